"""Colours: a mean colour, or a palette, in CIE Lab, where a distance of 1 is about what an eye can tell apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image, ImageColor

from .images import Picture, Pixels, digest, keep, read_image
from .loss import Loss
from .network import constant, distance, moved

ColorLike: TypeAlias = str | Sequence[float] | torch.Tensor

# linear sRGB -> XYZ (D65), divided by the white point
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)


def rgb_to_lab(rgb: torch.Tensor) -> torch.Tensor:
    """sRGB `(..., 3)`, nominally in [0, 1], to CIE Lab (D65); L in [0, 100].

    Both curves go on beyond [0, 1] by their own linear or power part, so that values and gradients are finite
    everywhere and never vanish (kornia's and scikit-image's give NaN gradients below 0, or clamp).
    """
    linear = torch.where(rgb > 0.04045, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix = constant(sum(_XYZ, ()), rgb).view(3, 3) / constant(_WHITE, rgb)[:, None]
    xyz = linear @ matrix.T
    knee = 6 / 29
    f = torch.where(xyz > knee**3, xyz.clamp(min=knee**3) ** (1 / 3), xyz / (3 * knee**2) + 4 / 29)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


class Color(Loss):
    """The distance of an image's colours from a mean colour or from a palette, in CIE Lab / 100.

    A colour: `||mean over pixels of Lab(image) - Lab(colour)||_2 / 100`, not squared.
    A palette, or a picture whose colours are the palette: the sliced Wasserstein distance between the pixels and the
    palette as two clouds of Lab colours, `sqrt(3 mean_u W_2(u)^2) / 100` over 24 fixed directions u: every pixel goes
    to some palette colour, and every palette colour gets its share of pixels. Of two clouds that differ by a shift it
    is the length of the shift. Where things are in the picture does not matter.

    Args:
        target: a colour: '#rrggbb', a name ('red'), 'rgb(255, 0, 0)' or three numbers in [0, 1]; a list of colours;
            or a picture: a path, a Pillow image, a tensor `(3, H, W)` in [0, 1].
        shares: for a list of colours: what part of the picture each takes, normalised; equal unless given.

    Raises:
        ValueError: that is no colour, or the shares do not match the colours.
        FileNotFoundError: there is no such picture.

    Source: sliced Wasserstein distance of colours: Rabin et al. 2011; CIE 1976 L*a*b*.
    """

    pictures = True
    name = "color"
    augment = False

    def __init__(
        self,
        target: ColorLike | Sequence[ColorLike] | Picture,
        *,
        shares: Sequence[float] | None = None,
    ):
        picture = _is_picture(target)
        single = not picture and _is_color(target)
        if picture:
            target = keep(target)
            colors = _picture_colors(target)
        else:
            colors = torch.stack([_color(one) for one in ([target] if single else target)])
        self.single = single
        self.target = rgb_to_lab(colors)
        self.shares = torch.ones(len(colors)) if shares is None else torch.as_tensor(shares, dtype=torch.float64)
        if self.shares.shape != (len(colors),) or not (self.shares >= 0).all() or not self.shares.sum() > 0:
            raise ValueError(f"shares are {len(colors)} numbers, one per colour, not negative, got {shares!r}")
        self.shares = self.shares.double() / self.shares.sum()
        generator = torch.Generator().manual_seed(0)
        bases = torch.linalg.qr(torch.randn(8, 3, 3, generator=generator, dtype=torch.float64))[0]
        self.directions = bases.reshape(24, 3)  # eight orthonormal bases, so that no axis counts more than another
        self._kept: torch.Tensor | None = None
        plain = target.tolist() if isinstance(target, torch.Tensor) and target.ndim < 3 else target
        plain = plain if picture or isinstance(plain, str) else list(plain)
        self.settings = {"target": [digest(c) for c in plain] if isinstance(plain, list) else digest(plain)}
        if shares is not None:
            self.settings["shares"] = [float(s) for s in shares]
        self.arguments = self.settings | {"target": plain}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        lab = rgb_to_lab(image.flatten(2).transpose(1, 2))  # (B, pixels, 3)
        if self.single:
            return distance(lab.mean(1) - moved(self.target, lab)) / 100
        pixels = lab.shape[1]
        along = (lab @ moved(self.directions, lab).T).sort(dim=1, stable=True).values  # (B, pixels, 24)
        moves = along - self._quantiles(along)
        return distance(moves) * (3 / (pixels * len(self.directions))) ** 0.5 / 100

    def _quantiles(self, along: torch.Tensor) -> torch.Tensor:
        """Where the palette, spread over as many pixels by its shares, lies along each direction: `(pixels, 24)`."""
        pixels = along.shape[1]
        if self._kept is None or len(self._kept) != pixels:
            goal, order = (self.target.double() @ self.directions.T).sort(0)  # (colours, 24)
            steps = self.shares[order].cumsum(0).T.contiguous()
            at = (torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels
            index = torch.searchsorted(steps, at.expand(len(steps), -1).contiguous()).clamp(max=len(goal) - 1)
            self._kept = goal.gather(0, index.T)
        return moved(self._kept, along)


def _is_color(target: object) -> bool:
    if isinstance(target, torch.Tensor):
        return target.ndim == 1
    return isinstance(target, str) or all(isinstance(part, (int, float)) for part in target)


def _color(color: ColorLike) -> torch.Tensor:
    if isinstance(color, str):
        try:
            return torch.tensor(ImageColor.getrgb(color)[:3]) / 255
        except ValueError:
            raise ValueError(
                f"'{color}' is no colour: give '#rrggbb', a name such as 'red', or a picture's path"
            ) from None
    value = torch.as_tensor(color, dtype=torch.float32)
    if value.shape != (3,) or not ((value >= 0) & (value <= 1)).all():
        raise ValueError(f"a colour is three numbers in [0, 1], got {color!r}")
    return value


def _is_picture(target: object) -> bool:
    if isinstance(target, str):
        return bool(Path(target).suffix) and not target.startswith(("#", "rgb", "hs"))
    if isinstance(target, torch.Tensor):
        return target.ndim >= 3
    return isinstance(target, (os.PathLike, Image.Image, Pixels))


def _picture_colors(picture: Picture, most: int = 65536) -> torch.Tensor:
    colors = read_image(picture).flatten(1).T
    return colors[:: -(-len(colors) // most)]
