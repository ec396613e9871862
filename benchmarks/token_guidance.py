"""Text guidance of demo-tokens by the demo's CLIP, for all ten classes, judged by a network that never guides.

One row per run goes to `results/token-guidance.jsonl` as soon as it is measured; a run that is there already, with the
same weights and settings, is not repeated.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import torch
from lossguide.guidance import Guidance, recipes
from lossguide.guidance.contact_sheet import Block, contact_sheet
from lossguide.guidance.guidance import Inner
from lossguide.guidance.steps import Fisher, PolyakToFloor
from lossguide.guidance.tokens import for_tokens
from lossguide.losses import ClipText
from lossguide.losses.demo import CLASSES
from lossguide.samplers import Result, TokenGenerator, sample
from lossguide.samplers.demo_tokens import FOLDER, load_demo_tokens

from .demo_text import Judge
from .metrics import frechet, jackknife
from .rows import Rows, digest_of

RESULTS = Path(__file__).parent / "results"
STEPS, SEED = 8, 1000  # the settings were chosen on seeds below 100
PER_CLASS, QUICK = 10, 3
"""Pictures of each class, and with `--quick`."""
ONCE = dict(time_travel=None)
WAYS = {
    "unguided": None,
    "auto": dict(),
    "no re-masking": ONCE,
    "no re-masking, no augmentation": ONCE | dict(augment=None),
    "no re-masking, no cap": ONCE | dict(inner=Inner(5, Fisher())),
    "no re-masking, plain gradient": ONCE | dict(inner=Inner(5, PolyakToFloor(cap=1.0))),
    "no re-masking, 1 inner step": ONCE | dict(inner=1),
    "no re-masking, 2 inner steps": ONCE | dict(inner=2),
    "no re-masking, 3 inner steps": ONCE | dict(inner=3),
    "8 candidates, no gradient": dict(inner=0, candidates=8, sharpness=300.0),
    "no re-masking, gradient and 4 candidates": ONCE | dict(candidates=4, sharpness=300.0),
}
ABOUT = {
    "auto": "`recipes.auto(loss)` as it is: 5 natural steps on the logits, each of a root mean square of 1 at most, 4 "
    "augmented copies; the steps from a quarter to three quarters of the way are taken twice, the least confident "
    "tokens masked again in between",
    "no re-masking, no cap": "the steps as long as Polyak's rule makes them",
    "no re-masking, plain gradient": "the steps along the gradient in the logits instead of the natural one",
}


def prompts() -> list[str]:
    """The ten prompts, one per class."""
    return [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in CLASSES]


def guidance_of(way: str, labels: torch.Tensor) -> Guidance | None:
    """What steers in a row of the table, toward one prompt per picture."""
    settings = WAYS[way]
    if settings is None:
        return None
    loss = ClipText([prompts()[c] for c in labels], model="demo")
    return recipes.tokens(loss, **settings) if settings else recipes.auto(loss)


def generate(model: TokenGenerator, way: str, per_class: int) -> tuple[Result, torch.Tensor, float]:
    """`per_class` pictures of each class, their labels, and seconds per picture."""
    found, labels, seconds = [], torch.arange(10).repeat(per_class), 0.0
    for start in range(0, len(labels), 40):
        wanted = labels[start : start + 40]
        begun = time.process_time()
        seeds = range(SEED + start, SEED + start + len(wanted))
        found.append(sample(model, guidance_of(way, wanted), steps=STEPS, seeds=seeds))
        seconds += time.process_time() - begun
    return torch.cat([one.images for one in found]), labels, seconds / len(labels)


def measured(judge: Judge, images: torch.Tensor, labels: torch.Tensor) -> dict:
    """Figures of pictures, each with its standard error where it has one."""
    with torch.no_grad():
        features, found = judge.network.features(images), judge(images, labels)
    features = features[labels.argsort(stable=True)]  # each group of the jackknife has pictures of all classes
    distance = lambda some: {"frechet": frechet(some, judge.features)}
    error = lambda share: (share * (1 - share) / len(labels)) ** 0.5
    return dict(
        accuracy=found["accuracy"],
        accuracy_error=error(found["accuracy"]),
        guide_accuracy=found["guide_accuracy"],
        per_class=found["per_class"],
        frechet=distance(features)["frechet"],
        frechet_error=jackknife(distance, features)["frechet"],
    )


def weights_digest() -> str:
    """A short digest of the generator's weights, so that rows of other weights are not mixed in."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure every row, or `only` some; write rows, contact sheets and, of all there is, `results/token-guidance.md`.

    Raises:
        FileNotFoundError: the generator's weights, or Fashion-MNIST, are not at hand.
    """
    if not any(FOLDER.glob("transformer/*.safetensors")):
        raise FileNotFoundError("no weights of demo-tokens: `python -m benchmarks.demo.train_tokens` trains them")
    model, judge = load_demo_tokens(), Judge()
    name = "token-guidance-quick" if quick else "token-guidance"
    rows = Rows(RESULTS / f"{name}.jsonl", weights_digest(), fresh)
    unknown = set(only) - set(WAYS)
    if unknown:
        raise ValueError(f"there is no row {', '.join(sorted(unknown))}; rows are {', '.join(WAYS)}")
    per_class, done = QUICK if quick else PER_CLASS, []
    for way in WAYS:
        guidance = guidance_of(way, torch.arange(1))
        key = dict(way=way, pictures=10 * per_class, steps=STEPS, seed=SEED)
        key["settings"] = None if guidance is None else digest_of(for_tokens(guidance))
        sheet = RESULTS / f"{name}-{way}.png" if way in ("unguided", "auto") else None
        row = rows.get(**key)
        if only and way not in only:
            done += [row] if row else []
            continue
        if row is None or (sheet is not None and not sheet.exists()):
            images, labels, seconds = generate(model, way, per_class)
            row = key | measured(judge, images, labels) | dict(seconds=seconds)
            rows.add(row)
            if sheet is not None:
                order = torch.argsort(labels, stable=True).view(10, -1)[:, :12].flatten()
                columns = min(12, per_class)
                contact_sheet([Block(way, images[order][: 10 * columns], columns)], "").save(sheet)
        done.append(row)
        print(
            f"{way:26} judge {row['accuracy']:.3f}  guide {row['guide_accuracy']:.3f}  Frechet {row['frechet']:.2f} "
            f"+- {row['frechet_error']:.2f}  {row['seconds']:.2f} s a picture",
            flush=True,
        )
    report = table(done, judge)
    (RESULTS / f"{name}.md").write_text(report)
    print(report)


def table(rows: list[dict], judge: Judge) -> str:
    """The report in Markdown."""
    by_way = {row["way"]: row for row in rows}
    lines = [
        f"# Text guidance of masked tokens: ten prompts, {rows[0]['pictures']} pictures a row, {STEPS} steps",
        "",
        "`python -m benchmarks run token-guidance`",
        "",
        "The generator knows no classes; `ClipText` by the demo's CLIP, which saw one half of the training pictures, "
        "steers its logits. The judge, trained on the other half, never guides; it is right on "
        f"{judge.real_accuracy:.3f} of the 10,000 real test pictures. Frechet distance: all ten classes together "
        "against the real test pictures, in the judge's penultimate features; it falls with the number of pictures, so "
        "compare equal numbers only. Gap: guide's accuracy (CLIP's, among the ten prompts) less the judge's. Standard "
        "errors: binomial for shares, jackknife over ten groups for distances. Seconds of one core.",
        "",
        "| | judge accuracy | guide accuracy | gap | Frechet | seconds a picture |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['way']} | {row['accuracy']:.3f} +- {row['accuracy_error']:.3f} | {row['guide_accuracy']:.3f} | "
            f"{row['guide_accuracy'] - row['accuracy']:+.3f} | {row['frechet']:.2f} +- {row['frechet_error']:.2f} | "
            f"{row['seconds']:.2f} |"
        )
    lines += ["", *(f"{way}: {about}." for way, about in ABOUT.items() if way in by_way), ""]
    lines += ["Judge accuracy by class:", "", "| | " + " | ".join(CLASSES) + " |", "|---" * 11 + "|"]
    lines += [f"| {way} | " + " | ".join(f"{a:.2f}" for a in row["per_class"]) + " |" for way, row in by_way.items()]
    lines.append("")
    if {"unguided", "auto"} <= set(by_way):
        plain, auto = by_way["unguided"], by_way["auto"]
        difference = auto["frechet"] - plain["frechet"]
        error = (auto["frechet_error"] ** 2 + plain["frechet_error"] ** 2) ** 0.5
        lines += [
            f"Judge accuracy {plain['accuracy']:.3f} -> {auto['accuracy']:.3f}; the worst class "
            f"{min(auto['per_class']):.2f}. Frechet distance {plain['frechet']:.2f} -> {auto['frechet']:.2f}, a "
            f"difference of {difference:+.2f} +- {error:.2f}.",
            "",
        ]
    return "\n".join(lines)
