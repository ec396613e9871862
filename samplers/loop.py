"""The sampling loop: noise in, pictures out, over any diffusers scheduler."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .capture import Captures, Latest
from .denoiser import Denoiser, as_picture
from .random import generators, particle_seeds, randn
from .record import Record
from .solver import Solver
from .time_travel import visits


@dataclass(frozen=True)
class Result:
    """What sampling gives.

    Attributes:
        images: `(B, C, H, W)`, float in [0, 1], on the CPU.
        samples: the final samples as the model knows them, `(B, *shape)`, on the CPU.
        record: what happened, per step and picture.
        seeds: one per picture.
    """

    images: torch.Tensor
    samples: torch.Tensor
    record: Record
    seeds: tuple[int, ...]

    def save(self, folder) -> None:
        """Write each picture as `<seed>.png` into a folder, which is made when it is not there."""
        from pathlib import Path

        from torchvision.utils import save_image

        Path(folder).mkdir(parents=True, exist_ok=True)
        for seed, image in zip(self.seeds, self.images):
            save_image(image, Path(folder) / f"{seed:05d}.png")


def sample(
    denoiser: Denoiser,
    guidance=None,
    *,
    steps: int = 50,
    seeds: Iterable[int] = (0,),
    eta: float = 1.0,
    batch_size: int | None = None,
    progress: bool = False,
    graphs: bool = False,
) -> Result:
    """Draw one picture per seed, steered by `guidance` (what a recipe returns), or plainly without.

    Picture i depends on seed i alone, not on the batch it is drawn in. The denoiser's weights and scheduler are left as
    they were.

    Args:
        denoiser: from `lossguide.samplers.denoiser`.
        guidance: what a recipe returned; None for the plain sampler.
        steps: solver steps.
        seeds: one integer per picture.
        eta: stochasticity of DDIM, 0 (deterministic) to 1 (as DDPM); other schedulers do not know it. Guidance works
            best at 1: the noise of later steps washes away what a guiding network was fooled by.
        batch_size: pictures per batch; all at once when None.
        progress: show a progress bar, with the loss on it.
        graphs: for CUDA devices: record the passes of the denoiser, the decoder and the guide as CUDA graphs at their
            first call, and replay them at all others. Small models and batches run several times faster; recording
            takes some calls, and memory of its own. The model must be a function of its sample and timestep alone, and
            a loss of its picture: their Python code is not run again. On other devices the same buffers are used,
            without a recording.

    On a CUDA device the host waits for no step, with or without graphs, and gives the device its work ahead. It has to
    wait for guidances whose course depends on what they find (particles, the conjugate gradients of `pigdm`, `ddnm` and
    `diffpir`, `raise_on_nonfinite`), once per run to see whether the solver draws noise, and in diffusers' own steps of
    DDPM, ancestral and SDE solvers and UniPC.

    Returns:
        `Result` with images, samples, record and seeds.
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"sample takes what denoiser(model, scheduler) returns, got {type(denoiser).__name__}")
    if guidance is not None and not hasattr(guidance, "begin"):
        raise TypeError(f"guidance is what a recipe returns, such as recipes.auto(loss), got {type(guidance).__name__}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ValueError("seeds holds one integer per picture; it is empty")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    size = len(seeds) if batch_size is None else batch_size
    batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    captures = Captures() if graphs else None
    with denoiser.frozen(), tqdm(total=0, disable=not progress, unit="step") as bar:
        done = [_sample_batch(denoiser, guidance, steps, batch, eta, len(batches), bar, captures) for batch in batches]
    x = torch.cat([x for x, _ in done])
    with torch.no_grad():
        if denoiser.decode is as_picture:
            images = x / 2 + 0.5
        else:
            images = torch.cat([denoiser.decode(part.to(denoiser.device)).cpu() for part in x.split(size)])
    record = Record.joined([record for _, record in done])
    record.warn_of_nonfinite()
    return Result(images.clamp(0, 1), x, record, tuple(seeds))


def _sample_batch(
    denoiser: Denoiser, guidance, steps, seeds, eta, batches, bar, captures: Captures | None
) -> tuple[torch.Tensor, Record]:
    solver = Solver.of(denoiser.scheduler, steps, denoiser.device)
    kind, channels = denoiser.kind or solver.kind, denoiser.shape[0]
    candidates = 1 if guidance is None else guidance.candidates
    seeds = particle_seeds(seeds, candidates)
    sources = generators(seeds)
    x = (randn(denoiser.shape, sources) * solver.initial_sigma).to(denoiser.device)
    predict = denoiser.predict if captures is None else captures("the denoiser", denoiser.predict)
    run = None if guidance is None else guidance.begin(solver, denoiser.decode, seeds)
    if run is not None:
        run.captures = captures
    latest = Latest()
    plan = visits(range(len(solver))) if run is None else run.visits
    record = Record() if run is None else run.record
    bar.total = len(plan) * batches
    for visit in plan:
        i, graph = visit.step, run is not None and run.needs_graph(visit)
        start = time.perf_counter()
        x = x.detach().requires_grad_(graph)
        with torch.set_grad_enabled(graph):
            output = predict(solver.model_input(x, i), solver.timesteps[i])
            prediction, variance = output[:, :channels], output[:, channels:].detach()
            if kind != solver.kind:  # the scheduler steps by what its own config says
                level = solver.levels[i]
                prediction = level.prediction(
                    level.x0(prediction, x, kind), level.noise(prediction, x, kind), solver.kind
                )

        if candidates > 1 and variance.shape[1]:
            raise ValueError("particles do not work with a model that also predicts a variance")

        def solve(prediction, x, i=i, variance=variance):
            output = torch.cat([prediction, variance], 1) if variance.shape[1] else prediction
            return solver.step(output, i, x.detach(), eta=eta, generator=sources)

        with torch.no_grad():
            if run is None:
                x = solve(prediction, x)
                record.add(step=i, visit=0, timestep=solver.times[i], seconds=time.perf_counter() - start)
            else:
                x = run.step(x, prediction, visit, solve, start)
        if not bar.disable:
            if "loss" in record.rows[-1]:
                value = latest(record.rows[-1]["loss"].mean())
                bar.set_postfix(loss="" if value is None else f"{value:.4g}", refresh=False)
            bar.update()
    kept = None if run is None else run.finish(x)
    if kept is not None:
        x = x[kept.to(x.device)]
        record.keep(kept)
    return x.detach().cpu(), record
