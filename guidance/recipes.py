"""Published methods, each a few lines over the same pieces; `auto` is the default.

A recipe takes the loss and `strength` (1 is its published or recommended default) and returns a `Guidance`, whose
fields can be changed by keyword: `dps(loss, start=0.2)`. `available()` lists them. Losses see pictures in [0, 1], where
a distance, and so its gradient, is half of that in a paper's [-1, 1]; published sizes that multiply a gradient stand as
they are. Left out are methods that optimise the first noise through the whole run (DOODL, D-Flow).
"""

from __future__ import annotations

import difflib
import inspect
import numbers
from collections.abc import Callable
from typing import Any

from ..losses.loss import as_losses
from ..samplers.time_travel import TimeTravel
from .augment import Augment
from .guidance import Guidance, Inner, Tokens
from .particles import Particles
from .proximal import Proximal
from .smoothing import Smoothing
from .steps import (
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
    Spherical,
    SqrtAlpha,
    Squared,
    Unit,
)

_BACKWARD = 1.15
"""Forwards that it costs to go through the denoiser beside its own forward: measured 1.02 to 1.15."""

_RECIPES: dict[str, Callable[..., Guidance]] = {}


def _recipe(function: Callable[..., Guidance]) -> Callable[..., Guidance]:
    _RECIPES[function.__name__] = function
    return function


@_recipe
def auto(loss, strength: float = 1.0, cost: float | None = None, **changes: Any) -> Guidance:
    """The default, without a strength to be found: a step as long as the sampler's noise, or just to the known floor.

    The step's length comes from the sampler (`NoiseScaled`), only its direction from the loss, with geometric
    augmentation and a short time travel. Steps fade with the noise, and where a network judges the content (a term that
    `augment` suits) none is taken from progress 0.8 on, which cleans up what fooled it. Where the loss's floor is
    known (a measurement's noise), three Polyak steps at x0 find where to go, and one product through the denoiser goes
    there, over-relaxed by 1.3, to the end.

    Windows are on the noise's clock, so that they suit any schedule. All in all it takes three to four times as long as
    the unguided sampler, and the guide's own passes besides.

    Args:
        cost: how many times as long as the unguided sampler it may take at most, from 1 up, the guide's own passes not
            counted. There is no time travel then, and only as many steps as can be paid go through the denoiser: one in
            four at 1.3, none at 1, but at least one above it.

    Raises:
        ValueError: `cost` is below 1, or settings ask for more than it pays.
    """
    if cost is not None and (not isinstance(cost, numbers.Real) or not cost >= 1):
        raise ValueError(f"cost is at least 1, that of the unguided sampler, got {cost!r}")
    terms = [] if loss is None else as_losses(loss).terms()
    content = loss is None or any(term.augment for term in terms)
    known = loss is not None and all(getattr(term.loss, "floor", None) is not None for term in terms)
    edit = "mean" if known else "shift"
    if known:
        settings = dict(
            rule=Shortest((Reach(1.3), Unit(1.0))),
            toward=Inner(3, PolyakToFloor()),
            time_travel=TimeTravel(3, 0.52, 0.76),
        )
    else:
        settings = dict(
            rule=NoiseScaled(0.2, fading=True),
            augment=Augment.geometric(8),
            time_travel=TimeTravel(3, 0.25, 0.75),
            stop=0.8 if content else 1.0,
        )
    if cost is not None:
        settings |= _within_cost(cost, edit, changes)
        if content and not known:
            settings["rule"] = NoiseScaled(0.28, fading=True)  # fewer visits, whose steps add up to as much
    elif changes.get("through_share", 1) < 1:
        settings["edit_between"] = edit
    return _build(
        loss,
        strength,
        changes,
        name="auto",
        citation="Polyak 1969 (step to a floor); Yang et al. 2024 (DSG, length of the noise), arXiv 2402.03201; "
        "Shen et al. 2024 (augmentation), arXiv 2403.12404",
        clock="noise",
        **settings,
    )


def _within_cost(cost: float, edit: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What of `auto` a cost pays for; `edit` is where steps that do not go through the denoiser land."""
    share = min((cost - 1) / _BACKWARD, 1.0)
    settings = dict(time_travel=None, **(dict(through_share=share) if share else dict(through="x0")))
    asked = settings | changes
    through = 0 if asked.get("through") == "x0" else asked.get("through_share", 1)
    if through > share or asked["time_travel"] is not None or asked.get("particles") is not None:
        more = [name for name in ("through", "through_share", "time_travel", "particles") if name in changes]
        raise ValueError(f"cost={cost} does not pay {' and '.join(more)} as given; leave out either")
    if asked.get("through") == "x0":
        settings["edit"] = edit
    elif asked.get("through_share", 1) < 1:
        settings["edit_between"] = edit
    return settings


@_recipe
def shen(loss, strength: float = 1.0, **changes: Any) -> Guidance:
    """Augmentation with 10 copies, Polyak step, 10-fold time travel at t = 800 ... 300 (Shen et al. 2024).

    The published factor of the step spans 2 to 0.001 over tasks; strength 1 is 0.002, which suits a cosine to a text.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=Polyak(0.002),
        augment=Augment(10),
        time_travel=TimeTravel(10, 0.2, 0.7),
        name="shen",
        citation="Shen et al., Understanding and Improving Training-free Loss-based Diffusion Guidance, "
        "NeurIPS 2024, arXiv 2403.12404",
    )


@_recipe
def dps(loss, strength: float = 1.0, **changes: Any) -> Guidance:
    """Diffusion posterior sampling: x_{t-1} -= strength * g_x (Chung et al. 2023).

    Losses see pictures in [0, 1], where distances are half of the paper's: strength 1 is its zeta of 0.5, for 1000
    steps; restorations at 50 want 10 to 20 times as much.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=Constant(1.0),
        name="dps",
        citation="Chung et al., Diffusion Posterior Sampling for General Noisy Inverse Problems, "
        "ICLR 2023, arXiv 2209.14687",
    )


@_recipe
def freedom(loss, strength: float = 1.0, rule: str = "clip", **changes: Any) -> Guidance:
    """FreeDoM: a step by rms of noise over rms of gradient, times the level, and time travel x3 (Yu et al. 2023).

    Args:
        rule: "clip", as published for text: 0.02 rms(e) / rms(g) s/a c_1, with c_1 of `AncestralShare`; "rms", the same
            without c_1, some ten times as long in the middle of 50 steps, which does better on most losses here;
            "sqrt-alpha", 0.2 a as published for faces, segmentation and style (0.2 to 500 by task, for losses of
            another scale).

    The window of time travel is that for Stable Diffusion; the paper's other models have none or more.

    Raises:
        ValueError: there is no such rule.
    """
    long = Rms(0.02, by_level=True)
    rules = {"clip": Chain((long, AncestralShare())), "rms": long, "sqrt-alpha": SqrtAlpha(0.2)}
    if rule not in rules:
        raise ValueError(f"freedom's rule is one of {', '.join(rules)}, got {rule!r}")
    return _build(
        loss,
        strength,
        changes,
        rule=rules[rule],
        time_travel=TimeTravel(3, 0.3, 0.6),
        name="freedom",
        citation="Yu et al., FreeDoM: Training-Free Energy-Guided Conditional Diffusion Model, "
        "ICCV 2023, arXiv 2303.09833",
    )


@_recipe
def lgd_mc(loss, strength: float = 1.0, copies: int = 10, **changes: Any) -> Guidance:
    """LGD-MC: DPS on a loss smoothed by `copies` draws of noise around x0 (Song et al. 2023).

    The noise's deviation is s / sqrt(a^2 + s^2).
    """
    return _build(
        loss,
        strength,
        changes,
        rule=Constant(1.0),
        smoothing=Smoothing(copies),
        name="lgd_mc",
        citation="Song et al., Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation, ICML 2023",
    )


@_recipe
def universal(
    loss, strength: float = 1.0, weight: float = 1.0, inner: int = 0, inner_size: float = 0.1, recur: int = 2, **changes
) -> Guidance:
    """Universal guidance: forward (e += weight s g), backward (`inner` steps on x0), recurrence (Bansal et al. 2023).

    `weight`, `inner` and `recur` (self-recurrence at every step, 2 to 10) are chosen by task in the paper; 0 leaves a
    part out. `inner_size`, the length of an inner step over the gradient, is this library's.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=SigmaScaled(weight) if weight else None,
        edit="score",
        inner=Inner(inner, Constant(inner_size), keep="sample") if inner else None,
        time_travel=TimeTravel(recur) if recur > 1 else None,
        name="universal",
        citation="Bansal et al., Universal Guidance for Diffusion Models, CVPR Workshops 2023, arXiv 2302.07121",
    )


@_recipe
def score(loss, strength: float = 1.0, **changes: Any) -> Guidance:
    """The plain score form: e += strength * s * g_x, for every solver (Dhariwal and Nichol 2021)."""
    return _build(
        loss,
        strength,
        changes,
        rule=SigmaScaled(1.0),
        edit="score",
        name="score",
        citation="Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, NeurIPS 2021, arXiv 2105.05233",
    )


@_recipe
def mpgd(loss, strength: float = 1.0, project: Callable | None = None, **changes: Any) -> Guidance:
    """Manifold preserving guidance: x0 moves, the noise stays, no backprop through the denoiser (He et al. 2024).

    The step is 0.02 rms(e) / rms(g_0) of the gradient; the 0.02 is this library's, and losses here want 2 to 8 times as
    much. `project` maps the moved x0 back to the manifold: an autoencoder's round trip, x0 -> decode(encode(x0)).
    """
    return _build(
        loss,
        strength,
        changes,
        rule=Rms(0.02, by_level=False),
        through="x0",
        edit="mean",
        project=project,
        name="mpgd",
        citation="He et al., Manifold Preserving Guided Diffusion, ICLR 2024, arXiv 2311.16424",
    )


@_recipe
def tfg(
    loss,
    strength: float = 1.0,
    rho: float = 1.0,
    mu: float = 0.25,
    sigma: float = 0.001,
    inner: int = 4,
    copies: int = 4,
    recur: int = 1,
    rho_schedule: str = "increase",
    mu_schedule: str = "increase",
    **changes: Any,
) -> Guidance:
    """TFG: a step through the denoiser, inner steps at x0, smoothing and recurrence in one (Ye et al. 2024).

    Published (rho, mu, sigma) by task: label (1, .25, .001), super-resolution x4 (4, 2, .01), deblurring (1, 8, .01),
    style (.25, 2, .1), two attributes (.5, 8, 1). A part of size 0 is left out: what remains is DPS, LGD, MPGD or UGD's
    backward step, at each step times what the schedule, and for `rho` a' / a, make of its size.

    Args:
        rho, mu: mean size over the run of the step through the denoiser, and of each of `inner` steps at x0.
        sigma: deviation of the smoothing noise at the highest level, falling as s; `copies` draws of it.
        recur: visits of each step.
        rho_schedule, mu_schedule: "increase", "decrease" or "constant"; see `steps.Scheduled`.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=Chain((Scheduled(rho, rho_schedule), LevelRatio())) if rho else None,
        inner=Inner(inner, Scheduled(mu, mu_schedule)) if mu and inner else None,
        smoothing=Smoothing(copies, sigma) if sigma else None,
        time_travel=TimeTravel(recur) if recur > 1 else None,
        name="tfg",
        citation="Ye et al., TFG: Unified Training-Free Guidance for Diffusion Models, NeurIPS 2024, arXiv 2409.15761",
    )


@_recipe
def dsg(loss, strength: float = 1.0, **changes: Any) -> Guidance:
    """DSG: turns the solver's noise toward descent and keeps its length, so there must be some (Yang et al. 2024).

    The noise is an ancestral step's, as of DDIM with eta 1.

    Raises:
        UnsuitableSolver: while sampling, where the solver draws no noise, or little.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=Spherical(0.1),
        name="dsg",
        citation="Yang et al., Guidance with Spherical Gaussian Constraint for Conditional Diffusion, "
        "ICML 2024, arXiv 2402.03201",
    )


@_recipe
def adam_dps(loss, strength: float = 1.0, **changes: Any) -> Guidance:
    """AdamDPS: Adam's moments of the gradient over the steps, one size for all tasks (Belardi et al. 2026)."""
    return _build(
        loss,
        strength,
        changes,
        rule=Chain((Adam(0.03, 0.5, 0.6), LevelRatio())),
        name="adam_dps",
        citation="Belardi et al., Adaptive Moments are Surprisingly Effective for Plug-and-Play Diffusion Sampling, "
        "ICLR 2026, arXiv 2603.16797",
    )


@_recipe
def pigdm(loss, strength: float = 1.0, **changes: Any) -> Guidance:
    """Pseudoinverse-guided: the Gaussian posterior's step at x0, pulled back through the denoiser (Song et al. 2023).

    For one `Measurement` by a linear operator. The weight is `a_t a_{t-1} r_t^2`, as in the authors' later code (with
    RED-diff, for measurements without noise, where `r_t` cancels); the paper writes `a_t r_t^2`, with which real
    pictures diverge in 50 steps (`rule=SqrtAlpha(1.0)`). Neither shrinks with the step: the more steps, the surer the
    method is of the measurement.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=AlphaProduct(),
        toward=Proximal("posterior"),
        name="pigdm",
        citation="Song et al., Pseudoinverse-Guided Diffusion Models for Inverse Problems, ICLR 2023",
    )


@_recipe
def red_diff(loss, strength: float = 1.0, weight: float = 0.25, **changes: Any) -> Guidance:
    """RED-diff: optimises a clean picture by Adam, the denoiser's residual its regulariser (Mardani et al. 2024).

    `strength` scales Adam's learning rate, 0.1 at 1 (published: 0.1 to 0.5, 100 steps). The loss is a distance, whose
    half square is optimised; in pictures in [0, 1] that is a quarter of the paper's, so that `weight` weighs more. It
    begins at grey, where the authors begin at the measurement's pseudoinverse.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=Chain((Squared(), PriorGap(weight), Adam(0.1, 0.9, 0.99))),
        through="x0",
        edit="anchor",
        name="red_diff",
        citation="Mardani et al., A Variational Perspective on Solving Inverse Problems with Diffusion Models, "
        "ICLR 2024, arXiv 2305.04391",
    )


@_recipe
def diffpir(loss, strength: float = 1.0, weight: float = 1.75, **changes: Any) -> Guidance:
    """DiffPIR: x0 goes to the proximal point of the measurement, the noise follows; no gradient (Zhu et al. 2023).

    For one `Measurement` by a linear operator. `weight` is lambda for samples in [-1, 1]: a quarter of the released
    code's 7, which counts x0 in [0, 1] and its uncertainty in [-1, 1]. The share zeta of fresh noise, 0.1 to 1 as
    published, is `remix=zeta` with a deterministic solver; one that draws noise keeps its own.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=AsNoise(),
        toward=Proximal("noise", weight),
        through="x0",
        edit="score",
        name="diffpir",
        citation="Zhu et al., Denoising Diffusion Models for Plug-and-Play Image Restoration, "
        "CVPR Workshops 2023, arXiv 2305.08995",
    )


@_recipe
def ddnm(loss, strength: float = 1.0, **changes: Any) -> Guidance:
    """DDNM: x0 is projected onto the pictures that agree with the measurement; no gradient (Wang et al. 2023).

    For one `Measurement` by a linear operator, without noise: noise in it is fitted.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=AsNoise(),
        toward=Proximal("infinite"),
        through="x0",
        edit="score",
        name="ddnm",
        citation="Wang et al., Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model, "
        "ICLR 2023, arXiv 2212.00490",
    )


@_recipe
def flowchef(loss, strength: float = 1.0, **changes: Any) -> Guidance:
    """FlowChef: x_{t-1} -= 0.5 g_0, no backprop through the network; made for flow models (Patel et al. 2025).

    The 0.5 is for 30 steps and a mean square in latents; distances want 10 to 60 times as much.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=Constant(0.5),
        through="x0",
        name="flowchef",
        citation="Patel et al., FlowChef: Steering Rectified Flow Models for Controlled Generations, "
        "ICCV 2025, arXiv 2412.00100",
    )


@_recipe
def flowdps(loss, strength: float = 1.0, size: float = 15.0, inner: int = 3, **changes: Any) -> Guidance:
    """FlowDPS: inner steps on x0, blended by the level, and noise mixed anew; made for flow models (Kim et al. 2025).

    For deterministic solvers; one that draws noise keeps its own.

    `size` is that of the inner gradient steps on a distance, 15 to 30 as published for latents of 96 x 96 x 16.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=None,
        through="x0",
        inner=Inner(inner, Constant(size), blend=True),
        remix="signal",
        name="flowdps",
        citation="Kim et al., FlowDPS: Flow-Driven Posterior Sampling for Inverse Problems, "
        "ICCV 2025, arXiv 2503.08136",
    )


@_recipe
def best_of_n(loss, strength: float = 1.0, count: int = 4, **changes: Any) -> Guidance:
    """Best of N: draws `count` candidates per picture and keeps the one of lowest loss; needs no gradient."""
    return _build(
        loss,
        strength,
        changes,
        rule=None,
        through="x0",
        particles=Particles(count, resample=False),
        name="best_of_n",
        citation="the baseline of every search at sampling time",
    )


@_recipe
def fk_steering(loss, strength: float = 1.0, count: int = 4, sharpness: float = 10.0, **changes: Any) -> Guidance:
    """Feynman-Kac steering: particles are resampled by how the loss falls; needs no gradient (Singhal et al. 2025).

    Wants a solver that draws noise, so that copies part again. `count` particles per picture; `sharpness` per unit of
    the loss.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=None,
        through="x0",
        particles=Particles(count, sharpness, pick="draw"),
        name="fk_steering",
        citation="Singhal et al., A General Framework for Inference-time Scaling and Steering of Diffusion Models, "
        "ICML 2025, arXiv 2501.06848",
    )


@_recipe
def tds(loss, strength: float = 1.0, count: int = 4, sharpness: float = 10.0, **changes: Any) -> Guidance:
    """Twisted diffusion sampler: particles moved by the gradient, weighed so that the law stays exact (Wu et al. 2023).

    Needs an ancestral solver (DDIM with eta=1, DDPM, Euler ancestral), and for a sharp loss many particles. `count`
    particles per picture; `sharpness` per unit of the loss.
    """
    return _build(
        loss,
        strength,
        changes,
        rule=AsScore(sharpness),
        particles=Particles(count, sharpness, pick="draw", twisted=True),
        name="tds",
        citation="Wu et al., Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, "
        "NeurIPS 2023, arXiv 2306.17775",
    )


def tokens(
    loss,
    strength: float = 1.0,
    inner: int | Inner | None = 5,
    candidates: int = 1,
    sharpness: float = 100.0,
    **changes: Any,
) -> Guidance:
    """For masked-token generators: Polyak steps on the logits of unknown tokens; what `auto` does there.

    The picture of which the gradient is taken has, at unknown places, the mean of the code vectors under the logits;
    steps are natural ones, in the softmax's own metric, of a root mean square of 1 at most: Polyak's, which aim at a
    loss of 0 where no floor is known and which no picture has, would else override the generator. Time travel masks the
    least confident tokens again; `auto` visits the steps from a quarter to three quarters of the way twice. A loss
    without a gradient is followed by `inner=0` and `candidates`, of which one is kept by its loss at each step.

    Args:
        inner: steps on the logits at each step of the scheduler; 0 for none.
        candidates, sharpness: draws of each step, of which one is kept by weights `exp(-sharpness * L)`.
    """
    rule = Fisher(PolyakToFloor(cap=1.0))
    settings = dict(
        rule=None,
        through="x0",
        inner=Inner(inner, rule) if isinstance(inner, int) and inner else inner or None,
        tokens=Tokens(candidates, sharpness),
        augment=Augment.geometric(4) if inner else None,
    )
    return _build(
        loss,
        strength,
        changes,
        name="tokens",
        citation="Polyak 1969 (step to a floor); Amari 1998 (natural gradient); Chang et al., MaskGIT, CVPR 2022, "
        "arXiv 2202.04200 (the generator); Li et al. 2024 (choice among candidates), arXiv 2408.08252",
        **settings,
    )


def _build(loss, strength: float, changes: dict[str, Any], **defaults: Any) -> Guidance:
    try:
        return Guidance(loss, strength=strength, **(defaults | changes))
    except TypeError as error:
        unknown = set(changes) - set(Guidance.__dataclass_fields__)
        if not unknown:
            raise
        own = _RECIPES.get(defaults["name"], tokens)
        known = [name for name in inspect.signature(own).parameters if name not in ("loss", "changes")]
        known += [name for name in Guidance.__dataclass_fields__ if name not in ("loss", *known)]
        close = difflib.get_close_matches(min(unknown), known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise TypeError(
            f"a recipe has no setting {', '.join(sorted(unknown))}; {hint}settings are {', '.join(known)}"
        ) from error


def available() -> dict[str, Callable[..., Guidance]]:
    """Every recipe for diffusion and flow models, by name; `tokens`, for token generators, is apart."""
    return dict(_RECIPES)


def get(name: str) -> Callable[..., Guidance]:
    """A recipe by name.

    Raises:
        LookupError: there is none; the message names the closest.
    """
    if name in _RECIPES:
        return _RECIPES[name]
    if name == "tokens":
        return tokens
    close = difflib.get_close_matches(name, _RECIPES, 3)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    raise LookupError(f"no recipe {name!r}; {hint}recipes are {', '.join(_RECIPES)}")


def __getattr__(name: str) -> Any:
    close = difflib.get_close_matches(name, _RECIPES, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise AttributeError(f"there is no recipe {name!r}{hint}")
