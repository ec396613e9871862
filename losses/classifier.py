"""A class label, judged by any classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F

from .loss import Loss
from .network import FrozenNetwork, describe_network, logits_of, moved, per_image


class ClassLabel(Loss):
    """The cross-entropy of a classifier to a label: `-log softmax(classifier(image))[label]`.

    Args:
        label: a class index for every image, or B of them (a list or a 1-D tensor), one per image of the batch; with
            the demo classifier also a class name ("ankle boot") or names.
        classifier: module or callable, images `(B, 3, h, w)` -> logits `(B, K)`; or 'demo', the small one shipped here.
        mean, std, size: the classifier's own preprocessing of images in [0, 1]; None leaves that part out.

    Raises:
        ValueError: the label is not in [0, K), or the number of labels is not that of images.

    Source: classifier guidance, Dhariwal and Nichol 2021 (arXiv 2105.05233); training-free: arXiv 2403.12404.
    """

    pictures = True
    name = "class-label"

    def __init__(
        self,
        label: int | str | Sequence[int | str] | torch.Tensor,
        classifier: Callable[[torch.Tensor], Any] | str = "demo",
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
    ):
        single = isinstance(label, (Integral, str)) or (isinstance(label, torch.Tensor) and label.ndim == 0)
        labels = [label] if single else list(label)
        if isinstance(classifier, str):
            if classifier != "demo":
                raise ValueError(f"classifier is a module, a callable or 'demo', got {classifier!r}")
            from . import demo

            for place, one in enumerate(labels):
                if isinstance(one, str):
                    labels[place] = demo.class_of(one)
                    if labels[place] is None:
                        raise ValueError(f"'{one}' is not one of the demo's classes: {', '.join(demo.CLASSES)}")
            network = demo.classifier("guide")
        else:
            network = classifier
        if any(isinstance(one, str) for one in labels):
            raise ValueError(
                f"a class is given by its index, and by its name only with classifier='demo', got {label!r}"
            )
        self.labels = torch.tensor([int(one) for one in labels])
        self.batch = len(self.labels)
        if len(self.labels) == 0 or self.labels.min() < 0:
            raise ValueError(f"a label is a class index from 0 on, got {label!r}")
        self.network = FrozenNetwork(network, size=size, mean=mean, std=std)
        self.settings = {
            "label": self.labels[0].item() if single else self.labels.tolist(),
            "classifier": describe_network(classifier),
        }
        self.arguments = self.settings | {"classifier": classifier, "mean": mean, "std": std, "size": size}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        logits = logits_of(self.network(image))
        if logits.ndim != 2 or len(logits) != len(image):
            raise ValueError(f"a classifier returns logits ({len(image)}, K), got {tuple(logits.shape)}")
        if self.labels.max() >= logits.shape[1]:
            raise ValueError(f"label {self.labels.max()} is not one of the classifier's {logits.shape[1]} classes")
        labels = per_image(moved(self.labels, image, torch.long), len(image), "labels")
        return F.cross_entropy(logits, labels, reduction="none")
