"""The earlier sample from which some schedulers go on, and what of it makes a given move of the sample they landed at.

Second-order solvers (Heun, KDPM2), single-step ones and UniPC's corrector start their next step from a sample that they
have kept. Each of these steps is linear in it, with a factor that the levels tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .levels import Level

HALVES = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
)
"""Two visits make a step, the second of which starts where the first did and adds to it."""


def held(scheduler, levels: Sequence[Level], index: int) -> tuple[str, torch.Tensor | float] | None:
    """The name of the sample that a scheduler has kept after its step `index`, and how far that has to move for the
    next step to land as if the sample that step `index` landed at had moved by one; None where nothing is kept.
    """
    name = type(scheduler).__name__
    after = levels[index + 1]
    if name in HALVES:
        return "sample", 1.0
    if name == "DPMSolverSDEScheduler":
        return "sample", _ratio(levels[index], after, "clean")
    if name == "UniPCMultistepScheduler":
        return "last_sample", _ratio(levels[index], after, "clean" if scheduler.config.predict_x0 else "noise")
    if name == "DPMSolverSinglestepScheduler":
        start = levels[index + 1 - scheduler.order_list[index]]
        algorithm = scheduler.config.algorithm_type
        ratio = _ratio(start, after, "clean" if algorithm.endswith("++") else "noise")
        if algorithm.startswith("sde"):
            ratio = ratio * _ratio(start, after, "clean") / _ratio(start, after, "noise")
        return "sample", ratio
    return None


def _ratio(before: Level, after: Level, kept: str) -> torch.Tensor | float:
    """What a step from `before` to `after` divides a sample by, the clean sample or the noise being kept."""
    scale = before.sigma / after.sigma.clamp_min(1e-20) if kept == "clean" else before.alpha / after.alpha
    return scale if bool((after.sigma > 0).all()) else 0.0  # the last step, after which nothing goes on
