"""Which thing is where, judged by any object detector."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .areas import check_box
from .loss import Loss
from .network import describe_network
from .pretrained import label_index, opened

_LEAST = 1e-12  # what is added to a score before its logarithm
_NEVER = -60.0  # the logit of classes that are not asked for


class Detection(Loss):
    """How surely a class is found in a box: `min over candidates of -log(score * (1 + GIoU) / 2 + 1e-12)`.

    GIoU is the generalised intersection over union of the candidate's box and the wanted one; unlike the plain one it
    has a gradient also where they do not meet. Without a box only the score counts.

    What has a gradient: scores and boxes. Which candidates there are, and which of them is the best, is chosen without
    one (anchors, thresholds, suppression of overlaps; an R-CNN takes its proposals for fixed). torchvision's detectors
    keep to themselves what they are not sure of, so while they are looked at here their score threshold is 1e-12 and
    the other classes are left out: the class asked for has candidates, and a gradient, where nothing would be
    detected. transformers' detectors return every candidate. Of a callable that returns no candidate of the class the
    loss is 27.6, with no gradient; have it return more.

    Args:
        network: torchvision's `FasterRCNN`, `MaskRCNN`, `KeypointRCNN`, `RetinaNet`, `FCOS` or `SSD`; a transformers
            object detector (`.logits` and `.pred_boxes`), or its local folder; or a callable, images `(B, 3, h, w)` ->
            B dicts of `boxes` (N, 4), corners in pixels, `scores` (N,) and `labels` (N,). It sees at least float32.
        label: the class's index, as the network numbers them; or its name, where a transformers model knows it.
        box: where it should be, `(x0, y0, x1, y1)` in fractions of the picture; anywhere unless given.
        mean, std, size: the network's own preprocessing of images in [0, 1]; None leaves that part out (torchvision's
            detectors do it themselves), or to the folder's own.

    Raises:
        ValueError: that is no box; the network has no such class.
        OSError, ImportError: the folder cannot be loaded.

    Source: guidance by a detector: universal guidance, Bansal et al. 2023 (arXiv 2302.07121); GIoU: Rezatofighi et al.
    2019 (arXiv 1902.09630).
    """

    pictures = True
    name = "detection"

    def __init__(
        self,
        network: Callable[[torch.Tensor], Any] | str | os.PathLike[str],
        label: int | str,
        box: Sequence[float] | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
    ):
        self.network = opened(network, "AutoModelForObjectDetection", size=size, mean=mean, std=std)
        self.label = label_index(label, self.network.network)
        self.box = None if box is None else check_box(box)
        self.augment = box is None  # a shifted picture has it elsewhere
        network = os.fspath(network) if isinstance(network, os.PathLike) else network
        self.settings = {"network": describe_network(network), "label": label, "box": self.box and list(self.box)}
        self.arguments = {"network": network, "label": label, "box": self.box, "mean": mean, "std": std, "size": size}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        image = self.network.prepare(image.to(torch.promote_types(image.dtype, torch.float32)))
        network = self.network.on(image)
        with _only(network, self.label):
            output = network(image)
        losses = []
        for one, (scores, boxes) in zip(image, self._candidates(output, image), strict=True):
            if not len(scores):
                scores, boxes = one.sum()[None] * 0, one.new_zeros(1, 4)
            if self.box is not None:
                scores = scores * (1 + giou(boxes, boxes.new_tensor(self.box))) / 2
            losses.append(-(scores.max().clamp(min=0) + _LEAST).log())
        return torch.stack(losses)

    def _candidates(self, output: Any, image: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each picture the scores `(N,)` of the class and its boxes `(N, 4)`, corners in fractions."""
        if isinstance(output, (list, tuple)) and len(output) == len(image) and all(map(_is_found, output)):
            sides = image.new_tensor([*image.shape[:1:-1]] * 2)
            mine = [one["labels"] == self.label for one in output]
            return [(one["scores"][m].to(image), one["boxes"][m].to(image) / sides) for one, m in zip(output, mine)]
        logits, boxes = (_field(output, key) for key in ("logits", "pred_boxes"))
        if logits is None or boxes is None or logits.ndim != 3 or boxes.shape != (*logits.shape[:2], 4):
            raise ValueError(
                f"a detector returns {len(image)} dicts of boxes, scores and labels, or an object with .logits "
                f"({len(image)}, N, K) and .pred_boxes ({len(image)}, N, 4), got {type(output).__name__}"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # DETR has one logit more, of nothing; its successors judge each class for itself
        alone = getattr(getattr(self.network.network, "config", None), "num_labels", None) == logits.shape[2]
        _check(self.label, 0, logits.shape[2] - (not alone))
        scores = (logits.sigmoid() if alone else logits.softmax(-1))[..., self.label]
        middle, half = boxes.to(scores)[..., :2], boxes.to(scores)[..., 2:] / 2
        return list(zip(scores, torch.cat([middle - half, middle + half], -1)))


def giou(boxes: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """The generalised intersection over union of boxes `(N, 4)`, by corners, with one box: `(N,)` in [-1, 1]."""

    def area(corners: torch.Tensor) -> torch.Tensor:
        return (corners[..., 2:] - corners[..., :2]).clamp(min=0).prod(-1)

    upper, lower = boxes[:, :2], boxes[:, 2:]
    common = area(torch.cat([upper.maximum(box[:2]), lower.minimum(box[2:])], -1))
    hull = area(torch.cat([upper.minimum(box[:2]), lower.maximum(box[2:])], -1))
    union = area(boxes) + area(box) - common
    return common / union - (hull - union) / hull  # both are at least the wanted box's area


def _is_found(one: Any) -> bool:
    return isinstance(one, dict) and {"boxes", "scores", "labels"} <= set(one)


def _field(output: Any, key: str) -> torch.Tensor | None:
    return output.get(key) if isinstance(output, dict) else getattr(output, key, None)


def _check(label: int, first: int, stop: int) -> None:
    if not first <= label < stop:
        raise ValueError(f"label {label} is not one of the detector's classes, {first} to {stop - 1}")


@contextlib.contextmanager
def _only(network: Any, label: int) -> Iterator[None]:
    """Within, a detector of torchvision returns all candidates of one class and none of the others."""
    if not isinstance(network, nn.Module):
        yield
        return
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
    from torchvision.models.detection.ssd import SSD

    def softmax(logits: torch.Tensor) -> torch.Tensor:  # the first class is the background, which takes the rest
        _check(label, 1, logits.shape[-1])
        every = logits.logsumexp(-1)
        rest = torch.cat([logits[..., :label], logits[..., label + 1 :]], -1).logsumexp(-1)
        alone = [torch.full_like(every, _NEVER)] * logits.shape[-1]
        alone[0], alone[label] = rest - every, logits[..., label] - every
        return torch.stack(alone, -1)

    def sigmoid(logits: torch.Tensor) -> torch.Tensor:
        _check(label, 0, logits.shape[-1])
        asked = torch.arange(logits.shape[-1], device=logits.device) == label
        return torch.where(asked, logits.clamp(min=_NEVER), _NEVER)

    def of_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
        def hook(module: nn.Module, given: Any, out: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            out = {**out, "cls_logits": change(out["cls_logits"])}
            if "bbox_ctrness" in out:  # FCOS takes the square root of a product, whose slope at 0 is none
                out["bbox_ctrness"] = out["bbox_ctrness"].clamp(min=-20)
            return out

        return hook

    if isinstance(network, GeneralizedRCNN):
        holder, judge = network.roi_heads, network.roi_heads.box_predictor
        hook = lambda module, given, out: (softmax(out[0]), *out[1:])
        swaps = {name: None for name in ("mask_roi_pool", "keypoint_roi_pool") if hasattr(holder, name)}
    elif isinstance(network, (RetinaNet, FCOS, SSD)):
        holder, judge, swaps = network, network.head, {}
        hook = of_head(softmax if isinstance(network, SSD) else sigmoid)
    else:
        yield
        return
    swaps |= {"score_thresh": _LEAST, "detections_per_img": 10**6}
    before, handle = {name: getattr(holder, name) for name in swaps}, judge.register_forward_hook(hook)
    try:
        for name, value in swaps.items():
            setattr(holder, name, value)
        yield
    finally:
        handle.remove()
        for name, value in before.items():
            setattr(holder, name, value)
