"""Photos for `lossguide restore`: reading them, bringing them to the model's size, and what was measured of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from ..losses import measure, operators, read_image
from ..losses.images import read_opacity
from ..losses.operators import LinearOperator

TASKS = ("inpaint", "super-resolution", "deblur")
HOLE = (0.85, 0.35, 0.25)  # the colour of missing pixels in the sheet
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Degraded:
    """What is known of a photo.

    Attributes:
        operator: what was measured; images of the model's size -> y.
        y: the measurement, `(1, 3, h, w)`.
        original: the clean photo `(1, 3, H, W)` where it is known.
        mask: `(H, W)` for inpainting, 1 = observed.
    """

    operator: LinearOperator
    y: torch.Tensor
    original: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def picture(self) -> torch.Tensor:
        """The measurement as a picture `(1, 3, H, W)` of full size: holes in a colour, large pixels repeated."""
        return self._picture(torch.tensor(HOLE).view(3, 1, 1))

    @property
    def filled(self) -> torch.Tensor:
        """The same, with holes in the mean of what is observed: what a restoration should be better than."""
        return self._picture(self.y.sum() / (3 * self.mask.sum()) if self.mask is not None else 0.0)

    def _picture(self, hole: torch.Tensor | float) -> torch.Tensor:
        if self.mask is not None:
            return torch.where(self.mask > 0, self.y, hole)
        return self.operator.pseudo_inverse(self.y) if isinstance(self.operator, operators.SuperResolution) else self.y

    @property
    def file(self) -> Image.Image:
        """The measurement as a file that `restore` takes: its own size, holes transparent."""
        from .contact_sheet import to_pil

        image = to_pil(self.y[0])
        if self.mask is not None:
            image.putalpha(Image.fromarray((self.mask * 255).byte().numpy()))
        return image


def read_photo(path: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A photo `(3, H, W)` in [0, 1], and where it has an alpha channel, which pixels are opaque, `(H, W)` of 0 and 1.

    Raises:
        OSError, ValueError: as `lossguide.losses.read_image`.
    """
    photo, opacity = read_image(path), read_opacity(path)
    return photo, None if opacity is None else (opacity >= 0.5).float()


def fitted(image: torch.Tensor, size: tuple[int, int], what: str, resize: bool) -> torch.Tensor:
    """A picture `(C, h, w)` of the wanted size, cropped to its shape and resized where `resize` allows.

    Raises:
        ValueError: it has another size, and `resize` is not set.
    """
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image
    if not resize:
        raise ValueError(
            f"{what} has {width} x {height} pixels, but {size[1]} x {size[0]} are needed; --resize crops and resizes it"
        )
    scale = max(size[0] / height, size[1] / width)
    crop = min(height, max(1, round(size[0] / scale))), min(width, max(1, round(size[1] / scale)))
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    image = image[None, :, top : top + crop[0], left : left + crop[1]]
    return F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def degraded(
    photo: torch.Tensor,
    opaque: torch.Tensor | None,
    task: str,
    size: tuple[int, int],
    channels: int,
    *,
    degrade: bool,
    resize: bool,
    mask: torch.Tensor | None = None,
    keep: float = 0.5,
    factor: int = 4,
    kernel_size: int = 9,
    blur_sigma: float = 2.0,
    noise: float = 0.0,
    seed: int = 0,
) -> Degraded:
    """What a photo tells: it is the measurement itself, or with `degrade` the clean picture that one is made of.

    Args:
        photo, opaque: from `read_photo`.
        task: one of `TASKS`.
        size, channels: of the model's pictures; a grey model (1 channel) gets a grey photo.
        mask: `(3, h, w)`, white = observed; without it opaque pixels are, and with `degrade` a random share `keep`.
        resize: crop and resize what has another size.
        noise: standard deviation of the noise in the measurement, in units of [0, 1].
        seed: of the random mask and the noise that `degrade` draws.

    Raises:
        ValueError: a size does not fit, or there is no hole to fill in.
    """
    source = torch.Generator().manual_seed(seed)
    shown = None
    if task == "inpaint":
        shown = _mask(mask, None if degrade else opaque, size, resize, keep if degrade else None, source)
        operator: LinearOperator = operators.Inpaint(shown)
    elif task == "super-resolution":
        operator = operators.SuperResolution(factor)
    else:
        operator = operators.GaussianBlur(kernel_size, blur_sigma)
    measured = tuple(operator(torch.zeros(1, 3, *size)).shape[-2:])
    photo = fitted(
        photo,
        size if degrade else measured,
        "the photo" if degrade or task != "super-resolution" else "the small photo",
        resize,
    )
    if channels == 1:
        photo = (photo * torch.tensor(_GREY).view(3, 1, 1)).sum(0, keepdim=True)
    y = measure(operator, photo[None], noise, source) if degrade else photo[None]
    original = photo[None].expand(-1, 3, -1, -1) if degrade else None
    y = y.expand(-1, 3, -1, -1)
    return Degraded(operator, y if shown is None else y * shown, original, shown)


def _mask(mask, opaque, size, resize: bool, keep: float | None, source: torch.Generator) -> torch.Tensor:
    if mask is not None:
        shown = fitted(mask, size, "the mask", resize).mean(0) > 0.5
    elif keep is not None:
        shown = torch.rand(size, generator=source) < keep
    elif opaque is not None:
        shown = fitted(opaque[None], size, "the photo", resize)[0] > 0.99
    else:
        raise ValueError(
            "inpainting needs to know the hole: --mask mask.png (white = keep), a photo with transparent pixels, or "
            "--degrade, which makes holes in a clean photo"
        )
    if not shown.any():
        raise ValueError("the mask shows nothing of the photo: white or opaque pixels are kept, at least one is needed")
    if shown.all():
        raise ValueError("there is no hole to fill in: every pixel is marked as kept (white in a mask, or opaque)")
    return shown.float()


def psnr(images: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio `(N,)` in dB of pictures `(N, 3, H, W)` in [0, 1] against one `(1, 3, H, W)`."""
    error = (images.clamp(0, 1) - original).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()
