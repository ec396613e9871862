"""`auto` at 1.3 times the time of the unguided sampler, and at the same: how much of its full gain is left.

On the ten pairs of `run methods`, whose rows of the unguided model and of `auto` at its default are used. The gain is
how far the judge's figure has come from the unguided model's, over how far `auto` at its default brings it.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from . import floor, methods, methods_report
from .work import Work

RESULTS = Path(__file__).parent / "results"
WAYS = {  # settings, and the share of the steps that are taken
    "cost 1.3": (dict(cost=1.3), 1.0),
    "fewer steps": (dict(time_travel=None), 0.62),
    "cost 1": (dict(cost=1.0), 1.0),
}
ENOUGH = 0.95


def way(model) -> float:
    """What going through the denoiser takes, in its bare forwards."""
    seconds = floor.time_ways(model, 4, 1, 3, ways=floor.WAYS[:2])
    return seconds[floor.WAYS[1]] / seconds[floor.WAYS[0]]


def gain(figure: float, unguided: float, full: float) -> float:
    """The share of the way from the unguided model's figure to the full method's."""
    return (figure - unguided) / (full - unguided)


def times(row: dict, through: float, steps: int) -> tuple[float, float]:
    """How many times as long as the unguided sampler a run took: in the denoiser's passes alone, and in all.

    Args:
        row: of the run.
        through: what a step through the denoiser takes, in bare forwards.
        steps: of the unguided sampler.
    """
    passes = row["forwards"] + (through - 1) * row["backwards"]
    batches = math.ceil(row["pictures"] / row["batch"])
    unguided = batches * steps * row["forward_processor_seconds"]
    return passes / steps, row["processor_seconds"] / unguided


def line(work: Work, rows: dict[str, dict | None], through: float, steps: int) -> str:
    """The report's row of a work, from those of "unguided", "auto" and each of `WAYS`."""
    cells = [work.name, work.figure]
    figures = {name: methods_report.figure(row, work) for name, row in rows.items()}
    cells += ["" if figures[name] is None else f"{figures[name]:.4g}" for name in ("unguided", "auto")]
    for name in WAYS:
        row, value = rows[name], figures[name]
        if value is None or None in (figures["unguided"], figures["auto"]):
            cells += ["", "", ""]
            continue
        share = gain(value, figures["unguided"], figures["auto"])
        passes, everything = times(row, through, steps)
        cells += [f"{value:.4g}", f"**{100 * share:.0f} %**", f"{passes:.2f} ({everything:.2f})"]
    return "| " + " | ".join(cells) + " |"


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = (), work: tuple[str, ...] = ()) -> None:
    """Measure what is not in `results/methods.jsonl` yet, on all work or some; write `results/cheap.md`."""
    torch.set_num_threads(1)
    name = "cheap-quick" if quick else "cheap"
    for unknown in set(work) - {one.name for one in methods.WORKS}:
        raise SystemExit(f"there is no work {unknown!r}; there is {', '.join(one.name for one in methods.WORKS)}")
    works = [one for one in methods.WORKS if one.available()]
    works = [one for one in works if not quick or one.name in ("demo-label", "demo-mask")]
    path = RESULTS / ("cheap-quick.jsonl" if quick else "methods.jsonl")
    size = dict(steps=10, most=10) if quick else {}
    plan = methods.Plan(works, ["unguided", "auto"], path, **size)
    lines, reached, through = [], dict.fromkeys(WAYS, 0), {}
    for one in works:
        jobs = {recipe: plan.job(one, recipe, {}, "evaluation") for recipe in ("unguided", "auto")}
        for label, (change, share) in WAYS.items():
            job = plan.job(one, "auto", change, "evaluation")
            jobs[label] = dataclasses.replace(job, steps=round(share * plan.steps))
        for job in jobs.values() if not work or one.name in work else ():  # the table tells all that is measured
            with plan.rows[one.name].claim(**job.key) as mine:
                if mine or (fresh and job.change):
                    plan.rows[one.name].add(methods.measure(job))
        rows = {label: plan.row(job) for label, job in jobs.items()}
        if one.model not in through:
            through[one.model] = way(one.model())
        if None in rows.values():
            continue  # another process is at it
        lines.append(line(one, rows, through[one.model], plan.steps))
        print(lines[-1], flush=True)
        figures = {label: methods_report.figure(row, one) for label, row in rows.items()}
        for label in WAYS:
            known = None not in (figures[label], figures["unguided"], figures["auto"])
            reached[label] += known and gain(figures[label], figures["unguided"], figures["auto"]) >= ENOUGH
    told = ", ".join(f"{value:.2f}" for value in through.values())
    text = [
        "# auto, cheap",
        "",
        f"`python -m benchmarks run cheap{' --quick' if quick else ''}`",
        "",
        "`recipes.auto(loss, cost=1.3)` and `cost=1` against `recipes.auto(loss)`, on the ten pairs of "
        "[methods](methods.md), pictures of the evaluation. Gain: how far the judge's figure has come from the "
        "unguided model's, over how far the full method brings it. Time: passes through the denoiser over those of "
        f"the unguided sampler, one forward and backward counting as measured in this run ({told} forwards); in "
        "brackets all the processor's time, the guide's own passes among it, over that of as many bare forwards.",
        "",
        "Fewer steps: `time_travel=None` and 62 % of the steps, each through the denoiser.",
        "",
        f"{100 * ENOUGH:.0f} % of the full gain, of {len(lines)}: "
        + ", ".join(f"{count} by {label}" for label, count in reached.items())
        + ".",
        "",
        "| task | figure | unguided | auto, full | " + " | ".join(f"{label} | gain | time" for label in WAYS) + " |",
        "|---|---|---|---|" + "---|---|---|" * len(WAYS),
        *lines,
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(text) + "\n")
    print(RESULTS / f"{name}.md")
