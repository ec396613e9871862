"""The built-in masked-token generator: an unconditional UVit2DModel over a VQ-KD tokenizer of Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import torch

from ..tokens import TokenGenerator, token_generator

FOLDER = Path(__file__).parent


def load_demo_tokens(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, folder: Path = FOLDER
) -> TokenGenerator:
    """The demo's token generator, 64 tokens a picture of 32 x 32; about 10 MB in memory, nothing is downloaded."""
    from diffusers import AmusedScheduler, UVit2DModel, VQModel

    load = dict(torch_dtype=dtype, low_cpu_mem_usage=False)
    transformer = UVit2DModel.from_pretrained(folder / "transformer", **load).to(device).eval()
    vqvae = VQModel.from_pretrained(folder / "vqvae", **load).to(device).eval()
    return token_generator(transformer, vqvae, AmusedScheduler.from_pretrained(folder / "scheduler"))
