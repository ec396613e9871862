"""`lossguide generate` for many pictures: kept one by one, gone on with after any end, shared by processes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import torch
from tqdm.auto import tqdm

from ..losses import read_image
from ..losses.loss import as_losses
from ..losses.reading import LARGEST_JSON, parse_json
from ..samplers import Record
from ..samplers.plain import plain
from . import cli_output as output
from .cli_agreed import asked, difference, near, probe
from .cli_job import Job, OutOfMemory, Problem, told
from .contact_sheet import MOST, Block, contact_sheet
from .files import Locks, read_plain, write_whole
from .guidance import Guidance
from .manifest import MANIFEST, PICTURES, SETTINGS, Manifest, clear, entered, leave


def process() -> tuple[int, int]:
    """The rank of this process and how many there are, as `accelerate launch` and torchrun say it.

    Raises:
        ValueError: RANK and WORLD_SIZE are no such numbers.
    """
    told_rank, told_world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, world = int(told_rank), int(told_world)
    except ValueError:
        raise ValueError(
            "the environment's RANK and WORLD_SIZE, which `accelerate launch` sets, are whole numbers, got "
            f"'{told_rank}' and '{told_world}'"
        ) from None
    if not 0 <= rank < world:
        raise ValueError(f"RANK is at least 0 and less than WORLD_SIZE, got {rank} of {world}")
    return rank, world


def is_large(run: dict[str, Any]) -> bool:
    """Whether a run is kept picture by picture: it has more of them than a sheet shows, or several processes, or it is
    to be gone on with."""
    with told(ValueError):
        return run["num_images"] > MOST or run["resume"] or process()[1] > 1


def draw_many(job: Job, guidance: Guidance, prompt: str, label: str, default: Path, **resolved: Any) -> None:
    """Draw the pictures of a job into its folder, where it is told by `--resume` into one that holds some of them.

    Args:
        job: the run.
        guidance: what steers it.
        prompt: for models that take one.
        label: over the guided pictures of the sheet.
        default: the folder where none is given.
        resolved: settings in place of those that were given, for `settings.json`.
    """
    run = job.run
    rank, world = process()
    if run["overwrite"] and world > 1:
        raise Problem("--overwrite is of one process: remove the folder, or give another --out")
    if run["overwrite"] and run["resume"]:
        raise Problem("--resume goes on with the run in --out, and --overwrite takes it away and begins anew: give one")
    if world > 1 and not Locks.several:
        raise Problem("several processes need file locks of Unix, which keep them from one another's pictures")
    wanted: Path = run["out"] or default
    with told(ValueError):
        large = _Large(job, guidance, prompt, label, resolved)
    with told(ValueError), large.disk(wanted):
        output.check_out(wanted)
        large.enter(wanted, join=run["resume"] or world > 1)
    try:
        with large.disk(large.folder):
            large.draw(rank, world)
            large.finish()
    except KeyboardInterrupt:
        large.tell_rest()
        raise
    finally:
        large.leave()


class _Large:
    """One process's part in a large run."""

    folder: Path
    manifest: Manifest

    def __init__(self, job: Job, guidance: Guidance, prompt: str, label: str, resolved: dict[str, Any]):
        self.job, self.guidance, self.prompt, self.label, self.resolved = job, guidance, prompt, label, resolved
        self.inside = self.began = self.made = False
        self.drawn = 0
        assert guidance.loss is not None
        self.loss = as_losses(guidance.loss)
        self.asked = asked(job, guidance, self.loss)
        self.probe = probe(job, self.loss)

    def enter(self, wanted: Path, join: bool) -> None:
        """Begin the run in a folder, or join the one that lies there."""
        overwrite = self.job.run["overwrite"]
        while True:
            self.folder = wanted if join or overwrite else output.free_folder(wanted)
            self.made = not self.folder.exists()
            with entered(self.folder) as (locks, alone):
                if overwrite:
                    if not alone:
                        raise OSError(f"another process is at work in '{self.folder}'")
                    clear(self.folder, strict=True)
                settings = read_settings(self.folder / SETTINGS)
                if join or settings is None:
                    self._enter(locks, alone, settings)
                    break
            leave(self.folder, locks)  # another process was faster: the next free folder
        if self.began and self.folder != wanted and (wanted / MANIFEST).is_file():
            self.job.say(f"'{wanted}' holds another run, which --resume would go on with; this goes to '{self.folder}'")

    def _enter(self, locks: Locks, alone: bool, settings: dict[str, Any] | None) -> None:
        job, count = self.job, len(self.job.seeds)
        batch = job.batch_size
        if settings is None:
            if output.holds_results(self.folder) and not job.run["overwrite"]:
                raise ValueError(f"'{self.folder}' holds pictures, but not the {SETTINGS} of the run that they are of")
            self.began = True
        else:
            batch = self._agreed(settings)
        about = {"run": self.asked, "batch_size": batch}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.manifest = Manifest(self.folder, count, job.seeds[0], batch, digest, locks)
        if settings is None:
            self._write_settings({})
        if alone:
            lost = self.manifest.check()
            if lost:
                job.say(f"{lost} pictures are listed, and are missing or damaged; they are drawn again.")
        else:
            self.manifest.refresh()
        job.batch_size = min(batch, job.batch_size)
        job.resolved["out"] = self.folder
        self.inside = True

    def _agreed(self, settings: dict[str, Any]) -> int:
        """The batch size of the run that lies in the folder.

        Raises:
            ValueError: it is another run.
        """
        found, batch, value = (settings.get(key) for key in ("run", "batch_size", "probe"))
        if not isinstance(found, dict) or type(batch) is not int or batch < 1:
            raise ValueError(f"'{self.folder}' holds a run that was not kept picture by picture; choose another --out")
        other = difference(found, self.asked)
        if other is None and not near(value, self.probe):
            other = f"a loss of {value} on a test picture", f"{self.probe:.6g}: a file or a network of it has changed"
        if other is not None:
            raise ValueError(
                f"the run in '{self.folder}' has {other[0]}, and this one has {other[1]}; go on with its settings, or "
                "choose another --out"
            )
        return batch

    def draw(self, rank: int, world: int) -> None:
        """Draw what is not done."""
        job, manifest = self.job, self.manifest
        count, there = manifest.count, manifest.finished
        if there < count:
            beside = f", process {rank + 1} of {world}" if world > 1 else ""
            job.say(f"Drawing {count - there} of {count} pictures, guided by {job.run['recipe']}{beside}.")
        if rank == 0 and len(manifest.batches) < world:
            job.say(
                f"{count} pictures in batches of {manifest.batch_size} do not keep {world} processes busy; try a "
                "smaller --batch-size"
            )
        with tqdm(total=count, initial=there, unit="picture", disable=job.run["quiet"] or rank > 0) as bar:
            for _ in manifest.work(self._batch, rank, world):
                bar.update(manifest.finished - bar.n)

    def _batch(self, indices: range) -> list[tuple[bytes, float]]:
        seeds = [self.manifest.first_seed + index for index in indices]
        images, record = self._halving(self.guidance, seeds)
        losses = self.job.losses(self.loss, images).tolist()
        if indices.start == 0:
            self._save_record(record)
        self.drawn += len(seeds)
        return list(zip(map(output.png, images), losses))

    def _halving(self, guidance: Guidance | None, seeds: list[int]) -> tuple[torch.Tensor, Record]:
        """Draw, with half the batch whenever the memory does not hold it."""
        job = self.job
        while True:
            try:
                return job.draw(guidance, self.prompt, seeds, progress=False)
            except OutOfMemory:
                if min(job.batch_size, len(seeds)) == 1:
                    raise
            # past the except block, where the error no longer keeps the tensors of the failed batch alive
            had = min(job.batch_size, len(seeds))
            job.batch_size = had // 2
            if job.model.device.type == "cuda":
                torch.cuda.empty_cache()
            click.echo(
                f"The memory of {job.model.device} does not hold a batch of {had}; going on with {job.batch_size} at "
                "once (pictures then agree with those of the whole batch to the round-off of the kernels).",
                err=True,
            )

    def _save_record(self, record: Record) -> None:
        text, plot = json.dumps(record.to_dict(), allow_nan=False) + "\n", io.BytesIO()
        record.plot().savefig(plot, dpi=110)
        write_whole(self.folder / "record.json", text.encode())
        write_whole(self.folder / "record.png", plot.getvalue())

    def finish(self) -> None:
        """When all pictures are done: the sheet and the results, by one process."""
        job, manifest = self.job, self.manifest
        with manifest.finishing():
            settings = read_settings(self.folder / SETTINGS) or {}
            there = (self.folder / "sheet.png").is_file() and isinstance(settings.get("results"), dict)
            if there:
                drawn = f"{self.drawn} pictures drawn" if self.drawn else "nothing was left to draw"
                click.echo(f"{output.shown(settings['results'].get('summary'))}; {drawn}")
                return
            job.say("Drawing some without guidance, for the sheet.")
            count = manifest.count
            some = range(min(count, MOST))
            plain_images, _ = self._halving(None, job.seeds[: len(some)])
            guided = torch.stack([read_image(self.folder / manifest.file(index)) for index in some])
            losses = manifest.losses()
            results = {
                "unguided": job.losses(self.loss, plain_images).double().mean().item(),
                "guided": statistics.fmean(losses[: len(some)]),
                "guided_all": statistics.fmean(losses),
            }
            before, after, every = results.values()
            summary = f"loss {before:.4g} -> {after:.4g} (unguided -> guided, mean of {len(some)})"
            shown = ""
            if count > len(some):
                summary, shown = f"{summary[:-1]} of {count}; of all {every:.4g})", f" (first {len(some)} of {count})"
            summary = job.caption(self.guidance, summary)
            sheet = io.BytesIO()
            blocks = [Block("unguided", plain_images), Block(f"guided: {self.label}{shown}", guided)]
            contact_sheet(blocks, summary).save(sheet, "PNG")
            write_whole(self.folder / "sheet.png", sheet.getvalue())
            self._write_settings({"results": {"loss": plain(results), "summary": summary}})
        click.echo(summary)
        spent = time.perf_counter() - job.begun
        click.echo(
            f"{self.folder / 'sheet.png'}, {manifest.count} pictures in {self.folder / PICTURES}, {MANIFEST}; "
            f"{self.drawn} drawn in {spent:.0f} s"
        )

    def _write_settings(self, more: dict[str, Any]) -> None:
        count, job = self.manifest.count, self.job
        resolved = {**job.resolved, "out": self.folder, "batch_size": self.manifest.batch_size, **self.resolved}
        resolved |= {"resume": False, "overwrite": False, "device": job.run["device"]}
        settings = {
            **job.settings(self.guidance, **resolved),
            "seeds": {"first": job.seeds[0], "count": count},
            "batch_size": self.manifest.batch_size,
            "run": self.asked,
            "probe": self.probe,
            **more,
        }
        output.write_settings(self.folder, settings)

    def tell_rest(self) -> None:
        """What is done, and how to go on, after an end before the end."""
        job, manifest = self.job, self.manifest
        manifest.refresh()
        if manifest.finished or not self.began:
            given = {**job.resolved, "device": job.run["device"], **self.resolved, "resume": True, "overwrite": False}
            command = output.command_line(job.context, **given)
            click.echo(f"{manifest.finished} of {manifest.count} pictures are done; to go on: {command}", err=True)

    def leave(self) -> None:
        """Leave the folder to the others, or, where nothing came to lie in it, as it was."""

        def nothing() -> bool:
            self.manifest.refresh()
            return self.began and not self.manifest.finished

        leave(self.folder, self.manifest.locks, discard=nothing)
        if self.made:
            with suppress(OSError):
                self.folder.rmdir()  # where nothing lies in it

    @contextmanager
    def disk(self, folder: Path) -> Iterator[None]:
        """What the disk refuses, in one sentence."""
        try:
            yield
        except OSError as error:
            what = str(error)
            if error.strerror:
                what = f"{error.strerror}: '{error.filename or folder}'"
            if self.inside:
                with suppress(OSError):
                    self.manifest.refresh()
                done = f"{self.manifest.finished} of {self.manifest.count} pictures are done and whole"
                what = f"{what}; {done}" + (", and --resume goes on" if self.manifest.finished else "")
            raise Problem(what) from error


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a folder; None where there are none.

    Raises:
        ValueError: they cannot be read.
        OSError: the file is a link, or cannot be opened.
    """
    try:
        found = parse_json(read_plain(path, LARGEST_JSON))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' is damaged, and without it a run cannot be gone on with")
    return found
