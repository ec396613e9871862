"""Pictures that are partly given: which part the losses see, and that only what is to be painted moves.

VisualCloze lays example pairs out as the rows of a grid, and fills the empty panels of the last row; inpainting
pipelines (FLUX-Fill too) paint where a mask is white. The rest is context: no gradient reaches its latents or tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PANELS = ("target", "picture")


def panels_of(pipe: Any, panel: int | str | None) -> Grid | Hole | None:
    """What is known of a pipeline's panels; None for one that paints the whole picture.

    Args:
        panel: which part the losses see, see `guide`.

    Raises:
        ValueError: the pipeline has no such panel.
    """
    name = type(pipe).__name__
    if isinstance(panel, bool) or not (panel is None or isinstance(panel, int) or panel in PANELS):
        raise ValueError(f"a panel is 'target', 'picture' or an index of VisualCloze's last row, got {panel!r}")
    unpack = getattr(pipe, "_unpack_latents", None)
    if unpack is not None and "sizes" in inspect.signature(unpack).parameters:
        return Grid(pipe, panel)
    if hasattr(pipe, "prepare_mask_latents"):
        if isinstance(panel, int):
            raise ValueError(f"{name} has no panels to count: panel is 'target', what the mask marks, or 'picture'")
        return Hole(pipe, panel)
    if panel is not None:
        raise ValueError(f"{name} paints the whole picture and has no panels: leave out panel={panel!r}")
    return None


@dataclass(frozen=True)
class Hole:
    """Inpainting: what a mask marks is painted.

    Args:
        pipe: the pipeline.
        panel: "target", the smallest box around the mask; "picture" or None, all of it.
    """

    pipe: Any
    panel: int | str | None = None

    def check(self, given: Mapping[str, Any]) -> None:
        """Nothing of a call is known to go wrong."""

    def seen(self, image: torch.Tensor, told: dict[str, Any]) -> torch.Tensor:
        """The part of decoded pictures `(B, 3, H, W)` that the losses see.

        Raises:
            ValueError: where the mask is, is not known, or differs in size between pictures.
        """
        if self.panel != "target":
            return image
        mask = told.get("mask_pixels")
        if not isinstance(mask, torch.Tensor) or mask.shape[-2:] != image.shape[-2:]:
            raise ValueError(f"{type(self.pipe).__name__} did not tell its mask in pixels: leave out panel='target'")
        boxes = told.get("mask_boxes") or [_box(one) for one in mask.flatten(1, -3).amax(1)]
        told["mask_boxes"] = boxes  # found once: on a GPU the host waits for them
        return _stacked([image[i, :, top:bottom, left:right] for i, (top, bottom, left, right) in _tiled(boxes, image)])

    def movable(self, x: torch.Tensor, told: Mapping[str, Any]) -> torch.Tensor | None:
        """Which elements of the latents may move, as booleans that broadcast against them; None for all.

        A latent, or a token, that holds any pixel to be painted may.
        """
        mask = told.get("mask_latents")
        if not isinstance(mask, torch.Tensor) or mask.dim() != x.dim() or x.dim() not in (3, 4):
            return None
        channels, places = (2, slice(1, 2)) if x.dim() == 3 else (1, slice(2, 4))  # tokens, or latents
        if mask.shape[places] != x.shape[places]:
            return None
        marked = (mask > 0).any(channels, keepdim=True)
        return _repeated(marked[: len(x)], x)  # for classifier-free guidance it is there twice


@dataclass(frozen=True)
class Grid:
    """VisualCloze: rows of panels, of which the empty ones of the last row are painted.

    Args:
        pipe: the pipeline that generates, not the one around it.
        panel: an index in the last row; "picture", that row; "target" or None, its empty panels side by side.
    """

    pipe: Any
    panel: int | str | None = None

    def check(self, given: Mapping[str, Any]) -> None:
        """What diffusers' pipeline would get wrong without a word, or fail at in words that do not help.

        Raises:
            ValueError: the call asks for such a thing; in a sentence.
        """
        grids, prompts = given.get("image"), given.get("task_prompt")
        if given.get("latents") is not None:
            raise ValueError("VisualCloze ignores latents=...: leave it out, its noise comes from the generator")
        if given.get("prompt_embeds") is not None or given.get("pooled_prompt_embeds") is not None:
            raise ValueError("VisualCloze cannot use prompt_embeds: give it task_prompt and content_prompt as text")
        if given.get("generator") is None:
            raise ValueError("VisualCloze cannot draw without a generator: give it one, or a list of one per picture")
        several = isinstance(prompts, (list, tuple))
        if several and len(prompts) > 1 and (given.get("num_images_per_prompt") or 1) > 1:
            raise ValueError(
                "VisualCloze mixes up grids and prompts when several prompts get several pictures each: leave out "
                "num_images_per_prompt, and repeat prompts and grids instead"
            )
        for rows in grids if several and isinstance(grids, (list, tuple)) else [grids]:
            self._check_grid(rows)

    def _check_grid(self, rows: Any) -> None:
        if not _is_grid(rows):
            raise ValueError(
                "VisualCloze takes a grid of Pillow images, a list of rows: each row an example, the last one the "
                "query, with None where a picture is to be painted"
            )
        if any(one is None for row in rows[:-1] for one in row) or all(one is not None for one in rows[-1]):
            raise ValueError("in VisualCloze's grid only panels of the last row are None, those to be painted, not all")
        targets = [i for i, one in enumerate(rows[-1]) if one is None]
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"VisualCloze needs rows of as many panels each, got {[len(row) for row in rows]}")
        if len(targets) > 1 and any(one is not None and one.width != one.height for row in rows for one in row):
            raise ValueError(
                "with two or more panels to paint VisualCloze (diffusers 0.42) swaps width and height: give it square "
                "pictures, or one panel to paint at a time"
            )
        self._chosen(len(rows[-1]), targets)

    def _chosen(self, count: int, targets: Sequence[int]) -> list[int]:
        """The panels of the last row that move."""
        if not isinstance(self.panel, int):
            return list(targets)
        place = self.panel + count if self.panel < 0 else self.panel
        if place not in targets:
            what = f"{'is given' if 0 <= place < count else 'is not there'}: to be painted"
            raise ValueError(
                f"panel {self.panel} of the last row {what} {'are' if len(targets) > 1 else 'is'} "
                f"{', '.join(str(i) for i in targets)}, counted from 0"
            )
        return [place]

    def seen(self, image: torch.Tensor, told: Mapping[str, Any]) -> torch.Tensor:
        """The panels of decoded last rows `(B, 3, H, W)` that the losses see, side by side."""
        lasts = self._last_rows(told)
        if self.panel == "picture":
            return image
        crops = []
        for i, last in _tiled(lasts, image):
            panels = image[i].split([width for _, width, _ in last], -1)
            crops.append(torch.cat([panels[j] for j in self._moving(last)], -1))
        return _stacked(crops)

    def movable(self, x: torch.Tensor, told: Mapping[str, Any]) -> torch.Tensor | None:
        """Which tokens of `x` `(B, L, C)` may move, `(B, L, 1)`; the last row's are the last ones."""
        side, marks = 2 * self.pipe.vae_scale_factor, []
        for last in self._last_rows(told):
            moving = self._moving(last)
            row = [torch.full((h // side, w // side), j in moving) for j, (h, w, _) in enumerate(last)]
            tokens = torch.cat(row, 1).flatten()
            marks.append(torch.cat([torch.zeros(x.shape[1] - len(tokens), dtype=torch.bool), tokens]))
        return _repeated(torch.stack(marks)[..., None].to(x.device), x)

    def _moving(self, last: Sequence[tuple[int, int, bool]]) -> list[int]:
        return self._chosen(len(last), [j for j, (_, _, painted) in enumerate(last) if painted])

    def _last_rows(self, told: Mapping[str, Any]) -> list[list[tuple[int, int, bool]]]:
        """Of each picture's last row the panels: height, width, whether it is to be painted."""
        lasts = [
            [(*one.shape[-2:], bool(mask.float().mean() > 0.5)) for one, mask in zip(rows[-1], masks[-1])]
            for rows, masks in zip(told["input_image"], told["input_mask"])
        ]
        sizes = {tuple(tuple(one.shape[-2:]) for row in rows for one in row) for rows in told["input_image"]}
        if len(sizes) > 1:
            raise ValueError("VisualCloze's grids of one call need panels of the same sizes: call it grid by grid")
        return lasts


def example_pairs(
    pipe: Any, grid: Sequence[Sequence[Any]]
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """The pairs and the query of a VisualCloze grid as its network sees them, to fit a loss on the grid's own examples.

    `PairTask.fit(pairs).loss(query)` then asks of the painted panel what the grid asks of the network.

    Args:
        pipe: a `VisualClozePipeline`, or its part that generates.
        grid: rows of two Pillow images, before and after; the last row is `[query, None]`.

    Returns:
        pairs of pictures `(3, H, W)` in [0, 1], and the query `(3, H, W)`, of the sizes of the panels.

    Raises:
        ValueError: that is no grid of pairs, or the pipeline no VisualCloze.
    """
    part = getattr(pipe, "generation_pipe", pipe)
    known = panels_of(part, None)
    if not isinstance(known, Grid):
        raise ValueError(f"{type(pipe).__name__} takes no grid of examples")
    known._check_grid(grid)
    if len(grid) < 2 or len(grid[0]) != 2 or grid[-1][1] is not None:
        raise ValueError("a grid of pairs has rows [before, after] and the last row [query, None]")
    rows = part.image_processor.preprocess_image(grid, vae_scale_factor=part.vae_scale_factor)[0]
    pictures = [[one[0].float() / 2 + 0.5 for one in row] for row in rows]
    return [(before, after) for before, after in pictures[:-1]], pictures[-1][0]


def _is_grid(rows: Any) -> bool:
    listed = isinstance(rows, (list, tuple)) and bool(rows) and all(isinstance(row, (list, tuple)) for row in rows)
    return listed and all(row and all(one is None or hasattr(one, "width") for one in row) for row in rows)


def _box(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what a mask `(H, W)` marks."""
    rows, columns = ((mask > 0).any(axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows):
        raise ValueError("the mask marks nothing to paint: white pixels are painted, at least one is needed")
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _tiled(ones: Sequence[Any], batch: torch.Tensor) -> list[tuple[int, Any]]:
    """Each picture's number, and what is known of it; several pictures of a prompt repeat the list."""
    return [(i, ones[i % len(ones)]) for i in range(len(batch))]


def _repeated(marked: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    marked = marked.to(x.device).repeat(len(x) // len(marked), *[1] * (x.dim() - 1))
    return None if bool(marked.all()) else marked


def _stacked(crops: list[torch.Tensor]) -> torch.Tensor:
    if len({crop.shape for crop in crops}) > 1:
        raise ValueError("the parts to be painted differ in size between the pictures: call the pipeline one by one")
    return torch.stack(crops)
