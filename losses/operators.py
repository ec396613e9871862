"""Measurement operators: what a camera, a mask or a lens makes of an image. All are linear, `A(image) -> y`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .images import Picture, digest, read_image
from .network import per_image


class LinearOperator:
    """Base class: define `__call__`, and where they differ or are cheaper, the other methods.

    `<A(x), y> = <x, A.adjoint(y, x.shape)>` for all x, y. Operators with a pseudo-inverse also have
    `pseudo_inverse(y)`, for which `A(A.pseudo_inverse(y)) = y` for every y that A can give. `arguments` is what the
    constructor takes to make the operator again, by which the library's own are saved.
    """

    arguments: dict[str, Any] = {}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} must define __call__(image) -> measurement")

    def adjoint(self, y: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """The transpose applied to a measurement, for images of `shape`."""
        with torch.enable_grad():
            image = y.new_zeros(shape).requires_grad_()
            return torch.autograd.grad(self(image), image, y)[0]

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        """One where a value of y `(B, ...)` is measured, zero where it is not; broadcastable to y."""
        return y.new_ones(())

    def describe(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"operator": type(self).__name__}

    def __repr__(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.describe().items() if key != "operator")
        return f"{type(self).__name__}({given})"


class Inpaint(LinearOperator):
    """Keep the pixels that a mask shows: `A(x) = mask * x`. `A = A^T = A^+`.

    Args:
        mask: 1 (or True) = observed, 0 = to be filled in; a tensor broadcastable to images `(B, 3, H, W)`, such as
            `(H, W)` or `(B, 1, H, W)`, or a picture (white = observed).

    Raises:
        ValueError: the mask holds other values than 0 and 1 (a picture is cut at one half), or shows nothing.
    """

    def __init__(self, mask: torch.Tensor | Picture):
        if not isinstance(mask, torch.Tensor):
            mask = read_image(mask).mean(0) > 0.5
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("a mask holds 1 where a pixel is observed and 0 where not, and nothing else")
        if not mask.any():
            raise ValueError("the mask shows nothing: 1 = observed, 0 = to be filled in")
        self.mask = mask.detach().to(torch.get_default_dtype())
        self.arguments = {"mask": self.mask.bool()}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        mask = self.mask.to(image)
        return image * (per_image(mask, len(image), "masks") if mask.ndim == 4 else mask)

    def adjoint(self, y: torch.Tensor, shape: torch.Size | tuple[int, ...] | None = None) -> torch.Tensor:
        return y * self.mask.to(y)

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y * self.mask.to(y)

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        return self.mask.to(y)

    def describe(self) -> dict[str, Any]:
        return {"operator": "Inpaint", "mask": digest(self.mask)}


class SuperResolution(LinearOperator):
    """Average pooling: each measured pixel is the mean of a `factor x factor` block, so the picture stays centred.

    `A^T` spreads each value evenly over its block (divided by `factor^2`), `A^+` repeats it.

    Args:
        factor: block side in pixels; it must divide height and width (ValueError otherwise).
    """

    def __init__(self, factor: int):
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor is a whole number of pixels, at least 1, got {factor!r}")
        self.factor = factor
        self.arguments = {"factor": factor}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"a factor of {self.factor} does not divide images of {height} x {width} pixels")
        return F.avg_pool2d(image, self.factor)

    def adjoint(self, y: torch.Tensor, shape: torch.Size | tuple[int, ...] | None = None) -> torch.Tensor:
        return self.pseudo_inverse(y) / self.factor**2

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)

    def describe(self) -> dict[str, Any]:
        return {"operator": "SuperResolution", "factor": self.factor}


class GaussianBlur(LinearOperator):
    """Convolution with a sampled, normalised Gaussian, per channel, edges reflected.

    Args:
        kernel_size: side of the kernel in pixels, odd; images must be larger than half of it.
        sigma: standard deviation in pixels.
    """

    def __init__(self, kernel_size: int, sigma: float):
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is an odd number of pixels, got {kernel_size!r}")
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
        kernel = self.kernel.to(image).expand(channels, 1, 1, -1)
        image = F.pad(image, (half, half, half, half), mode="reflect")
        return F.conv2d(F.conv2d(image, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)

    def describe(self) -> dict[str, Any]:
        return {"operator": "GaussianBlur", "kernel_size": self.kernel_size, "sigma": self.sigma}
