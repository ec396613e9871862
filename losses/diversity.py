"""A loss over a batch: its pictures shall differ."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .loss import Loss
from .network import FrozenNetwork, describe_network


class Diversity(Loss):
    """How alike a picture is to the others of its batch: the mean cosine similarity of features, in [-1, 1].

    The features are a network's, or, without one, the pictures themselves, averaged to `size` x `size` pixels, less
    their mean colour. Every picture's value depends on the whole batch, so that the same seed gives another picture in
    another batch; alone, a picture has zero.

    Args:
        network: images `(B, 3, H, W)` in [0, 1] -> features `(B, ...)`; None for the pictures themselves.
        size: pixels a side, without a network.
    """

    name = "diversity"
    augment = False  # augmented copies would be others of the batch
    whole_batch = True
    pictures = True

    def __init__(self, network: Callable[[torch.Tensor], torch.Tensor] | None = None, *, size: int = 16):
        if size < 2:
            raise ValueError(f"pictures are compared in at least 2 x 2 pixels, got {size}")
        self.network, self.size = None if network is None else FrozenNetwork(network), size
        self.settings = {"network": None if network is None else describe_network(network), "size": size}
        self.arguments = {"network": network, "size": size}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if self.network is not None:
            features = self.network(image).flatten(1)
        else:
            small = F.adaptive_avg_pool2d(image, self.size)
            features = (small - small.mean((2, 3), keepdim=True)).flatten(1)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        features = F.normalize(features, dim=1, eps=1e-6)
        alike = features @ features.T
        others = alike.sum(1) - alike.diagonal()
        return others / max(len(image) - 1, 1)
