"""Figures of merit: the Frechet distance."""

from __future__ import annotations

import numpy as np
import torch
from scipy import linalg


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
