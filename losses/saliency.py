"""Where the foreground is, judged by any saliency network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .areas import Area, Region, inside_outside
from .loss import Loss
from .network import FrozenNetwork, describe_network, logits_of


class Saliency(Loss):
    """How far a network's foreground map is from a mask: the binary cross-entropy, mean inside plus mean outside, / 2.

    Cross-entropy rather than soft IoU, because its gradient does not fade where the network is sure of the contrary;
    of a probability p the logarithms are those of `p + 1e-6` and `1 - p + 1e-6`, finite also for 0 and 1. Inside and
    outside count the same, however small the mask is.

    Args:
        network: module or callable, images `(B, 3, h, w)` -> a map `(B, 1, h, w)` or `(B, h, w)`; of a list of maps
            the first is taken, which is U-2-Net's own.
        mask: where the foreground should be: a box `(x0, y0, x1, y1)` in fractions; 'left', 'right', 'top', 'bottom',
            'center' or 'disc'; a picture (white is foreground); or a tensor `(H, W)` or `(B, H, W)` in [0, 1].
        output: what the map holds, 'probability' or 'logits'.
        mean, std, size: the network's own preprocessing of images in [0, 1]; None leaves that part out.

    Raises:
        FileNotFoundError, ValueError: the mask is none of those.
        ValueError: (when called) the network returns something else, or no probabilities.

    Source: cross-entropy of saliency maps: U-2-Net, Qin et al. 2020 (arXiv 2005.09007).
    """

    pictures = True
    name = "saliency"
    augment = False  # places must stay

    def __init__(
        self,
        network: Callable[[torch.Tensor], Any],
        mask: Area,
        *,
        output: str = "probability",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
    ):
        if output not in ("probability", "logits"):
            raise ValueError(f"output is 'probability' or 'logits', got {output!r}")
        self.network = FrozenNetwork(network, size=size, mean=mean, std=std)
        self.region, self.output = Region(mask), output
        self.batch = self.region.batch
        self.settings = {"network": describe_network(network), "mask": self.region.describe(), "output": output}
        self.arguments = {"network": network, "mask": self.region.area, "output": output}
        self.arguments |= {"mean": mean, "std": std, "size": size}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        maps = self.network(image)
        while isinstance(maps, (list, tuple)) and maps:
            maps = maps[0]
        maps = logits_of(maps)
        if maps.ndim == 4 and maps.shape[1] == 1:
            maps = maps[:, 0]
        if maps.ndim != 3 or len(maps) != len(image):
            raise ValueError(f"a saliency network returns one map ({len(image)}, 1, h, w), got {tuple(maps.shape)}")
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        if self.output == "logits":
            return inside_outside(F.logsigmoid(maps), F.logsigmoid(-maps), self.region.over(maps))
        if maps.device.type != "meta" and ((maps < -0.01) | (maps > 1.01)).any():
            low, high = maps.min().item(), maps.max().item()
            raise ValueError(f"a probability is in [0, 1], the network returned {low:g} to {high:g}; output='logits'?")
        maps = maps.clamp(0, 1)
        return inside_outside((maps + 1e-6).log(), (1 - maps + 1e-6).log(), self.region.over(maps))
