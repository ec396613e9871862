"""What the command line leaves behind: a folder of its own per run, the pictures, and how to run it again."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch

from ..samplers.plain import plain
from .contact_sheet import to_pil
from .files import write_whole
from .manifest import cleared

PARENT = "lossguide-out"
_WRITTEN = re.compile(
    r"(\d{5,}|sheet|record|degraded|original|mask)\.png|(record|settings)\.json|manifest\.jsonl|pictures|report\.txt"
)


def shown(text: Any) -> str:
    """Text that may come from a file, for the terminal: without what it would follow instead of show."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def default_folder(*words: str) -> Path:
    """`lossguide-out/ankle-boot` for 'ankle boot'."""
    slug = re.sub(r"[^\w]+", "-", " ".join(words).lower()).strip("-_")[:60].strip("-_")
    return Path(PARENT) / (slug or "run")


def holds_results(folder: Path) -> bool:
    """Whether a folder has files that are named as results are."""
    return folder.is_dir() and any(_WRITTEN.fullmatch(file.name) for file in folder.iterdir())


def check_out(wanted: Path) -> None:
    """See that there can be a folder for results.

    Raises:
        OSError: a file or a link to nothing lies there or on the way, or no folder can have that name.
    """
    if "\0" in str(wanted):
        raise OSError("no folder's name holds a NUL; choose another --out")
    for part in (wanted, *wanted.parents):
        if os.path.lexists(part) and not part.is_dir():
            what = "a link to nothing" if part.is_symlink() and not part.exists() else "a file"
            raise NotADirectoryError(f"'{part}' should be a folder for results, and it is {what}; choose another --out")


def free_folder(wanted: Path) -> Path:
    """The folder, or where it holds results already, the first of `<name>-2`, `<name>-3` ... that does not."""
    folder, number = wanted, 1
    while holds_results(folder):
        number += 1
        whole = wanted.resolve()
        folder = (
            wanted.with_name(f"{wanted.name}-{number}")
            if wanted.name not in ("", "..")
            else whole.with_name(f"{whole.name}-{number}")
        )
    return folder


@contextmanager
def results_folder(wanted: Path, overwrite: bool = False) -> Iterator[Path]:
    """A free folder for the results of one run, made at once; taken away again where nothing came to lie in it.

    With `overwrite` it is the wanted one, and what an earlier run wrote there is taken away.

    Raises:
        OSError: it cannot be made or written to; with `overwrite`, another process is at work in it, or it holds files
            that no run wrote and this one would write over.
    """
    check_out(wanted)
    if overwrite and wanted.is_dir():
        cleared(wanted)
    folder = wanted if overwrite else free_folder(wanted)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the folder '{folder}' cannot be written to; choose another with --out")
    try:
        yield folder
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()  # where nothing lies in it


def save_pictures(folder: Path, images: torch.Tensor, seeds: Sequence[int]) -> None:
    """Write each picture of `(N, 3, H, W)` as `<seed>.png`."""
    for seed, image in zip(seeds, images):
        write_whole(folder / f"{seed:05d}.png", png(image))


def png(image: torch.Tensor) -> bytes:
    """The bytes of a picture's file, `(3, H, W)` in [0, 1]."""
    data = io.BytesIO()
    to_pil(image).save(data, "PNG")
    return data.getvalue()


def command_line(context: click.Context, **resolved: Any) -> str:
    """The command that runs this again, every setting spelled out; `resolved` takes the place of what was given."""
    words = ["lossguide", context.info_name or ""]
    last: list[str] = []
    for parameter in context.command.params:
        value = resolved.get(parameter.name, context.params.get(parameter.name))
        if value is None or value is False or value == ():
            continue
        if isinstance(parameter, click.Argument):
            last.append(str(value))
        elif value is True:
            words.append(parameter.opts[-1])
        else:
            for one in value if isinstance(value, (tuple, list)) else (value,):
                words += [parameter.opts[-1], *(str(part) for part in (one if isinstance(one, tuple) else (one,)))]
    if any(word.startswith("-") for word in last):
        words.append("--")
    return shlex.join(words + last)


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write `settings.json`: the versions, and what is given; numbers that are not finite as null."""
    versions = {name: metadata.version(name) for name in ("lossguide", "torch", "diffusers")}
    text = json.dumps(plain({"versions": versions, **settings}), indent=1) + "\n"
    write_whole(folder / "settings.json", text.encode())
