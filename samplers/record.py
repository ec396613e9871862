"""The record of a run: what happened, per step and picture."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from .faults import DENOISER, KINDS, report
from .plain import plain

PER_PICTURE = ("loss", "gradient_norm", "step_size", "fault")


class Record:
    """One row per visited step, in order.

    A row is a dict: `step` (index into the solver's steps), `visit` (0, or the number of the repeat under time travel),
    `timestep`, `alpha` and `sigma` (their means where pixels differ), `progress` in [0, 1), `terms` (name -> loss
    `(B,)`, unweighted), `loss` (the weighted sum, `(B,)`), `gradient_norm` and `step_size` `(B,)`, `seconds`,
    `peak_memory` (the process's so far, in bytes, CUDA only), `fault` (`(B,)`, what was not finite, by its code in
    `lossguide.samplers.faults`; its name or None in JSON). Steps that were not guided have no loss. Values stay on the
    device until they are read.

    Attributes:
        rows: see above.
        model: what to call the model's prediction in messages.
        settings: of the guidance, plain data.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.model = DENOISER
        self.settings: dict[str, Any] = {}

    def __repr__(self) -> str:
        ends = self.losses().mean(1)[[0, -1]].tolist() if self.guided else []
        fell = f", loss {ends[0]:.4g} -> {ends[1]:.4g}" if ends else ""
        return f"Record({len(self.rows)} visits, {len(self.guided)} guided{fell})"

    def add(self, **row: Any) -> None:
        """Append a row."""
        self.rows.append(row)

    @property
    def nonfinite(self) -> torch.Tensor | None:
        """At how many visits `(B,)` each picture was not moved, as the loss, its gradient or its step was not finite;
        None where nothing was looked at. A prediction of the model that is not finite does not count here."""
        codes = [row["fault"] for row in self.rows if "fault" in row]
        return (torch.stack(codes) > 1).sum(0) if codes else None

    def warn_of_nonfinite(self) -> None:
        """Tell, in one warning, for which pictures something was not finite, what it was and where it began."""
        told = report(self.rows, self.model)
        if told is not None:
            warnings.warn(told, RuntimeWarning, stacklevel=3)

    def keep(self, chosen: torch.Tensor, *present: dict[str, Any]) -> None:
        """Keep the columns of these samples, in this order; also in rows that are not added yet."""
        for row in (*self.rows, *present):
            for key in PER_PICTURE:
                if key in row:
                    row[key] = row[key][chosen.to(row[key].device)]
            if "terms" in row:
                row["terms"] = {name: value[chosen.to(value.device)] for name, value in row["terms"].items()}

    @property
    def guided(self) -> list[dict[str, Any]]:
        """The rows that have a loss."""
        return [row for row in self.rows if "loss" in row]

    @property
    def terms(self) -> list[str]:
        """Names of the loss terms."""
        return list(dict.fromkeys(name for row in self.guided for name in row["terms"]))

    def losses(self, term: str | None = None) -> torch.Tensor:
        """Losses `(guided visits, B)` on the CPU: of a term, or the weighted sum; NaN where the term did not act.

        Raises:
            ValueError: there is no such term.
        """
        rows = self.guided
        if term is not None and rows and term not in self.terms:
            raise ValueError(f"there is no term {term!r} in the record; there are {', '.join(self.terms)}")
        if not rows:
            return torch.zeros(0, 0)
        missing = torch.full_like(rows[0]["loss"], float("nan"))
        values = [row["loss"] if term is None else row["terms"].get(term, missing) for row in rows]
        return torch.stack(values).float().cpu()

    @staticmethod
    def joined(records: list[Record]) -> Record:
        """The record of several batches of one run, side by side."""
        whole = Record()
        whole.settings, whole.model = records[0].settings, records[0].model
        for rows in zip(*(r.rows for r in records)):
            row = dict(rows[0], seconds=sum(r["seconds"] for r in rows))
            for key in PER_PICTURE:
                if key in row:
                    row[key] = torch.cat([r[key] for r in rows])
            if "terms" in row:
                row["terms"] = {name: torch.cat([r["terms"][name] for r in rows]) for name in row["terms"]}
            if "peak_memory" in row:
                row["peak_memory"] = max(r["peak_memory"] for r in rows)
            whole.rows.append(row)
        return whole

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become None."""
        rows = [
            row | {"fault": [KINDS[code - 1] if code else None for code in row["fault"].tolist()]}
            if "fault" in row
            else row
            for row in self.rows
        ]
        return {"settings": plain(self.settings), "nonfinite": plain(self.nonfinite), "rows": plain(rows)}

    def save(self, path: str | os.PathLike) -> None:
        """Write the record as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), allow_nan=False) + "\n")

    def plot(self, path: str | os.PathLike | None = None):
        """Plot loss by term, gradient norm and step size against the step: a line per picture, and their median.

        Writes to `path` when given; returns the matplotlib figure.
        """
        from matplotlib.figure import Figure

        rows = self.guided
        panels = [(name, self.losses(name)) for name in self.terms]
        panels += [
            (key.replace("_", " "), torch.stack([r[key] for r in rows]).float().cpu())
            for key in ("gradient_norm", "step_size")
            if rows and key in rows[0]
        ]
        figure = Figure(figsize=(4 * max(1, len(panels)), 3.2), layout="constrained")
        axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
        position = [row["step"] for row in rows]
        for axis, (title, values) in zip(axes, panels):
            axis.plot(
                position, values.numpy(), color="tab:blue", alpha=min(1.0, 3 / max(1, values.shape[1])), linewidth=0.7
            )
            axis.plot(position, values.nanmedian(dim=1).values.numpy(), color="black", linewidth=1.5)
            axis.set(title=title, xlabel="step")
            if title in ("gradient norm", "step size") and (values > 0).any():
                axis.set_yscale("log")
        if not panels:
            axes[0].set_title("no guided step")
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure
