"""Contact sheets: blocks of pictures side by side, each under its label, over a caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

CELL = 128  # small pictures are enlarged by a whole factor to about this side
LARGEST = 256  # larger ones are made smaller
MOST = 64  # pictures of a block; the rest is left out
_GAP, _BETWEEN, _FONT, _ROW = 2, 20, 15, 26


class Block(NamedTuple):
    """Pictures `(N, 1 or 3, H, W)` in [0, 1] under a label, in so many columns (as square as can be when None)."""

    label: str
    images: torch.Tensor
    columns: int | None = None


def to_pil(image: torch.Tensor) -> Image.Image:
    """A picture `(1 or 3, H, W)` in [0, 1] as an RGB Pillow image; what is out of range is cut, NaN is black."""
    values = image.detach().float().cpu().nan_to_num(0).clamp(0, 1).expand(3, -1, -1)
    return Image.fromarray((values * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def contact_sheet(blocks: Sequence[Block], caption: str = "") -> Image.Image:
    """Blocks of pictures from left to right, for a look.

    Pictures keep their order, row by row; small ones are enlarged by a whole factor, so that pixels stay square.

    Args:
        blocks: what to show; a block of more than `MOST` pictures shows its first.
        caption: at the bottom, in as many lines as the width of the sheet takes.
    """
    height, width = blocks[0].images.shape[-2:]
    factor = max(1, round(CELL / max(height, width))) if max(height, width) <= LARGEST else LARGEST / max(height, width)
    cell_width, cell_height = max(1, int(width * factor)), max(1, int(height * factor))
    resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    grids = []
    for block in blocks:
        count = min(len(block.images), MOST)
        columns = min(block.columns or round(count**0.5 + 0.499), count)
        grids.append((columns, -(-count // columns)))
    widths = [columns * (cell_width + _GAP) - _GAP for columns, _ in grids]
    tall = max(rows for _, rows in grids) * (cell_height + _GAP) - _GAP
    total = sum(widths) + _BETWEEN * (len(blocks) + 1)
    font = ImageFont.load_default(size=_FONT)
    lines = _wrapped(caption, font, total - 2 * _BETWEEN)
    sheet = Image.new("RGB", (total, _ROW + tall + _GAP + _ROW * len(lines)), "white")
    pen, left = ImageDraw.Draw(sheet), _BETWEEN
    for block, (columns, _), wide in zip(blocks, grids, widths):
        shown = block.images[:MOST]
        more = f" (first {MOST} of {len(block.images)})" if len(block.images) > MOST else ""
        pen.text((left, _ROW // 2), _cut(block.label + more, font, wide + _BETWEEN), "black", font, anchor="lm")
        for i, image in enumerate(shown):
            row, column = divmod(i, columns)
            place = (left + column * (cell_width + _GAP), _ROW + row * (cell_height + _GAP))
            sheet.paste(to_pil(image).resize((cell_width, cell_height), resample), place)
        left += wide + _BETWEEN
    for i, line in enumerate(lines):
        pen.text((_BETWEEN, _ROW + tall + _GAP + _ROW * i + _ROW // 2), line, "dimgray", font, anchor="lm")
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels; a single word that is wider is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_cut(word, font, width))
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text on one line, its end cut where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
