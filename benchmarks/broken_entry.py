"""One entry of the corpus of `benchmarks.broken`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

READ = ""  # what an entry is answered with that is unusual, and read all the same


class Entry(NamedTuple):
    """Something that a user, or who sends files to users, may give to lossguide.

    Attributes:
        name: what is wrong with it.
        kind: what it is given as: a picture, weights ...; see `benchmarks.broken.READERS` and `COMMANDS`.
        build: makes it in an empty folder, always the same, and returns what to give.
        says: a part of the sentence that it is refused with; `READ` where it is read.
    """

    name: str
    kind: str
    build: Callable[[Path], Path]
    says: str

    @property
    def id(self) -> str:
        """The entry's name among all."""
        return f"{self.kind}: {self.name}"
