"""Laws that hold for whatever is put in: levels, schedulers, losses, saved guidances, manifests, the command line."""

from __future__ import annotations

import io
import json
import os
import random
import sys

import diffusers
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lossguide.guidance import Augment, Guidance, cli, cli_check, cli_job, recipes
from lossguide.guidance.gradient import balanced_gradient
from lossguide.guidance.guidance import Inner
from lossguide.guidance.manifest import MANIFEST, Manifest, entered, leave
from lossguide.guidance.smoothing import Smoothing
from lossguide.guidance.steps import Constant
from lossguide.guidance.tune import with_settings
from lossguide.losses import Color, Losses, Measurement, Symmetry, Term, TotalVariation, as_losses, operators, registry
from lossguide.losses.check import Report
from lossguide.losses.reading import parse_json
from lossguide.samplers import Level, Solver, TimeTravel
from lossguide.samplers.levels import KINDS

torch.set_default_dtype(torch.float32)
settings.register_profile("laws", deadline=None, derandomize=True, database=None, max_examples=60)
law = settings(settings.get_profile("laws"))
in_folder = settings(law, suppress_health_check=[HealthCheck.function_scoped_fixture])

# ---- noise levels ------------------------------------------------------------------------------------------------

SHAPES = {"scalar": (), "sample": (2, 1, 1, 1), "pixel": (2, 1, 3, 3), "channel": (2, 3, 1, 1)}


@st.composite
def levels(draw, count=1):
    """So many levels of one family and one shape, the cleanest first."""
    shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    family = draw(st.sampled_from(["vp", "sigma space", "flow", "gamma"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    places = (torch.rand((count, *shape), generator=generator, dtype=torch.float64) * 0.97 + 0.015).sort(0).values
    made = []
    for place in places:
        if family == "vp":
            made.append(Level((1 - place**2).sqrt(), place))
        elif family == "sigma space":
            made.append(Level(torch.ones_like(place), place / (1 - place)))
        elif family == "flow":
            made.append(Level(1 - place, place))
        else:
            made.append(Level.of_gamma(torch.logit(place) * 2))
    return made


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(levels(), st.sampled_from(KINDS), st.integers(0, 99))
@law
def test_a_prediction_and_what_it_means_go_back_and_forth(made, kind, seed):
    (level,), (x0, noise) = made, normal(2, 2, 3, 3, 3, seed=seed)
    x = level.mix(x0, noise)
    prediction = level.prediction(x0, noise, kind)
    torch.testing.assert_close(level.x0(prediction, x, kind), x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(level.noise(prediction, x, kind), noise, rtol=1e-6, atol=1e-6)
    other = normal(2, 3, 3, 3, seed=seed + 1)  # any prediction is that of its own x0 and noise
    if kind != "sample":
        clean = level.x0(other, x, kind)
        again = level.prediction(clean, (x - level.alpha * clean) / level.sigma, kind)
        torch.testing.assert_close(again, other, rtol=1e-5, atol=1e-5)
    of_prediction, of_sample = level.weights(kind)
    torch.testing.assert_close(of_prediction * other + of_sample * x, level.x0(other, x, kind))


@given(levels(3))
@law
def test_renoising_in_two_steps_is_renoising_in_one(made):
    clean, between, noisy = made
    one, zero = torch.ones(2, 3, 3, 3, dtype=torch.float64), torch.zeros(2, 3, 3, 3, dtype=torch.float64)

    def law_of(start, end):  # x becomes factor * x + spread * noise
        return start.renoise(one, end, zero), start.renoise(zero, end, one)

    (first, a), (second, b), (whole, c) = law_of(clean, between), law_of(between, noisy), law_of(clean, noisy)
    torch.testing.assert_close(first * second, whole)
    torch.testing.assert_close((second * a) ** 2 + b**2, c**2, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(whole * clean.alpha, noisy.alpha.expand_as(whole))
    torch.testing.assert_close(((whole * clean.sigma) ** 2 + c**2).sqrt(), noisy.sigma.expand_as(whole))


@given(levels(3), st.integers(0, 99))
@law
def test_an_ancestral_step_keeps_the_marginal_and_composes(made, seed):
    clean, between, noisy = made
    x0, noise = normal(2, 2, 3, 3, 3, seed=seed)
    kept, drawn = noisy.shared(clean)
    torch.testing.assert_close(kept + drawn, torch.ones_like(kept))
    torch.testing.assert_close(noisy.shared(between)[0] * between.shared(clean)[0], kept)
    mean = (
        noisy.ancestral_mean(clean, x0, noise) - clean.alpha * x0
    )  # its noise, and what is drawn, make up the level's
    variance = (mean / noise) ** 2 + noisy.step_std(clean) ** 2
    torch.testing.assert_close(variance, (clean.sigma**2).expand_as(variance), rtol=1e-6, atol=1e-9)


@given(levels())
@law
def test_other_coordinates_are_the_same_level(made):
    (level,), narrow = made, made[0].preserving()
    torch.testing.assert_close(narrow.signal_share, level.signal_share)
    torch.testing.assert_close(narrow.alpha * level.stretch, level.alpha)
    torch.testing.assert_close(level.signal_share + level.x0_variance, torch.ones_like(level.signal_share))
    assert level.preserving().progress == pytest.approx(level.progress, abs=0.011)


# ---- schedulers --------------------------------------------------------------------------------------------------

CHOICES = {
    "num_train_timesteps": [1000, 100, 37],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"],
    "beta_start": [1e-4, 8.5e-4],
    "beta_end": [0.012, 0.02],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "timestep_type": ["discrete", "continuous"],
    "use_karras_sigmas": [True, False],
    "use_exponential_sigmas": [True, False],
    "use_beta_sigmas": [True, False],
    "use_lu_lambdas": [True, False],
    "use_flow_sigmas": [True, False],
    "flow_shift": [1.0, 3.0],
    "shift": [0.5, 1.0, 3.0],
    "shift_terminal": [None, 0.02, 0.1],
    "invert_sigmas": [True, False],
    "stochastic_sampling": [True, False],
    "rescale_betas_zero_snr": [True, False],
    "final_sigmas_type": ["zero", "sigma_min"],
    "sigma_schedule": ["karras", "exponential"],
    "sigma_min": [0.002, 0.03],
    "sigma_max": [20.0, 80.0],
    "sigma_data": [0.5, 1.0],
    "snr_shift_scale": [1.0, 3.0],
    "steps_offset": [0, 1],
    "set_alpha_to_one": [True, False],
    "interpolation_type": ["linear", "log_linear"],
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"],
    "solver_order": [1, 2, 3],
    "euler_at_final": [True, False],
    "clip_sample": [True, False],
}
SCHEDULERS = [
    *(
        "DDIM",
        "DDPM",
        "PNDM",
        "LCM",
        "TCD",
        "DDIMParallel",
        "DDPMParallel",
        "DDPMWuerstchen",
        "CogVideoXDDIM",
        "UnCLIP",
    ),
    *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "DPMSolverSDE"),
    *("KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"),
    *("SASolver", "EDMEuler", "EDMDPMSolverMultistep", "CosineDPMSolverMultistep", "FlowMatchEulerDiscrete"),
    *("FlowMatchHeunDiscrete", "FlowMatchLCM", "IPNDM", "CMStochasticIterative", "ScoreSdeVe"),
]


def noised(scheduler, place, x0, noise):
    """What the scheduler itself makes of a picture at one of its timesteps."""
    time = scheduler.timesteps[place].reshape(1)
    scheduler._begin_index, scheduler._step_index = 0, place  # some visit a timestep twice
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x0, time, noise)
    if getattr(scheduler.config, "use_flow_sigmas", False) or isinstance(scheduler, diffusers.SASolverScheduler):
        # SASolver's add_noise rounds to a timestep, and knows no flow; its steps use this
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[place].double())
        return alpha * x0 + sigma * noise
    return scheduler.add_noise(x0, noise, time)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_level_is_the_schedulers_own_or_refused_in_a_sentence(name):
    kind = getattr(diffusers, f"{name}Scheduler")
    known = [one for one in CHOICES if one in kind.__init__.__wrapped__.__code__.co_varnames]
    drawn = {one: st.sampled_from(CHOICES[one]) for one in known}
    short = {"num_train_timesteps": st.sampled_from([100, 37])} if name.startswith("KDPM2") else {}  # slow to make
    x0, noise = normal(2, 1, 3, 4, 4)
    read, refused = 0, set()

    @given(st.fixed_dictionaries(short, optional={one: drawn[one] for one in drawn if one not in short}), st.data())
    @settings(law, max_examples=20, suppress_health_check=list(HealthCheck))
    def holds(config, data):
        nonlocal read
        steps = data.draw(st.sampled_from([1, 2, 3, 5, 10]))
        try:
            kind(**config).set_timesteps(steps)
        except Exception:
            assume(False)  # diffusers itself does not make it
        try:
            solver = Solver.of(kind(**config), steps)
        except ValueError as error:
            assert name in str(error) and "\n" not in str(error)
            refused.add(str(error))
            return
        read += 1
        assert len(solver.levels) == len(solver) + 1
        assert all(0 <= level.alpha <= 1 + 1e-4 and 0 <= level.sigma < float("inf") for level in solver.levels)
        if config.get("invert_sigmas"):  # time from noise to the picture, which scale_noise does not know
            sigmas = solver.scheduler.sigmas.tolist()
            assert [level.alpha.item() for level in solver.levels] == pytest.approx(sigmas, abs=1e-6)
            return
        halfway = 2 if name.startswith(("KDPM2", "DPMSolverSDE")) else 1  # visits that add_noise does not know
        for place in range(0, len(solver), halfway):
            expected = noised(solver.scheduler, place, x0, noise).double()
            here = solver.levels[place].mix(x0, noise)
            torch.testing.assert_close(here, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))

    holds()
    assert read or len(refused) == 1


def test_what_a_stable_audio_network_predicts_is_edms():
    scheduler = diffusers.CosineDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=0.5)
    solver = Solver.of(scheduler, 4)
    x, prediction = normal(2, 1, 1, 4, 4)
    sigma = solver.scheduler.sigmas[1].double()
    own = solver.scheduler.precondition_outputs(x, prediction, sigma)
    torch.testing.assert_close(solver.levels[1].x0(prediction, x, solver.kind), own, rtol=1e-5, atol=1e-5)


# ---- losses ------------------------------------------------------------------------------------------------------


def named(name, factor):
    return Term(lambda image: (image * factor).square().mean((1, 2, 3)), name=name)


@st.composite
def terms(draw):
    """A loss of one term, whose name others may have, too."""
    name = draw(st.sampled_from(["a", "a-1", "a-2", "a-1-1", "b", "b-1"]))
    made = draw(st.floats(0.0, 4.0)) * named(name, draw(st.floats(0.1, 2.0)))
    start, stop = sorted((draw(st.integers(0, 9)), draw(st.integers(1, 10))))
    if draw(st.booleans()) and start < stop:
        made = made.during(start / 10, stop / 10)
    if draw(st.booleans()):
        made = made.scheduled((0.2, draw(st.floats(0, 2))), (0.7, draw(st.floats(0, 2))))
    return made


X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(terms(), terms(), terms(), st.floats(0.0, 8.0))
@law
def test_sums_commute_associate_and_distribute(a, b, c, factor):
    def same(one, other):
        torch.testing.assert_close(one(X), other(X))

    same(a + b, b + a)
    same((a + b) + c, a + (b + c))
    same(factor * (a + b), factor * a + factor * b)
    same(2.0 * (factor * a), (2.0 * factor) * a)
    same(0 * a + b, b + 0 * c)
    same(sum([a, b, c]), a + b + c)
    assert all(not term.acts_at(place / 10) for term in (0 * (a + b)).terms() for place in range(11))
    assert [term.name for term in ((a + b) + c).terms()] == [term.name for term in (a + (b + c)).terms()]


@given(st.lists(terms(), min_size=1, max_size=7))
@law
def test_names_of_terms_are_unique_and_stay(parts):
    whole = sum(parts)
    names = [term.name for term in whole.terms()]
    assert len(set(names)) == len(names)
    for other in (whole * 0.5, whole.during(0.1, 0.9), as_losses(whole), Losses(whole.terms()), sum([whole])):
        assert [term.name for term in other.terms()] == names
    once = [term.terms()[0].name for term in parts]
    assert all(name == own for name, own in zip(names, once) if once.count(own) == 1)


@given(terms(), st.integers(0, 20))
@law
def test_a_term_acts_in_its_window_with_its_schedules_weight(loss, place):
    (term,), progress = loss.terms(), place / 20
    start, stop = term.window
    inside = start <= progress and (progress < stop or stop == 1)
    here = term.at(progress)
    assert term.acts_at(progress) == (inside and here.weight > 0)
    factors = [factor for _, factor in term.schedule] or [1.0]
    assert min(factors) * term.weight - 1e-9 <= here.weight <= max(factors) * term.weight + 1e-9
    assert (here.window, here.name) == (term.window, term.name) and not here.schedule


@given(
    st.lists(st.tuples(st.floats(0.1, 4.0), st.floats(0.01, 50.0)), min_size=2, max_size=4), st.permutations(range(4))
)
@law
def test_balanced_terms_pull_alike_in_any_order_and_scale(given_terms, order):
    target = torch.rand(4, 1, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def term(number, weight, scale):
        return Term(lambda image: scale * (image - target[number]).square().sum((1, 2, 3)), str(number), weight)

    made = [term(number, *one) for number, one in enumerate(given_terms)]
    g, loss, values, factors = balanced_gradient(X, made, None, None)
    lengths = [
        (factor.view(-1, 1, 1, 1) * 2 * scale * (X - target[number])).flatten(1).norm(dim=1)
        for number, (factor, (_, scale)) in enumerate(zip(factors, given_terms))
    ]
    for one in lengths[1:]:
        torch.testing.assert_close(one, lengths[0])
    other = [made[number] for number in order if number < len(made)]
    g_other, loss_other, *_ = balanced_gradient(X, other, None, None)
    torch.testing.assert_close(g_other, g)
    torch.testing.assert_close(loss_other, loss)
    assert set(values) == {term.name for term in made}


# ---- saved guidances ---------------------------------------------------------------------------------------------

LOSSES = {
    "colour": lambda: 2 * Color("red") + Color(["#00ff00", "blue"], shares=[1, 3]),
    "window": lambda: Symmetry().during(0.1, 0.6) + TotalVariation().scheduled((0.0, 1.0), (1.0, 0.2)),
    "measurement": lambda: Measurement(operators.SuperResolution(2), torch.full((1, 3, 4, 4), 0.3), 0.1),
    "name": lambda: Term(Color("teal"), name="Ω: \n", weight=1e-300),
}
PICTURE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
SETTINGS = {
    "strength": st.floats(0, 1e300),
    "start": st.floats(0, 0.4),
    "stop": st.floats(0.5, 1),
    "every": st.integers(1, 10**12),
    "clock": st.sampled_from(["steps", "noise"]),
    "augment": st.none() | st.builds(Augment.geometric, st.integers(1, 9)),
    "smoothing": st.none() | st.builds(Smoothing, st.integers(1, 9), st.floats(0.001, 1)),
    "time_travel": st.none() | st.builds(TimeTravel, st.integers(1, 9), st.floats(0, 0.4), st.floats(0.5, 1)),
    "inner": st.none() | st.builds(Inner, st.integers(1, 9), st.builds(Constant, st.floats(0.1, 9))),
    "raise_on_nonfinite": st.booleans(),
    "name": st.text(st.characters(codec="utf-8")),
}


@given(
    st.sampled_from(sorted(recipes.available())),
    st.sampled_from(sorted(LOSSES)),
    st.fixed_dictionaries({}, optional=SETTINGS),
)
@in_folder
def test_a_guidance_is_the_same_after_a_folder(tmp_path, recipe, loss, changes):
    try:
        guidance = recipes.get(recipe)(LOSSES[loss]()).replace(**changes)
    except ValueError as error:
        assume(not str(error))  # what does not go together is said so
    json.loads(guidance.to_json())
    guidance.save_pretrained(tmp_path)
    again = Guidance.from_pretrained(tmp_path)
    assert again.to_dict() == guidance.to_dict()
    assert torch.equal(again.loss(PICTURE), guidance.loss(PICTURE))
    first = (tmp_path / "guidance.json").read_bytes()
    again.save_pretrained(tmp_path)
    assert (tmp_path / "guidance.json").read_bytes() == first


# ---- manifests ---------------------------------------------------------------------------------------------------

fuzzing = pytest.mark.skipif(sys.platform != "linux", reason="file locks, and the fuzzer's own files")


@fuzzing
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_manifest_is_read_mended_and_gone_on_with(tmp_path, monkeypatch, seed):
    """No error, no sound line lost, no picture listed that is not whole: see `benchmarks.fuzz_targets.manifest`."""
    from benchmarks import fuzz_targets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    came = {fuzz_targets.manifest(*fuzz_targets.parser_input("manifest", random.Random(f"{seed} {number}"), tmp_path))
            for number in range(60)}  # fmt: skip
    assert came == {"read lines", "read none"}


@given(st.lists(st.integers(1, 90), max_size=60), st.permutations(range(5)), st.booleans())
@in_folder
def test_a_manifest_is_read_while_others_write_it(tmp_path, parts, order, renewed):
    """Whatever part of it is there already: what is whole is listed, and in the end all."""
    (tmp_path / MANIFEST).unlink(missing_ok=True)
    with entered(tmp_path) as (locks, _):
        reader = Manifest(tmp_path, 5, 10, 2, "abc", locks)
    lines = [reader.header]
    for index in order:
        known = {"index": index, "seed": 10 + index, "file": reader.file(index)}
        lines.append(json.dumps({**known, "sha256": "0" * 64, "loss": 0.5}))
    text, at = "".join(f"{line}\n" for line in lines).encode(), 0
    for part in [*parts, len(text)]:
        with (tmp_path / MANIFEST).open("ab") as file:
            file.write(text[at : at + part])
        at += part
        if renewed and at < len(text):  # the one that is first sorts it, in a new file
            content = (tmp_path / MANIFEST).read_bytes()
            (tmp_path / "new").write_bytes(content)
            (tmp_path / "new").replace(tmp_path / MANIFEST)
        reader.refresh()
        whole = text[:at].count(b"\n") - 1
        assert [index for index in range(5) if reader.done[index]] == sorted(order[: max(whole, 0)])
    assert reader.finished == 5
    leave(tmp_path, locks)


# ---- the command line --------------------------------------------------------------------------------------------


@fuzzing
@pytest.mark.parametrize("seed", range(3))
def test_any_command_line_is_refused_in_one_sentence(tmp_path, monkeypatch, seed):
    """As far as the model: `python -m benchmarks run fuzz` goes on from there."""
    from benchmarks import fuzz_inputs

    def no_model(*_):
        raise OSError("no model in this test")

    picture = io.BytesIO()
    torch.manual_seed(0)
    cli.output.to_pil(torch.rand(3, 32, 32)).save(picture, "PNG")
    for name in fuzz_inputs.PICTURES[:5]:
        (tmp_path / name).write_bytes(picture.getvalue())
    for name in ("empty.png", "text.txt"):
        (tmp_path / name).touch()
    (tmp_path / "my_losses.py").write_text("class Dark: pass\ndef darkness(image): return image.mean((1, 2, 3))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_job, "load_model", no_model)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(cli_check, "check", lambda *_, **__: Report(()))
    before, ends = sorted(tmp_path.rglob("*")), set()
    for number in range(150):
        words = fuzz_inputs.command(random.Random(f"{seed} {number}"))
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace") for _ in range(2))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as end:
            cli.main(words, prog_name="lossguide")
        err.flush()
        told = err.buffer.getvalue().decode()
        assert end.value.code in (0, 2), words
        assert told.count("Error: ") >= 1 if end.value.code else "Error: " not in told, words
        assert "Traceback" not in told and (not end.value.code or told.rstrip().splitlines()[-1].startswith("Error: "))
        ends.add(end.value.code)
    assert ends == {0, 2}
    assert sorted(tmp_path.rglob("*")) == before


# ---- what fuzzing found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, told",
    [
        ("generate bag --num-images 1000000000000", "not in the range"),
        ("generate bag --batch-size 99999999999999999999", "not in the range"),
        ("generate bag --steps 99999999 --model demo-tokens", "not in the range"),
        ("generate bag --rerank likelihood --rerank-from 99999999999", "not in the range"),
        ("restore x.png --task deblur --kernel-size 99999999999999999999", "not in the range"),
        ("tune bag --num-images 1000000000000", "not in the range"),
        ("check color:red --shape 99999999999999999999x1x1", "each below a million"),
        ("check color:red --shape 3x\u0661x1", "each below a million"),
    ],
)
def test_numbers_that_are_a_slip_are_refused_before_they_fill_the_memory(words, told):
    found = CliRunner().invoke(cli.main, words.split())
    assert found.exit_code == 2 and told in found.output and found.output.count("Error: ") == 1


@pytest.mark.parametrize("word, told", [("a\0b", "a NUL character"), ("\ud800", "half a character")])
def test_words_that_no_shell_can_give_are_refused(word, told):
    for words in (["restore", word, "--task", "deblur"], ["generate", word], [word], ["check", "color:red", word]):
        found = CliRunner().invoke(cli.main, words)
        assert found.exit_code == 2 and f"Error: an argument holds {told}" in found.output


def test_check_tells_that_the_memory_does_not_hold_a_picture(monkeypatch):
    def check(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."
        )

    monkeypatch.setattr(cli_check, "check", check)
    found = CliRunner().invoke(cli.main, ["check", "color:red", "--shape", "3x99999x99999"])
    assert found.exit_code == 2
    assert (
        found.output == "Error: the memory of cpu does not hold pictures of 3 x 99999 x 99999; try a smaller --shape\n"
    )


def test_a_class_is_no_loss(tmp_path):
    (tmp_path / "mine.py").write_text("class Dark:\n    def __call__(self, image): return image.mean((1, 2, 3))\n")
    with pytest.raises(ValueError, match=r"'Dark' in '.*mine.py' is a class; in that file, make one"):
        registry.parse(f"{tmp_path / 'mine.py'}:Dark")


def test_levels_that_cannot_be_read_are_refused():
    refused = {
        "cannot be sampled with here: it has no step": (diffusers.ScoreSdeVeScheduler(), 5),
        "its prediction_type is that of a flow": (
            diffusers.EulerDiscreteScheduler(num_train_timesteps=100, prediction_type="flow_prediction"),
            1,
        ),
        "with 1 timesteps its sigmas are not finite": (
            diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1),
            1,
        ),
        "it visits timestep 37, and has levels of 37 only": (
            diffusers.DDPMParallelScheduler(num_train_timesteps=37, steps_offset=1),
            37,
        ),
    }
    for told, (scheduler, steps) in refused.items():
        with pytest.raises(ValueError, match=told):
            Solver.of(scheduler, steps)


def test_flow_sigmas_are_a_flows_levels_whatever_is_predicted():
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon")
    for level in Solver.of(scheduler, 5).levels:
        assert level.alpha == pytest.approx(1 - level.sigma)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"strength.": 1.5}, "there is no setting 'strength.'"),
        ({"rule.": 1.5}, "there is no setting 'rule.'"),
        ({"time_travel": None, "time_travel.start": 0.1}, "'time_travel' and 'time_travel.start'"),
        ({"time_travel.start": 0.1, "time_travel": None}, "'time_travel' and 'time_travel.start'"),
    ],
)
def test_settings_that_are_no_names_or_are_given_twice_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        with_settings(recipes.auto(Color("red")), given)


def test_a_key_that_is_there_twice_is_found_at_once():
    keys = [*range(200_000), 199_999]
    text = "{" + ",".join(f'"k{key}": 0' for key in keys) + "}"
    with pytest.raises(ValueError, match="the key 'k199999' is there twice"):
        parse_json(text.encode())
