"""Files and names that are broken, odd or made to do harm: each is read, or refused in one sentence, and nothing else.

The corpus is that of `python -m benchmarks run broken`, which gives all of it to the command line, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from lossguide.guidance import cli_output
from lossguide.guidance.cli import main
from lossguide.guidance.cli_model import check_index
from lossguide.losses import images, read_image, reading
from lossguide.losses.images import read_opacity
from lossguide.losses.network import FrozenNetwork, read_weights
from PIL import Image

from benchmarks import broken, broken_data
from benchmarks.broken import ask_reader, corpus, faults, look
from benchmarks.broken_entry import READ

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the corpus has pipes and processes of Unix")

KINDS = [kind for kind in broken.KINDS if kind != "run"]  # see tests/test_large_runs.py, with a model that is quick
ENTRIES = corpus(*KINDS) if hasattr(os, "fork") else []
CORPUS = {entry.id: entry for entry in ENTRIES}
READ_HERE = [name for name, entry in CORPUS.items() if entry.kind in broken.READERS]


@contextlib.contextmanager
def in_time(seconds=5):
    """What takes longer is ended by an error, as where a pipe is waited for."""

    def late(*_):
        raise AssertionError(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READ_HERE)
def test_it_is_read_or_refused_in_a_sentence(name, tmp_path):
    entry = CORPUS[name]
    given = entry.build(tmp_path)
    with in_time():
        answer = ask_reader(entry, given)
    assert not answer.fault, answer
    assert not list(tmp_path.rglob(broken_data.MARKER)), "code was run"


def test_the_corpus_is_large_and_each_entry_has_a_name_of_its_own():
    assert len(CORPUS) == len(ENTRIES) >= 60
    assert 20 <= sum(entry.says == READ for entry in CORPUS.values()) <= len(CORPUS) / 2


@pytest.mark.parametrize(
    "name",
    [
        "picture: a pipe",
        "picture: 50000 x 50000 in 1 KB",
        "picture: EPS that is called .png",
        "weights: a bomb by torch.save",
        "codebook: an encoder that is code",
        "tuned: {'loss': 'own.py:bright'}",
        "model: a network of its own",
        "clip: a text network of its own",
        "overwrite: a picture of the same number",
        "overwrite: a link: pictures",
        "out: a link to nothing",
        "journal: a pipe: journal.log",
        "journal: a link: best.json",
        "prompt: an absolute way",
    ],
)
def test_the_command_line_answers_alike_and_touches_nothing_else(name):
    found = look(CORPUS[name], readers=False)
    assert found.answers and not faults(found), (found.answers, found.faults)


def test_the_benchmark_sees_what_goes_wrong(tmp_path, monkeypatch):
    """A reader that raises something else, reads what it should not, waits, runs code or writes outside is found."""
    entry = CORPUS["weights: a list"]

    def told(reader):
        monkeypatch.setitem(broken.READERS, "weights", reader)
        return " ".join(faults(look(entry, commands=False)))

    assert "RuntimeError: boom" in told(lambda path: (_ for _ in ()).throw(RuntimeError("boom")))
    assert "it was read" in told(lambda path: None)
    assert "another answer" in told(lambda path: (_ for _ in ()).throw(ValueError("no")))
    assert "code was run" in told(lambda path: (path.parent / broken_data.MARKER).touch())
    assert "changed: given/a.pth" in told(lambda path: path.write_text("else"))
    assert "its process ended with -9" in told(lambda path: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(broken, "SLOW", 0.05)
    assert "Python took 0.1 s" in told(lambda path: time.sleep(0.1))


# ---- what is read, is read right -----------------------------------------------------------------------------------


def test_unusual_pictures_have_the_right_values(tmp_path):
    def pixels(name):
        path = CORPUS[f"picture: {name}"].build(tmp_path / name)
        return read_image(path)

    def values(name):
        (tmp_path / name).mkdir()
        return pixels(name)

    expected = torch.tensor([0, 1000 / 65535, 1]).expand(3, 1, 3)
    torch.testing.assert_close(values("16 bits"), expected)
    torch.testing.assert_close(values("16 bits, big-endian")[0, 0], torch.tensor([0, 0x8000 / 65535]))
    torch.testing.assert_close(values("floats")[0, 0], torch.tensor([0, 0.25, 1]))
    first = values("animated PNG")
    assert first.shape == (3, 8, 12)
    assert torch.equal(first, values("TIFF of three pages")) and torch.equal(first, values("a name of odd characters"))
    turned, mirrored = values("turned by EXIF"), values("mirrored by EXIF")
    plain = values("an impossible turn by EXIF")
    assert torch.equal(turned, plain.rot90(-1, (1, 2))) and torch.equal(mirrored, plain.flip(2))
    assert values("animated WebP").shape == values("a phone's two pictures (MPO)").shape == (3, 8, 12)


def test_opacity(tmp_path):
    alpha = np.array([[0, 127, 128, 255]], np.uint8)
    image = Image.new("RGB", (4, 1), "red")
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "a.png")
    torch.testing.assert_close(read_opacity(tmp_path / "a.png"), torch.from_numpy(alpha) / 255)
    assert read_opacity(Image.new("RGB", (4, 1))) is None
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert read_opacity(tmp_path / "turned.png").shape == read_image(tmp_path / "turned.png").shape[1:] == (4, 1)


def test_the_limit_of_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGEST", 12)
    Image.new("1", (4, 3)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (3, 3, 4)
    Image.new("1", (13, 1)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="has more than 12 pixels"):
        read_image(tmp_path / "b.png")
    assert read_image(Image.new("L", (13, 1))).shape == (3, 1, 13)  # which is in memory already
    with pytest.raises(ValueError, match="at least one pixel"):
        read_image(torch.zeros(3, 0, 4))


# ---- JSON and weights ----------------------------------------------------------------------------------------------


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"a": [1, -2.5, None, True, "ü 🧦"], "b": {"c": 2**64 - 1, "d": -(2**63), "e": 1e308}}
    (tmp_path / "a.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    assert reading.read_json(tmp_path / "a.json") == value
    for text in (b"18446744073709551616", b"-9223372036854775809"):
        with pytest.raises(ValueError, match="too large"):
            reading.parse_json(text)
    with pytest.raises(ValueError, match="it has more than 3 bytes"):
        reading.read_json(tmp_path / "a.json", limit=3)


def test_weights_come_back_as_they_were_saved(tmp_path):
    state = {"a": torch.rand(3, 4).T, "b": torch.arange(3), "c": torch.zeros(0), "d": torch.rand(8)[2:5]}
    torch.save(state, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth", "a head")
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


def test_other_libraries_make_tensors_only(tmp_path, monkeypatch):
    torch.save({"x": broken_data.Bomb(tmp_path)}, tmp_path / "a.pth")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with reading.no_code(), pytest.raises(Exception, match=r"[Ww]eights.only"):
        torch.load(tmp_path / "a.pth", weights_only=False)
    assert not (tmp_path / broken_data.MARKER).exists() and os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.load(tmp_path / "a.pth", weights_only=False)["x"].close()
    assert (tmp_path / broken_data.MARKER).exists(), "that it was a bomb"


def test_a_pipeline_s_parts_are_of_known_libraries():
    parts = {"unet": ["diffusers", "UNet2DModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    more = {"safety_checker": [None, None], "sizes": [1, 2], "checker": ["stable_diffusion", "Checker"]}
    own = {
        "scheduler": ["lossguide.samplers.multivariate", "MultivariateScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    check_index({"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30", **parts, **more, **own})
    for bad in (["my_unet", "Unet"], ["os", "system"], ["transformers", "AutoModel"], [None, "Unet"]):
        with pytest.raises(ValueError, match="its unet is .* which may be code of its own"):
            check_index({"_class_name": "DDPMPipeline", "unet": bad})


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": (1, 2, 3)},
        {"size": (8,)},
        {"size": 10**6},
        {"mean": (float("nan"),) * 3},
        {"std": (0, 1, 1)},
        {"mean": (1, 2)},
    ],
)
def test_the_preprocessing_of_a_network_is_looked_at(wrong):
    with pytest.raises(ValueError, match=f"a network's {next(iter(wrong))} is"):
        FrozenNetwork(lambda image: image, **wrong)


# ---- several threads ------------------------------------------------------------------------------------------------


def test_what_holds_for_the_process_ends_with_the_last_of_several_threads(monkeypatch):
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(name, raising=False)
    inside, go = threading.Event(), threading.Event()

    def second():
        with reading.no_code():
            inside.set()
            go.wait(5)

    thread = threading.Thread(target=second)
    with reading.no_code():
        thread.start()
        assert inside.wait(5)
    assert os.environ[name] == "1"  # the other is still at it
    go.set()
    thread.join()
    assert name not in os.environ


def test_a_picture_is_read_without_a_change_of_what_warnings_are_shown(tmp_path, monkeypatch):
    """Python's own way to silence them is the whole process's, and threads leave it as another found it."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    seen = []
    monkeypatch.setattr(images, "_to_tensor", lambda image: seen.append(list(warnings.filters)) or torch.zeros(3, 4, 4))
    read_image(tmp_path / "a.png")
    assert seen == [list(warnings.filters)]


def test_a_full_memory_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    def full(image):
        raise MemoryError

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "_to_tensor", full)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")


def test_json_may_name_a_file_whose_name_is_not_utf_8():
    name = os.fsdecode(b"caf\xe9")
    assert reading.parse_json(json.dumps({"out": name}).encode()) == {"out": name}
    with pytest.raises(ValueError, match="UTF-8"):
        reading.parse_json(b'"\\ud800"')  # which is no such byte


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", broken.PROMPTS)
def test_a_prompt_s_folder_is_one_within_the_folder_of_results(name):
    folder = cli_output.default_folder(broken.PROMPTS[name])
    assert folder.parts[0] == cli_output.PARENT and len(folder.parts) == 2 and ".." not in folder.parts
    assert len(os.fsencode(folder.name)) < 250 and folder.name.isprintable()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "x").mkdir(mode=0o500)
    with (
        pytest.raises(PermissionError, match="cannot be written to; choose another with --out"),
        cli_output.results_folder(tmp_path / "x"),
    ):
        pass


def test_a_sentence_shows_nothing_that_a_terminal_would_follow(tmp_path, monkeypatch):
    from click.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["restore", "a\x1b[31m\n\x07\udcff.png", "--task", "deblur"])
    assert result.exit_code == 2 and "there is no picture" in result.stderr
    assert result.stderr.strip().isprintable() and result.stderr.count("\n") == 1
