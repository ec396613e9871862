"""Noise levels that differ per pixel, against closed forms: no network, a Gaussian of six pixels with six schedules.

Its denoiser is exact at any map of levels, so that the bound on the likelihood, what guided samplers draw and what time
travel leaves are known. Results go to `results/per-pixel.md` and `.png`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from lossguide.guidance import Guidance, recipes
from lossguide.guidance.steps import AsScore, SigmaScaled, StepRule
from lossguide.losses import Measurement
from lossguide.samplers import Denoiser, Level, MultivariateScheduler, PolynomialGamma, ScalarGamma, denoiser, sample
from lossguide.samplers.gamma import Gamma, alpha, sigma

from tests.models import Gaussian, identity

from .posteriors import wasserstein

RESULTS = Path(__file__).parent / "results"
PIXELS = 6


class PixelGaussian(Gaussian):
    """Gaussian data whose exact denoiser knows a level of each pixel's own, `a` and `s` of shape `(d,)`."""

    def gain(self, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The slope of x0 in z: `C A (A C A + S^2)^-1`."""
        a, s = a.double().expand(self.dimension), s.double().expand(self.dimension)
        return self.covariance * a @ torch.linalg.inv(a[:, None] * self.covariance * a + torch.diag(s**2))

    def posterior_covariance(self, a, s) -> torch.Tensor:
        return torch.linalg.inv(torch.linalg.inv(self.covariance) + torch.diag((a / s).double() ** 2))

    def denoiser(self, vectors: int, gamma: Gamma | None = None, told: Callable = identity, **options) -> Denoiser:
        """A sample of shape (1, vectors, d) holds independent vectors; `told` changes what the model believes gamma to
        be."""

        def epsilon(z, g):
            g = told(g[0, 0, 0].double())
            a, s = alpha(g), sigma(g)
            return ((z - a * self.x0(z.double(), a, s)) / s).to(z.dtype)

        scheduler = MultivariateScheduler(gamma or gammas()["six schedules"], **options)
        return denoiser(epsilon, scheduler, shape=(1, vectors, self.dimension), decode=identity, per_pixel=True)


def prior() -> PixelGaussian:
    """Six pixels, each correlated with the others."""
    source = torch.Generator().manual_seed(6)
    root = torch.randn(PIXELS, PIXELS, generator=source, dtype=torch.float64)
    mean = 0.5 * torch.randn(PIXELS, generator=source, dtype=torch.float64)
    return PixelGaussian(mean, root @ root.T / PIXELS + 0.2 * torch.eye(PIXELS))


def gammas() -> dict[str, Gamma]:
    """Schedules of six pixels between the same ends: one for all, and sixes that rise at different times."""

    def six(*kinds: tuple[float, float, float]) -> PolynomialGamma:
        return PolynomialGamma.of(*torch.tensor(kinds, dtype=torch.float64).T.reshape(3, 1, 1, PIXELS))

    early, even, late, middle, ends = (1, -2, 1), (0, 0, 1), (1, 0, 0.05), (-4, 4, 0.1), (4, -4, 1.05)
    return {
        "one schedule": ScalarGamma(),
        "six schedules": six(early, (0, -1, 1.2), even, middle, (0, 1, 0.2), late),
        "the same, exchanged": six(late, (0, 1, 0.2), middle, even, (0, -1, 1.2), early),
        "six others": six(ends, late, even, early, middle, ends),
    }


@dataclass(frozen=True)
class Work:
    """`y = h x + sigma n` is measured: one mixture of all pixels."""

    prior: PixelGaussian
    y: float = 1.5
    sigma: float = 0.3

    @property
    def h(self) -> torch.Tensor:
        """The measurement as a matrix `(1, d)`."""
        return torch.tensor([[1.0, -0.5, 0.8, 0.3, -1.0, 0.6]], dtype=torch.float64)

    @property
    def posterior(self) -> Gaussian:
        """In closed form."""
        return self.prior.posterior(self.h, torch.tensor([self.y], dtype=torch.float64), self.sigma)

    def loss(self, image: torch.Tensor) -> torch.Tensor:
        """`-log p(y | x)` without its constant, summed over a sample's vectors."""
        return 0.5 * ((self.y - image @ self.h[0].to(image)) / self.sigma).square().flatten(1).sum(1)

    def measurement(self) -> Measurement:
        """The same as a distance; one vector per sample."""
        return Measurement(lambda image: image @ self.h.T.to(image), torch.full((1, 1, 1, 1), self.y), self.sigma)


def divergence(x: torch.Tensor, law: Gaussian) -> float:
    """`KL(N(mean, covariance of x) || law)` in nats; samples alone make it about `(d^2 + 3 d) / (4 n)`."""
    mean, covariance, precision = x.mean(0), x.T.cov(), torch.linalg.inv(law.covariance)
    off = mean - law.mean
    size = torch.logdet(law.covariance) - torch.logdet(covariance)
    return 0.5 * ((precision @ covariance).trace() - len(mean) + off @ precision @ off + size).item()


def floor(count: int) -> float:
    """What `divergence` of `count` exact samples is on average."""
    return (PIXELS**2 + 3 * PIXELS) / (4 * count)


# ---- the bound on the likelihood -----------------------------------------------------------------------------------


def bound(law: PixelGaussian, gamma: Gamma, x: torch.Tensor, told: Callable = identity) -> torch.Tensor:
    """The bound on `-log p(x)` in nats at points `(n, d)`, in closed form: what the denoiser costs along a schedule,
    from the law of `z_1` itself to that of x given `z_0`. `told` changes what the denoiser believes gamma to be."""
    off, eye = x - law.mean, torch.eye(PIXELS, dtype=torch.float64)

    def gains(g: torch.Tensor) -> torch.Tensor:
        a = alpha(g)
        noisy = a[..., :, None] * law.covariance * a[..., None, :] + torch.diag_embed(sigma(g) ** 2)
        return law.covariance * a[..., None, :] @ torch.linalg.inv(noisy)

    with torch.no_grad():
        nodes, weights = (torch.from_numpy(v) / 2 for v in np.polynomial.legendre.leggauss(600))
        maps, slopes = (f(nodes + 0.5).reshape(len(nodes), -1) for f in (gamma, gamma.derivative))
        maps, slopes = maps.expand(-1, PIXELS), slopes.expand(-1, PIXELS)
        believed = told(maps)
        a, s, a_told, s_told = alpha(maps), sigma(maps), alpha(believed), sigma(believed)
        slope = (eye - a_told[..., None] * gains(believed)) / s_told[..., None]  # of the noise found, in z
        signal = a[:, None] * off + ((a - a_told) * law.mean)[:, None]
        error = (signal @ slope.mT).square() + (eye - slope * s[:, None]).square().sum(-1)[:, None]
        total = 0.5 * (weights[:, None, None] * slopes[:, None] * error).sum((0, 2))

        first, last = (gamma(torch.tensor(t, dtype=torch.float64)).flatten().expand(PIXELS) for t in (0.0, 1.0))
        gain, given = gains(first), law.posterior_covariance(alpha(first), sigma(first))
        mean, slope, precision = off @ (eye - gain * alpha(first)).T, gain * sigma(first), torch.linalg.inv(given)
        total += 0.5 * ((mean @ precision * mean).sum(1) + (precision @ slope @ slope.T).trace())
        total += 0.5 * (torch.logdet(given) + PIXELS * math.log(2 * math.pi))

        a, s = alpha(last), sigma(last)
        noisy = a[:, None] * law.covariance * a + torch.diag(s**2)
        precision = torch.linalg.inv(noisy)
        total += 0.5 * ((a * off @ precision * (a * off)).sum(1) + (precision * s**2).trace() - PIXELS)
        return total + 0.5 * (torch.logdet(noisy) - (s**2).log().sum())


def bounds(points: int) -> list[str]:
    """The bound of every schedule at some points, of the exact denoiser and of one that is wrong."""
    law = prior()
    x = points_of(law, points)
    exact = -law.log_density(x)
    lines = [
        "| schedule | exact denoiser: bound, nats | largest error at one x | told a map a fifth nearer to its mean |",
        "|" + "---|" * 4,
        f"| **-log p(x)** | {exact.mean():.4f} |  |  |",
    ]
    for name, gamma in gammas().items():
        found = bound(law, gamma, x)
        worst, wrong = (found - exact).abs().max(), bound(law, gamma, x, _nearer).mean()
        lines.append(f"| {name} | {found.mean():.4f} | {worst:.1e} | {wrong:.4f} |")
    return lines


def points_of(law: Gaussian, count: int) -> torch.Tensor:
    """Draws of a Gaussian itself."""
    noise = torch.randn(count, law.dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return law.mean + noise @ torch.linalg.cholesky(law.covariance).T


# ---- guidance that is exact ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact(StepRule):
    """The gradient of the likelihood at x0 as that of `-log p(y | z_t)`, of which x0's own uncertainty is a part:
    `sigma^2 / (sigma^2 + h Cov[x0 | z_t] h^T)` times it; then another rule. `by_mean` gives that rule the pixels' mean
    sigma in place of their own."""

    work: Work
    rule: StepRule
    by_mean: bool = False

    def update(self, signal, state):
        level, work = signal.level, self.work
        a, s = (v.flatten()[-PIXELS:].expand(PIXELS) for v in (level.alpha, level.sigma))
        unknown = work.h @ work.prior.posterior_covariance(a, s) @ work.h.T
        share = (work.sigma**2 / (work.sigma**2 + unknown)).item()
        if self.by_mean:
            level = dataclasses.replace(level, sigma=level.sigma.mean())
        return self.rule.update(dataclasses.replace(signal, gradient=share * signal.gradient, level=level), state)


def exact_guidance(work: Work, rule: StepRule, edit: str, by_mean: bool = False) -> Guidance:
    """Guidance whose law is the posterior, but for the solver's steps."""
    return Guidance(work.loss, Exact(work, rule, by_mean), edit=edit, name="exact")


def guided(steps: Sequence[int], vectors: int) -> tuple[list[str], dict[str, torch.Tensor]]:
    """KL of what exact guidance draws to the posterior."""
    work, six = Work(prior()), gammas()["six schedules"]
    ways = {
        "noise moves by `s w g`": (exact_guidance(work, SigmaScaled(), "score"), {}),
        "mean moves by `-w P g`": (exact_guidance(work, AsScore(), "shift"), {}),
        "mean sigma for all pixels": (exact_guidance(work, SigmaScaled(), "score", by_mean=True), {}),
        "network told the mean gamma": (exact_guidance(work, SigmaScaled(), "score"), dict(told=_mean_gamma)),
        "unguided, the posterior's own denoiser": (None, {}),
    }
    lines = [f"| steps | {' | '.join(ways)} |", "|" + "---|" * (len(ways) + 1)]
    drawn = {}
    for count in steps:
        cells = []
        for name, (guidance, options) in ways.items():
            law = PixelGaussian(work.posterior.mean, work.posterior.covariance) if guidance is None else work.prior
            result = sample(law.denoiser(vectors, six, **options), guidance, steps=count, seeds=[0])
            drawn[name] = result.samples.reshape(-1, PIXELS).double()
            cells.append(f"{divergence(drawn[name], work.posterior):.4g}")
        lines.append(f"| {count} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines, drawn


def _nearer(gamma: torch.Tensor) -> torch.Tensor:
    return 0.8 * gamma + 0.2 * gamma.mean(-1, keepdim=True)


def _mean_gamma(gamma: torch.Tensor) -> torch.Tensor:
    return gamma.mean().expand(gamma.shape)


# ---- a constant map is diffusers' own ------------------------------------------------------------------------------


def as_table(scheduler) -> Callable[[torch.Tensor], torch.Tensor]:
    """A diffusers scheduler's levels as a schedule of equal pixels `(2, 4, 4)`."""
    shares = scheduler.alphas_cumprod.double()
    table = torch.log((1 - shares) / shares)
    table = torch.cat([table[:1] - 1e-3, table])  # at time 0, where sampling does not ask

    def gamma(t: torch.Tensor) -> torch.Tensor:
        place = t.double() * 1000
        below = place.round().long().clamp(0, 1000) if (place - place.round()).abs() < 1e-3 else place.long()
        return (table[below] + (place - below) * (table[min(int(below) + 1, 1000)] - table[below])).expand(2, 4, 4)

    return gamma


def apart_from_diffusers(eta: float | None, steps: int = 20) -> float:
    """The largest difference, over a whole run, to DDIM with this eta, or to DDPM where it is None."""
    own = (DDPMScheduler if eta is None else DDIMScheduler)(clip_sample=False, beta_schedule="linear")
    own.set_timesteps(steps)
    scheduler = MultivariateScheduler(as_table(own))
    scheduler.set_timesteps(timesteps=own.timesteps)
    source = torch.Generator().manual_seed(3)
    x = y = torch.randn(2, 2, 4, 4, generator=source)
    worst = 0.0
    for step, (t, time_) in enumerate(zip(own.timesteps, scheduler.timesteps)):
        level = scheduler.level_at(time_)
        predictions = [level.sigma * z / (level.alpha**2 / 4 + level.sigma**2) for z in (x, y)]  # data N(0, 1/4)
        draws = [torch.Generator().manual_seed(step) for _ in range(2)]
        options = {} if eta is None else dict(eta=eta)
        x = own.step(predictions[0], t, x, generator=draws[0], **options).prev_sample
        eta_ = 1.0 if eta is None else eta
        y = scheduler.step(predictions[1], time_, y, eta=eta_, generator=draws[1]).prev_sample
        worst = max(worst, (x - y).abs().max().item())
    return worst


# ---- time travel ---------------------------------------------------------------------------------------------------


def marginal(law: Gaussian, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the noised data."""
    a, s = (v.double().flatten() for v in (level.alpha, level.sigma))
    return a * law.mean, a[:, None] * law.covariance * a + torch.diag(s**2)


def renoised_apart(law: Gaussian, gamma: Gamma, clean: float, noisy: float) -> float:
    """The largest difference of mean and covariance between a marginal re-noised and the marginal there."""
    with torch.no_grad():
        levels = [Level.of_gamma(gamma(torch.tensor(t, dtype=torch.float64))) for t in (clean, noisy)]
    mean, covariance = marginal(law, levels[0])
    zero, one = torch.zeros(PIXELS, dtype=torch.float64), torch.ones(PIXELS, dtype=torch.float64)
    ratio = levels[0].renoise(one, levels[1], zero).flatten()
    added = levels[0].renoise(zero, levels[1], one).flatten()
    wanted = marginal(law, levels[1])
    found = (ratio * mean, ratio[:, None] * covariance * ratio + torch.diag(added**2))
    return max((a - b).abs().max().item() for a, b in zip(found, wanted))


def without_force(image: torch.Tensor) -> torch.Tensor:
    """A loss that pulls nowhere: time travel alone is left."""
    return 0 * image.flatten(1).sum(1)


def travelled(steps: int, vectors: int, repeats: int) -> torch.Tensor:
    """What a sampler draws that visits every step several times."""
    guidance = recipes.universal(without_force, recur=repeats)
    return sample(prior().denoiser(vectors), guidance, steps=steps, seeds=[4]).samples.reshape(-1, PIXELS).double()


# ---- every recipe --------------------------------------------------------------------------------------------------

LIKELIHOOD = ("score", "fk_steering", "tds")  # made for a log-likelihood; the others see a distance


def recipe_of(name: str, work: Work) -> Guidance:
    """A recipe at its default strength, with the loss that it is made for."""
    options = dict(sharpness=1.0, count=16) if name in ("fk_steering", "tds") else {}
    return recipes.get(name)(work.loss if name in LIKELIHOOD else work.measurement(), **options)


def recipe_names() -> list[str]:
    """All recipes for samples that are numbers; the masked-token generator's are not."""
    return [name for name in recipes.available() if not recipe_of(name, Work(prior())).to_dict().get("tokens")]


def recipe_table(steps: int, pictures: int, only: Sequence[str] = ()) -> list[str]:
    """What each recipe draws under six schedules and under one, against the posterior."""
    work, found = Work(prior()), gammas()
    lines = [
        "| recipe | KL, six schedules | KL, one schedule | W2, six | W2, one | hx, six | hx, one |",
        "|" + "---|" * 7,
        f"| **the posterior** | | | | | {_seen(points_of(work.posterior, 20_000), work)} | |",
    ]
    for name in ["unguided", *recipe_names()]:
        if only and name not in only:
            continue
        figures = []
        for gamma in (found["six schedules"], found["one schedule"]):
            guidance = None if name == "unguided" else recipe_of(name, work)
            count = pictures if guidance is None or guidance.candidates == 1 else pictures // 2
            x = sample(work.prior.denoiser(1, gamma), guidance, steps=steps, seeds=range(count)).samples
            x = x.reshape(count, PIXELS).double()
            law = work.posterior
            figures.append((divergence(x, law), wasserstein(x.mean(0), x.T.cov(), law), _seen(x, work)))
        cells = [f"{figure:.3g}" for pair in list(zip(*figures))[:2] for figure in pair] + [f[2] for f in figures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def _seen(x: torch.Tensor, work: Work) -> str:
    """Mean and spread of what is measured."""
    value = x @ work.h[0]
    return f"{value.mean():.2f} ± {value.std():.2f}"


# ---- the report ----------------------------------------------------------------------------------------------------


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure everything anew, which takes less than two minutes; `only` some recipes: print them."""
    started = time.process_time()
    steps, vectors, pictures = ((50, 100), 4_000, 100) if quick else ((50, 100, 250), 10_000, 400)
    if only:
        recipe_table(100, pictures, only)
        return
    tables: dict = {"bounds": bounds(4 if quick else 16)}
    print("\n".join(tables["bounds"]), flush=True)
    tables["guided"], drawn = guided(steps, vectors)
    gap = {name: apart_from_diffusers(eta) for name, eta in (("DDIM", 0.0), ("DDIM, eta 1", 1.0), ("DDPM", None))}
    tables["diffusers"] = ["| | largest difference in 20 steps |", "|---|---|"]
    tables["diffusers"] += [f"| {name} | {value:.1e} |" for name, value in gap.items()]
    law, six = prior(), gammas()["six schedules"]
    pairs = [(clean, noisy) for clean in (0.0, 0.3, 0.6) for noisy in (0.35, 0.7, 1.0) if clean < noisy]
    exact = max(renoised_apart(law, six, *pair) for pair in pairs)
    tables["travel"] = ["| visits per step | KL to the data's law, nats |", "|---|---|"]
    for repeats in (1, 3):
        x = travelled(steps[1], vectors, repeats)
        tables["travel"].append(f"| {repeats} | {divergence(x, law):.4f} |")
        print(tables["travel"][-1], flush=True)
    tables["steps"] = steps[1]
    tables["recipes"] = recipe_table(100, pictures)
    name = "per-pixel-quick" if quick else "per-pixel"
    plot(drawn, RESULTS / f"{name}.png")
    (RESULTS / f"{name}.md").write_text(_report(tables, exact, vectors, pictures, quick, time.process_time() - started))
    print(f"{time.process_time() - started:.0f} s")


def plot(drawn: dict[str, torch.Tensor], path: Path) -> None:
    """The six schedules, and what guidance draws of two pixels under them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    times = torch.linspace(0, 1, 101)
    with torch.no_grad():
        for axis, name in zip(axes, ("six schedules", "six others")):
            maps = gammas()[name](times)[:, 0, 0]
            for pixel in range(PIXELS):
                axis.plot(times, maps[:, pixel], label=f"pixel {pixel + 1}")
            axis.set(title=name, xlabel="t", ylabel="gamma")
            axis.legend(fontsize=8)
    work, axis = Work(prior()), axes[2]
    grid = torch.linspace(-4, 6, 400, dtype=torch.float64)
    law = work.posterior.seen(work.h, 0.0)
    axis.fill_between(grid, torch.exp(law.log_density(grid[:, None])), color="#dddddd", label="the posterior")
    for name, x in drawn.items():
        if not name.startswith("unguided"):
            axis.hist(x @ work.h[0], bins=120, range=(-4, 6), density=True, histtype="step", label=name)
    axis.set(title="what is measured, h x", xlabel="h x", ylabel="density", ylim=(0, 2.4))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _report(tables: dict, exact: float, vectors: int, pictures: int, quick: bool, seconds: float) -> str:
    parts = [
        "# Noise levels that differ per pixel",
        "",
        f"`python -m benchmarks run per-pixel{' --quick' if quick else ''}`, {seconds:.0f} s of one core's time.",
        "",
        "No network: a Gaussian of six correlated pixels, whose denoiser is exact at any map of levels, between "
        "gamma = -13.3 and 5. `y = h x + 0.3 n` with h over all six pixels is measured where something is guided.",
        "",
        "## The bound on the likelihood does not depend on the path",
        "",
        "In closed form, 600 Gauss-Legendre nodes, mean over points of the data. With the exact denoiser every path "
        "gives `-log p(x)` itself, at each x. With one that is wrong (here: it is told a map of levels a fifth nearer "
        "to their mean) the path matters.",
        "",
        *tables["bounds"],
        "",
        "## Guided samples: KL to the exact posterior, nats",
        "",
        f"{vectors} vectors under six schedules, ancestral steps, the gradient that of `-log p(y | z_t)`. Samples "
        f"alone make {floor(vectors):.4f}; the last column is what the solver's steps cost without guidance.",
        "",
        *tables["guided"],
        "",
        "## Equal pixels are diffusers' own steps",
        "",
        *tables["diffusers"],
        "",
        "## Time travel leaves the marginal as it is",
        "",
        "`z_t = a_t / a_s z_s + s_t sqrt(c) n`: largest difference of mean and covariance to those of the noisier "
        f"level {exact:.1e} (closed form, float64). Drawn, with a loss that pulls nowhere ({vectors} vectors, "
        f"{tables['steps']} steps; samples alone make {floor(vectors):.4f}):",
        "",
        *tables["travel"],
        "",
        "## Every recipe, 100 steps",
        "",
        f"Recipes at their defaults, on {pictures} samples of one vector (particles: {pictures // 2}; samples alone "
        f"make {floor(pictures):.2f}). `{'`, `'.join(LIKELIHOOD)}` see `-log p(y | x)`, the others the distance to y. "
        "KL is of the Gaussian of the same mean and covariance; `hx` is what is measured, y = 1.5. Few of them claim "
        "the posterior (see posteriors.md); the two schedules side by side tell whether a recipe minds that pixels "
        "differ.",
        "",
        *tables["recipes"],
    ]
    return "\n".join(parts) + "\n"
