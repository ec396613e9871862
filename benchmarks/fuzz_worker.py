"""A process that runs cases of the fuzzer one after the other, and says of each how far it came.

`python -m benchmarks.fuzz_worker prepare PLACE` makes what all begin with; `cases PLACE KIND SEED START STOP` runs
some, a line of JSON of each on stdout; `cover PLACE KIND SEED RUNS` lets atheris look for inputs that reach new code.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS = 5  # that a case may take: of the processor, or asleep
MEMORY = 6 << 30  # bytes that a case may take
DEAD = 60  # after so many, of whatever, the process is ended with its traceback


class Hang(BaseException):
    """A case takes too long."""


class Watch:
    """Raises `Hang` in a case that has computed for `SECONDS`, or has slept that long; a busy machine makes none."""

    def __init__(self) -> None:
        signal.signal(signal.SIGALRM, self._ring)

    def start(self, seconds: float = SECONDS) -> None:
        self.begun = self.last = time.process_time()
        self.seconds = seconds
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
        faulthandler.dump_traceback_later(DEAD, exit=True)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()

    def _ring(self, number: int, frame: Any) -> None:
        now = time.process_time()
        slept, self.last = now - self.last < 0.2, now
        if slept or now - self.begun >= self.seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Hang(f"{'asleep' if slept else 'computing'} for {self.seconds:g} s")


def quiet() -> Any:
    """Keep what is printed away from the parent; the stream to it."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    return out


def prepare(place: Path) -> None:
    """Make the sandbox's pattern and the valid files."""
    from . import fuzz_sandbox as sandbox

    quiet()
    sandbox.prepare(place / "pristine")
    sandbox.seeds(place / "seeds")


def cases(place: Path, kind: str, seed: int, start: int, stop: int) -> None:
    """Run the cases from `start` to before `stop`."""
    import resource

    out = quiet()
    from . import fuzz_inputs as inputs
    from . import fuzz_targets as targets
    from .fuzz_sandbox import Sandbox

    box = Sandbox(place / "pristine", Path(tempfile.mkdtemp(dir=place)))
    targets.watch()
    if kind == "command":
        targets.warm()
        box.renew()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    watch = Watch()
    for number in range(start, stop):
        rng = inputs.rng_of(seed, kind, number)
        print(json.dumps({"begun": number}), file=out)
        by_line = kind == "command"
        case: Any = targets.command_input(rng) if by_line else targets.parser_input(kind, rng, place / "seeds")
        finding, stage = None, "found"
        watch.start()
        begun = time.process_time()
        try:
            stage = targets.command(case, box) if by_line else _parsed(targets.PARSERS[kind], case, box)
        except BaseException as error:
            finding = targets.told(error)
        finally:
            watch.stop()
        row = {"ended": number, "stage": stage, "finding": finding, "case": repr(case)[:3000] if finding else ""}
        row |= {"seconds": time.process_time() - begun, "error": targets.came.error}
        print(json.dumps(row), file=out)
        if kind == "command" and (box.changes() or finding):
            box.renew()
    shutil.rmtree(box.root, ignore_errors=True)


def _parsed(parser: Any, case: tuple[bytes, ...], box: Any) -> str:
    box.told.clear()
    box.armed = True
    try:
        stage = parser(*case)
    finally:
        box.armed = False
    if box.told:
        raise RuntimeError(f"reached out of the sandbox: {box.told}")
    return stage


def cover(place: Path, kind: str, seed: int, runs: int) -> None:
    """Let atheris mutate what a parser is given, toward inputs that reach new code; it ends the process itself."""
    import atheris

    with atheris.instrument_imports(include=["lossguide"]):
        from . import fuzz_inputs as inputs
        from . import fuzz_targets as targets
    from .fuzz_sandbox import Sandbox

    box = Sandbox(place / "pristine", Path(tempfile.mkdtemp(dir=place)))
    corpus = place / f"corpus-{kind}"
    corpus.mkdir()
    for number in range(300):
        data = targets.parser_input(kind, inputs.rng_of(seed, kind, number), place / "seeds")[0]
        (corpus / str(number)).write_bytes(data)
    count = itertools.count()

    def one(data: bytes) -> None:
        next(count)
        _parsed(targets.PARSERS[kind], (data,), box)

    options = [f"-runs={runs}", f"-seed={seed + 1}", f"-timeout={DEAD}", "-rss_limit_mb=8192", "-max_len=20000"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={place}/", str(corpus)], one)
    atheris.Fuzz()


def main(words: list[str]) -> None:
    """See the module."""
    what, place, *rest = words
    if what == "prepare":
        prepare(Path(place))
    elif what == "cases":
        cases(Path(place), rest[0], *map(int, rest[1:]))
    else:
        cover(Path(place), rest[0], *map(int, rest[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
