"""CIFAR-10: its data, the training of its model, its classifiers, label guidance, and distances of features."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fcntl")
pytest.importorskip("torchmetrics")

from benchmarks import features, metrics, parts, work_cifar  # noqa: E402
from benchmarks.cifar10 import classifiers, data, label, model, train  # noqa: E402
from benchmarks.parts import Parts, Run  # noqa: E402


def package(folder, each: int = 3) -> dict[str, np.ndarray]:
    """A package in the format of the real one, of a few random pictures; the pictures by strip."""
    source, strips = np.random.default_rng(0), {}
    with tarfile.open(folder / data.ARCHIVE, "w:gz") as archive:

        def put(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        for split, names in data.PARTS.items():
            for name in names:
                strips[name] = source.integers(0, 256, (each, 32, 32, 3), np.uint8)
                file = io.BytesIO()
                Image.fromarray(strips[name].reshape(each, 1024, 3)).save(file, "PNG")
                put(name, file.getvalue())
            put(data.LABELS[split], json.dumps([i % 10 for i in range(each * len(names))]).encode())
    return strips


def test_the_package_is_read_picture_by_picture(tmp_path, monkeypatch):
    strips = package(tmp_path)
    monkeypatch.setattr(data, "SHA256", hashlib.sha256((tmp_path / data.ARCHIVE).read_bytes()).hexdigest())
    assert not data.available(tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m benchmarks.cifar10.data"):
        data.cifar10("test", tmp_path)
    data.fetch(tmp_path)
    images, labels = data.cifar10("train", tmp_path)
    assert images.shape == (15, 3, 32, 32) and images.dtype == torch.uint8
    whole = np.concatenate([strips[name] for name in data.PARTS["train"]])
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), whole)
    assert labels.tolist() == [i % 10 for i in range(15)]
    assert len(data.cifar10("test", tmp_path)[0]) == 3


def test_another_archive_is_refused(tmp_path):
    package(tmp_path)
    with pytest.raises(ValueError, match="sha256"):
        data.fetch(tmp_path)
    assert not data.available(tmp_path)


@pytest.mark.skipif(not data.available(), reason="CIFAR-10 has not been fetched")
def test_the_classifiers_are_as_good_as_published_on_the_real_test_set(shared):
    images, labels = data.cifar10("test")
    assert len(images) == 10_000 and torch.equal(labels.bincount(), torch.full((10,), 1000))
    for which, published in (("guide", 0.9173), ("judge", 0.9340)):
        right = classifiers.logits(which, images[:500] / 255).argmax(1) == labels[:500]
        assert abs(right.float().mean().item() - published) < 0.035, which  # three standard errors


def test_the_classifiers_have_the_layers_they_are_named_after():
    for depth, parameters in ((20, 269_722), (56, 853_018)):  # 0.27 M and 0.85 M in He et al. 2016
        network = classifiers.ResNet(depth)
        assert sum(p.numel() for p in network.parameters()) == parameters
        convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        assert len(convolutions) + 1 == depth
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_pictures_and_samples_of_the_model_are_the_same_thing():
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    for patch in (1, 2):
        samples = model.pack(images, patch)
        assert samples.shape == (2, 3 * patch**2, 32 // patch, 32 // patch)
        assert samples.square().mean().isclose((images * 2 - 1).square().mean())  # white noise stays white
        assert torch.allclose(model.unpack(samples, patch), images)


def test_the_average_of_the_weights_is_that_of_the_power_function():
    """After n steps the weight of step i is proportional to about i^17: mean n 18/19, deviation 5 % of n."""
    average, current = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    average.requires_grad_(False)
    moments = []
    for power in (1, 2):
        average.double().weight.fill_(0)
        for step in range(1, 2001):
            current.double().weight.data.fill_(float(step) ** power)
            train.update_average(average, current, step)
        moments.append(average.weight.item() / 2000**power)
    assert abs(moments[0] - 18 / 19) < 1e-2
    assert abs((moments[1] - moments[0] ** 2) ** 0.5 - 0.05) < 5e-3


def test_the_loss_of_a_model_that_knows_v_is_zero():
    """Of a single picture v follows from the sample: v = (a x - x0) / s."""
    alphas = model.build_scheduler().alphas_cumprod
    x0 = torch.rand(1, 3, 4, 4).expand(64, -1, -1, -1) * 2 - 1
    seen = []

    def knows(x, t):
        seen.append(t)
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        return type("Output", (), {"sample": (a * x - x0) / s})

    assert train.loss_of(knows, x0, alphas) < 1e-6
    assert seen[0].diff().min() >= 0 and seen[0].max() - seen[0].min() > 900  # one draw per stratum


def settings(out, **changes):
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = dict(device="cpu", steps=3, minutes=5.0, width=8, patch=2, batch=4, peak=1e-3, seed=0, out=out)
    return small | dict(images=images) | changes


def test_training_goes_on_where_it_was_and_its_model_guides(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    saved, real = [], torch.save

    def killed(state, path):
        real(state, path)
        saved.append(state["step"])
        if len(saved) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(**settings(tmp_path, steps=6))
    assert saved == [1, 2, 3, 4] and not model.available(tmp_path)
    facts = train.train(**settings(tmp_path, steps=6))
    assert saved[4:] == [4, 5, 6, 6] and facts["steps"] == 6  # the fourth was not saved whole
    with pytest.raises(SystemExit, match="width"):
        train.train(**settings(tmp_path, width=16))

    denoiser = model.load(tmp_path)
    assert denoiser.shape == (12, 16, 16)
    from lossguide.guidance import recipes
    from lossguide.samplers import sample

    result = sample(denoiser, recipes.auto(lambda image: image.flatten(1).mean(1)), steps=2, seeds=[0, 1])
    plain = sample(denoiser, steps=2, seeds=[0, 1])
    assert result.images.shape == (2, 3, 32, 32)
    assert not torch.equal(result.images, plain.images)


def test_time_ends_a_training_as_steps_do(tmp_path):
    facts = train.train(**settings(tmp_path, steps=float("inf"), minutes=0.02))
    assert facts["steps"] >= 1 and facts["minutes"] < 0.5


class Toy:
    """Stands for a model: `x0` is always zero, so pictures are grey; counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def load(self):
        from lossguide.samplers import denoiser

        toy = torch.nn.Linear(1, 1)
        toy.forward = self.forward
        return denoiser(toy, model.build_scheduler(), kind="sample", shape=(3, 4, 4))

    def forward(self, x, t):
        self.asked += 1
        return torch.zeros_like(x)


def plan(**changes) -> Run:
    judge = lambda images, places: {"grey": images.flatten(1).mean(1), "place": torch.tensor(list(places)).float()}
    whole = dict(name="toy", key={"recipe": "unguided"}, guidance=lambda places: None, judge=judge)
    return Run(**(whole | dict(count=5, part=2, seed=100, steps=2, eta=1.0) | changes))


def test_parts_are_drawn_once_and_in_any_process(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "FOLDER", tmp_path)
    toy = Toy()
    load = toy.load
    drawn = Parts(load, "toy")
    run = plan()
    first = next(run.parts())
    with drawn.rows.claim(**first) as mine:  # another process is at the first part
        assert mine and not drawn.draw(run)
    assert toy.asked == 4 and drawn.rows.get(**first) is None
    assert drawn.draw(run) and toy.asked == 6
    assert Parts(load, "toy").draw(run) and toy.asked == 6
    figures = drawn.figures(run)
    assert figures["place"] == 2 and figures["grey"] == pytest.approx(0.5, abs=1e-6)
    assert figures["place_error"] == pytest.approx(2**0.5 / 5**0.5)
    assert drawn.pictures(run).shape == (5, 3, 4, 4)
    assert not any(drawn.rows.get(**key) for key in plan(steps=3).parts())
    assert Parts(load, "toy", fresh=True).rows.all() == []


def test_a_part_that_was_not_saved_whole_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "FOLDER", tmp_path)
    toy = Toy()
    drawn, run = Parts(toy.load, "toy"), plan(count=2)

    def killed(path, array):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(parts, "save", killed)
        drawn.draw(run)
    assert drawn.rows.all() == []
    assert drawn.draw(run) and len(drawn.rows.all()) == 1


def test_label_guidance_runs_from_a_model_to_a_table(tmp_path, monkeypatch, shared):
    train.train(**settings(tmp_path / "model", steps=2))
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Flatten(1))
    monkeypatch.setattr(data, "cifar10", lambda split: (images, torch.arange(30) % 10))
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    monkeypatch.setattr(parts, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(label, "RESULTS", tmp_path)
    monkeypatch.setattr(label, "missing", lambda: None)
    monkeypatch.setattr(label, "features", lambda: features.Features("tiny", "tiny features", network))
    monkeypatch.setattr(label, "SIZES", {"cpu": label.Size(count=10, part=5, searched=5, steps=2, real=30)})
    monkeypatch.setattr(label, "METHODS", ("unguided", "auto", "dps"))
    monkeypatch.setattr(label, "TRIED", {"dps": (4.0,)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "model"
    monkeypatch.setattr(model, "training", lambda of=folder: json.loads((of / "training.json").read_text()))
    loaded = model.load
    monkeypatch.setattr(model, "load", lambda: loaded(folder))
    label.run()
    table = (tmp_path / "cifar10.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "cifar10.jsonl").read_text().splitlines()]
    assert {row["recipe"] for row in rows} == set(label.METHODS)
    assert all(f"| {recipe} |" in table for recipe in label.METHODS) and "weak model" in table
    assert all(0 <= row["accuracy"] <= 1 and row["pictures"] == 10 and row["fid"] > 0 for row in rows)
    kept = Parts(model.load, "cifar10").rows.all()
    assert {row["recipe"] for row in kept if row["seed"] == work_cifar.SEEDS["search"]} == set(label.TRIED)
    label.run()  # measures nothing again
    assert len(Parts(model.load, "cifar10").rows.all()) == len(kept)
    assert len((tmp_path / "cifar10.jsonl").read_text().splitlines()) == len(rows)


def test_noise_is_rough_and_a_picture_is_not():
    smooth = torch.linspace(0, 255, 32).expand(1, 3, 32, 32).byte()
    noise = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert label.rough(torch.cat([smooth, noise])).tolist() == [0, 1]


@pytest.mark.skipif(not data.available(), reason="CIFAR-10 has not been fetched")
def test_no_real_picture_is_rough():
    assert label.rough(data.cifar10("test")[0][:2000]).sum() == 0


def test_without_a_model_the_task_says_how_to_train_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(classifiers, "available", lambda: True)
    monkeypatch.setattr(model, "available", lambda: False)
    label.run(quick=True)
    told = capsys.readouterr().out
    assert "python -m benchmarks.cifar10.train" in told and told.endswith("; skipped\n")


def test_distances_agree_with_the_frechet_distance_and_know_a_set_from_itself():
    source = torch.Generator().manual_seed(0)
    a, again, b = (torch.randn(400, 6, generator=source) + shift for shift in (0, 0, 1.0))
    far, near = features.distances(b, a), features.distances(again, a)
    assert far["fid"] == pytest.approx(metrics.frechet(b, a), rel=1e-3)
    assert features.distances(a, a)["fid"] < 1e-3 and far["fid"] > 4  # 6 of the means alone
    assert abs(near["kid"]) < 0.05 < 1 < far["kid"]
    state = torch.random.get_rng_state()
    assert features.distances(b, a) == far  # the subsets are the same each time
    assert torch.equal(torch.random.get_rng_state(), state)


def test_pictures_are_resized_as_tensorflow_did():
    """Pixel i of the large picture is read at i * old / new; beyond the last pixel it is the last one."""
    row = torch.tensor([0.0, 4.0, 8.0, 2.0])
    large = features.resized_as_tensorflow(row.expand(1, 1, 4, 4), 8)[0, 0, 3]
    assert torch.allclose(large, torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0, 5.0, 2.0, 2.0]), atol=1e-5)
    column = features.resized_as_tensorflow(row.view(4, 1).expand(1, 1, 4, 4), 8)[0, 0, :, 5]
    assert torch.allclose(column, large, atol=1e-5)


def test_features_see_pictures_on_256_levels():
    network = torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(12, 12, bias=False))
    network[1].weight.data.copy_(torch.eye(12))
    images = torch.rand(5, 3, 2, 2) * 1.4 - 0.2
    seen = features.Features("plain", "", network)(images, batch=2)
    levels = (images.clamp(0, 1) * 255).round()
    assert torch.allclose(seen, levels.flatten(1) / 255)
    assert torch.equal(features.Features("plain", "", network)(levels.byte()), seen)


@pytest.mark.skipif(features.inception_file() is None, reason="no Inception at hand")
def test_the_inception_gives_2048_features_that_tell_pictures_apart():
    network = features.Features("inception", "", features._Inception(features.inception_file()))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = network(images)
    assert found.shape == (2, 2048) and found.min() >= 0
    assert 0.1 < found.mean() < 1 and (found[0] - found[1]).abs().max() > 0.1
