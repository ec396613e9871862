"""The look of pictures of the real model: the style of a painting, the colours of a photo."""

from __future__ import annotations

import kornia
import torch
import torch.nn.functional as F
from lossguide.losses import Color, Style, read_image
from scipy.optimize import linear_sum_assignment

from . import real
from .work import Pictures, Work

COUNTS = {"search": 2, "evaluation": 6, "fresh": 12}
SEEDS = {"search": 1020, "evaluation": 20, "fresh": 2020}
SIDE = 64  # the guide sees pictures at their own size
JUDGED_SIDE, JUDGED_LAYERS = 128, (1, 4, 7, 9)  # AlexNet's first four rectified layers
PIXELS = 512  # of a picture, for the judge of colours
PALETTE = 420  # the picture whose colours are wanted


def _grams(images: torch.Tensor) -> list[torch.Tensor]:
    """Correlations of AlexNet's features, a network that does not guide."""
    x = F.interpolate(images.nan_to_num(0.5), (JUDGED_SIDE,) * 2, mode="bicubic", antialias=True)
    x = (x - x.new_tensor((0.485, 0.456, 0.406)).view(-1, 1, 1)) / x.new_tensor((0.229, 0.224, 0.225)).view(-1, 1, 1)
    found = []
    for index, layer in enumerate(real.alexnet()[: max(JUDGED_LAYERS) + 1]):
        x = layer(x)
        if index in JUDGED_LAYERS:
            flat = x.flatten(2)
            found.append(flat @ flat.transpose(1, 2) / flat.shape[2])
    return found


def style(which: str) -> Pictures:
    """Faces in the style of a painting: the Gram distance in AlexNet, relative to the painting's, mean over layers."""
    painting = read_image(real.FOLDER / "style" / "candy.jpg")[None]
    painting = F.interpolate(painting, (SIDE, SIDE), mode="bicubic", antialias=True)
    guide = Style(painting[0], weights=real.FOLDER / "lpips" / "vgg16_features.pt", size=SIDE)

    @torch.no_grad()
    def judge(images: torch.Tensor) -> dict[str, torch.Tensor]:
        pairs = zip(_grams(images), _grams(painting))
        apart = [(got - wanted).flatten(1).norm(dim=1) / wanted.norm() for got, wanted in pairs]
        return {"gram": torch.stack(apart).mean(0), **natural(images)}

    return _pictures(which, guide, judge, {"style": painting.expand(1, -1, -1, -1)})


def color(which: str) -> Pictures:
    """Faces in the colours of another picture: the cost of the best assignment of pixels to its pixels, in Lab."""
    target = real.pictures()[PALETTE]
    guide = Color(target)

    def judge(images: torch.Tensor) -> dict[str, torch.Tensor]:
        wanted = _pixels(target[None])[0]
        costs = [torch.cdist(own, wanted) for own in _pixels(images)]
        return {
            "delta_e": torch.stack([cost[linear_sum_assignment(cost.numpy())].mean() for cost in costs]),
            **natural(images),
        }

    return _pictures(which, guide, judge, {"colours": target[None]})


def _pixels(images: torch.Tensor) -> torch.Tensor:
    """Some pixels `(B, PIXELS, 3)` of each picture in Lab, as kornia computes it."""
    some = torch.randperm(images.shape[-1] ** 2, generator=torch.Generator().manual_seed(1))[:PIXELS]
    return kornia.color.rgb_to_lab(images.nan_to_num(0.5).clamp(0, 1)).flatten(2)[:, :, some].transpose(1, 2)


@torch.no_grad()
def natural(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far the model itself moves a picture that it is given with some noise: root mean square, in [-1, 1]."""
    model, timestep = real.model(), 60
    share = model.scheduler.alphas_cumprod[timestep]
    noise = torch.randn(model.shape, generator=torch.Generator().manual_seed(5))
    x = images.nan_to_num(0.5) * 2 - 1
    sample = share.sqrt() * x + (1 - share).sqrt() * noise
    clean = (sample - (1 - share).sqrt() * model.predict(sample, torch.tensor(timestep))) / share.sqrt()
    return {"moved": (clean - x).square().flatten(1).mean(1).sqrt()}


def _pictures(which: str, guide, judge, shown: dict[str, torch.Tensor]) -> Pictures:
    loss = lambda places: guide
    return Pictures(range(SEEDS[which], SEEDS[which] + COUNTS[which]), loss, judge, shown)


def _work(name: str, about: str, pictures, figure: str, size: float, augment: bool = True) -> Work:
    return Work(
        f"real-{name}",
        f"{about}, real 64x64 model",
        real.model,
        pictures,
        figure,
        higher=False,
        size=size,
        augment=augment,
        batch=6,
        available=real.available,
    )


WORKS = [
    _work("style", "The style of a painting by VGG-16, judged in AlexNet", style, "gram", 30000.0, augment=False),
    _work("color", "The colours of another picture", color, "delta_e", 80.0, augment=False),
]
