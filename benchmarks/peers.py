"""Other people's code on the same work: deepinv (`pip install ".[peers]"`), its samplers unmodified.

deepinv gets the work's own model as its denoiser, the work's own operator as its physics, and the noise level of the
measurement. Where it is not installed, its methods are left out and the report says so. The community pipelines of
diffusers, CLIP guidance among them, are files of its repository and do not come with the package, so that there is
nothing to run.

`python -m benchmarks.peers` finds the strengths that the task uses: the best of a ladder by LPIPS, on the two pictures
that strengths of recipes are searched on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lossguide.losses import Measurement
from lossguide.samplers import Denoiser

from .budget import Calls


@dataclass(frozen=True)
class Peer:
    """Other people's sampler.

    Attributes:
        package: what must be installed.
        calls: iterations -> calls of the denoiser per picture.
        draw: `(model, measurement, seed, iterations, **settings)` -> pictures `(B, 3, H, W)` in [0, 1].
    """

    package: str
    calls: Callable[[int], Calls]
    draw: Callable[..., torch.Tensor]

    @property
    def available(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def as_deepinv(model: Denoiser):
    """The work's model as deepinv's denoiser: `(x, sigma) -> x0` for `x = x0 + sigma * noise` with x0 in [0, 1].

    The timestep is that of the same ratio of noise to picture, between two of the schedule's by its logarithm. What the
    samplers' own schedules ask beyond the ends of the model's gets the last timestep.
    """
    from deepinv.models import Denoiser as Base

    alphas = model.scheduler.alphas_cumprod.double().sqrt()
    ratios = ((1 - alphas**2).sqrt() / alphas).log()
    places = torch.arange(len(alphas), dtype=torch.float64)

    class Wrapped(Base):
        def forward(self, x: torch.Tensor, sigma, *args, **kwargs) -> torch.Tensor:
            wanted = (2 * torch.as_tensor(sigma).double().flatten()[0]).log().clamp(ratios[0], ratios[-1])
            upper = int((ratios < wanted).sum().clamp(1, len(ratios) - 1))
            share = (wanted - ratios[upper - 1]) / (ratios[upper] - ratios[upper - 1])
            ratio = wanted.exp().float()
            alpha = (1 + ratio**2).rsqrt()
            sample = (alpha * (2 * x - 1)).to(x.dtype)
            noise = model.predict(sample, (places[upper - 1] + share).float())
            return ((sample - ratio * alpha * noise) / alpha) / 2 + 0.5

    return Wrapped()


def as_physics(measurement: Measurement):
    """The measurement's operator and noise as deepinv's physics."""
    import deepinv

    operator = measurement.operator
    shape = (len(measurement.y), 3, 64, 64)
    return deepinv.physics.LinearPhysics(
        A=lambda x, **_: operator(x),
        A_adjoint=lambda y, **_: operator.adjoint(y, shape),
        noise_model=deepinv.physics.GaussianNoise(measurement.sigma),
    )


def dps(
    model: Denoiser,
    measurement: Measurement,
    seed: int,
    iterations: int,
    weight: float = 1.0,
    guidance: str = "norm",
) -> torch.Tensor:
    """`deepinv.sampling.DPS`: variance-preserving, ancestral; it evaluates the denoiser at all but the last time."""
    import deepinv

    sampler = deepinv.sampling.DPS(
        as_deepinv(model),
        num_steps=iterations + 1,
        weight=weight,
        guidance=guidance,
        rng=torch.Generator().manual_seed(seed),
    )
    with model.frozen():
        return sampler(measurement.y, as_physics(measurement), x_init=(len(measurement.y), *model.shape))


def diffpir(
    model: Denoiser, measurement: Measurement, seed: int, iterations: int, lambda_: float = 7.0, zeta: float = 0.1
) -> torch.Tensor:
    """`deepinv.sampling.DiffPIR`."""
    import deepinv

    sampler = deepinv.sampling.DiffPIR(
        as_deepinv(model),
        deepinv.optim.data_fidelity.L2(),
        sigma=measurement.sigma,
        max_iter=iterations,
        lambda_=lambda_,
        zeta=zeta,
    )
    with model.frozen():
        return sampler(measurement.y, as_physics(measurement), seed=seed)


PEERS = {
    "deepinv-dps": Peer("deepinv", lambda n: Calls(n, n), dps),
    "deepinv-diffpir": Peer("deepinv", lambda n: Calls(n), diffpir),
}
# DPS's default, guidance="norm", reached no better than LPIPS 0.20 at weights of 3, 10 and 30 in super-resolution
LADDERS = {
    "deepinv-dps": [dict(guidance="annealed", weight=w) for w in (1.0, 3.0, 10.0, 30.0)],
    "deepinv-diffpir": [dict(lambda_=v, zeta=z) for v, z in ((7.0, 0.1), (7.0, 0.5), (2.0, 0.5), (0.7, 0.5))],
}


def search(iterations: int = 50) -> None:
    """Print the figures of every strength on the search set of every restoration."""
    from . import real, runs, work_restore

    torch.set_num_threads(1)
    model = runs.model_in(real.model, torch.bfloat16)
    for work in work_restore.WORKS:
        pictures = work.pictures("search")
        measurement = pictures.loss(range(len(pictures.seeds)))
        for name, ladder in LADDERS.items():
            for settings in ladder:
                images = PEERS[name].draw(model, measurement, pictures.seeds[0], iterations, **settings)
                judged = pictures.judge(images.float().clamp(0, 1))
                told = "  ".join(f"{key} {value.mean().item():.4f}" for key, value in judged.items())
                print(f"{work.name:22} {name:16} {settings}  {told}", flush=True)


if __name__ == "__main__":
    search()
