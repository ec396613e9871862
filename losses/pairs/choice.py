"""Which mode explains example pairs: an operator, a direction or an analogy; or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..operators import Chain, Filter, Inpaint, Operator
from .features import STILL, Encoder, agreement, alike, analogy_agreement, shift_of
from .linear import EXACT, Candidate, Fitted, fit_filter
from .mask import Holes, fit_holes

MODES = ("operator", "direction", "analogy")
UNSEEN = 0.02  # share of the variance that an operator may leave unexplained whatever it looks like
ASKED = 0.1  # the same where an operator is asked for
NOISE = 0.5  # and where what is left looks like noise
STRUCTURE = 0.3  # up to which likeness of neighbouring pixels it does
CLEAN = 0.1  # likeness of neighbouring pixels up to which what is left is surely noise
ROUNDED = 4 / 12 / 255**2  # a mean squared error that rounding to 8 bits may leave, whatever it looks like
BETTER = 0.5  # what the other way of an operator must leave less than, as a share of the usual way's
AGREE = {"direction": 0.2, "analogy": 0.1}  # the cosine of the pairs' changes; what others foretell of a pair
SURE = 0.5  # the same where the outlines of before and after have nothing in common
OUTLINES = 0.3  # correlation of the outlines of before and after


@dataclass(frozen=True)
class Score:
    """A mode or family on what it was not fitted to: what it is called, and what to tell."""

    name: str
    told: str
    value: float
    chosen: bool = False


@dataclass(frozen=True, eq=False)
class Found:
    """What explains the pairs; see `PairTask`."""

    mode: str
    way: str
    family: str
    sigma: float | None
    ratio: float
    operator: Operator | None = None
    holes: Holes | None = None
    notes: tuple[str, ...] = ()
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def told(self) -> list[str]:
        """Lines of the report."""
        return list(self.notes)

    def check(self, encoder: Encoder) -> None:
        """Raises ValueError where an encoder sees something else in a picture than the one of the fit."""
        with torch.no_grad():
            seen = encoder(self.tensors["probe"][None])[0][0]
        kept = self.tensors["probe features"]
        if seen.shape != kept.shape or (seen - kept.to(seen)).norm() > 0.01 * kept.norm():
            raise ValueError("this is not the encoder that the pairs' task was fitted with: its features differ")


def choose(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], encoder: Encoder | None, mode: str
) -> tuple[Found, list[Score]]:
    """What explains pairs (before, after), and the scores of all that was tried.

    Raises:
        ValueError: nothing does.
    """
    scores: list[Score] = []
    found, reasons = None, []
    if mode in ("auto", "operator"):
        found, why = _operator(pairs, scores, ASKED if mode == "operator" else UNSEEN)
        reasons.append(why)
    if found is None and mode != "operator" and encoder is not None:
        found, why = _change(pairs, encoder, mode, scores)
        reasons.append(why)
    if found is None:
        more = "" if mode != "auto" or encoder is not None else "; no encoder was given to look for a change of content"
        raise ValueError(f"the pairs have nothing in common that could be done to a query: {'; '.join(reasons)}{more}")
    return found, scores


# ---- operators -----------------------------------------------------------------------------------------------------


def _operator(pairs, scores: list[Score], limit: float) -> tuple[Found | None, str]:
    """The operator after -> before, or before -> after where only that leaves nothing but noise, or much less."""
    pairs = [(before.cpu(), after.cpu()) for before, after in pairs]
    ways = {"restore": [(after, before) for before, after in pairs], "apply": pairs}
    best: dict[str, Fitted | Holes] = {}
    for way, turned in ways.items():
        arrow = "before <- after" if way == "restore" else "after <- before"
        fitted, candidates = fit_filter(turned)
        holes = fit_holes(turned)
        if holes is not None and (way == "restore" or holes.holes is not None):  # else nobody knows where
            candidates = [*candidates, holes.candidate]
            if fitted is None or holes.candidate.error <= 1.5 * fitted.candidate.error + EXACT:
                fitted = holes
        scores += [Score(f"{arrow}  {one.family}", _told(one), one.error) for one in candidates]
        if fitted is not None:
            best[way] = fitted
    if not best:
        return None, "no operator was tried, as no size is a whole multiple of the other, or a picture is of one colour"
    fine = {way: one for way, one in best.items() if _explains(one, limit)}
    if not fine:
        one = min(best.values(), key=lambda one: one.candidate.unexplained)
        return None, (
            f"the best operator ({one.candidate.family}) leaves {one.candidate.unexplained:.0%} of the variance "
            f"unexplained, and that is not noise (neighbouring pixels are {one.structure:.2f} alike)"
        )
    # the wrong way leaves outlines: a filter that undoes another, or that takes noise away, is never exact
    clean = [way for way, one in fine.items() if abs(one.structure) <= CLEAN or one.candidate.error <= ROUNDED]
    if clean:
        way = clean[0]
    else:
        way = min(fine, key=lambda way: fine[way].candidate.error * (BETTER if way == "restore" else 1.0))
    chosen, arrow = fine[way], "before <- after" if way == "restore" else "after <- before"
    for i, score in enumerate(scores):
        if score.name == f"{arrow}  {chosen.candidate.family}":
            scores[i] = Score(score.name, score.told, score.value, True)
    return _found(chosen, way, pairs), ""


def _explains(one: Fitted | Holes, limit: float) -> bool:
    share = one.candidate.unexplained
    return share <= limit or (share <= NOISE and abs(one.structure) <= STRUCTURE)


def _told(one: Candidate) -> str:
    return f"error {one.error**0.5:.5f}, {100 * one.unexplained:.3g} % unexplained, {one.parameters} numbers fitted"


def _found(chosen: Fitted | Holes, way: str, pairs) -> Found:
    before, after = pairs[0]
    ratio = after.shape[-1] / before.shape[-1]
    ways = dict(
        restore="undone: the answer is what the query was made of",
        apply="done: the answer is what is made of the query",
    )
    notes = [ways[way], f"noise of standard deviation {chosen.sigma:.5f}"]
    if isinstance(chosen, Holes):
        operator = None if chosen.holes is None else Inpaint(~chosen.holes)
        values = ", ".join(f"{value:.2f}" for value in chosen.fill.tolist())
        where = (
            "different holes" if chosen.holes is None else f"holes in {chosen.holes.float().mean():.1%} of the picture"
        )
        notes.insert(1, f"{where}, of the colour ({values})")
        return Found("operator", way, "mask", chosen.sigma, ratio, operator, chosen, tuple(notes))
    notes[1:1] = _numbers(chosen.operator)
    return Found("operator", way, chosen.candidate.family, chosen.sigma, ratio, chosen.operator, None, tuple(notes))


def _numbers(operator: Operator) -> list[str]:
    """The operator's numbers, as lines."""
    lines = []
    if isinstance(operator, Chain):
        lines.append("clipped to [0, 1]")
        operator = operator.operators[0]
    if not isinstance(operator, Filter):
        return lines
    kernel = operator.kernel
    if kernel.ndim == 4 and kernel.shape[-1] == 1:
        rows = ["  ".join(f"{value:+.3f}" for value in row) for row in kernel[:, :, 0, 0].tolist()]
        lines += ["matrix of colours:", *(f"  {row}" for row in rows)]
    elif kernel.shape[-1] > 1:
        sums = kernel.flatten(-2).sum(-1).flatten().tolist()
        lines.append(f"kernel sums to {', '.join(f'{value:.3f}' for value in sums)}; edges: {operator.padding}")
    if operator.offset is not None and operator.offset.abs().max() > 5e-4:
        lines.append(f"offset {', '.join(f'{value:+.4f}' for value in operator.offset.tolist())}")
    return lines


# ---- changes in a network's features -------------------------------------------------------------------------------


@torch.no_grad()
def _change(pairs, encoder: Encoder, mode: str, scores: list[Score]) -> tuple[Found | None, str]:
    """A direction or an analogy."""
    parts = pairs if len(pairs) > 1 else _halves(pairs[0])
    seen = [tuple(encoder(picture[None]) for picture in pair) for pair in parts]
    changes = torch.cat([after[0] - before[0] for before, after in seen])
    patches = [(before[1], after[1]) for before, after in seen]
    lengths = torch.cat([before[0] for before, _ in seen]).norm(dim=1)
    still = float(changes.norm(dim=1).mean()) < STILL * float(lengths.mean())
    outlines = sum(alike(before, after) for before, after in pairs) / len(pairs)
    found: dict[str, float] = {}
    if mode in ("auto", "direction"):
        found["direction"] = 1.0 if still else agreement(changes)
    has_patches = all(one is not None for pair in patches for one in pair)
    if mode == "analogy" and not has_patches:
        raise ValueError("mode 'analogy' needs an encoder with patches: (features, patches), or a map (B, c, h, w)")
    if mode in ("auto", "analogy") and has_patches and not (still and mode == "auto"):
        found["analogy"] = analogy_agreement([(before[0], after[0]) for before, after in patches])
    for name, value in found.items():
        scores.append(Score(name, f"agreement {value:.3f}, outlines before and after {outlines:.3f} alike", value))
    chosen = max(found, key=found.get)
    needed = AGREE[chosen]
    if mode == "auto" and outlines < OUTLINES:  # nothing shows that a pair's pictures belong together
        needed = SURE if len(pairs) > 1 else 2.0
    if found[chosen] < needed:
        return None, (
            f"the changes agree by {found[chosen]:.2f} ({chosen}), outlines of before and after by {outlines:.2f}"
        )
    scores[:] = [Score(s.name, s.told, s.value, s.chosen or s.name == chosen) for s in scores]
    seen = [tuple(encoder(picture[None]) for picture in pair) for pair in pairs]
    probe = pairs[0][0]
    tensors = {"probe": probe.contiguous(), "probe features": seen[0][0][0][0]}
    if chosen == "direction":
        direction, radius = shift_of(torch.cat([after[0] - before[0] for before, after in seen]))
        tensors |= {"direction": direction, "radius": torch.tensor(radius)}
        notes = (f"agreement of the pairs {found[chosen]:.3f}", f"length of the change {radius:.4g}")
    else:
        tensors |= {
            "before": torch.cat([before[1][0] for before, _ in seen]),
            "after": torch.cat([after[1][0] for _, after in seen]),
        }
        notes = (f"agreement of the pairs {found[chosen]:.3f}", f"{len(tensors['before'])} patches")
    family = f"change of {encoder.name}'s {'features' if chosen == 'direction' else 'patches'}"
    before, after = pairs[0]
    return Found(chosen, "change", family, None, 1.0, notes=notes, tensors=tensors), ""


def _halves(pair: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The left and the right half of a pair, each as large as the picture."""

    def half(picture: torch.Tensor, right: bool) -> torch.Tensor:
        middle = picture.shape[-1] // 2
        part = picture[..., middle:] if right else picture[..., :middle]
        return F.interpolate(part[None], picture.shape[-2:], mode="bilinear", align_corners=False)[0]

    return [tuple(half(picture, right) for picture in pair) for right in (False, True)]
