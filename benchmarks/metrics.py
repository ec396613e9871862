"""Figures of merit of whole sets of pictures: the Frechet and the kernel distance, in stated features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import linalg

from .features import distances

GROUPS = 10


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features `(N, d)` and `(M, d)` (Heusel et al.
    2017)."""
    a, b = a.double().numpy(), b.double().numpy()
    mean = a.mean(0) - b.mean(0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr sqrt(AB) from the eigenvalues of AB, which are real and not negative for covariances
    root = np.sqrt(np.clip(linalg.eigvals(first @ second).real, 0, None)).sum()
    return float(mean @ mean + np.trace(first) + np.trace(second) - 2 * root)


def frechet_by_class(
    features: torch.Tensor, labels: torch.Tensor, real: torch.Tensor, real_labels: torch.Tensor
) -> float:
    """Mean over classes of the Frechet distance within the class."""
    classes = labels.unique().tolist()
    return float(np.mean([frechet(features[labels == c], real[real_labels == c]) for c in classes]))


def jackknife(
    figures: Callable[[torch.Tensor], dict[str, float]], features: torch.Tensor, groups: int = GROUPS
) -> dict[str, float]:
    """Standard errors of figures of a set, from leaving out one of some groups at a time (Quenouille, Tukey)."""
    groups = min(groups, len(features))
    places = torch.arange(len(features)) % groups
    found = [figures(features[places != group]) for group in range(groups)]
    spread = {name: np.array([one[name] for one in found]) for name in found[0]}
    return {name: float(((groups - 1) * values.var()) ** 0.5) for name, values in spread.items()}


def distances_with_errors(features: torch.Tensor, real: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Frechet and kernel distance of features `(N, d)` to real ones `(M, d)`, each with its jackknife error.

    Nothing of fewer than 4. The Frechet distance of few pictures is too large, by an amount that depends on their
    number: compare equal numbers only.
    """
    if len(features) < 4:
        return {}
    figures = lambda some: distances(some, real)
    found, errors = figures(features), jackknife(figures, features)
    return {name: (found[key], errors[key]) for name, key in (("frechet", "fid"), ("kernel", "kid"))}
