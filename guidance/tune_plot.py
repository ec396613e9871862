"""The history of a search as a plot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tune import Trial


def plot_history(
    trials: Iterable[Trial], path: str | os.PathLike | None = None, logarithmic: Iterable[str] = ("strength",)
):
    """Plot the score against the trial with the best so far, and against each setting; failed trials are crosses.

    Args:
        trials: what `Tuned.trials` holds.
        path: where to write the plot; None writes nothing.
        logarithmic: settings on a logarithmic axis.

    Returns:
        the matplotlib figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    trials = list(trials)
    names, logarithmic = list(trials[0].settings) if trials else [], set(logarithmic)
    columns = min(4, 1 + len(names))
    rows = -(-(1 + len(names)) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    good = [trial for trial in trials if trial.score is not None]
    failed = [trial for trial in trials if trial.score is None]
    own = next((trial for trial in good if trial.number == 0), None)
    best = min(good, key=lambda trial: trial.score, default=None)

    def panel(axis, title: str, value: Callable[[Trial], Any]) -> None:
        axis.plot([value(t) for t in good], [t.score for t in good], "o", color="tab:blue", alpha=0.6, markersize=4)
        if own is not None:
            axis.plot([value(own)], [own.score], "s", color="tab:orange", label="the recipe's own")
        if best is not None:
            axis.plot([value(best)], [best.score], "*", color="black", markersize=11, label="best")
        if failed:
            bottom = axis.get_xaxis_transform()
            axis.plot([value(t) for t in failed], [0.02] * len(failed), "x", color="tab:red", transform=bottom)
        axis.set_title(title)

    panel(axes[0], "score, lower is better", lambda trial: trial.number)
    so_far = [min(t.score for t in good[: i + 1]) for i in range(len(good))]
    axes[0].step([t.number for t in good], so_far, where="post", color="black", linewidth=1.2)
    axes[0].set_xlabel("trial")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if good:
        axes[0].legend(fontsize="small")
    for axis, name in zip(axes[1:], names):
        values = [trial.settings[name] for trial in trials]
        words = not all(isinstance(value, (int, float)) for value in values)
        shown = {trial.number: str(value) if words else value for trial, value in zip(trials, values)}
        panel(axis, name, lambda trial, shown=shown: shown[trial.number])
        if name in logarithmic:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
        elif all(isinstance(value, int) for value in values):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[1 + len(names) :]:
        axis.set_axis_off()
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure
