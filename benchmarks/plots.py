"""Plots of what a task has measured: quality against seconds, loss against step, guide against judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import methods_report
from .trial import seconds_per_picture
from .work import Work

if TYPE_CHECKING:
    from .report import Measured

MARKERS = "osD^vPX*<>hpd8"


def write(path: Path, work: Work, measured: Measured) -> None:
    """Write the three plots of a work side by side."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    quality, curves, agreement = figure.subplots(1, 3)
    for i, method in enumerate(measured.methods(work)):
        look = dict(color=f"C{i % 10}", label=method)
        mark = dict(marker=MARKERS[i % len(MARKERS)], markersize=5)
        rows = [row for row in measured.rows(work) if row["method"] == method]
        rows = [row for row in rows if methods_report.figure(row, work) is not None]
        _quality(quality, work, rows, look, mark)
        _curve(curves, rows, look, i)
        _agreement(agreement, work, rows, look, mark)
    better = "higher" if work.higher else "lower"
    values = [methods_report.figure(row, work) for row in measured.rows(work)]
    if not work.higher and all(value is None or value > 0 for value in values):
        quality.set_yscale("log", nonpositive="clip")
    quality.set(xscale="log", xlabel="seconds per picture", ylabel=f"{work.figure} ({better} is better)")
    quality.set_title("quality against seconds")
    curves.set(yscale="log", xlabel="share of the steps", ylabel="guiding loss, mean over pictures")
    curves.set_title("loss against step, largest budget of calls")
    agreement.set(xlabel="guiding loss of the pictures", ylabel=work.figure, title="guide against judge")
    if all(row["figures"]["guide"] > 0 for row in measured.rows(work) if row["figures"]):
        agreement.set_xscale("log")
    for axis in (quality.xaxis, quality.yaxis, curves.yaxis, agreement.xaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())
    for axis in (quality, curves, agreement):
        axis.grid(alpha=0.25, linewidth=0.5)
    figure.legend(*quality.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=85)


def _quality(axis, work: Work, rows: list[dict], look: dict, mark: dict) -> None:
    """A line over the budgets; what costs nothing is a level."""
    timed = sorted((row for row in rows if seconds_per_picture(row) is not None), key=seconds_per_picture)
    if timed:
        values = [row["figures"][work.figure] for row in timed]
        errors = [row["errors"].get(work.figure) or 0.0 for row in timed]
        seconds = [seconds_per_picture(row) for row in timed]
        axis.errorbar(seconds, values, errors, linewidth=1, elinewidth=0.6, capsize=2, **look, **mark)
    for row in rows:
        if seconds_per_picture(row) is None:
            axis.axhline(row["figures"][work.figure], linewidth=1, linestyle=":", **look)


def _curve(axis, rows: list[dict], look: dict, place: int) -> None:
    """The mean loss over the visits of the largest budget of calls."""
    rows = [row for row in rows if row["clock"] == "calls" and row.get("curve")]
    if rows:
        row = max(rows, key=lambda row: row["budget"])
        steps, losses = zip(*row["curve"])
        share = [step / row.get("steps", row.get("candidates_at")) for step in steps]
        axis.plot(share, losses, linewidth=1, linestyle="-" if place < 10 else "--", **look)


def _agreement(axis, work: Work, rows: list[dict], look: dict, mark: dict) -> None:
    """A point per run, the larger the more it may spend."""
    most = max((row["budget"] for row in rows), default=1)
    for row in rows:
        size = 15 + 45 * row["budget"] / most
        axis.scatter(
            row["figures"]["guide"],
            row["figures"][work.figure],
            s=size,
            color=look["color"],
            marker=mark["marker"],
            alpha=0.7,
            linewidths=0,
        )
