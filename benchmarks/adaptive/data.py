"""Fashion-MNIST at 16x16, eight bits per pixel."""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool2d

from ..demo.data import fashion_mnist

LEVELS = 256


def pictures(split: str) -> torch.Tensor:
    """Pictures `(N, 1, 16, 16)`, uint8, of the split `train` (60,000) or `test` (10,000): blocks of 2x2 averaged."""
    return (avg_pool2d(fashion_mnist(split)[0], 2) * (LEVELS - 1)).round().to(torch.uint8)


def as_sample(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures of uint8 as samples in [-1, 1]."""
    return pictures.float() / ((LEVELS - 1) / 2) - 1


GRID_POINTS = as_sample(torch.arange(LEVELS))
"""Every value that a pixel of a sample can have."""
