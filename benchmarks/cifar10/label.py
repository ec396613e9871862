"""CIFAR-10 label guidance in the protocol of the field (Ye et al. 2024): ResNet20 guides, ResNet56 judges.

    python -m benchmarks run cifar10

Accuracy and confidence of the judge, FID and KID to the test set. Strengths other than the default are searched with
the judge on other seeds. A run is drawn in parts that are kept with their pictures in `.train/cifar10`; parts that are
there are not drawn again, and several processes share them. One row per run goes to `results/cifar10.jsonl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lossguide.guidance import Guidance, recipes
from lossguide.guidance.contact_sheet import Block, contact_sheet

from ..features import Features, distances, features
from ..parts import Parts, Run, save
from ..rows import Rows, digest_of
from ..runs import about
from ..work_cifar import SEEDS, judged, labels_of, loss
from . import classifiers, data, model

RESULTS = Path(__file__).parents[1] / "results"
ETA = 1.0


@dataclass(frozen=True)
class Size:
    """How much is drawn: pictures, of a part, of a set that strengths are searched on; solver steps; and how many test
    pictures distances are taken to."""

    count: int
    part: int
    searched: int
    steps: int
    real: int


SIZES = {
    "cuda": Size(count=10_000, part=500, searched=500, steps=100, real=10_000),
    "cpu": Size(count=100, part=20, searched=20, steps=25, real=1000),
    "quick": Size(count=20, part=10, searched=0, steps=10, real=100),
}
TRIED = {"tfg": (4.0, 16.0, 64.0), "dps": (4.0, 16.0, 64.0), "mpgd": (2.0, 4.0, 8.0)}
"""Strengths that are tried beside 1, of the recipes that have one to be found."""
SHOWN = 10
ROUGH = 0.15  # mean difference of neighbouring values; of test pictures it is 0.131 at most
METHODS = ("unguided", "auto", "tfg", "dps", "mpgd")
PUBLISHED = "TFG as published, with another model and 100 steps: accuracy 0.520, with recurrence 0.771"


def planned(recipe: str, strength: float, which: str, size: Size) -> Run:
    """A run of a recipe at a strength, on the set "search" or "evaluation"."""
    change = {} if strength == 1 else {"strength": strength}

    def guidance(places: Sequence[int]) -> Guidance | None:
        return None if recipe == "unguided" else recipes.get(recipe)(loss(places), **change)

    def judge(images: torch.Tensor, places: Sequence[int]) -> dict[str, torch.Tensor]:
        return judged(images, labels_of(places))

    settings = None if recipe == "unguided" else digest_of(guidance(range(1)))
    key = dict(recipe=recipe, change=change, settings=settings)
    name = f"{recipe} {strength:g}, {which}"
    count = size.searched if which == "search" else size.count
    return Run(name, key, guidance, judge, count, min(size.part, count), SEEDS[which], size.steps, ETA)


def real_features(network: Features, split: str, count: int) -> torch.Tensor:
    """Features of the first pictures of a split, kept beside the data."""
    path = data.FOLDER / f"features-{network.name}-{split}-{count}.npy"
    if not path.is_file():
        save(path, network(data.cifar10(split)[0][:count]).numpy())
    return torch.from_numpy(np.load(path))


def rough(pictures: torch.Tensor) -> torch.Tensor:
    """Which pictures `(N, 3, H, W)`, uint8, are nearer to noise than to pictures: 1 or 0, `(N,)`."""
    values = pictures.float() / 255
    across = [values.diff(dim=dim).abs().flatten(1) for dim in (2, 3)]
    return (torch.cat(across, 1).mean(1) > ROUGH).float()


def missing() -> str | None:
    """What the task lacks on this machine, in one sentence."""
    if not classifiers.available():
        return "the classifiers of CIFAR-10 are not in ../shared/real/cifar10"
    if not model.available():
        return model.MISSING.format(folder=model.MODEL)
    return None if data.available() else data.MISSING.format(folder=data.FOLDER)


def runs(parts: Parts, recipe: str, size: Size) -> list[Run]:
    """The evaluation at strength 1, and at the best of those tried where that is another; draws for the search."""
    best = 1.0
    if size.searched and recipe in TRIED:
        tried = (1.0, *TRIED[recipe])
        search = [planned(recipe, strength, "search", size) for strength in tried]
        whole = [parts.draw(run) for run in search]
        if all(whole):  # else another process is still at it
            accuracy = [parts.figures(run)["accuracy"] for run in search]
            best = tried[accuracy.index(max(accuracy))]
    return [planned(recipe, strength, "evaluation", size) for strength in dict.fromkeys([1.0, best])]


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure the methods, or `only` some recipes; the process that finds everything drawn writes the report."""
    for name in only:
        if name != "unguided":
            recipes.get(name)  # says which there are
    lacking = missing()
    if lacking is not None:
        print(f"{lacking}; skipped")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, name = SIZES["quick" if quick else device], "cifar10-quick" if quick else "cifar10"
    network = features()  # lacks now rather than when all is drawn
    if fresh:
        (RESULTS / f"{name}.jsonl").unlink(missing_ok=True)
    parts = Parts(model.load, name, device, fresh)
    plan = {recipe: runs(parts, recipe, size) for recipe in (only or METHODS)}
    done = [parts.draw(run) for of_recipe in plan.values() for run in of_recipe]
    if all(done) and not only:
        write(parts, [run for of_recipe in plan.values() for run in of_recipe], network, name, size)


def write(parts: Parts, done: list[Run], network: Features, name: str, size: Size) -> None:
    """Rows, the table and the contact sheet of what has been drawn."""
    network.network.to(parts.denoiser.device)
    real = real_features(network, "test", size.real)
    rows, found = Rows(RESULTS / f"{name}.jsonl", parts.weights), []
    for run in done:
        key = {**run.key, "steps": run.steps, "eta": run.eta, "pictures": run.count, "features": network.name}
        row = rows.get(**key)
        if row is None:
            figures = parts.figures(run) | distances(parts.features(run, network), real)
            figures["rough"] = rough(parts.pictures(run)).mean().item()
            row = rows.add({**key, "first_seed": run.seed, **figures, **about(parts.denoiser.device)})
        found.append(row)
    training = distances(real_features(network, "train", size.count), real)
    (RESULTS / f"{name}.md").write_text(report(found, training, model.training(), network, size, name))
    blocks = [Block(_strength(row), parts.pictures(run)[:SHOWN] / 255, 2) for run, row in zip(done, found)]
    contact_sheet(blocks, f"row by row: {', '.join(data.CLASSES)}").save(RESULTS / f"{name}.png")
    print(RESULTS / f"{name}.md")


def report(rows: list[dict], training: dict, facts: dict, network: Features, size: Size, name: str) -> str:
    """The table in Markdown; `training` are the distances of training pictures, `facts` how the model was trained."""
    count, base = size.count, rows[0]["seconds"]
    trained = (
        f"{facts['parameters'] / 1e6:.1f} M parameters, trained in {facts['minutes']:.0f} minutes on {facts['device']} "
        f"on {facts['pictures'] / 50_000:.1f} times the training set"
    )
    weak = " **A weak model: its figures compare methods, not models.**" if facts["device"] == "cpu" else ""
    lines = [
        "# CIFAR-10, guided to a label",
        "",
        "`python -m benchmarks run cifar10`, after `python -m benchmarks.cifar10.train`",
        "",
        f"ResNet20 guides, ResNet56 judges. {count} pictures, {count // 10} of each class, DDIM, {size.steps} steps, "
        f"eta {ETA:g}, on {rows[0]['device']}. The model: {trained}.{weak}",
        "",
        f"FID and KID (x 1000, with its deviation over subsets) to {size.real:,} test pictures, in {network.about}. "
        "FID of few pictures is too high: compare it within this table. Rough: the share of pictures "
        f"that are noise, whose neighbouring values differ by {ROUGH:g} and more (0.131 at most in a real one); a "
        "judge may still take them for the class. Errors are standard errors over pictures. "
        "Seconds on a processor are the process's own.",
    ]
    if size.searched:
        lines.append(f"A strength other than 1 is the best, to the judge, of {size.searched} pictures of other seeds.")
    lines += [
        "",
        "Guide and judge are of one family: what fools the one may fool the other, so look at "
        f"[the pictures]({name}.png). {PUBLISHED}.",
        "",
        "| method | strength | accuracy | confidence | FID | KID | rough | s per picture | x unguided |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        strength = "" if row["recipe"] == "unguided" else f"{row['change'].get('strength', 1):g}"
        judged = " | ".join(f"{row[name]:.3f} ± {row[f'{name}_error']:.3f}" for name in ("accuracy", "confidence"))
        cost = f"{row['seconds']:.2f} | {row['seconds'] / base:.1f}"
        lines.append(f"| {row['recipe']} | {strength} | {judged} | {_far(row)} | {row['rough']:.2f} | {cost} |")
    lines.append(f"| {count} training pictures | | | | {_far(training)} | | | |")
    return "\n".join(lines) + "\n"


def _strength(row: dict) -> str:
    return " ".join([row["recipe"], *(f"{value:g}" for value in row["change"].values())])


def _far(far: dict[str, float]) -> str:
    return f"{far['fid']:.1f} | {1000 * far['kid']:.1f} ± {1000 * far['kid_spread']:.1f}"
