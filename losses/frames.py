"""A loss of pictures as a loss of videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .loss import Composable, Loss, as_losses
from .network import describe_network


class Frames(Loss):
    """The mean of a picture loss over a video's frames: `Frames(ClipText("a red fox"))`.

    Takes videos `(B, F, 3, H, W)`, as video pipelines give them to their losses.

    Args:
        loss: of pictures `(N, 3, H, W) -> (N,)`; several terms count by their weights.
        which: frames to look at, negative ones from the end; all of them when None. A network sees B times as many
            pictures as frames are named, so few of them are faster.

    Raises:
        ValueError: the loss has a target per picture, looks at a whole batch, or has a window or schedule inside;
            (when called) what is looked at is no video, or has no such frame; a reference that differs from
            picture to picture does not fit the frames.
    """

    def __init__(self, loss: Composable | Callable[[torch.Tensor], torch.Tensor], which: Sequence[int] | None = None):
        if not isinstance(loss, Composable) and not callable(loss):
            raise TypeError(f"a loss is a callable (image) -> (B,), got {loss!r}")
        terms = as_losses(loss).terms()
        if any(term.schedule or term.window != (0.0, 1.0) for term in terms):
            raise ValueError("windows and schedules go around: Frames(loss).during(...)")
        if any(
            getattr(term.loss, "whole_batch", False) or (getattr(term.loss, "batch", None) or 1) > 1 for term in terms
        ):
            raise ValueError("Frames takes losses that look at each picture alone, with one target for all of them")
        self.loss, self.which = loss, None if which is None else [int(i) for i in which]
        self.name = "+".join(term.name for term in terms)
        self.augment = all(term.augment for term in terms)
        floors = [getattr(term.loss, "floor", None) for term in terms]
        if all(isinstance(floor, (int, float)) for floor in floors):
            self.floor = sum(term.weight * floor for term, floor in zip(terms, floors))
        described = [describe_network(term.loss) for term in terms]
        self.settings = {"loss": described[0] if len(terms) == 1 else described, "which": self.which}
        self.arguments = {"loss": loss, "which": self.which}
        self._sum = as_losses(loss) if len(terms) > 1 or terms[0].weight != 1 else terms[0]

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        if video.dim() != 5:
            raise ValueError(
                f"Frames looks at videos (B, F, 3, H, W), got {tuple(video.shape)}; "
                "for pictures the loss itself will do"
            )
        frames = video if self.which is None else video[:, self._places(video.shape[1])]
        return self._sum(frames.flatten(0, 1)).view(frames.shape[:2]).mean(1)

    def _places(self, count: int) -> list[int]:
        if any(not -count <= i < count for i in self.which):
            raise ValueError(f"frames {self.which} are asked for, and the video has {count}")
        return self.which
