"""Any linear filter: kernels per channel or across channels, at every pixel or every few."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..network import moved
from .blur import PADDINGS
from .operator import LinearOperator

EDGES = PADDINGS | {"replicate": "replicate"}


class Filter(LinearOperator):
    """Convolution with kernels, of one channel each or across channels, of every `stride`-th pixel.

    A pixel of what comes out is made of the `h x w` pixels around the middle of its own `stride x stride` block, so the
    picture stays centred. A kernel of `(C', C, 1, 1)` is a matrix of colours. Half precision is computed in float32.

    Args:
        kernel: `(1, h, w)` for all channels alike, `(C, h, w)` one per channel, or `(C', C, h, w)` across channels;
            floats, taken as they are. `h - stride` and `w - stride` are even and not negative.
        stride: it must divide height and width.
        padding: what lies beyond the edges: "reflect", "replicate" (the edge's own pixels), "zeros", or "circular".
        offset: `(C',)`, added to each channel; with one the filter is affine, and not `linear`.

    Raises:
        ValueError: the kernel is no such tensor, or not finite; the padding is another; a picture is too small, its
            sides are not whole multiples of the stride, or it has other channels.
    """

    def __init__(
        self, kernel: torch.Tensor, stride: int = 1, padding: str = "reflect", offset: torch.Tensor | None = None
    ):
        if not isinstance(kernel, torch.Tensor) or kernel.ndim not in (3, 4) or not kernel.is_floating_point():
            got = f"{kernel.dtype} {tuple(kernel.shape)}" if isinstance(kernel, torch.Tensor) else type(kernel).__name__
            raise ValueError(f"a kernel is a float tensor (C, h, w) or (C', C, h, w), got {got}")
        if not kernel.numel() or not kernel.isfinite().all():
            raise ValueError("a kernel is not empty, and all of its values are finite")
        if not isinstance(stride, int) or stride < 1:
            raise ValueError(f"stride is a whole number of pixels, at least 1, got {stride!r}")
        if any(side < stride or (side - stride) % 2 for side in kernel.shape[-2:]):
            size = " x ".join(map(str, kernel.shape[-2:]))
            raise ValueError(f"a kernel's sides are the stride and an even number more, got {size} and {stride}")
        if padding not in EDGES:
            raise ValueError(f"padding is one of {', '.join(EDGES)}, got {padding!r}")
        self.kernel, self.stride, self.padding = kernel.detach().clone(), stride, padding
        self.offset = None if offset is None else offset.detach().clone()
        self.linear = offset is None
        self.arguments = {"kernel": self.kernel, "stride": stride, "padding": padding, "offset": self.offset}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        channels, *sides = image.shape[1:]
        if any(side % self.stride for side in sides):
            raise ValueError(f"a stride of {self.stride} does not divide images of {sides[0]} x {sides[1]} pixels")
        if self.kernel.shape[-3] not in (1, channels) or (self.kernel.ndim == 4 and self.kernel.shape[1] != channels):
            raise ValueError(f"the kernel is for {self.kernel.shape[-3]} channels, got images {tuple(image.shape)}")
        down, right = ((side - self.stride) // 2 for side in self.kernel.shape[-2:])
        reach = max(down / sides[0], right / sides[1])
        if (self.padding == "reflect" and reach >= 1) or (self.padding == "circular" and reach > 1):
            raise ValueError(f"the kernel is too large for {self.padding} edges of {sides[0]} x {sides[1]} pixels")
        wide = image.to(torch.promote_types(image.dtype, torch.float32))
        wide = F.pad(wide, (right, right, down, down), mode=EDGES[self.padding]) if down or right else wide
        kernel = moved(self.kernel, wide).flip(-2, -1)
        if kernel.ndim == 4:
            wide = F.conv2d(wide, kernel, stride=self.stride)
        else:
            wide = F.conv2d(wide, kernel.expand(channels, -1, -1)[:, None], stride=self.stride, groups=channels)
        return (wide if self.offset is None else wide + moved(self.offset, wide).view(-1, 1, 1)).to(image.dtype)
