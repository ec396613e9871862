"""A Guidance to a folder and back: settings as JSON, tensors as safetensors, and never code.

`guidance.json` holds a format number, the version of lossguide that wrote it, and the guidance: every object as its
`type` and what its constructor takes. Types are names in a fixed table of the library's own classes; nothing is
imported by what a file says. Tensors lie in `guidance.safetensors`, under their place in the description.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import numbers
import os
import tempfile
import types
import typing
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .. import losses as _losses
from ..losses import operators
from ..losses.images import Pixels
from ..losses.loss import Losses, Term, as_losses
from ..losses.network import describe_network
from ..losses.reading import first_line, read_json, read_tensors
from ..samplers.time_travel import TimeTravel
from . import steps
from .augment import Augment
from .guidance import Guidance, Inner, Tokens
from .particles import Particles
from .proximal import Proximal
from .smoothing import Smoothing

FORMAT = 1
SETTINGS, TENSORS, CARD = "guidance.json", "guidance.safetensors", "README.md"


def _kinds(module: types.ModuleType, base: type) -> list[type]:
    return [k for k in vars(module).values() if isinstance(k, type) and issubclass(k, base) and k is not base]


def _type(kind: type) -> str:
    return "operators.Chain" if kind is operators.Chain else kind.__name__  # there are step rules in a row, too


_TYPES: dict[str, type] = {
    _type(kind): kind
    for kind in (
        *(Guidance, Inner, Tokens, Augment, Smoothing, Particles, Proximal, TimeTravel, Losses, Term, Pixels),
        *_kinds(_losses, _losses.Loss),
        *(_losses.Codebook, _losses.PatchFeatures),
        *_kinds(steps, steps.StepRule),
        *(kind for kind in _kinds(operators, operators.Operator) if kind is not operators.LinearOperator),
    )
}


# ---- to a folder -------------------------------------------------------------------------------------------------


class _Own(Exception):
    """Something that is the user's own, and where it stands."""

    def __init__(self, place: tuple, value: Any):
        self.place, self.value = place, value


def save(guidance: Guidance, folder: str | os.PathLike[str], losses: bool = True) -> None:
    """Write `guidance.json` and, where there are tensors, `guidance.safetensors`; see `Guidance.save_pretrained`."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        data = _plain(guidance if losses else guidance.replace(loss=None), tensors, ())
    except _Own as own:
        raise ValueError(_refusal(guidance, own)) from None
    if not losses:
        del data["loss"]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tensors:
        (folder / TENSORS).write_bytes(safetensors.torch.save(tensors))
    else:
        (folder / TENSORS).unlink(missing_ok=True)  # of what was saved here before
    file = {"format": FORMAT, "lossguide": version("lossguide"), "guidance": data}
    (folder / SETTINGS).write_text(json.dumps(file, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any, tensors: dict[str, torch.Tensor], place: tuple) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else {"number": str(float(value))}  # JSON knows no infinity
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one, tensors, (*place, i)) for i, one in enumerate(value)]
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"mapping": {key: _plain(one, tensors, (*place, key)) for key, one in value.items()}}
    if isinstance(value, torch.Tensor):
        key = _told(place)
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": key}
    kind = type(value)
    if _TYPES.get(_type(kind)) is not kind:
        raise _Own(place, value)
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else None
    arguments = value.arguments if fields is None else {field.name: getattr(value, field.name) for field in fields}
    check_types(kind, arguments, place)
    return {"type": _type(kind)} | {name: _plain(one, tensors, (*place, name)) for name, one in arguments.items()}


def _refusal(guidance: Guidance, own: _Own) -> str:
    what = f"{describe_network(own.value)!r}, which is not the library's own, and code is not saved"
    if own.place[:2] == ("loss", "terms"):
        term = guidance.loss.terms()[own.place[2]]
        part = "it" if own.place[-1] == "loss" else f"its {own.place[-1]}"
        return (
            f"the loss '{term.name}' cannot be saved: {part} is {what}; save_pretrained(folder, losses=False) stores "
            "all but the losses, and from_pretrained(folder, loss=my_loss) gives it one"
        )
    field = own.place[0] if own.place else "guidance"
    return (
        f"{field} cannot be saved: {_told(own.place)} is {what}; leave it out by guidance.replace({field}=...), and "
        "put it back after loading"
    )


# ---- and back ----------------------------------------------------------------------------------------------------


def load(name: str | os.PathLike[str], loss: Any = None, **hub: Any) -> Guidance:
    """What `save` wrote, from a folder or else the Hub; see `Guidance.from_pretrained`."""
    folder = Path(name)
    if not folder.is_dir():
        folder = _downloaded(os.fspath(name), hub)
    data, tensors = _settings(folder / SETTINGS), _tensors(folder / TENSORS)
    if loss is None and "loss" not in data:
        raise ValueError(f"'{name}' was saved without its losses; pass loss=")
    try:
        guidance = _made(data if loss is None else data | {"loss": None}, tensors, ())
    except RecursionError as error:
        raise ValueError(f"'{folder / SETTINGS}' is nested too deeply") from error
    if not isinstance(guidance, Guidance):
        raise ValueError(f"{SETTINGS} holds no Guidance but a {type(guidance).__name__}")
    return guidance if loss is None else guidance.replace(loss=as_losses(loss))


def _downloaded(name: str, hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[SETTINGS, TENSORS], **hub))
    except Exception as error:
        raise OSError(
            f"there is no folder '{name}', and the Hub does not give a guidance of it: {first_line(error)}"
        ) from error


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no {path.name} in '{path.parent}'; Guidance.save_pretrained writes it")
    file = read_json(path)
    number = file.get("format") if isinstance(file, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise ValueError(
            f"'{path}' was written by a newer lossguide ({file.get('lossguide')}, format {number}); lossguide "
            f"{version('lossguide')} reads format {FORMAT}"
        )
    if number != FORMAT or not isinstance(file.get("guidance"), dict):
        raise ValueError(f"'{path}' is not what Guidance.save_pretrained writes: a format of {FORMAT} and a guidance")
    return file["guidance"]


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path) if path.is_file() else {}


def _made(data: Any, tensors: dict[str, torch.Tensor], place: tuple) -> Any:
    if isinstance(data, list):
        return tuple(_made(one, tensors, (*place, i)) for i, one in enumerate(data))
    if not isinstance(data, dict):
        return data
    here = f"{SETTINGS}, {_told(place)}"
    if set(data) == {"number"} and data["number"] in ("inf", "-inf", "nan"):
        return float(data["number"])
    if set(data) == {"mapping"} and isinstance(data["mapping"], dict):
        return {key: _made(one, tensors, (*place, key)) for key, one in data["mapping"].items()}
    if set(data) == {"tensor"}:
        if data["tensor"] not in list(tensors):
            raise ValueError(f"{here}: there is no tensor {data['tensor']!r} in {TENSORS}")
        return tensors[data["tensor"]]
    kind = _TYPES.get(str(data.get("type")))
    if kind is None:
        raise ValueError(f"{here}: there is no type {data.get('type')!r}; known are {', '.join(sorted(_TYPES))}")
    known = inspect.signature(kind).parameters
    unknown = [name for name in data if name not in known and name != "type"]
    if unknown:
        has = ", ".join(known) or "none"
        raise ValueError(f"{here}: {kind.__name__} has no setting {', '.join(unknown)}; settings are {has}")
    missing = [name for name, one in known.items() if one.default is one.empty and name not in data]
    if missing:
        raise ValueError(f"{here}: a {kind.__name__} needs {', '.join(missing)}")
    arguments = {name: _made(one, tensors, (*place, name)) for name, one in data.items() if name != "type"}
    check_types(kind, arguments, place)
    rows = [arguments.pop(name) for name, one in known.items() if one.kind is one.VAR_POSITIONAL]
    try:
        return kind(*itertools.chain(*rows), **arguments)
    except OSError:  # weights that are missing or cannot be downloaded say so themselves
        raise
    except Exception as error:
        raise ValueError(f"{here}: {error}") from error


def check_types(kind: Callable, arguments: dict[str, Any], place: tuple = ()) -> None:
    """Raises ValueError where arguments are not what a class's or function's annotations say; `place` is theirs in a
    file."""
    described = kind if dataclasses.is_dataclass(kind) or inspect.isfunction(kind) else kind.__init__
    hints = typing.get_type_hints(described)
    known = inspect.signature(kind).parameters
    for name, value in arguments.items():
        row = known[name].kind is inspect.Parameter.VAR_POSITIONAL
        if not _suits(value, tuple[hints[name], ...] if row else hints[name]):
            wanted = known[name].annotation
            raise ValueError(f"{_told((*place, name))} of {kind.__name__} is {wanted}, got {str(value)[:80]!r}")


def _suits(value: Any, hint: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_suits(value, one) for one in inside)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        wanted = inside[:1] * len(value) if inside[-1] is Ellipsis else inside
        return len(wanted) == len(value) and all(map(_suits, value, wanted))
    if hint in (int, float):
        whole = isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())
        return not isinstance(value, bool) and (whole if hint is int else isinstance(value, numbers.Real))
    return isinstance(value, origin or hint)


def _told(place: tuple) -> str:
    return ".".join(map(str, place)) or "guidance"


# ---- to the Hub --------------------------------------------------------------------------------------------------


def push(
    guidance: Guidance,
    repo_id: str,
    losses: bool = True,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload guidance",
) -> Any:
    """Save and upload, with a short README.md where the repository has none; see `Guidance.push_to_hub`."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save(guidance, folder, losses)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not api.file_exists(repo_id, CARD):
            (Path(folder) / CARD).write_text(_card(guidance, repo_id, losses), encoding="utf-8")
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, delete_patterns=[TENSORS]
        )


def _card(guidance: Guidance, repo_id: str, losses: bool) -> str:
    loss = "" if losses else ", loss=my_loss"
    citation = f"\n{guidance.citation}\n" if guidance.citation else ""
    return f"""---
library_name: lossguide
---
# {guidance.name}
{citation}
```python
from lossguide.guidance import Guidance, guide

guidance = Guidance.from_pretrained("{repo_id}"{loss})
guided = guide(pipe, guidance)  # of your diffusers pipeline
```
"""
