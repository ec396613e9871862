"""Measured rows in a JSON-lines file that several processes share (Unix: file locks)."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lossguide.guidance import Guidance
from lossguide.samplers.plain import plain


def digest_of(guidance: Guidance) -> str:
    """A short digest of a guidance's settings but its loss, so that rows of other settings are not mixed in.

    Fields that are left alone do not count, so that the digest outlives a new field of Guidance.
    """
    fields = [field for field in dataclasses.fields(guidance) if field.name not in ("loss", "citation")]
    values = {field.name: getattr(guidance, field.name) for field in fields}
    settings = {f.name: plain(values[f.name]) for f in fields if f.name == "rule" or values[f.name] != f.default}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class Rows:
    """Measured rows in a JSON-lines file, found again by what was run.

    Args:
        path: the file; it is made with its first row.
        weights: a digest of the weights; rows of other weights are not found.
        fresh: forget what the file holds.
    """

    def __init__(self, path: Path, weights: str, fresh: bool = False):
        self.path, self.weights = path, weights
        self._read: tuple[object, list[dict]] = (None, [])
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)

    def all(self) -> list[dict]:
        """Every row of these weights, in the order measured."""
        if not self.path.exists():
            return []
        stat = self.path.stat()
        state = (stat.st_mtime_ns, stat.st_size)
        if self._read[0] != state:
            rows = []
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # torn by a kill; it will be measured again
                if isinstance(row, dict) and row.get("weights") == self.weights:
                    rows.append(row)
            self._read = (state, rows)
        return self._read[1]

    def get(self, **key) -> dict | None:
        """The row that agrees with the key, or None."""
        return next((row for row in self.all() if all(row.get(k) == v for k, v in key.items())), None)

    def add(self, row: dict) -> dict:
        """Append a row, whole, also where several processes append at once."""
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            torn = False
            if file.seek(0, 2):
                file.seek(-1, 2)
                torn = file.read(1) != b"\n"
            file.write(b"\n" * torn + json.dumps(row | {"weights": self.weights}).encode() + b"\n")
        return row

    @contextmanager
    def claim(self, **key) -> Iterator[bool]:
        """Whether this process is to measure the run: it is not there yet, and no other process is at it.

        The claim is a lock on a file beside the rows, which the system lets go when its process ends, however it ends.
        """
        name = hashlib.sha256(json.dumps(key | {"weights": self.weights}, sort_keys=True).encode()).hexdigest()[:16]
        path = self.path.with_name(f"{self.path.stem}.{name}.claim")
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                yield self.get(**key) is None  # looked up under the lock: the last owner may have just measured it
            finally:
                path.unlink(missing_ok=True)
