"""The guided step: the one place where a loss moves a sample. The library's loop and the plug-in both call it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..losses.loss import note
from ..samplers.capture import Captures
from ..samplers.change import Change
from ..samplers.denoiser import as_picture
from ..samplers.faults import place_of, unsound
from ..samplers.levels import Level
from ..samplers.random import generators, placed, randn
from ..samplers.record import Record
from ..samplers.solver import Solver, reordered
from ..samplers.time_travel import Visit, visits
from .edits import drew, log_ratio, metric_of, not_ancestral, score_for_shift, scored, summed
from .gradient import balanced_gradient, floor_of, loss_gradient, pulled_back
from .guidance import Guidance, Inner
from .particles import Population
from .preview import Preview
from .smoothing import smoothed
from .steps import Signal, UnsuitableSolver, norm, per_sample
from .watch import Watch, kept


class Run:
    """One sampling run under a guidance: its visits, its random draws, its step rule's state, its record.

    Args:
        guidance: what to carry out.
        solver: a solver whose timesteps are set.
        decode: sample -> picture for the losses.
        seeds: one integer per sample, or a function from the batch size to them.

    Attributes:
        movable: from the first sample to which of its elements may move, as booleans that broadcast against it; None
            for all. The others take the solver's own steps, and neither gradient nor step of the guidance.
        change: a source, and where and when it may change; None where there is none. What a step is not free to move
            gets nothing of the guidance either.
        watch: what the run does about numbers that are not finite.
        captures: where the guide's passes and the decoder's are recorded, to be replayed at later visits; None where
            they are not.
    """

    def __init__(self, guidance: Guidance, solver: Solver, decode: Callable[[torch.Tensor], torch.Tensor], seeds):
        self.guidance = guidance
        self.solver = solver
        self.decode = decode
        travel = guidance.time_travel if guidance.active else None
        self._progress = [guidance.progress(step, solver) for step in range(len(solver))]
        self.visits: list[Visit] = visits(
            self._progress, travel, lambda step: bool(self._terms(step)) and solver.begins(step)
        )
        weighty = guidance.active and any(term.weight for term in guidance.loss.terms())
        if weighty and not any(self._terms(step) for step in range(len(solver))):
            reached = ", ".join(f"{progress:.2f}" for progress in self._progress[-3:])
            raise ValueError(
                f"the loss acts at none of the {len(solver)} steps, the last ones at progress {reached}: "
                "its window, or the guidance's, holds none of them"
            )
        self._graph_steps = self._steps_through()
        self.record = Record()
        self.record.settings = guidance.to_dict()
        self.watch = Watch(guidance.active, guidance.raise_on_nonfinite, self.record.model)
        self.preview: Preview | None = None
        self.captures: Captures | None = None
        self.movable: Callable[[torch.Tensor], torch.Tensor | None] = lambda x: None
        self.change: Change | None = None
        self._region: torch.Tensor | None = None  # what may move at this visit
        self._movable: torch.Tensor | None = None
        self._seeds: Callable[[int], list[int]] = seeds if callable(seeds) else lambda batch: list(seeds)
        self._sources: list[torch.Generator] | None = None
        self._begun = False
        self._state: Any = None
        self._inner_state: Any = None
        self._toward_state: Any = None
        self._anchor: torch.Tensor | None = None
        self._factors: list[torch.Tensor] | None = None  # of the terms at this visit, where they are balanced
        self._population: Population | None = None
        self._draws: bool | None = None  # the solver itself
        self._random: bool | None = None if solver.keeps_shifts else False  # with what remixing adds
        self._levels = [level.preserving() for level in solver.levels]
        self._means = [(level.alpha.mean().item(), level.sigma.mean().item()) for level in solver.levels]

    def needs_graph(self, visit: Visit) -> bool:
        """Whether this visit needs the denoiser's graph from sample to prediction."""
        return visit.step in self._graph_steps

    def _steps_through(self) -> set[int]:
        """The steps that go through the denoiser: a share of all, spread evenly over those where the loss acts."""
        acting = [step for step in range(len(self.solver)) if self._terms(step)]
        if not self.guidance.goes_through or not acting:
            return set()
        wanted = max(1, int(self.guidance.through_share * len(self.solver) + 1e-9))
        wanted = min(wanted, len(acting))
        return {acting[i * len(acting) // wanted] for i in range(wanted)}

    def _terms(self, step: int) -> list:
        progress = self._progress[step]
        if not self.guidance.acts_at(step, progress):
            return []
        return [term.at(progress) for term in self.guidance.loss.terms() if term.acts_at(progress)]

    def step(
        self,
        x: torch.Tensor,
        prediction: torch.Tensor,
        visit: Visit,
        solve: Callable[[torch.Tensor], torch.Tensor],
        started: float | None = None,
        source: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """From `x_t` to the sample of the next visit.

        Args:
            x: `(B, ...)`; where `needs_graph(visit)` holds, `prediction` depends on it through autograd.
            prediction: the model's, of the solver's kind.
            visit: which step, which repeat.
            solve: the solver's own step, from a prediction and its sample to `x_{t-1}`.
            started: `time.perf_counter()` before the prediction was made, for the record.
            source: the same sample as the model saw it, where that is another tensor.

        Returns:
            `x_{t-1}`, or under time travel the re-noised `x_t` for the next visit; detached.
        """
        started = time.perf_counter() if started is None else started
        if not self._begun:
            self._begin(x.detach())
        self._region = self._free(visit.step)
        solver, guidance = self.solver, self.guidance
        level, after = solver.levels[visit.step], solver.levels[visit.step + 1]
        row: dict[str, Any] = dict(
            step=visit.step,
            visit=visit.repeat,
            timestep=solver.times[visit.step],
            progress=self._progress[visit.step],
            alpha=self._means[visit.step][0],
            sigma=self._means[visit.step][1],
        )
        self.watch.begin(prediction, row)
        terms = self._terms(visit.step)
        try:
            seen = self._look(x, prediction, terms, visit.step, row, source) if self._asks(terms, visit.step) else None
        except FloatingPointError:
            raise  # which says so itself
        except Exception as error:
            note(error, f"at {place_of(row)} of the guidance '{guidance.name}'")
            raise
        x, prediction = x.detach(), prediction.detach()
        if self.preview is not None and self.preview.due(len(self.record.rows)):
            with torch.no_grad():
                fine = torch.promote_types(x.dtype, torch.float32)
                self.preview(self.decode(level.x0(prediction.to(fine), x.to(fine), solver.kind)), row)
        if seen is not None and seen.order is not None:
            x, prediction = x[seen.order], prediction[seen.order]
            solver.reorder(seen.order, len(x))
            self.record.keep(seen.order, row)
            if self.change is not None:
                self.change.reorder(seen.order)
        if guidance.remix and guidance.active:
            solve = self._remixing(solve, level, after, visit.step)
        before = None if visit.last else solver.remember()
        with torch.no_grad():
            if seen is None:
                x_next = solve(prediction, x)
            elif guidance.edit == "anchor":
                x_next = self._anchored(x, prediction, seen, after, row, solve)
            else:
                x_next = self._edited(x, prediction, seen, level, after, row, solve)
            row["fault"] = self.watch.codes
            if seen is not None:
                self.watch.warn_of_all()
            if self.change is not None:
                x_next = self.change.landed(x_next, visit.step)
            if not visit.last:
                noise = randn(tuple(x.shape[1:]), self._sources, like=x_next)
                x_next = after.renoise(x_next, level, noise)
                solver.return_to(before)
        if x.is_cuda:
            row["peak_memory"] = torch.cuda.memory_stats_as_nested_dict(x.device)["allocated_bytes"]["all"]["peak"]
        self.record.add(**row, seconds=time.perf_counter() - started)
        return x_next

    def _asks(self, terms: list, step: int) -> bool:
        """Whether a visit needs the losses; candidates that are only compared at the end do at the last step alone."""
        guidance = self.guidance
        compared = self._population is not None and not guidance.particles.resample and not guidance.needs_gradient
        return bool(terms) and (not compared or step == len(self.solver) - 1)

    def _free(self, step: int) -> torch.Tensor | None:
        """What guidance may move in a step; None for all."""
        free = None if self.change is None or not self.guidance.active else self.change.free(step)
        return self._movable if free is None else free if self._movable is None else free & self._movable

    def go_on_from(self, earlier: Run) -> None:
        """Add to the record of an earlier run of the same call, and draw what it did not."""
        self.record, self._sources = earlier.record, earlier._sources

    def finish(self, x: torch.Tensor) -> torch.Tensor | None:
        """The samples `(N,)` to keep of the last ones, by index, where there are particles; else None."""
        if self._population is None:
            return None
        with torch.no_grad():
            lost = unsound(x)
            image = self.decode(torch.where(per_sample(lost, x, torch.bool), 0, x.detach())).float()
            terms = [term.at(1.0) for term in self.guidance.loss.terms() if term.acts_at(1.0)]
            terms = terms or list(self.guidance.loss.terms())
            loss = sum(term.weight * term(image) for term in terms)
            self._population.weigh(torch.where(lost.to(loss.device), torch.nan, loss))
        return self._population.chosen()

    def _begin(self, x: torch.Tensor) -> None:
        guidance = self.guidance
        self._begun = True
        self._movable = self.movable(x) if guidance.active else None
        if self._sources is None or len(self._sources) != len(x):
            self._sources = generators(self._seeds(len(x)), "guidance")
        self._state = None if guidance.rule is None else guidance.rule.init(x)
        self._inner_state = None if guidance.inner is None else guidance.inner.rule.init(x)
        self._toward_state = guidance.toward.rule.init(x) if isinstance(guidance.toward, Inner) else None
        if guidance.remix and guidance.active and not self.solver.goes_on:
            name = type(self.solver.scheduler).__name__
            raise UnsuitableSolver(
                f"remixing noise needs a solver that starts from the sample it is given, which {name} does not",
                "Euler, DDIM or DPM-Solver++",
            )
        pictures = len(x) // guidance.candidates
        for term in () if guidance.loss is None else guidance.loss.terms():
            wanted = getattr(term.loss, "batch", None) or 1
            if wanted not in (1, pictures):
                raise ValueError(f"the loss '{term.name}' is for {wanted} pictures, one each, and {pictures} are drawn")
        if guidance.candidates > 1:
            self._population = Population(guidance.particles, guidance.strength, self._sources)

    def _look(self, x, prediction, terms: list, step: int, row: dict, source=None) -> _Seen | None:
        """What the losses say of this step; None where nothing moves."""
        guidance, solver, kind = self.guidance, self.solver, self.solver.kind
        level = solver.levels[step]
        dtype = torch.promote_types(x.dtype, torch.float32)
        through = step in self._graph_steps
        if through and not prediction.requires_grad:
            raise _no_gradient()
        predicted, sample = prediction.detach().to(dtype), x.detach().to(dtype)
        # without what is not finite, at which some guides raise, so that no sample would get any further
        place, drawn = self.watch.only(level.x0(predicted, sample, kind)), None
        noise = level.noise(predicted, sample, kind)
        if guidance.edit == "anchor" and guidance.active:
            if self._anchor is None:
                self._anchor = torch.zeros_like(place) if step == 0 else place
            if self.change is not None:
                self._anchor = self.change.kept(self._anchor, step)
            place = self._anchor
            drawn = level.noise(place, sample, "sample")
        blur = None
        if guidance.smoothing is not None and guidance.active:
            blur = guidance.smoothing.draw(tuple(x.shape[1:]), self._sources, level, place)
        self._factors = None
        g0, loss, values = self._gradient_at(place, terms, blur)
        row.update(loss=loss, terms=values)
        if not guidance.active:
            return None
        signal = Signal(
            gradient=g0,
            loss=self.watch.only(loss),
            noise=noise,
            level=self._levels[step],
            next_level=self._levels[step + 1],
            floor=floor_of(terms, loss, self._factors),
            levels=self._levels,
            step=step,
            strength=guidance.strength,
            x0=place,
            drawn=drawn,
            random=self._random,
            metric=level.x0_variance if level.per_pixel else None,
        )
        goal = g0
        if isinstance(guidance.toward, Inner):
            goal, self._toward_state = self._descent(guidance.toward, self._toward_state, signal, terms, blur)
            goal = -goal
        elif guidance.toward is not None:
            goal = self._within(
                -guidance.toward.displacement(place, lambda x0: _residual(terms, self.decode(x0)), level)
            )
        if guidance.toward is not None:
            goal = self._noted("gradient", goal)
        dual, at_x0 = None, signal
        if level.per_pixel:
            dual = None if guidance.toward is None else guidance.toward.spread_at(level)
            metric = metric_of(level, solver.levels[step + 1], guidance.edit, through)
            signal = replace(signal, dual=dual, metric_x0=signal.metric, metric=metric)
        g = goal
        if through:
            g = self._through(prediction, (x, source), level, goal if dual is None else goal / dual)
            g = self._noted("through", self._within((g if dual is None else dual * g) * level.stretch.to(dtype)))
        if g is not None:
            row["gradient_norm"] = norm(g).flatten()
        seen = _Seen(replace(signal, gradient=g, at_x0=goal, x0=solver.clipped(place)))
        if guidance.inner is not None:
            seen.displacement = self._inner_displacement(at_x0, terms, blur)
        if self._population is not None:
            self._population.weigh(loss)
            order = self._population.ancestors()
            if order is not None:
                batch = len(x)
                seen = seen.reordered(order, batch)
                self.watch.reorder(order)
                self._state = reordered(self._state, order, batch)
                self._inner_state = reordered(self._inner_state, order, batch)
                self._toward_state = reordered(self._toward_state, order, batch)
                self._anchor = reordered(self._anchor, order, batch)
        return seen

    def _through(self, prediction, samples: tuple, level: Level, goal: torch.Tensor) -> torch.Tensor:
        """The product of `goal` with the Jacobian of x0 in the sample: directly, and through the denoiser."""
        weights = (one.to(goal) if one.dim() else one for one in level.weights(self.solver.kind))  # numbers stay put
        of_prediction, directly = (one * goal for one in weights)
        found = pulled_back(prediction, [x for x in samples if x is not None and x.requires_grad], of_prediction)
        if found is None or found.shape != goal.shape:
            raise _no_gradient()
        return found + directly

    def _noted(self, kind: str, value: torch.Tensor, terms: Callable = lambda: None) -> torch.Tensor:
        """A gradient or a step `(B, ...)`, zero for samples with a fault. One whose length is beyond the numbers that
        there are is not finite either: rules divide by it, and would make nothing of it without a word."""
        self.watch.add(kind, ~torch.isfinite(norm(value)).flatten(), terms)
        return self.watch.only(value)

    def _gradient_at(self, x0: torch.Tensor, terms: list, blur: torch.Tensor | None):
        """Gradient at x0 (None where none is needed), loss and terms, smoothed over the copies in `blur`. Of a sample
        with a fault the gradient is zero, and the loss is NaN where it could not be asked."""
        g, loss, values = self._evaluated(x0, terms, blur)
        loss, *each = (self.watch.only(value, torch.nan) for value in (loss, *values.values()))
        values = dict(zip(values, each))
        bad = {name: ~torch.isfinite(value) for name, value in values.items()}
        self.watch.add("loss", ~torch.isfinite(loss), lambda: [name for name in bad if bool(bad[name].any())])
        if g is not None:
            g = self._noted("gradient", g, lambda: self._guilty(x0, terms, blur))
        return g, loss, values

    def _evaluated(self, x0: torch.Tensor, terms: list, blur: torch.Tensor | None):
        if blur is None:
            return self._gradient_at_x0(x0, terms)
        return smoothed(lambda place: self._gradient_at_x0(place, terms), x0, blur)

    def _guilty(self, x0: torch.Tensor, terms: list, blur: torch.Tensor | None) -> list[str]:
        """The terms whose own gradient at x0 is not finite for some sample."""
        found = {term.name: self._evaluated(x0, [term], blur)[0] for term in terms}
        return [name for name, g in found.items() if not bool(torch.isfinite(norm(g)).all())]

    def _gradient_at_x0(self, x0: torch.Tensor, terms: list):
        """The guide's gradient at the picture, then one product through the decoder."""
        guidance = self.guidance
        gradient = guidance.needs_gradient
        with torch.set_grad_enabled(gradient):
            leaf = x0.detach().requires_grad_(gradient)
            image = self._decoding(leaf)
        _check_decoded(image, x0)
        if gradient and not image.requires_grad:
            raise _no_decoder()
        seen = image.detach()
        seen = seen.to(torch.promote_types(seen.dtype, torch.float32))
        bad = unsound(seen)
        self.watch.add("picture", bad)
        seen = torch.where(per_sample(bad, seen, torch.bool), 0, seen)
        draws = None
        augment = guidance.augment
        if gradient and augment is not None and augment.suits(seen) and any(term.augment for term in terms):
            draws = placed(augment.draw(self._sources), seen)
        augment = None if draws is None else augment
        if guidance.balance and gradient and len(terms) > 1:
            given = (seen, terms, augment, draws, self._factors, self._loss_gradient)
            g, loss, values, self._factors = balanced_gradient(*given)
        else:
            g, loss, values = self._loss_gradient(seen, terms, augment, draws, gradient)
        if g is not None:
            g = pulled_back(image, leaf, g)
            if g is None:
                raise _no_decoder()
        return self._within(g), loss, values

    @property
    def _decoding(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The decoder that the gradient passes, captured where it is one."""
        if self.captures is None or self.decode is as_picture:
            return self.decode
        return self.captures("the decoder", self.decode)

    def _loss_gradient(self, image: torch.Tensor, terms: list, augment, draws, gradient: bool = True):
        """`loss_gradient`, captured where that is wanted; a term's schedule changes its weight from visit to visit."""
        if self.captures is None or any(term.schedule for term in self.guidance.loss.terms()):
            return loss_gradient(image, terms, augment, draws, gradient=gradient)
        names = [term.name for term in terms]

        def evaluate(image: torch.Tensor, draws: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
            g, loss, values = loss_gradient(image, terms, augment, draws, gradient=gradient)
            return (loss, *(values[name] for name in names), *([] if g is None else [g]))

        captured = self.captures(f"the gradient of {' + '.join(names)}", evaluate)
        loss, *found = captured(image, *([] if draws is None else [draws]))
        return found[len(names)] if gradient else None, loss, dict(zip(names, found))

    def _within(self, value: torch.Tensor | None) -> torch.Tensor | None:
        """A gradient or a step, exactly zero where the sample may not move."""
        return value if value is None or self._region is None else torch.where(self._region, value, 0)

    def _descent(self, inner: Inner, state: Any, signal: Signal, terms: list, blur: torch.Tensor | None, strength=1.0):
        """How far inner steps move x0, from the signal's x0 and gradient there, each times the strength; and the rule's
        state after them."""
        start = place = signal.x0
        for i in range(inner.iterations):
            if i:
                g, loss, _ = self._gradient_at(place, terms, blur)
                signal = replace(signal, gradient=g, loss=self.watch.only(loss), x0=place)
            with torch.no_grad():
                move, after = inner.rule.update(signal.within(self._region), state)
                move = self._noted("step", self._within(torch.where(norm(signal.gradient) > 0, move, 0)))
                state = kept(self.watch.sound, after, state)
                place = place - strength * move
        if inner.blend:
            level = signal.level
            return level.sigma / (level.alpha + level.sigma) * (place - start), state
        return place - start, state

    def _inner_displacement(self, signal: Signal, terms: list, blur: torch.Tensor | None) -> torch.Tensor:
        """The displacement of x0 by `guidance.inner`; nothing for a sample where something was not finite."""
        given = (signal, terms, blur, self.guidance.strength)
        displacement, self._inner_state = self._descent(self.guidance.inner, self._inner_state, *given)
        return self._noted("step", displacement)

    def _move(self, signal: Signal, row: dict) -> torch.Tensor:
        """The rule's step to subtract, `(B, ...)`; zero for a sample with a fault, or whose gradient is zero."""
        guidance = self.guidance
        move, after = guidance.rule.update(signal.within(self._region), self._state)
        move = self._within(move)
        if not guidance.rule.scales_itself:
            move = guidance.strength * move
        move = self._noted("step", move)
        self._state = kept(self.watch.sound, after, self._state)
        move = torch.where((norm(signal.gradient) > 0) | (guidance.edit == "anchor"), move, 0)
        row["step_size"] = norm(move).flatten()
        return move

    def _edited(self, x, prediction, seen: _Seen, level: Level, after: Level, row: dict, solve) -> torch.Tensor:
        """The solver's step, with the rule's step and the displacement of x0 worked in."""
        guidance, solver, signal = self.guidance, self.solver, seen.signal
        displacement, shift, score = seen.displacement, None, None
        between = guidance.goes_through and row["step"] not in self._graph_steps
        edit = guidance.edit_between if between and guidance.edit == "shift" else guidance.edit
        wide = after.stretch.to(signal.x0.dtype)
        late = guidance.rule is not None and edit == "shift" and solver.keeps_shifts
        twisted = self._population is not None and guidance.particles.twisted
        if twisted and not late:
            raise not_ancestral()
        if guidance.rule is not None and not late:
            move = self._move(signal, row)
            if edit == "score":
                score = move
            elif edit == "mean":
                displacement = -move if displacement is None else displacement - move
            else:
                shift = wide * move
        if guidance.project is not None and displacement is not None:
            touched = (displacement != 0).flatten(1).any(1)
            projected = guidance.project(signal.x0 + displacement)
            if projected.shape != signal.x0.shape:
                raise ValueError(
                    f"project makes {tuple(projected.shape)} of x0 {tuple(signal.x0.shape)}, and must return the same "
                    "shape"
                )
            projected = projected - signal.x0
            touched = touched & torch.isfinite(projected).flatten(1).all(1)
            displacement = self._within(torch.where(per_sample(touched, projected, torch.bool), projected, 0))
        if displacement is not None and guidance.inner is not None and guidance.inner.keep == "sample":
            score = summed(score, -level.alpha / level.sigma.clamp_min(1e-20) * displacement)
        elif displacement is not None:
            shift = summed(shift, -after.alpha * displacement)
        if shift is not None and not solver.keeps_shifts:
            score, shift = summed(score, score_for_shift(shift, level, after)), None
        if score is not None:
            found = scored(x, prediction, score, level, solver.kind)
            found = found if self._region is None else torch.where(self._region, found, prediction)
            prediction = self._landed(found, prediction)
        x_next = solve(prediction, x)
        if late:
            landed = x_next.to(signal.x0.dtype) / wide
            if self._random is None:
                self._random = drew(landed, signal.level, signal.next_level, signal.x0, signal.noise)
            signal = replace(signal, landed=landed, random=self._random)
            move = self._move(signal, row)
            if twisted:
                self._population.correct(log_ratio(signal, move))
            shift = summed(shift, wide * move)
        stays = self._means[row["step"]] == self._means[row["step"] + 1]  # the level, at Heun's second halves
        if shift is not None and not stays:
            moved = self._landed((x_next.to(shift.dtype) - shift).to(x_next.dtype), x_next)
            solver.carry(x_next, moved, row["step"])
            x_next = moved
        return x_next

    def _landed(self, moved: torch.Tensor, unmoved: torch.Tensor) -> torch.Tensor:
        """What has been moved, but what has not for a sample that half precision cannot hold where it was moved to."""
        if torch.finfo(moved.dtype).bits > 16:  # whose moves are of a finite length
            return moved
        bad = unsound(moved)
        self.watch.add("step", bad)
        return torch.where(per_sample(bad, moved, torch.bool), unmoved, moved)

    def _anchored(self, x, prediction, seen: _Seen, after: Level, row: dict, solve) -> torch.Tensor:
        """The anchor takes the rule's step, and fresh noise makes of it a sample of the next level."""
        self._anchor = self._anchor - self._move(seen.signal, row)
        x_next = solve(prediction, x)  # so that the solver counts its steps, and for what may not move
        landed = self._anchor
        if row["step"] < len(self.solver) - 1:
            landed = after.mix(landed, randn(tuple(x.shape[1:]), self._sources, like=landed))
        landed = landed.to(x_next.dtype)
        landed = landed if self._region is None else torch.where(self._region, landed, x_next)
        self.solver.carry(x_next, landed, row["step"])
        return landed

    def _remixing(self, solve: Callable, level: Level, after: Level, step: int) -> Callable:
        """The solver's step, with a share of the predicted noise in it replaced by fresh noise, its variance kept; a
        solver that draws noise itself is left alone."""
        kind, solver, share = self.solver.kind, self.solver, self.guidance.remix

        def remixing(prediction: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            x_next = solve(prediction, x)
            fine = x.to(torch.promote_types(x.dtype, torch.float32))
            exact = prediction.to(fine.dtype)
            noise, std = level.noise(exact, fine, kind), level.step_std(after)
            if self._draws is None:
                self._draws = drew(x_next, level, after, solver.clipped(level.x0(exact, fine, kind)), noise)
            if self._draws is not False:
                return x_next
            part = share
            if share == "signal":
                part = after.alpha / (after.alpha + after.sigma)
            elif share == "ancestral":
                part = (std / after.sigma.clamp_min(1e-20)) ** 2
            part = part if isinstance(part, torch.Tensor) else torch.tensor(part, dtype=torch.float64)
            fresh = randn(tuple(x.shape[1:]), self._sources, like=fine)
            change = ((1 - part).clamp_min(0).sqrt() - 1) * noise + part.sqrt() * fresh
            mixed = (x_next + after.sigma * self._within(change)).to(x_next.dtype)
            solver.carry(x_next, mixed, step)
            return mixed

        return remixing


@dataclass
class _Seen:
    """What a visit found: the signal for the rule, the displacement of x0 by inner steps, and the order in which
    particles go on."""

    signal: Signal
    displacement: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def reordered(self, order: torch.Tensor, batch: int) -> _Seen:
        fields = {
            name: reordered(getattr(self.signal, name), order, batch) for name in ("gradient", "noise", "x0", "at_x0")
        }
        drawn = reordered(self.signal.drawn, order, batch)
        signal = replace(self.signal, loss=self.signal.loss[order.to(self.signal.loss.device)], drawn=drawn, **fields)
        if signal.floor is not None:
            signal = replace(signal, floor=signal.floor[order.to(signal.floor.device)])
        return _Seen(signal, reordered(self.displacement, order, batch), order)


def _no_gradient() -> ValueError:
    return ValueError(
        "the denoiser's prediction carries no gradient back to its sample: it ran without gradients or in inference "
        "mode, is not differentiable, was given another tensor than the solver, or a callback returned a sample "
        'without gradients; choose through="x0", which needs none'
    )


def _check_decoded(image: object, x0: torch.Tensor) -> None:
    if isinstance(image, torch.Tensor) and image.is_floating_point() and image.dim() and len(image) == len(x0):
        return
    got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
    raise ValueError(
        f"decode must return a float tensor with one picture for each of the {len(x0)} samples {tuple(x0.shape)} that "
        f"it is given, but returned {got}"
    )


def _no_decoder() -> ValueError:
    return ValueError(
        "the decoder is not differentiable: what it returns does not depend on the latents through torch operations; "
        "pass a differentiable decode, or an autoencoder (guide(..., vae=AutoencoderTiny...))"
    )


def _residual(terms: list, image: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What one measurement lacks at an image, `y - A(image)`, and its noise."""
    loss = terms[0].loss
    return loss.residual(image), loss.sigma
