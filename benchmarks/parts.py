"""Runs of many pictures, drawn in parts that are kept: killed at any moment, shared by several processes.

A part's pictures are saved before the row that promises them, beside it and outside of what is committed: a part that
has a row is not drawn again, and distances between sets are taken of the very pictures that were judged.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lossguide.guidance import Guidance
from lossguide.samplers import Denoiser, sample

from .features import Features
from .rows import Rows
from .runs import model_in, now, spent, weights_digest

FOLDER = Path(__file__).parents[1] / ".train"


@dataclass(frozen=True)
class Run:
    """What is drawn: so many pictures, in parts of so many.

    Attributes:
        name: for those who watch.
        key: what tells the run apart from others, as plain data.
        guidance: places in the set -> what guides those pictures; None for nothing.
        judge: pictures `(N, C, H, W)` in [0, 1] and their places -> figures `(N,)` by name.
        count, part: pictures in all and of a part.
        seed: of the first picture; the others follow.
        steps, eta: of the solver.
    """

    name: str
    key: dict
    guidance: Callable[[Sequence[int]], Guidance | None]
    judge: Callable[[torch.Tensor, Sequence[int]], dict[str, torch.Tensor]]
    count: int
    part: int
    seed: int
    steps: int
    eta: float

    def parts(self) -> Iterator[dict]:
        """The key of each part; `first` is the place of its first picture."""
        whole = {**self.key, "steps": self.steps, "eta": self.eta, "seed": self.seed}
        for first in range(0, self.count, self.part):
            yield {**whole, "first": first, "pictures": min(self.part, self.count - first)}


class Parts:
    """The parts that have been drawn with a model: rows, and files of pictures.

    Args:
        load: loads the model, on the processor; it is moved to `device`.
        name: of the folder that they are kept in; parts drawn with other weights are not found.
        fresh: forget what has been drawn.
    """

    def __init__(self, load: Callable[[], Denoiser], name: str, device: str = "cpu", fresh: bool = False):
        self.denoiser, self.weights = model_in(load, torch.float32, device), weights_digest(load)
        self.folder = FOLDER / name
        self.rows = Rows(self.folder / "parts.jsonl", self.weights, fresh)

    def file(self, key: dict, kind: str = "pictures") -> Path:
        """Where the pictures of a part are, or their features."""
        name = json.dumps({**key, "weights": self.weights}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{kind}.npy"

    def draw(self, run: Run) -> bool:
        """Draw the parts that are left and that no other process is at; whether all of them are there."""
        for key in run.parts():
            if self.rows.get(**key) is None:
                with self.rows.claim(**key) as mine:
                    if mine:
                        self.rows.add(self._drawn(run, key))
        return all(self.rows.get(**key) is not None for key in run.parts())

    def _drawn(self, run: Run, key: dict) -> dict:
        places = range(key["first"], key["first"] + key["pictures"])
        guidance, device = run.guidance(places), self.denoiser.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = now(device)
        seeds = [run.seed + place for place in places]
        result = sample(self.denoiser, guidance, steps=run.steps, seeds=seeds, eta=run.eta)
        cost = spent(start, now(device)) | {"visits": len(result.record.rows)}
        if device.type == "cuda":
            cost["peak_memory"] = torch.cuda.max_memory_allocated(device)
        found = {name: values.tolist() for name, values in run.judge(result.images, places).items()}
        save(self.file(key), (result.images.nan_to_num(0.5) * 255).round().byte().numpy())
        mean = ", ".join(f"{name} {np.mean(values):.4g}" for name, values in found.items())
        print(f"{run.name}, pictures {places[0]} to {places[-1]}: {mean}", flush=True)
        return {**key, "figures": found, **cost, "date": time.strftime("%Y-%m-%d")}

    def figures(self, run: Run) -> dict[str, float]:
        """Of a whole run: the judge's means, their standard errors `NAME_error`, and the cost per picture and step.

        Seconds are those of a GPU's clock, or the process's own on a processor, which others' work does not lengthen.
        """
        rows = [self.rows.get(**key) for key in run.parts()]
        clock = "seconds" if self.denoiser.device.type == "cuda" else "processor_seconds"
        seconds = sum(row[clock] for row in rows)
        found = {
            "seconds": seconds / run.count,
            "seconds_per_step": seconds / (len(rows) * run.steps),
            "visits": rows[0]["visits"],
        }
        if "peak_memory" in rows[0]:
            found["peak_memory"] = max(row["peak_memory"] for row in rows)
        for name in rows[0]["figures"]:
            values = np.concatenate([row["figures"][name] for row in rows])
            found |= {name: float(values.mean()), f"{name}_error": float(values.std() / len(values) ** 0.5)}
        return found

    def pictures(self, run: Run) -> torch.Tensor:
        """The pictures of a run, `(N, C, H, W)`, uint8."""
        return torch.from_numpy(np.concatenate([np.load(self.file(key)) for key in run.parts()]))

    def features(self, run: Run, network: Features) -> torch.Tensor:
        """Their features, kept beside them."""
        found = []
        for key in run.parts():
            path = self.file(key, network.name)
            if not path.is_file():
                save(path, network(torch.from_numpy(np.load(self.file(key)))).numpy())
            found.append(np.load(path))
        return torch.from_numpy(np.concatenate(found))


def save(path: Path, array: np.ndarray) -> None:
    """An array in a file that is whole or not there."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, array)
    part.replace(path)
