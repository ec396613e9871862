"""The built-in demo model: a small unconditional diffusion model of Fashion-MNIST, in diffusers' own format."""

from __future__ import annotations

from pathlib import Path

import torch

from ..denoiser import Denoiser, denoiser

FOLDER = Path(__file__).parent


def load_demo(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, folder: Path = FOLDER
) -> Denoiser:
    """The demo's denoiser, DDIM over its own noise schedule; about 11 MB in memory, nothing is downloaded."""
    from diffusers import DDIMScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=dtype, low_cpu_mem_usage=False).to(device).eval()
    return denoiser(unet, DDIMScheduler.from_pretrained(folder / "scheduler"))
