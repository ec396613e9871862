"""The diffusion model of CIFAR-10 that `benchmarks.cifar10.train` trains: how it is built, saved and loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from lossguide.samplers import Denoiser, denoiser

from .data import FOLDER

MODEL = Path(os.environ.get("CIFAR10_MODEL") or FOLDER / "model")
"""Where the trained model is, outside of this repository."""
MISSING = (
    "there is no CIFAR-10 diffusion model in {folder}: train it with `python -m benchmarks.cifar10.train` (8 minutes "
    "on a large GPU), or set CIFAR10_MODEL to a folder that has it"
)


def build_unet(width: int, patch: int):
    """An unconditional UNet2DModel of 32x32 pictures.

    Args:
        width: channels of the first level, a multiple of 8; the others have twice as many.
        patch: side of the pixel blocks that become channels before the network: 1 for the architecture of DDPM (Ho et
            al. 2020; width 128 there), 2 for one level and most of the cost less.
    """
    from diffusers import UNet2DModel

    levels = 4 if patch == 1 else 3
    return UNet2DModel(
        sample_size=32 // patch,
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        layers_per_block=2 if patch == 1 else 1,
        block_out_channels=(width, *(2 * width,) * (levels - 1)),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", *("DownBlock2D",) * (levels - 2)),
        up_block_types=(*("UpBlock2D",) * (levels - 2), "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=min(32, width // 4),
        attention_head_dim=min(64, width),
    )


def build_scheduler():
    """DDIM over the cosine levels (Nichol and Dhariwal 2021), v-prediction (Salimans and Ho 2022)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def pack(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Pictures `(B, 3, 32, 32)` in [0, 1] as samples of the model, in [-1, 1]."""
    return F.pixel_unshuffle(images * 2 - 1, patch)


def unpack(samples: torch.Tensor, patch: int) -> torch.Tensor:
    """Samples of the model as pictures `(B, 3, 32, 32)` in [0, 1], not clamped."""
    return F.pixel_shuffle(samples, patch) / 2 + 0.5


def available(folder: Path = MODEL) -> bool:
    """Whether a model has been trained."""
    return (folder / "training.json").is_file()


def training(folder: Path = MODEL) -> dict:
    """How the model was trained."""
    return json.loads((folder / "training.json").read_text())


def load(folder: Path = MODEL) -> Denoiser:
    """The trained model.

    Raises:
        FileNotFoundError: none has been trained; it says how.
    """
    from diffusers import DDIMScheduler, UNet2DModel

    if not available(folder):
        raise FileNotFoundError(MISSING.format(folder=folder))
    patch = training(folder)["patch"]
    unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    return denoiser(unet, scheduler, decode=lambda x: unpack(x, patch))
