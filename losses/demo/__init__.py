"""The demo's small networks and the words they know: a CLIP model, a guide classifier and a judge classifier.

All three were trained on Fashion-MNIST (see README.md in this folder): CLIP and the guide on one half of its training
set, the judge on the other half, so that what judges a picture never saw what guided it. The demo's world is ten kinds
of clothing; `class_of` tells whether a prompt names one of them.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["CLASSES", "SYNONYMS", "TEMPLATES", "caption", "captions", "class_of", "classifier", "clip_folder"]

FOLDER = Path(__file__).parent

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
"""The ten classes in the order of Fashion-MNIST's labels, under their official names."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "t-shirt": ("t shirt", "tshirt", "tee shirt", "tee", "top"),
    "trouser": ("trousers", "pants", "jeans", "slacks", "pair of trousers", "pair of pants", "pair of jeans"),
    "pullover": ("sweater", "jumper", "sweatshirt", "hoodie"),
    "dress": ("gown", "frock", "sundress"),
    "coat": ("jacket", "overcoat", "parka"),
    "sandal": ("flip-flop", "high heel", "open shoe"),
    "shirt": ("blouse", "button-up shirt", "dress shirt"),
    "sneaker": ("trainer", "running shoe", "tennis shoe"),
    "bag": ("handbag", "purse", "tote bag", "shoulder bag"),
    "ankle boot": ("boot", "bootie", "short boot"),
}
"""Other names of each class that CLIP was trained with; plurals besides (`plural`)."""

TEMPLATES = (
    "{}",
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a greyscale photo of a {}",
    "a product photo of a {}",
    "this is a {}",
)
"""Caption templates; `caption` fills them in and minds the article."""


def plural(name: str) -> str:
    """The plural of a class name or synonym: `dresses`, `ankle boots`; `pants` stays as it is."""
    if name.startswith("pair of ") or _is_plural(name):
        return name
    return name + ("es" if name.endswith("s") else "s")


def _is_plural(name: str) -> bool:
    return name.endswith("s") and not name.endswith("ss") and not name.startswith("pair of ")


def caption(name: str, template: str = "a photo of a {}") -> str:
    """A template filled with a name, singular or plural: `a photo of an ankle boot`, `a photo of sneakers`."""
    if _is_plural(name):
        return template.replace("is a {}", "are {}").replace("this are", "these are").replace("a {}", "{}").format(name)
    return template.replace("a {}", "an {}" if name[0] in "aeiou" else "a {}").format(name)


def captions(name: str) -> tuple[str, ...]:
    """Every caption of a class, its synonyms and plurals among them, that CLIP was trained with.

    Raises:
        ValueError: `name` is none of `CLASSES`.
    """
    if name not in CLASSES:
        raise ValueError(f"no class '{name}'; the demo's classes are {', '.join(CLASSES)}")
    names = dict.fromkeys(form for word in (name, *SYNONYMS[name]) for form in (word, plural(word)))
    return tuple(dict.fromkeys(caption(word, template) for word in names for template in TEMPLATES))


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


@functools.cache
def _pattern() -> tuple[re.Pattern[str], dict[str, int]]:
    owner = {_words(word): i for i, name in enumerate(CLASSES) for word in (name, *SYNONYMS[name])}
    longest_first = sorted(owner, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(longest_first)})(?:es|s)?\b"), owner


def class_of(prompt: str) -> int | None:
    """The index of the one class that a prompt names, or None when it names none of them, or several.

    Names and synonyms are found as whole words, singular or plural, in any case; the longest name wins, so that
    'dress shirt' is a shirt, and hyphens do not matter.
    """
    pattern, owner = _pattern()
    found = {owner[match[1]] for match in pattern.finditer(_words(prompt))}
    return found.pop() if len(found) == 1 else None


def clip_folder() -> Path:
    """The folder of the demo's CLIP model, which open_clip takes as `local-dir:<folder>`."""
    return FOLDER / "clip"


class Classifier(nn.Module):
    """What both classifiers share: pictures of any size and colour in, logits of the ten classes out."""

    body: nn.Module  # (B, 1, 32, 32), mean 0, deviation 1 -> (B, d)
    head: nn.Linear

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """Penultimate features (B, d) of pictures (B, 3, H, W) or (B, 1, H, W) in [0, 1]; d is `head.in_features`.

        Raises:
            ValueError: the picture has not four axes, or neither one nor three channels.
        """
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise ValueError(f"a classifier takes pictures (B, 3, H, W) or (B, 1, H, W), got {tuple(image.shape)}")
        grey = image.mean(1, keepdim=True)
        if grey.shape[2:] != (32, 32):
            grey = F.interpolate(grey, (32, 32), mode="bilinear", antialias=True, align_corners=False)
        return self.body((grey - 0.22) / 0.33)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (B, 10), in the order of `CLASSES`, of pictures (B, 3, H, W) or (B, 1, H, W) in [0, 1]."""
        return self.head(self.features(image))


class Guide(Classifier):
    """A plain convolutional network: GroupNorm and GELU, smooth in its input, strided convolutions, no shortcuts."""

    def __init__(self, width: int = 24):
        super().__init__()

        def block(inside: int, outside: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.GroupNorm(8, outside), nn.GELU()
            )

        w = width
        self.body = nn.Sequential(
            block(1, w, 1), block(w, 2 * w, 2), block(2 * w, 2 * w, 1), block(2 * w, 4 * w, 2),
            block(4 * w, 4 * w, 1), block(4 * w, 8 * w, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(8 * w, len(CLASSES))


class _Residual(nn.Module):
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


class Judge(Classifier):
    """A small residual network: BatchNorm and ReLU, a 5x5 stem, its features narrowed for Frechet distances."""

    def __init__(self, width: int = 32, features: int = 64):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv2d(1, w // 2, 5, 1, 2, bias=False), nn.BatchNorm2d(w // 2), nn.ReLU(),
            _Residual(w // 2, w, 2), _Residual(w, 2 * w, 2), _Residual(2 * w, 4 * w, 2),
            nn.Conv2d(4 * w, features, 1, bias=False), nn.BatchNorm2d(features), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(features, len(CLASSES))


NETWORKS: dict[str, type[Classifier]] = {"guide": Guide, "judge": Judge}


def classifier(which: Literal["guide", "judge"]) -> Classifier:
    """A trained classifier, frozen, in eval mode, float32, on the CPU.

    Called with pictures (B, 3, H, W) or (B, 1, H, W), nominally in [0, 1], it averages the channels, resizes to 32x32
    where the size differs, and returns logits (B, 10) in the order of `CLASSES`; `.features(image)` returns the
    penultimate features (B, d). Differentiable in the picture throughout.

    Args:
        which: `guide` is the one to steer with; `judge` was trained on other pictures and has another architecture.

    Raises:
        ValueError: `which` is neither.
        FileNotFoundError: the weights are missing, e.g. in a tree where they have not been trained yet.
    """
    if which not in NETWORKS:
        raise ValueError(f"the demo's classifiers are {', '.join(NETWORKS)}, got {which!r}")
    path = FOLDER / f"{which}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: `python -m benchmarks.demo.train_classifiers` makes it")
    from safetensors.torch import load_file

    network = NETWORKS[which]()
    network.load_state_dict(load_file(path))  # copies fp16 weights into the float32 network
    return network.eval().requires_grad_(False)
