"""Tries the faults of a plan in a copy of the tree, in forks of a process that has imported what does not change.

A fault in a function's body is put into the function where it is imported already, in a fork of a pytest session that
has collected its tests; one that acts at import, into the file, before a fork imports everything of ours.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from .mutants import in_function

BUDGET = 10.0  # seconds of tests for each fault


def tests_of(code: str, line: int, seen: dict[int, list[str]]) -> set[str] | None:
    """The tests that run the statement at a line; None for all, where it runs at import.

    Args:
        seen: of each line that was run, by which tests; "" at import.
    """
    if not in_function(code, line):
        return None
    statements = [
        range(node.lineno, (node.body[0].lineno if getattr(node, "body", None) else node.end_lineno + 1))
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.stmt)
    ]
    own = min((lines for lines in statements if line in lines), key=len, default=())
    if not own:  # a decorator's line, which runs at import
        return None
    return {test for one in own for test in seen.get(one, ()) if test}


class _Watch:
    """A pytest plugin: the time of each test, the lines that it runs, and which fail."""

    def __init__(self, cover):
        self.cover, self.start, self.seconds, self.bad = cover, 0.0, {}, set()

    def pytest_runtest_logstart(self, nodeid, location):
        self.start = time.process_time()
        self.cover.switch_context(nodeid)

    def pytest_runtest_logfinish(self, nodeid, location):
        self.cover.switch_context("")
        self.seconds[nodeid] = time.process_time() - self.start

    def pytest_runtest_logreport(self, report):
        if not report.passed:
            self.bad.add(report.nodeid)


def forked(work, seconds: float, log: Path | None) -> int:
    """Run `work() -> exit status` in a fork that writes to `log`; minus the signal that ended it."""
    child = os.fork()
    if not child:
        status = 70
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 5))
            signal.alarm(int(20 * seconds) + 60)  # where it waits rather than computes
            if log is not None:
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
            status = int(work())
        except BaseException:  # this process must not go on as if it were its parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 70:
        raise RuntimeError(f"the forked process failed: {log.read_text()[-2000:] if log else 'see above'}")
    return status


def pytest_in_copy(arguments: list[str], plugins=()) -> int:
    """pytest's exit status; hypothesis draws the same examples each time, and does not shrink what fails."""
    import pytest
    from hypothesis import Phase, settings

    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutation", phases=phases, database=None, derandomize=True, deadline=None)
    options = ["-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutation", "--tb=no", *arguments]
    return pytest.main(options, plugins=list(plugins))


def look(tests: list[str], modules: list[str], found: Path) -> int:
    """Run all tests once; write which lines of the modules each runs, its time, and what they import."""
    import coverage

    cover = coverage.Coverage(
        data_file=None, include=[str(Path(name).resolve()) for name in modules], config_file=False
    )
    watch = _Watch(cover)
    cover.start()
    pytest_in_copy(tests, [watch])
    cover.stop()
    here = str(Path.cwd())
    outside = [
        name
        for name, module in sys.modules.items()
        if not (getattr(module, "__file__", None) or here).startswith(here) and "pytest" not in name
    ]
    lines = {name: cover.get_data().contexts_by_lineno(str(Path(name).resolve())) for name in modules}
    seconds = {test: value for test, value in watch.seconds.items() if test not in watch.bad}
    found.write_text(json.dumps(dict(lines=lines, seconds=seconds, bad=sorted(watch.bad), outside=outside)))
    return 0


def became(status: int) -> str:
    """What an exit status says of a fault."""
    if status in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
        return "timeout"
    return "found" if status else "survived"


def functions(module: ModuleType) -> dict[tuple[str, ...], FunctionType]:
    """A module's functions and methods, also of properties, by the names that lead to them."""
    found = {}
    for name, value in vars(module).items():
        inside = vars(value) if isinstance(value, type) else {}
        for path, one in [((name,), value), *(((name, key), method) for key, method in inside.items())]:
            one = getattr(one, "fget", None) or getattr(one, "__func__", one)
            if isinstance(one, FunctionType) and one.__module__ == module.__name__:
                found[path] = one
    return found


def put_in(module: ModuleType, code: str) -> None:
    """Give a module's functions the bodies that they have in `code`, wherever they are imported already."""
    of_module = compile(code, module.__file__, "exec")
    for path, function in functions(module).items():
        body = of_module
        for name in path:
            body = next((one for one in body.co_consts if isinstance(one, CodeType) and one.co_name == name), None)
            if body is None:
                break  # made by a decorator
        else:
            function.__code__ = body


class _Each:
    """A pytest plugin: in place of the tests once, those of each fault in a fork of the session that has collected
    them."""

    def __init__(self, faults: list[dict], log: Path, tell):
        self.faults, self.log, self.tell = faults, log, tell

    def pytest_runtestloop(self, session):
        items = {item.nodeid: item for item in session.items}
        for fault in self.faults:
            module = importlib.import_module(f"lossguide.{fault['module'][:-3].replace('/', '.')}")
            chosen = [items[test] for test in fault["tests"]]

            def work(module=module, fault=fault, chosen=chosen):
                put_in(module, fault["code"])
                for item, following in zip(chosen, [*chosen[1:], None]):
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                    if session.testsfailed:
                        print("\nFAILED", item.nodeid)
                        return 1
                return 0

            self.tell(fault, lambda work=work, fault=fault: forked(work, fault["limit"], self.log))
        return True


def at_import(fault: dict, log: Path) -> int:
    """Try a fault that acts when its module is imported: in a fork that imports everything of ours anew."""

    def work():
        sys.dont_write_bytecode = True
        return pytest_in_copy(["-x", *fault["tests"]])

    module = Path(fault["module"])
    kept = module.read_text()
    module.write_text(fault["code"])
    try:
        status = forked(work, fault["limit"], log)
    finally:
        module.write_text(kept)
    if status == 5:
        raise RuntimeError(f"pytest found no tests: {log.read_text()[-2000:]}")
    return status


def in_copy(plan: Path) -> None:
    """Try the faults of a plan in this copy of the tree; a line of JSON for each."""
    asked = json.loads(plan.read_text())
    tests = list(asked["tests"])
    found = plan.with_suffix(".found")
    forked(lambda: look(tests, list(asked["modules"]), found), 3600, plan.with_suffix(".log"))
    known = json.loads(found.read_text())
    for name in known["outside"]:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001, S112 - not one that can be imported by itself
            continue
    if any(name.startswith("lossguide") for name in sys.modules):
        raise RuntimeError("the library is imported already, so that no fault would be seen")
    seconds, faults = known["seconds"], []
    print(f"{len(seconds)} tests, {sum(seconds.values()):.0f} s; {len(known['bad'])} skipped or failed", flush=True)
    for name, ones in asked["modules"].items():
        code = Path(name).read_text()
        seen = {int(line): tests for line, tests in known["lines"][name].items()}
        quickest = sorted({test for ones in seen.values() for test in ones} & set(seconds), key=seconds.get)[:20]
        spoilt = code.replace(" return ", " raise ImportError; return ")
        checks = [
            dict(line=0, change=f"{end} at import: {way}", code=text, at_import=way)
            for way in (True, False)
            for text, end in ((code, "survived"), (spoilt, "found"))
        ]
        for one in checks + ones:
            fit = tests_of(code, one["line"], seen) if one["line"] else quickest
            fit = sorted(seconds if fit is None else set(fit) & set(seconds), key=seconds.get)
            chosen, total = [], 0.0
            for test in fit:
                if chosen and total + seconds[test] > BUDGET:
                    break
                total += seconds[test]
                chosen.append(test)
            way = one.get("at_import", not in_function(code, one["line"]))
            faults.append(one | dict(module=name, tests=chosen, limit=30 + 5 * total, at_import=way))

    log = plan.with_suffix(".log")

    def tell(fault: dict, work) -> None:
        start = time.perf_counter()
        end = became(work()) if fault["tests"] else "survived"
        by = next((line for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))), "")[:200]
        if not fault["line"] and end != fault["change"].split()[0]:
            raise RuntimeError(f"{fault['module']} of the copy is not what is tested: {log.read_text()[-2000:]}")
        row = {key: fault[key] for key in ("module", "line", "change")} | dict(
            became=end, by=by if end == "found" else ""
        )
        row |= dict(tests=len(fault["tests"]), seconds=round(time.perf_counter() - start, 1))
        print(*row.values(), flush=True)
        if fault["line"]:
            with plan.with_suffix(".rows").open("a") as file:
                file.write(json.dumps(row) + "\n")

    for fault in faults:
        if fault["at_import"]:
            tell(fault, lambda fault=fault: at_import(fault, log))
    each = _Each([fault for fault in faults if not fault["at_import"]], log, tell)
    forked(lambda: pytest_in_copy(["-s", *tests], [each]), 10**6, None)


if __name__ == "__main__":
    in_copy(Path(sys.argv[1]))
