"""The guided step: the one place where a loss moves a sample. The library's loop and the plug-in both call it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..samplers.levels import Level
from ..samplers.random import generators, randn
from ..samplers.record import Record
from ..samplers.solver import Solver
from ..samplers.time_travel import Visit, visits
from .gradient import loss_gradient, pulled_back
from .guidance import Guidance
from .steps import Signal, norm, per_sample


class Run:
    """One sampling run under a guidance: its visits, its random draws, its step rule's state, its record.

    Args:
        guidance: what to carry out.
        solver: a solver whose timesteps are set.
        decode: sample -> picture for the losses.
        seeds: one integer per picture, or a function from the batch size to them.
    """

    def __init__(self, guidance: Guidance, solver: Solver, decode: Callable[[torch.Tensor], torch.Tensor], seeds):
        self.guidance = guidance
        self.solver = solver
        self.decode = decode
        travel = guidance.time_travel if guidance.active else None
        self.visits: list[Visit] = visits(len(solver), travel, lambda step: bool(self._terms(step)))
        self.record = Record()
        self.record.settings = guidance.to_dict()
        self._seeds: Callable[[int], list[int]] = seeds if callable(seeds) else lambda batch: list(seeds)
        self._sources: list[torch.Generator] | None = None
        self._state: Any = None

    def needs_graph(self, visit: Visit) -> bool:
        """Whether this visit needs the denoiser's graph from sample to prediction."""
        guidance = self.guidance
        return guidance.active and guidance.through == "denoiser" and bool(self._terms(visit.step))

    def _terms(self, step: int) -> list:
        steps = len(self.solver)
        if not self.guidance.acts_at(step, steps):
            return []
        return [term for term in self.guidance.loss.terms() if term.acts_at(step / steps)]

    def step(
        self,
        x: torch.Tensor,
        prediction: torch.Tensor,
        visit: Visit,
        solve: Callable[[torch.Tensor], torch.Tensor],
        started: float | None = None,
    ) -> torch.Tensor:
        """From `x_t` to the sample of the next visit.

        Args:
            x: `(B, ...)`; where `needs_graph(visit)` holds, `prediction` depends on it through autograd.
            prediction: the model's, of the solver's kind.
            visit: which step, which repeat.
            solve: the solver's own step, from a prediction to `x_{t-1}`.
            started: `time.perf_counter()` before the prediction was made, for the record.

        Returns:
            `x_{t-1}`, or under time travel the re-noised `x_t` for the next visit; detached.
        """
        started = time.perf_counter() if started is None else started
        if self._sources is None:
            self._sources = generators(self._seeds(len(x)), "guidance")
            self._state = self.guidance.rule.init(x.detach())
        solver, guidance = self.solver, self.guidance
        level, after = solver.levels[visit.step], solver.levels[visit.step + 1]
        row: dict[str, Any] = dict(
            step=visit.step,
            visit=visit.repeat,
            timestep=solver.times[visit.step],
            progress=visit.step / len(solver),
            alpha=level.alpha.tolist(),
            sigma=level.sigma.tolist(),
        )
        move, terms = None, self._terms(visit.step)
        if terms:
            move = self._move(x, prediction, terms, level, after, row)
        x, prediction = x.detach(), prediction.detach()
        shift = score = None
        if move is not None and guidance.edit == "score":
            score = move
        elif move is not None:
            shift = after.alpha * move if guidance.edit == "mean" else move
            if not solver.keeps_shifts:
                shift, score = None, _score_for_shift(shift, level, after)
        if score is not None:
            prediction = _scored(x, prediction, score, level, solver.kind)
        before = None if visit.last else solver.remember()
        with torch.no_grad():
            x_next = solve(prediction)
            if shift is not None:
                x_next = (x_next.to(shift.dtype) - shift).to(x_next.dtype)
            if not visit.last:
                noise = randn(tuple(x.shape[1:]), self._sources, like=x_next)
                x_next = after.renoise(x_next, level, noise)
                solver.return_to(before)
        if x.is_cuda:
            row["peak_memory"] = torch.cuda.max_memory_allocated(x.device)
        self.record.add(**row, seconds=time.perf_counter() - started)
        return x_next

    def _move(self, x, prediction, terms, level: Level, after: Level, row: dict) -> torch.Tensor | None:
        """The step to subtract, `(B, ...)` in float32 (float64 for float64 samples), or None at strength 0."""
        guidance, kind = self.guidance, self.solver.kind
        dtype = torch.promote_types(x.dtype, torch.float32)
        through = guidance.through == "denoiser" and guidance.active
        if through and not (prediction.requires_grad and x.requires_grad):
            raise ValueError(
                "the denoiser's prediction carries no gradient back to its sample: it ran without gradients or in "
                "inference mode, is not differentiable, or a callback returned a sample without gradients; choose "
                'through="x0", which needs none'
            )
        with torch.set_grad_enabled(through):
            x0 = level.x0(prediction.to(dtype), x.to(dtype), kind)
        g, loss, values = self._gradient_at_x0(x0.detach(), terms)
        row.update(loss=loss, terms=values)
        if g is None:
            return None
        if through:
            g = pulled_back(x0, x, g).to(dtype)
        fine = torch.isfinite(g).flatten(1).all(1) & torch.isfinite(loss)
        g = torch.where(per_sample(fine, g, torch.bool), g, 0)
        floor = _floor(terms, loss)
        with torch.no_grad():
            noise = level.noise(prediction.detach().to(dtype), x.detach().to(dtype), kind)
            signal = Signal(g, torch.nan_to_num(loss), noise, level, after, floor)
            move, self._state = guidance.rule.update(signal, self._state)
            move = guidance.strength * move
            fine = fine & torch.isfinite(move).flatten(1).all(1)
            move = torch.where(per_sample(fine, move, torch.bool), move, 0)
        self.record.count_nonfinite(~fine)
        if guidance.raise_on_nonfinite and not bool(fine.all()):
            bad = (~fine).nonzero().flatten().tolist()
            raise FloatingPointError(
                f"the loss, its gradient or its step is not finite at step {row['step']} for pictures {bad}"
            )
        row.update(gradient_norm=norm(g).flatten(), step_size=norm(move).flatten())
        return move

    def _gradient_at_x0(self, x0: torch.Tensor, terms: list):
        """Gradient at x0 (None at strength 0): the guide's at the picture, then one product through the decoder."""
        guidance = self.guidance
        with torch.set_grad_enabled(guidance.active):
            leaf = x0.requires_grad_(guidance.active)
            image = self.decode(leaf)
        seen = image.detach()
        seen = seen.to(torch.promote_types(seen.dtype, torch.float32))
        draws = None
        if guidance.active and guidance.augment is not None and any(term.augment for term in terms):
            draws = guidance.augment.draw(self._sources)
        augment = None if draws is None else guidance.augment
        g, loss, values = loss_gradient(seen, terms, augment, draws, gradient=guidance.active)
        if g is not None:
            g = pulled_back(image, leaf, g)
        return g, loss, values


def _scored(x: torch.Tensor, prediction: torch.Tensor, move: torch.Tensor, level: Level, kind: str) -> torch.Tensor:
    """The prediction whose noise is larger by `move`, and whose x0 is that of the same sample.

    Where the sample holds no x0 (alpha = 0) the noise says nothing about it, and nothing moves.
    """
    if not bool((level.alpha > 0).all()):
        return prediction
    sample = x.to(move.dtype)
    noise = level.noise(prediction.to(move.dtype), sample, kind) + move
    return level.prediction(level.x0(noise, sample, "epsilon"), noise, kind).to(prediction.dtype)


def _score_for_shift(shift: torch.Tensor, level: Level, after: Level) -> torch.Tensor | None:
    """The change of the noise prediction that makes a first-order step `a' x0 + s' e` land `shift` lower.

    With x0 moving along, `e + w` moves the step's end by `-a' (s / a - s' / a') w`; None where the level stays.
    """
    scale = after.alpha * level.sigma / level.alpha - after.sigma
    return shift / scale if bool((scale > 1e-6 * level.sigma).all()) else None


def _floor(terms: list, loss: torch.Tensor) -> torch.Tensor | None:
    """The weighted sum's known floor `(B,)`, or None when some term has none."""
    floors = [getattr(term.loss, "floor", None) for term in terms]
    if any(floor is None for floor in floors):
        return None
    return sum(term.weight * torch.as_tensor(floor).to(loss) for term, floor in zip(terms, floors)).expand_as(loss)
