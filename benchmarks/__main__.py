"""`python -m benchmarks list | run TASK`."""

from __future__ import annotations

import importlib

import click

TASKS = {"demo-text": "text guidance of the demo model: every recipe, judged by a network that never guides"}


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
    "--only", multiple=True, metavar="RECIPE", help="Only measure these (or unguided), in a process of its own."
)
def run(task: str, quick: bool, fresh: bool, only: tuple[str, ...]) -> None:
    """Run a task; what is measured already is not measured again."""
    importlib.import_module(f"benchmarks.{task.replace('-', '_')}").run(quick=quick, fresh=fresh, only=only)


if __name__ == "__main__":
    main()
