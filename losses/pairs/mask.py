"""Pictures with holes of one colour, found from examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .linear import Candidate, likeness

NEAR = 1.5 / 255  # how far a hole's values may be from its colour
FAR = 0.05  # how far from it what is behind a hole must be, to know that there is one
LEAST = 0.005  # share of the pixels that are surely holes


@dataclass(frozen=True)
class Holes:
    """Holes of one colour, and where the pairs have them.

    Attributes:
        candidate: the score, of the pixels that are seen.
        fill: the colour `(3,)`.
        holes: `(H, W)`, where some pair surely has a hole and none shows a pixel; None where pairs' holes differ.
        shown: `(H, W)`, where some pair shows a pixel; None where pairs' holes differ.
        sigma: standard deviation of the noise on what is seen.
        structure: as in `Fitted`.
    """

    candidate: Candidate
    fill: torch.Tensor
    holes: torch.Tensor | None
    shown: torch.Tensor | None
    sigma: float
    structure: float

    def seen(self, query: torch.Tensor) -> torch.Tensor:
        """Which pixels `(B, 1, H, W)` of pictures `(B, 3, H, W)` are no holes.

        Where the pictures have the pairs' holes these count, elsewhere every pixel of the holes' colour.

        Raises:
            ValueError: there is no hole, or nothing else.
        """
        coloured = self.of_fill(query)
        if self.holes is not None and query.shape[-2:] == self.holes.shape:
            same = coloured[:, self.holes].float().mean(1) > 0.9
            fixed = self.holes | (coloured & ~self.shown)
            coloured = torch.where(same.view(-1, 1, 1), fixed, coloured)
        if not coloured.flatten(1).any(1).all() or coloured.flatten(1).all(1).any():
            values = ", ".join(f"{value:.2f}" for value in self.fill.tolist())
            raise ValueError(f"the pairs have holes of the colour ({values}), but a query has none, or nothing else")
        return ~coloured[:, None]

    def of_fill(self, image: torch.Tensor) -> torch.Tensor:
        """Where pictures `(B, 3, H, W)` have the holes' colour."""
        return ((image - self.fill.to(image).view(-1, 1, 1)).abs() <= NEAR).all(1)


def fit_holes(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Holes | None:
    """Holes in the second pictures of pairs of one size, of the most likely colour; None where there are none."""
    if any(x.shape != y.shape for x, y in pairs):
        return None
    found = [one for fill in _colours([y for _, y in pairs]) if (one := _holes(pairs, fill)) is not None]
    return min(found, key=lambda one: one.candidate.error) if found else None


def _colours(pictures: Sequence[torch.Tensor], most: int = 3) -> torch.Tensor:
    """The most frequent exact colours, `(n, 3)`."""
    pixels = torch.cat([picture.flatten(1).T for picture in pictures]).float()
    rounded = (pixels * 255).round().long()
    keys = (rounded[:, 0] * 1000 + rounded[:, 1]) * 1000 + rounded[:, 2]
    _, inverse, counts = keys.unique(return_inverse=True, return_counts=True)
    frequent = [i for i in counts.argsort(descending=True)[:most].tolist() if counts[i] >= LEAST * len(keys)]
    return torch.stack([pixels[inverse == i].median(0).values for i in frequent]) if frequent else pixels[:0]


def _holes(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], fill: torch.Tensor) -> Holes | None:
    coloured = [((y.float() - fill.view(-1, 1, 1)).abs() <= NEAR).all(0) for _, y in pairs]
    sure = [c & ((x.float() - fill.view(-1, 1, 1)).abs() > FAR).any(0) for c, (x, _) in zip(coloured, pairs)]
    count = sum(c.numel() for c in coloured)
    seen = [~c for c in coloured]
    if sum(int(s.sum()) for s in sure) < LEAST * count or sum(int(s.sum()) for s in seen) < LEAST * count:
        return None
    values = torch.cat([y[:, s] for (_, y), s in zip(pairs, seen)], 1).double()
    rest = torch.cat([(y - x)[:, s] for (x, y), s in zip(pairs, seen)], 1).double()
    error, variance = float(rest.square().mean()), float(values.var(1).mean())
    structure = likeness([y - x for x, y in pairs], seen)
    holes = shown = None
    if len({c.shape for c in coloured}) == 1:
        holes, shown = torch.stack(sure).any(0), torch.stack(seen).any(0)
        if float((holes & shown).sum()) > 0.01 * float(holes.sum()):
            holes = shown = None
        else:
            holes = holes & ~shown
    candidate = Candidate("mask", 0, error, error / max(variance, 1e-12))
    return Holes(candidate, fill, holes, shown, error**0.5, structure)
