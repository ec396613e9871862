"""Where in a picture: boxes, shapes and masks."""

from __future__ import annotations

import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image

from .images import Picture, Pixels, digest, keep, read_image
from .network import per_image

Area: TypeAlias = Picture | Sequence[float]

_BOXES = {
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
    "center": (0.25, 0.25, 0.75, 0.75),
}
SHAPES = (*_BOXES, "disc")


def check_box(box: Sequence[float]) -> tuple[float, float, float, float]:
    """A box `(x0, y0, x1, y1)` in fractions of width and height; (0, 0) is the upper left corner.

    Raises:
        ValueError: those are not four numbers with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1.
    """
    values = tuple(float(v) for v in box)
    if len(values) != 4 or not (0 <= values[0] < values[2] <= 1 and 0 <= values[1] < values[3] <= 1):
        raise ValueError(f"a box is (x0, y0, x1, y1) in fractions of the picture, x0 < x1 and y0 < y1, got {box!r}")
    return values


class Region:
    """A part of the picture, drawn on a map of any size: 1 inside, 0 outside, the share of a pixel on the border.

    Args:
        area: a box `(x0, y0, x1, y1)` in fractions; 'left', 'right', 'top', 'bottom', 'center' (the middle half of
            each side) or 'disc' (in the middle, its radius a third of the sides); a mask: a picture's path, a Pillow
            image (white is inside), or a tensor `(H, W)` or `(B, H, W)` in [0, 1].

    Attributes:
        area: what to make it of again.
        batch: for how many pictures it is.

    Raises:
        FileNotFoundError: that is neither a shape nor a picture.
        ValueError: no box, or a mask of another shape or range, or one that marks nothing.
    """

    def __init__(self, area: Area):
        self.batch, self._mask = 1, None
        if isinstance(area, str) and area in SHAPES:
            self.area: Any = area
        elif isinstance(area, torch.Tensor):
            self._mask = area.detach().float().clone()
            self._mask = self._mask[None] if area.ndim == 2 else self._mask
            self.area, self.batch = area.detach().clone(), len(self._mask)
        elif isinstance(area, (str, os.PathLike, Image.Image, Pixels)):
            if isinstance(area, (str, os.PathLike)) and not Path(area).is_file():
                raise FileNotFoundError(f"there is no picture '{area}'; shapes are {', '.join(SHAPES)}")
            self.area = keep(area)
            self._mask = read_image(self.area).float().mean(0, keepdim=True)
        elif isinstance(area, Sequence) and all(isinstance(v, numbers.Real) for v in area):
            self.area = check_box(area)
        else:
            raise ValueError(f"an area is a box, a shape's name, a picture or a tensor, got {area!r}")
        if self._mask is not None:
            if self._mask.ndim != 3 or not ((self._mask >= 0) & (self._mask <= 1)).all():
                raise ValueError(f"a mask is (H, W) or (B, H, W) in [0, 1], got {tuple(self._mask.shape)}")
            if not (self._mask.flatten(1).sum(1) > 0).all():
                raise ValueError("the mask marks nothing: it is 0 everywhere")

    def describe(self) -> Any:
        """Plain data for records."""
        return digest(list(self.area) if isinstance(self.area, tuple) else self.area)

    def over(self, maps: torch.Tensor) -> torch.Tensor:
        """The area as it lies over maps `(B, h, w)`: the same shape, device and dtype."""
        height, width = maps.shape[1:]
        if self._mask is not None:
            drawn = self._mask[:, None]
            if drawn.shape[2:] != (height, width):
                drawn = F.interpolate(drawn, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
            drawn = drawn[:, 0]
        elif self.area == "disc":
            y, x = ((torch.arange(n) + 0.5) / n - 0.5 for n in (height, width))
            from_edge = 1 / 3 - (y[:, None].square() + x.square()).sqrt()
            drawn = (from_edge * min(height, width) + 0.5).clamp(0, 1)[None]
        else:
            x0, y0, x1, y1 = _BOXES[self.area] if isinstance(self.area, str) else self.area
            drawn = (_covered(y0, y1, height)[:, None] * _covered(x0, x1, width))[None]
        return per_image(drawn.to(maps), len(maps), "masks")


def _covered(start: float, stop: float, pixels: int) -> torch.Tensor:
    """What part of each of so many pixels lies between two fractions."""
    at = torch.arange(pixels, dtype=torch.float64)
    return ((at + 1).clamp(max=stop * pixels) - at.clamp(min=start * pixels)).clamp(min=0)


def inside_outside(log_in: torch.Tensor, log_out: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the mask of `-log p` and the mean around it of `-log(1 - p)`, half each: `(B, h, w)` -> `(B,)`.

    A small area so counts as much as all around it. Where a mask leaves nothing outside, only the inside counts.
    """
    terms, there = [], []
    for log, weight in ((log_in, mask), (log_out, 1 - mask)):
        total = weight.flatten(1).sum(1)
        terms.append(-(weight * log).flatten(1).sum(1) / total.clamp(min=1e-6))
        there.append((total > 1e-6).to(log))
    return (terms[0] * there[0] + terms[1] * there[1]) / (there[0] + there[1])
