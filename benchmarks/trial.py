"""One run of a comparison: a method on some work within a budget, and what its row says."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lossguide.guidance import Guidance, recipes
from lossguide.losses import as_losses
from lossguide.samplers import Denoiser
from lossguide.samplers.plain import plain

from . import budget, meter, methods_report, runs, task
from .grids import ETA
from .methods import settings_digest
from .task import Method, Task
from .work import Pictures, Work

TIMES = 3  # bare forwards that are timed before each run and after it


@functools.cache
def pictures_of(work: Work, which: str) -> Pictures:
    return work.pictures(which)


_LAST: dict[tuple, tuple[torch.Tensor, dict]] = {}


def _unguided(model: Denoiser, seeds: tuple[int, ...], batch: int, steps: int, eta: float) -> tuple[torch.Tensor, dict]:
    """Unguided pictures and what they cost; those of the last call are kept, for other work of the same model."""
    key = (id(model), seeds, batch, steps, eta)
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = runs.sampled(model, lambda places: None, seeds, batch, steps, eta, TIMES)
    images, cost = _LAST[key]
    return images, dict(cost)


@dataclass(frozen=True, eq=False)
class Trial:
    """One run: a method on some work within a budget.

    Attributes:
        task, work, method: what.
        clock, budget: how much; see `task.CLOCKS`.
        device: where.
    """

    task: Task
    work: Work
    method: Method
    clock: str
    budget: float
    device: str = "cpu"

    @property
    def recipe(self) -> str:
        return self.method.recipe

    @property
    def guided(self) -> bool:
        return self.recipe not in ("unguided", "trivial") and not self.recipe.startswith("peer:")

    @functools.cached_property
    def change(self) -> dict:
        return self.method.change(self.work.name)

    @functools.cached_property
    def key(self) -> dict:
        """What tells the run apart from others, as plain data."""
        settings = {} if self.method.candidates_at is None else dict(candidates_at=self.method.candidates_at)
        return dict(
            work=self.work.name,
            method=self.method.name,
            recipe=self.recipe,
            change=plain(self.change),
            **settings,
            clock=self.clock,
            budget=self.budget,
            set=self.task.which,
            pictures=len(self.seeds),
            dtype=str(self.task.dtype).removeprefix("torch."),
            eta=self.eta,
            settings=settings_digest(self.recipe, self.change, self.work) if self.guided else None,
            on=runs.device_name(self.device),
        )

    @property
    def counted(self) -> str:
        """What the budget is spent on."""
        return "steps" if self.method.candidates_at is None else "candidates"

    @property
    def eta(self) -> float:
        return ETA.get(self.recipe, 1.0)

    @functools.cached_property
    def pictures(self) -> Pictures:
        return pictures_of(self.work, self.task.which)

    @functools.cached_property
    def seeds(self) -> list[int]:
        return list(self.pictures.seeds)[: self.task.pictures]

    @functools.cached_property
    def model(self) -> Denoiser:
        return runs.model_in(self.work.model, self.task.dtype, self.device)

    def guidance(self, places: Sequence[int], count: int) -> Guidance | None:
        """What guides the pictures at these places, of so many candidates each where the budget is spent on them."""
        if not self.guided:
            return None
        candidates = {} if self.method.candidates_at is None else dict(count=count)
        return recipes.get(self.recipe)(self.pictures.loss(places), **self.change, **candidates)

    def calls(self, count: int) -> budget.Calls:
        """The calls per picture of so many steps, or candidates."""
        if self.recipe.startswith("peer:"):
            return task.peer(self.recipe.removeprefix("peer:")).calls(count)
        return budget.planned(self.model, self.guidance([0], count), self.method.candidates_at or count)

    def count(self, calls: float) -> int:
        """The most steps, or candidates, whose calls fit; 0 where none does."""
        return budget.most(self.calls, calls, len(self.model.scheduler.alphas_cumprod))

    def draw(self, count: int) -> tuple[torch.Tensor, dict]:
        """The pictures of so many steps, or candidates, and what they cost."""
        steps = self.method.candidates_at or count
        candidates = 1 if self.method.candidates_at is None else count
        batch = max(1, self.work.batch // candidates)
        if self.recipe.startswith("peer:"):
            peer = task.peer(self.recipe.removeprefix("peer:"))

            def one(places: Sequence[int]) -> torch.Tensor:
                loss = as_losses(self.pictures.loss(places)).terms()[0].loss
                images = peer.draw(self.model, loss, self.seeds[places[0]], steps, **self.change)
                return images.clamp(0, 1)

            return runs.drawn(self.model, one, len(self.seeds), batch, TIMES)
        if self.recipe == "unguided":  # the same whatever is wanted of the pictures
            return _unguided(self.model, tuple(self.seeds), batch, steps, self.eta)
        guidance_of = lambda places: self.guidance(list(places), count)
        return runs.sampled(self.model, guidance_of, self.seeds, batch, steps, self.eta, TIMES, candidates)

    def measure(self, calls: float, timed: dict | None = None, strips: Path | None = None) -> dict:
        """The row of the run, of at most so many calls per picture; where it is the run of another row, from that."""
        about = {"seeds": self.seeds, **runs.about(self.device)}
        try:
            if self.recipe == "trivial":
                count, images, cost = 0, self.pictures.trivial[: len(self.seeds)], {}
            else:
                count = self.count(calls)
                if not count:
                    raise ValueError(f"not one step fits into {calls:g} calls")
                if timed is not None and timed.get(self.counted) == count:
                    return {**timed, **self.key}
                images, cost = self.draw(count)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            return {**self.key, "figures": None, "failure": runs.failure(error), **about}
        if strips is not None:
            methods_report.save_strip(strips / self.work.name / f"{strip_name(self.key)}.png", images)
        judged = self.pictures.judge(images) | {"guide": self.guide(images)}
        if self.task.likelihood:
            judged[meter.FIGURE] = meter.bits(runs.model_in(self.work.model, torch.float32), images, self.seeds)
        row = {**self.key, self.counted: count, **runs.figures(judged), **cost, **about}
        if self.pictures.whole is not None:
            for name, (value, error) in self.pictures.whole(images).items():
                row["figures"][name], row["errors"][name] = value, error
        return row

    @torch.no_grad()
    def guide(self, images: torch.Tensor) -> torch.Tensor:
        """The guiding loss `(B,)` of finished pictures, weighted as it guides."""
        images = images.nan_to_num(0.5)
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        parts = [range(len(images))[i : i + self.work.batch] for i in range(0, len(images), self.work.batch)]
        found = []
        for places in parts:
            terms = as_losses(self.pictures.loss(list(places))).terms()
            found.append(sum(term.weight * term.loss(images[list(places)]) for term in terms))
        return torch.cat(found)


def strip_name(key: dict) -> str:
    """A file name for the pictures of a run."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def key_of(row: dict) -> dict:
    """The key that a row was measured under."""
    names = ("work", "method", "recipe", "change", "candidates_at", "clock", "budget", "set", "pictures", "dtype")
    return {name: row[name] for name in (*names, "eta", "settings", "on") if name in row}


def worth(row: dict) -> float | None:
    """The time of a run per picture, in bare forwards of one picture in the same run; None where it was not timed.

    By processor time where one thread does the work, which other programs do not stretch, else by the wall clock.
    """
    if not row.get("forward_seconds"):
        return None
    name = clock_of(row)
    return row[name] / row["pictures"] / (row[f"forward_{name}"] / row["forward_batch"])


def clock_of(row: dict) -> str:
    """The clock that a row's time is read from."""
    return "processor_seconds" if row["on"] == "cpu" and row["threads"] == 1 else "seconds"


def seconds_per_picture(row: dict) -> float | None:
    """By the same clock."""
    return row[clock_of(row)] / row["pictures"] if row.get("forward_seconds") else None
