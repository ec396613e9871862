"""Randomness per picture: the same seed gives the same picture in any batch, on any device."""

from __future__ import annotations

import torch

_STREAMS = {"sampler": 0, "guidance": 0x6C6F7373, "source": 0x6B657074}  # keeps their draws apart


def generators(seeds: list[int], stream: str = "sampler") -> list[torch.Generator]:
    """One CPU generator per seed; the streams "sampler", "guidance" and "source" are independent of each other."""
    offset = _STREAMS[stream]
    return [torch.Generator().manual_seed((int(seed) ^ offset) & (2**63 - 1)) for seed in seeds]


def randn(shape: tuple[int, ...], sources: list[torch.Generator], like: torch.Tensor | None = None) -> torch.Tensor:
    """Standard normal noise `(B, *shape)`, each sample from its own generator; device and dtype of `like`."""
    noise = torch.stack([torch.randn(shape, generator=source) for source in sources])
    return noise if like is None else placed(noise, like)


def placed(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the host with device and dtype of `like`; the host does not wait until it is there."""
    if like.is_cuda and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(like, non_blocking=like.device.type != "mps")  # which may read what is freed by then


def rand(shape: tuple[int, ...], sources: list[torch.Generator]) -> torch.Tensor:
    """Uniform numbers in [0, 1), `(B, *shape)`, each sample from its own generator."""
    return torch.stack([torch.rand(shape, generator=source) for source in sources])


def particle_seeds(seeds: list[int], count: int) -> list[int]:
    """Seeds of `count` particles for each seed: those of all seeds, then the second ones of all, and so on; the first
    of each is the seed itself."""
    apart = 0x9E3779B97F4A7C15
    return [(int(seed) + j * apart) & (2**63 - 1) if j else int(seed) for j in range(count) for seed in seeds]
