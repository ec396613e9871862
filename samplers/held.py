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


def held(scheduler, levels: Sequence[Level], index: int) -> tuple[str, torch.Tensor | float] | None:
    """The name of the sample that a scheduler may have kept after its step `index`, and how far that has to move for
    the next step to land as if the sample that step `index` landed at had moved by one; None if it keeps none.
    """
    name, config = type(scheduler).__name__, scheduler.config
    start, kept, power = levels[index], "noise", 1
    if name == "UniPCMultistepScheduler":
        place, kept = "last_sample", "clean" if config.predict_x0 else "noise"
    elif name == "DPMSolverSDEScheduler":  # whose ancestral steps shrink a sample twice
        place, kept, power = "sample", "clean", 2
    elif name in HALVES:
        return "sample", 1.0
    elif name == "PNDMScheduler":
        place = "cur_sample"
        if not config.skip_prk_steps and index < len(scheduler.prk_timesteps):  # four visits from one sample
            start = levels[index - index % 4]
    elif name == "DPMSolverSinglestepScheduler":
        known = sum(output is not None for output in scheduler.model_outputs)
        place, start = "sample", levels[index + 1 - min(scheduler.order_list[index], max(1, known))]
        kept = "noise" if config.algorithm_type == "dpmsolver" else "clean"
    else:
        return None
    after = levels[index + 1]
    if not bool((after.sigma > 0).all()):  # the last step, after which nothing goes on
        return place, 0.0
    clean, noise = start.sigma / after.sigma, start.alpha / after.alpha
    factor = (clean if kept == "clean" else noise) ** power
    if name == "DPMSolverSinglestepScheduler" and config.algorithm_type.startswith("sde"):
        factor = factor * clean / noise
    return place, factor


def begins(scheduler, index: int) -> bool:
    """Whether step `index` is the first visit of a whole step, the sample there being where that starts."""
    if type(scheduler).__name__ in HALVES:
        return index % 2 == 0
    if type(scheduler).__name__ == "DPMSolverSinglestepScheduler":
        return scheduler.order_list[index] == 1
    return True
