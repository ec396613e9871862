"""Work on CIFAR-10: a label, guided by ResNet20 and judged by ResNet56, as in the field's protocol (Ye et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lossguide.losses import ClassLabel
from lossguide.losses.network import IMAGENET_MEAN, IMAGENET_STD

from .cifar10 import classifiers, model
from .work import Pictures, Work

COUNTS = {"search": 50, "evaluation": 200, "fresh": 200}
SEEDS = {"search": 50_000, "evaluation": 0, "fresh": 90_000}


def labels_of(places: Sequence[int]) -> list[int]:
    """The label that each picture is to have."""
    return [place % 10 for place in places]


def loss(places: Sequence[int]) -> ClassLabel:
    """What guides: the cross-entropy of ResNet20 to the labels."""
    return ClassLabel(labels_of(places), classifiers.classifier("guide"), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def judged(images: torch.Tensor, labels: Sequence[int]) -> dict[str, torch.Tensor]:
    """The opinion of ResNet56, which never guides: accuracy and probability of the wanted label."""
    share = classifiers.logits("judge", images.nan_to_num(0.5)).softmax(1)
    labels = torch.tensor(labels)
    right = (share.argmax(1) == labels).float()
    return {"accuracy": right, "confidence": share.gather(1, labels[:, None])[:, 0]}


def pictures(which: str) -> Pictures:
    """A set of pictures, the i-th of class i % 10."""
    return Pictures(
        range(SEEDS[which], SEEDS[which] + COUNTS[which]),
        loss,
        lambda images: judged(images, labels_of(range(len(images)))),
    )


WORK = Work(
    "cifar10-label",
    "A CIFAR-10 class, by ResNet20",
    model.load,
    pictures,
    "accuracy",
    higher=True,
    size=10.0,
    batch=50,
    available=lambda: model.available() and classifiers.available(),
)
