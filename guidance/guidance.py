"""Guidance: what to do with a loss while sampling, as plain data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..losses.loss import Composable, as_losses
from ..samplers.plain import plain
from ..samplers.time_travel import TimeTravel
from .augment import Augment
from .steps import NoiseScaled, StepRule

THROUGH = ("denoiser", "x0")
EDITS = ("shift", "score", "mean")


@dataclass(frozen=True)
class Guidance:
    """A description of how a loss steers a sampler; recipes return it, `sample` and `guide` carry it out.

    Args:
        loss: any loss, sum of losses, or callable `(B, 3, H, W) -> (B,)`; None guides nothing.
        rule: how far to go along the gradient.
        through: where the gradient is taken: at `x_t` through the "denoiser", or at "x0" only (no graph of the
            denoiser).
        edit: where the step lands: "shift" moves `x_{t-1}` after the solver's step; "score" adds it to the noise
            prediction and moves x0 along, before the solver's step; "mean" moves x0 while the noise stays, which shifts
            `x_{t-1}` by `a_{t-1}` times the step. Solvers that do not keep a shift (Heun, UniPC) get the score that a
            first-order step would turn into it.
        augment: random augmentation, for the terms that it suits.
        time_travel: repeated visits in a window.
        start, stop: window of sampling progress [start, stop) in which the loss acts; 0 is pure noise, 1 the picture.
        every: act at every n-th step only.
        strength: factor of every step; 1 is the recipe's own default, 0 samples plainly and only records the loss.
        raise_on_nonfinite: raise at the first gradient that is not finite, instead of moving nothing and
            reporting at the end.
        name, citation: of the published method.
    """

    loss: Composable | Callable[[torch.Tensor], torch.Tensor] | None
    rule: StepRule = NoiseScaled()
    through: str = "denoiser"
    edit: str = "shift"
    augment: Augment | None = None
    time_travel: TimeTravel | None = None
    start: float = 0.0
    stop: float = 1.0
    every: int = 1
    strength: float = 1.0
    raise_on_nonfinite: bool = False
    name: str = "guidance"
    citation: str = ""

    def __post_init__(self) -> None:
        if self.loss is not None:
            object.__setattr__(self, "loss", as_losses(self.loss))
        if self.through not in THROUGH:
            raise ValueError(f"through is one of {', '.join(THROUGH)}, got {self.through!r}")
        if self.edit not in EDITS:
            raise ValueError(f"edit is one of {', '.join(EDITS)}, got {self.edit!r}")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"a window needs 0 <= start < stop <= 1, got {self.start}, {self.stop}")
        if self.every < 1:
            raise ValueError(f"every is at least 1, got {self.every}")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength is a number from 0 up, got {self.strength}")

    @property
    def active(self) -> bool:
        """Whether it moves anything at all."""
        return self.loss is not None and self.strength > 0

    def acts_at(self, step: int, steps: int) -> bool:
        """Whether the loss acts at this solver step."""
        return self.loss is not None and self.start <= step / steps < self.stop and step % self.every == 0

    def begin(self, solver, decode: Callable[[torch.Tensor], torch.Tensor], seeds):
        """Start a run over a solver whose timesteps are set; see `lossguide.guidance.step.Run`."""
        from .step import Run

        return Run(self, solver, decode, seeds)

    def replace(self, **changes: Any) -> Guidance:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every setting, and the losses' own descriptions."""

        data = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "loss"}
        return {"loss": None if self.loss is None else [plain(term.describe()) for term in self.loss.terms()], **data}

    def to_json(self) -> str:
        """The description as JSON text."""
        return json.dumps(self.to_dict(), indent=1)
