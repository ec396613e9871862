"""What a sensor and a file do to values: clipping, rounding, compression. None is linear."""

from __future__ import annotations

import torch

from .operator import Operator


class _Clamp(torch.autograd.Function):
    """To [0, 1]; a value outside has a gradient only where a step against it leads back inside."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        outward = ((x > 1) & (gradient < 0)) | ((x < 0) & (gradient > 0))
        return gradient.masked_fill(outward, 0)


class Clip(Operator):
    """A picture exposed too long: `clamp(gain * x, 0, 1)`, as for high dynamic range; not linear.

    The true gradient is zero where a value is clipped, so such a pixel could never come back. Here the clipped value
    has the gradient of an unclipped one where a step against it leads back into [0, 1], else zero.

    Args:
        gain: of the exposure, positive; at 2, all above one half is white.

    Source: Mardani et al. 2023, RED-diff (arXiv 2305.04391), for the task.
    """

    def __init__(self, gain: float = 2.0):
        if not 0 < gain < float("inf"):
            raise ValueError(f"gain is positive, got {gain!r}")
        self.gain = float(gain)
        self.arguments = {"gain": self.gain}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return _Clamp.apply(self.gain * image)


class Quantize(Operator):
    """Values rounded to the nearest of evenly spaced levels in [0, 1], halves to even ones; not linear.

    The gradient is that of the identity (straight-through), beyond [0, 1] only where a step leads back inside.

    Args:
        levels: how many, at least 2: 256 are eight bits.

    Source: Bengio et al. 2013 (arXiv 1308.3432).
    """

    def __init__(self, levels: int = 256):
        if not isinstance(levels, int) or levels < 2:
            raise ValueError(f"levels is a whole number, at least 2, got {levels!r}")
        self.levels = levels
        self.arguments = {"levels": levels}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        inside = _Clamp.apply(image)
        wide = inside.detach().to(torch.promote_types(image.dtype, torch.float32))
        rounded = (wide * (self.levels - 1)).round() / (self.levels - 1)
        return rounded.to(image.dtype) + (inside - inside.detach())


class Jpeg(Operator):
    """A JPEG file's round trip: 4:2:0 chroma, the standard tables, as kornia's differentiable codec has it; not linear.

    Rounding is smooth there, `round(u) + (u - round(u))^3`; its gradient is small near whole numbers and zero at them,
    as in a black picture. Values are clipped to [0, 1] before and after, with a gradient as in `Clip`. What comes out
    differs from libjpeg's files by an RMSE of about 0.02 at quality 10 and 0.01 from 50 up, which sigma should cover.

    Args:
        quality: 1 to 100, as in Pillow and libjpeg.

    Raises:
        ValueError: another quality, or images that are not `(B, 3, H, W)`.

    Source: Reich et al. 2024 (arXiv 2309.06978).
    """

    def __init__(self, quality: int = 50):
        if not isinstance(quality, int) or not 1 <= quality <= 100:
            raise ValueError(f"quality is a whole number from 1 to 100, got {quality!r}")
        self.quality = quality
        self.arguments = {"quality": quality}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        from kornia.enhance import jpeg_codec_differentiable

        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"JPEG is for colour pictures (B, 3, H, W), got {tuple(image.shape)}")
        wide = _Clamp.apply(image).to(torch.promote_types(image.dtype, torch.float32))
        coded = jpeg_codec_differentiable(wide, wide.new_tensor([self.quality]))
        return _Clamp.apply(coded).to(image.dtype)
