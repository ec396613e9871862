"""The table, the plot and the contact sheet of `likelihood`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from . import meter
from .methods_report import sheet as strips
from .methods_report import to_pil
from .runs import standard_error

GARMENTS, UNGUIDED, AUGMENTED, RANKED = "garments, test", "unguided", "auto", "reranked"
TELL_APART = (UNGUIDED, AUGMENTED, "dps, strength 200", "dps, strength 1000", "mpgd, strength 32", "mpgd, strength 38")
"""Sets that are also measured along the ODE."""
BANDS = ("nearly clean", "low noise", "high noise", "nearly noise")


def text(
    found: dict, closed: list[dict], size, quick: bool, reranked: tuple, chosen: Callable, missing: list[str]
) -> str:
    """The report in Markdown."""
    guided = [name for name, row in found.items() if "guide" in row and name != RANKED]
    sets = [name for name in found if name not in (*guided, RANKED)]
    seconds = {key: found[GARMENTS][f"{key}_seconds"] for key in ("elbo", "ode")}
    lines = [
        "# How likely pictures are to the demo model",
        "",
        f"`python -m benchmarks run likelihood{' --quick' if quick else ''}`",
        "",
        *(["Few pictures, only to see that all of it runs.", ""] if quick else []),
        "Bits per dimension of pictures of 8 bits, 32x32 grey: lower is more likely. ELBO: the bound, "
        f"{size.times} + 4 calls of the model per picture ({seconds['elbo']:.2f} s of one core). ODE: the density "
        f"along the probability flow, {size.steps} steps of Runge and Kutta, one probe of the divergence, one uniform "
        f"dequantisation, offset 6.994 bits ({seconds['ode']:.2f} s). ± is the standard error over pictures. AUC: the "
        "probability that a picture of the set is less likely than one of those it is compared with.",
        "",
        "## Closed forms",
        "",
        "The Bayes denoiser of a Gaussian and of a mixture of two, in two dimensions, at four points: the largest "
        "distance to the true log-density in nats. The noise of the bound's draws has exact first and second moments "
        "here, so that only its times are random. The ODE's density is of what is known at the cleanest level.",
        "",
        "| path | bound, Gaussian | ODE, Gaussian | ODE, mixture |",
        "|---|---|---|---|",
    ]
    for row in closed:
        cells = [f"{row[key]:.1e}" if key in row else "" for key in ("bound", "ode", "mixture")]
        lines.append(f"| {row['path']} | {' | '.join(cells)} |")
    real = found[GARMENTS]
    lines += [
        "",
        "## Kinds of pictures",
        "",
        f"The model is trained on garments. {len(real['elbo'])} test garments, {size.others} of each other kind; along "
        f"the ODE the first {len(real['ode'])} and {size.along // 2}. The bound's own random error is "
        f"{real['elbo_error']:.3f} per picture.",
        "",
        "| pictures | ELBO | of which reconstruction | ODE | AUC against test garments, ELBO | ODE |",
        "|---|---|---|---|---|---|",
    ]
    for name in sets:
        row = found[name]
        aucs = ["", ""] if name == GARMENTS else [f"{_auc(real, row, key):.3f}" for key in ("elbo", "ode")]
        rebuilt = torch.tensor(row["terms"]["reconstruction"]).mean()
        lines.append(f"| {name} | {_mean(row['elbo'])} | {rebuilt:.3f} | {_mean(row['ode'])} | {' | '.join(aucs)} |")
    lines += ["", *_guided(found, guided)]
    if RANKED in found:
        lines += ["", *_reranked(found[RANKED], reranked, chosen)]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    name = "likelihood-quick" if quick else "likelihood"
    return "\n".join([*lines, "", f"![Plots]({name}.png)", "", f"![Pictures]({name}-pictures.png)", ""])


def _guided(found: dict, guided: list[str]) -> list[str]:
    """Guided pictures: the meter beside the guide's loss, and whether it tells plain guidance from augmented."""
    unguided, augmented = found[UNGUIDED], found[AUGMENTED]
    lines = [
        "## Guided pictures",
        "",
        f"To a label by the guide classifier, {len(unguided['elbo'])} pictures each of the same seeds and labels, "
        "DDIM, eta 1. auto augments; the others follow the classifier's plain gradient, dps by a constant step through "
        "the denoiser, mpgd at the clean picture. Change: of the log-likelihood per dimension from the unguided "
        "picture of the seed (the meter), with its error over pictures. AUC against auto: does the likelihood, or its "
        "change, tell the pictures from auto's? The bands are parts of the bound by noise level: minus log "
        "signal-to-noise below -4, to 0, to 4, above.",
        "",
        "| guidance | guide's loss, mean | median | judge agrees | ELBO | change, bits/dim | AUC: ELBO | ODE | "
        f"change | {' | '.join(BANDS)} |",
        "|---|---|---|---|---|---|---|---|---|" + "---|" * len(BANDS),
    ]
    for name in guided:
        row = found[name]
        losses = torch.tensor(row["guide"])
        mean, error = _change(row, unguided)
        cells = [f"{losses.mean():.3g}", f"{losses.median():.3g}", f"{torch.tensor(row['accuracy']).mean():.2f}"]
        cells += [_mean(row["elbo"]), "" if name == UNGUIDED else f"{mean:+.3f} ± {error or 0:.2g}"]
        if name == AUGMENTED:
            cells += [""] * (3 + len(BANDS))
        else:
            cells += [
                f"{_auc(augmented, row, 'elbo'):.3f}",
                f"{_auc(augmented, row, 'ode'):.3f}" if "ode" in row else "",
            ]
            plain = torch.tensor(unguided["elbo"])
            gains = [torch.tensor(one["elbo"]) - plain for one in (augmented, row)]
            cells.append("" if name == UNGUIDED else f"{meter.auc(*gains):.3f}")
            levels = [torch.tensor(one["levels"]) for one in (augmented, row)]
            cells += [f"{meter.auc(levels[0][:, i], levels[1][:, i]):.3f}" for i in range(len(BANDS))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _reranked(row: dict, reranked: tuple, chosen: Callable) -> list[str]:
    recipe, options, count = reranked
    told = ", ".join(f"{key} {value:g}" for key, value in options.items())
    lines = [
        "## Reranking",
        "",
        f"{count} candidates for each of {len(row['elbo']) // count} pictures by {recipe} ({told}), of which one is "
        "kept; `lossguide generate --rerank likelihood` keeps the likeliest of the better half by the guide's loss.",
        "",
        "| kept | judge agrees | guide's loss | ELBO |",
        "|---|---|---|---|",
    ]
    for way, places in chosen(row, count).items():
        picked = {key: torch.tensor(row[key])[places] for key in ("accuracy", "guide", "elbo")}
        cells = [_mean(picked["accuracy"].tolist()), f"{picked['guide'].mean():.3g}", _mean(picked["elbo"].tolist())]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def _mean(values: list[float]) -> str:
    values = torch.tensor(values, dtype=torch.float64)
    return f"{values.mean():.3f} ± {standard_error(values) or 0:.2g}"


def _auc(usual: dict, row: dict, key: str) -> float:
    return meter.auc(torch.tensor(usual[key]), torch.tensor(row[key]))


def _change(row: dict, unguided: dict) -> tuple[float, float | None]:
    return meter.change(torch.tensor(row["elbo"]), torch.tensor(unguided["elbo"]))


def plot(found: dict, path: Path) -> None:
    """Bits per dimension of each kind, ELBO against ODE, and against the guide's loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.8), layout="constrained")
    kinds, agree, guided = figure.subplots(1, 3)
    names = [name for name in found if name != RANKED]
    for i, name in enumerate(names):
        row = found[name]
        spread = torch.rand(len(row["elbo"]), generator=torch.Generator().manual_seed(0)) * 0.6 - 0.3
        kinds.scatter(row["elbo"], (i + spread).tolist(), s=4, alpha=0.5, color=f"C{i % 10}")
        if "ode" in row:
            agree.scatter(row["elbo"][: len(row["ode"])], row["ode"], s=8, alpha=0.6, color=f"C{i % 10}", label=name)
        if "guide" in row:
            guided.scatter(row["guide"], row["elbo"], s=12, alpha=0.7, color=f"C{i % 10}", label=name)
    kinds.set_yticks(range(len(names)), names, fontsize=7)
    kinds.invert_yaxis()
    kinds.set(xlabel="ELBO, bits/dim", title="every picture")
    low, high = agree.get_xlim()
    agree.plot([low, high], [low, high], color="black", linewidth=0.6)
    agree.set(xlabel="ELBO, bits/dim", ylabel="ODE, bits/dim", title="bound and density")
    guided.set(xscale="log", xlabel="guide's loss", ylabel="ELBO, bits/dim", title="guided pictures")
    for axis in (agree, guided):
        axis.legend(fontsize=6)
    figure.savefig(path, dpi=100)


def sheet(pictures: dict[str, torch.Tensor], found: dict, path: Path, count: int = 10) -> None:
    """The first pictures of every set in a row, with the mean of the set."""
    rows = {}
    for name, images in pictures.items():
        if name != RANKED:
            mean = sum(found[name]["elbo"]) / len(images)
            label = name.replace("strength ", "").replace("garments, ", "")
            rows[f"{label} {mean:.2f}"] = to_pil(torch.cat(list(images[:count]), -1))
    strips(rows).save(path)
