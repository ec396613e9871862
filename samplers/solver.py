"""A diffusers scheduler as a solver: its levels, its steps, and going back to where it was."""

from __future__ import annotations

import copy
import inspect
from functools import cached_property
from typing import Any

import torch

from .held import begins, held
from .levels import Level, prediction_kind, scheduler_levels
from .random import randn

SCHEDULE = ("timesteps", "sigmas", "betas", "alphas", "alphas_cumprod")  # numbers per timestep, not per sample


class Solver:
    """A scheduler whose timesteps are set, read once.

    Attributes:
        timesteps: what the model is told, `(N,)`, on the device.
        sigmas: the scheduler's own, as it keeps them, or None.
        times: the same as numbers, read once so that no step waits for the device.
        levels: `N + 1` noise levels; step `i` leads from `levels[i]` to `levels[i + 1]`.
        kind: what the model predicts.
        goes_on: whether a step goes on from the noise in the sample it is given. The second halves of steps (Heun) and
            correctors (UniPC) also hold to what was predicted before, and fresh noise would be no noise to them.
        keeps_shifts: whether the next step starts from a sample that was moved, by itself or by `carry`.
    """

    def __init__(self, scheduler) -> None:
        if not hasattr(type(scheduler), "step"):
            raise ValueError(f"{type(scheduler).__name__} cannot be sampled with here: it has no step(); take another")
        self.scheduler = scheduler
        self.timesteps: torch.Tensor = scheduler.timesteps
        self.sigmas: torch.Tensor | None = getattr(scheduler, "sigmas", None)
        self.times: list[float] = scheduler.timesteps.tolist()
        self.levels: list[Level] = scheduler_levels(scheduler)
        self.kind: str = prediction_kind(scheduler)
        self.goes_on: bool = getattr(scheduler, "order", 1) == 1 and not hasattr(scheduler, "last_sample")
        self.keeps_shifts: bool = self.goes_on or held(scheduler, self.levels, 0) is not None
        self._step_options = set(inspect.signature(type(scheduler).step).parameters)

    @classmethod
    def of(
        cls,
        scheduler,
        steps: int,
        device: torch.device | str = "cpu",
        sources: list[torch.Generator] | None = None,
        candidates: int = 1,
    ) -> Solver:
        """A solver of `steps` steps over a copy of the scheduler, which itself is never touched.

        A schedule that depends on a latent gets one per picture, drawn from `sources`, which its `candidates` share.
        """
        scheduler = copy.deepcopy(scheduler)
        if getattr(scheduler, "per_pixel", False):
            scheduler.gamma.to("cpu")
            latent = scheduler.gamma.latent
            if latent and sources is None:
                raise ValueError("this schedule depends on a latent: Solver.of needs sources to draw it from")
            z = randn((latent,), sources).repeat(candidates, 1) if latent else None
            scheduler.set_timesteps(steps, z=z)
            scheduler.gammas = [one.to(device) for one in scheduler.gammas]
        else:
            scheduler.set_timesteps(steps, device="cpu")  # it looks numbers up by them, for which no step should wait
        solver = cls(scheduler)
        single = solver.timesteps.dtype == torch.float64  # which MPS does not have
        solver.timesteps = (solver.timesteps.float() if single else solver.timesteps).to(device)
        return solver

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def initial_sigma(self) -> float:
        """Standard deviation of the noise that sampling starts from."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    @cached_property
    def progress(self) -> list[float]:
        """How far each step's level has come, on the noise's clock."""
        clock = self.scheduler.progress_levels() if self.per_pixel else self.levels[:-1]
        return [level.progress for level in clock]

    @property
    def per_pixel(self) -> bool:
        """Whether the model is told the level of every pixel."""
        return getattr(self.scheduler, "per_pixel", False)

    def told(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What the model is told of the level: the timestep, or of a per-pixel schedule the map gamma, like `x`."""
        if not self.per_pixel:
            return self.timesteps[index]
        return self.levels[index].gamma.expand_as(x)

    def model_input(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """The sample as the model wants it: the scheduler's own scaling."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        return self.scheduler.scale_model_input(x, self.scheduler.timesteps[index])

    def step(self, prediction: torch.Tensor, index: int, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """The scheduler's own step from `levels[index]`; options it does not know (eta, generator) are left out."""
        known = {name: value for name, value in options.items() if name in self._step_options}
        if {"eta", "variance_noise"} <= self._step_options and isinstance(known.get("generator"), list):
            sources = known.pop("generator")  # the same numbers as DDIM would draw, without waiting for the device
            if known.get("eta", 0.0) > 0:
                known["variance_noise"] = randn(tuple(prediction.shape[1:]), sources, like=prediction)
        return self.scheduler.step(prediction, self.scheduler.timesteps[index], x, **known, return_dict=False)[0]

    def carry(self, landed: torch.Tensor, moved: torch.Tensor, index: int) -> None:
        """Let a move of the sample where step `index` landed reach what the scheduler goes on from.

        Where a pipeline steps copies of its samples together (guided and not), the move is for each.
        """
        name, factor = held(self.scheduler, self.levels, index) or (None, 0.0)
        kept = getattr(self.scheduler, name) if name else None
        if kept is not None:
            move = (moved - landed).repeat(len(kept) // len(landed), *[1] * (landed.dim() - 1))
            setattr(self.scheduler, name, (kept + factor * move).to(kept.dtype))

    def begins(self, index: int) -> bool:
        """Whether step `index` starts where the sample is; the second halves of steps (Heun) do not."""
        return begins(self.scheduler, index)

    def clipped(self, x0: torch.Tensor) -> torch.Tensor:
        """A clean sample as the scheduler itself clips it before its step (`clip_sample`)."""
        config = self.scheduler.config
        if not getattr(config, "clip_sample", False):
            return x0
        limit = getattr(config, "clip_sample_range", 1.0)
        return x0.clamp(-limit, limit)

    def reorder(self, order: torch.Tensor, batch: int) -> None:
        """Let sample `i` of the `batch` go on from the history of sample `order[i]`."""
        history = {name: value for name, value in vars(self.scheduler).items() if name not in SCHEDULE}
        vars(self.scheduler).update(reordered(history, order, batch))

    def remember(self) -> dict[str, Any]:
        """The scheduler's state: step index, histories of multistep solvers."""
        return {k: copy.copy(v) if isinstance(v, (list, dict)) else v for k, v in vars(self.scheduler).items()}

    def return_to(self, state: dict[str, Any]) -> None:
        """Undo every step since `remember`; the next one starts from the sample it is given, also by a corrector."""
        vars(self.scheduler).update({k: copy.copy(v) if isinstance(v, (list, dict)) else v for k, v in state.items()})
        if getattr(self.scheduler, "last_sample", None) is not None:
            self.scheduler.last_sample = None


def reordered(state, order: torch.Tensor, batch: int):
    """A nested state (tuples, lists, dicts) with every tensor of `batch` samples along its first axis reordered."""
    if isinstance(state, torch.Tensor):
        return state[order.to(state.device)] if state.dim() > 1 and len(state) == batch else state
    if type(state) is dict:  # a config, which is frozen, holds no samples
        return {key: reordered(value, order, batch) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(reordered(value, order, batch) for value in state)
    return state
