"""`lossguide generate --rerank likelihood`: of several candidates per picture the likeliest that does as asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import torch

from ..samplers.likelihood import elbo_bpd
from ..samplers.paths import path_of
from ..samplers.random import particle_seeds
from ..samplers.record import Record
from .cli_job import BAD, Job, Problem, told
from .cli_model import PixelModel
from .guidance import Guidance

_FROM, _TIMES = 4, 32


def rerank_options(command: Callable) -> Callable:
    """`--rerank` and `--rerank-from`."""
    kinds = click.Choice(["likelihood"])
    help = "Draw several candidates per picture and keep the likeliest of the better half by the guide's loss."
    command = click.option(
        "--rerank-from", type=click.IntRange(3, 1000), help=f"--rerank: candidates per picture; default: {_FROM}."
    )(command)
    return click.option("--rerank", type=kinds, help=help)(command)


def check_rerank(job: Job, large: bool) -> None:
    """Tell, before the work, what cannot be reranked."""
    run = job.run
    if run["rerank"] is None:
        if run["rerank_from"] is not None:
            raise Problem("--rerank-from belongs to --rerank likelihood")
        return
    if large:
        raise Problem("--rerank is for as many pictures as a sheet shows, in one process, without --resume")
    if not isinstance(job.model, PixelModel):
        raise Problem(f"--rerank likelihood needs a model of pixels, and '{run['model']}' tells no density of pictures")
    with told(*BAD):
        path_of(job.model.denoiser)


def draw_reranked(job: Job, guidance: Guidance, prompt: str = "") -> tuple[torch.Tensor, Record, str, dict[str, Any]]:
    """The kept pictures and their record; a line about what was kept, and the same as data.

    Candidate j of a picture has a seed that follows from the picture's own, the first that seed itself. Bits per
    dimension are bounds (`elbo_bpd`) with the same draws for all candidates of a picture.
    """
    run, count, wanted = job.run, job.run["rerank_from"] or _FROM, len(job.seeds)
    seeds = particle_seeds(job.seeds, count)
    images, record = job.draw(guidance, prompt, seeds)
    losses = job.losses(guidance.loss, images).float().cpu()
    job.say("Asking the model how likely the candidates are.")
    found = elbo_bpd(
        job.model.denoiser,
        images,
        times=_TIMES,
        seeds=job.seeds * count,
        batch_size=job.batch_size,
        progress=not run["quiet"],
    )
    losses, bpd = losses.view(count, wanted), found.bpd.float().view(count, wanted)
    chosen = likeliest(losses, bpd)
    places = chosen * wanted + torch.arange(wanted)
    record.keep(places)
    kept = bpd.flatten()[places]
    text = (
        f"kept the likeliest of the better half of {count}: {kept.mean():.3f} bits/dim, all candidates "
        f"{bpd.mean():.3f}, the first of each {bpd[0].mean():.3f} ({int((chosen > 0).sum())} of {wanted} are not it)"
    )
    data = {
        "from": count,
        "kept": chosen,
        "seeds": [seeds[i] for i in places],
        "loss": losses.T,
        "bits_per_dimension": bpd.T,
        "likelihood": found.settings,
    }
    return images[places], record, text, data


def likeliest(losses: torch.Tensor, bpd: torch.Tensor) -> torch.Tensor:
    """Which candidate of each picture to keep, `(N,)`: of those whose loss is at most the median of the picture's
    candidates, the one of fewest bits per dimension.

    Args:
        losses, bpd: `(candidates, N)`; a candidate whose loss is not finite comes last. Of an even number the lower
            median counts, so that half of them are left.
    """
    losses = losses.nan_to_num(torch.inf, torch.inf)
    good = losses <= losses.median(0).values
    return torch.where(good, bpd.nan_to_num(torch.inf), torch.inf).argmin(0)
