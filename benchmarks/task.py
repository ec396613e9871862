"""Tasks as data: which methods do which work, with which settings, and what each may spend."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .work import Work

CLOCKS = ("calls", "seconds")
"""What a budget of B is spent in: B calls of the denoiser per picture, or the time of B bare forwards per picture."""


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: for the report.
        recipe: of `lossguide.guidance.recipes`; "unguided", "trivial" (the work's restoration for nothing), or
            "peer:NAME" for other people's code (see `peers`).
        settings: keyword arguments of the recipe, the same for all work.
        by_work: further ones, by the work's name.
        candidates_at: spend the budget on candidates of this many steps each instead of on steps.
    """

    name: str
    recipe: str
    settings: Mapping = field(default_factory=dict)
    by_work: Mapping[str, Mapping] = field(default_factory=dict)
    candidates_at: int | None = None

    def change(self, work: str) -> dict:
        """The settings for a work."""
        return {**self.settings, **self.by_work.get(work, {})}


USUAL = (
    Method("unguided", "unguided"),
    Method("best of N", "best_of_n", candidates_at=25),
    Method("auto", "auto"),
    Method("auto, cost 1.3", "auto", dict(cost=1.3)),
    Method("auto, cost 1", "auto", dict(cost=1.0)),
)
"""What every comparison holds the others against."""


@dataclass(frozen=True)
class Task:
    """What `python -m benchmarks run NAME` measures and `report NAME` writes.

    Attributes:
        works: what is wanted: model, loss, judge, metrics (see `work`).
        methods: who does it, with which settings.
        budgets: what each picture may cost, the most telling first; see `CLOCKS`.
        pictures: of the set, at most.
        which: the set, one of `work.SETS`.
        dtype: the denoiser's precision.
        likelihood: also ask the model how likely the pictures are, for the column that `meter` gives a report.
        quick: what `--quick` changes of the above.
        note: for the report.
    """

    works: Sequence[Work]
    methods: Sequence[Method]
    budgets: Sequence[int] = (50, 100, 25, 200)
    pictures: int = 8
    which: str = "evaluation"
    dtype: torch.dtype = torch.bfloat16
    likelihood: bool = False
    quick: Mapping = field(default_factory=lambda: dict(budgets=(12,), pictures=2))
    note: str = ""


FOLDER = Path(__file__).parent / "tasks"


def names() -> dict[str, str]:
    """Every task that is a file of `tasks/`, and the first line of what it says of itself; nothing is imported."""
    found = {}
    for module in pkgutil.iter_modules([str(FOLDER)]):
        told = ast.get_docstring(ast.parse((FOLDER / f"{module.name}.py").read_text())) or ""
        found[module.name.replace("_", "-")] = told.split("\n")[0].rstrip(".")
    return found


def load(name: str) -> Task:
    """A task by its name."""
    return importlib.import_module(f"benchmarks.tasks.{name.replace('-', '_')}").TASK


def peer(name: str) -> Callable:
    """Other people's code by its name in `peers`."""
    from . import peers

    return peers.PEERS[name]
