"""What is near and what is far, judged by any depth network."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from .images import Picture, Pixels, digest, keep, read_image
from .loss import Loss
from .network import describe_network, logits_of, per_image
from .pretrained import opened


class Depth(Loss):
    """The distance of a network's depth from a target's, whatever their scales and shifts.

    `mean((d - t)^2) / 2` with each map brought to mean 0 and deviation 1, which is 1 less their correlation, in
    [0, 2]. (The residual after least-squares alignment, 1 less the squared correlation, would take near for far.)

    Args:
        network: module or callable, images `(B, 3, h, w)` -> depth `(B, h, w)` or `(B, 1, h, w)`, or transformers'
            output with `.predicted_depth`; or the local folder of a transformers model for depth estimation.
        target: a picture whose depth is taken: a path, a Pillow image, or a tensor `(3, H, W)` in [0, 1]; or depth
            itself, a tensor `(H, W)` or `(B, 1, H, W)`, large where the network's is large, NaN where anything may be.
            (A depth map in a file: `read_image("depth.png")[0]`.)
        mean, std, size: the network's own preprocessing of images in [0, 1]; None leaves that part out, or to the
            folder's own.

    Raises:
        FileNotFoundError, ValueError: the picture cannot be read.
        ValueError: the target has another shape, or is of one depth everywhere.
        OSError, ImportError: the folder cannot be loaded.

    Source: scale- and shift-invariant depth: MiDaS, Ranftl et al. 2020 (arXiv 1907.01341).
    """

    pictures = True
    name = "depth"
    augment = False  # places must stay

    def __init__(
        self,
        network: Callable[[torch.Tensor], Any] | str | os.PathLike[str],
        target: torch.Tensor | Picture,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
    ):
        self.network = opened(network, "AutoModelForDepthEstimation", size=size, mean=mean, std=std)
        self.settings = {"network": describe_network(_text(network)), "target": digest(target)}
        if isinstance(target, (str, os.PathLike, Image.Image, Pixels)) or (target.ndim == 3 and target.shape[0] == 3):
            target = keep(target)
            with torch.no_grad():
                depth = self._depth(read_image(target)[None])
        else:
            depth = target.detach()
            if depth.ndim not in (2, 4) or not depth.is_floating_point() or (depth.ndim == 4 and depth.shape[1] != 1):
                raise ValueError(
                    "a target is a picture, or depth as a float tensor (H, W) or (B, 1, H, W), "
                    f"got {depth.dtype} {tuple(depth.shape)}"
                )
            depth = depth[None] if depth.ndim == 2 else depth[:, 0]
        self.there = depth.isfinite()
        self.depth = torch.where(self.there, depth, 0).double()
        for one, there in zip(self.depth, self.there):
            if not there.any():
                raise ValueError("the target leaves every pixel free: it holds no finite depth")
            if one[there].max() == one[there].min():
                raise ValueError("the target is of one depth everywhere, which says nothing of near and far")
            one -= one[there].mean()
            one *= there / one[there].abs().max()
        self.batch = len(self.depth)
        self.arguments = {"network": _text(network), "target": target, "mean": mean, "std": std, "size": size}

    def _depth(self, image: torch.Tensor) -> torch.Tensor:
        output = self.network(image)
        if isinstance(output, dict) and "predicted_depth" in output:
            depth = output["predicted_depth"]
        else:
            depth = getattr(output, "predicted_depth", None)
            depth = logits_of(output) if depth is None else depth
        if depth.ndim == 4 and depth.shape[1] == 1:
            depth = depth[:, 0]
        if depth.ndim != 3 or len(depth) != len(image):
            raise ValueError(f"a depth network returns ({len(image)}, h, w), got {tuple(depth.shape)}")
        return depth.to(torch.promote_types(depth.dtype, torch.float32))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        depth = self._depth(image)
        target, weight = (per_image(part, len(image), "targets").to(depth) for part in self._at(depth.shape[1:]))
        return ((_normed(depth, weight) - _normed(target, weight)).square() * weight).flatten(1).sum(1) / 2

    def _at(self, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The target and the share of each place in the mean, at a size."""
        depth, there = self.depth[:, None], self.there[:, None].double()
        if depth.shape[2:] != tuple(size):
            depth, there = (F.interpolate(x, tuple(size), mode="bilinear", antialias=True) for x in (depth, there))
            depth = depth / there.clamp(min=1e-9)
            # where holes are everywhere at this size, the least bit that is known counts
            there = (there >= there.flatten(1).amax(1).clamp(max=0.5).view(-1, 1, 1, 1)).double()
        weight = there / there.flatten(1).sum(1).view(-1, 1, 1, 1)
        return depth[:, 0] * (weight[:, 0] > 0), weight[:, 0]


def _normed(maps: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Maps `(B, h, w)` at mean 0 and deviation 1; one that is all but constant stays small, with a finite gradient."""
    top = maps.detach().abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
    maps = maps / top  # squares neither overflow nor vanish
    maps = maps - (maps * weight).sum((1, 2), keepdim=True)
    return maps / ((maps.square() * weight).sum((1, 2), keepdim=True) + 1e-10).sqrt()


def _text(network: Any) -> Any:
    return os.fspath(network) if isinstance(network, os.PathLike) else network
