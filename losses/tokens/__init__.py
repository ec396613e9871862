"""Losses in understanding space: what a frozen network sees patch by patch, as features and as words of a codebook."""

from .codebook import Codebook, entropy_of, spherical_kmeans
from .features import PatchFeatures
from .losses import FeatureLoss, TokenHistogramLoss, TokenLoss

__all__ = [
    "Codebook",
    "FeatureLoss",
    "PatchFeatures",
    "TokenHistogramLoss",
    "TokenLoss",
    "entropy_of",
    "spherical_kmeans",
]
