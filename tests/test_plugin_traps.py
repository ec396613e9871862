"""Where stock pipelines do something unusual: what the plug-in must not get wrong without a word."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from lossguide.guidance import guide, recipes
from lossguide.losses import ClassLabel, ClipText, Frames
from lossguide.samplers import Solver, TimeTravel
from pipelines import PIPELINES
from test_pipelines import generators, made, options, result

TWICE = TimeTravel(2, 0.0, 1.0)


def squares(image):
    return (image - 0.8).square().flatten(1).mean(1)


def drawn(guided, name, *seeds, **changes):
    return result(name, guided(**options(name, len(seeds)) | changes, generator=generators(*seeds)))


def by_hand(pipe, given, forward, decode, x, step):
    """The gradient of the loss in the sample at a step, from the formulas."""
    solver = Solver.of(pipe.scheduler, given["num_inference_steps"])
    level, t = solver.levels[step], solver.timesteps[step]
    x = x.detach().requires_grad_(True)
    x0 = level.x0(forward(solver.model_input(x, step), t), x, solver.kind)
    return torch.autograd.grad(squares(decode(x0)).sum(), x)[0]


def test_the_gradient_through_stable_diffusion_is_that_of_the_formulas():
    pipe, given = made("sd"), options("sd", 2)
    texts = pipe.encode_prompt(given["prompt"], "cpu", 1, True, negative_prompt=given.get("negative_prompt"))
    both = torch.cat([texts[1], texts[0]])

    def forward(x, t):
        negative, positive = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample.chunk(2)
        return negative + given["guidance_scale"] * (positive - negative)

    def decode(z):
        return pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample / 2 + 0.5

    x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators(1, 2)])
    guided = guide(pipe, recipes.dps(squares))
    guided(**given, latents=x, generator=generators(1, 2))
    g = by_hand(pipe, given, forward, decode, x, 0)
    torch.testing.assert_close(guided.record.rows[0]["gradient_norm"], g.flatten(1).norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["flux", "mochi", "dit", "sd-inpaint"])
def test_the_denoisers_jacobian_is_not_lost(name):
    """Through the denoiser the gradient is another one than at x0, in half precision as in full."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = PIPELINES[name].build().to(dtype)
        given = {
            k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in options(name, 1).items()
        }
        norms = []
        for through in ("denoiser", "x0"):
            guided = guide(pipe, recipes.dps(lambda image: image.flatten(1).mean(1), strength=1e-6, through=through))
            guided(**given | dict(num_inference_steps=3), generator=generators(1))
            norms.append(torch.stack([row["gradient_norm"] for row in guided.record.rows]).flatten())
        assert ((norms[0] / norms[1]).log().abs() > 1e-3).any()
        found.append(norms[0])
    torch.testing.assert_close(found[1].float(), found[0], rtol=0.3, atol=0)


@pytest.mark.parametrize("name", ["sdxl-img2img", "flux-img2img", "sd3-img2img", "wan"])
def test_the_scheduler_steps_by_its_own_sigmas_under_time_travel(name, monkeypatch):
    pipe, seen = made(name), []
    own = type(pipe.scheduler).step

    def step(self, *args, **kwargs):
        seen.append((len(self.timesteps), len(self.sigmas), bool((self.sigmas.diff() < 0).all())))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", step)
    monkeypatch.setattr(step, "__wrapped__", own, raising=False)
    drawn(guide(pipe, recipes.dps(squares, time_travel=TWICE)), name, 1)
    assert set(seen) == {(10, 11, True)} and len(seen) > 10


@pytest.mark.parametrize("name", ["sd-img2img", "sdxl-img2img", "flux-img2img", "wan-v2v"])
def test_time_travel_from_the_middle_starts_where_the_plain_call_does(name):
    plain = guide(made(name), recipes.dps(squares, strength=0))
    drawn(plain, name, 1)
    guided = guide(made(name), recipes.dps(squares, time_travel=TWICE))
    drawn(guided, name, 1)
    steps = [row["step"] for row in plain.record.rows]
    assert steps[0] > 0 and [row["step"] for row in guided.record.rows] == [step for step in steps for _ in (0, 1)]


def test_a_call_that_ends_early_ends_without_gradients():
    def interrupts(pipe, step, timestep, tensors):
        pipe._interrupt = step == 3
        return tensors

    guided = guide(made("sd"), recipes.dps(squares))
    image = guided(**options("sd", 1) | dict(output_type="np"), callback_on_step_end=interrupts).images
    assert image.shape[0] == 1 and len(guided.record.rows) == 4
    guided = guide(made("sdxl"), recipes.dps(squares))
    for ending in (dict(output_type="np"), dict(output_type="latent"), dict(output_type="latent", return_dict=False)):
        output = guided(**options("sdxl", 1) | ending, denoising_end=0.5)
        image = output[0] if isinstance(output, tuple) else output.images
        assert not getattr(image, "requires_grad", False) and len(guided.record.rows) < 10


@pytest.mark.parametrize(
    "name, callback",
    [
        ("sd", SDCFGCutoffCallback(cutoff_step_ratio=0.5)),
        ("sdxl", SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)),
        ("sd", MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=0.5)])),
    ],
)
def test_diffusers_own_callbacks(name, callback):
    plain = drawn(made(name), name, 1, callback_on_step_end=callback)
    zero = guide(made(name), recipes.dps(squares, strength=0))
    assert torch.equal(drawn(zero, name, 1, callback_on_step_end=callback), plain)
    guided = guide(made(name), recipes.auto(squares))
    assert not torch.equal(drawn(guided, name, 1, callback_on_step_end=callback), plain)


def test_a_pipeline_that_copies_its_scheduler_gets_it_unsteered():
    class Copies(diffusers.DDIMPipeline):
        def __call__(self, *args, **kwargs):
            self.scheduler.set_timesteps(4)
            other = copy.deepcopy(self.scheduler)
            assert type(other) is diffusers.DDIMScheduler and "step" not in vars(other)
            x = torch.randn(1, 3, 8, 8)
            other.step(x, other.timesteps[0], x)
            return len(other.timesteps)

    pipe = Copies(**made("ddim").components)
    guided = guide(pipe, recipes.dps(squares, time_travel=TWICE))
    assert guided() == 4 and guided.record.rows == []


def test_a_scheduler_with_another_step_is_told():
    pipe = PIPELINES["cogvideox"].build()
    pipe.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="CogVideoXDPMScheduler takes more.*compatibles"):
        guide(pipe, recipes.dps(squares))(**options("cogvideox", 1), generator=generators(1))


def test_used_generators_give_other_draws():
    source, sums = torch.Generator().manual_seed(3), []
    guidance = recipes.auto(squares)
    for _ in range(2):
        guided = guide(made("sd"), guidance)
        guided(**options("sd", 1), latents=torch.ones(1, 4, 8, 8), generator=source)
        sums.append(guided.record.losses()[-1].item())
        torch.randn(1, generator=source)
    assert sums[0] != sums[1]


def test_losses_of_several_targets_are_told_how_many_pictures_there_are():
    given = options("sd", 2) | dict(num_images_per_prompt=2)
    for loss in (ClipText(["a bag", "a boot"], model="demo"), ClassLabel([1, 2])):
        with pytest.raises(ValueError, match="is for 2 pictures, one each, and 4 are drawn"):
            guide(made("sd"), recipes.auto(loss))(**given)


def test_picture_losses_are_told_of_videos():
    clip = ClipText("a bag", model="demo")
    with pytest.raises(ValueError, match=r"looks at pictures.*Frames"):
        drawn(guide(made("ltx"), recipes.auto(clip)), "ltx", 1)
    drawn(guide(made("ltx"), recipes.auto(Frames(clip, [0]))), "ltx", 1)


def test_offloaded_denoisers_are_refused_gradients():
    pipe = PIPELINES["sd"].build()
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match='offloaded.*through="x0"'):
        guide(pipe, recipes.dps(squares))(**options("sd", 1))


def test_what_is_no_loaded_pipeline_is_told():
    for wrong, told in ((diffusers.DDIMPipeline, "class DDIMPipeline"), ("some/model", "name 'some/model'")):
        with pytest.raises(TypeError, match=f"{told}.*from_pretrained"):
            guide(wrong, recipes.auto(squares))
    with pytest.raises(TypeError, match="vae is a diffusers autoencoder"):
        guide(made("sd"), recipes.auto(squares), vae="some/model")
    for wrong in (True, "preview", "no/such/folder/x.png"):
        with pytest.raises(ValueError, match="a preview goes to"):
            guide(made("sd"), recipes.auto(squares), preview=wrong)
    with pytest.raises(AttributeError, match="did you mean 'auto'"):
        recipes.atuo  # noqa: B018
    with pytest.raises(TypeError, match="ClipText"):
        recipes.auto("a red fox")
