"""A picture given to a latent pipeline, of which each pixel may change so far: as latents, see `samplers.change`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.functional import interpolate

from ..samplers.change import Change, UnsuitableChange, change_of
from .adapters import normalised


def change_in(pipe: Any, source: Any, change_map: Any, latents: torch.Tensor) -> Change:
    """What of a source may change, and when, for the latents that a pipeline begins with.

    Args:
        pipe: a pipeline of pictures whose latents are `(B, C, h, w)`, or packed by its own `_pack_latents`.
        source: pictures `(3, H, W)` or `(B, 3, H, W)` in [0, 1], encoded by the pipeline's own autoencoder.
        change_map: a number, `(H, W)` or `(B, 1, H, W)` in [0, 1]; a latent gets the mean of its pixels.
        latents: those of the plain pipeline.

    Raises:
        ValueError: how to encode is not known, or a size or a range is not right.
    """
    source = torch.as_tensor(source).detach().float()
    source = source[None] if source.dim() == 3 else source
    if source.dim() != 4 or source.shape[1] != 3 or not bool(((source >= 0) & (source <= 1)).all()):
        raise UnsuitableChange(f"a source is a picture (3, H, W) in [0, 1], or (B, 3, H, W); got {tuple(source.shape)}")
    change_map = torch.as_tensor(change_map).detach().float()
    if change_map.dim() and tuple(change_map.shape[-2:]) != tuple(source.shape[-2:]):
        raise UnsuitableChange(
            f"a change map is of its source's size, {tuple(source.shape[-2:])}, got {tuple(change_map.shape)}"
        )
    z = _encoded(pipe, source, latents)
    change_map = change_map.expand(source.shape[-2:]) if not change_map.dim() else change_map
    change_map = change_map.reshape(-1, 1, *source.shape[-2:])
    if not bool(((change_map >= 0) & (change_map <= 1)).all()):
        raise UnsuitableChange(f"a change map is in [0, 1], got {change_map.min():g} to {change_map.max():g}")
    change_map = interpolate(change_map, size=z.shape[-2:], mode="area")
    if latents.dim() == 3:
        z, change_map = _packed(pipe, z), _packed(pipe, change_map.expand(-1, *z.shape[1:]))
    if z.shape[1:] != latents.shape[1:]:
        raise UnsuitableChange(
            f"the source, {tuple(source.shape[-2:])} pixels, becomes latents {tuple(z.shape[1:])}, and "
            f"{type(pipe).__name__} draws {tuple(latents.shape[1:])}: make it as large as the picture that is drawn"
        )
    change = change_of(z.cpu(), change_map, tuple(latents.shape[1:]))
    change.check(len(latents))
    return change


def _encoded(pipe: Any, source: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The most likely latents, scaled as the pipeline scales them."""
    vae = getattr(pipe, "vae", None)  # others, which quantise, scale their latents in other ways
    pictures = hasattr(pipe, "_pack_latents") if latents.dim() == 3 else latents.dim() == 4
    kernels = any(isinstance(module, torch.nn.Conv3d) for module in vae.modules()) if vae is not None else True
    if not pictures or kernels or not hasattr(vae, "encode") or getattr(vae, "bn", None) is not None:
        raise UnsuitableChange(
            f"how {type(pipe).__name__} encodes a picture is not known here: a change map is for pipelines of pictures "
            "whose autoencoder makes latents (B, C, h, w); models of pixels take it in sample(...)"
        )
    dtype = vae.dtype
    upcast = getattr(vae.config, "force_upcast", False) and dtype == torch.float16
    try:
        vae.to(torch.float32 if upcast else dtype)
        found = vae.encode((source * 2 - 1).to(latents.device, vae.dtype))
    finally:
        vae.to(dtype)
    law = getattr(found, "latent_dist", None)
    if law is not None:
        z = law.mode()
    else:
        z = found.latents if hasattr(found, "latents") else found.latent
    return normalised(z.float(), vae)


def _packed(pipe: Any, z: torch.Tensor) -> torch.Tensor:
    """Latents `(B, C, h, w)` as the pipeline's tokens."""
    names = list(inspect.signature(pipe._pack_latents).parameters)
    if names[:5] != ["latents", "batch_size", "num_channels_latents", "height", "width"]:
        raise UnsuitableChange(
            f"how {type(pipe).__name__} packs its latents is not known here: it cannot take a change map"
        )
    return pipe._pack_latents(z, *z.shape)
