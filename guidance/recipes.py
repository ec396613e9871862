"""Published methods, each a few lines over the same pieces; `auto` is the default.

A recipe takes the loss and `strength` (1 is its published or recommended default) and returns a `Guidance`, whose
fields can be changed by keyword: `dps(loss, start=0.2)`. `available()` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..losses.loss import as_losses
from ..samplers.time_travel import TimeTravel
from .augment import Augment
from .guidance import Guidance
from .steps import Constant, NoiseScaled, Polyak, PolyakToFloor, Rms, Shortest, SqrtAlpha, Unit

_RECIPES: dict[str, Callable[..., Guidance]] = {}


def _recipe(function: Callable[..., Guidance]) -> Callable[..., Guidance]:
    _RECIPES[function.__name__] = function
    return function


@_recipe
def auto(loss, strength: float = 1.0, **changes: Any) -> Guidance:
    """The default: a step as long as the sampler's own noise, geometric augmentation, a short time travel.

    The step's length comes from the sampler (`NoiseScaled`), only its direction from the loss, so that no strength has
    to be found per task; the last fifth of the steps runs free, and cleans up what the guide cannot see. Where the
    loss's floor is known (a measurement's noise), it is Polyak's own step to that floor, at most as long as pure noise,
    to the end. Wants a stochastic solver (DDIM with eta = 1, DDPM).
    """
    known = loss is not None and all(getattr(term.loss, "floor", None) is not None for term in as_losses(loss).terms())
    return _build(
        loss,
        strength,
        changes,
        rule=Shortest((PolyakToFloor(), Unit(1.0))) if known else NoiseScaled(0.2),
        augment=Augment.geometric(8),
        time_travel=TimeTravel(2, 0.25, 0.75),
        stop=1.0 if known else 0.8,
        name="auto",
        citation="Yang et al. 2024 (DSG, step), arXiv 2402.03201; Shen et al. 2024 (augmentation), arXiv 2403.12404",
    )


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
    """Diffusion posterior sampling: x_{t-1} -= strength * g_x (Chung et al. 2023)."""
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
def freedom(loss, strength: float = 1.0, rule: str = "rms", **changes: Any) -> Guidance:
    """FreeDoM: step by rms of noise over rms of gradient, time travel x3 (Yu et al. 2023).

    `rule="sqrt-alpha"` steps by sqrt(alpha) instead, as published for faces, segmentation and style.
    """
    rules = {"rms": Rms(0.02, by_level=True), "sqrt-alpha": SqrtAlpha(0.2)}
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
def mpgd(loss, strength: float = 1.0, **changes: Any) -> Guidance:
    """Manifold preserving guidance: x0 moves, the noise stays, no backprop through the denoiser (He et al. 2024)."""
    return _build(
        loss,
        strength,
        changes,
        rule=Rms(0.02, by_level=False),
        through="x0",
        edit="mean",
        name="mpgd",
        citation="He et al., Manifold Preserving Guided Diffusion, ICLR 2024, arXiv 2311.16424",
    )


def _build(loss, strength: float, changes: dict[str, Any], **defaults: Any) -> Guidance:
    try:
        return Guidance(loss, strength=strength, **(defaults | changes))
    except TypeError as error:
        unknown = set(changes) - set(Guidance.__dataclass_fields__)
        if not unknown:
            raise
        raise TypeError(
            f"a recipe has no setting {', '.join(sorted(unknown))}; "
            f"settings are {', '.join(Guidance.__dataclass_fields__)}"
        ) from error


def available() -> dict[str, Callable[..., Guidance]]:
    """Every recipe by name."""
    return dict(_RECIPES)


def get(name: str) -> Callable[..., Guidance]:
    """A recipe by name.

    Raises:
        LookupError: there is none; the message names the closest.
    """
    if name in _RECIPES:
        return _RECIPES[name]
    import difflib

    close = difflib.get_close_matches(name, _RECIPES, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise LookupError(f"no recipe {name!r}; {hint}recipes are {', '.join(_RECIPES)}")
