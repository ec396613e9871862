"""Run a published comparison with the user's weights, and write its table beside the published figures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lossguide.guidance import Guidance, recipes

from ..features import Features, distances, features
from ..parts import Parts, Run, save
from ..rows import Rows, digest_of
from ..runs import about
from . import models
from .task import Published, Row
from .tasks import TASKS
from .wants import WANTED, Wanted

RESULTS = Path(__file__).parents[1] / "results"
QUICK = dict(pictures=2, batch=2, steps=(3,))


def run(
    name: str, weights: str | None = None, quick: bool = False, fresh: bool = False, only: Sequence[str] = ()
) -> None:
    """Run a comparison; what is drawn already is not drawn again.

    Args:
        name: one of `tasks.TASKS`.
        weights: the folder that holds what the task needs.
        quick: two pictures, three steps, to see that it runs; not for figures.
        fresh: draw and measure again.
        only: only these rows, by their names in the table; then nothing is written.

    Raises:
        SystemExit: something that the task needs is not in the folder, or there is no such row; it says what and where
            it is to be had.
    """
    task = TASKS[name]
    folder = None if weights is None else Path(weights)
    lacking = task.missing(folder)
    if lacking is not None:
        raise SystemExit(f"{name}: {lacking}")
    unknown = [one for one in only if one not in [row.name for row in task.rows]]
    if unknown:
        raise SystemExit(f"{name} has no row {unknown[0]!r}; it has {', '.join(row.name for row in task.rows)}")
    found = {key: part.find(folder) for key, part in task.needs.items()}
    found = {key: path for key, path in found.items() if path is not None}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    label = f"{name}-quick" if quick else name
    network = features() if "fid" in task.figures else None  # lacks now rather than when all is drawn
    if fresh:
        (RESULTS / f"{label}.jsonl").unlink(missing_ok=True)
    parts = Parts(lambda: models.load_denoiser(found["denoiser"]), label, device, fresh)
    wanted = WANTED[task.wanted](found, parts.denoiser.shape[-1], device, **task.settings)
    size = QUICK if quick else dict(pictures=task.pictures, batch=task.batch, steps=task.steps)
    rows = [row for row in task.rows if not only or row.name in only]
    inputs = digest_of_inputs(found)
    plan = [(row, planned(task, row, wanted, steps, size, inputs)) for steps in size["steps"] for row in rows]
    done = [parts.draw(run) for _, run in plan]
    if all(done) and not only:
        measured = [(row, run.steps, figures(parts, run, network, found, label)) for row, run in plan]
        (RESULTS / f"{label}.md").write_text(report(name, task, measured, network, quick))
        print(RESULTS / f"{label}.md")


def digest_of_inputs(found: dict[str, Path]) -> str:
    """A short digest of the folder's files by name and size, and of the texts, so that rows of others are not mixed in.

    The denoiser's weights have a digest of their own.
    """
    seen = []
    for key, path in sorted(found.items()):
        if key != "denoiser":
            files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
            seen += [f"{key} {one.relative_to(path.parent)} {one.stat().st_size}" for one in files]
            seen += [path.read_text()] if key == "prompts" else []
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:12]


def planned(task: Published, row: Row, wanted: Wanted, steps: int, size: dict, inputs: str) -> Run:
    """A row's run at so many steps."""

    def guidance(places: Sequence[int]) -> Guidance | None:
        return None if row.recipe == "unguided" else recipes.get(row.recipe)(wanted.loss(places), **row.change())

    settings = None if row.recipe == "unguided" else digest_of(guidance(range(1)))
    key = dict(recipe=row.recipe, settings=settings, inputs=inputs)
    batch = min(size["batch"], size["pictures"])
    return Run(f"{row.name}, {steps} steps", key, guidance, wanted.judge, size["pictures"], batch, 0, steps, task.eta)


def figures(parts: Parts, run: Run, network: Features | None, found: dict[str, Path], label: str) -> dict[str, float]:
    """The figures of a run, from its row or measured; FID is to all real pictures of the folder."""
    rows = Rows(RESULTS / f"{label}.jsonl", parts.weights)
    key = {**run.key, "steps": run.steps, "eta": run.eta, "pictures": run.count}
    key["features"] = None if network is None else network.name
    row = rows.get(**key)
    if row is None:
        far = {}
        if network is not None:
            network.network.to(parts.denoiser.device)
            real = real_features(network, found["pictures"], parts.denoiser.shape[-1], parts.folder)
            far = distances(parts.features(run, network), real)
        row = rows.add({**key, **parts.figures(run), **far, **about(parts.denoiser.device)})
    return row


def real_features(network: Features, folder: Path, side: int, kept: Path) -> torch.Tensor:
    """Features of the pictures in a folder, kept for the next run."""
    files = models.picture_files(folder)
    name = hashlib.sha256("\n".join([str(side), *map(str, files)]).encode()).hexdigest()[:16]
    path = kept / f"{name}-{network.name}.npy"
    if not path.is_file():
        parts = [files[i : i + 50] for i in range(0, len(files), 50)]
        save(path, torch.cat([network(models.read_pictures(part, side)) for part in parts]).numpy())
    return torch.from_numpy(np.load(path))


def report(
    name: str, task: Published, measured: list[tuple[Row, int, dict]], network: Features | None, quick: bool
) -> str:
    """The table in Markdown: what was measured, and in brackets what was published."""
    count = measured[0][2]["pictures"]
    lines = [
        f"# {task.about}",
        "",
        f"`python -m benchmarks run {name} --weights FOLDER{' --quick' if quick else ''}`",
        "",
        f"{task.source}; its figures are in brackets. Here: {count} pictures, DDIM, eta {task.eta:g}, on "
        f"{measured[0][2]['device']}." + (f" FID in {network.about}." if network is not None else ""),
        *(["", task.note] if task.note else []),
        "",
        "| method | steps | " + " | ".join(title for title, _ in task.figures.values()) + " |",
        "|---|---|" + "---|" * len(task.figures),
    ]
    for row, steps, found in measured:
        told = row.published.get(steps, {})
        cells = []
        for key, (_, digits) in task.figures.items():
            cell = "" if found.get(key) is None else f"{found[key]:.{digits}f}"
            error = found.get(f"{key}_error")
            cell += "" if error is None else f" ± {error:.{digits}f}"
            cells.append(f"{cell} ({told[key]:g})" if key in told else cell)
        lines.append(f"| {row.name} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
