"""The pictures that tokenizers are trained and measured on, and where what is trained goes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..cifar10 import data as cifar
from ..demo import data as fashion

FOLDER = Path(os.environ.get("TOKENS") or Path.home() / ".cache" / "lossguide" / "tokens")
"""Where teachers and tokenizers go, outside of this repository."""
CHANNELS = {"fashion": 1, "cifar10": 3}
TITLES = {"fashion": "Fashion-MNIST", "cifar10": "CIFAR-10"}


def available(name: str) -> bool:
    """Whether the pictures of a data set are at hand."""
    return {"fashion": fashion, "cifar10": cifar}[name].available()


def pictures(name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures `(N, C, 32, 32)`, uint8, and labels `(N,)`, of `fashion` (grey) or `cifar10` (colour).

    Args:
        split: `train` or `test`.

    Raises:
        FileNotFoundError: they are not at hand; it says how to get them.
    """
    if name == "cifar10":
        return cifar.cifar10(split)
    images, labels = fashion.fashion_mnist(split)
    return (images * 255).round().byte(), labels


def draw(images: torch.Tensor, count: int, mirror: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures `(count, C, 32, 32)`, float in [0, 1], half of them mirrored if asked, and which they are."""
    index = torch.randint(len(images), (count,))
    part = images[index].float() / 255
    if mirror:
        part = torch.where(torch.rand(count, 1, 1, 1) < 0.5, part.flip(3), part)
    return part, index
