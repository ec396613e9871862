"""Every recipe on ten pairs of a model and a task: at its default strength, and at the best of a grid.

Strengths are searched on some pictures; default and best are measured on others, and once more, for error bars, on
fresh ones. The denoiser runs in float32 for the figures of recipes that are compared with others' code; elsewhere in
bfloat16 on processors that compute in it, twice as fast, and a row of either precision counts. One row per run goes to
`results/methods.jsonl` as soon as it is measured, and no run is repeated. Several processes started with the same
command share the work.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lossguide.guidance import Guidance, recipes
from lossguide.losses import Measurement, Term, operators
from lossguide.samplers.plain import plain

from . import methods_report, work_demo, work_look, work_restore
from .grids import ETA, LONG, MOST, ORDER, beyond, grid, suits
from .rows import Rows, digest_of
from .runs import about, failure, fast_dtype, figures, model_in, sampled, weights_digest
from .work import Pictures, Work

RESULTS = Path(__file__).parent / "results"
STRIPS = Path(__file__).parents[1] / ".train" / "methods"  # not committed: the pictures of the contact sheets
WORKS = [*work_restore.WORKS, *work_look.WORKS, *work_demo.WORKS]
STEPS = 50
LEADERS = 3
BARE = ("trivial", "unguided")
COMPARED = (*BARE, "auto", "tfg", "mpgd", "freedom", "adam_dps", "pigdm", "dps", "diffpir")
"""Measured in float32, as others' code was, with which most of them are compared."""
CHEAPER = (dict(time_travel=None),)
"""Forms of auto that cost less, measured on the restorations, too."""
QUICK = ("auto", "dps", "diffpir", "best_of_n")
QUICK_SIZE = dict(steps=2, most=2, entries=2)


@dataclass(frozen=True)
class Job:
    """One run: a recipe with some settings on one set of a work's pictures."""

    work: Work
    recipe: str
    change: dict
    which: str
    steps: int
    most: int | None = None

    @functools.cached_property
    def key(self) -> dict:
        """What tells the run apart from others, as plain data."""
        return dict(
            work=self.work.name,
            recipe=self.recipe,
            change=plain(self.change),
            set=self.which,
            pictures=len(self.seeds),
            steps=self.steps,
            eta=ETA.get(self.recipe, 1.0),
            dtype=str(self.dtype).removeprefix("torch."),
            settings=None if self.recipe in BARE else settings_digest(self.recipe, self.change, self.work),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's precision."""
        return torch.float32 if self.exact else fast_dtype()

    @property
    def exact(self) -> bool:
        """Whether only float32 will do."""
        return self.which == "evaluation" and self.recipe in COMPARED

    @functools.cached_property
    def seeds(self) -> list[int]:
        return list(pictures_of(self.work, self.which).seeds)[: self.most]


@functools.cache
def _pictures(name: str, which: str) -> Pictures:
    return next(work for work in WORKS if work.name == name).pictures(which)


def pictures_of(work: Work, which: str) -> Pictures:
    """A set of a work's pictures, made once."""
    return _pictures(work.name, which)


def settings_digest(recipe: str, change: dict, work: Work) -> str:
    """A short digest of a recipe's settings, so that rows of other settings are not mixed in."""
    stand_in = Term(lambda image: image.flatten(1).sum(1), augment=work.augment)
    if work.linear:
        stand_in = Measurement(operators.SuperResolution(1), torch.zeros(3, 2, 2), 0.1)
    return digest_of(recipes.get(recipe)(stand_in, **change))


def draw(job: Job) -> tuple[torch.Tensor, dict]:
    """The pictures of a run, and what it cost."""
    pictures, model = pictures_of(job.work, job.which), model_in(job.work.model, job.dtype)
    if job.recipe == "trivial":
        return pictures.trivial[: len(job.seeds)], {}
    guided = job.recipe != "unguided"
    batch = job.work.batch
    if guided and recipes.get(job.recipe)(pictures.loss([0]), **job.change).candidates > 1:
        batch = 1  # not every loss's targets follow the particles of several pictures

    def guidance_of(places: Sequence[int]) -> Guidance | None:
        return recipes.get(job.recipe)(pictures.loss(places), **job.change) if guided else None

    return sampled(model, guidance_of, job.seeds, batch, job.steps, ETA.get(job.recipe, 1.0))


def measure(job: Job, strips: Path | None = None) -> dict:
    """The row of a run: figures of the judge, per picture and on the whole, and cost."""
    try:
        images, cost = draw(job)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        return {**job.key, "figures": None, "failure": failure(error), **about()}
    judged = pictures_of(job.work, job.which).judge(images)
    if strips is not None and job.which == "evaluation" and not job.change:
        methods_report.save_strip(strips / job.work.name / f"{job.recipe}.png", images)
    cost.pop("curve", None)
    return {**job.key, **figures(judged), **cost, **about()}


@dataclass(frozen=True)
class Search:
    """The runs of a search, the best settings when all of them have been measured, and whether they stand at an end."""

    jobs: list[Job]
    best: dict | None = None
    edge: bool = False


class Plan:
    """What there is to measure, in order, seen from what has been measured.

    Args:
        works: what to measure on.
        names: recipes, in order.
        path: the file of rows.
        steps: of the solver.
        most: pictures of a set at most.
        entries: settings of a grid at most; all, and those beyond the ends of its ladders, when None.
    """

    def __init__(
        self,
        works: Sequence[Work],
        names: Sequence[str],
        path: Path,
        steps: int = STEPS,
        most: int | None = None,
        entries: int | None = None,
    ):
        self.works, self.names, self.steps, self.most, self.entries = works, names, steps, most, entries
        self.rows = {work.name: Rows(path, weights_digest(work.model)) for work in works}
        self._jobs: dict = {}

    def job(self, work: Work, recipe: str, change: dict, which: str) -> Job:
        """A run, made once, for its key takes a while."""
        name = (work.name, recipe, json.dumps(plain(change), sort_keys=True), which)
        if name not in self._jobs:
            self._jobs[name] = Job(work, recipe, change, which, self.steps, self.most)
        return self._jobs[name]

    def row(self, job: Job) -> dict | None:
        """The row of a run, where it has been measured."""
        precisions = ("float32",) if job.exact else ("bfloat16", "float32")
        found = (self.rows[job.work.name].get(**job.key | {"dtype": precision}) for precision in precisions)
        return next((row for row in found if row is not None), None)

    def search(self, work: Work, recipe: str) -> Search:
        """The search of a recipe's settings, as far as it has come."""
        changes = grid(recipe, work)[: self.entries]
        if len(changes) == 1:
            return Search([], changes[0])
        sign, extra = -1 if work.higher else 1, 0
        while True:
            jobs = [self.job(work, recipe, change, "search") for change in changes]
            found = [self.row(job) for job in jobs]
            if not all(found):
                return Search(jobs)
            figures = [methods_report.figure(row, work) for row in found]
            good = [i for i, value in enumerate(figures) if value is not None]
            best = changes[min(good, key=lambda i: sign * figures[i])] if good else changes[0]
            further = beyond(changes, best)
            if further is None or extra == MOST or self.entries is not None:
                return Search(jobs, best, edge=further is not None)
            changes.append(further)
            extra += 1

    def cheaper(self, work: Work, recipe: str) -> list[Job]:
        """The runs of what costs less than the default."""
        if recipe != "auto" or not work.linear or self.entries is not None:
            return []
        return [self.job(work, recipe, change, "evaluation") for change in CHEAPER]

    def jobs(self) -> Iterator[Job]:
        """Every run, the most telling first; those that depend on others come once these have been measured."""
        for recipe in self.names:
            for work in self.works:
                if recipe in BARE:
                    if recipe != "trivial" or pictures_of(work, "evaluation").trivial is not None:
                        yield self.job(work, recipe, {}, "evaluation")
                elif suits(recipe, work):
                    yield self.job(work, recipe, {}, "evaluation")
                    yield from self.cheaper(work, recipe)
                    search = self.search(work, recipe)
                    yield from search.jobs
                    if search.best is not None:
                        yield self.job(work, recipe, search.best, "evaluation")
        if self.entries is not None:  # only to see that all of it runs
            yield from (self.job(work, "auto", {}, "fresh") for work in self.works if "auto" in self.names)
            return
        leaders = {work.name: self.leaders(work) for work in self.works}
        for leading in (True, False):
            for recipe in self.names:
                for work in self.works:
                    if recipe in BARE or not suits(recipe, work) or (recipe in leaders[work.name]) != leading:
                        continue
                    settings = ({}, self.search(work, recipe).best)
                    for change in settings if recipe == "auto" else settings[::-1]:  # what is compared comes first
                        if change is not None:
                            yield self.job(work, recipe, change, "fresh")

    def leaders(self, work: Work) -> set[str]:
        """auto, and the best of the other recipes so far, which are the first to be measured on fresh pictures."""
        ranked = {}
        for recipe in self.names:
            if recipe in BARE or recipe == "auto" or not suits(recipe, work):
                continue
            for change in ({}, self.search(work, recipe).best):
                row = None if change is None else self.row(self.job(work, recipe, change, "evaluation"))
                value = methods_report.figure(row, work)
                if value is not None:
                    value = -value if work.higher else value
                    ranked[recipe] = min(value, ranked.get(recipe, value))
        return {"auto", *sorted(ranked, key=ranked.get)[:LEADERS]}

    def run(self, strips: Path | None = None) -> None:
        """Measure what is left and no other process is at, until nothing is."""
        while True:
            for job in self.jobs():
                if self.row(job) is not None:
                    continue
                with self.rows[job.work.name].claim(**job.key) as mine:
                    if mine:
                        row = self.rows[job.work.name].add(measure(job, strips))
                        print(methods_report.line(row, job.work), flush=True)
                        break  # the plan may have changed
            else:
                return


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = (), work: tuple[str, ...] = ()) -> None:
    """Measure every recipe but the `LONG` ones, or `only` some, on all `work` or some of it; write the report."""
    for name in work:
        if name not in [one.name for one in WORKS]:
            raise SystemExit(f"there is no work {name!r}; there is {', '.join(one.name for one in WORKS)}")
    for name in only:
        if name not in (*BARE, *ORDER):
            raise SystemExit(f"there is no recipe {name!r}; there are {', '.join((*BARE, *ORDER))}")
    works = [one for one in WORKS if not work or one.name in work]
    for one in works:
        if not one.available():
            print(f"{one.name} is left out: its model or data are not on this machine")
    works = [dataclasses.replace(one, batch=2) if quick else one for one in works if one.available()]
    name = "methods-quick" if quick else "methods"
    path = RESULTS / f"{name}.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    names = [r for r in (*BARE, *ORDER) if (r in only if only else r not in LONG)]
    if quick:
        names = [r for r in names if r in (*BARE, *QUICK, *only)]
        plan = Plan(works, names, path, **QUICK_SIZE)
    else:
        plan = Plan(works, names, path)
    plan.run(STRIPS / name)
    write(name, path, quick)


def write(name: str, path: Path, quick: bool = False) -> None:
    """Write the report and the contact sheets of everything measured so far."""
    works = [one for one in WORKS if one.available()]
    all_names = [r for r in (*BARE, *ORDER) if not quick or r in (*BARE, *QUICK)]
    plan = Plan(works, all_names, path, **(QUICK_SIZE if quick else {}))
    tables = []
    for work in works:
        entries = []
        for recipe in all_names:
            if recipe not in BARE and not suits(recipe, work):
                continue
            own = plan.row(plan.job(work, recipe, {}, "evaluation"))
            runs, search = dict(default=own), Search([])
            if recipe not in BARE:
                runs["fresh default"] = plan.row(plan.job(work, recipe, {}, "fresh"))
                search = plan.search(work, recipe)
            if search.best is not None:
                runs["best"] = plan.row(plan.job(work, recipe, search.best, "evaluation"))
                runs["fresh best"] = plan.row(plan.job(work, recipe, search.best, "fresh"))
            searched = len(search.jobs[0].seeds) if search.jobs else None
            entries.append(methods_report.Entry(recipe, runs, search.edge, searched))
            for job in plan.cheaper(work, recipe):
                name_of = ", ".join([recipe, *(f"{key}={value}" for key, value in job.change.items())])
                entries.append(methods_report.Entry(name_of, dict(default=plan.row(job)), part=True))
        tables.append((work, entries))
    (RESULTS / f"{name}.md").write_text(methods_report.report(tables, name))
    for work in works:
        methods_report.write_sheet(work, pictures_of(work, "evaluation"), STRIPS / name, RESULTS, name)
    print(f"{RESULTS / name}.md")
