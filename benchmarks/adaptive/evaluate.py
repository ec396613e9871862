"""The bits per dimension of test pictures under trained models, part by part, and picture by picture."""

from __future__ import annotations

import math

import torch
from lossguide.samplers.gamma import Gamma

from .bound import diffusion_nats, latent_nats, prior_nats, reconstruction_nats
from .data import as_sample
from .model import AdaptiveModel

PARTS = ("diffusion", "latent", "prior", "reconstruction")
BATCH = 100


@torch.no_grad()
def bits(
    model: AdaptiveModel, images: torch.Tensor, times: int = 8, seed: int = 0, gamma: Gamma | None = None
) -> dict[str, torch.Tensor]:
    """The bound in bits per dimension, `(N,)` each by part, and their sum as "total"; in float32.

    Each picture is asked at one time in each of `times` equal parts of [0, 1]. Times and noise depend on `seed` alone:
    models can be compared picture by picture.

    Args:
        model: of any variant.
        images: `(N, C, H, W)`, uint8.
        times: calls of the model per picture.
        seed: of all draws.
        gamma: another path of levels than the model was trained on.
    """
    source, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    path = gamma or model.gamma
    found: dict[str, list[torch.Tensor]] = {name: [] for name in PARTS}
    for part in images.split(BATCH):
        x = as_sample(part)
        kl = torch.zeros(len(x))
        if model.config.latent:
            mean, log_variance = model.encode(x)
            kl = latent_nats(mean, log_variance)
        diffusion, rebuilt = torch.zeros(len(x)), torch.zeros(len(x))
        offset = torch.rand(len(x), generator=source)
        for k in range(times):
            noise, first = (torch.randn(x.shape, generator=source) for _ in range(2))
            z = None
            if model.config.latent:
                z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=own)
            diffusion += diffusion_nats(model, path, x, (k + offset) / times, noise, z) / times
            rebuilt += reconstruction_nats(path, x, first, z) / times
        values = dict(diffusion=diffusion, latent=kl, prior=prior_nats(path, x, z), reconstruction=rebuilt)
        for name, value in values.items():
            found[name].append(value / (x[0].numel() * math.log(2)))
    parts = {name: torch.cat(values) for name, values in found.items()}
    return parts | {"total": sum(parts.values())}


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean over pictures, and its standard error over them."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()
