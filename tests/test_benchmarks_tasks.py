"""Tasks that compare methods at equal cost: their arithmetic, their rows, their reports."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("fcntl")

from diffusers import DDIMScheduler  # noqa: E402
from lossguide.guidance import recipes  # noqa: E402
from lossguide.losses import Term  # noqa: E402
from lossguide.samplers import denoiser, sample  # noqa: E402

from benchmarks import __main__ as commands  # noqa: E402
from benchmarks import budget, compare, metrics, peers, report, runs, task, trial  # noqa: E402
from benchmarks.task import Method, Task  # noqa: E402
from benchmarks.work import Pictures, Work  # noqa: E402


class White(torch.nn.Module):
    """The exact denoiser of white noise, which counts the pictures that go through it by itself."""

    def __init__(self, scheduler):
        super().__init__()
        self.share = (1 - scheduler.alphas_cumprod).sqrt()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.forwards = self.backwards = 0

    def forward(self, x, t):
        self.forwards += len(x)
        output = self.weight * self.share[int(t)] * x
        return Counting.apply(output, self)


class Counting(torch.autograd.Function):
    """Passes everything on, and counts the pictures of backwards."""

    @staticmethod
    def forward(context, x, owner):
        context.owner = owner
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        context.owner.backwards += len(gradient)
        return gradient, None


def toy_model():
    scheduler = DDIMScheduler(num_train_timesteps=200, clip_sample=False)
    return denoiser(White(scheduler), scheduler, shape=(3, 4, 4))


def brightness(image: torch.Tensor) -> torch.Tensor:
    return (image.mean((1, 2, 3)) - 0.8).abs()


MODEL = toy_model()


def toy_work(name: str = "toy", model=lambda: MODEL) -> Work:
    """Pictures of some brightness, judged by how far from it they are."""
    judge = lambda images: {"error": (images.mean((1, 2, 3)) - 0.8).abs(), "spread": images.flatten(1).std(1)}
    pictures = Pictures(range(6), lambda places: Term(brightness, augment=False), judge)
    return Work(name, "A brightness", model, lambda which: pictures, "error", False, 10.0, augment=False, batch=4)


METHODS = {
    "unguided": None,
    "dps": dict(recipe="dps"),
    "every third": dict(recipe="dps", every=3),
    "share": dict(recipe="auto", through_share=0.4, time_travel=None),
    "auto": dict(recipe="auto"),
    "x0": dict(recipe="mpgd"),
    "freedom": dict(recipe="freedom"),
    "late": dict(recipe="dps", start=0.5),
    "best": dict(recipe="best_of_n", count=3),
    "particles": dict(recipe="tds", count=2),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [3, 11])
def test_planned_calls_are_those_that_the_hook_and_the_model_count(name, steps):
    model, settings = toy_model(), dict(METHODS[name] or {})
    guidance = recipes.get(settings.pop("recipe"))(Term(brightness), **settings) if settings else None
    planned = budget.planned(model, guidance, steps)
    with budget.counted(model.model) as calls:
        sample(model, guidance, steps=steps, seeds=range(2))
    assert (calls.forwards, calls.backwards) == (model.model.forwards, model.model.backwards)
    assert (calls.forwards, calls.backwards) == (2 * planned.forwards, 2 * planned.backwards)
    assert planned.forwards >= steps and (guidance is None) == (planned.total == steps and name == "unguided")


def test_the_most_steps_that_fit():
    assert budget.most(lambda n: budget.Calls(n, n), 25) == 12
    assert budget.most(lambda n: budget.Calls(n), 25) == 25
    assert budget.most(lambda n: budget.Calls(n), 25, limit=20) == 20
    assert budget.most(lambda n: budget.Calls(30 * n), 25) == 0
    assert budget.most(lambda n: budget.Calls(1.7 * n + 3), 0.5) == 0

    def late(n):  # acts from three steps on
        if n < 3:
            raise ValueError
        return budget.Calls(n, n // 2)

    assert budget.most(late, 9) == 6
    assert budget.most(late, 2) == 0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Reports and pictures of toys go here."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    trial.pictures_of.cache_clear()
    trial._LAST.clear()
    return tmp_path


def toy_task(**changes) -> Task:
    methods = [
        Method("unguided", "unguided"),
        Method("best of N", "best_of_n", candidates_at=10),
        Method("dps", "dps", dict(strength=3.0)),
        Method("auto", "auto", by_work={"toy": dict(time_travel=None)}),
    ]
    return Task(
        **dict(dict(works=[toy_work()], methods=methods, budgets=(20, 40), pictures=6, dtype=torch.float32), **changes)
    )


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_method_spends_the_same_calls_and_rows_say_what_was_counted(folder):
    path = folder / "toy.jsonl"
    compare.Comparison(toy_task(), path).run()
    found = {(row["method"], row["budget"]): row for row in rows_of(path) if row["clock"] == "calls"}
    assert len(found) == 8
    counts = {("unguided", 20): 20, ("unguided", 40): 40, ("best of N", 20): 2, ("best of N", 40): 4}
    counts |= {("dps", 20): 10, ("dps", 40): 20}
    for key, row in found.items():
        assert row["forwards"] + row["backwards"] <= row["budget"]
        if key in counts:
            assert row["forwards"] + row["backwards"] == row["budget"]
            assert row.get("steps", row.get("candidates")) == counts[key]
        assert row["change"] == (
            {"time_travel": None} if key[0] == "auto" else {"strength": 3.0} if key[0] == "dps" else {}
        )
        assert row["seeds"] == list(range(6)) and len(row["per_picture"]["error"]) == 6
        assert row["versions"]["torch"] and row["versions"]["python"] and row["threads"] and "processor" in row
        assert row["errors"]["error"] > 0 and row["processor_seconds"] > 0 and row["forward_seconds"] > 0
    assert found["dps", 40]["figures"]["error"] < found["unguided", 40]["figures"]["error"]
    guide = found["dps", 40]["figures"]["guide"]
    assert guide == pytest.approx(found["dps", 40]["figures"]["error"])  # here both are the same measure
    steps, losses = zip(*found["dps", 40]["curve"])
    assert list(steps) == list(range(20)) and losses[-1] < losses[0]


def test_equal_time_takes_as_many_calls_as_the_time_of_the_calls_says(folder, monkeypatch):
    cost = {"unguided": 1.0, "best of N": 1.05, "dps": 2.0, "auto": 0.5}  # time of a call in forwards
    work = toy_work()

    def draw(one, count):
        calls = one.calls(count)
        seconds = cost[one.method.name] * calls.total * 6
        timed = dict(seconds=seconds, processor_seconds=seconds, forward_seconds=4.0, forward_processor_seconds=4.0)
        counted = dict(forwards=calls.forwards, backwards=calls.backwards, batch=4, forward_batch=4)
        return torch.rand(6, 3, 4, 4), timed | counted

    monkeypatch.setattr(trial.Trial, "draw", draw)
    path = folder / "toy.jsonl"
    compare.Comparison(toy_task(works=[work], budgets=(40,)), path).run()
    rows = {(row["method"], row["clock"]): row for row in rows_of(path)}
    assert {key for key in rows if key[1] == "seconds"} == {("dps", "seconds"), ("auto", "seconds")}
    assert trial.worth(rows["dps", "calls"]) == pytest.approx(80)
    assert trial.worth(rows["dps", "seconds"]) == pytest.approx(40) and rows["dps", "seconds"]["steps"] == 10
    assert trial.worth(rows["auto", "calls"]) <= 20
    assert 36 <= trial.worth(rows["auto", "seconds"]) <= 40
    measured = report.Measured(rows_of(path), toy_task(works=[work]))
    assert measured.row(work, "best of N", "seconds", 40) is not None  # its run of equal calls serves
    assert measured.row(work, "dps", "seconds", 40)["clock"] == "seconds"


def test_a_run_goes_on_where_it_was_killed(folder, monkeypatch):
    path, drawn = folder / "toy.jsonl", []
    draw = trial.Trial.draw

    def watched(one, count):
        drawn.append((one.method.name, one.clock, one.budget))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(one, count)

    monkeypatch.setattr(trial.Trial, "draw", watched)
    one = toy_task(budgets=(20,))
    with pytest.raises(KeyboardInterrupt):
        compare.Comparison(one, path).run()
    assert len(rows_of(path)) == 2
    whole = path.read_text()
    path.write_text(whole[:-40])  # the second row is torn
    compare.Comparison(one, path).run()
    assert [name for name, clock, _ in drawn if clock == "calls"] == [
        "unguided",
        "best of N",
        "dps",
        "best of N",
        "dps",
        "auto",
    ]
    rows = report.read(path)
    keys = [(row["method"], row["clock"]) for row in rows]
    assert len(keys) == len(set(keys)) and {name for name, _ in keys} == {"unguided", "best of N", "dps", "auto"}
    count = len(drawn)
    compare.Comparison(one, path).run()
    assert len(drawn) == count and report.read(path) == rows


def test_a_run_that_fails_leaves_a_row_and_the_rest_goes_on(folder):
    methods = [Method("late", "dps", dict(start=0.999)), Method("unguided", "unguided")]
    path = folder / "toy.jsonl"
    compare.Comparison(toy_task(methods=methods, budgets=(20,)), path).run()
    late, unguided = (row for row in rows_of(path) if row["clock"] == "calls")
    assert late["figures"] is None and "not one step fits" in late["failure"] and unguided["steps"] == 20


def share(path: Path, rank: int, pause: float, told) -> None:
    """One of two processes at a task that needs no gradient; it tells what it draws."""
    draw = trial.Trial.draw

    def watched(one, count):
        told.put((rank, one.method.name))
        time.sleep(pause)
        return draw(one, count)

    trial.Trial.draw = watched
    methods = [
        Method("unguided", "unguided"),
        *(Method(f"best {n}", "best_of_n", candidates_at=n) for n in (2, 4, 5, 10)),
    ]
    compare.Comparison(toy_task(methods=methods, budgets=(20,)), path).run(rank, 2)


def test_two_processes_share_the_work_and_one_takes_over_what_a_killed_one_leaves(folder):
    context, path = multiprocessing.get_context("fork"), folder / "toy.jsonl"
    told = context.Queue()
    killed, other = (context.Process(target=share, args=(path, rank, (60, 0.2)[rank], told)) for rank in range(2))
    killed.start()
    assert told.get(timeout=30) == (0, "unguided")
    other.start()
    drawn = [told.get(timeout=30) for _ in range(4)]
    assert (1, "unguided") not in drawn  # another is at it
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    other.join(60)
    assert other.exitcode == 0
    keys = [(row["method"], row["clock"]) for row in rows_of(path)]
    assert len(keys) == len(set(keys))
    assert {name for name, clock in keys if clock == "calls"} == {"unguided", "best 2", "best 4", "best 5", "best 10"}
    assert not list(folder.glob("*.claim"))


def test_a_process_takes_its_share_first_and_its_rank_from_the_launcher(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert compare.process() == (1, 3)
    drawn = []
    monkeypatch.setattr(trial.Trial, "measure", lambda trial, *_: drawn.append(trial.method.name) or trial.key | failed)
    failed = dict(figures=None, failure="")
    compare.Comparison(toy_task(budgets=(20,)), folder / "toy.jsonl").run(*compare.process())
    assert drawn[0] == "best of N" and sorted(drawn) == ["auto", "best of N", "dps", "unguided"]


def hand_made(method, clock, amount, value, seconds=None, **more):
    seconds = amount if seconds is None else seconds
    change = {"strength": 2.0} if method == "dps" else {}
    return dict(
        work="toy", method=method, recipe=method, change=change, clock=clock, budget=amount, pictures=2, steps=amount,
        figures={"error": value, "guide": value / 2}, errors={"error": 0.01, "guide": 0.02}, forwards=float(amount),
        backwards=0.0, processor_seconds=2.0 * seconds, seconds=9.0, forward_processor_seconds=1.0, forward_seconds=9.0,
        forward_batch=1, batch=1, on="cpu", threads=1, cores=2, machine="m", processor="A processor", date="2026-01-01",
        versions={"python": "3", "torch": "2", "lossguide": None}, dtype="float32", seeds=[0, 1],
        curve=[[0, 1.0], [1, 0.5]], eta=1.0, settings=None, set="evaluation", **more,
    )  # fmt: skip


def test_the_report_is_made_of_the_rows_that_there_are(folder, monkeypatch):
    rows = [
        hand_made("unguided", "calls", 20, 0.9),
        hand_made("dps", "calls", 20, 0.4, seconds=40),
        hand_made("dps", "calls", 20, 0.3, seconds=40),  # measured again: the last one counts
        hand_made("dps", "seconds", 20, 0.5, seconds=15),
        hand_made("dps", "calls", 40, 0.2, seconds=80),
        dict(hand_made("auto", "calls", 20, 0.0), figures=None, failure="ValueError: no"),
        hand_made("gone", "calls", 20, 0.0),  # no longer a method of the task
    ]
    methods = [Method(name, name) for name in ("unguided", "dps", "auto")]
    chosen = toy_task(methods=methods)
    monkeypatch.setattr(task, "load", lambda name: chosen)
    path = folder / "toy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn": ')
    target = report.write("toy", folder=folder, strips=folder / "strips")
    text = target.read_text()
    calls, seconds = text.split("### At equal time")
    assert "| unguided |  | 0.9 ± 0.01 |  |" in calls
    assert "| dps | strength=2 | **0.3** ± 0.01 | **0.2** ± 0.01 |" in calls
    assert "| unguided |  | 0.9 ± 0.01 |  |" in seconds  # takes the time of its calls
    assert "| dps | strength=2 | **0.5** ± 0.01 (0.8 of the time) |  |" in seconds
    assert "failed: ValueError: no" in text and "gone" not in text
    assert "| dps | 40 calls | 40 | 40 + 0 | 80 | 80.0 | error 0.2 ± 0.01, guide 0.1 ± 0.02 |" in text
    assert "A processor, 1 of 2 threads per process, float32; python 3, torch 2; 2026-01-01" in text
    picture = folder / "toy-toy-plots.png"
    assert f"![Plots]({picture.name})" in text and 5_000 < picture.stat().st_size < 200_000
    for table in text.split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_the_contact_sheet_shows_one_row_per_method(folder):
    from PIL import Image

    compare.Comparison(toy_task(budgets=(20,)), folder / "toy.jsonl", strips=folder / "strips" / "toy").run()
    measured = report.Measured(report.read(folder / "toy.jsonl"), toy_task())
    assert report._sheet("toy", toy_task().works[0], measured, folder, folder / "strips") == ["toy-toy-pictures.png"]
    assert Image.open(folder / "toy-toy-pictures.png").height == 4 * (64 + 2)


def test_nothing_measured_is_said_and_no_file_is_written(folder, monkeypatch, capsys):
    monkeypatch.setattr(task, "load", lambda name: toy_task())
    assert report.write("toy", folder=folder) is None
    assert "nothing has been measured" in capsys.readouterr().out and not list(folder.iterdir())


def test_distances_of_exact_gaussians_are_those_of_the_closed_form():
    source = torch.Generator().manual_seed(0)

    def exact(mean, scale):
        """Features whose sample mean and covariance are exactly these."""
        x = torch.randn(50, 3, generator=source, dtype=torch.float64)
        x = x - x.mean(0)
        whiten = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / 49))
        return x @ whiten.T * torch.tensor(scale) + torch.tensor(mean)

    one, other = exact([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]), exact([1.0, 0.0, 2.0], [2.0, 2.0, 1.0])
    wanted = 5 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    found = metrics.distances_with_errors(one.float(), other.float())
    assert found["frechet"][0] == pytest.approx(wanted, rel=1e-3) and found["frechet"][1] > 0
    assert metrics.frechet(one, other) == pytest.approx(wanted, rel=1e-6)
    assert metrics.distances_with_errors(one[:3], other) == {}


def test_the_kernel_distance_of_two_points_is_that_of_the_closed_form():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.5])
    kernel = lambda x, y: (x @ y / 2 + 1).item() ** 3
    found = metrics.distances_with_errors(a.repeat(4, 1), b.repeat(9, 1))["kernel"]
    assert found[0] == pytest.approx(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b), rel=1e-5)
    assert found[1] == pytest.approx(0, abs=1e-4)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(40, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = metrics.jackknife(lambda some: {"mean": some.mean().item()}, values, groups=40)["mean"]
    assert found == pytest.approx((values.std() / 40**0.5).item())
    assert found == pytest.approx(runs.standard_error(values[:, 0]))


def test_every_task_file_says_what_it_is_and_names_what_there_is():
    from click.testing import CliRunner

    names = task.names()
    assert {"demo-label", "restorations", "style", "mask"} <= set(names)
    listed = CliRunner().invoke(commands.main, ["list"]).output
    for name, about in names.items():
        assert name in listed and about
        chosen = task.load(name)
        if not isinstance(chosen, Task):
            continue
        assert len({method.name for method in chosen.methods}) == len(chosen.methods)
        assert {"unguided", "best_of_n", "auto"} <= {method.recipe for method in chosen.methods}
        for work in chosen.works:
            for method in chosen.methods:
                if method.recipe in ("unguided", "trivial"):
                    continue
                if method.recipe.startswith("peer:"):
                    assert method.recipe.removeprefix("peer:") in peers.PEERS
                    continue
                assert trial.settings_digest(method.recipe, method.change(work.name), work)
    wrong = CliRunner().invoke(commands.main, ["report", "nothing"])
    assert wrong.exit_code and "there is no task 'nothing'" in wrong.output
