"""The network, its noise schedule and its latent; how they are saved and loaded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from lossguide.samplers import Denoiser, Record, Result, denoiser, sample
from lossguide.samplers.gamma import PolynomialGamma, ScalarGamma
from lossguide.samplers.multivariate import MultivariateScheduler
from torch.nn.functional import silu

from .data import LEVELS

FOLDER = Path(os.environ.get("ADAPTIVE_NOISE") or Path.home() / ".cache" / "lossguide" / "adaptive-noise")
"""Where trained models are, outside of this repository."""
LATENT = 16
VARIANTS = {
    "scalar": dict(schedule="scalar"),
    "scalar-latent": dict(schedule="scalar", latent=LATENT),
    "polynomial": dict(schedule="polynomial"),
    "polynomial-latent": dict(schedule="polynomial", latent=LATENT),
}
"""The schedule is one number per time or a polynomial per pixel; the latent of a picture, where there is one, is seen
by the network and moves the polynomials."""
OWN = 1 << 40  # keeps the draws of latents apart from those of the sampler
GRID = (LEVELS - 1) / 2  # steps of the eight bits per unit of a sample


class AdaptiveModel(ModelMixin, ConfigMixin):
    """A v-predicting UNet that sees the noise level of every pixel, with the schedule `gamma` it was trained under and,
    where it has a latent, the encoder `q(z | x)`.

    Besides the sample the network sees the map of gamma, and waves of one and of two steps of the eight bits, which
    tell noise far smaller than the picture apart (Kingma et al. 2021).

    Args:
        schedule: "scalar" or "polynomial".
        latent: size of z; 0 for none.
        sample_size, in_channels: of a sample.
        channels: of each level of the UNet; multiples of 8.
        layers: residual blocks per level.
    """

    per_pixel = True  # what `denoiser` asks: the network is told the level of every pixel

    @register_to_config
    def __init__(
        self,
        schedule: str = "scalar",
        latent: int = 0,
        sample_size: int = 16,
        in_channels: int = 1,
        channels: tuple[int, ...] = (32, 64, 64),
        layers: int = 1,
    ) -> None:
        super().__init__()
        shape = (in_channels, sample_size, sample_size)
        if schedule not in ("scalar", "polynomial"):
            raise ValueError(f"a schedule is scalar or polynomial, got {schedule!r}")
        self.gamma = ScalarGamma() if schedule == "scalar" else PolynomialGamma(shape, latent)
        self.unet = UNet2DModel(
            sample_size=sample_size,
            in_channels=6 * in_channels,
            out_channels=in_channels,
            layers_per_block=layers,
            block_out_channels=channels,
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            norm_num_groups=8,
            add_attention=False,
            class_embed_type="identity" if latent else None,
        )
        for parameter in self.unet.conv_out.parameters():  # it begins with v = 0
            torch.nn.init.zeros_(parameter)
        if latent:
            width = 4 * channels[0]
            self.embedding = torch.nn.Sequential(
                torch.nn.Linear(latent, width), torch.nn.SiLU(), torch.nn.Linear(width, width)
            )
            self.encoder = torch.nn.Sequential(
                torch.nn.Conv2d(in_channels, 32, 3, 2, 1),
                torch.nn.SiLU(),
                torch.nn.Conv2d(32, 64, 3, 2, 1),
                torch.nn.SiLU(),
                torch.nn.Flatten(),
                torch.nn.Linear(64 * math.ceil(sample_size / 4) ** 2, 2 * latent),
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one sample."""
        return (self.config.in_channels, self.config.sample_size, self.config.sample_size)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance, each `(B, latent)`, of `q(z | x)`."""
        return self.encoder(x).float().chunk(2, 1)

    def forward(self, x: torch.Tensor, gamma: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """The prediction of `v = a e - s x_0`.

        Args:
            x: noisy samples `(B, C, H, W)`.
            gamma: broadcasts against them.
            z: `(B, latent)` where the model has a latent.
        """
        middle, half = (self.gamma.maximum + self.gamma.minimum) / 2, (self.gamma.maximum - self.gamma.minimum) / 2
        level = ((gamma.to(x.dtype) - middle) / half).expand_as(x)
        waves = [wave(math.pi * periods * GRID * (x + 1)) for periods in (1, 2) for wave in (torch.sin, torch.cos)]
        time = 500 * (1 + level.flatten(1).mean(1))  # the mean level, in the range the embedding is made for
        label = silu(self.embedding(z.to(x.dtype))) if self.config.latent else None
        return self.unet(torch.cat([x, level, *waves], 1), time, label).sample


class AtLatent(torch.nn.Module):
    """A model with a latent, held at one `z` `(1, latent)`: `(x_t, gamma) -> v`."""

    per_pixel = True

    def __init__(self, model: AdaptiveModel, z: torch.Tensor) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.register_buffer("z", z)

    def forward(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return self.model(x, gamma, self.z.expand(len(x), -1))


def scheduler_of(model: AdaptiveModel, z: torch.Tensor | None = None) -> MultivariateScheduler:
    """The schedule that a model was trained under, as diffusers knows it; at one latent `z` `(1, latent)` if given."""
    gamma = model.gamma
    if gamma.latent and z is not None:
        coefficients = (value[0] for value in gamma.coefficients(z))
        gamma = PolynomialGamma.of(*coefficients, minimum=gamma.minimum, maximum=gamma.maximum)
    return MultivariateScheduler(gamma, prediction_type="v_prediction", clip_sample=True)


def denoiser_of(model: AdaptiveModel, z: torch.Tensor | None = None) -> Denoiser:
    """A model for `sample`, recipes and the likelihood.

    Args:
        model: of any variant.
        z: `(1, latent)`, the latent of all pictures, for a model that has one; drawn from a standard normal law.

    Raises:
        ValueError: the model has a latent and z is not given.
    """
    if not model.config.latent:
        return denoiser(model, scheduler_of(model))
    if z is None:
        raise ValueError(f"this model has a latent: pass z of shape (1, {model.config.latent}), standard normal")
    return denoiser(AtLatent(model, z), scheduler_of(model, z))


def draw(model: AdaptiveModel, guidance=None, *, seeds: Sequence[int], **options) -> Result:
    """A picture per seed, as `sample`, each with a latent of its own where the model has one."""
    if not model.config.latent:
        return sample(denoiser_of(model), guidance, seeds=seeds, **options)
    drawn = []
    for seed in seeds:
        source = torch.Generator().manual_seed(seed + OWN)
        z = torch.randn(1, model.config.latent, generator=source)
        drawn.append(sample(denoiser_of(model, z), guidance, seeds=[seed], **options))
    images, samples = (torch.cat([getattr(one, name) for one in drawn]) for name in ("images", "samples"))
    return Result(images, samples, Record.joined([one.record for one in drawn]), tuple(seeds))


def folder_of(variant: str, seed: int, folder: Path | None = None) -> Path:
    """Where the model of a variant and a seed is kept."""
    return (folder or FOLDER) / f"{variant}-{seed}"


def available(folder: Path) -> bool:
    """Whether the training there has ended."""
    return (folder / "training.json").is_file()


def training(folder: Path) -> dict:
    """How the model was trained."""
    return json.loads((folder / "training.json").read_text())


def load(folder: Path) -> AdaptiveModel:
    """A trained model.

    Raises:
        FileNotFoundError: none has been trained; it says how.
    """
    if not available(folder):
        raise FileNotFoundError(
            f"there is no trained model in {folder}: `python -m benchmarks.adaptive.train` trains one (2 minutes of "
            "one core), or set ADAPTIVE_NOISE to a folder that has them"
        )
    return AdaptiveModel.from_pretrained(folder / "model", low_cpu_mem_usage=False).eval()
