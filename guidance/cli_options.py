"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from . import recipes as methods
from .cli_job import told
from .cli_model import SCHEDULERS, known_scheduler
from .cli_output import PARENT

STEPS, IMAGES = click.IntRange(1, 10_000), click.IntRange(1, 10_000_000)
"""More are a slip of the finger: lists of so many seeds or noise levels would fill the memory before any work."""
DTYPES = ("float32", "bfloat16", "float16")


def _recipe(context: click.Context, parameter: click.Parameter, value: str) -> str:
    with told(LookupError):
        methods.get(value)
    return value


def _scheduler(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    with told(LookupError):
        return None if value is None else known_scheduler(value)


def shared(num_images: int) -> Callable[[Callable], Callable]:
    """The options that `generate`, `restore` and `imitate` share."""
    option, shown = click.option, {"show_default": True}
    options = [
        option("--model", default="demo", **shown, help="demo, demo-tokens, a folder of diffusers, or a hub id."),
        option("--recipe", default="auto", callback=_recipe, **shown, help="Method; `lossguide recipes` lists them."),
        option("--strength", type=click.FloatRange(0), default=1.0, **shown, help="Factor of every step."),
        option(
            "--set",
            "changes",
            multiple=True,
            metavar="NAME=VALUE",
            help="A setting of the recipe, such as rule=rms of freedom; also several times.",
        ),
        option("--steps", type=STEPS, default=50, **shown, help="Solver steps; by demo-tokens 8."),
        option(
            "--scheduler",
            callback=_scheduler,
            help=f"{', '.join(SCHEDULERS)}; default: ddim for the demo, else the model's own.",
        ),
        option("--num-images", type=IMAGES, default=num_images, **shown, help="How many pictures."),
        option("--batch-size", type=IMAGES, help="Pictures at once; default: up to 64, by text models 1."),
        option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, **shown, help="First picture's; then 1 more."),
        option("--device", default="auto", **shown, help="cpu, cuda, cuda:1 ...; auto: CUDA where there is one."),
        option("--dtype", type=click.Choice(DTYPES), default="float32", **shown, help="Precision of the model."),
        option(
            "--out",
            type=click.Path(file_okay=False, path_type=Path),
            help=f"Folder for the results; default: in {PARENT}. One that holds results is kept, NAME-2 is taken.",
        ),
        option("--quiet", "-q", is_flag=True, help="No progress bar."),
    ]

    def decorate(command: Callable) -> Callable:
        for add in reversed(options):
            command = add(command)
        return command

    return decorate
