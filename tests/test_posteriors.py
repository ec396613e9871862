"""Closed forms: every method that claims a posterior gives it, or misses it by what is stated of it; no network.

What a method draws from a Gaussian prior is known in closed form (`benchmarks.posteriors.expected`); the library is
held to that, and that to the posterior.
"""

from __future__ import annotations

import pytest
import torch
from lossguide.samplers import sample

from benchmarks.posteriors import (
    METHODS,
    STEPS,
    VECTORS,
    bell,
    converge,
    correlated,
    draw,
    drawn_by_grid,
    expected,
    particles,
    right,
    two_bells,
    two_modes,
    wasserstein,
    white,
)

PROBLEMS = {"white": white(), "correlated": correlated()}
AFFINE = [name for name, method in METHODS.items() if method.step is not None]


def distance(name: str, problem: str, steps: int) -> float:
    """Wasserstein-2 of a method's own law from the posterior."""
    return wasserstein(*expected(METHODS[name], PROBLEMS[problem], steps), PROBLEMS[problem].posterior)


# ---- the closed forms themselves ---------------------------------------------------------------------------------


def test_the_mixture_s_denoiser_and_posterior_are_those_of_bayes_on_a_grid():
    problem = two_bells()
    clean = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    parts = [w * p.log_density(clean[:, None]).exp() for w, p in zip(problem.prior.weights, problem.prior.parts)]
    prior = sum(parts)
    a, s = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    for x in (-1.5, 0.1, 0.9):
        joint = prior * torch.exp(-0.5 * ((x - a * clean) / s) ** 2)
        given = problem.prior.x0(torch.tensor([[x]], dtype=torch.float64), a, s)
        assert given.item() == pytest.approx(((joint * clean).sum() / joint.sum()).item(), abs=1e-6)
    joint = prior * torch.exp(-problem.loss(clean[:, None, None, None]))
    mean, share = (joint * clean).sum() / joint.sum(), (joint * (clean > 0)).sum() / joint.sum()
    assert problem.posterior.mean.item() == pytest.approx(mean.item(), abs=1e-6)
    overlap = 2e-3  # of the modes across 0
    assert problem.posterior.weights[1].item() == pytest.approx(share.item(), abs=overlap)


def test_the_grid_knows_what_the_plain_sampler_draws():
    problem = two_bells()
    drawn = sample(problem.prior.denoiser(20_000), None, steps=STEPS, seeds=[0]).samples.flatten().double()
    law = drawn_by_grid(problem.prior, STEPS)
    assert right(drawn).mean().item() == pytest.approx(law.mean(right), abs=0.015)
    assert drawn.mean().item() == pytest.approx(law.mean(), abs=0.04)
    assert drawn.square().mean().item() == pytest.approx(law.mean(torch.square), abs=0.04)


# ---- the library against each method's closed form -----------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", AFFINE)
def test_a_method_draws_what_its_steps_amount_to(name, problem):
    """Mean and covariance of 10,000 vectors are those of the method's affine steps (three to five standard errors)."""
    mean, covariance = expected(METHODS[name], PROBLEMS[problem], 50)
    x = draw(METHODS[name], PROBLEMS[problem], 50, 5 * VECTORS)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0, atol=0.04)


# ---- the closed form of each method against the posterior ----------------------------------------------------------


def test_the_solver_s_own_error_shrinks_with_its_steps():
    """Bias of any exact method: O(1/steps)."""
    for problem in PROBLEMS:
        errors = [distance("posterior's own denoiser", problem, steps) for steps in (50, 200, 800)]
        assert errors[0] < 0.1 and errors[2] < 0.01
        assert errors[1] < 0.45 * errors[0] and errors[2] < 0.45 * errors[1]


@pytest.mark.parametrize("name", ["proximal, as the noise", "pigdm, exact weight"])
def test_gaussian_approximations_are_exact_for_a_white_prior_only(name):
    """`r_t^2 I` is Cov[x_0 | x_t] for N(m, I): the posterior; else a bias that no number of steps removes."""
    assert distance(name, "white", 800) < 0.01
    errors = [distance(name, "correlated", steps) for steps in (200, 800)]
    assert min(errors) > 0.05 and abs(errors[0] - errors[1]) < 0.01


def test_pigdm_as_published_is_too_sure():
    """Its weight `a_t r_t^2` does not shrink with the step, so that more steps mean more guidance: the mean is y, noise
    and all, and the spread of what was measured falls toward zero."""
    for problem, work in PROBLEMS.items():
        spreads = []
        for steps in (50, 200, 800):
            mean, covariance = expected(METHODS["pigdm, the paper's weight"], work, steps)
            assert mean[0].item() == pytest.approx(work.y, abs=0.005), problem
            spreads.append(covariance[0, 0].sqrt() / work.posterior.covariance[0, 0].sqrt())
        assert spreads[0] < 0.5 and spreads[1] < 0.8 * spreads[0] and spreads[2] < 0.8 * spreads[1]


def test_ddnm_fits_y_and_its_hidden_part_is_right_only_where_y_says_nothing_of_it():
    """The measured part is y, noise included. The hidden part follows E[x_0 | x_t], which knows y only as noised: exact
    for a white prior, else between prior and posterior, in mean and in spread."""
    for problem, work in PROBLEMS.items():
        x = draw(METHODS["ddnm"], work, 50, VECTORS)
        torch.testing.assert_close(x[:, 0], torch.full_like(x[:, 0], work.y), rtol=0, atol=1e-4, msg=problem)
    mean, covariance = expected(METHODS["ddnm"], PROBLEMS["white"], 800)
    assert mean[1].item() == pytest.approx(-0.2, abs=1e-3) and covariance[1, 1].item() == pytest.approx(1, abs=0.02)
    work = PROBLEMS["correlated"]
    exact = work.prior.posterior(work.h, torch.tensor([work.y], dtype=torch.float64), 0.0)  # y without noise
    mean, covariance = expected(METHODS["ddnm"], work, 800)
    assert 0.5 < (mean[1] + 0.2) / (exact.mean[1] + 0.2) < 0.75
    assert exact.covariance[1, 1] * 1.3 < covariance[1, 1] < work.prior.covariance[1, 1] * 0.7


def test_diffpir_is_as_sure_as_its_weight():
    """`r_t^2 = s^2 / (weight a^2)`, of which weight 1 is right at low noise. 1.75, the default, trusts x0 too much: a
    mean short of the posterior's, and more than its spread."""
    mean, covariance = expected(METHODS["diffpir"], PROBLEMS["white"], 800)
    posterior = PROBLEMS["white"].posterior
    assert 0.3 + 0.8 * (posterior.mean[0] - 0.3) < mean[0] < posterior.mean[0] - 0.03
    assert 1.1 < covariance[0, 0].sqrt() / posterior.covariance[0, 0].sqrt() < 1.5
    assert distance("diffpir, weight 1", "white", 800) < 0.025


def test_the_likelihood_at_x0_is_too_sure():
    """`p(y | x0(x_t))` leaves out what x0 does not know yet: a mean at y, about seven tenths of the spread."""
    mean, covariance = expected(METHODS["score of p(y given x0)"], PROBLEMS["white"], 800)
    posterior = PROBLEMS["white"].posterior
    assert mean[0].item() == pytest.approx(1.5, abs=0.01)
    assert 0.6 < covariance[0, 0].sqrt() / posterior.covariance[0, 0].sqrt() < 0.8


def test_dps_ends_in_a_point_near_y_and_flowdps_comes_nearer_with_every_step():
    """A step of the un-squared distance has a length of its own, whatever the noise: with enough steps what is measured
    is within one step of y, whatever sigma; with few steps DPS has not come near yet. FlowDPS' steps fade."""
    for problem, work in PROBLEMS.items():
        mean, covariance = expected(METHODS["dps"], work, 1000)
        assert mean[0].item() == pytest.approx(work.y, abs=0.005), problem
        assert covariance[0, 0].sqrt() < 1 / VECTORS**0.5
        early = expected(METHODS["dps"], work, 50)[0][0]
        assert early - work.prior.mean[0] < 0.3 * (work.y - work.prior.mean[0])
        means = [expected(METHODS["flowdps"], work, steps)[0][0].item() for steps in (50, 800)]
        assert work.prior.mean[0] < means[0] < means[1] < work.y
    hidden = [expected(METHODS["flowdps"], PROBLEMS["white"], steps)[1][1, 1].sqrt() for steps in (50, 800)]
    assert hidden[1] < hidden[0] < 0.9, "the hidden part is too sure, the more so the more steps"


def test_red_diff_is_a_point():
    """An optimum near y: no spread where something is measured, less than half of it where nothing is."""
    x = draw(METHODS["red_diff"], PROBLEMS["white"], 100, VECTORS)
    assert abs(x[:, 0].mean() - 1.5) < 0.1
    assert x[:, 0].std() < 0.1 and x[:, 1].std() < 0.5


def test_lgd_as_a_score_is_exact_for_a_white_prior():
    """For N(m, I), `-log mean_k exp(-L(x0 + r_t n_k))` is `-log p(y | x_t)` as copies grow: what exact methods draw."""
    mean, covariance = expected(METHODS["posterior's own denoiser"], PROBLEMS["white"], 50)
    x = draw(METHODS["lgd_mc as a score"], PROBLEMS["white"], 50, 600)
    assert abs(x[:, 0].mean() - mean[0]) < 0.08, "of which 0.04 are what 10 copies lack"
    assert x[:, 0].std().item() == pytest.approx(covariance[0, 0].sqrt().item(), abs=0.05)


def test_modes_get_the_share_that_the_stated_bias_leaves_them():
    """Two modes, prior share 0.3 of the right one, posterior share 0.55: methods that are too sure of y, which lies
    nearer to it, give it more, those that trust x0 too much less."""
    work = two_modes()
    share = work.posterior.weights[1].item()
    bounds = {
        "posterior's own denoiser": (share - 0.04, share + 0.04),
        "pigdm, exact weight": (share - 0.11, share),
        "ddnm": (share - 0.08, share + 0.02),
        "diffpir, weight 1": (0.38, 0.48),
        "diffpir": (0.37, 0.43),
        "score of p(y given x0)": (0.68, 0.8),
        "pigdm": (0.62, 0.71),
        "pigdm, the paper's weight": (0.72, 0.9),
    }
    for name, (least, most) in bounds.items():
        x = draw(METHODS[name], work, 50, 2 * VECTORS)
        assert least < right(x[:, 1]).mean() < most, name


# ---- particles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe, rate", [("fk_steering", 1.0), ("tds", 0.6)])
def test_particles_converge_to_the_posterior(recipe, rate):
    """The law of the particle drawn misses the posterior by O(1/N) (Del Moral 2004), which fk_steering does from the
    start, and tds from where N outgrows the spread of its weights."""
    for problem, function in ((bell(), lambda x: x), (two_bells(), right)):
        curve = converge(recipe, problem, "", (1, 4, 16), 4500, function)
        for run in curve.runs:
            assert abs(run.figure - curve.target) < rate * run.count**-rate + 3 * run.error
        first, last = curve.runs[0], curve.runs[-1]
        assert last.all.distance(curve.law) < 0.38 * first.all.distance(curve.law)
        slope, error = curve.slope(least=1)
        assert error < 0.1 and slope < (-0.8 if recipe == "fk_steering" else -0.35)
        drawn = function(last.drawn)
        assert abs(drawn.mean() - last.figure) < 4 * drawn.std() / len(drawn) ** 0.5, "one is drawn by weight"


def test_best_of_n_goes_to_the_least_loss_instead():
    """More candidates lead away from the posterior: to y itself, without spread."""
    problem = bell()
    law = drawn_by_grid(problem.prior, STEPS).given(problem)
    few, many = (particles("best_of_n", problem, count, 200) for count in (4, 32))
    assert many.figure > law.mean() + 0.6 and many.drawn.std() < 0.6 * few.drawn.std()
    assert (many.drawn - problem.y).abs().mean() < 0.4 * (few.drawn - problem.y).abs().mean()
    assert many.all.distance(law) > 1.5 * few.all.distance(law)
