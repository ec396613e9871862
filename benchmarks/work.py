"""The work that methods are compared on: a model, what is wanted of each picture, and a judge that never guides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from lossguide.samplers import Denoiser

SETS = ("search", "evaluation", "fresh")
"""Strengths are searched on the first set of pictures, figures are of the second, error bars of the third."""


@dataclass(frozen=True)
class Pictures:
    """One set of pictures to make.

    Attributes:
        seeds: one per picture.
        loss: places in the set -> what guides those pictures.
        judge: the first pictures of the set, `(N, C, H, W)` in [0, 1] -> figures `(N,)` by name.
        shown: what the contact sheet shows beside the results, by label.
        trivial: what costs nothing, to be better than; None where there is no such thing.
        whole: figures of the first pictures of the set as a whole, such as distances to real ones: name -> figure and
            its standard error over pictures.
    """

    seeds: Sequence[int]
    loss: Callable[[Sequence[int]], Callable]
    judge: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    shown: dict[str, torch.Tensor] = field(default_factory=dict)
    trivial: torch.Tensor | None = None
    whole: Callable[[torch.Tensor], dict[str, tuple[float, float]]] | None = None


@dataclass(frozen=True)
class Work:
    """A model and something wanted of it.

    Attributes:
        name, about: for the report.
        model: loads the denoiser.
        pictures: one of `SETS` -> its pictures.
        figure: the judge's figure that counts.
        higher: whether more of it is better.
        size: a constant factor of the loss's gradient whose step is about as long as the sampler's noise; grids are
            built around it.
        linear: whether the loss is one measurement by a linear operator.
        augment: whether random augmentation suits what guides.
        batch: pictures drawn at once.
        available: whether the model and the data are at hand.
    """

    name: str
    about: str
    model: Callable[[], Denoiser]
    pictures: Callable[[str], Pictures]
    figure: str
    higher: bool
    size: float
    linear: bool = False
    augment: bool = True
    batch: int = 8
    available: Callable[[], bool] = lambda: True
