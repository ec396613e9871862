"""The guided step of a masked-token generator: a loss moves the logits, or chooses among draws, before tokens are kept.

A run is that of `step.Run`, whose inner steps act on the logits of the tokens that are not known yet.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from ..samplers.faults import TRANSFORMER
from ..samplers.time_travel import TimeTravel, Visit
from ..samplers.tokens import TokenGenerator, Unmasking, likeliest
from .gradient import floor_of
from .guidance import Guidance
from .step import Run
from .steps import Signal, UnsuitableSolver, norm, per_sample

_IRRELEVANT = ("through", "through_share", "edit_between", "name", "citation", "loss", "strength")
"""Settings that say how to go through a denoiser, which no gradient does here; and what is passed on as it is."""


class TokenRun(Run):
    """One sampling run of a token generator under a guidance.

    Args:
        guidance: with `tokens`; see `for_tokens`.
        schedule: its steps.
        generator: what draws the tokens and decodes them.
        seeds: one integer per picture.
    """

    def __init__(self, guidance: Guidance, schedule: Unmasking, generator: TokenGenerator, seeds: list[int]):
        super().__init__(guidance, schedule, lambda logits: logits, seeds)
        self.record.model = self.watch.model = TRANSFORMER
        self.generator = generator
        self._confidence: torch.Tensor | None = None

    def step_tokens(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        visit: Visit,
        draw: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        started: float | None = None,
    ) -> torch.Tensor:
        """From the tokens `(B, h, w)` of one visit to those of the next.

        Args:
            tokens: the mask token where there is none yet.
            logits: the transformer's, `(B, K, h, w)`.
            visit: which step, which repeat.
            draw: the scheduler's own step, from logits and tokens to the next tokens, and all of them as drawn; where
                there are candidates, it is told which one is drawn as well, and draws the first as the plain sampler.
            started: `time.perf_counter()` before the logits were made, for the record.
        """
        started = time.perf_counter() if started is None else started
        if not self._begun:
            self._begin(logits)
        level, guidance = self.solver.levels[visit.step], self.guidance
        row: dict[str, Any] = dict(
            step=visit.step,
            visit=visit.repeat,
            timestep=self.solver.times[visit.step],
            progress=self._progress[visit.step],
            alpha=level.alpha.tolist(),
            sigma=level.sigma.tolist(),
        )
        self.watch.begin(likeliest(logits), row)
        logits = self.watch.only(logits)  # no token can be drawn otherwise, of no sample
        terms = self._terms(visit.step)
        chosen = guidance.active and bool(terms) and guidance.tokens.candidates > 1
        if terms and (guidance.inner is not None or not chosen):
            logits = self._steered(logits, tokens, terms, visit.step, row)
        with torch.no_grad():
            after, drawn = self._chosen(logits, tokens, terms, row, draw) if chosen else draw(logits, tokens)
            if guidance.time_travel is not None and guidance.active:
                self._remember(logits, tokens, drawn)
                if not visit.last:
                    after = self._masked_again(tokens, drawn)
        row["fault"] = self.watch.codes
        if terms and not chosen:  # some of the candidates may be finite
            self.watch.warn_of_all()
        if tokens.is_cuda:
            row["peak_memory"] = torch.cuda.max_memory_allocated(tokens.device)
        self.record.add(**row, seconds=time.perf_counter() - started)
        return after

    def _steered(self, logits: torch.Tensor, tokens: torch.Tensor, terms: list, step: int, row: dict) -> torch.Tensor:
        """The logits after inner steps against the loss's gradient; of a sample that nothing moves, as they are."""
        guidance, limit = self.guidance, self.guidance.tokens.limit
        place = logits.float().log_softmax(1)
        self._region = (tokens == self.generator.mask_token)[:, None]  # lengths are those of what can move
        self.decode = lambda place: self.generator.decode_soft(place, tokens)
        gradient, loss, values = self._gradient_at(place, terms, None)
        row.update(loss=loss, terms=values)
        if not guidance.active:
            return logits
        signal = Signal(
            gradient=gradient,
            loss=self.watch.only(loss),
            noise=place,
            level=self.solver.levels[step],
            next_level=self.solver.levels[step + 1],
            floor=floor_of(terms, loss, self._factors),
            levels=self.solver.levels,
            step=step,
            strength=guidance.strength,
            x0=place,
        )
        move = self.watch.only(self._inner_displacement(signal, terms, None))
        row["gradient_norm"] = norm(gradient).flatten()
        row["step_size"] = norm(move).flatten()
        moved = per_sample((move != 0).flatten(1).any(1), move, torch.bool)
        return torch.where(moved, (place + move).clamp(-limit, limit).to(logits.dtype), logits)

    def _chosen(self, logits, tokens, terms: list, row: dict, draw) -> tuple[torch.Tensor, torch.Tensor]:
        """One of several draws per picture, by the softmax of minus their losses (Li et al. 2024).

        Draws whose loss is not finite are not chosen; where none is finite, the first is.
        """
        settings = self.guidance.tokens
        draws = [draw(logits, tokens, candidate) for candidate in range(settings.candidates)]
        values = []
        for _, drawn in draws:
            image = self.generator.decode_soft(logits.float(), drawn)
            values.append({term.name: term(image).detach().float() for term in terms})
        values = {term.name: torch.stack([one[term.name] for one in values]) for term in terms}
        loss = sum(term.weight * values[term.name] for term in terms)
        finite = torch.isfinite(loss) & self.watch.sound
        values = {name: self.watch.only(value.T, torch.nan).T for name, value in values.items()}
        guilty = [name for name, value in values.items() if not value.isfinite().all()]
        self.watch.add("loss", ~finite.all(0), lambda: guilty)
        finite, weights = finite.cpu(), -settings.sharpness * self.guidance.strength * loss.double().cpu()
        weights = torch.where(finite, weights, -math.inf)
        weights[0] = torch.where(finite.any(0), weights[0], 0)
        weights = weights.softmax(0)
        picks = [torch.multinomial(w, 1, generator=source) for w, source in zip(weights.T, self._sources)]
        pick = torch.cat(picks).to(tokens.device)
        places = torch.arange(len(tokens), device=tokens.device)
        if "loss" not in row:
            row.update(loss=loss[pick, places], terms={name: value[pick, places] for name, value in values.items()})
        after, drawn = (torch.stack(one)[pick, places] for one in zip(*draws))
        return after, drawn

    def _remember(self, logits: torch.Tensor, tokens: torch.Tensor, drawn: torch.Tensor) -> None:
        """How likely each token was when it was drawn."""
        likely = logits.float().softmax(1).gather(1, drawn[:, None])[:, 0]
        known = torch.zeros_like(likely) if self._confidence is None else self._confidence
        self._confidence = torch.where(tokens == self.generator.mask_token, likely, known)

    def _masked_again(self, tokens: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Of all tokens drawn so far, as many masked as were so before this visit: the least confident."""
        mask_token = self.generator.mask_token
        rank = self._confidence.flatten(1).argsort(dim=1, stable=True).argsort(dim=1).view_as(tokens)
        count = (tokens == mask_token).flatten(1).sum(1)
        return torch.where(rank < per_sample(count, rank), mask_token, drawn)


def for_tokens(guidance: Guidance) -> Guidance:
    """The guidance as a token generator carries it out: as it is where it is for tokens; for `auto`, the recipe
    `tokens`, with what `auto` was told.

    Raises:
        UnsuitableSolver: it is another recipe, or asks for what there is none of here.
    """
    if guidance.tokens is not None:
        return guidance
    if guidance.name != "auto":
        raise UnsuitableSolver(
            f"'{guidance.name}' steps by the noise of a diffusion model, and a token generator has none",
            "recipes.auto or recipes.tokens",
        )
    from . import recipes

    own = [recipes.auto(guidance.loss, guidance.strength, cost) for cost in (None, 1.0, 2.0)]
    fields = [f.name for f in dataclasses.fields(guidance) if f.name not in _IRRELEVANT]
    asked = {name: getattr(guidance, name) for name in fields}
    asked = {name: value for name, value in asked.items() if all(value != getattr(one, name) for one in own)}
    if guidance.time_travel is None:
        asked["time_travel"] = None
    asked.setdefault("time_travel", TimeTravel(2, 0.25, 0.75))
    try:
        return recipes.tokens(guidance.loss, guidance.strength, **asked)
    except ValueError as error:
        raise UnsuitableSolver(str(error), "recipes.auto without them, or a diffusion model") from error
