"""The two CIFAR-10 classifiers of the field's protocol, from `../shared/real`: ResNet20 guides, ResNet56 judges."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from lossguide.losses.network import IMAGENET_MEAN, IMAGENET_STD
from torch import nn

from .. import real

FILES = {"guide": "resnet20-12fca82f.th", "judge": "resnet56-4bfd9763.th"}
DEPTH = {"guide": 20, "judge": 56}


class Block(nn.Module):
    """Two convolutions and a shortcut without weights: subsampled, zeros for the new channels (He et al. 2016)."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.more = stride, out - channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(x + y)


class ResNet(nn.Module):
    """The residual network for CIFAR-10 of 6 n + 2 layers (He et al. 2016): images `(B, 3, 32, 32)` -> logits."""

    def __init__(self, depth: int, classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        channels = 16
        for i, out in enumerate((16, 32, 64)):
            blocks = []
            for j in range((depth - 2) // 6):
                blocks.append(Block(channels, out, 2 if i and not j else 1))
                channels = out
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def available() -> bool:
    """Whether both are at hand."""
    return all((real.FOLDER / "cifar10" / file).is_file() for file in FILES.values())


@functools.cache
def classifier(which: str) -> ResNet:
    """The one that guides or the one that judges, of images normalised with ImageNet's mean and deviation."""
    network = ResNet(DEPTH[which])
    state = torch.load(real.FOLDER / "cifar10" / FILES[which], map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return network.eval().requires_grad_(False)


@torch.no_grad()
def logits(which: str, images: torch.Tensor) -> torch.Tensor:
    """Logits `(N, 10)` of pictures `(N, 3, 32, 32)` in [0, 1], on the CPU."""
    network = classifier(which)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return torch.cat([network((part.float() - mean) / std) for part in images.cpu().split(250)])
