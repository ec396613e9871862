"""Scenes of two garments of Fashion-MNIST, side by side or one above the other, and what is said of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..demo.data import fashion_mnist

FOLDER = Path(os.environ.get("RELATIONS") or Path.home() / ".cache" / "lossguide" / "relations")
"""Where the trained networks are, outside of this repository."""
NAMES = {1: "trouser", 2: "pullover", 3: "dress", 5: "sandal", 8: "bag", 9: "boot"}
"""Six of the ten classes, by label: those that are told apart at half the size (no shirts, coats and sneakers)."""
CLASSES = tuple(NAMES.values())
OTHER_NAMES = {"pullover": "sweater", "dress": "gown", "bag": "handbag", "boot": "ankle boot"}
SIZE, SIDE = 32, 15
RELATIONS = ("left of", "right of", "above", "below")
OTHER_RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "over", "below": "under"}
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "there is {}")


@dataclass(frozen=True)
class Layout:
    """What a scene shows: `first` is left of `second`, or above it where `vertical`; indices of `CLASSES`."""

    vertical: bool
    first: int
    second: int

    def phrases(self) -> tuple[tuple[int, str, int], ...]:
        """The two phrases `(class, relation, class)` that are true of it."""
        there, back = ("above", "below") if self.vertical else ("left of", "right of")
        return (self.first, there, self.second), (self.second, back, self.first)


LAYOUTS = tuple(
    Layout(vertical, a, b)
    for vertical in (False, True)
    for a in range(len(CLASSES))
    for b in range(len(CLASSES))
    if a != b
)


def article(name: str) -> str:
    """'a bag', 'an ankle boot'."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(a: str, relation: str, b: str) -> str:
    """'a boot left of a bag'."""
    return f"{article(a)} {relation} {article(b)}"


def prompt(layout: Layout, phrase: int = 0) -> str:
    """One of the two plain captions of a layout."""
    a, relation, b = layout.phrases()[phrase]
    return caption(CLASSES[a], relation, CLASSES[b])


def garments(split: str) -> list[torch.Tensor]:
    """Pictures `(N, 15, 15)` in [0, 1] of each of `CLASSES`, of a split of `fashion_mnist`."""
    images, labels = fashion_mnist(split)
    small = F.interpolate(images[:, :, 2:30, 2:30], (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)[:, 0]
    return [small[labels == label] for label in NAMES]


def compose(
    pool: list[torch.Tensor], layouts: Sequence[Layout], generator: torch.Generator | None = None
) -> torch.Tensor:
    """A scene `(B, 1, 32, 32)` in [0, 1] of each layout: random garments of the pool, at random places.

    Along the axis of the relation the garments stand in their own halves; across it each by itself anywhere in the
    middle, within four pixels.
    """

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (len(layouts),), generator=generator)

    vertical = torch.tensor([layout.vertical for layout in layouts])
    batch, step = torch.arange(len(layouts)), torch.arange(SIDE)
    scene = torch.zeros(len(layouts), SIZE, SIZE)
    for which, along in ((0, draw(0, 2)), (1, draw(SIZE - SIDE - 2, SIZE - SIDE))):
        kinds = [layout.second if which else layout.first for layout in layouts]
        shares = torch.rand(len(layouts), generator=generator).tolist()
        pictures = torch.stack([pool[kind][int(share * len(pool[kind]))] for kind, share in zip(kinds, shares)])
        across = draw(4, 13)
        top, left = torch.where(vertical, along, across), torch.where(vertical, across, along)
        canvas = torch.zeros_like(scene)
        rows, columns = top[:, None] + step, left[:, None] + step
        canvas[batch[:, None, None], rows[:, :, None], columns[:, None, :]] = pictures
        scene = torch.maximum(scene, canvas)
    return scene[:, None]


def random_layouts(count: int, generator: torch.Generator | None = None) -> list[Layout]:
    """Layouts drawn with equal chances."""
    return [LAYOUTS[i] for i in torch.randint(len(LAYOUTS), (count,), generator=generator).tolist()]
