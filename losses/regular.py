"""What needs no target and no network: symmetry, and smoothness by total variation."""

from __future__ import annotations

import torch

from .loss import Loss

_FLIPPED = {"horizontal": -1, "vertical": -2}


class Symmetry(Loss):
    """How far an image is from its own mirror image: `mean((image - mirrored)^2)`.

    Args:
        axis: along which it is mirrored: 'horizontal', left and right are exchanged; 'vertical', top and bottom.

    Raises:
        ValueError: another axis.
    """

    pictures = True
    name = "symmetry"
    augment = False  # a shifted copy of a symmetric picture is not symmetric

    def __init__(self, axis: str = "horizontal"):
        if axis not in _FLIPPED:
            raise ValueError(f"axis is one of {', '.join(_FLIPPED)}, got {axis!r}")
        self.axis = axis
        self.settings = self.arguments = {"axis": axis}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        return (image - image.flip(_FLIPPED[self.axis])).square().flatten(1).mean(1)


class TotalVariation(Loss):
    """The mean slope of an image from pixel to pixel; zero for a constant one.

    With `dx` and `dy` the differences to the next pixel (0 at the last), the mean over pixels and channels of
    `sqrt(dx^2 + dy^2)`, or of `|dx| + |dy|`. The gradient is zero where there is no slope.

    Args:
        kind: 'isotropic', which slants cost no more than upright edges; or 'anisotropic'.

    Raises:
        ValueError: another kind.

    Source: Rudin, Osher and Fatemi 1992.
    """

    pictures = True
    name = "total-variation"
    augment = False  # a resized copy is smoother

    def __init__(self, kind: str = "isotropic"):
        if kind not in ("isotropic", "anisotropic"):
            raise ValueError(f"kind is isotropic or anisotropic, got {kind!r}")
        self.kind = kind
        self.settings = self.arguments = {"kind": kind}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        down = image.diff(dim=-2, append=image[..., -1:, :])
        right = image.diff(dim=-1, append=image[..., -1:])
        slopes = torch.stack([down, right])
        order = 2 if self.kind == "isotropic" else 1
        return torch.linalg.vector_norm(slopes, order, dim=0).flatten(1).mean(1)
