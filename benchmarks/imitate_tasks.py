"""What is done to pictures in the benchmark of example pairs: degradations, edits, and random ones of known family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lossguide.losses import operators

Picture = torch.Tensor


def grey(image: Picture) -> Picture:
    """The brightness in three channels, as a file has it."""
    return operators.Colorize()(image).expand(-1, 3, -1, -1)


def nearest(factor: int) -> Callable[[Picture], Picture]:
    """One pixel of every block."""
    return lambda image: image[..., ::factor, ::factor]


def random_kernel(side: int, source: torch.Generator) -> torch.Tensor:
    """Weights `(side, side)` of no symmetry that sum to one."""
    kernel = torch.rand(side, side, generator=source) ** 2
    return kernel / kernel.sum()


def cast(matrix, offset=(0.0, 0.0, 0.0)) -> operators.Filter:
    """A matrix of colours and an offset."""
    return operators.Filter(torch.as_tensor(matrix)[:, :, None, None], offset=torch.as_tensor(offset))


@dataclass(frozen=True)
class Degradation:
    """What a pair's picture before went through.

    Attributes:
        true: the operator, as one who knows it would give it.
        wrong: a plausible one that it is not.
        factor: how many times smaller the picture gets.
    """

    true: Callable[[Picture], Picture]
    wrong: Callable[[Picture], Picture]
    factor: int = 1


def degradations() -> dict[str, Degradation]:
    """The six of the benchmark; noise is added to each."""
    source = torch.Generator().manual_seed(5)
    kernel = operators.Kernel(random_kernel(5, source))
    tint = cast([[0.75, 0.15, 0.05], [0.05, 0.6, 0.05], [0.0, 0.15, 0.45]], (0.1, 0.05, 0.0))
    tent = torch.tensor([1.0, 3.0, 3.0, 1.0])
    tent = torch.outer(tent, tent)
    return {
        "blur": Degradation(kernel, operators.SuperResolution(1)),
        "colour cast": Degradation(tint, kernel),
        "greyscale": Degradation(grey, tint),
        "30 % mask": Degradation(
            operators.Inpaint(torch.rand(64, 64, generator=torch.Generator().manual_seed(6)) > 0.3), kernel
        ),
        "2x reduction": Degradation(operators.Filter(tent[None] / tent.sum(), 2), nearest(2), 2),
        "4x reduction": Degradation(operators.SuperResolution(4), nearest(4), 4),
    }


def vignette(image: Picture) -> Picture:
    """Dark corners."""
    place = torch.linspace(-1, 1, image.shape[-1])
    return image * (1.1 - 0.65 * (place[:, None] ** 2 + place[None] ** 2)).clamp(0, 1)


EDITS: dict[str, Callable[[Picture], Picture]] = {
    "posterise": lambda image: (image * 2).round() / 2,
    "vignette": vignette,
    "invert": lambda image: 1 - image,
}

FAMILIES = ("colour", "kernel, shared", "kernel, per channel", "reduction", "mask")


def random_task(seed: int) -> tuple[str, Callable[[Picture], Picture], float]:
    """A family, an operator of it with random numbers, and the noise's standard deviation."""
    source = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=source)

    family = FAMILIES[seed % len(FAMILIES)]
    side = 3 + 2 * int(between(0, 3))
    noise = float(between(0.002, 0.03))
    if family == "colour":
        matrix = torch.eye(3) * between(0.4, 0.8, 3) + between(0, 0.15, 3, 3)
        operator = grey if seed % 2 else cast(matrix, between(0, 0.1, 3))
    elif family == "kernel, shared":
        operator = operators.Kernel(random_kernel(side, source))
    elif family == "kernel, per channel":
        operator = operators.Filter(torch.stack([random_kernel(side, source) for _ in range(3)]))
    elif family == "reduction":
        factor = 2 + 2 * int(between(0, 2))
        kernel = random_kernel(factor + 2, source)[None]
        known = [operators.SuperResolution(factor), operators.SuperResolution(factor, "bicubic")]
        operator = [*known, operators.Filter(kernel, factor)][int(between(0, 3))]
    else:
        operator = operators.Inpaint(torch.rand(64, 64, generator=source) > between(0.1, 0.6))
    return family, operator, noise


def family_of(told: str) -> str:
    """The family of a task's own name for what it found."""
    if told.startswith("reduction"):
        return "reduction"
    if told.startswith("kernel"):
        return "kernel, " + told.split(", ")[1]
    return told
