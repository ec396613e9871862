"""What the published comparisons want of pictures: what guides them, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lossguide.losses import ClipText, Measurement, Segmentation, Term, operators
from lossguide.losses.clip import load_clip
from lossguide.losses.network import distance, logits_of
from lossguide.losses.pretrained import opened

from ..work_restore import psnr
from . import models


@dataclass(frozen=True)
class Wanted:
    """What is wanted of the pictures of a comparison.

    Attributes:
        loss: places in the set -> what guides those pictures.
        judge: pictures `(N, 3, H, W)` in [0, 1] and their places -> figures `(N,)` by name.
    """

    loss: Callable[[Sequence[int]], Callable]
    judge: Callable[[torch.Tensor, Sequence[int]], dict[str, torch.Tensor]]


def maps(found: dict[str, Path], side: int, device: str, **preprocessing) -> Wanted:
    """The map that a network makes of a real picture, at its distance `||map(image) - map(picture)||_2`.

    The layout of a face parser's scores, or a line extractor's lines; the i-th picture is to follow the i-th real one.
    """
    path, files = found["network"], models.picture_files(found["pictures"])
    module = models.Scripted(path).to(device) if path.is_file() else path
    network = opened(module, "AutoModelForSemanticSegmentation", **preprocessing)

    @torch.no_grad()
    def of(images: torch.Tensor) -> torch.Tensor:
        return logits_of(network(images.to(device)))

    def wanted(places: Sequence[int]) -> torch.Tensor:
        return of(models.read_pictures([files[place % len(files)] for place in places], side))

    def loss(places: Sequence[int]) -> Term:
        return Term(Segmentation(network, wanted(places)), augment=False)  # places must stay

    def judge(images: torch.Tensor, places: Sequence[int]) -> dict[str, torch.Tensor]:
        return {"distance": distance(of(images) - wanted(places)).cpu()}

    return Wanted(loss, judge)


def text(found: dict[str, Path], side: int, device: str, prompts: Sequence[str]) -> Wanted:
    """A text, by CLIP: the distance `||E(text) - E(image)||_2` of embeddings, and 100 cos by a CLIP that judges."""
    if "prompts" in found:
        prompts = [line.strip() for line in found["prompts"].read_text().splitlines() if line.strip()]
    clips = {name: str(found[name]) for name in ("clip", "judge") if name in found}

    def texts(places: Sequence[int]) -> list[str]:
        return [prompts[place % len(prompts)] for place in places]

    def loss(places: Sequence[int]) -> ClipText:
        return ClipText(texts(places), model=clips["clip"])

    def embedded(which: str, images: torch.Tensor, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        clip = load_clip(clips[which])
        return clip.embed_text(texts(places)).cpu(), clip.embed(images.to(device)).cpu()

    @torch.no_grad()
    def judge(images: torch.Tensor, places: Sequence[int]) -> dict[str, torch.Tensor]:
        figures = {"distance": distance(torch.sub(*embedded("clip", images, places)))}
        if "judge" in clips:
            figures["clip_score"] = 100 * F.cosine_similarity(*embedded("judge", images, places))
        return figures

    return Wanted(loss, judge)


def restoration(found: dict[str, Path], side: int, device: str, operator: str, factor: int = 1) -> Wanted:
    """A real picture, degraded without noise; judged by LPIPS with SqueezeNet, and PSNR."""
    files = models.picture_files(found["pictures"])
    degrade = (
        operators.SuperResolution(factor, "bicubic")
        if operator == "super-resolution"
        else operators.GaussianBlur(61, 3.0)
    )
    lpips = _lpips(found["squeezenet"])

    def truth(places: Sequence[int]) -> torch.Tensor:
        return models.read_pictures([files[place % len(files)] for place in places], side)

    def loss(places: Sequence[int]) -> Measurement:
        return Measurement(degrade, degrade(truth(places)))

    @torch.no_grad()
    def judge(images: torch.Tensor, places: Sequence[int]) -> dict[str, torch.Tensor]:
        real, images = truth(places), images.nan_to_num(0.5)
        return {"lpips": lpips(images * 2 - 1, real * 2 - 1).flatten(), "psnr": psnr(images, real)}

    return Wanted(loss, judge)


def _lpips(path: Path) -> torch.nn.Module:
    """LPIPS (SqueezeNet) with the trunk's weights from a file of torchvision's; the rest is in the package."""
    import lpips

    metric = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    state = torch.load(path, map_location="cpu", weights_only=True)
    trunk = {key.removeprefix("features."): value for key, value in state.items()}
    metric.net.load_state_dict({key: trunk[key.split(".", 1)[1]] for key in metric.net.state_dict()})
    return metric.eval().requires_grad_(False)


WANTED = {"maps": maps, "text": text, "restoration": restoration}
