"""Noise levels: round trips between all prediction kinds, every scheduler family against the scheduler's own steps."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lossguide.samplers import Level, Solver, scheduler_levels
from lossguide.samplers.levels import KINDS, check_kind, prediction_kind

torch.set_default_dtype(torch.float32)


@given(alpha=st.floats(0.01, 1), sigma=st.floats(0.01, 100), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_every_kind_returns_the_x0_and_noise_it_was_made_from(alpha, sigma, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 3, 1, 2, 2, generator=generator, dtype=torch.float64)
    level = Level.of(alpha, sigma)
    x = level.mix(x0, noise)
    prediction = level.prediction(x0, noise, kind)
    torch.testing.assert_close(level.x0(prediction, x, kind), x0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(level.noise(prediction, x, kind), noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_x0(kind):
    prediction, x = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    for level in (
        Level.of(0.8, 0.6),
        Level.of(1.0, 3.0),
        Level(torch.rand(1, 1, 4, 4).double() + 0.1, torch.ones(1).double()),
    ):
        of_prediction, of_sample = level.weights(kind)
        torch.testing.assert_close(of_prediction * prediction + of_sample * x, level.x0(prediction, x, kind))


def test_levels_may_differ_per_sample_and_per_pixel():
    alpha = torch.rand(2, 1, 4, 4, dtype=torch.float64) * 0.9 + 0.05
    level = Level(alpha, (1 - alpha**2).sqrt())
    x0, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for kind in KINDS:
        prediction = level.prediction(x0, noise, kind)
        torch.testing.assert_close(level.x0(prediction, level.mix(x0, noise), kind), x0)


def test_a_level_without_noise_has_no_noise():
    level, x = Level.of(1.0, 0.0), torch.randn(1, 1, 2, 2)
    assert torch.equal(level.noise(x, x, "sample"), torch.zeros_like(x))


def test_an_unknown_kind_is_told():
    with pytest.raises(ValueError, match="score.*epsilon"):
        Level.of(0.5, 0.5).x0(torch.zeros(1), torch.zeros(1), "score")


def test_renoising_keeps_the_marginal():
    clean, noisy = Level.of(0.9, 0.435889894354), Level.of(0.4, 0.9165151389911681)
    x0 = torch.full((200_000,), 0.7, dtype=torch.float64)
    x = clean.mix(x0, torch.randn_like(x0))
    x = clean.renoise(x, noisy, torch.randn_like(x0))
    assert x.mean().item() == pytest.approx(0.4 * 0.7, abs=0.01)
    assert x.std().item() == pytest.approx(noisy.sigma.item(), abs=0.01)


def test_progress_is_that_of_ddpm_whatever_the_schedule():
    ddpm = diffusers.DDPMScheduler(beta_schedule="linear", timestep_spacing="trailing")
    expected = [step / 20 for step in range(21)]
    assert [level.progress for level in Solver.of(ddpm, 20).levels] == pytest.approx(expected, abs=0.011)
    for level in Solver.of(diffusers.FlowMatchEulerDiscreteScheduler(), 20).levels:
        wide = Level.of(1.0, (level.sigma / level.alpha).clamp(max=1e4))
        assert level.progress == pytest.approx(wide.progress, abs=1e-9)
    halfway = 1 - (-0.1 + (0.01 + 39.8 * math.log(2)) ** 0.5) / 19.9
    assert Level.of(0.5, 0.5).progress == pytest.approx(halfway, abs=0.006)
    per_pixel = Level(torch.tensor([0.2, 0.9]).view(1, 1, 1, 2), torch.tensor([0.9, 0.2]).view(1, 1, 1, 2))
    assert 0.3 < per_pixel.progress < 0.7


VP = dict(beta_schedule="linear", prediction_type="epsilon")
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler(**VP, clip_sample=False, timestep_spacing="trailing"),
    "ddim-leading": diffusers.DDIMScheduler(**VP, clip_sample=False),
    "ddpm": diffusers.DDPMScheduler(**VP, clip_sample=False),
    "euler": diffusers.EulerDiscreteScheduler(**VP),
    "euler-karras-v": diffusers.EulerDiscreteScheduler(
        beta_schedule="linear", prediction_type="v_prediction", use_karras_sigmas=True
    ),
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler(**VP),
    "kdpm2": diffusers.KDPM2DiscreteScheduler(**VP),
    "kdpm2-ancestral": diffusers.KDPM2AncestralDiscreteScheduler(**VP),
    "dpm-sde": diffusers.DPMSolverSDEScheduler(**VP),
    "dpm++": diffusers.DPMSolverMultistepScheduler(**VP, solver_order=1, final_sigmas_type="zero"),
    "dpm++-flow": diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1, final_sigmas_type="zero"
    ),
    "unipc": diffusers.UniPCMultistepScheduler(**VP, solver_order=1, final_sigmas_type="zero"),
    "edm": diffusers.EDMEulerScheduler(),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-inverted": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_prediction_leads_to_the_next_level(name):
    """With the true x0 and noise as its prediction, a solver's step lands on the next level it announces, in mean."""
    solver = Solver.of(SCHEDULERS[name], 8)
    assert len(solver.levels) == len(solver) + 1
    x0, noise = torch.full((1, 1, 64, 64), 0.3), torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for i in range(len(solver)):
        level, after = solver.levels[i], solver.levels[i + 1]
        x = level.mix(x0, noise)
        solver.model_input(x, i)  # some schedulers find their place here
        out = solver.step(
            level.prediction(x0, noise, solver.kind), i, x, generator=torch.Generator().manual_seed(100 + i)
        )
        assert out.mean().item() == pytest.approx((after.alpha * 0.3).item(), abs=0.05 * (1 + after.sigma.item()))
        assert (out - after.alpha * x0).std().item() == pytest.approx(after.sigma.item(), rel=0.05, abs=2e-3)


def test_a_scheduler_whose_level_cannot_be_read_is_refused():
    scheduler = diffusers.VQDiffusionScheduler(num_vec_classes=8)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="VQDiffusionScheduler cannot be read"):
        scheduler_levels(scheduler)


def test_a_flow_beyond_pure_noise_is_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002)  # as Cosmos does
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="at most 1, got 80"):
        scheduler_levels(scheduler)


def test_step_std_is_what_ddim_draws():
    scheduler = SCHEDULERS["ddim"]
    solver = Solver.of(scheduler, 50)
    for i in (0, 20, 48):
        t, before = int(solver.timesteps[i]), int(solver.timesteps[i + 1])
        expected = solver.scheduler._get_variance(t, before) ** 0.5
        assert solver.levels[i].step_std(solver.levels[i + 1]).item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_solver_returns_to_where_it_was():
    solver = Solver.of(diffusers.DPMSolverMultistepScheduler(**VP), 8)
    x = torch.randn(1, 1, 4, 4)
    solver.step(x, 0, x)
    state = solver.remember()
    first = solver.step(x, 1, x)
    solver.return_to(state)
    assert torch.equal(solver.step(x, 1, x), first)


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_timesteps_are_what_every_device_has(name):
    """MPS has no float64."""
    solver = Solver.of(getattr(diffusers, name)(use_karras_sigmas=True), 4)
    assert solver.timesteps.dtype == torch.float32
    assert solver.timesteps.tolist() == pytest.approx(solver.times)


def test_the_users_scheduler_is_never_touched():
    scheduler = diffusers.EulerDiscreteScheduler(**VP)
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(scheduler).items()}
    solver = Solver.of(scheduler, 5)
    solver.model_input(torch.zeros(1, 1, 2, 2), 0)
    solver.step(torch.zeros(1, 1, 2, 2), 0, torch.zeros(1, 1, 2, 2))
    for key, value in vars(scheduler).items():
        assert torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else value == before[key]


LEVELS = {
    "preserving": (Level.of(0.6, 0.8), Level.of(0.8, 0.6)),
    "sigma space": (Level.of(1.0, 3.0), Level.of(1.0, 1.2)),
    "flow": (Level.of(0.3, 0.7), Level.of(0.55, 0.45)),
    "per sample": tuple(
        Level(*(torch.tensor(v, dtype=torch.float64).view(2, 1) for v in level))
        for level in (((0.5, 0.6), (0.7, 0.8)), ((0.9, 0.7), (0.3, 0.5)))
    ),
    "gamma": tuple(Level.of_gamma(torch.tensor([[0.7], [1.5]], dtype=torch.float64) - by) for by in (0.0, 1.3)),
}


@pytest.mark.parametrize("name", LEVELS)
def test_an_ancestral_step_is_bayes_rule(name):
    """q(x_to | x, x0) of the two Gaussians x_to = a' x0 + s' n and x = r x_to + sqrt(s^2 - r^2 s'^2) n', r = a / a'."""
    level, to = LEVELS[name]
    x0, noise = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, r = level.mix(x0, noise), level.alpha / to.alpha
    between = level.sigma**2 - r**2 * to.sigma**2
    variance = 1 / (1 / to.sigma**2 + r**2 / between)
    mean = variance * (to.alpha * x0 / to.sigma**2 + r * x / between)
    torch.testing.assert_close(level.step_std(to) ** 2, variance)
    torch.testing.assert_close(level.ancestral_mean(to, x0, noise), mean)
    kept, drawn = level.shared(to)
    torch.testing.assert_close(kept + drawn, torch.ones_like(kept))
    back = to.renoise(torch.zeros_like(noise), level, noise)
    torch.testing.assert_close(back, between.sqrt() * noise)
    torch.testing.assert_close(to.renoise(x0, level, torch.zeros_like(x0)), r * x0)


@pytest.mark.parametrize("name", LEVELS)
def test_score_gain_is_what_a_score_moves_the_mean_by(name):
    """A score larger by g lowers the noise by s g and raises x0 by s^2 / a g."""
    level, to = LEVELS[name]
    x0, noise, g = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = level.ancestral_mean(to, x0 + level.sigma**2 / level.alpha * g, noise - level.sigma * g)
    torch.testing.assert_close(moved - level.ancestral_mean(to, x0, noise), level.score_gain(to) * g)


def test_the_ends_of_the_algebra():
    nothing, half, clean = Level.of(0.0, 1.0), Level.of(0.6, 0.8), Level.of(1.0, 0.0)
    assert nothing.score_gain(half) == 0, "a sample that holds no x0 tells nothing"
    assert half.step_std(clean) == 0 and half.shared(clean)[0] == 0
    assert half.shared(half) == (1, 0) and half.step_std(half) == 0
    assert clean.shared(half) == (1, 0), "a step to a noisier level draws nothing anew"
    assert Level.of_gamma(torch.tensor(1.0)).shared(Level.of_gamma(torch.tensor(2.0))) == (1, 0)
    assert clean.shared(clean)[0].isfinite() and clean.step_std(clean) == 0
    x0 = torch.randn(2, 3)
    assert (clean.noise(x0, x0 + 0.1, "sample") == 0).all(), "a difference is round-off, not noise"
    assert (nothing.progress, clean.progress) == (0, 1)
    assert (nothing.signal_share, clean.signal_share, nothing.x0_variance, clean.x0_variance) == (0, 1, 1, 0)


def test_levels_of_gamma_are_apart_where_differences_of_squares_are_round_off():
    """In float32: what is drawn anew is -expm1 of gamma's difference; with a level of another make, the general one."""
    gamma = torch.tensor([-12.0, 0.5, 9.0])
    for apart in (1e-4, 1e-2, 1.0):
        level, to = Level.of_gamma(gamma), Level.of_gamma(gamma - apart)
        exact = -torch.expm1((gamma - apart).double() - gamma.double())
        torch.testing.assert_close(level.shared(to)[1].double(), exact, rtol=1e-5, atol=0)
    other = Level(to.alpha, to.sigma)
    for one, two in ((level, other), (Level(level.alpha, level.sigma), to)):
        torch.testing.assert_close(one.shared(two), level.shared(to), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("epsilon", "v_prediction", "flow")])
def test_where_one_sample_has_no_noise_the_other_keeps_its_own(kind):
    sigma = torch.tensor([0.0, 0.5], dtype=torch.float64).view(2, 1)
    level = Level(1 - sigma if kind == "reverse-flow" else torch.ones_like(sigma), sigma)
    x0, noise = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prediction = x0 - noise if kind == "reverse-flow" else torch.nan_to_num(level.prediction(x0, noise, kind))
    x = level.mix(x0, noise)
    found = level.noise(prediction, x, kind)
    torch.testing.assert_close(found[1], noise[1])
    assert kind == "reverse-flow" or (found[0] == 0).all()
    apart = level.noise(prediction, x + 0.1, kind)  # as round-off may be
    assert kind == "reverse-flow" or (apart[0] == 0).all()


@pytest.mark.parametrize("data", [0.5, 1.7])
def test_edm_predictions_have_unit_variance(data):
    """What Karras et al. (2022) choose c_skip and c_out for, with data of variance sigma_data^2."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for sigma in (0.1, 0.6, 4.0):
        level = Level.of(1.0, sigma, data)
        of_x0, of_noise = level.prediction(one, zero, "edm"), level.prediction(zero, one, "edm")
        assert (data * of_x0) ** 2 + of_noise**2 == pytest.approx(1)
        c_out, c_skip = level.weights("edm")
        assert c_out == pytest.approx(sigma * data / (sigma**2 + data**2) ** 0.5)
        assert c_skip == pytest.approx(data**2 / (sigma**2 + data**2))
        assert level.weights("edm-v") == (-c_out, c_skip)
        assert level.prediction(one, zero, "edm-v") == -of_x0


def test_predictions_are_what_their_names_say():
    level, wide = Level.of(0.6, 0.8), Level.of(1.0, 3.0)
    x0, noise = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    said = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": 0.6 * noise - 0.8 * x0,
        "flow": noise - x0,
        "reverse-flow": x0 - noise,
    }
    for kind, prediction in said.items():
        torch.testing.assert_close(level.prediction(x0, noise, kind), prediction)
        torch.testing.assert_close(level.x0(prediction, level.mix(x0, noise), kind), x0)
        torch.testing.assert_close(level.noise(prediction, level.mix(x0, noise), kind), noise)
    torch.testing.assert_close(wide.prediction(x0, noise, "v_prediction"), (noise - 3 * x0) / 10**0.5)
    for kind in ("aim", "score", "zero"):  # before, between and after the known ones, by the alphabet
        for asked in (level.prediction, level.x0, level.noise):
            with pytest.raises(ValueError, match=f"unknown prediction kind '{kind}'; known are epsilon, sample"):
                asked(x0, noise, kind)


def test_preserving_coordinates_hold_the_same_picture():
    for level, stretch in ((Level.of(1.0, 3.0, 0.7), 10**0.5), (Level.of(0.3, 0.7), 1), (Level.of(0.6, 0.8), 1)):
        same = level.preserving()
        assert level.stretch == pytest.approx(stretch) and same.sigma_data == level.sigma_data
        assert same.alpha * stretch == pytest.approx(level.alpha) and same.sigma * stretch == pytest.approx(level.sigma)
        assert same.signal_share == pytest.approx(level.signal_share.item())
        assert level.signal_share + level.x0_variance == pytest.approx(1)
    both = Level(torch.tensor([1.0, 0.6]), torch.tensor([3.0, 0.8]))
    torch.testing.assert_close(both.stretch, torch.tensor([10**0.5, 1.0]))
    clean = Level.of_gamma(torch.tensor([-math.inf, 0.0]))
    assert clean.preserving() is clean and clean.stretch == 1 and clean.alpha[0] == 1 and clean.sigma[0] == 0
    torch.testing.assert_close(clean.alpha[1] ** 2, torch.tensor(0.5))


def test_pixels_may_differ_only_where_there_is_more_than_one_number_for_a_sample():
    of = lambda *shape: Level(torch.full(shape, 0.6), torch.tensor(0.8))
    assert not any(of(*shape).per_pixel for shape in ((), (4,), (4, 1, 1, 1), (1, 1)))
    assert all(of(*shape).per_pixel for shape in ((1, 2), (4, 1, 2, 2), (1, 3, 1, 1)))
    assert Level(torch.tensor(0.6), torch.full((1, 1, 2, 2), 0.8)).per_pixel


@given(time=st.floats(0.05, 0.95))
@settings(max_examples=50, deadline=None)
def test_progress_inverts_the_limit_of_ddpms_schedule(time):
    """`abar = exp(-integral of beta)`, beta from 0.1 to 20 linear in time (Song et al. 2021)."""
    share = math.exp(-sum(0.1 + 19.9 * (i + 0.5) / 2000 * time for i in range(2000)) / 2000 * time)
    if share > 1e-9:
        assert Level.of(share**0.5, (1 - share) ** 0.5).progress == pytest.approx(1 - time, abs=0.0051)


def test_numbers_stay_on_the_host_in_double():
    level = Level.of(0.6, 0.8)
    assert (
        level.alpha.dtype == level.sigma.dtype == torch.float64 and level.alpha.dim() == 0 and level.sigma_data == 0.5
    )
    alpha = torch.rand(3, 1)
    assert Level.of(alpha, 0.5).alpha is alpha
    x = torch.randn(2, 3, dtype=torch.float16)
    assert level.mix(x, x).dtype == level.x0(x, x, "v_prediction").dtype == torch.float16
    of_prediction, of_sample = Level(alpha, alpha).weights("epsilon")
    assert of_prediction.dtype == of_sample.dtype == torch.float32


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (diffusers.DDIMScheduler(), "epsilon"),
        (diffusers.DDIMScheduler(prediction_type="sample"), "sample"),
        (diffusers.DDPMWuerstchenScheduler(), "epsilon"),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "flow"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "flow"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "reverse-flow"),
        (diffusers.FlowMatchHeunDiscreteScheduler(), "flow"),
        (diffusers.EDMEulerScheduler(), "edm"),
        (diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"), "edm-v"),
    ],
)
def test_kinds_of_schedulers(scheduler, kind):
    assert prediction_kind(scheduler) == kind and check_kind(kind) == kind


def test_a_kind_that_nobody_knows_is_told():
    scheduler = diffusers.DDIMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="unknown prediction kind 'score'"):
        prediction_kind(scheduler)


def test_levels_of_schedulers_at_their_own_tables():
    """Every family's table against its own formula: one level per visit, and the clean end."""
    ddim = diffusers.DDIMScheduler(**VP, set_alpha_to_one=False)
    ddim.set_timesteps(4)
    found = scheduler_levels(ddim)
    assert len(found) == 5
    for level, t in zip(found, [*ddim.timesteps.tolist(), 0]):
        assert level.signal_share.item() == pytest.approx(ddim.alphas_cumprod[t].item())
        assert (level.alpha**2 + level.sigma**2).item() == pytest.approx(1)
    ends = diffusers.DDPMScheduler(**VP)
    ends.set_timesteps(4)
    assert scheduler_levels(ends)[-1].sigma == 0 and scheduler_levels(ends)[-1].alpha == 1
    euler = diffusers.EulerDiscreteScheduler(**VP)
    euler.set_timesteps(4)
    assert [(level.alpha, level.sigma) for level in scheduler_levels(euler)] == [(1, s) for s in euler.sigmas.tolist()]
    euler.sigmas = euler.sigmas[:-1]
    assert [level.sigma.item() for level in scheduler_levels(euler)] == [*euler.sigmas.tolist(), 0], "its end untold"
    ddim.sigmas = euler.sigmas[:3]
    assert scheduler_levels(ddim)[0].signal_share == found[0].signal_share, "sigmas of other timesteps are not read"
    dpm = diffusers.DPMSolverMultistepScheduler(**VP)
    dpm.set_timesteps(4)
    for level, s in zip(scheduler_levels(dpm), dpm.sigmas.tolist()):
        assert (level.sigma / level.alpha).item() == pytest.approx(s)
        assert (level.alpha**2 + level.sigma**2).item() == pytest.approx(1)
    edm = diffusers.EDMEulerScheduler(sigma_data=0.7)
    edm.set_timesteps(4)
    assert {level.sigma_data for level in scheduler_levels(edm)} == {0.7}
    cascade = diffusers.DDPMWuerstchenScheduler(s=0.01)
    cascade.set_timesteps(4)
    found = scheduler_levels(cascade)
    cosine = lambda t: math.cos((t + 0.01) / 1.01 * math.pi / 2) ** 2 / math.cos(0.01 / 1.01 * math.pi / 2) ** 2
    shares = [min(max(cosine(t), 1e-4), 0.9999) for t in cascade.timesteps.tolist()]
    count = len(found) - 1
    assert [level.signal_share.item() for level in found] == pytest.approx([*shares[:count], 1.0], abs=1e-6)
    assert all((level.alpha**2 + level.sigma**2).item() == pytest.approx(1) for level in found)


def test_timesteps_beyond_the_table_are_told():
    ddim = diffusers.DDIMScheduler(**VP)
    ddim.timesteps = torch.tensor([999, 0])
    assert len(scheduler_levels(ddim)) == 3
    ddim.timesteps = torch.tensor([], dtype=torch.long)
    assert len(scheduler_levels(ddim)) == 1, "the end alone"
    ddim.timesteps = torch.tensor([1000, 0])
    with pytest.raises(ValueError, match="DDIMScheduler cannot be read: it visits timestep 1000"):
        scheduler_levels(ddim)


def test_what_a_flow_s_sigmas_may_be():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    for most, fine in ((1.0, True), (1.00005, True), (1.01, False), (1.5, False)):
        flow.sigmas[1] = most
        if fine:
            assert [(a.alpha + a.sigma).item() for a in scheduler_levels(flow)] == pytest.approx([1] * 5)
        else:
            with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler cannot be read: a flow's sigmas"):
                scheduler_levels(flow)
    consistency = diffusers.CMStochasticIterativeScheduler()
    consistency.set_timesteps(4)
    with pytest.raises(ValueError, match="neither `sigmas` nor `alphas_cumprod`; use a scheduler of the DDIM"):
        scheduler_levels(consistency)
