"""The laws of adding and scaling losses, and losses by name."""

from __future__ import annotations

import json

import pytest
import torch
from lossguide.losses import ClipText, Color, Loss, Losses, Measurement, Term, as_losses, operators, registry
from lossguide.losses.registry import available, parse


class Mean(Loss):
    name = "mean"

    def __call__(self, image):
        return image.mean((1, 2, 3))


def darkness(image):
    return -image.mean((1, 2, 3))


X = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_sums_and_weights():
    loss = 2.0 * Mean() + Mean() * 3 + darkness
    torch.testing.assert_close(loss(X), 4 * X.mean((1, 2, 3)))
    assert [term.weight for term in loss.terms()] == [2, 3, 1]
    torch.testing.assert_close((0.5 * loss)(X), loss(X) / 2)
    torch.testing.assert_close((darkness + Mean())(X), torch.zeros(3))
    torch.testing.assert_close(sum([Mean(), Mean(), Mean()])(X), 3 * X.mean((1, 2, 3)))
    torch.testing.assert_close((torch.tensor(2.0).item() * Mean())(X), 2 * Mean()(X))


def test_names_are_numbered_once():
    assert [t.name for t in (Mean() + darkness).terms()] == ["mean", "darkness"]
    expected = ["mean-1", "mean-2", "mean-3"]
    assert [t.name for t in (Mean() + Mean() + Mean()).terms()] == expected
    assert [t.name for t in (Mean() + (Mean() + Mean())).terms()] == expected
    assert [t.name for t in sum([Mean()] * 3).terms()] == expected
    assert [t.name for t in (2.0 * (Mean() + Mean()) + Mean()).during(0, 0.5).terms()] == expected


def test_windows():
    loss = Mean().during(0.2, 0.6) + darkness
    first, second = loss.terms()
    assert [first.acts_at(p) for p in (0.0, 0.2, 0.5, 0.6, 1.0)] == [False, True, True, False, False]
    assert second.acts_at(0.0) and second.acts_at(1.0)
    assert (2 * loss).terms()[0].window == (0.2, 0.6)
    assert not (0.0 * Mean()).terms()[0].acts_at(0.5)
    for wrong in ((0.5, 0.5), (-0.1, 1), (0, 1.1)):
        with pytest.raises(ValueError, match="window"):
            Mean().during(*wrong)


def test_plain_data_travels_with_the_term():
    term = Term(darkness, name="dark", weight=2.0, augment=False)
    assert (3 * term).terms()[0] == Term(darkness, name="dark", weight=6.0, augment=False)
    described = json.loads(json.dumps(as_losses(term).terms()[0].describe()))
    assert described["name"] == "dark" and described["weight"] == 2 and described["augment"] is False
    assert not (Mean() + Color("red")).terms()[1].augment
    assert Measurement(operators.SuperResolution(2), torch.zeros(1, 3, 2, 2), 0.1).terms()[0].loss.floor > 0


def test_wrong_shape_is_said_by_name():
    with pytest.raises(ValueError, match=r"'dark' must return one number per sample, shape \(3,\), but returned \(\)"):
        Losses((Term(lambda image: image.mean(), name="dark"),))(X)
    with pytest.raises(ValueError, match="but returned float"):
        as_losses(lambda image: 1.0)(X)


def test_what_cannot_be_composed():
    with pytest.raises(TypeError):
        Mean() * "2"
    with pytest.raises(TypeError, match="a loss is a callable"):
        as_losses(3)
    with pytest.raises(TypeError):
        Mean() + 1
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not negative"):
            wrong * Mean()


def test_no_terms_are_no_loss():
    x = X.clone().requires_grad_()
    value = Losses(())(x)
    assert value.tolist() == [0, 0, 0]
    assert torch.autograd.grad(value.sum(), x)[0].abs().max() == 0


# --- by name


@pytest.fixture
def named(tiny_clip):
    return lambda text: parse(text, clip_model=str(tiny_clip))


def test_parse_weights_and_arguments(named, tiny_clip):
    loss = named("2.5*clip-text: a boot: of leather * 2")
    (term,) = loss.terms()
    assert term.weight == 2.5 and term.loss.settings["prompt"] == "a boot: of leather * 2"
    plain = 2.5 * ClipText("a boot: of leather * 2", model=tiny_clip)
    assert torch.equal(loss(X), plain(X))
    assert named(" 1e-1 * color:red").terms()[0].weight == 0.1
    assert named("clip-text:see file.py:main").terms()[0].loss.settings["prompt"] == "see file.py:main"


def test_parse_each_name(named, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), "#102030").save(tmp_path / "a.png")
    for text in (f"clip-image:{tmp_path}/a.png", f"style:{tmp_path}/a.png", f"color:{tmp_path}/a.png", "color:#f00",
                 "color:red,#00f,rgb(0,255,0)"):  # fmt: skip
        loss = named(text)
        assert loss(X).shape == (3,) and loss.terms()[0].name == text.split(":")[0]
    assert len(named("color:red,#00f,rgb(0,255,0)").terms()[0].loss.target) == 3
    assert len(named(["color:red", "2*color:blue"]).terms()) == 2


def test_parse_a_function_of_the_users_own(named, tmp_path):
    file = tmp_path / "my_losses.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Scaled:\n    by: float\n    def __call__(self, image):\n"
        "        return self.by * image.mean((1, 2, 3))\n"
        "bright = Scaled(2.0)\ndef darkness(image):\n    return -image.mean((1, 2, 3))\nnumber = 3\n"
    )
    loss = named([f"0.5*{file}:darkness", f"{file}:bright"])
    torch.testing.assert_close(loss(X), 1.5 * X.mean((1, 2, 3)))
    assert loss.terms()[0].name == "darkness"
    with pytest.raises(LookupError, match="has no 'darknes'; did you mean 'darkness'"):
        named(f"{file}:darknes")
    with pytest.raises(ValueError, match="not callable"):
        named(f"{file}:number")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        named(f"{tmp_path}/none.py:darkness")
    file.write_text("1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        named(f"{file}:darkness")


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("clip-txt:a boot", LookupError, "did you mean 'clip-text'"),
        ("zzz:a", LookupError, "there are clip-text, "),
        ("clip-text", ValueError, "needs an argument after a colon, such as 'clip-text:an ankle boot'"),
        ("clip-text: ", ValueError, "needs an argument"),
        ("two*clip-text:a", ValueError, "a number before"),
        ("-1*clip-text:a", ValueError, "not negative"),
        ("nan*clip-text:a", ValueError, "not negative"),
        ("segmentation:a", ValueError, "in Python: Segmentation"),
        ("color:redd", ValueError, "'redd' is no colour"),
        ("style:missing.jpg", FileNotFoundError, "there is no picture"),
        ("", LookupError, "there is no loss ''"),
        ([], ValueError, "no loss was given"),
    ],
)
def test_parse_errors_are_one_clear_sentence(named, text, error, says):
    with pytest.raises(error, match=says.replace("(", r"\(")) as raised:
        named(text)
    assert "\n" not in str(raised.value)


def test_available_lists_every_name():
    entries = available()
    assert {"clip-text", "clip-image", "class-label", "style", "color"} <= {entry.name for entry in entries}
    assert all(entry.description and entry.example for entry in entries)
    assert available() is not registry._ENTRIES
