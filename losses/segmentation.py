"""A layout of classes, judged by any segmentation network."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from .images import Picture, digest, read_image
from .loss import Loss
from .network import FrozenNetwork, describe_network, distance, logits_of, per_image


class Segmentation(Loss):
    """The distance of a network's class maps `(K, h, w)` from a layout.

    A map of class indices: the mean cross-entropy over its pixels (brought to h x w by the nearest pixel).
    Scores `(K, h, w)`, or a picture whose scores are taken: `||scores(image) - target||_2`, not squared.

    Args:
        network: module or callable, images `(B, 3, h, w)` -> scores `(B, K, h, w)`, or torchvision's dict with 'out',
            or transformers' output with `.logits`.
        target: an integer tensor `(H, W)` or `(B, H, W)` of class indices, -1 where anything may be; a float tensor
            `(K, h, w)` or `(B, K, h, w)` of scores; or a path or Pillow image, a picture to take the layout from.
        mean, std, size: the network's own preprocessing of images in [0, 1]; None leaves that part out.

    Raises:
        ValueError: the target has another shape, or holds indices that are not classes of the network.

    Source: universal guidance, Bansal et al. 2023 (arXiv 2302.07121); the l2 form: Shen et al. 2024 (arXiv 2403.12404).
    """

    pictures = True
    name = "segmentation"

    def __init__(
        self,
        network: Callable[[torch.Tensor], Any],
        target: torch.Tensor | Picture,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
    ):
        self.network = FrozenNetwork(network, size=size, mean=mean, std=std)
        self.settings = {"network": describe_network(network), "target": digest(target)}
        if isinstance(target, (str, os.PathLike, Image.Image)):
            with torch.no_grad():
                target = self._scores(read_image(target)[None])
        elif target.is_floating_point():
            target = target.detach()[None] if target.ndim == 3 else target.detach()
        else:
            target = target.long()[None] if target.ndim == 2 else target.long()
            if (target < 0).all():
                raise ValueError("the target leaves every pixel free: it holds only negative class indices")
        if target.ndim != (4 if target.is_floating_point() else 3):
            raise ValueError(
                "a target is integer class indices (H, W) or (B, H, W), or float scores (K, h, w) or (B, K, h, w), "
                f"got {target.dtype} {tuple(target.shape)}"
            )
        self.target, self.batch = target, len(target)
        self.arguments = {"network": network, "target": target, "mean": mean, "std": std, "size": size}

    def _scores(self, image: torch.Tensor) -> torch.Tensor:
        scores = logits_of(self.network(image))
        if scores.ndim != 4 or len(scores) != len(image):
            raise ValueError(
                f"a segmentation network returns scores ({len(image)}, K, h, w), got {tuple(scores.shape)}"
            )
        return scores

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        scores = self._scores(image)
        target = per_image(self.target, len(image), "targets")
        if self.target.is_floating_point():
            if scores.shape[1:] != self.target.shape[1:]:
                raise ValueError(
                    f"the network scores {tuple(scores.shape[1:])}, the target {tuple(self.target.shape[1:])}"
                )
            return distance(scores - target.to(scores))
        if self.target.max() >= scores.shape[1]:
            raise ValueError(f"class {self.target.max()} is not one of the network's {scores.shape[1]}")
        # nearest-exact takes the pixel under each centre; doubles hold every class index
        target = F.interpolate(target[:, None].double(), scores.shape[2:], mode="nearest-exact")[:, 0].long()
        target = target.to(scores.device)
        entropy = F.cross_entropy(scores, target.clamp(min=-1), ignore_index=-1, reduction="none")
        return entropy.flatten(1).sum(1) / (target >= 0).flatten(1).sum(1).clamp(min=1)
