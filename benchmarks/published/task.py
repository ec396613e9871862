"""What a published comparison is: what it needs, who does what, and the figures to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lossguide.guidance import Augment


@dataclass(frozen=True)
class Part:
    """Something that the user puts into the folder of weights.

    Attributes:
        paths: where in the folder it may be; the first that is there counts.
        what: it is.
        where: it is to be had.
        optional: whether the task runs without it, with fewer figures.
    """

    paths: tuple[str, ...]
    what: str
    where: str
    optional: bool = False

    def find(self, folder: Path) -> Path | None:
        """Where it is in a folder."""
        return next((folder / path for path in self.paths if (folder / path).exists()), None)


@dataclass(frozen=True)
class Row:
    """One row of a comparison.

    Attributes:
        name: for the report; the published name where there is one.
        recipe: of `lossguide.guidance.recipes`, or "unguided".
        settings: keyword arguments of the recipe.
        copies: augmented copies of each picture; None leaves the recipe's own.
        published: figures by their names in the report, by the number of steps.
    """

    name: str
    recipe: str
    settings: Mapping = field(default_factory=dict)
    copies: int | None = None
    published: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def change(self) -> dict:
        """The keyword arguments of the recipe, with the augmentation."""
        if self.copies is None:
            return dict(self.settings)
        return {**self.settings, "augment": Augment(self.copies) if self.copies else None}


@dataclass(frozen=True)
class Published:
    """A published comparison.

    Attributes:
        about: it, in a line.
        source: the paper and the table.
        needs: parts of the folder of weights by the names that `wanted` knows them by.
        wanted: what is wanted of the pictures, one of `wants.WANTED`, and its settings.
        rows: who does it.
        figures: what the report shows, by name: how it is called, and how many digits.
        steps: numbers of solver steps, each a run of every row.
        eta: stochasticity of DDIM.
        pictures, batch: in all, and drawn at once.
        note: what is not as published, or not known.
    """

    about: str
    source: str
    needs: Mapping[str, Part]
    wanted: str
    rows: Sequence[Row]
    figures: Mapping[str, tuple[str, int]]
    settings: Mapping = field(default_factory=dict)
    steps: tuple[int, ...] = (100,)
    eta: float = 1.0
    pictures: int = 1000
    batch: int = 16
    note: str = ""

    def missing(self, folder: Path | None) -> str | None:
        """What lacks in a folder, in one sentence; None when the task can run."""
        parts = [part for part in self.needs.values() if not part.optional]
        parts = [part for part in parts if folder is None or part.find(folder) is None]
        if not parts:
            return None
        lacking = "; ".join(f"{' or '.join(part.paths)}, {part.what} ({part.where})" for part in parts)
        return f"--weights FOLDER {'is to hold' if folder is None else f'{folder} lacks'} {lacking}"
