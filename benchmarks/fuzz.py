"""Fuzzing: the command line, and the parsers of losses, saved guidances, best settings and manifests.

Each case follows from the seed and its number: inputs that are nearly right (real options, losses and files, mixed with
what nobody should type, and damaged bytes). Workers run them one by one, in a sandbox that they cannot leave; what
raises anything but what is documented, takes too long, or writes outside of its output folder, is a finding.
`--only command:17` runs one case again and shows what became of it, `--only manifest` one kind. It can be stopped at
any moment and goes on where it was; after a change of the code, `--fresh` begins anew.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

RESULTS = Path(__file__).parent / "results"
SEED = 0
WORKERS = min(os.cpu_count() or 1, 2)
FULL = {"command": 10_000, "loss-string": 20_000, "guidance": 30_000, "best-json": 20_000, "manifest": 30_000}
QUICK = {"command": 240, "loss-string": 2_000, "guidance": 1_500, "best-json": 500, "manifest": 1_000}
COVERED = {"loss-string": 5_000, "guidance": 10_000, "best-json": 50_000, "manifest": 10_000}
QUICK_COVERED = {"loss-string": 3_000, "guidance": 2_000, "best-json": 3_000, "manifest": 1_000}
WRONG = (
    *("exceptions that are not documented", "hangs", "files outside of the output folder, or files lost there"),
    *("network or processes", "other"),
)
AT_ONCE = {"command": 500}  # cases of a part, which one process runs; of parsers 5000
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MPLBACKEND": "Agg",
    "PYTHONDONTWRITEBYTECODE": "1",  # Python's own files beside a user's my_losses.py
}


@dataclass
class Part:
    """Some cases of a kind, or a run of atheris, and what came of it; plain data for JSON.

    Attributes:
        name: of the part; what is measured is not measured again.
        kind: of the cases.
        stages: how far they came -> how many.
        findings: the case, what it was, what was found.
        seconds, longest: of the whole, and of the processor for one case.
        sentences: that refused, without what they quote and their numbers.
        executions, coverage: by atheris.
    """

    name: str
    kind: str
    stages: dict[str, int] = field(default_factory=dict)
    findings: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0
    longest: float = 0.0
    sentences: list[str] = field(default_factory=list)
    executions: int = 0
    coverage: str = ""

    def add(self, row: dict) -> None:
        """Count a case."""
        self.stages[row["stage"]] = self.stages.get(row["stage"], 0) + 1
        self.longest = max(self.longest, row["seconds"])
        told = re.sub(r"'[^']*'|\d+", "", row.get("error", ""))[:60]
        if told and told not in self.sentences:
            self.sentences.append(told)
        if row["finding"]:
            self.findings.append([f"{self.kind}:{row['ended']}", row["case"], row["finding"]])


_running: list[subprocess.Popen] = []
_stopped = threading.Event()


def _worker(*words: object, errors: IO | int = subprocess.PIPE) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fuzz_worker", *map(str, words)],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | ENVIRONMENT,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,  # Ctrl-C is for the parent, which then ends them
    )
    _running.append(process)
    return process


def _cases(place: Path, part: Part, start: int, stop: int) -> Part:
    """Run cases in a process, and in another those after one that ended it."""
    begun = time.perf_counter()
    while start < stop:
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = _worker("cases", place, part.kind, SEED, start, stop, errors=errors)
            last = None
            for line in process.stdout:
                row = json.loads(line)
                if "begun" in row:
                    last = row["begun"]
                    continue
                start, last = row["ended"] + 1, None
                part.add(row)
            status = process.wait()
            errors.seek(0)
            said = f"ended with status {status}: {errors.read()[-3000:]}"
        if _stopped.is_set():
            break
        if last is not None:
            part.add({"ended": last, "stage": "found", "finding": f"the process {said}", "case": "", "seconds": 0})
            start = last + 1
        elif status:
            raise SystemExit(f"a worker of the fuzzer {said}")
    part.seconds = time.perf_counter() - begun
    return part


def _covered(place: Path, part: Part, runs: int) -> Part:
    """Let atheris look for inputs."""
    begun = time.perf_counter()
    process = _worker("cover", place, part.kind, SEED, runs)
    told = process.communicate()[1]
    part.seconds = time.perf_counter() - begun
    done = re.findall(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)", told)
    steps = re.findall(r"^#(\d+)", told, re.MULTILINE)
    part.executions = int(steps[-1]) if steps else 0
    if process.returncode or not done:
        artifact = re.findall(r"Test unit written to (\S+)", told)
        data = repr(Path(artifact[0]).read_bytes()[:2000]) if artifact else ""
        part.findings.append([part.name, data, told[-5000:]])
    else:
        part.coverage = f"{done[-1][1]} edges, {done[-1][3]} inputs kept"
    return part


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Fuzz all, or some kinds or cases, and write what was found so far; a part with a finding is run again."""
    if sys.platform != "linux":
        raise SystemExit("the fuzzer's sandbox is made for Linux")
    wanted = QUICK if quick else FULL
    numbered = [one.partition(":") for one in only]
    if any(kind not in wanted or colon and not number.isdecimal() for kind, colon, number in numbered):
        raise SystemExit(
            f"--only is one of {', '.join(wanted)}, or a case of it, such as command:17; got {', '.join(only)}"
        )
    shared, name = Path("/dev/shm"), "fuzz-quick" if quick else "fuzz"
    rows = RESULTS / f"{name}.jsonl"
    if fresh:
        rows.unlink(missing_ok=True)
    place = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if os.access(shared, os.W_OK) else None))
    try:
        made = _worker("prepare", place)
        told = made.communicate()[1]
        if made.returncode:
            raise SystemExit(f"the sandbox could not be made: {told[-2000:]}")
        single = [(kind, int(number)) for kind, colon, number in numbered if colon]
        if single:
            _again(place, single)
            return
        try:
            _measured(place, rows, quick, [kind for kind in wanted if not only or kind in only])
        finally:
            text = _report(_read(rows), quick)
            (RESULTS / f"{name}.md").write_text(text)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(text)
    if any(part.findings for part in _read(rows)):
        raise SystemExit("the fuzzer found something")


def _read(rows: Path) -> list[Part]:
    """The parts that are measured; of one that was measured again the last."""
    lines = rows.read_text().splitlines() if rows.exists() else []
    return list({part.name: part for part in (Part(**json.loads(line)) for line in lines)}.values())


def _again(place: Path, cases: list[tuple[str, int]]) -> None:
    for kind, number in cases:
        part = _cases(place, Part("one", kind), number, number + 1)
        print(f"{kind}:{number}", part.stages, f"{part.longest:.2f} s")
        for _, case, finding in part.findings:
            print(case, finding, sep="\n")


def _measured(place: Path, rows: Path, quick: bool, kinds: list[str]) -> None:
    counts, covered = (QUICK, QUICK_COVERED) if quick else (FULL, COVERED)
    by_coverage = importlib.util.find_spec("atheris") is not None
    have = {part.name for part in _read(rows) if not part.findings}
    jobs: list[tuple[float, Part, Callable[[Part], Part]]] = []
    for kind in kinds:
        step = min(AT_ONCE.get(kind, 5000), -(-counts[kind] // 2))
        for start in range(0, counts[kind], step):
            stop = min(start + step, counts[kind])
            part = Part(f"{kind} {start} to {stop}", kind)
            jobs.append((start / counts[kind], part, partial(_cases, place, start=start, stop=stop)))
        if by_coverage and kind in covered:
            part = Part(f"{kind} by atheris, {covered[kind]}", kind)
            jobs.append((0.5, part, partial(_covered, place, runs=covered[kind])))
    jobs = [job for job in sorted(jobs, key=lambda job: job[0]) if job[1].name not in have]  # some of each kind first
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for number, job in enumerate(as_completed([pool.submit(do, part) for _, part, do in jobs]), 1):
            part = job.result()
            with rows.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(part)) + "\n")
            print(f"{number} of {len(jobs)} parts: {part.name}, {part.seconds:.0f} s", file=sys.stderr, flush=True)
            for case, what, finding in part.findings:
                print(f"--- {case}\n{what}\n{finding}", flush=True)
    finally:
        _stopped.set()
        for process in _running:
            process.kill()
        pool.shutdown(cancel_futures=True)


def _report(parts: list[Part], quick: bool) -> str:
    wrong = Counter(_kind(finding) for part in parts for *_, finding in part.findings)
    hours = sum(part.seconds for part in parts) / 3600
    lines = [
        "# Fuzzing",
        "",
        f"`python -m benchmarks run fuzz{' --quick' if quick else ''}`",
        "",
        f"Seed {SEED}, at most {WORKERS} processes of one thread each, {hours:.1f} hours of them together. A case is a "
        "command line, or what a parser is given; `--only command:17` runs one again. A hang is a case that computes "
        "for 5 s, or sleeps as long; a drawing is stopped by Ctrl-C before, most at the first call of the model.",
        "",
        "| kind | cases | of | how far they came | seconds of the longest |",
        "|---|---|---|---|---|",
    ]
    for kind, wanted in (QUICK if quick else FULL).items():
        some = [part for part in parts if part.kind == kind]
        stages = sum((Counter(part.stages) for part in some), Counter())
        told = ", ".join(f"{stage} {count}" for stage, count in stages.most_common())
        longest = max((part.longest for part in some), default=0)
        lines.append(f"| {kind} | {stages.total()} | {wanted} | {told} | {longest:.1f} |")
    sentences = {one for part in parts for one in part.sentences}
    lines += ["", f"The commands were refused by {len(sentences)} different sentences.", ""]
    lines += ["| found | cases |", "|---|---|", *(f"| {kind} | {wrong[kind]} |" for kind in WRONG), ""]
    guided = [part for part in parts if part.executions]
    if guided:
        lines += ["By atheris, guided by coverage:", "", "| kind | executions | reached | found |", "|---|---|---|---|"]
        for part in guided:
            lines.append(f"| {part.kind} | {part.executions} | {part.coverage} | {len(part.findings)} |")
    else:
        lines.append("Guided by coverage: nothing yet; it needs atheris, `pip install lossguide[fuzz]`.")
    return "\n".join(lines) + "\n"


def _kind(finding: str) -> str:
    if "Hang: " in finding or "Timeout" in finding:
        return "hangs"
    if any(one in finding for one in ("outside of the output folder", "sandbox: ['o", "changed: ", "gone: ")):
        return "files outside of the output folder, or files lost there"
    if "reached out of the sandbox" in finding:
        return "network or processes"
    return "other" if "fuzz_targets.Finding" in finding else "exceptions that are not documented"
