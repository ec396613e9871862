"""Coarser pixels, and lenses: convolutions with a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..network import moved, resize
from .operator import LinearOperator

METHODS = ("average", "bicubic")
PADDINGS = {"reflect": "reflect", "zeros": "constant", "circular": "circular"}
LONGEST = 4096  # pixels of a blur: kernels are as large as a saved description asks, and must fit into the memory


class SuperResolution(LinearOperator):
    """A smaller picture, each of whose pixels is made of a `factor x factor` block, so the picture stays centred.

    By means, `A^T` spreads each value evenly over its block (divided by `factor^2`), `A^+` repeats it. The bicubic one
    has no pseudo-inverse here.

    Args:
        factor: block side in pixels; it must divide height and width (ValueError otherwise).
        method: "average", the mean of the block; "bicubic", antialiased, `4 * factor` pixels wide, as in torch's
            interpolate and Pillow's resize (which also clips).
    """

    def __init__(self, factor: int, method: str = "average"):
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor is a whole number of pixels, at least 1, got {factor!r}")
        if method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, got {method!r}")
        self.factor, self.method = factor, method
        self.tight = method == "average"
        self.arguments = {"factor": factor, "method": method}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"a factor of {self.factor} does not divide images of {height} x {width} pixels")
        if self.method == "bicubic":
            return resize(image, (height // self.factor, width // self.factor))
        return F.avg_pool2d(image, self.factor)

    def adjoint(self, y: torch.Tensor, shape: torch.Size | tuple[int, ...] | None = None) -> torch.Tensor:
        if self.method == "bicubic":
            height, width = y.shape[-2:]
            return super().adjoint(y, (*y.shape[:-2], height * self.factor, width * self.factor))
        return self._repeated(y) / self.factor**2

    @property
    def pseudo_inverse(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`pseudo_inverse(y)`; AttributeError where the method is bicubic."""
        if self.method != "average":
            raise AttributeError("SuperResolution has a pseudo-inverse where its method is 'average'")
        return self._repeated

    def _repeated(self, y: torch.Tensor) -> torch.Tensor:
        return y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)


class GaussianBlur(LinearOperator):
    """Convolution with a sampled, normalised Gaussian, per channel, edges reflected.

    Args:
        kernel_size: side of the kernel in pixels, odd, at most `LONGEST`; images must be larger than half of it.
        sigma: standard deviation in pixels.
    """

    def __init__(self, kernel_size: int, sigma: float):
        if not isinstance(kernel_size, int) or not 1 <= kernel_size <= LONGEST or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is an odd number of pixels, at most {LONGEST}, got {kernel_size!r}")
        if not sigma > 0:
            raise ValueError(f"sigma is positive, got {sigma!r}")
        self.kernel_size, self.sigma = kernel_size, float(sigma)
        self.arguments = {"kernel_size": kernel_size, "sigma": self.sigma}
        offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
        weights = torch.exp(-0.5 * (offsets / self.sigma) ** 2)
        self.kernel = weights / weights.sum()

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        channels, half = image.shape[1], self.kernel_size // 2
        if min(image.shape[-2:]) <= half:
            raise ValueError(f"a kernel of {self.kernel_size} pixels needs images of more than {half} pixels a side")
        kernel = moved(self.kernel, image).expand(channels, 1, 1, -1)
        image = F.pad(image, (half, half, half, half), mode="reflect")
        return F.conv2d(F.conv2d(image, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)


class Kernel(LinearOperator):
    """Convolution with any kernel, per channel; the picture keeps its size.

    A point becomes the kernel, whose middle is row `h // 2`, column `w // 2`. Half precision is computed in float32.
    With circular padding there is `A^+`, the division of the spectra where the kernel's is not zero: it amplifies the
    noise at frequencies that the kernel weakens.

    Args:
        kernel: `(h, w)`, floats, taken as they are: a blur's sum to one.
        padding: what lies beyond the edges: "reflect" (pictures larger than half the kernel), "zeros", or "circular",
            the opposite side (not smaller than half the kernel).

    Raises:
        ValueError: the kernel is no such tensor, or not finite; the padding is another; a picture is too small.
    """

    def __init__(self, kernel: torch.Tensor, padding: str = "reflect"):
        if not isinstance(kernel, torch.Tensor) or kernel.ndim != 2 or not kernel.is_floating_point():
            got = f"{kernel.dtype} {tuple(kernel.shape)}" if isinstance(kernel, torch.Tensor) else type(kernel).__name__
            raise ValueError(f"a kernel is a float tensor (h, w), got {got}")
        if not kernel.numel() or not kernel.isfinite().all():
            raise ValueError("a kernel is not empty, and all of its values are finite")
        if padding not in PADDINGS:
            raise ValueError(f"padding is one of {', '.join(PADDINGS)}, got {padding!r}")
        self.kernel, self.padding = kernel.detach().clone(), padding
        self.arguments = {"kernel": self.kernel, "padding": padding}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        height, width = self.kernel.shape
        below, right = height // 2, width // 2
        reach = max(below / image.shape[-2], right / image.shape[-1])
        if (self.padding == "reflect" and reach >= 1) or (self.padding == "circular" and reach > 1):
            size = " x ".join(map(str, image.shape[-2:]))
            raise ValueError(f"a kernel of {height} x {width} is too large for {self.padding} edges of {size} pixels")
        wide = image.to(torch.promote_types(image.dtype, torch.float32))
        around = (width - 1 - right, right, height - 1 - below, below)
        wide = F.pad(wide, around, mode=PADDINGS[self.padding])
        kernel = moved(self.kernel, wide).flip(0, 1).expand(image.shape[1], 1, -1, -1)
        return F.conv2d(wide, kernel, groups=image.shape[1]).to(image.dtype)

    @property
    def pseudo_inverse(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`pseudo_inverse(y)`; AttributeError where the padding is not circular."""
        if self.padding != "circular":
            raise AttributeError("a kernel has a pseudo-inverse where its padding is 'circular'")
        return self._divided

    def _divided(self, y: torch.Tensor) -> torch.Tensor:
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        point = wide.new_zeros(1, 1, *y.shape[-2:])
        point[..., 0, 0] = 1
        spectrum = torch.fft.fft2(self(point))
        size = spectrum.abs()
        seen = size > size.max() * max(y.shape[-2:]) * torch.finfo(wide.dtype).eps
        inverse = torch.where(seen, 1 / torch.where(seen, spectrum, 1), 0)
        return torch.fft.ifft2(torch.fft.fft2(wide) * inverse).real.to(y.dtype)


class MotionBlur(Kernel):
    """A camera that moves evenly along a straight line while the shutter is open; edges reflected.

    Each weight of the kernel is the share of the line that lies in that pixel. For other edges: `Kernel(blur.kernel,
    padding)`.

    Args:
        length: of the line in pixels, at least 1 and at most `LONGEST`; pictures must be larger than half of it.
        angle: of the line in degrees, counter-clockwise from the horizontal.
    """

    def __init__(self, length: float, angle: float = 0.0):
        if not 1 <= length <= LONGEST or not math.isfinite(angle):
            raise ValueError(
                f"length is at least 1 pixel and at most {LONGEST}, angle a number of degrees, got {length}, {angle}"
            )
        super().__init__(_line(float(length), float(angle)))
        self.length, self.angle = float(length), float(angle)
        self.arguments = {"length": self.length, "angle": self.angle}


def _line(length: float, angle: float) -> torch.Tensor:
    """The shares of a line around the middle of the middle pixel that lie in each pixel, of odd height and width."""
    across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    edges = [i + 0.5 for i in range(math.ceil(length / 2))]
    cuts = [sign * edge / abs(step) for step in (across, up) if abs(step) > 1e-9 for edge in edges for sign in (-1, 1)]
    cuts = sorted([-length / 2, length / 2, *(cut for cut in cuts if abs(cut) < length / 2)])
    half = math.ceil((length - 1) / 2)
    kernel = torch.zeros(2 * half + 1, 2 * half + 1, dtype=torch.float64)
    for start, stop in zip(cuts, cuts[1:]):
        middle = (start + stop) / 2
        if stop - start > 1e-9:
            kernel[half - round(middle * up), half + round(middle * across)] += (stop - start) / length
    rows, columns = kernel.sum(1).nonzero(), kernel.sum(0).nonzero()
    return kernel[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
