"""A large set of pictures in a folder: numbered, written whole, listed in a manifest, and drawn by several processes.

    settings.json       what was asked; who comes later must ask the same
    manifest.jsonl      a header, and a line per finished picture: index, seed, file, sha256, loss
    pictures/0012/12345.png
    .claims             locks of the processes that are at work; gone when none is

A picture counts when its line is in the manifest, which is written after the picture. The plan is cut into batches by
index, so that the same pictures are drawn together whoever draws them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..losses.reading import LARGEST_JSON, parse_json
from .files import Locks, open_plain, read_plain, real_folder, sync_folder, write_all, write_whole

SETTINGS, MANIFEST, PICTURES, CLAIMS = "settings.json", "manifest.jsonl", "pictures", ".claims"
_FIXED = ("sheet.png", "record.png", "record.json", "report.txt", SETTINGS, MANIFEST)  # beside the pictures
PER_FOLDER = 1000
_LARGEST = 1 << 30  # bytes of a picture's file; it has no more
_LINE = 4096  # bytes that a picture's lines take in a manifest, at most, also where some are doubled
_DOOR, _USE, _LIST, _FINISH, _FIRST = 0, 1, 2, 3, 8  # places of the locks: the last is the first batch's
_HEX = re.compile(r"[0-9a-f]{64}")
_PICTURE = re.compile(r"\d{5,}\.png|\.\d{5,}\.png\.partial", re.ASCII)

Drawn = Sequence[tuple[bytes, float]]


class Manifest:
    """The pictures of a plan that are done, as the folder shows them.

    Args:
        folder: of the run.
        count: how many pictures the plan has; picture `i` has seed `first_seed + i`.
        first_seed: the first picture's.
        batch_size: how many are drawn together.
        digest: of the settings, for the header.
        locks: of the processes at work.
    """

    def __init__(self, folder: Path, count: int, first_seed: int, batch_size: int, digest: str, locks: Locks):
        self.folder, self.count, self.first_seed, self.batch_size = folder, count, first_seed, batch_size
        self.locks = locks
        self.path = folder / MANIFEST
        self.header = json.dumps(
            {"pictures": count, "first_seed": first_seed, "batch_size": batch_size, "settings": digest}
        )
        self.done = bytearray(count)
        self._read: tuple[int, int] = (0, 0)  # inode, and how far it has been read

    @property
    def finished(self) -> int:
        """How many pictures are done."""
        return sum(self.done)

    @property
    def batches(self) -> list[range]:
        """The indices of each batch."""
        starts = range(0, self.count, self.batch_size)
        return [range(start, min(start + self.batch_size, self.count)) for start in starts]

    def file(self, index: int) -> str:
        """Where a picture lies, relative to the folder."""
        seed = self.first_seed + index
        return f"{PICTURES}/{seed // PER_FOLDER:04d}/{seed:05d}.png"

    def check(self) -> int:
        """Hold the manifest against the files and make it anew where they differ; for a process that is alone.

        Lines that are torn, doubled or of a picture that is missing or damaged go, so that the picture is drawn again.

        Returns:
            How many pictures were listed and are not there.
        """
        listed: dict[int, str] = {}
        lost: set[int] = set()
        real_folder(self.folder / PICTURES)
        text = self._bytes() if self.path.is_symlink() or self.path.exists() else b""
        for entry in filter(None, map(self._entry, text.split(b"\n"))):
            index = entry["index"]
            if index in listed:
                continue
            if self._digest(index) == entry["sha256"]:
                listed[index] = json.dumps(entry)
                lost.discard(index)
            else:
                lost.add(index)
        self._write([listed[index] for index in sorted(listed)], text)
        self.done = bytearray(index in listed for index in range(self.count))
        return len(lost)

    def refresh(self) -> None:
        """Read what has been listed since, by other processes too."""
        self._locked(self._refresh)

    def add(self, indices: Iterable[int], drawn: Drawn) -> None:
        """Write pictures that are not done yet, each whole, and then their lines.

        Args:
            indices: which they are.
            drawn: of each the bytes of its file, and its loss.

        Raises:
            OSError: the disk is full, or cannot be written to; what was done before is as it was.
        """
        entries = []
        for index, (data, loss) in zip(indices, drawn):
            if self.done[index]:
                continue
            path = self.folder / self.file(index)
            real_folder(path.parent.parent, make=True)
            real_folder(path.parent, make=True)
            write_whole(path, data)
            known = self._expected(index)
            value = float(loss) if math.isfinite(loss) else None
            entries.append({**known, "sha256": hashlib.sha256(data).hexdigest(), "loss": value})
        for folder in {(self.folder / entry["file"]).parent for entry in entries}:
            sync_folder(folder)
        if entries:
            self._locked(lambda: self._append("".join(json.dumps(entry) + "\n" for entry in entries).encode()))
        for entry in entries:
            self.done[entry["index"]] = 1

    def work(self, draw: Callable[[range], Drawn], rank: int = 0, world: int = 1) -> Iterator[None]:
        """Draw what is not done, batch by batch, beside other processes; yields after each look at a batch.

        A process begins with its share, each `world`-th batch; then it takes up what no other is at, and in the end it
        waits for those that others are at, and takes up what they leave behind when they die.

        Args:
            draw: the indices of a batch -> the bytes and losses of all its pictures, in order.
            rank, world: this process among those that were started together.

        Raises:
            OSError: as `add`.
        """
        batches = self.batches
        own = range(rank, len(batches), world)
        order = [*own, *(i for i in range(len(batches)) if i % world != rank)]
        for wait in (False, True):
            for number in order:
                indices = batches[number]
                if self._whole(indices) or not self.locks.take(_FIRST + number, wait=wait):
                    continue
                try:
                    self.refresh()  # under the lock: its last owner may have just drawn it
                    if not self._whole(indices):
                        self.add(indices, draw(indices))
                finally:
                    self.locks.free(_FIRST + number)
                yield

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """For what one process does when all pictures are done; others wait. Sorts the manifest first."""
        self.locks.take(_FINISH, wait=True)
        try:
            self._locked(self._sort)
            yield
        finally:
            self.locks.free(_FINISH)

    def losses(self) -> list[float]:
        """Losses by index, of pictures that are done; not a number where they were not finite."""
        found = [math.nan] * self.count
        for entry in filter(None, map(self._entry, self._bytes().split(b"\n"))):
            if entry["loss"] is not None:
                found[entry["index"]] = entry["loss"]
        return found

    def _whole(self, indices: range) -> bool:
        return all(self.done[indices.start : indices.stop])

    def _expected(self, index: int) -> dict[str, Any]:
        return {"index": index, "seed": self.first_seed + index, "file": self.file(index)}

    def _entry(self, line: bytes) -> dict[str, Any] | None:
        """What a line lists, where it is one that this plan can have: no other file than the picture's own."""
        try:
            found = parse_json(line)
            index = found["index"]
            if type(index) is not int or not 0 <= index < self.count:
                return None
            known, digest, loss = self._expected(index), found["sha256"], found["loss"]
            loss = None if loss is None else float(loss)
            right = all(found.get(key) == value for key, value in known.items()) and _HEX.fullmatch(digest)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None
        if not right or not (loss is None or math.isfinite(loss)):
            return None
        return {**known, "sha256": digest, "loss": loss}

    def _digest(self, index: int) -> str | None:
        """Of a picture's file; None where it is not there, or only a link."""
        path = self.folder / self.file(index)
        try:
            if not real_folder(path.parent):
                return None
            digest = hashlib.sha256()
            with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
                if os.fstat(file.fileno()).st_size > _LARGEST:
                    return None
                while block := file.read(1 << 20):
                    digest.update(block)
            return digest.hexdigest()
        except NotADirectoryError:
            raise
        except OSError:
            return None

    def _bytes(self) -> bytes:
        return read_plain(self.path, LARGEST_JSON + _LINE * self.count)

    def _write(self, lines: list[str], before: bytes) -> None:
        """Make the manifest of these lines, where it is another."""
        text = "".join(f"{line}\n" for line in [self.header, *lines]).encode()
        if text != before:
            write_whole(self.path, text)
            sync_folder(self.folder)

    def _sort(self) -> None:
        before = self._bytes()
        found = {entry["index"]: entry for entry in map(self._entry, before.split(b"\n")) if entry}
        self._write([json.dumps(found[index]) for index in sorted(found)], before)

    def _locked(self, change: Callable[[], None]) -> None:
        self.locks.take(_LIST, wait=True)
        try:
            change()
        finally:
            self.locks.free(_LIST)

    def _refresh(self) -> None:
        with os.fdopen(open_plain(self.path, os.O_RDONLY), "rb") as file:
            status = os.fstat(file.fileno())
            inode, start = self._read
            if status.st_ino != inode or status.st_size < start:
                start = 0
            file.seek(start)
            new = file.read()
        whole = new.rfind(b"\n") + 1
        self._read = (status.st_ino, start + whole)
        for entry in filter(None, map(self._entry, new[:whole].split(b"\n"))):
            self.done[entry["index"]] = 1

    def _append(self, text: bytes) -> None:
        handle = open_plain(self.path, os.O_RDWR)
        try:
            size = os.lseek(handle, 0, os.SEEK_END)
            if size:
                os.lseek(handle, -1, os.SEEK_END)
                if os.read(handle, 1) != b"\n":  # torn by a kill
                    text = b"\n" + text
            try:
                write_all(handle, text)
                os.fsync(handle)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)


@contextmanager
def entered(folder: Path) -> Iterator[tuple[Locks, bool]]:
    """Come into a run's folder, while no other process comes or goes: the locks, and whether one is alone in it.

    Afterwards this process is one of those at work, until `leave`, or its end.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        locks = Locks(folder / CLAIMS)
        locks.take(_DOOR, wait=True)
        if locks.current:
            break
        locks.close()  # the last to leave has just taken it away
    try:
        yield locks, locks.take(_USE)
        locks.take(_USE, shared=True)
        locks.free(_DOOR)
    except BaseException:
        _out(folder, locks)
        raise


def leave(folder: Path, locks: Locks, discard: Callable[[], bool] | None = None) -> None:
    """Be no longer at work; the last takes the file of locks away, and all that the run has written if `discard` then
    says so."""
    if locks.take(_DOOR):
        _out(folder, locks, discard)
    else:
        locks.close()


def _out(folder: Path, locks: Locks, discard: Callable[[], bool] | None = None) -> None:
    with suppress(OSError):
        if locks.several and locks.take(_USE) and locks.current:
            if discard is not None and discard():
                clear(folder)
            locks.path.unlink()
    locks.close()


def cleared(folder: Path) -> None:
    """Take away what an earlier run has written into a folder, see `clear`.

    Raises:
        OSError: something cannot be taken away, or another process is at work in it.
        FileExistsError: a file that a run would write over is not that run's.
    """
    with entered(folder) as (locks, alone):
        if not alone:
            raise OSError(f"another process is at work in '{folder}'")
        clear(folder, strict=True)
    leave(folder, locks)


def clear(folder: Path, strict: bool = False) -> None:
    """Take away what a run has written into a folder, and nothing else; no link is followed.

    A run is known by its settings or the header of its manifest; its pictures are those of its seeds.

    Args:
        strict: take nothing away where there are files of such names that are not of a run here.

    Raises:
        OSError: something cannot be taken away.
        FileExistsError: with `strict`, there are files of others.
    """
    if not folder.is_dir():
        return
    beside, numbered = _written(folder)
    own, foreign = [], []
    for path in _named(folder):
        name = re.sub(r"^\.(.+)\.partial$", r"\1", path.name)
        fixed = name in _FIXED and path.parent == folder
        seeds = beside if path.parent == folder else numbered
        if seeds is not None and (fixed or _drawn(name, None if path.parent == folder else path.parent.name, seeds)):
            own.append(path)
        elif name == path.name:
            foreign.append(path)
    if strict and foreign:
        raise FileExistsError(
            f"'{min(foreign)}' is not of a run of lossguide that lies in '{folder}', and --overwrite takes away only "
            "what such a run wrote: move it, or choose another --out"
        )
    for path in own:
        path.unlink()
    if numbered is not None and real_folder(folder / PICTURES):
        for part in list((folder / PICTURES).iterdir()):  # also one for whose first picture the disk had no room
            if re.fullmatch(r"\d{4,}", part.name, re.ASCII) and not part.is_symlink():
                with suppress(OSError):
                    part.rmdir()
    with suppress(OSError):
        (folder / PICTURES).rmdir()


def _named(folder: Path) -> Iterator[Path]:
    """Files that are named as those of a run are."""
    for path in folder.iterdir():
        name = re.sub(r"^\.(.+)\.partial$", r"\1", path.name)
        if name in _FIXED or re.fullmatch(r"\d{5,}\.png", name, re.ASCII):
            yield path
    if real_folder(folder / PICTURES):
        for part in (folder / PICTURES).iterdir():
            if re.fullmatch(r"\d{4,}", part.name, re.ASCII) and real_folder(part):
                yield from (p for p in part.iterdir() if _PICTURE.fullmatch(p.name))


def _drawn(name: str, part: str | None, seeds: Collection[int]) -> bool:
    """Whether a run of these seeds names a picture so, and puts it into this numbered folder where it is in one."""
    seed = int(name.removesuffix(".png"))
    return name == f"{seed:05d}.png" and part in (None, f"{seed // PER_FOLDER:04d}") and seed in seeds


def _written(folder: Path) -> tuple[Collection[int] | None, Collection[int] | None]:
    """The seeds of a run's pictures in its folder, and of those in the numbered folders; twice None without a run."""
    settings, header = _json(folder / SETTINGS), _json(folder / MANIFEST)
    plan = None
    if {"pictures", "first_seed", "batch_size", "settings"} <= header.keys():
        plan = header["first_seed"], header["pictures"]
    elif {"command", "options"} <= settings.keys():
        seeds = settings.get("seeds")
        if not isinstance(seeds, dict):
            return seeds if isinstance(seeds, list) else (), ()
        plan = seeds.get("first"), seeds.get("count")
    if plan is None:
        return None, None
    known = all(type(number) is int for number in plan)
    return (), range(plan[0], plan[0] + plan[1]) if known else ()


def _json(path: Path) -> dict[str, Any]:
    """What a file says, or a manifest's first line; nothing where it is not there, or says something else."""
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            found = parse_json(file.readline(LARGEST_JSON) if path.name == MANIFEST else file.read(LARGEST_JSON))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
