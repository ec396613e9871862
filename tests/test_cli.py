"""The command line: what each command writes, that its own command gives the same again, and how bad input is told."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from lossguide.guidance import cli_job, cli_model, cli_output, cli_restore, contact_sheet, recipes
from lossguide.guidance.cli import main
from lossguide.guidance.steps import UnsuitableSolver
from lossguide.losses import demo as words
from lossguide.losses import read_image, registry
from lossguide.samplers import demo
from lossguide.samplers.change import UnsuitableChange
from models import tiny_stable_diffusion, vp_scheduler
from PIL import Image

LOSSES = """
def bright(image):
    return (1 - image).square().flatten(1).mean(1)

def single(image):
    return image.mean()

def broken(image):
    return {}["eyes"]

def unconnected(image):
    return image.detach().flatten(1).mean(1)
"""


def unet(channels, side):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=side, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8,),
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4, attention_head_dim=4,
        )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models: the demo's stand-in (grey, 32 pixels), a pixel pipeline in colour, Stable Diffusion."""
    folder = tmp_path_factory.mktemp("models")
    unet(1, 32).save_pretrained(folder / "grey" / "unet")
    vp_scheduler(prediction_type="v_prediction", clip_sample=True).save_pretrained(folder / "grey" / "scheduler")
    DDIMPipeline(unet(3, 16), vp_scheduler(clip_sample=True)).save_pretrained(folder / "pixels")
    tiny_stable_diffusion().save_pretrained(folder / "text")
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, models):
    """An empty working directory with a file of losses, and the stand-in for the demo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "FOLDER", models / "grey")
    (tmp_path / "own.py").write_text(LOSSES)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def works(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def fails(*arguments):
    """The one sentence that bad input gets."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.exception
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1 and result.stdout == ""
    return result.stderr


QUICK = ("--steps", 3, "--num-images", 2, "-q")
BRIGHT = ("--loss", "own.py:bright")


def pictures(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("0*.png"))}


def test_generate_writes_pictures_sheet_record_and_the_command_that_gives_the_same_again(place):
    result = works("generate", *BRIGHT, *QUICK, "--steps", 10, "--seed", 7, "--out", "made")
    folder = place / "made"
    assert sorted(file.name for file in folder.iterdir()) == [
        "00007.png", "00008.png", "record.json", "record.png", "settings.json", "sheet.png",
    ]  # fmt: skip
    assert Image.open(folder / "00007.png").size == (32, 32)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["seeds"] == [7, 8] and settings["guidance"]["name"] == "auto" and settings["versions"]["torch"]
    assert settings["results"]["loss"]["guided"] < settings["results"]["loss"]["unguided"]
    assert len(json.loads((folder / "record.json").read_text())["rows"]) >= 3
    assert re.search(r"loss \S+ -> \S+ ", result.stdout) and "made/sheet.png" in result.stdout

    again = shlex.split(settings["command"])
    assert again[:2] == ["lossguide", "generate"]
    works(*again[1:])
    assert (place / "made-2").is_dir() and pictures(place / "made-2") == pictures(folder)


def test_settings_of_a_recipe_are_set_and_told_in_the_command(place):
    own = ("--recipe", "tfg", "--set", "rho=0.5", "--set", "mu_schedule=constant", "--set", "stop=0.9")
    works("generate", *BRIGHT, *QUICK, *own, "--steps", 3, "--out", "made")
    settings = json.loads((place / "made" / "settings.json").read_text())
    guidance = settings["guidance"]
    assert guidance["rule"]["rules"][0]["size"] == 0.5 and guidance["stop"] == 0.9
    assert guidance["inner"]["rule"]["schedule"] == "constant"
    assert "--set rho=0.5 --set mu_schedule=constant --set stop=0.9" in settings["command"]
    works(*shlex.split(settings["command"])[1:])
    assert pictures(place / "made-2") == pictures(place / "made")


def test_the_pictures_do_not_depend_on_the_batch(place):
    works("generate", *BRIGHT, "--steps", 3, "--num-images", 3, "-q", "--out", "a")
    works("generate", *BRIGHT, "--steps", 3, "--num-images", 3, "-q", "--out", "b", "--batch-size", 2)
    for first, second in zip(sorted((place / "a").glob("0*.png")), sorted((place / "b").glob("0*.png"))):
        difference = torch.tensor(list(Image.open(first).tobytes())) - torch.tensor(list(Image.open(second).tobytes()))
        assert difference.abs().max() <= 1


def test_a_prompt_is_judged_by_clip_and_names_the_folder(place, tiny_clip):
    works("generate", "Ankle boot!", *BRIGHT, *QUICK, "--clip-model", tiny_clip)
    settings = json.loads((place / "lossguide-out" / "ankle-boot" / "settings.json").read_text())
    assert [term["name"] for term in settings["guidance"]["loss"]] == ["clip-text", "bright"]
    assert shlex.split(settings["command"])[-1] == "Ankle boot!"


@pytest.mark.parametrize("recipe", recipes.available())
def test_every_recipe_runs(recipe):
    arguments = "generate", *BRIGHT, "--recipe", recipe, "--steps", 5, "--num-images", 1, "-q"
    if recipe in ("pigdm", "diffpir", "ddnm"):  # these are for `restore`
        assert "works with one Measurement" in fails(*arguments)
    else:
        works(*arguments)


@pytest.mark.parametrize("recipe", ["dsg", "tds"])
@pytest.mark.parametrize("scheduler", ["dpm++", "unipc"])
def test_a_recipe_that_the_scheduler_does_not_suit_says_what_does(recipe, scheduler):
    told = fails("generate", *BRIGHT, *QUICK, "--recipe", recipe, "--scheduler", scheduler)
    assert "choose DDIM with eta=1, DDPM or Euler ancestral" in told


@pytest.mark.parametrize("scheduler", cli_model.SCHEDULERS)
def test_every_scheduler_runs(place, scheduler):
    works("generate", *BRIGHT, *QUICK, "--scheduler", scheduler, "--out", "x")
    settings = json.loads((place / "x" / "settings.json").read_text())
    assert settings["scheduler"]["class"] == cli_model.SCHEDULERS[scheduler][0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs(dtype):
    works("generate", *BRIGHT, *QUICK, "--dtype", dtype)


def test_a_pixel_pipeline_and_a_folder_of_parts(place, models):
    works("generate", *BRIGHT, *QUICK, "--model", models / "pixels", "--out", "pipeline")
    works("generate", *BRIGHT, *QUICK, "--model", models / "grey", "--out", "parts")
    works("generate", *BRIGHT, *QUICK, "--model", models / "grey" / "unet", "--out", "unet")
    works("generate", *BRIGHT, *QUICK, "--out", "demo")
    assert pictures(place / "parts") == pictures(place / "unet") == pictures(place / "demo")
    assert Image.open(place / "pipeline" / "00000.png").size == (16, 16)


def test_a_text_pipeline_goes_through_the_plug_in(place, models, tiny_clip):
    arguments = ("generate", "a b", *QUICK, "--model", models / "text", "--clip-model", tiny_clip)
    works(*arguments, "--out", "single", "--strength", 2)
    works(*arguments, "--out", "both", "--strength", 2, "--batch-size", 2)
    works(*arguments, "--out", "plain", "--strength", 0)
    settings = json.loads((place / "single" / "settings.json").read_text())
    assert settings["options"]["batch_size"] == 1
    assert list(pictures(place / "single")) == ["00000.png", "00001.png"]
    assert pictures(place / "single") != pictures(place / "plain")
    plain = json.loads((place / "plain" / "settings.json").read_text())["results"]["loss"]
    assert plain["unguided"] == plain["guided"]
    works(
        "restore", picture(place / "photo.png", 16), "--task", "deblur", "--degrade", *QUICK, "--model", models / "text"
    )


def picture(path, side, mode="RGB", seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(3, 4, 4, generator=generator)
    image = torch.nn.functional.interpolate(small[None], (side, side), mode="bilinear")[0]
    contact_sheet.to_pil(image).convert(mode).save(path)
    return path


@pytest.mark.parametrize("task", cli_restore.TASKS)
def test_restore_degrades_and_restores_and_takes_its_own_degraded_picture(place, task):
    result = works("restore", picture(place / "photo.png", 32), "--task", task, "--degrade", *QUICK)
    folder = place / "lossguide-out" / f"photo-{task}"
    names = {file.name for file in folder.iterdir()}
    assert {
        "00000.png",
        "00001.png",
        "degraded.png",
        "original.png",
        "sheet.png",
        "settings.json",
        "record.json",
    } <= names
    results = json.loads((folder / "settings.json").read_text())["results"]
    assert len(results["psnr"]["restored"]) == 2 and results["floor"] > 0
    assert "PSNR" in result.stdout and "residual" in result.stdout
    degraded = Image.open(folder / "degraded.png")
    assert degraded.size == ((8, 8) if task == "super-resolution" else (32, 32))
    result = works("restore", folder / "degraded.png", "--task", task, *QUICK, "--out", "again")
    assert "PSNR" not in result.stdout and not (place / "again" / "original.png").exists()


def test_restore_by_a_mask_keeps_to_what_it_shows(place, models):
    photo = picture(place / "photo.png", 16)
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (4, 4, 12, 12))
    mask.save(place / "mask.png")
    works(
        "restore", photo, "--task", "inpaint", "--mask", "mask.png", *QUICK, "--model", models / "pixels", "--out", "x"
    )
    shown = Image.open(place / "x" / "degraded.png").getchannel("A")
    assert shown.tobytes() == mask.tobytes()


def test_a_photo_of_another_size_is_refused_and_resized_on_demand(place):
    photo = picture(place / "photo.png", 40)
    told = fails("restore", photo, "--task", "deblur", *QUICK)
    assert "40 x 40" in told and "32 x 32" in told and "--resize" in told
    assert "8 x 8" in fails("restore", photo, "--task", "super-resolution", *QUICK)
    works("restore", photo, "--task", "deblur", "--resize", *QUICK)
    works("restore", photo, "--task", "super-resolution", "--resize", *QUICK)


def test_fitted_crops_to_the_shape_and_keeps_the_mean():
    image = torch.rand(3, 40, 64, generator=torch.Generator().manual_seed(0))
    image[:, :, :12] = image[:, :, -12:] = 9  # beside the middle square, cropped away
    small = cli_restore.fitted(image, (10, 10), "the photo", True)
    assert small.shape == (3, 10, 10)
    torch.testing.assert_close(small.mean(), image[:, :, 12:-12].mean(), atol=0.01, rtol=0)


def test_psnr():
    original = torch.full((1, 3, 4, 4), 0.5)
    values = cli_restore.psnr(torch.stack([original[0] + 0.1, original[0]]), original)
    torch.testing.assert_close(values, torch.tensor([20.0, 100.0]))


def test_recipes_and_losses_are_listed_one_a_line():
    listed = works("recipes").stdout.splitlines()
    assert [line.split()[0] for line in listed[:-2]] == list(recipes.available())
    listed = works("losses").stdout.splitlines()
    assert [line.split("  ")[0] for line in listed[:-2]] == [entry.name for entry in registry.available()]
    assert "lossguide, version" in works("--version").stdout


@pytest.mark.parametrize("arguments", [[], ["--help"], ["generate", "--help"], ["restore", "-h"]])
def test_help_shows_examples(arguments):
    assert "Examples:\n    lossguide " in works(*arguments).stdout.replace("  Examples:\n      ", "Examples:\n    ")


BAD = {
    "nothing": (["generate"], "prompt"),
    "no such loss": (["generate", "--loss", "clip-txt:a boot"], "did you mean 'clip-text'"),
    "loss without argument": (["generate", "--loss", "color"], "argument after a colon"),
    "negative weight": (["generate", "--loss", "-1*class-label:9"], "not negative"),
    "no loss file": (["generate", "--loss", "none.py:f"], "no file 'none.py'"),
    "no loss picture": (["generate", "--loss", "color:none.png"], "none.png"),
    "loss of another shape": (["generate", "--loss", "own.py:single"], "one number per sample"),
    "loss without gradient": (["generate", "--loss", "own.py:unconnected"], "not differentiable"),
    "loss that raises": (["generate", "--loss", "own.py:broken"], "'broken' raised KeyError: 'eyes' (own.py:9)"),
    "a raising loss among others": (
        ["tune", *BRIGHT, "--loss", "2*own.py:broken", "--judge", "own.py:bright"],
        "'broken' raised KeyError: 'eyes' (own.py:9)",
    ),
    "no negatives": (["generate", "--loss", "contrast:boot"], "say how things stand, as in 'a boot left of a bag'"),
    "a solver for no change map": (
        ["generate", *BRIGHT, "--source", "photo.png", "--change-map", "0.5", "--scheduler", "unipc"],
        "UniPCMultistepScheduler does not: choose DDIM",
    ),
    "outside the demo": (["generate", "a red dog"], "'a red dog' does not name exactly one"),
    "two classes": (["generate", "a bag and a boot"], "--clip-model"),
    "no such recipe": (["generate", *BRIGHT, "--recipe", "fredom"], "did you mean 'freedom'"),
    "no such setting": (
        ["generate", *BRIGHT, "--recipe", "tfg", "--set", "roh=2"],
        "did you mean rho?",
    ),
    "a setting of another type": (["generate", *BRIGHT, "--recipe", "tfg", "--set", "rho=big"], "rho of tfg is float"),
    "a setting beyond numbers": (["generate", *BRIGHT, "--recipe", "tfg", "--set", "rho=1e999"], "a finite number"),
    "a setting without a value": (["generate", *BRIGHT, "--set", "stop"], "--set takes NAME=VALUE"),
    "a setting in vain": (["generate", *BRIGHT, "--set", "strength=2"], "--set does not set strength"),
    "no such choice": (["generate", *BRIGHT, "--recipe", "freedom", "--set", "rule=rmss"], "clip, rms, sqrt-alpha"),
    "no part in a word": (
        ["generate", *BRIGHT, "--recipe", "dps", "--set", "rule=adam"],
        "rule of Guidance is",
    ),
    "no such scheduler": (["generate", *BRIGHT, "--scheduler", "eular"], "did you mean 'euler'"),
    "no such option": (["generate", *BRIGHT, "--stpes", "3"], "--steps"),
    "no such command": (["generat", "a boot"], "generat"),
    "no such device": (["generate", *BRIGHT, "--device", "cuda:99"], "there are cpu"),
    "not a device": (["generate", *BRIGHT, "--device", "gpu"], "there are cpu"),
    "no model, before the text's": (["generate", "a shoe", "--model", "./none"], "no folder './none'"),
    "a mistyped model": (["generate", *BRIGHT, "--model", "dmeo"], "no folder 'dmeo'"),
    "two strengths": (["generate", *BRIGHT, "--strength", "2", "--tuned", "own.py"], "leave out --strength"),
    "no model folder": (["generate", *BRIGHT, "--model", "./none"], "no folder './none'"),
    "a file as model": (["generate", *BRIGHT, "--model", "own.py"], "is a file"),
    "an empty folder as model": (["generate", *BRIGHT, "--model", "."], "model_index.json"),
    "steps": (["generate", *BRIGHT, "--steps", "0"], "--steps"),
    "too many steps": (["generate", *BRIGHT, "--steps", "2000"], "1000"),
    "strength": (["generate", *BRIGHT, "--strength", "-1"], "--strength"),
    "strength nan": (["generate", *BRIGHT, "--strength", "nan"], "strength"),
    "no images": (["generate", *BRIGHT, "--num-images", "0"], "--num-images"),
    "out is a file": (["generate", *BRIGHT, *QUICK, "--out", "own.py"], "own.py"),
    "no photo": (["restore", "none.png", "--task", "deblur"], "no picture 'none.png'"),
    "photo is none": (["restore", "own.py", "--task", "deblur"], "not a picture"),
    "no task": (["restore", "photo.png"], "--task"),
    "no such task": (["restore", "photo.png", "--task", "inpant"], "inpaint"),
    "no hole": (["restore", "photo.png", "--task", "inpaint"], "--mask"),
    "an option of another task": (["restore", "photo.png", "--task", "deblur", "--factor", "2"], "super-resolution"),
    "even kernel": (["restore", "photo.png", "--task", "deblur", "--kernel-size", "8"], "odd"),
    "factor": (["restore", "photo.png", "--task", "super-resolution", "--factor", "5"], "does not divide"),
    "keep nothing": (["restore", "photo.png", "--task", "inpaint", "--degrade", "--keep", "0"], "shows nothing"),
    "keep all": (["restore", "photo.png", "--task", "inpaint", "--degrade", "--keep", "1"], "no hole"),
    "keep without degrade": (["restore", "photo.png", "--task", "inpaint", "--keep", "0.3"], "--degrade"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_leaves_no_folder(place, case):
    picture(place / "photo.png", 32)
    arguments, part = BAD[case]
    assert part in fails(*arguments)
    assert not list((place / "lossguide-out").glob("*"))


def test_a_pipeline_that_takes_no_change_map_is_told(place, monkeypatch):
    def draw(*_, **__):
        raise UnsuitableChange("how such a pipeline encodes a picture is not known here")

    picture(place / "photo.png", 32)
    monkeypatch.setattr(cli_model.PixelModel, "draw", draw)
    told = fails("generate", *BRIGHT, *QUICK, "--source", "photo.png", "--change-map", "0.5")
    assert "not known here" in told and not list((place / "lossguide-out").glob("*"))


def test_a_recipe_that_is_not_for_tokens_says_the_option(monkeypatch):
    def draw(*_, **__):
        raise UnsuitableSolver("a token generator has none", "recipes.auto or recipes.tokens")

    monkeypatch.setattr(cli_model.PixelModel, "draw", draw)
    assert "choose --recipe auto or --recipe tokens" in fails("generate", *BRIGHT, *QUICK)


def test_broken_model_folders_are_told(place, models):
    folder = place / "broken"
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    (folder / "unet" / "config.json").write_text("{")
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert "cannot be loaded" in fails("generate", *BRIGHT, "--model", folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    assert "cannot be loaded" in fails("generate", *BRIGHT, "--model", folder)
    assert "hub" in fails("generate", *BRIGHT, "--model", "nobody/no-such-model")
    demo_folder, demo.FOLDER = demo.FOLDER, place / "none"
    try:
        assert "weights" in fails("generate", *BRIGHT)
    finally:
        demo.FOLDER = demo_folder


def test_a_scheduler_of_another_kind_is_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler
    from lossguide.samplers import denoiser

    model = cli_model.PixelModel(denoiser(unet(1, 8), FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(ValueError, match="predicts flow"):
        cli_model._with_scheduler(model, "ddim")


def test_a_scheduler_of_the_same_kind_keeps_the_models_own_levels(models):
    model = cli_model.load_model(str(models / "grey"), "ddpm", 10, torch.device("cpu"), torch.float32)
    assert isinstance(model.scheduler, DDPMScheduler) and model.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_out_of_memory_is_told_with_a_smaller_batch(monkeypatch, error):
    def draw(*_, **__):
        raise error

    monkeypatch.setattr(cli_model.PixelModel, "draw", draw)
    assert "--batch-size 4" in fails("generate", *BRIGHT, "-q", "--batch-size", "8")


def test_a_bug_keeps_its_traceback_and_leaves_no_empty_folder(monkeypatch, place):
    def draw(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli_model.PixelModel, "draw", draw)
    assert str(run("generate", *BRIGHT, "-q").exception) == "a bug"
    with pytest.raises(KeyError), cli_job.told(LookupError):
        {}["a bug"]
    assert not list((place / "lossguide-out").glob("*"))


def test_results_are_never_written_over(place):
    (place / "photos").mkdir()
    (place / "photos" / "mine.png").write_bytes(b"")
    assert cli_output.free_folder(place / "photos") == place / "photos"
    for taken in ("photos", "photos-2"):
        (place / taken).mkdir(exist_ok=True)
        (place / taken / "sheet.png").write_bytes(b"")
    assert cli_output.free_folder(place / "photos") == place / "photos-3"
    assert cli_output.default_folder("2*color:red", "Über") == Path("lossguide-out/2-color-red-über")
    assert cli_output.default_folder("!?") == Path("lossguide-out/run")


def test_a_sheet_enlarges_small_pictures_by_a_whole_factor_and_keeps_their_pixels():
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    block = contact_sheet.Block
    sheet = contact_sheet.contact_sheet([block("left", images), block("right", images[:1])], "a caption " * 50)
    tile = sheet.crop((20, 26, 20 + 128, 26 + 128)).resize((32, 32), Image.Resampling.NEAREST)
    assert tile.tobytes() == contact_sheet.to_pil(images[0]).tobytes()
    assert sheet.width == 3 * 20 + (3 * 130 - 2) + 128  # three columns, and one


def test_odd_values_become_pictures_all_the_same():
    odd = torch.tensor([float("nan"), float("inf"), -1.0, 2.0]).view(1, 2, 2)
    assert contact_sheet.to_pil(odd).getchannel("R").tobytes() == bytes([0, 255, 0, 255])


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_with_a_word_and_status_130(place, models):
    code = (
        "import pathlib, sys; from lossguide.samplers import demo;"
        "demo.FOLDER = pathlib.Path(sys.argv.pop(1)); from lossguide.guidance.cli import main; main()"
    )
    command = [sys.executable, "-c", code, str(models / "grey"), "generate", *BRIGHT, "--steps", "900", "--out", "x"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=place,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 60
    told = b""
    while b"step/s" not in told and time.monotonic() < deadline:
        told += os.read(process.stderr.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130
    assert rest.decode().strip().endswith("Stopped.") and b"Traceback" not in told + rest
    assert not (place / "x").exists()


def test_the_real_demo_draws_what_is_asked(place, monkeypatch):
    real = Path(demo.__file__).parent
    if not (real / "unet").is_dir() or not words.clip_folder().is_dir():
        pytest.skip("the demo's weights are not here")
    monkeypatch.setattr(demo, "FOLDER", real)
    works("generate", "ankle boot", "--steps", 20, "--num-images", 4, "-q", "--out", "x")
    images = torch.stack([read_image(file) for file in sorted((place / "x").glob("0*.png"))])
    judged = words.classifier("judge")(images).argmax(1)
    assert (judged == words.class_of("ankle boot")).float().mean() >= 0.5
