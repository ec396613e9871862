"""What the guided step makes of a rule's step: identities of its edits, weights and windows in closed form."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from lossguide.guidance import Guidance
from lossguide.guidance.edits import drew, log_ratio, metric_of, score_for_shift, scored, summed
from lossguide.guidance.gradient import floor_of
from lossguide.guidance.guidance import Inner
from lossguide.guidance.particles import Particles
from lossguide.guidance.steps import Constant, NoiseScaled, PolyakToFloor, Signal, UnsuitableSolver
from lossguide.losses import Measurement, Term
from lossguide.samplers import Level, MultivariateScheduler, PolynomialGamma, Solver, TimeTravel
from lossguide.samplers.levels import KINDS
from lossguide.samplers.random import generators, randn
from models import vp_scheduler

LEVEL, AFTER = Level.of(0.6, 0.8), Level.of(0.8, 0.6)
GAMMA = torch.tensor([[[[0.5, -0.3], [1.0, 0.2]]]], dtype=torch.float64)
PER_PIXEL = Level.of_gamma(GAMMA), Level.of_gamma(GAMMA - torch.tensor([0.4, 0.9], dtype=torch.float64))
PAIRS = {"one level": (LEVEL, AFTER), "sigma space": (Level.of(1.0, 3.0), Level.of(1.0, 1.2)), "per pixel": PER_PIXEL}


def draws(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def squares(image):
    return (image - 0.8).square().flatten(1).sum(1)


# ---- edits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_scored_prediction_is_of_the_same_sample_with_its_noise_larger(kind, pair):
    level, _ = PAIRS[pair]
    x0, noise, move = draws(3, 3, 1, 2, 2)
    move[1] = 0
    x = level.mix(x0, noise)
    prediction = level.prediction(x0, noise, kind)
    found = scored(x, prediction, move, level, kind)
    torch.testing.assert_close(level.noise(found, x, kind), noise + move)
    torch.testing.assert_close(level.mix(level.x0(found, x, kind), noise + move), x)
    assert torch.equal(found[1], prediction[1]), "where nothing moves the prediction stays, to the bit"
    nothing = Level.of(0.0, 1.0)
    assert torch.equal(scored(x, prediction, move, nothing, kind), prediction)
    assert scored(x.float(), prediction.float(), move, level, kind).dtype == torch.float32


@pytest.mark.parametrize("pair", PAIRS)
def test_a_shift_as_a_score_lands_a_first_order_step_where_the_shift_would(pair):
    level, after = PAIRS[pair]
    x0, noise, shift = draws(3, 2, 1, 2, 2)
    x = level.mix(x0, noise)
    score = score_for_shift(shift, level, after)
    changed = noise + score
    end = after.mix(level.x0(changed, x, "epsilon"), changed)
    torch.testing.assert_close(end, after.mix(x0, noise) - shift)
    assert score_for_shift(shift, level, level) is None, "a step that stays cannot land elsewhere"
    assert score_for_shift(shift, after, level) is None, "nor can one to a noisier level"


@pytest.mark.parametrize("pair", PAIRS)
def test_metrics_are_what_a_score_moves(pair):
    """A score larger by -w g: what becomes of the noise, of x0, and of the mean of an ancestral step."""
    level, after = PAIRS[pair]
    x0, noise, g = draws(3, 2, 1, 2, 2)
    x, w = level.mix(x0, noise), 0.01
    changed = -level.sigma * (-noise / level.sigma - w * g)
    clean = level.x0(changed, x, "epsilon")
    ends = [level.ancestral_mean(after, *one) for one in ((x0, noise), (clean, changed))]
    for edit, moved in (("score", changed - noise), ("mean", x0 - clean), ("shift", ends[0] - ends[1])):
        torch.testing.assert_close(w * metric_of(level, after, edit, True) * g, moved, msg=edit)
    for edit in ("shift", "mean"):  # at x0: the variance of x0, of data of variance one
        at_x0 = metric_of(level, after, edit, False)
        torch.testing.assert_close(at_x0, 1 / (1 + (level.alpha / level.sigma) ** 2))
    moved = level.noise(x0 - metric_of(level, after, "mean", False) * g, x, "sample") - noise
    torch.testing.assert_close(metric_of(level, after, "score", False) * g, moved)


def test_a_pixel_without_noise_is_certain():
    level = Level.of_gamma(torch.tensor([[[[-float("inf"), 0.5]]]], dtype=torch.float64))
    for edit in ("score", "shift", "mean"):
        found = metric_of(level, level, edit, False).flatten()
        assert found[0] == 0 and found[1] > 0


def test_sums_of_what_may_be_missing():
    one, other = draws(2, 3)
    assert summed(None, None) is None and summed(one, None) is one and summed(None, other) is other
    torch.testing.assert_close(summed(one, other), one + other)


# ---- whether noise was drawn, and how likely --------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_drawn_noise_is_told_from_predicted_noise(pair):
    level, after = PAIRS[pair]
    x0, noise, fresh = draws(3, 5, 1, 2, 2)
    mean, std = level.ancestral_mean(after, x0, noise), level.step_std(after)
    assert drew(mean + std * fresh, level, after, x0, noise) is True
    assert drew(after.mix(x0, noise), level, after, x0, noise) is False
    assert drew(mean, level, level, x0, noise) is None
    assert drew(mean, level, Level.of(1.0, 0.0), x0, noise) is None
    part = torch.where(torch.arange(5).view(-1, 1, 1, 1) < 1, after.mix(x0, noise), mean + std * fresh)
    assert drew(part, level, after, x0, noise) is True, "by most of the samples"


@pytest.mark.parametrize("pair", PAIRS)
def test_the_ratio_is_that_of_two_normal_laws(pair):
    level, after = PAIRS[pair]
    x0, noise, fresh = draws(3, 50, 1, 2, 2)
    fresh = fresh / fresh.square().mean().sqrt()
    move = 0.3 * draws(50, 1, 2, 2, seed=7)
    mean, std = level.ancestral_mean(after, x0, noise), level.step_std(after)
    landed = mean + std * fresh
    now = Signal(move, squares(move), noise, level, after, x0=x0, landed=landed)
    law = torch.distributions.Normal
    ratio = law(mean, std).log_prob(landed - move) - law(mean - move, std).log_prob(landed - move)
    torch.testing.assert_close(log_ratio(now, move), ratio.flatten(1).sum(1))
    last = replace(now, next_level=Level.of(1.0, 0.0), landed=x0)
    assert torch.equal(log_ratio(last, move), torch.zeros(50).double()), "the last step draws nothing"
    for scale in (0.5, 1.5):
        with pytest.raises(UnsuitableSolver, match="weighed by the law of an ancestral step"):
            log_ratio(replace(now, landed=mean + scale * std * fresh), move)


def test_pixels_that_draw_nothing_say_nothing_of_the_ratio():
    stays = torch.tensor([0.0, 0.7], dtype=torch.float64).expand(1, 1, 2, 2)
    level, after = Level.of_gamma(GAMMA), Level.of_gamma(GAMMA - stays)
    x0, noise, fresh = draws(3, 100, 1, 2, 2)
    mean, std = level.ancestral_mean(after, x0, noise), level.step_std(after)
    fresh = fresh / fresh[..., 1].square().mean().sqrt()
    now = Signal(noise, squares(x0), noise, level, after, x0=x0, landed=mean + std * fresh)
    move = 0.1 * draws(100, 1, 2, 2, seed=7)
    law, part = torch.distributions.Normal, (..., slice(1, 2))
    at = (now.landed - move)[part]
    ratio = law(mean[part], std[part]).log_prob(at) - law((mean - move)[part], std[part]).log_prob(at)
    torch.testing.assert_close(log_ratio(now, move), ratio.flatten(1).sum(1))
    assert drew(now.landed, level, after, x0, noise) is True
    faint = 0.01 * noise
    assert drew(after.mix(x0, faint), level, after, x0, faint) is False, "those that stay do not tell"


# ---- floors of losses -------------------------------------------------------------------------------------------


def test_the_floor_of_a_sum_is_the_weighted_sum_of_floors():
    low, high = (Measurement(lambda image: image, torch.zeros(2, 3), sigma) for sigma in (0.1, 0.2))
    low.floor, high.floor = torch.tensor([0.5, 1.0]), 2.0
    loss = torch.zeros(6, dtype=torch.float64)
    terms = [Term(low, weight=3.0), Term(high, weight=0.5)]
    found = floor_of(terms, loss, None)
    torch.testing.assert_close(found, torch.tensor([2.5, 4.0] * 3, dtype=torch.float64))
    factors = [torch.tensor([float(i)] * 6) for i in (2, 4)]
    balanced = torch.tensor([2 * 1.5 + 4.0, 2 * 3 + 4.0] * 3, dtype=torch.float64)
    torch.testing.assert_close(floor_of(terms, loss, factors), balanced)
    assert floor_of([*terms, Term(squares)], loss, None) is None


# ---- a step of a run --------------------------------------------------------------------------------------------


def stepped(guidance, step=3, steps=10, movable=None, change=None, scheduler=None, eta=0.0, decode=lambda x: x):
    """The library's step from fixed values, the solver's own, and the parts of both; a denoiser that is `tanh`."""
    solver = Solver.of(scheduler or vp_scheduler(), steps)
    run = guidance.begin(solver, decode, [0, 1])
    if movable is not None:
        run.movable = lambda x: movable
    run.change = change
    visit = next(visit for visit in run.visits if visit.step == step)
    x = draws(2, 1, 2, 2, seed=5).requires_grad_(run.needs_graph(visit))
    prediction = torch.tanh(x)
    solve = lambda prediction, x: solver.step(prediction, step, x, eta=eta)
    found = run.step(x, prediction, visit, solve)
    x, prediction = x.detach(), prediction.detach()
    level = solver.levels[step]
    return found, solve(prediction, x), run, level, level.x0(prediction, x, solver.kind), x


def close(found, expected):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("edit", ["shift", "mean", "score"])
def test_what_may_not_move_takes_the_solvers_own_step(edit, strength):
    free = torch.tensor([[True, False], [True, True]]).expand(1, 1, 2, 2)
    guidance = Guidance(squares, rule=Constant(0.01), through="x0", edit=edit, strength=strength)
    found, plain, run, *_ = stepped(guidance, movable=free)
    whole, *_ = stepped(guidance)
    assert torch.equal(found[:, :, 0, 1], plain[:, :, 0, 1])
    close(found[:, :, 1], whole[:, :, 1])
    assert (whole != plain).all()


class Held:
    """A change that is free in some places, and holds the others at nothing."""

    def __init__(self, free):
        self.where = free

    def free(self, step):
        return self.where

    def landed(self, x, step):
        return torch.where(self.where, x, 0)


def test_what_a_change_holds_gets_nothing_of_the_guidance():
    free = torch.tensor([[True, False], [True, True]]).expand(1, 1, 2, 2)
    movable = torch.tensor([[True, True], [False, True]]).expand(1, 1, 2, 2)
    guidance = Guidance(squares, rule=NoiseScaled(0.1), through="x0")
    held, plain, *_ = stepped(guidance, change=Held(free))
    alone, *_ = stepped(guidance, movable=free)
    close(held, torch.where(free, alone, 0))
    both, *_ = stepped(guidance, change=Held(free), movable=movable)
    close(both, torch.where(free, stepped(guidance, movable=free & movable)[0], 0))
    none, *_ = stepped(guidance.replace(strength=0.0), change=Held(free))
    assert torch.equal(none, torch.where(free, plain, 0))


@pytest.mark.parametrize(("step", "start"), [(0, 0.0), (3, 0.3)])
def test_an_anchor_is_moved_and_put_at_the_next_level(step, start):
    """It starts at the middle of all pictures, or, where the loss acts later, at the picture that is seen by then."""
    guidance = Guidance(squares, Constant(0.01), through="x0", edit="anchor", start=start)
    found, _, run, level, x0, _ = stepped(guidance, step)
    anchor = torch.zeros_like(x0) if step == 0 else x0
    anchor = anchor - 0.02 * (anchor - 0.8)
    noise = randn((1, 2, 2), generators([0, 1], "guidance"))
    close(found, run.solver.levels[step + 1].mix(anchor, noise))


def test_an_anchor_ends_without_noise_whatever_the_last_level():
    scheduler = diffusers.DDIMScheduler(set_alpha_to_one=False, clip_sample=False)
    guidance = Guidance(squares, Constant(0.01), through="x0", edit="anchor", start=0.9)
    found, _, run, _, x0, _ = stepped(guidance, 9, scheduler=scheduler)
    assert run.solver.levels[10].sigma > 0
    close(found, x0 - 0.02 * (x0 - 0.8))


class Probe(Constant):
    """A step rule that remembers what it was shown."""

    def update(self, signal, state):
        self.__dict__["seen"] = signal
        return super().update(signal, state)


def test_where_pixels_differ_the_way_to_go_is_pulled_back_without_what_it_is_weighed_by():
    """Inner steps weigh each pixel by its spread; J^T, here a diagonal, takes the gradient, and so it is by hand."""
    a, b, c = draws(3, 1, 2, 2, seed=3).abs() + 0.1
    probe = Probe(0.0)
    guidance = Guidance(squares, probe, toward=Inner(1, rule=PolyakToFloor()))
    scheduler = MultivariateScheduler(PolynomialGamma.of(a, b, c))
    *_, level, x0, x = stepped(guidance, scheduler=scheduler)
    seen = probe.seen
    spread, gradient = level.x0_variance, 2 * (x0 - 0.8)
    whole = (spread * gradient.square()).flatten(1).sum(1).view(-1, 1, 1, 1)
    goal = squares(x0).view(-1, 1, 1, 1) / whole * spread * gradient
    close(seen.at_x0, goal)
    close(seen.dual, spread)
    jacobian = (1 - level.sigma * (1 - torch.tanh(x).square())) / level.alpha
    close(seen.slope, jacobian * goal / spread)
    close(seen.gradient, spread * jacobian * goal / spread)


@pytest.mark.parametrize("keep", ["sample", "noise"])
@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.01])
def test_inner_steps_are_gradient_descent_at_x0_each_times_the_strength(keep, blend, strength):
    """On a square of distance d, k steps of size h leave (1 - 2 h)^k d."""
    inner = Inner(3, rule=Constant(0.05 / strength), keep=keep, blend=blend)
    guidance = Guidance(squares, strength=strength, rule=None, through="x0", inner=inner)
    found, plain, run, level, x0, x = stepped(guidance)
    moved = (0.9**3 - 1) * (x0 - 0.8)
    if blend:
        moved = level.sigma / (level.alpha + level.sigma) * moved
    after = run.solver.levels[4]
    kept = after.alpha - after.sigma * level.alpha / level.sigma if keep == "sample" else after.alpha
    close(found, plain + kept * moved)


def test_small_gradients_move_x0_too():
    found, plain, run, _, x0, _ = stepped(
        Guidance(lambda x: 1e-4 * squares(x), rule=None, through="x0", inner=Inner(1, rule=Constant(500.0)))
    )
    close(found, plain - run.solver.levels[4].alpha * 0.1 * (x0 - 0.8))


def test_a_projection_replaces_what_was_moved():
    guidance = Guidance(squares, rule=Constant(0.01), through="x0", edit="mean", project=lambda x0: 0.5 * x0)
    found, plain, run, _, x0, _ = stepped(guidance)
    moved = 0.5 * (x0 - 0.02 * (x0 - 0.8)) - x0
    close(found, plain + run.solver.levels[4].alpha * moved)


@pytest.mark.parametrize("other", [lambda x: x[:1], lambda x: x[..., :1], lambda x: x.repeat(1, 1, 1, 2)])
def test_a_projection_or_a_picture_of_another_shape_is_told(other):
    with pytest.raises(ValueError, match="project makes .* and must return the same shape"):
        stepped(Guidance(squares, rule=Constant(0.01), through="x0", edit="mean", project=other))
    if other(torch.zeros(2, 1, 1, 1)).shape[0] < 2:
        for decode in (other, lambda x: x.repeat(2, 1, 1, 1)):
            with pytest.raises(ValueError, match="decode must return a float tensor with one picture for each"):
                stepped(Guidance(squares, through="x0"), decode=decode)


def test_the_record_says_what_a_step_was():
    guidance = Guidance(Term(squares, weight=2.0), rule=Constant(0.01), through="x0", strength=0.5)
    found, plain, run, level, x0, _ = stepped(guidance)
    row = run.record.rows[0]
    assert (row["step"], row["visit"], row["progress"], row["timestep"]) == (3, 0, 0.3, run.solver.times[3])
    assert (row["alpha"], row["sigma"]) == pytest.approx((level.alpha.item(), level.sigma.item()))
    assert 0 <= row["seconds"] < 60
    gradient = 4 * (x0 - 0.8)
    close(torch.as_tensor(row["loss"]), 2 * squares(x0))
    close(torch.as_tensor(row["gradient_norm"]), gradient.flatten(1).norm(dim=1))
    close(torch.as_tensor(row["step_size"]), 0.005 * gradient.flatten(1).norm(dim=1))
    close(plain - found, 0.005 * gradient)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(1.0, range(10)), (0.3, [0, 3, 6]), (0.5, [0, 2, 4, 6, 8]), (0.05, [0]), (0.25, [0, 5])],
)
def test_a_share_of_steps_is_spread_evenly(share, expected):
    solver = Solver.of(vp_scheduler(), 10)
    run = Guidance(squares, through_share=share).begin(solver, lambda x: x, [0])
    assert [visit.step for visit in run.visits if run.needs_graph(visit)] == list(expected)
    late = Guidance(squares, through_share=share, start=0.8).begin(solver, lambda x: x, [0])
    wanted = min(2, max(1, int(10 * share)))
    assert [visit.step for visit in late.visits if late.needs_graph(visit)] == [8, 9][:wanted]
    assert not any(Guidance(squares, through="x0").begin(solver, lambda x: x, [0])._graph_steps)


def test_a_window_that_holds_no_step_is_told():
    solver = Solver.of(vp_scheduler(), 10)
    with pytest.raises(
        ValueError, match=r"none of the 10 steps, the last ones at progress 0.70, 0.80, 0.90: its window"
    ):
        Guidance(squares, start=0.95).begin(solver, lambda x: x, [0])
    Guidance(squares, start=0.9).begin(solver, lambda x: x, [0])
    Guidance(Term(squares, weight=0.0), start=0.95).begin(solver, lambda x: x, [0])
    Guidance(squares, start=0.95, strength=0.0).begin(solver, lambda x: x, [0])


@pytest.mark.parametrize("share", [0.3, "signal", "ancestral"])
def test_remixing_exchanges_predicted_noise_for_fresh(share):
    """`sqrt(1 - p)` of the predicted noise and `sqrt(p)` of fresh noise, by guidance's own draws."""
    guidance = Guidance(squares, rule=Constant(0.0), through="x0", remix=share)
    found, plain, run, level, x0, x = stepped(guidance)
    after = run.solver.levels[4]
    part = {
        "signal": after.alpha / (after.alpha + after.sigma),
        "ancestral": 1 - (level.alpha * after.sigma / (after.alpha * level.sigma)) ** 2,
    }.get(share, torch.tensor(0.3))
    noise, fresh = level.noise(torch.tanh(x), x, "epsilon"), randn((1, 2, 2), generators([0, 1], "guidance"))
    close(found, after.alpha * x0 + after.sigma * ((1 - part).sqrt() * noise + part.sqrt() * fresh))
    random, solvers_own, *_ = stepped(guidance, scheduler=diffusers.DDIMScheduler(), eta=0.0)
    assert not torch.equal(random, solvers_own)


def test_remixing_needs_a_solver_that_starts_from_its_sample():
    with pytest.raises(UnsuitableSolver, match="which HeunDiscreteScheduler does not; choose Euler, DDIM or DPM"):
        stepped(Guidance(squares, through="x0", remix=0.5), scheduler=diffusers.HeunDiscreteScheduler())


def test_a_loss_for_other_pictures_is_told():
    def loss(image):
        return squares(image)

    loss.batch = 3
    with pytest.raises(ValueError, match="for 3 pictures, one each, and 2 are drawn"):
        stepped(Guidance(loss, through="x0"))


def test_time_travel_ends_at_the_level_it_came_from():
    guidance = Guidance(squares, Constant(0.0), through="x0", time_travel=TimeTravel(3))
    found, plain, run, level, *_ = stepped(guidance)
    after = run.solver.levels[4]
    r = level.alpha / after.alpha
    noise = randn((1, 2, 2), generators([0, 1], "guidance"))
    close(found, r * plain + (level.sigma**2 - r**2 * after.sigma**2).sqrt() * noise)
    assert [visit.repeat for visit in run.visits if visit.step == 3] == [0, 1, 2]


def level_of(x):
    return x.flatten(1).mean(1)


def depth_of(x):
    return -0.1 * level_of(x)


@pytest.mark.parametrize(
    ("loss", "kept"),
    [
        (Term(level_of), 0),
        (Term(depth_of), 1),
        (Term(level_of).during(0.0, 0.5), 0),
        (Term(level_of).during(0.0, 0.5) + Term(depth_of), 1),
    ],
    ids=["all along", "the other way", "only before", "one before and one at the end"],
)
def test_particles_are_judged_at_the_end_by_what_acts_there_or_else_by_all(loss, kept):
    guidance = Guidance(loss, rule=None, through="x0", particles=Particles(2, resample=False))
    *_, run, _, _, x = stepped(guidance)
    x = torch.stack([torch.zeros_like(x[0]), torch.ones_like(x[0])])
    assert run.finish(x).tolist() == [kept]


@pytest.mark.parametrize(("size", "fine"), [(1000.0, True), (1.0, False)])
def test_noise_that_round_off_explains_is_not_taken_for_another_solvers(size, fine):
    """A spread of 1.5 times the variance, at samples whose fifth digit is as large as the noise, and at small ones."""
    level, after = Level.of(1.0, 0.02), Level.of(1.0, 0.0115)
    x0, noise = torch.full((50, 1, 4, 4), size, dtype=torch.float64), torch.zeros(50, 1, 4, 4, dtype=torch.float64)
    fresh = draws(50, 1, 4, 4)
    fresh = fresh / fresh.square().mean().sqrt() * 1.5**0.5
    landed = level.ancestral_mean(after, x0, noise) + level.step_std(after) * fresh
    now = Signal(noise, level_of(x0), noise, level, after, x0=x0, landed=landed)
    if fine:
        assert log_ratio(now, 0 * fresh).eq(0).all()
    else:
        with pytest.raises(UnsuitableSolver):
            log_ratio(now, 0 * fresh)
