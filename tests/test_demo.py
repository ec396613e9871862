"""The built-in demo, end to end, judged by the network that never guides; the benchmark's own pieces."""

from __future__ import annotations

import json

import pytest
import torch
from lossguide.guidance import recipes
from lossguide.guidance.cli_restore import psnr
from lossguide.losses import ClassLabel, ClipText, Measurement, measure, operators
from lossguide.losses.demo import classifier
from lossguide.samplers import load_demo, sample

from benchmarks.demo_text import Rows, prompts
from benchmarks.metrics import frechet


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def judged(images):
    with torch.no_grad():
        return classifier("judge")(images).argmax(1)


def test_every_prompt_is_drawn(demo):
    labels = torch.arange(10)
    loss = ClipText([prompts()[c] for c in labels], model="demo")
    guided = sample(demo, recipes.auto(loss), steps=20, seeds=range(10))
    plain = sample(demo, None, steps=20, seeds=range(10))
    assert (judged(guided.images) == labels).float().mean() >= 0.8
    assert (judged(plain.images) == labels).float().mean() <= 0.4


def test_a_class_is_drawn_without_backprop_through_the_denoiser(demo):
    guidance = recipes.auto(ClassLabel("ankle boot"), through="x0")
    assert (judged(sample(demo, guidance, steps=20, seeds=range(6)).images) == 9).float().mean() >= 0.8


def test_a_picture_with_half_of_its_pixels_gone_comes_back(demo):
    picture = sample(demo, recipes.auto(ClassLabel("pullover")), steps=50, seeds=[1]).images.expand(-1, 3, -1, -1)
    mask = (torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    operator = operators.Inpaint(mask)
    y = measure(operator, picture, 0.02, torch.Generator().manual_seed(1))
    loss = Measurement(operator, y, 0.02)
    restored = sample(demo, recipes.auto(loss), steps=50, seeds=[5]).images.expand(-1, 3, -1, -1)
    assert psnr(restored, picture) > psnr(y, picture) + 6
    assert loss(restored) < 1.5 * loss.floor


def test_frechet_distance_of_known_gaussians():
    """||m||^2 + tr(A + B - 2 sqrt(AB)), here with diagonal covariances."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 2, generator=generator)
    b = torch.randn(200_000, 2, generator=generator) * torch.tensor([2.0, 0.5]) + torch.tensor([3.0, 0.0])
    assert frechet(a, b) == pytest.approx(9 + 1 + 0.25, rel=0.02)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.1)).item() == pytest.approx(20, abs=1e-4)


def test_measured_rows_survive_a_torn_line_and_other_weights(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", "aaa", fresh=False)
    rows.add({"recipe": "dps", "accuracy": 0.5})
    with rows.path.open("a") as file:
        file.write(json.dumps({"recipe": "shen", "weights": "aaa"})[:-5])
    rows.add({"recipe": "mpgd", "accuracy": 0.25})
    assert rows.get(recipe="dps")["accuracy"] == 0.5
    assert rows.get(recipe="mpgd")["accuracy"] == 0.25
    assert rows.get(recipe="shen") is None
    assert Rows(rows.path, "bbb", fresh=False).get(recipe="dps") is None
