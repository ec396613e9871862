"""Agreement with a measurement, and a convenience that makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .images import digest
from .loss import Loss
from .network import describe_network, distance, moved, per_image
from .operators import Operator


class Measurement(Loss):
    """The distance of what an operator makes of the image to what was measured: `||y - A(image)||_2`, not squared.

    `floor = sigma * sqrt(m)`, with m the number of measured values of one sample, is what noise alone leaves: a loss
    below it means that noise is being fitted. A zero residual gives a zero gradient.

    Args:
        operator: one of `losses.operators`, or any differentiable callable, images in [0, 1] -> measurements.
        y: the measurement `(B, ...)`, one per image; or a single one, `(1, ...)` or `(C, h, w)`, for all. Values
            that the operator does not observe are ignored.
        sigma: standard deviation of the noise in y, in the units of y (images are in [0, 1]).

    Raises:
        ValueError: y does not match what the operator gives, or sigma is negative.

    Source: Chung et al. 2023, diffusion posterior sampling (arXiv 2209.14687).
    """

    name = "measurement"
    augment = False

    def __init__(self, operator: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor, sigma: float = 0.0):
        if not callable(operator):
            raise TypeError(f"an operator is a callable (images) -> measurements, got {operator!r}")
        if not sigma >= 0:
            raise ValueError(f"sigma is a standard deviation, not negative, got {sigma!r}")
        self.operator, self.sigma = operator, float(sigma)
        y = y.detach()
        y = y[None] if y.ndim == 3 else y
        with _fitting(f"the operator does not suit measurements {tuple(y.shape)}"):
            observed = torch.ones_like(y) * _observed(operator, y)
        self.y = torch.where(observed > 0, y, 0)
        self.batch = len(self.y)
        counts = observed.reshape(len(observed), -1).sum(1)
        floor = sigma * counts.sqrt()
        self.floor = floor[0].item() if (counts == counts[0]).all() else floor
        described = operator.describe() if isinstance(operator, Operator) else describe_network(operator)
        self.settings: dict[str, Any] = {"operator": described, "y": digest(self.y), "sigma": float(sigma)}
        self.arguments = self.settings | {"operator": operator, "y": self.y}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return distance(self.residual(image))

    def residual(self, image: torch.Tensor) -> torch.Tensor:
        """`y - A(image)`, of the shape of y; zero where nothing is observed."""
        with _fitting(f"the operator does not suit images {tuple(image.shape)}"):
            measured = self.operator(image)
        y = moved(self.y, measured)  # a spectrum is wider than half-precision images
        if measured.shape[1:] != y.shape[1:] or len(measured) != len(image):
            raise ValueError(
                f"the operator makes {tuple(measured.shape)} of images {tuple(image.shape)}, but y is {tuple(y.shape)}"
            )
        return per_image(y, len(image), "measurements") - measured


@contextmanager
def _fitting(told: str) -> Iterator[None]:
    """What torch says where sizes differ, as what it means."""
    try:
        yield
    except RuntimeError as error:
        if "must match" not in str(error):
            raise
        raise ValueError(f"{told}: is a mask of another size? ({error})") from error


def _observed(operator: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    return operator.observed(y) if isinstance(operator, Operator) else y.new_ones(())


def measure(
    operator: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    sigma: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """What an operator measures of images, with noise: `A(image) + sigma * noise`, on measured values only.

    Args:
        operator: one of `losses.operators`, or any callable.
        image: `(B, 3, H, W)` in [0, 1].
        sigma: standard deviation of the noise, in the units of the measurement.
        generator: for a noise that can be repeated; it is drawn on the generator's device.
    """
    y = operator(image)
    if sigma == 0:
        return y
    device = y.device if generator is None else generator.device
    noise = torch.randn(y.shape, generator=generator, device=device, dtype=y.dtype).to(y.device)
    return y + sigma * noise * _observed(operator, y)
