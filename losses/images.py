"""Reading target pictures, and short names for them in records."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .reading import first_line, open_file

FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000"),
    *("MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"),
)
"""What pictures may be: what Pillow decodes by itself. Of others it would start programs, such as Ghostscript."""
LARGEST = 8192 * 8192
"""Pixels of a picture that is read from a file, at most: a small file can claim, and fill, any number of them."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """What a loss keeps of a picture that was read, so that it can be saved without the file.

    Args:
        values: `(3, H, W)`, uint8, or floats in [0, 1] where eight bits do not hold them.
        path: of the file that they were read from, if any; it names the picture in records.
    """

    values: torch.Tensor
    path: str | None = None


Picture: TypeAlias = str | os.PathLike[str] | Image.Image | torch.Tensor | Pixels


def keep(picture: Picture | Sequence[Picture]) -> Any:
    """A picture in memory, or a list of them, whatever becomes of file or tensor; `read_image` reads it. Errors as
    there."""
    if isinstance(picture, (list, tuple)):
        return [keep(one) for one in picture]
    if isinstance(picture, torch.Tensor):
        return picture.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(picture, Pixels):
        return picture
    values = read_image(picture).contiguous()
    small = (255 * values).round().byte()
    path = None if isinstance(picture, Image.Image) else os.fspath(picture)
    return Pixels(small if torch.equal(small.float() / 255, values) else values, path)


def read_image(picture: Picture) -> torch.Tensor:
    """A picture as `(3, H, W)`, float32 in [0, 1].

    Any mode that Pillow reads becomes RGB: rotated as its EXIF data says, 16 bits scaled, transparency over white. Of
    an animation or of several pages the first counts.

    Args:
        picture: the path of a file in one of `FORMATS`, whatever its name ends in; a Pillow image; or a tensor
            `(3, H, W)` or `(1, H, W)` in [0, 1], which is passed on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a picture that can be read, it is damaged, has no pixels or more than `LARGEST`, or
            values that are not finite; or the tensor has another shape.
        OSError: the file cannot be opened.
    """
    if isinstance(picture, Pixels):
        picture = picture.values.float() / 255 if picture.values.dtype == torch.uint8 else picture.values
    if isinstance(picture, torch.Tensor):
        if picture.ndim == 4 and len(picture) == 1:
            picture = picture[0]
        if picture.ndim != 3 or picture.shape[0] not in (1, 3) or not picture.is_floating_point():
            raise ValueError(
                f"a picture is a float tensor (3, H, W) in [0, 1], got {picture.dtype} {tuple(picture.shape)}"
            )
        if not picture.numel():
            raise ValueError(f"a picture has at least one pixel, got {tuple(picture.shape)}")
        return picture.detach().expand(3, -1, -1)
    with _loaded(picture) as image:
        return _to_tensor(image)


def read_opacity(picture: str | os.PathLike[str] | Image.Image) -> torch.Tensor | None:
    """How opaque each pixel of a picture is, `(H, W)`, float32 in [0, 1]; None where nothing says so. Errors as
    `read_image`."""
    with _loaded(picture) as image:
        if not image.has_transparency_data:
            return None
        return torch.from_numpy(np.array(image.convert("RGBA").getchannel("A"))).float() / 255


@contextmanager
def _loaded(picture: str | os.PathLike[str] | Image.Image) -> Iterator[Image.Image]:
    """The first frame of a picture, decoded and turned as its EXIF data says. What its decoder raises becomes a
    ValueError; what comes from a file is not limited to a few kinds."""
    name, file = "the picture", None
    if not isinstance(picture, Image.Image):
        name, file = f"the picture '{os.fspath(picture)}'", open_file(picture, "picture")
    try:
        image = picture if file is None else _identified(file)
        if not min(image.size):
            raise ValueError("it has no pixels")
        if file is not None and image.width * image.height > LARGEST:
            raise Image.DecompressionBombError
        image.load()
        yield ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(
            f"{name.removeprefix('the picture ')} is not a picture that can be read: it is damaged, or in none of the "
            f"formats {', '.join(FORMATS)}"
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{name} has more than {LARGEST} pixels, those of a square of {math.isqrt(LARGEST)}, and no more are read: "
            "make it smaller"
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {first_line(error)}") from error
    finally:
        if file is not None:
            file.close()


def _identified(file: BinaryIO) -> Image.Image:
    Image.init()  # some formats only come with newer versions of Pillow
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def read_images(pictures: Picture | Sequence[Picture]) -> list[torch.Tensor]:
    """One picture, a list of them, or a tensor `(B, 3, H, W)`, each as `read_image` gives it. Errors as there."""
    if isinstance(pictures, (list, tuple)) and not pictures:
        raise ValueError("a list of pictures must not be empty")
    several = isinstance(pictures, (list, tuple)) or (isinstance(pictures, torch.Tensor) and pictures.ndim == 4)
    return [read_image(one) for one in (pictures if several else [pictures])]


def _to_tensor(image: Image.Image) -> torch.Tensor:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey, or floats
        values = np.asarray(image).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        if image.mode != "F" and not 0 <= values.min() <= values.max() <= 65535:
            raise ValueError(f"its grey values, {values.min():g} to {values.max():g}, are not those of 16 bits")
        grey = torch.from_numpy(values / (1 if image.mode == "F" else 65535)).clamp(0, 1)
        return grey.expand(3, -1, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def digest(value: Any) -> Any:
    """A path as text; a tensor or a picture as its shape and the first digits of its SHA-1. Plain data for JSON."""
    if isinstance(value, (list, tuple)):
        return [digest(one) for one in value]
    if isinstance(value, Pixels) and value.path is not None:
        return value.path
    if isinstance(value, (Image.Image, Pixels)):
        value = read_image(value)
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous()
        sha = hashlib.sha1(content.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        return f"{'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')} sha1:{sha[:10]}"
    return os.fspath(value) if isinstance(value, os.PathLike) else value
