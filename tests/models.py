"""Small models that the tests share: Gaussians and mixtures whose denoiser is exact, and tiny networks of random
weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from lossguide.samplers import Denoiser, denoiser


def vp_scheduler(**options) -> DDIMScheduler:
    return DDIMScheduler(**(dict(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing") | options))


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


class Exact:
    """A law of vectors along the last axis whose denoiser `x0(x, a, s) = E[x_0 | a x_0 + s n = x]` is known."""

    scheduler = vp_scheduler()
    dimension: int

    def level(self, t) -> tuple[torch.Tensor, torch.Tensor]:
        cumulative = self.scheduler.alphas_cumprod[int(t)].double()
        return cumulative.sqrt(), (1 - cumulative).sqrt()

    def x0(self, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def denoiser(self, vectors: int) -> Denoiser:
        """A sample of shape (1, vectors, d) holds independent vectors."""

        def epsilon(x, t):
            a, s = self.level(t)
            return ((x - a * self.x0(x.double(), a, s)) / s).to(x.dtype)

        shape = (1, vectors, self.dimension)
        return denoiser(epsilon, self.scheduler, kind="epsilon", shape=shape, decode=identity)

    def flow_denoiser(self, vectors: int) -> Denoiser:
        """The same of a flow model, `x_t = (1 - s) x_0 + s n`, under its Euler solver."""

        def flow(x, t):
            s = t.double() / 1000
            x0 = self.x0(x.double(), 1 - s, s)
            return ((x - x0) / s).to(x.dtype)

        shape = (1, vectors, self.dimension)
        return denoiser(flow, FlowMatchEulerDiscreteScheduler(), kind="flow", shape=shape, decode=identity)


class Gaussian(Exact):
    """Data N(mean, covariance) along the last axis, and its exact denoiser under a variance-preserving schedule."""

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor):
        self.mean, self.covariance = mean.double(), covariance.double()
        self.dimension = len(mean)

    def gain(self, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The slope of x0 in x: `a C (a^2 C + s^2 I)^-1`."""
        return a * self.covariance @ torch.linalg.inv(a**2 * self.covariance + s**2 * torch.eye(self.dimension))

    def x0(self, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return self.mean + (x - a * self.mean) @ self.gain(a, s).T

    def posterior_covariance(self, a, s) -> torch.Tensor:
        """Covariance of x0 given x_t."""
        precision = torch.linalg.inv(self.covariance) + (a / s) ** 2 * torch.eye(self.dimension)
        return torch.linalg.inv(precision)

    def log_density(self, x: torch.Tensor, a: float | torch.Tensor = 1.0, s: float | torch.Tensor = 0.0):
        """Of `a x_0 + s n`, the last axis summed over."""
        covariance = a**2 * self.covariance + s**2 * torch.eye(self.dimension)
        rest = x - a * self.mean
        size = torch.logdet(covariance) + self.dimension * math.log(2 * math.pi)
        return -0.5 * ((rest @ torch.linalg.inv(covariance) * rest).sum(-1) + size)

    def posterior(self, h: torch.Tensor, y: torch.Tensor, sigma: float) -> Gaussian:
        """Given `y = h x + sigma n`, `h` `(m, d)`: Kalman's formula."""
        gain = self.covariance @ h.T @ torch.linalg.inv(h @ self.covariance @ h.T + sigma**2 * torch.eye(len(h)))
        return Gaussian(self.mean + gain @ (y - h @ self.mean), self.covariance - gain @ h @ self.covariance)

    def seen(self, h: torch.Tensor, sigma: float) -> Gaussian:
        """The law of `h x + sigma n`."""
        return Gaussian(h @ self.mean, h @ self.covariance @ h.T + sigma**2 * torch.eye(len(h)))


class GaussianMixture(Exact):
    """A mixture of Gaussians: its denoiser is the mean of theirs, weighted by how likely each made x."""

    def __init__(self, weights: torch.Tensor, parts: Sequence[Gaussian]):
        self.weights, self.parts = weights.double() / weights.sum(), tuple(parts)
        self.dimension = parts[0].dimension

    def x0(self, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        likely = torch.stack([part.log_density(x, a, s) for part in self.parts], -1) + self.weights.log()
        shares = torch.softmax(likely, -1)
        return sum(shares[..., i, None] * part.x0(x, a, s) for i, part in enumerate(self.parts))

    def posterior(self, h: torch.Tensor, y: torch.Tensor, sigma: float) -> GaussianMixture:
        """Given `y = h x + sigma n`: each part's own posterior, weighted by how likely it made y."""
        likely = torch.stack([part.seen(h, sigma).log_density(y) for part in self.parts])
        weights = torch.softmax(likely + self.weights.log(), 0)
        return GaussianMixture(weights, [part.posterior(h, y, sigma) for part in self.parts])

    @property
    def mean(self) -> torch.Tensor:
        return sum(w * part.mean for w, part in zip(self.weights, self.parts))

    @property
    def covariance(self) -> torch.Tensor:
        around = [part.covariance + torch.outer(part.mean - self.mean, part.mean - self.mean) for part in self.parts]
        return sum(w * one for w, one in zip(self.weights, around))


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
