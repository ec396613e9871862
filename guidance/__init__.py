"""What to do with a loss: directions, step rules, augmentation, recipes, the diffusers plug-in, the command line."""

from . import recipes, steps
from .augment import Augment
from .guidance import Guidance
from .plugin import Guided, guide

__all__ = ["Augment", "Guidance", "Guided", "guide", "recipes", "steps"]
