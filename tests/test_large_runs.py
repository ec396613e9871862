"""Large runs: what is on disk after any end, that going on gives the same pictures, and that processes share them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lossguide.guidance import cli_agreed, cli_large, cli_model, files
from lossguide.guidance import manifest as manifests
from lossguide.guidance.cli import main
from lossguide.guidance.manifest import Manifest, clear, entered, leave
from lossguide.losses import registry
from lossguide.samplers import Record, demo
from models import tiny_stable_diffusion, vp_scheduler
from PIL import Image
from tqdm import tqdm

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and file locks")


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """What a kill leaves does not depend on what has come to the disk itself."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    tqdm.set_lock(threading.RLock())  # its own is shared with children, and a killed one would keep it


COUNT, BATCH, SEED = 7, 3, 998  # over the border between two folders of pictures
LOSSES = "LEVEL = 1\ndef bright(image):\n    return (LEVEL - image).square().flatten(1).mean(1)\n"


def fake(indices):
    return [(b"picture %d " % index * 40, index / 7) for index in indices]


def go(folder, draw=fake, rank=0, world=1, finish=True):
    """What a process does in a large run, without a model."""
    with entered(folder) as (locks, alone):
        manifest = Manifest(folder, COUNT, SEED, BATCH, "abc", locks)
        manifest.check() if alone else manifest.refresh()
    try:
        for _ in manifest.work(draw, rank, world):
            pass
        if finish:
            with manifest.finishing():
                pass
    finally:
        leave(folder, locks)
    return manifest


def child(work):
    """The number of a process of its own that does some work."""
    number = os.fork()
    if number == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # the parent sees the status; pytest must not go on in the child
            import traceback

            traceback.print_exc()
            os._exit(1)
    return number


def ends(number):
    """How a child ended: its status, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def content(folder):
    """Every file and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("whole")
    go(folder)
    return content(folder)


def consistent(folder):
    """Every line that is whole lists a picture that is whole."""
    for line in (folder / "manifest.jsonl").read_bytes().split(b"\n")[1:]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        assert hashlib.sha256((folder / row["file"]).read_bytes()).hexdigest() == row["sha256"]


def test_a_run_leaves_its_pictures_and_an_exact_manifest(whole):
    found = dict(whole)
    header, *rows = map(json.loads, found.pop("manifest.jsonl").splitlines())
    assert header == {"pictures": 7, "first_seed": 998, "batch_size": 3, "settings": "abc"}
    assert [row["index"] for row in rows] == list(range(7)) and [row["seed"] for row in rows] == list(range(998, 1005))
    assert [row["loss"] for row in rows] == [i / 7 for i in range(7)]
    assert {row["file"]: row["sha256"] for row in rows} == {
        name: hashlib.sha256(data).hexdigest() for name, data in found.items()
    }
    assert set(found) >= {"pictures/0000/00999.png", "pictures/0001/01000.png"}


def test_a_kill_at_any_moment_loses_doubles_and_tears_nothing(tmp_path, whole):
    """A process is killed at its first, second ... call of the system that changes the disk, a write half done."""

    def killed_at(moment, folder):
        calls = 0

        def counted(name):
            real = getattr(os, name)

            def call(*args, **options):
                nonlocal calls
                calls += 1
                if calls == moment:
                    if name == "write":
                        real(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            setattr(os, name, call)

        for name in ("open", "write", "fsync", "replace", "mkdir", "unlink"):
            counted(name)
        go(folder)

    moment, left = 0, set()
    while True:
        moment += 1
        folder = tmp_path / str(moment)
        number = child(lambda: killed_at(moment, folder))  # noqa: B023
        if ends(number) == 0:
            break
        if (folder / "manifest.jsonl").exists():
            consistent(folder)
        left.add(len(list(folder.rglob("*.png"))))
        go(folder)
        assert content(folder) == whole, moment
        shutil.rmtree(folder)
    assert moment > 60 and left == set(range(8))


@pytest.mark.parametrize("room", [0, 50, 200, 700, 1500, 2000, 2400, 2700, 3100, 3500, 3900])
def test_a_full_disk_at_any_moment_leaves_what_is_done(tmp_path, monkeypatch, whole, room):
    left, real = room, os.write

    def write(handle, data):
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = bytes(data)[:left]
        left -= len(data)
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space"):
        go(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    if (tmp_path / "manifest.jsonl").exists():
        consistent(tmp_path)
        assert (tmp_path / "manifest.jsonl").read_bytes().endswith(b"\n")  # the append that failed is taken back
    monkeypatch.undo()
    go(tmp_path)
    assert content(tmp_path) == whole


FOREIGN = [
    b'{"index": 0, "seed": 998, "file": "../../etc/passwd", "sha256": "%s", "loss": 1.0}' % (b"0" * 64),
    b'{"index": 3, "seed": 4, "file": "pictures/0000/00004.png", "sha256": "%s", "loss": 1.0}' % (b"0" * 64),
    b'{"index": 1e300, "seed": 1}', b'{"index": true}', b'{"index": 99}', b"[" * 100_000, b"\xff\x00", b"7", b"null",
    b'{"index": 1, "seed": 999, "file": "pictures/0000/00999.png", "sha256": 5, "loss": "x"}',
]  # fmt: skip


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_manifest_that_is_cut_doubled_or_foreign_is_made_anew(tmp_path_factory, whole, data):
    folder = tmp_path_factory.mktemp("cut")
    for name, content_ in whole.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content_)
    text = whole["manifest.jsonl"]
    lines = text.split(b"\n")
    for line in data.draw(st.lists(st.sampled_from(lines + FOREIGN), max_size=4)):
        lines.insert(data.draw(st.integers(0, len(lines))), line)
    text = b"\n".join(lines)
    (folder / "manifest.jsonl").write_bytes(text[: data.draw(st.integers(0, len(text)))])
    for name in data.draw(st.lists(st.sampled_from([n for n in whole if n.endswith(".png")]), max_size=2)):
        picture = folder / name
        if picture.exists() and data.draw(st.booleans()):
            picture.write_bytes(picture.read_bytes()[: data.draw(st.integers(0, 400))])
        else:
            picture.unlink(missing_ok=True)
    go(folder)
    assert content(folder) == whole


def test_what_is_whole_is_not_drawn_again(tmp_path, whole):
    go(tmp_path)
    (tmp_path / "pictures/0000/00999.png").write_bytes(b"torn")
    drawn = []

    def draw(indices):
        drawn.append(indices)
        return fake(indices)

    stamp = (tmp_path / "pictures/0000/00998.png").stat().st_mtime_ns
    go(tmp_path, draw)
    assert drawn == [range(3)] and content(tmp_path) == whole  # the whole batch, for its composition
    assert (tmp_path / "pictures/0000/00998.png").stat().st_mtime_ns == stamp


def slowly(folder, pause=0.0, meet=False):
    """Draws that leave a line each, and then take some time, or wait until another process is at work, too."""

    def draw(indices):
        with (folder.parent / "log").open("a") as lines:
            lines.write(f"{os.getpid()} {indices.start}\n")
        time.sleep(pause)
        begun = time.monotonic()
        while meet and len({number for number, _ in log(folder)}) < 2 and time.monotonic() - begun < 60:
            time.sleep(0.01)
        return fake(indices)

    return draw


def log(folder):
    return [tuple(map(int, line.split())) for line in (folder.parent / "log").read_text().splitlines()]


def test_processes_share_a_run_and_draw_nothing_twice(tmp_path, whole):
    folder = tmp_path / "run"
    numbers = [child(lambda: go(folder, slowly(folder, meet=True), rank, 2)) for rank in (0, 1)]  # noqa: B023
    assert [ends(number) for number in numbers] == [0, 0]
    assert content(folder) == whole
    assert sorted(start for _, start in log(folder)) == [0, 3, 6]
    assert len({number for number, _ in log(folder)}) == 2


def test_those_left_take_up_the_share_of_one_that_dies(tmp_path, whole):
    folder = tmp_path / "run"
    dying = child(lambda: go(folder, slowly(folder, 60)))
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    other = child(lambda: go(folder, slowly(folder), 1, 2))
    while len(log(folder)) < 3:
        time.sleep(0.01)
    time.sleep(0.1)  # the other is done with its own, and waits
    os.kill(dying, signal.SIGKILL)
    assert ends(dying) == -signal.SIGKILL and ends(other) == 0
    assert content(folder) == whole and log(folder)[0] == (dying, 0) and log(folder)[-1] == (other, 0)


def test_nobody_clears_a_folder_where_another_is_at_work(tmp_path):
    folder = tmp_path / "run"
    number = child(lambda: go(folder, slowly(folder, 60)))
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    with pytest.raises(OSError, match="another process is at work"):
        manifests.cleared(folder)
    os.kill(number, signal.SIGKILL)
    ends(number)
    manifests.cleared(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["pictures", "pictures/0000", "manifest.jsonl", ".claims"])
def test_no_link_is_followed_out_of_the_folder(tmp_path, name):
    outside, folder = tmp_path / "outside", tmp_path / "run"
    (outside / "0000").mkdir(parents=True)
    (outside / "file").write_text("mine")
    (folder / "pictures").mkdir(parents=True)
    if name == "pictures":
        (folder / "pictures").rmdir()
    (folder / name).symlink_to(outside / "file" if "." in name else outside)
    with pytest.raises(OSError):
        go(folder)
    assert content(outside) == {"file": b"mine"} and not list((outside / "0000").iterdir())


def test_a_picture_that_is_a_link_is_replaced_and_not_followed(tmp_path, whole):
    folder, outside = tmp_path / "run", tmp_path / "outside.png"
    go(folder)
    picture = folder / "pictures/0000/00999.png"
    outside.write_bytes(picture.read_bytes())  # the right bytes, in the wrong place
    picture.unlink()
    picture.symlink_to(outside)
    partial = picture.with_name(".00999.png.partial")
    partial.symlink_to(outside)
    go(folder)
    assert content(folder) == whole and not picture.is_symlink() and not partial.is_symlink()
    outside.write_bytes(b"other")
    assert content(folder) == whole


def test_clear_takes_away_what_runs_write_and_nothing_else(tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    go(folder)
    outside.mkdir()
    (outside / "00001.png").write_text("mine")
    for name in ("notes.txt", "pictures/cat.png", "pictures/0000/cat.png", ".record.json", "12.png"):
        (folder / name).write_text("mine")
    (folder / "pictures" / "0002").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        clear(folder)
    (folder / "pictures" / "0002").unlink()
    clear(folder)
    assert set(content(folder)) == {"notes.txt", "pictures/cat.png", "pictures/0000/cat.png", ".record.json", "12.png"}
    assert (outside / "00001.png").exists()


def test_a_file_is_written_whole_over_what_a_kill_left(tmp_path):
    path = tmp_path / "a.png"
    (tmp_path / ".a.png.partial").write_bytes(b"half of another")
    path.write_bytes(b"before")
    files.write_whole(path, b"after")
    assert content(tmp_path) == {"a.png": b"after"}


# the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny stand-in for the demo."""
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4, attention_head_dim=4,
        )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    vp_scheduler(prediction_type="v_prediction", clip_sample=True).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "FOLDER", model)
    (tmp_path / "own.py").write_text(LOSSES)
    return tmp_path


ARGUMENTS = ("generate", "--loss", "own.py:bright", "--recipe", "mpgd", "--steps", "2", "--batch-size", "4", "-q")


def run(*arguments):
    return CliRunner().invoke(main, [*ARGUMENTS, *map(str, arguments)])


def works(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def fails(*arguments):
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.exception
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


def pictures(folder):
    return {name: data for name, data in content(folder).items() if name.endswith(".png") and "/" in name}


def test_the_command_keeps_many_pictures_one_by_one(place):
    result = works("--num-images", 70, "--seed", 5, "--out", "x", "--batch-size", 24)
    folder = place / "x"
    assert "mean of 64 of 70" in result.stdout and len(pictures(folder)) == 70
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.jsonl", "pictures", "record.json", "record.png", "settings.json", "sheet.png",
    ]  # fmt: skip
    _, *rows = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    assert [row["seed"] for row in rows] == list(range(5, 75))
    found = json.loads((folder / "settings.json").read_text())
    assert found["seeds"] == {"first": 5, "count": 70} and found["batch_size"] == 24
    assert found["results"]["loss"]["guided_all"] == pytest.approx(sum(row["loss"] for row in rows) / 70)
    assert found["results"]["loss"]["guided"] == pytest.approx(sum(row["loss"] for row in rows[:64]) / 64)
    assert len(json.loads((folder / "record.json").read_text())["rows"][0]["loss"]) == 24  # of the first batch
    command = shlex.split(found["command"])
    assert "--resume" not in command and "--overwrite" not in command
    assert CliRunner().invoke(main, command[1:]).exit_code == 0  # into a folder of its own
    assert content(place / "x-2")["manifest.jsonl"] == content(folder)["manifest.jsonl"]


def test_pictures_are_those_of_a_small_run(place):
    works("--num-images", 6, "--out", "small")
    works("--num-images", 6, "--out", "large", "--resume")
    small = {path.name: path.read_bytes() for path in (place / "small").glob("0*.png")}
    assert {Path(name).name: data for name, data in pictures(place / "large").items()} == small
    one, other = (json.loads((place / name / "settings.json").read_text()) for name in ("small", "large"))
    assert other["results"]["loss"]["unguided"] == one["results"]["loss"]["unguided"]
    assert other["results"]["loss"]["guided"] == pytest.approx(one["results"]["loss"]["guided"], rel=1e-6)


def test_resume_goes_on_and_says_when_nothing_is_left(place):
    works("--num-images", 10, "--resume", "--out", "x")
    before = content(place / "x")
    (place / "x" / "pictures" / "0000" / "00009.png").write_bytes(b"torn")
    (place / "x" / "sheet.png").unlink()
    assert "2 drawn" in works("--num-images", 10, "--resume", "--out", "x").stdout
    after = content(place / "x")
    assert {**after, "settings.json": b""} == {**before, "settings.json": b""}
    assert "nothing was left to draw" in works("--num-images", 10, "--resume", "--out", "x").stdout


def test_resume_refuses_another_run(place, model):
    works("--num-images", 6, "--resume", "--out", "x")
    before = content(place / "x")
    for change, told in {
        ("--steps", 3): "steps 2, and this one has 3",
        ("--seed", 1): "seed 0, and this one has 1",
        ("--num-images", 7): "num images 6, and this one has 7",
        ("--strength", 2): "strength 1.0, and this one has 2.0",
        ("--scheduler", "ddpm"): 'has scheduler "ddim", and this one has',
        ("--loss", "color:red"): "losses",
        ("--recipe", "dps"): 'recipe "mpgd", and this one has "dps"',
    }.items():
        assert told in fails("--num-images", 6, "--resume", "--out", "x", *change)
    (place / "own.py").write_text(LOSSES.replace("LEVEL - image", "0.999 * LEVEL - image"))
    assert "loss.0.source" in fails("--num-images", 6, "--resume", "--out", "x")
    (place / "own.py").write_text(LOSSES.replace("LEVEL = 1", "LEVEL = 0.9"))
    assert "on a test picture" in fails("--num-images", 6, "--resume", "--out", "x")
    (place / "own.py").write_text(LOSSES)
    demo.FOLDER = place / "other"
    shutil.copytree(model, demo.FOLDER)
    unet = UNet2DModel.from_pretrained(demo.FOLDER / "unet")
    with torch.no_grad():
        unet.conv_in.bias += 1e-3
    unet.save_pretrained(demo.FOLDER / "unet")
    assert "another model" in fails("--num-images", 6, "--resume", "--out", "x")
    assert content(place / "x") == before


def test_resume_knows_a_loss_of_ones_own_in_another_process(place, monkeypatch):
    works("--num-images", 6, "--resume", "--out", "x")
    monkeypatch.setattr(registry, "hash", lambda _: 7, raising=False)  # which is another number in every process
    works("--num-images", 6, "--resume", "--out", "x")


def test_resume_refuses_what_is_not_such_a_run(place):
    works("--num-images", 2, "--out", "small")
    assert "not kept picture by picture" in fails("--num-images", 2, "--resume", "--out", "small")
    works("--num-images", 6, "--resume", "--out", "x")
    settings = place / "x" / "settings.json"
    settings.write_text("{")
    assert "damaged" in fails("--num-images", 6, "--resume", "--out", "x")
    settings.unlink()
    assert "not the settings.json" in fails("--num-images", 6, "--resume", "--out", "x")
    (place / "own.json").write_text("{}")
    settings.symlink_to(place / "own.json")
    fails("--num-images", 6, "--resume", "--out", "x")
    assert (place / "own.json").read_text() == "{}"


def test_another_batch_size_goes_on_within_the_batches_of_the_run(place):
    works("--num-images", 10, "--resume", "--out", "x")
    before = content(place / "x")["manifest.jsonl"]
    shutil.rmtree(place / "x" / "pictures" / "0000")
    works("--num-images", 10, "--resume", "--out", "x", "--batch-size", 2)
    one, other = (list(map(json.loads, text.splitlines())) for text in (before, content(place / "x")["manifest.jsonl"]))
    assert one[0] == other[0]
    for first, second in zip(one[1:], other[1:]):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)


def test_nothing_is_overwritten_unless_it_is_asked_for(place):
    works("--num-images", 6, "--resume", "--out", "x")
    before = content(place / "x")
    (place / "x" / "notes.txt").write_text("mine")
    works("--num-images", 70, "--out", "x", "--steps", 1, "--batch-size", 35)
    assert len(pictures(place / "x-2")) == 70
    assert content(place / "x") == {**before, "notes.txt": b"mine"}
    works("--num-images", 65, "--out", "x", "--steps", 1, "--batch-size", 65, "--overwrite")
    assert len(pictures(place / "x")) == 65
    works("--num-images", 2, "--out", "x", "--steps", 1, "--overwrite")
    assert set(content(place / "x")) == {
        "00000.png", "00001.png", "notes.txt", "record.json", "record.png", "settings.json", "sheet.png",
    }  # fmt: skip
    told = fails("--num-images", 2, "--out", "x", "--overwrite", "--resume")
    assert "--resume goes on with the run in --out, and --overwrite takes it away" in told


def test_overwrite_takes_nothing_away_that_no_run_wrote(place):
    folder = place / "x"
    (folder / "pictures" / "0000").mkdir(parents=True)
    for name in ("00000.png", "pictures/0000/00007.png", "notes.txt"):
        (folder / name).write_text("mine")
    before = content(folder)
    few, many = ("--num-images", 2, "--out", "x", "--overwrite"), ("--num-images", 65, "--out", "x", "--overwrite")
    for arguments in (few, many):
        assert "is not of a run of lossguide" in fails(*arguments) and content(folder) == before
    assert "not the settings.json" in fails("--num-images", 6, "--out", "x", "--resume")
    for text in ('{"editor.tabSize": 4}', "[]", "{"):  # somebody else's
        (folder / "settings.json").write_text(text)
        assert "is not of a run of lossguide" in fails(*few)
    assert {**content(folder), "settings.json": b""} == {**before, "settings.json": b""}


def test_overwrite_knows_the_pictures_of_the_run_by_its_seeds(place):
    folder = place / "x"
    works("--num-images", 2, "--seed", 3, "--steps", 1, "--out", "x")
    (folder / "00009.png").write_text("mine")
    before = content(folder)
    assert "00009.png" in fails("--num-images", 2, "--seed", 9, "--out", "x", "--overwrite")
    assert content(folder) == before
    (folder / "00009.png").unlink()
    works("--num-images", 2, "--seed", 9, "--steps", 1, "--out", "x", "--overwrite")
    assert sorted(path.name for path in folder.glob("0*.png")) == ["00009.png", "00010.png"]
    works("--num-images", 6, "--resume", "--out", "y")
    (place / "y" / "settings.json").write_text("{")  # the manifest tells it, too
    (place / "y" / "pictures" / "0000" / "00006.png").write_text("mine")
    assert "00006.png" in fails("--num-images", 2, "--out", "y", "--overwrite")
    (place / "y" / "pictures" / "0000" / "00006.png").unlink()
    works("--num-images", 2, "--steps", 1, "--out", "y", "--overwrite")
    assert not (place / "y" / "pictures").exists() and not (place / "y" / "manifest.jsonl").exists()


def test_resume_refuses_another_source_or_map_of_the_same_name(place):
    def saved(name, level):
        Image.new("RGB", (8, 8), (level,) * 3).save(name)

    saved("source.png", 10)
    saved("map.png", 200)
    arguments = ("--num-images", 3, "--resume", "--out", "x", "--source", "source.png", "--change-map", "map.png")
    works(*arguments)
    works(*arguments)
    saved("source.png", 11)
    assert "has a source picture of its own, and this one has another" in fails(*arguments)
    saved("source.png", 10)
    saved("map.png", 201)
    assert "has a change map of its own, and this one has another" in fails(*arguments)
    saved("map.png", 200)
    works(*arguments)


def test_a_loss_of_ones_own_that_raises_only_here_is_told(place):
    text = "def bright(image):\n    if not image.requires_grad:\n        raise ValueError('no {}')\n"
    (place / "own.py").write_text(text + "    return image.flatten(1).mean(1)\n")
    told = fails("--num-images", 70, "--out", "x")
    assert "the loss 'bright' raised ValueError: no {} (own.py:3)" in told and not (place / "x").exists()


def test_a_rank_that_is_no_number_is_told(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert "RANK and WORLD_SIZE" in fails("--num-images", 3)


def test_a_command_killed_while_it_works_is_gone_on_with(place):
    works("--num-images", 30, "--resume", "--out", "x")
    number = child(lambda: run("--num-images", 30, "--resume", "--out", "y"))
    manifest = place / "y" / "manifest.jsonl"
    while not manifest.exists() or manifest.read_bytes().count(b"\n") < 9:
        time.sleep(0.005)
    os.kill(number, signal.SIGKILL)
    assert ends(number) == -signal.SIGKILL
    assert 8 <= manifest.read_bytes().count(b"\n") < 31 and (place / "y" / ".claims").exists()
    works("--num-images", 30, "--resume", "--out", "y")
    one, other = content(place / "x"), content(place / "y")
    assert set(one) == set(other) and pictures(place / "x") == pictures(place / "y")
    assert one["manifest.jsonl"] == other["manifest.jsonl"]


def test_ctrl_c_ends_with_what_is_done_and_how_to_go_on(place):
    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        sys.stderr = open("told", "w")  # noqa: SIM115
        sys.argv = ["lossguide", *ARGUMENTS, "--num-images", "400", "--out", "y"]
        try:
            main()
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)

    number = child(work)
    manifest = place / "y" / "manifest.jsonl"
    while not manifest.exists() or manifest.read_bytes().count(b"\n") < 9:
        time.sleep(0.005)
    os.kill(number, signal.SIGINT)
    assert ends(number) == 130
    told = (place / "told").read_text().split("\n\n")
    count = len(manifest.read_bytes().splitlines()) - 1
    assert told[-1] == "Stopped.\n" and told[-2].startswith(
        f"{count} of 400 pictures are done; to go on: lossguide gen"
    )
    assert not list((place / "y").rglob("*.partial")) and not (place / "y" / ".claims").exists()
    command = shlex.split(told[-2].split("to go on: ")[1])
    assert command[-1] == "--resume" or "--resume" in command
    consistent(place / "y")


def test_an_end_before_the_first_picture_leaves_nothing(place, monkeypatch):
    def draw(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli_model.PixelModel, "draw", draw)
    assert str(run("--num-images", 70, "--out", "x").exception) == "a bug"
    assert not (place / "x").exists()


def test_a_full_disk_is_told_in_one_sentence(place, monkeypatch):
    real, room = os.write, 3000

    def write(handle, data):
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data)

    works("--num-images", 30, "--resume", "--out", "x")
    works("--num-images", 4, "--out", "begun")  # whatever is loaded at the first use writes nothing later
    found = content(place / "x")
    room += sum(len(found[name]) for name in ("settings.json", "record.json", "record.png", "manifest.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        told = fails("--num-images", 30, "--resume", "--out", "y")
    assert "No space left on device" in told and "of 30 pictures are done and whole, and --resume goes on" in told
    works("--num-images", 30, "--resume", "--out", "y")
    assert pictures(place / "x") == pictures(place / "y")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_out_of_memory_halves_the_batch_and_goes_on(place, monkeypatch, error):
    real, sizes = cli_model.PixelModel.draw, []

    def draw(self, guidance, seeds, steps, batch_size, *args, **options):
        sizes.append(min(batch_size, len(seeds)))
        if sizes[-1] > most:
            raise error
        return real(self, guidance, seeds, steps, batch_size, *args, **options)

    works("--num-images", 12, "--resume", "--out", "x", "--batch-size", 8)
    monkeypatch.setattr(cli_model.PixelModel, "draw", draw)
    most = 3
    told = works("--num-images", 12, "--resume", "--out", "y", "--batch-size", 8).stderr
    assert sizes == [8, 4, 2, 2, 2] and "going on with 4" in told and "going on with 2" in told and "round-off" in told
    rows = [(place / name / "manifest.jsonl").read_text().splitlines() for name in "xy"]
    assert rows[0][0] == rows[1][0]  # the batches of the plan are the same
    for one, other in zip(rows[0][1:], rows[1][1:]):
        assert json.loads(one)["loss"] == pytest.approx(json.loads(other)["loss"], abs=1e-5)
    most = 0
    assert "does not hold a batch of 1" in run("--num-images", 12, "--resume", "--out", "z").stderr.splitlines()[-1]


def test_two_processes_give_the_pictures_of_one(place, monkeypatch):
    works("--num-images", 30, "--resume", "--out", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def part(rank):
        os.environ["RANK"] = str(rank)
        result = run("--num-images", 30, "--out", "y")  # --resume is meant
        assert result.exit_code == 0, result.stderr

    numbers = [child(lambda: part(rank)) for rank in (0, 1)]  # noqa: B023
    assert [ends(number) for number in numbers] == [0, 0]
    assert pictures(place / "x") == pictures(place / "y")
    assert content(place / "x")["manifest.jsonl"] == content(place / "y")["manifest.jsonl"]
    assert "--overwrite is of one process" in fails("--num-images", 30, "--out", "y", "--overwrite")
    monkeypatch.setenv("RANK", "2")
    assert "RANK" in fails("--num-images", 30, "--out", "y")


def test_a_text_pipeline_is_kept_too(place, tiny_clip):
    tiny_stable_diffusion().save_pretrained("text")
    text = ("--num-images", 3, "--batch-size", 1, "--model", "text", "--clip-model", tiny_clip, "--out")
    works("a b", *text, "small")
    works("a b", *text, "large", "--resume")
    small = {path.name: path.read_bytes() for path in (place / "small").glob("0*.png")}
    assert {Path(name).name: data for name, data in pictures(place / "large").items()} == small
    (place / "large" / "manifest.jsonl").unlink()
    works("a b", *text, "large", "--resume")
    assert {Path(name).name: data for name, data in pictures(place / "large").items()} == small


def test_each_process_of_a_launch_gets_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli_model.find_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cli_model.find_device("auto") == torch.device("cuda:1")


def test_memory_does_not_grow_with_the_pictures(place, monkeypatch):
    def draw(self, guidance, seeds, *_, **__):
        return torch.zeros(len(seeds), 3, 128, 128), Record()

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    monkeypatch.setattr(cli_model.PixelModel, "draw", draw)
    found, real = [], cli_large._Large._batch
    monkeypatch.setattr(cli_large._Large, "_batch", lambda self, one: [found.append(resident()), real(self, one)][1])
    works("--num-images", 400, "--out", "x")
    assert len(found) == 100 and found[-1] - found[40] < 15  # MiB; the pictures of these batches are 45


def test_differences_are_named():
    difference = cli_agreed.difference
    assert difference({"a": 1}, {"a": 1}) is None
    assert difference({"options": {"num_images": 1}}, {"options": {"num_images": 2}}) == ("num images 1", "2")
    assert difference({"a": [{"b": 1}]}, {"a": [{"b": 2}]}) == ("a.0.b 1", "2")
    assert difference({"a": 1, "new": 2}, {"a": 1}) == ("new 2", "null")


def test_a_folder_whose_first_picture_had_no_room_goes_with_the_run(tmp_path):
    settings = {"command": "lossguide generate", "options": {}, "seeds": {"first": 0, "count": 24}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    for part in ("0000", "mine"):
        (tmp_path / "pictures" / part).mkdir(parents=True)
    clear(tmp_path)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["mine"]
