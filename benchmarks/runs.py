"""One measured run: pictures drawn batch by batch, what that cost, the judge's figures, and where it was measured."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lossguide.samplers import Denoiser, Result, sample

from .budget import counted


@functools.cache
def model_in(load: Callable[[], Denoiser], dtype: torch.dtype, device: str = "cpu") -> Denoiser:
    """A work's denoiser in some precision, on some device, made once."""
    if dtype == torch.float32 and device == "cpu":
        return load()
    model = load()
    moved = copy.deepcopy(model.model).to(device, dtype)
    return dataclasses.replace(model, model=moved, dtype=dtype, device=torch.device(device))


@functools.cache
def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor computes in it; elsewhere it is emulated, many times slower than float32."""
    known = torch.cpu.get_capabilities()
    return torch.bfloat16 if known.get("avx512_bf16") or known.get("amx_bf16") else torch.float32


@functools.cache
def weights_digest(load: Callable[[], Denoiser]) -> str:
    """A short digest of a model's weights, so that rows of other weights are not mixed in."""
    digest = hashlib.sha256()
    for value in model_in(load, torch.float32).model.state_dict().values():
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy() if value.dim() else b"")
    return digest.hexdigest()[:12]


def now(device: torch.device) -> tuple[float, float]:
    """Wall-clock and processor seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


@torch.no_grad()
def bare_forward(model: Denoiser, pictures: int, times: int) -> list[dict[str, float]]:
    """What each of some forwards of the denoiser took; see `spent`."""
    x, found = torch.randn(pictures, *model.shape).to(model.device), []
    for _ in range(times):
        start = now(model.device)
        model.predict(x, torch.tensor(100, device=model.device))
        found.append(spent(start, now(model.device)))
    return found


def spent(start: tuple[float, float], end: tuple[float, float]) -> dict[str, float]:
    """Wall-clock `seconds` and `processor_seconds` between two of `now`."""
    return dict(zip(("seconds", "processor_seconds"), (b - a for a, b in zip(start, end))))


def drawn(
    model: Denoiser,
    one: Callable[[Sequence[int]], torch.Tensor | Result],
    pictures: int,
    batch: int,
    times: int,
    candidates: int = 1,
) -> tuple[torch.Tensor, dict]:
    """Pictures and what they cost.

    Args:
        model: the denoiser, whose calls are counted and timed.
        one: places in the set -> their pictures `(N, C, H, W)` in [0, 1], or the `Result` of a sampling run.
        pictures: how many there are.
        batch: how many are drawn at once.
        times: bare forwards that are timed before the run and after it.
        candidates: samples per picture; bare forwards are of as many as go through the denoiser at once.
    """
    images, visited, curve, nonfinite, visits = [], [], [], 0, None
    batch = min(batch, pictures)
    forward = bare_forward(model, batch * candidates, times)
    start = now(model.device)
    with counted(model.model) as calls:
        for first in range(0, pictures, batch):
            places = range(pictures)[first : first + batch]
            result = one(places)
            images.append(result.images if isinstance(result, Result) else result.detach().float().cpu())
            if isinstance(result, Result):
                record, visits = result.record, len(result.record.rows)
                nonfinite += 0 if record.nonfinite is None else int(record.nonfinite.sum())
                visited += [row["seconds"] for row in record.rows] if len(places) == batch else []
                if record.guided:
                    curve.append(([row["step"] for row in record.guided], record.losses()))
    cost = spent(start, now(model.device))
    forward += bare_forward(model, batch * candidates, times)
    cost |= dict(
        forwards=calls.forwards / pictures,
        backwards=calls.backwards / pictures,
        **{f"forward_{name}": statistics.median(one[name] for one in forward) for name in cost},
        seconds_per_visit=statistics.median(visited) if visited else None,
        visits=visits,
        nonfinite=nonfinite,
        batch=batch,
        forward_batch=batch * candidates,
    )
    if curve:  # of the guided visits: how far the solver has come, and the mean loss over pictures
        steps = curve[0][0]
        losses = torch.cat([losses for _, losses in curve], 1).mean(1).tolist()
        cost["curve"] = [[step, float(f"{loss:.4g}")] for step, loss in zip(steps, losses)]
    return torch.cat(images), cost


def sampled(
    model: Denoiser,
    guidance_of: Callable[[Sequence[int]], object],
    seeds: Sequence[int],
    batch: int,
    steps: int,
    eta: float,
    times: int | None = None,
    candidates: int = 1,
) -> tuple[torch.Tensor, dict]:
    """Pictures of the library's own loop, one per seed, and what they cost; guided by `guidance_of(places)`."""

    def one(places: Sequence[int]) -> Result:
        return sample(model, guidance_of(places), steps=steps, seeds=[seeds[i] for i in places], eta=eta)

    return drawn(model, one, len(seeds), batch, min(3, steps // 2) if times is None else times, candidates)


def figures(judged: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Of what a judge says of each picture: means, their standard errors, and the values themselves."""
    judged = {name: value.double() for name, value in judged.items()}
    return {
        "figures": {name: mean(name, value) for name, value in judged.items()},
        "errors": {name: standard_error(value) for name, value in judged.items()},
        "per_picture": {name: [round(v, 6) for v in value.tolist()] for name, value in judged.items()},
    }


def mean(name: str, values: torch.Tensor) -> float:
    """The figure of a set: the mean over pictures, of a root mean square its own kind."""
    return (values.square().mean().sqrt() if name == "rmse" else values.mean()).item()


def standard_error(values: torch.Tensor) -> float | None:
    """Standard error of the mean over pictures; None for a single one."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None


def failure(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def about(device: torch.device | str = "cpu") -> dict:
    """Where and with what a run was measured."""
    versions = {name: _version(name) for name in ("torch", "diffusers", "lossguide")}
    return dict(
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        versions={"python": platform.python_version(), **versions},
        machine=platform.machine(),
        processor=_processor(),
        cores=os.cpu_count(),
        device=device_name(device),
        date=time.strftime("%Y-%m-%d"),
    )


def device_name(device: torch.device | str) -> str:
    """`cpu`, or the name of the GPU."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from the tree
        return None


@functools.cache
def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
