"""Every loss: shape, independence of samples, gradients, extremes; and each against what it should be."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lossguide.losses import (
    ClassLabel,
    ClipImage,
    ClipText,
    Color,
    Frames,
    Measurement,
    Segmentation,
    Style,
    Term,
    operators,
    read_image,
)
from lossguide.losses.clip import load_clip
from lossguide.losses.color import rgb_to_lab
from lossguide.losses.network import FrozenNetwork, logits_of
from PIL import Image
from torch import nn


def picture(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Convolutions(nn.Module):
    """Two smooth layers; maps of `outside` channels at half the size."""

    def __init__(self, outside=4, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, outside, 3, 1, 1)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Classifier(Convolutions):
    def forward(self, x):
        return super().forward(x).mean((2, 3))


MAKERS = {
    "clip-text": lambda clip: ClipText("a boot", model=clip),
    "clip-text-spherical": lambda clip: ClipText("a boot", model=clip, distance="spherical"),
    "clip-image": lambda clip: ClipImage(picture(3, 20, 30, seed=5, dtype=torch.float32), model=clip),
    "class-label": lambda clip: ClassLabel(2, Classifier(), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), size=16),
    "style": lambda clip: Style(picture(3, 20, 20, seed=5, dtype=torch.float32), backbone=Convolutions()),
    "style-clip": lambda clip: Style(picture(3, 9, 9, seed=5, dtype=torch.float32), backbone="clip", model=clip),
    "segmentation": lambda clip: Segmentation(Convolutions(), torch.randint(-1, 4, (32, 32)), size=(12, 16)),
    "segmentation-l2": lambda clip: Segmentation(Convolutions(), torch.randn(4, 6, 8), size=(12, 16)),
    "color": lambda clip: Color("#4080c0"),
    "color-palette": lambda clip: Color(["red", "#ffffff", (0.0, 0.2, 0.9)], shares=[0.5, 0.3, 0.2]),
    "color-picture": lambda clip: Color(picture(3, 20, 20, seed=5, dtype=torch.float32)),
    "measurement": lambda clip: Measurement(operators.GaussianBlur(5, 1.0), picture(1, 3, 24, 24, seed=5)),
}


@pytest.fixture(params=MAKERS)
def loss(request, tiny_clip):
    torch.manual_seed(0)
    return MAKERS[request.param](str(tiny_clip))


def test_one_number_per_sample_whatever_the_batch(loss):
    x = picture(3, 3, 24, 24)
    values = loss.terms()[0](x)
    assert values.shape == (3,) and values.dtype == torch.float64 and values.isfinite().all()
    torch.testing.assert_close(loss(x[:1]), values[:1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss(x.flip(0)), values.flip(0), rtol=1e-9, atol=1e-12)


def test_gradients_of_samples_are_their_own(loss):
    x = picture(2, 3, 24, 24).requires_grad_()
    together = torch.autograd.grad(loss(x).sum(), x)[0]
    alone = torch.autograd.grad(loss(x[1:]).sum(), x)[0]
    torch.testing.assert_close(together[1], alone[1], rtol=1e-7, atol=1e-12)
    assert (alone[0] == 0).all()


def test_gradient_against_finite_differences(loss):
    x = picture(2, 3, 24, 24).requires_grad_()
    # of a palette's thousands of sorted values two swap in a longer step, which is a kink
    step, slack = (1e-9, 1e-7) if isinstance(loss, Color) else (1e-6, 1e-8)
    gradient = torch.autograd.grad(loss(x).sum(), x)[0]
    with torch.no_grad():
        for seed in range(3):
            along = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
            slope = (loss(x + step * along).sum() - loss(x - step * along).sum()) / (2 * step)
            torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-4, atol=slack)


@pytest.mark.parametrize("kind", ["black", "white", "constant", "overshoot", "far"])
def test_finite_gradients_at_extremes(loss, kind):
    x = {
        "black": torch.zeros(1, 3, 24, 24),
        "white": torch.ones(1, 3, 24, 24),
        "constant": torch.full((1, 3, 24, 24), 0.04045),
        "overshoot": picture(1, 3, 24, 24, dtype=torch.float32) * 3 - 1,
        "far": torch.full((1, 3, 24, 24), -2.0),
    }[kind].requires_grad_()
    value = loss(x)
    gradient = torch.autograd.grad(value.sum(), x)[0]
    assert value.isfinite().all() and gradient.isfinite().all()
    assert gradient.abs().max() > 0  # nothing is clamped away


def test_settings_are_plain_data(loss):
    text = json.dumps(loss.terms()[0].describe())
    assert len(text) < 1000 and loss.settings and type(loss).__name__ in text
    assert loss.name in MAKERS
    assert type(loss).__name__ in repr(loss)


def test_everything_moves_to_the_device_of_the_image(loss):
    x = torch.rand(2, 3, 24, 24, device="meta", requires_grad=True)  # no numbers, but it mixes with no other device
    value = loss(x)
    assert value.shape == (2,) and value.device.type == "meta"
    assert torch.autograd.grad(value.sum(), x)[0].shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda(loss):
    x = picture(2, 3, 24, 24)
    torch.testing.assert_close(loss(x.cuda()).cpu(), loss(x), rtol=1e-6, atol=1e-9)


def test_half_precision_images(loss):
    x = picture(1, 3, 24, 24, dtype=torch.bfloat16)
    torch.testing.assert_close(loss(x.float()), loss(x).float(), rtol=0.1, atol=0.1)


def test_importing_is_cheap():
    code = (
        "import sys, lossguide.losses;"
        "print([m for m in ('open_clip', 'torchvision', 'kornia', 'lpips', 'transformers') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# --- the frozen network


def test_frozen_network_leaves_the_original_alone():
    network = Convolutions().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    frozen = FrozenNetwork(network)
    x = picture(1, 3, 8, 8)
    frozen(x), frozen(x.bfloat16()), frozen(x.float())
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]) and value.dtype == torch.float32


def test_frozen_network_resizes_and_normalises():
    frozen = FrozenNetwork(lambda x: x, size=(4, 6), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    out = frozen(torch.full((1, 3, 8, 8), 0.4))
    assert out.shape == (1, 3, 4, 6)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0.3 / 0.5, 0.2 / 0.6, 0.1 / 0.7]))


def test_logits_of_what_networks_return():
    t = torch.zeros(1, 2)

    class Output:
        logits = t

    for output in (t, {"out": t, "aux": t + 1}, Output(), (t, t + 1)):
        assert logits_of(output) is t
    with pytest.raises(TypeError, match="got str"):
        logits_of("scores")


# --- CLIP


def test_clip_agrees_with_open_clip(tiny_clip, tmp_path):
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_clip}")
    values = torch.nn.functional.interpolate(picture(1, 3, 6, 6, dtype=torch.float32), (64, 64), mode="bicubic")
    Image.fromarray((values[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(Image.open(tmp_path / "a.png"))[None])
        text = model.encode_text(tokenizer(["a boot"]))
    expected = 1 - F.cosine_similarity(image, text)
    x = read_image(tmp_path / "a.png")[None]
    got = ClipText("a boot", model=tiny_clip)(x)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)  # Pillow resizes in 8 bits
    angle = torch.arccos(1 - got)
    spherical = ClipText("a boot", model=tiny_clip, distance="spherical")(x)
    torch.testing.assert_close(spherical, angle**2 / 2, rtol=1e-5, atol=1e-6)


def test_clip_image_of_itself_is_zero(tiny_clip):
    x = picture(3, 40, 40, dtype=torch.float32)
    for distance in ("cosine", "spherical"):
        loss = ClipImage(x, model=tiny_clip, distance=distance)
        y = x[None].clone().requires_grad_()
        assert loss(y).item() == pytest.approx(0, abs=1e-6)
        assert torch.autograd.grad(loss(y).sum(), y)[0].isfinite().all()


def test_a_prompt_for_each_image(tiny_clip):
    x = picture(2, 3, 32, 32, dtype=torch.float32)
    loss = ClipText(["a boot", "a bag"], model=tiny_clip)
    both = loss(x)
    torch.testing.assert_close(both[1:], ClipText("a bag", model=tiny_clip)(x[1:]))
    torch.testing.assert_close(loss(x.repeat(3, 1, 1, 1)), both.repeat(3))  # as augmented copies come
    with pytest.raises(ValueError, match="2 targets for 3 images"):
        ClipText(["a boot", "a bag"], model=tiny_clip)(x[[0, 1, 0]])


def test_clip_is_loaded_once(tiny_clip):
    assert load_clip(tiny_clip) is load_clip(str(tiny_clip), None)


def test_a_checkpoint_file(tmp_path, monkeypatch, tiny_clip):
    import open_clip

    config = json.loads((tiny_clip / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-for-a-test", config)
    loss = ClipText("a boot", model="tiny-for-a-test", pretrained=tiny_clip / "open_clip_model.safetensors")
    assert loss.settings["pretrained"].endswith("open_clip_model.safetensors")
    assert torch.equal(loss.targets[0], ClipText("a boot", model=tiny_clip).targets[0])


def test_clip_errors(tiny_clip, monkeypatch):
    with pytest.raises(ValueError, match="longer than the 16 tokens.*shorten it: 'boot boot"):
        ClipText("boot " * 15, model=tiny_clip)
    ClipText("boot " * 14, model=tiny_clip)  # with its two marks exactly 16
    with pytest.raises(ValueError, match="not empty"):
        ClipText(" ", model=tiny_clip)
    with pytest.raises(ValueError, match="cosine, spherical"):
        ClipText("a", model=tiny_clip, distance="l2")
    with pytest.raises(LookupError, match="close to it: ViT-B-32"):
        ClipText("a", model="ViT-B-33")
    with pytest.raises(LookupError, match="neither a file nor a pretrained tag"):
        ClipText("a", model="ViT-B-32", pretrained="no-such-tag")
    with pytest.raises(ValueError, match="needs pretrained="):
        ClipText("a", model="ViT-B-32", pretrained=None)


def test_a_download_that_fails_says_so_once(monkeypatch, capfd):
    import open_clip

    def fail(*args, **kwargs):
        assert kwargs["force_quick_gelu"]  # the activation that OpenAI's weights were trained with
        raise RuntimeError("Failed to download weights")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(OSError, match=r"'ViT-B-32' with 'openai' could not be loaded.*model='demo'"):
        ClipText("a boot")
    assert capfd.readouterr().err == ""


# --- classifier


def test_class_label_is_cross_entropy():
    x, network = picture(3, 3, 8, 8, dtype=torch.float32), Classifier()
    expected = -torch.log_softmax(network(x), 1)
    torch.testing.assert_close(ClassLabel(1, network)(x), expected[:, 1])
    labels = torch.tensor([0, 3, 2])
    for given in (labels, labels.tolist(), labels.numpy()):
        torch.testing.assert_close(ClassLabel(given, network)(x), expected[range(3), labels])
    assert ClassLabel(np.int64(1), network).settings["label"] == 1
    assert ClassLabel([1, 2], network).settings["label"] == [1, 2]
    torch.testing.assert_close(ClassLabel(labels, network)(x.repeat(2, 1, 1, 1)), expected[range(3), labels].repeat(2))


def test_class_label_errors():
    x, network = picture(3, 3, 8, 8, dtype=torch.float32), Classifier()
    with pytest.raises(ValueError, match="label 4 is not one of the classifier's 4"):
        ClassLabel(4, network)(x)
    with pytest.raises(ValueError, match="from 0 on"):
        ClassLabel(-1, network)
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        ClassLabel([1, 2], network)(x)
    with pytest.raises(ValueError, match="only with classifier='demo'"):
        ClassLabel("boot", network)
    with pytest.raises(ValueError, match="returns logits"):
        ClassLabel(0, Convolutions())(x)
    with pytest.raises(ValueError, match="'demo', got 'resnet'"):
        ClassLabel(0, "resnet")


def test_demo_classes_by_name():
    demo = pytest.importorskip("lossguide.losses.demo")
    try:
        loss = ClassLabel("ankle boot")
    except FileNotFoundError:
        pytest.skip("the demo classifier has not been trained yet")
    x = picture(2, 3, 28, 28, dtype=torch.float32)
    assert loss.settings["label"] == 9
    assert torch.equal(loss(x), ClassLabel(9)(x))
    with pytest.raises(ValueError, match=demo.CLASSES[0]):
        ClassLabel("aeroplane")


# --- style


def test_style_of_itself_is_zero_and_of_places_free():
    x = picture(3, 16, 16, dtype=torch.float32)
    loss = Style(x, backbone=lambda image: [image, image[:, :, ::2, ::2] ** 2])
    assert loss(x[None]).item() == pytest.approx(0, abs=1e-12)
    shuffled = x.flatten(1)[:, torch.randperm(256)].view_as(x)[None]
    assert Style(x, backbone=lambda image: image)(shuffled).item() == pytest.approx(0, abs=1e-12)


def test_style_by_clip_takes_patch_tokens(tiny_clip):
    x, y = picture(2, 3, 32, 32, dtype=torch.float32)
    loss = Style(x, backbone="clip", model=tiny_clip, layers=[2])
    clip, seen = load_clip(tiny_clip), []
    block = clip.image.network.transformer.resblocks[2]
    hook = block.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        clip.embed(torch.stack([x, y]))
    hook.remove()
    tokens = seen[0][:, 1:]  # without the class token
    grams = tokens.transpose(1, 2) @ tokens / (32 * 16)
    torch.testing.assert_close(loss(y[None])[0], (grams[0] - grams[1]).square().mean(), rtol=1e-4, atol=1e-9)


def test_style_by_real_vgg16(shared):
    """Against Gram matrices computed here from torchvision's own layers, on a real picture with real weights."""
    from torchvision.models import vgg16

    weights, candy = shared / "real/lpips/vgg16_features.pt", shared / "real/style/candy.jpg"
    features = vgg16().features
    features.load_state_dict(torch.load(weights, weights_only=True))
    loss = Style(candy, weights=weights, size=48)

    def grams(x):
        x = F.interpolate(x, (48, 48), mode="bicubic", antialias=True)
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        for index, layer in enumerate(features[:23]):
            x = layer(x)
            if index in (3, 8, 15, 22):
                yield torch.einsum("bchw,bdhw->bcd", x, x) / x[0].numel()

    x = picture(2, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        expected = sum((a - b).square().mean((1, 2)) for a, b in zip(grams(x), grams(read_image(candy)[None])))
        torch.testing.assert_close(loss(x), expected, rtol=1e-3, atol=0)
    own = read_image(candy)[None]
    other = read_image(shared / "real/style/mosaic.jpg")[None]
    assert loss(own).item() < 1e-9 < loss(other).item()


def test_style_errors(tmp_path, monkeypatch, tiny_clip):
    x = picture(3, 8, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="'vgg16', 'clip', a module"):
        Style(x, backbone="resnet")
    with pytest.raises(FileNotFoundError, match="no file of VGG-16 weights"):
        Style(x, weights=tmp_path / "missing.pt")
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not hold the state dict"):
        Style(x, weights=tmp_path / "other.pt")
    with pytest.raises(ValueError, match="0 to 3, got"):
        Style(x, backbone="clip", model=tiny_clip, layers=[4])

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(OSError, match="could not be downloaded.*no route to host.*pass weights="):
        Style(x)


# --- segmentation


def test_segmentation_is_the_mean_cross_entropy():
    x, network = picture(2, 3, 16, 16, dtype=torch.float32), Convolutions()
    target = torch.randint(0, 4, (8, 8), generator=torch.Generator().manual_seed(0))
    big = target.repeat_interleave(3, 0).repeat_interleave(3, 1)  # the nearest pixel of each is the same class
    expected = F.cross_entropy(network(x), target.expand(2, 8, 8), reduction="none").mean((1, 2))
    for given in (target, big, target.int(), target[None].expand(2, -1, -1)):
        torch.testing.assert_close(Segmentation(network, given)(x), expected)
    torch.testing.assert_close(Segmentation(lambda image: {"out": network(image)}, target)(x), expected)
    free = target.clone()
    free[:, 4:] = -1
    half = F.cross_entropy(network(x)[..., :4], target[:, :4].expand(2, 8, 4), reduction="none").mean((1, 2))
    torch.testing.assert_close(Segmentation(network, free)(x), half)


def test_segmentation_l2_to_a_picture(tmp_path):
    values = (picture(16, 16, 3) * 255).byte()
    Image.fromarray(values.numpy()).save(tmp_path / "a.png")
    network, x = Convolutions(), picture(2, 3, 16, 16, dtype=torch.float32)
    loss = Segmentation(network, tmp_path / "a.png")
    assert loss(read_image(tmp_path / "a.png")[None]).item() == pytest.approx(0, abs=1e-6)
    wanted = network(read_image(tmp_path / "a.png")[None])
    torch.testing.assert_close(loss(x), (network(x) - wanted).flatten(1).norm(dim=1))
    torch.testing.assert_close(Segmentation(network, wanted[0])(x), loss(x))


def test_segmentation_errors():
    x, network = picture(1, 3, 16, 16, dtype=torch.float32), Convolutions()
    with pytest.raises(ValueError, match="class 4 is not one of the network's 4"):
        Segmentation(network, torch.full((8, 8), 4))(x)
    with pytest.raises(ValueError, match="leaves every pixel free"):
        Segmentation(network, torch.full((8, 8), -1))
    with pytest.raises(ValueError, match="integer class indices"):
        Segmentation(network, torch.zeros(8, 8))
    with pytest.raises(ValueError, match="returns scores"):
        Segmentation(Classifier(), torch.zeros(8, 8).long())(x)
    with pytest.raises(ValueError, match="the target \\(5, 8, 8\\)"):
        Segmentation(network, torch.zeros(5, 8, 8))(x)


# --- colour


def test_lab_agrees_with_kornia_and_with_known_colours():
    kornia = pytest.importorskip("kornia")
    x = picture(1, 3, 16, 16)
    torch.testing.assert_close(
        rgb_to_lab(x.movedim(1, -1)), kornia.color.rgb_to_lab(x).movedim(1, -1), atol=2e-2, rtol=1e-4
    )
    known = {(1.0, 0.0, 0.0): (53.24, 80.09, 67.20), (1.0, 1.0, 1.0): (100.0, 0.0, 0.0), (0.0, 0.0, 0.0): (0, 0, 0)}
    for rgb, lab in known.items():
        torch.testing.assert_close(rgb_to_lab(torch.tensor(rgb)), torch.tensor(lab).float(), atol=0.02, rtol=0)


def test_lab_keeps_its_slope_beyond_the_gamut():
    x = torch.tensor([[-0.5, -0.5, -0.5], [1.5, 1.5, 1.5]], requires_grad=True)
    gradient = torch.autograd.grad(rgb_to_lab(x)[:, 0].sum(), x)[0]
    assert (gradient > 0).all()
    assert rgb_to_lab(x)[0, 0] < 0 and rgb_to_lab(x)[1, 0] > 100


def test_mean_colour():
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    for given in ("red", "#ff0000", (1.0, 0.0, 0.0), torch.tensor([1.0, 0.0, 0.0]), "rgb(255, 0, 0)"):
        loss = Color(given)
        assert loss(red).item() == pytest.approx(0, abs=1e-5)
        assert loss(torch.ones_like(red)).item() == pytest.approx(
            (46.76**2 + 80.09**2 + 67.20**2) ** 0.5 / 100, abs=1e-3
        )
    assert not loss.augment


def test_palette():
    half = torch.zeros(1, 3, 8, 8)
    half[..., :4] = 1
    assert Color(["black", "white"])(half).item() == pytest.approx(0, abs=1e-5)
    assert Color(["black", "white"], shares=[1, 1])(half.flip(-1)).item() == pytest.approx(0, abs=1e-5)
    lopsided = Color(["black", "white"], shares=[3, 1])(half).item()  # a quarter of the pixels go from 100 to 0
    assert lopsided == pytest.approx((0.25 * 1.0**2) ** 0.5, abs=1e-4)
    constant = torch.full((1, 3, 8, 8), 0.5)
    one = Color([(1.0, 0.0, 0.0)])(constant)  # of a shift, its length: the mean colour's distance
    torch.testing.assert_close(one, Color((1.0, 0.0, 0.0))(constant))


def test_palette_can_be_descended_from_black():
    x = torch.zeros(1, 3, 8, 8, requires_grad=True)
    loss, optimizer = Color(["red", "blue"]), torch.optim.Adam([x], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss(x).sum().backward()
        optimizer.step()
    assert loss(x).item() < 0.05
    reds = (x[0, 0] > 0.8).sum().item()
    assert reds == 32 and (x[0, 2] > 0.8).sum() == 32


def test_colours_of_a_picture(tmp_path):
    x = picture(3, 12, 12, dtype=torch.float32)
    shuffled = x.flatten(1)[:, torch.randperm(144)].view_as(x)[None]
    assert Color(x)(shuffled).item() == pytest.approx(0, abs=1e-5)
    Image.new("RGB", (4, 4), "#102030").save(tmp_path / "flat.png")
    for given in (str(tmp_path / "flat.png"), tmp_path / "flat.png", Image.open(tmp_path / "flat.png")):
        assert Color(given)(read_image(tmp_path / "flat.png")[None]).item() == pytest.approx(0, abs=1e-5)


def test_colour_errors():
    for wrong in ("no colour", (1.0, 2.0, 0.0), (255, 0, 0), (0.1, 0.2), ["red", "no colour"]):
        with pytest.raises(ValueError, match="colour"):
            Color(wrong)
    with pytest.raises(ValueError, match="shares are 2 numbers"):
        Color(["red", "blue"], shares=[1])
    with pytest.raises(FileNotFoundError, match=r"there is no picture 'missing\.png'"):
        Color("missing.png")


# --- reading pictures


def test_reading_any_mode(tmp_path):
    rgb = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    for mode, suffix in (("L", "png"), ("P", "png"), ("CMYK", "tif"), ("1", "png"), ("YCbCr", "jpg")):
        rgb.convert(mode).save(tmp_path / f"{mode}.{suffix}")
        x = read_image(tmp_path / f"{mode}.{suffix}")
        assert x.shape == (3, 4, 4) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    Image.fromarray(np.full((2, 3), 32768, dtype=np.uint16)).save(tmp_path / "16.png")
    torch.testing.assert_close(read_image(tmp_path / "16.png"), torch.full((3, 2, 3), 32768 / 65535))


def test_transparency_lies_over_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 1).all()
    Image.new("LA", (2, 2), (0, 255)).save(tmp_path / "solid.png")
    assert (read_image(tmp_path / "solid.png") == 0).all()


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 4, 2)


def test_unreadable_pictures(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        read_image(tmp_path / "none.png")
    for name in ("text.png", "cut.png"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="float tensor"):
        read_image(torch.zeros(2, 4, 4))


def test_frames_are_the_mean_of_a_picture_loss():
    video = torch.rand(2, 5, 3, 8, 8)
    dark = lambda image: image.mean((1, 2, 3))
    torch.testing.assert_close(Frames(dark)(video), video.flatten(1).mean(1))
    torch.testing.assert_close(Frames(dark, [0, -1])(video), video[:, [0, -1]].flatten(1).mean(1))
    torch.testing.assert_close(Frames(2 * Color("red"))(video), 2 * Frames(Color("red"))(video))
    many = Frames(Color("red") + 3 * Term(dark, augment=False))
    torch.testing.assert_close(many(video), Frames(Color("red"))(video) + 3 * Frames(dark)(video))
    assert not many.augment and Frames(dark).augment
    still = Measurement(operators.SuperResolution(2), torch.zeros(3, 4, 4), 0.1)
    assert Frames(still).floor == still.floor
    for wrong, told in ((video[:, 0], "for pictures the loss itself"), (video[:, :0], "asked for")):
        with pytest.raises(ValueError, match=told):
            Frames(dark, [0])(wrong)
