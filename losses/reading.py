"""Files that somebody else wrote: read as data, whole or not at all, and never waited for."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

LARGEST_JSON = 16 << 20  # bytes of a description; numbers in masses belong into safetensors
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def open_file(path: str | os.PathLike[str], what: str = "file") -> BinaryIO:
    """A file to read bytes from; links to it are followed.

    Args:
        what: it should be, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is a folder, a pipe or a device instead, which might never end.
        OSError: it cannot be opened.
    """
    name = os.fspath(path)
    try:
        handle = os.open(name, _FLAGS)  # does not wait for the writer of a pipe
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no {what} '{name}'") from None
    except ValueError:
        raise FileNotFoundError(f"there is no {what} '{name}': no file's name holds a NUL") from None
    except OSError as error:
        if os.path.lexists(name) and not os.path.isfile(name):  # sockets, and folders on Windows
            raise ValueError(f"'{name}' is no {what} but {_kind(name)}") from None
        raise error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"'{name}' is no {what} but {_kind(name)}")
    return os.fdopen(handle, "rb")


def _kind(path: str) -> str:
    return "a folder" if os.path.isdir(path) else "a pipe, a device or a broken link"


def check_folder(folder: str | os.PathLike[str]) -> None:
    """See that a folder of a model and those in it hold files and folders only: libraries would wait for a pipe.

    Raises:
        ValueError: there is something else.
    """
    for path in (*Path(folder).glob("*"), *Path(folder).glob("*/*")):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"'{path}' is neither a file nor a folder, and might never end")


def read_json(path: str | os.PathLike[str], limit: int = LARGEST_JSON) -> Any:
    """What a JSON file says, see `parse_json`.

    Raises:
        ValueError: it is not JSON, or longer than `limit` bytes.
        FileNotFoundError, OSError: as `open_file`.
    """
    with open_file(path) as file:
        content = file.read(limit + 1)
    try:
        if len(content) > limit:
            raise ValueError(f"it has more than {limit} bytes")
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"'{os.fspath(path)}' is not JSON: {error}") from error


def parse_json(content: bytes) -> Any:
    """What JSON in UTF-8 says, in one way only: a key once, and numbers that are finite and of 64 bits.

    Raises:
        ValueError: it says something else, or nothing; or it is nested too deeply.
    """
    try:
        text = content.decode("utf-8-sig")  # some editors of Windows begin a file with a mark
        found = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_number,
            parse_float=_float,
            parse_int=_int,
        )
        # half a character can be written as an escape, and not shown; but so is a byte of a name that is not in UTF-8
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode(errors="surrogateescape")
        return found
    except UnicodeError:
        raise ValueError("it is not text in UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError(f"the number {text[:40]}{'...' * (len(text) > 40)} is too large")
    return int(text)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, in memory of their own.

    Raises:
        ValueError: it is no such file.
        FileNotFoundError, OSError: as `open_file`.
    """
    from safetensors.torch import load_file

    open_file(path).close()
    try:
        return {name: value.clone() for name, value in load_file(path).items()}
    except Exception as error:  # what a broken header raises is not limited to a few kinds
        raise ValueError(f"'{os.fspath(path)}' is not a safetensors file: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def no_code() -> Iterator[None]:
    """Other libraries open files here: their `torch.load` makes tensors and nothing else, also where it is not asked to
    (before torch 2.6), and transformers does not offer to run a folder's own code.

    This holds for the whole process; of several threads the first to come sets it, and the last to leave puts back what
    was there.
    """
    global _inside, _restore
    with _LOCK:
        if _inside == 0:
            _restore = _forbid()
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0 and _restore is not None:
                _restore()


_LOCK = threading.Lock()
_inside = 0
_restore: Callable[[], None] | None = None


def _forbid() -> Callable[[], None]:
    """Forbid code, as `no_code` says; returns what takes that back."""
    forced, freed = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (forced, freed)}
    os.environ[forced] = "1"
    dynamic: Any = sys.modules.get("transformers.dynamic_module_utils")
    patience = getattr(dynamic, "TIME_OUT_REMOTE_CODE", None)
    if patience is not None:
        dynamic.TIME_OUT_REMOTE_CODE = 0  # seconds that it waits for a yes; with none it refuses

    def restore() -> None:
        if patience is not None:
            dynamic.TIME_OUT_REMOTE_CODE = patience
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    return restore
