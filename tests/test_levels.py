"""Noise levels: round trips between all prediction kinds, every scheduler family against the scheduler's own steps."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lossguide.samplers import Level, Solver, scheduler_levels
from lossguide.samplers.levels import KINDS

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
