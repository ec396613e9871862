"""`lossguide generate --source picture.png --change-map map.png`: a picture of which each pixel may change so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click
import torch
from torch.nn.functional import interpolate

from ..losses import read_image
from ..samplers import Solver
from ..samplers.change import check_solver
from .cli_job import BAD, Job, Problem, told


def change_options(command: Callable) -> Callable:
    """The options of a change map."""
    options = [
        click.option("--source", metavar="FILE", help="Change this picture instead of drawing one; with --change-map."),
        click.option(
            "--change-map",
            metavar="FILE|NUMBER",
            help="How far each pixel of --source may change: black stays, white is free; or one number in [0, 1].",
        ),
    ]
    for add in reversed(options):
        command = add(command)
    return command


def take_change(job: Job, source: str | None, change_map: str | None) -> None:
    """Let a job's model change a picture, as `--source` and `--change-map` say; nothing where neither is given."""
    if source is None and change_map is None:
        return
    if source is None or change_map is None:
        raise Problem("--source and --change-map belong together: give both")
    model: Any = job.model
    if not hasattr(model, "change"):
        raise Problem(f"the model '{job.run['model']}' draws tokens, of which a change map says nothing")
    if model.size is None:
        raise Problem(f"the model '{job.run['model']}' does not tell the size of its pictures, which --source needs")
    with told(*BAD):
        picture = _fitted(read_image(source), model.size)
        free = _number(change_map)
        free = _fitted(read_image(change_map), model.size).mean(0) if free is None else torch.tensor(free)
        check_solver(Solver.of(model.scheduler, job.run["steps"]))
    if not 0 <= float(free.min()) <= float(free.max()) <= 1:
        raise Problem(f"--change-map is in [0, 1], got {change_map}")
    job.model = dataclasses.replace(model, change=(picture, free))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _fitted(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A picture `(C, H, W)` as large as what the model draws."""
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    return interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
