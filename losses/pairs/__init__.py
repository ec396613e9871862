"""What was done to some pictures, found from examples before and after, as a loss for others."""

from .task import PairTask

__all__ = ["PairTask"]
