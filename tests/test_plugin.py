"""The plug-in on stock pipelines: identity at strength 0, pipelines left as found, batches, time travel, latents."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler
from lossguide.guidance import guide, recipes
from lossguide.samplers import TimeTravel, denoiser, sample
from models import tiny_stable_diffusion, tiny_unet, vp_scheduler


def auto(loss, **changes):
    """The default, with a time travel of two visits in five steps of ten."""
    return recipes.auto(loss, **{"time_travel": TimeTravel(2, 0.25, 0.75), "clock": "steps"} | changes)


def squares(image):
    return (image - 0.8).square().flatten(1).mean(1)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def ddim():
    pipe = DDIMPipeline(tiny_unet(), vp_scheduler(prediction_type="v_prediction", clip_sample=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(batch_size=2, eta=1.0)


def ddpm():
    pipe = DDPMPipeline(tiny_unet(), DDPMScheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(batch_size=2)


def stable_diffusion():
    return tiny_stable_diffusion(), dict(prompt=["a b", "b a"], height=16, width=16, eta=1.0)


def stable_diffusion_euler():
    pipe = tiny_stable_diffusion()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe, dict(prompt=["a b", "b a"], height=16, width=16)


PIPELINES = [ddim, ddpm, stable_diffusion, stable_diffusion_euler]


@pytest.fixture(params=PIPELINES, ids=lambda make: make.__name__)
def stock(request):
    pipe, options = request.param()
    return pipe, dict(options, num_inference_steps=10, output_type="pt")


def images(call, options, *seeds):
    return call(**options, generator=generators(*seeds)).images.float().cpu()


def state(pipe):
    """What a pipeline must still be after a call."""
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    return (
        pipe.scheduler,
        dict(vars(pipe.scheduler)),
        sorted(vars(pipe)),
        [p.requires_grad for m in modules for p in m.parameters()],
        [len(m._forward_pre_hooks) for m in modules],
        torch.is_grad_enabled(),
        dict(pipe.config),
    )


def test_strength_zero_or_no_loss_is_bitwise_the_plain_call(stock):
    pipe, options = stock
    plain = images(pipe, options, 1, 2)
    for guidance in (auto(squares, strength=0.0), auto(None)):
        assert torch.equal(images(guide(pipe, guidance), options, 1, 2), plain)


@pytest.mark.parametrize("recipe", ["auto", "mpgd"])
def test_the_loss_falls_and_the_record_shows_it(stock, recipe):
    pipe, options = stock
    # a decoder of random weights hardly moves: steps are long here, and longer in latents
    strength = {"auto": (5.0, 20.0), "mpgd": (20.0, 1000.0)}[recipe]["prompt" in options]
    guided = guide(pipe, recipes.get(recipe)(squares, strength=strength))
    output = guided(**options, generator=generators(1, 2))
    assert (squares(output.images.float()) < 0.7 * squares(images(pipe, options, 1, 2))).all()
    losses = output.record.losses()
    assert losses.shape == (len(guided.record.guided), 2) and (losses[-1] < losses[0]).all()


def test_the_pipeline_is_left_as_found_also_after_an_exception(stock):
    pipe, options = stock
    pipe(**options)  # a pipeline's first call sets attributes of its own
    before = state(pipe)
    guide(pipe, auto(squares))(**options)
    assert state(pipe) == before
    calls = []

    def fails(image):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return squares(image)

    with pytest.raises(KeyboardInterrupt):
        guide(pipe, auto(fails))(**options)
    assert state(pipe) == before


def test_a_batch_of_two_is_two_singles(stock):
    pipe, options = stock
    guided = guide(pipe, auto(squares))
    together = images(guided, options, 1, 2)
    for i in range(2):
        one = {k: ([v[i]] if k == "prompt" else 1 if k == "batch_size" else v) for k, v in options.items()}
        torch.testing.assert_close(images(guided, one, i + 1), together[i : i + 1], rtol=0, atol=1e-4)


def test_no_second_call_of_the_denoiser(stock):
    pipe, options = stock
    calls = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    guided = guide(pipe, recipes.dps(squares))
    guided(**options)
    handle.remove()
    assert len(calls) == 10 == len(guided.record.rows)
    travelled = guide(pipe, auto(squares))
    travelled(**options)
    assert len(travelled.record.rows) == 15


@pytest.mark.parametrize("clock", ["steps", "noise"])
def test_the_plugin_and_the_librarys_own_loop_take_the_same_steps(clock):
    pipe, options = ddim()
    guidance = auto(squares, clock=clock)
    own = sample(denoiser(pipe.unet, pipe.scheduler), guidance, steps=10, seeds=[1, 2]).images
    plugged = images(guide(pipe, guidance), dict(options, num_inference_steps=10, output_type="pt"), 1, 2)
    torch.testing.assert_close(own, plugged, rtol=0, atol=1e-5)


def test_two_guided_pipelines_do_not_disturb_each_other(stock):
    pipe, options = stock
    bright, dark = (
        guide(pipe, auto(squares)),
        guide(pipe, auto(lambda image: image.square().mean((1, 2, 3)))),
    )
    first = images(bright, options, 1, 2)
    images(dark, options, 1, 2)
    assert torch.equal(images(bright, options, 1, 2), first)


def test_pictures_and_tuples_come_back_as_the_pipeline_gives_them():
    pipe, options = ddim()
    guided = guide(pipe, auto(squares))
    assert guided(**options, num_inference_steps=3).images[0].size == (8, 8)
    plain = guided(**options, num_inference_steps=3, return_dict=False)
    assert isinstance(plain, tuple) and len(guided.record.rows) == 5


def test_classifier_free_guidance_and_callbacks_stay(stock):
    pipe, options = stock
    if "prompt" not in options:
        pytest.skip("a pipeline without prompts")
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].shape)
        return {"latents": tensors["latents"] * 1.0}

    guided = guide(pipe, auto(squares))
    low = guided(**options, guidance_scale=1.0, generator=generators(1, 2)).images
    high = guided(**options, guidance_scale=9.0, generator=generators(1, 2), callback_on_step_end=callback).images
    assert len(seen) == 15 and not torch.equal(low, high)


def test_what_cannot_be_guided_is_told():
    pipe, _ = ddim()
    with pytest.raises(TypeError, match="no scheduler"):
        guide(object(), auto(squares))
    with pytest.raises(TypeError, match="recipes.auto"):
        guide(pipe, squares)


class CutsItsSchedule(DDIMPipeline):
    """A pipeline that starts in the middle of its schedule without saying where."""

    def __call__(self, generator, num_inference_steps):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(1, 3, 8, 8, generator=generator)
        for t in self.scheduler.timesteps[3:]:
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return x


def test_a_pipeline_that_cuts_its_schedule_by_itself():
    pipe = CutsItsSchedule(**ddim()[0].components)
    before = state(pipe)
    with pytest.raises(ValueError, match="time_travel=None"):
        guide(pipe, auto(squares))(torch.Generator().manual_seed(0), 10)
    assert state(pipe) == before
    guided = guide(pipe, auto(squares, time_travel=None))
    guided(torch.Generator().manual_seed(0), 10)
    assert [row["step"] for row in guided.record.rows] == list(range(3, 10))


def test_the_callers_latents_are_not_touched():
    pipe, options = stable_diffusion()
    latents = torch.randn(2, 4, 8, 8)
    guide(pipe, auto(squares))(**options, latents=latents, num_inference_steps=3)
    assert not latents.requires_grad


def test_generators_given_by_position_count_too():
    pipe, _ = ddpm()
    guided = guide(pipe, auto(squares))
    by_name = guided(batch_size=2, generator=generators(1, 2), num_inference_steps=5, output_type="pt").images
    torch.manual_seed(99)
    by_place = guided(2, generators(1, 2), 5, "pt").images
    assert torch.equal(by_name, by_place)
