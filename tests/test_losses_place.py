"""Losses of what is where and who it is: each against what it should be, and all of them at the extremes."""

from __future__ import annotations

import builtins
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lossguide.guidance import Guidance, recipes
from lossguide.losses import (
    Attribute,
    Depth,
    Detection,
    FaceIdentity,
    Landmarks,
    Saliency,
    Segmentation,
    Sketch,
    read_image,
    registry,
)
from lossguide.losses.areas import SHAPES, Region, inside_outside
from lossguide.losses.detection import giou
from PIL import Image
from torch import nn


def picture(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


class Maps(nn.Module):
    """Two smooth layers; maps of `outside` channels at half the size, through `after`."""

    def __init__(self, outside, after=None, seed=0):
        super().__init__()
        self.a, self.b = seeded(lambda: (nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, outside, 3, 1, 1)), seed)
        self.after = after

    def forward(self, x):
        maps = self.b(torch.tanh(self.a(x)))
        return maps if self.after is None else self.after(maps)


class Vector(Maps):
    def forward(self, x):
        maps = super().forward(x)
        return torch.cat([maps.mean((2, 3)), maps.square().mean((2, 3))], 1)


def list_of_maps(maps):
    return [maps.sigmoid(), maps * 0]


def as_points(maps):
    return maps.mean((2, 3)).sigmoid().unflatten(1, (-1, 2))


def as_queries(maps):
    """What DETR returns: of each place logits of three classes and of nothing, and a box."""
    found = maps.flatten(2).transpose(1, 2)
    return types.SimpleNamespace(logits=found[..., :4], pred_boxes=found[..., 4:].sigmoid())


class Boxes(Maps):
    """What torchvision's detectors return: class i % 3 at place i."""

    def forward(self, x):
        found = super().forward(x).flatten(2).transpose(1, 2)
        corners = torch.cat([found[..., 1:3].sigmoid() / 2, 0.5 + found[..., 3:5].sigmoid() / 2], -1)
        corners = corners * corners.new_tensor([x.shape[3], x.shape[2]] * 2)
        labels = torch.arange(found.shape[1], device=x.device) % 3
        return [{"scores": f[:, 0].sigmoid(), "boxes": c, "labels": labels} for f, c in zip(found, corners)]


def drawing(size=24):
    lines = torch.ones(3, size, size)
    lines[:, size // 4, size // 8 : -size // 8] = 0.1
    lines[:, size // 8 : -size // 8, size // 3] = 0.2
    return lines


BOX = (0.1, 0.2, 0.6, 0.9)
OWN = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "size": (12, 16)}
MAKERS = {
    "segmentation-share": lambda: Segmentation(Maps(4), label=2, share=0.3, size=(12, 16)),
    "segmentation-box": lambda: Segmentation(Maps(4), label=2, mask=BOX, **OWN),
    "segmentation-mask": lambda: Segmentation(Maps(4), label=0, mask=picture(9, 9)),
    "saliency": lambda: Saliency(Maps(1, list_of_maps), "disc", **OWN),
    "saliency-logits": lambda: Saliency(Maps(1), BOX, output="logits"),
    "sketch": lambda: Sketch(drawing()),
    "sketch-extractor": lambda: Sketch(drawing(), Maps(1, torch.sigmoid), extracted="dark", **OWN),
    "depth": lambda: Depth(Maps(1, lambda m: m[:, 0]), picture(9, 9)),
    "depth-picture": lambda: Depth(Maps(1), picture(3, 20, 30, dtype=torch.float32), **OWN),
    "landmarks": lambda: Landmarks(Maps(6, as_points), [[0.1, 0.2], [0.5, 0.5], [math.nan] * 2], **OWN),
    "detection": lambda: Detection(Maps(8, as_queries), 1, BOX, **OWN),
    "detection-anywhere": lambda: Detection(Maps(8, as_queries), 1),
    "detection-dicts": lambda: Detection(Boxes(5), 1, BOX),
    "face-identity": lambda: FaceIdentity(Vector(6), picture(3, 20, 20, dtype=torch.float32), crop=BOX, **OWN),
    "attribute": lambda: Attribute(
        Vector(6), seeded(lambda: nn.Linear(12, 5)), {"smile": (3, 1), "glasses": (0, 0)}, **OWN
    ),
    "attribute-softmax": lambda: Attribute(Vector(3), None, {"smile": (3, 1), "hat": (5, 0)}, activation="softmax"),
}


@pytest.fixture(params=MAKERS)
def loss(request):
    return MAKERS[request.param]()


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
    assert (alone[0] == 0).all() and together.abs().amax((1, 2, 3)).min() > 0


def test_gradient_against_finite_differences(loss):
    x = picture(2, 3, 24, 24).requires_grad_()
    gradient = torch.autograd.grad(loss(x).sum(), x)[0]
    with torch.no_grad():
        for seed in range(3):
            along = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
            slope = (loss(x + 1e-6 * along).sum() - loss(x - 1e-6 * along).sum()) / 2e-6
            torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-5, atol=1e-8)


PICTURES = {
    "black": lambda: torch.zeros(1, 3, 24, 24),
    "white": lambda: torch.ones(1, 3, 24, 24),
    "constant": lambda: torch.full((1, 3, 24, 24), 0.3),
    "overshoot": lambda: picture(1, 3, 24, 24, dtype=torch.float32) * 3 - 1,
    "huge": lambda: 1e4 * (2 * picture(1, 3, 24, 24, dtype=torch.float32) - 1),
    "huge-constant": lambda: torch.full((1, 3, 24, 24), 1e4),
    "wide": lambda: picture(1, 3, 5, 40, dtype=torch.float32),
    "two": lambda: picture(1, 3, 2, 2, dtype=torch.float32),
    "one": lambda: picture(1, 3, 1, 1, dtype=torch.float32),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_finite_gradients_at_extremes(loss, kind):
    x = PICTURES[kind]().requires_grad_()
    value = loss(x)
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images(loss, dtype):
    x = picture(1, 3, 24, 24, dtype=torch.float32).to(dtype).requires_grad_()
    value = loss(x)
    torch.testing.assert_close(loss(x.float()), value.float(), rtol=0.1, atol=0.1)
    assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()


def test_a_network_that_says_always_the_same(loss):
    network = loss.network.network
    if not isinstance(network, nn.Module):
        pytest.skip("no network")
    for value in (0.0, 1e4, -1e4):
        with torch.no_grad():
            for weight in network.parameters():
                weight.zero_()
            network.b.bias.fill_(value)
        x = picture(2, 3, 24, 24, dtype=torch.float32).requires_grad_()
        got = loss(x)
        assert got.isfinite().all() and torch.autograd.grad(got.sum(), x)[0].isfinite().all()


def test_settings_are_plain_data(loss):
    text = json.dumps(loss.terms()[0].describe())
    assert len(text) < 1000 and loss.settings and type(loss).__name__ in text
    assert loss.name in MAKERS or loss.name == "segmentation"


def test_everything_moves_to_the_device_of_the_image(loss):
    if isinstance(loss.network.network, Boxes):
        pytest.skip("how many boxes are of a class is not known without numbers")
    x = torch.rand(2, 3, 24, 24, device="meta", requires_grad=True)
    value = loss(x)
    assert value.shape == (2,) and value.device.type == "meta"
    assert torch.autograd.grad(value.sum(), x)[0].shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda(loss):
    x = picture(2, 3, 24, 24)
    torch.testing.assert_close(loss(x.cuda()).cpu(), loss(x), rtol=1e-6, atol=1e-9)


def test_a_network_of_one_s_own_is_not_saved(loss, tmp_path):
    guidance = Guidance(loss)
    if not isinstance(loss.network.network, nn.Module):
        guidance.save_pretrained(tmp_path)
        x = picture(1, 3, 24, 24)
        assert torch.equal(Guidance.from_pretrained(tmp_path).loss(x), guidance.loss(x))
        return
    with pytest.raises(
        ValueError, match=f"'{loss.name}' cannot be saved: its (network|extractor) is '(Maps|Vector|Boxes)'"
    ):
        guidance.save_pretrained(tmp_path)
    guidance.save_pretrained(tmp_path, losses=False)


def test_arguments_make_the_loss_again(loss):
    x = picture(2, 3, 24, 24)
    again = type(loss)(**loss.arguments)
    assert torch.equal(again(x), loss(x)) and again.settings == loss.settings and again.augment == loss.augment


# --- areas


def drawn(area, height=6, width=8, batch=1):
    return Region(area).over(torch.zeros(batch, height, width, dtype=torch.float64))


def test_a_box_covers_shares_of_pixels():
    mask = drawn((0.0, 0.25, 0.3125, 1.0), 4, 8)[0]
    expected = torch.zeros(4, 8).double()
    expected[1:, :2], expected[1:, 2] = 1, 0.5
    torch.testing.assert_close(mask, expected)
    for box in (BOX, (0.41, 0.52, 0.42, 0.53)):
        for size in ((1, 1), (7, 3), (32, 32)):
            mask = drawn(box, *size)
            assert mask.mean().item() == pytest.approx((box[2] - box[0]) * (box[3] - box[1]), rel=1e-9)


def test_shapes():
    for name in SHAPES:
        mask = drawn(name, 60, 60)[0]
        share = math.pi / 9 if name == "disc" else 0.25 if name == "center" else 0.5
        assert mask.mean().item() == pytest.approx(share, abs=2e-3) and mask.min() >= 0 and mask.max() == 1
        assert drawn(name, 1, 1).sum() > 0
    assert drawn("left")[0, :, :4].all() and not drawn("left")[0, :, 4:].any()
    assert drawn("bottom")[0, 3:].all() and drawn("top")[0, :3].all() and drawn("right")[0, :, 4:].all()
    disc = drawn("disc", 60, 30)[0]
    assert disc[30, 15] == 1
    torch.testing.assert_close(disc, disc.flip(0, 1), atol=1e-5, rtol=0)


def test_masks_of_tensors_and_pictures(tmp_path):
    mask = torch.zeros(6, 8)
    mask[2:, 4:] = 1
    Image.fromarray((mask.numpy() * 255).astype("uint8")).save(tmp_path / "mask.png")
    for given in (mask, mask.bool(), mask.long(), str(tmp_path / "mask.png"), Image.open(tmp_path / "mask.png")):
        torch.testing.assert_close(drawn(given)[0], mask.double())
    big = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert drawn(big)[0].mean().item() == pytest.approx(mask.mean().item(), abs=0.03)
    two = torch.stack([mask, 1 - mask])
    region = Region(two)
    assert region.batch == 2
    torch.testing.assert_close(region.over(torch.zeros(4, 6, 8)), two.repeat(2, 1, 1))


def test_areas_that_are_none():
    for box in ((0.5, 0.0, 0.4, 1.0), (0, 0, 1), (0, 0, 1, 2), (math.nan, 0, 1, 1)):
        with pytest.raises(ValueError, match=r"a box is \(x0, y0, x1, y1\)"):
            Region(box)
    with pytest.raises(FileNotFoundError, match="no picture 'lefft'; shapes are left, right"):
        Region("lefft")
    with pytest.raises(ValueError, match="marks nothing"):
        Region(torch.zeros(4, 4))
    for wrong in (torch.full((4, 4), 2.0), torch.ones(1, 2, 4, 4), torch.full((4, 4), math.nan)):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            Region(wrong)
    with pytest.raises(ValueError, match="an area is a box"):
        Region({"box": 1})


def test_inside_and_outside_count_the_same():
    p = picture(2, 6, 8) * 0.8 + 0.1
    mask = drawn("left", batch=2)
    mask[1] = 0
    mask[1, 2, 3] = 1
    expected = (
        -p.log()[0][mask[0] == 1].mean() / 2 - (1 - p).log()[0][mask[0] == 0].mean() / 2,
        -p[1, 2, 3].log() / 2 - (1 - p).log()[1][mask[1] == 0].mean() / 2,
    )
    torch.testing.assert_close(inside_outside(p.log(), (1 - p).log(), mask), torch.stack(expected))
    torch.testing.assert_close(inside_outside(p.log(), (1 - p).log(), mask * 0 + 1), -p.log().mean((1, 2)))


# --- segmentation


def test_segmentation_of_a_class():
    x, network = picture(2, 3, 16, 16), Maps(4).double()
    p = network(x).softmax(1)[:, 2]
    share = p.mean((1, 2))
    kl = 0.3 * (0.3 / share).log() + 0.7 * (0.7 / (1 - share)).log()
    torch.testing.assert_close(Segmentation(network, label=2, share=0.3)(x), kl)
    torch.testing.assert_close(Segmentation(network, label=2, share=1)(x), -share.log())
    torch.testing.assert_close(Segmentation(network, label=2, share=0.0)(x), -(1 - share).log())
    exact = Segmentation(network, label=2, share=share[0].item())(x)
    assert exact[0].abs() < 1e-12 and exact[1] > 0
    left = -p[:, :, :4].log().mean((1, 2)) / 2 - (1 - p)[:, :, 4:].log().mean((1, 2)) / 2
    for mask in ("left", (0, 0, 0.5, 1), drawn("left", 8, 8)[0]):
        loss = Segmentation(network, label=2, mask=mask)
        torch.testing.assert_close(loss(x), left)
        assert not loss.augment
    both = Segmentation(network, label=2, mask=torch.cat([drawn("left", 8, 8), drawn("top", 8, 8)]))
    assert both.batch == 2
    torch.testing.assert_close(both(x)[1:], Segmentation(network, label=2, mask="top")(x[1:]))


def test_segmentation_asks_for_a_target_or_a_class():
    network = Maps(4)
    target = torch.zeros(8, 8).long()
    for wrong in (
        {},
        {"label": 1},
        {"target": target, "label": 1, "share": 0.5},
        {"target": target, "share": 0.5},
        {"label": 1, "share": 0.5, "mask": "left"},
    ):
        with pytest.raises(ValueError, match="a target; or a label with share= or with mask="):
            Segmentation(network, **wrong)
    with pytest.raises(ValueError, match=r"a share of the picture is in \[0, 1\], got 1.5"):
        Segmentation(network, label=1, share=1.5)
    with pytest.raises(ValueError, match="class 4 is not one of the network's 4"):
        Segmentation(network, label=4, share=0.5)(picture(1, 3, 8, 8))
    with pytest.raises(ValueError, match="no class of the name 'dog'; give the class's index"):
        Segmentation(network, label="dog", share=0.5)


# --- saliency


def test_saliency():
    x, network = picture(2, 3, 16, 16), Maps(1).double()
    p = network(x)[:, 0].sigmoid()
    expected = -p[:, :4].log().mean((1, 2)) / 2 - (1 - p)[:, 4:].log().mean((1, 2)) / 2
    torch.testing.assert_close(Saliency(network, "top", output="logits")(x), expected)
    shapes = (lambda p: p, lambda p: p[:, 0], lambda p: (p, p * 0), lambda p: [[p, p * 0]], lambda p: {"out": p})
    for shape in shapes:
        got = Saliency(lambda image, shape=shape: shape(network(image).sigmoid()), "top")(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    perfect = torch.zeros(1, 3, 8, 8)
    perfect[:, :, :4] = 1
    assert Saliency(lambda image: image[:, :1], "top")(perfect).item() < 2e-6
    assert Saliency(lambda image: image[:, :1], "top")(1 - perfect).item() == pytest.approx(-math.log(1e-6), rel=1e-3)


def test_saliency_that_is_sure_of_the_contrary_still_has_a_gradient():
    for value in (-8.0, 8.0):
        x = torch.full((1, 3, 8, 8), value, requires_grad=True)
        gradient = torch.autograd.grad(Saliency(lambda image: image[:, :1].sigmoid(), "top")(x).sum(), x)[0]
        wrong = gradient[:, 0, :4] if value < 0 else gradient[:, 0, 4:]
        assert wrong.abs().min() > 0.9 / 64


def test_saliency_errors():
    x = picture(1, 3, 8, 8)
    with pytest.raises(ValueError, match="'probability' or 'logits', got 'map'"):
        Saliency(Maps(1), "left", output="map")
    with pytest.raises(ValueError, match="returned -.* output='logits'"):
        Saliency(lambda image: image[:, :1] - 3, "left")(x)
    with pytest.raises(ValueError, match=r"one map \(1, 1, h, w\), got \(1, 2, 4, 4\)"):
        Saliency(Maps(2), "left")(x)
    with pytest.raises(ValueError, match="2 masks for 3 images"):
        Saliency(Maps(1), torch.ones(2, 4, 4), output="logits")(x.repeat(3, 1, 1, 1))


def test_saliency_by_real_u2net(shared):
    """A bright disc on black is found where it is, and the loss can be descended on a real picture."""
    onnx2torch = pytest.importorskip("onnx2torch")
    network = onnx2torch.convert(str(shared / "real/saliency/u2netp.onnx"))
    own = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "size": 320}
    with torch.no_grad():
        disc = Region("disc").over(torch.zeros(1, 160, 160)).expand(1, 3, -1, -1)
        found = [Saliency(network, area, **own)(0.1 + 0.8 * disc).item() for area in ("disc", "left", "top")]
    assert found[0] < 0.3 * min(found[1:])
    photo = F.interpolate(read_image(shared / "real/style/candy.jpg")[None], (64, 64), mode="area")
    x = photo.clone().requires_grad_()
    loss, values = Saliency(network, "left", **own), []
    for _ in range(4):
        value = loss(x)
        values.append(value.item())
        gradient = torch.autograd.grad(value.sum(), x)[0]
        assert gradient.isfinite().all() and gradient.abs().max() > 0
        x = (x - 2 * gradient / gradient.norm()).detach().requires_grad_()
    assert values[-1] < 0.7 * values[0], values


# --- sketch


def square(where, size=32):
    """A dark filled square on grey."""
    image = torch.full((1, 3, size, size), 0.7, dtype=torch.float64)
    image[:, :, where : where + 12, where : where + 12] = 0.2
    return image


def outline(where, size=32):
    lines = torch.ones(3, size, size)
    lines[:, where : where + 12, where : where + 12] = 0
    lines[:, where + 1 : where + 11, where + 1 : where + 11] = 1
    return lines


def test_sketch_is_the_angle_of_blurred_edges():
    """Against Sobel's masks and a Gauss bell written out here."""
    from scipy.ndimage import correlate, correlate1d

    x, size = picture(3, 20, 20), 20
    mask = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    slopes = [correlate(c.numpy(), m, mode="nearest") for c in x for m in (mask, mask.T)]
    edges = np.square(slopes).sum(0) / 3
    edges = np.sqrt(edges + 1e-4) - 0.01
    lines = 1 - outline(4, size).double()[0].numpy()
    sigma = 0.1 * size
    bell = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
    for axis in (0, 1):
        edges, lines = (correlate1d(m, bell / bell.sum(), axis, mode="nearest") for m in (edges, lines))
    cosine = (edges * lines).mean() / np.sqrt((np.square(edges).mean() + 1e-6) * np.square(lines).mean())
    got = Sketch(outline(4, size), blur=0.1)(x[None]).item()
    assert got == pytest.approx(1 - cosine, rel=1e-6)


def test_sketch_prefers_what_was_drawn():
    loss = Sketch(outline(4))
    here, near, far = (loss(square(at)).item() for at in (4, 6, 16))
    assert here < 0.15 and here < near < far
    assert loss(torch.full((1, 3, 32, 32), 0.5)).item() == pytest.approx(1)
    for changed in (square(4) * 0.3, 1 - square(4), square(4) * 2 - 1):  # contrast and sign do not matter
        assert loss(changed).item() == pytest.approx(here, abs=0.02)
    assert not loss.augment


def test_sketch_takes_dark_or_light_lines_on_any_paper(tmp_path):
    dark, x = outline(4), square(6)
    wanted = Sketch(dark)(x)
    for other in (1 - dark, 0.2 + 0.5 * dark, 0.6 - 0.4 * dark, dark.double()):
        torch.testing.assert_close(Sketch(other)(x), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(Sketch(1 - dark, lines="light")(x), wanted)
    grey = dark[0].byte() * 255
    Image.fromarray(grey.numpy()).save(tmp_path / "drawing.png")
    for given in (tmp_path / "drawing.png", Image.fromarray(grey.numpy())):
        torch.testing.assert_close(Sketch(given)(x), wanted)
    named = registry.parse(f"2*sketch:{tmp_path / 'drawing.png'}")
    torch.testing.assert_close(named(x), 2 * wanted)
    assert "sketch" in {entry.name for entry in registry.available()}
    extractor = lambda image: [1 - image[:, :1]]
    torch.testing.assert_close(Sketch(dark, extractor, blur=0)(dark[None].double()).item(), 0.0, atol=1e-4, rtol=0)
    on_white = lambda image: image[:, 0]
    assert Sketch(dark, on_white, extracted="dark", blur=0)(dark[None].double()).item() == pytest.approx(0, abs=1e-4)


def test_sketch_can_be_descended():
    torch.manual_seed(0)
    x = (0.5 + 0.1 * torch.randn(1, 3, 32, 32)).requires_grad_()
    loss, optimizer = Sketch(outline(8)), torch.optim.Adam([x], lr=0.03)
    first = loss(x).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(x).sum().backward()
        optimizer.step()
    assert loss(x).item() < 0.4 * first


def test_sketch_errors():
    with pytest.raises(ValueError, match="holds no lines: it is of one shade"):
        Sketch(torch.ones(3, 8, 8))
    with pytest.raises(ValueError, match="holds no lines.*light"):
        Sketch(outline(4), lines="light")
    with pytest.raises(ValueError, match="'auto', 'dark' or 'light', got 'red'"):
        Sketch(outline(4), lines="red")
    with pytest.raises(ValueError, match="'dark' or 'light', got 'auto'"):
        Sketch(outline(4), extracted="auto")
    with pytest.raises(ValueError, match="blur is a share"):
        Sketch(outline(4), blur=2)
    with pytest.raises(FileNotFoundError):
        Sketch("missing.png")
    with pytest.raises(ValueError, match="an extractor returns lines"):
        Sketch(outline(4), Maps(2))(picture(1, 3, 8, 8))


def test_a_sketch_comes_back_from_a_folder(tmp_path):
    Image.fromarray((outline(4)[0].byte() * 255).numpy()).save(tmp_path / "gone.png")
    guidance = recipes.dps(Sketch(tmp_path / "gone.png", lines="dark", blur=0.05))
    (tmp_path / "gone.png").unlink()
    guidance.save_pretrained(tmp_path / "saved")
    loaded = Guidance.from_pretrained(tmp_path / "saved")
    assert loaded.to_dict() == guidance.to_dict()
    assert torch.equal(loaded.loss(square(5)), guidance.loss(square(5)))


# --- depth


def test_depth_is_one_less_the_correlation():
    x, target = picture(2, 3, 8, 8), picture(8, 8, seed=1)
    got = Depth(lambda image: image[:, 0], target)(x)
    expected = [1 - np.corrcoef(one.flatten(), target.flatten())[0, 1] for one in x[:, 0].numpy()]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-7, atol=1e-9)
    scaled = Depth(lambda image: 300 * image[:, :1] - 7000, 0.001 * target + 5)(x)
    torch.testing.assert_close(scaled, got, rtol=1e-5, atol=0)
    for shape in (lambda d: {"predicted_depth": d}, lambda d: types.SimpleNamespace(predicted_depth=d), lambda d: [d]):
        torch.testing.assert_close(Depth(lambda image, s=shape: s(image[:, 0]), target)(x), got)
    assert Depth(lambda image: image[:, 0], -target)(x).sum().item() == pytest.approx(4 - got.sum().item(), rel=1e-6)


def test_depth_of_itself_is_zero(tmp_path):
    values = (picture(16, 16, 3) * 255).byte()
    Image.fromarray(values.numpy()).save(tmp_path / "a.png")
    x = read_image(tmp_path / "a.png")[None]
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), x[0], Image.open(tmp_path / "a.png")):
        y = x.clone().requires_grad_()
        value = Depth(Maps(1), given)(y)
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert torch.autograd.grad(value.sum(), y)[0].isfinite().all()


def test_depth_of_a_part():
    x, target = picture(2, 3, 8, 8), picture(8, 8, seed=1)
    target[:, :3] = math.nan
    got = Depth(lambda image: image[:, 0], target)(x)
    kept = target[:, 3:].flatten()
    expected = [1 - np.corrcoef(one[:, 3:].flatten(), kept)[0, 1] for one in x[:, 0].numpy()]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-7, atol=1e-9)
    big = target.repeat_interleave(2, 0).repeat_interleave(2, 1)
    close = Depth(lambda image: image[:, 0], big)(x)
    torch.testing.assert_close(close, got, atol=0.15, rtol=0)
    both = Depth(lambda image: image[:, 0], torch.stack([target, target.flip(0)])[:, None])
    assert both.batch == 2 and torch.equal(both(x)[:1], got[:1])


def test_depth_errors():
    x = picture(1, 3, 8, 8)
    with pytest.raises(ValueError, match="one depth everywhere"):
        Depth(Maps(1), torch.ones(8, 8))
    with pytest.raises(ValueError, match="leaves every pixel free"):
        Depth(Maps(1), torch.full((8, 8), math.nan))
    for wrong in (torch.zeros(8, 8).long(), torch.rand(2, 8, 8), torch.rand(2, 3, 8, 8)):
        with pytest.raises(ValueError, match="a target is a picture, or depth"):
            Depth(Maps(1), wrong)
    with pytest.raises(ValueError, match="a depth network returns"):
        Depth(Maps(2), torch.rand(8, 8))(x)
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere' with a config.json"):
        Depth("nowhere", torch.rand(8, 8))


# --- landmarks


def test_landmarks():
    found = picture(2, 3, 2)
    wanted = [[0.1, 0.2], [0.5, 0.5], [0.9, 0.3]]
    x = picture(2, 3, 8, 8)
    away = np.linalg.norm(found.numpy() - np.array(wanted), axis=-1)
    for network in (lambda image: found, lambda image: found.flatten(1), lambda image: [found]):
        torch.testing.assert_close(Landmarks(network, wanted)(x), torch.tensor(away.mean(1)))
    seen = torch.tensor(away[:, :2].mean(1))
    torch.testing.assert_close(Landmarks(lambda image: found, wanted, visible=[True, True, False])(x), seen)
    torch.testing.assert_close(Landmarks(lambda image: found, [*wanted[:2], [math.nan, 0.3]])(x), seen)
    each = Landmarks(lambda image: found, [wanted, wanted], visible=[[True] * 3, [False, False, True]])
    torch.testing.assert_close(each(x), torch.tensor([away[0].mean(), away[1, 2]]))
    assert each.batch == 2
    at = found.clone().requires_grad_()
    value = Landmarks(lambda image: at, found)(x)
    assert (value == 0).all() and (torch.autograd.grad(value.sum(), at)[0] == 0).all()


def test_landmarks_errors():
    with pytest.raises(ValueError, match=r"points are \(K, 2\)"):
        Landmarks(Maps(6, as_points), [0.1, 0.2])
    with pytest.raises(ValueError, match="no point is visible"):
        Landmarks(Maps(6, as_points), [[0.1, 0.2]], visible=[False])
    with pytest.raises(ValueError, match=r"visible is \(1,\)"):
        Landmarks(Maps(6, as_points), [[0.1, 0.2]], visible=[True, True])
    with pytest.raises(ValueError, match=r"returns points \(1, 2, 2\), got \(1, 3, 2\)"):
        Landmarks(Maps(6, as_points), torch.rand(2, 2))(picture(1, 3, 8, 8))


# --- detection


def test_giou_agrees_with_torchvision():
    ops = pytest.importorskip("torchvision.ops")
    boxes = torch.cat([picture(50, 2), 1 + picture(50, 2, seed=1)], 1) / 2
    boxes = torch.cat([boxes, boxes / 4, torch.tensor([[0.2, 0.2, 0.2, 0.2], [*BOX]])])
    expected = ops.generalized_box_iou(boxes, torch.tensor([BOX], dtype=boxes.dtype))[:, 0]
    torch.testing.assert_close(giou(boxes, boxes.new_tensor(BOX)), expected)


def test_detection_takes_the_best_of_score_and_place():
    scores = torch.tensor([0.9, 0.6, 0.5, 0.99])
    boxes = torch.tensor([[0.0, 0.0, 2.0, 4.0], [4.0, 0.0, 8.0, 4.0], [4.0, 2.0, 8.0, 4.0], [4.0, 2.0, 8.0, 4.0]])
    found = {"scores": scores, "boxes": boxes, "labels": torch.tensor([1, 1, 1, 2])}
    nothing = {"scores": scores[:0], "boxes": boxes[:0], "labels": found["labels"][:0]}
    x = torch.rand(2, 3, 4, 8)
    values = Detection(lambda image: [found, nothing], 1, (0.5, 0.0, 1.0, 1.0))(x)
    torch.testing.assert_close(values[0], -torch.tensor(0.6).log())  # it fits; 0.9 is elsewhere
    assert values[1].item() == pytest.approx(-math.log(1e-12))
    half = Detection(lambda image: [found, found], 1, (0.5, 0.5, 1.0, 1.0))(x)
    torch.testing.assert_close(half[0], -torch.tensor(0.5).log())
    assert Detection(lambda image: [found, found], 1)(x)[0].item() == pytest.approx(-math.log(0.9), rel=1e-5)
    assert Detection(lambda image: [found, found], 1).augment


def test_detection_has_a_gradient_where_boxes_do_not_meet():
    at = torch.tensor([[0.0, 0.0, 1.0, 1.0]], requires_grad=True)
    found = lambda image: [{"scores": torch.ones(1), "boxes": at, "labels": torch.ones(1)}]
    value = Detection(found, 1, (0.5, 0.5, 1.0, 1.0))(torch.rand(1, 3, 8, 8))
    gradient = torch.autograd.grad(value.sum(), at)[0]
    assert (gradient[0, 2:] < 0).all()  # the lower corner is to go on


def test_detection_by_queries():
    x, network = picture(2, 3, 8, 8), Maps(8, as_queries).double()
    out = network(x)
    middle, side = out.pred_boxes[..., :2], out.pred_boxes[..., 2:]
    corners = torch.cat([middle - side / 2, middle + side / 2], -1)
    for softmax in (True, False):
        network.config = types.SimpleNamespace(num_labels=3 if softmax else 4, label2id={"cat": 1})
        score = (out.logits.softmax(-1) if softmax else out.logits.sigmoid())[..., 1]
        fit = torch.stack([(1 + giou(c, c.new_tensor(BOX))) / 2 for c in corners])
        expected = -(score * fit).amax(1).log()
        torch.testing.assert_close(Detection(network, 1, BOX)(x), expected)
        torch.testing.assert_close(Detection(network, "cat", BOX)(x), expected)
    with pytest.raises(ValueError, match="no class of the name 'dog'; it has cat"):
        Detection(network, "dog")
    network.config.num_labels = 3
    with pytest.raises(ValueError, match="label 3 is not one of the detector's classes, 0 to 2"):
        Detection(network, 3)(x)


def test_detection_errors():
    with pytest.raises(ValueError, match="a box is"):
        Detection(Boxes(5), 1, (0, 0, 1))
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="a label is a class index"):
            Detection(Boxes(5), wrong)
    with pytest.raises(ValueError, match="a detector returns 1 dicts"):
        Detection(Maps(8), 1)(picture(1, 3, 8, 8))


class Backbone(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, channels, 3, 2, 1)
        self.out_channels = channels

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def detector(kind):
    """torchvision's own detectors with random weights, five classes, 48 px."""
    from torchvision.models import detection as d
    from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.ops import MultiScaleRoIAlign

    size, anchors = {"min_size": 48, "max_size": 48}, AnchorGenerator(((8, 16, 32),), ((0.5, 1.0, 2.0),))
    pool = MultiScaleRoIAlign(["0"], 3, 2)
    backbone = Backbone(8 if kind in ("faster", "mask", "keypoint", "ssd") else 32)
    if kind == "faster":
        return d.FasterRCNN(backbone, 5, rpn_anchor_generator=anchors, box_roi_pool=pool, **size)
    if kind == "mask":
        return d.MaskRCNN(backbone, 5, rpn_anchor_generator=anchors, box_roi_pool=pool, mask_roi_pool=pool, **size)
    if kind == "keypoint":
        return d.KeypointRCNN(
            backbone, 5, rpn_anchor_generator=anchors, box_roi_pool=pool, keypoint_roi_pool=pool, **size
        )
    if kind == "retina":
        return d.RetinaNet(backbone, 5, anchor_generator=anchors, **size)
    if kind == "fcos":
        return d.FCOS(backbone, 5, anchor_generator=AnchorGenerator(((16,),), ((1.0,),)), **size)
    backbone.out_channels = [8]
    return SSD(backbone, DefaultBoxGenerator([[2]]), (48, 48), 5)


@pytest.mark.parametrize("kind", ["faster", "mask", "keypoint", "retina", "fcos", "ssd"])
def test_detection_by_torchvision(kind):
    network = seeded(lambda: detector(kind)).eval()
    x = picture(2, 3, 48, 48).requires_grad_()
    holder = network.roi_heads if hasattr(network, "roi_heads") else network
    holder.score_thresh = 0.999  # nothing is detected
    before = {key: value for key, value in vars(holder).items() if not key.startswith("_")}
    assert not any(len(one["scores"]) for one in network(x.detach().float()))
    for box in (None, BOX):
        loss = Detection(network, 2, box)
        value = loss(x)
        gradient = torch.autograd.grad(value.sum(), x)[0]
        assert value.dtype == torch.float64 and gradient.isfinite().all() and value.max() < 10
        assert gradient.abs().amax((1, 2, 3)).min() > 0
        torch.testing.assert_close(loss(x[1:]), value[1:])
        along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        with torch.no_grad():
            slope = (loss(x + 1e-6 * along).sum() - loss(x - 1e-6 * along).sum()) / 2e-6
        # the proposals of an R-CNN are fixed to the gradient, and not to the difference
        slack = 1e-4 if kind in ("retina", "fcos", "ssd") else 0.02 * gradient.norm().item() * 48
        torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-4, atol=slack)
        for scale in (0.0, 1.0, 1e4, -1e4):
            y = torch.full((1, 3, 48, 48), scale, requires_grad=True)
            far = loss(y)
            assert far.isfinite().all() and torch.autograd.grad(far.sum(), y)[0].isfinite().all()
    assert loss(x.detach().bfloat16()).dtype == torch.float32
    after = {key: value for key, value in vars(holder).items() if not key.startswith("_")}
    assert before == after and not any(module._forward_hooks for module in network.modules())
    assert not any(len(one["scores"]) for one in network(x.detach().float())), "left as it was"
    with pytest.raises(ValueError, match="label 7 is not one of the detector's classes"):
        Detection(network, 7)(x)
    y = x.detach().float()
    for _ in range(8):
        y = y.requires_grad_()
        gradient = torch.autograd.grad(loss(y).sum(), y)[0]
        y = (y - gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).detach()
    assert (loss(y) < loss(x.detach().float())).all()


@pytest.mark.parametrize("kind", ["faster", "ssd", "retina", "fcos"])
def test_detection_scores_are_torchvision_s_own(kind):
    network = seeded(lambda: detector(kind)).eval()
    holder = network.roi_heads if kind == "faster" else network
    holder.score_thresh, holder.detections_per_img, holder.topk_candidates = 1e-9, 10**6, 10**6
    x = picture(2, 3, 48, 48, dtype=torch.float32)
    with torch.no_grad():
        found = network(x)
        best = torch.stack([-one["scores"][one["labels"] == 2].max().log() for one in found])
        torch.testing.assert_close(Detection(network, 2)(x), best, rtol=1e-4, atol=1e-5)


# --- faces


def test_face_identity_is_the_angle_of_embeddings():
    network, x, wanted = Vector(6).double(), picture(2, 3, 20, 30), picture(3, 16, 16, dtype=torch.float32)
    a, b = network(x), network(wanted[None].double())
    expected = 1 - (a @ b[0]) / a.norm(dim=1) / b.norm()
    torch.testing.assert_close(FaceIdentity(network, wanted)(x), expected, rtol=1e-5, atol=1e-7)
    box = (0.1, 0.25, 0.5, 0.75)
    loss = FaceIdentity(network, wanted, crop=box)
    torch.testing.assert_close(loss(x), FaceIdentity(network, wanted)(x[:, :, 5:15, 3:15]))
    assert not loss.augment and FaceIdentity(network, wanted).augment
    y = x.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(y).sum(), y)[0]
    assert (gradient[..., 5:15, 3:15] != 0).all() and (gradient != 0).sum() == 2 * 3 * 10 * 12
    own = FaceIdentity(network, x[0], crop=box, picture_crop=box)
    assert own(x[:1]).item() == pytest.approx(0, abs=1e-9) and own(x)[1] > 0
    turned = FaceIdentity(network, wanted, align=lambda image: image.flip(-1))
    torch.testing.assert_close(turned(x), FaceIdentity(network, wanted.flip(-1))(x.flip(-1)))


def test_face_identity_errors(monkeypatch):
    face = picture(3, 8, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="'vggface2', 'casia-webface', a module or a callable, got 'arcface'"):
        FaceIdentity("arcface", face)
    with pytest.raises(ValueError, match="a box is"):
        FaceIdentity(Vector(2), face, crop=(0, 0, 1))
    with pytest.raises(ValueError, match="returns embeddings"):
        FaceIdentity(Maps(2), face)
    with pytest.raises(FileNotFoundError):
        FaceIdentity(Vector(2), "missing.png")
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(ImportError, match="'vggface2' needs facenet-pytorch, .*pip install facenet-pytorch"):
        FaceIdentity("vggface2", face)


def test_faces_by_name(monkeypatch, tmp_path):
    """facenet-pytorch itself is not at hand; what of it is used is."""
    asked = []

    def resnet(pretrained):
        asked.append(pretrained)
        if len(asked) > 3:
            raise OSError("no route to host")
        return Vector(6)

    monkeypatch.setitem(sys.modules, "facenet_pytorch", types.SimpleNamespace(InceptionResnetV1=resnet))
    face, x = picture(3, 160, 160, dtype=torch.float32), picture(1, 3, 160, 160)
    loss = FaceIdentity("vggface2", face)
    plain = FaceIdentity(lambda image: Vector(6).double()(image.double()), (face * 255 - 127.5) / 128)
    torch.testing.assert_close(loss(x), plain((x * 255 - 127.5) / 128), rtol=1e-4, atol=1e-6)
    assert loss.network.size == 160
    guidance = Guidance(FaceIdentity("vggface2", face, crop=BOX))
    guidance.save_pretrained(tmp_path)
    assert torch.equal(guidance.loss(x), Guidance.from_pretrained(tmp_path).loss(x)) and set(asked) == {"vggface2"}
    with pytest.raises(OSError, match="'casia-webface' could not be downloaded .no route to host.; pass a module"):
        FaceIdentity("casia-webface", face)


# --- attributes


def test_attributes():
    x, network = picture(3, 3, 8, 8), Vector(6).double()
    head = seeded(lambda: nn.Linear(12, 5)).double()
    logits = head(network(x))
    probabilities = {"sigmoid": logits.sigmoid(), "softmax": logits.softmax(1)}
    want = {"smile": (3, 1), "glasses": (0, 0), "some": (1, 0.25)}
    for activation, p in probabilities.items():
        terms = [-p[:, 3].log(), -(1 - p[:, 0]).log(), -0.25 * p[:, 1].log() - 0.75 * (1 - p[:, 1]).log()]
        got = Attribute(network, head, want, activation=activation)(x)
        torch.testing.assert_close(got, torch.stack(terms).mean(0))
        torch.testing.assert_close(Attribute(network, head, {"smile": (3, 1)}, activation=activation)(x), terms[0])
        whole = nn.Sequential(network, head)
        torch.testing.assert_close(Attribute(whole, None, want, activation=activation)(x), got)
    high = Attribute(network, head, {"a": (2, 1)})
    y = x.clone().requires_grad_()
    down = torch.autograd.grad(high(y).sum(), y)[0]
    assert (head(network(x - 0.01 * down))[:, 2] > logits[:, 2]).all()


def test_attributes_errors():
    network, x = Vector(2), picture(1, 3, 8, 8)
    for wrong in ({}, [(1, 1)], None):
        with pytest.raises(ValueError, match="what is wanted is a mapping"):
            Attribute(network, None, wrong)
    for pair in ((1,), (-1, 1), (1, 2), (0.5, 1), 3):
        with pytest.raises(ValueError, match=r"'smile' is \(index from 0 on, wanted 1 or 0\)"):
            Attribute(network, None, {"smile": pair})
    with pytest.raises(ValueError, match="'sigmoid' or 'softmax', got 'tanh'"):
        Attribute(network, None, {"a": (0, 1)}, activation="tanh")
    with pytest.raises(ValueError, match="'a' is logit 4, and the head has 4"):
        Attribute(network, None, {"a": (4, 1)})(x)
    with pytest.raises(ValueError, match="a head returns logits"):
        Attribute(Maps(2), None, {"a": (0, 1)})(x)


def test_attributes_by_real_mobilenet(shared):
    """A few steps make a real classifier see what is wanted."""
    pytest.importorskip("torchvision")
    import importlib.util

    spec = importlib.util.spec_from_file_location("real_load", shared / "real/load.py")
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    net = load.mobilenet_v2()
    features = lambda image: net.features(image).mean((2, 3))
    own = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "size": 128}
    x = F.interpolate(read_image(shared / "real/style/candy.jpg")[None], (64, 64), mode="area")
    want = {"tabby": (281, 1), "strawberry": (949, 0)}
    loss = Attribute(features, net.classifier, want, activation="softmax", **own)
    whole = Attribute(net, None, want, activation="softmax", **own)
    torch.testing.assert_close(loss(x), whole(x), rtol=1e-4, atol=1e-5)
    values = []
    for _ in range(6):
        x = x.detach().requires_grad_()
        value = loss(x)
        values.append(value.item())
        gradient = torch.autograd.grad(value.sum(), x)[0]
        x = x - gradient / gradient.norm()
    assert values[-1] < 0.6 * values[0], values
    face = FaceIdentity(features, x.detach()[0], crop=(0, 0, 1, 1), **own)  # any embedding will do
    assert face(x.detach()).item() == pytest.approx(0, abs=1e-5)


# --- folders of transformers models


def saved_model(folder, config, kind, **preprocessing):
    transformers = pytest.importorskip("transformers")
    seeded(lambda: getattr(transformers, kind)(config)).eval().save_pretrained(folder)
    if preprocessing:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return getattr(transformers, kind).from_pretrained(folder).eval()


def tiny_glpn():
    from transformers import GLPNConfig

    return GLPNConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
    )  # fmt: skip


def test_depth_by_a_folder(tmp_path):
    model = saved_model(tmp_path, tiny_glpn(), "GLPNForDepthEstimation")
    x = picture(2, 3, 32, 32, dtype=torch.float32)
    found = model(x).predicted_depth.detach()
    target = picture(*found.shape[1:], seed=1)
    loss = Depth(tmp_path, target)
    torch.testing.assert_close(loss(x), Depth(model, target)(x))
    expected = [1 - np.corrcoef(one.flatten(), target.flatten())[0, 1] for one in found]
    torch.testing.assert_close(loss(x), torch.tensor(expected).float(), rtol=1e-3, atol=1e-4)
    guidance = Guidance(Depth(str(tmp_path), x[0]))
    guidance.save_pretrained(tmp_path / "guidance")
    assert torch.equal(Guidance.from_pretrained(tmp_path / "guidance").loss(x), guidance.loss(x))


def test_segmentation_by_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=3,
        id2label={0: "sky", 1: "dog", 2: "grass"}, label2id={"sky": 0, "dog": 1, "grass": 2},
    )  # fmt: skip
    own = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "size": {"height": 16, "width": 24}}
    model = saved_model(tmp_path, config, "SegformerForSemanticSegmentation", **own)
    x = picture(2, 3, 32, 32, dtype=torch.float32)
    same = {"mean": own["image_mean"], "std": own["image_std"], "size": (16, 24)}
    loss = Segmentation(tmp_path, label="dog", mask="left")
    torch.testing.assert_close(loss(x), Segmentation(model, label=1, mask="left", **same)(x))
    guidance = Guidance(Segmentation(str(tmp_path), label="grass", share=0.25))
    guidance.save_pretrained(tmp_path / "guidance")
    assert torch.equal(Guidance.from_pretrained(tmp_path / "guidance").loss(x), guidance.loss(x))
    with pytest.raises(ValueError, match="no class of the name 'cat'; it has sky, dog, grass"):
        Segmentation(tmp_path, label="cat", share=0.2)


def test_detection_by_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=5, num_labels=3,
    )  # fmt: skip
    model = saved_model(tmp_path, config, "YolosForObjectDetection", size={"shortest_edge": 32, "longest_edge": 64})
    x = picture(2, 3, 24, 24, dtype=torch.float32).requires_grad_()
    loss = Detection(tmp_path, 1, BOX)
    torch.testing.assert_close(loss(x), Detection(model, 1, BOX, size=32)(x))
    assert loss.network.size == 32
    gradient = torch.autograd.grad(loss(x).sum(), x)[0]
    assert gradient.isfinite().all() and gradient.abs().amax((1, 2, 3)).min() > 0
    guidance = Guidance(Detection(str(tmp_path), 1, BOX))
    guidance.save_pretrained(tmp_path / "guidance")
    assert torch.equal(Guidance.from_pretrained(tmp_path / "guidance").loss(x), guidance.loss(x))


def test_a_folder_runs_no_code_and_opens_no_pickle(tmp_path, monkeypatch):
    saved_model(tmp_path, tiny_glpn(), "GLPNForDepthEstimation")
    target = torch.rand(8, 8)
    config = json.loads((tmp_path / "config.json").read_text())
    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n")
    evil = config | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(evil))
    with pytest.raises(OSError, match="could not be loaded by AutoModelForDepthEstimation"):
        Depth(tmp_path, target)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    torch.save({}, tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="could not be loaded"):
        Depth(tmp_path, target)
    assert not marker.exists()
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="needs transformers, which is not installed: pip install transformers"):
        Depth(tmp_path, target)
