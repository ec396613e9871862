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
    "DPMSolverSDEScheduler",
)
"""Two visits make a step, the second of which starts where the first did."""


def held(scheduler, levels: Sequence[Level], index: int) -> tuple[str, float | torch.Tensor] | None:
    """The name of the sample that a scheduler may have kept after its step `index`, and how far that has to move for
    the next step to land as if the sample that step `index` landed at had moved by one; None if it keeps none.
    """
    name, config = type(scheduler).__name__, scheduler.config
    start, place = levels[index], "sample"
    clean, noise, ancestral = (1, 0), (0, 1), (2, -1)  # powers of what a step divides a sample by, that being kept
    if name == "UniPCMultistepScheduler":
        place, powers = "last_sample", clean if config.predict_x0 else noise
    elif name == "PNDMScheduler":
        place, powers = "cur_sample", noise
        if not config.skip_prk_steps and index < len(scheduler.prk_timesteps):  # four visits from one sample
            start = levels[index - index % 4]
    elif name == "DPMSolverSinglestepScheduler":
        known = sum(output is not None for output in scheduler.model_outputs)
        start = levels[index + 1 - min(scheduler.order_list[index], max(1, known))]
        powers = {"dpmsolver": noise, "dpmsolver++": clean}.get(config.algorithm_type, ancestral)
    elif name == "DPMSolverSDEScheduler":
        powers = ancestral
    elif name in HALVES:  # which add to the sample
        powers = (0, 0)
    else:
        return None
    after = levels[index + 1]
    if not bool((after.sigma > 0).all()):  # the last step, after which nothing goes on
        return place, 0.0
    return place, (start.sigma / after.sigma) ** powers[0] * (start.alpha / after.alpha) ** powers[1]


def begins(scheduler, index: int) -> bool:
    """Whether step `index` is the first visit of a whole step, the sample there being where that starts."""
    if type(scheduler).__name__ in HALVES:
        return index % 2 == 0
    if type(scheduler).__name__ == "DPMSolverSinglestepScheduler":
        return scheduler.order_list[index] == 1
    return True
