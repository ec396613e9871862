"""Measurement operators: what a camera, a mask, a lens or a file makes of an image, `A(image) -> y`.

Linear ones have an adjoint, some a pseudo-inverse; all have a gradient that is finite everywhere.
"""

from .blur import GaussianBlur, Kernel, MotionBlur, SuperResolution
from .camera import Clip, Jpeg, Quantize
from .filter import Filter
from .fourier import Fourier, PhaseRetrieval
from .operator import Chain, LinearOperator, Operator
from .pixels import Colorize, Inpaint, Outpaint

__all__ = [
    "Chain",
    "Clip",
    "Colorize",
    "Filter",
    "Fourier",
    "GaussianBlur",
    "Inpaint",
    "Jpeg",
    "Kernel",
    "LinearOperator",
    "MotionBlur",
    "Operator",
    "Outpaint",
    "PhaseRetrieval",
    "Quantize",
    "SuperResolution",
]
