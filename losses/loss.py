"""The loss contract: an image in, one number per sample out; lower is better.

A loss maps images `(B, 3, H, W)`, float, nominally in [0, 1] (values may overshoot), to a tensor `(B,)`. It owns its
target and its network's preprocessing, moves to the image's device and dtype by itself, and knows nothing of noise,
steps or files. Losses compose by `+` and `*` into named terms; a term carries the plain data that guidance reads.
"""

from __future__ import annotations

import dataclasses
import itertools
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


class Composable:
    """What adds and scales: `2.0 * ClipText("a boot") + Style("candy.jpg")`."""

    def terms(self) -> tuple[Term, ...]:
        raise TypeError(f"{type(self).__name__} must define terms()")

    def _parts(self) -> tuple[Term, ...]:
        return self.terms()  # a sum's own terms are numbered anew in every sum that they enter

    def __add__(self, other: Composable | Callable) -> Losses:
        return Losses(self._parts() + as_losses(other)._parts())

    def __radd__(self, other: Composable | Callable | int) -> Losses:
        if isinstance(other, int) and other == 0:  # so that sum([...]) works
            return Losses(self._parts())
        return Losses(as_losses(other)._parts() + self._parts())

    def __mul__(self, weight: float) -> Losses:
        if not isinstance(weight, numbers.Real):
            return NotImplemented
        return Losses(tuple(dataclasses.replace(term, weight=term.weight * float(weight)) for term in self._parts()))

    __rmul__ = __mul__

    def during(self, start: float, stop: float) -> Losses:
        """Act only while the sampling progress (0 at pure noise, 1 at the picture) is in [start, stop).

        What progress is measured by, steps or noise, is the guidance's `clock`. The window takes the place of those
        that the terms had.
        """
        if not 0 <= start < stop <= 1:
            raise ValueError(f"a window needs 0 <= start < stop <= 1, got {start}, {stop}")
        return Losses(tuple(dataclasses.replace(term, window=(start, stop)) for term in self._parts()))

    def scheduled(self, *points: tuple[float, float]) -> Losses:
        """Weigh by a factor that goes along straight lines through `(progress, factor)`, level before and after them.

        `text + style.scheduled((0.3, 0), (0.6, 1))`: the style sets in slowly. Weights are relative: a factor of zero
        switches a lone loss off, another makes it weaker only where the rule's steps are as long as the gradient, which
        `auto`'s are not.

        Raises:
            ValueError: the points are not in order of their progress in [0, 1], or a factor is negative.
        """
        return Losses(tuple(dataclasses.replace(term, schedule=tuple(points)) for term in self._parts()))


class Loss(Composable):
    """Base class of the library's losses: define `__call__` and, where it differs, the attributes below.

    Attributes:
        name: the term's name in records; the class name unless set.
        augment: whether random augmentation suits the loss: yes where a network judges, no where pixels must match.
        floor: the loss of a perfect picture where it is known (a measurement's noise level), else None.
        batch: for how many pictures it is, where each has a target of its own; None where it suits any number.
        whole_batch: whether a picture's value depends on the others of its batch.
        pictures: whether it looks at colour pictures only, not at videos and sound.
        settings: plain data (strings, numbers, lists) that describe the loss in records and JSON files.
        arguments: what the constructor takes to make the loss again, by which the library's own losses are saved.
    """

    name: str = ""
    augment: bool = True
    floor: float | torch.Tensor | None = None
    batch: int | None = None
    whole_batch: bool = False
    pictures: bool = False
    settings: dict[str, Any] = {}
    arguments: dict[str, Any] = {}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} must define __call__(image) -> (B,)")

    def terms(self) -> tuple[Term, ...]:
        return (Term(self, name=self.name or type(self).__name__, augment=self.augment),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"


@dataclass(frozen=True)
class Term(Composable):
    """One loss among several: `Term(my_function, weight=2.0, augment=False)` also gives any callable its plain data.

    Args:
        loss: callable `(B, 3, H, W) -> (B,)`.
        name: shown in records; the callable's own name unless given.
        weight: factor of the loss in the sum, not negative.
        window: sampling progress [start, stop) in which the term acts; 0 is pure noise, 1 the finished picture.
        augment: whether random augmentation suits it.
        schedule: points `(progress, factor)` between which the weight's factor goes along straight lines.
    """

    loss: Callable[[torch.Tensor], torch.Tensor]
    name: str = ""
    weight: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    augment: bool = True
    schedule: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.loss) or isinstance(self.loss, type):
            hint = ""
            if isinstance(self.loss, str):
                hint = f"; a text is wished by ClipText({self.loss!r})"
            elif isinstance(self.loss, (list, tuple)):
                hint = "; losses are added: one + other"
            elif isinstance(self.loss, type):
                hint = f"; make one: {self.loss.__name__}(...)"
            raise TypeError(f"a loss is a callable (image) -> (B,), got {self.loss!r}{hint}")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"a weight is finite and not negative, got {self.weight} for {self.loss!r}")
        if not _is_schedule(self.schedule):
            raise ValueError(
                "a schedule is points (progress, factor), progress in [0, 1] and in order, factors not negative, "
                f"got {self.schedule}"
            )
        if not self.name:
            object.__setattr__(self, "name", getattr(self.loss, "__name__", type(self.loss).__name__))

    def terms(self) -> tuple[Term, ...]:
        return (self,)

    def at(self, progress: float) -> Term:
        """The term with the weight that its schedule gives it at this sampling progress in [0, 1]."""
        if not self.schedule:
            return self
        factor = float(np.interp(progress, *zip(*self.schedule)))
        return dataclasses.replace(self, weight=self.weight * factor, schedule=())

    def acts_at(self, progress: float) -> bool:
        """Whether the term acts at this sampling progress in [0, 1]."""
        return self.at(progress).weight > 0 and self.window[0] <= progress < (
            self.window[1] if self.window[1] < 1 else 1.1
        )

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """The unweighted loss `(B,)` of images `(B, 3, H, W)`; the shape of what comes back is checked.

        Raises:
            ValueError: the loss returned something else than one number per sample, or wrote into the images; or it
                raised an error whose cause is known.
        """
        if getattr(self.loss, "pictures", False) and (image.dim() != 4 or image.shape[1] != 3):
            raise ValueError(
                f"loss '{self.name}' looks at pictures (B, 3, H, W), got {tuple(image.shape)}; Frames(loss) makes one "
                "for videos (B, F, 3, H, W)"
            )
        counted = not torch.compiler.is_compiling() and not image.is_inference()
        version = image._version if counted else None
        try:
            value = self.loss(image)
        except Exception as error:
            advice = advice_on(error)
            if advice is None:
                note(error, f"raised by the loss '{self.name}' for pictures {tuple(image.shape)}")
                raise
            told = f"loss '{self.name}' fails on pictures {tuple(image.shape)} ({said(error)}); {advice}"
            raise ValueError(told) from error
        if version is not None and image._version != version:
            raise ValueError(
                f"loss '{self.name}' writes into the pictures that it is given, which other terms see as well: leave "
                "out operations such as .clamp_(), += and image[...] = , or let them write into image.clone()"
            )
        if isinstance(value, torch.Tensor) and not image.requires_grad and value.dtype in _WHOLE:
            value = value.float()  # a count or a yes will do where no gradient is asked for
        wrong = wrong_value(value, len(image))
        if wrong is not None:
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            got = value.dtype if isinstance(value, torch.Tensor) and value.shape == (len(image),) else got
            raise ValueError(
                f"loss '{self.name}' must return one number per sample, shape ({len(image)},), but returned {got}: it "
                f"{wrong}"
            )
        if value.device != image.device:
            raise ValueError(
                f"loss '{self.name}' returned its value on {value.device} for pictures on {image.device}: leave out "
                ".cpu() and .cuda(), and move its own tensors by .to(image.device)"
            )
        return value

    def describe(self) -> dict[str, Any]:
        """Plain data for JSON."""
        loss = self.loss
        kind = getattr(loss, "__qualname__", type(loss).__name__)
        return {
            "loss": f"{getattr(loss, '__module__', type(loss).__module__)}.{kind}",
            "settings": dict(getattr(loss, "settings", {})),
            "name": self.name,
            "weight": self.weight,
            "window": list(self.window),
            "augment": self.augment,
            "schedule": [list(point) for point in self.schedule],
        }


_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def wrong_value(value: object, images: int) -> str | None:
    """What is wrong with what a loss returned for so many images, and what to do about it; None where nothing is."""
    if value is None:
        return "returns nothing: end it with return"
    if not isinstance(value, torch.Tensor):
        return (
            f"returns a {type(value).__name__}, which has no gradient: return a tensor (B,), by torch operations all "
            "the way, without .item(), float() and numpy"
        )
    if value.shape != (images,):
        size = " x ".join(str(side) for side in value.shape)
        if value.ndim == 0 or value.numel() == 1 < images:
            return "returns one number for the whole batch: average over every axis but the first, .mean((1, 2, 3))"
        if value.numel() == images:
            return f"returns {size} for a batch of {images}: drop all axes but the first, .flatten()"
        return (
            f"returns {size} for a batch of {images}, not one number each: average over every axis but the first, "
            ".flatten(1).mean(1)"
        )
    if not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        return f"returns numbers of {kind}, which have no gradient: leave out rounding and comparisons"
    return None


# what an error of torch or Python says, and what it means here
_CAUSES = (
    (
        TypeError,
        "positional argument",
        "a loss takes the pictures alone, and where it is the loss that wants more, bind the rest by functools.partial",
    ),
    (RuntimeError, "call numpy()", "numpy knows no gradient, use torch operations all the way"),
    (RuntimeError, "same device", "move its own tensors to the picture's by .to(image.device)"),
    (RuntimeError, "should be the same", "bring its own tensors and network to the picture's kind by .to(image)"),
    (RuntimeError, "same dtype", "bring its own tensors and network to the picture's kind by .to(image)"),
    (RuntimeError, "inplace operation", "write y = y + 1 for y += 1, and the like"),
    (RuntimeError, "in-place operation", "write y = y + 1 for y += 1, and into image.clone() in place of the picture"),
)


def advice_on(error: Exception) -> str | None:
    """What to do about an error in a loss; None where that is not known."""
    text = str(error)
    return next((advice for kind, known, advice in _CAUSES if isinstance(error, kind) and known in text), None)


def note(error: Exception, text: str) -> None:
    """Let an error's traceback end with where it happened, on Pythons that can (3.11)."""
    if hasattr(error, "add_note"):
        error.add_note(text)


def said(error: Exception) -> str:
    """An error's kind and its first sentence."""
    first = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".:")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _is_schedule(points: Any) -> bool:
    """Whether these are points `(progress, factor)` in order."""
    if any(len(point) != 2 or not all(isinstance(v, numbers.Real) for v in point) for point in points):
        return False
    places = [place for place, _ in points]
    fine = all(0 <= place <= 1 and 0 <= factor < float("inf") for place, factor in points)
    return fine and places == sorted(places)


class Losses(Composable):
    """A weighted sum of terms; itself a loss. Terms of the same name are numbered."""

    def __init__(self, terms: tuple[Term, ...]):
        self._unnumbered = tuple(terms)
        self.arguments = {"terms": self._unnumbered}
        names = [term.name for term in terms]
        taken = {name for name in names if names.count(name) == 1}  # somebody's own "a-1" stays what it is
        numbered = []
        for term in terms:
            if names.count(term.name) > 1:
                numbers = (f"{term.name}-{number}" for number in itertools.count(1))
                term = dataclasses.replace(term, name=next(name for name in numbers if name not in taken))
                taken.add(term.name)
            numbered.append(term)
        self._terms = tuple(numbered)

    def terms(self) -> tuple[Term, ...]:
        return self._terms

    def _parts(self) -> tuple[Term, ...]:
        return self._unnumbered

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if not self._terms:
            return image.flatten(1).sum(1) * 0
        return torch.stack([term.weight * term(image) for term in self._terms]).sum(0)

    def __repr__(self) -> str:
        return " + ".join(f"{term.weight:g} * {term.loss!r}" for term in self._terms)


def as_losses(loss: Composable | Callable[[torch.Tensor], torch.Tensor]) -> Losses:
    """Any loss, term, sum of them or plain callable `(B, 3, H, W) -> (B,)` as a sum of terms."""
    if isinstance(loss, Losses):
        return loss
    if isinstance(loss, Composable):
        return Losses(loss.terms())
    return Losses((Term(loss),))
