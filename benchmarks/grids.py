"""The settings that each recipe is tried with: its default, and a grid around what suits a loss of the work's scale."""

from __future__ import annotations

from lossguide.guidance.steps import Adam, Chain, LevelRatio

from .work import Work

ORDER = (
    "auto", "tfg", "mpgd", "freedom", "adam_dps", "pigdm", "dps", "diffpir", "ddnm", "dsg", "red_diff",
    "flowchef", "score", "universal", "lgd_mc", "flowdps", "best_of_n", "fk_steering", "tds", "shen",
)  # fmt: skip
"""Every recipe, the most telling first."""

LONG = ("tds", "shen")
"""Only measured where they are asked for: 200 and 275 visits of a step per picture instead of 50 to 100."""

LINEAR = ("pigdm", "diffpir", "ddnm", "red_diff", "flowdps")
"""For one measurement by a linear operator."""

ETA = {"flowdps": 0.0}
"""Stochasticity of DDIM where it is not 1: FlowDPS puts in the noise itself."""

MOST = 2
"""How many strengths are tried beyond an end of the ladder when the best is there."""


def suits(recipe: str, work: Work) -> bool:
    """Whether a recipe can do the work."""
    return work.linear or recipe not in LINEAR


def grid(recipe: str, work: Work) -> list[dict]:
    """What to try, as keyword arguments of the recipe; the first is its default."""
    c = work.size
    if recipe == "tfg":  # rho at x_t, mu at x0; in others' code the best ratio was 2 (restorations), published 1/4 to 8
        return [{}, *(dict(rho=s * c, mu=2 * s * c, sigma=0.01) for s in (0.1, 0.4, 1.6)), dict(rho=c, mu=c / 4)]
    if recipe == "freedom":
        rms = (dict(rule="rms", **change) for change in ({}, *_strengths(0.3, 3)))
        return [{}, *rms, *(dict(rule="sqrt-alpha", strength=5 * c * s) for s in (0.3, 1, 3))]
    if recipe == "adam_dps":  # the decay rates are those found for others' code on the restorations
        quick, slow = (Chain((Adam(0.03, *betas), LevelRatio())) for betas in ((0.138, 0.032), (0.69, 0.735)))
        return [
            {},
            *_strengths(0.5, 2, 4),
            dict(rule=quick, strength=2.7),
            *(dict(rule=slow, strength=s) for s in (1.3, 4)),
        ]
    if recipe == "red_diff":  # a weight of 0.25 for pictures in [-1, 1] is 0.0625 for a distance in [0, 1]
        return [{}, *(dict(weight=0.0625, strength=s) for s in (0.5, 1, 2, 4))]
    if recipe == "diffpir":
        return [{}, *(dict(weight=w) for w in (1.0, 2.5, 20.0))]
    ladders = {
        "auto": (0.4, 0.7, 1.5, 3),
        "mpgd": (2, 4, 8),
        "pigdm": (0.5, 1.5, 2.5),
        "dps": (0.3 * c, c, 3 * c),
        "ddnm": (0.3, 0.6),
        "dsg": (0.5, 2, 4),
        "flowchef": (c, 3 * c, 9 * c),
        "score": (c, 4 * c, 16 * c),
        "universal": (c, 4 * c, 16 * c),
        "lgd_mc": (0.3 * c, c, 3 * c),
        "flowdps": (0.3, 3),
        "fk_steering": (0.1, 10),
        "tds": (0.1, 10),
        "shen": (0.25, 4, 16),
    }
    return [{}, *_strengths(*ladders.get(recipe, ()))]


def _strengths(*values: float) -> list[dict]:
    return [{"strength": float(value)} for value in values]


def beyond(tried: list[dict], best: dict) -> dict | None:
    """The next strength to try where the best of those tried stands at an end of its ladder, else None.

    A ladder is the settings that differ in strength only; the next is as far from the end as the end from its
    neighbour.
    """
    rest = {key: value for key, value in best.items() if key != "strength"}
    ladder = sorted(
        change.get("strength", 1.0) for change in tried if {k: v for k, v in change.items() if k != "strength"} == rest
    )
    place = ladder.index(best.get("strength", 1.0))
    if len(ladder) < 3 or 0 < place < len(ladder) - 1:
        return None
    end, neighbour = (ladder[0], ladder[1]) if place == 0 else (ladder[-1], ladder[-2])
    return {**rest, "strength": round(end * end / neighbour, 10)}
