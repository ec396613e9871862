"""Teachers that have seen no labels: small residual networks trained by SimCLR (Chen et al. 2020).

    python -m benchmarks.tokens.teacher fashion          # 5 minutes on one core
    python -m benchmarks.tokens.teacher cifar10          # 10 minutes

Two random views of a picture should have like features, and views of other pictures others. What a tokenizer learns
from is the last map of the network, 8x8 places, each feature less its mean over the training pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from . import data
from .fit import fit

TEMPERATURE = 0.2
BATCH = 256
PLANS = {"fashion": dict(width=32, steps=500, smallest=0.3), "cifar10": dict(width=40, steps=600, smallest=0.2)}
"""By data set: channels of the first stage, steps of `BATCH` pictures, the smallest crop as a share of the area."""


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        self.shortcut = nn.Identity()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class Teacher(nn.Module):
    """A residual network of 32x32 pictures with maps of 8x8 places, and the head that SimCLR's contrast is taken in.

    Args:
        channels: of the pictures.
        width: channels of the first stage; the features have four times as many.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv2d(channels, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            _Block(w, w, 1), _Block(w, 2 * w, 2), _Block(2 * w, 4 * w, 1),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(4 * w, 4 * w), nn.ReLU(), nn.Linear(4 * w, 64))
        self.register_buffer("centre", torch.zeros(4 * w))

    @property
    def dimension(self) -> int:
        """Of the features."""
        return len(self.centre)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, D, 8, 8)` of pictures `(B, C, 32, 32)` in [0, 1]."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(((images - 0.5) * 2).contiguous(memory_format=torch.channels_last))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features `(B, 64, D)`, float32, of pictures `(B, C, 32, 32)` in [0, 1], less their mean in training."""
        return self.maps(images).float().flatten(2).transpose(1, 2) - self.centre


def views(images: torch.Tensor, smallest: float) -> torch.Tensor:
    """A random view of each picture: cropped, resized, mirrored, other brightness, contrast and colours.

    Args:
        smallest: the least area of a crop, as a share of the picture's.
    """
    n, channels = images.shape[:2]
    side = (smallest + (1 - smallest) * torch.rand(n)).sqrt()
    aspect = torch.exp((torch.rand(n) * 2 - 1) * 0.29)  # 3:4 to 4:3
    w, h = (side * aspect.sqrt()).clamp(max=1), (side / aspect.sqrt()).clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = w * (1 - 2 * (torch.rand(n) < 0.5).float())
    theta[:, 1, 1] = h
    theta[:, 0, 2], theta[:, 1, 2] = (1 - w) * (torch.rand(n) * 2 - 1), (1 - h) * (torch.rand(n) * 2 - 1)
    view = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
    if channels == 3:
        view = torch.einsum("nij,njhw->nihw", _colours(n), view)
    mean = view.mean((1, 2, 3), keepdim=True)
    contrast, brightness = (1 + (torch.rand(2, n, 1, 1, 1) * 2 - 1) * 0.4).unbind()
    return ((view - mean) * contrast + mean) * brightness


def _colours(n: int) -> torch.Tensor:
    """Random matrices `(n, 3, 3)`: saturation 0.4 to 1.6 and hue turned by up to 36 degrees in YIQ; grey in a fifth."""
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    saturation = torch.where(torch.rand(n) < 0.2, torch.zeros(n), 0.4 + 1.2 * torch.rand(n))
    angle = (torch.rand(n) * 2 - 1) * 0.2 * torch.pi
    turn = torch.zeros(n, 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
    turn[:, 2, 1] = saturation * angle.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    return torch.linalg.inv(yiq) @ turn @ yiq


def contrast(first: torch.Tensor, second: torch.Tensor, temperature: float = TEMPERATURE) -> torch.Tensor:
    """NT-Xent of two views' embeddings `(B, d)`: each of the 2 B should find its partner among the others."""
    both = F.normalize(torch.cat([first, second]), dim=1)
    n = len(first)
    logits = (both @ both.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


def train(name: str, width: int, steps: int, smallest: float, seed: int, out: Path, batch: int = BATCH) -> Teacher:
    """Train a teacher on the pictures of a data set, without labels, and save it as `out`/NAME-teacher.safetensors."""
    images = data.pictures(name, "train")[0]
    torch.manual_seed(seed)
    teacher = Teacher(data.CHANNELS[name], width).to(memory_format=torch.channels_last)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        part, _ = data.draw(images, batch, mirror=False)
        maps = teacher.maps(torch.cat([views(part, smallest), views(part, smallest)]))
        first, second = teacher.head(maps.float().mean((2, 3))).chunk(2)
        return contrast(first, second), {}

    state = out / f"{name}-teacher.state"
    run = fit({"teacher": teacher}, loss, steps, 2e-3, seed, state, title=f"{name} teacher")
    teacher.eval()
    with torch.no_grad():
        means = [teacher(part.float() / 255).mean((0, 1)) for part in images[:: max(1, len(images) // 5000)].split(500)]
    teacher.centre.copy_(torch.stack(means).mean(0))
    save_file({key: value.contiguous() for key, value in teacher.state_dict().items()}, file(name, out))
    facts = dict(method="SimCLR", width=width, steps=steps, batch=batch, smallest=smallest, seed=seed, **run)
    (out / f"{name}-teacher.json").write_text(json.dumps(facts, indent=1) + "\n")
    state.unlink()
    return teacher.requires_grad_(False)


def file(name: str, folder: Path) -> Path:
    """The file of a data set's teacher."""
    return folder / f"{name}-teacher.safetensors"


def load(name: str, folder: Path = data.FOLDER) -> Teacher:
    """The trained teacher of a data set, frozen.

    Raises:
        FileNotFoundError: it has not been trained; it says how.
    """
    path = file(name, folder)
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: `python -m benchmarks.tokens.teacher {name}` trains it")
    state = load_file(path)
    teacher = Teacher(data.CHANNELS[name], len(state["centre"]) // 4)
    teacher.load_state_dict(state)
    return teacher.to(memory_format=torch.channels_last).eval().requires_grad_(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(data.CHANNELS))
    parser.add_argument("--steps", type=int, help="instead of the plan's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=data.FOLDER)
    arguments = parser.parse_args()
    plan = PLANS[arguments.name] | ({"steps": arguments.steps} if arguments.steps else {})
    train(arguments.name, seed=arguments.seed, out=arguments.out, **plan)
