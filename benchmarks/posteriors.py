"""Closed forms: every method that claims a posterior, against the posterior itself, without a network.

Gaussian and mixture priors have an exact denoiser, and given one measured coordinate `y = x_1 + sigma n` an exact
posterior. For Gaussians most methods move a sample by an affine map per step, so that the law of what they draw is a
Gaussian known in closed form (`expected`): how far that one is from the posterior is the method's own bias, without
Monte Carlo, at any number of steps. Particle methods are measured against what they converge to: the law of the plain
sampler, steps and all, times the likelihood (`drawn_by_grid`). Results go to `results/posteriors.md` and `.png`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lossguide.guidance import Guidance, recipes
from lossguide.guidance.steps import AsNoise, AsScore, SqrtAlpha, StepRule
from lossguide.losses import Measurement
from lossguide.samplers import Level, Solver, sample
from scipy.stats import wasserstein_distance

from tests.models import Exact, Gaussian, GaussianMixture

RESULTS = Path(__file__).parent / "results"
VECTORS = 2000  # per sample, where a sample may hold several
FLOWDPS_SIZE = 15 * (VECTORS / (96 * 96 * 16)) ** 0.5  # published for latents of 96 x 96 x 16, under one norm of all


@dataclass(frozen=True)
class Problem:
    """A prior of vectors, of which the first coordinate is measured: `y = x_1 + sigma n`."""

    prior: Exact
    y: float
    sigma: float

    @property
    def h(self) -> torch.Tensor:
        """The measurement as a matrix `(1, d)`."""
        return torch.eye(self.prior.dimension, dtype=torch.float64)[:1]

    @property
    def posterior(self) -> Exact:
        """In closed form."""
        return self.prior.posterior(self.h, torch.tensor([self.y], dtype=torch.float64), self.sigma)

    def loss(self, image: torch.Tensor) -> torch.Tensor:
        """`-log p(y | x)` without its constant, summed over a sample's vectors."""
        return 0.5 * ((self.y - image[..., 0]) / self.sigma).square().flatten(1).sum(1)

    def measurement(self) -> Measurement:
        """The same as a distance, `||y - x_1||` over a sample's `VECTORS` vectors."""
        return Measurement(lambda image: image[..., :1], torch.full((1, 1, VECTORS, 1), self.y), self.sigma)


def white() -> Problem:
    """Prior `N(m, I)`, for which the assumptions of PiGDM and of LGD hold exactly."""
    return Problem(Gaussian(torch.tensor([0.3, -0.2]), torch.eye(2)), 1.5, 0.3)


def correlated() -> Problem:
    """Prior of correlation 0.8: what is measured says much of what is not."""
    return Problem(Gaussian(torch.tensor([0.3, -0.2]), torch.tensor([[1.0, 0.8], [0.8, 1.0]])), 1.5, 0.3)


def two_modes() -> Problem:
    """Two narrow modes, of which the measurement prefers the rarer."""
    modes = [Gaussian(torch.tensor([c, c]), 0.09 * torch.eye(2)) for c in (-1.0, 1.0)]
    return Problem(GaussianMixture(torch.tensor([0.7, 0.3]), modes), 0.3, 0.7)


# ---- what a method draws, in closed form -------------------------------------------------------------------------


@dataclass
class Step:
    """One step of a sampler on a Gaussian prior: its quantities as affine maps of the sample, `(d, d + 1)` on `(x, 1)`.

    Attributes:
        mean, covariance: of the sample at this step.
        x, x0, noise: the maps to the sample itself, to the clean sample predicted and to the noise predicted.
        slope: the Jacobian of x0.
    """

    problem: Problem
    level: Level
    after: Level
    mean: torch.Tensor
    covariance: torch.Tensor
    x: torch.Tensor = field(init=False)
    x0: torch.Tensor = field(init=False)
    noise: torch.Tensor = field(init=False)
    slope: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.a, self.s, prior, d = self.level.alpha, self.level.sigma, self.problem.prior, len(self.mean)
        self.x = torch.eye(d, d + 1, dtype=torch.float64)
        self.slope = prior.gain(self.a, self.s)
        self.x0 = self.slope @ self.x
        self.x0[:, -1] += prior.mean - self.a * self.slope @ prior.mean
        self.noise = (self.x - self.a * self.x0) / self.s

    def residual(self, x0: torch.Tensor) -> torch.Tensor:
        """`y - H x0`."""
        rest = -self.problem.h @ x0
        rest[:, -1] += self.problem.y
        return rest

    def distance(self, x0: torch.Tensor) -> torch.Tensor:
        """`||y - H x0||` over a sample of many vectors, each of which follows the law of this step."""
        rest = self.residual(x0)
        mean, slope = rest[:, :-1] @ self.mean + rest[:, -1], rest[:, :-1]
        return (VECTORS * (mean.square().sum() + (slope @ self.covariance @ slope.T).trace())).sqrt()

    def kalman(self, covariance: torch.Tensor) -> torch.Tensor:
        """`C H^T (H C H^T + sigma^2)^-1`: from a residual to the posterior mean of `N(x0, C)`."""
        h, noise = self.problem.h, self.problem.sigma**2 * torch.eye(1, dtype=torch.float64)
        return covariance @ h.T @ torch.linalg.inv(h @ covariance @ h.T + noise)

    def spread(self, variance: torch.Tensor) -> torch.Tensor:
        """`variance * I`."""
        return variance * torch.eye(len(self.mean), dtype=torch.float64)

    def ancestral(self, x0: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The step of DDIM with eta = 1, as a map, and the spread of the noise that it draws."""
        return self.level.ancestral_mean(self.after, x0, noise), self.level.step_std(self.after)

    def follow(self, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x0 goes by `gain` times the residual, and the noise makes up for it."""
        x0 = self.x0 + gain @ self.residual(self.x0)
        return self.ancestral(x0, (self.x - self.a * x0) / self.s)

    def shifted(self, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The plain step, and `step` added where it lands."""
        plain, std = self.ancestral(self.x0, self.noise)
        return plain + step, std

    def likelihood_slope(self, covariance: torch.Tensor) -> torch.Tensor:
        """The gradient at x_t of `log N(y; H x0, H C H^T + sigma^2)`."""
        h, noise = self.problem.h, self.problem.sigma**2 * torch.eye(1, dtype=torch.float64)
        return self.slope.T @ h.T @ torch.linalg.inv(h @ covariance @ h.T + noise) @ self.residual(self.x0)

    def as_score(self, slope: torch.Tensor) -> torch.Tensor:
        """Where the slope of a log-likelihood takes an ancestral step: `(a'/a) (s^2 - (a s'/a')^2)` times it."""
        ratio = self.after.alpha / self.a
        draws = (self.level.step_std(self.after) > 0).double()
        return draws * ratio * (self.s**2 - (self.after.sigma / ratio) ** 2) * slope


def _score(p: Step):
    slope = p.likelihood_slope(p.spread(torch.zeros(())))
    return p.ancestral(p.x0 + p.s**2 / p.a * slope, p.noise - p.s * slope)


def _dps(p: Step):
    return p.shifted(p.slope.T @ p.problem.h.T @ p.residual(p.x0) / p.distance(p.x0))


def _flowdps(p: Step):
    x0 = p.x0
    for _ in range(3):
        x0 = x0 + FLOWDPS_SIZE * p.problem.h.T @ p.residual(x0) / p.distance(x0)
    share = p.after.alpha / (p.after.alpha + p.after.sigma)
    x0 = p.x0 + p.s / (p.a + p.s) * (x0 - p.x0)
    return p.after.alpha * x0 + p.after.sigma * (1 - share).sqrt() * p.noise, p.after.sigma * share.sqrt()


# ---- the methods -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactWeight(StepRule):
    """PiGDM's step weighted as its own derivation has it, by what the score of `p(y | x_t)` does to an ancestral step,
    in place of `a_t r_t^2`."""

    def update(self, signal, state):
        level = signal.level
        slope = signal.gradient * (level.alpha**2 + level.sigma**2) / level.sigma**2
        return AsScore().update(dataclasses.replace(signal, gradient=slope), state)


@dataclass(frozen=True)
class Method:
    """A method, and what it should give.

    Attributes:
        bias: what is stated of it.
        guidance: it, for a problem; None for the plain sampler of the posterior's own denoiser.
        step: its step as an affine map and the spread of the noise drawn, where that is known.
        alone: its loss must see one vector at a time.
        flow: it is made for flow models.
    """

    bias: str
    guidance: Callable[[Problem], Guidance] | None = None
    step: Callable[[Step], tuple[torch.Tensor, torch.Tensor]] | None = None
    alone: bool = False
    flow: bool = False


METHODS = {
    "posterior's own denoiser": Method(
        "none but the solver's: what every exact method should equal",
        step=lambda p: p.follow(p.kalman(p.problem.prior.posterior_covariance(p.a, p.s))),
    ),
    "proximal, as the noise": Method(
        "none for N(m, I): x0 becomes E[x_0 | x_t, y]; else r_t^2 I in place of Cov[x_0 | x_t]",
        lambda w: recipes.pigdm(w.measurement(), rule=AsNoise(), through="x0", edit="score"),
        lambda p: p.follow(p.kalman(p.spread(p.s**2))),
    ),
    "pigdm, exact weight": Method(
        "none for N(m, I): the score of p(y | x_t); else r_t^2 I in place of Cov[x_0 | x_t]",
        lambda w: recipes.pigdm(w.measurement(), rule=ExactWeight()),
        lambda p: p.shifted(p.as_score(p.likelihood_slope(p.spread(p.s**2)))),
    ),
    "pigdm": Method(
        "too sure, the more so the more steps: its weight a_t a_{t-1} r_t^2 does not shrink with the step",
        lambda w: recipes.pigdm(w.measurement()),
        lambda p: p.shifted(p.a * p.after.alpha * p.s**2 * p.likelihood_slope(p.spread(p.s**2))),
    ),
    "pigdm, the paper's weight": Method(
        "surer still: a_t r_t^2",
        lambda w: recipes.pigdm(w.measurement(), rule=SqrtAlpha(1.0)),
        lambda p: p.shifted(p.a * p.s**2 * p.likelihood_slope(p.spread(p.s**2))),
    ),
    "ddnm": Method(
        "y is fitted exactly, its noise too; the hidden part is right where it does not depend on y, else it lags",
        lambda w: recipes.ddnm(w.measurement()),
        lambda p: p.follow(torch.linalg.pinv(p.problem.h)),
    ),
    "diffpir": Method(
        "too unsure: r_t^2 = s^2 / (1.75 a^2), four sevenths of what x0 leaves unknown at low noise",
        lambda w: recipes.diffpir(w.measurement()),
        lambda p: p.follow(p.kalman(p.spread((p.s / p.a) ** 2 / 1.75))),
    ),
    "diffpir, weight 1": Method(
        "nearly none for N(m, I): r_t^2 = s^2 / a^2, right at low noise",
        lambda w: recipes.diffpir(w.measurement(), weight=1.0),
        lambda p: p.follow(p.kalman(p.spread((p.s / p.a) ** 2))),
    ),
    "score of p(y given x0)": Method(
        "too sure: p(y | x_t) without what x0 leaves unknown (DPS's derivation, with the weight derived)",
        lambda w: recipes.score(w.loss),
        _score,
    ),
    "dps": Method(
        "none stated: 1 / sqrt(2000) per value and step, whatever the noise; so with more and more steps a point at y",
        lambda w: recipes.dps(w.measurement()),
        _dps,
    ),
    "lgd_mc as a score": Method(
        "none for N(m, I) as copies grow (10 here)",
        lambda w: recipes.lgd_mc(w.loss, rule=AsScore()),
        alone=True,
    ),
    "lgd_mc": Method("that of dps", lambda w: recipes.lgd_mc(w.measurement())),
    "red_diff": Method(
        "a point: an optimum near y, and what Adam's last steps leave of the noise",
        lambda w: recipes.red_diff(w.measurement()),
    ),
    "flowdps": Method(
        "short of y, the less the more steps; the hidden part too sure, as noise put anew is not the flow's",
        lambda w: recipes.flowdps(w.measurement(), size=FLOWDPS_SIZE),
        _flowdps,
        flow=True,
    ),
    "fk_steering, 64": Method("O(1/N)", lambda w: recipes.fk_steering(w.loss, count=64, sharpness=1.0), alone=True),
    "tds, 64": Method(
        "O(1/N), once N outgrows the spread of its weights",
        lambda w: recipes.tds(w.loss, count=64, sharpness=1.0),
        alone=True,
    ),
}


def expected(method: Method, problem: Problem, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of what a method draws from a Gaussian prior, each step's affine map carried out on them.

    Where a sample's vectors share one distance, it is that of infinitely many.
    """
    prior = problem.prior
    scheduler = prior.flow_denoiser(1).scheduler if method.flow else prior.scheduler
    levels = Solver.of(scheduler, steps).levels
    mean, covariance = torch.zeros_like(prior.mean), torch.eye(len(prior.mean), dtype=torch.float64)
    for level, after in zip(levels[:-1], levels[1:]):
        step, std = method.step(Step(problem, level, after, mean, covariance))
        slope = step[:, :-1]
        mean = slope @ mean + step[:, -1]
        covariance = slope @ covariance @ slope.T + std**2 * torch.eye(len(mean), dtype=torch.float64)
    return mean, covariance


def draw(method: Method, problem: Problem, steps: int, count: int) -> torch.Tensor:
    """`count` vectors `(count, d)` that a method draws."""
    law = problem.posterior if method.guidance is None else problem.prior
    vectors = 1 if method.alone else VECTORS
    model = law.flow_denoiser(vectors) if method.flow else law.denoiser(vectors)
    guidance = None if method.guidance is None else method.guidance(problem)
    result = sample(model, guidance, steps=steps, seeds=range(count // vectors))
    return result.samples.reshape(count, -1).double()


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def wasserstein(mean: torch.Tensor, covariance: torch.Tensor, law) -> float:
    """The Wasserstein-2 distance of `N(mean, covariance)` from a law's own mean and covariance (Gelbrich 1990)."""
    root = _root(law.covariance)
    cross = _root(root @ covariance @ root)
    squared = (mean - law.mean).square().sum() + (covariance + law.covariance - 2 * cross).trace()
    return squared.clamp_min(0).sqrt().item()


# ---- particles ---------------------------------------------------------------------------------------------------

STEPS = 40
COUNTS = (1, 2, 4, 8, 16, 32, 64)


def bell(sigma: float = 1.0) -> Problem:
    """`N(0, 1)` on a line, measured at 2."""
    return Problem(Gaussian(torch.zeros(1), torch.eye(1)), 2.0, sigma)


def two_bells() -> Problem:
    """Two modes on a line, of which the measurement prefers the rarer."""
    modes = [Gaussian(torch.tensor([c]), 0.16 * torch.eye(1)) for c in (-1.2, 1.2)]
    return Problem(GaussianMixture(torch.tensor([0.7, 0.3]), modes), 1.0, 0.9)


@dataclass(frozen=True)
class Points:
    """A law on a line, as points and their weights."""

    at: torch.Tensor
    weights: torch.Tensor

    def mean(self, function: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> float:
        """Of a function."""
        return (self.weights * function(self.at)).sum().item()

    def given(self, problem: Problem) -> Points:
        """This law times the likelihood."""
        likely = self.weights * torch.exp(-problem.loss(self.at[:, None, None, None]))
        return Points(self.at, likely / likely.sum())

    def distance(self, other: Points) -> float:
        """Wasserstein-1."""
        return float(wasserstein_distance(self.at, other.at, self.weights, other.weights))


def drawn_by_grid(prior: Exact, steps: int, points: int = 1201, width: float = 6.0) -> Points:
    """What the plain sampler draws on a line: its density carried from step to step on a grid.

    A sampler of few steps draws a law of its own, a little narrower than the prior; particle methods reweigh that one.
    """
    levels = Solver.of(prior.scheduler, steps).levels
    x = torch.linspace(-width, width, points, dtype=torch.float64)
    weights = torch.exp(-(x**2) / 2)
    for level, after in zip(levels[:-1], levels[1:]):
        x0 = prior.x0(x[:, None], level.alpha, level.sigma)[:, 0]
        mean = level.ancestral_mean(after, x0, (x - level.alpha * x0) / level.sigma)
        std = level.step_std(after)
        if std == 0:
            return Points(mean, weights / weights.sum())
        kernel = torch.exp(-((x[:, None] - mean) ** 2) / (2 * std**2))
        weights = (kernel / kernel.sum(0)) @ weights
    return Points(x, weights / weights.sum())


@dataclass(frozen=True)
class Watched(Guidance):
    """A guidance that shows all its particles at the end, `(pictures, count)`, with their weights.

    The law of the one drawn by weight is that of all by weight: to average over all of them has the same expectation,
    and far less noise.
    """

    seen: list = field(default_factory=list)

    def begin(self, solver, decode, seeds):
        run = super().begin(solver, decode, seeds)
        finish = run.finish

        def watched(x):
            chosen = finish(x)
            weights = torch.ones(len(x), 1) if run._population is None else run._population.weights
            self.seen.append(Points(x.double().view(self.candidates, -1).T, weights.double()))
            return chosen

        run.finish = watched
        return run


def watched(guidance: Guidance) -> Watched:
    """The same guidance, watched."""
    return Watched(**{f.name: getattr(guidance, f.name) for f in dataclasses.fields(guidance)})


@dataclass(frozen=True)
class Particles:
    """What runs of `count` particles gave: all particles by weight, the one `drawn` in each run, and a `figure`: the
    mean of a function of the particle drawn, taken by weight, with its standard error over the runs."""

    count: int
    all: Points
    drawn: torch.Tensor
    figure: float
    error: float


def particles(recipe: str, problem: Problem, count: int, runs: int, function=lambda x: x, **options) -> Particles:
    """Independent runs of a particle method, on a line; other counts run on other seeds."""
    if recipe != "best_of_n":  # which knows no weights
        options = dict(sharpness=1.0) | options
    guidance = watched(recipes.get(recipe)(problem.loss, count=count, **options))
    result = sample(
        problem.prior.denoiser(1), guidance, steps=STEPS, seeds=range(100_000 * count, 100_000 * count + runs)
    )
    drawn, seen = result.samples.flatten().double(), guidance.seen[0]
    if recipe == "best_of_n":
        seen = Points(drawn[:, None], torch.ones(runs, 1, dtype=torch.float64))
    values = (seen.weights * function(seen.at)).sum(1)
    points = Points(seen.at.flatten(), seen.weights.flatten() / runs)
    return Particles(count, points, drawn, values.mean().item(), values.std().item() / runs**0.5)


def slope(counts: Sequence[int], biases: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """The slope of `log |bias|` in `log N`, and its standard error; each point weighs as `(bias / error)^2`."""
    x = torch.tensor([math.log(n) for n in counts], dtype=torch.float64)
    y = torch.tensor([math.log(abs(b)) for b in biases], dtype=torch.float64)
    w = torch.tensor([(b / e) ** 2 for b, e in zip(biases, errors)], dtype=torch.float64)
    x, y = x - (w * x).sum() / w.sum(), y - (w * y).sum() / w.sum()
    return ((w * x * y).sum() / (w * x * x).sum()).item(), (1 / (w * x * x).sum()).sqrt().item()


# ---- the report --------------------------------------------------------------------------------------------------


def _exact(law: GaussianMixture, count: int) -> torch.Tensor:
    """`count` vectors of a mixture itself."""
    source = torch.Generator().manual_seed(0)
    part = torch.multinomial(law.weights, count, replacement=True, generator=source)
    noise = torch.randn(count, law.dimension, dtype=torch.float64, generator=source)
    means = torch.stack([one.mean for one in law.parts])
    roots = torch.stack([torch.linalg.cholesky(one.covariance) for one in law.parts])
    return means[part] + (roots[part] @ noise[..., None])[..., 0]


def _drawn(problem: Problem, steps: int, count: int, only: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The methods' names and what each draws: 10,000 vectors, or `count` where it sees one at a time."""
    for name, method in METHODS.items():
        if not only or name.split(",")[0] in only:
            yield name, draw(method, problem, steps, count if method.alone else 5 * VECTORS)


def gaussian_table(problem: Problem, steps: int, count: int, only: Sequence[str] = ()) -> list[str]:
    """Every method on a Gaussian prior: mean and spread drawn, and distances from the posterior."""
    law = problem.posterior
    lines = [
        "| method | mean of x1, x2 | std of x1, x2 | covariance | error of mean | of covariance | W2 | W2 by its law "
        "| at 1000 steps |",
        "|" + "---|" * 9,
    ]

    def add(name: str, mean: torch.Tensor, covariance: torch.Tensor, figures: Sequence[float] = ()) -> None:
        std = covariance.diagonal().clamp_min(0).sqrt()
        cells = [f"{m[0]:.3f}, {m[1]:.3f}" for m in (mean, std)] + [f"{covariance[0, 1]:.3f}"]
        cells += [f"{value:.3f}" for value in figures] + [""] * (5 - len(figures))
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)

    add("**the posterior**", law.mean, law.covariance)
    for name, x in _drawn(problem, steps, count, only):
        mean, covariance = x.mean(0), x.T.cov()
        figures = [(mean - law.mean).norm(), (covariance - law.covariance).norm(), wasserstein(mean, covariance, law)]
        if METHODS[name].step is not None:
            figures += [wasserstein(*expected(METHODS[name], problem, n), law) for n in (steps, 1000)]
        add(name, mean, covariance, figures)
    return lines


def mixture_table(problem: Problem, steps: int, count: int, only: Sequence[str] = ()) -> list[str]:
    """Every method on the two modes: the share of each, and distances of both coordinates from the posterior's."""
    truth = _exact(problem.posterior, 200_000)
    lines = ["| method | share of the right mode | std of x1, x2 | W1 of x1 | W1 of x2 |", "|" + "---|" * 5]
    for name, x in [("**the posterior**", truth), *_drawn(problem, steps, count, only)]:
        distances = [wasserstein_distance(x[:, i], truth[:, i]) for i in (0, 1)]
        lines.append(
            f"| {name} | {right(x[:, 1]).mean():.3f} | {x[:, 0].std():.3f}, {x[:, 1].std():.3f} | "
            f"{distances[0]:.3f} | {distances[1]:.3f} |"
        )
        print(lines[-1], flush=True)
    return lines


def right(x: torch.Tensor) -> torch.Tensor:
    """Whether a point lies in the right mode."""
    return (x > 0).double()


@dataclass(frozen=True)
class Curve:
    """A particle method on a line, at several counts, against what it should converge to."""

    recipe: str
    label: str
    target: float
    law: Points
    runs: list[Particles]

    def slope(self, least: int = 4) -> tuple[float, float]:
        """Of the bias in N, from `least` particles on."""
        kept = [run for run in self.runs if run.count >= least]
        return slope([r.count for r in kept], [r.figure - self.target for r in kept], [r.error for r in kept])


def converge(recipe: str, problem: Problem, label: str, counts, total: int, function=lambda x: x) -> Curve:
    """`total` particles at each count, in as many runs as that makes."""
    law = drawn_by_grid(problem.prior, STEPS).given(problem)
    target, runs = law.mean(function), []
    for count in counts:
        runs.append(particles(recipe, problem, count, total // count, function))
        print(f"{recipe}, {label}, N = {count}: {runs[-1].figure - target:+.4f} +- {runs[-1].error:.4f}", flush=True)
    return Curve(recipe, label, target, law, runs)


def curve_table(curves: list[Curve]) -> list[str]:
    """Bias at each count, its slope, and Wasserstein-1 at the ends."""
    header = [f"N = {n}" for n in COUNTS] + ["slope from N = 4", "W1, least and most N"]
    lines = [f"| method | error of | {' | '.join(header)} |", "|" + "---|" * (len(header) + 2)]
    for curve in curves:
        biases = {run.count: f"{run.figure - curve.target:+.4f} ± {run.error:.4f}" for run in curve.runs}
        fitted = "none" if curve.recipe == "best_of_n" else "{:.2f} ± {:.2f}".format(*curve.slope())
        ends = ", ".join(f"{run.all.distance(curve.law):.3f}" for run in (curve.runs[0], curve.runs[-1]))
        cells = [curve.recipe, curve.label, *(biases.get(n, "") for n in COUNTS), fitted, ends]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


LOOKS = {"fk_steering": ("#0072b2", "o"), "tds": ("#d55e00", "s"), "best_of_n": ("#777777", "x")}
MEAN, SHARE, SHARP, MILD = "mean", "share of the right mode", "mean, sharp", "mean, mild"
LINES = {MEAN: "-", SHARE: "-", SHARP: "--", MILD: ":"}


def plot(curves: list[Curve], path: Path) -> None:
    """Bias against the number of particles, and the laws drawn on the mixture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 5.2), layout="constrained")
    for curve in curves:
        axis, (colour, mark) = axes[1 if curve.label == SHARE else 0], LOOKS[curve.recipe]
        fitted = "no limit" if curve.recipe == "best_of_n" else f"slope {curve.slope()[0]:.2f}"
        axis.errorbar(
            [run.count for run in curve.runs],
            [abs(run.figure - curve.target) for run in curve.runs],
            [2 * run.error for run in curve.runs],
            color=colour,
            marker=mark,
            linestyle=LINES[curve.label],
            alpha=1.0 if LINES[curve.label] == "-" else 0.5,
            label=f"{curve.recipe}{curve.label.removeprefix('mean') if axis is axes[0] else ''}: {fitted}",
        )
    axes[0].set(title="N(0, 1), y = 2 ± 1 (sharp: ± 0.5, mild: ± 1.41)", ylabel="|error of the mean|")
    axes[1].set(title="two modes, y = 1 ± 0.9", ylabel="|error of the right mode's share|")
    for axis in axes[:2]:
        axis.plot(COUNTS, [0.6 / n for n in COUNTS], color="black", linewidth=0.8, label="1/N")
        axis.set(xscale="log", yscale="log", xlabel="particles N", ylim=(2e-3, 3))
        axis.set_xticks(COUNTS, [str(n) for n in COUNTS])
        axis.minorticks_off()
    edges = torch.linspace(-3, 3, 49, dtype=torch.float64)
    modes = [curve for curve in curves if curve.label == SHARE]
    histogram = dict(bins=edges, density=True)
    axes[2].hist(modes[0].law.at, weights=modes[0].law.weights, color="#dddddd", label="what is aimed at", **histogram)
    for curve in modes:
        law, look = curve.runs[-1].all, dict(histtype="step", color=LOOKS[curve.recipe][0])
        label = f"{curve.recipe}, N = {curve.runs[-1].count}"
        axes[2].hist(law.at, weights=law.weights, label=label, **histogram, **look)
    axes[2].set(title="two modes: what is drawn", xlabel="x", ylabel="density", ylim=(0, 1.5))
    for axis in axes:
        axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure everything anew, which takes minutes; write the tables and the plot. `only` some recipes: print them."""
    started = time.perf_counter()
    steps, count, total = (50, 100, 2_000) if quick else (100, 300, 24_000)
    problems = {"N(m, I)": white(), "N(m, C), correlation 0.8": correlated()}
    tables = {name: gaussian_table(problem, steps, count, only) for name, problem in problems.items()}
    modes = mixture_table(two_modes(), steps, count, only)
    counts, curves = COUNTS[::2] if quick else COUNTS, []
    for recipe in ("fk_steering", "tds", "best_of_n"):
        if only and recipe not in only:
            continue
        part = total // 4 if recipe == "best_of_n" else total
        curves.append(converge(recipe, bell(), MEAN, counts, part))
        curves.append(converge(recipe, two_bells(), SHARE, counts, part, right))
        if recipe != "best_of_n":
            curves.append(converge(recipe, bell(0.5), SHARP, COUNTS[::2], part // 2))
        if recipe == "tds":
            curves.append(converge(recipe, bell(2**0.5), MILD, counts, part))
    if only:
        return
    name = "posteriors-quick" if quick else "posteriors"
    plot(curves, RESULTS / f"{name}.png")
    (RESULTS / f"{name}.md").write_text(_report(tables, modes, curves, steps, name))
    print(f"{time.perf_counter() - started:.0f} s")


def _report(tables: dict[str, list[str]], modes: list[str], curves: list[Curve], steps: int, name: str) -> str:
    lines = [
        "# Against closed forms: does a method that claims a posterior draw it?",
        "",
        "`python -m benchmarks run posteriors`",
        "",
        "No network: the denoiser of a Gaussian or of a mixture is exact. Of two coordinates the first is measured, "
        f"y = x1 + sigma n; DDIM with eta = 1, {steps} steps (flowdps: the flow model's Euler steps), 10,000 vectors "
        "(300 for the methods that weigh one vector at a time). W2: Wasserstein-2 between the Gaussians of the same "
        "means and covariances. `W2 by its law`: the same from the method's own affine steps, carried out on mean and "
        "covariance, without Monte Carlo; the row of the posterior's own denoiser is what the solver's steps cost by "
        "themselves. The loss of dps, lgd_mc, red_diff and flowdps is one distance of 2000 vectors together.",
        "",
        "What is stated of each:",
        "",
        *(f"- {label}: {method.bias}." for label, method in METHODS.items()),
        "",
    ]
    for label, table in tables.items():
        lines += [f"## {label}, y = 1.5, sigma = 0.3", "", *table, ""]
    law = two_modes()
    lines += [
        f"## Two modes at (-1, -1) and (1, 1), std 0.3, shares 0.7 and 0.3; y = {law.y}, sigma = {law.sigma}",
        "",
        *modes,
        "",
        f"## Particles, on a line, {STEPS} steps, sharpness 1, one drawn",
        "",
        f"![bias against the number of particles]({name}.png)",
        "",
        "The law of the particle drawn, against the law of the plain sampler (by a grid) times the likelihood; ± is "
        "one standard error over the runs. The theory is a bias of order 1/N (Del Moral 2004), a slope of -1: "
        "fk_steering has it from the start, tds comes to it more slowly, as its likelihood of x0 is sharper at high "
        "noise than p(y | x_t), and few particles carry the weight. Sharp: sigma = 0.5 in place of 1, where 64 "
        "particles are not yet in the range of 1/N (fk_steering's bias changes its sign on the way); mild: sigma = "
        "1.41. best_of_n does not converge to the posterior but to the least loss.",
        "",
        *curve_table(curves),
        "",
    ]
    return "\n".join(lines)
