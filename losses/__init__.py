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
from .contrastive import ContrastiveText, WordRelation
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
from .tokens import Codebook, FeatureLoss, PatchFeatures, TokenHistogramLoss, TokenLoss

__all__ = [
    "Aesthetic",
    "Attribute",
    "ClassLabel",
    "ClipDirection",
    "ClipImage",
    "ClipText",
    "Codebook",
    "Color",
    "Composable",
    "ContrastiveText",
    "Depth",
    "Detection",
    "Diversity",
    "FaceIdentity",
    "FeatureLoss",
    "Finding",
    "Frames",
    "Landmarks",
    "Loss",
    "Losses",
    "Measurement",
    "PairTask",
    "PatchFeatures",
    "Perceptual",
    "Report",
    "Saliency",
    "Segmentation",
    "Sketch",
    "Style",
    "Symmetry",
    "Term",
    "TokenHistogramLoss",
    "TokenLoss",
    "TotalVariation",
    "WordRelation",
    "as_losses",
    "check",
    "measure",
    "operators",
    "read_image",
    "registry",
]
