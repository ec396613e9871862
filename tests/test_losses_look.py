"""Losses of text and look: against the libraries' own forward, finite differences, extremes, and to a file and back."""

from __future__ import annotations

import builtins
import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lossguide.guidance import Guidance, recipes
from lossguide.losses import (
    Aesthetic,
    ClipDirection,
    ClipImage,
    ClipText,
    Perceptual,
    Symmetry,
    TotalVariation,
    read_image,
    registry,
)
from lossguide.losses.aesthetic import read_head
from lossguide.losses.clip import load_clip
from PIL import Image
from torch import nn

SIZE = (34, 40)


def picture(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_lpips(net="alex", **options):
    """LPIPS with its own weights of channels over a trunk that was never trained."""
    lpips = pytest.importorskip("lpips")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False, **options)


@pytest.fixture(scope="module")
def other_clip(tiny_clip, tmp_path_factory):
    """Another tiny model, of other weights, size and width, that shares nothing with the first but its words."""
    import open_clip
    from safetensors.torch import save_file

    config = json.loads((tiny_clip / "open_clip_config.json").read_text())
    config["model_cfg"] |= {"embed_dim": 24}
    config["model_cfg"]["vision_cfg"] |= {"image_size": 24}
    folder = tmp_path_factory.mktemp("other_clip")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = open_clip.CLIP(**config["model_cfg"])
    save_file(
        {k: v.clone().contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def five_layers(width, relu=False):
    """The improved aesthetic predictor, with its dropouts, as it was published."""
    wide = [width, 1024, 128, 64, 16, 1]
    layers = []
    for place, (a, b) in enumerate(zip(wide, wide[1:])):
        layers += [nn.Linear(a, b)]
        layers += [nn.ReLU()] * (relu and place < 4) + [nn.Dropout(0.2)] * (place < 3)
    model = nn.Module()
    model.layers = nn.Sequential(*layers)
    return model


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Files of heads for embeddings of 16 numbers, and the modules that they were saved from."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("heads")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = {"linear.pth": nn.Linear(16, 1), "five.pth": five_layers(16), "relu.safetensors": five_layers(16, True)}
    for name, module in made.items():
        save = save_file if name.endswith("safetensors") else torch.save
        save(module.state_dict(), folder / name)
    return {folder / name: getattr(module.eval(), "layers", module) for name, module in made.items()}


def photo(seed=5):
    return picture(3, 20, 30, seed=seed, dtype=torch.float32)


MAKERS = {
    "texts": lambda clip, other, head: ClipText({"a fox": 1.0, "snow": 0.5}, model=clip, negative=["a dog", "a cat"]),
    "texts-spherical": lambda clip, other, head: ClipText(
        {"a fox": 1, "snow": 0.5}, model=clip, negative="a dog", negative_weight=0.3, distance="spherical"
    ),
    "ensemble": lambda clip, other, head: ClipText("a fox", model=[clip, other], negative="a dog"),
    "image-ensemble": lambda clip, other, head: ClipImage(photo(), model=[clip, other], pretrained=None),
    "direction": lambda clip, other, head: ClipDirection("a photo", "a sketch", photo(), model=clip),
    "direction-ensemble": lambda clip, other, head: ClipDirection("a photo", "a sketch", photo(), model=[clip, other]),
    "perceptual": lambda clip, other, head: Perceptual(photo(), random_lpips()),
    "perceptual-size": lambda clip, other, head: Perceptual(photo(), random_lpips("squeeze"), size=(24, 20)),
    "perceptual-own": lambda clip, other, head: Perceptual(photo(), lambda a, b: ((a - b) ** 2).mean(1)),
    "aesthetic": lambda clip, other, head: Aesthetic(head, model=clip),
    "aesthetic-five": lambda clip, other, head: Aesthetic(head.with_name("five.pth"), model=clip),
    "aesthetic-relu": lambda clip, other, head: Aesthetic(head.with_name("relu.safetensors"), model=clip),
    "symmetry": lambda clip, other, head: Symmetry(),
    "symmetry-vertical": lambda clip, other, head: Symmetry("vertical"),
    "total-variation": lambda clip, other, head: TotalVariation(),
    "total-variation-anisotropic": lambda clip, other, head: TotalVariation("anisotropic"),
}
UNSAVED = ("perceptual", "perceptual-size", "perceptual-own")  # of a network of one's own


@pytest.fixture(params=MAKERS)
def loss(request, tiny_clip, other_clip, heads):
    return MAKERS[request.param](str(tiny_clip), str(other_clip), next(iter(heads)))


# ---- what every loss is to do --------------------------------------------------------------------------------------


def test_one_number_per_sample_whatever_the_batch(loss):
    x = picture(3, 3, *SIZE)
    values = loss.terms()[0](x)
    assert values.shape == (3,) and values.dtype == torch.float64 and values.isfinite().all() and (values >= 0).all()
    torch.testing.assert_close(loss(x[:1]), values[:1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss(x.flip(0)), values.flip(0), rtol=1e-9, atol=1e-12)


def test_gradients_of_samples_are_their_own(loss):
    x = picture(2, 3, *SIZE).requires_grad_()
    together = torch.autograd.grad(loss(x).sum(), x)[0]
    alone = torch.autograd.grad(loss(x[1:]).sum(), x)[0]
    torch.testing.assert_close(together[1], alone[1], rtol=1e-7, atol=1e-12)
    assert (alone[0] == 0).all()


def test_gradient_against_finite_differences(loss):
    x = picture(2, 3, *SIZE).requires_grad_()
    step = 1e-7  # so short that no ReLU or absolute value turns within it
    gradient = torch.autograd.grad(loss(x).sum(), x)[0]
    with torch.no_grad():
        for seed in range(3):
            along = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
            slope = (loss(x + step * along).sum() - loss(x - step * along).sum()) / (2 * step)
            torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-4, atol=1e-7)


FLAT = {"black": 0.0, "white": 1.0, "constant": 0.04045, "huge": 1e4, "negative": -1e4, "faint": 1e-30}


@pytest.mark.parametrize("kind", [*FLAT, "huge noise", "faint noise"])
def test_values_and_gradients_are_finite_at_extremes(loss, kind):
    x = torch.full((2, 3, *SIZE), FLAT[kind]) if kind in FLAT else picture(2, 3, *SIZE, dtype=torch.float32)
    x = {"huge noise": 2e4 * (x - 0.5), "faint noise": 1e-30 * x}.get(kind, x).requires_grad_()
    value = loss(x)
    gradient = torch.autograd.grad(value.sum(), x)[0]
    assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 50)])
def test_pictures_of_a_few_pixels(loss, size):
    x = picture(1, 3, *size, dtype=torch.float32).requires_grad_()
    if loss.name == "perceptual" and loss.smallest > 1 and loss.network.size is None:
        with pytest.raises(ValueError, match="at least 31 pixels a side, got .*pass size="):
            loss(x)
        return
    value = loss(x)
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images(loss, dtype):
    x = picture(2, 3, *SIZE).to(dtype).requires_grad_()
    value = loss(x)
    gradient = torch.autograd.grad(value.sum(), x)[0]
    slack = (
        0.5 if loss.name == "clip-direction" and dtype == torch.bfloat16 else 0.05
    )  # small differences of embeddings
    torch.testing.assert_close(value.float(), loss(x.detach().float()), rtol=slack, atol=slack)
    assert gradient.dtype == dtype and gradient.isfinite().all()


def test_settings_are_plain_data(loss):
    text = json.dumps(loss.terms()[0].describe())
    assert len(text) < 1000 and loss.settings and type(loss).__name__ in text and type(loss).__name__ in repr(loss)


def test_everything_moves_to_the_device_of_the_image(loss):
    loss(picture(2, 3, *SIZE))  # what is kept for one device does not stay there
    x = torch.rand(2, 3, *SIZE, device="meta", requires_grad=True)
    value = loss(x)
    assert value.shape == (2,) and value.device.type == "meta"
    assert torch.autograd.grad(value.sum(), x)[0].shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda(loss):
    x = picture(2, 3, *SIZE)
    torch.testing.assert_close(loss(x.cuda()).cpu(), loss(x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in UNSAVED])
def test_to_a_file_and_back(name, tiny_clip, other_clip, heads, tmp_path):
    loss = MAKERS[name](str(tiny_clip), str(other_clip), next(iter(heads)))
    texts = []
    x, guidance = picture(2, 3, *SIZE, dtype=torch.float32), recipes.auto(loss)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        guidance.save_pretrained(folder)
        texts.append((folder / "guidance.json").read_text())
        loaded = Guidance.from_pretrained(folder)
        assert loaded.to_dict() == guidance.to_dict()
        assert torch.equal(loaded.loss(x), guidance.loss(x))
        guidance = loaded
    assert texts[0] == texts[1]


def test_more_to_a_file_and_back(tiny_clip, heads, tmp_path):
    x = picture(2, 3, *SIZE, dtype=torch.float32)
    Image.fromarray((255 * picture(9, 9, 3)).byte().numpy()).save(tmp_path / "a.png")
    pictures = [tmp_path / "a.png", picture(3, 8, 8, dtype=torch.float32)]
    for place, loss in enumerate(
        (
            ClipDirection("a photo", "a sketch", pictures, model=tiny_clip),
            ClipDirection("a photo", "a sketch", torch.stack([photo(1), photo(2)]), model=tiny_clip),
            ClipText(["a fox", "a dog"], model=[tiny_clip], pretrained=[None], negative=("snow", "rain")),
        )
    ):
        guidance = recipes.auto(loss)
        guidance.save_pretrained(tmp_path / str(place))
        loaded = Guidance.from_pretrained(tmp_path / str(place))
        assert loaded.to_dict() == guidance.to_dict() and torch.equal(loaded.loss(x), guidance.loss(x))
    with pytest.raises(ValueError, match="'perceptual' cannot be saved: its net is 'LPIPS'"):
        recipes.auto(Perceptual(photo(), random_lpips())).save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="'aesthetic' cannot be saved: its head is 'Linear'"):
        recipes.auto(Aesthetic(nn.Linear(16, 1), model=tiny_clip)).save_pretrained(tmp_path / "own")


# ---- texts by CLIP -------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_open_clip(folder, x, texts):
    """Cosines `(B, N)` by open_clip's own forward; images already of the model's size."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    config = open_clip.get_model_preprocess_cfg(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = F.normalize(model.encode_image((x - mean) / std), dim=-1)
    return images, F.normalize(model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(texts)), dim=-1)


def test_weighted_texts_and_what_to_keep_away_from(tiny_clip):
    x = picture(2, 3, 32, 32, dtype=torch.float32)
    images, words = by_open_clip(tiny_clip, x, ["a fox", "snow", "a dog", "a cat"])
    cosine = images @ words.T
    options = {"negative": ["a dog", "a cat"], "negative_weight": 0.3, "model": tiny_clip}
    got = ClipText({"a fox": 1.0, "snow": 0.5}, **options)(x)
    wanted = (1 - cosine[:, 0]) + 0.5 * (1 - cosine[:, 1]) + 0.3 * (2 + cosine[:, 2] + cosine[:, 3])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    angle = cosine.double().arccos()
    got = ClipText({"a fox": 1.0, "snow": 0.5}, distance="spherical", **options)(x)
    wanted = angle[:, 0] ** 2 / 2 + angle[:, 1] ** 2 / 4 + 0.15 * ((math.pi - angle[:, 2:]) ** 2).sum(1)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_weighted_texts_are_the_sum_of_losses(tiny_clip):
    x = picture(2, 3, 32, 32, dtype=torch.float32)
    both = ClipText("a fox", model=tiny_clip) + 0.5 * ClipText("snow", model=tiny_clip)
    torch.testing.assert_close(ClipText({"a fox": 1, "snow": 0.5}, model=tiny_clip)(x), both(x))
    assert torch.equal(ClipText({"a fox": 1}, model=tiny_clip)(x), ClipText("a fox", model=tiny_clip)(x))
    assert torch.equal(ClipText("a fox", model=tiny_clip, negative=[])(x), ClipText("a fox", model=tiny_clip)(x))


def test_a_prompt_for_each_image_and_one_negative_for_all(tiny_clip):
    x = picture(2, 3, 32, 32, dtype=torch.float32)
    loss = ClipText(["a fox", "snow"], model=tiny_clip, negative="a dog")
    assert loss.batch == 2 and ClipText({"a": 1, "b": 1}, model=tiny_clip).batch == 1
    both = torch.cat(
        [ClipText(t, model=tiny_clip, negative="a dog")(x[i : i + 1]) for i, t in enumerate(loss.settings["prompt"])]
    )
    torch.testing.assert_close(loss(x), both)
    torch.testing.assert_close(loss(x.repeat(2, 1, 1, 1)), both.repeat(2))


def test_descent_goes_to_the_text_and_away_from_the_other(tiny_clip):
    for options in ({}, {"distance": "spherical"}):
        x = picture(1, 3, 32, 32, dtype=torch.float32).requires_grad_()
        loss = ClipText({"a fox": 0.0}, model=tiny_clip, negative="a dog", **options)
        near = ClipText("a dog", model=tiny_clip)
        before = near(x).item()
        for _ in range(10):
            x = (x - 0.1 * F.normalize(torch.autograd.grad(loss(x).sum(), x)[0].flatten(), dim=0).view_as(x)).detach()
            x.requires_grad_()
        assert near(x).item() > before + 0.01


def test_several_models_are_the_mean_of_their_losses(tiny_clip, other_clip):
    x = picture(2, 3, *SIZE, dtype=torch.float32)
    for make in (
        lambda **o: ClipText({"a fox": 1.0, "snow": 0.5}, negative="a dog", **o),
        lambda **o: ClipImage(photo(), distance="spherical", **o),
        lambda **o: ClipDirection("a photo", "a sketch", photo(), **o),
    ):
        alone = [make(model=one)(x) for one in (tiny_clip, other_clip)]
        torch.testing.assert_close(make(model=[tiny_clip, other_clip])(x), sum(alone) / 2)
        assert torch.equal(make(model=[other_clip])(x), alone[1])
    assert ClipText("a", model=[tiny_clip, "demo"]).settings["pretrained"] == [None, None]


def test_errors_of_texts(tiny_clip):
    for wrong in ({"a fox": -1}, {"a fox": float("nan")}, {"a fox": float("inf")}, {"a fox": "1"}):
        with pytest.raises(ValueError, match="weight of 'a fox' is a number, finite and not negative.*negative="):
            ClipText(wrong, model=tiny_clip)
    with pytest.raises(ValueError, match="weight of 'negative'"):
        ClipText("a fox", model=tiny_clip, negative="a dog", negative_weight=-1)
    for empty in ({}, []):
        with pytest.raises(ValueError, match="must not be empty"):
            ClipText(empty, model=tiny_clip)
    for wrong in ({"": 1.0}, {3: 1.0}):
        with pytest.raises(ValueError, match="a prompt is a text that is not empty"):
            ClipText(wrong, model=tiny_clip)
    with pytest.raises(ValueError, match="a prompt is a text that is not empty"):
        ClipText("a fox", model=tiny_clip, negative=" ")
    for models, tags in (([], None), ([tiny_clip], [None, None])):
        with pytest.raises(ValueError, match="one pretrained for all, or a list of one each"):
            ClipText("a fox", model=models, pretrained=tags)
    with pytest.raises(LookupError, match="close to it: RN50"):
        ClipText("a fox", model=[tiny_clip, "RN5O"])


# ---- a direction by CLIP -------------------------------------------------------------------------------------------


def test_direction_is_that_of_stylegan_nada(tiny_clip):
    x, start = picture(2, 3, 32, 32, dtype=torch.float32), picture(2, 3, 32, 32, seed=7, dtype=torch.float32)
    images, words = by_open_clip(tiny_clip, torch.cat([x, start]), ["a photo", "a sketch"])
    wanted = 1 - F.cosine_similarity(images[:2] - images[2:], (words[1] - words[0])[None])
    got = ClipDirection("a photo", "a sketch", start, model=tiny_clip)
    torch.testing.assert_close(got(x), wanted, rtol=0, atol=2e-4)
    assert got.batch == 2
    torch.testing.assert_close(got(x.repeat(2, 1, 1, 1)), got(x).repeat(2))
    for one in (start[0], start[:1], [start[0]]):
        single = ClipDirection("a photo", "a sketch", one, model=tiny_clip)
        assert single.batch == 1
        torch.testing.assert_close(single(x)[0], got(x)[0])
    away = ClipDirection("a sketch", "a photo", start, model=tiny_clip)
    torch.testing.assert_close(got(x) + away(x), torch.full((2,), 2.0))


def test_direction_starts_at_one_with_a_slope_to_follow(tiny_clip):
    start = photo()
    loss = ClipDirection("a photo", "a sketch", start, model=tiny_clip)
    x = start[None].clone().requires_grad_()
    value = loss(x)
    assert value.item() == pytest.approx(1, abs=1e-3)
    gradient = torch.autograd.grad(value.sum(), x)[0]
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    with torch.no_grad():
        assert loss(x - 0.05 * gradient / gradient.norm()).item() < 0.9


def test_errors_of_directions(tiny_clip):
    with pytest.raises(ValueError, match="there is no direction"):
        ClipDirection("a photo", "a photo", photo(), model=tiny_clip)
    with pytest.raises(ValueError, match="not empty"):
        ClipDirection("", "a photo", photo(), model=tiny_clip)
    with pytest.raises(ValueError, match="list of pictures must not be empty"):
        ClipDirection("a photo", "a sketch", [], model=tiny_clip)
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        ClipDirection("a photo", "a sketch", "none.png", model=tiny_clip)
    with pytest.raises(ValueError, match="2 pictures for 3 images"):
        ClipDirection("a photo", "a sketch", [photo(), photo(1)], model=tiny_clip)(picture(3, 3, 8, 8))


# ---- the perceptual distance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_perceptual_is_that_of_lpips(net):
    x, start = picture(2, 3, *SIZE, dtype=torch.float32), picture(2, 3, *SIZE, seed=7, dtype=torch.float32)
    for options in ({}, {"lpips": False}, {"version": "0.0"}):
        metric = random_lpips(net, **options)
        with torch.no_grad():
            wanted = metric(x, start, normalize=True).flatten()
        torch.testing.assert_close(Perceptual(start, metric)(x), wanted, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(Perceptual(start[0], metric)(x)[:1], wanted[:1], rtol=1e-4, atol=1e-7)
        if net == "vgg":
            break


def test_perceptual_at_the_picture_itself():
    for dtype in (torch.float32, torch.bfloat16):
        start = photo().repeat(1, 2, 2)
        x = start[None].to(dtype).requires_grad_()
        value = Perceptual(x.detach()[0].float(), random_lpips())(x)
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_perceptual_is_finite_where_no_feature_is_active(dtype):
    """lpips's own forward gives NaN in float16: zero by zero."""
    metric = random_lpips()
    for parameter in metric.net.slice1.parameters():
        parameter.data.mul_(0).sub_(1)  # ReLU cuts all of it
    x = torch.ones(1, 3, *SIZE, dtype=dtype, requires_grad=True)
    value = Perceptual(photo(), metric)(x)
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), x)[0].isfinite().all()
    assert dtype != torch.float16 or metric.half()(x, x).isnan().all()


def test_perceptual_brings_the_picture_to_the_image(tmp_path):
    Image.fromarray((255 * picture(*SIZE, 3)).byte().numpy()).save(tmp_path / "a.png")
    loss = Perceptual(tmp_path / "a.png", random_lpips())
    for size in (SIZE, (50, 40), SIZE):  # what is kept of the picture is for one size
        x = F.interpolate(read_image(tmp_path / "a.png")[None], size, mode="bicubic", antialias=True)
        assert loss(x).item() == pytest.approx(0, abs=1e-6)
        assert loss(x.double()).item() == pytest.approx(0, abs=1e-6)
    small = Perceptual(tmp_path / "a.png", random_lpips(), size=32)
    big = picture(1, 3, 64, 64, dtype=torch.float32)
    shrunk = F.interpolate(big, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(small(big), small(shrunk))


def test_perceptual_by_a_network_of_ones_own():
    x, start = picture(4, 3, 8, 8, dtype=torch.float32), picture(2, 3, 8, 8, seed=7, dtype=torch.float32)
    loss = Perceptual(start, lambda a, b: (a - b).abs())
    torch.testing.assert_close(loss(x), 2 * (x - start.repeat(2, 1, 1, 1)).abs().flatten(1).mean(1))
    spatial = random_lpips(spatial=True)
    assert Perceptual(photo(), spatial)(picture(2, 3, *SIZE, dtype=torch.float32)).shape == (2,)


def test_perceptual_from_a_trunk_in_a_file(tmp_path):
    """Of any of torchvision's files: `features`, or the whole network."""
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = squeezenet1_1()
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    torch.save(network.features.state_dict(), tmp_path / "features.pth")
    metric = random_lpips("squeeze")
    features = network.features.state_dict()
    metric.net.load_state_dict({key: features[key.split(".", 1)[1]] for key in metric.net.state_dict()})
    x, state = picture(2, 3, *SIZE, dtype=torch.float32), torch.random.get_rng_state()
    values = [Perceptual(photo(), "squeeze", weights=tmp_path / f"{name}.pth")(x) for name in ("whole", "features")]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], Perceptual(photo(), metric)(x))
    assert torch.equal(state, torch.random.get_rng_state())
    loss = Perceptual(photo(), "squeeze", weights=tmp_path / "whole.pth", size=32)
    recipes.auto(loss).save_pretrained(tmp_path / "saved")
    loaded = Guidance.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.loss(x), loss(x)) and loaded.to_dict() == recipes.auto(loss).to_dict()


@pytest.mark.parametrize(("net", "trunk"), [("alex", "alexnet"), ("vgg", "vgg16")])
def test_perceptual_with_real_weights(net, trunk, shared):
    import importlib.util

    spec = importlib.util.spec_from_file_location("real_load", shared / "real/load.py")
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)
    metric = real.lpips_metric(net)
    candy, mosaic = (
        F.interpolate(read_image(shared / f"real/style/{n}.jpg")[None], (64, 64)) for n in ("candy", "mosaic")
    )
    x = torch.cat([mosaic, candy, 0.9 * candy]).requires_grad_()
    loss = Perceptual(candy, net, weights=shared / f"real/lpips/{trunk}_features.pt")
    value = loss(x)
    wanted = metric(x, candy.expand(3, -1, -1, -1), normalize=True).flatten()
    torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-6)
    assert value[1] < 1e-6 < value[2] < value[0]
    ours = torch.autograd.grad(value[0], x, retain_graph=True)[0][0]
    torch.testing.assert_close(ours, torch.autograd.grad(wanted[0], x)[0][0], rtol=1e-3, atol=1e-5)
    assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()


def test_errors_of_perceptual(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="net is one of alex, vgg, squeeze, a module or a callable, got 'resnet'"):
        Perceptual(photo(), "resnet")
    with pytest.raises(ValueError, match="for a net given by name"):
        Perceptual(photo(), random_lpips(), weights="a.pth")
    with pytest.raises(FileNotFoundError, match="no file of the trunk of LPIPS 'alex' '.*none.pth'"):
        Perceptual(photo(), weights=tmp_path / "none.pth")
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth' does not hold the state dict of torchvision's network for LPIPS"):
        Perceptual(photo(), weights=tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("broken.pth", "list.pth"):
        with pytest.raises(ValueError, match=f"{name}' does not hold the state dict"):
            Perceptual(photo(), weights=tmp_path / name)

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(OSError, match="'alex' could not be downloaded.*no route to host.*pass weights="):
        Perceptual(photo())
    whole = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: offline_import() if name == "lpips" else whole(name, *a, **k)
    )
    with pytest.raises(ImportError, match="pip install lpips"):
        Perceptual(photo())


def offline_import():
    raise ImportError("No module named 'lpips'")


# ---- the aesthetic score -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_score_of_every_published_head(heads, tiny_clip):
    x = picture(3, 3, 32, 32, dtype=torch.float32)
    images, _ = by_open_clip(tiny_clip, x, ["a"])
    for path, head in heads.items():
        torch.testing.assert_close(Aesthetic(path, model=tiny_clip)(x), 10 - head(images)[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(Aesthetic(head, model=tiny_clip)(x), 10 - head(images)[:, 0], rtol=1e-4, atol=1e-5)
    flat = Aesthetic(lambda embeddings: embeddings.sum(1), model=tiny_clip)
    torch.testing.assert_close(flat(x), 10 - images.sum(1), rtol=1e-5, atol=1e-6)


def test_five_layers_without_a_bend_are_one(heads):
    _, five, relu = heads
    x = picture(5, 16, dtype=torch.float32)
    network = read_head(five)
    torch.testing.assert_close(network(x) + network(-x), 2 * network(0 * x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        read_head(relu)(x) + read_head(relu)(-x), 2 * read_head(relu)(0 * x), rtol=1e-3, atol=1e-4
    )


def test_errors_of_aesthetic(heads, tiny_clip, other_clip, tmp_path):
    head = next(iter(heads))
    with pytest.raises(ValueError, match="takes embeddings of 16 numbers, and the model '.*' makes 24"):
        Aesthetic(head, model=other_clip)
    with pytest.raises(FileNotFoundError, match="no file of an aesthetic head '.*none.pth'"):
        Aesthetic(tmp_path / "none.pth", model=tiny_clip)
    a, b = torch.zeros(2, 16), torch.zeros(2)
    wrong = {
        "two scores": ({"weight": a, "bias": b}, "shapes are"),
        "vector": ({"weight": b, "bias": b}, "shapes are"),
        "other": ({"linear.weight": a, "linear.bias": b}, "keys are linear.weight, linear.bias"),
        "more": ({"weight": a, "bias": b, "extra": b}, "keys are"),
        "places": ({"layers.0.weight": a, "layers.0.bias": b}, "keys are layers.0.weight"),
        "no weights": ({}, "keys are"),
    }
    for name, (state, says) in wrong.items():
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=f"{name}.pth' is no aesthetic head that is known .{says}") as raised:
            Aesthetic(tmp_path / f"{name}.pth", model=tiny_clip)
        assert "\n" not in str(raised.value)


def test_a_head_runs_no_code(tmp_path, tiny_clip):
    class Explosive:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    torch.save({"weight": Explosive()}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="head.pth' does not hold the state dict"):
        Aesthetic(tmp_path / "head.pth", model=tiny_clip)
    assert not (tmp_path / "executed").exists()


# ---- symmetry and total variation ----------------------------------------------------------------------------------


def test_symmetry():
    x = picture(2, 3, 5, 7)
    n = x.numpy()
    for axis, mirrored in (("horizontal", n[..., ::-1]), ("vertical", n[..., ::-1, :])):
        wanted = ((n - mirrored) ** 2).mean((1, 2, 3))
        np.testing.assert_allclose(Symmetry(axis)(x).numpy(), wanted, rtol=1e-12)
    even = (x + x.flip(-1)) / 2
    assert Symmetry()(even).abs().max() < 1e-30 and Symmetry("vertical")(even).min() > 0.01
    with pytest.raises(ValueError, match="axis is one of horizontal, vertical, got 'diagonal'"):
        Symmetry("diagonal")


def test_total_variation():
    x = picture(2, 3, 5, 7)
    for kind in ("isotropic", "anisotropic"):
        wanted = []
        for image in x.tolist():
            total = 0.0
            for channel in image:
                for i, row in enumerate(channel):
                    for j, value in enumerate(row):
                        dy = channel[i + 1][j] - value if i + 1 < len(channel) else 0.0
                        dx = row[j + 1] - value if j + 1 < len(row) else 0.0
                        total += math.hypot(dx, dy) if kind == "isotropic" else abs(dx) + abs(dy)
            wanted.append(total / 105)
        torch.testing.assert_close(TotalVariation(kind)(x), torch.tensor(wanted, dtype=x.dtype))
    with pytest.raises(ValueError, match="kind is isotropic or anisotropic"):
        TotalVariation("round")


def test_total_variation_agrees_with_kornia():
    kornia = pytest.importorskip("kornia")
    x = picture(2, 3, 9, 7)
    torch.testing.assert_close(
        TotalVariation("anisotropic")(x) * 189, kornia.losses.total_variation(x).flatten(1).sum(1)
    )


def test_total_variation_of_a_constant_picture_is_still():
    for kind in ("isotropic", "anisotropic"):
        x = torch.full((1, 3, 6, 6), 0.3, requires_grad=True)
        value = TotalVariation(kind)(x)
        assert value.item() == 0 and (torch.autograd.grad(value.sum(), x)[0] == 0).all()


# ---- by name -------------------------------------------------------------------------------------------------------


def test_by_name(tmp_path, monkeypatch, heads, tiny_clip):
    x = picture(2, 3, *SIZE, dtype=torch.float32)
    for text, loss in (
        ("symmetry", Symmetry()),
        ("2*symmetry:vertical", 2 * Symmetry("vertical")),
        ("total-variation", TotalVariation()),
        ("total-variation: anisotropic", TotalVariation("anisotropic")),
    ):
        assert torch.equal(registry.parse(text)(x), loss(x))
    for text, says in (
        ("symmetry:", "needs an argument after a colon, such as 'symmetry, symmetry:vertical'"),
        ("symmetry:diagonal", "axis is one of"),
        ("perceptual", "needs an argument after a colon, such as 'perceptual:photo.png'"),
        ("clip-direction:a", "in Python: ClipDirection"),
    ):
        with pytest.raises(ValueError, match=says):
            registry.parse(text)
    for text in (f"perceptual:{tmp_path}/none.png", f"aesthetic:{tmp_path}/none.pth"):
        with pytest.raises(FileNotFoundError, match="none.p"):
            registry.parse(text)
    monkeypatch.setattr("lossguide.losses.perceptual._named", lambda net, weights: random_lpips(net))
    Image.fromarray((255 * picture(*SIZE, 3)).byte().numpy()).save(tmp_path / "a.png")
    assert registry.parse(f"perceptual:{tmp_path}/a.png")(x).shape == (2,)
    monkeypatch.setattr("lossguide.losses.aesthetic.load_clip", lambda model, pretrained: load_clip(tiny_clip))
    assert registry.parse(f"aesthetic:{next(iter(heads))}")(x).shape == (2,)
    names = {entry.name for entry in registry.available()}
    assert {"perceptual", "aesthetic", "symmetry", "total-variation", "clip-direction"} <= names
