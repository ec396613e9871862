"""Methods side by side at equal cost: each spends the same calls of the denoiser, and then the same time.

For a budget of B, a method's steps (of best of N: its candidates) are the most whose calls, forwards and backwards, are
no more than B per picture. Measured, this also tells its time, in that of a bare forward in the same run; where that is
not within `NEAR` of B, the method is measured once more, with steps for the time of B forwards.

One row per run goes to `results/TASK.jsonl` as soon as it is measured. A run that is there is not repeated, and what a
kill tore is measured again. Several processes share the work: they may be started by hand, or by `accelerate launch`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from . import runs, task
from .rows import Rows
from .task import Method, Task
from .trial import Trial, pictures_of, worth
from .work import Work

RESULTS = Path(__file__).parent / "results"
STRIPS = Path(__file__).parents[1] / ".train" / "tasks"  # not committed: the pictures of the contact sheets
NEAR = 0.1
"""Runs of equal time are within this share of it."""
PAUSE = 0.5  # seconds between looks at what other processes are at


class Comparison:
    """What a task measures, seen from what has been measured.

    Args:
        task: what.
        path: the file of rows.
        device: where.
        strips: a folder for pictures; None keeps none.
    """

    def __init__(self, task: Task, path: Path, device: str = "cpu", strips: Path | None = None):
        self.task, self.path, self.device, self.strips = task, path, device, strips
        self.works = [work for work in task.works if work.available()]
        self.rows = {work.name: Rows(path, runs.weights_digest(work.model)) for work in self.works}
        self._trials: dict = {}

    def trial(self, *what) -> Trial:
        """A trial, made once, for its key takes a while."""
        name = tuple(one if isinstance(one, (str, int, float)) else one.name for one in what)
        if name not in self._trials:
            self._trials[name] = Trial(self.task, *what, device=self.device)
        return self._trials[name]

    def row(self, trial: Trial) -> dict | None:
        return self.rows[trial.work.name].get(**trial.key)

    def left(self) -> Iterator[tuple[Trial, float, dict | None]]:
        """Trials that are still to be measured, the most telling first.

        Each with the calls that it may make, and where they are for a time, with the row that tells what calls take.
        """
        for amount in self.task.budgets:
            for clock in task.CLOCKS:
                for work in self.works:
                    for method in self.task.methods:
                        if not self._sensible(work, method, amount, clock):
                            continue
                        trial, calls, found = self.trial(work, method, clock, amount), float(amount), None
                        if clock == "seconds":
                            found = self.row(self.trial(work, method, "calls", amount))
                            if found is None or served(found, amount):
                                continue
                            calls *= amount / worth(found)
                        if self.row(trial) is None:
                            yield trial, calls, found

    def _sensible(self, work: Work, method: Method, amount: float, clock: str) -> bool:
        if method.recipe.startswith("peer:"):
            return work.linear and task.peer(method.recipe.removeprefix("peer:")).available
        if method.candidates_at is not None and method.candidates_at > amount:
            return False
        if method.recipe == "trivial":
            bare = pictures_of(work, self.task.which).trivial is not None
            return bare and clock == "calls" and amount == self.task.budgets[0]
        return True

    def run(self, rank: int = 0, world: int = 1) -> None:
        """Measure what is left, each of `world` processes its own share first, until nothing is left.

        A process that finds others at all that is left waits for them, and takes over what a dead one leaves.
        """
        while True:
            left = list(self.left())
            own = left[rank::world]
            for trial, calls, timed in own + [one for one in left if one not in own]:
                with self.rows[trial.work.name].claim(**trial.key) as mine:
                    if mine:
                        row = self.rows[trial.work.name].add(trial.measure(calls, timed, self.strips))
                        print(f"[{rank}] " * (world > 1) + line(row, trial.work), flush=True)
                        break  # more may have come to be measured
            else:
                if not left:
                    return
                time.sleep(PAUSE)


def served(row: dict, amount: float) -> bool:
    """Whether a run of equal calls also is one of equal time, or cannot be timed."""
    cost = worth(row) if row["figures"] is not None else None
    return cost is None or abs(cost / amount - 1) <= NEAR


def line(row: dict, work: Work) -> str:
    """A row on one line, for the terminal."""
    start = f"{row['work']:22} {row['method']:18} {row['budget']:4g} {row['clock']:8}"
    if row["figures"] is None:
        return f"{start} failed: {row['failure']}"
    cost = f"  {worth(row):.1f} forwards' time" if worth(row) else ""
    return start + "  ".join(f"{name} {value:.4g}" for name, value in row["figures"].items()) + cost


def process() -> tuple[int, int]:
    """The rank of this process and how many there are, as `accelerate launch` and torchrun say it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device() -> str:
    """This process's device: its own GPU where there are any."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def path_of(name: str, quick: bool = False) -> Path:
    """The file of a task's rows."""
    return RESULTS / f"{name}{'-quick' if quick else ''}.jsonl"


def run(name: str, quick: bool = False, fresh: bool = False, only: tuple[str, ...] = (), work: tuple[str, ...] = ()):
    """Measure a task, or `only` some methods on some `work` of it; the first process writes the report."""
    from . import report

    rank, world = process()
    chosen = task.load(name)
    for given, known in ((only, [one.name for one in chosen.methods]), (work, [one.name for one in chosen.works])):
        unknown = [one for one in given if one not in known]
        if unknown:
            raise SystemExit(f"there is no {unknown[0]!r} in {name}; there are {', '.join(map(repr, known))}")
    if fresh and world > 1:
        raise SystemExit("--fresh forgets what others may have just measured: remove the file of rows instead")
    chosen = dataclasses.replace(
        chosen,
        methods=[one for one in chosen.methods if not only or one.name in only],
        works=[one for one in chosen.works if not work or one.name in work],
        **(chosen.quick if quick else {}),
    )
    if world == 1 and os.environ.get("ACCELERATE_USE_CPU") == "True":
        print("accelerate launch --cpu starts one process; --multi_gpu as many as are asked for, without GPUs too")
    path = path_of(name, quick)
    if fresh:
        path.unlink(missing_ok=True)
    if device() == "cpu":  # one thread each: its processor time is what the work takes, whatever else is running
        torch.set_num_threads(1)
    comparison = Comparison(chosen, path, device(), STRIPS / path.stem)
    for one in chosen.works:
        if one not in comparison.works and rank == 0:
            print(f"{one.name} is left out: its model or data are not on this machine")
    if rank == 0:
        for method in chosen.methods:
            if method.recipe.startswith("peer:") and not task.peer(method.recipe.removeprefix("peer:")).available:
                print(f'{method.name} is left out: it needs `pip install ".[peers]"`')
    comparison.run(rank, world)
    if rank == 0:
        report.write(name, quick=quick)
