"""The variational bound of a diffusion with any noise schedule per pixel, part by part, in nats per picture.

    -log p(x) <= KL(q(z|x) | N(0, I)) + KL(q(x_1|x) | N(0, I)) - E log p(x|x_0) + E .5 sum_i gamma_i' (e - eh)_i^2

(Kingma et al. 2021; Sahoo et al. 2024). It holds on every path of noise levels, for every denoiser.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from lossguide.samplers.gamma import Gamma, alpha, sigma

from .data import GRID_POINTS

Predict = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""`(x_t, gamma, z) -> v`."""


def low_discrepancy_times(count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """`count` times in [0, 1), each uniform and together evenly spread, in random order (Kingma et al. 2021)."""
    offset, order = torch.rand(1, generator=generator), torch.randperm(count, generator=generator)
    return (offset + order / count) % 1


def diffusion_nats(
    predict: Predict,
    gamma: Gamma,
    x: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """`.5 sum gamma' (e - eh)^2`, `(B,)`, at times `(B,)`, as `.5 sum a^2 gamma' (v - vh)^2`, which is the same."""
    own = z if gamma.latent else None
    level, slope = gamma(t, own), gamma.derivative(t, own)
    a, s = alpha(level), sigma(level)
    error = predict(a * x + s * noise, level, z).to(x.dtype) - (a * noise - s * x)
    return 0.5 * (slope * (a * error).square()).flatten(1).sum(1)


def prior_nats(gamma: Gamma, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
    """KL of `q(x_1 | x)` from standard normal noise, `(B,)`."""
    level = gamma(torch.ones(len(x)), z if gamma.latent else None)
    variance = torch.sigmoid(level)
    terms = torch.sigmoid(-level) * x.square() + variance - variance.log() - 1
    return 0.5 * terms.flatten(1).sum(1)


def reconstruction_nats(
    gamma: Gamma, x: torch.Tensor, noise: torch.Tensor, z: torch.Tensor | None = None
) -> torch.Tensor:
    """`-log p(x | x_0)`, `(B,)`, of pictures of eight bits: a softmax over their values at the first level."""
    level = gamma(torch.zeros(len(x)), z if gamma.latent else None)
    seen = x + (level / 2).exp() * noise  # x_0 / a
    logits = -0.5 * (-level)[..., None].exp() * (seen[..., None] - GRID_POINTS).square()
    own = (x[..., None] - GRID_POINTS).abs().argmin(-1, keepdim=True)
    return -logits.log_softmax(-1).gather(-1, own).flatten(1).sum(1)


def latent_nats(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL of `q(z | x)` from standard normal noise, `(B,)`."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)
