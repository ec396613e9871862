"""Change maps: what is kept is kept exactly, what is free is the plain sampler's, and between it is image-to-image."""

from __future__ import annotations

import math
import re

import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from lossguide.guidance import guide, recipes
from lossguide.guidance.adapters import normalised
from lossguide.guidance.cli import main
from lossguide.losses import read_image
from lossguide.samplers import TimeTravel, denoiser, load_demo, sample
from models import Gaussian, tiny_stable_diffusion, tiny_unet, vp_scheduler
from pipelines import PIPELINES
from test_modular import made as modular_pipeline
from torchvision.utils import save_image

SOURCE = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
HALF = torch.zeros(8, 8)
HALF[4:] = 1.0  # the lower half is free


def brighter(image):
    return (image - 0.9).square().flatten(1).mean(1)


def model(scheduler=None):
    return denoiser(tiny_unet(), scheduler or vp_scheduler(prediction_type="v_prediction"))


SCHEDULERS = [
    vp_scheduler(prediction_type="v_prediction"),
    DDPMScheduler(prediction_type="v_prediction"),
    EulerDiscreteScheduler(prediction_type="v_prediction"),
    EulerAncestralDiscreteScheduler(prediction_type="v_prediction"),
    DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    FlowMatchEulerDiscreteScheduler(),
]
TRAVELLING = recipes.auto(brighter, time_travel=TimeTravel(2, 0.0, 0.9), clock="steps")
PAIRS = [(scheduler, guidance) for scheduler in SCHEDULERS for guidance in (None, TRAVELLING)]


@pytest.mark.parametrize("scheduler, guidance", [*PAIRS, (SCHEDULERS[0], recipes.mpgd(brighter))])
def test_ones_are_the_plain_sampler_and_zeros_the_source(scheduler, guidance):
    options = dict(steps=4, seeds=[3, 4])
    plain = sample(model(scheduler), guidance, **options)
    free = sample(model(scheduler), guidance, source=SOURCE, change_map=torch.ones(8, 8), **options)
    assert torch.equal(free.samples, plain.samples)
    kept = sample(model(scheduler), guidance, source=SOURCE, change_map=0.0, **options)
    assert torch.equal(kept.samples, (2 * SOURCE - 1).expand(2, -1, -1, -1))
    assert torch.equal(kept.images, SOURCE.expand(2, -1, -1, -1))
    half = sample(model(scheduler), guidance, source=SOURCE, change_map=HALF, **options)
    assert torch.equal(half.images[:, :, :4], SOURCE[:, :4].expand(2, -1, -1, -1))
    assert not torch.isclose(half.samples[:, :, 4:], 2 * SOURCE[:, 4:] - 1, atol=1e-3).any(dim=1).all()


@pytest.mark.parametrize("guidance", [None, TRAVELLING, recipes.mpgd(brighter)], ids=["plain", "auto", "mpgd"])
def test_a_picture_does_not_depend_on_its_batch(guidance):
    maps = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    pictures = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    together = sample(model(), guidance, steps=5, seeds=[5, 6, 7], source=pictures, change_map=maps)
    split = sample(model(), guidance, steps=5, seeds=[5, 6, 7], source=pictures, change_map=maps, batch_size=2)
    alone = sample(model(), guidance, steps=5, seeds=[7], source=pictures[2], change_map=maps[2])
    assert torch.allclose(split.samples, together.samples, atol=1e-4)
    assert torch.allclose(alone.samples[0], together.samples[2], atol=1e-4)


@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
def test_a_number_is_image_to_image_of_that_strength(strength):
    """From the same noise, at the level where image-to-image of that strength begins."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    unet, steps = tiny_unet(), 20
    drawn = sample(denoiser(unet, scheduler), steps=steps, seeds=[1], eta=0.0, source=SOURCE, change_map=strength)
    scheduler.set_timesteps(steps)
    first = steps - int(steps * strength)
    source = torch.Generator().manual_seed(1 ^ 0x6B657074)  # a draw per level up to this one
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    if first:
        noise = [torch.randn(3, 8, 8, generator=source) for _ in range(first + 1)][-1]
        x = scheduler.add_noise(2 * SOURCE[None] - 1, noise[None], scheduler.timesteps[first : first + 1])
    with torch.no_grad():
        for t in scheduler.timesteps[first:]:
            x = scheduler.step(unet(x, t).sample, t, x, eta=0.0).prev_sample
    assert torch.allclose(drawn.samples, x, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("multistep", [False, True])
def test_variance_of_independent_gaussian_pixels(eta, multistep):
    """A pixel of N(0, c) with map m starts from `a_m y + s_m n`, and every step is an affine map of its own: mean and
    variance in closed form."""
    variance, y, steps = 0.3, 0.8, 20
    strengths = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    prior = Gaussian(torch.zeros(5), variance * torch.eye(5))
    scheduler = vp_scheduler()
    if multistep:
        scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", timestep_spacing="trailing", solver_order=1)
    made = prior.denoiser(vectors=20000)
    made = denoiser(made.model, scheduler, kind="epsilon", shape=made.shape, decode=made.decode)
    source = torch.full((1, 20000, 5), y)
    drawn = sample(made, steps=steps, seeds=[0], eta=eta, source=source, change_map=strengths.expand(20000, 5))
    scheduler.set_timesteps(steps)
    signal = [*scheduler.alphas_cumprod[scheduler.timesteps].double().tolist(), 1.0]
    for i, strength in enumerate(strengths.tolist()):
        first = steps - math.floor(steps * strength)
        a2 = signal[first]
        mean, spread = (math.sqrt(a2) * y, 1 - a2) if strength < 1 else (0.0, 1.0)
        for now, then in zip(signal[first:-1], signal[first + 1 :]):
            noise = 0.0 if multistep else eta**2 * (1 - then) / (1 - now) * (1 - now / then)
            slope = math.sqrt(now) * variance / (now * variance + 1 - now)  # of x0 in x
            of_noise = (1 - math.sqrt(now) * slope) / math.sqrt(1 - now)
            step = math.sqrt(then) * slope + math.sqrt(max(0.0, 1 - then - noise)) * of_noise
            mean, spread = step * mean, step**2 * spread + noise
        pixel = drawn.samples[0, 0, :, i].double()
        assert pixel.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(spread / 20000) + 1e-6)
        assert pixel.var().item() == pytest.approx(spread, rel=0.05, abs=1e-9)


def test_the_rest_comes_nearer_to_its_law_given_what_is_kept():
    """Two correlated pixels, one kept: the other moves toward its conditional mean, time travel brings it nearer."""
    rho, y = 0.9, 1.5
    prior = Gaussian(torch.zeros(2), torch.tensor([[1.0, rho], [rho, 1.0]]))
    source, change_map = torch.full((1, 4000, 2), y), torch.tensor([0.0, 1.0]).expand(4000, 2)
    travelling = recipes.shen(
        lambda x: 0 * x.flatten(1).sum(1), time_travel=TimeTravel(4), augment=None, smoothing=None
    )
    means, made = [], prior.denoiser(4000)
    for guidance in (None, travelling):
        drawn = sample(made, guidance, steps=40, seeds=[0], source=source, change_map=change_map)
        means.append(drawn.samples[..., 1].mean().item())
        assert torch.equal(drawn.samples[..., 0], source[None, ..., 0])
    assert 0.5 * rho * y < means[0] < means[1] < 1.02 * rho * y
    assert rho * y - means[1] < 0.5 * (rho * y - means[0])


def test_no_guidance_where_the_source_is_kept():
    seen = []

    def spy(image):
        image.register_hook(lambda gradient: seen.append(gradient.abs().amax((0, 1, 3))))
        return brighter(image)

    result = sample(model(), recipes.auto(spy, augment=None), steps=4, seeds=[0], source=SOURCE, change_map=HALF)
    assert seen[0].min() > 0  # the loss itself sees, and pulls at, the whole picture
    none = sample(model(), recipes.auto(brighter), steps=4, seeds=[0], source=SOURCE, change_map=0.3)
    lengths = [row["gradient_norm"].item() for row in none.record.guided]
    assert lengths[:2] == [0.0, 0.0]  # three quarters of the steps are left, half of them: nothing is free
    assert lengths[-1] > 0 and all(row["gradient_norm"] > 0 for row in result.record.guided)


def test_particles_and_anchors_keep_the_source():
    for guidance in (recipes.fk_steering(brighter), recipes.tds(brighter), recipes.red_diff(brighter)):
        drawn = sample(model(), guidance, steps=5, seeds=[0, 1], source=SOURCE, change_map=HALF)
        assert torch.equal(drawn.images[:, :, :4], SOURCE[:, :4].expand(2, -1, -1, -1))


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(), UniPCMultistepScheduler(), PNDMScheduler()])
def test_solvers_that_start_again_are_refused(scheduler):
    with pytest.raises(ValueError, match="does not: choose DDIM, Euler or DPM-Solver"):
        sample(model(scheduler), steps=4, source=SOURCE, change_map=HALF)


def test_what_cannot_be_is_told():
    for wrong, told in [
        (dict(source=SOURCE), "pass a change_map"),
        (dict(change_map=HALF), "pass the source"),
        (dict(source=SOURCE, change_map=2 * HALF), r"in \[0, 1\]"),
        (dict(source=2 * SOURCE, change_map=HALF), r"in \[0, 1\]"),
        (dict(source=SOURCE[:, :4], change_map=HALF), "source is of shape"),
        (dict(source=SOURCE, change_map=HALF[:4]), "does not fit"),
        (dict(source=SOURCE.expand(3, -1, -1, -1), change_map=HALF), "3 sources for 2 pictures"),
    ]:
        with pytest.raises(ValueError, match=told):
            sample(model(), steps=2, seeds=[0, 1], **wrong)


@pytest.mark.parametrize("name", ["sdxl", "flux", "sdxl, modular"])
def test_other_pipelines_too(name):
    """Packed latents, timesteps chosen after the latents, blocks: ones are the plain call, zeros the source."""
    name, modular = name.split(",")[0], "modular" in name
    pipe = modular_pipeline(name) if modular else PIPELINES[name].build()
    options = PIPELINES[name].options(1, 0) | dict(num_inference_steps=3)
    options = {k: v for k, v in options.items() if k not in ("output_type", "guidance_scale")}
    options |= dict(output="latents", output_type="latent") if modular else dict(output_type="latent")
    source = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(3))

    def call(pipe):
        out = pipe(**options, generator=[torch.Generator().manual_seed(1)])
        return out if modular else out.images

    assert torch.equal(call(guide(pipe, None, source=source, change_map=1.0)), call(pipe))
    kept = call(guide(pipe, None, source=source, change_map=0.0))
    z = normalised(pipe.vae.encode(2 * source[None] - 1).latent_dist.mode(), pipe.vae)
    z = FluxPipeline._pack_latents(z, *z.shape) if name == "flux" else z
    assert torch.allclose(kept, z, atol=1e-5)


def test_pipelines_that_cannot_say_so():
    source = torch.rand(3, 16, 16)
    for name, told in [
        ("ddim", "use its text-to-image pipeline, or sample"),
        ("sd-img2img", "use its text-to-image pipeline"),
        ("sd-inpaint", "a mask of its own"),
        ("qwen-image", "how QwenImagePipeline encodes"),
    ]:
        with pytest.raises(ValueError, match=told):
            guided = guide(PIPELINES[name].build(), None, source=source, change_map=0.5)
            guided(**PIPELINES[name].options(1, 0), generator=[torch.Generator().manual_seed(1)])
    pipe, options = PIPELINES["sd"].build(), PIPELINES["sd"].options(1, 0)
    for wrong, told in [
        (dict(source=source), "belong together"),
        (dict(source=torch.rand(3, 32, 32), change_map=1.0), "as large as the picture"),
        (dict(source=source, change_map=torch.rand(8, 8)), "of its source's size"),
        (dict(source=source, change_map=2.0), r"in \[0, 1\]"),
        (dict(source=source.expand(3, -1, -1, -1), change_map=1.0), "3 sources for 1 pictures"),
    ]:
        with pytest.raises(ValueError, match=told):
            guide(pipe, None, **wrong)(**options, generator=[torch.Generator().manual_seed(1)])


def test_a_latent_pipeline_keeps_and_changes_its_latents():
    pipe = tiny_stable_diffusion()
    source = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(3))
    change_map = torch.zeros(16, 16)
    change_map[8:] = 1.0
    z = pipe.vae.encode(2 * source[None] - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    options = dict(prompt="a b", height=16, width=16, num_inference_steps=5, output_type="latent", eta=1.0)

    def call(pipe):
        return pipe(**options, generator=[torch.Generator().manual_seed(1)]).images

    for guidance in (None, TRAVELLING):
        plain = call(pipe if guidance is None else guide(pipe, guidance))
        assert torch.equal(call(guide(pipe, guidance, source=source, change_map=1.0)), plain)
        kept = call(guide(pipe, guidance, source=source, change_map=0.0))
        assert torch.allclose(kept, z, atol=1e-6)
        half = call(guide(pipe, guidance, source=source, change_map=change_map))
        middle = half.shape[-2] // 2
        assert torch.equal(half[:, :, :middle], kept[:, :, :middle])
        assert (half[:, :, middle:] - kept[:, :, middle:]).abs().mean() > 0.05


def test_on_the_command_line(tmp_path):
    """`generate --source --change-map`: what is black in the map comes out as it went in."""
    picture = load_demo().shape
    source = torch.rand(3, *picture[1:], generator=torch.Generator().manual_seed(0)).mean(0, keepdim=True)
    change_map = torch.zeros_like(source)
    change_map[:, 16:] = 1.0
    for name, image in (("source", source), ("map", change_map)):
        save_image(image, tmp_path / f"{name}.png")
    base = ["generate", "dress", "--steps", "2", "--num-images", "1", "--quiet", "--out", str(tmp_path / "out")]
    given = ["--source", str(tmp_path / "source.png")]
    result = CliRunner().invoke(main, [*base, *given, "--change-map", str(tmp_path / "map.png")])
    assert result.exit_code == 0, result.output
    before, after = (read_image(tmp_path / name) for name in ("source.png", "out/00000.png"))
    assert torch.equal(before[:, :16], after[:, :16]) and not torch.equal(before[:, 16:], after[:, 16:])
    for wrong, told in [(given, "belong together"), ([*given, "--change-map", "2"], r"in \[0, 1\]")]:
        result = CliRunner().invoke(main, [*base, *wrong], standalone_mode=False)
        assert result.exit_code and re.search(told, str(result.exception))
