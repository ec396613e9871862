"""A denoiser asked at any noise level: its scheduler's discrete levels made one continuous path.

The path runs in variance-preserving coordinates, `z = a x + s n` with `a^2 = sigmoid(-gamma)`, `s^2 = sigmoid(gamma)`,
where `gamma = log(s^2 / a^2)` is minus the log of the signal-to-noise ratio. Every scheduler's own coordinates are a
stretch of them.
"""

from __future__ import annotations

import numpy as np
import torch

from .denoiser import Denoiser
from .levels import Level, prediction_kind
from .solver import Solver

_CONSISTENCY = ("CMStochastic", "LCM", "TCD")


def path_of(denoiser: Denoiser, rounded: bool = False) -> Path | PixelPath:
    """The path of a denoiser, by its scheduler; see `Path` for arguments and errors."""
    if not getattr(denoiser.scheduler, "per_pixel", False):
        return Path(denoiser, rounded)
    if rounded:
        raise ValueError("rounded is for models of trained timesteps; one that is told levels per pixel has none")
    return PixelPath(denoiser)


class Path:
    """From the cleanest level that a denoiser knows, at time 0, to the noisiest, at time 1; `gamma` is linear in time.

    Between two of the scheduler's levels the timestep that the model is told is interpolated, linearly in `gamma`, of
    flow models linearly in sigma. No level is cleaner than the scheduler's cleanest.

    Args:
        denoiser: from `lossguide.samplers.denoiser`.
        rounded: tell the model the nearest of the scheduler's timesteps instead, for models that know no others.

    Attributes:
        first, last: `gamma` at time 0 and 1.
        batched: whether the model takes one timestep per sample; diffusers' models do.

    Raises:
        ValueError: the scheduler's levels cannot be read, or the model is a consistency model.
    """

    def __init__(self, denoiser: Denoiser, rounded: bool = False):
        self.denoiser, self.rounded = denoiser, rounded
        scheduler = denoiser.scheduler
        name = type(scheduler).__name__
        if name.startswith(_CONSISTENCY):
            raise ValueError(
                f"a model under {name} has no density: a consistency model jumps to the picture, and tells no noise "
                "at the levels between"
            )
        config = scheduler.config
        count = int(getattr(config, "num_train_timesteps", None) or 1000)
        try:
            solver = Solver.of(scheduler, count)
        except (ValueError, TypeError) as error:
            raise ValueError(f"a model under {name} has no density that can be read: {error}") from error
        levels = solver.levels[:-1]  # the last is where sampling ends
        a, s = (np.array([float(getattr(level, side)) for level in levels]) for side in ("alpha", "sigma"))
        self._coordinates, self._sigma_data = _coordinates(a, s, name), levels[0].sigma_data
        self._scale = None if self._coordinates != "sigma" else _input_scale(solver, a, s)
        self.kind = denoiser.kind or solver.kind
        steps = np.array(solver.times)
        trained = getattr(scheduler, "alphas_cumprod", None)
        if trained is not None and self._coordinates != "flow" and steps[0] >= 1:  # not EDM's 0.25 log sigma
            a = trained.double().sqrt().numpy()
            s, steps = np.sqrt(1 - a**2), np.arange(len(a), dtype=float)
        usable = (a > 0) & (s > 0)
        gamma, places = np.unique(2 * np.log(s[usable] / a[usable]), return_index=True)
        if len(gamma) < 2:
            raise ValueError(
                f"a model under {name} has no density that can be read: it has fewer than two noise levels"
            )
        self._gamma, self._steps = gamma, steps[usable][places]
        self.first, self.last = float(gamma[0]), float(gamma[-1])
        self.batched = isinstance(denoiser.model, torch.nn.Module) and hasattr(denoiser.model, "config")

    def gamma(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`gamma` and its derivative at times in [0, 1], 0-dimensional or `(B,)`; both broadcast against a sample."""
        rate = torch.tensor(self.last - self.first, dtype=torch.float64)
        shape = (-1,) + (1,) * len(self.denoiser.shape) if time.dim() else ()
        return self.first + rate * time.double().reshape(shape), rate

    def noise(self, z: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The noise that the model finds in `z` `(B, *shape)`, differentiable in `z`."""
        gamma, _ = self.gamma(time)
        if self._coordinates == "flow":
            a, s = torch.sigmoid(-gamma / 2), torch.sigmoid(gamma / 2)
        elif self._coordinates == "sigma":
            a, s = torch.ones_like(gamma), (gamma / 2).exp()
        else:
            a, s = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        a, s = like(a, z), like(s, z)
        level = Level(a, s, self._sigma_data)
        x = z * (a**2 + s**2).sqrt()
        given = x if self._scale is None else x / (s**2 + self._scale).sqrt()
        prediction = self.denoiser.predict(given, self._timestep(gamma).to(z.device))[:, : self.denoiser.shape[0]]
        return level.noise(prediction, x, self.kind)

    def _timestep(self, gamma: torch.Tensor) -> torch.Tensor:
        """What the model is told, 0-dimensional or `(B,)`."""
        key = (lambda g: 1 / (1 + np.exp(-g / 2))) if self._coordinates == "flow" else lambda g: g
        where, known = key(gamma.numpy().reshape(gamma.shape[:1])), key(self._gamma)
        if self.rounded:
            nearest = np.abs(np.asarray(where)[..., None] - known).argmin(-1)
            steps = torch.as_tensor(self._steps[nearest])
            return steps.long() if (self._steps == np.round(self._steps)).all() else steps.float()
        return torch.as_tensor(np.interp(where, known, self._steps)).float()


class PixelPath:
    """The same under a scheduler whose level differs per pixel, `MultivariateScheduler`: `gamma` is its own, a map.

    Raises:
        ValueError: the schedule depends on a latent.
    """

    batched = True  # a map of levels has a batch dimension

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.schedule = denoiser, denoiser.scheduler.gamma
        if self.schedule.latent:
            raise ValueError(
                "this schedule depends on a latent, whose own term the bound would lack: hold the latent fixed, "
                "MultivariateScheduler(lambda t: gamma(t, z)[0])"
            )
        self.kind = denoiser.kind or prediction_kind(denoiser.scheduler)

    @torch.no_grad()
    def gamma(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`gamma` and its derivative, maps `shape`, or `(B, *shape)` for times `(B,)`."""
        return self.schedule(time), self.schedule.derivative(time)

    def noise(self, z: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The noise that the model finds in `z` `(B, *shape)`, differentiable in `z`."""
        told = like(self.gamma(time)[0], z).expand_as(z)
        prediction = self.denoiser.predict(z, told)[:, : self.denoiser.shape[0]]
        return Level.of_gamma(told).noise(prediction, z, self.kind)


def like(value: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """A level's number in the sample's dtype, on its device."""
    return value.to(sample.device, sample.dtype)


def _coordinates(a: np.ndarray, s: np.ndarray, name: str) -> str:
    if np.allclose(a, 1, atol=1e-6):
        return "sigma"
    if np.allclose(a**2 + s**2, 1, atol=1e-4):
        return "preserving"
    if np.allclose(a + s, 1, atol=1e-4):
        return "flow"
    raise ValueError(f"a model under {name} has no density that can be read: its levels follow no known rule")


def _input_scale(solver: Solver, a: np.ndarray, s: np.ndarray) -> float | None:
    """The `d` of a scheduler that divides the model's input by `sqrt(sigma^2 + d)`; None of one that does not.

    Read at the cleanest level, where it can be told most precisely.
    """
    place = int(np.argmin(s))
    scale = float(solver.model_input(torch.ones(1, dtype=torch.float64), place))
    return None if scale == 1.0 else 1 / scale**2 - s[place] ** 2
