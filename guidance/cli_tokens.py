"""The command line's masked-token generator, drawn as the other models are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..samplers import Record, TokenGenerator, sample
from .guidance import Guidance

NAME = "demo-tokens"
STEPS = 8  # where none are asked for


@dataclass(frozen=True)
class TokenModel:
    """A masked-token generator, drawn with the library's own loop.

    Attributes:
        generator: the adapted model.
    """

    generator: TokenGenerator
    largest_batch = 64
    takes_prompt = False

    @property
    def scheduler(self) -> Any:
        """The diffusers scheduler that it is drawn with."""
        return self.generator.scheduler

    @property
    def channels(self) -> int:
        """1 for a model of grey pictures, 3 for one in colour."""
        return self.generator.vqvae.config.out_channels

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures."""
        factor = 2 ** (len(self.generator.vqvae.config.block_out_channels) - 1)
        return self.generator.shape[0] * factor, self.generator.shape[1] * factor

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.generator.device

    def draw(
        self,
        guidance: Guidance | None,
        seeds: list[int],
        steps: int,
        batch_size: int,
        prompt: str = "",
        progress: bool = False,
    ) -> tuple[torch.Tensor, Record]:
        """Pictures `(N, 3, H, W)` in [0, 1] on the CPU, one per seed, and the record; plain ones without guidance."""
        result = sample(self.generator, guidance, steps=steps, seeds=seeds, batch_size=batch_size, progress=progress)
        return result.images.float().expand(-1, 3, -1, -1), result.record


def load_tokens(scheduler: str | None, device: torch.device, dtype: torch.dtype) -> TokenModel:
    """The model `demo-tokens`.

    Raises:
        OSError: its weights are not where they belong.
        ValueError: a scheduler was asked for.
    """
    from ..samplers.demo_tokens import FOLDER, load_demo_tokens

    if scheduler is not None:
        raise ValueError(f"--scheduler is for diffusion models; {NAME} has tokens, and the scheduler of its own")
    try:
        return TokenModel(load_demo_tokens(device, dtype, folder=FOLDER))
    except (OSError, ValueError) as error:
        raise OSError(f"the weights of {NAME} are not where they belong, '{FOLDER}': {error}".split("\n")[0]) from error
