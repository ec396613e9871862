"""Fashion-MNIST (Zalando, MIT licence) from the Debian package `dataset-fashion-mnist`, padded to 32x32."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


def available() -> bool:
    """Whether the four idx files are on this machine."""
    return (FOLDER / "train-images-idx3-ubyte.gz").is_file()


def _idx(path: Path) -> np.ndarray:
    with gzip.open(path) as stream:
        header = stream.read(4)
        shape = np.frombuffer(stream.read(4 * header[3]), ">i4")
        return np.frombuffer(stream.read(), np.uint8).reshape(shape)


def fashion_mnist(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, 1, 32, 32), float in [0, 1], and labels (N,) of a split.

    `train` has 60,000 pictures, `test` 10,000. `guide` and `judge` are the even and the odd half of `train`: a network
    that guides and a network that judges never see the same picture.
    """
    if not available():
        raise FileNotFoundError(
            f"no Fashion-MNIST in {FOLDER}: `apt-get install dataset-fashion-mnist`, or set FASHION_MNIST to a folder "
            "that holds the four idx files"
        )
    prefix = "t10k" if split == "test" else "train"
    images = torch.from_numpy(_idx(FOLDER / f"{prefix}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(_idx(FOLDER / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64))
    part = {"train": slice(None), "test": slice(None), "guide": slice(0, None, 2), "judge": slice(1, None, 2)}[split]
    return F.pad(images[part, None].float() / 255, (2, 2, 2, 2)), labels[part]


def jitter(images: torch.Tensor, shift: float = 0.08, scale: float = 0.12, degrees: float = 8.0) -> torch.Tensor:
    """Random small affine map and brightness per picture: the training augmentation of the classifiers and of CLIP."""
    n = len(images)
    angle = (torch.rand(n) * 2 - 1) * degrees * torch.pi / 180
    zoom = 1 + (torch.rand(n) * 2 - 1) * scale
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = angle.cos() * zoom
    theta[:, 0, 1], theta[:, 1, 0] = -angle.sin() * zoom, angle.sin() * zoom
    theta[:, :, 2] = (torch.rand(n, 2) * 2 - 1) * shift
    moved = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
    return moved * (1 + (torch.rand(n, 1, 1, 1) * 2 - 1) * 0.2)
