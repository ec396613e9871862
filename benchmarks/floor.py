"""The floor of a step, and how near the library's own loop comes to it: time, and what is kept for the backward pass.

The floor of a step through the denoiser is one forward and one backward to the sample, that of a step at x0 one
forward. Loops written out by hand for DDIM, without records, checks or choices, are timed in turn with `sample`.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from lossguide.guidance import Guidance, recipes
from lossguide.samplers import Denoiser, load_demo, sample
from lossguide.samplers.random import generators, randn

from . import real

BATCHES = (1, 4, 16)
SIZE = 1e-3
WAYS = ("forward", "forward and input-only backward", "unguided", "at x0", "through")
SAVED = ("bare", "sample", "sample, checkpointing")


def loss(image: torch.Tensor) -> torch.Tensor:
    """Squared distance `(B,)` from grey: next to nothing to compute."""
    return (image - 0.5).square().flatten(1).sum(1)


def guidances() -> dict[str, Guidance | None]:
    """What the loops by hand do, as guidance."""
    through = recipes.dps(loss, strength=SIZE)
    return {"unguided": None, "at x0": through.replace(through="x0"), "through": through}


def by_hand(model: Denoiser, steps: int, batch: int, way: str) -> torch.Tensor:
    """DDIM at eta 1 for this model alone: "unguided", or as DPS with a gradient "at x0" or "through" the denoiser."""
    scheduler = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(steps)
    sources = generators(range(batch))
    x = randn(model.shape, sources)
    for t in scheduler.timesteps:
        x = x.detach().requires_grad_(way == "through")
        with torch.set_grad_enabled(way == "through"):
            prediction = model.predict(x, t)
        if way != "unguided":
            alpha = scheduler.alphas_cumprod[int(t)]
            with torch.set_grad_enabled(way == "through"):
                if scheduler.config.prediction_type == "v_prediction":
                    x0 = alpha.sqrt() * x - (1 - alpha).sqrt() * prediction
                else:
                    x0 = (x - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
            leaf = x0.detach().requires_grad_(True)
            with torch.enable_grad():
                g = torch.autograd.grad(loss(model.decode(leaf)).sum(), leaf)[0]
            if way == "through":
                g = torch.autograd.grad(x0, x, g)[0]
        with torch.no_grad():
            x_next = scheduler.step(prediction.detach(), t, x.detach(), eta=1.0, generator=sources).prev_sample
            if way != "unguided":
                x_next = x_next - SIZE * g
        x = x_next
    return x


def ways_of(model: Denoiser, batch: int, steps: int) -> dict[str, tuple[Callable[[], object], int]]:
    """By name: what to time, and how many steps it is."""
    x, t = torch.randn(batch, *model.shape), torch.tensor(100)

    @torch.no_grad()
    def forward():
        model.predict(x, t)

    def both():
        leaf = x.clone().requires_grad_(True)
        torch.autograd.grad(model.predict(leaf, t).sum(), leaf)

    def ours(guidance):
        return lambda: sample(model, guidance, steps=steps, seeds=range(batch))

    found: dict[str, tuple[Callable[[], object], int]] = {"forward": (forward, 1), WAYS[1]: (both, 1)}
    for name, guidance in guidances().items():
        found[name] = (ours(guidance), steps)
        found[f"{name}, by hand"] = (lambda name=name: by_hand(model, steps, batch, name), steps)
    return found


def time_ways(
    model: Denoiser, batch: int, steps: int, repeats: int, ways: Sequence[str] | None = None
) -> dict[str, float]:
    """Median processor seconds of a step each way, or some `ways`, timed in turn on this thread."""
    seconds: dict[str, list[float]] = {}
    with model.frozen():
        for repeat in range(repeats + 1):
            for name, (way, count) in ways_of(model, batch, steps).items():
                if ways is not None and name not in ways:
                    continue
                start = time.process_time()
                way()
                if repeat:
                    seconds.setdefault(name, []).append((time.process_time() - start) / count)
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextmanager
def kept(weights: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """Context in which what autograd keeps for a backward pass is counted: gives the bytes so far, weights left out,
    each piece of memory once."""
    own = {p.untyped_storage().data_ptr() for p in [*weights.parameters(), *weights.buffers()]}
    held: dict[int, torch.UntypedStorage] = {}  # kept alive, or an address might be given out twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in held.values())


def kept_bytes(model: Denoiser, batch: int) -> dict[str, int]:
    """Bytes kept for backward by a bare forward, by one guided step of `sample`, and with checkpointing."""
    found = {}
    network = model.model
    with model.frozen():
        x = torch.randn(batch, *model.shape).requires_grad_(True)
        with kept(network) as count:
            held = model.predict(x, torch.tensor(100))
            found["bare"] = count()
        del held
        for name in SAVED[1:]:
            if "checkpointing" in name:
                network.enable_gradient_checkpointing()
            with kept(network) as count:
                sample(model, recipes.dps(loss), steps=1, seeds=range(batch))
                found[name] = count()
        network.disable_gradient_checkpointing()
    return found


def models() -> dict[str, Denoiser]:
    """What is measured: the demo, where Python's own time shows, and the real model where it is at hand."""
    found = {"demo model, 32x32": load_demo()}
    if real.available():
        found["real 64x64 model"] = real.model()
    return found


def tables(quick: bool) -> list[str]:
    """Both tables, in Markdown."""
    repeats = 2 if quick else 9
    times = [
        "| model | batch | forward | forward and input-only backward | unguided / by hand | at x0 / by hand "
        "| at x0 / forward | through / by hand | through / floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    saved = [
        "| model | batch | bare forward | guided step | ratio | guided step, checkpointing | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in models().items():
        steps = 10 if model.shape[-1] < 64 else 2 if quick else 4  # what a call costs once weighs on short steps
        for batch in BATCHES[: 2 if quick else None]:
            found = time_ways(model, batch, steps if batch < 16 else max(2, steps // 2), repeats if batch == 1 else 3)
            ratios = {way: found[way] / found[f"{way}, by hand"] for way in WAYS[2:]}
            times.append(
                f"| {name} | {batch} | {found['forward']:.4f} | {found[WAYS[1]]:.4f} | **{ratios['unguided']:.3f}** "
                f"| **{ratios['at x0']:.3f}** | {found['at x0'] / found['forward']:.3f} "
                f"| **{ratios['through']:.3f}** | {found['through'] / found[WAYS[1]]:.3f} |"
            )
            print(times[-1], flush=True)
            held = kept_bytes(model, batch)
            bare, own, checkpointed = (held[way] / 2**20 for way in SAVED)
            saved.append(
                f"| {name} | {batch} | {bare:.1f} | {own:.1f} | **{own / bare:.3f}** | {checkpointed:.1f} "
                f"| **{checkpointed / bare:.3f}** |"
            )
            print(saved[-1], flush=True)
    return [
        "",
        "## The library's own loop, and the floor",
        "",
        "Processor seconds per step of one thread, medians, timed in turn; DDIM at eta 1, a loss that costs next to "
        "nothing. Floors: one forward, and one forward with a backward to the sample alone. By hand: the same loop "
        "without records, checks or choices.",
        "",
        *times,
        "",
        "MiB that autograd keeps for the backward pass, weights not counted; checkpointing is the model's own "
        "(`enable_gradient_checkpointing`).",
        "",
        *saved,
    ]
