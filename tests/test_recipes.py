"""Every recipe: its published update by hand in float64, its corners, and its manners with every solver."""

from __future__ import annotations

import math
import warnings

import diffusers
import pytest
import torch
from lossguide.guidance import Guidance, recipes
from lossguide.guidance.guidance import Inner
from lossguide.guidance.particles import Particles
from lossguide.guidance.steps import Constant, NoiseScaled, PolyakToFloor
from lossguide.losses import Measurement, operators
from lossguide.samplers import Solver, denoiser, sample
from lossguide.samplers.random import generators, randn
from lossguide.samplers.time_travel import TimeTravel
from models import identity, vp_scheduler

LINEAR = ("pigdm", "diffpir", "ddnm")
REFRESHING = ("red_diff", "flowdps", "fk_steering")  # what they draw themselves stays when nothing else moves


# ---- one step by hand -------------------------------------------------------------------------------------------

SHAPE, STEP = (1, 2, 3), 4
MATRIX = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
WEIGHTS = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / 3
DRAWN = torch.randn(1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
SAMPLE = torch.randn(1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def operator(image):
    return image.flatten(1) @ MATRIX.to(image).T


def distance(image):
    return (TARGET.to(image) - operator(image)).norm(dim=1)


def model(x):
    return torch.tanh(x.flatten(1) @ WEIGHTS.T).view_as(x) + 0.5 * x


class Hand:
    """The quantities of METHODS at one step of a DDIM run with eta = 1, computed anew."""

    def __init__(self):
        scheduler = vp_scheduler()
        scheduler.set_timesteps(10)
        bar = [scheduler.alphas_cumprod[t].double() for t in scheduler.timesteps] + [
            torch.ones((), dtype=torch.float64)
        ]
        self.bars = bar
        self.a, self.s = bar[STEP].sqrt(), (1 - bar[STEP]).sqrt()
        self.a1, self.s1 = bar[STEP + 1].sqrt(), (1 - bar[STEP + 1]).sqrt()
        self.std = self.s1 / self.s * (1 - bar[STEP] / bar[STEP + 1]).sqrt()
        self.e = model(SAMPLE)
        self.x0 = self.clean(SAMPLE)
        leaf = SAMPLE.clone().requires_grad_()
        self.gx = torch.autograd.grad(distance(self.clean(leaf)).sum(), leaf)[0]
        self.g0 = self.slope(self.x0)

    def clean(self, x):
        return (x - self.s * model(x)) / self.a

    def slope(self, x0, loss=distance):
        leaf = x0.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(leaf).sum(), leaf)[0]

    def ddim(self, x0, e, noise=DRAWN):
        return self.a1 * x0 + (self.s1**2 - self.std**2).sqrt() * e + self.std * noise

    def with_noise(self, e):
        return self.ddim((SAMPLE - self.s * e) / self.a, e)

    def schedule(self, kind):
        ratios = [self.bars[i] / self.bars[i + 1] for i in range(10)]
        ratios = ratios if kind == "increase" else [1 - r for r in ratios]
        return ratios[STEP] * 10 / sum(ratios)


def library(guidance: Guidance, visits: int = 1) -> torch.Tensor:
    """The library's step from SAMPLE, with the same solver and noise."""
    hand, solver = Hand(), Solver.of(vp_scheduler(), 10)
    run = guidance.replace(time_travel=None).begin(solver, identity, [0])
    visit = next(v for v in run.visits if v.step == STEP)

    def solve(prediction, x):
        x0 = (x - hand.s * prediction) / hand.a
        return hand.a1 * x0 + hand.s1 * prediction if guidance.remix else hand.ddim(x0, prediction)

    for _ in range(visits):
        leaf = SAMPLE.clone().requires_grad_(run.needs_graph(visit))
        with torch.set_grad_enabled(run.needs_graph(visit)):
            prediction = model(leaf)
        moved = run.step(leaf, prediction, visit, solve)
    return moved


def blurred(hand, copies, spread):
    """The noise of smoothing's copies, from guidance's own stream."""
    sources = generators([0], "guidance")
    return spread * torch.stack([randn(SHAPE, sources).double() for _ in range(copies)])


def log_mean(x0, noise):
    return -torch.stack([-distance(x0 + n) for n in noise]).logsumexp(0) + math.log(len(noise))


def through(loss, hand):
    leaf = SAMPLE.clone().requires_grad_()
    return torch.autograd.grad(loss(hand.clean(leaf)).sum(), leaf)[0]


def rms(x):
    return x.square().mean().sqrt()


def by_hand(name: str) -> tuple[Guidance, torch.Tensor]:
    """A recipe, and what its paper makes of the step."""
    h = Hand()
    plain = h.ddim(h.x0, h.e)
    if name == "dps":
        return recipes.dps(distance, strength=0.3), plain - 0.3 * h.gx
    if name == "shen":
        guidance = recipes.shen(distance, augment=None)
        return guidance, plain - 0.002 * h.e.norm() / h.gx.norm() ** 2 * h.gx
    if name == "lgd_mc":
        noise = blurred(h, 10, h.s)
        return recipes.lgd_mc(distance), plain - through(lambda x0: log_mean(x0, noise), h)
    if name == "freedom":  # c1 as in the authors' code, from the cumulated alphas
        now, then = h.bars[STEP], h.bars[STEP + 1]
        c1 = then.sqrt() * (1 - now / then) / (1 - now)
        return recipes.freedom(distance), plain - 0.02 * rms(h.e) / rms(h.gx) * h.s / h.a * c1 * h.gx
    if name == "freedom rms":
        return recipes.freedom(distance, rule="rms"), plain - 0.02 * rms(h.e) / rms(h.gx) * h.s / h.a * h.gx
    if name == "freedom sqrt-alpha":
        return recipes.freedom(distance, rule="sqrt-alpha"), plain - 0.2 * h.a * h.gx
    if name == "universal":
        delta = torch.zeros_like(h.x0)
        for _ in range(3):
            delta = delta - 0.05 * h.slope(h.x0 + delta)
        e = h.e + 2.0 * h.s * h.gx - h.a / h.s * delta
        return recipes.universal(distance, weight=2.0, inner=3, inner_size=0.05), h.with_noise(e)
    if name == "score":
        return recipes.score(distance, strength=0.7), h.with_noise(h.e + 0.7 * h.s * h.gx)
    if name == "mpgd":
        return recipes.mpgd(distance), h.ddim(h.x0 - 0.02 * rms(h.e) / rms(h.g0) * h.g0, h.e)
    if name == "mpgd projected":
        moved = h.x0 - 0.02 * rms(h.e) / rms(h.g0) * h.g0
        return recipes.mpgd(distance, project=lambda x0: 0.9 * x0), h.ddim(0.9 * moved, h.e)
    if name == "tfg":
        noise = blurred(h, 4, 0.1 * h.s)
        d_t = 2.0 * h.schedule("increase") * through(lambda x0: log_mean(x0, noise), h)
        x0 = h.x0
        for _ in range(4):
            x0 = x0 - 0.3 * h.schedule("decrease") * h.slope(x0, lambda z: log_mean(z, noise))
        alpha = h.bars[STEP] / h.bars[STEP + 1]
        guidance = recipes.tfg(distance, rho=2.0, mu=0.3, sigma=0.1, mu_schedule="decrease")
        return guidance, plain - d_t / alpha.sqrt() + h.a1 * (x0 - h.x0)
    if name == "dsg":
        radius = math.sqrt(6) * h.std
        wanted = -radius * h.gx / h.gx.norm()
        mixed = h.std * DRAWN + 0.1 * (wanted - h.std * DRAWN)
        return recipes.dsg(distance), plain - h.std * DRAWN + radius * mixed / mixed.norm()
    if name == "adam_dps":  # the first step's moments are the gradient and its square
        step = h.gx / (h.gx.abs() + 1e-8)
        return recipes.adam_dps(distance), plain - 0.03 * step / (h.bars[STEP] / h.bars[STEP + 1]).sqrt()
    if name == "pigdm":
        sigma, variance = 0.1, h.s**2
        inverse = torch.linalg.inv(variance * MATRIX @ MATRIX.T + sigma**2 * torch.eye(4, dtype=torch.float64))
        v = variance * (MATRIX.T @ inverse @ (TARGET - operator(h.x0)).T).T.view_as(h.x0)
        step = through(lambda x0: (v * x0).flatten(1).sum(1), h)
        return recipes.pigdm(Measurement(operator, TARGET, sigma)), plain + h.a * h.a1 * step
    if name == "diffpir":
        sigma, variance = 0.1, (h.s / h.a) ** 2 / 1.75
        normal = MATRIX.T @ MATRIX / sigma**2 + torch.eye(6, dtype=torch.float64) / variance
        right = MATRIX.T @ TARGET.T / sigma**2 + h.x0.flatten(1).T / variance
        x0 = torch.linalg.solve(normal, right).T.view_as(h.x0)
        return recipes.diffpir(Measurement(operator, TARGET, sigma)), h.ddim(x0, (SAMPLE - h.a * x0) / h.s)
    if name == "ddnm":
        inverse = torch.linalg.pinv(MATRIX)
        x0 = h.x0 + ((TARGET - operator(h.x0)) @ inverse.T).view_as(h.x0)
        return recipes.ddnm(Measurement(operator, TARGET)), h.ddim(x0, (SAMPLE - h.a * x0) / h.s)
    if name == "flowchef":
        return recipes.flowchef(distance), plain - 0.5 * h.g0
    if name == "flowdps":
        x0 = h.x0
        for _ in range(3):
            x0 = x0 - 0.1 * h.slope(x0)
        x0 = h.x0 + h.s / (h.a + h.s) * (x0 - h.x0)
        share = h.a1 / (h.a1 + h.s1)
        fresh = randn(SHAPE, generators([0], "guidance")).double()
        return recipes.flowdps(distance, size=0.1), h.a1 * x0 + h.s1 * ((1 - share).sqrt() * h.e + share.sqrt() * fresh)
    if name == "tds":
        beta = 1 - h.bars[STEP] / h.bars[STEP + 1]
        shift = beta / (1 - beta).sqrt() * 10 * h.gx
        return recipes.tds(distance, count=1), plain - shift
    if name == "noise-scaled":
        guidance = Guidance(distance, rule=NoiseScaled(0.2))
        return guidance, plain - 0.2 * math.sqrt(6) * h.std * h.gx / h.gx.norm()
    if name == "polyak":
        loss = distance(h.x0)
        guidance = Guidance(distance, rule=PolyakToFloor(target=0.5))
        return guidance, plain - (loss - 0.5) / h.gx.norm() ** 2 * h.gx
    if name == "auto, floor known":  # three Polyak steps at x0, pulled back, 1.3 times as long as x0 needs
        x0 = h.x0
        for _ in range(3):
            g = h.slope(x0)
            x0 = x0 - (distance(x0) - 0.1 * 2).clamp_min(0) / g.norm() ** 2 * g
        goal = h.x0 - x0
        g = through(lambda z: (goal * z).flatten(1).sum(1), h)
        return recipes.auto(Measurement(operator, TARGET, 0.1)), plain - 1.3 * goal.norm() ** 2 / g.norm() ** 2 * g
    raise AssertionError(name)


BY_HAND = (
    "dps", "shen", "lgd_mc", "freedom", "freedom rms", "freedom sqrt-alpha", "universal", "score", "mpgd",
    "mpgd projected", "tfg", "dsg", "adam_dps", "pigdm", "diffpir", "ddnm", "flowchef", "flowdps", "tds",
    "noise-scaled", "polyak", "auto, floor known",
)  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_one_step_is_the_published_one(name):
    guidance, expected = by_hand(name)
    torch.testing.assert_close(library(guidance), expected, rtol=0, atol=1e-10)
    assert (expected - Hand().ddim(Hand().x0, Hand().e)).abs().max() > 1e-4, "the step does something"


def test_adams_second_step_is_bias_corrected():
    h = Hand()
    first, second = 0.5 * h.gx, 0.4 * h.gx**2
    first, second = (0.5 * first + 0.5 * h.gx) / (1 - 0.5**2), (0.6 * second + 0.4 * h.gx**2) / (1 - 0.6**2)
    step = 0.03 * first / (second.sqrt() + 1e-8) / (h.bars[STEP] / h.bars[STEP + 1]).sqrt()
    torch.testing.assert_close(
        library(recipes.adam_dps(distance), visits=2), h.ddim(h.x0, h.e) - step, rtol=0, atol=1e-10
    )


def test_red_diffs_second_step():
    """Begun in the middle, the anchor starts at x0, where the prior does not pull; after one step of Adam it does."""
    h, sources = Hand(), generators([0], "guidance")
    first = distance(h.x0) * h.slope(h.x0)
    anchor = h.x0 - 0.1 * first / (first.abs() + 1e-8)
    drawn = (SAMPLE - h.a * anchor) / h.s
    second = distance(anchor) * h.slope(anchor) + 0.25 * h.s / h.a * (h.e - drawn)
    m = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    v = (0.99 * 0.01 * first**2 + 0.01 * second**2) / (1 - 0.99**2)
    anchor = anchor - 0.1 * m / (v.sqrt() + 1e-8)
    fresh = [randn(SHAPE, sources).double() for _ in range(2)][1]
    torch.testing.assert_close(
        library(recipes.red_diff(distance), visits=2), h.a1 * anchor + h.s1 * fresh, rtol=0, atol=1e-10
    )


def test_corners_of_tfg():
    """DPS, LGD, MPGD and UGD are TFG with a part left out."""
    h = Hand()
    ratio = float((h.bars[STEP] / h.bars[STEP + 1]).sqrt())
    constant = dict(rho_schedule="constant", mu_schedule="constant")
    pairs = {
        "dps": (recipes.tfg(distance, rho=0.3, mu=0, sigma=0, **constant), recipes.dps(distance, strength=0.3 / ratio)),
        "lgd": (
            recipes.tfg(distance, rho=1.0, mu=0, sigma=1.0, copies=10, **constant),
            recipes.lgd_mc(distance, strength=1 / ratio),
        ),
        "mpgd": (
            recipes.tfg(distance, rho=0, mu=0.3, sigma=0, inner=1, **constant),
            recipes.mpgd(distance, rule=Constant(0.3)),
        ),
        "ugd, forward": (
            recipes.tfg(distance, rho=0.3, mu=0, sigma=0, **constant),
            # the score form moves the step's end by a'/a (s^2 - (a s'/a')^2) per unit of w g
            recipes.universal(
                distance, weight=float(0.3 / (h.s**2 - (h.a * h.s1 / h.a1) ** 2)), recur=1
            ),
        ),
        "ugd, backward": (
            recipes.tfg(distance, rho=0, mu=0.05, sigma=0, inner=3, **constant),
            recipes.universal(distance, weight=0, inner=3, inner_size=0.05, recur=1).replace(
                inner=Inner(3, Constant(0.05))
            ),
        ),
    }  # fmt: skip
    for name, (corner, method) in pairs.items():
        torch.testing.assert_close(library(corner), library(method), rtol=0, atol=1e-12, msg=name)


def test_a_share_of_the_steps_goes_through_the_denoiser():
    calls = []

    def counted(x, t):
        calls.append(torch.is_grad_enabled() and x.requires_grad)
        return soft(x, t)

    guided = denoiser(counted, vp_scheduler(), shape=(3, 4, 4))
    sample(guided, recipes.dps(squares, through_share=0.4), steps=10, seeds=[0])
    assert calls == [True, False, True, False, False] * 2
    calls.clear()
    sample(guided, recipes.dps(squares, through_share=0.25), steps=8, seeds=[0])
    assert calls == [True, False, False, False] * 2
    calls.clear()
    sample(guided, recipes.dps(squares, through_share=0.4, start=0.5), steps=10, seeds=[0])  # all that can be paid
    assert calls == [False] * 5 + [True, True, True, True, False]


def test_between_steps_through_the_denoiser_the_gradient_is_that_at_x0():
    h = Hand()
    moved = library(recipes.dps(distance, through_share=0.3))  # its first step goes through, this one does not
    torch.testing.assert_close(moved, h.ddim(h.x0, h.e) - h.g0, rtol=0, atol=1e-10)
    moved = library(recipes.dps(distance, through_share=0.3, edit_between="mean"))  # x0 moves, the noise stays
    torch.testing.assert_close(moved, h.ddim(h.x0 - h.g0, h.e), rtol=0, atol=1e-10)


def test_what_auto_may_cost_is_what_it_takes():
    calls = []

    def counted(x, t):
        calls.append(2 if torch.is_grad_enabled() and x.requires_grad else 1)
        return soft(x, t)

    model = denoiser(counted, vp_scheduler(), shape=(3, 4, 4))
    for loss in (squares, Measurement(operators.SuperResolution(2), torch.zeros(3, 2, 2), 0.1)):
        for cost, passes in {1: 20, 1.3: 25, 1.6: 30, 2.5: 40}.items():
            calls.clear()
            sample(model, recipes.auto(loss, cost=cost, stop=1.0, augment=None), steps=20, seeds=[0])
            assert sum(calls) == passes and len(calls) == 20
    assert recipes.auto(squares, cost=1).edit == "shift" and recipes.auto(loss, cost=1).edit == "mean"
    for cost in (0.5, math.nan):
        with pytest.raises(ValueError, match="cost is at least 1"):
            recipes.auto(squares, cost=cost)


@pytest.mark.parametrize(
    ("cost", "changes"),
    [
        (1, dict(through="denoiser")),
        (1.3, dict(through_share=0.5)),
        (1.3, dict(time_travel=TimeTravel(2))),
        (1.3, dict(particles=Particles(4))),
    ],
)
def test_what_costs_more_than_auto_may_is_refused(cost, changes):
    with pytest.raises(ValueError, match=f"does not pay {next(iter(changes))}"):
        recipes.auto(squares, cost=cost, **changes)
    recipes.auto(squares, **changes)
    recipes.auto(squares, cost=cost, through="x0", time_travel=None)


# ---- every recipe with every solver -----------------------------------------------------------------------------

SOLVERS = {
    "ddim": lambda: vp_scheduler(),
    "ddpm": lambda: diffusers.DDPMScheduler(timestep_spacing="trailing", clip_sample=False),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "euler-ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "dpm++ 2m": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm++ 2m sde": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "dpm++ single": lambda: diffusers.DPMSolverSinglestepScheduler(lower_order_final=True),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
    "deis": lambda: diffusers.DEISMultistepScheduler(),
    "lms": lambda: diffusers.LMSDiscreteScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "lcm": lambda: diffusers.LCMScheduler(original_inference_steps=50),
    "edm euler": lambda: diffusers.EDMEulerScheduler(),
    "edm dpm++": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
    "flow euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
}
RESTARTING = ("heun", "unipc", "flow heun")
DRAWING = ("ddim", "ddpm", "euler-ancestral", "dpm++ 2m sde", "lcm")
ANCESTRAL = ("ddim", "ddpm", "euler-ancestral")
STEPS = 5


def soft(x, t):
    """A small denoiser of no particular kind, that mixes a sample's own pixels only."""
    return 0.3 * torch.tanh(x + 0.5 * x.roll(1, -1)) + 0.1 * x.flatten(1).mean(1).view(-1, 1, 1, 1)


def squares(image):
    return (image - 0.8).square().flatten(1).mean(1)


def loss_for(recipe: str, factor: float = 1.0):
    """A loss that suits the recipe; `factor` 0 or NaN spoils its gradient."""
    if recipe in LINEAR:
        mask = torch.ones(4, 4)
        mask[:, 2:] = 0
        inpaint = operators.Inpaint(mask)
        return Measurement(lambda image: factor * inpaint(image), factor * inpaint(torch.full((1, 3, 4, 4), 0.8)), 0.1)
    return lambda image: factor * squares(image)


def drawn(solver: str, guidance: Guidance | None, seeds=(3, 4)):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return sample(denoiser(soft, SOLVERS[solver](), shape=(3, 4, 4)), guidance, steps=STEPS, seeds=seeds)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("recipe", recipes.available())
def test_manners(recipe, solver):
    """Strength 0 is bitwise the plain sampler; a sample is the same in any batch; bad gradients move nothing."""
    make = recipes.get(recipe)
    plain = drawn(solver, None)
    zero = drawn(solver, make(loss_for(recipe), strength=0.0))
    assert torch.equal(zero.samples, plain.samples)
    refused = {"dsg": solver not in DRAWING, "tds": solver not in ANCESTRAL, "flowdps": solver in RESTARTING}
    if refused.get(recipe, False):
        with pytest.raises(ValueError, match="draws none|ancestral step|starts from the sample"):
            drawn(solver, make(loss_for(recipe)))
        return
    guided = drawn(solver, make(loss_for(recipe)), seeds=(4, 3, 9))
    alone = drawn(solver, make(loss_for(recipe)), seeds=(3,))
    assert guided.samples.isfinite().all()
    scale = guided.samples.abs().max().clamp_min(1)
    torch.testing.assert_close(guided.samples[1:2] / scale, alone.samples / scale, rtol=0, atol=1e-5)
    for factor in (0.0, float("nan")):
        still = drawn(solver, make(loss_for(recipe, factor)).replace(time_travel=None))
        if recipe in REFRESHING or recipe == "tds":
            assert still.samples.isfinite().all()
        else:
            assert torch.equal(still.samples, plain.samples)


@pytest.mark.parametrize("recipe", LINEAR)
def test_linear_recipes_refuse_other_losses(recipe):
    with pytest.raises(ValueError, match="one Measurement"):
        recipes.get(recipe)(squares)


def test_particles_are_kept_apart_and_the_best_is_kept():
    plain = drawn("ddim", None, seeds=(1, 2, 3, 4))
    best = drawn("ddim", recipes.best_of_n(squares, count=8), seeds=(1, 2, 3, 4))
    assert best.samples.shape == plain.samples.shape and best.record.losses().shape[1] == 4
    values = [squares(result.samples / 2 + 0.5) for result in (best, plain)]
    assert (values[0] <= values[1]).all(), "the seed's own sample is among the candidates"
    assert values[0].mean() < values[1].mean()


def test_particles_follow_their_own_pictures_targets():
    """Losses with one target per picture: each picture's candidates are held to its own."""
    target = torch.tensor([0.0, 0.3, 0.6, 0.9])

    def to_target(image):
        wanted = target.repeat(len(image) // len(target)) if len(image) > 1 else target[:1]
        return (image.flatten(1).mean(1) - wanted).abs()

    plain = drawn("ddim", None, seeds=(1, 2, 3, 4)).samples / 2 + 0.5
    for guidance in (recipes.best_of_n(to_target, count=6), recipes.fk_steering(to_target, count=6, sharpness=500.0)):
        kept = drawn("ddim", guidance, seeds=(1, 2, 3, 4)).samples / 2 + 0.5
        assert (to_target(kept) <= to_target(plain)).sum() >= 3 and to_target(kept).mean() < to_target(plain).mean()


def test_bad_inner_gradients_are_counted_and_projection_moves_nothing_alone():
    spoilt = recipes.auto(loss_for("pigdm", float("nan")), time_travel=None)
    assert spoilt.toward is not None and drawn("ddim", spoilt).record.nonfinite.tolist() == [STEPS, STEPS]
    with pytest.raises(FloatingPointError):
        drawn("ddim", spoilt.replace(raise_on_nonfinite=True))
    plain = drawn("ddim", None).samples
    assert torch.equal(drawn("ddim", recipes.mpgd(loss_for("mpgd", 0.0), project=lambda x0: 0.5 * x0)).samples, plain)


def test_remixed_noise_keeps_the_level_after_a_score_edit():
    """White data, DDIM with eta = 0, its noise renewed: x_t keeps its level's spread, and the mean of ddnm's x0."""
    y = torch.full((1, 3, 16, 16), 0.9)
    measured = Measurement(lambda image: image, y, 0.0)

    def white(x, t):
        return (1 - vp_scheduler().alphas_cumprod[t]).sqrt() * x

    seen = {}

    class Watched(torch.nn.Module):
        def forward(self, x, t):
            seen[int(t)] = x
            return white(x, t)

    model = denoiser(Watched(), vp_scheduler(), shape=(3, 16, 16), decode=identity)
    sample(model, recipes.ddnm(measured, remix=1.0), steps=10, seeds=range(4), eta=0.0)
    for t, x in list(seen.items())[2:]:
        a = vp_scheduler().alphas_cumprod[t].sqrt()
        assert x.mean().item() == pytest.approx(0.9 * a.item(), abs=0.05)
        assert x.std().item() == pytest.approx((1 - a**2).sqrt().item(), rel=0.05)


def test_strength_turns_a_sphere_further_and_keeps_its_length():
    guided = [
        drawn("ddim", g).samples
        for g in (recipes.dsg(squares, strength=4.0), recipes.dsg(squares).replace(strength=4.0))
    ]
    assert torch.equal(*guided)


@pytest.mark.parametrize(
    "change",
    [dict(rule=None), dict(project=identity), dict(through_share=0.5, edit="score"), dict(edit="anchor")],
)
def test_settings_that_would_do_nothing_are_refused(change):
    with pytest.raises(ValueError):
        recipes.dps(squares, **change)


def test_particles_need_no_gradient():
    def rounded(image):
        return (image.round() - 1).abs().mean((1, 2, 3)).detach()

    plain = drawn("ddim", None, seeds=range(8)).samples
    for guidance in (recipes.best_of_n(rounded, count=8), recipes.fk_steering(rounded, count=8, sharpness=100.0)):
        kept = drawn("ddim", guidance, seeds=range(8)).samples
        assert rounded(kept / 2 + 0.5).mean() < 0.9 * rounded(plain / 2 + 0.5).mean()


@pytest.mark.parametrize("solver", SOLVERS)
def test_remixing_makes_deterministic_solvers_random_and_leaves_random_ones_alone(solver):
    still = recipes.dps(squares, rule=Constant(0.0))
    plain = drawn(solver, still).samples
    if solver in RESTARTING:
        with pytest.raises(ValueError, match="starts from the sample"):
            drawn(solver, still.replace(remix="ancestral"))
        return
    remixed = drawn(solver, still.replace(remix="ancestral")).samples
    assert torch.equal(plain, remixed) == (solver in DRAWING)


def test_remixed_ddim_without_noise_is_ancestral_in_law():
    """DDIM with eta = 0 and its noise remixed steps from x to the mean of eta = 1, with fresh noise of its spread."""
    h, solver = Hand(), Solver.of(vp_scheduler(), 10)
    guidance = Guidance(distance, rule=Constant(0.0), through="x0", remix="ancestral")
    run = guidance.begin(solver, identity, [0])

    def solve(prediction, x):
        return h.a1 * (x - h.s * prediction) / h.a + h.s1 * prediction

    moved = run.step(SAMPLE, model(SAMPLE), run.visits[STEP], solve)
    fresh = randn(SHAPE, generators([0], "guidance")).double()
    torch.testing.assert_close(moved, h.ddim(h.x0, h.e, fresh), rtol=0, atol=1e-10)
