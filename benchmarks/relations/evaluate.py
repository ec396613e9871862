"""Relation accuracy of guidance by a text: by its cosine, against hard negatives, with word relations, and sums.

    python -m benchmarks run relations

An unconditional model of scenes is guided by a CLIP of scenes, `auto` at its default; a judge that was trained on other
pictures says whether both things are there and where the text puts them. There are two CLIPs that guide: one has been
trained with hard captions, and one as CLIPs are. What word relations need (k, b and their weight) is found on other
prompts. A run is drawn in parts that are kept in `.train/relations`; what is there is not drawn again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lossguide.guidance import Guidance, recipes
from lossguide.guidance.contact_sheet import Block, contact_sheet
from lossguide.losses import ClipText, ContrastiveText, WordRelation
from lossguide.losses.loss import Composable
from torchvision.transforms.functional import gaussian_blur

from ..parts import Parts, Run
from ..rows import Rows, digest_of
from ..runs import about
from . import networks, scenes
from .scenes import FOLDER, LAYOUTS, Layout

RESULTS = Path(__file__).parents[1] / "results"
ETA = 1.0
GAIN = 0.05  # of accuracy over the plain cosine, for a loss to be recommended
SEEDS = {"first": 10_000, "second": 20_000}
FIGURES = ("all", "things", "thing", "axis", "relation")
TAU = 0.02
REFERENCES = 8  # scenes of each prompt that k and b are found on
GUIDES = {"plain": "clip-plain", "hard": "clip"}
"""The CLIPs that guide, trained among captions as they come and among hard ones."""


@dataclass(frozen=True)
class Size:
    """How much is drawn: pictures of each prompt in each of the two sets of seeds, and solver steps; pictures drawn at
    once; prompts to calibrate with and to measure with."""

    pictures: int
    steps: int
    part: int
    prompts: tuple[int, int]


SIZES = {False: Size(1, 25, 24, (12, 24)), True: Size(1, 10, 6, (6, 6))}


def layouts(which: str, size: Size) -> list[Layout]:
    """The prompts' layouts, some to search with, others to measure with; as many side by side as above each other."""
    order = torch.randperm(30, generator=torch.Generator().manual_seed(7)).tolist()
    tried, measured = (count // 2 for count in size.prompts)
    chosen = order[:tried] if which == "search" else order[tried : tried + measured]
    return [LAYOUTS[30 * (i % 2) + place] for place in chosen for i in range(2)]


def prompts(which: str, size: Size, places: Sequence[int]) -> tuple[list[Layout], list[str]]:
    """Layouts and captions of the pictures at these places of a set; all four relations in turn."""
    own = layouts(which, size)
    chosen = [place % len(own) for place in places]
    return [own[i] for i in chosen], [scenes.prompt(own[i], i // 2 % 2) for i in chosen]


def reference() -> tuple[torch.Tensor, list[str]]:
    """Scenes of the guide's half `(N, 3, 32, 32)` as the prompts to calibrate with say, and these."""
    own, texts = prompts("search", SIZES[False], range(SIZES[False].prompts[0] * REFERENCES))
    pictures = scenes.compose(scenes.garments("guide"), own, torch.Generator().manual_seed(1))
    return pictures.expand(-1, 3, -1, -1), texts


def _text(texts: list[str], guide: str) -> Composable:
    return ClipText(texts, model=str(FOLDER / GUIDES[guide]))


def _contrast(texts: list[str], guide: str) -> Composable:
    return ContrastiveText(texts, model=str(FOLDER / GUIDES[guide]))


def _among(texts: list[str], guide: str) -> Composable:
    """The contrast with all the prompts of the task, no two of which can be true of a scene."""
    every = prompts("first", SIZES[False], range(SIZES[False].prompts[1]))[1]
    return ContrastiveText(texts, every, model=str(FOLDER / GUIDES[guide]))


@functools.cache
def calibration(guide: str) -> tuple[float, float]:
    """k and b of the word relations."""
    pictures, texts = reference()
    loss = WordRelation(texts, model=str(FOLDER / GUIDES[guide]), tau=TAU).calibrated(pictures)
    return loss.arguments["scale"], loss.arguments["offset"]


def _relation(texts: list[str], guide: str) -> Composable:
    scale, offset = calibration(guide)
    return WordRelation(texts, model=str(FOLDER / GUIDES[guide]), scale=scale, offset=offset, tau=TAU)


Maker = Callable[[list[str], str], Composable]
METHODS: dict[str, tuple[Maker, Maker | None, float]] = {
    "ClipText": (_text, None, 0.0),
    "ContrastiveText": (_contrast, None, 0.0),
    "ContrastiveText, all prompts": (_among, None, 0.0),
    "ClipText + ContrastiveText": (_text, _contrast, 1.0),
    "ClipText + WordRelation": (_text, _relation, 1 / 3),
    "ContrastiveText + WordRelation": (_contrast, _relation, 1 / 3),
}
"""What guides, what is added to it, and how long its gradient is beside the other's where guidance starts."""


@functools.cache
def weight(method: str, guide: str) -> float:
    """The weight of what is added: its gradient's share of the other's, at blurred scenes that show other things."""
    main, more, share = METHODS[method]
    if more is None:
        return 0.0
    pictures, texts = reference()
    blurred = gaussian_blur(pictures.roll(7, 0), 9, 3.0)

    def length(loss: Composable) -> float:
        leaf = blurred.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
        return gradient.flatten(1).norm(dim=1).median().item()

    return float(f"{share * length(main(texts, guide)) / length(more(texts, guide)):.2g}")


def loss_of(method: str, guide: str, texts: list[str]) -> Composable:
    """What guides to these texts."""
    main, more, _ = METHODS[method]
    if more is None:
        return main(texts, guide)
    return main(texts, guide) + weight(method, guide) * more(texts, guide)


UNGUIDED, PLAIN = "unguided", "ClipText"


def planned(method: str, guide: str, which: str, size: Size) -> Run:
    """A run of a method with a CLIP (neither for the unguided) on a set of seeds."""

    def guidance(places: Sequence[int]) -> Guidance | None:
        return None if method == UNGUIDED else recipes.auto(loss_of(method, guide, prompts(which, size, places)[1]))

    def judge(images: torch.Tensor, places: Sequence[int]) -> dict[str, torch.Tensor]:
        found = networks.judged(_judge(), images, prompts(which, size, places)[0])
        return {name: values.float() for name, values in found.items()}

    trained = _trained("judge", *([] if method == UNGUIDED else [GUIDES[guide]]))
    key = dict(method=method, guide=guide, set=which, trained=trained, settings=digest_of(recipes.auto(None)))
    if method != UNGUIDED and METHODS[method][1] is not None:
        key |= dict(weight=weight(method, guide))
    count = size.pictures * size.prompts[1]
    name = f"{method}, {guide}, {which}"
    return Run(name, key, guidance, judge, count, min(size.part, count), SEEDS[which], size.steps, ETA)


@functools.cache
def _judge() -> networks.Judge:
    return networks.load_judge()


def _facts(name: str) -> dict:
    return json.loads((FOLDER / f"{name}_training.json").read_text())


def _trained(*names: str) -> str:
    """What tells networks from others that were trained."""
    return "-".join(f"{_facts(name)['loss']:.6f}" for name in names)


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure the methods, or `only` some; the report holds those that are drawn."""
    names = (UNGUIDED, *METHODS)
    for name in only:
        if name not in names:
            raise SystemExit(f"there is no method {name!r}; there are {', '.join(names)}")
    lacking = networks.missing()
    if lacking is not None:
        print(f"{lacking}; skipped")
        return
    torch.set_num_threads(1)
    size, file = SIZES[quick], "relations-quick" if quick else "relations"
    if fresh:
        (RESULTS / f"{file}.jsonl").unlink(missing_ok=True)
    parts = Parts(networks.load_model, file, fresh=fresh)
    plan = [(UNGUIDED, ""), *((method, guide) for method in METHODS for guide in GUIDES)]
    found: dict[tuple[str, str], list[Run]] = {}
    for method, guide in plan:
        if not only or method in only:
            runs = [planned(method, guide, which, size) for which in ("first", "second")]
            done = [parts.draw(one) for one in runs]
            if all(done):
                found[method, guide] = runs
                if (PLAIN, next(reversed(GUIDES))) in found and not only:  # what there is, as it comes
                    write(parts, found, size, file)


# ---- the report ----------------------------------------------------------------------------------------------------


def values(parts: Parts, runs: Sequence[Run], figure: str) -> torch.Tensor:
    """The judge's figure of every picture of some runs."""
    rows = [parts.rows.get(**key) for run in runs for key in run.parts()]
    return torch.tensor([value for row in rows for value in row["figures"][figure]])


def mean(numbers: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return numbers.mean().item(), (numbers.std(correction=0) / len(numbers) ** 0.5).item()


def write(parts: Parts, found: dict[tuple[str, str], list[Run]], size: Size, file: str) -> None:
    """Rows, the table and contact sheets of what has been drawn."""
    rows, done = Rows(RESULTS / f"{file}.jsonl", parts.weights), []
    for (method, guide), runs in found.items():
        own = values(parts, runs, "all")
        key = runs[0].key | dict(set="both", steps=size.steps, pictures=len(own))
        row = rows.get(**key)
        if row is None:
            figures = {figure: mean(values(parts, runs, figure)) for figure in FIGURES}
            sets = [mean(values(parts, [one], "all"))[0] for one in runs]
            plain = found.get((PLAIN, guide))
            gain = None if plain is None or method == PLAIN else mean(own - values(parts, plain, "all"))
            cost = sum(parts.figures(one)["seconds"] for one in runs) / len(runs)
            row = rows.add(key | dict(figures=figures, sets=sets, gain=gain, seconds=cost, **about()))
        done.append(row)
    (RESULTS / f"{file}.md").write_text(report(done, size, file))
    texts = prompts("first", size, range(3))[1]
    for guide in GUIDES:
        shown = [
            Block(name, parts.pictures(runs[0])[:24] / 255, 3)
            for (name, own), runs in found.items()
            if own in (guide, "")
        ]
        contact_sheet(shown, f"the first row: {'; '.join(texts)}").save(RESULTS / f"{file}-{guide}.png")
    print(RESULTS / f"{file}.md")


def report(rows: list[dict], size: Size, file: str) -> str:
    """The tables in Markdown."""
    count, judge, unet = rows[0]["pictures"], _facts("judge"), _facts("unet")
    known = "; ".join(
        f"{guide}, {_facts(name)['accuracy']:.3f} of the sixty captions, and {_facts(name)['accuracy_of_places']:.3f} "
        "of a caption among those of the same things in other places"
        for guide, name in GUIDES.items()
    )
    quick = " --quick" if file.endswith("quick") else ""
    example = prompts("first", size, [0])[1][0]
    lines = [
        "# Relations: are things where the text puts them?",
        "",
        f"`python -m benchmarks run relations{quick}`, after `python -m benchmarks.relations.train`",
        "",
        f"Scenes of two garments of Fashion-MNIST ({', '.join(scenes.CLASSES)}), side by side or one above the other. "
        f'{size.prompts[1]} prompts such as "{example}", {count} pictures of each method in two sets of seeds, `auto` '
        f"at its default, DDIM, {size.steps} steps, eta {ETA:g}; the same prompts and seeds for all methods.",
        "",
        "All: both things and where they are are right, to a judge that was trained on the other half of the garments "
        f"(on held-out scenes it is right on {judge['all']:.3f} in all, {judge['thing']:.3f} of the things, "
        f"{judge['axis']:.3f} of the axes). Things: both are there, wherever; thing: the share of the two that is "
        "there. Axis: side by side or above each other. Relation: the axis, and what is there of the two on its own "
        "side.",
        "",
        "Two CLIPs guide. *hard* was trained with the same things in other places among the negatives of every scene, "
        "*plain* for half as long among captions as they come, a third of which say where things are. Of held-out "
        f"scenes they know: {known}. The diffusion model: {unet['parameters'] / 1e6:.1f} M parameters, {unet['steps']} "
        "steps. The weight is that of the second term: its gradient is then as long as the first one's "
        "(ContrastiveText) or a third of that (WordRelation) at blurred scenes of other prompts, where k and b are "
        "from, too. "
        "Errors are standard errors over pictures; the gain is paired, picture by picture.",
        "",
        "| guide | method | weight | all | gain over ClipText | first, second seeds | things | thing | axis | relation "
        "| s per picture |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figure = {name: f"{value:.3f} ± {error:.3f}" for name, (value, error) in row["figures"].items()}
        gain = f"{row['gain'][0]:+.3f} ± {row['gain'][1]:.3f}" if row["gain"] else ""
        weight = f"{row['weight']:g}" if "weight" in row else ""
        sets = ", ".join(f"{value:.3f}" for value in row["sets"])
        others = " | ".join(figure[name] for name in FIGURES[1:])
        lines.append(
            f"| {row['guide']} | {row['method']} | {weight} | {figure['all']} | {gain} | {sets} | {others} | "
            f"{row['seconds']:.2f} |"
        )
    lines += ["", verdict(rows), ""]
    pictures = ", ".join(f"[{guide}]({file}-{guide}.png)" for guide in GUIDES)
    return "\n".join([*lines, f"Pictures: {pictures}.", ""])


def verdict(rows: list[dict]) -> str:
    """Which methods gain as much as it takes to be recommended, beyond twice the error, and lose with no guide."""
    ahead: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["method"] != UNGUIDED and row["gain"]:
            ahead.setdefault(row["method"], []).append(tuple(row["gain"]))
    enough = [
        name
        for name, gains in ahead.items()
        if any(gain >= GAIN and gain > 2 * error for gain, error in gains)
        and all(gain > -2 * error or gain > -GAIN for gain, error in gains)
    ]
    rest = [name for name in ahead if name not in enough]
    found = f"Recommended, as they gain {GAIN:.2f} and more over ClipText: {', '.join(enough)}. " if enough else ""
    return found + (f"No such gain, and not recommended: {', '.join(rest)}." if rest else "")
