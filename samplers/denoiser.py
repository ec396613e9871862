"""Denoisers: foreign models adapted once, at the door, to `(x_t, t) -> prediction`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
        per_pixel: whether the model is told the level of every pixel, `(x_t, gamma) -> prediction`.
    """

    model: Callable
    scheduler: object
    shape: tuple[int, ...]
    kind: str | None
    decode: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    dtype: torch.dtype
    per_pixel: bool = False

    def predict(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the model returns at model input `x` and timestep `t` (or the map gamma), in the dtype of `x`.

        The prediction `(B, C, H, W)`; `(B, 2 C, H, W)` from a model that also predicts a variance.

        Raises:
            ValueError: the model returns something else, or does not take samples of this size.
        """
        try:
            output = self.model(x.to(self.dtype), t)
        except RuntimeError as error:
            if "Sizes of tensors must match" not in str(error):
                raise
            raise ValueError(
                f"the denoiser {type(self.model).__name__} does not take samples {tuple(x.shape)}: what it makes "
                f"smaller and larger again comes back in another size ({error}); choose shape=(channels, height, "
                "width) with sides that all its halvings divide, such as multiples of 32"
            ) from error
        if not isinstance(output, torch.Tensor):
            output = getattr(output, "sample", output)
        if not isinstance(output, torch.Tensor):
            with suppress(TypeError, LookupError):  # what has no first part is told below
                output = output[0]
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            kind = output.dtype if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(f"the denoiser must return a float tensor {tuple(x.shape)}, but returned {kind}")
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
    per_pixel: bool | None = None,
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
        per_pixel: that the model is made for a `MultivariateScheduler`: it gets the map `gamma`, `(B, C, H, W)` in
            float32, the log of noise over signal of every pixel, in place of `t`; by default the model's own attribute
            `per_pixel`, else False.

    Raises:
        TypeError: the model is not callable, or is a whole pipeline; or either model or scheduler works per pixel and
            the other does not.
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
    per_pixel = _per_pixel(model, scheduler, per_pixel)
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
    return Denoiser(model, scheduler, tuple(shape), kind, decode or as_picture, device, dtype or own[1], per_pixel)


def _per_pixel(model: Callable, scheduler, declared: bool | None) -> bool:
    """Whether model and scheduler both work per pixel; a network's word is not taken where it is known better."""
    name = type(model).__name__
    known = type(model).__module__.startswith("diffusers.")  # told one time for all
    able = not known and bool(getattr(model, "per_pixel", False) if declared is None else declared)
    if getattr(scheduler, "per_pixel", False) and not able:
        raise TypeError(
            f"{type(scheduler).__name__} gives every pixel a level of its own, and {name} is told one time for all, so "
            "that its predictions would be wrong: take a network made for it, (x_t, gamma) -> prediction with gamma of "
            "the shape of x_t, and say so by per_pixel=True; or take the scheduler that this one was trained with"
        )
    if able and not getattr(scheduler, "per_pixel", False):
        raise TypeError(
            f"{name} is told the level of every pixel, which {type(scheduler).__name__} does not know: use "
            "MultivariateScheduler, with ScalarGamma where all pixels share one"
        )
    return able


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
