"""A garment whose upper part is kept while a text changes the rest: a change map, with a step and with a ramp.

The demo model draws garments of one kind; the lower half of each is then steered to another kind by CLIP. A judging
classifier that never guides says what the whole is taken for. Results go to `results/change-map.md` and `.png`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lossguide.guidance import recipes
from lossguide.losses import ClipText
from lossguide.losses.demo import CLASSES, classifier
from lossguide.samplers import TimeTravel, load_demo, sample
from torchvision.utils import make_grid

RESULTS = Path(__file__).parent / "results"
FROM, TO = "pullover", "dress"
KEPT = 16  # rows of 32
PICTURES, STEPS = 16, 50
TRAVEL = TimeTravel(3, 0.0, 0.9)


def maps() -> dict[str, torch.Tensor]:
    """Maps `(32, 32)` that keep the upper half: free at once below, or the more the lower."""
    rows = torch.arange(32.0)[:, None].expand(32, 32)
    ramp = ((rows - KEPT + 1) / 8).clamp(0, 1)
    return {"step": (rows >= KEPT).float(), "ramp": ramp}


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Draw, judge and report."""
    count, steps = (4, 10) if quick else (PICTURES, STEPS)
    model, judge, seeds = load_demo(), classifier("judge"), range(count)
    wanted = {name: recipes.auto(ClipText(f"a photo of a {name}", model="demo")) for name in (FROM, TO)}
    ways = {"unguided": None, f"guided to '{TO}'": wanted[TO]}
    ways["the same, travelling"] = wanted[TO].replace(time_travel=TRAVEL, clock="steps")

    @torch.no_grad()
    def taken(images: torch.Tensor) -> dict[str, float]:
        found = judge(images).argmax(1)
        return {name: (found == CLASSES.index(name)).float().mean().item() for name in (FROM, TO)}

    source = sample(model, wanted[FROM], steps=steps, seeds=seeds).images
    shown, rows = {"source": source}, [("source", taken(source), "", "")]
    for name, change_map in maps().items():
        for way, guidance in ways.items():
            how = f"{name}, {way}"
            drawn = sample(model, guidance, steps=steps, seeds=seeds, source=source, change_map=change_map).images
            kept = "yes" if torch.equal(drawn[:, :, :KEPT], source[:, :, :KEPT]) else "no"
            seam = (drawn[:, :, KEPT] - drawn[:, :, KEPT - 1]).abs().mean().item()
            shown[how] = drawn
            rows.append((how, taken(drawn), kept, f"{seam:.3f}"))
    own = (source[:, :, KEPT] - source[:, :, KEPT - 1]).abs().mean().item()
    name = "change-map-quick" if quick else "change-map"
    lines = [
        "# Change maps: the upper half kept, the lower half steered by a text",
        "",
        f"`python -m benchmarks run change-map{' --quick' if quick else ''}`",
        "",
        f"The demo model, {steps} steps; {count} garments drawn with `auto` to 'a photo of a {FROM}', of which the "
        f"upper {KEPT} rows are kept. step: the rest is free at once; ramp: the map rises from 0 to 1 over 8 rows. "
        f"travelling: every step up to {TRAVEL.stop:.0%} visited {TRAVEL.repeats} times, noise put back in between. "
        "Shares of a judging classifier that never guides. Seam: mean difference of the rows beside the edge; "
        f"{own:.3f} in the source.",
        "",
        f"| map | taken for a {FROM} | taken for a {TO} | upper half the source's, bit by bit | seam |",
        "|---|---|---|---|---|",
        *(f"| {how} | {share[FROM]:.2f} | {share[TO]:.2f} | {kept} | {seam} |" for how, share, kept, seam in rows),
        "",
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(lines))
    _sheet(RESULTS / f"{name}.png", {key: images[:8] for key, images in shown.items()})
    print("\n".join(lines))


def _sheet(path: Path, shown: dict[str, torch.Tensor]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.25 * len(shown)), layout="constrained")
    for axis, (title, images) in zip(figure.subplots(len(shown), 1), shown.items()):
        large = torch.nn.functional.interpolate(images, scale_factor=3)
        axis.imshow(make_grid(large, nrow=8, padding=6, pad_value=1.0).permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=90)
