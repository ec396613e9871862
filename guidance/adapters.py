"""What the plug-in has to know of families of pipelines: how their latents become what a loss sees.

The table holds a family per entry, and the first that suits a pipeline is taken; `register` adds one from outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..samplers.denoiser import as_picture


@dataclass
class Call:
    """One call of a pipeline, as far as decoders need it.

    Attributes:
        pipe: the pipeline.
        vae: the autoencoder that decodes for the loss: the pipeline's own, or one that the user gave.
        arguments: what the pipeline was called with, by name, then what it handed to its own `prepare_latents`; and,
            as "prepared", what it got back.
    """

    pipe: Any
    vae: Any
    arguments: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        value = self.arguments.get(name)
        if value is None:
            raise ValueError(
                f"{type(self.pipe).__name__} did not tell its {name}, which decoding needs: pass {name}=..., or "
                "guide(..., decode=...)"
            )
        return value


Decoder = Callable[[torch.Tensor, Call], torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """How to guide a family of pipelines.

    Args:
        suits: whether a pipeline belongs to it.
        decode: latents `(B, ...)` and the call -> what a loss sees, differentiable: pictures `(B, 3, H, W)` or videos
            `(B, F, 3, H, W)` in [0, 1], waveforms `(B, channels, T)`; or such views by name, of which the first is the
            default and `guide(..., decode="spectrogram")` chooses another.
        doubled: whether the pipeline carries each latent twice for its classifier-free guidance (DiT).
        part: where the pipeline is made of several, the one to guide, by its attribute.
    """

    suits: Callable[[Any], bool]
    decode: Decoder | Mapping[str, Decoder]
    doubled: bool = False
    part: str | None = None

    def decoder(self, view: str | None = None) -> Decoder:
        """The decoder of a view; of the first one when None.

        Raises:
            ValueError: there is no such view.
        """
        views = self.decode if isinstance(self.decode, Mapping) else {"picture": self.decode}
        if view is not None and view not in views:
            raise ValueError(f"there is no view {view!r}; this pipeline has {', '.join(views)}")
        return next(iter(views.values()), None) if view is None else views[view]


def register(adapter: Adapter) -> Adapter:
    """Put an adapter before those that are there; returns it."""
    _ADAPTERS.insert(0, adapter)
    return adapter


def adapter_of(pipe: Any) -> Adapter:
    """The first adapter that suits a pipeline.

    Raises:
        TypeError: none does.
    """
    for adapter in _ADAPTERS:
        if adapter.suits(pipe):
            return adapter
    raise TypeError(
        f"how {type(pipe).__name__} decodes is not known here: pass guide(..., decode=function), from its latents to "
        "pictures (B, 3, H, W) in [0, 1], or register an Adapter"
    )


def denormalised(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """Latents as the autoencoder itself knows them: its scale, shift, mean and standard deviation undone."""
    config = vae.config
    z = latents / (getattr(config, "scaling_factor", None) or 1.0) + (getattr(config, "shift_factor", None) or 0.0)
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    return z if mean is None or std is None else z * std + mean


def normalised(z: torch.Tensor, vae: Any) -> torch.Tensor:
    """The inverse of `denormalised`: an autoencoder's own latents as the model that denoises knows them."""
    config = vae.config
    mean, std = (_per_channel(vae, name, z) for name in ("latents_mean", "latents_std"))
    z = z if mean is None or std is None else (z - mean) / std
    return (z - (getattr(config, "shift_factor", None) or 0.0)) * (getattr(config, "scaling_factor", None) or 1.0)


def _per_channel(vae: Any, name: str, latents: torch.Tensor) -> torch.Tensor | None:
    value = getattr(vae.config, name, None)
    value = dict(vae.named_buffers(recurse=False)).get(name) if value is None else value
    if value is None:
        return None
    return torch.as_tensor(value).to(latents).view(1, -1, *[1] * (latents.dim() - 2))


def decoded(z: torch.Tensor, vae: Any, *args: Any) -> torch.Tensor:
    """What an autoencoder makes of its own latents, in its precision, as float32."""
    return vae.decode(z.to(vae.dtype), *args, return_dict=False)[0].float()


def as_video(frames: torch.Tensor) -> torch.Tensor:
    """Frames `(B, 3, F, H, W)` in [-1, 1] as `(B, F, 3, H, W)` in [0, 1]; not clamped."""
    return frames.transpose(1, 2) / 2 + 0.5


def _visual(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """Pictures and videos of an autoencoder whose latents come as they are."""
    z = denormalised(latents, call.vae)
    if z.dim() == 5 and _latent_axes(call.vae) == 4:  # an autoencoder of pictures, frame by frame (AnimateDiff)
        frames = decoded(z.transpose(1, 2).flatten(0, 1), call.vae)
        return as_picture(frames).unflatten(0, (len(z), -1))
    image = decoded(z, call.vae)
    return as_video(image) if image.dim() == 5 else as_picture(image)


def _packed(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """FLUX, Qwen-Image and their kin: tokens `(B, L, 4 C)` of 2 x 2 latent pixels."""
    pipe, size = call.pipe, (call["height"], call["width"])
    if hasattr(pipe, "_unpack_latents"):
        z = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    else:  # modular pipelines keep that to themselves
        rows, columns = (int(side) // (2 * pipe.vae_scale_factor) for side in size)
        z = latents.unflatten(1, (rows, columns)).unflatten(-1, (-1, 2, 2))  # (B, H/2, W/2, C, 2, 2)
        z = z.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    if _latent_axes(call.vae) == 5:
        z = z if z.dim() == 5 else z[:, :, None]
        return as_picture(decoded(denormalised(z, call.vae), call.vae)[:, :, 0])
    return as_picture(decoded(denormalised(z, call.vae), call.vae))


def _packed_in_order(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """FLUX.2: tokens `(B, L, 4 C)` in rows, normalised as its autoencoder's batch norm says."""
    places, norm = call["prepared"][1], call.vae.bn
    height, width = (int(places[..., axis].max()) + 1 for axis in (1, 2))
    z = latents.transpose(1, 2).unflatten(-1, (height, width))
    mean, variance = (one.view(1, -1, 1, 1).to(z) for one in (norm.running_mean, norm.running_var))
    z = z * (variance + call.vae.config.batch_norm_eps).sqrt() + mean
    return as_picture(decoded(call.pipe._unpatchify_latents(z), call.vae))


def _from_first_frame(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """Wan 2.2's image to video: the first latent frame is that of the given picture."""
    _, condition, mask = call["prepared"]
    mask, condition = mask.to(latents), condition.to(latents)
    return _visual((1 - mask) * condition + mask * latents, call)


def _after_first_frame(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """LTX's image to video: the solver sees the frames after the given one, unpacked."""
    pipe, (count, height, width) = call.pipe, (latents.shape[2] + 1, *latents.shape[3:])
    patches = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    first = pipe._unpack_latents(call["prepared"][0], count, height, width, *patches)[:, :, :1]
    z = denormalised(torch.cat([first.to(latents), latents], 2), call.vae)
    time = torch.zeros(len(z)).to(z) if getattr(call.vae.config, "timestep_conditioning", False) else None
    return as_video(decoded(z, call.vae, time))


def _frame_by_frame(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """Stable Video Diffusion: latents `(B, F, C, h, w)`."""
    z, vae = denormalised(latents.flatten(0, 1), call.vae), call.vae
    frames = vae.decode(z.to(vae.dtype), num_frames=latents.shape[1]).sample.float()
    return as_picture(frames).unflatten(0, latents.shape[:2])


def _unquantised(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """Kandinsky: latents as its autoencoder knows them, and not to be quantised."""
    movq = call.vae
    return as_picture(movq.decode(latents.to(movq.dtype), force_not_quantize=True).sample.float())


def _cascaded(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """Stable Cascade's decoder, whose pictures are in [0, 1] already."""
    return decoded(call.vae.config.scale_factor * latents, call.vae)


def _latent_axes(vae: Any) -> int:
    """Axes of an autoencoder's latents: 5 where it is one of videos."""
    kinds = {5: torch.nn.Conv3d, 4: torch.nn.Conv2d}
    return next((n for n, kind in kinds.items() if any(isinstance(m, kind) for m in vae.modules())), 4)


def _packed_video(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """LTX: tokens of patches in space and time."""
    pipe = call.pipe
    side = pipe.vae_spatial_compression_ratio
    z = pipe._unpack_latents(
        latents,
        (call["num_frames"] - 1) // pipe.vae_temporal_compression_ratio + 1,
        call["height"] // side,
        call["width"] // side,
        pipe.transformer_spatial_patch_size,
        pipe.transformer_temporal_patch_size,
    )
    z = denormalised(z, call.vae)
    time = torch.zeros(len(z)).to(z) if getattr(call.vae.config, "timestep_conditioning", False) else None
    return as_video(decoded(z, call.vae, time))


def _frames_first(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """CogVideoX: latents `(B, F, C, H, W)`."""
    return _visual(latents.transpose(1, 2), call)


def _last_row(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """VisualCloze: tokens of every row of a grid of panels; the last row, which is to be completed, is decoded."""
    pipe, rows = call.pipe, call["input_image"][0]
    sizes = [[tuple(panel.shape[-2:]) for panel in row] for row in rows]
    row = pipe._unpack_latents(latents, sizes, pipe.vae_scale_factor)[-1]
    return as_picture(decoded(denormalised(row, call.vae), call.vae))


def _spectrogram(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """The mel spectrogram `(B, 1, T, mels)`, in the vocoder's logarithmic units."""
    return decoded(denormalised(latents, call.vae), call.vae)


def _vocoded(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """The waveform `(B, 1, T)` that the vocoder makes of the spectrogram."""
    vocoder = call.pipe.vocoder
    mel = _spectrogram(latents, call).squeeze(1)
    wave = vocoder(mel.to(next(vocoder.parameters()).dtype)).float()
    return wave[:, None] if wave.dim() == 2 else wave


def _waveform(latents: torch.Tensor, call: Call) -> torch.Tensor:
    """The waveform `(B, channels, T)` of an audio autoencoder, with the silence that pads it."""
    return decoded(latents, call.vae)


def _pixels(x: torch.Tensor, call: Call) -> torch.Tensor:
    return as_picture(x)


def _has(function: Callable | None, *names: str) -> bool:
    return function is not None and set(names) <= set(inspect.signature(function).parameters)


def _named(*names: str) -> Callable[[Any], bool]:
    return lambda pipe: type(pipe).__name__.startswith(names)


def _flux_like(pipe: Any) -> bool:
    modular = "ModularPipeline" in type(pipe).__name__
    return modular and _named("FluxM", "FluxK", "QwenImageM", "QwenImageE")(pipe)


def _from_picture(pipe: Any) -> bool:
    return _named("WanImageToVideo")(pipe) and bool(getattr(pipe.config, "expand_timesteps", False))


_SOUND = {"waveform": _vocoded, "spectrogram": _spectrogram}
_ADAPTERS = [
    Adapter(_named("VisualClozePipeline"), _last_row, part="generation_pipe"),
    Adapter(lambda pipe: "Combined" in type(pipe).__name__ and hasattr(pipe, "decoder_pipe"), {}, part="decoder_pipe"),
    Adapter(_named("DiTPipeline"), _visual, doubled=True),
    Adapter(_named("CogVideoX"), {"video": _frames_first}),
    Adapter(_from_picture, {"video": _from_first_frame}),
    Adapter(_named("LTXImageToVideo"), {"video": _after_first_frame}),
    Adapter(_named("StableVideoDiffusion"), {"video": _frame_by_frame}),
    Adapter(lambda pipe: _has(getattr(pipe, "_unpack_latents", None), "sizes"), _last_row),
    Adapter(lambda pipe: hasattr(pipe, "transformer_temporal_patch_size"), {"video": _packed_video}),
    Adapter(lambda pipe: hasattr(pipe, "vocoder"), _SOUND),
    Adapter(lambda pipe: "Oobleck" in type(getattr(pipe, "vae", None)).__name__, {"waveform": _waveform}),
    Adapter(_flux_like, _packed),
    Adapter(lambda pipe: hasattr(pipe, "_unpatchify_latents") and hasattr(pipe.vae, "bn"), _packed_in_order),
    Adapter(lambda pipe: _has(getattr(pipe, "_unpack_latents", None), "height", "width", "vae_scale_factor"), _packed),
    Adapter(lambda pipe: getattr(pipe, "movq", None) is not None, _unquantised),
    Adapter(lambda pipe: getattr(pipe, "vqgan", None) is not None, _cascaded),
    Adapter(lambda pipe: not hasattr(pipe, "_unpack_latents") and autoencoder_of(pipe) is not None, _visual),
    Adapter(lambda pipe: autoencoder_of(pipe) is None, _pixels),
]


def autoencoder_of(pipe: Any) -> Any:
    """A pipeline's own autoencoder; None where it works in pixels."""
    for name in ("vae", "vqvae", "movq", "vqgan"):
        if getattr(pipe, name, None) is not None:
            return getattr(pipe, name)
    return None
