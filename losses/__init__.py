"""What is wanted of an image: losses, `(B, 3, H, W)` in [0, 1] -> `(B,)`, lower is better.

Importing this package is cheap; open_clip, torchvision and the like are imported by the losses that use them.
"""

from . import operators, registry
from .classifier import ClassLabel
from .clip import ClipImage, ClipText
from .color import Color
from .frames import Frames
from .images import read_image
from .loss import Composable, Loss, Losses, Term, as_losses
from .measurement import Measurement, measure
from .segmentation import Segmentation
from .style import Style

__all__ = [
    "ClassLabel",
    "ClipImage",
    "ClipText",
    "Color",
    "Composable",
    "Frames",
    "Loss",
    "Losses",
    "Measurement",
    "Segmentation",
    "Style",
    "Term",
    "as_losses",
    "measure",
    "operators",
    "read_image",
    "registry",
]
