"""Least squares on shifted copies of pictures, from sums that add up over pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

MOST_ROWS = 12_000  # pixels of a pair that are looked at; large pictures are thinned out by rows
RIDGES = tuple(10.0**power for power in range(-13, 0))  # shares of the mean eigenvalue


@dataclass(frozen=True)
class Sums:
    """`X'X (p, p)`, `X'Y (p, 3)`, the sums of X, Y and Y squared, and the count, of windows X and pixels Y.

    Columns of X go by channel first, `c * K * K + place in the window`.
    """

    xx: torch.Tensor
    xy: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    yy: torch.Tensor
    count: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def part(self, columns: torch.Tensor) -> Sums:
        """Some of the columns of X."""
        return Sums(self.xx[columns][:, columns], self.xy[columns], self.x[columns], self.y, self.yy, self.count)

    @property
    def variance(self) -> float:
        """Of Y, around the mean of each channel."""
        return float((self.yy - self.y**2 / self.count).clamp_min(0).sum() / (self.count * len(self.y)))


def sums_of(x: torch.Tensor, y: torch.Tensor, size: int, stride: int, used: torch.Tensor | None = None, folds: int = 1):
    """The sums of a pair, one for each of `folds` parts of the picture from left to right.

    Args:
        x, y: `(3, H, W)` and `(3, H / stride, W / stride)`; a pixel of y is made of a window of x.
        size: side of the window; only pixels of y whose window lies inside x count.
        used: `(H / stride, W / stride)`, which pixels of y count; all when None.
    """
    x, y = x.double(), y.double()
    margin = (size - stride) // 2
    first = -(-margin // stride)  # the first pixel of y whose window lies inside x
    start = first * stride - margin
    rows = (x.shape[-2] - start - size) // stride + 1
    columns = (x.shape[-1] - start - size) // stride + 1
    every = max(1, rows * columns // MOST_ROWS)
    bounds = [columns * i // folds for i in range(folds + 1)]
    parts: list[list] = [[] for _ in range(folds)]
    for row in range(0, rows, every):
        top = start + row * stride
        windows = F.unfold(x[None, :, top : top + size, start:], size, stride=stride)[0].T  # (columns, 3 K K)
        pixels = y[:, first + row, first : first + columns].T
        keep = torch.ones(columns, dtype=torch.bool)
        if used is not None:
            keep = used[first + row, first : first + columns]
        for part, (a, b) in zip(parts, zip(bounds, bounds[1:])):
            part.append((windows[a:b][keep[a:b]], pixels[a:b][keep[a:b]]))
    return [_summed(torch.cat([w for w, _ in part]), torch.cat([p for _, p in part])) for part in parts]


def _summed(x: torch.Tensor, y: torch.Tensor) -> Sums:
    return Sums(x.T @ x, x.T @ y, x.sum(0), y.sum(0), y.square().sum(0), len(x))


@dataclass(frozen=True)
class Shape:
    """A family's shape: which weights there are.

    Attributes:
        kind: "shared", one kernel for all channels; "channel", one for each; "mixed", across channels.
        size: side of the kernel.
    """

    kind: str
    size: int

    @property
    def parameters(self) -> int:
        """How many weights and offsets there are."""
        kernels = {"shared": 1, "channel": 3, "mixed": 9}[self.kind]
        return kernels * self.size**2 + 3


@dataclass(frozen=True)
class Fit:
    """Weights `(1, k, k)`, `(3, k, k)` or `(3, 3, k, k)` of a correlation, offsets `(3,)`, and the noise's variance."""

    shape: Shape
    weights: torch.Tensor
    offset: torch.Tensor
    variance: float

    def error(self, sums: Sums, largest: int) -> float:
        """The mean squared error on other sums, of windows of the side `largest`."""
        total = 0.0
        for channel in range(3):
            w = self.weights[channel % len(self.weights)]
            names = range(3) if self.shape.kind == "mixed" else [channel]
            part = sums.part(columns_of(names, self.shape.size, largest))
            w, o = w.flatten(), self.offset[channel]
            error = part.yy[channel] - 2 * (w @ part.xy[:, channel] + o * part.y[channel])
            total += float(error + w @ part.xx @ w + 2 * o * (w @ part.x) + part.count * o**2)
        return max(total, 0.0) / (3 * sums.count)


def columns_of(channels, size: int, largest: int) -> torch.Tensor:
    """Where the middle `size x size` of windows of the side `largest` lies among the columns."""
    skip = (largest - size) // 2
    middle = torch.arange(largest**2).view(largest, largest)[skip : skip + size, skip : skip + size].flatten()
    return torch.cat([c * largest**2 + middle for c in channels])


def fit(sums: Sums, shape: Shape, largest: int) -> Fit:
    """Ridge regression with offsets, its strength chosen by generalised cross-validation (Golub et al. 1979)."""
    k = shape.size
    if shape.kind == "mixed":
        part = sums.part(columns_of(range(3), k, largest))
        xx, xy, mean = _centred(part)
        weights, residual, freedom = _ridge(xx, xy, _spread(part), part.count)
        weights = weights.T.reshape(3, 3, k, k)
        offset = part.y / part.count - weights.flatten(1) @ mean
        left = 3 * part.count - 3 * (freedom + 1)
        return Fit(shape, weights, offset, float(residual) / max(left, 1))
    parts = [sums.part(columns_of([c], k, largest)) for c in range(3)]
    centred = [_centred(part) for part in parts]
    if shape.kind == "shared":
        xx = sum(xx for xx, _, _ in centred)
        xy = sum(xy[:, c] for c, (_, xy, _) in enumerate(centred))
        yy = sum(_spread(part)[c] for c, part in enumerate(parts))
        one, residual, freedom = _ridge(xx, xy[:, None], yy[None], 3 * sums.count)
        solved, left = [one[:, 0]] * 3, 3 * sums.count - freedom - 3
    else:
        each = [
            _ridge(xx, xy[:, c : c + 1], _spread(part)[c : c + 1], part.count)
            for c, (part, (xx, xy, _)) in enumerate(zip(parts, centred))
        ]
        solved = [weights[:, 0] for weights, _, _ in each]
        residual, left = sum(r for _, r, _ in each), 3 * sums.count - sum(f + 1 for _, _, f in each)
    offset = torch.stack(
        [part.y[c] / part.count - w @ mean for c, (w, part, (_, _, mean)) in enumerate(zip(solved, parts, centred))]
    )
    weights = torch.stack(solved[:1] if shape.kind == "shared" else solved).view(-1, k, k)
    return Fit(shape, weights, offset, float(residual) / max(left, 1))


def _centred(part: Sums) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean = part.x / part.count
    return part.xx - part.count * mean[:, None] * mean, part.xy - mean[:, None] * part.y, mean


def _spread(part: Sums) -> torch.Tensor:
    return part.yy - part.y**2 / part.count


def _ridge(xx: torch.Tensor, xy: torch.Tensor, yy: torch.Tensor, count: int):
    """Weights `(p, m)`, the residual sum of squares and the effective number of weights of one target."""
    values, vectors = torch.linalg.eigh(xx)
    values = values.clamp_min(0)
    turned = vectors.T @ xy
    scale = float(values.mean()) or 1.0
    best = None
    for ridge in RIDGES:
        inverse = 1 / (values + ridge * scale)
        freedom = float((values * inverse).sum())
        residual = (yy.sum() - ((2 * inverse - values * inverse**2)[:, None] * turned**2).sum()).clamp_min(0)
        residual = residual.clamp_min(1e-15 * float(yy.sum()))  # what rounding leaves
        score = float(residual) / max(count - freedom - 1, 1e-3) ** 2
        if best is None or score < best[0]:
            best = score, vectors @ (inverse[:, None] * turned), residual, freedom
    return best[1:]
