"""The guided step, held to analytic truths: Gaussian posteriors, finite differences, identities."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass

import diffusers
import pytest
import torch
from lossguide.guidance import Augment, Guidance, recipes
from lossguide.guidance.steps import (
    AlphaProduct,
    Chain,
    Constant,
    NoiseScaled,
    Polyak,
    PolyakToFloor,
    Rms,
    Shortest,
    Signal,
    SqrtAlpha,
    StepRule,
    Unit,
)
from lossguide.losses import Measurement, Term, operators
from lossguide.losses.loss import as_losses
from lossguide.samplers import Level, Solver, TimeTravel, denoiser, sample
from models import Gaussian, tiny_unet, vp_scheduler


def brightness(image):
    return (image.mean((1, 2, 3)) - 0.7).abs()


def squares(image):
    return (image - 0.8).square().flatten(1).sum(1)


@pytest.fixture(scope="module")
def tiny():
    return denoiser(tiny_unet(), vp_scheduler(prediction_type="v_prediction", clip_sample=True))


@dataclass(frozen=True)
class ExactLikelihood(StepRule):
    """Scales the gradient of .5 (y - H x0)^2 to that of -log p(y | x_t), and to the score edit's units (times s_t)."""

    gaussian: Gaussian
    h: torch.Tensor
    variance: float

    def update(self, signal, state):
        a, s = signal.level.alpha, signal.level.sigma
        spread = self.h @ self.gaussian.posterior_covariance(a, s) @ self.h
        return s / (self.variance + spread) * signal.gradient, state


def test_exact_likelihood_guidance_samples_the_posterior():
    """Gaussian data, one linear measurement: mean and covariance of the guided samples are the closed-form
    posterior's."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.3, 0.4, 0.8]], dtype=torch.float64)
    gaussian = Gaussian(torch.tensor([0.5, -0.2, 0.1]), root @ root.T)
    h, y, variance = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64), 1.6, 0.04

    def loss(x):
        return 0.5 * (y - x.double() @ h).square().flatten(1).sum(1)

    guidance = Guidance(loss, rule=ExactLikelihood(gaussian, h, variance), edit="score")
    vectors = sample(gaussian.denoiser(2000), guidance, steps=250, seeds=range(10)).samples.reshape(-1, 3).double()
    gain = gaussian.covariance @ h / (variance + h @ gaussian.covariance @ h)
    mean = gaussian.mean + gain * (y - h @ gaussian.mean)
    covariance = gaussian.covariance - torch.outer(gain, h @ gaussian.covariance)
    torch.testing.assert_close(vectors.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(vectors.T.cov(), covariance, rtol=0, atol=0.04)
    prior = sample(gaussian.denoiser(2000), None, steps=250, seeds=range(10)).samples.reshape(-1, 3).double()
    torch.testing.assert_close(prior.T.cov(), gaussian.covariance, rtol=0, atol=0.05)


def test_the_gradient_through_the_denoiser_is_that_of_finite_differences():
    unet = tiny_unet(dtype=torch.float64)
    solver = Solver.of(vp_scheduler(), 10)
    solver.kind = "v_prediction"
    run = Guidance(squares, rule=Constant(1.0)).begin(solver, lambda x: x / 2 + 0.5, [0])
    visit = run.visits[4]
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def value(x):
        prediction = unet(x, solver.timesteps[4])[0]
        return squares(solver.levels[4].x0(prediction, x, "v_prediction") / 2 + 0.5)

    leaf = x.clone().requires_grad_(True)
    moved = run.step(leaf, unet(leaf, solver.timesteps[4])[0], visit, lambda prediction, x: torch.zeros_like(x))
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        slope = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    assert (-moved * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_strength_zero_is_bitwise_the_plain_sampler(tiny, scheduler):
    model = denoiser(tiny.model, getattr(diffusers, scheduler)(beta_schedule="linear"))
    plain = sample(model, None, steps=6, seeds=[3, 4])
    zero = sample(model, recipes.auto(brightness, strength=0.0, stop=1.0), steps=6, seeds=[3, 4])
    nothing = sample(model, recipes.auto(None), steps=6, seeds=[3, 4])
    assert torch.equal(plain.samples, zero.samples) and torch.equal(plain.samples, nothing.samples)
    assert zero.record.losses().shape == (6, 2), "the loss is still recorded"
    assert not torch.equal(plain.samples, sample(model, recipes.auto(brightness), steps=6, seeds=[3, 4]).samples)


@pytest.mark.parametrize("recipe", ["auto", "shen", "tfg", "universal", "red_diff"])
def test_a_sample_does_not_depend_on_its_batch(tiny, recipe):
    guidance = recipes.get(recipe)(squares)
    alone = sample(tiny, guidance, steps=6, seeds=[5])
    together = sample(tiny, guidance, steps=6, seeds=[5, 0, 1, 2, 3, 4, 6, 7])
    split = sample(tiny, guidance, steps=6, seeds=[5, 0, 1, 2, 3, 4, 6, 7], batch_size=3)
    scale = alone.samples.abs().max().clamp_min(1)
    torch.testing.assert_close(together.samples[:1] / scale, alone.samples / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(split.samples[:1] / scale, alone.samples / scale, rtol=0, atol=1e-5)
    assert split.record.losses().shape == together.record.losses().shape


@pytest.mark.parametrize("recipe", recipes.available())
def test_every_recipe_lowers_the_loss(tiny, recipe):
    plain = sample(tiny, None, steps=20, seeds=range(4))
    strength = {"freedom": 100.0, "mpgd": 10.0, "shen": 500.0, "flowdps": 0.01, "dsg": 5.0}.get(recipe, 1.0)
    loss = squares
    if recipe in ("pigdm", "diffpir", "ddnm"):
        loss = Measurement(operators.SuperResolution(2), torch.full((1, 3, 4, 4), 0.8), 0.05)
    guided = sample(tiny, recipes.get(recipe)(loss, strength=strength), steps=20, seeds=range(4))
    if recipe in ("best_of_n", "fk_steering"):  # four random candidates do not differ much
        assert loss(guided.images).mean() < 0.98 * loss(plain.images).mean()
    else:
        assert (loss(guided.images) < 0.9 * loss(plain.images)).all()


def test_candidates_that_are_compared_at_the_end_ask_the_loss_at_the_last_step_alone(tiny):
    seen = []

    def counted(image):
        seen.append(len(image))
        return squares(image)

    result = sample(tiny, recipes.best_of_n(counted, count=3), steps=6, seeds=[0, 1])
    assert seen == [6, 6], "of the last prediction, for the record, and of the pictures"
    assert [row["step"] for row in result.record.rows if "loss" in row] == [5]
    seen.clear()
    sample(tiny, recipes.fk_steering(counted, count=3), steps=6, seeds=[0, 1])
    assert len(seen) == 7


def test_zero_and_nan_gradients_move_nothing_and_are_told(tiny):
    plain = sample(tiny, None, steps=5, seeds=[0, 1, 2])

    def spoilt(image):
        value = squares(image)
        factor = torch.tensor([1.0, float("nan"), 0.0])
        return value * factor

    guidance = recipes.auto(Term(spoilt, augment=False), time_travel=None, stop=0.8)
    with pytest.warns(RuntimeWarning, match=r"1 of 3 pictures.*picture 1 \(4 times\)"):
        result = sample(tiny, guidance, steps=5, seeds=[0, 1, 2])
    # the same step runs, but the sample moves by exactly nothing
    assert torch.equal(result.samples[1], plain.samples[1]) and torch.equal(result.samples[2], plain.samples[2])
    assert not torch.equal(result.samples[0], plain.samples[0])
    assert result.record.nonfinite.tolist() == [0, 4, 0]
    with pytest.raises(FloatingPointError, match=r"step 0 for pictures \[1\]"):
        sample(tiny, guidance.replace(raise_on_nonfinite=True), steps=5, seeds=[0, 1, 2])
    json.loads(json.dumps(result.record.to_dict(), allow_nan=False))


RULES = [
    Constant(),
    SqrtAlpha(),
    AlphaProduct(),
    Rms(),
    Unit(),
    Polyak(),
    PolyakToFloor(),
    NoiseScaled(),
    Chain((Unit(), Constant(2.0))),
    Shortest((Unit(), Polyak())),
]


def _signal(gradient, floor=None):
    level, after = Level.of(0.6, 0.8), Level.of(0.8, 0.6)
    return Signal(gradient, torch.full((len(gradient),), 2.0), torch.ones_like(gradient), level, after, floor)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_rules_are_per_sample_and_zero_at_zero(rule):
    gradient = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient[1] = 0
    step, _ = rule.update(_signal(gradient), rule.init(gradient))
    assert torch.isfinite(step).all() and (step[1] == 0).all() and (step[0] != 0).any()
    alone, _ = rule.update(_signal(gradient[2:]), rule.init(gradient[2:]))
    torch.testing.assert_close(step[2:], alone)


def test_rules_by_hand():
    g = torch.tensor([3.0, 4.0], dtype=torch.float64).view(1, 1, 1, 2)
    cases = {
        Constant(2.0): 2 * g,
        SqrtAlpha(0.5): 0.5 * 0.6 * g,
        AlphaProduct(0.5): 0.5 * 0.6 * 0.8 * g,
        Rms(0.1): 0.1 * (0.8 / 0.6) * (2**0.5 / 5) * g,
        Rms(0.1, by_level=False): 0.1 * (2**0.5 / 5) * g,
        Unit(0.1): 0.1 * 2**0.5 * g / 5,
        Polyak(3.0): 3 * 2**0.5 / 25 * g,
        PolyakToFloor(): 2.0 / 25 * g,
        # sqrt((1 - a'^2) / (1 - a^2)) sqrt(1 - a^2 / a'^2)
        NoiseScaled(0.2): 0.2 * 2**0.5 * math.sqrt(0.36 / 0.64) * math.sqrt(1 - 0.36 / 0.64) * g / 5,
    }
    for rule, expected in cases.items():
        torch.testing.assert_close(rule.update(_signal(g), rule.init(g))[0], expected, msg=str(rule))
    floored = PolyakToFloor().update(_signal(g, floor=torch.tensor([2.5])), None)[0]
    assert (floored == 0).all(), "below the floor nothing moves"


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_gradients_give_steps_of_the_same_length(size):
    g = torch.full((1, 1, 2, 2), size)
    step, _ = NoiseScaled().update(_signal(g), None)
    reference, _ = NoiseScaled().update(_signal(torch.ones_like(g)), None)
    torch.testing.assert_close(step, reference)


def test_mean_edit_shifts_by_the_next_alpha_and_score_moves_x0_with_the_noise(tiny):
    solver = Solver.of(vp_scheduler(), 10)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    prediction = torch.randn_like(x)
    level, after = solver.levels[3], solver.levels[4]

    def stepped(edit):
        run = Guidance(squares, rule=Constant(0.01), through="x0", edit=edit).begin(solver, lambda z: z, [0])
        return run.step(x, prediction, run.visits[3], lambda p, x: solver.step(p, 3, x))

    plain = solver.step(prediction, 3, x)  # diffusers' tables are float32
    x0 = level.x0(prediction, x, "epsilon")
    move = 0.01 * 2 * (x0 - 0.8)
    torch.testing.assert_close(stepped("shift"), plain - move, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stepped("mean"), plain - after.alpha * move, rtol=1e-5, atol=1e-5)
    moved_noise = prediction + move
    by_hand = after.mix((x - level.sigma * moved_noise) / level.alpha, moved_noise)
    torch.testing.assert_close(stepped("score"), by_hand, rtol=1e-5, atol=1e-5)


def test_one_denoiser_call_per_step_and_no_graph_where_none_is_needed(tiny):
    calls = []

    def counted(x, t):
        calls.append(torch.is_grad_enabled() and x.requires_grad)
        return tiny.model(x, t)[0]

    model = denoiser(counted, tiny.scheduler, shape=tiny.shape)
    sample(model, Guidance(squares, start=0.4, stop=0.8, augment=Augment.geometric(8)), steps=10, seeds=[0, 1])
    assert calls == [False] * 4 + [True] * 4 + [False] * 2
    calls.clear()
    sample(model, Guidance(squares, through="x0", edit="mean"), steps=4, seeds=[0])
    assert calls == [False] * 4
    calls.clear()
    sample(model, Guidance(squares, every=2), steps=4, seeds=[0])
    assert calls == [True, False, True, False]


def test_weights_never_require_a_gradient_and_are_left_as_found(tiny):
    tiny.model.requires_grad_(True)
    seen = []

    def loss(image):
        seen.append(any(p.requires_grad for p in tiny.model.parameters()))
        return squares(image)

    sample(tiny, Guidance(loss), steps=2, seeds=[0])
    assert seen == [False, False] and all(p.requires_grad for p in tiny.model.parameters())
    assert all(p.grad is None for p in tiny.model.parameters())
    with pytest.raises(RuntimeError, match="on purpose"):
        sample(tiny, Guidance(lambda image: (_ for _ in ()).throw(RuntimeError("on purpose"))), steps=2, seeds=[0])
    assert all(p.requires_grad for p in tiny.model.parameters())


def test_copies_in_chunks_give_the_gradient_of_all_at_once():
    from lossguide.guidance.gradient import loss_gradient

    image = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    draws = torch.rand(6, 3, 9)
    terms = [Term(squares), Term(brightness, weight=3.0, augment=False)]
    reference = None
    for chunk in (100, 6, 1):
        g, loss, values = loss_gradient(image, terms, Augment(6, chunk=chunk), draws)
        torch.testing.assert_close(loss, values["squares"] + 3 * values["brightness"])
        if reference is not None:
            torch.testing.assert_close(g, reference)
        reference = g
    torch.testing.assert_close(values["brightness"], brightness(image))


def test_augmentation_is_per_sample_differentiable_and_leaves_what_it_should():
    image = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    nothing = Augment(1, translate=0, scale=(1, 1), brightness=0, saturation=(1, 1), contrast=(1, 1), cutout=0)
    torch.testing.assert_close(nothing.apply(image, torch.rand(2, 9)), image)
    sources = [torch.Generator().manual_seed(i) for i in range(2)]
    draws = Augment(4).draw(sources)
    assert (
        draws.shape == (4, 2, 9) and not torch.equal(draws[0], draws[1]) and not torch.equal(draws[:, 0], draws[:, 1])
    )
    both = Augment(4).apply(image, draws[0])
    torch.testing.assert_close(both[1:], Augment(4).apply(image[1:], draws[0, 1:]))
    shifted = Augment(1, translate=0.25, scale=(1, 1), brightness=0, saturation=(1, 1), contrast=(1, 1), cutout=0)
    right = shifted.apply(image, torch.tensor([[1.0, 0.5, *[0.5] * 7]] * 2))
    torch.testing.assert_close(right[..., 4:], image[..., :-4])
    leaf = image.requires_grad_(True)
    grad = torch.autograd.grad(Augment(4).apply(leaf, draws[0]).square().sum(), leaf)[0]
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0


def test_time_travel_visits_its_window_and_keeps_the_law():
    """With the exact denoiser of a Gaussian, repeating steps must not change what is sampled."""
    gaussian = Gaussian(torch.tensor([0.4, -0.4]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
    far = Guidance(lambda x: 0 * x.flatten(1).sum(1), time_travel=TimeTravel(2, 0.2, 0.8))
    result = sample(gaussian.denoiser(2000), far, steps=300, seeds=range(6))
    vectors = result.samples.reshape(-1, 2).double()
    assert [row["step"] for row in result.record.rows].count(150) == 2 and len(result.record.rows) == 300 + 180
    torch.testing.assert_close(vectors.mean(0), gaussian.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(vectors.T.cov(), gaussian.covariance, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    "scheduler", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"]
)
def test_time_travel_runs_with_any_solver(tiny, scheduler):
    model = denoiser(tiny.model, getattr(diffusers, scheduler)(beta_schedule="linear"))
    result = sample(model, recipes.auto(squares), steps=8, seeds=[0, 1])
    assert torch.isfinite(result.samples).all()


def test_flow_matching_models_are_guided_too():
    """For data at one point the exact flow is (x - m) / sigma; guidance moves what it samples."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)

    def flow(x, t):
        return (x - 0.2 * torch.tanh(x)) / (t / 1000).clamp_min(1e-3)

    model = denoiser(flow, scheduler, shape=(3, 8, 8))
    plain = sample(model, None, steps=20, seeds=[0])
    guided = sample(model, recipes.auto(squares, through="x0", edit="mean"), steps=20, seeds=[0])
    assert squares(guided.images).item() < squares(plain.images).item()


@pytest.mark.parametrize(
    "scheduler", ["HeunDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"]
)
def test_solvers_that_start_again_from_their_own_sample_are_guided_too(scheduler):
    """Second-order solvers and correctors would lose a shift; the loss must fall with them as with the others."""
    gaussian = Gaussian(torch.tensor([0.4, -0.4]), torch.tensor([[0.05, 0.02], [0.02, 0.03]]))
    exact = gaussian.denoiser(50)
    model = denoiser(
        exact.model, getattr(diffusers, scheduler)(beta_schedule="linear"), shape=exact.shape, decode=lambda x: x
    )

    def model_in_vp(x, t):  # Heun hands over x / sqrt(1 + sigma^2) and times between the integers
        return exact.model(x, t.round())

    model = denoiser(model_in_vp, model.scheduler, shape=exact.shape, decode=lambda x: x)

    def loss(x):
        return (x - 0.8).square().flatten(1).mean(1)

    plain = sample(model, None, steps=20, seeds=range(4)).samples
    guided = sample(model, recipes.auto(loss, augment=None, time_travel=None), steps=20, seeds=range(4)).samples
    assert (loss(guided) < 0.8 * loss(plain)).all(), (loss(plain), loss(guided))


def test_a_model_may_predict_another_kind_than_its_scheduler_says():
    """One exact Gaussian denoiser, told in every kind under a scheduler that steps by epsilon: the same samples."""
    gaussian = Gaussian(torch.tensor([0.4, -0.4]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
    exact = gaussian.denoiser(4)
    reference = sample(exact, None, steps=10, seeds=[0]).samples
    for kind in ("sample", "v_prediction", "flow"):

        def told(x, t, kind=kind):
            a, s = gaussian.level(t)
            noise = exact.model(x, t)
            return Level(a, s).prediction((x - s * noise) / a, noise, kind)

        model = denoiser(told, exact.scheduler, kind=kind, shape=exact.shape, decode=lambda x: x)
        torch.testing.assert_close(sample(model, None, steps=10, seeds=[0]).samples, reference, rtol=1e-3, atol=1e-3)


def test_models_that_also_predict_a_variance_run(tiny):
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", prediction_type="v_prediction")

    def model(x, t):
        return torch.cat([tiny.model(x, t)[0], torch.zeros_like(x)], 1)

    learned = denoiser(model, scheduler, shape=tiny.shape)
    plain = sample(learned, None, steps=6, seeds=[0])
    guided = sample(learned, recipes.auto(squares, strength=4.0), steps=6, seeds=[0])
    assert squares(guided.images) < squares(plain.images)


@pytest.mark.parametrize(
    "guidance", [recipes.freedom(squares), recipes.auto(squares, edit="score")], ids=["freedom", "score"]
)
def test_pure_noise_without_a_trace_of_the_picture_is_no_trap(guidance):
    """alpha = 0 at the first step of flow matching: finite samples, no warning."""
    flow = denoiser(lambda x, t: 0.5 * x, diffusers.FlowMatchEulerDiscreteScheduler(), shape=(3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(sample(flow, guidance, steps=5, seeds=[0]).samples).all()


def test_gradients_survive_half_precision():
    """A loss of tiny slope through a half-precision network: the direction is that of full precision."""
    from lossguide.guidance.gradient import pulled_back

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8
    g = 1e-9 * torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 64, dtype=torch.float16, requires_grad=True)
    pulled = pulled_back(x @ weight.half(), x, g)
    torch.testing.assert_close(pulled, g @ weight.T, rtol=0.02, atol=1e-11)


@pytest.mark.parametrize("clock", ["steps", "noise"])
def test_windows_are_measured_by_their_clock(tiny, clock):
    flow = denoiser(tiny.model, diffusers.FlowMatchEulerDiscreteScheduler())
    guidance = Guidance(squares, strength=0.1, stop=0.5, clock=clock, time_travel=TimeTravel(2, 0.3, 0.9))
    rows = sample(flow, guidance, steps=10).record.rows
    steps = [(row["step"], row["progress"]) for row in rows if "loss" in row]
    expected = [0.0, 0.1, 0.2, 0.3, 0.4] if clock == "steps" else [0.0, 0.36]  # DDPM's, with a noise share of 0.89
    again = [3, 4] if clock == "steps" else [1]
    assert [step for step, _ in steps] == [i for i in range(len(expected)) for _ in range(2 if i in again else 1)]
    assert [progress for step, progress in dict(steps).items()] == pytest.approx(expected, abs=0.011)
    with pytest.raises(ValueError, match="clock is one of steps, noise"):
        Guidance(squares, clock="time")


def test_the_noise_s_clock_starts_at_the_first_step_of_any_schedule(tiny):
    scaled = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    solver = Solver.of(scaled, 20)
    assert solver.levels[0].progress > 0.2
    rows = sample(denoiser(tiny.model, scaled), recipes.auto(as_losses(squares).during(0, 0.1)), steps=20).record.rows
    assert [row["progress"] for row in rows if "loss" in row][0] == 0
    with pytest.raises(ValueError, match="acts at none of the 4 steps"):
        sample(denoiser(tiny.model, scaled), recipes.dps(squares, start=0.9), steps=4)


@pytest.mark.parametrize("known", [False, True])
def test_auto_s_windows_are_on_the_noise_s_clock(known):
    loss = Measurement(lambda image: image, torch.zeros(1, 3, 8, 8), 0.1) if known else squares
    guidance = recipes.auto(loss)
    assert guidance.clock == "noise" and guidance.time_travel.repeats == 3 and (guidance.stop == 1.0) == known
    assert recipes.auto(Term(squares, augment=False) + Term(squares)).stop == 0.8
    assert recipes.auto(Term(squares, augment=False)).stop == 1.0


class Seen(Constant):
    """A step rule that remembers whether the solver was told to draw noise."""

    def update(self, signal, state):
        self.__dict__["random"] = signal.random
        return super().update(signal, state)


@pytest.mark.parametrize(
    ("scheduler", "eta", "random"),
    [
        ("DDIMScheduler", 1.0, True),
        ("DDIMScheduler", 0.0, False),
        ("DDPMScheduler", 1.0, True),
        ("EulerDiscreteScheduler", 1.0, False),
        ("EulerAncestralDiscreteScheduler", 1.0, True),
        ("DPMSolverMultistepScheduler", 1.0, False),
        ("UniPCMultistepScheduler", 1.0, False),
        ("FlowMatchEulerDiscreteScheduler", 1.0, False),
    ],
)
def test_rules_are_told_whether_the_solver_draws_noise(tiny, scheduler, eta, random):
    rule = Seen(0.01)
    sample(denoiser(tiny.model, getattr(diffusers, scheduler)()), Guidance(squares, rule), steps=6, eta=eta)
    assert rule.random is random


def test_fading_steps_add_up_to_as_much_and_to_half_without_noise():
    one, g = Level.of(0.6, 0.8), torch.ones(1, 1, 1, 2)
    levels = {n: [Level.of(0.6, 0.8 - 0.001 * i) for i in range(n + 1)] for n in (4, 20, 50, 200)}

    def length(steps, random):
        signal = Signal(g, g[:, 0, 0, 0], g, one, Level.of(0.8, 0.6), levels=levels[steps], random=random)
        return NoiseScaled(0.2, fading=True).update(signal, None)[0].norm().item()

    own = length(50, True)
    assert length(50, None) == own > 0
    assert length(200, True) == pytest.approx(own / 2) and length(20, True) == pytest.approx(own * 2.5**0.5)
    assert length(4, True) == pytest.approx(own * 2.5) and length(50, False) == pytest.approx(own / 2)


def test_a_corrector_goes_on_from_the_sample_that_time_travel_made(tiny):
    """UniPC would start again from the sample before, and fresh noise would be lost."""
    solver = Solver.of(diffusers.UniPCMultistepScheduler(beta_schedule="linear"), 8)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = solver.step(torch.zeros_like(x), 0, x)
    before = solver.remember()
    solver.step(torch.zeros_like(x), 1, x)
    solver.return_to(before)
    one = solver.step(torch.zeros_like(x), 1, x)
    solver.return_to(before)
    assert (solver.step(torch.zeros_like(x), 1, x + 0.5) - one).abs().min() > 0.3


def test_time_travel_only_where_a_loss_acts(tiny):
    guidance = recipes.auto(squares, start=0.6, time_travel=TimeTravel(2, 0.25, 0.75))
    record = sample(tiny, guidance, steps=20, seeds=[0]).record
    assert len(record.rows) == 20 + 3 and len(record.guided) == 4 + 3


def test_half_precision_models_keep_float32_algebra(tiny):
    from lossguide.samplers.denoiser import as_picture

    half = denoiser(tiny_unet().to(torch.bfloat16), vp_scheduler())
    seen = []

    def loss(image):
        seen.append(image.dtype)
        return squares(image)

    result = sample(half, Guidance(loss), steps=3, seeds=[0])
    assert half.dtype == torch.bfloat16 and set(seen) == {torch.float32} and result.samples.dtype == torch.float32
    assert as_picture(torch.zeros(1, 1, 2, 2)).shape == (1, 3, 2, 2)


def test_terms_act_in_their_windows_and_by_their_weights(tiny):
    terms = 2.0 * Term(squares).during(0.5, 1.0) + Term(brightness)
    record = sample(tiny, Guidance(terms, rule=Constant(0.01)), steps=4, seeds=[0, 1]).record
    assert record.losses("squares").isnan().all(1).tolist() == [True, True, False, False]
    torch.testing.assert_close(record.losses()[2:], 2 * record.losses("squares")[2:] + record.losses("brightness")[2:])


def test_the_record_saves_and_plots(tiny, tmp_path):
    result = sample(tiny, recipes.auto(squares), steps=4, seeds=[0, 1])
    result.record.plot(tmp_path / "loss.png")
    result.record.save(tmp_path / "record.json")
    result.save(tmp_path / "pictures")
    data = json.loads((tmp_path / "record.json").read_text())
    assert (tmp_path / "loss.png").stat().st_size > 1000 and len(list((tmp_path / "pictures").iterdir())) == 2
    assert {"step", "visit", "timestep", "terms", "loss", "gradient_norm", "step_size", "seconds"} <= set(
        data["rows"][0]
    )
    assert data["settings"]["name"] == "auto"


def test_guidance_is_frozen_printable_and_json():
    guidance = recipes.shen(2.0 * Term(squares) + Term(brightness), strength=0.5)
    data = json.loads(guidance.to_json())
    assert (
        data["loss"][0]["weight"] == 2.0
        and data["rule"] == {"type": "Polyak", "eta": 0.002}
        and "2403.12404" in data["citation"]
    )
    assert "Polyak" in repr(guidance)
    with pytest.raises(AttributeError):
        guidance.strength = 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guidance(squares, through="everything"), "through is one of denoiser, x0"),
        (lambda: Guidance(squares, edit="jump"), "edit is one of"),
        (lambda: Guidance(squares, start=0.5, stop=0.5), "start < stop"),
        (lambda: Guidance(squares, strength=-1), "strength"),
        (lambda: recipes.auto(squares, strenght=2), "no setting strenght"),
        (lambda: recipes.best_of_n(squares, n=4), "no setting n; settings are strength, count, "),
        (lambda: recipes.dps(squares, rule="adam"), "rule is a step rule such as .*, got 'adam'"),
        (lambda: recipes.dps(squares, time_travel=3), "time_travel is a TimeTravel such as .*, got 3"),
        (lambda: recipes.dps(squares, augment=4), "augment is an Augment or None, got 4"),
        (lambda: recipes.fk_steering(squares, count=1.5), "a whole count >= 1, got 1.5"),
        (lambda: recipes.auto(squares, cost="1.3"), "cost is at least 1, that of the unguided sampler, got '1.3'"),
        (lambda: recipes.get("dsp"), "did you mean 'tds' or 'dsg' or 'dps'"),
        (lambda: recipes.get("freedon"), "did you mean 'freedom'"),
        (lambda: TimeTravel(0), "repeats"),
        (lambda: Augment(0), "copies"),
        (lambda: denoiser(lambda x, t: x, vp_scheduler()), "pass shape="),
        (lambda: sample(denoiser(tiny_unet(), vp_scheduler()), None, seeds=[]), "seeds"),
        (lambda: sample(denoiser(tiny_unet(), vp_scheduler()), squares), "recipes.auto"),
        (lambda: sample(tiny_unet()), "denoiser\\(model, scheduler\\)"),
        (lambda: denoiser(tiny_unet(), vp_scheduler(), kind="eps"), "unknown prediction kind 'eps'"),
        (lambda: denoiser(diffusers.DDIMPipeline(tiny_unet(), vp_scheduler()), None), "use guide"),
    ],
)
def test_mistakes_are_told_in_a_sentence(make, message):
    with pytest.raises((ValueError, TypeError, LookupError), match=message):
        make()


def test_losses_that_cannot_guide_are_told(tiny):
    with pytest.raises(ValueError, match="'detached' is not differentiable"):

        def detached(image):
            return squares(image.detach())

        sample(tiny, recipes.auto(detached), steps=2)
    with pytest.raises(ValueError, match="one number per sample"):
        sample(tiny, recipes.auto(lambda image: image.mean()), steps=2)
    frozen = denoiser(lambda x, t: torch.no_grad()(tiny.model)(x, t)[0], tiny.scheduler, shape=tiny.shape)
    with pytest.raises(ValueError, match='through="x0"'):
        sample(frozen, recipes.auto(squares), steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(frozen, recipes.mpgd(squares), steps=2)


@pytest.mark.parametrize("seeds", [3, "ab", [0.5]])
def test_seeds_are_integers(seeds):
    with pytest.raises(TypeError, match="one integer per picture, such as range"):
        sample(denoiser(lambda x, t: x, vp_scheduler(), shape=(3, 8, 8)), steps=2, seeds=seeds)


def test_slips_of_the_finger_are_told():
    with pytest.raises(ValueError, match="integer of at least 1, got 2.5"):
        sample(denoiser(lambda x, t: x, vp_scheduler(), shape=(3, 8, 8)), steps=2.5, seeds=[0])
    with pytest.raises(ValueError, match="strength is a number from 0 up, got '2'"):
        recipes.auto(None, strength="2")
    with pytest.raises(TypeError, match="no setting stength; did you mean strength"):
        recipes.auto(None, stength=2)
