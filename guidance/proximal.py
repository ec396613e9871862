"""Steps toward a linear measurement without a gradient: the posterior mean of a Gaussian around x0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..samplers.levels import Level

SPREADS = ("posterior", "noise", "infinite")


@dataclass(frozen=True)
class Proximal:
    """`r^2 B^T (B r^2 B^T + sigma^2)^{-1} (y - A(x0))`, B the operator (with the decoder): from x0 to the mean of
    `N(x0, r^2)` given the measurement, by conjugate gradients. `r` differs per pixel where the level does.

    Args:
        spread: `r`: "posterior", `s / sqrt(a^2 + s^2)` (PiGDM); "noise", `s / a` (DiffPIR); "infinite", which fits the
            measurement exactly, `B^+ (y - A(x0))` (DDNM).
        weight: divides `r^2`: the trust in x0 against the measurement.
        iterations: of conjugate gradients, at most.
    """

    spread: str = "posterior"
    weight: float = 1.0
    iterations: int = 30

    def __post_init__(self) -> None:
        if self.spread not in SPREADS:
            raise ValueError(f"spread is one of {', '.join(SPREADS)}, got {self.spread!r}")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight is positive, got {self.weight}")

    def spread_at(self, level: Level) -> torch.Tensor | None:
        """`r^2` over the weight; None where it is infinite."""
        if self.spread == "infinite":
            return None
        variance = level.sigma**2 / (1.0 if self.spread == "posterior" else level.alpha**2) / self.weight
        return variance / (level.alpha**2 + level.sigma**2) if self.spread == "posterior" else variance

    def displacement(
        self, x0: torch.Tensor, measured: Callable[[torch.Tensor], tuple[torch.Tensor, float]], level: Level
    ) -> torch.Tensor:
        """From x0 `(B, ...)` to the point, per sample; `measured` maps x0 to `y - A(x0)`, affine in x0, and sigma."""
        with torch.enable_grad():
            leaf = x0.detach().requires_grad_(True)
            rest, sigma = measured(leaf)

        def transposed(u: torch.Tensor) -> torch.Tensor:
            found = -torch.autograd.grad(rest, leaf, u, retain_graph=True)[0]
            return found if share is None else share * found

        wanted, share = rest.detach(), None
        variance = self.spread_at(level)
        if variance is None:
            ratio = 0.0
        elif variance.dim():  # the measurement has another shape, so that only numbers per sample meet it
            largest = variance.flatten(1).amax(1)
            share = (variance / largest.view(-1, *[1] * (x0.dim() - 1))).to(x0)
            ratio = sigma**2 / largest.clamp_min(1e-12).to(x0).view(-1, *[1] * (wanted.dim() - 1))
        else:
            ratio = sigma**2 / variance.clamp_min(1e-12).to(x0)

        def normal(u: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return wanted - measured(leaf + transposed(u))[0] + ratio * u

        return transposed(_conjugate_gradients(normal, wanted, self.iterations)).detach()


def _conjugate_gradients(matrix: Callable[[torch.Tensor], torch.Tensor], b: torch.Tensor, iterations: int):
    """Solve `matrix(u) = b` per sample, from zero; a sample stops where its residual is a millionth of `b`."""

    def dot(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (u * v).flatten(1).sum(1).view(-1, *[1] * (u.dim() - 1))

    u, r = torch.zeros_like(b), b
    p, rr = r, dot(b, b)
    enough = 1e-12 * rr
    for _ in range(iterations):
        going = rr > enough
        if not bool(going.any()):
            break
        q = matrix(p)
        curvature = dot(p, q)
        step = torch.where(going & (curvature > 0), rr / torch.where(curvature > 0, curvature, 1), 0)
        step = torch.where(going & ~torch.isfinite(curvature), torch.nan, step)  # told, not taken for an end
        u, r = u + step * p, r - step * q
        new = dot(r, r)
        p = r + torch.where(going, new / torch.where(rr > 0, rr, 1), 0) * p
        rr = new
    return u
