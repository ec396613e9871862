"""Cost against work: time per picture against batch, steps, copies and resolution, and memory against pictures.

The demo model under label guidance. Each curve changes one thing and leaves the others; its line is fitted by least
squares.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from lossguide.guidance import Augment, recipes
from lossguide.losses import ClassLabel
from lossguide.samplers import load_demo, sample

RESULTS = Path(__file__).parent / "results"
USUAL = dict(batch=4, steps=10, copies=4, side=32)
CURVES = {
    "batch": (1, 2, 4, 8, 16),
    "steps": (5, 10, 20, 40),
    "copies": (1, 8, 16, 32),
    "side": (16, 32, 48, 64),
}
WORK = {
    "batch": ("pictures drawn at once", lambda n: n),
    "steps": ("solver steps", lambda n: n),
    "copies": ("augmented copies per picture and step", lambda n: n),
    "side": ("pixels of a picture", lambda n: n * n),
}
WAYS = {"unguided": None, "at x0": "x0", "through the denoiser": "denoiser"}
PICTURES = (8, 32, 128)


def draw(way: str, batch: int, steps: int, copies: int, side: int, pictures: int | None = None) -> None:
    """Draw one batch, or more pictures in batches."""
    model = dataclasses.replace(load_demo(), shape=(1, side, side))
    guidance = None
    if WAYS[way]:
        guidance = recipes.dps(ClassLabel(3), through=WAYS[way], augment=Augment.geometric(copies))
    sample(model, guidance, steps=steps, seeds=range(pictures or batch), batch_size=batch)


def seconds(way: str, repeats: int, **size: int) -> float:
    """Median processor seconds of one call on one thread."""
    found = []
    for repeat in range(repeats + 1):
        start = time.process_time()
        draw(way, **size)
        if repeat:
            found.append(time.process_time() - start)
    return statistics.median(found)


def fitted(work: list[float], values: list[float]) -> tuple[float, float, float]:
    """The line through points: intercept, slope, and the share R^2 of the variance that it explains."""
    slope, intercept = np.polyfit(work, values, 1)
    off = np.asarray(values) - (intercept + slope * np.asarray(work))
    spread = np.var(values)
    return float(intercept), float(slope), float(1 - np.var(off) / spread) if spread > 0 else 1.0


def peak(way: str, pictures: int) -> float:
    """Peak MiB that drawing so many pictures, eight at once, takes beside the weights; in a process of its own."""
    code = (
        "import json, torch; torch.set_num_threads(1)\n"
        "from benchmarks import cost, memory\n"
        f"job = lambda n: cost.draw({way!r}, batch=8, steps=2, copies=4, side=32, pictures=n)\n"
        f"job(8)\nprint(json.dumps(memory.peak_of(lambda: job({pictures}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])[1]


def plot(curves: dict, path: Path) -> None:
    """One panel per curve: measured points and fitted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9), layout="constrained")
    for axis, (what, ways) in zip(figure.subplots(1, len(curves)), curves.items()):
        label, work_of = WORK[what]
        for way, points in ways.items():
            x = [work_of(n) for n in points]
            intercept, slope, _ = fitted(x, list(points.values()))
            color = f"C{list(WAYS).index(way)}"
            axis.plot(x, [intercept + slope * one for one in x], linewidth=1, color=color)
            axis.plot(x, list(points.values()), "o", markersize=4, color=color, label=way)
        axis.set(xlabel=label, xlim=(0, None), ylim=(0, None))
    first = figure.axes[0]
    first.set_ylabel("processor seconds of a call")
    first.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure every curve and write the tables and the plot."""
    torch.set_num_threads(1)
    name = "cost-quick" if quick else "cost"
    repeats = 1 if quick else 5
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for what, values in CURVES.items():
        for way in WAYS:
            if what == "copies" and way == "unguided":
                continue
            points = {n: seconds(way, repeats, **USUAL | {what: n}) for n in values[: 3 if quick else None]}
            curves.setdefault(what, {})[way] = points
            print(what, way, {n: round(value, 3) for n, value in points.items()}, flush=True)
    lines = [
        "# Cost against work",
        "",
        f"`python -m benchmarks run cost{' --quick' if quick else ''}`",
        "",
        f"Processor seconds of one call of `sample` on one thread, medians of {repeats}; the demo model, a label by "
        f"its classifier. Where it is not what changes: {', '.join(f'{n} {what}' for what, n in USUAL.items())}. "
        "A line is fitted to each curve: seconds at no work, seconds per unit of work, and R^2.",
        "",
        "| work | way | measured | at none | per unit | R^2 |",
        "|---|---|---|---|---|---|",
    ]
    for what, ways in curves.items():
        label, work_of = WORK[what]
        for way, points in ways.items():
            intercept, slope, share = fitted([work_of(n) for n in points], list(points.values()))
            measured = ", ".join(f"{n}: {value:.3f}" for n, value in points.items())
            lines.append(f"| {label} | {way} | {measured} | {intercept:.3f} | {slope:.2e} | {share:.3f} |")
    lines += [
        "",
        f"![Seconds against work]({name}.png)",
        "",
        "Peak MiB beside the weights, eight pictures at once, by the number of pictures in all: it does not grow but "
        "by the pictures themselves.",
        "",
        "| way | " + " | ".join(str(n) for n in PICTURES[: 2 if quick else None]) + " |",
        "|---|" + "---|" * len(PICTURES[: 2 if quick else None]),
    ]
    for way in WAYS:
        peaks = [peak(way, n) for n in PICTURES[: 2 if quick else None]]
        lines.append(f"| {way} | " + " | ".join(f"{one:.0f}" for one in peaks) + " |")
        print(lines[-1], flush=True)
    plot(curves, RESULTS / f"{name}.png")
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(RESULTS / f"{name}.md")
