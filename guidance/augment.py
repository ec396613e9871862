"""Random augmentation of what the guiding network sees, one draw per sample and copy.

A network trained on clean pictures only is misled by gradients that satisfy it without changing what the picture shows;
averaging the gradient over random changes that keep the content removes them (Shen et al. 2024, arXiv 2403.12404).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..losses.network import constant
from ..samplers.random import rand

_GREY = (0.299, 0.587, 0.114)
_DRAWS = 9  # uniform numbers per copy: shift x 2, scale, turn, brightness, saturation, contrast, cutout x 2


@dataclass(frozen=True)
class Augment:
    """Random changes of a picture; the loss is averaged over `copies` of them.

    The defaults are those of Shen et al.: K = 10 copies, translation, resize, colour and cutout.

    Args:
        copies: how many changed copies per picture and step.
        translate: largest shift, as a share of the side.
        scale: range of the resize factor.
        degrees: largest turn.
        brightness: largest brightness change, added.
        saturation, contrast: ranges of their factors.
        cutout: side of the square set to grey, as a share of the side; 0 for none.
        chunk: copies go through the guiding network in passes of at most so many pictures, but a whole batch at least.
    """

    copies: int = 10
    translate: float = 0.125
    scale: tuple[float, float] = (0.8, 1.2)
    degrees: float = 0.0
    brightness: float = 0.5
    saturation: tuple[float, float] = (0.0, 2.0)
    contrast: tuple[float, float] = (0.5, 1.5)
    cutout: float = 0.5
    chunk: int = 128

    def __post_init__(self) -> None:
        for name in ("scale", "saturation", "contrast"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.copies < 1 or self.chunk < 1:
            raise ValueError(f"augmentation needs copies >= 1 and chunk >= 1, got {self.copies} and {self.chunk}")

    @classmethod
    def geometric(cls, copies: int = 4, chunk: int = 128) -> Augment:
        """Shifts, resizes and small turns only: content and colour stay."""
        return cls(copies, degrees=10.0, brightness=0.0, saturation=(1, 1), contrast=(1, 1), cutout=0.0, chunk=chunk)

    @staticmethod
    def suits(image: torch.Tensor) -> bool:
        """Whether these are pictures or videos in colour; sound and spectrograms are left alone."""
        return image.dim() in (4, 5) and image.shape[-3] == 3

    def draw(self, sources: list[torch.Generator]) -> torch.Tensor:
        """Uniform numbers `(copies, B, n)` for one step, from the generator of each sample."""
        return rand((self.copies, _DRAWS), sources).transpose(0, 1)

    def apply(self, image: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Change images `(B, 3, H, W)` by draws `(B, n)` from `draw`; differentiable, never clamped.

        The frames of a video `(B, F, 3, H, W)` are changed alike.
        """
        if image.dim() == 5:
            frames = self.apply(image.flatten(0, 1), draws.repeat_interleave(image.shape[1], 0))
            return frames.unflatten(0, image.shape[:2])
        u = draws.to(image)
        if self.translate or self.degrees or self.scale != (1, 1):
            image = self._warp(image, u[:, :4])
        if self.brightness or self.saturation != (1, 1) or self.contrast != (1, 1):
            image = self._recolour(image, u[:, 4:7])
        if self.cutout:
            image = self._cut(image, u[:, 7:9])
        return image

    def _warp(self, image: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Resized, turned clockwise and then shifted about the middle; edges are repeated."""
        wide = image.to(torch.promote_types(image.dtype, torch.float32))
        u = u.to(wide.dtype)[:, :, None, None]
        height, width = image.shape[2:]
        x, y = (torch.arange(side, device=image.device, dtype=wide.dtype) - (side - 1) / 2 for side in (width, height))
        x = x[None, None, :] - (2 * u[:, 0] - 1) * self.translate * width  # what is there now came from the inverse
        y = y[None, :, None] - (2 * u[:, 1] - 1) * self.translate * height
        zoom, turn = _between(u[:, 2], self.scale), (2 * u[:, 3] - 1) * math.radians(self.degrees)
        cosine, sine = turn.cos() / zoom, turn.sin() / zoom
        across = (cosine * x + sine * y) * (2 / max(1, width - 1))
        down = (cosine * y - sine * x) * (2 / max(1, height - 1))
        grid = torch.stack([across, down], -1)
        return F.grid_sample(wide, grid, padding_mode="border", align_corners=True).to(image.dtype)

    def _recolour(self, image: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        u = u[:, :, None, None, None]
        weights = constant(_GREY, image).view(1, 3, 1, 1)
        image = image + (2 * u[:, 0] - 1) * self.brightness
        grey = (image * weights).sum(1, keepdim=True)
        image = grey + _between(u[:, 1], self.saturation) * (image - grey)
        mean = grey.mean((2, 3), keepdim=True)
        return mean + _between(u[:, 2], self.contrast) * (image - mean)

    def _cut(self, image: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        inside = []
        for axis, side in ((0, image.shape[2]), (1, image.shape[3])):
            place = torch.arange(side, device=image.device).to(image)
            half = max(1, math.floor(self.cutout * side)) / 2
            inside.append((place[None] - u[:, axis : axis + 1] * (side - 1)).abs() < half)
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return torch.where(hole, 0.5, image)


def _between(u: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * u
