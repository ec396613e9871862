"""The edits of a guided step in numbers: how a step that a rule found becomes a change of the prediction, of x0 or of
where the solver lands, and what the solver's own step drew."""

from __future__ import annotations

import torch

from ..samplers.levels import Level
from .steps import Signal, UnsuitableSolver, per_sample, unit


def summed(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of two steps of which either may be missing."""
    return other if one is None else one if other is None else one + other


def scored(x: torch.Tensor, prediction: torch.Tensor, move: torch.Tensor, level: Level, kind: str) -> torch.Tensor:
    """The prediction whose noise is larger by `move`, and whose x0 is that of the same sample.

    Where the sample holds no x0 (alpha = 0) the noise says nothing about it, and nothing moves.
    """
    if not bool((level.alpha > 0).all()):
        return prediction
    sample = x.to(move.dtype)
    noise = level.noise(prediction.to(move.dtype), sample, kind) + move
    changed = level.prediction(level.x0(noise, sample, "epsilon"), noise, kind).to(prediction.dtype)
    return torch.where(per_sample((move != 0).flatten(1).any(1), changed, torch.bool), changed, prediction)


def score_for_shift(shift: torch.Tensor, level: Level, after: Level) -> torch.Tensor | None:
    """The change of the noise prediction that makes a first-order step `a' x0 + s' e` land `shift` lower.

    With x0 moving along, `e + w` moves the step's end by `-a' (s / a - s' / a') w`; None where the level stays.
    """
    scale = after.alpha * level.sigma / level.alpha - after.sigma
    return shift / scale if bool((scale > 1e-6 * level.sigma).all()) else None


def metric_of(level: Level, after: Level, edit: str, through: bool) -> torch.Tensor:
    """What turns a gradient into an edit where pixels differ in their level: a score that is larger by `-w g` moves the
    noise by `s w g`, x0 by `-(s^2 / a) w g` and the mean of an ancestral step by `-w P g`; at x0, its uncertainty."""
    if not through:
        return level.x0_variance * (level.alpha / level.sigma.clamp_min(1e-20) if edit == "score" else 1)
    if edit == "score":
        return level.sigma
    return level.sigma**2 / level.alpha if edit == "mean" else level.score_gain(after)


def drew(landed: torch.Tensor, level: Level, after: Level, x0: torch.Tensor, noise: torch.Tensor) -> bool | None:
    """Whether a solver's step drew noise, by where it landed; None where no step would.

    A deterministic solver's first step lands off the ancestral mean along the predicted noise. Pixels whose level stays
    do not tell.
    """
    draws = level.step_std(after) > 0
    if not bool(draws.any()):
        return None
    off = landed - level.ancestral_mean(after, x0, noise)
    if draws.dim():
        off, noise = off * draws, noise * draws
    return bool((unit(off) * unit(noise)).flatten(1).sum(1).nanmedian() < 0.5)


def log_ratio(signal: Signal, move: torch.Tensor) -> torch.Tensor:
    """Logarithm `(B,)` of the model's own density over the moved proposal's, where an ancestral step landed."""
    variance = signal.level.step_std(signal.next_level) ** 2
    draws = variance > 0
    if not bool(draws.any()):
        return torch.zeros(len(move), dtype=torch.float64)
    drawn = signal.landed - signal.level.ancestral_mean(signal.next_level, signal.x0, signal.noise)
    if draws.dim():  # pixels whose level stays draw nothing, and say nothing
        drawn, move, variance = (
            value.expand_as(drawn)[:, draws[0].expand(drawn.shape[1:])] for value in (drawn, move, variance)
        )
    spreads = (drawn.square() / variance).flatten(1).mean(1)  # one, for noise of that variance around that mean
    sound = torch.isfinite(spreads)
    count = max(1, int(sound.sum())) * drawn[0].numel()
    largest = signal.landed.flatten(1).abs().amax(1)[sound].amax() if sound.any() else 0.0
    round_off = ((1e-5 * largest) ** 2 / variance).mean().item()
    if abs(spreads[sound].mean().item() - 1) > 0.05 + 6 * (2 / count) ** 0.5 + round_off:
        raise not_ancestral()
    return ((2 * drawn - move) * move / (2 * variance)).double().flatten(1).sum(1)


def not_ancestral() -> UnsuitableSolver:
    """Why twisted particles refuse a solver."""
    return UnsuitableSolver(
        "twisted particles are weighed by the law of an ancestral step, and this solver's is another"
    )
