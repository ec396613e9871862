"""Step rules: how far to go along a gradient. Small pieces `(init, update)`, per sample, after optax.

`update` gets what is known at a step (a `Signal`, with the direction so far) and returns the step to be subtracted
and its next state. Every norm is per sample; a zero gradient gives a zero step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..samplers.levels import Level


@dataclass(frozen=True)
class Signal:
    """What a step rule sees, per sample.

    Attributes:
        gradient: of the loss at `x_t` or at x0, `(B, ...)`.
        loss: its value, `(B,)`.
        floor: the loss of a perfect picture, `(B,)`, or None where it is not known.
        noise: the noise prediction, like the gradient.
        level, next_level: the noise levels that the solver's step leads from and to.
    """

    gradient: torch.Tensor
    loss: torch.Tensor
    noise: torch.Tensor
    level: Level
    next_level: Level
    floor: torch.Tensor | None = None


class StepRule:
    """Base class: `init(x) -> state`, `update(signal, state) -> (step, state)`; the step is subtracted."""

    def init(self, x: torch.Tensor) -> Any:
        """The state before the first step, for samples `x`."""
        return None

    def update(self, signal: Signal, state: Any) -> tuple[torch.Tensor, Any]:
        """The step `(B, ...)` for this signal, and the next state."""
        raise TypeError(f"{type(self).__name__} must define update(signal, state)")


def norm(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm per sample, `(B, 1, 1, ...)`."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))


def unit(x: torch.Tensor) -> torch.Tensor:
    """Each sample divided by its norm; zero stays zero."""
    # scaled by the largest entry first, so that neither tiny nor huge gradients under- or overflow when squared
    largest = x.flatten(1).abs().amax(1).view(-1, *[1] * (x.dim() - 1))
    scaled = x / torch.where(largest > 0, largest, 1)
    length = norm(scaled)
    return scaled / torch.where(length > 0, length, 1)


def per_sample(value: torch.Tensor, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers `(B,)` shaped to broadcast against `like` `(B, ...)`, in its dtype unless another is given."""
    return value.to(like.device, dtype or like.dtype).view(-1, *[1] * (like.dim() - 1))


def _over(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """A quotient that is zero where the denominator is."""
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1), 0)


@dataclass(frozen=True)
class Constant(StepRule):
    """`size * g`: DPS (Chung et al. 2023) with its loss un-squared."""

    size: float = 1.0

    def update(self, signal, state):
        return self.size * signal.gradient, state


@dataclass(frozen=True)
class SqrtAlpha(StepRule):
    """`size * a_t * g`: FreeDoM (Yu et al. 2023) for faces, segmentation and style."""

    size: float = 0.2

    def update(self, signal, state):
        return self.size * signal.level.alpha * signal.gradient, state


@dataclass(frozen=True)
class Rms(StepRule):
    """`size * rms(e) / rms(g) * g`, times `s_t / a_t` when `by_level`: FreeDoM for CLIP (Yu et al. 2023)."""

    size: float = 0.02
    by_level: bool = True

    def update(self, signal, state):
        level = signal.level
        factor = _over(level.sigma, level.alpha) if self.by_level else 1.0
        return self.size * factor * norm(signal.noise) * unit(signal.gradient), state


@dataclass(frozen=True)
class Unit(StepRule):
    """`size * sqrt(n) * g / ||g||`, n the number of elements: root mean square `size` whatever the loss."""

    size: float = 0.01

    def update(self, signal, state):
        return self.size * signal.gradient[0].numel() ** 0.5 * unit(signal.gradient), state


@dataclass(frozen=True)
class Polyak(StepRule):
    """`eta * ||e|| / ||g||^2 * g`, the noise prediction's norm standing in for the gap of the loss, as published by
    Shen et al. 2024."""

    eta: float = 1.0

    def update(self, signal, state):
        length = norm(signal.gradient)
        return self.eta * _over(norm(signal.noise), length) * unit(signal.gradient), state


@dataclass(frozen=True)
class PolyakToFloor(StepRule):
    """`max(L - L*, 0) / ||g||^2 * g`, Polyak's own step to a known floor `L*` (a measurement's noise level; 0 if
    unknown)."""

    def update(self, signal, state):
        gap = signal.loss if signal.floor is None else signal.loss - signal.floor
        length = norm(signal.gradient)
        return _over(per_sample(gap.clamp_min(0), length), length) * unit(signal.gradient), state


@dataclass(frozen=True)
class NoiseScaled(StepRule):
    """`k * sqrt(n) * s_step * g / ||g||`, `s_step` the spread of the noise that an ancestral solver draws at this step.

    As long as the sampler's own noise, whatever the loss's scale: the radius of DSG (Yang et al. 2024), without its
    mixing.
    """

    k: float = 0.2

    def update(self, signal, state):
        radius = self.k * signal.gradient[0].numel() ** 0.5 * signal.level.step_std(signal.next_level)
        return radius * unit(signal.gradient), state


@dataclass(frozen=True)
class Shortest(StepRule):
    """The shortest, per sample, of the steps that several rules propose."""

    rules: tuple[StepRule, ...]

    def init(self, x):
        return tuple(rule.init(x) for rule in self.rules)

    def update(self, signal, state):
        steps, after = zip(*(rule.update(signal, own) for rule, own in zip(self.rules, state)))
        best = steps[0]
        for step in steps[1:]:
            best = torch.where(norm(step) < norm(best), step, best)
        return best, tuple(after)


@dataclass(frozen=True)
class Chain(StepRule):
    """Rules in a row: each takes the step of the one before as its gradient."""

    rules: tuple[StepRule, ...]

    def init(self, x):
        return tuple(rule.init(x) for rule in self.rules)

    def update(self, signal, state):
        after = []
        for rule, own in zip(self.rules, state):
            step, own = rule.update(signal, own)
            signal = replace(signal, gradient=step)
            after.append(own)
        return signal.gradient, tuple(after)
