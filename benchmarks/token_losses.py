"""Features, tokens and their histogram as guides of a real model: do tokens bring what a reference shows, but not how?

`auto` at its default guides the real 64x64 model towards reference pictures, in a layer of one network. A network that
does not guide judges how alike the contents are; pixels and LPIPS, in a third, how much of the very picture came along.
One row per run goes to `results/token-losses.jsonl`; a run that is there is not repeated.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from lossguide.guidance import recipes
from lossguide.losses import Codebook, FeatureLoss, PatchFeatures, TokenHistogramLoss, TokenLoss
from lossguide.losses.loss import Loss
from lossguide.losses.network import IMAGENET_MEAN, IMAGENET_STD, read_weights
from lossguide.samplers import sample
from torchvision.utils import save_image

from . import losses, methods, real, work_look
from .rows import Rows

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / ".train" / "token-losses"  # not committed: pictures of the runs
STEPS, QUICK_STEPS = 50, 8
SIDE = 128  # at which every network sees the pictures
K = 256
SEEDS = (range(20, 24), range(30, 34))  # a block has one picture per reference
OWN = dict(size=SIDE, mean=IMAGENET_MEAN, std=IMAGENET_STD)
KINDS = {
    "FeatureLoss": lambda codebook, wanted: FeatureLoss(codebook.encoder, wanted),
    "TokenLoss": TokenLoss,
    "TokenHistogramLoss": TokenHistogramLoss,
}
WEAK, STRENGTH = "FeatureLoss, weaker", 0.3  # is a token only a weaker feature?


@dataclass(frozen=True)
class Guide:
    """A network that guides.

    Attributes:
        name: what it is, for the report.
        encoder: its layer.
        metric: LPIPS by another trunk, as lpips names it.
        runs: what is drawn, and of how many blocks of seeds.
    """

    name: str
    encoder: PatchFeatures
    metric: str
    runs: dict[str, int]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The losses that are tried."""
        return tuple(kind for kind in self.runs if kind in KINDS)


@functools.cache
def guides() -> dict[str, Guide]:
    """Every guide by the name of its network."""
    mobilenet = PatchFeatures(losses.mobilenet().features, "13", **OWN)
    alexnet = PatchFeatures(real.alexnet(), "11", **OWN)
    most = {"unguided": 2, "FeatureLoss": 2, "TokenLoss": 2, "TokenHistogramLoss": 1, WEAK: 1}
    least = {"unguided": 1, "FeatureLoss": 1, "TokenLoss": 1}
    return {
        "mobilenet": Guide("MobileNetV2, features.13, 8 x 8 patches", mobilenet, "alex", most),
        "alexnet": Guide("AlexNet, features.11, 7 x 7 patches", alexnet, "vgg", least),
    }


@functools.cache
def codebook(network: str) -> Codebook:
    """K codes of the model's training pictures but for the references."""
    rest = [place for place in range(len(real.pictures())) if place not in losses.REFERENCES]
    return Codebook.fit(real.pictures()[rest], guides()[network].encoder, K)


@functools.cache
def judge() -> PatchFeatures:
    """VGG-16's last rectified layer, which never guides."""
    from torchvision.models import vgg16

    network = vgg16(weights=None).features
    weights = read_weights(real.FOLDER / "lpips" / "vgg16_features.pt", "VGG-16")
    network.load_state_dict({key.removeprefix("features."): value for key, value in weights.items()})
    return PatchFeatures(network, "29", **OWN)


@torch.no_grad()
def contents(images: torch.Tensor) -> torch.Tensor:
    """Unit vectors `(B, 512)`: what the judge sees, averaged over the picture."""
    seen = torch.cat([judge()(part).mean(1) for part in images.clamp(0, 1).split(25)])
    return torch.nn.functional.normalize(seen, dim=1)


@functools.cache
def known() -> torch.Tensor:
    """What the judge sees in the model's training pictures, centred: what all of them share says nothing."""
    return contents(real.pictures())


@torch.no_grad()
def judged(images: torch.Tensor, metric: str) -> dict[str, list[float]]:
    """Figures of pictures `(4, 3, 64, 64)`, the first for the first reference and so on.

    `alike` is the judge's correlation with the reference, `rank` the share of the other training pictures that are more
    like the picture than its reference, `psnr` and `lpips` the distance to the reference itself.
    """
    wanted, images = losses.references(), images.clamp(0, 1)
    middle = known().mean(0)
    unit = torch.nn.functional.normalize
    cosines = unit(contents(images) - middle, dim=1) @ unit(known() - middle, dim=1).T
    alike = cosines[range(len(images)), list(losses.REFERENCES)]
    rank = (cosines > alike[:, None]).double().sum(1) / (cosines.shape[1] - 1)
    psnr = -10 * (images - wanted).square().mean((1, 2, 3)).log10()
    figures = dict(alike=alike, rank=rank, psnr=psnr, lpips=lpips(metric)(images * 2 - 1, wanted * 2 - 1).flatten())
    return {name: values.tolist() for name, values in figures.items()}


@functools.cache
def lpips(net: str) -> torch.nn.Module:
    """LPIPS with its ImageNet trunk."""
    return real.load().lpips_metric(net)


def drawn(loss: Loss | None, strength: float, block: int, steps: int) -> torch.Tensor:
    """Pictures `(4, 3, 64, 64)` of a block's seeds in [0, 1]."""
    model = methods.model_in(real.model, torch.bfloat16)
    guidance = None if loss is None else recipes.auto(loss, strength=strength)
    return sample(model, guidance, steps=steps, seeds=SEEDS[block]).images


def kept(network: str, kind: str, block: int, steps: int) -> Path:
    """Where a run's pictures are."""
    return PICTURES / f"{network}-{kind}-{block}-{steps}.pt"


def measured(rows: Rows, network: str, kind: str, block: int, steps: int) -> dict:
    """The row of a run; without a `kind` of the unguided pictures, in every loss."""
    guide, words = guides()[network], codebook(network)
    key = dict(network=network, kind=kind, block=block, steps=steps, codes=words.digest)
    if (row := rows.get(**key)) is not None:
        return row
    wishes = {name: KINDS[name](words, losses.references()) for name in guide.kinds}
    loss = wishes.get("FeatureLoss" if kind == WEAK else kind)
    images = drawn(loss, STRENGTH if kind == WEAK else 1.0, block, steps)
    PICTURES.mkdir(parents=True, exist_ok=True)
    torch.save(images, kept(network, kind, block, steps))
    with torch.no_grad():
        values = {f"value {name}": wish(images).tolist() for name, wish in wishes.items()}
        ids = words.ids(torch.cat([images, losses.references()]))
        values["same"] = (ids[:4] == ids[4:]).double().mean(1).tolist()
    row = key | values | judged(images, guide.metric)
    print(
        network, kind, block, {k: round(sum(v) / len(v), 3) for k, v in row.items() if isinstance(v, list)}, flush=True
    )
    return rows.add(row)


def between(rows: Rows, network: str, kind: str, steps: int) -> dict | None:
    """The row of how far pictures of two seeds, drawn to the same reference, are from each other."""
    guide, key = guides()[network], dict(network=network, kind=kind, block="both", steps=steps)
    key["codes"] = codebook(network).digest
    if (row := rows.get(**key)) is not None:
        return row
    paths = [kept(network, kind, block, steps) for block in range(2)]
    if guide.runs[kind] < 2 or not all(path.exists() for path in paths):
        return None
    one, other = (torch.load(path, weights_only=True).clamp(0, 1) * 2 - 1 for path in paths)
    with torch.no_grad():
        return rows.add(key | dict(apart=lpips(guide.metric)(one, other).flatten().tolist()))


def natural(rows: Rows, row: dict) -> dict | None:
    """The row of how far the model itself moves a run's pictures, given with some noise; see `work_look.natural`."""
    key = {name: row[name] for name in ("network", "kind", "steps", "codes")} | dict(block=f"{row['block']}, moved")
    path = kept(row["network"], row["kind"], row["block"], row["steps"])
    if (found := rows.get(**key)) is not None or not path.exists():
        return found
    moved = work_look.natural(torch.load(path, weights_only=True).clamp(0, 1))["moved"]
    return rows.add(key | dict(moved=moved.tolist()))


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure every guide, and write the report; `only` names losses, networks or 'unguided'."""
    if not real.available():
        raise SystemExit("token-losses needs the real model, which is not on this machine: ../shared/real")
    torch.set_num_threads(1)
    name, steps = ("token-losses-quick", QUICK_STEPS) if quick else ("token-losses", STEPS)
    rows = Rows(RESULTS / f"{name}.jsonl", methods.weights_digest(real.model), fresh)
    for block in range(1 if quick else len(SEEDS)):
        for network, guide in guides().items():
            for kind, blocks in guide.runs.items():
                if block < blocks and (not only or {network, kind} & set(only)):
                    measured(rows, network, kind, block, steps)
    report(rows, name, steps)


def report(rows: Rows, name: str, steps: int) -> None:
    """Write the tables of what has been measured, and the page of pictures."""
    command = "python -m benchmarks run token-losses" + (" --quick" if name.endswith("quick") else "")
    lines = [
        "# Features, tokens and their histogram",
        "",
        f"`{command}`",
        "",
        f"Pictures of the real 64x64 model, {steps} steps, `auto` at its default, each guided to one of four reference "
        f"pictures. Every network sees them at {SIDE} x {SIDE}. The codebook has {K} codes, fitted to the other "
        f"{len(real.pictures()) - len(losses.REFERENCES)} training pictures at hand. Means, with standard errors.",
        "",
        "- Three losses: that loss of the finished pictures, as a share of the unguided pictures' at the same seeds, "
        "whichever guided.",
        "- Same tokens: the share of patches whose token is the reference's.",
        "- Alike: the correlation with the reference in VGG-16's last layer, averaged over the picture and centred; it "
        "never guides. Rank: the share of the other training pictures that are more like the picture than its "
        "reference is, 0 where the reference is the nearest, .5 by chance.",
        "- PSNR and LPIPS, by a third network, to the reference: how much of the very picture came along.",
        "- Two seeds: LPIPS between two pictures drawn to the same reference.",
        "- Moved: how far the model itself moves the picture, given with some noise: more where it is less natural.",
        f"- {WEAK}: at strength {STRENGTH}.",
    ]
    for network, guide in guides().items():
        of = lambda kind, network=network: [
            row
            for block in range(len(SEEDS))
            if (row := rows.get(network=network, kind=kind, block=block, steps=steps, codes=codebook(network).digest))
        ]
        plain = of("unguided")
        if not plain:
            continue
        lines += [
            "",
            f"## {guide.name}",
            "",
            f"LPIPS by {dict(alex='AlexNet', vgg='VGG-16')[guide.metric]}; "
            f"the codes' entropy is {codebook(network).entropy:.2f} of {math.log2(K):.0f} bits.",
            "",
            f"| guide | pictures | {' | '.join(guide.kinds)} | same tokens | alike | rank | PSNR | LPIPS | two seeds | "
            "moved |",
            "|---" * (len(guide.kinds) + 9) + "|",
        ]
        for kind in guide.runs:
            if found := of(kind):
                blocks = {row["block"] for row in found}
                base = [row for row in plain if row["block"] in blocks]
                shares = [f"{mean(found, f'value {k}') / mean(base, f'value {k}'):.2f}" for k in guide.kinds]
                figures = [told(found, *entry) for entry in (("same", 2), ("alike", 2), ("rank", 3))]
                figures += [told(found, *entry) for entry in (("psnr", 1), ("lpips", 3))]
                pair, moved = between(rows, network, kind, steps), [natural(rows, row) for row in found]
                figures += [told([pair], "apart", 3) if pair else "", told(moved, "moved", 3) if all(moved) else ""]
                cells = [kind, str(4 * len(found)), *shares, *figures]
                lines.append(f"| {' | '.join(cells)} |")
    shown = [kind for kind in guides()["mobilenet"].runs if kept("mobilenet", kind, 0, steps).exists()]
    if shown:
        pages = [torch.load(kept("mobilenet", kind, 0, steps), weights_only=True) for kind in shown]
        save_image(torch.cat([losses.references(), *pages]).clamp(0, 1), RESULTS / f"{name}.png", nrow=4)
        lines += [
            "",
            f"Guided in MobileNetV2. From above: the references; {'; '.join(shown)}.",
            "",
            f"![Pictures]({name}.png)",
        ]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(RESULTS / f"{name}.md")


def told(rows: list[dict], figure: str, digits: int) -> str:
    """Mean and standard error over the pictures of some rows."""
    values = torch.tensor([value for row in rows for value in row[figure]])
    return f"{values.mean():.{digits}f} ± {values.std() / len(values) ** 0.5:.{digits}f}"


def mean(rows: list[dict], figure: str) -> float:
    """Mean over the pictures of some rows."""
    values = [value for row in rows for value in row[figure]]
    return sum(values) / len(values)
