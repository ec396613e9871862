"""Time travel: visit a step several times, re-noising in between (Lugmayr et al. 2022; Yu et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TimeTravel:
    """Visit each step of a window `repeats` times.

    Args:
        repeats: visits per step, at least 1.
        start, stop: the window of sampling progress, [start, stop); 0 is pure noise, 1 the picture.
    """

    repeats: int = 2
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if self.repeats < 1 or not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"time travel needs repeats >= 1 and 0 <= start < stop <= 1, got {self}")


@dataclass(frozen=True)
class Visit:
    """One visit of solver step `step`: the `repeat`-th (from 0), and whether it is the `last`."""

    step: int
    repeat: int = 0
    last: bool = True


def visits(
    progress: Sequence[float], travel: TimeTravel | None = None, where: Callable[[int], bool] = lambda step: True
) -> list[Visit]:
    """The order in which solver steps are visited, of which `progress` tells how far each has come; only steps `where`
    something acts, and that can be begun anew, are visited repeatedly."""
    plan = []
    for step, reached in enumerate(progress):
        inside = travel is not None and travel.start <= reached < travel.stop and where(step)
        repeats = travel.repeats if inside else 1
        plan += [Visit(step, repeat, repeat == repeats - 1) for repeat in range(repeats)]
    return plan
