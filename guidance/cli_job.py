"""One run of a command: its model, its seeds, what it draws and writes, and how its problems are told."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
import torch

from ..losses import registry
from ..losses.loss import Composable, Term, as_losses
from ..losses.reading import read_json
from ..samplers import Record
from ..samplers.change import UnsuitableChange
from . import cli_output as output
from . import recipes
from .cli_model import PipelineModel, PixelModel, find_device, load_model
from .cli_tokens import NAME as TOKENS
from .cli_tokens import STEPS as TOKEN_STEPS
from .cli_tokens import TokenModel
from .contact_sheet import Block, contact_sheet
from .gradient import loss_gradient
from .guidance import Guidance
from .saved import check_types
from .steps import UnsuitableSolver
from .tune import with_settings


class Problem(click.ClickException):
    """Bad input: told in one sentence on stderr, exit status 2."""

    exit_code = 2


class OutOfMemory(Problem):
    """A batch is too large."""


@contextmanager
def told(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds that come from what the user gave, as one sentence."""
    try:
        yield
    except kinds as error:
        if isinstance(error, (KeyError, IndexError)):  # a bug, not a name that is not known
            raise
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            raise Problem(f"{error.strerror}: '{error.filename}'") from error
        raise Problem(str(error) or type(error).__name__) from error


@contextmanager
def loss_told() -> Iterator[None]:
    """What the user's own loss raises, as one sentence that says where."""
    try:
        yield
    except Exception as error:
        name, place = _own_place(error)
        cause = error.__cause__
        if not place and cause is not None and not lacks_memory(error):  # the library has said what the error means
            place = _own_place(cause)[1]
            if place:
                raise Problem(f"{error} ({place})") from error
        if not place or lacks_memory(error):
            raise
        what = f"the loss '{name}'" if name else "a loss"
        raise Problem(f"{what} raised {type(error).__name__}: {error} ({place})") from error


def _own_place(error: BaseException) -> tuple[str, str]:
    """Of which loss an error is, and where in the user's own file it was raised; empty where it was not."""
    name, place, trace = "", "", error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if isinstance(frame.f_locals.get("self"), Term):
            name = frame.f_locals["self"].name
        if str(frame.f_globals.get("__name__")).startswith(registry.OWN_MODULE):
            place = f"{os.path.relpath(frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return name, place


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that the memory is full."""
    text = str(error).lower()
    told_so = ("out of memory", "not enough memory", "can't allocate memory")  # CUDA, Windows, Linux
    return isinstance(error, MemoryError) or any(one in text for one in told_so)


BAD = (ValueError, LookupError, OSError)


def _tuned(path: Path, recipe: str) -> dict[str, Any]:
    """The settings in a file that `lossguide tune` wrote, for this recipe."""
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise ValueError(f"'{path}' is not what `lossguide tune` writes: it has no settings")
    own = found.get("guidance")
    name = own.get("name") if isinstance(own, dict) else None
    if isinstance(name, str) and name in recipes.available() and name != recipe:
        raise ValueError(f"'{path}' was found for another recipe than '{recipe}': add --recipe {name}")
    return found["settings"]


def _assigned(recipe: Callable[..., Guidance], words: Sequence[str]) -> dict[str, Any]:
    """Settings of a recipe written as NAME=VALUE, the value as JSON or as plain text.

    Raises:
        ValueError: one is written otherwise, has an option of its own, or its value is of another type.
    """
    settings: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not name or not equals:
            raise ValueError(f"--set takes NAME=VALUE, such as rule=rms, got '{word}'")
        if name in ("loss", "strength", "name", "citation"):
            raise ValueError(f"--set does not set {name}")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is a finite number, got {text}")
        settings[name] = value
    own = {name for name in inspect.signature(recipe).parameters if name != "changes"}
    for kind, known in ((recipe, own), (Guidance, set(Guidance.__dataclass_fields__) - own)):
        check_types(kind, {name: value for name, value in settings.items() if name in known})
    return settings


class Job:
    """One run of a command: its model, its seeds, and what all commands do with them."""

    def __init__(self, context: click.Context, run: dict[str, Any]):
        self.context, self.run = context, run
        self.begun = time.perf_counter()
        if run["model"] == TOKENS and context.get_parameter_source("steps") == click.core.ParameterSource.DEFAULT:
            run["steps"] = context.params["steps"] = TOKEN_STEPS
        with told(*BAD):
            self.recipe = recipes.get(run["recipe"])
            device = find_device(run["device"])
            scheduler = run["scheduler"]
            if scheduler is None and run["model"] == "demo":
                scheduler = "ddim"
            self.model: PixelModel | PipelineModel | TokenModel = load_model(
                run["model"], scheduler, run["steps"], device, getattr(torch, run["dtype"])
            )
        self.resolved: dict[str, Any] = {"device": str(device), "scheduler": scheduler}
        self.seeds = list(range(run["seed"], run["seed"] + run["num_images"]))
        self.batch_size = run["batch_size"] or min(len(self.seeds), self.model.largest_batch)

    def say(self, text: str) -> None:
        """A line about progress, on stderr."""
        if not self.run["quiet"]:
            click.echo(text, err=True)

    def guidance(self, loss: Composable) -> Guidance:
        """The recipe over a loss, which is tried once: a loss that cannot work is told before the work begins."""
        with told(*BAD, TypeError):
            changes = _assigned(self.recipe, self.run.get("changes", ()))
            guidance = self.recipe(loss, strength=self.run["strength"], **changes)
        if self.run.get("tuned") is not None:
            with told(*BAD, TypeError):
                guidance = with_settings(guidance, _tuned(self.run["tuned"], guidance.name))
        size = self.model.size or (64, 64)
        image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(self.model.device)
        with loss_told():
            loss_gradient(image, list(guidance.loss.terms()), None, None)
        return guidance

    @contextmanager
    def folder(self, default: Path) -> Iterator[Path]:
        """The folder for the results."""
        wanted = self.run["out"] or default
        self.resolved["out"] = wanted
        with told(OSError), output.results_folder(wanted, self.run.get("overwrite", False)) as folder:
            yield folder

    def draw(
        self, guidance: Guidance | None, prompt: str = "", seeds: list[int] | None = None, progress: bool = True
    ) -> tuple[torch.Tensor, Record]:
        """Pictures and record, see `PixelModel.draw`; of some seeds only where they are given."""
        seeds, progress = self.seeds if seeds is None else seeds, progress and not self.run["quiet"]
        try:
            with loss_told():
                return self.model.draw(guidance, seeds, self.run["steps"], self.batch_size, prompt, progress=progress)
        except UnsuitableSolver as error:
            raise Problem(re.sub(r"\brecipes\.(?=\w)", "--recipe ", str(error))) from error
        except (FloatingPointError, UnsuitableChange) as error:
            raise Problem(str(error)) from error
        except (MemoryError, RuntimeError) as error:
            self._out_of_memory(error)

    def _out_of_memory(self, error: Exception) -> NoReturn:
        if not lacks_memory(error):
            raise error
        smaller = f"try --batch-size {self.batch_size // 2}" if self.batch_size > 1 else "--dtype bfloat16 needs less"
        raise OutOfMemory(
            f"the memory of {self.model.device} does not hold a batch of {self.batch_size}; {smaller}"
        ) from error

    @torch.no_grad()
    def losses(self, loss: Composable, images: torch.Tensor) -> torch.Tensor:
        """The loss of each picture, without augmentation, `(N,)`."""
        parts = images.to(self.model.device).split(self.batch_size)
        with loss_told():
            return torch.cat([as_losses(loss)(part) for part in parts])

    def mean_loss(self, loss: Composable, images: torch.Tensor) -> float:
        """The loss of pictures, without augmentation, averaged over them."""
        return self.losses(loss, images).double().mean().item()

    def write(
        self,
        folder: Path,
        guidance: Guidance,
        record: Record,
        blocks: list[Block],
        summary: str,
        results: dict,
        **resolved,
    ) -> None:
        """Write sheet, record and settings."""
        contact_sheet(blocks, self.caption(guidance, summary)).save(folder / "sheet.png")
        record.save(folder / "record.json")
        record.plot(folder / "record.png")
        resolved = {**self.resolved, "batch_size": self.batch_size, **resolved}
        settings = {
            **self.settings(guidance, **resolved),
            "results": results,
            "seconds_per_step": self.seconds_per_step(record),
        }
        output.write_settings(folder, settings)

    def caption(self, guidance: Guidance, summary: str) -> str:
        """A summary, and what was done to come to it."""
        run, last = self.run, self.seeds[-1]
        seeds = f"seed {last}" if len(self.seeds) == 1 else f"seeds {self.seeds[0]} to {last}"
        settings = f"strength {guidance.strength:g}{', tuned' if run.get('tuned') else ''}, {run['steps']} steps"
        return f"{summary}; {run['recipe']}, {settings}, {type(self.model.scheduler).__name__}, {seeds}"

    def settings(self, guidance: Guidance, **resolved: Any) -> dict[str, Any]:
        """What was asked, and the command that asks it again; `resolved` takes the place of what was given."""
        return {
            "directory": Path.cwd(),
            "command": output.command_line(self.context, **resolved),
            "options": {**self.context.params, **resolved},
            "seeds": self.seeds,
            "scheduler": {"class": type(self.model.scheduler).__name__, **dict(self.model.scheduler.config)},
            "guidance": guidance.to_dict(),
        }

    def seconds_per_step(self, record: Record) -> float:
        """Seconds that one solver step of all pictures took, its repeated visits included."""
        return sum(row["seconds"] for row in record.rows) / self.run["steps"]

    def finish(self, folder: Path, record: Record, summary: str) -> None:
        """The last lines: what came out, and where it is."""
        click.echo(summary)
        spent = time.perf_counter() - self.begun
        pace = self.seconds_per_step(record)
        click.echo(f"{folder / 'sheet.png'} and more beside it; {pace:.2f} s per step, {spent:.0f} s in all")
