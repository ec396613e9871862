"""Likelihoods of pictures: closed forms on every path, discrete values, errors told, refusals, the meter, reranking."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from lossguide.guidance import cli_rerank
from lossguide.guidance.cli_rerank import likeliest
from lossguide.samplers import denoiser, likelihood, load_demo
from lossguide.samplers.gamma import PolynomialGamma, ScalarGamma
from lossguide.samplers.likelihood import elbo_bpd, ode_bpd
from lossguide.samplers.multivariate import MultivariateScheduler
from lossguide.samplers.paths import path_of
from models import identity, tiny_unet, vp_scheduler

pytest.importorskip("fcntl")  # of benchmarks.rows

from test_cli import fails, models, place, run, works  # noqa: E402, F401

from benchmarks import laws, meter, report, trial  # noqa: E402
from benchmarks.demo.data import available, fashion_mnist  # noqa: E402
from benchmarks.laws import BELL, BELLS, POINTS, log_density, told, told_per_pixel  # noqa: E402
from benchmarks.task import Method, Task  # noqa: E402
from benchmarks.work import Pictures, Work  # noqa: E402

SCHEDULERS = {
    "vp": lambda: vp_scheduler(),
    "vp, v": lambda: vp_scheduler(prediction_type="v_prediction"),
    "vp, sample": lambda: vp_scheduler(prediction_type="sample"),
    "cosine": lambda: vp_scheduler(beta_schedule="squaredcos_cap_v2"),
    "zero snr": lambda: vp_scheduler(rescale_betas_zero_snr=True),
    "Euler": EulerDiscreteScheduler,
    "Euler, Karras": lambda: EulerDiscreteScheduler(use_karras_sigmas=True, prediction_type="v_prediction"),
    "EDM": EDMEulerScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
    "flow, shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def per_pixel(vectors: int):
    return told_per_pixel(BELL, laws.two_clocks(), vectors)


def models_of(name: str, law, vectors: int):
    return per_pixel(vectors) if name == "per pixel" else told(law, SCHEDULERS[name](), vectors)


@pytest.mark.parametrize("name", [*SCHEDULERS, "per pixel"])
def test_the_bound_of_a_gaussian_is_its_density_on_every_path(name, monkeypatch):
    monkeypatch.setattr(likelihood, "randn", laws.balanced(2))  # means over the noise are exact
    x = POINTS[:, None, None].expand(-1, 1, 4, 2).contiguous()
    found = elbo_bpd(models_of(name, BELL, 4), x, bits=None, times=1500)
    assert (found.log_likelihood / 4 - log_density(BELL, POINTS)).abs().max() < 1e-3
    assert found.latent and found.dimensions == 8
    assert torch.allclose(sum(found.terms.values()), found.bpd)


@pytest.mark.parametrize("name", [*SCHEDULERS, "per pixel"])
def test_the_density_along_the_ode_is_the_gaussians(name):
    found = ode_bpd(models_of(name, BELL, 1), POINTS[:, None, None], bits=None, steps=60)
    assert (found.log_likelihood - log_density(BELL, POINTS)).abs().max() < 1e-3
    assert (found.standard_error == 0).all() and found.settings["exact"]


@pytest.mark.parametrize("name", ["vp", "EDM", "flow"])
@pytest.mark.parametrize("solver", [dict(steps=60), dict(solver="scipy", tolerance=1e-6)])
def test_the_density_along_the_ode_is_the_mixtures(name, solver):
    found = ode_bpd(models_of(name, BELLS, 1), POINTS[:, None, None], bits=None, **solver)
    assert (found.log_likelihood - log_density(BELLS, POINTS)).abs().max() < 1e-3


def test_the_error_bar_is_the_spread_over_seeds():
    x = POINTS[1].view(1, 1, 1, 2).expand(400, 1, 4, 2).contiguous()
    found = elbo_bpd(told(BELL, FlowMatchEulerDiscreteScheduler(), 4), x, bits=None, times=64)
    spread, claimed = found.bpd.std(), found.standard_error.mean()
    assert 0.8 < claimed / spread < 1.3
    truth = -log_density(BELL, POINTS[1]) / 2 / math.log(2)
    assert abs(found.bpd.mean() - truth) < 4 * spread / 400**0.5 + 0.02  # the times of callables are shared


class Values(laws.Exact):
    """Pairs of values in 2 bits with a law of their own, drawn at random: what is known of them is known exactly."""

    dimension = 2

    def __init__(self):
        grid = torch.linspace(-1, 1, 4, dtype=torch.float64)
        self.values = torch.cartesian_prod(grid, grid)
        self.shares = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(0)

    def x0(self, x, a, s):
        likely = self.shares.log() - ((x[..., None, :] - a * self.values) ** 2).sum(-1) / (2 * s**2)
        return likely.softmax(-1) @ self.values


def test_the_bound_of_discrete_values_is_their_probability():
    law, vectors = Values(), 1500
    model = dataclasses.replace(told(law, vp_scheduler(), vectors), decode=likelihood.as_picture)
    pictures = (law.values.float() / 2 + 0.5)[:3, None, None].expand(-1, 1, vectors, 2)
    found = elbo_bpd(model, pictures, bits=2, times=128)
    truth = -law.shares[:3].log2() / 2
    assert (found.bpd - truth).abs().max() < 0.03  # of about 2 bits; the error of so many draws
    assert not found.latent
    # what is drawn to one side of the two nearest values of a bin costs nothing more
    assert found.terms["reconstruction"].max() < 1e-3


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_decoder_gives_all_values_one_probability_in_all(bits):
    grid = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)[:, None]
    means = torch.tensor([-1.3, -1.0, -0.2, 0.4999, 1.0, 2.0], dtype=torch.float64)
    for spread in (0.01, 0.3):
        shares = (-likelihood._coded(grid, means, torch.tensor(spread), bits)).exp()
        assert torch.allclose(shares.sum(0), torch.ones(6, dtype=torch.float64), atol=1e-9)


def test_dequantised_pictures_get_the_density_and_its_offset():
    law = laws.Gaussian(torch.zeros(2), 0.2 * torch.eye(2))
    model = dataclasses.replace(told(law, FlowMatchEulerDiscreteScheduler(), 1), decode=likelihood.as_picture)
    pictures = torch.tensor([[0.4, 0.7], [0.5, 0.55]]).view(2, 1, 1, 2)
    found = ode_bpd(model, pictures, bits=8, steps=40, probes=4)
    x = (pictures[:, 0, 0] * 255).round() / 255 * 2 - 1
    truth = -log_density(law, x) / 2 / math.log(2) + math.log2(255 / 2)
    assert torch.allclose(found.bpd, truth, atol=0.03)  # the dequantisation moves a value by up to 0.004
    assert 0 < found.standard_error.max() < 0.03
    offset = found.terms["dequantisation"]
    assert torch.allclose(offset, torch.full_like(offset, 6.994), atol=1e-3)


def a_unet(**scheduler):
    return denoiser(tiny_unet(1), vp_scheduler(**scheduler))


def some_pictures(count=3):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_hutchinsons_estimate_agrees_with_the_trace():
    model = dataclasses.replace(a_unet(), shape=(1, 4, 4))
    x = some_pictures(2)[..., :4, :4] * 2 - 1
    exact = ode_bpd(model, x, bits=None, steps=2)
    guessed = ode_bpd(model, x, bits=None, steps=2, exact=False, probes=8)
    assert exact.settings["exact"] and (guessed.standard_error > 0).all()
    assert ((guessed.bpd - exact.bpd).abs() < 4 * guessed.standard_error).all()


@pytest.mark.parametrize("of", [lambda *a, **k: elbo_bpd(*a, times=6, **k), lambda *a, **k: ode_bpd(*a, steps=2, **k)])
def test_a_picture_is_as_likely_in_any_batch(of):
    model, pictures = a_unet(), some_pictures()
    before = [p.requires_grad for p in model.model.parameters()]
    whole = of(model, pictures, seeds=[5, 6, 7])
    alone = of(model, pictures[2:], seeds=[7])
    assert torch.allclose(whole.bpd[2:], alone.bpd, atol=1e-4)
    assert torch.allclose(of(model, pictures, seeds=[5, 6, 7], batch_size=2).bpd, whole.bpd, atol=1e-4)
    assert not torch.allclose(of(model, pictures, seeds=[8, 9, 10]).bpd, whole.bpd, atol=1e-4)
    assert torch.equal(of(model, pictures.expand(-1, 3, -1, -1), seeds=[5, 6, 7]).bpd, whole.bpd)
    assert [p.requires_grad for p in model.model.parameters()] == before
    assert not model.scheduler.num_inference_steps  # as it was


def test_the_model_is_asked_between_its_timesteps_or_only_at_them():
    asked = []
    unet = tiny_unet(1)

    def model(x, t):
        asked.append(t.clone())
        return unet(x, t).sample

    adapted = denoiser(model, vp_scheduler(), shape=(1, 8, 8))
    elbo_bpd(adapted, some_pictures(), times=8)
    assert all(t.dim() == 0 for t in asked) and any(t != t.round() for t in asked)
    asked.clear()
    elbo_bpd(adapted, some_pictures(), times=8, rounded=True)
    assert all(not t.is_floating_point() for t in asked) and max(asked) > 800 and min(asked) == 0


def test_timesteps_follow_the_scheduler():
    path = path_of(a_unet())
    assert path.batched  # a diffusers model
    cumulative = vp_scheduler().alphas_cumprod[500].double()
    gamma = ((1 - cumulative) / cumulative).log()
    assert abs(path._timestep(gamma) - 500) < 1e-3
    assert path.first == pytest.approx(math.log(1e-4 / (1 - 1e-4)), abs=1e-3)
    flow = path_of(denoiser(tiny_unet(1), FlowMatchEulerDiscreteScheduler()))
    assert abs(flow._timestep(torch.tensor(0.0, dtype=torch.float64)) - 500) < 1e-3  # half noise, half picture


def test_a_per_pixel_path_of_one_level_is_the_scalar_path():
    torch.manual_seed(0)
    net = torch.nn.Conv2d(2, 1, 3, padding=1)

    def seen(z, gamma):
        return net(torch.cat([z, gamma / 10], 1))

    shape = (1, 8, 8)
    first, last = -9.0, 8.0
    scalar = denoiser(seen, MultivariateScheduler(ScalarGamma(first, last)), shape=shape, per_pixel=True)
    ones = torch.ones(shape)
    schedule = PolynomialGamma.of(0 * ones, 0 * ones, ones, minimum=first, maximum=last)
    maps = denoiser(seen, MultivariateScheduler(schedule), shape=shape, per_pixel=True)
    for of in (lambda model: elbo_bpd(model, some_pictures(), times=8), lambda m: ode_bpd(m, some_pictures(), steps=3)):
        assert torch.allclose(of(scalar).bpd, of(maps).bpd, atol=1e-4)


def test_what_has_no_density_is_refused():
    unet, pictures = tiny_unet(1), some_pictures()
    for scheduler in (LCMScheduler(), CMStochasticIterativeScheduler()):
        with pytest.raises(ValueError, match="consistency model"):
            elbo_bpd(denoiser(unet, scheduler), pictures)
    with pytest.raises(ValueError, match="no density that can be read"):
        elbo_bpd(denoiser(unet, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)), pictures)
    latent = dataclasses.replace(a_unet(), decode=identity)
    with pytest.raises(ValueError, match="latents.*bits=None"):
        ode_bpd(latent, pictures)
    assert elbo_bpd(latent, pictures, bits=None, times=2).latent
    with pytest.raises(ValueError, match="depends on a latent"):
        schedule = MultivariateScheduler(PolynomialGamma((1, 8, 8), latent=2))
        elbo_bpd(denoiser(lambda z, gamma: z, schedule, shape=(1, 8, 8), per_pixel=True), pictures)
    with pytest.raises(TypeError, match="denoiser"):
        elbo_bpd(unet, pictures)


@pytest.mark.parametrize(
    ("pictures", "options", "message"),
    [
        (torch.rand(2, 1, 8, 9), {}, "shape"),
        (torch.rand(2, 3, 8, 8), {}, "not grey"),
        (torch.full((2, 1, 8, 8), math.nan), {}, "finite"),
        (255 * torch.rand(2, 1, 8, 8), {}, r"in \[0, 1\]"),
        (torch.rand(2, 1, 8, 8), dict(bits=0), "bits"),
        (torch.rand(2, 1, 8, 8), dict(seeds=[1]), "one integer per picture"),
        (torch.rand(2, 1, 8, 8), dict(times=1), "times"),
        (torch.rand(0, 1, 8, 8), {}, "no pictures"),
    ],
)
def test_bad_input_is_told(pictures, options, message):
    with pytest.raises(ValueError, match=message):
        elbo_bpd(a_unet(), pictures, **options)


def test_there_are_two_solvers():
    with pytest.raises(ValueError, match="rk4, scipy"):
        ode_bpd(a_unet(), some_pictures(), solver="heun")


def test_the_meter_tells_how_the_log_likelihood_changed():
    unguided, guided = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([3.5, 4.3, 5.7])
    mean, error = meter.change(guided, unguided)
    assert mean == pytest.approx(-0.5) and error == pytest.approx(0.2 / 3**0.5)
    row = dict(seeds=[0, 1, 2], per_picture={meter.FIGURE: guided.tolist()})
    plain = dict(seeds=[0, 1, 2], per_picture={meter.FIGURE: unguided.tolist()})
    assert meter.changed(row, plain) == pytest.approx((mean, error))
    assert meter.changed(dict(row, seeds=[3, 4, 5]), plain) is None
    assert meter.changed(dict(seeds=[0, 1, 2], per_picture={"accuracy": [1, 0, 1]}), plain) is None  # an older row
    with pytest.raises(ValueError, match="same seeds"):
        meter.change(guided[:2], unguided)
    assert meter.auc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])) == 0.875


def test_a_task_reports_the_log_likelihood_beside_its_methods():
    def loss(image):
        return (1 - image).square().flatten(1).mean(1)

    def judge(images):
        return {"hit": images.flatten(1).mean(1)}

    pictures = Pictures(range(3), lambda places: loss, judge)
    work = Work("tiny", "Bright", a_unet, lambda which: pictures, "hit", True, 1.0)
    methods = [Method("unguided", "unguided"), Method("dps", "dps")]
    task = Task([work], methods, budgets=(8,), dtype=torch.float32, likelihood=True)
    rows = [trial.Trial(task, work, method, "calls", 8).measure(8) for method in task.methods]
    text = "\n".join(report.summary(work, report.Measured(rows, task), "calls"))
    mean, error = meter.changed(rows[1], rows[0])
    assert "log-likelihood at 8, bits/dim" in text and f"{mean:+.3f} ± {error:.2g}" in text
    for row in rows:
        del row["per_picture"][meter.FIGURE]  # as rows that were measured before
    assert "log-likelihood" not in "\n".join(report.summary(work, report.Measured(rows, task), "calls"))


def test_the_likeliest_of_the_better_half_is_kept():
    losses = torch.tensor([[1.0, 0.1], [2.0, 0.2], [3.0, 0.3], [0.5, math.nan]])
    bits = torch.tensor([[4.0, 5.0], [1.0, 4.0], [0.0, 0.0], [4.5, 0.0]])
    assert likeliest(losses, bits).tolist() == [0, 1]


def test_generate_keeps_the_likeliest(place, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cli_rerank, "_TIMES", 4)
    words = ("generate", "--loss", "own.py:bright", "--recipe", "dps", "--steps", 3, "--num-images", 2, "-q")
    result = works(*words, "--rerank", "likelihood", "--rerank-from", 3, "--out", "out")
    assert "of the better half of 3" in result.stdout
    told = json.loads((place / "out" / "settings.json").read_text())["results"]["rerank"]
    losses, bits = torch.tensor(told["loss"]), torch.tensor(told["bits_per_dimension"])
    assert losses.shape == bits.shape == (2, 3)
    assert torch.equal(torch.tensor(told["kept"]), likeliest(losses.T, bits.T))
    assert sorted(p.name for p in (place / "out").glob("0*.png")) == ["00000.png", "00001.png"]
    works(*words, "--rerank", "likelihood", "--rerank-from", 3, "--out", "again", "--batch-size", 4)
    again = json.loads((place / "again" / "settings.json").read_text())["results"]["rerank"]
    assert again["kept"] == told["kept"] and again["seeds"] == told["seeds"]


def test_reranking_is_refused_where_it_cannot_be(models):  # noqa: F811
    words = ("generate", "--loss", "own.py:bright", "--steps", 3, "-q")
    assert "--rerank-from belongs to" in fails(*words, "--rerank-from", 4)
    assert "sheet" in fails(*words, "--num-images", 65, "--rerank", "likelihood")
    result = run(*words, "--model", models / "text", "--rerank", "likelihood")
    assert result.exit_code == 2 and "model of pixels" in result.stderr.splitlines()[-1]


@pytest.mark.skipif(not available(), reason="Fashion-MNIST is not on this machine")
def test_the_demo_finds_garments_likelier_than_their_negatives():
    model = load_demo()
    garments = fashion_mnist("test")[0][:3]
    real, negative = (elbo_bpd(model, x, times=8).bpd for x in (garments, 1 - garments))
    assert (real < negative).all() and 1 < real.mean() < 4
    along = ode_bpd(model, garments[:1], steps=10)
    assert (along.bpd - real[:1]).abs().max() < 0.7
    assert isinstance(model.scheduler, DDIMScheduler)


def test_pictures_in_half_precision_are_judged_in_full():
    """The same 8-bit pictures, which half precision holds well enough to find their bins."""
    image = torch.tensor([0, 51, 102, 255]).view(1, 1, 2, 2) / 255
    model = denoiser(lambda x, t: 0.3 * x, DDIMScheduler(), kind="epsilon", shape=(1, 2, 2))
    wanted = elbo_bpd(model, image, times=8).bpd
    torch.testing.assert_close(elbo_bpd(model, image.half(), times=8).bpd, wanted)
