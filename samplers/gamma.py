"""Noise schedules per pixel: `gamma(t)`, the log of noise over signal, for `a^2 = sigmoid(-gamma)`,
`s^2 = sigmoid(gamma)` (Sahoo et al. 2024, MuLAN; Kingma et al. 2021, VDM).

Schedules are torch modules: `forward(t, z=None)` and `derivative(t, z=None)`, both differentiable in `t`, `z` and their
parameters. Time runs from 0 (the picture) to 1 (noise). A time without dimensions gives a map of the schedule's
`shape`, times `(B,)` or latents `(B, latent)` give `(B, *shape)`. Nothing is computed in less than float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import softplus

GAMMA_MIN, GAMMA_MAX = -13.3, 5.0


def alpha(gamma: torch.Tensor) -> torch.Tensor:
    """`sqrt(sigmoid(-gamma))`."""
    return torch.sigmoid(-gamma).sqrt()


def sigma(gamma: torch.Tensor) -> torch.Tensor:
    """`sqrt(sigmoid(gamma))`; never as `sqrt(1 - a^2)`, of which little is left near the picture."""
    return torch.sigmoid(gamma).sqrt()


class Gamma(torch.nn.Module):
    """Base class of schedules between `minimum` and `maximum`.

    Attributes:
        shape: of one sample, `(C, H, W)`; 1 where a dimension shares its level.
        latent: size of the latent that the schedule depends on; 0 where it depends on none.
    """

    latent = 0

    def __init__(self, shape: tuple[int, ...], minimum: float = GAMMA_MIN, maximum: float = GAMMA_MAX) -> None:
        super().__init__()
        if not minimum < maximum:
            raise ValueError(f"gamma grows from its minimum to its maximum, got {minimum} and {maximum}")
        self.shape, self.minimum, self.maximum = tuple(int(n) for n in shape), float(minimum), float(maximum)

    def describe(self) -> dict[str, Any]:
        """What makes another of its kind, as plain data; its tensors are in `state_dict`."""
        return {
            "type": type(self).__name__,
            "shape": list(self.shape),
            "minimum": self.minimum,
            "maximum": self.maximum,
        }

    def _time(self, t: float | torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        """The time, shaped to broadcast against maps."""
        if self.latent and z is None:
            raise ValueError(f"this schedule depends on a latent: pass z of shape (B, {self.latent})")
        if not self.latent and z is not None:
            raise ValueError("this schedule depends on no latent, but got one")
        if self.latent and (z.dim() != 2 or z.shape[1] != self.latent):
            raise ValueError(f"a latent of this schedule has shape (B, {self.latent}), got {tuple(z.shape)}")
        parameter = next(self.parameters(), z)
        device = parameter.device if parameter is not None else None
        t = t if isinstance(t, torch.Tensor) else torch.tensor(t, device=device)
        dtype = torch.promote_types(t.dtype, torch.float32)
        t = t.to(device=device or t.device, dtype=dtype if parameter is None else _wide(parameter.dtype, dtype))
        return t.view(-1, *[1] * len(self.shape)) if t.dim() else t


class ScalarGamma(Gamma):
    """One level for all pixels: `gamma = minimum + (maximum - minimum) t`.

    Args:
        minimum, maximum: at time 0 and 1.
        shape: of one sample; only its number of dimensions counts.
    """

    def __init__(
        self, minimum: float = GAMMA_MIN, maximum: float = GAMMA_MAX, shape: tuple[int, ...] = (1, 1, 1)
    ) -> None:
        super().__init__((1,) * len(shape), minimum, maximum)

    def forward(self, t: float | torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """`shape`, or `(B, *shape)` for times `(B,)`."""
        t = self._time(t, z)
        gamma = self.minimum + (self.maximum - self.minimum) * t
        return gamma if t.dim() else gamma.expand(self.shape)

    def derivative(self, t: float | torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """`d gamma / dt`."""
        t = self._time(t, z)
        slope = torch.full_like(t, self.maximum - self.minimum)
        return slope if t.dim() else slope.expand(self.shape)


class PolynomialGamma(Gamma):
    """`gamma = minimum + (maximum - minimum) P(t) / P(1)` with `P(t)` the integral of `(A u^2 + B u + C)^2` up to `t`:
    monotone whatever the coefficients, which each pixel has of its own (Sahoo et al. 2024).

    It starts as the linear schedule: `A = B = 0`, `C = 1e-3 + softplus(...)`. With `latent`, an MLP maps z to the
    coefficients, and samples differ.

    Args:
        shape: of one sample, `(C, H, W)`.
        latent: size of z; 0 for coefficients that are parameters themselves.
        hidden: width of the MLP's two hidden layers.
        minimum, maximum: gamma at time 0 and 1.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent: int = 0,
        hidden: int = 64,
        minimum: float = GAMMA_MIN,
        maximum: float = GAMMA_MAX,
    ) -> None:
        super().__init__(shape, minimum, maximum)
        self.latent, self.hidden, self.given = latent, hidden, False
        if latent:
            last = torch.nn.Linear(hidden, 3 * self._count)
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
            self.network = torch.nn.Sequential(
                torch.nn.Linear(latent, hidden), torch.nn.SiLU(), torch.nn.Linear(hidden, hidden), torch.nn.SiLU(), last
            )
        else:
            self.a, self.b, self.c = (torch.nn.Parameter(torch.zeros(self.shape)) for _ in range(3))

    @classmethod
    def of(
        cls,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        minimum: float = GAMMA_MIN,
        maximum: float = GAMMA_MAX,
    ) -> PolynomialGamma:
        """The schedule with these coefficients, tensors of one sample's shape that broadcast against each other.

        Raises:
            ValueError: they are all zero at some pixel, or not finite.
        """
        parts = torch.broadcast_tensors(*(torch.as_tensor(v) for v in (a, b, c)))
        parts = [v.detach().clone().to(_wide(v.dtype)) for v in parts]
        if not all(bool(torch.isfinite(v).all()) for v in parts):
            raise ValueError("the coefficients of gamma are not all finite")
        schedule = cls(tuple(parts[0].shape), minimum=minimum, maximum=maximum)
        schedule.given = True
        schedule.a, schedule.b, schedule.c = (torch.nn.Parameter(v) for v in parts)
        if not bool((_integral(torch.ones(()), *parts) > 0).all()):
            raise ValueError("gamma does not grow where its coefficients A, B and C are all zero")
        return schedule

    @property
    def _count(self) -> int:
        return int(torch.tensor(self.shape).prod())

    def coefficients(self, z: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, B and C: each of `shape`, or `(B, *shape)` for latents `(B, latent)`."""
        if not self.latent:
            c = self.c if self.given else 1e-3 + softplus(self.c.to(_wide(self.c.dtype)))
            return self.a, self.b, c
        found = self.network(z.to(self.network[0].weight.dtype))
        a, b, c = found.to(_wide(found.dtype)).unflatten(1, (3, *self.shape)).unbind(1)
        return a, b, 1e-3 + softplus(c)

    def forward(self, t: float | torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """`shape`; `(B, *shape)` for times `(B,)` or latents `(B, latent)`."""
        t = self._time(t, z)
        coefficients = self.coefficients(z)
        share = _integral(t, *coefficients) / _integral(torch.ones_like(t), *coefficients)
        return self.minimum + (self.maximum - self.minimum) * share

    def derivative(self, t: float | torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """`d gamma / dt = (maximum - minimum) (A t^2 + B t + C)^2 / P(1)`."""
        t = self._time(t, z)
        a, b, c = self.coefficients(z)
        return (self.maximum - self.minimum) * (a * t**2 + b * t + c) ** 2 / _integral(torch.ones_like(t), a, b, c)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "latent": self.latent, "hidden": self.hidden, "given": self.given}


class FunctionGamma(Gamma):
    """A function `t -> map` as a schedule; `t` comes without dimensions, in [0, 1].

    Args:
        function: differentiable, never falling.

    Raises:
        ValueError: it falls somewhere, or is not finite.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        check_monotone(function)
        ends = [torch.as_tensor(function(torch.tensor(t))) for t in (0.0, 1.0)]
        super().__init__(tuple(ends[0].shape), ends[0].min().item(), ends[1].max().item())
        self.function = function

    def forward(self, t: float | torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """`shape`, or `(B, *shape)` for times `(B,)`."""
        t = self._time(t, z)
        return torch.stack([self.function(one) for one in t.flatten()]) if t.dim() else self.function(t)

    def derivative(self, t: float | torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """`d gamma / dt`, by automatic differentiation."""
        t = self._time(t, z)
        slopes = [torch.func.jvp(self.function, (one,), (torch.ones_like(one),))[1] for one in t.flatten()]
        return torch.stack(slopes) if t.dim() else slopes[0]


def from_description(data: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Gamma:
    """The schedule that `describe` and `state_dict` tell.

    Raises:
        ValueError: its type is not known, or its tensors are needed and not given.
    """
    data = dict(data)
    name = data.pop("type", None)
    if name == "ScalarGamma":
        return ScalarGamma(**data)
    if name != "PolynomialGamma":
        raise ValueError(f"a stored schedule is a ScalarGamma or a PolynomialGamma, got {name!r}")
    if tensors is None:
        raise ValueError(
            "a config does not hold the coefficients of a polynomial schedule: use from_pretrained, or pass gamma="
        )
    given = data.pop("given", False)
    schedule = PolynomialGamma(**data)
    schedule.given = given
    if given:  # in the precision in which they were given
        schedule.to(next(iter(tensors.values())).dtype)
    schedule.load_state_dict(tensors)
    return schedule


def check_monotone(
    gamma: Callable[..., torch.Tensor], z: torch.Tensor | None = None, points: int = 257, tolerance: float = 1e-4
) -> None:
    """Make sure that a schedule `gamma(t[, z])` does not fall with time, on a grid of `points` times.

    Raises:
        ValueError: it falls by more than `tolerance`, the round-off of float32, or is not finite.
    """
    times = torch.linspace(0, 1, points)
    with torch.no_grad():
        maps = torch.stack([torch.as_tensor(gamma(t) if z is None else gamma(t, z)) for t in times])
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("gamma is not finite everywhere in [0, 1]")
    falls = (maps[:-1] - maps[1:]).flatten(1)
    if bool((falls > tolerance).any()):
        step, place = divmod(int(falls.argmax()), falls.shape[1])
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), maps.shape[1:]))
        raise ValueError(
            f"gamma must not fall with time, as noise only grows: it falls by {falls.max():.3g} from t = "
            f"{times[step]:.3g} to {times[step + 1]:.3g} at pixel {place}"
        )
    if not bool((maps[-1] > maps[0]).all()):
        raise ValueError("gamma must grow from t = 0 to t = 1 at every pixel")


def _integral(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """`P(t)`."""
    return t * (c**2 + t * (b * c + t * ((b**2 + 2 * a * c) / 3 + t * (a * b / 2 + t * a**2 / 5))))


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    """The widest of these and float32."""
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide
