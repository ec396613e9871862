"""Denoisers: foreign models adapted once, at the door, to `(x_t, t) -> prediction`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .levels import check_kind


@dataclass(frozen=True)
class Denoiser:
    """A model that removes noise, with what the sampling loop needs to know; made by `denoiser`.

    Attributes:
        model: callable `(x_t, t) -> prediction`, or a diffusers model.
        scheduler: diffusers scheduler that chooses solver and levels; never mutated.
        shape: shape of one sample, `(C, H, W)`.
        kind: what the model predicts, or None for what the scheduler says.
        decode: sample -> picture `(B, 3, H, W)` in [0, 1] that losses see, differentiable.
        device, dtype: where and in what precision the model runs.
    """

    model: Callable
    scheduler: object
    shape: tuple[int, ...]
    kind: str | None
    decode: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    dtype: torch.dtype

    def predict(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the model returns at model input `x` and timestep `t`, in the dtype of `x`.

        The prediction `(B, C, H, W)`; `(B, 2 C, H, W)` from a model that also predicts a variance.
        """
        output = self.model(x.to(self.dtype), t)
        if not isinstance(output, torch.Tensor):
            output = output[0]
        if output.shape != x.shape and output.shape != (len(x), 2 * x.shape[1], *x.shape[2:]):
            raise ValueError(
                f"the denoiser must return the shape it was given, {tuple(x.shape)}, but returned {tuple(output.shape)}"
            )
        return output.to(x.dtype)

    def frozen(self):
        """Context in which the model's weights require no gradient; what was there is restored."""
        return frozen(self.model)


def denoiser(
    model: Callable,
    scheduler,
    *,
    kind: str | None = None,
    shape: tuple[int, ...] | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """Adapt a model to the sampling loop.

    Args:
        model: a diffusers model (`UNet2DModel` ...), or any callable `(x_t, t) -> prediction`, `x_t` `(B, C, H, W)` and
            `t` 0-dimensional, scaled as the scheduler scales its model's input.
        scheduler: any diffusers scheduler with a readable noise level; never mutated.
        kind: one of `lossguide.samplers.levels.KINDS`, such as "epsilon", "sample", "v_prediction", "flow" or "edm"; by
            default what the scheduler's config says.
        shape: shape of one sample; by default read from the model's config.
        decode: sample -> picture for the losses, differentiable; by default from [-1, 1] to [0, 1], one channel
            repeated to three.
        device, dtype: where and in what precision the model runs; by default as its parameters, else CPU, float32.

    Raises:
        TypeError: the model is not callable, or is a whole pipeline.
        ValueError: there is no such kind, or the model does not tell its shape and none is given.
    """
    if hasattr(model, "components") and hasattr(model, "scheduler"):
        raise TypeError(
            f"{type(model).__name__} is a whole pipeline: use guide(pipe, guidance), or its unet and scheduler"
        )
    if not callable(model):
        raise TypeError(f"a denoiser is a callable (x_t, t) -> prediction, got {type(model).__name__}")
    if kind is not None:
        check_kind(kind)
    if shape is None:
        config = getattr(model, "config", None)
        size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
        if size is None or channels is None:
            raise ValueError(
                f"{type(model).__name__} does not tell its sample shape: pass shape=(channels, height, width)"
            )
        shape = (channels, *((size, size) if isinstance(size, int) else size))
    parameter = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    own = (torch.device("cpu"), torch.float32) if parameter is None else (parameter.device, parameter.dtype)
    device = own[0] if device is None else torch.device(device)
    return Denoiser(model, scheduler, tuple(shape), kind, decode or as_picture, device, dtype or own[1])


def as_picture(x: torch.Tensor) -> torch.Tensor:
    """A pixel model's sample in [-1, 1] as a picture in [0, 1]; one channel becomes three. Not clamped."""
    image = x / 2 + 0.5
    return image.expand(-1, 3, *image.shape[2:]) if image.shape[1] == 1 else image


@contextmanager
def frozen(*models: object) -> Iterator[None]:
    """Context in which the parameters of these modules require no gradient; what was there is restored."""
    modules = [m for m in models if isinstance(m, torch.nn.Module)]
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad and not p.is_inference()]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
