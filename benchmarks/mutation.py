"""Mutation testing: small faults put into the level algebra, the step rules and the guided step, one at a time; do the
tests find them?

Cosmic Ray makes the faults. Its own way to run tests, a new interpreter for each fault, would spend nearly all its time
importing torch; here processes are forked (see `mutation_worker`). Each fault is tried with the tests that run its
line, the shortest first, in a copy of the tree.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from .mutants import mutants
from .mutation_worker import BUDGET
from .rows import Rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SURVIVORS = Path(__file__).parent / "survivors.json"  # why a fault is not found, by what it changes
MODULES = ("samplers/levels.py", "guidance/steps.py", "guidance/step.py", "guidance/edits.py")
TESTS = (
    "tests/test_levels.py",
    "tests/test_steps.py",
    "tests/test_steps_guided.py",
    "tests/test_guidance.py",
    "tests/test_recipes.py",
    "tests/test_per_pixel.py",
    "tests/test_faults.py",
)
COUNT, SEED = 120, 0


def copied(folder: Path) -> Path:
    """A copy of the tree, in which `lossguide` is found before the one that is installed."""
    tree = folder / "tree"
    tree.mkdir()
    junk = shutil.ignore_patterns("__pycache__", "results", ".train")
    for name in ("samplers", "guidance", "losses", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=junk)
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "lossguide").mkdir()
    for name in ("samplers", "guidance", "losses"):
        (tree / "lossguide" / name).symlink_to(tree / name)
    return tree


def digest(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Try a sample of faults in each module, or in those whose path ends with one of `only`, and write the table.

    What was found stays found while the module is as it was (`fresh` tries it again); what was not is tried again.
    """
    path = RESULTS / f"mutation{'-quick' if quick else ''}.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    plan, samples, totals, codes = {}, {}, {}, {}
    for name in MODULES:
        codes[name] = (ROOT / name).read_text()
        chosen, totals[name] = mutants(codes[name], 5 if quick else COUNT, SEED)
        samples[name] = chosen
        if not only or any(name.endswith(end) for end in only):
            known = latest(path, name, codes[name])
            left = [
                one
                for one in chosen
                if known.get((one.line, one.change), {"became": "survived"})["became"] == "survived"
            ]
            plan[name] = [dict(line=one.line, change=one.change, code=one.code) for one in left]
    with tempfile.TemporaryDirectory() as folder:
        tree, asked = copied(Path(folder)), Path(folder) / "plan.json"
        asked.write_text(json.dumps(dict(tests=TESTS, modules=plan)))
        own = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "benchmarks.mutation_worker", str(asked)]
        try:
            subprocess.run(command, cwd=tree, env=os.environ | own, check=True)
        finally:
            done = asked.with_suffix(".rows")
            for line in done.read_text().splitlines() if done.exists() else ():
                row = json.loads(line)
                Rows(path, digest(codes[row["module"]])).add(row)
    lines = report({name: latest(path, name, code) for name, code in codes.items()}, samples, totals)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(f"wrote {path.with_suffix('.md')}")


def latest(path: Path, module: str, code: str) -> dict[tuple[int, str], dict]:
    """What became of each fault of a module as it is now, when it was tried last."""
    return {(row["line"], row["change"]): row for row in Rows(path, digest(code)).all() if row["module"] == module}


def report(known: dict, samples: dict, totals: dict) -> list[str]:
    """The tables, in Markdown."""
    why = json.loads(SURVIVORS.read_text())
    names = ", ".join(name.removeprefix("tests/") for name in TESTS)
    lines = [
        "# Do the tests find small faults?",
        "",
        '`python -m benchmarks run mutation` after `pip install ".[test,mutation]"`; with `--fresh` where tests were '
        "changed or removed.",
        "",
        f"Faults are made by the operators of Cosmic Ray {version('cosmic-ray')}, without those that only exchange an "
        f"operator for one that no tensor has: a random sample of each module's (seed {SEED}), tried one at a time "
        f"with the tests that run its line, the shortest first, at most {BUDGET:.0f} seconds of them, out of {names}. "
        "A timeout counts as found. An equivalent fault changes nothing that could be observed; the last column leaves "
        "those out.",
        "",
        "| module | faults | tried | found | timeouts among them | not found | equivalent among them | share found "
        "| without equivalent ones |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    missed, both = [], [0, 0, 0, 0.0]
    for name, chosen in samples.items():
        rows = [row for one in chosen if (row := known[name].get((one.line, one.change)))]
        if not rows:
            continue
        left = [row for row in rows if row["became"] == "survived"]
        missed += left
        same = sum(why.get(name, {}).get(row["change"], "").startswith("Equivalent") for row in left)
        late = sum(row["became"] == "timeout" for row in rows)
        tried, all_of = len(rows), totals[name]
        found = tried - len(left)
        share = found / tried
        error = (share * (1 - share) / tried * (1 - tried / all_of)) ** 0.5  # drawn without replacement
        lines.append(
            f"| {name} | {all_of} | {tried} | {found} | {late} | {len(left)} | {same} | {share:.3f} ± {error:.3f} "
            f"| **{found / (tried - same):.3f}** |"
        )
        both = [a + b for a, b in zip(both, (tried, found, same, 0))]
    if both[0]:
        lines.append(
            f"| all tried | {sum(totals.values())} | {both[0]} | {both[1]} | | {both[0] - both[1]} | {both[2]} "
            f"| {both[1] / both[0]:.3f} | **{both[1] / (both[0] - both[2]):.3f}** |"
        )
    lines += ["", "## What is not found", "", "| module, line | change | why |", "|---|---|---|"]
    for row in missed:
        reason = why.get(row["module"], {}).get(row["change"], "**not looked at yet**")
        text = row["change"].replace("|", "\\|")
        lines.append(f"| {row['module']}:{row['line']} | `{text}` | {reason} |")
    return lines
