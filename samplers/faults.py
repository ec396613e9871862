"""Numbers that are not finite: what was not, where it was first seen, and how that is told.

A fault is kept per sample and visit as a code on the sample's own device, so that looking for it makes no host wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

KINDS = ("prediction", "picture", "loss", "gradient", "through", "step")
"""What may not be finite, in the order in which a visit comes to it. Code 0 is nothing, code `i + 1` is `KINDS[i]`."""

DENOISER, TRANSFORMER = "the denoiser's prediction", "the transformer's prediction"
_SHOWN = 8  # pictures that a message names at most


def unsound(value: torch.Tensor) -> torch.Tensor:
    """Which samples `(B,)` of `(B, ...)` hold a number that is not finite."""
    return ~torch.isfinite(value).flatten(1).all(1)


class Faults:
    """What was not finite at one visit, per sample: the first that was not counts.

    Attributes:
        codes: `(B,)`, int8; 0 where everything was finite.
    """

    def __init__(self, batch: int, device: torch.device | str = "cpu"):
        self.codes = torch.zeros(batch, dtype=torch.int8, device=device)

    @classmethod
    def of_prediction(cls, prediction: torch.Tensor) -> Faults:
        """Those of a visit as it begins, from what the model returned, `(B, ...)`."""
        faults = cls(len(prediction), prediction.device)
        faults.add("prediction", unsound(prediction.detach()))
        return faults

    def add(self, kind: str, bad: torch.Tensor) -> None:
        """Note that a kind was not finite for the samples `bad`, bool `(B,)`."""
        new = self.sound & bad.to(self.codes.device)
        self.codes = torch.where(new, KINDS.index(kind) + 1, self.codes)

    @property
    def sound(self) -> torch.Tensor:
        """For which samples `(B,)` everything was finite."""
        return self.codes == 0

    def reorder(self, order: torch.Tensor) -> None:
        """Let sample `i` be what sample `order[i]` was."""
        self.codes = self.codes[order.to(self.codes.device)]

    def check_prediction(self, row: dict[str, Any], model: str = DENOISER) -> None:
        """Make sure that the prediction is finite for one sample at least; the host waits for the answer.

        Raises:
            FloatingPointError: it is for none.
        """
        if bool((self.codes == 1).all()):
            raise FloatingPointError(
                f"{sentence('prediction', row, range(len(self.codes)), model)}, which are all, and nothing can come of "
                "them: take bfloat16 or float32 in place of float16, which overflows easily, or look for the fault in "
                "the model's weights or its input"
            )


def sentence(kind: str, row: dict[str, Any], pictures: Sequence[int], model: str = DENOISER, terms=None) -> str:
    """That a kind is not finite at a visit, whose row of the record this is, for some pictures; without a full stop.

    `terms` are the names of the losses at fault, where that is known better than by the row.
    """
    numbers = ", ".join(str(i) for i in list(pictures)[:_SHOWN]) + (", ..." if len(pictures) > _SHOWN else "")
    place = place_of(row, f" for pictures [{numbers}]")
    return f"{_what(kind, row, pictures, model, terms)} is not finite at {place}"


def report(rows: list[dict[str, Any]], model: str = DENOISER) -> str | None:
    """What the rows of a record tell of faults, in one sentence; None where there were none."""
    rows = [row for row in rows if "fault" in row]
    if not rows:
        return None
    codes = torch.stack([row["fault"] for row in rows]).cpu()
    lost = _told(codes == 1, codes, rows, model)
    still = _told(codes > 1, codes, rows, model)
    told = [] if lost is None else [f"{model} was not finite for {lost[0]}, which guidance cannot mend: {lost[1]}"]
    if still is not None:
        subject = "the loss, its gradient or its step was not finite"
        told.append(f"{subject} for {still[0]}, which it did not move then: {still[1]}")
    return "; and ".join(told) or None


def _told(bad: torch.Tensor, codes: torch.Tensor, rows: list[dict], model: str) -> tuple[str, str] | None:
    """For how many pictures something was bad, bool `(visits, B)`, and for each how often and where first."""
    found = bad.any(0).nonzero().flatten().tolist()
    if not found:
        return None
    each = []
    for i in found[:_SHOWN]:
        first = int(bad[:, i].nonzero()[0])
        kind = KINDS[int(codes[first, i]) - 1]
        what = "" if kind == "prediction" else f"{_what(kind, rows[first], [i], model)} "
        each.append(f"picture {i} ({int(bad[:, i].sum())} times), first {what}at {place_of(rows[first])}")
    more = ["..."] if len(found) > _SHOWN else []
    return f"{len(found)} of {codes.shape[1]} pictures", "; ".join(each + more)


def place_of(row: dict[str, Any], pictures: str = "") -> str:
    """Where a visit is, in words; `pictures` are named after its step."""
    repeat = f"repeat {row['visit']}, " if row.get("visit") else ""
    return f"step {row['step']}{pictures} ({repeat}timestep {row['timestep']:g})"


def _what(kind: str, row: dict[str, Any], pictures: Sequence[int], model: str, terms=None) -> str:
    values = row.get("terms", {})
    if terms is None and kind == "loss":
        terms = [name for name, value in values.items() if not torch.isfinite(value.cpu()[list(pictures)]).all()]
    loss = " or ".join(f"'{name}'" for name in terms or values) or "a term"
    return {
        "prediction": model,
        "picture": "what the decoder makes of x0",
        "loss": f"the value of the loss {loss}",
        "gradient": f"the gradient of the loss {loss}",
        "through": f"the gradient of the loss {loss}, taken through the denoiser,",
        "step": f"the step for the loss {loss}",
    }[kind]
