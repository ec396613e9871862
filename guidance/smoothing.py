"""Smoothing of the loss by noise around x0 (LGD-MC, Song et al., ICML 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..samplers.levels import Level
from ..samplers.random import randn


@dataclass(frozen=True)
class Smoothing:
    """`-log mean_k exp(-L(x0 + r n_k))` in place of `L(x0)`, `r = size * s / sqrt(a^2 + s^2)`.

    Args:
        copies: how many noised copies per step.
        size: their spread, as a share of x0's own uncertainty.
    """

    copies: int = 10
    size: float = 1.0

    def __post_init__(self) -> None:
        if self.copies < 1 or not self.size >= 0:
            raise ValueError(f"smoothing needs copies >= 1 and size >= 0, got {self.copies} and {self.size}")

    def draw(self, shape, sources: list[torch.Generator], level: Level, like: torch.Tensor) -> torch.Tensor:
        """The copies' noise for one step, `(copies, B, *shape)`."""
        spread = self.size * level.sigma / (level.alpha**2 + level.sigma**2).sqrt()
        noise = torch.stack([randn(shape, sources, like) for _ in range(self.copies)])
        return (spread * noise).to(like.dtype)


def smoothed(
    evaluate: Callable[[torch.Tensor], tuple], x0: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, torch.Tensor]]:
    """Gradient, loss and terms of the smoothed loss at `x0`, from those of the loss itself at each copy.

    The gradient of a log-mean-exp is the mean of the copies' gradients, weighted by `softmax(-L_k)`; `terms` are plain
    means over the copies.
    """
    gradients, losses, values = zip(*(evaluate(x0 + one) for one in noise))
    loss = torch.stack(losses)
    weights = torch.softmax(-loss, 0)
    g = None
    if gradients[0] is not None:
        g = sum(w.view(-1, *[1] * (one.dim() - 1)) * one for w, one in zip(weights, gradients))
    smooth = torch.log(torch.tensor(float(len(loss)))) - torch.logsumexp(-loss, 0)
    return g, smooth.to(loss), {name: sum(v[name] for v in values) / len(values) for name in values[0]}
