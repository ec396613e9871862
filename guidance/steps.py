"""Step rules: how far to go along a gradient. Small pieces `(init, update)`, per sample, after optax.

`update` gets what is known at a step (a `Signal`, with the direction so far) and returns the step to be subtracted
and its next state. Every norm is per sample; a zero gradient gives a zero step.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        level, next_level: the noise levels that the solver's step leads from and to. Sigma-space samplers (Karras, EDM)
            are told in variance-preserving coordinates, so that a rule means the same to every solver of a model.
        levels, step: all levels of the run, and the index of `level` among them.
        strength: the guidance's, for rules that scale themselves.
        x0: the clean sample predicted, as the solver clips it.
        at_x0: the gradient at x0, before it was pulled back through the denoiser.
        landed: where the solver's own step lands, or None where the rule has to be asked before it.
        drawn: the noise that was put on the anchor (edit "anchor"), else None.
        random: whether the solver draws noise, where that is known.
        metric: where pixels differ in their level, what turns the gradient into a step of the edit, per pixel; else
            None.
        metric_x0: the same for a gradient at x0.
        dual: what `gradient` and `at_x0` are weighed by already where the levels differ, or None.
        count: how many elements of each sample may move, `(B, 1, ...)`; None for all. The others are zero everywhere.
    """

    gradient: torch.Tensor
    loss: torch.Tensor
    noise: torch.Tensor
    level: Level
    next_level: Level
    floor: torch.Tensor | None = None
    levels: Sequence[Level] = ()
    step: int = 0
    strength: float = 1.0
    x0: torch.Tensor | None = None
    at_x0: torch.Tensor | None = None
    landed: torch.Tensor | None = None
    drawn: torch.Tensor | None = None
    random: bool | None = None
    metric: torch.Tensor | None = None
    metric_x0: torch.Tensor | None = None
    dual: torch.Tensor | None = None
    count: torch.Tensor | None = None

    @property
    def slope(self) -> torch.Tensor:
        """The gradient, without what it is weighed by."""
        return self.gradient if self.dual is None else self.gradient / self.dual

    @property
    def whitened(self) -> torch.Tensor:
        """The gradient in coordinates in which the metric M is one: `sqrt(M) g`."""
        return self.gradient if self.metric is None else self.metric.sqrt() * self.slope

    @property
    def whitened_x0(self) -> torch.Tensor:
        """The same of the gradient at x0."""
        if self.metric_x0 is None:
            return self.at_x0
        return self.metric_x0.sqrt() * (self.at_x0 if self.dual is None else self.at_x0 / self.dual)

    def back(self, step: torch.Tensor) -> torch.Tensor:
        """A step in those coordinates as one of the sample."""
        return step if self.metric is None else self.metric.sqrt() * step

    @property
    def root(self) -> float | torch.Tensor:
        """`sqrt(n)`, n the number of elements that may move: the length of white noise."""
        return self.gradient[0].numel() ** 0.5 if self.count is None else self.count.sqrt()

    def within(self, movable: torch.Tensor | None) -> Signal:
        """The same for a sample of which only `movable` elements are there, so that lengths are theirs."""
        if movable is None:
            return self
        fields = ("gradient", "noise", "x0", "at_x0", "landed", "drawn")
        found = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        count = movable.expand_as(self.gradient).flatten(1).sum(1).to(self.gradient.dtype)
        kept = {name: torch.where(movable, value, 0) for name, value in found.items()}
        return replace(self, count=count.view(-1, *[1] * (self.gradient.dim() - 1)), **kept)


class UnsuitableSolver(ValueError):
    """A recipe asks of the solver what it does not do."""

    def __init__(self, what: str, wanted: str = "DDIM with eta=1, DDPM or Euler ancestral"):
        super().__init__(f"{what}; choose {wanted}")


class StepRule:
    """Base class: `init(x) -> state`, `update(signal, state) -> (step, state)`; the step is subtracted.

    A rule that `scales_itself` heeds `signal.strength`; the steps of others are multiplied by it. A `natural` rule
    steps in the signal's metric where pixels differ in their level; others know the gradient and the levels alone.
    """

    scales_itself = False
    natural = False

    def init(self, x: torch.Tensor) -> Any:
        """The state before the first step, for samples `x` `(B, ...)`: tensors of B rows, one per sample, and what is
        common to all, nested as one likes."""
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
    return torch.where(denominator > 0, numerator / denominator, 0)


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
class AlphaProduct(StepRule):
    """`size * a_t a_{t-1} * g`: the pseudoinverse-guided method (Song et al. 2023) in its authors' later code.

    With a gradient through the denoiser, whose slope is at most about `1 / a_t`, it moves x0 by at most about what was
    asked of it at x0.
    """

    size: float = 1.0

    def update(self, signal, state):
        return self.size * signal.level.alpha * signal.next_level.alpha * signal.gradient, state


@dataclass(frozen=True)
class Rms(StepRule):
    """`size * rms(e) / rms(g) * g`, times `s_t / a_t` when `by_level`: with `AncestralShare`, FreeDoM's for CLIP (Yu et
    al. 2023)."""

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
    natural = True

    def update(self, signal, state):
        return self.size * signal.root * unit(signal.back(signal.whitened)), state


@dataclass(frozen=True)
class Polyak(StepRule):
    """`eta * ||e|| / ||g||^2 * g`, the noise prediction's norm standing in for the gap of the loss, as published by
    Shen et al. 2024."""

    eta: float = 1.0
    natural = True

    def update(self, signal, state):
        g = signal.whitened
        return signal.back(self.eta * _over(norm(signal.noise), norm(g)) * unit(g)), state


@dataclass(frozen=True)
class PolyakToFloor(StepRule):
    """`max(L - L*, 0) / ||g||^2 * g`: Polyak's own step (1969), with a target loss and a cap.

    Where pixels differ in their level, `max(L - L*, 0) / <g, M g> * M g`, M the metric of the edit.

    Args:
        target: `L*`; None for the loss's own floor (a measurement's noise level), 0 where that is not known.
        cap: the root mean square of the step at most; None for no cap.
    """

    target: float | None = None
    cap: float | None = None
    natural = True

    def update(self, signal, state):
        floor = signal.floor if self.target is None else self.target
        gap = signal.loss if floor is None else signal.loss - floor
        g = signal.whitened
        length = norm(g)
        length = _over(per_sample(gap.clamp_min(0), length), length)
        direction = signal.back(unit(g))
        if self.cap is not None:
            most = self.cap * signal.root
            length = length.clamp_max(most if signal.metric is None else most / norm(direction))
        return length * direction, state


@dataclass(frozen=True)
class Reach(StepRule):
    """`size * ||g_0||^2 / ||g||^2 * g`: as long as it takes to move x0 by `size * g_0`, `g = J^T g_0` pulled back
    through the denoiser's Jacobian J; `size * g_0` itself where it was not.

    With `g_0` Polyak's step at x0 this is Polyak's step through the denoiser; `g_0` may as well be what several steps,
    or a proximal point, reach at x0. Sizes from 1 to 2 over-relax (Kaczmarz; Agmon 1954).
    Where pixels differ in their level, both lengths are those of their metrics.
    """

    size: float = 1.0
    natural = True

    def update(self, signal, state):
        g, reach = signal.whitened, norm(signal.whitened_x0)
        return signal.back(self.size * _over(reach, norm(g)) * reach * unit(g)), state


@dataclass(frozen=True)
class NoiseScaled(StepRule):
    """`k * sqrt(n) * s_step * g / ||g||`, `s_step` the spread of the noise that an ancestral solver draws at this step.

    As long as the sampler's own noise, whatever the loss's scale: the radius of DSG (Yang et al. 2024), without its
    mixing. Where pixels differ in their level, `k * sqrt(n) * S^2 g / ||S g||`, S the spread of each pixel's noise.

    Args:
        k: the share of the noise's length.
        fading: times `s_t`: the loss has fallen to its plateau long before the end, and steps of full length would then
            only push details. Also, `k` is then for 50 steps of a solver that draws noise: steps add up to as much when
            there are more or (down to 8) fewer of them, and to half where no noise washes away what they did.
    """

    k: float = 0.2
    fading: bool = False
    natural = True

    def update(self, signal, state):
        spread = signal.level.step_std(signal.next_level)
        radius = self.k * signal.root * spread
        if self.fading:
            levels = signal.levels
            if state is None:  # counted once; Heun's half-steps, which stay at a level, are none
                state = max(sum(not torch.equal(a.sigma, b.sigma) for a, b in zip(levels, levels[1:])), 1)
            share = min((50 / state) ** 0.5, 2.5) * (0.5 if signal.random is False else 1.0)
            radius = share * radius * signal.level.sigma
        return radius * unit(signal.gradient if signal.metric is None else spread * signal.slope), state


@dataclass(frozen=True)
class Squared(StepRule):
    """`L * g`, the gradient of `L^2 / 2`: for methods that are published for a squared distance."""

    def update(self, signal, state):
        return per_sample(signal.loss, signal.gradient) * signal.gradient, state


@dataclass(frozen=True)
class SigmaScaled(StepRule):
    """`size * s_t * g`: the score form's addition to the noise prediction (Dhariwal and Nichol 2021; Bansal et al.
    2023)."""

    size: float = 1.0

    def update(self, signal, state):
        return self.size * signal.level.sigma * signal.gradient, state


@dataclass(frozen=True)
class LevelRatio(StepRule):
    """`a_{t-1} / a_t * g`: a step at `x_t` as it arrives at `x_{t-1}` (TFG, Ye et al. 2024)."""

    def update(self, signal, state):
        return _over(signal.next_level.alpha, signal.level.alpha) * signal.gradient, state


@dataclass(frozen=True)
class AncestralShare(StepRule):
    """`c_1 * g`, `c_1 = a' (1 - (a s' / (a' s))^2)` being what x0 counts for in an ancestral step's mean beside `x_t`:
    a part of FreeDoM's step for CLIP (Yu et al. 2023), small while there is much noise."""

    def update(self, signal, state):
        return signal.next_level.alpha * signal.level.shared(signal.next_level)[1] * signal.gradient, state


@dataclass(frozen=True)
class Scheduled(StepRule):
    """`size * w_t * g`, `w_t` of mean one over the run (TFG, Ye et al. 2024).

    Args:
        size: mean factor.
        schedule: "constant"; "increase", as `abar_t / abar_{t-1}`; or "decrease", as one minus that.
    """

    size: float = 1.0
    schedule: str = "increase"

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "increase", "decrease"):
            raise ValueError(f"a schedule is constant, increase or decrease, got {self.schedule!r}")

    def update(self, signal, state):
        return self.size * self._weight(signal) * signal.gradient, state

    def _weight(self, signal):
        if self.schedule == "constant":
            return 1.0
        shares = torch.stack([level.signal_share for level in signal.levels])
        ratios = shares[:-1] / shares[1:]
        if self.schedule == "decrease":
            ratios = 1 - ratios
        return ratios[signal.step] * len(ratios) / ratios.sum(0)


@dataclass(frozen=True)
class Adam(StepRule):
    """`size * m / (sqrt(v) + 1e-8)`: Adam's bias-corrected moments of the gradient over the steps (Kingma and Ba 2015).

    Args:
        size: length per element where gradients agree from step to step.
        beta1, beta2: decay of the first and the second moment, in [0, 1).
    """

    size: float = 0.03
    beta1: float = 0.5
    beta2: float = 0.6

    def init(self, x):
        return 0, 0.0, 0.0

    def update(self, signal, state):
        count, first, second = state
        count, g = count + 1, signal.gradient
        first = self.beta1 * first + (1 - self.beta1) * g
        second = self.beta2 * second + (1 - self.beta2) * g.square()
        m, v = first / (1 - self.beta1**count), second / (1 - self.beta2**count)
        return self.size * m / (v.sqrt() + 1e-8), (count, first, second)


@dataclass(frozen=True)
class Spherical(StepRule):
    """Turn the noise that the solver drew toward descent, and keep its length (DSG, Yang et al. 2024).

    `x_{t-1} = mu + r unit(d + k (d* - d))` with `r = sqrt(n) s_step`, `d` the noise drawn, `d* = -r g / ||g||`.

    Raises:
        UnsuitableSolver: the solver draws no noise.
    """

    k: float = 0.1
    scales_itself = True  # by more turning, up to descent itself, not by a longer step

    def update(self, signal, state):
        step_std = signal.level.step_std(signal.next_level)
        none = "a spherical step turns the noise that the solver draws, and this solver draws none"
        if signal.landed is None:
            raise UnsuitableSolver(none)
        if not bool((step_std > 0).any()):
            return torch.zeros_like(signal.gradient), state
        mean = signal.level.ancestral_mean(signal.next_level, signal.x0, signal.noise)
        drawn = (signal.landed - mean) * _over(torch.ones_like(step_std), step_std)  # over each pixel's noise
        along = (unit(drawn) * unit(signal.noise)).flatten(1).sum(1)
        # asked once, as the host waits for the answer
        if state is None and bool((norm(drawn) < 0.5 * signal.root).all() | (along > 0.9).all()):
            raise UnsuitableSolver(none)
        wanted = -signal.root * unit(signal.gradient if signal.metric is None else step_std * signal.slope)
        turned = signal.root * unit(drawn + min(1.0, self.k * signal.strength) * (wanted - drawn))
        return signal.landed - (mean + step_std * turned), True


@dataclass(frozen=True)
class AsNoise(StepRule):
    """`a_t / s_t * g`: a step of x0 as what the noise prediction has to gain, so that the sample stays; for the edit
    "score"."""

    def update(self, signal, state):
        return _over(signal.level.alpha, signal.level.sigma) * signal.gradient, state


@dataclass(frozen=True)
class AsScore(StepRule):
    """`(a'/a) (s^2 - (a s'/a')^2) g`: how far a score of `-g` moves an ancestral step; nothing where no noise is drawn.

    The twisted proposal of TDS (Wu et al. 2023).
    """

    size: float = 1.0

    def update(self, signal, state):
        level, after = signal.level, signal.next_level
        gain = level.score_gain(after)
        draws = (level.step_std(after) > 0).to(gain)
        return self.size * draws * gain * signal.gradient, state


@dataclass(frozen=True)
class PriorGap(StepRule):
    """`g + weight * s/a * (e - n)`: adds the denoiser's own pull on an anchor, `n` the noise put on it (RED-diff,
    Mardani et al. 2024); only for the edit "anchor"."""

    weight: float = 0.25

    def update(self, signal, state):
        if signal.drawn is None:
            raise ValueError('the prior\'s pull on an anchor needs edit="anchor"')
        factor = self.weight * _over(signal.level.sigma, signal.level.alpha)
        return signal.gradient + factor * (signal.noise - signal.drawn), state


@dataclass(frozen=True)
class Shortest(StepRule):
    """The shortest, per sample, of the steps that several rules propose."""

    rules: tuple[StepRule, ...]

    @property
    def natural(self) -> bool:
        return all(rule.natural for rule in self.rules)

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

    @property
    def natural(self) -> bool:
        return any(rule.natural for rule in self.rules)

    def init(self, x):
        return tuple(rule.init(x) for rule in self.rules)

    def update(self, signal, state):
        after = []
        for rule, own in zip(self.rules, state):
            step, own = rule.update(signal, own)
            signal = replace(signal, gradient=step, **(dict(metric=None, dual=None) if rule.natural else {}))
            after.append(own)
        return signal.gradient, tuple(after)


@dataclass(frozen=True)
class Fisher(StepRule):
    """A rule in the metric of the softmax over the first axis, for logits: `M = 1 / (p + damping)` (Amari 1998).

    A logit's gradient is its token's probability times how far the token is from the mean in what the loss wants;
    without the probability, which the metric takes away, unlikely tokens are heard as well.

    Args:
        rule: one that steps in the signal's metric.
        damping: the probability below which a token counts less and less.
    """

    rule: StepRule = PolyakToFloor()
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not self.rule.natural:
            raise ValueError(f"{type(self.rule).__name__} knows no metric")
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"damping is positive, got {self.damping}")

    def init(self, x):
        return self.rule.init(x)

    def update(self, signal, state):
        metric = 1 / (signal.x0.softmax(1) + self.damping)
        return self.rule.update(replace(signal, metric=metric), state)
