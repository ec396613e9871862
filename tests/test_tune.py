"""Tuning: what the search finds, that it goes on where it stopped, and what it refuses."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
import torch
from click.testing import CliRunner
from lossguide.guidance import recipes
from lossguide.guidance import tune as tuning
from lossguide.guidance.cli import main
from lossguide.guidance.tune import default_space, tune, with_settings
from lossguide.guidance.tune_plot import plot_history
from lossguide.losses import ClassLabel, Color, Measurement, Term, operators
from lossguide.samplers import TimeTravel, denoiser
from models import vp_scheduler
from optuna.distributions import CategoricalDistribution, FloatDistribution

STRENGTH = {"strength": FloatDistribution(0.1, 10.0, log=True)}
SEEDS = (5, 6)


def bright(image):
    return (image - 0.9).square().flatten(1).sum(1)


def grey(image):
    """The judge: a mean of 0.7, which too much guidance leaves behind."""
    return (image.flatten(1).mean(1) - 0.7).abs()


def weak(loss):
    return recipes.dps(loss, strength=0.1)


def drawn(guidance, seeds, steps):
    """Pictures as bright as the guidance is strong; each its own a little."""
    level = torch.tensor([guidance.strength / 10 + 0.01 * (seed % 3) for seed in seeds])
    return level.view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def white_noise():
    scheduler = vp_scheduler()
    return denoiser(
        lambda x, t: (1 - scheduler.alphas_cumprod[t]).sqrt() * x, scheduler, kind="epsilon", shape=(1, 4, 4)
    )


def scores(tuned):
    return [(trial.settings, trial.score) for trial in tuned.trials]


def test_finds_a_better_strength_than_a_bad_default_and_writes_it_down(tmp_path):
    tuned = tune(white_noise(), bright, grey, recipe=weak, trials=8, steps=6, space=STRENGTH, folder=tmp_path)
    first = tuned.trials[0]
    assert first.settings == {"strength": 0.1} and tuned.score < 0.5 * first.score
    assert tuned.score == min(trial.score for trial in tuned.trials) and tuned.guidance.strength > 0.1
    assert tuned.fresh.best < tuned.fresh.own and tuned.fresh.seeds == list(range(50_008, 50_016))

    assert {file.name for file in tmp_path.iterdir()} == {"journal.log", "trials.json", "history.png", "best.json"}
    trials = json.loads((tmp_path / "trials.json").read_text())["trials"]
    assert [(trial["settings"], trial["score"]) for trial in trials] == scores(tuned)
    best = json.loads((tmp_path / "best.json").read_text())
    assert with_settings(weak(bright), best["settings"]).strength == tuned.guidance.strength
    assert best["fresh"]["best"] == tuned.fresh.best


def test_a_search_that_stopped_or_was_killed_goes_on_as_if_it_had_not(tmp_path):
    def stop_at(number):
        count = iter(range(number + 1))

        def draw(guidance, seeds, steps):
            if next(count) == number:
                raise KeyboardInterrupt
            return drawn(guidance, seeds, steps)

        return draw

    run = dict(loss=bright, judge=grey, recipe=weak, seeds=SEEDS, setup={"model": "constant"})
    whole = tune(drawn, **run, trials=12)
    part = tune(drawn, **run, trials=3, folder=tmp_path)
    assert scores(part) == scores(whole)[:3]
    with pytest.raises(KeyboardInterrupt):
        tune(stop_at(2), **run, trials=12, folder=tmp_path)
    assert len(json.loads((tmp_path / "trials.json").read_text())["trials"]) == 5
    with open(tmp_path / "journal.log", "a") as journal:
        journal.write('{"op_code": 5, "half')
    resumed = tune(drawn, **run, trials=12, folder=tmp_path)
    assert scores(resumed) == scores(whole)
    again = tune(stop_at(2), **run, trials=12, folder=tmp_path)  # two draws, on the fresh seeds
    assert scores(again) == scores(whole) and again.fresh == whole.fresh


def test_another_setup_in_the_same_folder_is_refused(tmp_path):
    run = dict(loss=bright, judge=grey, recipe=weak, seeds=SEEDS, steps=6, trials=1, folder=tmp_path)
    tune(white_noise(), **run)
    for name, other in {
        "loss": lambda image: bright(image),
        "judge": Color("red"),
        "recipe": "freedom",
        "seeds": (5, 7),
        "steps": 7,
        "space": STRENGTH,
        "setup": {"model": "another"},
    }.items():
        differs = "model" if name == "setup" else name
        with pytest.raises(ValueError, match=f"search that differs in .*{differs}.*another folder"):
            tune(white_noise(), **(run | {name: other}))
    tune(white_noise(), **run)


def classifier(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))


def lighter_than(level):
    return lambda image: (image - level).flatten(1).mean(1)


def test_the_guide_is_not_its_own_judge():
    run = dict(recipe=weak, trials=1, seeds=SEEDS, space=STRENGTH)
    for guide, judge in [
        (bright, bright),
        (Color("red") + bright, 2.0 * Color("red")),
        (ClassLabel(1, classifier(0)), ClassLabel(1, classifier(0))),
    ]:
        with pytest.raises(ValueError, match="the judge is the guide"):
            tune(drawn, guide, judge, **run)
    for guide, judge in [
        (ClassLabel(1, classifier(0)), ClassLabel(1, classifier(1))),
        (lighter_than(0.2), lighter_than(0.3)),
        (Color("red"), Color("blue")),
    ]:
        assert tune(drawn, guide, judge, **run).score < float("inf")


def test_trials_that_fail_count_and_do_not_stop_the_search(tmp_path):
    def fragile(guidance, seeds, steps):
        if guidance.strength > 5:
            raise FloatingPointError("the step is not finite")
        return drawn(guidance, seeds, steps) / (guidance.strength > 0.5)  # NaN or infinite below

    tuned = tune(fragile, bright, grey, recipe=weak, trials=8, seeds=SEEDS, folder=tmp_path)
    failures = {trial.failure for trial in tuned.trials}
    assert failures == {None, "a picture is not finite", "the step is not finite"}
    assert tuned.trials[0].score is None and tuned.fresh.own is None and tuned.fresh.best < 1
    assert 0.5 < tuned.guidance.strength < 5 and len(tuned.trials) == 8

    nothing = lambda image: image.flatten(1).mean(1) * float("nan")  # noqa: E731
    with pytest.raises(ValueError, match="none of the 2 trials gave a finite score.*the judge's score"):
        tune(drawn, bright, nothing, recipe=weak, trials=2, seeds=SEEDS)


def test_settings_that_do_not_go_together_fail_and_choices_that_the_recipe_refuses_are_left_out():
    space = {
        "start": FloatDistribution(0.0, 0.9),
        "stop": FloatDistribution(0.1, 1.0),
        "through": CategoricalDistribution(("x0", "nowhere")),
    }
    tuned = tune(drawn, bright, grey, trials=12, seeds=SEEDS, space=space)
    assert {trial.settings["through"] for trial in tuned.trials} == {"x0", "denoiser"}
    refused = [trial for trial in tuned.trials if trial.settings["start"] >= trial.settings["stop"]]
    assert refused and all("a window needs" in trial.failure for trial in refused)


def test_a_window_that_holds_no_step_fails_and_the_search_goes_on(tmp_path):
    late = Term(bright).during(0.6, 1.0)
    space = {"stop": CategoricalDistribution((0.3, 1.0))}
    for trials in (4, 6):
        tuned = tune(white_noise(), late, grey, recipe="dps", trials=trials, steps=6, space=space, folder=tmp_path)
    assert len(tuned.trials) == 6 and tuned.settings == {"stop": 1.0}
    failed = [trial for trial in tuned.trials if trial.score is None]
    assert failed and all(trial.settings == {"stop": 0.3} and "none of the" in trial.failure for trial in failed)
    with pytest.raises(ValueError, match="none of the"):  # the recipe's own trial tells the user at once
        tune(white_noise(), late, grey, recipe=lambda loss: recipes.dps(loss, stop=0.3), trials=2, steps=6, space=space)


def test_numbers_are_not_searched_for_what_is_none():
    with pytest.raises(ValueError, match="'remix' is 'ancestral' in 'mine', no number"):
        recipe = lambda loss: recipes.dps(loss, remix="ancestral", name="mine")
        tune(drawn, bright, grey, recipe=recipe, space={"remix": FloatDistribution(0, 1)})


@pytest.mark.parametrize("recipe", recipes.available())
def test_the_first_trial_is_the_recipe_as_it_is(recipe):
    seen = []

    def draw(guidance, seeds, steps):
        seen.append(guidance)
        return drawn(guidance, seeds, steps)

    loss = Measurement(operators.Inpaint(torch.ones(4, 4)), torch.zeros(1, 3, 4, 4), sigma=0.1)  # which all can take
    own = recipes.get(recipe)(loss)
    tune(draw, loss, grey, recipe=recipe, trials=2, seeds=SEEDS)
    plain = {"time_travel": own.time_travel or TimeTravel(1, 0.25, 0.75)}
    assert seen[0].to_dict() == own.replace(**plain).to_dict()
    assert set(default_space()) >= {"strength", "through", "augment.copies", "time_travel.repeats"}


def test_settings_reach_the_parts_of_a_guidance():
    own = recipes.auto(bright)
    changed = with_settings(own, {"time_travel.repeats": 3, "rule.k": 0.5, "augment.copies": 0, "stop": 0.9})
    assert changed.time_travel == TimeTravel(3, own.time_travel.start, own.time_travel.stop)
    assert changed.rule.k == 0.5 and changed.augment is None and changed.stop == 0.9
    assert with_settings(recipes.dps(bright), {"augment.copies": 4}).augment.copies == 4
    for name in ("strenght", "time_travel.often", "rule.eta"):
        with pytest.raises(ValueError, match=f"no setting '{name}'"):
            with_settings(own, {name: 1})


def test_the_history_of_failures_and_of_nothing_is_plotted(tmp_path):
    settings = {"strength": 1.0, "through": "x0", "time_travel.repeats": 2}
    trials = [tuning.Trial(0, settings, None, 0.1, "failed"), tuning.Trial(1, settings, 0.5, 0.1)]
    for number, some in enumerate((trials, trials[:1], [])):
        figure = plot_history(some, tmp_path / f"{number}.png")
        assert figure.axes and (tmp_path / f"{number}.png").is_file()


def test_only_a_journal_that_was_there_is_called_damaged(tmp_path, monkeypatch):
    def fails(**kwargs):
        raise RuntimeError("of Optuna's own")

    monkeypatch.setattr("optuna.create_study", fails)
    for folder in (None, tmp_path / "new"):
        with pytest.raises(RuntimeError, match="Optuna's own"):
            tune(drawn, bright, grey, folder=folder)
    (tmp_path / "journal.log").write_text("{}\n")
    with pytest.raises(ValueError, match="is damaged"):
        tune(drawn, bright, grey, folder=tmp_path)


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"lossguide\[tune\]"):
        tune(drawn, bright, grey)


def run(*arguments):
    return CliRunner().invoke(main, ["tune", *(str(a) for a in arguments)])


def fails(*arguments):
    """The one sentence that bad input gets."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.exception
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1 and result.stdout == ""
    return result.stderr


QUICK = ("--num-images", 2, "--steps", 4)


def test_the_command_tunes_the_demo_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--trials", 2, *QUICK)
    assert result.exit_code == 0, (result.stderr, result.exception)
    folder = tmp_path / "lossguide-out" / "tune-auto-ankle-boot"
    held = json.loads((folder / "trials.json").read_text())
    assert [term["name"] for term in held["setup"]["judge"]] == ["class-label"] and len(held["trials"]) == 2
    assert (folder / "history.png").is_file() and "on fresh seeds: " in result.stdout and "best=" in result.stderr

    assert "differs in steps" in fails("--trials", 2, "--num-images", 2, "--steps", 5)
    command = shlex.split(result.stdout.strip().split("to go on: ")[-1])
    assert command[:2] == ["lossguide", "tune"] and command[command.index("--trials") + 1] == "4"
    command[command.index("--trials") + 1] = "3"
    assert run(*command[2:]).exit_code == 0
    trials = json.loads((folder / "trials.json").read_text())["trials"]
    assert trials[:2] == held["trials"] and len(trials) == 3


def test_an_edited_file_is_another_loss_and_ctrl_c_tells_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.py"
    own.write_text("def dark(image):\n    return image.flatten(1).mean(1)\n")
    arguments = ("--loss", "own.py:dark", "--judge", "class-label:bag", *QUICK, "--trials", 1, "--out", "x")
    assert run(*arguments).exit_code == 0 and run(*arguments).exit_code == 0
    assert "the judge is the guide" in fails("--loss", "own.py:dark", "--judge", "2*own.py:dark", *QUICK)
    own.write_text("def dark(image):\n    return image.flatten(1).square().mean(1)\n")
    assert "differs in loss" in fails(*arguments)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_scores", interrupted)
    result = run(*arguments[:-1], "y")
    assert result.exit_code == 130 and "y; this goes on with it: lossguide tune" in result.stderr


def test_bad_input_gets_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--judge" in fails("--loss", "class-label:bag")
    assert "does not name exactly one" in fails("a red dog")
    assert "the judge is the guide" in fails("--judge", "clip-text:ankle boot", *QUICK)
    assert "did you mean 'freedom'" in fails("--recipe", "fredom")
    assert "prompt or --loss" in fails("--model", "./none")
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "lossguide[tune]" in fails(*QUICK)
    assert not list(tmp_path.iterdir())


def test_generate_takes_what_tune_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.json").write_text(json.dumps({"settings": {"strength": 3.0, "stop": 0.5}}))
    arguments = "generate 'ankle boot' --recipe dps --tuned best.json --steps 3 --num-images 1 -q --out x"
    result = CliRunner().invoke(main, shlex.split(arguments))
    assert result.exit_code == 0, result.stderr
    guidance = json.loads((tmp_path / "x" / "settings.json").read_text())["guidance"]
    assert (guidance["name"], guidance["strength"], guidance["stop"]) == ("dps", 3.0, 0.5)
    (tmp_path / "best.json").write_text(json.dumps({"settings": {"strength": 3.0}, "guidance": guidance}))
    other = CliRunner().invoke(main, shlex.split(arguments.replace("--recipe dps ", "")))
    assert other.exit_code == 2 and "found for another recipe than 'auto': add --recipe dps" in other.stderr


def test_one_picture_confirms_nothing_and_strengths_at_the_end_of_the_range_are_told(tmp_path, monkeypatch):
    def found(model, loss, judge, recipe, *, folder, **_):
        guidance = recipes.dps(loss, strength=9.5)
        trials = (tuning.Trial(0, {"strength": 1.0}, 2.0, 0.1), tuning.Trial(1, {"strength": 9.5}, 1.0, 0.1))
        return tuning.Tuned(guidance, {"strength": 9.5}, 1.0, tuning.Fresh([1], 2.0, 1.0, None), trials)

    monkeypatch.setattr("lossguide.guidance.cli_tune.tune", found)
    arguments = ["tune", "ankle boot", "--recipe", "dps", "--num-images", "1", "--out", str(tmp_path / "t")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "do not confirm the gain" in result.stdout
    assert "at the end of what was searched, 0.1 to 10" in result.stdout
