"""`auto` at its default over solvers and steps: text guidance of the demo model, a restoration by the real one.

Deterministic solvers are run as they are and made random (`remix`). The flow-matching model is the demo model itself,
seen along straight paths. One row per run goes to `results/solvers.jsonl`; a run that is there is not repeated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from lossguide.guidance import recipes
from lossguide.losses import ClassLabel, ClipText, Measurement, operators
from lossguide.samplers import Denoiser, denoiser, load_demo, sample

from . import methods, real
from .demo_text import Judge, prompts, weights_digest
from .rows import Rows, digest_of
from .work_restore import restoration

RESULTS = Path(__file__).parent / "results"
STEPS = (10, 20)
PER_CLASS, SEED = 8, 70_000  # a change of the one needs a change of the other
WORKS = {
    "text": "Text guidance of the demo model, 8 pictures of each of ten classes",
    "super-resolution": "4x super-resolution by the real model, 8 pictures",
}
FIGURES = {"text": ("accuracy", "frechet"), "super-resolution": ("lpips", "psnr", "diverged")}
KINDS = {"unguided": None, "as it is": 0.0, "made random": "ancestral"}
SOLVERS = {
    "DDIM, eta 1": diffusers.DDIMScheduler,
    "DDIM, eta 0": diffusers.DDIMScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "DPM-Solver++ 2M": diffusers.DPMSolverMultistepScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "flow matching, Euler": diffusers.FlowMatchEulerDiscreteScheduler,
}
GIVEN = ("DDIM, eta 1", "UniPC")
"""Not to be made random: it is already, or it starts its steps from a sample of its own."""


def as_flow(model: Denoiser) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A variance-preserving v-predicting model as the flow-matching model that it is along straight paths.

    `x_t = (1 - s) x0 + s e` with `t = 1000 s` is the variance-preserving sample of the same ratio of noise to picture,
    stretched; `v` gives `x0` and `e`, and the flow is `e - x0`.
    """
    alphas = model.scheduler.alphas_cumprod.double().sqrt()
    places = torch.arange(len(alphas), dtype=torch.float64)

    def flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s = float(t) / 1000
        stretch = ((1 - s) ** 2 + s**2) ** 0.5
        alpha, sigma = (1 - s) / stretch, s / stretch
        upper = int((alphas > alpha).sum().clamp(1, len(alphas) - 1))
        share = (alphas[upper - 1] - alpha) / (alphas[upper - 1] - alphas[upper])
        place = places[upper - 1] + share.clamp(0, 1)
        sample = x / stretch
        v = model.model(sample, place.float()).sample
        return (sigma * sample + alpha * v) - (alpha * sample - sigma * v)

    return flow


def model_of(work: str, solver: str) -> Denoiser:
    """The work's model under a solver."""
    own = load_demo() if work == "text" else real.model()
    if solver.startswith("DDIM"):
        return own
    if solver.startswith("flow"):
        own.model.requires_grad_(False)
        return denoiser(as_flow(own), SOLVERS[solver](), shape=own.shape)
    return dataclasses.replace(own, scheduler=SOLVERS[solver].from_config(dict(own.scheduler.config)))


def measure(work: str, solver: str, steps: int, remix: float | str | None, judge: Judge) -> dict:
    """The figures of one run; without guidance where `remix` is None."""
    model, eta = model_of(work, solver), float(solver.endswith("eta 1"))
    if work == "text":
        labels = torch.arange(10).repeat_interleave(PER_CLASS)
        loss, seeds = ClipText([prompts()[c] for c in labels], model="demo"), range(SEED, SEED + len(labels))
    else:
        pictures = restoration(work)("evaluation")
        seeds = pictures.seeds
        loss = pictures.loss(range(len(seeds)))
    guidance = None if remix is None else recipes.auto(loss, remix=remix)
    result = sample(model, guidance, steps=steps, seeds=seeds, eta=eta)
    figures = judge(result.images, labels) if work == "text" else pictures.judge(result.images)
    return {name: torch.as_tensor(figures[name]).float().mean().item() for name in FIGURES[work]} | {
        "visits": len(result.record.rows)
    }


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = (), work: tuple[str, ...] = ()) -> None:
    """Measure every solver, or `only` some, on all `work` or some; write rows and the table `results/solvers.md`."""
    for given, known in ((only, SOLVERS), (work, WORKS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise SystemExit(f"there is no {unknown[0]!r}; there are {', '.join(map(repr, known))}")
    if fresh and (only or work):
        raise SystemExit("--fresh measures everything again: leave out --only and --work")
    name = "solvers-quick" if quick else "solvers"
    judge = Judge()
    stand_ins = {
        "text": ClassLabel(0),
        "super-resolution": Measurement(operators.SuperResolution(1), torch.zeros(3, 2, 2), 0.1),
    }
    found: dict = {}
    for task in WORKS:
        if (work and task not in work) or (task != "text" and (quick or not real.available())):
            continue
        weights = weights_digest(load_demo()) if task == "text" else methods.weights_digest(real.model)
        rows = Rows(RESULTS / f"{name}.jsonl", weights, fresh and task == "text")
        for steps in STEPS[: 1 if quick else None]:
            for solver in SOLVERS:
                if (only and solver not in only) or (task != "text" and solver.startswith("flow")):
                    continue
                for kind, remix in KINDS.items():
                    if (kind == "made random" and solver in GIVEN) or (kind == "unguided" and task != "text"):
                        continue
                    settings = None if remix is None else digest_of(recipes.auto(stand_ins[task], remix=remix))
                    key = dict(work=task, solver=solver, steps=steps, kind=kind, settings=settings, seed=SEED)
                    with rows.claim(**key) as mine:
                        if mine:
                            row = rows.add(key | measure(task, solver, steps, remix, judge))
                            print(*key.values(), *(f"{n} {row[n]:.4g}" for n in FIGURES[task]), flush=True)
                    found[task, solver, steps, kind] = rows.get(**key)
    if not (only or work):
        (RESULTS / f"{name}.md").write_text(report(found))


def report(found: dict) -> str:
    """The tables in Markdown."""
    lines = [
        "# auto at its default over solvers and steps",
        "",
        "`python -m benchmarks run solvers`",
        "",
        'The solver as it is, and made random by `remix="ancestral"`, which is not for UniPC, nor for eta 1.',
    ]
    for work, about in WORKS.items():
        steps = sorted({key[2] for key in found if key[0] == work})
        lines += ["", f"## {about}: {' / '.join(FIGURES[work])}", ""]
        lines += ["| solver | | " + " | ".join(f"{n} steps" for n in steps) + " |", "|---|---|" + "---|" * len(steps)]
        for solver, kind in dict.fromkeys((key[1], key[3]) for key in found if key[0] == work):
            rows = [found[work, solver, n, kind] for n in steps]
            cells = [" / ".join(f"{row[f]:.3g}" for f in FIGURES[work]) if row else "" for row in rows]
            lines.append(f"| {solver} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
