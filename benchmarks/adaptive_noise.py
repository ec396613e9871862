"""Learned noise schedules: four variants by two seeds, trained at equal steps, compared in bits per dimension.

Trains what has not been trained (2 core-minutes each; a run that was stopped goes on), takes the variational bound on
test pictures, draws a sheet of pictures, and judges guided ones by a classifier that never guides. Results go to
`results/adaptive-noise.md`, `.jsonl` and `.png`; models to a folder outside of the repository.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lossguide.guidance import recipes
from lossguide.losses import ClassLabel
from lossguide.losses.demo import CLASSES, classifier
from lossguide.samplers.gamma import Gamma, ScalarGamma

from .adaptive import data
from .adaptive.evaluate import PARTS, bits, mean_and_error
from .adaptive.model import FOLDER, VARIANTS, AdaptiveModel, draw, folder_of, load, training
from .adaptive.model import available as finished
from .adaptive.train import STEPS, trained
from .demo.data import available

RESULTS = Path(__file__).parent / "results"
SEEDS, PICTURES, TIMES = (0, 1), 2000, 8
DRAWN, SAMPLING_STEPS, LABEL = 8, 50, "ankle boot"
TITLES = {"unguided": "unguided", "at x0": f"guided to {LABEL} at x0", "through": "guided through the denoiser"}


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Train the variants, or those of `only`, then measure and report all that are trained.

    Raises:
        FileNotFoundError: Fashion-MNIST is not on this machine.
        ValueError: there is no such variant.
    """
    for name in only:
        if name not in VARIANTS:
            raise ValueError(f"there is no variant {name!r}; there are {', '.join(VARIANTS)}")
    if not available():
        data.pictures("test")  # says what is missing
    name = "adaptive-noise-quick" if quick else "adaptive-noise"
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            _measure(name, Path(folder), only, seeds=(0,), steps=40, pictures=50, times=4, drawn=2, sampling=5)
    else:
        _measure(name, FOLDER, only, fresh=fresh)


def _measure(
    name: str,
    folder: Path,
    only: Sequence[str],
    *,
    fresh: bool = False,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    pictures: int = PICTURES,
    times: int = TIMES,
    drawn: int = DRAWN,
    sampling: int = SAMPLING_STEPS,
) -> None:
    images = data.pictures("test")[:pictures]
    for seed in seeds:
        for variant in only or VARIANTS:
            facts = trained(variant, seed, folder, fresh, steps=steps)
            print(f"{variant}, seed {seed}: {facts['core_minutes']} core-minutes of training", flush=True)
    rows, totals, sheets = [], {}, {}
    for seed in seeds:
        for variant in (name for name in VARIANTS if finished(folder_of(name, seed, folder))):
            own = folder_of(variant, seed, folder)
            facts, model = training(own), load(own)
            settings = f"{len(images)}-{times}"
            parts = _once(own / f"bits-{settings}.pt", bits, model, images, times)
            totals[variant, seed] = parts["total"]
            row = dict(variant=variant, seed=seed, pictures=len(images), times=times)
            row |= {key: facts[key] for key in ("steps", "parameters", "core_minutes")}
            row["bits"], row["error"] = mean_and_error(parts["total"])
            row |= {part: parts[part].mean().item() for part in PARTS}
            if variant != "scalar" and ("scalar", seed) in totals:
                row["against_scalar"] = mean_and_error(parts["total"] - totals["scalar", seed])
            path, of = _another_path(model, folder, seed)
            if path is not None:
                there = _once(own / f"bits-{settings}-{of}.pt", bits, model, images, times, gamma=path)
                row["other_path"] = mean_and_error(there["total"] - parts["total"])
            if seed == seeds[0]:
                found = _once(own / f"drawn-{drawn}-{sampling}.pt", _drawn, model, drawn, sampling)
                sheets[variant] = found
                row["judge"] = {way: _share(shown) for way, shown in found.items()}
            rows.append(row)
            print(f"{variant}, seed {seed}: {row['bits']:.4f} +- {row['error']:.4f} bits/dim", flush=True)
    (RESULTS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (RESULTS / f"{name}.md").write_text(report(name, rows, drawn, sampling))
    _plot(RESULTS / f"{name}.png", sheets, folder, seeds[0])
    print(f"{RESULTS / name}.md, .jsonl and .png")


def _once(path: Path, measure: Callable, *args, **options):
    """What was measured already, or is measured now and kept beside the model."""
    if not path.is_file():
        torch.save(measure(*args, **options), path)
    return torch.load(path, weights_only=True)


def _another_path(model: AdaptiveModel, folder: Path, seed: int) -> tuple[Gamma | None, str]:
    """A path that the model was not trained on, and its name: the straight one for a per-pixel model, the polynomials
    of the same seed for a scalar one; None where there are none."""
    if model.config.schedule == "polynomial":
        return ScalarGamma(), "straight"
    other = folder_of("polynomial", seed, folder)
    return (load(other).gamma, "polynomials") if finished(other) else (None, "")


def _drawn(model: AdaptiveModel, count: int, steps: int) -> dict[str, torch.Tensor]:
    """Pictures of the model, plain and guided to a label, the gradient taken at x0 or through the denoiser."""
    loss = ClassLabel(LABEL)
    ways = {"unguided": None, "at x0": recipes.auto(loss, through="x0"), "through": recipes.auto(loss)}
    return {name: draw(model, how, seeds=range(count), steps=steps).images for name, how in ways.items()}


@torch.no_grad()
def _share(images: torch.Tensor) -> float:
    """Of pictures that a judge, who never guides, takes for the label."""
    large = torch.nn.functional.interpolate(images, scale_factor=2)
    return (classifier("judge")(large).argmax(1) == CLASSES.index(LABEL)).float().mean().item()


def report(name: str, rows: list[dict], drawn: int, sampling: int) -> str:
    """The tables, in words."""
    first = rows[0]
    lines = [
        "# Learned noise schedules",
        "",
        f"`python -m benchmarks run adaptive-noise{' --quick' if name.endswith('quick') else ''}`",
        "",
        f"Fashion-MNIST at 16x16, 8 bits per pixel. Every model: {first['steps']} steps of 32 pictures, the same "
        "network, bfloat16, averaged weights. scalar: one level for all pixels, gamma linear in time from -13.3 to 5. "
        "polynomial: gamma of each pixel a polynomial of its own, trained with the network. latent: 16 numbers of the "
        "picture, Gaussian with exact KL, which the network sees and which, with polynomials, move their coefficients.",
        "",
        f"Bits per dimension: the variational bound, mean over the first {first['pictures']} test pictures at "
        f"{first['times']} times each, with its standard error over pictures. Against scalar: the difference picture "
        "by picture to the scalar model of the same seed, with the same times and noise; below zero is better.",
        "",
        "| schedule | seed | bits/dim | diffusion | latent | prior | reconstruction | against scalar | parameters | "
        "core-minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = " | ".join(f"{row[part]:.4f}" for part in PARTS)
        against = "" if "against_scalar" not in row else "{:+.4f} +- {:.4f}".format(*row["against_scalar"])
        lines.append(
            f"| {_shown(row['variant'])} | {row['seed']} | {row['bits']:.4f} +- {row['error']:.4f} | {parts} "
            f"| {against} | {row['parameters'] / 1e6:.2f} M | {row['core_minutes']:.1f} |"
        )
    lines += ["", _spread(rows), "", "## The same networks on another path", ""]
    lines += [
        "For an exact denoiser the bound is the same on every path from the first level to the last. By how much it "
        "changes here when polynomial models are asked along the straight path, where all pixels share a level, and "
        "scalar ones along the polynomials of the same seed (levels they never saw):",
        "",
        "| schedule | seed | change in bits/dim |",
        "|---|---|---|",
    ]
    for row in rows:
        if "other_path" in row:
            change = "{:+.4f} +- {:.4f}".format(*row["other_path"])
            lines.append(f"| {_shown(row['variant'])} | {row['seed']} | {change} |")
    lines += ["", "## Pictures", ""]
    lines += [
        f"{drawn} pictures per model of seed {first['seed']}, {sampling} ancestral steps, unguided and guided by "
        f"`auto` to '{LABEL}' (`ClassLabel`, the demo's guiding classifier); the share that the judging one, which "
        "never guides, takes for it at twice the size. These networks see waves of one step of the eight bits, through "
        "which a gradient is mostly noise: it is best taken at x0.",
        "",
        f"| schedule | {' | '.join(TITLES.values())} |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if "judge" in row:
            shares = " | ".join(f"{row['judge'][way]:.2f}" for way in TITLES)
            lines.append(f"| {_shown(row['variant'])} | {shares} |")
    return "\n".join([*lines, ""])


def _shown(variant: str) -> str:
    return variant.replace("-", " + ")


def _spread(rows: list[dict]) -> str:
    """What the seeds say of the differences."""
    told = []
    for variant in VARIANTS:
        found = [row["against_scalar"][0] for row in rows if row["variant"] == variant and "against_scalar" in row]
        if len(found) > 1:
            values = torch.tensor(found)
            told.append(f"{_shown(variant)} {values.mean():+.4f} (seeds apart by {values.max() - values.min():.4f})")
    scalar = [row["bits"] for row in rows if row["variant"] == "scalar"]
    if not told or len(scalar) < 2:
        return "One seed: how far training itself scatters is not known."
    return (
        f"Mean over the seeds, against scalar: {', '.join(told)}. The two scalar models are apart by "
        f"{abs(scalar[0] - scalar[1]):.4f}: differences of that size are within what the seed of a training does."
    )


def _plot(path: Path, sheets: dict[str, dict[str, torch.Tensor]], folder: Path, seed: int) -> None:
    """Pictures of every variant, unguided and guided, and the learned levels of the pixels."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    figure = Figure(figsize=(13, 2.6 * len(sheets)), layout="constrained")
    axes = figure.subplots(len(sheets), 4, squeeze=False)
    for row, (variant, drawn) in zip(axes, sheets.items()):
        model = load(folder_of(variant, seed, folder))
        for axis, (title, images) in zip(row[:2], drawn.items()):  # the first two
            grid = make_grid(torch.nn.functional.interpolate(images, scale_factor=4), nrow=4, padding=4, pad_value=1.0)
            axis.imshow(grid.permute(1, 2, 0).numpy())
            axis.set_title(f"{_shown(variant)}, {TITLES[title]}", fontsize=9)
            axis.axis("off")
        times = torch.linspace(0, 1, 41)
        with torch.no_grad():
            zero = torch.zeros(1, model.gamma.latent) if model.gamma.latent else None
            gammas = torch.stack([model.gamma(t, zero).reshape(model.gamma.shape) for t in times])
            middle = model.gamma(torch.tensor(0.5), zero).reshape(model.gamma.shape)
        lines = gammas.flatten(1)[:, :: max(1, gammas[0].numel() // 64)]
        row[2].plot(times.numpy(), lines.numpy(), linewidth=0.5, alpha=0.6)
        row[2].set_title("gamma of pixels over time", fontsize=9)
        shown = row[3].imshow(middle[0].expand(16, 16).numpy(), cmap="viridis")
        figure.colorbar(shown, ax=row[3])
        row[3].set_title("gamma at t = 0.5", fontsize=9)
        row[3].axis("off")
    figure.savefig(path, dpi=85)
