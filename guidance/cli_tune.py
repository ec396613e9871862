"""`lossguide tune`: search the settings that suit one's own loss and model, by a judge."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click

from ..losses import ClassLabel, demo, registry
from ..losses.loss import as_losses
from . import cli_output as output
from .cli_job import BAD, Job, Problem, told
from .cli_model import check_model
from .cli_options import IMAGES, STEPS
from .cli_tokens import NAME as TOKENS
from .tune import SEEDS, default_space, tune

# what `generate` can be told besides, and tuning leaves at its defaults
_LEFT = {"strength": 1.0, "scheduler": None, "dtype": "float32", "batch_size": None, "quiet": False}
_CLIP_PRETRAINED = "openai"


@click.command("tune", short_help="Search a recipe's settings.")
@click.argument("prompt", required=False)
@click.option("--model", default="demo", show_default=True, help="demo, a folder in diffusers' format, or a hub id.")
@click.option("--loss", "losses", multiple=True, metavar="TEXT", help="[WEIGHT*]NAME:ARGUMENT, also several times.")
@click.option(
    "--judge",
    metavar="TEXT",
    help="Scores the pictures, lower is better: written like a --loss, and not the guide; default with the demo: the "
    "cross-entropy of its judging classifier to the PROMPT's class.",
)
@click.option("--recipe", default="auto", show_default=True, help="Method; `lossguide recipes` lists them.")
@click.option("--steps", type=STEPS, default=50, show_default=True, help="Solver steps.")
@click.option("--num-images", type=IMAGES, default=len(SEEDS), show_default=True, help="Pictures per trial.")
@click.option("--trials", type=click.IntRange(1), default=30, show_default=True, help="In all, earlier runs included.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=SEEDS[0],
    show_default=True,
    help="First picture's, in every trial; also the search's own.",
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...; auto: CUDA where there is one."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Folder for the history; default: in {output.PARENT}. A search that lies there goes on.",
)
@click.pass_context
def tune_command(context: click.Context, prompt, losses, judge, trials, **run: Any) -> None:
    """Search strength, time travel, augmentation and window for a PROMPT or losses, scored by a judge.

    The first trial is the recipe as it is. The best settings are tried once more, beside it, on fresh seeds. Each trial
    draws --num-images pictures, as long as `lossguide generate` takes for them, and up to four times that. The same
    command goes on after Ctrl-C, or with more --trials.

    Writes journal.log (the search itself), trials.json, history.png and best.json.

    \b
    Examples:
      lossguide tune --trials 10
      lossguide tune "a sandal" --recipe dps --steps 30
      lossguide tune --loss class-label:bag --judge clip-text:bag
      lossguide tune "a coat" --model ./my-model --loss my_losses.py:dark --judge my_losses.py:sharpness
    """
    from .cli import _losses  # here, because the other file holds the group that this command belongs to

    if prompt is None and not losses:
        if run["model"] != "demo":
            raise Problem("there is nothing to aim at: give a prompt or --loss")
        prompt = "ankle boot"
    clip_model = "demo" if run["model"] == "demo" else "ViT-B-32"
    if run["model"] == TOKENS:
        raise Problem(f"tune searches the settings of recipes for diffusion models, and {TOKENS} is none")
    with told(*BAD):
        check_model(run["model"])
        loss = _losses(prompt, losses, clip_model, _CLIP_PRETRAINED)
        if judge is not None:
            score = as_losses(registry.parse(judge, clip_model=clip_model, clip_pretrained=_CLIP_PRETRAINED))
        elif run["model"] == "demo" and prompt is not None:
            score = as_losses(ClassLabel(demo.class_of(prompt), classifier=demo.classifier("judge")))
        else:
            raise Problem(
                "nothing tells good pictures from bad: name a --judge, such as class-label:9 or judge.py:score"
            )
    job = Job(context, {**run, **_LEFT})
    with told(*BAD):
        job.guidance(loss)  # tries the loss once, before the work begins
    words = [prompt] if prompt is not None else losses
    folder = run["out"] or output.default_folder("tune", run["recipe"], *words)
    command = output.command_line(context, prompt=prompt, out=folder, device=job.resolved["device"])

    def draw(guidance, seeds, steps):
        images, _ = job.model.draw(guidance, seeds, steps, job.batch_size, prompt or "")
        return images.to(job.model.device)

    try:
        with told(*BAD, ImportError):
            output.check_out(folder)
            tuned = tune(
                draw,
                loss,
                score,
                recipe=run["recipe"],
                trials=trials,
                seeds=job.seeds,
                steps=run["steps"],
                folder=folder,
                setup={"model": {"name": run["model"], "scheduler": _scheduler(job)}},
                progress=True,
            )
    except KeyboardInterrupt:
        click.echo(f"\nWhat was tried lies in {folder}; this goes on with it: {command}", err=True)
        raise
    further = re.sub(r" --trials \d+|$", f" --trials {2 * len(tuned.trials)}", command, count=1)
    own, fresh = tuned.trials[0], tuned.fresh
    judged = " and ".join(term.name for term in score.terms())
    click.echo(f"{run['recipe']} as it is -> best of {len(tuned.trials)} trials, scored by {judged}, lower is better")
    click.echo(f"on the seeds of the search: {_number(own.score)} -> {tuned.score:.4g}")
    error = "" if fresh.error is None else f" (standard error of the difference {fresh.error:.2g})"
    click.echo(f"on fresh seeds: {_number(fresh.own)} -> {_number(fresh.best)}{error}")
    if tuned.settings == own.settings:
        click.echo(f"Nothing was better than {run['recipe']} as it is.")
    else:
        doubtful = None in (fresh.own, fresh.best, fresh.error) or fresh.own - fresh.best < 2 * fresh.error
        if doubtful:
            click.echo("Fresh seeds do not confirm the gain: score more pictures, with --num-images.")
        click.echo("best: " + ", ".join(f"{name} {value}" for name, value in tuned.settings.items()))
        searched = default_space()["strength"]
        if not 1.2 * searched.low < tuned.settings.get("strength", 1.0) < searched.high / 1.2:
            click.echo(
                f"Its strength is at the end of what was searched, {searched.low:g} to {searched.high:g}: try others "
                "with `lossguide generate --strength`, or search further in Python: lossguide.guidance.tune.tune."
            )
        click.echo(f"{'to use it all the same' if doubtful else 'use it'}: {_generate(run, prompt, losses, folder)}")
    click.echo(f"{folder / 'history.png'} and more beside it; to go on: {further}")


def _generate(run: dict[str, Any], prompt: str | None, losses: tuple[str, ...], folder: Path) -> str:
    """The command that draws with the best settings."""
    words = ["lossguide", "generate", *([prompt] if prompt is not None else [])]
    for loss in losses:
        words += ["--loss", loss]
    for name in ("model", "recipe", "steps"):
        words += [f"--{name}", str(run[name])]
    return shlex.join([*words, "--tuned", str(folder / "best.json")])


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _scheduler(job: Job) -> dict[str, Any]:
    return {"class": type(job.model.scheduler).__name__, **dict(job.model.scheduler.config)}
