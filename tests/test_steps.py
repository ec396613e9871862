"""Step rules against closed forms: steps that solve a linear problem exactly, lengths, identities, defaults."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lossguide.guidance.steps import (
    Adam,
    AlphaProduct,
    AncestralShare,
    AsNoise,
    AsScore,
    Chain,
    Constant,
    Fisher,
    LevelRatio,
    NoiseScaled,
    Polyak,
    PolyakToFloor,
    PriorGap,
    Reach,
    Rms,
    Scheduled,
    Shortest,
    SigmaScaled,
    Signal,
    Spherical,
    SqrtAlpha,
    Squared,
    StepRule,
    Unit,
    UnsuitableSolver,
    norm,
    per_sample,
    unit,
)
from lossguide.samplers import Level

LEVEL, AFTER = Level.of(0.6, 0.8), Level.of(0.8, 0.6)


def draws(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def signal(batch=3, shape=(2, 2, 3), **more):
    """A signal of random parts at LEVEL."""
    gradient, noise, x0, at_x0 = draws(4, batch, *shape)
    fields = dict(gradient=gradient, noise=noise, x0=x0, at_x0=at_x0, loss=draws(batch, seed=1).abs() + 0.5)
    return Signal(**(fields | dict(level=LEVEL, next_level=AFTER) | more))


def step(rule, now):
    return rule.update(now, rule.init(now.gradient))[0]


def inner(a, b):
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.dim() - 1))


# ---- lengths ----------------------------------------------------------------------------------------------------


@given(size=st.floats(-35, 35), dims=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_units_have_length_one_whatever_the_size(size, dims):
    x = draws(3, *[2] * dims) * 10.0**size
    x[1] = 0
    found = unit(x)
    torch.testing.assert_close(norm(found).flatten(), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(norm(x).shape, torch.Size([3, *[1] * dims]))
    torch.testing.assert_close(norm(x) * found, x)
    torch.testing.assert_close(norm(x).flatten(), x.flatten(1).square().sum(1).sqrt())
    torch.testing.assert_close(unit(x.float()), found.float(), rtol=1e-5, atol=1e-6)


def test_numbers_per_sample_broadcast():
    like = torch.zeros(2, 3, 4, dtype=torch.float16)
    found = per_sample(torch.tensor([1.0, 2.0]), like)
    assert found.shape == (2, 1, 1) and found.dtype == torch.float16 and found.flatten().tolist() == [1, 2]
    assert per_sample(torch.tensor([True, False]), like, torch.bool).dtype == torch.bool


# ---- steps that solve something exactly -------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, 0.2])
def test_polyaks_step_ends_where_a_linear_loss_is_at_its_target(target):
    """L = <g, x>: after the step it is L*, and nothing moves where it is below."""
    now = signal(floor=torch.tensor([0.1, 0.3, 9.0], dtype=torch.float64))
    moved = step(PolyakToFloor(target), now)
    wanted = now.floor if target is None else torch.full_like(now.loss, target)
    after = now.loss - inner(now.gradient, moved).flatten()
    torch.testing.assert_close(after, torch.minimum(wanted, now.loss))
    unknown = step(PolyakToFloor(), replace(now, floor=None))
    torch.testing.assert_close(inner(now.gradient, unknown).flatten(), now.loss)


def test_polyaks_step_in_a_metric_is_the_shortest_in_it():
    """Of all steps to the target of a linear loss, M g's multiple is the shortest by <d, d / M>."""
    metric = draws(1, 2, 2, 3, seed=5).abs() + 0.1
    now = signal(metric=metric)
    moved = step(PolyakToFloor(), now)
    torch.testing.assert_close(inner(now.gradient, moved).flatten(), now.loss)
    across = draws(3, 2, 2, 3, seed=6)
    across = across - inner(across, now.gradient) / inner(now.gradient, now.gradient) * now.gradient
    length = lambda d: inner(d, d / metric)
    assert all((length(moved + size * across) > length(moved)).all() for size in (-0.1, 0.1))


@pytest.mark.parametrize("metric", [None, draws(1, 2, 2, 3, seed=5).abs() + 0.1])
def test_a_cap_is_the_root_mean_square_at_most(metric):
    now = signal(metric=metric, loss=torch.tensor([1e-9, 50.0, 100.0], dtype=torch.float64))
    free, capped = step(PolyakToFloor(), now), step(PolyakToFloor(cap=0.3), now)
    torch.testing.assert_close(capped[:1], free[:1])
    torch.testing.assert_close(capped.square().flatten(1).mean(1).sqrt()[1:], torch.full((2,), 0.3).double())
    torch.testing.assert_close(unit(capped), unit(free))


def test_reach_moves_x0_as_far_as_was_asked():
    """With g = J^T g0 and J linear, x0's move J d falls along g0 by as much as `size * g0` would."""
    jacobian = draws(5, 5, seed=3)
    at_x0 = draws(2, 5, seed=4)
    now = signal(2, (5,), gradient=at_x0 @ jacobian, at_x0=at_x0)
    moved = step(Reach(1.3), now) @ jacobian.T
    torch.testing.assert_close(inner(moved, at_x0), 1.3 * inner(at_x0, at_x0))
    torch.testing.assert_close(step(Reach(1.3), replace(now, gradient=at_x0)), 1.3 * at_x0)


def test_reach_in_two_metrics():
    """Where pixels differ: along M g, and <M0 g0, g0> of the gradient at x0 is what is reached."""
    metric, metric_x0, dual = (draws(1, 2, 2, 3, seed=seed).abs() + 0.1 for seed in (5, 6, 7))
    now = signal(metric=metric, metric_x0=metric_x0)
    moved = step(Reach(), now)
    torch.testing.assert_close(inner(moved, now.gradient), inner(now.at_x0, metric_x0 * now.at_x0))
    torch.testing.assert_close(unit(moved), unit(metric * now.gradient))
    weighed = replace(now, gradient=dual * now.gradient, at_x0=dual * now.at_x0, dual=dual)
    torch.testing.assert_close(step(Reach(), weighed), moved)
    torch.testing.assert_close(weighed.slope, now.gradient)
    torch.testing.assert_close(step(NoiseScaled(), weighed), step(NoiseScaled(), now))
    assert now.whitened_x0.shape == now.at_x0.shape and signal().whitened_x0 is not None


def test_squared_is_the_gradient_of_half_the_square():
    leaf = draws(3, 4).requires_grad_()
    loss = leaf.sin().sum(1)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    (expected,) = torch.autograd.grad((loss.square() / 2).sum(), leaf)
    now = signal(3, (4,), gradient=gradient, loss=loss.detach())
    torch.testing.assert_close(step(Squared(), now), expected)


def test_fisher_is_natural_gradient_of_a_softmax():
    """To first order, logits that fall by `(p + damping)^-1 g` make a linear loss of the tokens fall by as much as
    Polyak's step promises."""
    logits, gradient = draws(2, 4, 5), draws(2, 4, 5, seed=1)
    now = signal(2, (4, 5), x0=logits, gradient=gradient)
    moved = step(Fisher(damping=0.3), now)
    torch.testing.assert_close(inner(gradient, moved).flatten(), now.loss)
    torch.testing.assert_close(unit(moved), unit(gradient / (logits.softmax(1) + 0.3)))
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"damping is positive, got {bad}"):
            Fisher(damping=bad)
    with pytest.raises(ValueError, match="Constant knows no metric"):
        Fisher(Constant())
    assert Fisher(damping=5.0).damping == 5 and Fisher().damping == 0.01


# ---- steps as long as something known ---------------------------------------------------------------------------


def test_steps_of_known_length():
    now = signal()
    e, n = norm(now.noise), 12**0.5
    for rule, length in (
        (Unit(0.1), torch.full_like(e, 0.1 * n)),
        (Rms(0.1), 0.1 * 0.8 / 0.6 * e),
        (Rms(0.1, by_level=False), 0.1 * e),
        (Polyak(0.5), 0.5 * e / norm(now.gradient)),
        (NoiseScaled(0.3), torch.full_like(e, 0.3 * n * LEVEL.step_std(AFTER).item())),
        (NoiseScaled(0.3, fading=True), torch.full_like(e, 0.3 * n * LEVEL.step_std(AFTER).item() * 0.8 * 2.5)),
        (Constant(0.7), 0.7 * norm(now.gradient)),
        (SqrtAlpha(0.7), 0.7 * 0.6 * norm(now.gradient)),
        (AlphaProduct(0.7), 0.7 * 0.6 * 0.8 * norm(now.gradient)),
        (SigmaScaled(0.7), 0.7 * 0.8 * norm(now.gradient)),
        (LevelRatio(), 0.8 / 0.6 * norm(now.gradient)),
        (AncestralShare(), 0.8 * (1 - 0.36 / 0.64) / 0.64 * norm(now.gradient)),
        (AsNoise(), 0.6 / 0.8 * norm(now.gradient)),
        (AsScore(0.7), 0.7 * LEVEL.score_gain(AFTER).item() * norm(now.gradient)),
    ):
        found = step(rule, now)
        torch.testing.assert_close(norm(found), length, msg=str(rule))
        torch.testing.assert_close(unit(found), unit(now.gradient), msg=str(rule))


@pytest.mark.parametrize("rule", [Unit(0.1), NoiseScaled(0.3), PolyakToFloor(cap=0.01), Spherical(1.0)])
def test_lengths_are_those_of_what_may_move(rule):
    """A sample of which half may move steps as the half alone would."""
    now = signal(2, (4, 3), landed=draws(2, 4, 3, seed=8))
    free = torch.zeros(4, 1, dtype=torch.bool)
    free[:2] = True
    kept = now.within(free)
    cut = {name: getattr(now, name)[:, :2] for name in ("gradient", "noise", "x0", "at_x0", "landed")}
    alone = step(rule, replace(now, **cut))
    torch.testing.assert_close(step(rule, kept)[:, :2], alone)
    assert kept.count.flatten().tolist() == [6, 6] and kept.count.shape == (2, 1, 1)
    assert (kept.noise[:, 2:] == 0).all() and now.within(None) is now
    torch.testing.assert_close(kept.root.flatten(), torch.full((2,), 6**0.5).double())


def test_fading_counts_only_steps_whose_level_changes():
    """Heun visits levels twice."""
    once = [Level.of(1, 1 - i / 25) for i in range(26)]
    twice = [level for level in once[:-1] for _ in range(2)] + once[-1:]
    rule = NoiseScaled(fading=True)
    lengths = [rule.update(signal(levels=levels), None) for levels in (once, twice)]
    assert [state for _, state in lengths] == [25, 25]
    torch.testing.assert_close(lengths[0][0], lengths[1][0])
    torch.testing.assert_close(lengths[0][0], 2**0.5 * 0.8 * step(NoiseScaled(), signal()))
    assert rule.update(signal(levels=twice), 50)[1] == 50, "counted once"


@pytest.mark.parametrize("schedule", ["constant", "increase", "decrease"])
def test_schedules_have_mean_one(schedule):
    shares = [0.1, 0.3, 0.6, 0.9, 1.0]
    levels = [Level.of(share**0.5, (1 - share) ** 0.5) for share in shares]
    now = signal(levels=levels)
    weights = [(step(Scheduled(2.0, schedule), replace(now, step=i)) / now.gradient).mean().item() for i in range(4)]
    assert sum(weights) / 4 == pytest.approx(2)
    ratios = [a / b for a, b in zip(shares, shares[1:])]
    ratios = {"constant": [1.0] * 4, "increase": ratios, "decrease": [1 - ratio for ratio in ratios]}[schedule]
    assert [w / weights[0] for w in weights] == pytest.approx([r / ratios[0] for r in ratios])
    with pytest.raises(ValueError, match="a schedule is constant, increase or decrease, got 'up'"):
        Scheduled(schedule="up")


def test_adam_is_torchs():
    """The same moments as torch.optim.Adam's, over several steps."""
    rule = Adam(0.1, 0.7, 0.9)
    leaf = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([leaf], lr=0.1, betas=(0.7, 0.9), eps=1e-8)
    place, state = torch.zeros(2, 3, dtype=torch.float64), rule.init(leaf)
    for i in range(4):
        gradient = draws(2, 3, seed=i)
        moved, state = rule.update(signal(2, (3,), gradient=gradient), state)
        place = place - moved
        leaf.grad = gradient
        optimiser.step()
        torch.testing.assert_close(place, leaf.detach())


# ---- steps that know the solver's noise -------------------------------------------------------------------------


def landed(now, noise):
    return now.level.ancestral_mean(now.next_level, now.x0, now.noise) + now.level.step_std(now.next_level) * noise


@pytest.mark.parametrize(("k", "strength"), [(0.0, 1.0), (0.3, 1.0), (0.3, 2.0), (1.0, 1.0), (0.7, 5.0)])
def test_a_spherical_step_turns_the_noise_and_ends_on_the_sphere(k, strength):
    now = signal(strength=strength)
    noise = draws(3, 2, 2, 3, seed=9)
    now = replace(now, landed=landed(now, noise))
    mean, std, root = landed(now, 0 * noise), LEVEL.step_std(AFTER), 12**0.5
    end, state = now.landed - Spherical(k).update(now, None)[0], Spherical(k).update(now, None)[1]
    torch.testing.assert_close(norm(end - mean), (root * std).expand(3, 1, 1, 1))
    wanted, share = -root * unit(now.gradient), min(1.0, k * strength)
    torch.testing.assert_close(unit(end - mean), unit((1 - share) * noise + share * wanted))
    assert state is True


def test_a_spherical_step_of_a_solver_that_draws_nothing_is_refused():
    now = signal()
    with pytest.raises(UnsuitableSolver, match="draws none; choose DDIM with eta=1, DDPM or Euler ancestral"):
        step(Spherical(), now)
    clean = replace(now, next_level=Level.of(1.0, 0.0), landed=now.x0)
    assert (step(Spherical(), clean) == 0).all(), "the last step draws nothing"
    short = replace(now, landed=landed(now, 0.1 * draws(3, 2, 2, 3, seed=9)))
    along = replace(now, landed=landed(now, 2.0 * now.noise))
    for bad in (short, along):
        with pytest.raises(UnsuitableSolver):
            step(Spherical(), bad)
        assert Spherical().update(bad, True)[0].isfinite().all(), "asked once"
    mixed = landed(now, torch.cat([0.1 * now.noise[:1], draws(2, 2, 2, 3, seed=9)]))
    assert step(Spherical(), replace(now, landed=mixed)).isfinite().all(), "one sample may be so by chance"


def test_a_spherical_step_where_pixels_differ():
    """In each pixel's own noise: the whitened end lies on the sphere, toward `S g`."""
    gamma = draws(1, 2, 2, 3, seed=3)
    level, after = Level.of_gamma(gamma), Level.of_gamma(gamma - draws(1, 2, 2, 3, seed=4).abs() - 0.1)
    now = signal(level=level, next_level=after, metric=level.x0_variance)
    now = replace(now, landed=landed(now, draws(3, 2, 2, 3, seed=9)))
    mean, std = landed(now, 0), level.step_std(after)
    end = (now.landed - step(Spherical(1.0), now) - mean) / std
    torch.testing.assert_close(end, -(12**0.5) * unit(std * now.gradient))


def test_a_score_moves_an_ancestral_step_by_its_gain_and_nothing_where_no_noise_is_drawn():
    now = signal()
    e, x0 = now.noise + 0.8 * now.gradient, now.x0 - 0.8**2 / 0.6 * now.gradient  # of a score lower by the gradient
    moved = LEVEL.ancestral_mean(AFTER, now.x0, now.noise) - LEVEL.ancestral_mean(AFTER, x0, e)
    torch.testing.assert_close(step(AsScore(), now), moved)
    assert (step(AsScore(), replace(now, next_level=Level.of(1.0, 0.0))) == 0).all()


def test_a_prior_s_pull_vanishes_where_the_noise_is_found():
    now = signal(drawn=draws(3, 2, 2, 3, seed=7))
    pull = 0.25 * 0.8 / 0.6 * (now.noise - now.drawn)
    torch.testing.assert_close(step(PriorGap(), now), now.gradient + pull)
    torch.testing.assert_close(step(PriorGap(0.5), now), now.gradient + 2 * pull)
    torch.testing.assert_close(step(PriorGap(), replace(now, drawn=now.noise)), now.gradient)
    with pytest.raises(ValueError, match='needs edit="anchor"'):
        step(PriorGap(), signal())


def test_no_picture_and_no_noise_divide_by_nothing():
    nothing = signal(level=Level.of(0.0, 1.0))
    for rule in (Rms(), LevelRatio()):
        assert (step(rule, nothing) == 0).all()
    assert (step(AsNoise(), signal(level=Level.of(1.0, 0.0))) == 0).all()


# ---- rules of rules ---------------------------------------------------------------------------------------------


def test_the_shortest_of_each_sample():
    now = signal(loss=torch.tensor([0.001, 100.0, 0.001], dtype=torch.float64))
    long, short = step(PolyakToFloor(), now), step(Unit(0.1), now)
    for rules in ((PolyakToFloor(), Unit(0.1)), (Unit(0.1), PolyakToFloor()), (Unit(9.0), PolyakToFloor(), Unit(0.1))):
        torch.testing.assert_close(step(Shortest(rules), now), torch.cat([long[:1], short[1:2], long[2:]]))


def test_a_chain_hands_on_its_step_and_every_rule_its_own_state():
    now = signal()
    torch.testing.assert_close(step(Chain((Constant(2.0), SigmaScaled(3.0))), now), 6 * 0.8 * now.gradient)
    for kind in (Chain, Shortest):
        rule = kind((Adam(0.1), Constant(2.0), Adam(0.3)))
        state = rule.init(now.gradient)
        assert state == ((0, 0.0, 0.0), None, (0, 0.0, 0.0))
        for count in (1, 2):
            _, state = rule.update(now, state)
            assert (state[0][0], state[1], state[2][0]) == (count, None, count)
    metric, dual = (draws(1, 2, 2, 3, seed=seed).abs() + 0.1 for seed in (5, 6))
    uneven = replace(now, gradient=dual * now.gradient, metric=metric, dual=dual)
    torch.testing.assert_close(
        step(Chain((PolyakToFloor(), Unit(0.1))), uneven),
        step(Unit(0.1), replace(uneven, gradient=step(PolyakToFloor(), uneven), metric=None, dual=None)),
    )
    torch.testing.assert_close(step(Chain((Constant(2.0), Unit(0.1))), uneven), step(Unit(0.1), uneven))


@pytest.mark.parametrize(
    ("rule", "natural", "itself"),
    [
        (Constant(), False, False), (SqrtAlpha(), False, False), (Rms(), False, False), (Unit(), True, False),
        (AlphaProduct(), False, False),
        (Polyak(), True, False), (PolyakToFloor(), True, False), (Reach(), True, False), (NoiseScaled(), True, False),
        (Squared(), False, False), (SigmaScaled(), False, False), (Adam(), False, False), (Spherical(), False, True),
        (Shortest((Unit(), Polyak())), True, False), (Shortest((Unit(), Constant())), False, False),
        (Chain((Unit(), Constant())), True, False), (Chain((Squared(), Constant())), False, False),
    ],
    ids=repr,
)  # fmt: skip
def test_what_rules_say_of_themselves(rule, natural, itself):
    assert rule.natural is natural and rule.scales_itself is itself
    with pytest.raises(AttributeError):
        rule.size = 1.0
    assert rule == replace(rule) and hash(rule) == hash(replace(rule))


def test_a_rule_without_an_update_is_told():
    class Mine(StepRule):
        pass

    assert Mine().init(torch.zeros(1)) is None and not Mine.natural and not Mine.scales_itself
    with pytest.raises(TypeError, match=r"Mine must define update\(signal, state\)"):
        Mine().update(signal(), None)


def test_defaults_that_recipes_and_saved_runs_rely_on():
    assert (Rms().size, Rms().by_level, SqrtAlpha().size) == (0.02, True, 0.2)
    assert (Adam().size, Adam().beta1, Adam().beta2) == (0.03, 0.5, 0.6)
    assert (Spherical().k, PriorGap().weight, Polyak().eta, Constant().size, SigmaScaled().size) == (0.1, 0.25, 1, 1, 1)
    assert (Unit().size, Reach().size, AsScore().size, Scheduled().size, Scheduled().schedule) == (
        0.01, 1, 1, 1, "increase",
    )  # fmt: skip
    assert (NoiseScaled().k, NoiseScaled().fading, PolyakToFloor().target, PolyakToFloor().cap) == (
        0.2,
        False,
        None,
        None,
    )
    now = signal()
    assert (now.step, now.strength, now.levels, now.floor, now.random, now.count) == (0, 1.0, (), None, None, None)
