"""The operators' base classes, and operators in a row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..images import digest
from ..network import describe_network


class Operator:
    """Base class: define `__call__`, images `(B, 3, H, W)` in [0, 1] -> measurements `(B, ...)`, each of its own image.

    Attributes:
        linear: whether `A(a x + b z) = a A(x) + b A(z)`.
        tight: of a linear one, whether `A A^T` is a multiple of the identity: each value is measured once, all alike.
        arguments: what the constructor takes to make the operator again, by which the library's own are saved.
    """

    linear: bool = False
    tight: bool = False
    arguments: dict[str, Any] = {}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} must define __call__(image) -> measurement")

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        """One where a value of y `(B, ...)` is measured, zero where it is not; broadcastable to y."""
        return y.new_ones(())

    def describe(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"operator": type(self).__name__} | {key: digest(value) for key, value in self.arguments.items()}

    def __repr__(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.describe().items() if key != "operator")
        return f"{type(self).__name__}({given})"


class LinearOperator(Operator):
    """Base class: define `__call__`, and where they differ or are cheaper, the other methods.

    `<A(x), y> = <x, A.adjoint(y, x.shape)>` for all x, y. Operators with a pseudo-inverse also have
    `pseudo_inverse(y)`, for which `A(A.pseudo_inverse(y)) = y` for every y that A can give.
    """

    linear = True

    def adjoint(self, y: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """The transpose applied to a measurement, for images of `shape`."""
        return _transposed(self, y, shape)


def _transposed(
    operator: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor, shape: torch.Size | tuple[int, ...]
) -> torch.Tensor:
    with torch.enable_grad():
        image = y.new_zeros(shape).requires_grad_()
        return torch.autograd.grad(operator(image), image, y)[0]


def _tight(operator: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    return isinstance(operator, Operator) and operator.tight


class Chain(Operator):
    """Operators in a row: `Chain(a, b)(x) = b(a(x))`. It observes what the last one observes, so a mask comes last.

    Where all are linear, so is the chain (`linear`), and it has `adjoint`. Where all have a pseudo-inverse, and all but
    the last are `tight` (`Colorize`, `SuperResolution` by means), it has `pseudo_inverse`, theirs in reverse: of other
    rows that would be none.

    Args:
        operators: one or more of these operators, or any differentiable callables.
    """

    def __init__(self, *operators: Callable[[torch.Tensor], torch.Tensor]):
        if not operators:
            raise ValueError("a chain needs at least one operator")
        for operator in operators:
            if not callable(operator) or isinstance(operator, type):
                raise TypeError(f"an operator is a callable (images) -> measurements, got {operator!r}")
        self.operators = operators
        self.linear = all(isinstance(one, Operator) and one.linear for one in operators)
        self.tight = all(_tight(one) for one in operators)
        self.arguments = {"operators": operators}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        for operator in self.operators:
            image = operator(image)
        return image

    @property
    def adjoint(self) -> Callable[[torch.Tensor, torch.Size | tuple[int, ...]], torch.Tensor]:
        """`adjoint(y, shape)`, the transpose; AttributeError where an operator is not linear."""
        if not self.linear:
            raise AttributeError("a chain has an adjoint where all of its operators are linear")
        return partial(_transposed, self)

    @property
    def pseudo_inverse(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`pseudo_inverse(y)`; AttributeError where the operators' own do not make one."""
        inverses = all(hasattr(one, "pseudo_inverse") for one in self.operators)
        if not (inverses and all(_tight(one) for one in self.operators[:-1])):
            raise AttributeError("a chain has a pseudo-inverse where all have one and all but the last are tight")
        return self._backwards

    def _backwards(self, y: torch.Tensor) -> torch.Tensor:
        for operator in reversed(self.operators):
            y = operator.pseudo_inverse(y)
        return y

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        last = self.operators[-1]
        return last.observed(y) if isinstance(last, Operator) else super().observed(y)

    def describe(self) -> dict[str, Any]:
        kinds = [one.describe() if isinstance(one, Operator) else describe_network(one) for one in self.operators]
        return {"operator": "Chain", "operators": kinds}

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.operators))})"
