"""What sampling is about to make, shown on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Preview:
    """Shows the current x0 every few visited steps.

    Args:
        to: a path, whose picture is written anew each time (of a video its first frames), or a callable
            `(images, row)` that gets what the losses see, pictures clamped to [0, 1], and the record's row so far
            (`step`, `progress`, `loss` ...).
        every: visits from one to the next.
    """

    to: str | os.PathLike | Callable[[torch.Tensor, dict[str, Any]], None]
    every: int = 5

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"a preview every n visits needs n >= 1, got {self.every}")
        if callable(self.to):
            return
        path = Path(self.to) if isinstance(self.to, (str, os.PathLike)) else None
        if path is None or not path.suffix or not path.parent.is_dir():
            raise ValueError(
                "a preview goes to a picture's path in a folder that is there, such as preview.png, or to a function; "
                f"got {self.to!r}"
            )

    def due(self, count: int) -> bool:
        """Whether the visit after `count` others is shown."""
        return count % self.every == 0

    def __call__(self, images: torch.Tensor, row: dict[str, Any]) -> None:
        """Show `images`, `(B, 3, H, W)` or `(B, F, 3, H, W)`."""
        if callable(self.to):
            colours = images.dim() in (4, 5) and images.shape[-3] == 3
            self.to(images.clamp(0, 1) if colours else images, row)
            return
        from torchvision.utils import save_image

        if images.dim() == 5:
            images = images[:, 0]
        if images.dim() != 4:
            raise ValueError("a preview in a file is of pictures; sound can go to a callable: preview=function")
        save_image(images.clamp(0, 1), os.fspath(self.to), nrow=max(1, round(len(images) ** 0.5)))
