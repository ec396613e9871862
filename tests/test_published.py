"""The published comparisons with tiny networks of random weights: their figures mean nothing, that they run does."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

pytest.importorskip("fcntl")
pytest.importorskip("torchmetrics")

from lossguide.losses.network import distance  # noqa: E402

from benchmarks import features, parts  # noqa: E402
from benchmarks.published import models, wants  # noqa: E402
from benchmarks.published import run as running  # noqa: E402
from benchmarks.published.tasks import TASKS  # noqa: E402


class Lines(nn.Module):
    """Pictures -> `(B, 2, h, w)`, and a second output, as BiSeNet has."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        return y, y.mean((2, 3))


class Noise(nn.Module):
    """(x, t) -> noise and a variance, as ADM has."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 1, 1)

    def forward(self, x, t):
        return self.conv(x) * (1 + t.view(-1, 1, 1, 1) / 1000)


def tiny_unet():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tiny_clip):
    """A folder that holds what any of the tasks needs, in the formats that they come in."""
    from torchvision.models import squeezenet1_1

    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_unet().save_pretrained(folder / "denoiser")
        torch.save(squeezenet1_1(weights=None).state_dict(), folder / "squeezenet1_1.pth")
        for name in ("parser.pt", "lines.pt"):
            torch.jit.trace(Lines(), torch.rand(1, 3, 64, 64)).save(folder / name)
        (folder / "pictures").mkdir()
        for i in range(3):
            to_pil_image(torch.rand(3, 40, 48)).save(folder / "pictures" / f"{i}.png")
    for name in ("clip-b16", "clip-l14"):
        (folder / name).symlink_to(tiny_clip)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Results and pictures of this test alone, and quick features."""
    network = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(1))
    monkeypatch.setattr(running, "RESULTS", tmp_path)
    monkeypatch.setattr(parts, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(running, "features", lambda: features.Features("tiny", "a tiny network's features", network))
    return tmp_path


@pytest.mark.parametrize("name", TASKS)
def test_a_comparison_runs_from_weights_to_table(name, weights, here):
    task = TASKS[name]
    running.run(name, str(weights), quick=True)
    table = (here / f"{name}-quick.md").read_text()
    rows = [json.loads(line) for line in (here / f"{name}-quick.jsonl").read_text().splitlines()]
    assert len(rows) == len(task.rows)
    assert all(f"| {row.name} | 3 |" in table for row in task.rows)
    for key in set(task.figures) - {"fid", "peak_memory"}:  # FID of two pictures need not be a number
        assert all(math.isfinite(row[key]) for row in rows), key


def test_what_was_drawn_is_not_drawn_again(weights, here, monkeypatch):
    running.run("published-cats-sr4", str(weights), quick=True, only=["auto"])
    assert not (here / "published-cats-sr4-quick.md").exists()
    drawn = []
    draw = parts.Parts._drawn
    monkeypatch.setattr(parts.Parts, "_drawn", lambda self, run, key: drawn.append(run.name) or draw(self, run, key))
    running.run("published-cats-sr4", str(weights), quick=True)
    assert drawn == [f"{row.name}, 3 steps" for row in TASKS["published-cats-sr4"].rows if row.name != "auto"]


def test_other_inputs_are_other_rows(weights, tmp_path):
    found = {"denoiser": weights / "denoiser", "clip": weights / "clip-b16", "pictures": weights / "pictures"}
    digests = [running.digest_of_inputs(found)]
    for text in ("a cat", "a dog"):
        (tmp_path / "prompts.txt").write_text(text)
        digests.append(running.digest_of_inputs(found | {"prompts": tmp_path / "prompts.txt"}))
    digests.append(running.digest_of_inputs(found | {"pictures": weights / "denoiser"}))
    assert len(set(digests)) == 4 and digests[0] == running.digest_of_inputs(found)


@pytest.mark.parametrize("name", TASKS)
def test_what_lacks_is_told_with_where_it_is_to_be_had(name, tmp_path):
    for folder in (None, tmp_path):
        with pytest.raises(SystemExit) as told:
            running.run(name, folder and str(folder))
        needed = [part for part in TASKS[name].needs.values() if not part.optional]
        assert all(part.paths[0] in str(told.value) and part.where in str(told.value) for part in needed)
    (tmp_path / "denoiser").mkdir()
    with pytest.raises(SystemExit) as told:
        running.run(name, str(tmp_path))
    assert "a diffusers model" not in str(told.value)


def test_there_is_a_published_figure_for_each_method_at_a_number_of_steps_that_is_run():
    for name, task in TASKS.items():
        told = {steps for row in task.rows for steps in row.published}
        assert told and told <= set(task.steps), name
        assert all(set(figures) <= set(task.figures) for row in task.rows for figures in row.published.values()), name


def test_the_report_puts_the_published_figure_beside_the_measured_one():
    task = TASKS["published-steps"]
    found = {"distance": 1700.123, "distance_error": 10, "fid": 40, "pictures": 8, "device": "cpu"}
    table = running.report("published-steps", task, [(task.rows[1], 50, found)], None, False)
    assert "| FreeDoM | 50 | 1700.12 ± 10.00 (1821) | 40.0 |" in table


def test_the_distance_of_maps_is_zero_for_the_picture_itself(weights):
    found = {"network": weights / "lines.pt", "pictures": weights / "pictures"}
    wanted = wants.maps(found, 32, "cpu", size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    own = models.read_pictures(models.picture_files(weights / "pictures"), 32)
    assert own.shape == (3, 3, 32, 32)
    assert wanted.judge(own[[0, 1]], [0, 4])["distance"].abs().max() < 1e-4  # the pictures come round again
    other = own.flip(3)
    judged = wanted.judge(other[[0, 1]], [0, 1])["distance"]
    assert judged.min() > 0.1
    assert torch.allclose(wanted.loss([0, 1])(other[[0, 1]]), judged)  # what guides is what is judged


def test_a_text_s_distance_is_that_of_embeddings_as_they_are(weights):
    from lossguide.losses.clip import load_clip

    found = {"clip": weights / "clip-b16", "judge": weights / "clip-l14"}
    wanted = wants.text(found, 32, "cpu", prompts=("a cat", "a dog"))
    images = torch.rand(3, 3, 32, 32)
    clip = load_clip(str(weights / "clip-b16"))
    with torch.no_grad():
        texts, seen = clip.embed_text(["a cat", "a dog", "a cat"]), clip.embed(images)
        figures = wanted.judge(images, range(3))
        assert torch.allclose(figures["distance"], distance(texts - seen))
        assert torch.allclose(figures["clip_score"], 100 * (1 - wanted.loss(range(3))(images)), atol=1e-3)


def test_a_restoration_is_judged_against_the_picture_that_was_degraded(weights):
    found = {"pictures": weights / "pictures", "squeezenet": weights / "squeezenet1_1.pth"}
    wanted = wants.restoration(found, 32, "cpu", "super-resolution", 4)
    own = models.read_pictures(models.picture_files(weights / "pictures"), 32)[:2]
    figures = wanted.judge(own, [0, 1])
    assert figures["lpips"].abs().max() < 1e-5 and figures["psnr"].min() > 90
    assert wanted.loss([0, 1])(own).max() < 1e-4
    assert wanted.judge(own.flip(2), [0, 1])["psnr"].max() < 20


def test_a_torchscript_denoiser_s_variance_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SIDE", 16)
    torch.jit.trace(Noise(), (torch.rand(2, 3, 16, 16), torch.ones(2))).save(tmp_path / "denoiser.pt")
    model = models.load_denoiser(tmp_path / "denoiser.pt")
    x = torch.rand(3, 3, 16, 16, requires_grad=True)
    predicted = model.predict(x, torch.tensor(500))
    assert predicted.shape == x.shape
    assert torch.autograd.grad(predicted.sum(), x)[0].abs().sum() > 0
    whole = model.model.network(x, torch.full((3,), 500.0))
    assert torch.allclose(predicted, whole[:, :3])


def test_a_denoiser_s_own_levels_hold(tmp_path):
    from diffusers import DDPMScheduler

    tiny_unet().save_pretrained(tmp_path / "unet")
    DDPMScheduler(beta_end=0.01).save_pretrained(tmp_path / "scheduler")
    model = models.load_denoiser(tmp_path)
    assert torch.equal(model.scheduler.alphas_cumprod, DDPMScheduler(beta_end=0.01).alphas_cumprod)
    assert model.shape == (3, 32, 32)
