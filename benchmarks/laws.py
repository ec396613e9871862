"""Laws whose density and whose denoiser are known at every level, under any scheduler, for closed forms."""

from __future__ import annotations

import math

import numpy as np
import torch
from lossguide.samplers import Denoiser, denoiser
from lossguide.samplers.gamma import PolynomialGamma
from lossguide.samplers.multivariate import MultivariateScheduler

from tests.models import Exact, Gaussian, GaussianMixture, identity

BELL = Gaussian(torch.tensor([0.02, -0.01]), torch.tensor([[0.9, 0.4], [0.4, 0.7]]))
BELLS = GaussianMixture(
    torch.tensor([0.4, 0.6]),
    [
        Gaussian(torch.tensor([-0.9, 0.6]), torch.tensor([[0.3, 0.1], [0.1, 0.2]])),
        Gaussian(torch.tensor([0.6, -0.4]), torch.tensor([[0.4, -0.2], [-0.2, 0.5]])),
    ],
)
POINTS = torch.tensor([[0.3, -0.2], [1.0, 0.4], [-0.8, 0.9], [1.2, -1.0]])


def log_density(law: Exact, x: torch.Tensor) -> torch.Tensor:
    """Of vectors along the last axis, in nats."""
    if isinstance(law, Gaussian):
        return law.log_density(x.double())
    parts = torch.stack([part.log_density(x.double()) for part in law.parts], -1)
    return torch.logsumexp(parts + law.weights.log(), -1)


def told(law: Exact, scheduler, vectors: int) -> Denoiser:
    """The Bayes denoiser of a law, whose samples `(1, vectors, d)` hold independent vectors, for a scheduler whose
    timesteps it understands between whole numbers too: log signal-to-noise is linear between them."""
    name, config, shape = type(scheduler).__name__, scheduler.config, (1, vectors, law.dimension)
    if name.startswith("EDM"):

        def model(x, t):
            s, d = (4 * t.double()).exp(), config.sigma_data
            total = s**2 + d**2
            x = x.double() * total.sqrt()
            return (law.x0(x, torch.ones_like(s), s) - d**2 / total * x) * total.sqrt() / (s * d)
    elif name.startswith("FlowMatch"):

        def model(x, t):
            s = t.double() / config.num_train_timesteps
            return (x.double() - law.x0(x.double(), 1 - s, s)) / s
    else:
        cumulative = scheduler.alphas_cumprod.double()
        known = ((1 - cumulative) / cumulative).log().numpy()

        def model(x, t):
            gamma = torch.tensor(float(np.interp(float(t), np.arange(len(known)), known)), dtype=torch.float64)
            a, s = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
            x0 = law.x0(x.double(), a, s)
            noise = (x - a * x0) / s
            return {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0}[config.prediction_type]

    return denoiser(lambda x, t: model(x, t).to(x.dtype), scheduler, shape=shape, decode=identity)


def told_per_pixel(law: Gaussian, gamma, vectors: int) -> Denoiser:
    """The Bayes denoiser of a Gaussian whose coordinates have levels of their own: `gamma(t)` is `(1, 1, d)`, the same
    for every vector."""

    def model(x, gammas):
        level = gammas[:, 0, 0].double()  # (B, d)
        a, s2 = torch.sigmoid(-level).sqrt(), torch.sigmoid(level)
        spread = a[:, :, None] * law.covariance * a[:, None, :] + torch.diag_embed(s2)
        rest = x.double() - (a * law.mean)[:, None, None]
        gain = law.covariance * a[:, None, :] @ torch.linalg.inv(spread)
        x0 = law.mean + rest @ gain.transpose(1, 2)[:, None]
        return ((x - a[:, None, None] * x0) / s2.sqrt()[:, None, None]).to(x.dtype)

    shape = (1, vectors, law.dimension)
    return denoiser(model, MultivariateScheduler(gamma), kind="epsilon", shape=shape, decode=identity, per_pixel=True)


def two_clocks() -> PolynomialGamma:
    """A schedule of two coordinates, of which the first gets its noise late and the second early."""
    a, b, c = (torch.tensor(values).view(1, 1, 2) for values in ((2.0, 1.0), (0.5, -2.0), (0.4, 1.5)))
    return PolynomialGamma.of(a, b, c, minimum=-13.3, maximum=12.0)


def balanced(dimension: int):
    """In place of `randn`: the vectors of each sample get noise of mean zero and of covariance one exactly, so that
    means of quadratic functions have no error. `vectors` is then `2 * dimension`."""
    points = math.sqrt(dimension) * torch.cat([torch.eye(dimension), -torch.eye(dimension)])

    def randn(shape, sources, like=None):
        noise = points.expand(len(sources), *shape)
        return noise if like is None else noise.to(like)

    return randn
