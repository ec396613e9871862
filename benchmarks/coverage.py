"""Which lines of the library its tests run: the test files one by one, so that a run can be killed and goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
KEPT = ROOT / ".train" / "coverage"  # not committed: which lines each test file runs
FOLDERS = ("losses", "samplers", "guidance")
LEAST = 80  # per cent of a file


def digest() -> str:
    """Of the library and its tests, which the lines found belong to."""
    found = hashlib.sha256()
    for folder in (*FOLDERS, "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "coverage", *words]


def measured(folder: Path, test: Path) -> str:
    """Run a test file under coverage unless that is done; the last line that pytest wrote of what it found."""
    done = folder / f"{test.stem}.txt"
    if not done.exists():
        data = folder / test.stem
        words = ["run", f"--data-file={data}", "-m", "pytest", "-p", "no:cacheprovider", str(test)]
        ran = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True)
        said = [line for line in ran.stdout.splitlines() if " in " in line and ("passed" in line or "failed" in line)]
        done.write_text(said[-1].strip("= ") if said else f"exit status {ran.returncode}")
    return done.read_text()


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure the whole suite, or with `quick` or `only` some of its files (`--only levels`), and write the table."""
    folder = KEPT / digest()
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    chosen = only or ("levels", "steps") if quick else only
    tests = [test for test in tests if not chosen or test.stem.removeprefix("test_") in chosen]
    said = {}
    for test in tests:
        said[test.name] = measured(folder, test)
        print(test.name, said[test.name], flush=True)
    parts = [str(path) for path in folder.iterdir() if path.suffix not in (".txt", ".json") and path.name != "all"]
    whole, data = folder / "all", folder / "all.json"
    subprocess.run(command("combine", "-q", "--keep", f"--data-file={whole}", *parts), cwd=ROOT, check=True)
    subprocess.run(command("json", "-q", f"--data-file={whole}", "-o", str(data)), cwd=ROOT, check=True)
    lines = report(json.loads(data.read_text())["files"], said)
    path = RESULTS / f"coverage{'-quick' if chosen else ''}.md"
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path}")


def report(files: dict[str, dict], said: dict[str, str]) -> list[str]:
    """The tables, in Markdown, of coverage's own summary of each file."""
    sums = {name: file["summary"] for name, file in files.items()}

    def row(name: str, ones: list[dict]) -> str:
        count, run = sum(one["num_statements"] for one in ones), sum(one["covered_lines"] for one in ones)
        return f"| {name} | {count} | {run} | **{100 * run / max(count, 1):.1f} %** |"

    low = sorted((one["percent_covered"], name) for name, one in sums.items() if one["percent_covered"] < LEAST)
    odd = [f"- {name}: {text}" for name, text in said.items() if "passed" not in text or "failed" in text]
    return [
        "# Which lines of the library its tests run",
        "",
        f"`python -m benchmarks run coverage`: {len(said)} test files, coverage {version('coverage')}, by lines; those "
        "that a process runs which a test starts count, too.",
        "",
        "| folder | statements | run | share |",
        "|---|---|---|---|",
        *(row(name, [one for file, one in sums.items() if file.startswith(name + os.sep)]) for name in FOLDERS),
        row("all", list(sums.values())),
        "",
        f"## Files below {LEAST} %",
        "",
        *(["| file | share |", "|---|---|"] if low else ["None."]),
        *(f"| {name} | {share:.0f} % |" for share, name in low),
        *(["", "## Test files that did not pass as a whole", "", *odd] if odd else []),
    ]
