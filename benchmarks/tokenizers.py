"""Tokenizers that learn to understand against one that learns pixels: codes used, what tokens know, what is lost.

    python -m benchmarks run tokenizers            # trains what is missing: an hour on one core
    python -m benchmarks run tokenizers --only cifar10

Teachers see no labels (`tokens.teacher`). VQ-KD and plain VQ share encoder, codes and steps (`tokens.train`); LG-VQ's
losses are put on and off (`tokens.language`). `--only` takes `fashion`, `cifar10`, `language` and `demo`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from .tokens import data, evaluate, teacher
from .tokens.model import ids_of, pictures_of
from .tokens.ship import DEMO
from .tokens.train import Plan, name_of, train

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1)
PROBED = 20_000
"""Training pictures that probes are fitted on."""
STEPS = {"fashion": 1500, "cifar10": 800}
PIXEL_STEPS = {"fashion": 0, "cifar10": 800}
"""Of the second stage, of the first seed of VQ-KD: that of Fashion-MNIST is the demo's, others are for tokens alone."""
COMPARED = [
    Plan(name, kind, seed=seed, steps=STEPS[name], pixel_steps=0 if seed or kind == "plain" else PIXEL_STEPS[name])
    for name in data.CHANNELS
    for kind in ("plain", "kd")
    for seed in SEEDS
]
WEIGHTS = ((1e-3, 1e-4), (0.3, 0.3))
LANGUAGE = [
    Plan("fashion", "kd", seed=seed, semantic=semantic, relation=relation, pixel_steps=0)
    for semantic, relation in WEIGHTS
    for seed in SEEDS
]
GROUPS = {
    "fashion": [plan for plan in COMPARED if plan.data == "fashion"],
    "cifar10": [plan for plan in COMPARED if plan.data == "cifar10"],
    "language": LANGUAGE,
    "demo": [DEMO],
}
QUICK = dict(codes=64, steps=40, batch=32)
COMMAND = "python -m benchmarks run tokenizers"


def _shortened(plan: Plan) -> Plan:
    return dataclasses.replace(plan, **QUICK, pixel_steps=min(plan.pixel_steps, 20))


class Bench:
    """Trained tokenizers and teachers of a folder, trained if they are not there, and their figures."""

    def __init__(self, folder: Path, quick: bool, fresh: bool):
        self.folder, self.quick, self.fresh = folder, quick, fresh
        self._sets: dict = {}

    def pictures(self, name: str) -> tuple[tuple, tuple, torch.Tensor]:
        """Training and test pictures with labels, and the judge's features of the test pictures."""
        if name not in self._sets:
            train_set, test = (data.pictures(name, split) for split in ("train", "test"))
            if self.quick:
                train_set, test = tuple(x[:2000] for x in train_set), tuple(x[:500] for x in test)
            self._sets = {name: (train_set, test, evaluate.judged(name, test[0].float() / 255))}  # one set in memory
        return self._sets[name]

    def teacher(self, name: str) -> teacher.Teacher:
        """Of a data set."""
        if not teacher.file(name, self.folder).is_file():
            plan = teacher.PLANS[name] | (dict(steps=15, batch=64) if self.quick else {})
            teacher.train(name, seed=0, out=self.folder, **plan)
        return teacher.load(name, self.folder)

    def model(self, plan: Plan):
        """The VQModel of a plan, and how it was trained."""
        frozen = self.teacher(plan.data) if plan.kind == "kd" else None
        return train(plan, self.folder, self.pictures(plan.data)[0], frozen)

    def bounds(self, name: str) -> dict[str, float]:
        """Accuracy of linear probes of a data set's `pixels` and of its `teacher`'s pooled features, measured once."""
        path = self.folder / f"{name}-bounds.json"
        if path.is_file() and not self.fresh:
            return json.loads(path.read_text())
        network, (train_set, test, _) = self.teacher(name), self.pictures(name)
        images, labels = (x[:PROBED] for x in train_set)
        with torch.no_grad():
            pool = lambda part: torch.cat([network(p.float() / 255).mean(1) for p in part.split(500)])
            features = pool(images), pool(test[0])
        pixels = images.float().flatten(1) / 255, test[0].float().flatten(1) / 255
        found = {
            key: evaluate.probe(known, labels, unseen, test[1])
            for key, (known, unseen) in (("pixels", pixels), ("teacher", features))
        }
        path.write_text(json.dumps(found) + "\n")
        return found

    def measured(self, plan: Plan) -> bool:
        """Whether a plan's figures are there."""
        return (self.folder / name_of(plan) / "figures.json").is_file()

    def figures(self, plan: Plan) -> dict:
        """Of a plan, measured once."""
        path = self.folder / name_of(plan) / "figures.json"
        if path.is_file() and not self.fresh:
            return json.loads(path.read_text())
        print(f"measuring {name_of(plan)}", flush=True)
        vq, facts = self.model(plan)
        train_set, test, real = self.pictures(plan.data)
        train_set = tuple(x[:PROBED] for x in train_set)
        known, ids = ids_of(vq, train_set[0]), ids_of(vq, test[0])
        row = dict(name=name_of(plan), pictures=len(ids)) | evaluate.understood(vq, known, train_set[1], ids, test[1])
        if plan.kind == "plain" or plan.pixel_steps:
            row |= evaluate.copied(vq, plan.data, ids, test[0], real)
        if plan.data == "fashion":
            from .tokens import language

            row |= evaluate.recalled(
                vq, known, language.captions(*train_set), ids, language.captions(*test), len(language.VOCABULARY)
            )
        row["seconds"] = facts["tokens"]["seconds"] + facts.get("pixels", {}).get("seconds", 0)
        path.write_text(json.dumps(row, indent=1) + "\n")
        return row


COLUMNS = {
    "usage": ("codes used", 1),
    "perplexity": ("perplexity", 1),
    "probe_pooled": ("probe, pooled", 100),
    "probe_flat": ("probe, flat", 100),
    "recall_1": ("recall@1", 100),
    "recall_10": ("recall@10", 100),
    "psnr": ("PSNR", 1),
    "frechet": ("Frechet", 1),
}


def _table(groups: Sequence[tuple[str, list[dict]]], columns: Sequence[str]) -> list[str]:
    """Rows of means over seeds, with the single values where there are several."""
    lines = ["| | " + " | ".join(COLUMNS[c][0] for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for title, rows in groups:
        cells = []
        for column in columns:
            scale = COLUMNS[column][1]
            values = [row[column] * scale for row in rows if column in row]
            digits = 3 if column in ("usage", "frechet") else 1
            cell = f"{sum(values) / len(values):.{digits}f}" if values else ""
            cells.append(cell + (f" ({', '.join(f'{v:.{digits}f}' for v in values)})" if len(values) > 1 else ""))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _gains(plain: list[dict], kd: list[dict]) -> list[str]:
    lines = []
    for key in ("probe_pooled", "probe_flat"):
        pairs = [100 * (b[key] - a[key]) for a, b in zip(plain, kd)]
        n = kd[0]["pictures"]
        spread = max(((r[key] * (1 - r[key]) / n) ** 0.5 for r in (*plain, *kd)), default=0)
        lines.append(
            f"- {COLUMNS[key][0]}: VQ-KD above plain by {', '.join(f'{p:+.1f}' for p in pairs)} points"
            f"{', seed by seed' if len(pairs) > 1 else ''} (standard error of one accuracy from {n} test pictures: at "
            f"most {100 * spread:.1f})"
        )
    return lines


def _write(rows: dict[str, dict], plans: dict[str, list[Plan]], bounds: dict, quick: bool) -> None:
    title = "# Tokenizers: quick run, not for figures" if quick else "# Tokenizers: to understand, or to copy"
    lines = [title, "", f"`{COMMAND}{' --quick' if quick else ''}`", "", *ABOUT.strip().splitlines(), ""]
    if quick:
        lines += ["Shortened: 64 codes, 40 steps of 32 pictures, 2000 training and 500 test pictures, one seed.", ""]
    of = lambda wanted: [rows[name_of(plan)] for plan in wanted if name_of(plan) in rows]
    for name in data.CHANNELS:
        plain, kd = (of([p for p in plans.get(name, []) if p.kind == kind]) for kind in ("plain", "kd"))
        if not (plain and kd):
            continue
        lines += [f"## {data.TITLES[name]}", ""]
        groups = [("plain VQ", plain), ("VQ-KD", kd)]
        if name == "fashion" and of(plans.get("demo", [])):
            groups.append(("VQ-KD of the demo: first seed, 3000 pixel steps", of(plans["demo"])))
        lines += _table(groups, ("usage", "perplexity", "probe_pooled", "probe_flat", "psnr", "frechet"))
        lines += ["", *_gains(plain, kd)]
        if name in bounds:
            lines.append(
                f"- by the same probe: the pixels themselves {100 * bounds[name]['pixels']:.1f}, the teacher's pooled "
                f"features {100 * bounds[name]['teacher']:.1f}"
            )
        lines.append("")
    if of(plans.get("language", [])):
        lines += ["## LG-VQ's losses, on Fashion-MNIST with captions", "", *ABOUT_LANGUAGE.strip().splitlines(), ""]
        groups = [("off", of([p for p in plans.get("fashion", []) if p.kind == "kd"]))]
        for semantic, relation in WEIGHTS:
            part = [p for p in plans["language"] if (p.semantic, p.relation) == (semantic, relation)]
            groups.append((f"{semantic:g} / {relation:g}", of(part)))
        groups = [group for group in groups if group[1]]
        lines += _table(groups, ("usage", "perplexity", "probe_pooled", "probe_flat", "recall_1", "recall_10"))
        captions = groups[-1][1][0]["captions"]
        error = 100 * 0.5 / captions**0.5
        lines += ["", f"- {captions} captions: the standard error of a recall is at most {error:.1f} points", ""]
    stem = "tokenizers-quick" if quick else "tokenizers"
    lines += [f"![pictures]({stem}.png)", "", "Of each data set: originals, plain VQ, VQ-KD."]
    (RESULTS / f"{stem}.md").write_text("\n".join(lines).rstrip() + "\n")
    (RESULTS / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


ABOUT = """
Pictures of 32x32, 8x8 tokens, 256 codes of 32 numbers and unit norm, 1500 steps of 64 pictures (CIFAR-10: 800), the
encoder of diffusers' VQModel (0.3 M parameters). Codebook of both: cosines, k-means at first, running means (decay
.99); a code used by fewer than 2 of a batch's 4096 tokens, on average, is put where a random one of them is. *Plain*
learns pixels (mean squared error); *VQ-KD* learns to foretell, through one transformer block, the 8x8 features of a
frozen teacher that SimCLR trained on the same pictures **without labels**; its tokens are then frozen, and a pixel
decoder is trained on those of the first seed: in as many steps on CIFAR-10; on Fashion-MNIST the demo's, in 3000 steps,
half of the pictures from mixtures of codes. Figures on the 10,000 test pictures; the seeds in brackets.

- *codes used*: the share of codes that any test picture uses; *perplexity*: e to the entropy of their use.
- *probe*: test accuracy, in points, of a linear classifier of code vectors, fitted on 20,000 training pictures and
  their labels: of the mean of a picture's 64 vectors (*pooled*, 32 numbers), or of all of them (*flat*, 2048).
- *Frechet*: distance between decoded and original test pictures in a classifier's 64 features (Fashion-MNIST: the
  demo's judge; CIFAR-10: a ResNet56). It compares within a table only; it is no rFID, which is by Inception.
"""
ABOUT_LANGUAGE = """
Each caption names class, brightness, shape and texture ("a bright wide plain sneaker"; the latter three are measured
from pixels). **The captions hold the label**: probes of these runs say how far language got into the tokens. Text side:
the demo CLIP's vectors of the class names, frozen, and learned ones of the other words. Weights of the semantic and the
relationship alignment beside; the first are the published ones. *recall*: captions, in points, that find a picture of
their own among the 1 or 10 nearest of the test pictures, by the same ridge regression from tokens to words for all.
"""


def _sheet(bench: Bench, plans: dict[str, list[Plan]], path: Path) -> None:
    """Originals and what each tokenizer makes of them."""
    from PIL import Image

    blocks = []
    for name in data.CHANNELS:
        shown = [plan for plan in plans.get(name, []) if plan.seed == 0 and (plan.kind == "plain" or plan.pixel_steps)]
        shown += plans.get("demo", []) if name == "fashion" else []
        if not shown:
            continue
        images = bench.pictures(name)[1][0][:16]
        rows = [images.float() / 255]
        for plan in shown:
            vq, _ = bench.model(plan)
            rows.append(pictures_of(vq, ids_of(vq, images)))
        blocks += [torch.cat(list(F.pad(row, (1, 1, 1, 1)).expand(-1, 3, -1, -1)), 2) for row in rows]
    if blocks:
        whole = (torch.cat(blocks, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(whole).resize((whole.shape[1] * 2, whole.shape[0] * 2), Image.NEAREST).save(path)


def run(quick: bool, fresh: bool, only: Sequence[str]) -> None:
    """Train what is missing, measure it, and write results/tokenizers.md, .jsonl and .png."""
    unknown = set(only) - set(GROUPS)
    if unknown:
        raise SystemExit(f"--only takes {', '.join(GROUPS)}, got {', '.join(sorted(unknown))}")
    groups = {key: [_shortened(p) for p in plans if p.seed == 0] if quick else plans for key, plans in GROUPS.items()}
    wanted = {key: plans for key, plans in groups.items() if not only or key in only}
    for name in {plan.data for plans in wanted.values() for plan in plans}:
        if not data.available(name):
            data.pictures(name, "train")  # says what is missing
    bench = Bench(data.FOLDER / "quick" if quick else data.FOLDER, quick, fresh)
    for key, plans in wanted.items():
        for plan in plans:
            bench.figures(plan)
        if key in data.CHANNELS:
            bench.bounds(key)
    bench.fresh = False
    # the report is of everything measured so far
    groups = {key: [plan for plan in plans if bench.measured(plan)] for key, plans in groups.items()}
    rows = {name_of(plan): bench.figures(plan) for plans in groups.values() for plan in plans}
    bounds = {name: bench.bounds(name) for name in data.CHANNELS if groups[name]}
    _write(rows, groups, bounds, quick)
    _sheet(bench, groups, RESULTS / ("tokenizers-quick.png" if quick else "tokenizers.png"))
