"""Text guidance of the demo model by its CLIP, for all ten classes, judged by a classifier that never guides.

Peers run at the best strength of a grid, chosen by Frechet distance on other seeds; `auto` runs at its default. One row
per run goes to `results/demo-text.jsonl` as soon as it is measured; a run that is there already, with the same weights
and settings, is not repeated.
"""

from __future__ import annotations

import hashlib
import platform
import statistics
import time
from pathlib import Path

import torch
from lossguide.guidance import recipes
from lossguide.losses import ClassLabel, ClipText
from lossguide.losses.clip import load_clip
from lossguide.losses.demo import CLASSES, classifier
from lossguide.samplers import Denoiser, load_demo, sample
from torchvision.utils import make_grid, save_image

from . import meter
from .demo.data import fashion_mnist
from .metrics import frechet_by_class
from .rows import Rows, digest_of

RESULTS = Path(__file__).parent / "results"
STEPS, PER_CLASS, CHUNK = 50, 32, 8
GRID = {
    "dps": (10.0, 30.0, 100.0),
    "freedom": (0.3, 1.0, 2.0),
    "mpgd": (1.0, 3.0, 10.0, 30.0),
    "shen": (0.25, 1.0, 2.5),
}
SETTINGS = {"freedom": dict(rule="rms")}  # beside the strength; the rule published for text is ten times weaker
SEARCH_PER_CLASS = {"shen": 2}  # else 4; shen visits 275 steps a picture
SEARCH_SEED, SEED = 50_000, 0


def prompts() -> list[str]:
    """The ten prompts, one per class."""
    return [f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in CLASSES]


class Judge:
    """The judging classifier, its features of the real test pictures, and the guide's own opinion beside it."""

    def __init__(self) -> None:
        self.network = classifier("judge")
        images, self.labels = fashion_mnist("test")
        with torch.no_grad():
            self.features = torch.cat([self.network.features(part) for part in images.split(500)])
            logits = torch.cat([self.network(part) for part in images.split(500)])
        self.real_accuracy = (logits.argmax(1) == self.labels).float().mean().item()
        clip = load_clip("demo")
        self.texts = torch.nn.functional.normalize(clip.embed_text(prompts()), dim=-1)
        self.clip = clip

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        logits = self.network(images)
        similar = torch.nn.functional.normalize(self.clip.embed(images.expand(-1, 3, -1, -1)), dim=-1) @ self.texts.T
        return {
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "guide_accuracy": (similar.argmax(1) == labels).float().mean().item(),
            "frechet": frechet_by_class(self.network.features(images), labels, self.features, self.labels),
            "per_class": [(logits.argmax(1) == labels)[labels == c].float().mean().item() for c in range(10)],
        }

    def real(self, per_class: int) -> dict[str, float]:
        """The same figures for as many real training pictures."""
        images, labels = fashion_mnist("guide")
        chosen = torch.cat([(labels == c).nonzero()[:per_class, 0] for c in range(10)])
        return self(images[chosen], labels[chosen])


def generate(model: Denoiser, recipe: str | None, strength: float, per_class: int, seed: int):
    """`per_class` pictures of each class: images, labels, seconds per visit of a step."""
    images, labels, seconds = [], [], []
    chunk = min(CHUNK, per_class)
    for start in range(0, per_class, chunk):
        wanted = torch.arange(10).repeat_interleave(chunk)
        guidance = None
        if recipe is not None:
            loss = ClipText([prompts()[c] for c in wanted], model="demo")
            guidance = recipes.get(recipe)(loss, strength=strength, **SETTINGS.get(recipe, {}))
        first = seed + 10 * start
        result = sample(model, guidance, steps=STEPS, seeds=range(first, first + len(wanted)))
        images.append(result.images)
        labels.append(wanted)
        seconds += [row["seconds"] for row in result.record.rows]
    return torch.cat(images), torch.cat(labels), statistics.median(seconds), len(seconds) * chunk // per_class


@torch.no_grad()
def bare_forward(model: Denoiser, pictures: int) -> float:
    """Median seconds of one forward of the denoiser."""
    x, seconds = torch.randn(pictures, *model.shape), []
    for _ in range(9):
        start = time.perf_counter()
        model.predict(x, torch.tensor(500))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def settings_digest(recipe: str | None) -> str | None:
    """A short digest of a recipe's settings, so that rows of other settings are not mixed in."""
    return None if recipe is None else digest_of(recipes.get(recipe)(ClassLabel(0), **SETTINGS.get(recipe, {})))


def weights_digest(model: Denoiser) -> str:
    """A short digest of the demo's weights, so that rows of other weights are not mixed in."""
    digest = hashlib.sha256()
    for module in (model.model, classifier("judge"), load_clip("demo").text):
        for value in module.state_dict().values():
            digest.update(
                value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.dim() else b""
            )
    return digest.hexdigest()[:12]


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure every recipe, or `only` some; write rows, contact sheets and the table `results/demo-text.md`."""
    model, judge = load_demo(), Judge()
    name = "demo-text-quick" if quick else "demo-text"
    rows = Rows(RESULTS / f"{name}.jsonl", weights_digest(model), fresh)
    per_class = 2 * CHUNK if quick else PER_CLASS
    grid = {m: s[:1] for m, s in GRID.items() if m != "shen"} if quick else GRID

    def measure(recipe: str | None, strength: float, stage: str, pictures: int, seed: int) -> dict:
        key = dict(recipe=recipe, strength=strength, stage=stage, pictures=10 * pictures, steps=STEPS, seed=seed)
        key["settings"] = settings_digest(recipe)
        found = rows.get(**key)
        if found is None:
            forward = bare_forward(model, 10 * min(CHUNK, pictures))
            images, labels, seconds, visits = generate(model, recipe, strength, pictures, seed)
            likely = {}
            if stage == "final":
                likely["per_picture"] = {meter.FIGURE: [round(v, 5) for v in meter.bits(model, images).tolist()]}
            found = rows.add(
                key
                | judge(images, labels)
                | likely
                | dict(
                    seconds_per_visit=seconds,
                    forward_seconds=forward,
                    visits=visits,
                    threads=torch.get_num_threads(),
                    torch=torch.__version__,
                    machine=platform.machine(),
                    date=time.strftime("%Y-%m-%d"),
                )
            )
            if stage == "final" and recipe in (None, "auto"):
                order = torch.argsort(labels, stable=True).view(10, -1)[:, :12].flatten()
                save_image(
                    make_grid(images[order], nrow=12, padding=1, pad_value=0.3)
                    .repeat_interleave(2, 1)
                    .repeat_interleave(2, 2),
                    RESULTS / f"{name}-{recipe or 'unguided'}.png",
                )
        print(
            f"{stage:6} {recipe or 'unguided':9} {strength:7g}  judge {found['accuracy']:.3f}  "
            f"guide {found['guide_accuracy']:.3f}  "
            f"Frechet {found['frechet']:.2f}  {found['seconds_per_visit'] / found['forward_seconds']:.2f} x forward",
            flush=True,
        )
        return found

    final = [measure(r, 1.0, "final", per_class, SEED) for r in (None, "auto") if not only or (r or "unguided") in only]
    for recipe, strengths in grid.items():
        if only and recipe not in only:
            continue
        tried = [measure(recipe, s, "search", SEARCH_PER_CLASS.get(recipe, 4), SEARCH_SEED) for s in strengths]
        best = min(tried, key=lambda r: r["frechet"])["strength"]
        final.append(measure(recipe, best, "final", per_class, SEED))
    if only:
        return
    real = judge.real(per_class)
    report = table(final, real, judge.real_accuracy, per_class)
    (RESULTS / f"{name}.md").write_text(report)
    print(report)


def table(final: list[dict], real: dict, real_accuracy: float, per_class: int) -> str:
    """The report in Markdown."""
    unguided = next((row for row in final if row["recipe"] is None), None)
    lines = [
        f"# Text guidance of the demo model, {per_class} pictures of each of ten classes, {STEPS} steps of DDIM, eta 1",
        "",
        "`python -m benchmarks run demo-text`",
        "",
        f"The judge, which never guides, is right on {real_accuracy:.3f} of the 10,000 real test pictures. Frechet "
        "distance: in the judge's penultimate features, to the real test pictures of the class, mean over classes. "
        "Peers run at the best strength of a grid (by Frechet distance, on other seeds); auto at its default. "
        "`x forward`: median time of a visited step over that of one bare forward of the denoiser in the same run. "
        "Log-likelihood: its change from the unguided pictures of the same seeds, under the model itself.",
        "",
        "| recipe | strength | judge accuracy | share of real | guide accuracy | Frechet by class | visited steps "
        "| x forward per visit | log-likelihood, bits/dim |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in final:
        name = ", ".join([row["recipe"] or "unguided", *(SETTINGS.get(row["recipe"], {}).values())])
        likely = meter.changed(row, unguided)
        lines.append(
            f"| {name} | {row['strength'] if row['recipe'] else '-'} | {row['accuracy']:.3f} | "
            f"{row['accuracy'] / real_accuracy:.3f} | {row['guide_accuracy']:.3f} | "
            f"{row['frechet']:.2f} | {row['visits']} | "
            f"{row['seconds_per_visit'] / row['forward_seconds']:.2f} | "
            f"{'' if likely is None else f'{likely[0]:+.3f} ± {likely[1]:.2g}'} |"
        )
    lines += [
        f"| real training pictures | - | {real['accuracy']:.3f} | | {real['guide_accuracy']:.3f} | "
        f"{real['frechet']:.2f} | | | |",
        "",
    ]
    auto = next(row for row in final if row["recipe"] == "auto")
    lines += [
        f"Judge accuracy of auto by class: {', '.join(f'{n} {a:.2f}' for n, a in zip(CLASSES, auto['per_class']))}.",
        "",
    ]
    return "\n".join(lines)
