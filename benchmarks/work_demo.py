"""Work for the demo model: a label, a text, a brightness, a silhouette, and a label and a brightness at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from lossguide.losses import ClassLabel, ClipText, Term
from lossguide.losses.demo import CLASSES, caption, classifier
from lossguide.samplers import load_demo

from .demo.data import available, fashion_mnist
from .metrics import distances_with_errors
from .work import SETS, Pictures, Work

COUNTS = {"search": 30, "evaluation": 60, "fresh": 120}
SEEDS = {"search": 50_000, "evaluation": 0, "fresh": 90_000}
NEAR = 0.02  # how far a brightness in [0, 1] may be from the one that is wanted
SURE = 0.5  # the judge takes a picture for clothing when it gives a class this probability; 98 % of unguided ones pass
INK = 0.15  # what is brighter belongs to the thing, the rest is background


@functools.cache
def judge():
    """The classifier that never guides."""
    return classifier("judge")


@functools.cache
def examples(which: str) -> torch.Tensor:
    """Real test pictures `(N, 1, 32, 32)`, the i-th of class i % 10, others for every set."""
    images, labels = fashion_mnist("test")
    skip = sum(COUNTS[one] for one in SETS[: SETS.index(which)]) // 10
    each = COUNTS[which] // 10
    by_class = [images[(labels == c).nonzero()[skip : skip + each, 0]] for c in range(10)]
    return torch.stack(by_class, 1).flatten(0, 1)


@functools.cache
def real_features() -> torch.Tensor:
    """The judge's penultimate features `(10000, 64)` of the real test pictures."""
    with torch.no_grad():
        return torch.cat([judge().features(part) for part in fashion_mnist("test")[0].split(500)])


def to_real(images: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Frechet and kernel distance to the real test pictures, in the judge's penultimate features."""
    if not available():
        return {}
    with torch.no_grad():
        return distances_with_errors(judge().features(images.nan_to_num(0.5)), real_features())


def labels_of(places: Sequence[int]) -> list[int]:
    """The label that each picture is to have."""
    return [place % 10 for place in places]


def judged(images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The judge's opinion: accuracy and probability of the wanted label, or of the likeliest without."""
    with torch.no_grad():
        share = judge()(images.nan_to_num(0.5)).softmax(1)
    if labels is None:
        return {"confidence": share.amax(1)}
    right = (share.argmax(1) == labels).float()
    return {"accuracy": right, "confidence": share.gather(1, labels[:, None])[:, 0]}


def brightness(target: torch.Tensor) -> Term:
    """How far the mean of a picture is from a brightness, one of `target` `(B,)` for each."""

    def brightness(image: torch.Tensor) -> torch.Tensor:
        return (image.flatten(1).mean(1) - target.to(image)).abs()

    return Term(brightness, augment=False)


def silhouette(wanted: torch.Tensor) -> Term:
    """How much ink lacks inside of `wanted` `(B, 1, H, W)`, and how much there is outside."""

    def silhouette(image: torch.Tensor) -> torch.Tensor:
        lack = wanted.to(image) * (3 * INK - image).relu() + (1 - wanted.to(image)) * (image - INK / 3).relu()
        return lack.flatten(1).mean(1)

    return Term(silhouette, augment=False)


def _pictures(loss: Callable, judge: Callable, shown: bool = False) -> Callable[[str], Pictures]:
    """Sets of pictures from `loss(which, places)` and `judge(which, images)`."""

    def pictures(which: str) -> Pictures:
        return Pictures(
            range(SEEDS[which], SEEDS[which] + COUNTS[which]),
            lambda places: loss(which, list(places)),
            lambda images: judge(which, images),
            {"example": examples(which)} if shown else {},
            whole=to_real,
        )

    return pictures


def _label(which, places):
    return ClassLabel(labels_of(places))


def _text(which, places):
    return ClipText([caption(CLASSES[c]) for c in labels_of(places)], model="demo")


def _labelled(which, images):
    return judged(images, torch.tensor(labels_of(range(len(images)))))


def _levels(which):
    return examples(which).flatten(1).mean(1)


def _brightness(which, places):
    return brightness(_levels(which)[places])


def _deviation(which, images):
    return (images.flatten(1).mean(1) - _levels(which)[: len(images)]).abs()


def _bright(which, images):
    found, deviation = judged(images), _deviation(which, images)
    hit = (deviation < NEAR) & (found["confidence"] > SURE)
    return {"hit": hit.float(), "deviation": deviation, **found}


def _two(which, places):
    return ClassLabel(labels_of(places)) + 10.0 * _brightness(which, places)


def _both(which, images):
    found, deviation = _labelled(which, images), _deviation(which, images)
    hit = (deviation < NEAR) & (found["accuracy"] > 0)
    return {"hit": hit.float(), "deviation": deviation, **found}


def _silhouette(which, places):
    return silhouette((examples(which)[places] > INK).float())


def _overlap(which, images):
    ink, wanted = images > INK, examples(which)[: len(images)] > INK
    overlap = (ink & wanted).flatten(1).sum(1) / (ink | wanted).flatten(1).sum(1)
    return {"iou": overlap, **judged(images)}


def _work(
    name: str, about: str, pictures, figure: str, size: float, needs_data: bool = True, augment: bool = True
) -> Work:
    return Work(
        f"demo-{name}",
        f"{about}, demo model",
        load_demo,
        pictures,
        figure,
        higher=True,
        size=size,
        augment=augment,
        batch=30,
        available=available if needs_data else lambda: True,
    )


WORKS = [
    _work("label", "A class, by the guide classifier", _pictures(_label, _labelled), "accuracy", 10.0, False),
    _work("text", "A text, by the demo's CLIP", _pictures(_text, _labelled), "accuracy", 30.0, False),
    _work(
        "color",
        f"The brightness of a real picture; a hit is within {NEAR} and taken for clothing by the judge",
        _pictures(_brightness, _bright, shown=True),
        "hit",
        40.0,
        augment=False,
    ),
    _work(
        "mask",
        "The silhouette of a real picture",
        _pictures(_silhouette, _overlap, shown=True),
        "iou",
        500.0,
        augment=False,
    ),
    _work(
        "two",
        f"The class and the brightness of a real picture; a hit is of that class to the judge, and within {NEAR}",
        _pictures(_two, _both, shown=True),
        "hit",
        4.0,
    ),
]
