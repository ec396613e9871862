"""The checker of losses: what is right passes, and every kind of wrong loss is told by its own check."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from lossguide.guidance.cli import main
from lossguide.losses import ClassLabel, ClipText, Color, Finding, Frames, Loss, check
from torch import nn

SMALL = (3, 16, 16)


def mean(image):
    return image.mean((1, 2, 3))


def right(image):
    return mean((1 - image).square())


def wrong_gradient(image):
    return mean(image * image.detach())


def in_place(image):
    return mean(image.mul_(2).square())


def asks_for_a_gradient(image):
    return mean(image.requires_grad_().square())


def goes_back(image):
    value = mean(image.square())
    if value.requires_grad:
        value.sum().backward(retain_graph=True)
    return value


def frozen_part(image):
    with torch.no_grad():
        weight = image.mean((2, 3), keepdim=True)
    return mean((image / (weight + 0.1)).square())


def straight_through(image):
    soft, hard = (8 * (image - 0.5)).sigmoid(), (image > 0.5).to(image.dtype)
    return mean(soft + (hard - soft).detach())


def changes_in_between(image):
    half = image.sigmoid()
    square = half.square()
    half += 1
    return mean(square)


def one_only(image):
    if len(image) > 1:
        raise ValueError("one picture, please")
    return mean(image)


class Remembers:
    def __init__(self):
        self.values = []

    def __call__(self, image):
        self.values.append(mean(image.square()))
        return self.values[-1]


def network(*layers):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)
        return nn.Sequential(nn.Conv2d(3, 4, 3), *layers, *head, nn.Flatten(0))


def found(loss, name, shape=SMALL):
    """The finding of one check."""
    return next(finding for finding in check(loss, shape).findings if finding.check == name)


def bad(loss):
    """What is not ok."""
    return [finding for finding in check(loss, SMALL).findings if finding.level != "ok"]


@pytest.mark.parametrize(
    "loss",
    [
        right,
        lambda image: image[..., :4].mean((1, 2, 3)),
        lambda image: (image - 0.5).abs().flatten(1).mean(1),
        lambda image: (mean(image) - 0.9).clamp(min=0),  # no gradient at most pictures, but at white ones
        lambda image: image.flatten(1).median(1).values,
        network(nn.ReLU()),
        network(nn.BatchNorm2d(4)).eval(),
        2.0 * Color("red"),
        ClassLabel(9),
        ClipText("a boot", model="demo"),
        ClipText(["a boot", "a bag"], model="demo"),
    ],
)
def test_what_is_right_passes(loss):
    report = check(loss, SMALL)
    assert report.ok and not report.warnings, str(report)
    assert {"shape", "alone", "differences", "speed"} <= {finding.check for finding in report.findings}


def test_single_precision_is_compared_more_loosely():
    net = network(nn.ReLU())
    assert "float32" in found(net, "differences").text and "not in float64" in found(net, "precision").text
    assert "float32" in found(lambda image: net(image.float()).to(image.dtype), "differences").text
    assert "float64" in found(right, "differences").text
    assert found(lambda image: wrong_gradient(image.float()), "differences").level == "problem"


PROBLEMS = {
    "one number": (lambda image: image.mean(), "shape", ".mean((1, 2, 3))"),
    "one number in a row": (lambda image: image.mean()[None], "shape", "for the whole batch"),
    "an axis too many": (lambda image: mean(image)[:, None], "shape", ".flatten()"),
    "a number per pixel": (lambda image: image.square(), "shape", "average over every axis but the first"),
    "nothing": (lambda image: None, "shape", "end it with return"),
    "a number of Python's": (lambda image: image.mean().item(), "shape", "returns a float"),
    "an array": (lambda image: mean(image).numpy(), "shape", "returns a ndarray"),
    "whole numbers": (lambda image: image.flatten(1).argmax(1), "shape", "int64"),
    "another argument": (lambda image, target: mean(image - target), "shape", "functools.partial"),
    "batches fail": (one_only, "shape", "one picture, please"),
    "logarithm": (lambda image: mean(image.log()), "values", "infinite for a black picture"),
    "power": (lambda image: mean((image + 0.01) ** 2.4), "values", "NaN for a picture slightly outside"),
    "batch": (lambda image: mean((image - image.mean(0)).square()), "alone", "the others in its batch"),
    "little of the batch": (lambda image: mean(image) + 1e-4 * image.mean(), "alone", "the others in its batch"),
    "order": (lambda image: mean(image) + 0.1 * torch.arange(len(image)), "alone", "the others in its batch"),
    "batch normalisation": (network(nn.BatchNorm2d(4)), "alone", ".eval()"),
    "in place": (in_place, "untouched", "writes into the picture"),
    "requires_grad": (asks_for_a_gradient, "untouched", "requires_grad"),
    "backward": (goes_back, "untouched", "calls .backward()"),
    "detached": (lambda image: mean(image.detach()), "gradient", ".detach()"),
    "no grad": (torch.no_grad()(right), "gradient", "torch.no_grad()"),
    "another tensor": (lambda image: torch.tensor(mean(image).tolist()), "gradient", "torch.tensor(...)"),
    "numpy": (lambda image: torch.from_numpy(image.numpy().mean((1, 2, 3))), "gradient", "numpy knows no gradient"),
    "changed on the way": (changes_in_between, "gradient", "y = y + 1"),
    "threshold": (lambda image: mean((image > 0.5).float()), "gradient", "comparison"),
    "rounding": (lambda image: mean((255 * image).round()), "gradient", "zero everywhere"),
    "root": (lambda image: mean(image.abs().sqrt()), "finite", "(x + 1e-6).sqrt()"),
    "deviation": (lambda image: mean(image.var((2, 3), keepdim=True).sqrt()), "finite", "for a black picture"),
    "partly detached": (wrong_gradient, "differences", "not that of the value"),
    "partly without": (frozen_part, "differences", "torch.no_grad()"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_every_kind_of_wrong_loss_is_told_once(case):
    loss, name, part = PROBLEMS[case]
    (finding,) = bad(loss)
    assert (finding.check, finding.level) == (name, "problem") and part in finding.text


WARNINGS = {
    "random": (lambda image: mean((image + 0.1 * torch.randn_like(image)).square()), "repeatable", "is random"),
    "dropout": (network(nn.Dropout()), "repeatable", ".eval()"),
    "clamp": (lambda image: mean(image.clamp(0, 1).square()), "outside", "clamp(0, 1)"),
    "straight through": (straight_through, "differences", "steps"),
    "one size": (lambda image: mean((image - torch.full(SMALL, 0.3)).square()), "size", "3 x 16 x 16"),
    "memory": (Remembers(), "memory", "value.detach()"),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_what_may_be_meant_is_a_warning(case):
    loss, name, part = WARNINGS[case]
    (finding,) = bad(loss)
    assert (finding.check, finding.level) == (name, "warning") and part in finding.text


def test_the_last_value_may_be_kept():
    def last(image):
        last.value = mean(image.square())
        return last.value

    assert check(last, SMALL).ok and not check(last, SMALL).warnings


def test_a_loss_for_another_shape_says_so_and_takes_its_own():
    class Fixed(Loss):
        def __call__(self, image):
            return mean((image - torch.zeros(3, 8, 8)).square())

    assert "name that" in found(Fixed(), "shape").text
    assert check(Fixed(), (3, 8, 8)).ok
    videos = check(Frames(right), (2, 3, 8, 8))
    assert videos.ok and not videos.warnings
    assert check(lambda sound: sound.square().mean(1), (100,)).ok


def test_each_term_is_tried_by_itself():
    report = check(Color("red") + right + wrong_gradient, SMALL)
    assert [finding.loss for finding in report.problems] == ["wrong_gradient"]
    assert list(dict.fromkeys(finding.loss for finding in report.findings)) == ["color", "right", "wrong_gradient"]
    lines = str(report).splitlines()
    assert lines[0] == "color" and lines[1].split()[:2] == ["ok", "shape"] and len(lines) == 3 + len(report.findings)
    assert isinstance(report.findings[0], Finding)


def test_checking_changes_neither_the_random_state_nor_the_loss():
    loss = ClassLabel(9)
    image = torch.rand(2, *SMALL, generator=torch.Generator().manual_seed(0))
    state, before = torch.get_rng_state(), loss(image)
    check(loss, SMALL)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(loss(image), before)
    with torch.no_grad():
        assert check(right, SMALL).ok


def test_what_is_no_loss_and_no_shape_is_refused():
    with pytest.raises(TypeError, match="a loss is a callable"):
        check("a boot")
    for shape in ((), (3, 0, 8), (3, 8.5, 8)):
        with pytest.raises(ValueError, match="shape"):
            check(right, shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")
def test_the_pictures_device_is_followed():
    own = torch.full((3, 1, 1), 0.5)
    assert found(right, "device").level == "ok"
    assert ".to(image" in found(lambda image: mean((image - own).square()), "shape").text
    assert "leave out .cpu()" in found(lambda image: right(image).cpu(), "device").text
    (finding,) = bad(lambda image: mean((image - own.cuda()).square()))
    assert (finding.check, finding.level) == ("device", "warning")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a file of losses."""
    monkeypatch.chdir(tmp_path)
    code = "import torch\ndef right(image):\n    return (1 - image).square().mean((1, 2, 3))\n"
    code += "def single(image):\n    return image.mean()\n"
    code += "def clamped(image):\n    return image.clamp(0, 1).square().mean((1, 2, 3))\n"
    code += "class Kind:\n    def __call__(self, image):\n        return image.mean((1, 2, 3))\n"
    (tmp_path / "own.py").write_text(code)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, ["check", "--device", "cpu", *arguments])


@pytest.mark.usefixtures("place")
def test_the_command_tells_what_it_found_and_by_its_status_whether_there_is_a_problem():
    result = run("own.py:right", "--shape", "3x16x16")
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.startswith("right\n  ok       shape ") and "3 x 16 x 16" in result.stdout
    assert result.stdout.endswith("\n0 problems, 0 warnings\n")

    result = run("own.py:clamped", "--shape", "3x16x16")
    assert result.exit_code == 0 and result.stdout.endswith("\n0 problems, 1 warning\n")

    result = run("2*own.py:right", "own.py:single", "--shape", "3x16x16")
    assert result.exit_code == 1 and result.stderr == "" and "\nsingle\n  problem  shape " in result.stdout
    assert result.stdout.endswith("\n1 problem, 0 warnings\n")


def test_the_librarys_losses_pass_by_name():
    result = run("color:red", "class-label:9", "clip-text:a boot", "--shape", "3x32x32")
    assert result.exit_code == 0, result.stdout
    assert result.stdout.endswith("\n0 problems, 0 warnings\n")


BAD = {
    "no such function": (["own.py:rihgt"], "did you mean 'right'"),
    "no such loss": (["clip-txt:a boot"], "did you mean 'clip-text'"),
    "a class": (["own.py:Kind"], "make one: Kind(...)"),
    "no loss": ([], "LOSS"),
    "no shape": (["own.py:right", "--shape", "3 by 64"], "such as 3x64x64"),
    "empty shape": (["own.py:right", "--shape", "3x0x64"], "such as 3x64x64"),
    "no such device": (["own.py:right", "--device", "cuda:99"], "there are cpu"),
}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(case):
    arguments, part = BAD[case]
    result = run(*arguments)
    assert result.exit_code == 2 and part in result.stderr and result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_the_command_ends_with_its_status(place):
    command = [sys.executable, "-m", "lossguide.guidance.cli", "check", "own.py:single"]
    assert subprocess.run(command, cwd=place, capture_output=True).returncode == 1
