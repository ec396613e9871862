"""What is measured of a picture's spectrum."""

from __future__ import annotations

import torch

from ..network import moved
from .operator import LinearOperator, Operator
from .pixels import binary


class Fourier(LinearOperator):
    """Some frequencies of each channel, as magnetic resonance measures them: `mask * FFT(x)`, orthonormal.

    `(B, C, H, W)` becomes `(B, 2 C, H, W)`: the real parts of the channels, then the imaginary parts; at least
    float32, as one value of a picture's spectrum is far larger than the others. `A^+` also fills in a frequency of
    whose opposite the mask shows, as pictures are real, and leaves the others zero.

    Args:
        mask: `(H, W)`, 1 (or True) = measured, in the order of `torch.fft.fft2`, frequency zero at [0, 0]: one drawn
            around the middle goes through `torch.fft.ifftshift` first.

    Raises:
        ValueError: the mask has another shape, holds other values than 0 and 1, or shows nothing; pictures of another
            size.

    Source: Lustig et al. 2007, sparse MRI (doi 10.1002/mrm.21391).
    """

    def __init__(self, mask: torch.Tensor):
        if mask.ndim != 2:
            raise ValueError(f"a mask of frequencies is (H, W), got {tuple(mask.shape)}")
        self.mask = binary(mask)
        self.arguments = {"mask": self.mask.bool()}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if image.shape[-2:] != self.mask.shape:
            sizes = [" x ".join(map(str, size)) for size in (self.mask.shape, image.shape[-2:])]
            raise ValueError(f"a mask of {sizes[0]} frequencies does not suit images of {sizes[1]} pixels")
        wide = _wide(image)
        spectrum = torch.fft.fft2(wide, norm="ortho") * moved(self.mask, wide)
        return torch.cat([spectrum.real, spectrum.imag], 1)

    def adjoint(self, y: torch.Tensor, shape: torch.Size | tuple[int, ...] | None = None) -> torch.Tensor:
        return torch.fft.ifft2(self._spectrum(y), norm="ortho").real

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        spectrum, mask = self._spectrum(y), moved(self.mask, _wide(y))
        times = mask + _opposite(mask)
        return torch.fft.ifft2((spectrum + _opposite(spectrum).conj()) / times.clamp_min(1), norm="ortho").real

    def _spectrum(self, y: torch.Tensor) -> torch.Tensor:
        wide = _wide(y)
        return torch.complex(*wide.chunk(2, 1)) * moved(self.mask, wide)

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        return moved(self.mask, y)


class PhaseRetrieval(Operator):
    """How strong each frequency is, without its phase: `|FFT(x)|` of the picture amid zeros; not linear.

    `(B, C, H, W)` becomes `(B, C, round(oversampling H), round(oversampling W))`, at least float32, in the order of
    `torch.fft.fft2`; the norm of a picture is kept. A picture that is shifted or turned by 180 degrees measures alike.
    The gradient of a magnitude that is exactly zero is zero.

    Args:
        oversampling: how many times as high and wide the picture is made, at least 1; below 2 the picture is not
            determined.

    Source: Fienup 1982 (doi 10.1364/AO.21.002758).
    """

    def __init__(self, oversampling: float = 2.0):
        if not 1 <= oversampling < float("inf"):
            raise ValueError(f"oversampling is a number from 1 up, got {oversampling!r}")
        self.oversampling = float(oversampling)
        self.arguments = {"oversampling": self.oversampling}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        size = [round(self.oversampling * side) for side in image.shape[-2:]]
        return torch.fft.fft2(_wide(image), s=size, norm="ortho").abs()


def _wide(image: torch.Tensor) -> torch.Tensor:
    return image.to(torch.promote_types(image.dtype, torch.float32))  # torch has no half-precision transform


def _opposite(spectrum: torch.Tensor) -> torch.Tensor:
    """At each frequency, the value at its negative."""
    return spectrum.flip(-2, -1).roll((1, 1), (-2, -1))
