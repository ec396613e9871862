"""Which linear operator made one picture of another: closed forms, compared on what they were not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..operators import Chain, Clip, Filter, Operator, SuperResolution
from .windows import Fit, Shape, Sums, fit, sums_of

LARGEST = 15  # side of the largest kernel that is tried
TOLERANCE = 1.03  # a simpler family may be this much worse
EXACT = 1e-8  # a mean squared error that nobody sees
SATURATED = 0.01  # share of values that were clipped, from which on clipping is part of the operator


@dataclass(frozen=True)
class Candidate:
    """A family and how well it explains pairs that it was not fitted to.

    Attributes:
        family: what the user reads: "colour", "kernel 5x5, shared".
        parameters: how many numbers are fitted.
        error: mean squared error of the pairs left out.
        unexplained: the share of the variance that this is.
    """

    family: str
    parameters: int
    error: float
    unexplained: float


@dataclass(frozen=True)
class Fitted:
    """An operator that makes the second pictures of pairs out of the first.

    Attributes:
        candidate: its family and score.
        operator: with its offset, and with clipping where the pairs show it.
        sigma: standard deviation of what it leaves unexplained.
        structure: how alike neighbouring pixels of what is left are, -1 to 1; noise has 0.
    """

    candidate: Candidate
    operator: Operator
    sigma: float
    structure: float


def stride_of(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int | None:
    """How many times larger the first pictures are than the second; None where that is no one whole number."""
    strides = {a // b if a % b == 0 else 0 for x, y in pairs for a, b in zip(x.shape[-2:], y.shape[-2:])}
    return strides.pop() if len(strides) == 1 and 0 not in strides else None


def fit_filter(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], clipping: bool = True
) -> tuple[Fitted | None, list[Candidate]]:
    """The filter `x -> y` of the family that explains left-out pairs best, a simpler one where it is as good.

    One pair is left out in halves.

    Args:
        pairs: `(x, y)`, `(3, H, W)` and `(3, H / stride, W / stride)`.
        clipping: whether values at 0 and 1 may have been clipped.

    Returns:
        The filter, None where the sizes do not suit or y is of one colour, and every family that was tried.
    """
    stride = stride_of(pairs)
    side = min(min(x.shape[-2:]) for x, _ in pairs)
    if stride is None or side < 4 * stride:
        return None, []
    shapes = _shapes(stride, side)
    largest = max(shape.size for shape in shapes)
    used = [_unclipped(x, y, stride) if clipping else None for x, y in pairs]
    parts = [sums_of(x, y, largest, stride, u, 2 if len(pairs) == 1 else 1) for (x, y), u in zip(pairs, used)]
    folds = [fold for part in parts for fold in part]
    variance = sum(fold.variance * fold.count for fold in folds) / max(sum(fold.count for fold in folds), 1)
    if variance < EXACT or min(fold.count for fold in folds) < 8:
        return None, []
    tried: list[tuple[Candidate, Shape | str]] = []
    for name, known in _known(stride, largest).items():
        error = _mean([known.error(fold, largest) for fold in folds], folds)
        tried.append((Candidate(name, 0, error, error / variance), name))
    for shape in shapes:
        others = [_rest(folds, i) for i in range(len(folds))]
        if shape.parameters > 1.5 * min(rest.count for rest in others):  # three equations each
            continue
        error = _mean([fit(rest, shape, largest).error(fold, largest) for rest, fold in zip(others, folds)], folds)
        tried.append((Candidate(_name(shape, stride), shape.parameters, error, error / variance), shape))
    best = min(candidate.error for candidate, _ in tried)
    fine = [one for one in tried if one[0].error <= TOLERANCE * best + EXACT]
    candidate, shape = min(fine, key=lambda one: one[0].parameters)
    fitted = _finished(candidate, shape, pairs, used, stride)
    if isinstance(fitted.operator, Chain) and not _clips(fitted.operator.operators[0], pairs, used):
        return fit_filter(pairs, clipping=False)
    return fitted, [one for one, _ in tried]


def _shapes(stride: int, side: int) -> list[Shape]:
    if stride > 1:
        sizes = [size for size in range(stride, 4 * stride + 1, 2) if size <= side // 3]
        return [Shape(kind, size) for size in sizes for kind in ("shared", "channel")]
    sizes = range(3, min(LARGEST, (side // 4 - 1) | 1) + 1, 2)
    found = [Shape("mixed", 1)]
    for size in sizes:
        found += [Shape("shared", size), Shape("channel", size)] + ([Shape("mixed", size)] if size <= 5 else [])
    return found


def _known(stride: int, largest: int) -> dict[str, Fit]:
    """Operators without a parameter, as fits."""
    if stride == 1:
        return {"nothing but noise": _as_fit(torch.ones(1, 1, 1, dtype=torch.float64))}
    found = {f"reduction {stride}x, average": _as_fit(torch.full((1, stride, stride), 1 / stride**2).double())}
    if 4 * stride <= largest:
        # the response of the middle pixel of a small picture that is large enough for no edge to be felt
        picture = torch.zeros(1, 1, 9 * stride, 9 * stride, dtype=torch.float64, requires_grad=True)
        SuperResolution(stride, "bicubic")(picture)[0, 0, 4, 4].backward()
        first = 4 * stride - 3 * stride // 2
        around = slice(first, first + 4 * stride)
        if (3 * stride) % 2 == 0:
            found[f"reduction {stride}x, bicubic"] = _as_fit(picture.grad[0, :, around, around])
    return found


def _as_fit(weights: torch.Tensor) -> Fit:
    return Fit(Shape("shared", weights.shape[-1]), weights, torch.zeros(3, dtype=torch.float64), 0.0)


def _name(shape: Shape, stride: int) -> str:
    if shape.size == 1:
        return "colour"
    kind = {"shared": "shared", "channel": "per channel", "mixed": "across channels"}[shape.kind]
    kernel = f"kernel {shape.size}x{shape.size}, {kind}"
    return kernel if stride == 1 else f"reduction {stride}x, {kernel}"


def _rest(folds: list[Sums], left_out: int) -> Sums:
    total = None
    for i, fold in enumerate(folds):
        if i != left_out:
            total = fold if total is None else total + fold
    return total


def _mean(errors: list[float], folds: list[Sums]) -> float:
    return sum(error * fold.count for error, fold in zip(errors, folds)) / sum(fold.count for fold in folds)


def _unclipped(x: torch.Tensor, y: torch.Tensor, stride: int) -> torch.Tensor | None:
    """Which pixels of y were not clipped to 0 or 1, where some were: they are at the limit, and x is not."""
    if float(y.min()) < 0 or float(y.max()) > 1:
        return None
    limit = (y <= 0) | (y >= 1)
    small = torch.nn.functional.avg_pool2d(x[None].double(), stride)[0]
    moved = limit & ((small - y).abs() > 0.05)
    if float(moved.float().mean()) < SATURATED:
        return None
    unclipped = ~limit.any(0)
    return unclipped if float(unclipped.float().mean()) > 0.2 else None


def _clips(operator: Operator, pairs, used) -> bool:
    """Whether most values that may have been clipped would have been beyond the limits."""
    shares = []
    for (x, y), u in zip(pairs, used):
        if u is not None:
            would = operator(x[None].float())[0][:, ~u]
            limit = y[:, ~u]
            beyond = ((limit >= 1) & (would > 1.01)) | ((limit <= 0) & (would < -0.01))
            shares.append(float(beyond.float().sum() / ((limit >= 1) | (limit <= 0)).sum()))
    return sum(shares) / len(shares) > 0.5


def _finished(candidate: Candidate, shape: Shape | str, pairs, used, stride: int) -> Fitted:
    """Fitted to all pairs, with every window that lies inside."""
    clipped = any(u is not None for u in used)
    if isinstance(shape, str) and stride > 1:
        operator: Operator = SuperResolution(stride, shape.rsplit(" ", 1)[1])
        sigma = _squares(operator, pairs, used) ** 0.5
    else:
        if isinstance(shape, str):
            kernel, offset = torch.ones(1, 1, 1), None
            sigma = _squares(Filter(kernel), pairs, used) ** 0.5
        else:
            total = _rest([s for (x, y), u in zip(pairs, used) for s in sums_of(x, y, shape.size, stride, u)], -1)
            found = fit(total, shape, shape.size)
            kernel, sigma = found.weights.flip(-2, -1).float(), found.variance**0.5
            offset = found.offset.float()
        paddings = ("reflect", "replicate", "zeros", "circular") if kernel.shape[-1] > stride else ("reflect",)
        choices = [Filter(kernel, stride, padding, offset) for padding in paddings]
        operator = min(choices, key=lambda one: _squares(one, pairs, used))
    residuals = [y - operator(x[None].to(torch.float32))[0] for x, y in pairs]
    structure = likeness(residuals, used)
    return Fitted(candidate, Chain(operator, Clip(1.0)) if clipped else operator, sigma, structure)


def _squares(operator: Operator, pairs, used) -> float:
    """The mean squared residual of the pixels that are used."""
    errors = [(y - operator(x[None].float())[0]).square().mean(0) for x, y in pairs]
    return float(torch.cat([error.flatten() if u is None else error[u] for error, u in zip(errors, used)]).mean())


def likeness(residuals: Sequence[torch.Tensor], used: Sequence[torch.Tensor | None]) -> float:
    """The correlation of neighbouring pixels of residuals `(3, H, W)`, where both are used."""
    above = below = 0.0
    for r, u in zip(residuals, used):
        u = torch.ones(r.shape[-2:]) if u is None else u.float()
        r = (r - (r * u).sum((1, 2), keepdim=True) / u.sum().clamp_min(1)) * u
        for one, other, a, b in (
            (r[:, 1:], r[:, :-1], u[1:], u[:-1]),
            (r[..., 1:], r[..., :-1], u[:, 1:], u[:, :-1]),
        ):
            both = a * b
            above += float((one * other).sum())
            below += float(((one**2 + other**2) * both).sum()) / 2
    return above / max(below, 1e-20)
