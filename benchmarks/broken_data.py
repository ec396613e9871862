"""Weights and descriptions that are broken or made to do harm, for `benchmarks.broken`."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lossguide.guidance import recipes
from lossguide.losses import Codebook, Color, PairTask, PatchFeatures, operators
from safetensors.torch import save

from .broken_entry import READ, Entry

MARKER = "executed"  # the file that would tell that code was run


class Bomb:
    """An object whose pickle leaves a file where it is opened."""

    def __init__(self, place: Path):
        self.path = str(place / MARKER)

    def __reduce__(self):
        return open, (self.path, "w")


def saved_by_torch(value, legacy: bool = False) -> bytes:
    """The bytes of `torch.save`."""
    data = io.BytesIO()
    torch.save(value, data, _use_new_zipfile_serialization=not legacy)
    return data.getvalue()


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, bytes or plain data, which is said to be so long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def jsons(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    """What a JSON object may be instead: name, bytes, and what is said of it."""
    inside = good.index(b"{") + 1
    put = lambda extra: good[:inside] + extra + b"," + good[inside:]
    yield "empty", b"", "is not JSON"
    yield "cut in half", good[: len(good) // 2], "is not JSON"
    yield "not a number", put(b'"x": NaN'), "NaN is not a number of JSON"
    yield "infinity", put(b'"x": -Infinity'), "-Infinity is not a number of JSON"
    yield "a float too large", put(b'"x": 1e999'), "the number 1e999 is too large"
    yield "an integer of 5000 digits", put(b'"x": ' + b"9" * 5000), "is too large"
    yield "a key twice", put(b'"x": 1, "x": 2'), "the key 'x' is there twice"
    yield "100000 brackets", b"[" * 100_000, "nested too deeply"
    yield "100000 keys within each other", b'{"a":' * 100_000, "nested too deeply"
    yield "Latin-1", put(b'"x": "\xe9"'), "not text in UTF-8"
    yield "UTF-16", good.decode().encode("utf-16"), "not text in UTF-8"
    yield "half a character", put(b'"x": "\\ud83e"'), "not text in UTF-8"
    yield "17 MB", put(b'"x": "' + b"a" * (17 << 20) + b'"'), "more than 16777216 bytes"
    yield "a pickle", pickle.dumps({"a": 1}), "is not JSON"


# ---- weights ---------------------------------------------------------------------------------------------------------


def _weights() -> Iterator[tuple[str, str, Callable[[Path], bytes], str]]:
    """Name, file name, bytes, and what is said: of heads of the aesthetic loss."""
    says, none = "does not hold the state dict of an aesthetic head", "no aesthetic head that is known"
    head = {"weight": torch.ones(1, 8), "bias": torch.ones(1)}
    whole, long = saved_by_torch(head), torch.ones(1).expand(1, 10**12)
    put = lambda **changes: lambda _: saved_by_torch(head | changes)
    yield "a head by torch.save", "a.pth", lambda _: whole, READ
    yield "a head by torch.save as it was", "a.pth", lambda _: saved_by_torch(head, legacy=True), READ
    yield "a head as safetensors", "a.safetensors", lambda _: save(head), READ
    yield "a bomb by torch.save", "a.pth", lambda place: saved_by_torch(head | {"x": Bomb(place)}), says
    yield "a bomb by torch.save as it was", "a.pth", lambda place: saved_by_torch(Bomb(place), legacy=True), says
    yield "a bomb by pickle", "a.pth", lambda place: pickle.dumps(Bomb(place)), says
    yield "a bomb that is called .safetensors", "a.safetensors", lambda place: pickle.dumps(Bomb(place)), says
    yield "TorchScript", "a.pth", _script, says
    yield "nothing", "a.pth", lambda _: b"", says
    yield "half of a head", "a.pth", lambda _: whole[: len(whole) // 2], says
    yield "compressed parts", "a.pth", lambda _: _compressed(head), "its parts are compressed"
    yield "a list", "a.pth", lambda _: saved_by_torch([head]), says
    yield "keys that are numbers", "a.pth", lambda _: saved_by_torch({1: torch.ones(1)}), says
    yield "4 TB in 4 bytes", "a.pth", put(weight=long), says
    yield "a sparse tensor", "a.pth", put(bias=torch.ones(1).to_sparse()), says
    yield "a tensor without values", "a.pth", put(bias=torch.ones(1, device="meta")), says
    yield "other keys", "a.pth", lambda _: saved_by_torch({"a": torch.ones(1)}), none
    yield "other shapes", "a.pth", put(bias=torch.ones(2)), "shapes are"
    yield "whole numbers", "a.pth", put(bias=torch.ones(1).long()), "not finite floats"
    yield "not numbers", "a.pth", put(bias=torch.tensor([torch.nan])), "not finite floats"
    good = {"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    for name, data in (
        ("nothing", b""),
        ("seven bytes", bytes(7)),
        ("a header of 8 million TB", safetensors(good, length=2**63 - 1)),
        ("a header of 99 MB that is not there", safetensors(good, length=99_000_000)),
        ("a header that is no JSON", safetensors(b"{" * 64)),
        ("a header of 10000 brackets", safetensors(b'{"a":' * 10_000)),
        ("no values", safetensors(good)),
        ("values beyond the shape", safetensors(good, bytes(8))),
        ("a shape beyond 64 bits", safetensors({"a": {**good["weight"], "shape": [2**40, 2**40]}}, bytes(4))),
        ("a negative shape", safetensors({"a": {**good["weight"], "shape": [-1]}}, bytes(4))),
        ("a type that is none", safetensors({"a": {**good["weight"], "dtype": "F33"}}, bytes(4))),
        ("offsets that overlap", safetensors({"a": good["weight"], "b": good["weight"]}, bytes(4))),
    ):
        yield f"safetensors: {name}", "a.safetensors", lambda _, data=data: data, says


def _script(place: Path) -> bytes:
    class Adds(torch.nn.Module):
        def forward(self, x):
            return x + 1

    data = io.BytesIO()
    torch.jit.save(torch.jit.trace(Adds(), torch.ones(1)), data)
    return data.getvalue()


def _compressed(head: dict) -> bytes:
    """The file of a large tensor of zeros, of which a thousandth is left."""
    data, small = io.BytesIO(saved_by_torch(head | {"weight": torch.zeros(1, 4_000_000)})), io.BytesIO()
    with zipfile.ZipFile(data) as source, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as made:
        for part in source.infolist():
            made.writestr(part.filename, source.read(part))
    return small.getvalue()


# ---- descriptions ----------------------------------------------------------------------------------------------------

Files = dict[str, bytes]


@functools.cache
def _saved(what: str) -> Files:
    """The files of something that was saved as it should be."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if what == "guidance":
            recipes.auto(Color("red")).save_pretrained(folder)
        elif what == "codebook":
            encoder = PatchFeatures("demo")
            width = encoder(torch.zeros(1, 3, 32, 32)).shape[-1]
            codes = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
            Codebook(codes, encoder, torch.arange(4)).save(folder)
        else:
            sharp = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
            blurred = operators.GaussianBlur(3, 1.0)(sharp)
            PairTask.fit(list(zip(blurred, sharp))).save(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def laid(place: Path, files: Files) -> Path:
    """A folder of files, which may lie in folders of their own."""
    folder = place / "folder"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    folder.mkdir(exist_ok=True)
    return folder


def changed(files: Files, name: str, *path, value) -> Files:
    """The same with another value in a JSON file; none where it is Ellipsis."""
    data = json.loads(files[name])
    inner = data
    for part in path[:-1]:
        inner = inner[part]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return files | {name: json.dumps(data).encode()}


def _pipe(files: Files, name: str) -> Callable[[Path], Path]:
    def build(place: Path) -> Path:
        folder = laid(place, {key: data for key, data in files.items() if key != name})
        os.mkfifo(folder / name)
        return folder

    return build


def _guidance() -> Iterator[tuple[str, Callable[[Path], Path] | Files, str]]:
    files, json_, tensors_ = _saved("guidance"), "guidance.json", "guidance.safetensors"
    term = ("guidance", "loss", "terms", 0, "loss")
    put = lambda *path, value: changed(files, json_, *path, value=value)
    yield "as it was saved", files, READ
    yield "a mark at the front (BOM)", files | {json_: b"\xef\xbb\xbf" + files[json_]}, READ
    for name, data, says in jsons(files[json_]):
        yield name, {json_: data}, says
    yield "a list", {json_: b"[]"}, "is not what Guidance.save_pretrained writes"
    yield "no file", {}, "there is no guidance.json"
    yield "a pipe", _pipe(files, json_), "there is no guidance.json"
    yield "a format of the future", put("format", value=2), "written by a newer lossguide"
    yield "a class of Python's own", put("guidance", "rule", value={"type": "os.system", "command": "true"}), "no type"
    yield "a function of a file as loss", put(*term, value="own.py:bright"), "loss of Term is"
    yield "a loss that is none", put("guidance", "loss", value="own.py:bright"), "loss of Guidance is"
    yield "a text as number", put("guidance", "strength", value="1"), "strength of Guidance is float"
    yield "a negative strength", put("guidance", "strength", value=-1), "strength is a number from 0 up"
    yield "a tensor that is not there", put(*term, "target", value={"tensor": "x"}), "there is no tensor 'x'"
    drawing = {"type": "Sketch", "drawing": "/dev/zero"}
    yield "a device as picture", put(*term, value=drawing), "is no picture but a pipe, a device"
    picture = put(*term, "target", value={"type": "Pixels", "values": {"tensor": "x"}})
    yield "a picture", picture | {tensors_: save({"x": torch.zeros(3, 4, 4, dtype=torch.uint8)})}, READ
    yield "a picture of no pixels", picture | {tensors_: save({"x": torch.zeros(3, 0, 4)})}, "at least one pixel"
    yield "a picture of five colours", picture | {tensors_: save({"x": torch.zeros(5, 4, 4)})}, "a picture is a float"
    for blur in (
        {"type": "GaussianBlur", "kernel_size": 10**9 + 1, "sigma": 1.0},
        {"type": "MotionBlur", "length": 1e9},
    ):
        measured = put(*term, value={"type": "Measurement", "operator": blur, "y": {"tensor": "x"}})
        measured |= {tensors_: save({"x": torch.zeros(1, 3, 4, 4)})}
        yield f"a {blur['type']} of a thousand million pixels", measured, "4096, "
    yield "tensors that are none", picture | {tensors_: b"\xff" * 64}, "is not a safetensors file"
    bombed = lambda place: laid(place, picture | {tensors_: pickle.dumps(Bomb(place))})
    yield "a bomb for tensors", bombed, "is not a safetensors file"


def _codebook() -> Iterator[tuple[str, Callable[[Path], Path] | Files, str]]:
    files, json_, codes_ = _saved("codebook"), "codebook.json", "codebook.safetensors"
    put = lambda *path, value: changed(files, json_, *path, value=value)
    says = "holds no codebook that can be read"
    yield "as it was saved", files, READ
    for name, data, _ in list(jsons(files[json_]))[:9]:
        yield name, files | {json_: data}, says
    yield "a pipe", _pipe(files, json_), "there is no codebook in"
    yield "no codes", {json_: files[json_]}, "codebook.safetensors is missing"
    yield "codes that are none", files | {codes_: safetensors(b"{" * 9)}, says
    yield "a bomb for codes", lambda place: laid(place, files | {codes_: pickle.dumps(Bomb(place))}), says
    yield "codes of one dimension", files | {codes_: save({"codes": torch.ones(4)})}, says
    yield (
        "codes of whole numbers",
        files | {codes_: save({"codes": torch.ones(4, 4).long()})},
        "codes are floats (K, d)",
    )
    yield "codes that are not numbers", files | {codes_: save({"codes": torch.full((4, 4), torch.nan)})}, "a code is a"
    yield "other codes", files | {codes_: save({"codes": torch.eye(4)})}, "the file has changed"
    yield "an encoder without size", put("encoder", "size", value=...), says
    yield "an encoder that is a number", put("by_name", "encoder", value=5), says
    yield "an encoder that is code", put("by_name", "encoder", value="own.py:features"), "is neither 'demo'"
    yield "an option that there is none of", put("by_name", "trust_remote_code", value=True), says
    yield "a mean of texts", put("by_name", "mean", value=["a", "b", "c"]), "a network's mean is a finite number"
    yield "a size of a thousand million", put("by_name", "size", value=10**9), "a network's size is"


def _pairs() -> Iterator[tuple[str, Callable[[Path], Path] | Files, str]]:
    files, json_, tensors_ = _saved("pairs"), "pairs.json", "pairs.safetensors"
    put = lambda *path, value: changed(files, json_, *path, value=value)
    says = "does not hold what PairTask.save writes"
    yield "as it was saved", files, READ
    for name, data, _ in list(jsons(files[json_]))[:9]:
        yield name, files | {json_: data}, says
    yield "a pipe", _pipe(files, json_), "there is no pairs.json"
    for path, value in (
        (("mode",), "exec"),
        (("way",), "change"),
        (("sigma",), -1),
        (("sigma",), None),
        (("ratio",), 0),
        (("ratio",), 10**9),
        (("operator", "kind"), "os.system"),
        (("operator", "stride"), 10**12),
        (("operator", "padding"), ["reflect"]),
        (("pairs",), "3"),
        (("scores",), [{"name": "a", "told": "b", "value": 1, "x": 1}]),
        (("notes",), [1]),
        (("format",), 2),
    ):
        yield f"{'.'.join(path)} {value!r}", put(*path, value=value), says
    yield "no kernel", files | {tensors_: save({})}, says
    yield "a kernel that is not numbers", files | {tensors_: save({"kernel": torch.full((1, 3, 3), torch.nan)})}, says
    yield "a bomb for tensors", lambda place: laid(place, files | {tensors_: pickle.dumps(Bomb(place))}), says


def _tuned() -> Iterator[tuple[str, bytes, str]]:
    good = b'{"settings": {"strength": 2.0, "time_travel.repeats": 1}}'
    yield "as it was written", good, READ
    yield from jsons(good)
    yield "a list", b"[]", "it has no settings"
    yield "settings that are a list", b'{"settings": []}', "it has no settings"
    for settings, says in (
        ({"loss": "own.py:bright"}, "there is no setting 'loss'"),
        ({"rule": "own.py:bright"}, "rule of Guidance is"),
        ({"rule.__class__": "os"}, "there is no setting 'rule.__class__'"),
        ({"augment.__init__": 1}, "there is no setting 'augment.__init__'"),
        ({"strength": "2"}, "strength of Guidance is float"),
        ({"strength": None}, "strength of Guidance is float"),
        ({"strength": True}, "strength of Guidance is float"),
        ({"strength": -1}, "strength is a number from 0 up"),
        ({"time_travel.repeats": 1.5}, "repeats of TimeTravel is int"),
        ({"time_travel.start": {}}, "start of TimeTravel is float"),
        ({"edit": ["shift"]}, "edit of Guidance is"),
        ({"": 1}, "there is no setting ''"),
    ):
        yield str(settings), json.dumps({"settings": settings}).encode(), says


def _one_file(name: str, data: Callable[[Path], bytes] | bytes) -> Callable[[Path], Path]:
    def build(place: Path) -> Path:
        (place / name).write_bytes(data if isinstance(data, bytes) else data(place))
        return place / name

    return build


def _only_a_pipe(place: Path) -> Path:
    os.mkfifo(place / "pipe")
    return place / "pipe"


_FOLDERS = {"guidance": _guidance, "codebook": _codebook, "pairs": _pairs}
KINDS = ("weights", "tuned", *_FOLDERS)


def entries(kind: str) -> list[Entry]:
    """Those of a kind."""
    if kind == "weights":
        files = [Entry(name, kind, _one_file(file, data), says) for name, file, data, says in _weights()]
        return [*files, Entry("a pipe", kind, _only_a_pipe, "is no file of an aesthetic head but a pipe")]
    if kind == "tuned":
        files = [Entry(name, kind, _one_file("best.json", data), says) for name, data, says in _tuned()]
        return [*files, Entry("a pipe", kind, _only_a_pipe, "is no file but a pipe")]
    return [
        Entry(name, kind, files if callable(files) else functools.partial(laid, files=files), says)
        for name, files, says in _FOLDERS[kind]()
    ]
