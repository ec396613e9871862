"""What the folder of weights holds, as it is used: denoisers, networks, pictures."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from lossguide.losses import read_image
from lossguide.losses.network import resize
from lossguide.samplers import Denoiser, denoiser
from torch import nn

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
SIDE = 256


class Prediction(nn.Module):
    """A denoiser's prediction of the mean, without that of the variance which some make beside it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output = self.network(x, t.expand(len(x)))
        output = output if isinstance(output, torch.Tensor) else output[0]
        return output[:, : x.shape[1]]


class Scripted(nn.Module):
    """A TorchScript file as a module like others: one by itself cannot stop requiring gradients."""

    def __init__(self, path: Path):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.script = torch.jit.load(path, map_location="cpu").eval()

    def forward(self, *inputs: torch.Tensor):
        return self.script(*inputs)


def load_denoiser(path: Path) -> Denoiser:
    """A pixel model with DDIM: TorchScript `(x, t) -> noise` at 256x256, or a diffusers folder.

    A folder is that of a UNet2DModel, or of a pipeline with one; its scheduler's noise levels hold where it has one,
    else those of DDPM.
    """
    from diffusers import DDIMScheduler, UNet2DModel

    if path.is_file():
        return denoiser(Prediction(Scripted(path)), _ddim(DDIMScheduler()), shape=(3, SIDE, SIDE))
    inside = path / "unet" if (path / "unet").is_dir() else path
    unet = UNet2DModel.from_pretrained(inside, local_files_only=True, low_cpu_mem_usage=False).eval()
    given = path / "scheduler" if (path / "scheduler").is_dir() else path
    own = (given / "scheduler_config.json").is_file()
    scheduler = DDIMScheduler.from_pretrained(given, local_files_only=True) if own else DDIMScheduler()
    size = unet.config.sample_size
    side = (size, size) if isinstance(size, int) else tuple(size)
    return denoiser(Prediction(unet), _ddim(scheduler), shape=(unet.config.in_channels, *side))


def _ddim(scheduler):
    return type(scheduler).from_config(scheduler.config, clip_sample=True, set_alpha_to_one=True)


def picture_files(folder: Path) -> list[Path]:
    """The picture files in a folder and below it, in the order of their names.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not files:
        raise FileNotFoundError(f"there is no picture in {folder} ({', '.join(ENDINGS)})")
    return files


def read_pictures(files: list[Path], side: int) -> torch.Tensor:
    """Pictures `(N, 3, side, side)` in [0, 1]: the largest square in the middle of each, resized."""
    found = []
    for path in files:
        image = read_image(path)
        least = min(image.shape[1:])
        top, left = ((n - least) // 2 for n in image.shape[1:])
        found.append(resize(image[None, :, top : top + least, left : left + least], side).clamp(0, 1))
    return torch.cat(found)
