"""What is fuzzed: the parsers of losses, guidances, best settings and manifests, and the command line.

A target takes an input and raises `Finding`, or another exception, where it finds what may not be; what the library's
docstrings promise to raise is no finding.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lossguide.guidance import Guidance, recipes
from lossguide.guidance.cli import main
from lossguide.guidance.cli_job import _tuned
from lossguide.guidance.manifest import Manifest, entered, leave
from lossguide.guidance.tune import with_settings
from lossguide.losses import Color, registry
from lossguide.samplers.plain import plain

from . import fuzz_inputs as inputs
from .fuzz_sandbox import Sandbox

PICTURES = 6
LIMITS = (0,) * 14 + (5,) + (40,) * 4 + (200,)
"""Samples after which Ctrl-C is pressed; at 0, when the first is asked for, so that not every case takes a second."""
PATIENCE = 2.0
"""Seconds of computing after which it is pressed all the same, at the next call of the model."""


class Finding(Exception):
    """Something that may not be."""


def promised(error: Exception, *kinds: type[Exception]) -> bool:
    """Whether an error is of the kinds that are documented, and told as a sentence: a key or an index that is missing
    or a text that cannot be encoded is told by Python itself."""
    return isinstance(error, kinds) and not isinstance(error, (KeyError, IndexError, UnicodeError)) and bool(str(error))


# ---- parsers: bytes in, what became of them out ------------------------------------------------------------------


def loss_string(data: bytes) -> str:
    """`registry.parse`, in the sandbox's folder."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        loss = registry.parse(text)
    except Exception as error:
        if promised(error, LookupError, ValueError, OSError):
            return "refused"
        raise
    terms = loss.terms()
    if not terms or not all(0 <= term.weight < math.inf for term in terms):
        raise Finding(f"weights {[term.weight for term in terms]}")
    json.dumps([plain(term.describe()) for term in terms], allow_nan=False)
    repr(loss)
    return "parsed"


def guidance_folder(data: bytes, tensors: bytes = b"") -> str:
    """`Guidance.from_pretrained`; what it reads is saved and read again."""
    folder = Path("fuzzed")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "guidance.json").write_bytes(data)
    if tensors:
        (folder / "guidance.safetensors").write_bytes(tensors)
    try:
        guidance = Guidance.from_pretrained(folder)
    except Exception as error:
        if promised(error, ValueError, OSError):
            return "refused"
        raise
    json.dumps(guidance.to_dict(), allow_nan=False)
    guidance.save_pretrained("again")
    again = Guidance.from_pretrained("again")
    if guidance.to_json() != again.to_json():
        raise Finding("what was read is not what is read after saving it")
    return "parsed"


def best_settings(data: bytes) -> str:
    """The settings in a best.json, put into the default recipe and one with a rule of its own."""
    path = Path("fuzzed.json")
    path.write_bytes(data)
    read = 0
    for recipe in (recipes.auto, recipes.tds):
        try:
            guidance = with_settings(recipe(_red()), _tuned(path, recipe.__name__))
        except Exception as error:
            if promised(error, ValueError, OSError):
                continue
            raise
        json.dumps(guidance.to_dict(), allow_nan=False)
        read += 1
    return "parsed" if read else "refused"


@functools.cache
def _red() -> Color:
    return Color("red")


def manifest_lines() -> list[bytes]:
    """A manifest's lines, its header first."""
    header = {"pictures": PICTURES, "first_seed": 3, "batch_size": 2, "settings": "0" * 64}
    lines = [json.dumps(header).encode()]
    for index in range(PICTURES):
        entry = {"index": index, "seed": 3 + index, "file": f"pictures/0000/{3 + index:05d}.png"}
        digest = hashlib.sha256(_picture(index)).hexdigest()
        lines.append(json.dumps({**entry, "sha256": digest, "loss": 0.25 * index}).encode())
    return lines


def _picture(index: int) -> bytes:
    return f"picture {index}".encode() * 3


def manifest(data: bytes) -> str:
    """A run's folder with a manifest and pictures, some of them damaged: it is read, mended, and gone on with.

    A line that is whole and sound, of a picture that is whole, counts; no picture counts that is not whole. When the
    missing ones are drawn, the manifest lists all.
    """
    folder, rng = Path("run"), random.Random(data)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures" / "0000").mkdir(parents=True)
    whole = set()
    for index in range(PICTURES):
        path = folder / "pictures" / "0000" / f"{3 + index:05d}.png"
        how = rng.choice(("whole", "whole", "whole", "torn", "missing", "link"))
        if how == "whole":
            whole.add(index)
        content = _picture(index)
        if how == "link":
            path.symlink_to("../../../boot.png")
        elif how != "missing":
            path.write_bytes(content[: -1 if how == "torn" else None])
    (folder / "manifest.jsonl").write_bytes(data)
    own = manifest_lines()
    sound = {own.index(line) - 1 for line in data.split(b"\n") if line in own[1:]}
    with entered(folder) as (locks, _):
        pass
    reader = Manifest(folder, PICTURES, 3, 2, "0" * 64, locks)
    reader.refresh()
    reader.losses()
    listed = {index for index in range(PICTURES) if reader.done[index]}
    torn = {own.index(data.rpartition(b"\n")[2]) - 1} if data.rpartition(b"\n")[2] in own[1:] else set()
    if not sound - torn <= listed:  # the last line is not whole before its end is there
        raise Finding(f"reading lost the lines of {sorted(sound - torn - listed)}")
    fresh = Manifest(folder, PICTURES, 3, 2, "0" * 64, locks)
    fresh.check()
    done = {index for index in range(PICTURES) if fresh.done[index]}
    if not done <= whole:
        raise Finding(f"{sorted(done - whole)} are listed, and are not whole")
    if not sound & whole <= done:
        raise Finding(f"mending lost the lines of {sorted((sound & whole) - done)}")
    with (folder / "manifest.jsonl").open("ab") as file:  # a process beside it is killed as it writes
        file.write(rng.choice(own)[: rng.randrange(40)])
    missing = sorted(set(range(PICTURES)) - done)
    fresh.add(missing, [(_picture(index), 0.5) for index in missing])
    with fresh.finishing():
        pass
    lines = (folder / "manifest.jsonl").read_bytes().splitlines()
    if len(lines) != PICTURES + 1 or any(json.loads(line)["index"] != i for i, line in enumerate(lines[1:])):
        raise Finding("after the missing pictures were drawn the manifest does not list all of them in order")
    leave(folder, locks)
    return "read lines" if sound else "read none"


PARSERS: dict[str, Callable[..., str]] = {
    "loss-string": loss_string,
    "guidance": guidance_folder,
    "best-json": best_settings,
    "manifest": manifest,
}


def parser_input(kind: str, rng: random.Random, seeds: Path) -> tuple[bytes, ...]:
    """What a parser is given in one case."""
    if kind == "loss-string":
        return (inputs.loss_text(rng).encode("utf-8", "surrogatepass"),)
    if kind == "manifest":
        lines = manifest_lines()
        if rng.random() < 0.5:
            lines = [json.dumps(inputs.changed_json(json.loads(line), rng)).encode("utf-8", "surrogatepass")
                     if rng.random() < 0.3 else line for line in rng.choices(lines, k=rng.randrange(9))]  # fmt: skip
        data = b"\n".join(lines) + b"\n" * rng.randrange(2)
        return (inputs.damaged(data, rng) if rng.random() < 0.8 else data,)
    if kind == "best-json":
        return (inputs.json_bytes(json.loads((seeds / "best.json").read_bytes()), rng),)
    folder = rng.choice(sorted(path for path in seeds.iterdir() if path.is_dir()))
    tensors = folder / "guidance.safetensors"
    stored = tensors.read_bytes() if tensors.is_file() else b""
    if stored and rng.random() < 0.1:
        stored = inputs.damaged(stored, rng)
    return inputs.json_bytes(json.loads((folder / "guidance.json").read_bytes()), rng), stored


# ---- the command line --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Came:
    """How far a command came.

    Attributes:
        entered: whether its options were accepted and it began.
        out: what it was told by --out.
        goes_on: whether it goes on with what lies there.
        calls: how many samples the model was called with, each time counted.
        limit: after so many the user presses Ctrl-C.
        error: the sentence that it ended with.
    """

    entered: bool = False
    out: Path | None = None
    goes_on: bool = False
    calls: int = 0
    limit: int = 40
    begun: float = dataclasses.field(default_factory=time.process_time)
    error: str = ""


came = Came()


def watch() -> None:
    """Count how far commands come, load the demo once, and press Ctrl-C in runs that are long."""
    import diffusers
    from lossguide.samplers import demo, demo_tokens

    for module, name in ((demo, "load_demo"), (demo_tokens, "load_demo_tokens")):
        setattr(module, name, functools.cache(getattr(module, name)))
    for kind in (diffusers.UNet2DModel, diffusers.UVit2DModel):
        kind.forward = _counted(kind.forward)
    for name, command in main.commands.items():
        command.callback = _noted(name, command.callback)


def warm() -> None:
    """Load before the clock runs what a process loads once: the demo, and what draws."""
    torch.set_num_threads(1)
    came.begun = math.inf
    words = ["generate", "bag", "--steps", "1", "--num-images", "1", "--device", "cpu", "-q", "--out", "warm"]
    tune = ["tune", "--steps", "1", "--num-images", "1", "--trials", "1", "--device", "cpu", "--out", "warm-tuned"]
    for command in (words, [*words, "--model", "demo-tokens"], tune):
        try:
            main(command, prog_name="lossguide")
        except SystemExit as end:
            if end.code:
                raise Finding(f"'lossguide {' '.join(command)}' failed") from None


def _counted(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def call(self: Any, sample: torch.Tensor, *args: Any, **options: Any) -> Any:
        came.calls += len(sample)
        if came.calls > came.limit or time.process_time() - came.begun > PATIENCE:
            raise KeyboardInterrupt
        return forward(self, sample, *args, **options)

    return call


def _noted(name: str, callback: Callable) -> Callable:
    @functools.wraps(callback)
    def call(*args: Any, **options: Any) -> Any:
        came.entered = True
        came.out = options.get("out") or (Path("lossguide-out") if "out" in options else None)
        came.goes_on = name == "tune" or bool(options.get("resume") or options.get("overwrite"))
        return callback(*args, **options)

    return call


def command_input(rng: random.Random) -> dict[str, Any]:
    """A command line, what is damaged before it, and after how many calls of the model Ctrl-C is pressed."""
    damage = [(rng.choice(inputs.FILES), rng.randrange(1 << 30)) for _ in range(rng.random() < 0.15)]
    return {"words": inputs.command(rng), "damage": damage, "limit": rng.choice(LIMITS)}


def command(case: dict[str, Any], sandbox: Sandbox) -> str:
    """Run a command line in the sandbox."""
    for file, seed in case["damage"]:
        path = Path(file)
        data = inputs.damaged(path.read_bytes(), random.Random(seed))
        path.unlink()
        path.write_bytes(data)
        sandbox.accept()
    vars(came).update(vars(Came(limit=case["limit"])))
    said = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")]
    kept, sandbox.told = (sys.stdout, sys.stderr), []
    sys.stdout, sys.stderr = said
    status: Any = None
    try:
        sandbox.armed = True
        try:
            main(list(case["words"]), prog_name="lossguide")
        finally:
            sandbox.armed = False
            sys.stdout, sys.stderr = kept
    except SystemExit as end:
        status = end.code
    texts = []
    for stream in said:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "replace"))
    _held(status, texts[1], sandbox)
    return _stage(status)


def _held(status: Any, told: str, sandbox: Sandbox) -> None:
    if sandbox.told:
        raise Finding(f"reached out of the sandbox: {sandbox.told}")
    if "Traceback (most recent call last)" in told:
        raise Finding(f"a traceback was printed: {told[-2000:]}")
    if status not in (0, 1, 2, 130):
        raise Finding(f"the exit status is {status!r}")
    lines = [line for line in told.splitlines() if line.startswith("Error: ")]
    if (status == 2) != bool(lines) or len(lines) > 1 or (lines and len(lines[0]) < 12):
        raise Finding(f"status {status} with {lines or 'no line of an error'}")
    came.error = lines[0] if lines else ""
    out = (sandbox.work / came.out).resolve() if came.out is not None else None
    wrong = sandbox.wrong(sandbox.changes(), out, came.goes_on)
    if wrong:
        raise Finding("; ".join(wrong[:5]))


def _stage(status: int) -> str:
    if not came.entered:
        return "refused at parsing" if status else "told help or version"
    if status == 130:
        return "drew, stopped by Ctrl-C"
    if came.calls:
        return "drew pictures" if status == 0 else "refused after drawing began"
    return {0: "done without drawing", 1: "checked, with problems"}.get(status, "refused later")


def told(error: BaseException) -> str:
    """An exception with where it arose."""
    return "".join(traceback.format_exception(error))[-6000:]
