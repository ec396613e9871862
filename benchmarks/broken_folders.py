"""Folders of models and results that are broken or made to do harm, and names of such, for `benchmarks.broken`."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from click.testing import CliRunner
from lossguide.guidance.cli import main
from lossguide.guidance.manifest import Manifest, entered, leave
from lossguide.losses import demo

from .broken_data import MARKER, Bomb, Files, changed, jsons, laid, saved_by_torch
from .broken_entry import READ, Entry

MINE = b"mine"  # what a user's own files hold; they are there afterwards, whatever was done
Makes = Callable[[Path], Path] | Files


def _all(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@functools.cache
def _saved(what: str) -> Files:
    """The files of a model or of a run, as they should be."""
    with tempfile.TemporaryDirectory() as place, torch.random.fork_rng():
        folder = Path(place) / "folder"
        torch.manual_seed(0)
        if what == "drawn":
            command = ("generate", "ankle boot", "--num-images", "2", "--steps", "1", "--resume", "-q", "--out")
            CliRunner().invoke(main, [*command, str(folder)], catch_exceptions=False)
        elif what == "run":
            (folder / "pictures").mkdir(parents=True)
            with entered(folder) as (locks, _):
                manifest = Manifest(folder, 2, 0, 2, "settings", locks)
                manifest.check()
                manifest.add(range(2), [(b"a picture", 1.0), (b"another", 2.0)])
            leave(folder, locks)
            options = {"command": "lossguide generate", "options": {}, "seeds": {"first": 0, "count": 2}}
            (folder / "settings.json").write_text(json.dumps(options), encoding="utf-8")
        elif what == "journal":
            import optuna
            from optuna.storages.journal import JournalFileBackend

            folder.mkdir()
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "journal.log")))
            study = optuna.create_study(storage=storage, study_name="tune")
            study.enqueue_trial({"strength": 1.0})
            study.tell(study.ask({"strength": optuna.distributions.FloatDistribution(0.1, 10.0)}), 1.0)
        elif what == "model":
            from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

            unet = UNet2DModel(
                sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,),
                down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
                attention_head_dim=4,
            )  # fmt: skip
            DDIMPipeline(unet, DDIMScheduler(clip_sample=True)).save_pretrained(folder)
        elif what == "network":
            from transformers import GLPNConfig, GLPNForDepthEstimation

            config = GLPNConfig(
                num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
                strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
            )  # fmt: skip
            GLPNForDepthEstimation(config).save_pretrained(folder)
        else:
            folder = Path(demo.clip_folder())
        return _all(folder)


def _code(place: Path) -> bytes:
    """A file of Python that would leave a mark, and has what it is asked for."""
    return f"open({str(place / MARKER)!r}, 'w').close()\nclass Evil:\n    pass\nEvilConfig = Evil\n".encode()


def _with(files: Files, name: str, make: Callable[[Path], None]) -> Callable[[Path], Path]:
    """The same folder with something else in the place of one of its files."""

    def build(place: Path) -> Path:
        folder = laid(place, {key: data for key, data in files.items() if not f"{key}/".startswith(f"{name}/")})
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make(folder / name)
        return folder

    return build


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _linked(path: Path) -> None:
    """A link that leads out of the folder, to a file or folder of the user's."""
    outside = path.parents[len(path.parts) - 1 - path.parts.index("folder")] / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "file").write_bytes(MINE)
    path.symlink_to(outside / "file" if "." in path.name else outside)


# ---- models ----------------------------------------------------------------------------------------------------------


def _models() -> Iterator[tuple[str, Makes, str]]:
    files, index, weights = _saved("model"), "model_index.json", "unet/diffusion_pytorch_model.safetensors"
    put = lambda name, *path, value: changed(files, name, *path, value=value)
    no_code = "and that is not run"
    state = {"weight": torch.zeros(1)}
    pickled = {key: data for key, data in files.items() if key != weights}
    old = "unet/diffusion_pytorch_model.bin"
    yield "as it was saved", files, READ
    yield "weights by torch.save", lambda place: laid(place, pickled | {old: _as_bin(files[weights])}), READ
    bomb = lambda place: laid(place, pickled | {old: saved_by_torch(state | {"x": Bomb(place)})})
    yield "a bomb for weights", bomb, "cannot be loaded"
    evil = put(index, "_class_name", value=["evil", "Evil"])
    yield "a pipeline of its own", lambda place: laid(place, evil | {"evil.py": _code(place)}), "is not run"
    evil_part = put(index, "unet", value=["evil", "Evil"])
    yield "a network of its own", lambda place: laid(place, evil_part | {"unet/evil.py": _code(place)}), no_code
    asks = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    auto = put(index, "unet", value=["transformers", "AutoTokenizer"]) | {
        "unet/tokenizer_config.json": json.dumps(asks).encode()
    }
    yield "a tokenizer of its own", lambda place: laid(place, auto | {"unet/evil.py": _code(place)}), no_code
    yield "a class of Python's own", put(index, "unet", value=["subprocess", "Popen"]), no_code
    yield "a pipeline within", lambda place: laid(
        place, put(index, "unet", value=["diffusers", "DiffusionPipeline"])
        | {"unet/model_index.json": b'{"_class_name": ["evil", "Evil"]}', "unet/evil.py": _code(place)}
    ), "is not run"  # fmt: skip
    for name, data, _ in list(jsons(files[index])):
        if name in ("empty", "cut in half", "100000 brackets", "Latin-1", "a pickle"):
            yield f"description: {name}", files | {index: data}, "cannot be loaded"
            yield f"network's description: {name}", files | {"unet/config.json": data}, "cannot be loaded"
    yield "description: a list", files | {index: b"[]"}, "cannot be loaded"
    yield "a network of another kind", put("unet/config.json", "in_channels", value="three"), "cannot be loaded"
    yield "weights of another shape", put("unet/config.json", "block_out_channels", value=[16]), "cannot be loaded"
    yield "half of the weights", files | {weights: files[weights][:5000]}, "cannot be loaded"
    yield "weights that are none", files | {weights: b"\xff" * 64}, "cannot be loaded"
    yield "no weights", pickled, "cannot be loaded"
    yield "a pipe for weights", _with(files, weights, _pipe), "neither a file nor a folder"
    yield "a pipe for a description", _with(files, "unet/config.json", _pipe), "neither a file nor a folder"
    schedule = "scheduler/scheduler_config.json"
    yield "levels that are texts", put(schedule, "beta_start", value="a"), "cannot be loaded"
    yield "no levels at all", put(schedule, "num_train_timesteps", value=0), "makes at most 0 steps"
    yield "a schedule that there is none of", put(schedule, "beta_schedule", value="evil"), "cannot be loaded"


def _as_bin(weights: bytes) -> bytes:
    from safetensors.torch import load

    return saved_by_torch(load(weights))


def _networks() -> Iterator[tuple[str, Makes, str]]:
    files, prep = _saved("network"), "preprocessor_config.json"
    says, weights = "could not be loaded by AutoModelForDepthEstimation", "model.safetensors"
    good = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    yield "as it was saved", files | {prep: json.dumps(good).encode()}, READ
    evil = json.loads(files["config.json"]) | {"model_type": "evil"}
    evil["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForDepthEstimation": "evil.Evil"}
    own = files | {"config.json": json.dumps(evil).encode()}
    yield "code of its own", lambda place: laid(place, own | {"evil.py": _code(place)}), says
    rest = {key: data for key, data in files.items() if key != weights}
    bomb = lambda place: laid(place, rest | {"pytorch_model.bin": saved_by_torch({"x": Bomb(place)})})
    yield "a bomb for weights", bomb, says
    yield "a pipe for weights", _with(files, weights, _pipe), says
    yield "half of the weights", files | {weights: files[weights][:3000]}, says
    for name, data, told in list(jsons(json.dumps(good).encode())):
        yield f"preprocessing: {name}", files | {prep: data}, told
    yield "preprocessing: a list", files | {prep: b"[]"}, "does not describe an image processor"
    for key, value in (
        ("image_mean", ["a", "b", "c"]),
        ("image_mean", 0.5),
        ("image_std", [0, 0, 0]),
        ("image_std", [1, 1]),
        ("size", 10**9),
        ("size", -1),
        ("size", {"height": 32}),
        ("size", [[1]]),
        ("size", "large"),
    ):
        bad = files | {prep: json.dumps(good | {key: value}).encode()}
        yield f"preprocessing: {key} {value}", bad, "the preprocessing of the network in"


def _clips() -> Iterator[tuple[str, Makes, str]]:
    files, config, weights = _saved("clip"), "open_clip_config.json", "open_clip_model.safetensors"
    files = {name: files[name] for name in (config, weights)}
    says = "could not be loaded"
    put = lambda *path, value: changed(files, config, *path, value=value)
    yield "as it was saved", files, READ
    for name, data, _ in jsons(files[config]):
        if name in ("empty", "cut in half", "100000 brackets", "Latin-1", "a pickle"):
            yield name, files | {config: data}, says
    yield "a list", files | {config: b"[]"}, says
    yield "texts for numbers", put("model_cfg", "vision_cfg", "width", value="wide"), says
    yield "weights of another width", put("model_cfg", "embed_dim", value=8), says
    yield "half of the weights", files | {weights: files[weights][:100_000]}, says
    yield "a pipe for weights", _with(files, weights, _pipe), says
    bomb = lambda place: laid(
        place, {config: files[config], "open_clip_pytorch_model.bin": saved_by_torch({"x": Bomb(place)})}
    )
    yield "a bomb for weights", bomb, says
    auto = {"auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}, "model_type": "evil"}

    def tower(place: Path) -> Path:
        evil = put("model_cfg", "text_cfg", "hf_model_name", value=str(place / "folder"))
        return laid(place, evil | {"config.json": json.dumps(auto).encode(), "evil.py": _code(place)})

    yield "a text network of its own", tower, says


# ---- results ---------------------------------------------------------------------------------------------------------


def _runs() -> Iterator[tuple[str, Makes, str]]:
    """Folders that `--resume` is told to go on in."""
    files = _saved("drawn")
    settings, listed, picture = "settings.json", "manifest.jsonl", "pictures/0000/00000.png"
    lines = files[listed].splitlines(keepends=True)
    first = json.loads(lines[1])
    yield "as it was left", files, READ
    for name, data, _ in jsons(files[settings]):
        says = "Larger than the" if name == "17 MB" else "is damaged, and without it"
        yield f"settings: {name}", files | {settings: data}, says
    yield "settings: a list", files | {settings: b"[]"}, "is damaged, and without it"
    yield "settings: another batch size", changed(files, settings, "batch_size", value="2"), "not kept picture by"
    yield "settings: another run", changed(files, settings, "run", value={"options": {"steps": 9}}), "and this one has"
    for name, what in (("a pipe", _pipe), ("a link", _linked), ("a folder", Path.mkdir)):
        yield f"settings: {name}", _with(files, settings, what), "settings.json"
        yield f"manifest: {name}", _with(files, listed, what), "manifest.jsonl"
        yield f"locks: {name}", _with(files, ".claims", what), ".claims"
        if name != "a folder":
            yield f"pictures: {name}", _with(files, "pictures", what), "should be a folder of this run"
            yield f"numbered folder: {name}", _with(files, "pictures/0000", what), "should be a folder of this run"
            yield f"picture: {name}", _with(files, picture, what), READ
    yield "picture: a folder", _with(files, picture, Path.mkdir), "00000.png"
    yield "picture: 2 GB of zeros", _with(files, picture, lambda path: _zeros(path, 2 << 30)), READ
    yield "manifest: 2 GB of zeros", _with(files, listed, lambda path: _zeros(path, 2 << 30)), "Larger than the"
    for name, text in (
        ("empty", b""),
        ("binary", b"\xff\0" * 500),
        ("no line is whole", lines[0][:20]),
        ("a picture outside", _line(first, file="../outside/file.png")),
        ("a picture anywhere", _line(first, file="/etc/passwd")),
        ("a NUL in a name", _line(first, file="pictures/0000/0\0.png")),
        ("a line within a name", _line(first, file="pictures/0000/00000.png\n")),
        ("a picture that is not in the plan", _line(first, index=10**30)),
        ("a loss that is not a number", _line(first, loss=float("nan"))),
        ("a digest of another kind", _line(first, sha256=["a"])),
        ("100000 brackets", b"[" * 100_000),
    ):
        yield f"manifest: {name}", files | {listed: lines[0] + text if name != "empty" else text}, READ


def _line(entry: dict, **changes) -> bytes:
    return json.dumps(entry | changes).encode() + b"\n"


def _zeros(path: Path, count: int) -> None:
    """A file that takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(count)


def _overwritten() -> Iterator[tuple[str, Makes, str]]:
    """Folders that `--overwrite` is told to take."""
    files, says = _saved("run"), "is not of a run of lossguide"
    yield "as it was left", files, READ
    yield "somebody else's picture", {"00000.png": MINE}, says
    yield "a picture that the run did not draw", files | {"pictures/0000/00007.png": MINE}, says
    yield "a picture of the same number", files | {"pictures/0000/000001.png": MINE}, says
    yield "a picture in another numbered folder", files | {"pictures/0007/00001.png": MINE}, says
    yield "a picture of Arabic digits", files | {"pictures/0000/٠٠٠٠١.png": MINE, "٠٠٠٠١.png": MINE}, READ
    yield "other files beside", files | {"notes.txt": MINE, "pictures/cat.png": MINE, "pictures/0000/cat": MINE}, READ
    yield "settings of an editor", {"settings.json": b'{"tabSize": 4}', "sheet.png": MINE}, says
    yield "locks of others", files | {".claims": MINE}, "Not a file of locks"
    null = changed(files, "settings.json", "seeds", value=[None, 7])
    yield "settings of no seeds", {"settings.json": null["settings.json"], "000007.png": MINE}, says
    for name, what in (("pictures", "a symbolic link"), ("pictures/0000", "a symbolic link"), ("manifest.jsonl", says)):
        yield f"a link: {name}", _with({} if "." in name else files, name, _linked), what
    yield "a link: picture", _with(files, "pictures/0000/00001.png", _linked), READ


def _outs() -> Iterator[tuple[str, Callable[[Path], Path], str]]:
    """What `--out` may be told."""

    def link(target: str) -> Callable[[Path], Path]:
        def build(place: Path) -> Path:
            (place / "outside").mkdir()
            (place / "x").symlink_to(place / target)
            return place / "x"

        return build

    def file(place: Path) -> Path:
        (place / "x").write_bytes(MINE)
        return place / "x"

    def pipe(place: Path) -> Path:
        os.mkfifo(place / "x")
        return place / "x"

    yield "a folder that is not there", lambda place: place / "x", READ
    yield "a file", file, "file"
    yield "below a file", lambda place: file(place) / "y", "should be a folder for results, and it is a file"
    yield "a pipe", pipe, "file"
    yield "a link to a folder", link("outside"), READ  # which the user has named
    yield "a link to nothing", link("none"), "should be a folder for results, and it is a link to nothing"
    yield "a link to itself", link("x"), "should be a folder for results, and it is a link to nothing"
    yield "a NUL in the name", lambda place: place / "x\0y", "holds a NUL"
    yield "a name of 5000 letters", lambda place: place / ("x" * 5000), "File name too long"
    yield "pictures of the user's", lambda place: laid(place, {"00000.png": MINE, "sheet.png": MINE}), READ
    yield "a sheet that leads out", _with({}, "sheet.png", _linked), READ


PROMPTS = {
    "a way out": "../../outside/bag",
    "an absolute way": "/tmp/outside/bag",
    "dots": "bag .. . ...",
    "an empty name after all": "bag" + "/" * 40,
    "emoji": "👜 bag 👜",
    "other scripts": "bag 鞄 сумка ٠١",
    "right to left": "\u202egab\u202c bag",
    "lines and tabs": "a bag\n\t\r\n on a table",
    "an escape sequence": "bag \x1b[31m\x07",
    "a NUL": "bag \0 of nothing",
    "half a character": "bag \udcff",
    "letters that grow": "bag " + "İ" * 20,
    "letters of four bytes": "bag " + "𝒜" * 20,
    "300 words": "bag " + "of " * 300,
    "options": "--bag; rm -rf $HOME",
}


def _journals() -> Iterator[tuple[str, Makes, str]]:
    """Folders that a search is told to go on in."""
    damaged = "is damaged"
    yield "no folder yet", {}, READ
    yield "nothing in the journal", {"journal.log": b""}, READ
    yield "half of a line", {"journal.log": b'{"op_code": 0, "worker'}, READ
    for name, text in (
        ("not JSON", b"nonsense\n"),
        ("a list", b"[]\n"),
        ("100000 brackets", b"[" * 100_000 + b"\n"),
        ("no code", b"{}\n"),
        ("a code that there is none of", b'{"op_code": 99, "worker_id": "a"}\n'),
        ("code", b'{"op_code": "__import__(\'os\')", "worker_id": "a"}\n'),
        ("a study of no directions", b'{"op_code": 0, "worker_id": "a", "study_name": "tune"}\n'),
        ("binary", b"\xff\xfe\n"),
    ):
        yield name, {"journal.log": text}, damaged
    yield "a trial of which nothing else is told", _saved("journal"), damaged
    for name in ("journal.log", "trials.json", "best.json", "history.png"):
        yield f"a link: {name}", _with({"journal.log": b""}, name, _linked), "is a link or no file"
        yield f"a pipe: {name}", _with({"journal.log": b""}, name, _pipe), "is a link or no file"
    yield "somebody else's best.json", {"best.json": MINE}, "is not of a search"


KINDS = {
    "model": _models,
    "network": _networks,
    "clip": _clips,
    "run": _runs,
    "overwrite": _overwritten,
    "out": _outs,
    "journal": _journals,
}


def entries(kind: str) -> list[Entry]:
    """Those of a kind."""
    return [
        Entry(name, kind, makes if callable(makes) else functools.partial(laid, files=makes), says)
        for name, makes, says in KINDS[kind]()
    ]
