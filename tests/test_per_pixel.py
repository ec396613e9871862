"""Noise levels that differ per pixel: schedules, the scheduler, the guided step, against closed forms."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lossguide.guidance import guide, recipes
from lossguide.guidance.edits import drew
from lossguide.guidance.guidance import Inner
from lossguide.guidance.proximal import Proximal
from lossguide.guidance.steps import (
    AsScore,
    Chain,
    Constant,
    NoiseScaled,
    Polyak,
    PolyakToFloor,
    Shortest,
    SigmaScaled,
    Signal,
    Unit,
)
from lossguide.samplers import (
    Level,
    MultivariateScheduler,
    PolynomialGamma,
    ScalarGamma,
    Solver,
    TimeTravel,
    denoiser,
    sample,
)
from lossguide.samplers.gamma import FunctionGamma, check_monotone, sigma
from models import tiny_stable_diffusion, tiny_unet, vp_scheduler

from benchmarks.per_pixel import (
    PIXELS,
    PixelGaussian,
    Work,
    apart_from_diffusers,
    bound,
    divergence,
    exact_guidance,
    gammas,
    points_of,
    prior,
    recipe_names,
    recipe_of,
    renoised_apart,
    travelled,
)

SHAPE = (2, 4, 4)


def polynomial(seed: int = 0, shape: tuple[int, ...] = SHAPE, **ends: float) -> PolynomialGamma:
    source = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(shape, generator=source) for _ in range(3))
    return PolynomialGamma.of(2 * a, b, c.abs() + 0.1, **ends)


def conditioned(latent: int = 3) -> PolynomialGamma:
    """A schedule that depends on a latent, with weights that are not those of the start."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        gamma = PolynomialGamma(SHAPE, latent, hidden=8)
        for parameter in gamma.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    return gamma


def narrow(z: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """The noise that the exact denoiser of N(0, 1/4) pixels finds."""
    level = Level.of_gamma(gamma)
    return level.sigma * z / (level.alpha**2 / 4 + level.sigma**2)


def made(scheduler, shape=SHAPE, model=narrow, **options):
    return denoiser(model, scheduler, shape=shape, per_pixel=True, **options)


# ---- schedules -----------------------------------------------------------------------------------------------------

number = st.floats(-5, 5, allow_nan=False).map(lambda v: round(v, 3))


@given(a=number, b=number, c=number)
@settings(max_examples=100, deadline=None)
def test_a_polynomial_schedule_is_monotone_whatever_its_coefficients(a, b, c):
    assume(max(abs(a), abs(b), abs(c)) > 0.01)
    gamma = PolynomialGamma.of(*(torch.tensor(v, dtype=torch.float64).view(1, 1, 1) for v in (a, b, c)))
    with torch.no_grad():
        values = gamma(torch.linspace(0, 1, 301, dtype=torch.float64)).flatten()
        slopes = gamma.derivative(torch.linspace(0, 1, 301, dtype=torch.float64)).flatten()
    assert values[0].item() == -13.3 and values[-1].item() == pytest.approx(5, abs=1e-9)
    assert (values.diff() > -1e-9).all() and (slopes >= 0).all()


def test_the_polynomial_is_the_integral_of_the_square_and_its_derivative_that():
    gamma = polynomial().double()
    a, b, c = gamma.coefficients()
    nodes = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    squares = (a * nodes.view(-1, 1, 1, 1) ** 2 + b * nodes.view(-1, 1, 1, 1) + c) ** 2
    for end in (0.2, 0.7):
        expected = -13.3 + 18.3 * squares[nodes < end].sum(0) / squares.sum(0)
        torch.testing.assert_close(gamma(end), expected, rtol=0, atol=1e-5)
    time = torch.tensor(0.37, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(gamma, time)
    torch.testing.assert_close(gamma.derivative(time), jacobian, rtol=1e-10, atol=1e-10)
    ahead, behind = gamma(time + 1e-5), gamma(time - 1e-5)
    torch.testing.assert_close(gamma.derivative(time), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6)
    function = FunctionGamma(lambda t: gamma(t).detach() if not t.requires_grad else gamma(t))
    assert function.shape == SHAPE


def test_learned_schedules_start_linear_and_take_gradients():
    times, z = torch.linspace(0, 1, 5), torch.randn(5, 3)
    for gamma, latent in ((PolynomialGamma(SHAPE), None), (PolynomialGamma(SHAPE, 3), z)):
        torch.testing.assert_close(gamma(times, latent), ScalarGamma()(times).expand(5, *SHAPE))
        gamma(torch.tensor([0.2, 0.4, 0.5, 0.6, 0.7]), latent).square().sum().backward()
        found = [p.grad for p in gamma.parameters() if p.grad is not None]
        assert any(bool((g != 0).any()) for g in found) and all(bool(torch.isfinite(g).all()) for g in found)


def test_shapes_follow_time_and_latent():
    plain, given_z, one = polynomial(), conditioned(), ScalarGamma()
    assert plain(0.5).shape == SHAPE and plain(torch.rand(3)).shape == plain.derivative(torch.rand(3)).shape == (
        3,
        *SHAPE,
    )
    assert one(0.5).shape == (1, 1, 1) and one.derivative(torch.rand(3)).shape == (3, 1, 1, 1)
    z = torch.randn(4, 3)
    assert given_z(0.5, z).shape == given_z.derivative(torch.rand(4), z).shape == (4, *SHAPE)
    assert not torch.equal(given_z(0.5, z)[0], given_z(0.5, z)[1]), "samples differ"
    check_monotone(given_z, z)


def test_sigma_near_the_picture_is_not_round_off():
    gamma = torch.tensor(-13.3)
    exact = (1 / (1 + torch.exp(torch.tensor(13.3, dtype=torch.float64)))).sqrt()
    assert sigma(gamma).item() == pytest.approx(exact.item(), rel=1e-6)
    level, same = (Level.of_gamma(g.float()) for g in (torch.tensor([-13.2]), torch.tensor([-13.2002])))
    assert level.step_std(same).item() == pytest.approx(exact.item() * (2e-4) ** 0.5 * 1.05, rel=0.02)


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: MultivariateScheduler(lambda t: (1 - t) * torch.ones(SHAPE)), "must not fall.*pixel"),
        (lambda: MultivariateScheduler(lambda t: 5 * torch.sin(4 * t) * torch.ones(SHAPE)), "must not fall"),
        (lambda: MultivariateScheduler(lambda t: torch.log(t) * torch.ones(SHAPE)), "not finite"),
        (lambda: MultivariateScheduler(lambda t: 0 * t * torch.ones(SHAPE)), "must grow"),
        (lambda: PolynomialGamma.of(*torch.zeros(3, 1, 1, 2)), "all zero"),
        (lambda: PolynomialGamma.of(torch.tensor([[[float("nan")]]]), *torch.ones(2, 1, 1, 1)), "not all finite"),
        (lambda: ScalarGamma(5.0, -5.0), "from its minimum"),
        (lambda: conditioned()(0.5), r"pass z of shape \(B, 3\)"),
        (lambda: conditioned()(0.5, torch.zeros(2, 4)), r"shape \(B, 3\), got \(2, 4\)"),
        (lambda: polynomial()(0.5, torch.zeros(2, 4)), "depends on no latent"),
        (lambda: MultivariateScheduler(ScalarGamma(), prediction_type="flow"), "prediction_type is one of"),
        (lambda: MultivariateScheduler(ScalarGamma(), solver_type="heun"), "solver_type is one of"),
        (lambda: MultivariateScheduler(ScalarGamma()).set_timesteps(timesteps=[0.2, 0.7]), "fall from noise"),
        (lambda: MultivariateScheduler(ScalarGamma()).set_timesteps(timesteps=[1.2, 0.7]), r"in \[0, 1\]"),
        (lambda: MultivariateScheduler(ScalarGamma()).set_timesteps(), "either"),
        (lambda: MultivariateScheduler(conditioned()).set_timesteps(3), "pass z"),
        (lambda: Solver.of(MultivariateScheduler(conditioned()), 3), "needs sources"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(make, told):
    with pytest.raises(ValueError, match=told):
        make()


# ---- the scheduler -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, None])
def test_a_constant_map_is_diffusers_ddim_and_ddpm(eta):
    assert apart_from_diffusers(eta) < 1e-5


def test_a_step_is_the_formula():
    scheduler = MultivariateScheduler(polynomial(), final_sigmas_type="sigma_min")
    scheduler.set_timesteps(10)
    x, prediction, noise = torch.randn(3, 2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        here, there = (scheduler.gamma(t).double() for t in scheduler.timesteps[3:5])
    a, s, a2, s2 = (
        *((-here).sigmoid().sqrt(), here.sigmoid().sqrt()),
        *((-there).sigmoid().sqrt(), there.sigmoid().sqrt()),
    )
    c = -torch.expm1(there - here)
    expected = a2 / a * (x - s * c * prediction) + s2 * c.sqrt() * noise
    time = scheduler.timesteps[3]
    found = scheduler.step(prediction, time, x, eta=1.0, variance_noise=noise)
    torch.testing.assert_close(found.prev_sample, expected, rtol=1e-5, atol=1e-5)
    clean = (x - s * prediction) / a
    torch.testing.assert_close(found.pred_original_sample, clean, rtol=1e-5, atol=1e-5)
    still = scheduler.step(prediction, time, x).prev_sample
    torch.testing.assert_close(still, a2 * clean + s2 * prediction, rtol=1e-5, atol=1e-5)
    level = Level.of_gamma(here[None])
    for kind in ("sample", "v_prediction"):
        other = MultivariateScheduler.from_config(scheduler.config, gamma=scheduler.gamma, prediction_type=kind)
        other.set_timesteps(10)
        told = level.prediction(clean, prediction, kind)
        torch.testing.assert_close(other.step(told, time, x).prev_sample, still, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        other.get_velocity(clean, prediction, scheduler.timesteps[3].expand(2)), told, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="one of the scheduler's timesteps"):
        scheduler.step(prediction, 0.123, x)


def test_times_are_numbers_in_0_to_1_or_whole_numbers():
    scheduler = MultivariateScheduler(polynomial())
    x, noise = torch.randn(2, 3, *SHAPE)
    whole = scheduler.add_noise(x, noise, torch.tensor([0, 499, 999]))
    torch.testing.assert_close(whole, scheduler.add_noise(x, noise, torch.tensor([0.001, 0.5, 1.0])))
    level = scheduler.level_at(torch.tensor([0.5]))
    torch.testing.assert_close(whole[1:2], level.alpha * x[1:2] + level.sigma * noise[1:2])
    assert scheduler.gamma_at(0.5, 3).shape == (3, *SHAPE) and scheduler.gamma_at(999).max().item() == pytest.approx(
        5, abs=1e-4
    )
    half = scheduler.add_noise(x.half(), noise.half(), torch.tensor([10, 20, 30]))
    assert half.dtype == torch.float16
    scheduler.set_timesteps(timesteps=[999, 499, 0])
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1.0, 0.5, 0.001]))


def test_the_flow_s_steps_are_of_second_order():
    """N(0, 1/4) pixels are carried to `z_1 sqrt(var_0 / var_1)`, whatever their schedule."""
    gamma, z = polynomial(3, minimum=-6.0, maximum=4.0), torch.randn(1, *SHAPE)
    level = [Level.of_gamma(gamma(t)[None].detach()) for t in (1.0, 0.0)]
    spread = [(one.alpha**2 / 4 + one.sigma**2).sqrt() for one in level]
    errors = []
    for steps in (20, 40, 80):
        scheduler = MultivariateScheduler(gamma, solver_type="ode", final_sigmas_type="sigma_min")
        scheduler.set_timesteps(steps)
        x = z
        for time, one in zip(scheduler.timesteps, scheduler.gammas):
            x = scheduler.step(narrow(x, one), time, x).prev_sample
        errors.append((x - z * spread[1] / spread[0]).abs().max().item())
    assert errors[1] < 0.35 * errors[0] and errors[2] < 0.35 * errors[1]


def test_clipping_and_generators_are_as_ddim_s():
    scheduler = MultivariateScheduler(polynomial(), clip_sample=True, clip_sample_range=0.5)
    scheduler.set_timesteps(5)
    x = torch.randn(2, *SHAPE)
    assert scheduler.step(x, scheduler.timesteps[0], x).pred_original_sample.abs().max() <= 0.5
    sources = [torch.Generator().manual_seed(i) for i in range(2)]
    both = scheduler.step(x, scheduler.timesteps[1], x, eta=1.0, generator=sources).prev_sample
    alone = torch.Generator().manual_seed(1)
    second = scheduler.step(x[1:], scheduler.timesteps[1], x[1:], eta=1.0, generator=alone, return_dict=False)[0]
    torch.testing.assert_close(both[1:], second)


@pytest.mark.parametrize("gamma", [ScalarGamma(-9.0, 4.0), polynomial(), polynomial().double(), conditioned()])
def test_what_is_saved_is_what_is_loaded(gamma, tmp_path):
    scheduler = MultivariateScheduler(gamma, prediction_type="v_prediction", solver_type="ode")
    scheduler.save_pretrained(tmp_path / "scheduler")
    files = {path.name for path in (tmp_path / "scheduler").iterdir()}
    scalar = isinstance(gamma, ScalarGamma)
    assert files == {"scheduler_config.json"} | (set() if scalar else {"gamma.safetensors"})
    again = MultivariateScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert again.config.prediction_type == "v_prediction" and again.config.solver_type == "ode"
    z = torch.randn(2, 3) if gamma.latent else None
    assert torch.equal(again.gamma(0.3, z), gamma(0.3, z))
    changed = MultivariateScheduler.from_pretrained(tmp_path / "scheduler", solver_type="ancestral")
    assert changed.config.solver_type == "ancestral" and torch.equal(changed.gamma(0.3, z), gamma(0.3, z))
    if not scalar:
        with pytest.raises(ValueError, match="use from_pretrained, or pass gamma="):
            MultivariateScheduler.from_config(scheduler.config)
        (tmp_path / "scheduler" / "gamma.safetensors").unlink()
        with pytest.raises(ValueError, match="holds no gamma.safetensors"):
            MultivariateScheduler.from_pretrained(tmp_path / "scheduler")


def test_code_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="code, which is not stored"):
        MultivariateScheduler(lambda t: t * torch.ones(SHAPE)).save_pretrained(tmp_path)


# ---- who may be told what ------------------------------------------------------------------------------------------


class Declared(torch.nn.Module):
    per_pixel = True

    def forward(self, z, gamma):
        assert gamma.shape == z.shape and gamma.dtype == torch.float32
        return narrow(z, gamma)


def test_a_network_told_one_time_is_refused():
    scheduler = MultivariateScheduler(polynomial(shape=(3, 8, 8)))
    for options in ({}, {"per_pixel": True}):
        with pytest.raises(TypeError, match="UNet2DModel is told one time for all"):
            denoiser(tiny_unet(), scheduler, **options)
    with pytest.raises(TypeError, match="say so by per_pixel=True"):
        denoiser(lambda z, t: z, scheduler, shape=(3, 8, 8))
    for options in (dict(model=narrow, per_pixel=True), dict(model=Declared())):
        with pytest.raises(TypeError, match="which DDIMScheduler does not know"):
            denoiser(scheduler=vp_scheduler(), shape=(3, 8, 8), **options)
    pipe = tiny_stable_diffusion()
    pipe.scheduler = scheduler
    with pytest.raises(TypeError, match="tells its network one time for all pixels"):
        guide(pipe, recipes.auto(lambda image: image.mean((1, 2, 3))))


def test_a_model_that_declares_itself_gets_the_map():
    scheduler = MultivariateScheduler(polynomial())
    before = copy.deepcopy(vars(scheduler))
    result = sample(denoiser(Declared(), scheduler, shape=SHAPE), recipes.auto(bright), steps=6, seeds=[0, 1])
    assert torch.isfinite(result.images).all()
    assert before.keys() == vars(scheduler).keys() and torch.equal(before["timesteps"], scheduler.timesteps)
    row = result.record.rows[0]
    assert isinstance(row["alpha"], float) and isinstance(row["sigma"], float) and result.record.to_dict()


# ---- what is drawn, in closed form ---------------------------------------------------------------------------------


def bright(image: torch.Tensor) -> torch.Tensor:
    return (image - 0.8).square().mean((1, 2, 3))


def test_the_bound_of_the_exact_denoiser_is_the_likelihood_on_every_path():
    law = prior()
    x = points_of(law, 4)
    exact = -law.log_density(x)
    wrong = []
    for gamma in gammas().values():
        torch.testing.assert_close(bound(law, gamma, x), exact, rtol=0, atol=1e-3)
        wrong.append(bound(law, gamma, x, lambda g: 0.8 * g + 0.2 * g.mean(-1, keepdim=True)).mean())
    assert max(wrong) - min(wrong) > 0.1, "of one that is wrong the path matters"


@pytest.mark.parametrize("solver, most", [("ancestral", 0.05), ("ode", 0.04)])
def test_the_sampler_draws_the_data(solver, most):
    for name in ("one schedule", "six schedules"):
        model = prior().denoiser(4000, gammas()[name], solver_type=solver)
        x = sample(model, None, steps=150, seeds=[0]).samples.reshape(-1, PIXELS).double()
        assert divergence(x, prior()) < most, name


def test_exact_guidance_draws_the_posterior_and_the_mean_sigma_does_not():
    work = Work(prior())
    model = work.prior.denoiser(4000)

    def drawn(guidance):
        return sample(model, guidance, steps=200, seeds=[0]).samples.reshape(-1, PIXELS).double()

    score, shift, mean = (
        drawn(exact_guidance(work, rule, edit, by_mean))
        for rule, edit, by_mean in (
            (SigmaScaled(), "score", False),
            (AsScore(), "shift", False),
            (SigmaScaled(), "score", True),
        )
    )
    right = divergence(score, work.posterior)
    assert right < 0.05 and divergence(mean, work.posterior) > 100 * right
    torch.testing.assert_close(score, shift, rtol=0, atol=1e-3)  # -w P g


def test_time_travel_leaves_the_marginal_as_it_is():
    six = gammas()["six schedules"]
    for clean, noisy in ((0.0, 0.3), (0.2, 0.9), (0.5, 1.0)):
        assert renoised_apart(prior(), six, clean, noisy) < 1e-12
    x = travelled(100, 4000, 2)
    assert divergence(x, prior()) < 0.08
    torch.testing.assert_close(x.mean(0), prior().mean, rtol=0, atol=0.08)


# ---- the rules' metric ---------------------------------------------------------------------------------------------


def signal(level: Level, after: Level, gradient: torch.Tensor, **more) -> Signal:
    return Signal(
        gradient=gradient,
        loss=torch.tensor([3.0, 0.5]),
        noise=torch.ones_like(gradient),
        level=level,
        next_level=after,
        metric=level.score_gain(after),
        **more,
    )


def test_rules_step_in_the_metric_of_the_level():
    gamma = polynomial(5)
    level, after = (Level.of_gamma(gamma(t)[None].detach()) for t in (0.7, 0.6))
    g = torch.randn(2, *SHAPE)
    gain = level.score_gain(after)
    plain = (after.alpha / level.alpha) * (level.sigma**2 - (level.alpha * after.sigma / after.alpha) ** 2)
    torch.testing.assert_close(gain, plain, rtol=1e-3, atol=1e-6)
    now = signal(level, after, g)

    def inside(u, v):
        return (u * v).flatten(1).sum(1).view(-1, 1, 1, 1)

    step, _ = PolyakToFloor(target=1.0).update(now, None)
    gap = torch.tensor([2.0, 0.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(step, gap / inside(g, gain * g) * gain * g)
    step, _ = Polyak(0.5).update(now, None)
    torch.testing.assert_close(step, 0.5 * 32**0.5 / inside(g, gain * g) * gain * g)
    step, _ = NoiseScaled(0.2).update(now, None)
    spread = level.step_std(after)
    torch.testing.assert_close((step / spread).flatten(1).norm(dim=1), torch.full((2,), 0.2 * 32**0.5))
    across = step / spread**2 / g  # one number per sample
    torch.testing.assert_close(across, across[:, :1, :1, :1].expand_as(across), rtol=1e-3, atol=0)
    step, _ = PolyakToFloor(target=0.0, cap=0.01).update(now, None)
    assert (step.flatten(1).norm(dim=1) <= 0.01 * 32**0.5 * 1.0001).all()
    step, _ = Unit(0.3).update(now, None)
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((2,), 0.3 * 32**0.5))


def test_a_proximal_point_is_the_posterior_of_pixels_of_different_spread():
    gamma = polynomial(2)
    level = Level.of_gamma(gamma(0.6)[None].detach().double())
    h = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0, y, noise = torch.randn(2, *SHAPE).double(), torch.randn(2, 5).double(), 0.2
    found = Proximal("posterior", 2.0, 60).displacement(x0, lambda x: (y - x.flatten(1) @ h.T, noise), level)
    spread = torch.diag((level.x0_variance / 2).flatten())
    gain = spread @ h.T @ torch.linalg.inv(h @ spread @ h.T + noise**2 * torch.eye(5))
    expected = (y - x0.flatten(1) @ h.T) @ gain.T
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_does_on_equal_maps_what_it_does_on_one_level(name):
    """A map of equal pixels takes the way of those that differ, and ends where one number for all does."""
    work = Work(prior())

    def drawn(gamma):
        model = work.prior.denoiser(1, gamma, final_sigmas_type="sigma_min")
        return sample(model, recipe_of(name, work), steps=12, seeds=range(3)).samples

    one, equal, six = (
        drawn(gamma)
        for gamma in (
            ScalarGamma(-6.0, 4.0),
            FunctionGamma(lambda t: (-6 + 10 * t).expand(1, 1, PIXELS)),
            PolynomialGamma.of(*torch.rand(3, 1, 1, PIXELS, generator=torch.Generator().manual_seed(0)), -6.0, 4.0),
        )
    )
    torch.testing.assert_close(equal, one, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(six).all() and not torch.allclose(six, one, atol=1e-3)


# ---- latents -------------------------------------------------------------------------------------------------------


def test_a_sample_s_latent_is_its_own_whatever_its_batch():
    model = made(MultivariateScheduler(conditioned()))
    guidance = recipes.auto(bright, clock="noise", augment=None, time_travel=TimeTravel(2, 0.3, 0.6))
    both = sample(model, guidance, steps=15, seeds=[5, 6, 7])
    alone = sample(model, guidance, steps=15, seeds=[6])
    torch.testing.assert_close(both.samples[1:2], alone.samples, rtol=1e-4, atol=1e-5)
    assert [r["progress"] for r in both.record.rows] == [r["progress"] for r in alone.record.rows]
    parts = sample(model, guidance, steps=15, seeds=[5, 6, 7], batch_size=2)
    torch.testing.assert_close(parts.samples, both.samples, rtol=1e-4, atol=1e-5)
    maps = [Solver.of(model.scheduler, 4, "cpu", [torch.Generator().manual_seed(s)]).levels[1].gamma for s in (5, 6)]
    assert (maps[0] - maps[1]).abs().max() > 0.1


def test_particles_of_a_picture_share_its_latent():
    model = made(MultivariateScheduler(conditioned()))
    guidance = recipes.fk_steering(bright, count=3, sharpness=50.0)
    both = sample(model, guidance, steps=10, seeds=[1, 2])
    alone = sample(model, guidance, steps=10, seeds=[2])
    torch.testing.assert_close(both.samples[1:], alone.samples, rtol=1e-4, atol=1e-5)


def test_latents_of_one_s_own():
    scheduler, z = MultivariateScheduler(conditioned()), torch.randn(2, 3)
    scheduler.set_timesteps(5, z=z)
    assert scheduler.gammas[1].shape == (2, *SHAPE)
    x, noise = torch.randn(2, 2, *SHAPE)
    times = torch.tensor([0.3, 0.6])
    level = Level.of_gamma(scheduler.gamma(times, z))
    torch.testing.assert_close(scheduler.add_noise(x, noise, times), level.mix(x, noise))
    other = Level.of_gamma(scheduler.gamma(times, z.flip(0)))
    torch.testing.assert_close(scheduler.add_noise(x, noise, times, z=z.flip(0)), other.mix(x, noise))
    with pytest.raises(ValueError, match="3 times and 2 latents"):
        scheduler.add_noise(*torch.randn(2, 3, *SHAPE), torch.rand(3))


def test_a_plain_ddim_loop_of_one_s_own_works():
    """As diffusers' users write it."""
    scheduler = MultivariateScheduler(polynomial())
    scheduler.set_timesteps(200)
    x = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.no_grad():
            prediction = narrow(scheduler.scale_model_input(x, t), scheduler.gamma_at(t, len(x)))
            x = scheduler.step(prediction, t, x).prev_sample
    assert x.std().item() == pytest.approx(0.5, abs=0.03)


def test_the_law_of_pixels_is_that_of_one_level_where_all_are_equal():
    law, level = prior(), Level.of(0.6, 0.8)
    a, s = (v.expand(PIXELS) for v in (level.alpha, level.sigma))
    plain = super(PixelGaussian, law)
    torch.testing.assert_close(law.gain(a, s), plain.gain(level.alpha, level.sigma))
    torch.testing.assert_close(law.posterior_covariance(a, s), plain.posterior_covariance(level.alpha, level.sigma))


@pytest.mark.parametrize("name", ["dsg", "tds"])
def test_rules_that_need_noise_refuse_the_flow(name):
    model = made(MultivariateScheduler(polynomial(), solver_type="ode"))
    with pytest.raises(ValueError, match="this solver"):
        sample(model, recipes.get(name)(bright), steps=8, seeds=[0])


def test_graphs_and_change_maps_know_maps_of_levels():
    model, guidance = made(MultivariateScheduler(polynomial())), recipes.auto(bright)
    plain = sample(model, guidance, steps=6, seeds=[0, 1])
    assert torch.equal(sample(model, guidance, steps=6, seeds=[0, 1], graphs=True).samples, plain.samples)
    change = torch.tensor([0.0, 0.3, 0.6, 1.0]).expand(1, 4, 4)
    source = torch.rand(SHAPE)
    changed = sample(model, guidance, steps=6, seeds=[0, 1], source=source, change_map=change).images
    apart = (changed - source).abs().amax((0, 1, 2))
    assert apart[0] == 0 and (apart[1:] > 0).all()


class Spy(PolyakToFloor):
    """Keeps the metrics it was given."""

    def update(self, signal, state):
        seen.append(signal.metric)
        return super().update(signal, state)


seen: list = []


def test_inner_steps_step_in_the_metric_of_x0():
    seen.clear()
    scheduler = MultivariateScheduler(polynomial())
    model = denoiser(lambda x, gamma: sigma(gamma) * x, scheduler, shape=SHAPE, per_pixel=True, decode=lambda x: x)
    loss = lambda image: image.square().flatten(1).mean(1)
    guidance = recipes.dps(loss, inner=Inner(1, Spy()), time_travel=None)
    sample(model, guidance, steps=3, seeds=[0])
    solver = Solver.of(scheduler, 3)
    assert len(seen) == 3
    for metric, level in zip(seen, solver.levels):
        torch.testing.assert_close(metric, level.x0_variance)


def test_a_composed_rule_is_natural_as_its_parts_are():
    assert Shortest((Unit(), PolyakToFloor())).natural and not Shortest((Unit(), Constant())).natural
    assert Chain((Constant(), Unit())).natural and not Chain((Constant(), Constant(2.0))).natural


def test_where_some_levels_stay_the_others_tell_whether_noise_is_drawn():
    """One pixel's level is the same at both ends of a step: nothing is drawn there, and it does not count."""
    start = torch.linspace(-2, 2, 8).view(1, 1, 2, 4)
    fall = torch.full_like(start, 2.0)
    fall[..., 0, 0] = 0
    level, after = Level.of_gamma(start), Level.of_gamma(start - fall)
    x0, noise, fresh = torch.randn(3, 4, 1, 2, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    mean = level.ancestral_mean(after, x0, noise)
    assert drew(mean + level.step_std(after) * fresh, level, after, x0, noise) is True
    assert drew(after.alpha * x0 + after.sigma * noise, level, after, x0, noise) is False
    assert drew(mean, level, level, x0, noise) is None
