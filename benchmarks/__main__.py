"""`python -m benchmarks list | run TASK | report`."""

from __future__ import annotations

import difflib
import importlib

import click

from . import task as tasks
from .published.tasks import TASKS as PUBLISHED

TASKS = {
    "demo-text": "text guidance of the demo model: every recipe, judged by a network that never guides",
    "methods": "every recipe on ten pairs of a model and a task, at its default strength and at its best",
    "overhead": "what a guided call costs beyond its necessary passes",
    "losses": "every loss on a real model: how far it falls, whether a judge agrees, with and without augmentation",
    "token-losses": "features, tokens and their histogram as guides of a real model: what a reference shows, not how",
    "token-guidance": "text guidance of a masked-token generator: inner steps, re-masking, candidates, ten classes",
    "imitate": "example pairs: what was done is found and undone, against the true operator; edits; refusals",
    "relations": "scenes of two things: is each where the text puts it? cosine, hard negatives, word relations",
    "cheap": "auto at 1.3 times the time of the unguided sampler and at the same: how much of its gain is left",
    "cost": "time per picture against batch, steps, copies and resolution; memory against the number of pictures",
    "memory": "peak memory of guided calls against the plain call and naive backpropagation",
    "gpu": "the loop on a CUDA device: eager, compiled and graphed steps against the floor, memory, a profile",
    "soak": "large runs of `lossguide generate`: processes killed at random, a full disk, against an undisturbed run",
    "broken": "broken, odd and harmful files and names: each is read, or refused in one sentence, and no more happens",
    "posteriors": "closed forms: every method that claims a posterior against it, particles against their number",
    "tokenizers": "VQ-KD against a plain VQ at equal cost; LG-VQ's losses on and off; trains what is missing",
    "per-pixel": "noise levels that differ per pixel against closed forms: bound, guidance, time travel, every recipe",
    "fuzz": "the command line and the parsers under random input: exceptions, hangs, files outside the output folder",
    "adaptive-noise": "learned noise schedules, scalar and per pixel, with and without a latent, in bits per dimension",
    "likelihood": "how likely pictures are to the demo model: closed forms, other kinds, guided ones; reranking",
    "change-map": "garments whose upper half is kept while a text changes the rest",
    "mutation": "small faults put into levels, step rules and the guided step: do the tests find them?",
    "coverage": "which lines of the library its tests run, by folder, and the files that are short of it",
    "solvers": "auto at its default over solvers, numbers of steps and a flow-matching model",
    "cifar10": "CIFAR-10 labels in the field's protocol; the model is trained by `python -m benchmarks.cifar10.train`",
}


@click.group()
def main() -> None:
    """Measure methods; rows, tables, plots and contact sheets go to benchmarks/results/.

    `list` names the tasks. Those that compare methods at equal cost are small files in benchmarks/tasks/; they can be
    killed at any moment and go on where they were, several processes share them (start the command twice, or
    `accelerate launch --multi_gpu --num_processes 2 -m benchmarks run TASK`, which needs no GPU), and `report` writes
    what there is so far.
    """


@main.command("list")
def list_tasks() -> None:
    """List the tasks."""
    for name, about in (TASKS | tasks.names()).items():
        click.echo(f"{name:14} {about}")
    click.echo("with weights that you have, --weights FOLDER (without it, each says what the folder is to hold):")
    for name, task in PUBLISHED.items():
        click.echo(f"{name:23} {task.about}; {task.source}")


@main.command()
@click.argument("task")
@click.option("--quick", is_flag=True, help="Few pictures and strengths, to see that it runs; not for figures.")
@click.option("--fresh", is_flag=True, help="Measure again what has been measured.")
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Only these recipes (or unguided), solvers, or methods of a task, in a process of its own.",
)
@click.option(
    "--work",
    multiple=True,
    metavar="NAME",
    help="cheap, methods, solvers, comparisons: only this work, such as real-inpaint.",
)
@click.option("--weights", metavar="FOLDER", help="published-*: the folder of weights that the task needs.")
def run(task: str, quick: bool, fresh: bool, only: tuple[str, ...], work: tuple[str, ...], weights: str | None) -> None:
    """Run a TASK that `list` names; what is measured already is not measured again."""
    names = [*TASKS, *tasks.names(), *PUBLISHED]
    if task not in names:
        close = difflib.get_close_matches(task, names, 1)
        raise click.UsageError(
            f"there is no task {task!r}{f'; did you mean {close[0]!r}?' if close else ';'} "
            "`python -m benchmarks list` names them"
        )
    if task in PUBLISHED:
        from .published.run import run as run_published

        run_published(task, weights, quick=quick, fresh=fresh, only=only)
        return
    if task in tasks.names():
        from . import compare

        compare.run(task, quick=quick, fresh=fresh, only=only, work=work)
        return
    more = dict(work=work) if work else {}
    if more and task not in ("cheap", "methods", "solvers"):
        raise click.UsageError(f"{task} takes no --work")
    importlib.import_module(f"benchmarks.{task.replace('-', '_')}").run(quick=quick, fresh=fresh, only=only, **more)


@main.command()
@click.argument("names", metavar="[TASK]...", nargs=-1)
@click.option("--quick", is_flag=True, help="Of the rows of `run TASK --quick`.")
def report(names: tuple[str, ...], quick: bool) -> None:
    """Write tables, plots and contact sheets of the rows measured so far, of all tasks in benchmarks/tasks/ or some."""
    from . import report as reports

    for name in names:
        if name not in tasks.names():
            raise click.UsageError(f"there is no task {name!r} to report; there are {', '.join(tasks.names())}")
    for name in names or tasks.names():
        reports.write(name, quick=quick)


if __name__ == "__main__":
    main()
