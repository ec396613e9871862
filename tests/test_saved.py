"""A guidance to a folder and back: equal and drawing the same pictures; refused in a sentence; nothing executed."""

from __future__ import annotations

import json
import pickle
import sys
import types

import pytest
import torch
from lossguide.guidance import Augment, Guidance, recipes, saved
from lossguide.guidance.guidance import Inner
from lossguide.guidance.steps import Adam, Chain, Constant, PolyakToFloor, Scheduled, Shortest, StepRule, Unit
from lossguide.losses import ClassLabel, ClipImage, ClipText, Color, Measurement, Segmentation, Style, Term, operators
from lossguide.losses.images import Pixels, keep, read_image
from lossguide.samplers import TimeTravel, denoiser, sample
from models import tiny_unet, vp_scheduler
from PIL import Image
from torch import nn


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def squares(image):
    return (image - 0.8).square().flatten(1).sum(1)


@pytest.fixture(scope="module")
def tiny():
    return denoiser(tiny_unet(), vp_scheduler(prediction_type="v_prediction", clip_sample=True))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A picture in a file."""
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.fromarray((noise(20, 24, 3, seed=1) * 255).byte().numpy()).save(path)
    return path


def there_and_back(guidance, folder, model=None):
    """Saved and loaded; equal, and bitwise the same on two pictures."""
    guidance.save_pretrained(folder)
    loaded = Guidance.from_pretrained(folder)
    assert loaded.to_dict() == guidance.to_dict() and type(loaded) is Guidance
    if model is not None:
        one, other = (sample(model, g, steps=4, seeds=[3, 4]) for g in (guidance, loaded))
        assert torch.equal(one.samples, other.samples)
        assert not torch.equal(one.samples, sample(model, None, steps=4, seeds=[3, 4]).samples)
    return loaded


def measurement():
    return Measurement(operators.SuperResolution(2), noise(1, 3, 4, 4), 0.05)


@pytest.mark.parametrize("recipe", recipes.available())
def test_every_recipe_comes_back(recipe, tiny, tmp_path):
    guidance = recipes.get(recipe)(measurement(), strength=0.5)
    loaded = there_and_back(guidance, tmp_path, tiny)
    assert loaded.replace(loss=None) == guidance.replace(loss=None)
    assert (loaded.name, loaded.strength) == (recipe, 0.5)
    there_and_back(recipes.get(recipe)(None), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["guidance.json"], "no tensors of the one before"


LOSSES = {
    "clip-text": lambda clip, photo: ClipText("a boot, \u00e0 la mode \U0001f462", model=clip),
    "clip-texts": lambda clip, photo: ClipText(("a boot", "a bag"), model=clip, distance="spherical"),
    "clip-text-demo": lambda clip, photo: ClipText("an ankle boot", model="demo"),
    "clip-image": lambda clip, photo: ClipImage(photo, model=clip),
    "clip-image-str": lambda clip, photo: ClipImage(str(photo), model=clip),
    "clip-image-pillow": lambda clip, photo: ClipImage(Image.open(photo), model=clip),
    "clip-image-tensor": lambda clip, photo: ClipImage(noise(20, 30, 3).permute(2, 0, 1), model=clip),
    "clip-image-grey": lambda clip, photo: ClipImage(noise(1, 20, 30).double(), model=clip),
    "class-label": lambda clip, photo: ClassLabel("ankle boot"),
    "class-labels": lambda clip, photo: ClassLabel([9, 2], "demo", mean=[0.1] * 3, std=(0.9,) * 3, size=(16, 20)),
    "class-label-tensor": lambda clip, photo: ClassLabel(torch.tensor([1, 2]), size=28),
    "style-clip": lambda clip, photo: Style(photo, backbone="clip", model=clip),
    "style-clip-layers": lambda clip, photo: Style(noise(3, 9, 9), backbone="clip", model=clip, layers=[0, 2], size=32),
    "color": lambda clip, photo: Color("#4080c0"),
    "color-numbers": lambda clip, photo: Color([0.1, 0.2, 0.3]),
    "color-tensor": lambda clip, photo: Color(torch.tensor([0.1, 0.2, 0.3])),
    "color-palette": lambda clip, photo: Color(["red", "#ffffff", (0.0, 0.2, 0.9)], shares=[0.5, 0.3, 0.2]),
    "color-tensors": lambda clip, photo: Color([torch.tensor([0.1, 0.2, 0.3]), "blue"]),
    "color-rows": lambda clip, photo: Color(noise(4, 3)),
    "color-path": lambda clip, photo: Color(str(photo)),
    "color-pillow": lambda clip, photo: Color(Image.open(photo)),
    "color-picture": lambda clip, photo: Color(noise(3, 20, 20)),
    "inpaint": lambda clip, photo: Measurement(operators.Inpaint(noise(2, 1, 8, 8) > 0.5), noise(2, 3, 8, 8), 0.1),
    "inpaint-one": lambda clip, photo: Measurement(operators.Inpaint(noise(8, 8) > 0.5), noise(3, 8, 8)),
    "blur": lambda clip, photo: Measurement(operators.GaussianBlur(5, 1.0), noise(2, 8, 8, 3).permute(0, 3, 1, 2), 0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_comes_back(name, tiny, tiny_clip, photo, tmp_path):
    guidance = recipes.auto(LOSSES[name](str(tiny_clip), photo), time_travel=None)
    loaded = there_and_back(guidance, tmp_path / "once", tiny)
    there_and_back(loaded, tmp_path / "twice", tiny)
    first, second = ((tmp_path / n / "guidance.json").read_text() for n in ("once", "twice"))
    assert first == second


def test_style_by_vgg16_comes_back(tiny, shared, photo, tmp_path):
    weights = shared / "real/lpips/vgg16_features.pt"
    there_and_back(recipes.auto(Style(photo, weights=weights, size=32), time_travel=None), tmp_path, tiny)


def test_pictures_are_stored_themselves(tiny, tiny_clip, tmp_path):
    Image.fromarray((noise(9, 9, 3) * 255).byte().numpy()).save(tmp_path / "gone.png")
    guidance = recipes.auto(ClipImage(tmp_path / "gone.png", model=tiny_clip))
    pixels = read_image(tmp_path / "gone.png")
    (tmp_path / "gone.png").unlink()
    loaded = there_and_back(guidance, tmp_path, tiny)
    (term,) = loaded.loss.terms()
    assert term.loss.settings["picture"].endswith("gone.png")
    kept = term.loss.arguments["picture"]
    assert kept.values.dtype == torch.uint8 and torch.equal(read_image(kept), pixels)


def test_a_picture_is_kept_to_the_last_bit(tmp_path):
    grey = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    eight = keep(Image.fromarray(grey.numpy()))
    assert eight.values.dtype == torch.uint8 and eight.path is None and torch.equal(eight.values[0], grey)
    assert torch.equal(read_image(eight), read_image(Image.fromarray(grey.numpy())))
    Image.fromarray(((noise(4, 4) * 65535).int().numpy()).astype("uint16")).save(tmp_path / "16.png")
    sixteen = keep(tmp_path / "16.png")
    assert sixteen.values.dtype == torch.float32 and torch.equal(read_image(sixteen), read_image(tmp_path / "16.png"))
    assert keep(sixteen) is sixteen
    mine = noise(3, 4, 4)
    held = keep(mine)
    mine.zero_()
    assert held.sum() > 0
    with pytest.raises(ValueError, match="float tensor"):
        read_image(Pixels(torch.zeros(2, 4, 4)))


def test_weights_windows_names_and_flags_come_back(tiny, tmp_path):
    mask = operators.Inpaint(noise(8, 8) > 0.5)
    loss = (
        2.0 * Color("red").during(0.1, 0.6)
        + Color("blue")
        + Term(Color("green"), name="grass", weight=0.25, augment=True)
        + Term(Color("white") + 3.0 * ClassLabel(2), name="both", augment=False)
        + Measurement(mask, noise(1, 3, 8, 8), 0.1)
        + Measurement(mask, noise(1, 3, 8, 8, seed=1), 0.2)
    )
    loaded = there_and_back(Guidance(loss), tmp_path, tiny)
    assert [t.name for t in loaded.loss.terms()] == [t.name for t in loss.terms()]
    assert [t.weight for t in loaded.loss.terms()] == [2, 1, 0.25, 1, 1, 1]
    assert loaded.loss.terms()[0].window == (0.1, 0.6) and not loaded.loss.terms()[3].augment
    numbered = [t.name for t in (loaded.loss + Color("black")).terms()]
    assert numbered == [t.name for t in (loss + Color("black")).terms()], "names are numbered as if never saved"


def test_every_setting_comes_back(tiny, tmp_path):
    inf = float("inf")
    guidance = Guidance(
        Color("red"),
        rule=Shortest((Chain((Unit(1.0), Scheduled(2, "decrease"))), Adam(0.1), PolyakToFloor(-inf, inf))),
        through_share=0.4,
        inner=Inner(2, Constant(0.1), keep="sample", blend=True),
        augment=Augment(2, scale=[1, 1], saturation=[1, 1], contrast=(1, 1)),
        remix="ancestral",
        time_travel=TimeTravel(2, 0.1, 0.9),
        start=0.1,
        stop=1,
        clock="noise",
        every=2,
        strength=0.3,
        raise_on_nonfinite=True,
        name="mine \u2014 'quoted'",
        citation="none",
    )
    loaded = there_and_back(guidance, tmp_path, tiny)
    assert loaded.replace(loss=None) == guidance.replace(loss=None)
    assert loaded.rule.rules[2].cap == inf and loaded.rule.rules[2].target == -inf
    assert json.loads((tmp_path / "guidance.json").read_text(), parse_constant=pytest.fail)["format"] == 1
    nan = recipes.tfg(Color("red")).replace(rule=Constant(float("nan")))
    nan.save_pretrained(tmp_path)
    assert Guidance.from_pretrained(tmp_path).rule.size != Guidance.from_pretrained(tmp_path).rule.size


def test_the_table_holds_every_class_that_a_guidance_can():
    from lossguide import guidance, losses

    public = [vars(module)[name] for module in (guidance, losses) for name in module.__all__]
    kinds = {kind for kind in public if isinstance(kind, type)} - {guidance.Guided, losses.Composable, losses.Loss}
    kinds -= {losses.Report, losses.Finding, losses.PairTask}
    assert kinds <= set(saved._TYPES.values())
    rules = [kind for kind in vars(guidance.steps).values() if isinstance(kind, type) and issubclass(kind, StepRule)]
    assert set(rules) - {StepRule} <= set(saved._TYPES.values()) and StepRule not in saved._TYPES.values()


# ---- a loss of one's own ------------------------------------------------------------------------------------------


class Blur(operators.GaussianBlur):
    pass


class Own(StepRule):
    pass


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (squares, "the loss 'squares' cannot be saved: it is 'squares', which is not the library's own"),
        (Color("red") + Term(squares, name="mine"), "the loss 'mine' cannot be saved: it is 'squares'"),
        (Term(Color("red") + squares, name="both"), "the loss 'both' cannot be saved: it is 'squares'"),
        (ClassLabel(1, nn.Flatten()), "the loss 'class-label' cannot be saved: its classifier is 'Flatten'"),
        (Style(noise(3, 8, 8), backbone=nn.Identity()), "the loss 'style' cannot be saved: its backbone is 'Identity'"),
        (Segmentation(nn.Identity(), noise(3, 8, 8)), "'segmentation' cannot be saved: its network is 'Identity'"),
        (Color("red") + Color("red") + Measurement(torch.relu, noise(1, 3, 8, 8)), "'measurement' .* its operator is"),
        (Measurement(Blur(3, 1.0), noise(1, 3, 8, 8)), "its operator is 'Blur'"),
    ],
)
def test_what_is_not_the_library_s_own_is_left_out(loss, says, tiny, tmp_path):
    guidance = recipes.auto(loss, time_travel=None)
    with pytest.raises(ValueError, match=f"{says}.*losses=False.*loss=my_loss") as raised:
        guidance.save_pretrained(tmp_path / "new")
    assert "\n" not in str(raised.value) and not (tmp_path / "new").exists()
    guidance.save_pretrained(tmp_path, losses=False)
    with pytest.raises(ValueError, match="saved without its losses; pass loss="):
        Guidance.from_pretrained(tmp_path)
    loaded = Guidance.from_pretrained(tmp_path, loss=loss)
    assert loaded.to_dict() == guidance.to_dict()


def test_a_loss_takes_the_place_of_the_stored_one(tmp_path):
    recipes.dps(ClipText("a boot", model="demo")).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "guidance.json").read_text())
    data["guidance"]["loss"]["terms"][0]["loss"]["model"] = "/nowhere"  # which is not even looked at
    (tmp_path / "guidance.json").write_text(json.dumps(data))
    assert Guidance.from_pretrained(tmp_path, loss=squares).to_dict() == recipes.dps(squares).to_dict()
    recipes.ddnm(measurement()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one Measurement of a linear operator"):
        Guidance.from_pretrained(tmp_path, loss=squares)


def test_other_code_is_not_saved_either(tmp_path):
    with pytest.raises(
        ValueError, match=r"project cannot be saved: project is '.*<lambda>'.*replace\(project=\.\.\.\)"
    ):
        recipes.mpgd(Color("red"), project=lambda x: x).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"rule cannot be saved: rule.rules.1 is 'Own'"):
        recipes.dps(Color("red"), rule=Chain((Constant(), Own()))).save_pretrained(tmp_path, losses=False)
    with pytest.raises(ValueError, match="size of Constant is float, got 'large'"):
        recipes.dps(Color("red"), rule=Constant("large")).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- files that nobody saved ---------------------------------------------------------------------------------------


def stored(folder, change=lambda file: None, loss=None):
    recipes.tfg(Color("red") if loss is None else loss).save_pretrained(folder)
    file = json.loads((folder / "guidance.json").read_text())
    file = change(file) or file
    (folder / "guidance.json").write_text(file if isinstance(file, str) else json.dumps(file))
    return folder


def at(*path, value):
    def change(file):
        file = file["guidance"]
        for part in path[:-1]:
            file = file[part]
        file[path[-1]] = value

    return change


LOSS = ("loss", "terms", 0, "loss")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (at("rule", "type", value="os.system"), "rule: there is no type 'os.system'; known are Adam, Aesthetic, "),
        (at("rule", "type", value="lossguide.guidance.steps.Constant"), "there is no type 'lossguide"),
        (at("rule", "type", value="StepRule"), "there is no type 'StepRule'"),
        (at("rule", "type", value=["Constant"]), "there is no type \\['Constant'\\]"),
        (at("rule", value={"eta": 1}), "there is no type None"),
        (at("project", value={"type": "evil_module.Run"}), "project: there is no type 'evil_module.Run'"),
        (at(*LOSS, value={"type": "evil_module.Run", "x": 1}), "loss.terms.0.loss: there is no type 'evil_module.Run'"),
        (at("rule", value={"type": "Constant", "sise": 1}), "Constant has no setting sise; settings are size"),
        (at("rule", value={"type": "Squared", "__class__": 1}), "Squared has no setting __class__; settings are none"),
        (at("strenght", value=1.0), "Guidance has no setting strenght; settings are loss, rule, "),
        (at(*LOSS, "network", value="evil_module"), "Color has no setting network; settings are target, shares"),
        (at("strength", value=-1), "strength is a number from 0 up, got -1"),
        (at("strength", value="1"), "strength of Guidance is float, got '1'"),
        (at("every", value=1.5), "every of Guidance is int, got '1.5'"),
        (at("rule", value={"type": "Constant", "size": True}), "rule.size of Constant is float"),
        (at("rule", value={"type": "Inpaint", "mask": {"tensor": "m"}}), "there is no tensor 'm' in guidance.safetens"),
        (at("rule", value={"type": "SuperResolution", "factor": 2}), "rule of Guidance is StepRule \\| None"),
        (at("rule", value={"type": "Chain", "rules": [{"type": "Augment"}]}), "rules of Chain is tuple\\[StepRule"),
        (at("rule", value={"number": "inf"}), "rule of Guidance is StepRule"),
        (at("augment", value={"type": "Augment", "scale": [1, 2, 3]}), "scale of Augment is tuple\\[float, float\\]"),
        (at("augment", value={"type": "Augment", "copies": 0}), "guidance.json, augment: augmentation needs copies"),
        (at("inner", value={"type": "Inner", "iterations": {"tensor": []}}), "there is no tensor \\[\\]"),
        (at("time_travel", value={"type": "Guidance", "loss": None}), "time_travel of Guidance is TimeTravel"),
        (at("project", value="os.system"), "project of Guidance is Callable"),
        (at("loss", value="evil_module"), "loss of Guidance is Composable"),
        (at("loss", "terms", 0, "weight", value=-1), "loss.terms.0: a weight is finite and not negative"),
        (at("loss", "terms", value=[{"type": "Color", "target": "red"}]), "terms of Losses is tuple\\[Term"),
        (at(*LOSS, "target", value="no colour"), "loss.terms.0.loss: 'no colour' is no colour"),
        (at(*LOSS, value={"type": "ClipText"}), "loss.terms.0.loss: a ClipText needs prompt"),
        (at(*LOSS, value={"type": "ClipText", "prompt": "a", "model": "ViT-B-33"}), "open_clip has no model"),
        (at(*LOSS, value={"type": "ClassLabel", "label": 1, "classifier": "evil"}), "a callable or 'demo', got 'evil'"),
        (at(*LOSS, value={"type": "Segmentation", "network": 5, "target": "p"}), "network of Segmentation is "),
        (at("type", value="Constant"), "Constant has no setting loss, rule"),
        (lambda file: {**file, "guidance": {"type": "Constant", "loss": None}}, "Constant has no setting loss"),
        (lambda file: {**file, "guidance": {"type": "Term", "loss": {"type": "Color", "target": "red"}}}, "but a Term"),
        (lambda file: {**file, "guidance": []}, "is not what Guidance.save_pretrained writes"),
        (lambda file: {**file, "format": "1"}, "is not what Guidance.save_pretrained writes"),
        (lambda file: {**file, "format": 2, "lossguide": "9.1"}, r"written by a newer lossguide \(9\.1, format 2\)"),
        (lambda file: [1], "is not what Guidance.save_pretrained writes"),
        (lambda file: "{" * 3, "is not JSON"),
        (lambda file: '{"a":' * 100000, "is not JSON"),
        (lambda file: json.dumps(file).replace('"red"', "[" * 600 + "]" * 600), "is nested too deeply"),
    ],
)
def test_a_file_that_is_not_right_is_told_in_a_sentence(change, says, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=says):
        Guidance.from_pretrained(stored(tmp_path / "guidance", change))
    assert "evil_module" not in sys.modules


class Explosive:
    def __reduce__(self):
        return open, (self.path, "w")


def explosive(path):
    bomb = Explosive()
    bomb.path = str(path)
    return bomb


def test_no_pickle_is_ever_opened(tmp_path):
    loss = Measurement(operators.Inpaint(noise(8, 8) > 0.5), noise(1, 3, 8, 8))
    folder, marker = stored(tmp_path / "guidance", loss=loss), tmp_path / "executed"
    bomb = pickle.dumps(explosive(marker))
    (folder / "guidance.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Guidance.from_pretrained(folder)
    (folder / "guidance.safetensors").unlink()
    with pytest.raises(ValueError, match="there is no tensor 'loss.terms.0.loss.operator.mask'"):
        Guidance.from_pretrained(folder)
    torch.save(explosive(marker), tmp_path / "weights.pt")
    for settings in (
        {"type": "Style", "picture": {"type": "Pixels", "values": {"tensor": "p"}}, "weights": "weights.pt"},
        {"type": "ClipText", "prompt": "a boot", "model": "ViT-B-32", "pretrained": "weights.pt"},
    ):
        stored(folder, at(*LOSS, value=settings))
        saved.safetensors.torch.save_file({"p": noise(3, 8, 8)}, folder / "guidance.safetensors")
        with pytest.MonkeyPatch.context() as patch, pytest.raises((ValueError, OSError), match="weights.pt"):
            patch.chdir(tmp_path)
            Guidance.from_pretrained(folder)
    assert not marker.exists()
    bomb = pickle.loads(bomb)
    bomb.close()
    assert marker.exists(), "that it was one"


def test_the_folder_of_a_network_runs_no_code_either(tiny_clip, tmp_path):
    """open_clip hands a tokenizer's settings, `trust_remote_code` among them, on to transformers."""
    clip, marker = tmp_path / "clip", tmp_path / "executed"
    clip.mkdir()
    for path in tiny_clip.iterdir():
        (clip / path.name).write_bytes(path.read_bytes())
    config = json.loads((clip / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "own", "tokenizer_kwargs": {"trust_remote_code": True}}
    (clip / "open_clip_config.json").write_text(json.dumps(config))
    auto = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (clip / "tokenizer_config.json").write_text(json.dumps(auto))
    (clip / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n")
    change = at(*LOSS, value={"type": "ClipText", "prompt": "a boot", "model": str(clip)})
    with pytest.raises(OSError, match="could not be loaded"):
        Guidance.from_pretrained(stored(tmp_path / "guidance", change))
    assert not marker.exists()


def test_a_hand_written_file_needs_only_what_differs(tmp_path):
    recipe = {"type": "Guidance", "loss": {"type": "Color", "target": "red"}, "rule": {"type": "Unit"}, "every": 2}
    (tmp_path / "guidance.json").write_text(json.dumps({"format": 1, "guidance": recipe}))
    assert Guidance.from_pretrained(tmp_path).to_dict() == Guidance(Color("red"), Unit(), every=2).to_dict()


# ---- the Hub, without a network ------------------------------------------------------------------------------------


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    recipes.dps(Color("red")).save_pretrained("me/mine")
    assert Guidance.from_pretrained("me/mine").name == "dps"


def test_from_the_hub(tmp_path, monkeypatch):
    asked = {}

    def snapshot(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ValueError, match="there is no guidance.json in"):
        Guidance.from_pretrained("me/mine")
    recipes.dps(Color("red")).save_pretrained(tmp_path)
    assert Guidance.from_pretrained("me/mine", revision="v1", token="t", cache_dir="c").name == "dps"
    assert asked == {
        "repo_id": "me/mine",
        "allow_patterns": ["guidance.json", "guidance.safetensors"],
        "revision": "v1",
        "token": "t",
        "cache_dir": "c",
        "local_files_only": False,
    }


@pytest.mark.parametrize("name", ["nobody/no-such-guidance", "/no/such/folder"])
def test_neither_a_folder_nor_on_the_hub(name, tmp_path):
    with pytest.raises(OSError, match=f"there is no folder '{name}', and the Hub does not give") as raised:
        Guidance.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(raised.value)


class Hub:
    """What of `HfApi` is used, and what it was asked."""

    files: dict[str, str] = {}
    card = False

    def __init__(self, token=None):
        self.calls = [("token", token)]

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return types.SimpleNamespace(repo_id=f"me/{repo_id}")

    def file_exists(self, repo_id, name):
        assert (repo_id, name) == ("me/mine", "README.md")
        return self.card

    def upload_folder(self, *, repo_id, folder_path, **options):
        from pathlib import Path

        Hub.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return [*self.calls, ("upload", repo_id, options)]


def test_to_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    guidance = recipes.dps(measurement())
    options = {"commit_message": "Upload guidance", "delete_patterns": ["guidance.safetensors"]}
    assert guidance.push_to_hub("mine", private=True, token="t") == [
        ("token", "t"),
        ("create", "mine", {"private": True, "exist_ok": True}),
        ("upload", "me/mine", options),
    ]
    assert set(Hub.files) == {"guidance.json", "guidance.safetensors", "README.md"}
    card = Hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: lossguide\n---\n# dps\n") and "2209.14687" in card
    assert 'Guidance.from_pretrained("me/mine")' in card
    for name, content in Hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert Guidance.from_pretrained(tmp_path).to_dict() == guidance.to_dict()
    monkeypatch.setattr(Hub, "card", True)
    recipes.dps(squares).push_to_hub("mine", losses=False, commit_message="again")
    assert set(Hub.files) == {"guidance.json"}, "a card that is there already is left alone"
    monkeypatch.setattr(Hub, "create_repo", lambda *args, **kwargs: pytest.fail("made a repository"))
    with pytest.raises(ValueError, match="'squares' cannot be saved"):
        recipes.dps(squares).push_to_hub("mine")
