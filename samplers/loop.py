"""The sampling loop: noise in, pictures out, over any diffusers scheduler."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .capture import Captures, Latest
from .change import Change, change_of
from .denoiser import Denoiser, as_picture
from .faults import Faults
from .random import generators, particle_seeds, randn
from .record import Record
from .solver import Solver
from .time_travel import visits
from .tokens import TokenGenerator, draw_batch


@dataclass(frozen=True)
class Result:
    """What sampling gives.

    Attributes:
        images: `(B, C, H, W)`, float in [0, 1], on the CPU.
        samples: the final samples as the model knows them, `(B, *shape)`, on the CPU; the tokens of a token generator.
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
    denoiser: Denoiser | TokenGenerator,
    guidance=None,
    *,
    steps: int | None = None,
    seeds: Iterable[int] = (0,),
    eta: float = 1.0,
    batch_size: int | None = None,
    progress: bool = False,
    graphs: bool = False,
    source: torch.Tensor | None = None,
    change_map: torch.Tensor | float | None = None,
) -> Result:
    """Draw one picture per seed, steered by `guidance` (what a recipe returns), or plainly without.

    Picture i depends on seed i alone, not on the batch it is drawn in. The denoiser's weights and scheduler are left as
    they were.

    Args:
        denoiser: from `lossguide.samplers.denoiser`, or a masked-token generator from `token_generator`.
        guidance: what a recipe returned; None for the plain sampler.
        steps: solver steps; by default 50, and 8 of a token generator, as in MaskGIT.
        seeds: one integer per picture.
        eta: stochasticity of DDIM, 0 (deterministic) to 1 (as DDPM); other schedulers do not know it. Guidance works
            best at 1: the noise of later steps washes away what a guiding network was fooled by.
        batch_size: pictures per batch; all at once when None.
        progress: show a progress bar, with the loss on it.
        graphs: for CUDA devices: record the passes of the denoiser, the decoder and the guide as CUDA graphs at their
            first call, and replay them at all others. Small models and batches run several times faster; recording
            takes some calls, and memory of its own. The model must be a function of its sample and timestep alone, and
            a loss of its picture: their Python code is not run again. On other devices the same buffers are used,
            without a recording. Token generators have none.
        source: a picture in [0, 1] to change, `(C, H, W)`, or `(B, C, H, W)` with one per seed. Where the denoiser has
            a `decode` of its own: a sample as the model knows it, such as an autoencoder's latent.
        change_map: how far each pixel of the source may change, `(H, W)` or `(B, 1, H, W)`: 0 keeps it exactly, 1
            paints it anew; at `m` between, it joins when the share of the steps left is `m`, as image-to-image of that
            strength does (Levin & Fried 2023). A number is that strength everywhere. Guidance moves no pixel that has
            not joined. Every step is computed, also those before the first pixel joins.

    On a CUDA device the host waits for no step of a denoiser, with or without graphs, and gives the device its work
    ahead. It has to wait for guidances whose course depends on what they find (particles, the conjugate gradients of
    `pigdm`, `ddnm` and `diffpir`, `raise_on_nonfinite`), once per run to see whether the solver draws noise, at the
    first step to see whether the prediction and the loss are finite at all, and in diffusers' own steps of DDPM,
    ancestral and SDE solvers and UniPC. Levels per pixel lie on the device, and what
    depends on them (`score` edits, `dsg`) waits, too. A token generator waits at every step, for its draws.

    Numbers that are not finite do not spoil other pictures: a loss, gradient or step that is not moves nothing of its
    picture then, and what the model returns for one picture is that picture's alone. Which, where and what is told in
    one warning at the end.

    Returns:
        `Result` with images, samples, record and seeds.

    Raises:
        FloatingPointError: at the first step the prediction is not finite for any picture of the batch, as where
            float16 overflows; or something is not, and the guidance is to `raise_on_nonfinite`.
        TypeError, ValueError: an argument is of another kind or does not fit; what a model, decoder or loss returns
            has another shape, or carries no gradient.
    """
    if not isinstance(denoiser, (Denoiser, TokenGenerator)):
        raise TypeError(
            "sample takes what denoiser(model, scheduler) or token_generator(...) returns, "
            f"got {type(denoiser).__name__}"
        )
    if graphs and isinstance(denoiser, TokenGenerator):
        raise ValueError("graphs are recorded of denoisers; a token generator is drawn without them")
    if isinstance(denoiser, TokenGenerator) and (source is not None or change_map is not None):
        raise ValueError("a change map says how far pixels or latents may change; a token generator has neither")
    if guidance is not None and not hasattr(guidance, "begin"):
        raise TypeError(f"guidance is what a recipe returns, such as recipes.auto(loss), got {type(guidance).__name__}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if steps is None:
        steps = 8 if isinstance(denoiser, TokenGenerator) else 50
    try:
        seeds = [operator.index(seed) for seed in seeds]
    except TypeError:
        raise TypeError(f"seeds holds one integer per picture, such as range(4), got {seeds!r}") from None
    if not seeds:
        raise ValueError("seeds holds one integer per picture; it is empty")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if isinstance(denoiser, TokenGenerator):
        denoiser.check(len(seeds))
    size = len(seeds) if batch_size is None else batch_size
    batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    captures = Captures() if graphs else None
    change, given = None, None
    if source is not None or change_map is not None:
        given = _given(denoiser, source)
        change = change_of(given * 2 - 1 if denoiser.decode is as_picture else given, change_map, denoiser.shape)
        change.check(len(seeds))
    parts = [change and change.part(start, size) for start in range(0, len(seeds), size)]
    with denoiser.frozen(), tqdm(total=0, disable=not progress, unit="step") as bar:
        if isinstance(denoiser, TokenGenerator):
            done = [
                draw_batch(denoiser.part(i * size, size), guidance, steps, batch, len(batches), bar)
                for i, batch in enumerate(batches)
            ]
        else:
            done = [
                _sample_batch(denoiser, guidance, steps, batch, eta, len(batches), bar, captures, part)
                for batch, part in zip(batches, parts)
            ]
    x = torch.cat([x for x, _ in done])
    with torch.no_grad():
        if denoiser.decode is as_picture:
            images = x / 2 + 0.5
            if change is not None:  # to the last bit
                images = torch.where(change.change_map == 0, given, images)
        else:
            images = torch.cat([denoiser.decode(part.to(denoiser.device)).cpu() for part in x.split(size)])
    record = Record.joined([record for _, record in done])
    record.warn_of_nonfinite()
    return Result(images.clamp(0, 1), x, record, tuple(seeds))


def _given(denoiser: Denoiser, source) -> torch.Tensor:
    """A source, on the host; of a pixel model with its number of channels."""
    if source is None:
        raise ValueError("a change_map says how far a source may change: pass the source, too")
    source = torch.as_tensor(source).detach().float().cpu()
    if denoiser.decode is not as_picture:
        return source
    if not bool(((source >= 0) & (source <= 1)).all()):
        raise ValueError(f"a source is a picture in [0, 1], got values from {source.min():g} to {source.max():g}")
    grey = denoiser.shape[0] == 1 and source.dim() >= 3 and source.shape[-3] == 3
    return source.mean(-3, keepdim=True) if grey else source


def _sample_batch(
    denoiser: Denoiser, guidance, steps, seeds, eta, batches, bar, captures: Captures | None, change: Change | None
) -> tuple[torch.Tensor, Record]:
    candidates = 1 if guidance is None else guidance.candidates
    pictures, seeds = len(seeds), particle_seeds(seeds, candidates)
    sources = generators(seeds)
    solver = Solver.of(denoiser.scheduler, steps, denoiser.device, sources[:pictures], candidates)
    kind, channels = denoiser.kind or solver.kind, denoiser.shape[0]
    x = (randn(denoiser.shape, sources) * solver.initial_sigma).to(denoiser.device)
    if change is not None:
        change = change.repeated(candidates)
        x = change.begin(x, solver, generators(seeds, "source"))
    predict = denoiser.predict if captures is None else captures("the denoiser", denoiser.predict)
    run = None if guidance is None else guidance.begin(solver, denoiser.decode, seeds)
    if run is not None:
        run.captures, run.change, run.watch.checks = captures, change, True
    latest = Latest()
    plan = visits(range(len(solver))) if run is None else run.visits
    record = Record() if run is None else run.record
    bar.total = len(plan) * batches
    for visit in plan:
        i, graph = visit.step, run is not None and run.needs_graph(visit)
        start = time.perf_counter()
        x = x.detach().requires_grad_(graph)
        with torch.set_grad_enabled(graph):
            output = predict(solver.model_input(x, i), solver.told(i, x))
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
                faults = Faults.of_prediction(prediction)
                row = dict(step=i, visit=0, timestep=solver.times[i])
                if i == 0:
                    faults.check_prediction(row)
                x = solve(prediction, x)
                x = x if change is None else change.landed(x, i)
                record.add(**row, fault=faults.codes, seconds=time.perf_counter() - start)
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
