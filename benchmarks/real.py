"""A real pretrained model, its pictures and judging networks, from `../shared/real`, which is not part of this."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
from lossguide.samplers import Denoiser, denoiser

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "real"


def available() -> bool:
    """Whether the material is at hand."""
    return (FOLDER / "load.py").is_file()


@functools.cache
def load():
    """The folder's own `load.py`."""
    spec = importlib.util.spec_from_file_location("real_load", FOLDER / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def model() -> Denoiser:
    """An unconditional model of faces, RGB 64x64, with the scheduler that others' code was measured with."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=300,
        trained_betas=load().anime64_betas(),
        timestep_spacing="leading",
        clip_sample=True,
        set_alpha_to_one=True,
    )
    return denoiser(load().anime64_unet(), scheduler)


@functools.cache
def pictures() -> torch.Tensor:
    """Its pictures, `(N, 3, 64, 64)` in [0, 1]."""
    return load().anime64_images() / 2 + 0.5


@functools.cache
def _lpips():
    return load().lpips_metric("alex")


@torch.no_grad()
def lpips(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """LPIPS (AlexNet) `(B,)` of pictures in [0, 1], at their own size."""
    return _lpips()(images * 2 - 1, truth * 2 - 1).flatten()


@functools.cache
def alexnet() -> torch.nn.Sequential:
    """torchvision's AlexNet features with their ImageNet weights."""
    from torchvision.models import alexnet as build

    network = build(weights=None).features
    state = torch.load(FOLDER / "lpips" / "alexnet_features.pt", weights_only=True)
    network.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    return network.eval().requires_grad_(False)
