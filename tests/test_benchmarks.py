"""The benchmarks' rows, plan and report, without a model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("fcntl")

from lossguide.samplers import Level  # noqa: E402

from benchmarks import grids, methods, methods_report, solvers  # noqa: E402
from benchmarks.methods_report import Entry  # noqa: E402
from benchmarks.rows import Rows, digest_of  # noqa: E402
from benchmarks.work import Pictures, Work  # noqa: E402

REPOSITORY = Path(__file__).parents[1]


def other_process(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_a_torn_line_is_skipped_and_the_next_row_starts_a_line_of_its_own(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", "w")
    rows.add(dict(run=1, figure=0.5))
    with rows.path.open("a") as file:
        file.write('{"run": 2, "fig')
    assert rows.get(run=2) is None
    rows.add(dict(run=2, figure=0.25))
    assert [rows.get(run=run)["figure"] for run in (1, 2)] == [0.5, 0.25]
    assert Rows(rows.path, "others").get(run=1) is None
    assert Rows(rows.path, "w", fresh=True).get(run=1) is None


def test_rows_that_several_processes_append_stay_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (
        "from pathlib import Path\nfrom benchmarks.rows import Rows\n"
        f"rows = Rows(Path({str(path)!r}), 'w')\n"
        "for i in range(200): rows.add(dict(run=i, text='x' * 5000))"
    )
    processes = [other_process(code) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 400 and all(len(line["text"]) == 5000 for line in lines)


def test_a_claim_is_one_process_s_and_ends_with_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (
        "import time\nfrom pathlib import Path\nfrom benchmarks.rows import Rows\n"
        f"with Rows(Path({str(path)!r}), 'w').claim(run=1) as mine:\n"
        "    print(mine, flush=True)\n    time.sleep(60)"
    )
    other, rows = other_process(code), Rows(path, "w")
    try:
        assert other.stdout.readline() == "True\n"
        with rows.claim(run=1) as mine:
            assert not mine
        with rows.claim(run=2) as mine:
            assert mine
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with rows.claim(run=1) as mine:
        assert mine  # of a dead process
        rows.add(dict(run=1))
    with rows.claim(run=1) as mine:
        assert not mine  # measured
    assert not list(tmp_path.glob("*.claim"))


def work(figure: str = "error", higher: bool = False) -> Work:
    """A work whose pictures are single numbers."""
    judge = lambda images: {figure: images.flatten(1).mean(1), "other": images.flatten(1).amax(1)}
    pictures = lambda which: Pictures(range(4), lambda places: None, judge)
    return Work("toy", "A toy", lambda: None, pictures, figure, higher, size=10.0)


@pytest.fixture
def toy(monkeypatch):
    """The plan on a work whose runs give `|log(strength / best)|`, and what was drawn, in order."""
    one, drawn = work(), []

    def draw(job):
        drawn.append((job.recipe, job.change, job.which))
        error = abs(torch.tensor(job.change.get("strength", 1.0) / toy_best[0]).log())
        cost = dict(seconds_per_visit=2.0, forward_seconds=1.0, visits=50, seconds=100.0)
        return error + 0.01 * torch.rand(len(job.seeds), 1, 1, 1), cost

    toy_best = [700.0]
    monkeypatch.setattr(methods, "WORKS", [one])
    monkeypatch.setattr(methods, "draw", draw)
    monkeypatch.setattr(methods, "weights_digest", lambda load: "w")
    methods._pictures.cache_clear()
    yield one, drawn, toy_best
    methods._pictures.cache_clear()


def test_the_plan_searches_beyond_the_ends_of_a_grid_and_measures_nothing_twice(toy, tmp_path):
    one, drawn, _ = toy
    plan = methods.Plan([one], ["dps"], tmp_path / "rows.jsonl")
    plan.run()
    tried = [change.get("strength", 1.0) for _, change, which in drawn if which == "search"]
    assert tried == [1.0, 3.0, 10.0, 30.0, 90.0, 270.0]  # the grid, and two more
    assert drawn[0] == ("dps", {}, "evaluation")
    assert [(change, which) for _, change, which in drawn[-3:]] == [
        ({"strength": 270.0}, "evaluation"),
        ({"strength": 270.0}, "fresh"),
        ({}, "fresh"),
    ]
    search = plan.search(one, "dps")
    assert search.best == {"strength": 270.0} and search.edge
    count = len(drawn)
    methods.Plan([one], ["dps"], tmp_path / "rows.jsonl").run()
    assert len(drawn) == count


def test_the_best_inside_of_a_grid_needs_no_further_search(toy, tmp_path):
    one, drawn, best = toy
    best[0] = 9.0
    plan = methods.Plan([one], ["dps"], tmp_path / "rows.jsonl")
    plan.run()
    search = plan.search(one, "dps")
    assert search.best == {"strength": 10.0} and not search.edge and len(search.jobs) == 4


@pytest.mark.parametrize("recipe, counts", [("score", True), ("dps", False)])
def test_rows_of_either_precision_count_but_where_others_code_is_compared(toy, tmp_path, monkeypatch, recipe, counts):
    one, *_ = toy
    monkeypatch.setattr(methods, "fast_dtype", lambda: torch.bfloat16)
    plan = methods.Plan([one], [recipe], tmp_path / "rows.jsonl")
    tried, final = (plan.job(one, recipe, {}, which) for which in ("search", "evaluation"))
    assert tried.dtype == torch.bfloat16 and final.dtype == (torch.bfloat16 if counts else torch.float32)
    for job in (tried, final):
        other = "float32" if job.key["dtype"] == "bfloat16" else "bfloat16"
        plan.rows["toy"].add(job.key | {"dtype": other})
    assert plan.row(tried) is not None and (plan.row(final) is not None) == counts


def test_a_run_that_fails_leaves_a_row_and_the_rest_goes_on(toy, tmp_path, monkeypatch):
    one, drawn, _ = toy
    draw = methods.draw

    def fail(job):
        if job.change.get("strength") == 10.0:
            raise ValueError("too\nstrong")
        return draw(job)

    monkeypatch.setattr(methods, "draw", fail)
    plan = methods.Plan([one], ["dps"], tmp_path / "rows.jsonl")
    plan.run()
    failed = [row for row in plan.rows["toy"].all() if row["figures"] is None]
    assert [row["failure"] for row in failed] == ["ValueError: too"]
    assert plan.search(one, "dps").best is not None


def test_runs_that_another_process_is_at_are_left_to_it(toy, tmp_path):
    one, drawn, _ = toy
    path = tmp_path / "rows.jsonl"
    plan = methods.Plan([one], ["best_of_n"], path)
    job = plan.job(one, "best_of_n", {}, "evaluation")
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom benchmarks.rows import Rows\n"
        f"with Rows(Path({str(path)!r}), 'w').claim(**json.loads({json.dumps(job.key)!r})) as mine:\n"
        "    print(mine, flush=True)\n    sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "True\n"
    start = time.time()
    plan.run()
    assert [which for *_, which in drawn] == ["fresh"] and time.time() - start < 30
    other.communicate("")
    plan.run()
    assert [which for *_, which in drawn] == ["fresh", "evaluation"]


def row(figures, change=None, spread=0.0, **more):
    per_picture = {name: [value - spread, value + spread] for name, value in figures.items()}
    errors = dict.fromkeys(figures, spread)
    cost = dict(seconds_per_visit=4.0, forward_seconds=2.0, visits=75, steps=50, pictures=8)
    return dict(change=change or {}, figures=figures, per_picture=per_picture, errors=errors, **cost, **more)


@pytest.mark.parametrize(
    "higher, auto, peer, worse",
    [(False, 0.104, 0.1, 0.04), (False, 0.106, 0.1, 0.06), (True, 0.96, 1.0, 0.04), (True, 0.9, 1.0, 0.1)],
)
def test_the_verdict_is_on_auto_s_default_and_the_best_of_the_rest(higher, auto, peer, worse):
    weak = row({"error": 0.0 if higher else 9.0})
    entries = [
        Entry("unguided", dict(default=row({"error": 5.0 if higher else 0.0}))),
        Entry("auto", dict(default=row({"error": auto}))),
        Entry("mpgd", dict(default=weak, best=row({"error": peer}, {"strength": 4.0}))),
        Entry("dps", dict(default=None, best=None)),
    ]
    verdict = methods_report.verdict(work(higher=higher), entries)
    assert verdict["worse"] == pytest.approx(worse)
    assert verdict["within"] == (worse <= 0.05) and verdict["name"] == "mpgd, strength=4"


def test_the_report_shows_what_is_there_and_others_figures_beside_it():
    failed = dict(figures=None, failure="ValueError: no", change={})
    entries = [
        Entry(
            "auto", {"default": row({"lpips": 0.06, "psnr": 17.0}), "fresh default": row({"lpips": 0.07, "psnr": 1.0})}
        ),
        Entry("mpgd", {"default": failed, "fresh best": row({"lpips": 0.09, "psnr": 1.0}, {"strength": 2.0}, 0.01)}),
        Entry("dps", {"default": None, "best": None}, searched=2),
    ]
    one = Work("real-super-resolution", "Real", lambda: None, lambda which: None, "lpips", False, 1.0)
    empty = Work("toy", "A toy", lambda: None, lambda which: None, "hit", True, 1.0)
    text = methods_report.report([(one, entries), (empty, [])], "methods")
    assert "On 1 of 1 measured." in text and "| toy | hit, higher is better | | | | | not measured |" in text
    assert "failed: ValueError: no" in text and "FreeDoM, others' code" in text
    assert "0.09 ± 0.01" in text and "-0.02 ± 0.01" in text
    header, *body = [line for line in text.splitlines() if line.startswith("|") and line.count("|") > 8]
    assert body and all(line.count("|") == header.count("|") for line in body)
    assert "Real. 8 pictures; 2 others to search on; 8 fresh ones." in text
    assert "Not measured: dps." in text and "Only at the default: auto." in text
    assert methods_report.cost(row({})) is None
    spent = dict(processor_seconds=600.0, forward_processor_seconds=4.0, forward_batch=4)
    assert methods_report.cost(row({}, **spent)) == 1.5  # 1.5 s for a picture's step, 1 s for its forward


def test_grids_start_at_the_default_and_every_recipe_has_a_place():
    from lossguide.guidance import recipes

    assert set(grids.ORDER) == set(recipes.available())
    for recipe in grids.ORDER:
        assert grids.grid(recipe, work())[0] == {}
    assert grids.beyond([{}, {"strength": 2.0}, {"strength": 4.0}], {}) == {"strength": 0.5}
    assert grids.beyond([{"mu": 1}, {"mu": 2}], {"mu": 1}) is None


def test_the_digest_of_settings_tells_what_differs_from_the_defaults():
    dps = methods.recipes.dps
    assert digest_of(dps(None)) == digest_of(dps(torch.sum)) != digest_of(dps(None, strength=3.0))
    one = work()
    digests = [methods.settings_digest("dps", change, one) for change in ({}, {"strength": 1.0}, {"strength": 2.0})]
    assert digests[0] == digests[1] != digests[2]


def test_a_model_seen_along_straight_paths_finds_the_same_picture():
    model = solvers.load_demo()
    x0, noise = torch.randn(2, 2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for timestep in (30, 500, 970):
        alpha = model.scheduler.alphas_cumprod[timestep].sqrt()
        level = Level.of(alpha.item(), (1 - alpha**2).sqrt().item())
        sample = level.mix(x0, noise)
        v = model.predict(sample, torch.tensor(timestep))
        share = level.sigma / (level.alpha + level.sigma)
        straight = Level(1 - share, share)
        stretched = sample / (level.alpha + level.sigma)
        flow = solvers.as_flow(model)(stretched, 1000 * share)
        found = straight.x0(flow, stretched, "flow")
        torch.testing.assert_close(found, level.x0(v, sample, "v_prediction"), rtol=1e-3, atol=1e-3)
