"""How likely pictures are to a pixel model: a bound by its noise errors, or the density along its ODE.

Both are given in bits per dimension, `-log p(picture) / (D ln 2)` for a picture of `D` numbers; lower is more likely.
They tell when a guide is satisfied but a picture has left what the model knows. Likelihoods of single pictures favour
plain ones: compare pictures of the same kind, best by the change from the unguided picture of the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from .denoiser import Denoiser, as_picture
from .paths import Path, PixelPath, like, path_of
from .random import generators, rand, randn

_OWN = 0x70726F62  # keeps these draws apart from those a picture was made with
_RECONSTRUCTIONS = 4  # draws at the cleanest level
_EXACT = 32  # dimensions up to which the divergence is exact unless asked otherwise
SOLVERS = ("rk4", "scipy")


@dataclass(frozen=True)
class Likelihood:
    """How likely some pictures are.

    Attributes:
        bpd: bits per dimension `(B,)`, lower is more likely.
        standard_error: of each, from its random draws alone `(B,)`; NaN where there was only one draw.
        terms: what it is the sum of, `(B,)` each, by name.
        dimensions: how many numbers a picture has.
        latent: whether this is the density of a latent, or of whatever else the model draws, not of the picture.
        settings: how it was computed.
        gamma, errors: elbo_bpd only: minus log signal-to-noise ratios `(B, times)` at which the model was asked, and
            its mean square error there in the noise.
    """

    bpd: torch.Tensor
    standard_error: torch.Tensor
    terms: dict[str, torch.Tensor]
    dimensions: int
    latent: bool
    settings: dict = field(default_factory=dict)
    gamma: torch.Tensor | None = None
    errors: torch.Tensor | None = None

    @property
    def log_likelihood(self) -> torch.Tensor:
        """`log p` in nats, `(B,)`."""
        return -self.bpd * self.dimensions * math.log(2)

    def mean(self) -> tuple[float, float]:
        """The mean over pictures, and its standard error over pictures."""
        return self.bpd.mean().item(), (self.bpd.std() / len(self.bpd) ** 0.5).item()

    def __repr__(self) -> str:
        what = "of a latent" if self.latent else "of pictures"
        return f"Likelihood({self.bpd.mean():.4g} bits/dim, mean of {len(self.bpd)} {what}; {self.settings})"


def elbo_bpd(
    denoiser: Denoiser,
    images: torch.Tensor,
    *,
    bits: int | None = 8,
    times: int = 64,
    seeds: Iterable[int] | None = None,
    batch_size: int = 64,
    rounded: bool = False,
    progress: bool = False,
) -> Likelihood:
    """An upper bound of the bits per dimension, from how well the model finds the noise (Kingma et al. 2021, VDM).

    In nats, with `gamma` minus the log of the signal-to-noise ratio from the cleanest level 0 to the noisiest 1:
    `-log p(x) <= 1/2 int E |n - n_model(z)|^2 d gamma` (diffusion) `+ KL(q(z_1 | x) || N(0, I))` (prior)
    `+ E -log p(x | z_0)` (reconstruction). The integral is drawn at one time in each of `times` equal parts. The
    decoder `p(x | z_0)` is normal around the model's clean picture with deviation `s_0 / a_0`, summed over the bin of
    each value for pictures of some bits, the outer bins open (Ho et al. 2020). With a per-pixel schedule `d gamma` is a
    map (Sahoo et al. 2024).

    The scheduler's levels are joined to a continuous path, see `Path`; the model is asked at fractional timesteps, or
    at the nearest with `rounded`. The bound holds for any model so asked; it is not clipped as some schedulers clip.

    Args:
        denoiser: from `lossguide.samplers.denoiser`.
        images: pictures `(B, C, H, W)` in [0, 1], also `(B, 3, H, W)` grey ones for a model of one channel; with
            `bits=None` samples `(B, *shape)` as the model itself draws them.
        bits: pictures are rounded to so many bits, and the bits per dimension are those of a code for them; None for
            the density of samples that are not rounded.
        times: calls of the model per picture, besides 4 for the reconstruction.
        seeds: one per picture, by default 0, 1 ...: picture i depends on seed i alone. Models that are plain callables
            are asked at one time for all pictures of a batch, the same in any batch.
        batch_size: pictures at once.
        rounded: only ask at the scheduler's own timesteps.
        progress: show a progress bar.

    Raises:
        ValueError: the model has no density that can be read (consistency models, unreadable schedulers), or does not
            draw pictures and `bits` is not None.
    """
    path, x, seeds = _prepared(denoiser, images, bits, seeds, rounded)
    if times < 2:
        raise ValueError(f"times must be at least 2, got {times}")
    parts = _each(
        x, seeds, batch_size, progress, times + _RECONSTRUCTIONS, lambda *part: _elbo(path, *part, times, bits)
    )
    terms = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    error, gamma, errors = (torch.cat([part[i] for part in parts]) for i in (1, 2, 3))
    settings = {"method": "elbo", "bits": bits, "times": times, "rounded": rounded}
    return _likelihood(denoiser, terms, error, settings, gamma=gamma, errors=errors)


def ode_bpd(
    denoiser: Denoiser,
    images: torch.Tensor,
    *,
    bits: int | None = 8,
    solver: str = "rk4",
    steps: int = 25,
    tolerance: float = 1e-5,
    exact: bool | None = None,
    probes: int = 1,
    seeds: Iterable[int] | None = None,
    batch_size: int = 64,
    rounded: bool = False,
    progress: bool = False,
) -> Likelihood:
    """Bits per dimension along the probability-flow ODE (Song et al. 2021): `log p(x) = log N(z_1) + int div f dt`.

    `dz/dt = f = 1/2 gamma' s (n_model(z) - s z)` from the cleanest level, where `z_0 = a_0 x`, to the noisiest: `p` is
    the density of what the model knows at its cleanest level, which is a little wider than that of clean pictures.
    Pictures of some bits are dequantised: each gets uniform noise of the width `w = 2 / (2^bits - 1)` of a value's bin
    in [-1, 1], and `bpd = -log2 p(x + u) / D - log2 w`, in expectation over the noise no less than that of the rounded
    picture (Theis et al. 2016); the offset `-log2 w` is 6.994 for 8 bits.

    Args:
        solver: "rk4" of `steps` steps, equal in the path's time, each of four calls of the model; or "scipy":
            `solve_ivp`'s adaptive RK45 with `tolerance`, whose steps are those of the whole batch.
        exact: take the divergence exactly, by as many backward passes as the picture has numbers; else by Hutchinson's
            estimate `v' (df/dz) v` with signs `v`. By default exact up to 32 numbers.
        probes: dequantisations, each with signs of its own along a trajectory of its own; the standard error is over
            them. With exact divergence and `bits=None` one is enough, and the error is zero.
        denoiser, images, bits, seeds, batch_size, rounded, progress: as for `elbo_bpd`.

    Raises:
        ValueError: as `elbo_bpd`; or there is no such solver.
    """
    path, x, seeds = _prepared(denoiser, images, bits, seeds, rounded)
    if solver not in SOLVERS:
        raise ValueError(f"there is no solver {solver!r}; there are {', '.join(SOLVERS)}")
    if steps < 1 or probes < 1:
        raise ValueError(f"steps and probes are at least 1, got {steps} and {probes}")
    exact = x[0].numel() <= _EXACT if exact is None else exact
    known = exact and bits is None
    probes = 1 if known else probes

    def one(x: torch.Tensor, seeds: list[int], tick: Callable[[], None]) -> torch.Tensor:
        sources = generators([seed ^ _OWN for seed in seeds])
        return torch.stack([_ode(path, x, sources, bits, solver, steps, tolerance, exact, tick) for _ in range(probes)])

    calls = probes * steps * (4 if solver == "rk4" else 1)
    with denoiser.frozen():
        found = torch.cat(_each(x, seeds, batch_size, progress, calls, one), 1)
    spread = found.std(0) / probes**0.5 if probes > 1 else torch.full_like(found[0], 0.0 if known else math.nan)
    settings = {"method": "ode", "bits": bits, "solver": solver, "probes": probes, "exact": exact, "rounded": rounded}
    settings |= {"tolerance": tolerance} if solver == "scipy" else {"steps": steps}
    offset = (
        {} if bits is None else {"dequantisation": torch.full_like(found[0], -x[0].numel() * math.log(_width(bits)))}
    )
    return _likelihood(denoiser, {"density": found.mean(0), **offset}, spread, settings)


def _likelihood(denoiser: Denoiser, terms: dict[str, torch.Tensor], error: torch.Tensor, settings: dict, **more):
    """From nats to bits per dimension."""
    dimensions = math.prod(denoiser.shape)
    nats = dimensions * math.log(2)
    terms = {name: value / nats for name, value in terms.items()}
    latent = denoiser.decode is not as_picture
    return Likelihood(sum(terms.values()), error / nats, terms, dimensions, latent, settings, **more)


def _prepared(denoiser: Denoiser, images, bits, seeds, rounded) -> tuple[Path | PixelPath, torch.Tensor, list[int]]:
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"a likelihood is of what denoiser(model, scheduler) returns, got {type(denoiser).__name__}")
    path = path_of(denoiser, rounded)
    if not len(images):
        raise ValueError("there are no pictures")
    seeds = list(range(len(images))) if seeds is None else [int(seed) for seed in seeds]
    if len(seeds) != len(images):
        raise ValueError(f"seeds holds one integer per picture, got {len(seeds)} for {len(images)}")
    return path, _as_samples(denoiser, images, bits), seeds


def _as_samples(denoiser: Denoiser, images: torch.Tensor, bits: int | None) -> torch.Tensor:
    """Pictures as the model knows them."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    if bits is None:
        x = images
    else:
        if denoiser.decode is not as_picture:
            raise ValueError(
                "this model draws latents, or something else than pictures: pass its own samples with bits=None, and "
                "the figure is their density, not that of the pictures"
            )
        if not 1 <= bits <= 16:
            raise ValueError(f"bits must be from 1 to 16, got {bits}")
        if images.dim() == 4 and images.shape[1] == 3 and denoiser.shape[0] == 1:
            if not torch.allclose(images, images[:, :1].expand_as(images), atol=1e-4):
                raise ValueError("the model is of one channel, and the pictures are not grey")
            images = images[:, :1]
        if not (images.min() > -0.5 and images.max() < 1.5):  # also where there is a NaN
            raise ValueError("pictures are finite and in [0, 1]")
        most = 2**bits - 1
        x = (images.clamp(0, 1) * most).round() / most * 2 - 1
    if tuple(x.shape[1:]) != denoiser.shape:
        raise ValueError(f"the model's samples have shape {denoiser.shape}, and these {tuple(x.shape[1:])}")
    return x


def _width(bits: int) -> float:
    """Of the bin of a value, in [-1, 1]."""
    return 2 / (2**bits - 1)


def _each(x, seeds, size, progress, calls, function) -> list:
    """`function(x, seeds, tick)` of each batch, on the model's device."""
    starts = range(0, len(x), size)
    with tqdm(total=calls * len(starts), disable=not progress, unit="call") as bar:
        return [function(x[i : i + size], seeds[i : i + size], bar.update) for i in starts]


@torch.no_grad()
def _elbo(path: Path | PixelPath, x: torch.Tensor, seeds: list[int], tick: Callable, times: int, bits: int | None):
    """Terms in nats `(B,)` each, the error of their sum `(B,)`, and where the model erred by how much `(B, times)`."""
    sources = generators([seed ^ _OWN for seed in seeds])
    x = x.to(path.denoiser.device)
    shape, zero = x.shape[1:], torch.zeros(())
    u = rand((times,), sources if path.batched else generators([_OWN])).double()
    when = (torch.arange(times) + u) / times
    diffusion, gammas, errors = [], [], []
    for k in range(times):
        time = when[:, k] if path.batched else when[0, k]
        gamma, rate = path.gamma(time)
        noise = randn(shape, sources, like=x)
        z = _mix(x, noise, gamma)
        off = (noise - path.noise(z, time)).square()
        diffusion.append((like(rate, x) * off).flatten(1).double().sum(1).cpu() / 2)
        gammas.append(gamma.expand(len(x), *shape).flatten(1).mean(1).cpu())
        errors.append(off.flatten(1).mean(1).cpu())
        tick()
    gamma, _ = path.gamma(zero)
    spread = like((gamma / 2).exp().expand(shape), x)
    rebuilt = []
    for _ in range(_RECONSTRUCTIONS):
        noise = randn(shape, sources, like=x)
        z = _mix(x, noise, gamma)
        clean = z / like(torch.sigmoid(-gamma).sqrt(), x) - spread * path.noise(z, zero)
        rebuilt.append(_coded(x, clean, spread, bits).flatten(1).double().sum(1).cpu())
        tick()
    diffusion, rebuilt = torch.stack(diffusion, 1), torch.stack(rebuilt, 1)
    gamma = path.gamma(torch.ones(()))[0].expand(shape)
    a2, s2 = torch.sigmoid(-gamma).cpu(), torch.sigmoid(gamma).cpu()
    prior = (a2 * x.cpu().double() ** 2 + s2 - s2.log() - 1).flatten(1).sum(1) / 2
    terms = {"diffusion": diffusion.mean(1), "prior": prior, "reconstruction": rebuilt.mean(1)}
    # neighbouring parts differ by their noise and, a little, by their place: the error is told rather too large
    variance = diffusion.diff(dim=1).square().mean(1) / 2 / times + rebuilt.var(1) / _RECONSTRUCTIONS
    return terms, variance.sqrt(), torch.stack(gammas, 1), torch.stack(errors, 1)


def _mix(x: torch.Tensor, noise: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    return like(torch.sigmoid(-gamma).sqrt(), x) * x + like(torch.sigmoid(gamma).sqrt(), x) * noise


def _coded(x: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor, bits: int | None) -> torch.Tensor:
    """Nats of each number under a normal law, or of the bin of the value that it is."""
    if bits is None:
        return ((x - mean) / spread) ** 2 / 2 + spread.log() + math.log(2 * math.pi) / 2
    half = _width(bits) / 2
    low, high = ((x - half - mean) / spread).double(), ((x + half - mean) / spread).double()
    low = torch.where(x < -1 + half, -math.inf, low)
    high = torch.where(x > 1 - half, math.inf, high)
    right = low > 0  # the same mass on the left, where it is told precisely
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(log_high + torch.log1p(-(log_low - log_high).exp()))


def _ode(path: Path | PixelPath, x, sources, bits, solver, steps, tolerance, exact, tick) -> torch.Tensor:
    """`-log p(x)` in nats `(B,)`, of dequantised pictures."""
    x = x.to(path.denoiser.device)
    if bits is not None:
        x = x + like((rand(tuple(x.shape[1:]), sources) - 0.5) * _width(bits), x)
    signs = None if exact else like(rand(tuple(x.shape[1:]), sources).round() * 2 - 1, x)
    first = path.gamma(torch.zeros(()))[0].expand(x.shape[1:])
    a0 = torch.sigmoid(-first).sqrt()

    def flow(time: float, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            t = torch.tensor(time, dtype=torch.float64).clamp(0, 1)
            gamma, rate = path.gamma(t)
            s = like(torch.sigmoid(gamma).sqrt(), z)
            f = like(rate, z) * s * (path.noise(z, t) - s * z) / 2
            div = _divergence(f, z, signs)
        tick()
        return f.detach(), div.double().cpu()

    z = like(a0, x) * x
    if solver == "scipy":
        z, change = _by_scipy(flow, z, tolerance)
    else:
        change = torch.zeros(len(x), dtype=torch.float64)
        for i in range(steps):
            z, change = _step(flow, i / steps, 1 / steps, z, change)
    end = -(z.double().cpu() ** 2 + math.log(2 * math.pi)).flatten(1).sum(1) / 2
    return -(end + change + a0.double().cpu().log().sum())


def _divergence(f: torch.Tensor, z: torch.Tensor, signs: torch.Tensor | None) -> torch.Tensor:
    """The trace of `df/dz` of each sample `(B,)`: exact, or `v' (df/dz) v`."""
    if signs is not None:
        return (torch.autograd.grad(f, z, signs)[0] * signs).flatten(1).sum(1)
    flat, total = f.flatten(1), 0.0
    for i in range(flat.shape[1]):
        total = total + torch.autograd.grad(flat[:, i].sum(), z, retain_graph=True)[0].flatten(1)[:, i]
    return total


def _step(flow, time: float, h: float, z, change):
    """One step of Runge and Kutta of the sample and of the change of its log-density."""
    f1, d1 = flow(time, z)
    f2, d2 = flow(time + h / 2, z + h / 2 * f1)
    f3, d3 = flow(time + h / 2, z + h / 2 * f2)
    f4, d4 = flow(time + h, z + h * f3)
    return z + h / 6 * (f1 + 2 * f2 + 2 * f3 + f4), change + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)


def _by_scipy(flow, z: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    import numpy as np
    from scipy.integrate import solve_ivp

    count = z.numel()

    def both(time: float, state: np.ndarray) -> np.ndarray:
        f, div = flow(time, torch.from_numpy(state[:count]).to(z).view(z.shape))
        return np.concatenate([f.double().cpu().numpy().ravel(), div.numpy()])

    start = np.concatenate([z.double().cpu().numpy().ravel(), np.zeros(len(z))])
    end = solve_ivp(both, (0.0, 1.0), start, rtol=tolerance, atol=tolerance)
    if not end.success:
        raise ValueError(f"the ODE of this model could not be solved: {end.message}")
    return torch.from_numpy(end.y[:count, -1]).view(z.shape), torch.from_numpy(end.y[count:, -1])
