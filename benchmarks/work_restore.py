"""Restorations of real pictures: exactly the work on which others' published code was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from lossguide.losses import Measurement, measure, operators

from . import real
from .work import Pictures, Work

NUMBERS = {
    "search": (25, 75),
    "evaluation": (5, 50, 100, 150, 200, 250, 300, 350),
    "fresh": tuple(range(12, 492, 20)),
}
NOISE = 0.025  # in [0, 1]


def _source(which: str, seed: int) -> torch.Generator:
    """Random numbers of a set of pictures: the evaluation's are those that others' code was measured with."""
    return torch.Generator().manual_seed(seed + 1000 * {"evaluation": 0, "search": 1, "fresh": 2}[which])


def _seeds(which: str, count: int) -> range:
    first = {"evaluation": 20, "search": 1020, "fresh": 2020}[which]
    return range(first, first + count)


def psnr(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio `(B,)` in dB of pictures in [0, 1], the peak being 1."""
    return -10 * (images - truth).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def filled(y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each missing pixel as the mean of the observed ones among its eight neighbours, grey where there is none."""
    share = F.avg_pool2d(mask, 3, 1, 1)
    near = torch.where(share > 0, F.avg_pool2d(y, 3, 1, 1) / share.clamp_min(1e-6), 0.5)
    return y + (1 - mask) * near


def restoration(kind: str) -> Callable[[str], Pictures]:
    """A set of real pictures, degraded: "super-resolution" (4x), "inpaint" (50 %) or "deblur" (9x9, sigma 2)."""

    def pictures(which: str) -> Pictures:
        truth = real.pictures()[list(NUMBERS[which])]
        mask = None
        if kind == "super-resolution":
            operator = operators.SuperResolution(4)
        elif kind == "deblur":
            operator = operators.GaussianBlur(9, 2.0)
        else:
            mask = (torch.rand(len(truth), 1, 64, 64, generator=_source(which, 77)) > 0.5).float()
            operator = operators.Inpaint(mask)
        y = measure(operator, truth, NOISE, _source(which, 123))

        def loss(places: Sequence[int]) -> Measurement:
            places = list(places)
            return Measurement(operator if mask is None else operators.Inpaint(mask[places]), y[places], NOISE)

        if kind == "super-resolution":
            trivial = F.interpolate(y, (64, 64), mode="bicubic").clamp(0, 1)
        else:
            trivial = (y if mask is None else filled(y, mask)).clamp(0, 1)
        least = psnr(trivial, truth) - 6

        def judge(images: torch.Tensor) -> dict[str, torch.Tensor]:
            count = len(images)
            bad = ~torch.isfinite(images).flatten(1).all(1)
            images = torch.where(bad.view(-1, 1, 1, 1), 0.5, images)
            observed = y[0].numel() if mask is None else 3 * mask[:count].flatten(1).sum(1)
            got = psnr(images, truth[:count])
            return {
                "lpips": real.lpips(images, truth[:count]),
                "psnr": got,
                "rmse": 2 * loss(range(count))(images) / torch.as_tensor(observed).sqrt(),  # in [-1, 1] units
                "diverged": (bad | (got < least[:count])).float(),
            }

        degraded = trivial if kind != "super-resolution" else operator.pseudo_inverse(y)
        shown = {"truth": truth, "degraded": y.clamp(0, 1) if mask is not None else degraded.clamp(0, 1)}
        return Pictures(_seeds(which, len(truth)), loss, judge, shown, trivial)

    return pictures


def _work(kind: str, about: str, size: float) -> Work:
    return Work(
        f"real-{kind}",
        f"{about} and noise, real 64x64 model",
        real.model,
        restoration(kind),
        figure="lpips",
        higher=False,
        size=size,
        linear=True,
        available=real.available,
    )


WORKS = [
    _work("super-resolution", "4x average pooling", 20.0),
    _work("inpaint", "Half of the pixels", 15.0),
    _work("deblur", "9x9 Gaussian blur of sigma 2", 10.0),
]
