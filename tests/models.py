"""Small models that the tests share: a Gaussian whose denoiser is exact, and tiny networks of random weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from lossguide.samplers import Denoiser, denoiser


def vp_scheduler(**options) -> DDIMScheduler:
    return DDIMScheduler(**(dict(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing") | options))


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


class Gaussian:
    """Data N(mean, covariance) along the last axis, and its exact denoiser under a variance-preserving schedule."""

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor):
        self.mean, self.covariance = mean.double(), covariance.double()
        self.scheduler = vp_scheduler()

    def level(self, t) -> tuple[torch.Tensor, torch.Tensor]:
        cumulative = self.scheduler.alphas_cumprod[int(t)].double()
        return cumulative.sqrt(), (1 - cumulative).sqrt()

    def x0(self, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        gain = a * self.covariance @ torch.linalg.inv(a**2 * self.covariance + s**2 * torch.eye(len(self.mean)))
        return self.mean + (x - a * self.mean) @ gain.T

    def posterior_covariance(self, a, s) -> torch.Tensor:
        """Covariance of x0 given x_t."""
        precision = torch.linalg.inv(self.covariance) + (a / s) ** 2 * torch.eye(len(self.mean))
        return torch.linalg.inv(precision)

    def denoiser(self, vectors: int) -> Denoiser:
        """A sample of shape (1, vectors, d) holds independent vectors."""

        def epsilon(x, t):
            a, s = self.level(t)
            return ((x - a * self.x0(x.double(), a, s)) / s).to(x.dtype)

        shape = (1, vectors, len(self.mean))
        return denoiser(epsilon, self.scheduler, kind="epsilon", shape=shape, decode=identity)


def tiny_unet(channels: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
        )
    return unet.to(dtype).eval()


def tiny_stable_diffusion():
    """A StableDiffusionPipeline of random weights, 16x16 pictures, its tokenizer made of a handful of words."""
    import json
    import tempfile
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            sample_size=16,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
        config = CLIPTextConfig(
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            vocab_size=8,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        text_encoder = CLIPTextModel(config)
    with tempfile.TemporaryDirectory() as folder:
        words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "o</w>", "t</w>", "a", "b"]
        (Path(folder) / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=8)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
