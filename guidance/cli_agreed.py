"""What makes a large run the run that it is, so that only the same is gone on with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from ..losses.loss import Composable, as_losses
from ..samplers.plain import plain
from .cli_job import Job
from .guidance import Guidance
from .tune import described

# what a run may be gone on with differently: the same pictures come out, but for the round-off of the kernels
_FREE = ("model", "device", "batch_size", "out", "quiet", "resume", "overwrite", "tuned", "clip_model")
_PROBE = 0.01  # how far the loss of the test picture may be off on another device, as a share


def asked(job: Job, guidance: Guidance, loss: Composable) -> dict[str, Any]:
    """All that makes the pictures what they are, as plain data that is the same in every process."""
    options = {name: value for name, value in {**job.context.params, **job.resolved}.items() if name not in _FREE}
    config = {key: value for key, value in dict(job.model.scheduler.config).items() if not key.startswith("_")}
    versions = {name: metadata.version(name).split("+")[0] for name in ("lossguide", "torch", "diffusers")}
    data = {
        "options": options,
        "versions": versions,
        "scheduler": {"class": type(job.model.scheduler).__name__, **config},
        "weights": weights_digest(job.model),
        "guidance": guidance.to_dict() | {"loss": [described(term) for term in as_losses(loss).terms()]},
    }
    change = getattr(job.model, "change", None)
    if change is not None:
        data["change"] = [_digest(tensor) for tensor in change]  # the files may be others under the same names
    return json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(plain(data))))


def weights_digest(model: Any) -> str:
    """A digest of some values of each tensor of a model's networks: other weights of the same shapes have another."""
    digest = hashlib.sha256()
    for network in _networks(model):
        for name, value in network.state_dict().items():
            if isinstance(value, torch.Tensor) and not value.is_meta:
                some = value.detach().flatten()[:: max(1, value.numel() // 1024)].cpu().contiguous()
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    return hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor.numpy().tobytes()).hexdigest()


def _networks(thing: Any) -> Iterator[torch.nn.Module]:
    if isinstance(thing, torch.nn.Module):
        yield thing
    elif isinstance(getattr(thing, "components", None), dict):  # a diffusers pipeline
        for part in thing.components.values():
            yield from _networks(part)
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield from _networks(getattr(thing, field.name))


def difference(one: Any, other: Any, name: str = "") -> tuple[str, str] | None:
    """The first setting in which two differ, with its value in each; None where they agree."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*other, *(key for key in one if key not in other)]:
            found = difference(one.get(key), other.get(key), f"{name}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = (difference(a, b, f"{name}.{i}") for i, (a, b) in enumerate(zip(one, other)))
        return next((found for found in pairs if found is not None), None)
    if one == other:
        return None
    name = name.removeprefix("options.").replace("_", " ")
    if name == "weights":
        return "weights of its own", "those of another model"
    if name == "change" or name.startswith("change."):
        part = "a change map" if name == "change.1" else "a source picture"
        return f"{part} of its own", "another"
    return f"{name} {_short(one)}", _short(other)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@torch.no_grad()
def probe(job: Job, loss: Composable) -> float:
    """The loss of a test picture, which shows what no description does: another file of the same name."""
    image = torch.rand(1, 3, *(job.model.size or (64, 64)), generator=torch.Generator().manual_seed(0))
    return job.losses(loss, image).item()


def near(one: Any, other: float) -> bool:
    """Whether two such losses are of the same picture, maybe on two devices."""
    if not isinstance(one, (int, float)):
        return one is None and not math.isfinite(other)
    return math.isclose(one, other, rel_tol=_PROBE, abs_tol=1e-4)
