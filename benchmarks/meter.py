"""Has a guided picture left what the model knows? Its log-likelihood against that of the unguided one of its seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lossguide.samplers import Denoiser
from lossguide.samplers.likelihood import elbo_bpd

from .runs import standard_error

FIGURE = "bits per dimension"
TIMES = 32


def bits(model: Denoiser, images: torch.Tensor, seeds: Sequence[int] | None = None, times: int = TIMES) -> torch.Tensor:
    """Bits per dimension `(N,)` of pictures `(N, C, H, W)` in [0, 1] under a pixel model, by `elbo_bpd`; higher is less
    likely. Equal seeds, by default 0, 1 ..., get equal draws, so that differences have less noise than figures."""
    images = images.float().nan_to_num(0.5)
    return elbo_bpd(model, images, times=times, seeds=seeds).bpd


def change(guided: torch.Tensor, unguided: torch.Tensor) -> tuple[float, float | None]:
    """Mean change of the log-likelihood per dimension, in bits, from unguided pictures to guided ones of the same
    seeds, and its standard error over pictures; negative where guidance leads away from what the model knows.

    Args:
        guided, unguided: their bits per dimension `(N,)`.
    """
    if guided.shape != unguided.shape:
        raise ValueError(f"a change is between pictures of the same seeds: {len(unguided)} and {len(guided)} of them")
    gain = (unguided - guided).double()
    return gain.mean().item(), standard_error(gain)


def changed(row: dict | None, unguided: dict | None) -> tuple[float, float | None] | None:
    """The same from two measured rows; None where either has no such figure, or they are of other seeds."""
    if row is None or unguided is None or row.get("seeds") != unguided.get("seeds"):
        return None
    found = [one.get("per_picture", {}).get(FIGURE) for one in (row, unguided)]
    return None if None in found else change(*(torch.tensor(values) for values in found))


def auc(lower: torch.Tensor, higher: torch.Tensor) -> float:
    """The probability that one of `higher` exceeds one of `lower`, ties counted half: the area under the curve."""
    a, b = lower.double().flatten()[:, None], higher.double().flatten()[None]
    return ((b > a).double() + 0.5 * (b == a)).mean().item()
