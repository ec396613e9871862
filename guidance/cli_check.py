"""`lossguide check`: does a loss of one's own keep to what is asked of it?"""

from __future__ import annotations

import re

import click

from ..losses import check, registry
from .cli_job import BAD, Problem, lacks_memory, told
from .cli_model import find_device


def _shape(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", value, re.ASCII):
        raise Problem(
            "--shape is that of one picture, such as 3x64x64 (colours, height, width), each below a million, got "
            f"'{value}'"
        )
    return tuple(int(side) for side in value.split("x"))


@click.command("check", short_help="Try a loss of your own.")
@click.argument("losses", nargs=-1, required=True, metavar="LOSS...")
@click.option(
    "--shape", default="3x64x64", callback=_shape, show_default=True, help="One picture's: colours, height, width."
)
@click.option("--clip-model", default="demo", show_default=True, help="open_clip model or folder for texts.")
@click.option("--clip-pretrained", default="openai", show_default=True, help="Its weights, where it is given by name.")
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...; auto: CUDA where there is one."
)
@click.pass_context
def check_command(context: click.Context, losses, shape, clip_model, clip_pretrained, device) -> None:
    """Try a LOSS on pictures, and say what is wrong with it and what to do about it.

    Looks at the shape of what it returns, its values and gradient on random, black, white and overshooting pictures,
    whether each picture counts by itself, what it does to the caller's picture, and its speed. The exit status is 1
    where there is a problem; warnings may be meant so.

    \b
    Examples:
      lossguide check my_losses.py:darkness
      lossguide check "clip-text:a boot" color:red --shape 3x32x32
    """
    with told(*BAD, TypeError):
        loss = registry.parse(losses, clip_model=clip_model, clip_pretrained=clip_pretrained)
        where = find_device(device)
    try:
        report = check(loss, shape, device=where)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        sides = " x ".join(map(str, shape))
        raise Problem(f"the memory of {where} does not hold pictures of {sides}; try a smaller --shape") from error
    click.echo(report)
    problems, warnings = len(report.problems), len(report.warnings)
    click.echo(f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    if problems:
        context.exit(1)
