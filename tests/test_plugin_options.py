"""The plug-in's options, what stays of the pipeline's own, and what it says where it cannot help."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMPipeline
from lossguide.guidance import guide, recipes
from lossguide.guidance.adapters import Adapter, register
from lossguide.losses import Frames, Measurement, operators
from lossguide.samplers import TimeTravel
from models import tiny_stable_diffusion, tiny_unet, vp_scheduler
from pipelines import PIPELINES
from test_pipelines import generators, made, options, result


def squares(image):
    return (image - 0.8).square().flatten(1).mean(1)


def drawn(guided, name, *seeds, **changes):
    given = options(name, len(seeds)) | changes
    return result(name, guided(**given, generator=generators(*seeds)))


# ---- callbacks and previews --------------------------------------------------------------------------------------


def test_a_callback_that_changes_nothing_changes_nothing_and_sees_no_graph():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tensors["latents"].requires_grad, torch.is_grad_enabled()))
        return tensors

    guided = guide(made("sd"), recipes.dps(squares))
    assert torch.equal(drawn(guided, "sd", 1, callback_on_step_end=callback), drawn(guided, "sd", 1))
    assert seen == [(step, False, False) for step in range(10)]


def test_a_callbacks_own_latents_are_guided_from():
    def callback(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"].clone().mul_(0.9)}

    guided = guide(made("sd"), recipes.dps(squares, time_travel=TimeTravel(2, 0.2, 0.5)))
    changed = drawn(guided, "sd", 1, callback_on_step_end=callback)
    assert not torch.equal(changed, drawn(guided, "sd", 1))
    assert all((row["gradient_norm"] > 0).all() for row in guided.record.rows)


def test_previews_are_shown_every_few_visits(tmp_path):
    shown = []

    def watch(images, row):
        shown.append((row["step"], tuple(images.shape), images.min().item() >= 0, row["loss"].shape))

    guided = guide(made("sd"), recipes.dps(squares), preview=watch, preview_every=4)
    watched = drawn(guided, "sd", 1, 2)
    assert shown == [(step, (2, 3, 16, 16), True, (2,)) for step in (0, 4, 8)]
    assert torch.equal(watched, drawn(guide(made("sd"), recipes.dps(squares)), "sd", 1, 2))
    for name in ("sd", "wan"):
        path = tmp_path / f"{name}.png"
        drawn(guide(made(name), recipes.mpgd(lambda x: x.flatten(1).mean(1)), preview=path), name, 1)
        assert path.stat().st_size > 100
    with pytest.raises(ValueError, match="n >= 1"):
        guide(made("sd"), recipes.dps(squares), preview=watch, preview_every=0)


# ---- what decodes for the loss -----------------------------------------------------------------------------------


def test_a_smaller_autoencoder_decodes_for_the_loss():
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    sizes = []

    def loss(image):
        sizes.append(image.shape)
        return squares(image)

    guided = guide(made("sd"), recipes.dps(loss, strength=20.0), vae=tiny)
    drawn(guided, "sd", 1)
    losses = guided.record.losses()
    assert sizes[0] == (1, 3, 16, 16) and losses[-1] < losses[0]
    assert all(p.requires_grad for p in tiny.parameters())


def test_views_are_chosen_by_name():
    shapes = []

    def loss(sound):
        shapes.append(tuple(sound.shape))
        return sound.square().flatten(1).mean(1)

    for view in ("spectrogram", "waveform"):
        guided = guide(made("audioldm"), recipes.auto(loss), decode=view)
        drawn(guided, "audioldm", 1)
        assert guided.record.losses()[-1] < guided.record.losses()[0]
    assert set(shapes) == {(1, 1, 16, 16), (1, 1, 64)}
    with pytest.raises(ValueError, match="no view 'picture'.*waveform, spectrogram"):
        guide(made("audioldm"), recipes.auto(loss), decode="picture")


def test_a_picture_loss_guides_the_frames_of_a_video():
    guided = guide(made("ltx"), recipes.auto(Frames(squares, [0, 2])))
    video = drawn(guided, "ltx", 1)
    assert video.shape == (1, 5, 3, 32, 32) and guided.record.losses()[-1] < guided.record.losses()[0]


def test_an_adapter_from_outside_comes_first(monkeypatch):
    from lossguide.guidance import adapters

    class Mine(DDIMPipeline):
        pass

    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    shapes = []
    register(Adapter(lambda pipe: type(pipe) is Mine, lambda latents, call: latents[..., : call["batch_size"]]))

    def loss(image):
        shapes.append(image.shape[-1])
        return image.flatten(1).mean(1)

    pipe = Mine(tiny_unet(), vp_scheduler())
    pipe.set_progress_bar_config(disable=True)
    guide(pipe, recipes.mpgd(loss))(batch_size=2, num_inference_steps=2)
    assert set(shapes) == {2}


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "flux", "sd3", "wan"])
def test_checkpointing_changes_no_picture_and_leaves_no_trace(name):
    plain = drawn(guide(made(name), recipes.dps(lambda x: x.flatten(1).mean(1))), name, 1, 2)
    guided = guide(made(name), recipes.dps(lambda x: x.flatten(1).mean(1)), checkpointing=True)
    torch.testing.assert_close(drawn(guided, name, 1, 2), plain, rtol=0, atol=1e-3 if name == "wan" else 1e-5)
    modules = [m for m in made(name).components.values() if isinstance(m, torch.nn.Module)]
    assert not any(getattr(m, "is_gradient_checkpointing", False) for m in modules)


def test_there_is_no_graph_outside_the_window_nor_at_x0():
    graphs = []
    model = made("sd").unet
    hook = model.register_forward_hook(lambda module, args, output: graphs.append(output[0].requires_grad))
    try:
        drawn(guide(made("sd"), recipes.dps(squares, start=0.3, stop=0.6)), "sd", 1)
        assert graphs == [0.3 <= step / 10 < 0.6 for step in range(10)]
        graphs.clear()
        drawn(guide(made("sd"), recipes.mpgd(squares)), "sd", 1)
        assert not any(graphs)
    finally:
        hook.remove()


def test_half_precision_is_guided_in_full():
    pipe = tiny_stable_diffusion().to(torch.bfloat16)
    dtypes = []

    def loss(image):
        dtypes.append(image.dtype)
        return squares(image)

    guided = guide(pipe, recipes.auto(loss, strength=20.0))
    given = options("sd", 1) | dict(generator=generators(1))
    image = guided(**given).images
    assert set(dtypes) == {torch.float32} and torch.isfinite(image).all()
    assert guided.record.losses()[-1] < guided.record.losses()[0]


def test_an_autoencoder_that_overflows_in_half_precision_decodes_in_full():
    pipe = PIPELINES["sdxl"].build()
    pipe.vae.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    inside = []

    def loss(image):
        inside.append(pipe.vae.dtype)
        return squares(image)

    guided = guide(pipe, recipes.mpgd(loss))
    output = guided(**options("sdxl", 1), generator=generators(1))
    assert set(inside) == {torch.float32} and pipe.vae.dtype == torch.float16
    assert torch.isfinite(output.images).all()


def test_a_denoiser_that_knows_no_gradients_is_guided_at_x0():
    quantised = tiny_stable_diffusion()
    quantised.unet = torch.ao.quantization.quantize_dynamic(quantised.unet, {torch.nn.Linear}, torch.qint8)
    compiled = tiny_stable_diffusion()
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    offloaded = tiny_stable_diffusion()
    offloaded.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    modelwise = tiny_stable_diffusion()
    modelwise.enable_model_cpu_offload(device="cpu")
    for pipe in (quantised, compiled, offloaded, modelwise):
        guided = guide(pipe, recipes.auto(squares, through="x0", strength=20.0))
        guided(**options("sd", 1), generator=generators(1))
        assert guided.record.losses()[-1] < guided.record.losses()[0]


# ---- what cannot be helped is told -------------------------------------------------------------------------------


def test_inference_mode_around_the_call_does_not_matter():
    guided = guide(made("sd"), recipes.dps(squares))
    expected = drawn(guided, "sd", 1)
    with torch.inference_mode():
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        given = options("sd", 1) | dict(latents=latents)
        image = guided(**given, generator=generators(1)).images
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_weights_of_inference_mode_are_told():
    with torch.inference_mode():
        unet = tiny_unet()
    pipe = DDIMPipeline(unet, vp_scheduler())
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(RuntimeError, match="inference_mode.*x0"):
        guide(pipe, recipes.dps(squares))(num_inference_steps=2)
    guide(pipe, recipes.mpgd(squares))(num_inference_steps=2)


def test_what_is_not_differentiable_is_told():
    def decode(latents):
        return latents.detach()[:, :3] / 2 + 0.5

    with pytest.raises(ValueError, match="decoder is not differentiable.*AutoencoderTiny"):
        drawn(guide(made("sd"), recipes.mpgd(squares), decode=decode), "sd", 1)

    class NoGradient(torch.nn.Module):
        config, dtype, device = made("ddim").unet.config, torch.float32, torch.device("cpu")

        @torch.no_grad()
        def forward(self, x, t):
            return made("ddim").unet(x, t)

    pipe = DDIMPipeline(tiny_unet(), vp_scheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.unet = NoGradient()
    with pytest.raises(ValueError, match='carries no gradient.*through="x0"'):
        guide(pipe, recipes.dps(squares))(num_inference_steps=2)


def test_pipelines_outside_torch_and_unknown_decoders_are_told():
    class OnnxStableDiffusionPipeline:
        scheduler = vp_scheduler()

    class Packs:
        scheduler = vp_scheduler()
        vae = torch.nn.Identity()

        def _unpack_latents(self, latents, something):
            return latents

    with pytest.raises(TypeError, match="outside torch"):
        guide(OnnxStableDiffusionPipeline(), recipes.auto(squares))
    with pytest.raises(TypeError, match="how Packs decodes is not known.*decode=function"):
        guide(Packs(), recipes.auto(squares))
    guide(Packs(), recipes.auto(squares), decode=lambda latents: latents)


def test_a_scheduler_whose_level_cannot_be_read_is_told():
    from diffusers import VQDiffusionScheduler

    class Pipe(DDIMPipeline):
        def __call__(self):
            self.scheduler.set_timesteps(3)

    pipe = Pipe(tiny_unet(), vp_scheduler())
    pipe.scheduler = VQDiffusionScheduler(num_vec_classes=8)
    with pytest.raises(ValueError, match="VQDiffusionScheduler cannot be read"):
        guide(pipe, recipes.auto(squares))()


def test_methods_of_pixel_models_are_refused_latents():
    measurement = Measurement(operators.SuperResolution(2), torch.zeros(3, 8, 8), 0.1)
    with pytest.raises(TypeError, match="pixel model"):
        guide(made("sd"), recipes.ddnm(measurement))
    with pytest.raises(TypeError, match="particles"):
        guide(made("sd"), recipes.best_of_n(squares))
