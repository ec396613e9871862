"""How much each pixel of a given picture may change (Levin & Fried 2023, Differential Diffusion)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .random import randn
from .solver import Solver

_RESTARTS = ("sample", "last_sample", "cur_sample")  # where solvers keep a sample of their own, to start again from
_HISTORIES = ("model_outputs", "ets", "derivatives")


class UnsuitableChange(ValueError):
    """What a model, solver or pipeline cannot do with a source and its change map."""


def check_solver(solver: Solver) -> None:
    """Make sure that a solver can take a change map.

    Raises:
        UnsuitableChange: it starts again from a sample of its own.
    """
    scheduler = solver.scheduler
    if not solver.goes_on or any(hasattr(scheduler, name) for name in _RESTARTS):
        raise UnsuitableChange(
            f"a change map needs a solver that starts from the sample it is given, which "
            f"{type(scheduler).__name__} does not: choose DDIM, Euler or DPM-Solver++ (multistep)"
        )


class Change:
    """Pixel i keeps the re-noised source while `t > map_i`, where `t` is the share of the steps that is left.

    With a map of one number `m` for all pixels this is image-to-image of strength `m`: sampling starts in the middle,
    from the source and noise. Where the map is 0 the source comes out as it went in.

    Args:
        source: samples as the model knows them, `(1, *shape)` for all pictures, or one each.
        change_map: in [0, 1], `(1, 1, H, W)` or one per picture, or whatever broadcasts against the samples.

    Raises:
        ValueError: a map is not in [0, 1], or does not fit the source.
    """

    def __init__(self, source: torch.Tensor, change_map: torch.Tensor):
        if not bool(((change_map >= 0) & (change_map <= 1)).all()):
            raise UnsuitableChange(
                f"a change map is in [0, 1], from what stays to what is free; got {change_map.min():g} to "
                f"{change_map.max():g}"
            )
        if not _fits(change_map.shape[1:], source.shape[1:]):
            raise UnsuitableChange(
                f"a change map of shape {tuple(change_map.shape)} does not fit samples of shape {tuple(source.shape)}"
            )
        self.source, self.change_map = source, change_map.float()
        self._free: list[torch.Tensor | None] = []
        self._noise: torch.Tensor | None = None

    def check(self, pictures: int) -> None:
        """Make sure that this is for so many pictures.

        Raises:
            ValueError: it is for another number.
        """
        for name, value in (("sources", self.source), ("change maps", self.change_map)):
            if len(value) not in (1, pictures):
                raise UnsuitableChange(
                    f"there are {len(value)} {name} for {pictures} pictures: pass one for all, or each"
                )

    def part(self, start: int, count: int) -> Change:
        """That of `count` pictures of a run, or of those that are left, from `start` on."""
        return self._each(lambda value: value[start : start + count])

    def repeated(self, times: int) -> Change:
        """That of a run in which each picture is drawn so often: once all of them, then all again."""
        return self._each(lambda value: value.repeat(times, *[1] * (value.dim() - 1)))

    def _each(self, of: Callable[[torch.Tensor], torch.Tensor]) -> Change:
        return Change(*(value if len(value) == 1 else of(value) for value in (self.source, self.change_map)))

    def begin(self, x: torch.Tensor, solver: Solver, sources: list[torch.Generator]) -> torch.Tensor:
        """The first samples, from those of the plain sampler.

        What is kept gets fresh noise at every level, from `sources`: the rest then comes nearer to its law given what
        is kept. Under solvers that extrapolate from earlier steps it is one noise at all levels, that of the start.

        Raises:
            ValueError: the solver starts again from a sample of its own, or the samples are of another shape or number.
        """
        check_solver(solver)
        scheduler = solver.scheduler
        self.check(len(x))
        if self.source.shape[1:] != x.shape[1:]:
            raise UnsuitableChange(
                f"a source is a sample of shape {tuple(x.shape[1:])} to this model, got {tuple(self.source.shape[1:])}"
            )
        steps = len(solver)
        free = [self.change_map >= (steps - i) / steps for i in range(steps)]
        self._free = [None if bool(one.all()) else one.to(x.device) for one in free]
        self.source = self.source.to(x)
        self._levels, self._sources = solver.levels, sources
        extrapolates = getattr(scheduler.config, "solver_type", None) == "ode"  # the per-pixel one's
        if extrapolates or any(hasattr(scheduler, name) for name in _HISTORIES):
            self._noise = x.detach() / solver.initial_sigma
        return x if self._free[0] is None else torch.where(self._free[0], x, self._at(0, x))

    def free(self, step: int) -> torch.Tensor | None:
        """What moves in a step, as booleans that broadcast against the samples; None for all of it."""
        return self._free[step]

    def landed(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """Where a step has led to, with the source at that level in place of what it was not free to move."""
        if self._free[step] is None:
            return x
        last = step == len(self._free) - 1  # some solvers end at a little noise
        return torch.where(self._free[step], x, self.source if last else self._at(step + 1, x))

    def reorder(self, order: torch.Tensor) -> None:
        """Let sample `i` go on as sample `order[i]`, a candidate of the same picture."""
        if self._noise is not None:
            self._noise = self._noise[order.to(self._noise.device)]

    def kept(self, x0: torch.Tensor, step: int) -> torch.Tensor:
        """Clean samples, with the source in place of what a step is not free to move."""
        return x0 if self._free[step] is None else torch.where(self._free[step], x0, self.source.to(x0.dtype))

    def _at(self, index: int, like: torch.Tensor) -> torch.Tensor:
        noise = self._noise
        if noise is None:
            noise = randn(tuple(like.shape[1:]), self._sources, like=like)
        fine = torch.promote_types(like.dtype, torch.float32)
        return self._levels[index].mix(self.source.to(fine), noise.to(fine)).to(like.dtype)


def change_of(source: torch.Tensor, change_map: torch.Tensor | float | None, shape: tuple[int, ...]) -> Change:
    """A source of samples of a `shape`, and what `sample` takes as `change_map`.

    Args:
        source: `shape`, or `(B, *shape)`.
        change_map: a number, `(H, W)`, `(1, H, W)` or `(B, 1, H, W)`.

    Raises:
        ValueError: there is no map, or a shape is another.
    """
    if change_map is None:
        raise UnsuitableChange(
            "how far the source may change is not said: pass a change_map, 0 where it stays, 1 where free"
        )
    change_map = torch.as_tensor(change_map).detach().cpu()
    source = source[None] if source.dim() == len(shape) else source
    if tuple(source.shape[1:]) != tuple(shape):
        raise UnsuitableChange(
            f"source is of shape {tuple(shape)}, or one such per picture, to this model; got {tuple(source.shape)}"
        )
    if change_map.dim() > len(shape) + 1:
        raise UnsuitableChange(f"a change map is (H, W), or (B, 1, H, W); got {tuple(change_map.shape)}")
    missing = len(shape) + 1 - change_map.dim()
    return Change(source, change_map.reshape((1,) * missing + tuple(change_map.shape)))


def _fits(one: torch.Size, other: torch.Size) -> bool:
    return len(one) == len(other) and all(a in (1, b) for a, b in zip(one, other))
