"""`python -m benchmarks list | run TASK`."""

from __future__ import annotations

import importlib

import click

TASKS = {
    "demo-text": "text guidance of the demo model: every recipe, judged by a network that never guides",
    "methods": "every recipe on ten pairs of a model and a task, at its default strength and at its best",
    "overhead": "what a guided call costs beyond its necessary passes",
    "losses": "every loss on a real model: how far it falls, whether a judge agrees, with and without augmentation",
    "memory": "peak memory of guided calls against the plain call and naive backpropagation",
    "posteriors": "closed forms: every method that claims a posterior against it, particles against their number",
    "solvers": "auto at its default over solvers, numbers of steps and a flow-matching model",
}


@click.group()
def main() -> None:
    """Measure the recipes; results go to benchmarks/results/."""


@main.command("list")
def list_tasks() -> None:
    """List the tasks."""
    for name, about in TASKS.items():
        click.echo(f"{name:12} {about}")


@main.command()
@click.argument("task", type=click.Choice(list(TASKS)))
@click.option("--quick", is_flag=True, help="Few pictures and strengths, to see that it runs; not for figures.")
@click.option("--fresh", is_flag=True, help="Measure again what has been measured.")
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Only these recipes (or unguided), or solvers, in a process of its own.",
)
@click.option("--work", multiple=True, metavar="NAME", help="methods, solvers: only this work, such as real-inpaint.")
def run(task: str, quick: bool, fresh: bool, only: tuple[str, ...], work: tuple[str, ...]) -> None:
    """Run a task; what is measured already is not measured again."""
    more = dict(work=work) if work else {}
    importlib.import_module(f"benchmarks.{task.replace('-', '_')}").run(quick=quick, fresh=fresh, only=only, **more)


if __name__ == "__main__":
    main()
