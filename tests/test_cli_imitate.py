"""`lossguide imitate`: what it writes, that it finds what was done, and how bad input is told."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
import torch.nn.functional as F
from lossguide.guidance import cli_imitate, contact_sheet
from lossguide.losses import read_image
from lossguide.samplers import demo
from PIL import Image
from test_cli import QUICK, fails, models, pictures, works  # noqa: F401  (models is a fixture)

SIDE = 32
KERNEL = torch.tensor([[0.0, 1, 2], [1, 4, 1], [2, 1, 0]]) / 12


def photo(seed: int, side: int = SIDE) -> torch.Tensor:
    """Noise with structure at several scales, `(3, side, side)` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.rand(1, 3, n, n, generator=generator) for n in (4, 8, 16, 32)]
    return sum(F.interpolate(layer, (side, side), mode="bilinear") for layer in layers)[0] / len(layers)


def blurred(image: torch.Tensor) -> torch.Tensor:
    padded = F.pad(image[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, KERNEL[None, None])[:, 0]


def reduced(image: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(image, 4)


def posterised(image: torch.Tensor) -> torch.Tensor:
    return (image * 3).round() / 3


def darkened(image: torch.Tensor) -> torch.Tensor:
    return 0.6 * image + 0.1


def saved(name: str, image: torch.Tensor) -> str:
    contact_sheet.to_pil(image).save(name)
    return name


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, models):  # noqa: F811
    """An empty working directory with two pairs of each kind and a query, and the stand-in for the demo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "FOLDER", models / "grey")
    for seed in range(3):
        saved(f"sharp{seed}.png", photo(seed))
        kinds = dict(blurred=blurred, dark=darkened, small=reduced, poster=posterised)
        for name, done in kinds.items():
            saved(f"{name}{seed}.png", done(photo(seed)))
    saved("large.png", photo(9, 48))
    (tmp_path / "text.txt").write_text("no picture")
    return tmp_path


def pair(before: str, after: str = "sharp", seed: int = 0) -> tuple[str, ...]:
    return "--pair", f"{before}{seed}.png", f"{after}{seed}.png"


def settings(folder) -> dict:
    return json.loads((folder / "settings.json").read_text())


def test_a_blur_is_found_from_one_pair_and_the_command_gives_the_same_again(place):
    result = works("imitate", "blurred2.png", *pair("blurred"), *QUICK, "--seed", 7, "--out", "made")
    folder = place / "made"
    assert sorted(file.name for file in folder.iterdir()) == [
        "00007.png", "00008.png", "record.json", "record.png", "report.txt", "settings.json", "sheet.png",
    ]  # fmt: skip
    report = (folder / "report.txt").read_text()
    assert report.startswith("operator: kernel 3x3") and "from 1 pair" in report and "<- chosen" in report
    found = settings(folder)
    assert found["results"]["mode"] == "operator" and found["results"]["way"] == "restore"
    assert found["seeds"] == [7, 8] and found["guidance"]["loss"][0]["name"] == "measurement"
    assert "operator: kernel 3x3" in result.stdout and "made/sheet.png" in result.stdout
    again = shlex.split(found["command"])
    assert again[:2] == ["lossguide", "imitate"] and again[-1] == "blurred2.png"
    works(*again[1:])
    assert pictures(place / "made-2") == pictures(folder)


def test_the_sheet_is_the_grid_of_the_pairs_and_in_its_last_row_query_and_answer(place):
    works("imitate", "small2.png", *pair("small"), *pair("small", seed=1), *QUICK, "--out", "x")
    sheet = Image.open("x/sheet.png")
    cells = [[read_image(f"small{i}.png"), read_image(f"sharp{i}.png")] for i in range(2)]
    cells.append([read_image("small2.png"), read_image("x/00000.png")])
    for row, (left, right) in enumerate(cells):
        for column, one in enumerate((left, right)):
            corner = 20 + column * 130, 26 + row * 130
            shown = read_image(sheet.crop((*corner, corner[0] + 128, corner[1] + 128)))
            assert torch.equal(shown, F.interpolate(one[None], (128, 128), mode="nearest")[0])
    assert sheet.width > 20 + 2 * 130 + 128  # the other answer beside it


def test_the_other_way_round(place):
    """What was sharp becomes blurred: the same pairs, taken inversely."""
    works("imitate", "sharp2.png", *pair("blurred"), *QUICK, "--inverse", "--out", "x")
    results = settings(place / "x")["results"]
    assert results["way"] == "apply" and "taken the other way round" in (place / "x" / "report.txt").read_text()
    works("imitate", "sharp2.png", *pair("sharp", "blurred"), *QUICK, "--out", "y")
    assert pictures(place / "x") == pictures(place / "y")


def test_a_change_that_no_operator_makes_is_seen_by_clip(place):
    pairs = [*pair("sharp", "poster"), *pair("sharp", "poster", 1)]
    asked = ("imitate", "sharp2.png", *pairs, *QUICK)
    works(*asked, "--mode", "direction", "--out", "x")
    results = settings(place / "x")["results"]
    assert results["mode"] == "direction" and "floor" not in results
    assert settings(place / "x")["options"]["clip_model"] == "demo"
    assert "patches" in fails(*asked, "--mode", "analogy")  # the demo's CLIP has none


def test_any_model_and_resizing_to_it(place, models):  # noqa: F811
    model = ("--model", models / "pixels")  # 16 pixels
    told = fails("imitate", "blurred2.png", *pair("blurred"), *QUICK, *model)
    assert "32 x 32" in told and "16 x 16" in told and "--resize" in told
    works("imitate", "dark2.png", *pair("dark"), *QUICK, *model, "--resize", "--out", "x")
    assert Image.open("x/00000.png").size == (16, 16)
    works("imitate", "large.png", *pair("small"), *QUICK, "--resize", "--out", "y")  # an 8th-size query of it
    assert settings(place / "y")["results"]["family"].startswith("reduction 4x")
    works("imitate", "dark2.png", *pair("dark"), *QUICK, "--model", models / "text", "--resize")


def test_sizes_after_resizing_keep_the_share_of_the_pair():
    small, large = torch.rand(3, 8, 8), torch.rand(3, 32, 32)
    for pairs, query, inverse in (([(small, large)], large, False), ([(large, small)], large, True)):
        cut, asked = cli_imitate.resized(pairs, query, (16, 16), inverse)
        answer, like_query = cut[0][::-1] if not inverse else cut[0]
        assert answer.shape == (3, 16, 16) and like_query.shape == asked.shape == (3, 4, 4)
    cut, asked = cli_imitate.resized([(large, small)], small, (16, 16), False)
    assert cut[0][0].shape == asked.shape == (3, 64, 64) and cut[0][1].shape == (3, 16, 16)
    cut, asked = cli_imitate.resized([(torch.rand(3, 20, 33), large)], small, (16, 24), False)
    assert cut[0][0].shape == cut[0][1].shape == asked.shape == (3, 16, 24)


BAD = {
    "no pair": (["sharp2.png"], "--pair before.png after.png"),
    "half a pair": (["sharp2.png", "--pair", "sharp0.png"], "requires 2 arguments"),
    "no query": ([*pair("blurred")], "Missing argument"),
    "no such query": (["none.png", *pair("blurred")], "no picture 'none.png'"),
    "no such picture": (["sharp2.png", "--pair", "blurred0.png", "none.png"], "no picture 'none.png'"),
    "no picture at all": (["text.txt", *pair("blurred")], "not a picture"),
    "no such mode": (["sharp2.png", *pair("blurred"), "--mode", "operater"], "operator"),
    "no such model": (["sharp2.png", *pair("blurred"), "--model", "./none"], "no folder './none'"),
    "no such recipe": (["sharp2.png", *pair("blurred"), "--recipe", "fredom"], "did you mean 'freedom'"),
    "another size": (["large.png", *pair("blurred")], "48 x 48 pixels"),
    "pairs of nothing": (["sharp2.png", "--pair", "sharp0.png", "sharp1.png"], "have nothing in common"),
    "no operator": (
        ["sharp2.png", "--pair", "sharp0.png", "sharp1.png", "--mode", "operator"],
        "have nothing in common",
    ),
    "no such CLIP": (
        ["sharp2.png", "--pair", "sharp0.png", "sharp1.png", "--clip-model", "ViT-B-33"],
        "open_clip has no model 'ViT-B-33'",
    ),
    "CLIP is not at hand": (
        ["sharp2.png", "--pair", "sharp0.png", "sharp1.png", "--clip-model", "hf-hub:nobody/none"],
        "have nothing in common",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_leaves_no_folder(place, case):
    arguments, part = BAD[case]
    assert part in fails("imitate", *arguments)
    assert not list((place / "lossguide-out").glob("*"))


def test_help_shows_examples():
    assert "lossguide imitate blurred.png --pair" in works("imitate", "-h").stdout
