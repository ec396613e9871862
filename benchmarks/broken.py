"""Files and names that are broken, odd or made to do harm, given to lossguide: each is read, or refused in a sentence.

Each entry of the corpus goes to what reads such things in Python and to the command line, in a process of its own: a
traceback, an answer that takes more than 5 s, code that is run, a file that is changed or made outside the folder of
the results, and a user's file that is gone are counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import signal
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from click.testing import CliRunner
from lossguide.guidance import Guidance, recipes
from lossguide.guidance.cli import main
from lossguide.guidance.cli_job import _tuned
from lossguide.guidance.cli_model import load_model
from lossguide.guidance.cli_output import results_folder
from lossguide.guidance.manifest import cleared
from lossguide.guidance.tune import default_space, tune, with_settings
from lossguide.losses import Codebook, Color, PairTask
from lossguide.losses.aesthetic import read_head
from lossguide.losses.clip import load_clip
from lossguide.losses.images import read_image, read_opacity
from lossguide.losses.pretrained import opened
from PIL import Image

from . import broken_data, broken_folders, broken_pictures
from .broken_data import MARKER
from .broken_entry import READ, Entry
from .broken_folders import MINE, PROMPTS

RESULTS = Path(__file__).parent / "results"
SLOW = 5.0  # seconds of an answer, see `clock`
PATIENCE = 60  # seconds until a process is ended
REFUSALS = (ValueError, OSError, LookupError)
FEW = ("--steps", "1", "--num-images", "1")
QUICK = 6  # entries of a kind


def _picture(path: Path) -> None:
    read_image(path)
    read_opacity(path)


def _results(path: Path) -> None:
    with results_folder(path):
        pass


def _search(path: Path) -> None:
    def draw(guidance: Guidance, seeds: list[int], steps: int) -> torch.Tensor:
        return torch.full((len(seeds), 3, 4, 4), 0.5)

    space = {"strength": default_space()["strength"]}
    tune(draw, Color("red"), Color("blue"), trials=1, steps=1, seeds=[1], space=space, folder=path)


READERS: dict[str, Callable[[Path], Any]] = {
    "picture": _picture,
    "weights": read_head,
    "guidance": Guidance.from_pretrained,
    "codebook": Codebook.load,
    "pairs": PairTask.load,
    "tuned": lambda path: with_settings(recipes.auto(Color("red")), _tuned(path, "auto")),
    "model": lambda path: load_model(str(path), None, 2, torch.device("cpu"), torch.float32),
    "network": lambda path: opened(path, "AutoModelForDepthEstimation"),
    "clip": load_clip,
    "overwrite": cleared,
    "out": _results,
    "journal": _search,
}
"""What reads an entry of a kind in Python."""

COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "picture": (
        ("generate", "--loss", "clip-image:{}", *FEW),
        ("restore", "{}", "--task", "inpaint", "--degrade", "--resize", *FEW),
        ("imitate", "photo.png", "--pair", "{}", "photo.png", *FEW),
    ),
    "weights": (("generate", "--loss", "aesthetic:{}", *FEW),),
    "codebook": (("generate", "--loss", "token:{}@photo.png", *FEW),),
    "tuned": (("generate", "ankle boot", "--tuned", "{}", *FEW),),
    "model": (("generate", "--loss", "color:red", "--model", "{}", *FEW),),
    "clip": (("generate", "bag", "--clip-model", "{}", *FEW),),
    "run": (("generate", "ankle boot", "--num-images", "2", "--steps", "1", "--resume", "--out", "{}"),),
    "overwrite": (("generate", "ankle boot", "--num-images", "2", "--steps", "1", "--overwrite", "--out", "{}"),),
    "out": (
        ("generate", "--loss", "color:red", *FEW, "--out", "{}"),
        ("restore", "photo.png", "--task", "deblur", "--degrade", *FEW, "--out", "{}"),
        ("tune", "ankle boot", "--trials", "1", *FEW, "--out", "{}"),
    ),
    "prompt": (("generate", "--loss", "color:red", *FEW, "--", "{}"),),
    "journal": (("tune", "ankle boot", "--trials", "1", *FEW, "--out", "{}"),),
}
"""How an entry of a kind is given to the command line, in the place of `{}`."""

KINDS = ("picture", *broken_data.KINDS, *broken_folders.KINDS, "prompt")
WRITTEN = ("run", "overwrite", "out", "journal")  # kinds whose entries are folders for results


class Answer(NamedTuple):
    """What one reader or command made of an entry: nothing said where it was read."""

    by: str
    says: str
    seconds: float
    fault: str = ""


class Found(NamedTuple):
    """All of an entry: the answers, what else went wrong, and MiB of memory on top of what the process had."""

    entry: Entry
    answers: list[Answer]
    faults: list[str]
    memory: float


def corpus(*kinds: str) -> list[Entry]:
    """Every entry, or those of some kinds."""
    found = []
    for kind in kinds or KINDS:
        if kind == "picture":
            found += broken_pictures.entries()
        elif kind == "prompt":
            found += [Entry(name, kind, lambda _, text=text: text, READ) for name, text in PROMPTS.items()]
        else:
            found += (broken_data if kind in broken_data.KINDS else broken_folders).entries(kind)
    return found


def clock() -> float:
    """Seconds without those that this thread waits for a processor, which others may be at."""
    try:
        waited = int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        waited = 0.0
    return time.perf_counter() - waited


def ask_reader(entry: Entry, given: Path) -> Answer:
    """What Python's reader of such a kind says."""
    start = clock()
    says, fault = "", ""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            READERS[entry.kind](given)
    except REFUSALS as error:
        says = str(error)
        if isinstance(error, (KeyError, IndexError)) or "\n" in _shown(says, given):
            fault = f"not one sentence: {error!r}"
    except Exception as error:
        says, fault = repr(error), f"{type(error).__name__}: {_place(error)}"
    return Answer("Python", says, clock() - start, fault or _unlike(entry, says))


def ask_command(entry: Entry, given: Path | str, words: tuple[str, ...]) -> Answer:
    """What the command line says, in its working directory."""
    quiet = () if words[0] == "tune" else ("-q",)
    arguments = [word.replace("{}", str(given)) for word in (*words[:1], *quiet, *words[1:])]
    start = clock()
    result = CliRunner().invoke(main, arguments)
    seconds = clock() - start
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    says = lines[-1].removeprefix("Error: ") if lines else ""
    fault = _unlike(entry, says)
    if not isinstance(result.exception, (SystemExit, type(None))):
        says, fault = repr(result.exception), f"{type(result.exception).__name__}: {_place(result.exception)}"
    elif (result.exit_code, len(lines)) not in ((0, 0), (2, 1)):
        fault = f"exit status {result.exit_code} with {len(lines)} sentences"
    elif result.exit_code and words[0] != "tune" and result.stderr.count("\n") > 1:
        fault = f"more than a sentence: {result.stderr!r}"
    return Answer(f"lossguide {words[0]}", says, seconds, fault)


def _unlike(entry: Entry, says: str) -> str:
    if entry.kind == "prompt" or (entry.says in says and bool(says) == bool(entry.says)):
        return ""
    return "it was read" if not says else f"another answer than expected ({entry.says or 'it is read'})"


def _place(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error} ({Path(last.filename).name}:{last.lineno})"


def _shown(says: str, given: Path | str) -> str:
    """A sentence without the name of the entry, which may hold anything."""
    return says.replace(str(given), "").replace(Path(str(given)).name, "")


# ---- one entry -------------------------------------------------------------------------------------------------------


def look(entry: Entry, readers: bool = True, commands: bool = True) -> Found:
    """Give an entry to its readers, in a process of its own and a folder that is looked at before and after."""
    with tempfile.TemporaryDirectory(prefix="broken-") as sandbox:
        place, here = Path(sandbox) / "given", Path(sandbox) / "here"
        place.mkdir()
        here.mkdir()
        Image.new("RGB", (32, 32), "grey").save(here / "photo.png")
        given = entry.build(place)
        before = _everything(Path(sandbox))
        answers, memory, fault = _in_a_process(entry, given, here, readers, commands)
        after = _everything(Path(sandbox))
        faults = [fault] if fault else []
        if list(Path(sandbox).rglob(MARKER)):
            faults.append("code was run")
        free = [here / "lossguide-out", here / "out"]
        if entry.kind in WRITTEN:
            free += [Path(given), Path(os.path.realpath(str(given).split("\0")[0]))]
        for path in sorted({*before, *after}, key=str):
            kept = before.get(path) == after.get(path)
            own = before.get(path, "").endswith(hashlib.sha1(MINE).hexdigest())
            if not kept and (own or not any(_within(path, one) for one in free)):
                faults.append(f"changed: {path.relative_to(sandbox)}")
    clean = [answer._replace(says=answer.says.replace(f"{place}/", "").replace(str(place), "")) for answer in answers]
    return Found(entry, clean, faults, memory)


def _within(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder for results, or in the free one beside it, `NAME-2`."""
    names, start = path.parts, folder.parts
    if names[: len(start) - 1] != start[:-1] or len(names) < len(start):
        return False
    return re.fullmatch(re.escape(start[-1]) + r"(-\d+)?", names[len(start) - 1]) is not None


def _everything(folder: Path) -> dict[Path, str]:
    """Every file in a folder: what it is, and a digest of what it holds."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        digest = ""
        if stat.S_ISREG(status.st_mode):
            small = status.st_size < 1 << 28
            digest = hashlib.sha1(path.read_bytes()).hexdigest() if small else str(status.st_mtime_ns)
        elif stat.S_ISLNK(status.st_mode):
            digest = os.readlink(path)
        found[path] = f"{stat.S_IFMT(status.st_mode)} {digest}"
    return found


def _in_a_process(
    entry: Entry, given: Path | str, here: Path, readers: bool, commands: bool
) -> tuple[list[Answer], float, str]:
    """The answers, MiB of memory on top of what this process has, and what became of the process if not its end."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        with os.fdopen(writes, "w") as out:
            _answer(entry, given, here, readers, commands, out)
            out.flush()
            os._exit(0)
    os.close(writes)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(PATIENCE)
    with os.fdopen(reads) as answers:
        lines = [json.loads(line) for line in answers]
    status = os.waitpid(child, 0)[1]
    signal.alarm(0)
    found = [Answer(*line) for line in lines if isinstance(line, list)]
    memory = max((line for line in lines if isinstance(line, float)), default=0.0)
    return found, memory, f"its process ended with {os.waitstatus_to_exitcode(status)}" if status else ""


def _answer(entry: Entry, given: Path | str, here: Path, readers: bool, commands: bool, out: Any) -> None:
    """In the process: an answer a line, and the memory after each."""
    os.chdir(here)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries in C print
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    start = pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def tell(answer: Answer) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(list(answer)), json.dumps(max(0.0, peak - start)), sep="\n", file=out, flush=True)

    changes = entry.kind in WRITTEN  # the reader would leave other files to the command
    if readers and entry.kind in READERS and not (changes and commands):
        tell(ask_reader(entry, Path(given)))
    if not commands or (entry.kind == "weights" and not entry.says):  # such a head wants a large CLIP
        return
    for words in COMMANDS.get(entry.kind, ()):
        if entry.says or words[0] != "imitate":  # of which a picture that is read would not be the pair
            own_out = () if entry.kind in (*WRITTEN, "prompt") else ("--out", "out")
            tell(ask_command(entry, given, words[:1] + own_out + words[1:]))


# ---- all of them -----------------------------------------------------------------------------------------------------


def faults(found: Found) -> list[str]:
    """What is wrong with how an entry was answered."""
    slow = [f"{answer.by} took {answer.seconds:.1f} s" for answer in found.answers if answer.seconds > SLOW]
    return [*found.faults, *(f"{answer.by}: {answer.fault}" for answer in found.answers if answer.fault), *slow]


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Give every entry to its readers, or those of the kinds in `only`, and write the table."""
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import matplotlib.figure  # noqa: F401  # once, before the processes

    warnings.simplefilter("ignore", FutureWarning)  # that TorchScript goes out of use
    unknown = [kind for kind in only if kind not in KINDS]
    if unknown:
        raise click.UsageError(f"there is no kind {unknown[0]!r}; kinds are {', '.join(KINDS)}")
    entries = corpus(*only)
    if quick:
        kinds = {entry.kind: [one for one in entries if one.kind == entry.kind] for entry in entries}
        entries = [entry for those in kinds.values() for entry in those[:: max(1, len(those) // QUICK)]]
    found = []
    for entry in entries:
        found.append(look(entry))
        wrong = faults(found[-1])
        print(f"{entry.id}: {'; '.join(wrong) or 'as it should be'}", flush=True)
    path = RESULTS / f"broken{'-quick' if quick or only else ''}.md"
    path.write_text(report(found), encoding="utf-8")
    print(path)
    if any(map(faults, found)):
        sys.exit(1)


def report(found: list[Found]) -> str:
    """The table of all entries as Markdown."""
    answers = [answer for one in found for answer in one.answers]
    raised = [answer for answer in answers if re.search(r"\(\w+\.py:\d+\)$", answer.fault)]
    slow = [answer for answer in answers if answer.seconds > SLOW]
    ended = [one for one in found if any(fault.startswith("its process") for fault in one.faults)]
    outside = [one for one in found if any(fault.startswith("changed") for fault in one.faults)]
    ran = [one for one in found if "code was run" in one.faults]
    other = [one for one in found if faults(one)]
    refused = [one for one in found if one.entry.says]
    most = max(found, key=lambda one: one.memory)
    lines = [
        "# Broken input",
        "",
        "`python -m benchmarks run broken`",
        "",
        f"{len(found)} entries: {len(refused)} to refuse, {len(found) - len(refused)} to read; {len(answers)} answers.",
        "",
        "| | |",
        "|---|---|",
        f"| tracebacks | {len(raised)} |",
        f"| processes that crashed or were ended after {PATIENCE} s | {len(ended)} |",
        f"| answers after more than {SLOW:g} s, without what waits for a processor | {len(slow)} |",
        f"| entries whose code was run | {len(ran)} |",
        f"| entries with a file made, changed or gone outside the results | {len(outside)} |",
        f"| entries with anything wrong, these included | {len(other)} |",
        f"| slowest answer | {max(answer.seconds for answer in answers):.1f} s |",
        f"| most memory on top | {most.memory:.0f} MiB, {most.entry.id} |",
    ]
    for kind in dict.fromkeys(one.entry.kind for one in found):
        lines += ["", f"## {kind}", "", "| entry | done | sentence |", "|---|---|---|"]
        for one in found:
            if one.entry.kind == kind:
                says = {_cell(answer.says): answer.by for answer in one.answers}
                done = "refused" if all(says) else "read" if not any(says) else "read, not by all"
                wrong = "; ".join(faults(one))
                told = "<br>".join(filter(None, says)) + (f" **{_cell(wrong)}**" if wrong else "")
                lines.append(f"| {_cell(one.entry.name)} | {done} | {told} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|").replace("<", "&lt;")
    text = re.sub(r"(\w)\1{60,}", r"\1\1\1...", text)
    return text if len(text) <= 300 else text[:297] + "..."
