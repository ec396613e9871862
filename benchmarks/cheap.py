"""`auto` at 1.3 times the time of the unguided sampler, and at the same: how much of its full gain is left.

On the ten pairs of `run methods`, whose rows of the unguided model and of `auto` at its default are used. The gain is
how far the judge's figure has come from the unguided model's, over how far `auto` at its default brings it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from . import floor, methods, methods_report
from .work import Work

RESULTS = Path(__file__).parent / "results"
COSTS = (1.3, 1.0)
ENOUGH = 0.95


def way(model) -> float:
    """What going through the denoiser takes, in its bare forwards."""
    seconds = floor.time_ways(model, 4, 1, 3, ways=floor.WAYS[:2])
    return seconds[floor.WAYS[1]] / seconds[floor.WAYS[0]]


def gain(figure: float, unguided: float, full: float) -> float:
    """The share of the way from the unguided model's figure to the full method's."""
    return (figure - unguided) / (full - unguided)


def times(row: dict, through: float) -> tuple[float, float]:
    """How many times as long as the unguided sampler a run took: in the denoiser's passes alone, and in all.

    Args:
        row: of the run.
        through: what a step through the denoiser takes, in bare forwards.
    """
    passes = row["forwards"] + (through - 1) * row["backwards"]
    batches = math.ceil(row["pictures"] / row["batch"])
    unguided = batches * row["steps"] * row["forward_processor_seconds"]
    return passes / row["steps"], row["processor_seconds"] / unguided


def line(work: Work, rows: dict[str, dict | None], through: float) -> str:
    """The report's row of a work, from those of "unguided", "auto" and each cost."""
    cells = [work.name, work.figure]
    figures = {name: methods_report.figure(row, work) for name, row in rows.items()}
    cells += ["" if figures[name] is None else f"{figures[name]:.4g}" for name in ("unguided", "auto")]
    for cost in COSTS:
        row, value = rows[str(cost)], figures[str(cost)]
        if value is None or None in (figures["unguided"], figures["auto"]):
            cells += ["", "", ""]
            continue
        share = gain(value, figures["unguided"], figures["auto"])
        passes, everything = times(row, through)
        cells += [f"{value:.4g}", f"**{100 * share:.0f} %**", f"{passes:.2f} ({everything:.2f})"]
    return "| " + " | ".join(cells) + " |"


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = (), work: tuple[str, ...] = ()) -> None:
    """Measure what is not in `results/methods.jsonl` yet, on all work or some; write `results/cheap.md`."""
    torch.set_num_threads(1)
    name = "cheap-quick" if quick else "cheap"
    works = [one for one in methods.WORKS if one.available() and (not work or one.name in work)]
    works = [one for one in works if not quick or one.name in ("demo-label", "demo-mask")]
    path = RESULTS / ("cheap-quick.jsonl" if quick else "methods.jsonl")
    size = dict(steps=10, most=10) if quick else {}
    plan = methods.Plan(works, ["unguided", "auto"], path, **size)
    lines, reached, through = [], 0, {}
    for one in works:
        rows = {}
        settings = {"unguided": ("unguided", {}), "auto": ("auto", {})}
        for label, (recipe, change) in (settings | {str(cost): ("auto", dict(cost=cost)) for cost in COSTS}).items():
            job = plan.job(one, recipe, change, "evaluation")
            with plan.rows[one.name].claim(**job.key) as mine:
                if mine or (fresh and change):
                    plan.rows[one.name].add(methods.measure(job))
            rows[label] = plan.row(job)
        if one.model not in through:
            through[one.model] = way(one.model())
        if None in rows.values():
            continue  # another process is at it
        lines.append(line(one, rows, through[one.model]))
        print(lines[-1], flush=True)
        figures = [methods_report.figure(rows[label], one) for label in (str(COSTS[0]), "unguided", "auto")]
        reached += None not in figures and gain(*figures) >= ENOUGH
    told = ", ".join(f"{value:.2f}" for value in through.values())
    text = [
        "# auto, cheap",
        "",
        f"`python -m benchmarks run cheap{' --quick' if quick else ''}`",
        "",
        "`recipes.auto(loss, cost=1.3)` and `cost=1` against `recipes.auto(loss)`, on the ten pairs of "
        "[methods](methods.md), pictures of the evaluation. Gain: how far the judge's figure has come from the "
        "unguided model's, over how far the full method brings it. Time: passes through the denoiser over those of "
        f"the unguided sampler, one forward and backward counting as measured in this run ({told} forwards); in brackets all the "
        "processor's time, the guide's own passes among it, over that of as many bare forwards.",
        "",
        f"At 1.3, {reached} of {len(lines)} reach {100 * ENOUGH:.0f} % of the full gain.",
        "",
        "| task | figure | unguided | auto, full | cost 1.3 | gain | time | cost 1 | gain | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *lines,
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(text) + "\n")
    print(RESULTS / f"{name}.md")
