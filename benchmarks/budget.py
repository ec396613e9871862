"""What a run may cost: calls of the denoiser per picture, planned before it and counted during it.

A forward of the denoiser is one call, and so is a backward through it: it takes 1.0 to 1.2 times as long as a forward
without a graph (see `run floor`), whose time a run is compared with besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lossguide.samplers import Denoiser
from lossguide.samplers.solver import Solver

MOST = 1000
"""Steps that are tried at most."""


@dataclass
class Calls:
    """Forwards of the denoiser and backwards through it; of one picture, or of all that went through it."""

    forwards: float = 0
    backwards: float = 0

    @property
    def total(self) -> float:
        return self.forwards + self.backwards


def planned(model: Denoiser, guidance, steps: int) -> Calls:
    """The calls per picture of `sample(model, guidance, steps=steps)`, without running it.

    Raises:
        ValueError: the guidance acts at none of so few steps.
    """
    solver = Solver.of(model.scheduler, steps, model.device)
    if guidance is None:
        return Calls(len(solver))
    run = guidance.begin(solver, model.decode, [0] * guidance.candidates)
    backwards = sum(run.needs_graph(visit) for visit in run.visits)
    return Calls(guidance.candidates * len(run.visits), guidance.candidates * backwards)


def most(calls: Callable[[int], Calls], budget: float, limit: int = MOST) -> int:
    """The largest count, from 1 to `limit`, whose calls fit into a budget; 0 where not even one does.

    Counts are steps, or candidates. Time travel makes calls grow unevenly, but they do grow; counts that cannot be run
    (`ValueError`) do not fit.
    """

    def fits(count: int) -> bool:
        try:
            return calls(count).total <= budget + 1e-9
        except ValueError:
            return False

    low, high = 0, 1
    while high <= limit and not fits(high) and high <= budget:  # too few steps for the guidance to act at one
        high += 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    while low + 1 <= limit and fits(low + 1):
        low += 1
    return low


@contextmanager
def counted(model: Callable) -> Iterator[Calls]:
    """Counts, for the time, what goes forward through a module and backward through it, in pictures.

    Other callables than modules are not counted.
    """
    calls = Calls()

    def backward(gradient: torch.Tensor) -> None:
        calls.backwards += len(gradient)

    def forward(module, arguments, output) -> None:
        prediction = output if isinstance(output, torch.Tensor) else output[0]
        calls.forwards += len(prediction)
        if prediction.requires_grad:
            prediction.register_hook(backward)

    handle = model.register_forward_hook(forward) if isinstance(model, torch.nn.Module) else None
    try:
        yield calls
    finally:
        if handle is not None:
            handle.remove()
