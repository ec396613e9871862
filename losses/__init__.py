"""What is wanted of an image: losses, `(B, 3, H, W)` in [0, 1] -> `(B,)`, lower is better.

Importing this package is cheap; open_clip, torchvision and the like are imported by the losses that use them.
"""

from . import operators, registry
from .aesthetic import Aesthetic
from .attribute import Attribute
from .check import Finding, Report, check
from .classifier import ClassLabel
from .clip import ClipDirection, ClipImage, ClipText
from .color import Color
from .depth import Depth
from .detection import Detection
from .diversity import Diversity
from .face import FaceIdentity
from .frames import Frames
from .images import read_image
from .landmarks import Landmarks
from .loss import Composable, Loss, Losses, Term, as_losses
from .measurement import Measurement, measure
from .pairs import PairTask
from .perceptual import Perceptual
from .regular import Symmetry, TotalVariation
from .saliency import Saliency
from .segmentation import Segmentation
from .sketch import Sketch
from .style import Style

__all__ = [
    "Aesthetic",
    "Attribute",
    "ClassLabel",
    "ClipDirection",
    "ClipImage",
    "ClipText",
    "Color",
    "Composable",
    "Depth",
    "Detection",
    "Diversity",
    "FaceIdentity",
    "Finding",
    "Frames",
    "Landmarks",
    "Loss",
    "Losses",
    "Measurement",
    "PairTask",
    "Perceptual",
    "Report",
    "Saliency",
    "Segmentation",
    "Sketch",
    "Style",
    "Symmetry",
    "Term",
    "TotalVariation",
    "as_losses",
    "check",
    "measure",
    "operators",
    "read_image",
    "registry",
]
