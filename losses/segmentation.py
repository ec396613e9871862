"""A layout of classes, judged by any segmentation network."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from .areas import Area, Region, inside_outside
from .images import Picture, digest, read_image
from .loss import Loss
from .network import describe_network, distance, logits_of, per_image
from .pretrained import label_index, opened


class Segmentation(Loss):
    """The distance of a network's class maps `(K, h, w)` from a layout, or of one class from where it should be.

    A map of class indices: the mean cross-entropy over its pixels (brought to h x w by the nearest pixel).
    Scores `(K, h, w)`, or a picture whose scores are taken: `||scores(image) - target||_2`, not squared.
    `label` and `share`: the divergence of the class's share of the picture, its mean probability s, from the wanted
    one, `share log(share / s) + (1 - share) log((1 - share) / (1 - s))`.
    `label` and `mask`: the class in the mask and not around it, the mean of `-log p` inside plus the mean of
    `-log(1 - p)` outside, / 2. (Where around it anything may be, a target of indices says so.)

    Args:
        network: module or callable, images `(B, 3, h, w)` -> scores `(B, K, h, w)`, or torchvision's dict with 'out',
            or transformers' output with `.logits`; or the local folder of a transformers model for segmentation.
        target: an integer tensor `(H, W)` or `(B, H, W)` of class indices, -1 where anything may be; a float tensor
            `(K, h, w)` or `(B, K, h, w)` of scores; or a path or Pillow image, a picture to take the layout from.
        label: instead of a target: a class's index, or its name where a transformers model knows it.
        share: with `label`: how much of the picture it should take, in [0, 1].
        mask: with `label`: where it should be: a box `(x0, y0, x1, y1)` in fractions; 'left', 'right', 'top',
            'bottom', 'center' or 'disc'; a picture (white is inside); or a tensor `(H, W)` or `(B, H, W)` in [0, 1].
        mean, std, size: the network's own preprocessing of images in [0, 1]; None leaves that part out, or to the
            folder's own.

    Raises:
        ValueError: the target has another shape, or holds indices that are not classes of the network; or it is not
            either a target or a label with one of share and mask.
        FileNotFoundError, ValueError: the mask is none of those.
        OSError, ImportError: the folder cannot be loaded.

    Source: universal guidance, Bansal et al. 2023 (arXiv 2302.07121); the l2 form: Shen et al. 2024 (arXiv 2403.12404).
    """

    pictures = True
    name = "segmentation"

    def __init__(
        self,
        network: Callable[[torch.Tensor], Any] | str | os.PathLike[str],
        target: torch.Tensor | Picture | None = None,
        *,
        label: int | str | None = None,
        share: float | None = None,
        mask: Area | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
    ):
        if (target is None) == (label is None) or (share is None) + (mask is None) != (2 if label is None else 1):
            raise ValueError("what is wanted is a target; or a label with share= or with mask=")
        self.network = opened(network, "AutoModelForSemanticSegmentation", size=size, mean=mean, std=std)
        network = os.fspath(network) if isinstance(network, os.PathLike) else network
        self.settings = {"network": describe_network(network)}
        self.arguments = {"network": network, "mean": mean, "std": std, "size": size}
        self.label = self.share = self.region = None
        if label is not None:
            self._set_label(label, share, mask)
            return
        self.settings["target"] = digest(target)
        if isinstance(target, (str, os.PathLike, Image.Image)):
            with torch.no_grad():
                target = self._scores(read_image(target)[None])
        elif target.is_floating_point():
            target = target.detach()[None] if target.ndim == 3 else target.detach()
        else:
            target = target.long()[None] if target.ndim == 2 else target.long()
            if (target < 0).all():
                raise ValueError("the target leaves every pixel free: it holds only negative class indices")
        if target.ndim != (4 if target.is_floating_point() else 3):
            raise ValueError(
                "a target is integer class indices (H, W) or (B, H, W), or float scores (K, h, w) or (B, K, h, w), "
                f"got {target.dtype} {tuple(target.shape)}"
            )
        self.target, self.batch = target, len(target)
        self.arguments["target"] = target

    def _set_label(self, label: int | str, share: float | None, mask: Area | None) -> None:
        self.label = label_index(label, self.network.network)
        if share is not None:
            if not 0 <= share <= 1:
                raise ValueError(f"a share of the picture is in [0, 1], got {share}")
            self.share, self.augment = float(share), False  # a resized picture has more of it
            self.settings |= {"label": label, "share": self.share}
            self.arguments |= {"label": label, "share": self.share}
        else:
            self.region = Region(mask)
            self.batch, self.augment = self.region.batch, False  # a shifted picture has it elsewhere
            self.settings |= {"label": label, "mask": self.region.describe()}
            self.arguments |= {"label": label, "mask": self.region.area}

    def _scores(self, image: torch.Tensor) -> torch.Tensor:
        scores = logits_of(self.network(image))
        if scores.ndim != 4 or len(scores) != len(image):
            raise ValueError(
                f"a segmentation network returns scores ({len(image)}, K, h, w), got {tuple(scores.shape)}"
            )
        return scores

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        scores = self._scores(image)
        if self.label is not None:
            return self._of_label(scores.to(torch.promote_types(scores.dtype, torch.float32)))
        target = per_image(self.target, len(image), "targets")
        if self.target.is_floating_point():
            if scores.shape[1:] != self.target.shape[1:]:
                raise ValueError(
                    f"the network scores {tuple(scores.shape[1:])}, the target {tuple(self.target.shape[1:])}"
                )
            return distance(scores - target.to(scores))
        if self.target.max() >= scores.shape[1]:
            raise ValueError(f"class {self.target.max()} is not one of the network's {scores.shape[1]}")
        # nearest-exact takes the pixel under each centre; doubles hold every class index
        target = F.interpolate(target[:, None].double(), scores.shape[2:], mode="nearest-exact")[:, 0].long()
        target = target.to(scores.device)
        entropy = F.cross_entropy(scores, target.clamp(min=-1), ignore_index=-1, reduction="none")
        return entropy.flatten(1).sum(1) / (target >= 0).flatten(1).sum(1).clamp(min=1)

    def _of_label(self, scores: torch.Tensor) -> torch.Tensor:
        if not self.label < scores.shape[1] > 1:
            raise ValueError(f"class {self.label} is not one of the network's {scores.shape[1]}, or there is but one")
        every = scores.logsumexp(1)
        others = torch.cat([scores[:, : self.label], scores[:, self.label + 1 :]], 1)
        inside, outside = scores[:, self.label] - every, others.logsumexp(1) - every  # log p and log(1 - p)
        if self.region is not None:
            return inside_outside(inside, outside, self.region.over(inside))
        loss = 0.0
        for wanted, log in ((self.share, inside), (1 - self.share, outside)):
            if wanted > 0:
                log = log.flatten(1)
                loss = loss + wanted * (math.log(wanted) + math.log(log.shape[1]) - log.logsumexp(1))
        return loss
