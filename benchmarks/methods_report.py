"""The report of the methods benchmark: tables in Markdown, and contact sheets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lossguide.guidance.contact_sheet import to_pil
from PIL import Image, ImageDraw, ImageFont

from .work import Pictures, Work

WITHIN = 0.05
SHOWN = 8  # pictures of a contact sheet's row
OTHERS = {
    "real-super-resolution": {
        "unguided": (0.304, 8.50, 0.687, 0.99),
        "MPGD": (0.108, 16.26, 0.034, 1.03),
        "TFG": (0.078, 16.49, 0.026, 2.27),
        "FreeDoM": (0.0639, 16.91, 0.022, 3.15),
        "DPS (2 of 8 diverged)": (0.112, 15.90, 0.166, 4.20),
        "AdamDPS": (0.0669, 16.73, 0.034, 2.18),
        "deepinv DPS": (0.103, 15.41, 0.065, 2.27),
        "deepinv DiffPIR": (0.096, 15.78, 0.071, 1.06),
    },
    "real-inpaint": {
        "MPGD": (0.034, 20.76, 0.127, 1.03),
        "TFG": (0.0160, 24.09, 0.056, 2.27),
        "AdamDPS": (0.0136, 24.55, 0.051, 2.18),
        "deepinv DiffPIR": (0.068, 18.96, 0.055, 1.06),
    },
    "real-deblur": {
        "MPGD": (0.069, 17.77, 0.050, 1.03),
        "TFG": (0.0481, 18.27, 0.048, 2.27),
        "AdamDPS": (0.0517, 18.01, 0.050, 2.18),
        "deepinv DiffPIR": (0.063, 17.82, 0.052, 1.06),
    },
}
"""Others' published code on the same pictures with other noise draws, each at the best of four strengths: LPIPS, PSNR,
RMSE to the measurement, time of a step over that of a forward."""


@dataclass(frozen=True)
class Entry:
    """What has been measured of a recipe on a work: rows by "default", "best", "fresh default" and "fresh best".

    Attributes:
        edge: whether the best settings stand at the end of the grid.
        searched: pictures that they were searched on.
        part: whether it is another form of the recipe before it, without a grid of its own.
    """

    recipe: str
    runs: dict[str, dict | None]
    edge: bool = False
    searched: int | None = None
    part: bool = False

    def run(self, name: str) -> dict | None:
        row = self.runs.get(name)
        return None if row is None or row["figures"] is None else row


def figure(row: dict | None, work: Work) -> float | None:
    """The figure that counts; None where the run is missing, failed or gave no number."""
    value = None if row is None or row["figures"] is None else row["figures"][work.figure]
    return value if value is not None and abs(value) < float("inf") else None


def line(row: dict, work: Work) -> str:
    """A row on one line, for the terminal."""
    start = f"{row['work']:22} {row['recipe']:11} {row['set']:10} {settings(row):28}"
    if row["figures"] is None:
        return f"{start} failed: {row['failure']}"
    cost = f"  {ratio(row):.2f} x forward, {row['seconds']:.0f} s" if "seconds" in row else ""
    return start + "  ".join(f"{name} {value:.4g}" for name, value in row["figures"].items()) + cost


def settings(row: dict | None) -> str:
    """What was changed of a recipe's defaults."""
    if row is None:
        return ""
    return ", ".join(f"{key}={_short(value)}" for key, value in row["change"].items()) or "default"


def _short(value) -> str:
    if isinstance(value, dict):  # a step rule
        rules = value.get("rules", [value])
        inside = (f"{k} {v:g}" for rule in rules for k, v in rule.items() if isinstance(v, (int, float)))
        return f"{'/'.join(rule['type'] for rule in rules)} ({', '.join(inside)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def ratio(row: dict) -> float:
    """The time of a visited step over that of one bare forward."""
    return row["seconds_per_visit"] / row["forward_seconds"]


def cost(row: dict) -> float | None:
    """The processor time of a step of the solver, with all of its visits and the guide's passes, over that of one bare
    forward of as many pictures; None where it was not counted (time by the clock, other programs stretch)."""
    if "processor_seconds" not in row:
        return None
    forward = row["forward_processor_seconds"] / row["forward_batch"]
    return row["processor_seconds"] / row["pictures"] / row["steps"] / forward


def candidates(work: Work, entries: list[Entry]) -> list[tuple[float, str]]:
    """Every method at its best, the best first: figure and what it is."""
    found = []
    for entry in entries:
        if entry.recipe in ("trivial", "unguided") or entry.part:
            continue
        for name in ("default", "best"):
            value = figure(entry.run(name), work)
            if value is not None:
                found.append((value, f"{entry.recipe}, {settings(entry.run(name))}"))
    if work.figure == "lpips":
        found += [(f[0], f"{m}, others' code") for m, f in OTHERS.get(work.name, {}).items() if m != "unguided"]
    return sorted(found, reverse=work.higher)


def verdict(work: Work, entries: list[Entry]) -> dict | None:
    """How auto at its default compares with the best of all; None where it has not been measured."""
    auto = next((figure(entry.run("default"), work) for entry in entries if entry.recipe == "auto"), None)
    ranked = candidates(work, entries)
    if auto is None or not ranked:
        return None
    best, name = ranked[0]
    worse = (best - auto if work.higher else auto - best) / abs(best) if best else 0.0 if auto == best else float("inf")
    return dict(auto=auto, best=best, name=name, worse=worse, within=worse <= WITHIN)


def report(tables: list[tuple[Work, list[Entry]]], name: str) -> str:
    """The report in Markdown."""
    verdicts = [(work, verdict(work, entries)) for work, entries in tables]
    measured = [(work, found) for work, found in verdicts if found is not None]
    good = sum(found["within"] for _, found in measured)
    quick = name.endswith("quick")
    lines = [
        "# Recipes on ten pairs of a model and a task",
        "",
        f"`python -m benchmarks run methods{' --quick' if quick else ''}`",
        "",
        *(["Two pictures and two steps, only to see that all of it runs.", ""] if quick else []),
        "`default`: strength 1. `found`: the settings of a grid that did best by the same figure on other, few "
        "pictures (so that they may do worse here); a `*` means that they stand at the end of the grid. `visits`: "
        "steps visited per picture. `cost`: processor time per step of the solver, with all its visits and the "
        "guide's own passes, over that of one bare forward of the denoiser in the same run, where it was counted; "
        "others' code is told likewise. ±: standard error over pictures. `trivial`: what needs no model, such as "
        "bicubic interpolation. The grids are in `benchmarks/grids.py`.",
        "",
        "## Is auto's default within 5 % of the best method at its best?",
        "",
        f"On {good} of {len(measured)} measured.",
        "",
        "| task | figure | auto, default | best of all | which | auto is worse by | within 5 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for work, found in verdicts:
        figure_name = f"{work.figure}, {'higher' if work.higher else 'lower'} is better"
        if found is None:
            lines.append(f"| {work.name} | {figure_name} | | | | | not measured |")
            continue
        lines.append(
            f"| {work.name} | {figure_name} | {found['auto']:.4g} | {found['best']:.4g} | {found['name']} | "
            f"{100 * found['worse']:.1f} % | {'yes' if found['within'] else 'no'} |"
        )
    for work, entries in tables:
        lines += ["", f"## {work.name}", "", f"{work.about}. {_counts(entries)}".strip(), "", *_table(work, entries)]
        lines += [*_fresh(work, entries), *_missing(entries)]
    if any(work.name in OTHERS for work, _ in tables):
        lines += [
            "",
            "Others' code: the published code of TFG's repository (which also holds FreeDoM, MPGD and DPS), "
            "adam-guidance and deepinv 0.5.0, unmodified, on the same pictures and operators with other noise draws, "
            "at the best of four strengths by LPIPS on the same two pictures. LPIPS (AlexNet) at 64 px; PSNR in dB, "
            "the peak being 1 for pictures in [0, 1]; RMSE of the measured restoration to the measurement, for "
            "pictures in [-1, 1], whose noise is 0.05; diverged: PSNR 6 dB below the trivial restoration (bicubic, "
            "mean of the neighbours, the blurred picture itself), or not finite.",
        ]
    return "\n".join(lines) + "\n"


def _counts(entries: list[Entry]) -> str:
    """How many pictures the figures are of."""
    counts = {}
    for entry in entries:
        for name, row in entry.runs.items():
            if row is not None and "pictures" in row:
                counts.setdefault("fresh" if name.startswith("fresh") else "measured", row["pictures"])
        if entry.searched:
            counts.setdefault("searched", entry.searched)
    told = {"measured": "pictures", "searched": "others to search on", "fresh": "fresh ones"}
    return "; ".join(f"{counts[name]} {what}" for name, what in told.items() if name in counts) + "." * bool(counts)


def _table(work: Work, entries: list[Entry]) -> list[str]:
    lines = [
        f"| recipe | default: {work.figure} | the rest | found | {work.figure} | the rest | visits | cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        default, best = entry.run("default"), entry.run("best")
        if entry.runs.get("default") is None and best is None:
            continue
        timed = default or best
        timed = timed if timed is not None and "visits" in timed else None
        cells = [
            entry.recipe,
            _with_error(default, work) if default else _failed(entry.runs.get("default")),
            _rest(default, work),
            settings(best) + " *" * entry.edge if best else "",
            _with_error(best, work),
            _rest(best, work),
            str(timed["visits"]) if timed else "",
            f"{cost(timed):.2f}" if timed and cost(timed) else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for method, (lpips, psnr, rmse, passes) in OTHERS.get(work.name, {}).items():
        rest = f"psnr {psnr:.2f}, rmse {rmse:.3f}"
        lines.append(f"| {method}, others' code | | | best of four | {lpips:.4g} | {rest} | | {passes:.2f} |")
    return lines


def _fresh(work: Work, entries: list[Entry]) -> list[str]:
    """What was measured on fresh pictures, beside auto's default on the same ones."""
    auto = next((entry.run("fresh default") for entry in entries if entry.recipe == "auto"), None)
    lines = []
    for entry in entries:
        told = []
        for name in ("fresh default", "fresh best"):
            row = entry.run(name)
            if row is None or settings(row) in told:
                continue
            told.append(settings(row))
            better = "" if row is auto else _paired(row, auto, work)
            lines.append(f"| {entry.recipe} | {settings(row)} | {_with_error(row, work)} | {better} |")
    head = [f"| on fresh pictures | settings | {work.figure} | better than auto's default by |", "|---|---|---|---|"]
    return ["", *head, *lines] if lines else []


def _missing(entries: list[Entry]) -> list[str]:
    """Which recipes have not been measured, or not searched."""
    bare = ("trivial", "unguided")
    entries = [entry for entry in entries if entry.recipe not in bare and not entry.part]
    absent = [entry.recipe for entry in entries if entry.runs.get("default") is None and entry.run("best") is None]
    unsearched = [entry.recipe for entry in entries if entry.run("default") and entry.run("best") is None]
    told = [("Not measured", absent), ("Only at the default", unsearched)]
    return [part for what, names in told if names for part in ("", f"{what}: {', '.join(names)}.")]


def _failed(row: dict | None) -> str:
    return f"failed: {row['failure']}" if row is not None and row.get("failure") else ""


def _number(row: dict | None, work: Work) -> str:
    value = figure(row, work)
    return "" if value is None else f"{value:.4g}"


def _rest(row: dict | None, work: Work) -> str:
    if row is None:
        return ""
    return ", ".join(f"{name} {value:.4g}" for name, value in row["figures"].items() if name != work.figure)


def _with_error(row: dict | None, work: Work) -> str:
    if figure(row, work) is None:
        return ""
    error = row["errors"][work.figure]
    return _number(row, work) + (f" ± {error:.2g}" if error is not None else "")


def _paired(row: dict | None, auto: dict | None, work: Work) -> str:
    """How much better than auto's default, picture by picture."""
    if figure(row, work) is None or figure(auto, work) is None:
        return ""
    own, reference = (torch.tensor(one["per_picture"][work.figure], dtype=torch.float64) for one in (row, auto))
    gain = own - reference if work.higher else reference - own
    error = f" ± {gain.std().item() / len(gain) ** 0.5:.2g}" if len(gain) > 1 else ""
    return f"{gain.mean().item():+.2g}{error}"


def save_strip(path: Path, images: torch.Tensor) -> None:
    """Keep the first pictures of a run side by side, for the contact sheet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(torch.cat(list(images[:SHOWN]), -1)).save(path)


def write_sheet(work: Work, pictures: Pictures, strips: Path, folder: Path, name: str) -> None:
    """A contact sheet: what the work shows, then each recipe's default, one row each.

    Pictures of the real model stay beside the strips, for they are not free to be published.
    """
    rows = {label: to_pil(torch.cat(list(images[:SHOWN]), -1)) for label, images in pictures.shown.items()}
    done = strips / work.name
    rows |= {path.stem: Image.open(path) for path in sorted(done.glob("*.png"), key=lambda p: _place(p.stem))}
    if len(rows) == len(pictures.shown):
        return
    place = strips if work.name.startswith("real") else folder
    sheet(rows).save(place / f"{name}-{work.name}.png")


def sheet(rows: dict[str, Image.Image]) -> Image.Image:
    """Pictures in rows below one another, each with its label; small ones are enlarged."""
    side = next(iter(rows.values())).height
    zoom = max(1, 64 // side)
    font, left = ImageFont.load_default(size=14), 150
    tall = max(image.height for image in rows.values()) * zoom
    wide = max(image.width for image in rows.values()) * zoom
    whole = Image.new("RGB", (left + wide, (tall + 2) * len(rows)), "white")
    pen = ImageDraw.Draw(whole)
    for i, (label, image) in enumerate(rows.items()):
        top = i * (tall + 2)
        pen.text((6, top + tall // 2), label, "black", font, anchor="lm")
        whole.paste(image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST), (left, top))
    return whole


def _place(recipe: str) -> int:
    from .grids import ORDER

    order = ("trivial", "unguided", *ORDER)
    return order.index(recipe) if recipe in order else len(order)
