"""Every loss on a real model with real networks: how far it falls, and whether a judge that did not guide agrees.

`auto` at its default guides the real 64x64 model; guided and unguided pictures share their seeds. The second table has
random augmentation on and off for the losses in which a network judges. One row per run goes to
`results/losses.jsonl`; a run that is there is not repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lossguide.guidance import Augment, recipes
from lossguide.losses import (
    Color,
    Measurement,
    Perceptual,
    Saliency,
    Sketch,
    Style,
    Term,
    measure,
    operators,
    read_image,
)
from lossguide.losses.loss import Composable
from lossguide.samplers import sample
from scipy.ndimage import distance_transform_edt
from torchvision.utils import save_image

from . import methods, real, work_look
from .rows import Rows

RESULTS = Path(__file__).parent / "results"
SHEETS = Path(__file__).parents[1] / ".train" / "losses"  # not committed: pictures of the runs
SEEDS, STEPS = range(20, 24), 50
VARIANTS = ("not augmented", "augmented")
SALIENCY_SIDE = 160  # half of what the network was trained at, a quarter of the time
REFERENCES = (5, 50, 100, 150)  # pictures of the real model's own kind


@dataclass(frozen=True)
class Task:
    """A wish and its judge.

    Attributes:
        loss: makes the guide.
        judge: pictures `(B, 3, H, W)` in [0, 1] -> `(B,)`, lower is better; another network or another measure.
        judged: what the judge is, for the report.
        network: whether augmentation is tried on and off.
        shown: whether the pictures are new ones, not made to be like given ones.
    """

    loss: Callable[[], Composable]
    judge: Callable[[torch.Tensor], torch.Tensor]
    judged: str
    network: bool = False
    shown: bool = True


def references() -> torch.Tensor:
    """Pictures `(4, 3, 64, 64)` in [0, 1]."""
    return real.pictures()[list(REFERENCES)]


def disc(side: int = 64) -> torch.Tensor:
    """A mask `(1, side, side)`: a disc in the middle that covers a third."""
    place = torch.linspace(-1, 1, side)
    return ((place[:, None] ** 2 + place[None] ** 2) < 4 / 3 / torch.pi * 1.0).float()[None]


def left(side: int = 64) -> torch.Tensor:
    """A mask `(1, side, side)`: the left half."""
    mask = torch.zeros(1, side, side)
    mask[..., : side // 2] = 1
    return mask


@functools.cache
def u2net() -> torch.nn.Module:
    """U-2-Net's foreground probability, differentiable."""
    import onnx
    from onnx2torch import convert

    return convert(onnx.load(str(real.FOLDER / "saliency" / "u2netp.onnx"))).eval().requires_grad_(False)


@functools.cache
def mobilenet() -> torch.nn.Module:
    """MobileNetV2 with its ImageNet weights."""
    return real.load().mobilenet_v2()


@functools.cache
def vgg() -> torch.nn.Module:
    """LPIPS with the VGG trunk."""
    return real.load().lpips_metric("vgg")


def normalised(image: torch.Tensor, side: int) -> torch.Tensor:
    """As ImageNet networks want it, at a size."""
    image = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
    mean, std = image.new_tensor((0.485, 0.456, 0.406)), image.new_tensor((0.229, 0.224, 0.225))
    return (image - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def features_to(targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Cosine distance of MobileNetV2's features to those of reference pictures."""

    def features(image: torch.Tensor) -> torch.Tensor:
        return mobilenet().features(normalised(image, 128)).mean((2, 3))

    with torch.no_grad():
        wanted = features(targets)

    def imagenet_features(image: torch.Tensor) -> torch.Tensor:
        return 1 - F.cosine_similarity(features(image), wanted.repeat(len(image) // len(wanted), 1))

    return imagenet_features


def gram_judge(style: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Relative Gram distance in AlexNet."""
    painting = F.interpolate(read_image(_style(style))[None], (64, 64), mode="bicubic", antialias=True)

    @torch.no_grad()
    def judge(images: torch.Tensor) -> torch.Tensor:
        pairs = zip(work_look._grams(images), work_look._grams(painting))
        return torch.stack([(a - b).flatten(1).norm(dim=1) / b.norm() for a, b in pairs]).mean(0)

    return judge


def colour_judge(images: torch.Tensor) -> torch.Tensor:
    """Mean Delta E of the best assignment of pixels."""
    return work_look.color("evaluation").judge(images)["delta_e"]


def border_judge(mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """One minus the correlation of the mask with how far, in Lab, each pixel is from the colours outside of it."""
    import kornia

    def judge(images: torch.Tensor) -> torch.Tensor:
        lab = kornia.color.rgb_to_lab(images.clamp(0, 1))
        outside = (1 - mask)[None]
        mean = (lab * outside).sum((2, 3), keepdim=True) / outside.sum()
        far = (lab - mean).norm(dim=1).flatten(1)
        wanted = mask.flatten()[None].expand_as(far)
        far, wanted = far - far.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True)
        return 1 - F.cosine_similarity(far, wanted)

    return judge


def edges_judge(drawing: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mean distance in pixels between the picture's Canny edges and the drawing's, both ways."""
    import kornia

    def edges(images: torch.Tensor) -> torch.Tensor:
        return kornia.filters.canny(images.clamp(0, 1), 0.1, 0.3)[1][:, 0] > 0

    line = edges(drawing)[0]

    def judge(images: torch.Tensor) -> torch.Tensor:
        found = []
        for own in edges(images):
            ways = [(own, line), (line, own)]
            found.append(sum(distance_transform_edt(~b.numpy())[a.numpy()].mean() for a, b in ways if a.any()) / 2)
        return torch.tensor(found)

    return judge


def _style(name: str) -> Path:
    return real.FOLDER / "style" / f"{name}.jpg"


def _styled(name: str) -> Style:
    return Style(_style(name), weights=real.FOLDER / "lpips" / "vgg16_features.pt", size=64)


def foreground(mask: torch.Tensor) -> Saliency:
    return Saliency(u2net(), mask[0], mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=SALIENCY_SIDE)


def _restored(operator) -> Measurement:
    y = measure(operator, references(), 0.025, torch.Generator().manual_seed(7))
    return Measurement(operator, y, 0.025)


def _to_reference(images: torch.Tensor) -> torch.Tensor:
    return real.lpips(images, references())


def _drawing() -> torch.Tensor:
    import kornia

    edges = kornia.filters.sobel(references()[:1]).amax(1)[0]
    return 1 - (edges / edges.max()).expand(3, -1, -1)


def tasks() -> dict[str, Task]:
    """Every wish by name."""
    found = {
        f"style: {name.split('-')[0]}": Task(
            functools.partial(_styled, name), gram_judge(name), "Gram distance in AlexNet", name == "candy"
        )
        for name in ("candy", "mosaic", "rain-princess-cropped", "udnie")
    }
    mask = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(3)) > 0.5
    found |= {
        "colours": Task(lambda: Color(real.pictures()[work_look.PALETTE]), colour_judge, "Delta E, best assignment"),
        "foreground: disc": Task(lambda: foreground(disc()), border_judge(disc()), "Lab contrast to mask", True),
        "foreground: left half": Task(lambda: foreground(left()), border_judge(left()), "Lab contrast to mask", False),
        "ImageNet features": Task(
            lambda: Term(features_to(references())), _to_reference, "LPIPS, AlexNet", True, shown=False
        ),
        "LPIPS, VGG": Task(lambda: Perceptual(references(), vgg()), _to_reference, "LPIPS, AlexNet", True, shown=False),
        "sketch": Task(lambda: Sketch(_drawing()), edges_judge(references()[:1]), "distance of Canny edges, pixels"),
        "super-resolution": Task(
            lambda: _restored(operators.SuperResolution(4)), _to_reference, "LPIPS, AlexNet", shown=False
        ),
        "inpainting": Task(lambda: _restored(operators.Inpaint(mask)), _to_reference, "LPIPS, AlexNet", shown=False),
        "deblurring": Task(
            lambda: _restored(operators.GaussianBlur(9, 2.0)), _to_reference, "LPIPS, AlexNet", shown=False
        ),
        "sketch and colours, balanced": Task(
            lambda: Sketch(_drawing()) + Color(real.pictures()[work_look.PALETTE]),
            lambda images: edges_judge(references()[:1])(images) + colour_judge(images) / 10,
            "Canny edges, pixels + Delta E / 10",
        ),
    }
    return found


def draw(loss: Composable | None, augment: Augment | None | str = "default") -> torch.Tensor:
    """Pictures `(4, 3, 64, 64)` in [0, 1]; plain ones without a loss."""
    model = methods.model_in(real.model, torch.bfloat16)
    guidance = None
    if loss is not None:
        terms = loss.terms()
        changes = {} if augment == "default" else {"augment": augment}
        guidance = recipes.auto(loss, balance=len(terms) > 1, **changes)
    return sample(model, guidance, steps=STEPS, seeds=SEEDS).images


@torch.no_grad()
def value(loss: Composable, images: torch.Tensor) -> torch.Tensor:
    """The guide's own loss `(B,)` of finished pictures."""
    return sum(term.weight * term(images) for term in loss.terms())


def measured(rows: Rows, name: str, task: Task, variant: str) -> dict:
    """The row of a run: guide's and judge's loss, guided and unguided."""
    key = dict(task=name, variant=variant, steps=STEPS)
    if (row := rows.get(**key)) is not None:
        return row
    plain = plain_pictures()
    loss = task.loss()
    if variant == "default":
        images = draw(loss)
        SHEETS.mkdir(parents=True, exist_ok=True)
        save_image(images, sheet_of(name), nrow=4)
    else:
        suited = [Term(t.loss, name=t.name, augment=variant == "augmented") for t in loss.terms()]
        images = draw(sum(suited[1:], suited[0]), Augment.geometric(8) if variant == "augmented" else None)
    row = dict(
        **key,
        guide=value(loss, images).mean().item(),
        guide_plain=value(loss, plain).mean().item(),
        judge=task.judge(images).double().mean().item(),
        judge_plain=task.judge(plain).double().mean().item(),
    )
    print(name, variant, {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}, flush=True)
    return rows.add(row)


@functools.cache
def plain_pictures() -> torch.Tensor:
    """The unguided pictures of the seeds."""
    path = SHEETS / "plain.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(draw(None), path)
    return torch.load(path, weights_only=True)


def sheet_of(name: str) -> Path:
    """Where a task's pictures are kept."""
    return SHEETS / f"{name.replace(' ', '-').replace(':', '').replace(',', '')}.png"


def page(names: list[str]) -> None:
    """One page: the unguided pictures, then a row of each task's."""
    rows = [plain_pictures()]
    for name in names:
        strip = read_image(sheet_of(name))
        between = (strip.shape[2] - 4 * 64) // 5
        strip = strip[:, between : between + 64]
        rows.append(torch.stack([strip[:, :, i * (64 + between) + between :][:, :, :64] for i in range(4)]))
    save_image(torch.cat(rows), RESULTS / "losses.png", nrow=4)


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure every loss, and write the report."""
    if not real.available():
        raise SystemExit("the real model is not on this machine")
    torch.set_num_threads(1)
    rows = Rows(RESULTS / "losses.jsonl", methods.weights_digest(real.model), fresh)
    for name, task in tasks().items():
        if not only or name in only:
            for variant in ("default", *(VARIANTS if task.network and not quick else ())):
                measured(rows, name, task, variant)
    report(rows)


def report(rows: Rows) -> None:
    """Write the tables of what has been measured, and the page of pictures."""
    lines = [
        "# Every loss on a real model",
        "",
        "`python -m benchmarks run losses`",
        "",
        f"Four pictures of the real 64x64 model, {STEPS} steps, `auto` at its default. Losses are means over the "
        "pictures, as a share of the unguided pictures' at the same seeds.",
        "",
        "| loss | guide's, of unguided | judge's, of unguided | judge |",
        "|---|---|---|---|",
    ]
    for name, task in tasks().items():
        if (row := rows.get(task=name, variant="default", steps=STEPS)) is not None:
            guide, judge = _shares(row)
            lines.append(f"| {name} | {guide:.2f} | {judge:.2f} | {task.judged} |")
    lines += [
        "",
        "## Random augmentation on and off",
        "",
        "Eight copies shifted, resized and turned a little, or none, where a network judges. The gap is the judge's "
        "share less the guide's: how much of the fall the judge does not see.",
        "",
        "| loss | guide, off | judge, off | gap, off | guide, on | judge, on | gap, on |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in tasks():
        found = [rows.get(task=name, variant=variant, steps=STEPS) for variant in VARIANTS]
        if any(found):
            cells = []
            for row in found:
                shares = _shares(row) if row else ()
                cells += [f"{v:.2f}" for v in (*shares, shares[1] - shares[0])] if row else [""] * 3
            lines.append(f"| {name} | {' | '.join(cells)} |")
    shown = [name for name, task in tasks().items() if task.shown and sheet_of(name).exists()]
    if shown:
        page(shown)
        lines += [
            "",
            f"From above: unguided; {'; '.join(shown)}. Pictures made to be like given ones are not shown.",
            "",
            "![Pictures](losses.png)",
        ]
    (RESULTS / "losses.md").write_text("\n".join(lines) + "\n")
    print(RESULTS / "losses.md")


def _shares(row: dict) -> tuple[float, float]:
    return row["guide"] / row["guide_plain"], row["judge"] / row["judge_plain"]
