"""Particles: several candidates per picture, weighed by their losses; no gradient is needed."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch

PICKS = ("best", "draw")
_NEVER = -1e300  # the logarithm of the weight of what is not to be chosen; finite, so that differences are


@dataclass(frozen=True)
class Particles:
    """Several particles per picture, of which one is kept.

    Their weights follow `exp(-sharpness * L)`; with `resample`, those that fall behind are replaced on the way
    (systematic resampling where the effective number falls below half of them), so that with more and more particles
    the one drawn at the end follows the model's law times `exp(-sharpness * L)`.

    Args:
        count: particles per picture, at least 1.
        sharpness: `lambda`, per unit of loss.
        resample: on the way, or only at the end.
        pick: keep the "best" (lowest loss) at the end, or "draw" one by weight.
        twisted: the proposal is moved by the loss's gradient, which the weights correct (TDS).
    """

    count: int = 4
    sharpness: float = 10.0
    resample: bool = True
    pick: str = "best"
    twisted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.count, numbers.Integral) or self.count < 1:
            raise ValueError(f"particles need a whole count >= 1, got {self.count!r}")
        if not 0 < self.sharpness < float("inf"):
            raise ValueError(f"sharpness is positive, got {self.sharpness}")
        if self.pick not in PICKS:
            raise ValueError(f"pick is one of {', '.join(PICKS)}, got {self.pick!r}")


class Population:
    """The particles of a batch, their weights, their resampling.

    Of G pictures with N particles each, sample `j * G + i` is the j-th particle of picture i: losses with one target
    per picture see their pictures in order, N times.

    Args:
        settings: what to do.
        strength: factor of the sharpness.
        sources: one generator per sample; each picture's particles draw from that of their first.
    """

    def __init__(self, settings: Particles, strength: float, sources: list[torch.Generator]):
        self.settings = settings
        self.sharpness = settings.sharpness * strength
        if len(sources) % settings.count:
            raise ValueError(
                f"a batch of {len(sources)} samples cannot be cut into groups of {settings.count} particles"
            )
        self.sources = sources[: len(sources) // settings.count]
        self._potential = torch.zeros(len(self.sources), settings.count, dtype=torch.float64)
        self._rest = torch.zeros_like(self._potential)  # of the weights: what the present losses do not say

    def weigh(self, loss: torch.Tensor) -> None:
        """Take the particles' present losses `(B,)` into their weights, in place of those before; one that is not
        finite is not chosen before it is again, unless all of its picture's are."""
        loss = self._by_picture(loss)
        self._potential = torch.where(torch.isfinite(loss), -self.sharpness * loss, _NEVER)

    def correct(self, log_ratio: torch.Tensor) -> None:
        """Add the logarithm `(B,)` of the model's density over the proposal's."""
        self._rest = self._rest + torch.nan_to_num(self._by_picture(log_ratio), 0.0, 1e290, -1e290)

    @property
    def log_weights(self) -> torch.Tensor:
        """Logarithms of the weights `(pictures, count)`, not normalised."""
        return self._rest + self._potential

    def _by_picture(self, values: torch.Tensor) -> torch.Tensor:
        return values.detach().double().cpu().view(self.settings.count, -1).T

    @property
    def weights(self) -> torch.Tensor:
        """Normalised weights `(pictures, count)`."""
        return torch.softmax(self.log_weights, 1)

    def ancestors(self) -> torch.Tensor | None:
        """Which sample of the batch each goes on from, `(B,)`; None where every picture keeps what it has."""
        if not self.settings.resample:
            return None
        weights, count = self.weights, self.settings.count
        poor = 1 / weights.square().sum(1) < count / 2
        if not bool(poor.any()):
            return None
        chosen = torch.arange(count).repeat(len(weights), 1)
        for group in poor.nonzero().flatten().tolist():
            start = torch.rand((), generator=self.sources[group], dtype=torch.float64)
            places = (torch.arange(count) + start) / count
            # from the right, so that a place of exactly 0 does not fall to a weight of 0
            chosen[group] = torch.searchsorted(weights[group].cumsum(0), places, right=True).clamp_max(count - 1)
            self._potential[group] = self._potential[group][chosen[group]]
            self._rest[group] = torch.where(self._potential[group] > _NEVER, -self._potential[group], 0)
        return (chosen.T * len(chosen) + torch.arange(len(chosen))).flatten()

    def chosen(self) -> torch.Tensor:
        """The sample of each picture that is kept, `(pictures,)`."""
        if self.settings.pick == "best":
            inside = self._potential.argmax(1)
        else:
            drawn = [torch.multinomial(w, 1, generator=source) for w, source in zip(self.weights, self.sources)]
            inside = torch.cat(drawn)
        return inside * len(inside) + torch.arange(len(inside))
