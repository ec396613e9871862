"""Moves of a sample reach the earlier sample that second-order solvers, single-step ones and correctors go on from."""

from __future__ import annotations

import diffusers
import pytest
import torch
from lossguide.guidance import recipes
from lossguide.losses import Measurement
from lossguide.samplers import TimeTravel, denoiser, sample
from lossguide.samplers.solver import Solver
from models import Gaussian

LINEAR = dict(beta_schedule="linear")
NOISE, CLEAN = "epsilon", "sample"
SOLVERS = {
    "heun": (diffusers.HeunDiscreteScheduler(**LINEAR), NOISE),
    "kdpm2": (diffusers.KDPM2DiscreteScheduler(**LINEAR), NOISE),
    "kdpm2 ancestral": (diffusers.KDPM2AncestralDiscreteScheduler(**LINEAR), NOISE),
    "flow heun": (diffusers.FlowMatchHeunDiscreteScheduler(), "velocity"),
    "unipc": (diffusers.UniPCMultistepScheduler(**LINEAR, solver_order=2), CLEAN),
    "unipc 3": (
        diffusers.UniPCMultistepScheduler(**LINEAR, solver_order=3, solver_type="bh1", final_sigmas_type="sigma_min"),
        CLEAN,
    ),
    "unipc of noise": (
        diffusers.UniPCMultistepScheduler(**LINEAR, predict_x0=False, final_sigmas_type="sigma_min"),
        NOISE,
    ),
    "unipc, flow": (
        diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero"
        ),
        CLEAN,
    ),
    "single": (diffusers.DPMSolverSinglestepScheduler(**LINEAR, solver_order=2), CLEAN),
    "single 3": (diffusers.DPMSolverSinglestepScheduler(**LINEAR, solver_order=3), CLEAN),
    "single of noise": (
        diffusers.DPMSolverSinglestepScheduler(**LINEAR, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
        NOISE,
    ),
    "single, random": (diffusers.DPMSolverSinglestepScheduler(**LINEAR, algorithm_type="sde-dpmsolver++"), CLEAN),
    "midpoint, random": (diffusers.DPMSolverSDEScheduler(**LINEAR, noise_sampler_seed=0), CLEAN),
    "pndm": (diffusers.PNDMScheduler(**LINEAR, skip_prk_steps=True), NOISE),
    "pndm, four times": (diffusers.PNDMScheduler(**LINEAR), NOISE),
}


def landings(name: str, moved_after: int | None, move: torch.Tensor, steps: int = 6) -> tuple[list, Solver]:
    """Where each step lands whose predicted noise, clean sample or velocity is given, whatever the sample."""
    scheduler, kept = SOLVERS[name]
    solver = Solver.of(scheduler, steps)
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * solver.initial_sigma
    landed = []
    for index in range(len(solver)):
        given = torch.full_like(x, 0.1 * index)
        level = solver.levels[index]
        if kept == "velocity":
            prediction = given
        else:
            noise = given if kept == NOISE else level.noise(given, x, "sample")
            x0 = given if kept == CLEAN else level.x0(given, x, "epsilon")
            prediction = level.prediction(x0, noise, solver.kind)
        noise_source = torch.Generator().manual_seed(100 + index)
        torch.manual_seed(100 + index)
        x = solver.step(prediction, index, x, generator=noise_source)
        if index == moved_after:
            solver.carry(x, x + move, index)
            x = x + move
        landed.append(x)
    return landed, solver


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_move_reaches_the_next_landing_as_by_a_step_of_first_order(name, after):
    """What is predicted being the same, the next sample moves as much as the formula of a first-order step says."""
    move = torch.tensor([0.5, -0.25, 1.0, 0.0, 0.3, 0.2, -0.7, 0.1], dtype=torch.float64).reshape(1, 2, 2, 2)
    still, solver = landings(name, None, move)
    moved, _ = landings(name, after, move)
    here, there = solver.levels[after + 1], solver.levels[after + 2]
    factor = {NOISE: there.alpha / here.alpha, CLEAN: there.sigma / here.sigma, "velocity": 1.0}[SOLVERS[name][1]]
    if name == "single, random":
        factor = factor * there.sigma * here.alpha / (here.sigma * there.alpha)
    if name == "midpoint, random":
        factor = factor**2
    torch.testing.assert_close(moved[after + 1] - still[after + 1], factor * move, rtol=1e-3, atol=1e-4)
    assert not torch.equal(moved[after + 1], still[after + 1])


@pytest.mark.parametrize("name", SOLVERS)
def test_without_carrying_a_move_is_lost_somewhere(name, monkeypatch):
    monkeypatch.setattr(Solver, "carry", lambda *_: None)
    move = torch.ones(1, 2, 2, 2, dtype=torch.float64)
    still, _ = landings(name, None, move)
    lost = [(landings(name, after, move)[0][after + 1] - still[after + 1]).abs().max() < 1e-3 for after in range(4)]
    assert any(lost)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_move_is_carried_nowhere(name):
    move = torch.ones(1, 2, 2, 2, dtype=torch.float64)
    last = len(Solver.of(SOLVERS[name][0], 6)) - 1
    assert torch.equal(landings(name, last, move)[0][last], landings(name, None, move)[0][last] + move)


def test_a_move_is_carried_to_each_copy_that_is_stepped_along():
    """DiT's pipeline steps its guided and its unguided samples together."""
    solver = Solver.of(SOLVERS["heun"][0], 4)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    solver.step(torch.zeros(4, 1, 2, 2), 0, torch.cat([x, x]))
    before, move = solver.scheduler.sample.clone(), torch.ones(2, 1, 2, 2)
    move[1] = 2
    solver.carry(x, x + move, 0)
    assert (solver.scheduler.sample - before).flatten(1).mean(1).tolist() == pytest.approx([1, 2, 1, 2], abs=1e-4)


@pytest.mark.parametrize("name", ["heun", "kdpm2", "single", "midpoint, random"])
def test_time_travel_goes_back_to_where_whole_steps_begin(name):
    """From the middle of one, the kept sample would stay behind."""
    guidance = recipes.dps(lambda image: image.flatten(1).mean(1), time_travel=TimeTravel(3, 0.0, 1.0))
    run = guidance.begin(Solver.of(SOLVERS[name][0], 6), lambda x: x, [0])
    repeats = [sum(visit.step == step for visit in run.visits) for step in range(len(run.solver))]
    assert repeats == [3 if run.solver.begins(step) else 1 for step in range(len(repeats))]
    assert repeats[:4] == [3, 1, 3, 1]


def test_where_the_level_stays_nothing_moves():
    """The second halves of Heun's steps end at the level where they began."""
    guidance = recipes.dps(lambda image: image.square().flatten(1).mean(1), through="x0", strength=100.0)
    gaussian = Gaussian(torch.tensor([0.4, -0.4]), torch.tensor([[0.5, 0.45], [0.45, 0.5]]))
    exact = gaussian.denoiser(4)
    model = denoiser(lambda x, t: exact.model(x, t.round()), SOLVERS["heun"][0], shape=exact.shape, decode=exact.decode)
    carry, moved = Solver.carry, []

    def seen(self, before, after, index):
        moved.append(index)
        carry(self, before, after, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Solver, "carry", seen)
        rows = sample(model, guidance, steps=5, seeds=[0]).record.rows
    assert len(rows) == 9 and moved == [0, 2, 4, 6, 8]


def test_solvers_that_nothing_is_known_of_are_told_apart():
    assert not Solver.of(diffusers.SASolverScheduler(**LINEAR), 4).keeps_shifts
    heun, euler = (Solver.of(one, 4) for one in (SOLVERS["heun"][0], diffusers.EulerDiscreteScheduler()))
    assert heun.keeps_shifts and not heun.goes_on and euler.keeps_shifts and euler.goes_on


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("kind", [diffusers.UniPCMultistepScheduler, diffusers.HeunDiscreteScheduler])
def test_measurements_are_followed_as_by_a_solver_that_goes_on(kind, steps):
    """The measured half of each vector comes as near to what was measured as by Euler's solver."""
    gaussian = Gaussian(torch.tensor([0.4, -0.4]), torch.tensor([[0.5, 0.45], [0.45, 0.5]]))
    exact = gaussian.denoiser(200)

    def model(x, t):  # Heun's times lie between the integers
        return exact.model(x, t.round())

    loss = Measurement(lambda x: x[..., :1], torch.full((1, 200, 1), 0.9), 0.1)

    def residual(scheduler) -> torch.Tensor:
        guided = denoiser(model, scheduler, shape=exact.shape, decode=exact.decode)
        samples = sample(guided, recipes.auto(loss), steps=steps, seeds=range(4)).samples
        return (samples[..., 0] - 0.9).square().mean((1, 2)).sqrt()

    own = kind(**LINEAR, **({"final_sigmas_type": "zero"} if "UniPC" in kind.__name__ else {}))
    found, euler = residual(own), residual(diffusers.EulerDiscreteScheduler(**LINEAR))
    assert (found < 1.5 * euler + 0.02).all(), (found, euler)
