"""What the tasks of `tasks/` have measured so far: tables in Markdown, plots, contact sheets; nothing is measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from lossguide.guidance.contact_sheet import to_pil
from PIL import Image

from . import compare, meter, methods_report, task, trial
from .compare import RESULTS, STRIPS
from .task import CLOCKS, Task
from .work import Work

TITLES = {
    "calls": "At equal calls of the denoiser",
    "seconds": "At equal time",
}
OFF = 0.15
"""Where a run for a time takes more or less than this share of it, because steps are whole, the report says so."""


class Measured:
    """The rows of a task, the last one of each run.

    Args:
        rows: as they were measured.
        task: its methods and works, which tell what is shown and in which order.
    """

    def __init__(self, rows: Iterable[dict], task: Task):
        self.task = task
        self._rows = {(row["work"], row["method"], row["clock"], row["budget"]): row for row in rows}
        self.budgets = sorted({budget for *_, budget in self._rows})

    def row(self, work: Work, method: str, clock: str, budget: float) -> dict | None:
        """A run; of equal time also that of equal calls, where it took as long."""
        found = self._rows.get((work.name, method, clock, budget))
        if found is None and clock == "seconds":
            found = self._rows.get((work.name, method, "calls", budget))
            if found is not None and (found["figures"] is None or not compare.served(found, budget)):
                return None
        return found

    def rows(self, work: Work) -> list[dict]:
        """Every run of a work: by method, then by budget, equal calls first."""
        names = [method.name for method in self.task.methods]
        found = [row for (name, method, *_), row in self._rows.items() if name == work.name and method in names]
        place = lambda row: (names.index(row["method"]), row["budget"], CLOCKS.index(row["clock"]))
        return sorted(found, key=place)

    def methods(self, work: Work) -> list[str]:
        """The methods that something has been measured of."""
        return list(dict.fromkeys(row["method"] for row in self.rows(work)))


def read(path: Path) -> list[dict]:
    """The whole rows of a file; torn ones are left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def write(name: str, quick: bool = False, folder: Path = RESULTS, strips: Path = STRIPS) -> Path | None:
    """Write a task's table, plots and contact sheets; None where nothing has been measured."""
    from . import plots

    path = folder / compare.path_of(name, quick).name
    rows = read(path)
    if not rows:
        print(f"{path.stem}: nothing has been measured yet")
        return None
    chosen = task.load(name)
    if quick:
        chosen = dataclasses.replace(chosen, **chosen.quick)
    measured = Measured(rows, chosen)
    pictures = {}
    for work in chosen.works:
        if measured.rows(work):
            plots.write(folder / f"{path.stem}-{work.name}-plots.png", work, measured)
            pictures[work.name] = [
                f"{path.stem}-{work.name}-plots.png",
                *_sheet(path.stem, work, measured, folder, strips),
            ]
    target = folder / f"{path.stem}.md"
    target.write_text(text(name, chosen, measured, pictures, quick))
    print(target)
    return target


def text(name: str, chosen: Task, measured: Measured, pictures: dict[str, Sequence[str]], quick: bool = False) -> str:
    """The report in Markdown."""
    works = [work for work in chosen.works if measured.rows(work)]
    everything = [row for work in works for row in measured.rows(work)]
    lines = [
        f"# {task.names().get(name, name)}",
        "",
        f"`python -m benchmarks run {name}{' --quick' if quick else ''}`; "
        f"of what has been measured so far: `python -m benchmarks report {name}`.",
        "",
        *(["Few pictures and steps, only to see that all of it runs.", ""] if quick else []),
        "Each method spends the same: B calls of the denoiser per picture, a forward and a backward through it being "
        "one each, or the time of B bare forwards. Its steps (of best of N: its candidates, of the steps that are "
        f"named) are the most that fit. A method whose run of equal calls takes that time to {100 * compare.NEAR:.0f} "
        "% is not run again for equal time; an empty cell has not been measured, or nothing fits. ± is the standard "
        "error over pictures, each of a seed of its own; the best of a column is bold. The judge never guides. "
        "`x forward`: the time per picture over that of a bare forward of one picture in the same run, by processor "
        "time of the one thread that does the work.",
        "",
        *([chosen.note, ""] if chosen.note else []),
        *(f"- {line}" for line in machines(everything)),
    ]
    missing = [method.name for method in chosen.methods if not any(row["method"] == method.name for row in everything)]
    if missing:
        lines += [f"- Not measured, or not installed: {', '.join(missing)}."]
    for work in works:
        lines += ["", f"## {work.name}", "", f"{work.about}; {_better(work)}.", ""]
        for clock in CLOCKS:
            lines += [f"### {TITLES[clock]}: {work.figure}", "", *summary(work, measured, clock), ""]
        for file in pictures.get(work.name, ()):
            lines += [f"![{'Plots' if 'plots' in file else 'Pictures'}]({file})", ""]
        lines += ["<details><summary>Every run</summary>", "", *details(work, measured), "", "</details>"]
    return "\n".join(lines) + "\n"


def machines(rows: Sequence[dict]) -> list[str]:
    """What the rows were measured on and with, one line each."""
    found = {}
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
        where = row["processor"] or row["machine"] if row["on"] == "cpu" else row["on"]
        line = f"{where}, {row['threads']} of {row['cores']} threads per process, {row['dtype']}; {versions}"
        found.setdefault(line, set()).add(row["date"])
    return [f"{line}; {' to '.join(sorted({min(dates), max(dates)}))}" for line, dates in found.items()]


def summary(work: Work, measured: Measured, clock: str) -> list[str]:
    """Methods against budgets: the figure that counts."""
    budgets = measured.budgets
    lines = [f"| method | settings | {' | '.join(f'{b:g}' for b in budgets)} |", "|---|---|" + "---|" * len(budgets)]
    likely = _likelihood(work, measured, clock)
    if likely:
        lines = [f"{lines[0]} log-likelihood at {measured.task.budgets[0]:g}, bits/dim |", f"{lines[1]}---|"]
    columns = {}
    for budget in budgets:
        values = {}
        for method in measured.methods(work):
            row = measured.row(work, method, clock, budget)
            value = methods_report.figure(row, work)
            if value is not None and row["recipe"] != "trivial":
                values[method] = value
        columns[budget] = (max if work.higher else min)(values.values(), default=None)
    for method in measured.methods(work):
        cells, change = [], None
        for budget in budgets:
            row = measured.row(work, method, clock, budget)
            change = row if row is not None else change
            cells.append(_cell(row, work, columns[budget], clock, budget))
        if any(cells):
            lines.append(f"| {method} | {_settings(change)} | {' | '.join(cells)} |")
            lines[-1] += f" {likely.get(method, '')} |" if likely else ""
    return lines


def _likelihood(work: Work, measured: Measured, clock: str) -> dict[str, str]:
    """By method the change of the log-likelihood from the unguided pictures, at the most telling budget."""
    budget, cells = measured.task.budgets[0], {}
    unguided = measured.row(work, "unguided", "calls", budget)
    for method in measured.methods(work):
        found = meter.changed(measured.row(work, method, clock, budget), unguided)
        if found is not None and method != "unguided":
            cells[method] = f"{found[0]:+.3f}" + (f" ± {found[1]:.2g}" if found[1] is not None else "")
    return cells


def _cell(row: dict | None, work: Work, best: float | None, clock: str, budget: float) -> str:
    value = methods_report.figure(row, work)
    if value is None:
        return ""
    error = row["errors"].get(work.figure)
    shown = f"**{value:.4g}**" if value == best else f"{value:.4g}"
    shown += f" ± {error:.2g}" if error is not None else ""
    share = (trial.worth(row) or budget) / budget
    return shown if clock == "calls" or abs(share - 1) <= OFF else f"{shown} ({share:.1f} of the time)"


def details(work: Work, measured: Measured) -> list[str]:
    """Every run on a line, with all its figures and what it cost."""
    lines = [
        "| method | budget | steps | forwards + backwards | seconds per picture | x forward | figures |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured.rows(work):
        start = f"| {row['method']} | {row['budget']:g} {row['clock']} |"
        if row["figures"] is None:
            lines.append(f"{start} | | | | failed: {row['failure']} |")
            continue
        steps = f"{row['candidates']} of {row['candidates_at']}" if "candidates" in row else str(row.get("steps", ""))
        calls, cost = "", trial.worth(row)
        if "forwards" in row:
            calls = f"{row['forwards']:g} + {row['backwards']:g}"
        seconds = f"{trial.seconds_per_picture(row):.3g}" if cost is not None else ""
        told = ", ".join(f"{name} {_with_error(row, name)}" for name in row["figures"])
        lines.append(f"{start} {steps} | {calls} | {seconds} | {'' if cost is None else f'{cost:.1f}'} | {told} |")
    return lines


def _with_error(row: dict, name: str) -> str:
    value, error = row["figures"][name], row["errors"].get(name)
    return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def _settings(row: dict | None) -> str:
    if row is None or row["recipe"] in ("unguided", "trivial"):
        return ""
    return methods_report.settings(row)


def _better(work: Work) -> str:
    return f"{work.figure}: {'higher' if work.higher else 'lower'} is better"


def _sheet(name: str, work: Work, measured: Measured, folder: Path, strips: Path) -> list[str]:
    """A contact sheet of the largest budget that most methods have been measured at, where the pictures are at hand.

    Restorations of pictures that are not free stay beside the strips, and of the real model's work what is to be
    imitated is not shown.
    """
    counts: dict[float, int] = {}
    for row in measured.rows(work):
        if row["clock"] == "calls" and row["figures"] is not None:
            counts[row["budget"]] = counts.get(row["budget"], 0) + 1
    if not counts:
        return []
    budget = max(counts, key=lambda b: (counts[b], b))
    done = {}
    for row in measured.rows(work):
        file = strips / name / work.name / f"{trial.strip_name(trial.key_of(row))}.png"
        if row["clock"] == "calls" and (row["budget"] == budget or row["recipe"] == "trivial") and file.is_file():
            done[row["method"]] = Image.open(file)
    if not done:
        return []
    free = not work.linear
    shown = {}
    if not (free and work.name.startswith("real")):
        images = work.pictures(measured.task.which).shown
        shown = {label: to_pil(_row(one, next(iter(done.values())))) for label, one in images.items()}
    target = (folder if free else strips / name) / f"{name}-{work.name}-pictures.png"
    methods_report.sheet(shown | done).save(target, optimize=True)
    return [target.name] if free else []


def _row(images, like: Image.Image):
    """As many of the pictures side by side as the other strips hold."""
    import torch

    return torch.cat(list(images[: like.width // images.shape[-1]]), -1)
