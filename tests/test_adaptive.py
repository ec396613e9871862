"""The trainer of learned noise schedules: its bound against closed forms, its models as the library knows them."""

from __future__ import annotations

import math

import pytest
import torch
from lossguide.guidance import recipes
from lossguide.samplers import denoiser, sample
from lossguide.samplers.gamma import PolynomialGamma, ScalarGamma, alpha, check_monotone, sigma
from lossguide.samplers.likelihood import elbo_bpd
from lossguide.samplers.multivariate import MultivariateScheduler
from models import tiny_unet
from torch.distributions import Normal, kl_divergence

from benchmarks import adaptive_noise
from benchmarks.adaptive import train as training
from benchmarks.adaptive.bound import (
    diffusion_nats,
    latent_nats,
    low_discrepancy_times,
    prior_nats,
    reconstruction_nats,
)
from benchmarks.adaptive.data import as_sample
from benchmarks.adaptive.evaluate import bits, mean_and_error
from benchmarks.adaptive.model import VARIANTS, AdaptiveModel, denoiser_of, draw, folder_of, load, scheduler_of
from benchmarks.adaptive.train import train, trained

TINY = dict(sample_size=8, channels=(8, 16))


def pictures(count: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def bent(shape: tuple[int, ...]) -> PolynomialGamma:
    """A path of each pixel's own."""
    gamma = PolynomialGamma(shape)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gamma.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return gamma


def paths(shape: tuple[int, ...]) -> list:
    return [ScalarGamma(), bent(shape)]


def as_v(x0, x, gamma):
    a, s = alpha(gamma), sigma(gamma)
    return a * (x - a * x0) / s - s * x0


def brighter(image):
    return (image - 0.9).square().flatten(1).mean(1)


def close(values: torch.Tensor, truth: float) -> None:
    """The mean is the truth, within four standard errors."""
    mean, error = mean_and_error(values)
    assert abs(mean - truth) < 4 * error + 1e-6
    assert error < 0.03 * abs(truth)


@pytest.mark.parametrize("gamma", paths((1, 2, 2)), ids=["straight", "bent"])
def test_diffusion_part_of_gaussians_is_the_closed_form_on_every_path(gamma):
    """For N(0, c) and its exact denoiser: half the integral of `c / (c + e^gamma)` over gamma."""
    torch.manual_seed(0)
    c, count = 0.4, 40000
    x = c**0.5 * torch.randn(count, 1, 2, 2)

    def exact(x, gamma, z):
        a, s = alpha(gamma), sigma(gamma)
        return as_v(a * c / (a**2 * c + s**2) * x, x, gamma)

    found = diffusion_nats(exact, gamma, x, low_discrepancy_times(count), torch.randn_like(x))
    first, last = gamma.minimum, gamma.maximum
    one = 0.5 * (last - first - math.log(c + math.exp(last)) + math.log(c + math.exp(first)))
    close(found.detach(), 4 * one)


@pytest.mark.parametrize("gamma", paths((1, 2, 2)), ids=["straight", "bent"])
def test_whole_bound_of_black_and_white_pixels_is_their_entropy(gamma):
    """Pixels black or white with probability one half: `log 2` nats each, on every path."""
    torch.manual_seed(0)
    count = 40000
    x = as_sample(255 * torch.randint(0, 2, (count, 1, 2, 2)))

    def exact(x, gamma, z):
        return as_v(torch.tanh(alpha(gamma) / sigma(gamma) ** 2 * x), x, gamma)

    total = diffusion_nats(exact, gamma, x, low_discrepancy_times(count), torch.randn_like(x))
    rebuilt = reconstruction_nats(gamma, x, torch.randn_like(x))
    assert rebuilt.mean() < 0.04  # a value's neighbours are six deviations away
    close((total + prior_nats(gamma, x) + rebuilt - rebuilt.mean()).detach(), 4 * math.log(2))


def test_other_parts_are_what_they_are_called():
    torch.manual_seed(0)
    gamma, x = bent((1, 2, 2)), as_sample(torch.randint(0, 256, (5, 1, 2, 2)))
    end = gamma(torch.tensor(1.0))
    law = Normal(alpha(end) * x, sigma(end).expand_as(x))
    assert torch.allclose(prior_nats(gamma, x), kl_divergence(law, Normal(0.0, 1.0)).flatten(1).sum(1), atol=1e-5)
    mean, log_variance = torch.randn(5, 3), torch.randn(5, 3)
    law = Normal(mean, (0.5 * log_variance).exp())
    assert torch.allclose(latent_nats(mean, log_variance), kl_divergence(law, Normal(0.0, 1.0)).sum(1), atol=1e-5)
    wide = ScalarGamma(minimum=-8.0)  # one deviation is 2.3 steps of the eight bits: what rounding hides is lost
    draws = torch.stack([reconstruction_nats(wide, x, torch.randn_like(x)) for _ in range(4000)])
    step = math.exp(4.0) * 2 / 255  # in deviations
    inner = x.flatten(1).abs().amax(1) < 0.9
    entropy = 0.5 * math.log(2 * math.pi * math.e) - math.log(step)  # of a normal law on a fine grid
    assert draws.mean(0)[inner].mean().item() == pytest.approx(4 * entropy, rel=0.02)


def test_times_are_even_and_each_uniform():
    torch.manual_seed(0)
    times = torch.stack([low_discrepancy_times(8) for _ in range(2000)])
    assert torch.equal((times * 8).floor().sort(1).values, torch.arange(8.0).expand(2000, 8))
    assert times[:, 0].mean().item() == pytest.approx(0.5, abs=0.03)
    assert times[:, 0].var().item() == pytest.approx(1 / 12, rel=0.1)


@pytest.mark.parametrize("variant", ["polynomial", "polynomial-latent"])
def test_training_lowers_the_bound_and_leaves_a_schedule(variant, tmp_path):
    images = (pictures()[:, :, :1, :1] // 128 * 255).expand(-1, -1, 8, 8).contiguous()  # black or white
    facts = train(variant, 0, tmp_path, images, steps=100, batch=8, peak=3e-3, **TINY)
    assert facts["steps"] == 100 and facts["curve"][0][0] == 100
    model = load(tmp_path)
    torch.manual_seed(0)
    before = bits(AdaptiveModel(**VARIANTS[variant], **TINY).eval(), images)["total"]
    after = bits(model, images)["total"]
    assert after.mean() < before.mean() - 0.5
    z = torch.randn(1, model.gamma.latent) if model.gamma.latent else None
    check_monotone(model.gamma, z)
    ends = [model.gamma(torch.tensor(t), z) for t in (0.0, 1.0)]
    assert torch.allclose(ends[0], torch.tensor(-13.3)) and torch.allclose(ends[1], torch.tensor(5.0))
    middle = model.gamma(torch.tensor(0.5), z)
    assert middle.std() > 0.01


def test_a_stopped_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    options = dict(steps=4, batch=4, **TINY)
    assert train("polynomial", 0, tmp_path, pictures(), minutes=0, **options) is None
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 1
    with pytest.raises(ValueError, match="is of a run with"):
        train("scalar", 0, tmp_path, pictures(), **options)
    assert train("polynomial", 0, tmp_path, pictures(), **options)["steps"] == 4
    out = folder_of("polynomial", 0, tmp_path)
    tmp_path.joinpath("training.json").rename(out.mkdir() or out / "training.json")
    assert trained("polynomial", 0, tmp_path)["batch"] == 4  # not trained again


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_are_saved_drawn_and_guided(variant, tmp_path):
    torch.manual_seed(0)
    model = AdaptiveModel(**VARIANTS[variant], **TINY).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # near v = 0, which is a denoiser of standard normal pixels
            parameter += (1e-3 if "conv_out" in name else 0.1) * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    scheduler_of(model).save_pretrained(tmp_path / "scheduler")
    (tmp_path / "training.json").write_text("{}")
    back, scheduler = load(tmp_path), MultivariateScheduler.from_pretrained(tmp_path / "scheduler")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), back.parameters()))
    z = torch.randn(1, model.gamma.latent) if model.gamma.latent else None
    assert torch.equal(scheduler.gamma(torch.tensor(0.3), z), model.gamma(torch.tensor(0.3), z))
    plain, guided = (draw(back, how, seeds=[0, 1, 2], steps=16) for how in (None, recipes.dps(brighter)))
    assert plain.images.shape == (3, 1, 8, 8) and guided.record.guided
    assert brighter(guided.images).mean() < brighter(plain.images).mean()
    alone = draw(back, seeds=[2], steps=16)
    assert torch.allclose(alone.samples[0], plain.samples[2], atol=1e-4)
    if not model.config.latent:  # as any other model of the library
        again = sample(denoiser(back, scheduler), seeds=[0, 1, 2], steps=16)
        assert torch.allclose(again.samples, plain.samples, atol=1e-5)


@pytest.mark.parametrize("variant", ["scalar", "polynomial"])
def test_the_librarys_likelihood_agrees(variant):
    torch.manual_seed(0)
    model, images = AdaptiveModel(**VARIANTS[variant], **TINY).eval(), pictures()
    with torch.no_grad():
        for parameter in model.gamma.parameters():
            parameter += torch.randn_like(parameter)
    own = bits(model, images, times=32)
    theirs = elbo_bpd(denoiser_of(model), images.float() / 255, times=32)
    assert torch.allclose(own["prior"], theirs.terms["prior"].float(), atol=1e-5)
    apart = own["diffusion"] - theirs.terms["diffusion"].float()
    mean, error = mean_and_error(apart)
    assert abs(mean) < 4 * error and error < 0.1


def test_noise_of_the_comparison_is_the_same_for_all_models():
    """A latent that does nothing changes the latent's part alone."""
    torch.manual_seed(0)
    plain = AdaptiveModel(**TINY).eval()  # untrained: v = 0
    latent = AdaptiveModel("scalar", 4, **TINY).eval()
    images = pictures(20)
    one, other = bits(plain, images), bits(latent, images)
    assert torch.allclose(one["diffusion"], other["diffusion"], rtol=1e-4)
    assert torch.allclose(one["total"] + other["latent"], other["total"], rtol=1e-4)


def test_what_cannot_be_is_told(tmp_path):
    with pytest.raises(ValueError, match="scalar or polynomial"):
        AdaptiveModel("cosine")
    with pytest.raises(ValueError, match="has a latent"):
        denoiser_of(AdaptiveModel("scalar", 4, **TINY))
    with pytest.raises(FileNotFoundError, match="benchmarks.adaptive.train"):
        load(tmp_path)
    with pytest.raises(TypeError, match="told one time for all"):
        denoiser(tiny_unet(1), scheduler_of(AdaptiveModel("polynomial", **TINY)))
    with pytest.raises(ValueError, match="there is no variant 'cosine'"):
        adaptive_noise.run(only=("cosine",))
