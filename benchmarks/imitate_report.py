"""The report of `python -m benchmarks run imitate`: tables, and a page of pairs, queries and answers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image

from .rows import Rows

RESULTS = Path(__file__).parent / "results"
TITLES = dict(
    none="input", wrong="wrong operator", true="true operator", fitted="fitted from one pair", mean="mean of 4"
)


def write(rows: Rows, file: str, count: int, steps: int) -> None:
    """Write the tables of what has been measured, and the page."""
    key = dict(queries=count, steps=steps)
    command = "python -m benchmarks run imitate" + (" --quick" if file.endswith("quick") else "")
    lines = [
        "# Example pairs",
        "",
        f"`{command}`",
        "",
        *_restored(rows, key),
        *_choice(rows),
        *_refused(rows),
        *_edits(rows, key),
    ]
    if (picture := page(count, steps)) is not None:
        picture.quantize(256).save(RESULTS / f"{file}.png", optimize=True)  # a third of the size
        lines += [
            "## Pictures",
            "",
            "In each row the pair (before, after), then two queries, each with its answer and what it should be.",
            "",
            f"![Pairs, queries and answers]({file}.png)",
            "",
        ]
    (RESULTS / f"{file}.md").write_text("\n".join(lines))
    print(RESULTS / f"{file}.md")


def _restored(rows: Rows, key: dict) -> list[str]:
    from .imitate import NOISE, degradations

    notes: list[str] = []
    lines = [
        "## An unknown operator, from one pair",
        "",
        f"PSNR in dB / LPIPS (AlexNet) of the answers, means over {key['queries']} queries; {key['steps']} steps, "
        f"`auto` at its default, real 64x64 model, noise {NOISE}. The input is bicubic for reductions, and has its "
        "holes filled by their neighbours. The wrong operator is none for the blur, one pixel of each block for "
        "reductions, else that of the blur or the colour cast.",
        "",
        "| task | found | " + " | ".join(TITLES.values()) + " | fitted - true | fitted - input | fitted - wrong |",
        "|---|---|" + "---|" * (len(TITLES) + 3),
    ]
    for task in degradations():
        found = {name: rows.get(kind="restore", task=task, operator=name, **key) for name in TITLES}
        own = found["fitted"]
        if own is None:
            continue
        cells = [f"{row['psnr']:.2f} / {row['lpips']:.3f}" if row else "" for row in found.values()]
        gaps = [f"{own['psnr'] - found[n]['psnr']:+.2f}" if found[n] else "" for n in ("true", "none", "wrong")]
        lines.append(f"| {task} | {own['found']}, noise {own['sigma']:.4f} | {' | '.join(cells + gaps)} |")
        if found["mean"] is not None:
            one, four = (10 ** (-found[name]["psnr"] / 10) for name in ("fitted", "mean"))
            notes.append(
                f"{task}: an answer is one draw of many that fit the query, and has their variance on top of the error "
                f"of their mean. By the errors of one draw and of the mean of four, the mean of infinitely many would "
                f"have {-10 * math.log10(max(4 * four - one, 1e-12) / 3):.2f} dB."
            )
    return [*lines, "", *[line for note in notes for line in (note, "")]]


def _choice(rows: Rows) -> list[str]:
    tried = [row for row in rows.all() if row.get("kind") == "choice"]
    right = sum(row["family"] == row["found"] and row["way"] == "restore" for row in tried)
    lines = [
        "## Which family",
        "",
        f"Random operators of five families with random noise, from one pair: {right} of {len(tried)} right.",
        "",
        "| true family | found | noise | noise found |",
        "|---|---|---|---|",
    ]
    for row in tried:
        sigma = "" if row["sigma"] is None else f"{row['sigma']:.4f}"
        lines.append(f"| {row['family']} | {row['found']} {row['way']} | {row['noise']:.4f} | {sigma} |")
    return [*lines, ""]


def _refused(rows: Rows) -> list[str]:
    lines = [
        "## Pairs of unrelated pictures",
        "",
        "| pairs | network | refused |",
        "|---|---|---|",
    ]
    for pairs in (1, 3):
        for network in (False, True):
            tried = [
                r for r in rows.all() if r.get("kind") == "refusal" and (r["pairs"], r["network"]) == (pairs, network)
            ]
            if tried:
                right = sum(row["found"] == "refused" for row in tried)
                lines.append(f"| {pairs} | {'MobileNetV2' if network else 'none'} | {right} of {len(tried)} |")
    return [*lines, ""]


def _edits(rows: Rows, key: dict) -> list[str]:
    from .imitate import EDITS, EXAMPLES

    lines = [
        "## Edits, by a network's features",
        "",
        f'`mode="direction"` from {len(EXAMPLES)} pairs; MobileNetV2 guides. Similarity is the cosine of the answer\'s '
        "change to the mean change of the examples, in AlexNet and VGG-16, which did not guide; LPIPS (AlexNet) to the "
        "query, and to the query edited by image processing, which is what 'itself' is. An answer nearer to the "
        "query than to the edited query has the edit's look rather than the edit.",
        "",
        "| edit | by | similarity, AlexNet | similarity, VGG-16 | LPIPS to the query | LPIPS to the edited query |",
        "|---|---|---|---|---|---|",
    ]
    for edit in EDITS:
        for kind in ("unguided", "direction", "analogy", "itself"):
            if (row := rows.get(kind="edit", task=edit, by=kind, **key)) is not None:
                lines.append(
                    f"| {edit} | {kind} | {row['alexnet']:.3f} | {row['vgg16']:.3f} | {row['query lpips']:.3f} | "
                    f"{row['edit lpips']:.3f} |"
                )
    return [*lines, ""]


def page(count: int, steps: int) -> Image.Image | None:
    """Rows of a pair, and of queries with their answers and what these should be."""
    from . import imitate, real

    truth, shown = real.pictures()[list(imitate.QUERIES)], []
    for task in imitate.degradations():
        path = imitate.kept(f"{task} fitted", steps)
        if path.exists():
            before, q = (_enlarged(one) for one in imitate.degraded(task))
            shown.append((before[0], real.pictures()[imitate.PAIR], q, torch.load(path, weights_only=True), truth))
    for edit, done in imitate.EDITS.items():
        path = imitate.kept(f"{edit} direction", steps)
        if path.exists():
            example = real.pictures()[imitate.EXAMPLES[0]]
            shown.append((example, done(example), truth, torch.load(path, weights_only=True), done(truth)))
    if not shown:
        return None
    gap = 6
    rows = []
    for before, after, queries, answers, wanted in shown:
        cells = [before, after]
        for i in range(min(2, count, len(answers))):
            cells += [queries[i], answers[i], wanted[i]]
        parts = []
        for i, cell in enumerate(cells):
            parts += [torch.ones(3, 64, gap if i in (2, 5) else 1)] * bool(i) + [cell.clamp(0, 1)]
        rows += [torch.cat(parts, 2), torch.ones(3, 2, 1).expand(-1, -1, sum(p.shape[2] for p in parts))]
    whole = torch.cat(rows[:-1], 1)
    return Image.fromarray((whole * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    factor = 64 // images.shape[-1]
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
