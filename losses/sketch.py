"""A drawing that a picture's edges should follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .images import Picture, digest, keep, read_image
from .loss import Loss
from .network import FrozenNetwork, describe_network, logits_of, moved

_GREY = (0.299, 0.587, 0.114)


class Sketch(Loss):
    """How little a picture's edges follow a drawing: `1 - cos(edges, lines)` of the two blurred maps, in [0, 1].

    The cosine takes the maps' lengths away, so that neither the contrast of the picture nor that of the drawing
    matters. Edges are Sobel magnitudes of all three channels, `e = m^2 / (sqrt(m^2 + 0.01^2) + 0.01)`, which is smooth
    where there is no edge; the gradient of a constant picture is zero.

    Args:
        drawing: lines on paper: a path, a Pillow image, or a tensor `(3, H, W)` in [0, 1]. The paper is what most of
            it is (its median), of any shade.
        extractor: another judge of lines: module or callable, images `(B, 3, h, w)` -> `(B, 1, h, w)` or `(B, h, w)`,
            or a list with that first.
        lines: 'dark' lines on light paper, 'light' ones on dark paper, or 'auto' (whichever there is more of).
        extracted: whether the extractor's lines are 'light' (edge strengths) or 'dark' (it draws on white).
        blur: deviation of the blur of both maps, as a share of the shorter side; lines attract from so far.
        mean, std, size: the extractor's own preprocessing of images in [0, 1]; None leaves that part out.

    Raises:
        FileNotFoundError, ValueError: the drawing cannot be read.
        ValueError: the drawing holds no lines, or a setting is none of those.

    Source: guidance by sketches: Voynov et al. 2023 (arXiv 2211.13752); by an extractor's lines: FreeDoM, Yu et al.
    2023 (arXiv 2303.09833).
    """

    pictures = True
    name = "sketch"
    augment = False  # places must stay

    def __init__(
        self,
        drawing: Picture,
        extractor: Callable[[torch.Tensor], Any] | None = None,
        *,
        lines: str = "auto",
        extracted: str = "light",
        blur: float = 0.02,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
    ):
        if lines not in ("auto", "dark", "light"):
            raise ValueError(f"lines are 'auto', 'dark' or 'light', got {lines!r}")
        if extracted not in ("dark", "light"):
            raise ValueError(f"extracted lines are 'dark' or 'light', got {extracted!r}")
        if not 0 <= blur < 1:
            raise ValueError(f"blur is a share of the shorter side, in [0, 1), got {blur}")
        drawing = keep(drawing)
        self.lines = _lines(read_image(drawing), lines)
        self.network = FrozenNetwork(_edges if extractor is None else extractor, size=size, mean=mean, std=std)
        self.extracted, self.blur = extracted, float(blur)
        self.settings = {"drawing": digest(drawing), "extractor": extractor and describe_network(extractor)}
        self.settings |= {"lines": lines, "extracted": extracted, "blur": self.blur}
        self.arguments = self.settings | {"drawing": drawing, "extractor": extractor}
        self.arguments |= {"mean": mean, "std": std, "size": size}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        found = logits_of(self.network(image))
        if found.ndim == 4 and found.shape[1] == 1:
            found = found[:, 0]
        if found.ndim != 3 or len(found) != len(image):
            raise ValueError(f"an extractor returns lines ({len(image)}, 1, h, w), got {tuple(found.shape)}")
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        if self.extracted == "dark":
            found = 1 - found
        lines = moved(self.lines, found)
        if lines.shape != found.shape[1:]:
            lines = F.interpolate(lines[None, None], found.shape[1:], mode="bilinear", antialias=True)[0, 0]
        found, lines = self._blurred(found).flatten(1), self._blurred(lines[None]).flatten(1)
        # lengths count from 0.001 per pixel on, so that a picture without edges has a gradient
        length = (found.square().mean(1) + 1e-6).sqrt() * (lines.square().mean(1) + 1e-12).sqrt()
        return 1 - (found * lines).mean(1) / length

    def _blurred(self, maps: torch.Tensor) -> torch.Tensor:
        from kornia.filters import gaussian_blur2d

        sigma = self.blur * min(maps.shape[1:])
        if sigma == 0:
            return maps
        reach = 2 * math.ceil(3 * sigma) + 1
        return gaussian_blur2d(maps[:, None], (reach, reach), (sigma, sigma), "replicate")[:, 0]


def _lines(drawing: torch.Tensor, lines: str) -> torch.Tensor:
    """How strong the line is at each pixel of a drawing `(3, H, W)`: `(H, W)`, 0 on paper."""
    grey = (drawing.double() * torch.tensor(_GREY, dtype=torch.float64).view(3, 1, 1)).sum(0)
    darker = grey.flatten().median() - grey
    if lines == "auto":
        lines = "dark" if darker.sum() >= 0 else "light"
    strength = (darker if lines == "dark" else -darker).clamp(min=0)
    if strength.max() < 1 / 255:
        raise ValueError("the drawing holds no lines: it is of one shade" + ("" if lines == "auto" else f" ({lines})"))
    return (strength / strength.max()).float()


def _edges(image: torch.Tensor) -> torch.Tensor:
    from kornia.filters import spatial_gradient

    image = image.to(torch.promote_types(image.dtype, torch.float32))
    square = spatial_gradient(image).square().sum((1, 2)) / image.shape[1]
    return square / ((square + 1e-4).sqrt() + 0.01)
