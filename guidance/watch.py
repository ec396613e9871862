"""What a run does about numbers that are not finite: it notes them, leaves them out, and warns or stops."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..samplers.faults import DENOISER, KINDS, Faults, sentence
from .steps import per_sample


class Watch:
    """The faults of a run's present visit.

    Args:
        active: whether the guidance moves anything; where not, faults are only noted.
        raises: whether to stop at the first fault.
        model: what to call the model's prediction in messages.

    Attributes:
        checks: whether to stop where the first prediction comes to nothing; as `active` says unless set, so that a
            pipeline at strength 0 does what it does by itself.
    """

    def __init__(self, active: bool, raises: bool, model: str = DENOISER):
        self.active, self.raises, self.model = active, raises and active, model
        self.checks = active
        self._faults = Faults(0)
        self._row: dict[str, Any] = {}
        self._begun = self._seen = False

    def begin(self, prediction: torch.Tensor, row: dict[str, Any]) -> None:
        """Begin a visit, whose row of the record this is, with the model's prediction `(B, ...)`.

        The host waits for the answer at the first visit only, or where it has to stop.

        Raises:
            FloatingPointError: at the first visit, the prediction is not finite for any sample.
        """
        self._faults, self._row = Faults.of_prediction(prediction), row
        if self.checks and not self._begun:
            self._faults.check_prediction(row, self.model)
        self._begun = True
        self._stop("prediction", ~self._faults.sound)

    def add(self, kind: str, bad: torch.Tensor, terms: Callable[[], Sequence[str] | None] = lambda: None) -> None:
        """Note that a kind is not finite for the samples `bad`, bool `(B,)`; `terms` finds the losses at fault.

        Raises:
            FloatingPointError: that is asked for, and there is one.
        """
        self._faults.add(kind, bad)
        self._stop(kind, bad, terms)

    def _stop(self, kind: str, bad: torch.Tensor, terms: Callable[[], Sequence[str] | None] = lambda: None) -> None:
        if self.raises and bool(bad.any()):
            pictures = bad.nonzero().flatten().tolist()
            raise FloatingPointError(sentence(kind, self._row, pictures, self.model, terms()))

    @property
    def codes(self) -> torch.Tensor:
        """What was not finite first, by its code, `(B,)`."""
        return self._faults.codes

    @property
    def sound(self) -> torch.Tensor:
        """For which samples everything was finite, bool `(B,)`."""
        return self._faults.sound

    def only(self, value: torch.Tensor, otherwise: float = 0.0) -> torch.Tensor:
        """The same `(B, ...)`, and zero or another number for samples that have a fault."""
        return torch.where(per_sample(self.sound, value, torch.bool), value, otherwise)

    def reorder(self, order: torch.Tensor) -> None:
        """Let sample `i` go on as sample `order[i]`."""
        self._faults.reorder(order)

    def warn_of_all(self) -> None:
        """At the end of the first visit that has a loss: warn if nothing was moved. The host waits for the answer."""
        if self._seen or not self.active:
            return
        self._seen = True
        codes = self.codes.tolist()
        if all(codes) and max(codes) > 1:
            told = sentence(KINDS[max(codes) - 1], self._row, range(len(codes)), self.model)
            warnings.warn(
                f"{told}, which are all: guidance moves nothing as long as that lasts; raise_on_nonfinite=True stops "
                "the run instead",
                RuntimeWarning,
                stacklevel=3,
            )


def kept(sound: torch.Tensor, after: Any, before: Any) -> Any:
    """A step rule's next state, of which samples that are not `sound`, bool `(B,)`, keep what they had before.

    States are nested tuples, lists and dicts; what is no tensor of B rows is common to all samples.
    """
    if isinstance(after, torch.Tensor):
        known = isinstance(before, (torch.Tensor, float, int))
        if after.dim() < 1 or len(after) != len(sound) or not known:
            return after
        return torch.where(per_sample(sound, after, torch.bool), after, before)
    if isinstance(after, (tuple, list)) and isinstance(before, (tuple, list)) and len(after) == len(before):
        each = [kept(sound, one, other) for one, other in zip(after, before)]
        return type(after)(*each) if hasattr(after, "_fields") else type(after)(each)  # a named tuple takes them singly
    if isinstance(after, dict) and isinstance(before, dict):
        return {name: kept(sound, one, before[name]) if name in before else one for name, one in after.items()}
    return after
