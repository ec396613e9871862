"""Where things are in pictures of the real model: the foreground in a disc."""

from __future__ import annotations

import torch

from . import losses, real
from .work import Pictures, Work
from .work_look import COUNTS, SEEDS, natural


def mask(which: str) -> Pictures:
    """The foreground, as U-2-Net sees it, in a disc in the middle; judged by colours, which needs no network."""
    wanted = losses.disc()
    contrast = losses.border_judge(wanted)

    @torch.no_grad()
    def judge(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"contrast": contrast(images.nan_to_num(0.5)), **natural(images)}

    guide = losses.foreground(wanted)
    shown = {"mask": wanted[None].expand(1, 3, -1, -1)}
    seeds = range(SEEDS[which], SEEDS[which] + COUNTS[which])
    return Pictures(seeds, lambda places: guide, judge, shown)


WORKS = [
    Work(
        "real-mask",
        "The foreground in a disc by U-2-Net, judged by the contrast of colours to the mask, real 64x64 model",
        real.model,
        mask,
        figure="contrast",
        higher=False,
        size=20.0,
        augment=False,
        batch=6,
        available=real.available,
    )
]
