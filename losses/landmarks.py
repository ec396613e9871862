"""Where points of a face or a body are, judged by any landmark network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .images import digest
from .loss import Loss
from .network import FrozenNetwork, describe_network, logits_of, moved, per_image


class Landmarks(Loss):
    """The mean Euclidean distance of a network's points from target points, visible ones only.

    Distances are in fractions of the picture. Networks of heat maps `(B, K, h, w)` are wrapped by
    `(kornia.geometry.spatial_soft_argmax2d(maps) + 1) / 2`, which is differentiable.

    Args:
        network: module or callable, images `(B, 3, h, w)` -> points `(B, K, 2)`, x then y in fractions of width and
            height, (0, 0) the upper left corner; or `(B, 2 K)` of the same.
        points: K points as the network orders them, `(K, 2)` or `(B, K, 2)`: a tensor or nested lists; NaN where a
            point is not visible.
        visible: which points count, booleans `(K,)` or `(B, K)`; all that are not NaN unless given.
        mean, std, size: the network's own preprocessing of images in [0, 1]; None leaves that part out.

    Raises:
        ValueError: points or visible have another shape, or nothing is visible; (when called) the network returns
            another number of points.
    """

    pictures = True
    name = "landmarks"
    augment = False  # places must stay

    def __init__(
        self,
        network: Callable[[torch.Tensor], Any],
        points: torch.Tensor | Sequence[Any],
        *,
        visible: torch.Tensor | Sequence[Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
    ):
        self.network = FrozenNetwork(network, size=size, mean=mean, std=std)
        points = torch.as_tensor(points).detach().double()
        if points.ndim not in (2, 3) or points.shape[-1] != 2:
            raise ValueError(f"points are (K, 2) or (B, K, 2), x and y in fractions, got {tuple(points.shape)}")
        points = points[None] if points.ndim == 2 else points
        if visible is not None:
            visible = torch.as_tensor(visible).bool()
            if visible.shape not in (points.shape[1:2], points.shape[:2]):
                raise ValueError(
                    f"visible is ({points.shape[1]},) or (B, {points.shape[1]}) booleans, got {tuple(visible.shape)}"
                )
            points = torch.where(visible[..., None], points, torch.nan)
        self.visible = points.isfinite().all(-1)
        if not self.visible.any(1).all():
            raise ValueError("no point is visible")
        self.points, self.batch = torch.where(self.visible[..., None], points, 0), len(points)
        self.settings = {"network": describe_network(network), "points": digest(points)}
        self.arguments = {"network": network, "points": points, "mean": mean, "std": std, "size": size}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        found = logits_of(self.network(image))
        wanted = (len(image), *self.points.shape[1:])
        if found.shape == (len(image), 2 * wanted[1]):
            found = found.view(wanted)
        if found.shape != wanted:
            raise ValueError(f"a landmark network returns points {wanted}, got {tuple(found.shape)}")
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        points, visible = (
            per_image(moved(part, found), len(image), "sets of points") for part in (self.points, self.visible)
        )
        away = torch.linalg.vector_norm(found - points, dim=-1)
        return (away * visible).sum(1) / visible.sum(1)
