"""How likely pictures are to the demo model, and what that tells: closed forms, other kinds of pictures, guided ones.

Bits per dimension by the bound (`elbo_bpd`) and along the ODE (`ode_bpd`). One row per set of pictures goes to
`results/likelihood.jsonl` as soon as it is measured; a row that is there, of the same weights, is not measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from lossguide.guidance import recipes
from lossguide.guidance.cli_rerank import likeliest
from lossguide.losses import ClassLabel
from lossguide.losses.demo import classifier
from lossguide.samplers import likelihood as measure
from lossguide.samplers import load_demo, sample
from lossguide.samplers.random import particle_seeds

from . import laws, likelihood_report, runs
from .cifar10 import data as cifar10
from .demo.data import fashion_mnist
from .likelihood_report import AUGMENTED, GARMENTS, RANKED, UNGUIDED
from .rows import Rows

RESULTS = Path(__file__).parent / "results"
KEPT = Path(__file__).parents[1] / ".train" / "likelihood"  # not committed: the pictures of the sets
EDGES = (-9.3, -4.0, 0.0, 4.0, 10.2)  # of minus log signal-to-noise: the bound's shares between them are kept
SEED = 0


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    garments: int = 256
    others: int = 24
    guided: int = 30
    along: int = 8  # guided ones along the ODE; half as many of each other kind, four times as many test garments
    times: int = 32
    steps: int = 12  # of the ODE
    sampling: int = 50


FULL = Size()
QUICK = Size(garments=12, others=6, guided=4, along=2, times=8, steps=6, sampling=12)

GUIDED = {
    UNGUIDED: None,
    AUGMENTED: ("auto", {}),
    "auto, strength 2": ("auto", dict(strength=2.0)),
    "dps, strength 30": ("dps", dict(strength=30.0)),
    "dps, strength 100": ("dps", dict(strength=100.0)),
    "dps, strength 200": ("dps", dict(strength=200.0)),
    "dps, strength 1000": ("dps", dict(strength=1000.0)),
    "mpgd, strength 8": ("mpgd", dict(strength=8.0)),
    "mpgd, strength 32": ("mpgd", dict(strength=32.0)),
    "mpgd, strength 38": ("mpgd", dict(strength=38.0)),  # to about the guide loss that auto leaves
    "freedom": ("freedom", dict(rule="rms")),
    "adam_dps": ("adam_dps", {}),
}
"""Guided pictures; auto augments and goes through the denoiser, the others see the plain gradient of the classifier."""
RERANKED = ("dps", dict(strength=100.0), 4)


def others(count: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Pictures `(count, 1, 32, 32)` in [0, 1] that the model was not trained on, and some that it was."""
    source = lambda: torch.Generator().manual_seed(SEED)
    garments = lambda: fashion_mnist("test")[0][:count]
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    found = {
        "garments, training": lambda: fashion_mnist("train")[0][:count],
        "garments, blurred": lambda: F.conv2d(garments(), torch.outer(kernel, kernel)[None, None], padding=2),
        "garments, upside down": lambda: garments().flip(2),
        "garments, negative": lambda: 1 - garments(),
        "one grey each": lambda: torch.rand(count, 1, 1, 1, generator=source()).expand(-1, 1, 32, 32),
        "black": lambda: torch.zeros(count, 1, 32, 32),
        "uniform noise": lambda: torch.rand(count, 1, 32, 32, generator=source()),
    }
    if cifar10.available():
        found["CIFAR-10, grey"] = lambda: cifar10.cifar10("test")[0][:count].float().mean(1, keepdim=True) / 255
    return found


def labels(count: int) -> list[int]:
    """The label that each guided picture is to have."""
    return [i % 10 for i in range(count)]


def drawn(recipe: tuple | None, seeds: list[int], wanted: list[int], steps: int) -> torch.Tensor:
    """Pictures of the seeds, guided to a label each."""
    guidance = None if recipe is None else recipes.get(recipe[0])(ClassLabel(wanted), **recipe[1])
    model = runs.model_in(load_demo, torch.bfloat16)
    return sample(model, guidance, steps=steps, seeds=seeds).images.float()


@torch.no_grad()
def judged(images: torch.Tensor, wanted: list[int]) -> dict[str, list[float]]:
    """The guide's loss and whether the judge agrees, per picture."""
    loss = ClassLabel(wanted)(images.expand(-1, 3, -1, -1))
    right = classifier("judge")(images).argmax(1) == torch.tensor(wanted)
    return {"guide": loss.tolist(), "accuracy": right.float().tolist()}


def kept(name: str, quick: bool, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Pictures that are drawn once, rounded to eight bits."""
    path = KEPT / f"{name}{'-quick' if quick else ''}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((make().clamp(0, 1) * 255).round().byte(), path)
    return torch.load(path).float() / 255


def likely(images: torch.Tensor, size: Size, along: int) -> dict:
    """The figures of a set, per picture, in bits per dimension."""
    model = load_demo()
    start = time.process_time()
    bound = measure.elbo_bpd(model, images, times=size.times)
    middle = time.process_time()
    parts = bound.errors / bound.errors.sum(1, keepdim=True) * bound.terms["diffusion"][:, None]
    levels = [(parts * ((bound.gamma >= low) & (bound.gamma < high))).sum(1) for low, high in zip(EDGES, EDGES[1:])]
    row = {
        "elbo": bound.bpd.tolist(),
        "elbo_error": bound.standard_error.mean().item(),
        "terms": {name: value.tolist() for name, value in bound.terms.items()},
        "levels": torch.stack(levels, 1).tolist(),
        "elbo_seconds": (middle - start) / len(images),
    }
    if along:
        ode = measure.ode_bpd(model, images[:along], steps=size.steps)
        row |= {"ode": ode.bpd.tolist(), "ode_seconds": (time.process_time() - middle) / along}
    return row


def closed_forms(times: int) -> list[dict]:
    """Largest errors in nats at four points: of the bound and of the density along the ODE."""
    schedulers = {
        "DDIM, linear betas, noise": diffusers.DDIMScheduler(),
        "DDIM, linear betas, v": diffusers.DDIMScheduler(prediction_type="v_prediction"),
        "DDIM, cosine betas": diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
        "Euler": diffusers.EulerDiscreteScheduler(),
        "EDM": diffusers.EDMEulerScheduler(),
        "flow matching": diffusers.FlowMatchEulerDiscreteScheduler(),
        "per pixel": None,
    }
    x, found = laws.POINTS, []
    for name, scheduler in schedulers.items():

        def told(law, vectors, scheduler=scheduler):
            if scheduler is None:
                return laws.told_per_pixel(law, laws.two_clocks(), vectors)
            return laws.told(law, scheduler, vectors)

        def off(found, law, vectors=1):
            return (found.log_likelihood / vectors - laws.log_density(law, x)).abs().max().item()

        many = x[:, None, None].expand(-1, 1, 4, 2).contiguous()
        random, measure.randn = measure.randn, laws.balanced(2)
        try:
            bound = off(measure.elbo_bpd(told(laws.BELL, 4), many, bits=None, times=times), laws.BELL, 4)
        finally:
            measure.randn = random
        points = x[:, None, None]
        row = {"path": name, "bound": bound}
        row["ode"] = off(measure.ode_bpd(told(laws.BELL, 1), points, bits=None, steps=60), laws.BELL)
        if scheduler is not None:
            row["mixture"] = off(measure.ode_bpd(told(laws.BELLS, 1), points, bits=None, steps=60), laws.BELLS)
        found.append(row)
    return found


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure every set, or `only` some; write rows, and of what has been measured so far table, plot and sheet."""
    size, name = (QUICK, "likelihood-quick") if quick else (FULL, "likelihood")
    rows = Rows(RESULTS / f"{name}.jsonl", runs.weights_digest(load_demo), fresh)
    if fresh:
        for path in KEPT.glob("*-quick.pt" if quick else "*.pt"):
            if quick or not path.stem.endswith("-quick"):
                path.unlink()
    wanted = labels(size.guided)
    seeds = list(range(SEED, SEED + size.guided))
    known = [GARMENTS, *others(1), *GUIDED, RANKED]
    unknown = [one for one in only if one not in known]
    if unknown:
        raise SystemExit(f"there is no {unknown[0]!r}; there are {', '.join(map(repr, known))}")
    found, pictures = {}, {}

    def row(which: str, count: int, along: int, images: Callable[[], torch.Tensor], more: Callable | None = None):
        key = dict(set=which, pictures=count, times=size.times, along=along, steps=size.steps)
        one = rows.get(**key)
        if one is None and only and which not in only:
            return
        pictures[which] = kept(which, quick, images)
        if one is None:
            one = key | likely(pictures[which], size, along)
            one = rows.add(one | (more(pictures[which]) if more else {}))
            print(f"{which:24} {sum(one['elbo']) / len(one['elbo']):.3f} bits/dim", flush=True)
        found[which] = one

    row(GARMENTS, size.garments, 4 * size.along, lambda: fashion_mnist("test")[0][: size.garments])
    for which, images in others(size.others).items():
        row(which, size.others, size.along // 2, images)
    judge = lambda images: judged(images, wanted)
    for which, recipe in GUIDED.items():
        along = size.along if which in likelihood_report.TELL_APART else 0
        draw = lambda recipe=recipe: drawn(recipe, seeds, wanted, size.sampling)
        row(which, size.guided, along, draw, judge)
    recipe, options, count = RERANKED
    candidates, again = particle_seeds(seeds, count), wanted * count
    draw = lambda: drawn((recipe, options), candidates, again, size.sampling)
    row(RANKED, len(candidates), 0, draw, lambda images: judged(images, again))
    missing = [one for one in known if one not in found]
    if {GARMENTS, UNGUIDED, AUGMENTED} & set(missing):
        print(f"no report yet: {', '.join(missing)} have not been measured")
        return
    text = likelihood_report.text(found, closed_forms(1500), size, quick, RERANKED, chosen, missing)
    (RESULTS / f"{name}.md").write_text(text)
    likelihood_report.plot(found, RESULTS / f"{name}.png")
    likelihood_report.sheet(pictures, found, RESULTS / f"{name}-pictures.png")
    print(text)


def chosen(row: dict, count: int) -> dict[str, torch.Tensor]:
    """Which candidate of each picture several ways of choosing keep, places `(N,)` among all."""
    losses, bits = (torch.tensor(row[key]).view(count, -1) for key in ("guide", "elbo"))
    number = losses.shape[1]
    ways = {
        "the first": torch.zeros(number, dtype=torch.long),
        "least guide loss": losses.argmin(0),
        "likeliest": bits.argmin(0),
        "likeliest of the better half": likeliest(losses, bits),
    }
    return {way: choice * number + torch.arange(number) for way, choice in ways.items()}
