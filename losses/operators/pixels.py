"""Which pixels are seen, and in which colours."""

from __future__ import annotations

from typing import Any

import torch

from ..images import Picture, digest, read_image
from ..network import constant, moved, per_image
from .operator import LinearOperator

REC_601 = (0.299, 0.587, 0.114)


def binary(mask: torch.Tensor) -> torch.Tensor:
    """A mask of zeros and ones as floats.

    Raises:
        ValueError: it holds other values, or shows nothing.
    """
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("a mask holds 1 where a pixel is observed and 0 where not, and nothing else")
    if not mask.any():
        raise ValueError("the mask shows nothing: 1 = observed, 0 = to be filled in")
    return mask.detach().to(torch.get_default_dtype())


class Inpaint(LinearOperator):
    """Keep the pixels that a mask shows: `A(x) = mask * x`. `A = A^T = A^+`.

    Args:
        mask: 1 (or True) = observed, 0 = to be filled in; a tensor broadcastable to images `(B, 3, H, W)`, such as
            `(H, W)` or `(B, 1, H, W)`, or a picture (white = observed).

    Raises:
        ValueError: the mask holds other values than 0 and 1 (a picture is cut at one half), or shows nothing.
    """

    def __init__(self, mask: torch.Tensor | Picture):
        if not isinstance(mask, torch.Tensor):
            mask = read_image(mask).mean(0) > 0.5
        self.mask = binary(mask)
        self.arguments = {"mask": self.mask.bool()}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        mask = moved(self.mask, image)
        return image * (per_image(mask, len(image), "masks") if mask.ndim == 4 else mask)

    def adjoint(self, y: torch.Tensor, shape: torch.Size | tuple[int, ...] | None = None) -> torch.Tensor:
        return self(y)

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return self(y)

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        return moved(self.mask, y)

    def describe(self) -> dict[str, Any]:
        return {"operator": "Inpaint", "mask": digest(self.mask)}


class Outpaint(LinearOperator):
    """Keep the pixels in a box, of pictures of any size; the rest is zero. `A = A^T = A^+`.

    Args:
        box: the share of height and width that is kept, in the middle; or the box's (left, top, right, bottom) as
            shares of width and height in [0, 1], rounded to whole pixels.

    Raises:
        ValueError: the box is empty, or reaches outside; or, when called, holds no pixel of a small picture.
    """

    def __init__(self, box: float | tuple[float, float, float, float] = 0.5):
        if isinstance(box, (tuple, list)):
            self.box = tuple(float(edge) for edge in box)
            inside = len(box) == 4 and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
        else:
            self.box = float(box)
            inside = 0 < box <= 1
        if not inside:
            raise ValueError(f"a box is a share in (0, 1], or left < right and top < bottom in [0, 1], got {box!r}")
        self.arguments = {"box": self.box}

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        sides = y.shape[-2:]
        if isinstance(self.box, float):
            margins = [(1 - self.box) / 2] * 4
        else:
            margins = [self.box[1], self.box[0], 1 - self.box[3], 1 - self.box[2]]
        top, left, below, right = (round(round(margin * side, 6)) for margin, side in zip(margins, (*sides, *sides)))
        mask = y.new_zeros(sides)
        mask[top : sides[0] - below, left : sides[1] - right] = 1
        if not mask.any():
            raise ValueError(f"the box {self.box} holds no pixel of images of {sides[0]} x {sides[1]} pixels")
        return mask

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image * self.observed(image)

    def adjoint(self, y: torch.Tensor, shape: torch.Size | tuple[int, ...] | None = None) -> torch.Tensor:
        return self(y)

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return self(y)


class Colorize(LinearOperator):
    """The brightness alone, `(B, 3, H, W)` RGB to `(B, 1, H, W)`: Rec. 601 weights, of the values as they are stored.

    `A^+` gives the smallest picture of that brightness, which is not a grey one.
    """

    tight = True

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"the brightness is that of colour pictures (B, 3, H, W), got {tuple(image.shape)}")
        return (image * self._weights(image)).sum(1, keepdim=True)

    def adjoint(self, y: torch.Tensor, shape: torch.Size | tuple[int, ...] | None = None) -> torch.Tensor:
        return y * self._weights(y)

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return self.adjoint(y) / sum(weight**2 for weight in REC_601)

    @staticmethod
    def _weights(like: torch.Tensor) -> torch.Tensor:
        return constant(REC_601, like).view(3, 1, 1)
