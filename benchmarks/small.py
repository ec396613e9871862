"""A Stable Diffusion pipeline of random weights, small enough for a processor: for costs, not for pictures."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

TOKENS, WIDTH = 77, 64


def stable_diffusion(latent: int = 32, width: int = 64, vae_width: int = 32) -> StableDiffusionPipeline:
    """The pipeline without its text encoder; pictures have 8 pixels per latent pixel.

    Args:
        latent: side of the latents.
        width, vae_width: channels of the first blocks of denoiser and decoder (Stable Diffusion 1.5: 320 and 128),
            multiples of 32.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=latent,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
        sample_size=8 * latent,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        unet=unet.eval(),
        text_encoder=None,
        tokenizer=None,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_decoder() -> AutoencoderTiny:
    """A small decoder of the same latents, of random weights, in the size of the published one."""
    torch.manual_seed(1)
    return AutoencoderTiny().eval()


def embeddings(batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict:
    """What stands for the prompts in a call, with classifier-free guidance."""
    source = torch.Generator().manual_seed(2)
    prompt, negative = torch.randn(2, batch, TOKENS, WIDTH, generator=source).to(device, dtype)
    return dict(prompt_embeds=prompt, negative_prompt_embeds=negative, guidance_scale=7.5)
