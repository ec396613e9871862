"""Does a loss keep to what is asked of it? `check(loss)` tries it and says what is wrong, and what to do about it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .loss import Composable, advice_on, as_losses, said, wrong_value

LEVELS = ("ok", "warning", "problem")

_KINDS = {
    "random": "a picture of random pixels",
    "black": "a black picture",
    "white": "a white picture",
    "grey": "a picture of one colour",
    "outside": "a picture slightly outside [0, 1]",
}
_LOW = (torch.float64, torch.bfloat16, torch.float16)
_STEPS = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # of finite differences; single precision needs the longer ones


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: the check's name.
        level: "ok", "warning" or "problem".
        text: one sentence; where something is wrong, with what to do about it.
        loss: the term's name.
    """

    check: str
    level: str
    text: str
    loss: str = ""


@dataclass(frozen=True)
class Report:
    """What `check` found; print it."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What keeps the loss from guiding, or makes it guide wrongly."""
        return tuple(finding for finding in self.findings if finding.level == "problem")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What may be meant so."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        lines = []
        for name in dict.fromkeys(finding.loss for finding in self.findings):
            lines.append(name)
            lines += [f"  {f.level:<8} {f.check:<13} {f.text}" for f in self.findings if f.loss == name]
        return "\n".join(lines)


@torch.enable_grad()
def check(
    loss: Composable | Callable[[torch.Tensor], torch.Tensor],
    shape: Sequence[int] = (3, 64, 64),
    *,
    device: torch.device | str | None = None,
) -> Report:
    """Try a loss on pictures: its shape, values, gradient, what it does to the caller's tensor, and its speed.

    Args:
        loss: any callable `(B, 3, H, W) -> (B,)`, or a loss; of a sum, each term is tried by itself.
        shape: of one picture, `(3, H, W)`; or of what else the loss looks at, such as a video `(F, 3, H, W)`.
        device: where to try it; CUDA where there is one unless given.

    Raises:
        TypeError: that is no loss.
        ValueError: that is no shape.
    """
    shape = tuple(shape)
    if not shape or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"a picture's shape is (3, H, W) in whole numbers above 0, got {shape}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    findings: list[Finding] = []
    for term in as_losses(loss).terms():
        trial = _Trial(term.loss, shape, device, getattr(term.loss, "batch", None) or 1)
        findings += [dataclasses.replace(finding, loss=term.name) for finding in _tried(trial)]
    return Report(tuple(findings))


def _tried(trial: _Trial) -> list[Finding]:
    levels: dict[str, str] = {}
    findings = []
    for name, look, needs in _CHECKS:
        if any(levels.get(needed) != "ok" for needed in needs):
            continue
        try:
            outcome = look(trial)
        except _Failed as failure:
            outcome = "problem", str(failure)
        if outcome is not None:
            levels[name] = outcome[0]
            findings.append(Finding(name, *outcome))
    return findings


class _Failed(Exception):
    """The loss raised an error."""


@dataclass(frozen=True)
class _Trial:
    """A loss, and pictures to try it on; `each` of them have targets of their own, so that fewer do not suit it."""

    loss: Callable[[torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]
    device: torch.device
    each: int = 1

    def pictures(
        self, kind: str = "random", count: int = 1, shape: tuple[int, ...] | None = None, seed: int = 0
    ) -> torch.Tensor:
        """`count` times as many pictures as the loss has targets, of one of `_KINDS`."""
        size = (count * self.each, *(shape or self.shape))
        noise = torch.rand(size, generator=torch.Generator().manual_seed(seed))
        flat = {"black": 0.0, "white": 1.0, "grey": 0.5}
        image = torch.full(size, flat[kind]) if kind in flat else noise
        return (image * 1.2 - 0.1 if kind == "outside" else image).to(self.device)

    def value(self, image: torch.Tensor) -> torch.Tensor:
        """What the loss returns for a copy of the pictures."""
        return self.call(image.clone())

    def call(self, image: torch.Tensor) -> torch.Tensor:
        """What the loss returns for this very tensor."""
        try:
            return self.loss(image)
        except Exception as error:
            raise _failure(error, image) from error

    def gradient(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss of each picture and its gradient there; None where there is none."""
        leaf = image.detach().clone().requires_grad_()
        value = self.value(leaf)
        if not value.requires_grad:
            return value, None
        try:
            return value.detach(), torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0]
        except Exception as error:
            raise _failure(error, image) from error

    @functools.cached_property
    def precise(self) -> bool:
        """Whether the loss reckons in double precision where it is given that, and rounds nowhere on the way."""
        image = self.pictures().double() + 1e-9
        try:
            value, rounded = self.value(image), self.value(image.float().double())
        except _Failed:
            return False
        return value.dtype == torch.float64 and not torch.equal(value, rounded)

    @property
    def dtype(self) -> torch.dtype:
        """The precision to compare values in."""
        return torch.float64 if self.precise else torch.float32


def _failure(error: Exception, image: torch.Tensor) -> _Failed:
    advice = advice_on(error)
    return _Failed(f"fails on pictures {_size(image.shape)} ({said(error)}){f'; {advice}' if advice else ''}")


def _size(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)


# Each check returns its level and what it found, or None where it does not apply.
_Outcome = tuple[str, str]


def _shape(trial: _Trial) -> _Outcome:
    for count in (1, 2, 3):
        image = trial.pictures(count=count)
        try:
            value = trial.value(image)
        except _Failed as failure:
            other = "; if it is for pictures of another shape, name that" if count == 1 else ""
            raise _Failed(f"{failure}{other}") from failure
        wrong = wrong_value(value, len(image))
        if wrong:
            return "problem", wrong
    batches = ", ".join(str(count * trial.each) for count in (1, 2, 3))
    return "ok", f"one number per picture, for batches of {batches} of {_size(trial.shape)}"


def _finite(trial: _Trial) -> _Outcome:
    for kind, words in _KINDS.items():
        value = trial.value(trial.pictures(kind))
        if not value.isfinite().all():
            return "problem", (
                f"is {_odd(value)} for {words}: keep logarithms, roots, powers and divisions away from zero and below, "
                "as in .clamp(min=1e-6)"
            )
    return "ok", "black, white, of one colour, slightly outside [0, 1]: every value is finite"


def _repeatable(trial: _Trial) -> _Outcome:
    image = trial.pictures(count=2)
    first, second = trial.value(image), trial.value(image)
    if _far(first, second, 1e-6 if trial.precise else 1e-5):
        i = (first - second).abs().argmax()
        return "warning", (
            f"is random, {first[i]:.6g} and then {second[i]:.6g} for the same picture, and what compares values was "
            "left out: draw once and keep it; a network with dropout wants .eval()"
        )
    return "ok", "two calls give the same value"


def _alone(trial: _Trial) -> _Outcome:
    if getattr(trial.loss, "whole_batch", False):
        return "ok", "a picture's value depends on its batch, as the loss says"
    n = trial.each
    image = trial.pictures(count=3).to(trial.dtype)
    value = trial.value(image)
    among = [(value[:n], trial.value(torch.cat([image[:n], 0.5 * image[n:]]))[:n])]
    if n == 1:
        among.append((torch.cat([trial.value(one) for one in image.split(1)]), value))
        among.append((value.flip(0), trial.value(image.flip(0))))
    for first, second in among:
        if _far(first, second, 1e-6 if trial.precise else 3e-3):
            i = (first - second).abs().argmax()
            return "problem", (
                f"a picture's value depends on the others in its batch, {first[i]:.6g} and {second[i]:.6g}: average "
                "over every axis but the first; a network with batch normalisation wants .eval()"
            )
    return "ok", "each picture's value depends on that picture alone"


def _untouched(trial: _Trial) -> _Outcome:
    image = trial.pictures("outside", 2)
    kept, version = image.clone(), image._version
    trial.call(image)
    if image._version != version or not torch.equal(image, kept):
        return "problem", (
            "writes into the picture that it is given: leave out operations such as .clamp_(), += and image[...] = , "
            "or let them write into image.clone()"
        )
    leaf = kept.clone().requires_grad_()
    with contextlib.suppress(_Failed):  # the check of the gradient tells it
        trial.call(leaf)
    if image.requires_grad or not leaf.requires_grad:
        return "problem", "changes requires_grad of the picture that it is given: leave that to the caller"
    if leaf.grad is not None:
        return "problem", "calls .backward(): return the value, the gradient is taken by the caller"
    return "ok", "leaves the picture that it is given as it is"


def _gradient(trial: _Trial) -> _Outcome:
    for kind in _KINDS:
        _, gradient = trial.gradient(trial.pictures(kind, 2))
        if gradient is None:
            return "problem", (
                "has no gradient: somewhere it leaves torch or cuts the graph, by .detach(), .item(), numpy, "
                "torch.tensor(...), torch.no_grad() or a comparison; use torch operations all the way"
            )
        if gradient.count_nonzero():
            return "ok", "there is one"
    return "problem", (
        "the gradient is zero everywhere: the value moves in steps, as after .round(), .argmax() or a threshold; use a "
        "smooth stand-in, such as a sigmoid or a softmax"
    )


def _gradient_finite(trial: _Trial) -> _Outcome:
    for kind, words in _KINDS.items():
        _, gradient = trial.gradient(trial.pictures(kind, 2))
        if gradient is not None and not gradient.isfinite().all():
            return "problem", (
                f"the gradient is {_odd(gradient)} for {words}: roots, norms, deviations and logarithms have none at "
                "zero, add a small number inside, as in (x + 1e-6).sqrt()"
            )
    return "ok", "black, white, of one colour, slightly outside [0, 1]: the gradient is finite"


def _outside(trial: _Trial) -> _Outcome:
    image = trial.pictures("outside", 2)
    _, gradient = trial.gradient(image)
    beyond = (image < 0) | (image > 1)
    if gradient is not None and gradient[~beyond].count_nonzero() > 100 and not gradient[beyond].count_nonzero():
        return "warning", (
            "pixels outside [0, 1] have no gradient, as after clamp(0, 1), so that nothing brings them back: leave the "
            "clamp out, or add a term that draws them in"
        )
    return "ok", "pixels outside [0, 1] have a gradient, too"


def _differences(trial: _Trial) -> _Outcome:
    if getattr(trial.loss, "whole_batch", False):
        return "ok", "not compared: each picture moves the values of the others"
    image = trial.pictures(count=2).to(trial.dtype)
    _, gradient = trial.gradient(image)
    assert gradient is not None  # by the checks before
    wrong, rough, shown = 0, 0, ""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(image.shape, generator=generator).to(image)
        if not trial.precise:  # uphill in every pixel: a change that rounding does not drown
            direction = torch.where(gradient < 0, -direction.abs(), direction.abs())
        for slope, found, smooth in _slopes(trial, image, gradient, direction):
            if found is None:
                continue
            if smooth:
                wrong, shown = wrong + 1, f"{slope:.4g}, and by finite differences {found:.4g}"
            else:
                rough += 1
    if wrong > rough:
        return "problem", (
            f"the gradient is not that of the value, along a random direction {shown}: look for a part that is "
            "detached or runs under torch.no_grad(), and for a backward() of its own"
        )
    if wrong or rough:
        return "warning", (
            "finite differences do not confirm the gradient, because the value moves in steps or has kinks, or is too "
            "coarse for them: fine if that is meant"
        )
    return "ok", f"agrees with finite differences in {_name(trial.dtype)}"


def _slopes(
    trial: _Trial, image: torch.Tensor, gradient: torch.Tensor, direction: torch.Tensor
) -> list[tuple[float, float | None, bool]]:
    """For each picture: the slope by the gradient; by differences where that is another, else None; if it is smooth.

    Central differences at several steps, of which the best counts. It is smooth where two steps in a row find the same
    slope, to both sides, and not exactly zero.
    """
    tolerance = 1e-3 if trial.precise else 0.05
    middle = trial.value(image).detach().double()
    slope = (gradient * direction).flatten(1).sum(1).double()
    length = gradient.flatten(1).norm(dim=1).double()
    best = torch.full_like(slope, math.inf)
    even, found, last = best.clone(), slope.clone(), torch.zeros_like(slope)
    for step in _STEPS if trial.precise else _STEPS[2:]:
        ahead, behind = (trial.value(image + sign * step * direction).detach().double() for sign in (1, -1))
        central = (ahead - behind) / (2 * step)
        scale = torch.maximum(length, central.abs()).clamp(min=torch.finfo(torch.float64).tiny)
        best = torch.minimum(best, torch.where(slope == central, 0, (slope - central).abs() / scale))
        uneven = torch.maximum((ahead - 2 * middle + behind).abs() / step, (central - last).abs()) / scale
        uneven = torch.where((central == 0) | (last == 0), math.inf, uneven)
        found, last = torch.where(uneven < even, central, found), central
        even = torch.minimum(even, uneven)
        if (best < tolerance).all():
            break
    return [
        (slope[i].item(), None if best[i] < tolerance else found[i].item(), bool(even[i] < 2 * tolerance))
        for i in range(len(slope))
    ]


def _other_size(trial: _Trial) -> _Outcome:
    *rest, width = trial.shape
    if len(rest) > 1:
        rest[-1] = max(1, rest[-1] * 3 // 4)
    shape = (*rest, width * 5 // 4)
    image = trial.pictures(count=2, shape=shape)
    try:
        wrong = wrong_value(trial.value(image), len(image))
    except _Failed as failure:
        wrong = str(failure)
    if wrong:
        return "warning", f"suits {_size(trial.shape)} but not {_size(shape)}: {wrong}; fine if no others come"
    return "ok", f"takes {_size(shape)}, too"


def _precision(trial: _Trial) -> _Outcome:
    image = trial.pictures()
    works: list[str] = ["float32"]
    fails: list[str] = []
    for dtype in _LOW:
        try:
            value = trial.value(image.to(dtype))
            sound = wrong_value(value, len(image)) is None and bool(value.isfinite().all())
        except _Failed:
            sound = False
        (works if sound else fails).append(_name(dtype))
    without = f"; not in {', '.join(fails)} (guidance asks in float32)" if fails else ""
    return "ok", f"works in {', '.join(works)}{without}"


def _device(trial: _Trial) -> _Outcome | None:
    if not torch.cuda.is_available():
        return None
    for device in dict.fromkeys((trial.device, torch.device("cuda"), torch.device("cpu"))):
        image = trial.pictures().to(device)
        try:
            at = trial.value(image).device
        except _Failed as failure:
            return "warning" if device.type == "cpu" else "problem", (
                f"works on {trial.device} but not on {device}: {failure}"
            )
        if at.type != device.type:
            return "problem", f"returns its value on {at} for a picture on {device}: leave out .cpu() and .cuda()"
    return "ok", "follows the picture's device"


def _memory(trial: _Trial) -> _Outcome:
    kept = []
    for _ in range(3):
        leaf = trial.pictures().requires_grad_()
        value = trial.value(leaf)
        torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        kept.append(weakref.ref(leaf))
        del leaf, value
    gc.collect()
    if sum(one() is not None for one in kept) > 1:
        return "warning", "keeps the graph of earlier calls in memory: keep value.detach() of what it remembers"
    return "ok", "keeps nothing of earlier calls"


def _speed(trial: _Trial) -> _Outcome:
    image = trial.pictures(count=2)
    begun = time.perf_counter()
    forward: list[float] = []
    backward: list[float] = []
    while len(forward) < 3 or (len(forward) < 10 and time.perf_counter() - begun < 1):
        leaf = image.clone().requires_grad_()
        times = [_now(trial.device)]
        value = trial.value(leaf).sum()
        times.append(_now(trial.device))
        torch.autograd.grad(value, leaf)
        times.append(_now(trial.device))
        forward.append(times[1] - times[0])
        backward.append(times[2] - times[1])
    there, back = (1000 * statistics.median(spent) / len(image) for spent in (forward, backward))
    return "ok", f"{there:.3g} ms forward and {back:.3g} ms backward for a picture of {_size(trial.shape)}"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _far(first: torch.Tensor, second: torch.Tensor, tolerance: float) -> bool:
    """Whether two sets of values differ by more than a share of their size."""
    largest = torch.maximum(first.abs().max(), second.abs().max())
    return bool((first - second).abs().max() > tolerance * largest)


def _odd(value: torch.Tensor) -> str:
    return "NaN" if value.isnan().any() else "infinite"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_CHECKS: tuple[tuple[str, Callable[[_Trial], _Outcome | None], tuple[str, ...]], ...] = (
    # name, check, what must be found ok before
    ("shape", _shape, ()),
    ("values", _finite, ("shape",)),
    ("repeatable", _repeatable, ("values",)),
    ("alone", _alone, ("repeatable",)),
    ("untouched", _untouched, ("shape",)),
    ("gradient", _gradient, ("shape",)),
    ("finite", _gradient_finite, ("values", "gradient")),
    ("outside", _outside, ("finite",)),
    ("differences", _differences, ("finite", "alone")),
    ("size", _other_size, ("shape",)),
    ("precision", _precision, ("shape",)),
    ("device", _device, ("shape",)),
    ("memory", _memory, ("gradient",)),
    ("speed", _speed, ("gradient",)),
)
