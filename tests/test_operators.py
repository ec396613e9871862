"""Operators: transposes, pseudo-inverses, centring; the measurement loss and its noise floor."""

from __future__ import annotations

import pytest
import torch
from lossguide.losses import Measurement, measure
from lossguide.losses.operators import (
    Chain,
    Colorize,
    Fourier,
    GaussianBlur,
    Inpaint,
    Kernel,
    MotionBlur,
    Outpaint,
    SuperResolution,
)
from PIL import Image


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.rand(2, 1, 12, 16, generator=torch.Generator().manual_seed(77)) > 0.5
OPERATORS = [
    Inpaint(MASK),
    Inpaint(MASK[0, 0]),
    SuperResolution(4),
    SuperResolution(1),
    GaussianBlur(9, 2.0),
    GaussianBlur(1, 2.0),
    SuperResolution(4, "bicubic"),
    Outpaint(),
    Outpaint((0.1, 0.2, 0.6, 1.0)),
    MotionBlur(7.5, 30.0),
    Kernel(noise(3, 4)),
    Kernel(noise(21, 5), "zeros"),
    Kernel(noise(25, 4), "circular"),
    Kernel(torch.full((4, 4), 1 / 16), "circular"),  # blind to some frequencies
    Colorize(),
    Fourier(MASK[0, 0]),
    Fourier(torch.ones(12, 16)),
    Chain(GaussianBlur(5, 1.0), SuperResolution(2), Inpaint(MASK[0, 0, :6, :8])),
    Chain(SuperResolution(2), Kernel(noise(3, 5), "circular")),
    Chain(Chain(SuperResolution(2), Colorize()), Outpaint()),
]


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_adjoint_is_the_transpose(operator):
    x = noise(2, 3, 12, 16)
    y = noise(*operator(x).shape, seed=1)
    back = operator.adjoint(y, x.shape)
    assert back.shape == x.shape
    torch.testing.assert_close((operator(x) * y).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_linear(operator):
    a, b = noise(2, 3, 12, 16), noise(2, 3, 12, 16, seed=1)
    torch.testing.assert_close(operator(2 * a - b), 2 * operator(a) - operator(b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_adjoint_is_the_transpose_of_the_derivative(operator):
    x = noise(2, 3, 12, 16).requires_grad_()
    y = operator(x)
    w = noise(*y.shape, seed=1)
    torch.testing.assert_close(operator.adjoint(w, x.shape), torch.autograd.grad(y, x, w)[0])


@pytest.mark.parametrize("operator", [op for op in OPERATORS if hasattr(op, "pseudo_inverse")], ids=repr)
def test_pseudo_inverse_has_the_four_penrose_properties(operator):
    x = noise(2, 3, 12, 16)
    y = operator(x)
    torch.testing.assert_close(operator(operator.pseudo_inverse(y)), y)
    w = noise(*y.shape, seed=2)
    inner = operator.pseudo_inverse(operator(operator.pseudo_inverse(w)))
    torch.testing.assert_close(inner, operator.pseudo_inverse(w))
    z = noise(2, 3, 12, 16, seed=3)
    project = lambda v: operator.pseudo_inverse(operator(v))
    torch.testing.assert_close((project(x) * z).sum(), (x * project(z)).sum())


def test_block_mean_is_centred():
    ramp = torch.arange(12.0).expand(1, 3, 12, 12)
    torch.testing.assert_close(SuperResolution(4)(ramp)[0, 0, 0], torch.tensor([1.5, 5.5, 9.5]))
    flipped = SuperResolution(2)(ramp.flip(-1)).flip(-1)
    torch.testing.assert_close(flipped, SuperResolution(2)(ramp))


def test_blur_agrees_with_torchvision():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    x = noise(2, 3, 12, 16)
    torch.testing.assert_close(GaussianBlur(9, 2.0)(x), functional.gaussian_blur(x, [9, 9], [2.0, 2.0]))


def test_blur_keeps_a_constant_picture():
    torch.testing.assert_close(GaussianBlur(5, 1.0)(torch.full((1, 3, 8, 8), 0.3)), torch.full((1, 3, 8, 8), 0.3))


def test_mask_from_a_picture(tmp_path):
    picture = Image.new("L", (4, 3), 0)
    picture.putpixel((1, 2), 255)
    picture.save(tmp_path / "mask.png")
    assert Inpaint(tmp_path / "mask.png").mask.nonzero().tolist() == [[2, 1]]


def test_operator_errors():
    with pytest.raises(ValueError, match="shows nothing"):
        Inpaint(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="1 where a pixel is observed"):
        Inpaint(torch.full((4, 4), 0.5))
    with pytest.raises(ValueError, match="does not divide images of 10 x 12"):
        SuperResolution(4)(torch.zeros(1, 3, 10, 12))
    with pytest.raises(ValueError, match="odd"):
        GaussianBlur(8, 1.0)
    with pytest.raises(ValueError, match="more than 4 pixels"):
        GaussianBlur(9, 1.0)(torch.zeros(1, 3, 4, 12))


def test_measurement_is_the_norm_of_the_residual():
    operator, x = SuperResolution(4), noise(2, 3, 12, 16)
    y = operator(noise(2, 3, 12, 16, seed=1))
    loss = Measurement(operator, y)
    expected = torch.stack([(y[i] - operator(x)[i]).pow(2).sum().sqrt() for i in range(2)])
    torch.testing.assert_close(loss(x), expected)
    torch.testing.assert_close(Measurement(operator, y[0])(x)[0], expected[0])  # one measurement for every image
    assert loss.terms()[0].augment is False


def test_zero_residual_has_a_zero_gradient():
    x = noise(2, 3, 12, 16).requires_grad_()
    for operator in OPERATORS:
        value = Measurement(operator, operator(x))(x)
        gradient = torch.autograd.grad(value.sum(), x)[0]
        assert value.tolist() == [0, 0]
        assert gradient.abs().max() == 0


def test_floor_counts_what_is_measured():
    x = noise(2, 3, 12, 16)
    assert Measurement(SuperResolution(4), SuperResolution(4)(x), 0.1).floor == pytest.approx(0.1 * 36**0.5)
    single = Inpaint(MASK[0, 0])
    assert Measurement(single, single(x), 0.1).floor == pytest.approx(0.1 * (3 * MASK[0].sum().item()) ** 0.5)
    both = Measurement(Inpaint(MASK), Inpaint(MASK)(x), 0.1).floor  # masks of their own: floors of their own
    torch.testing.assert_close(both, 0.1 * (3.0 * MASK.flatten(1).sum(1)).double().sqrt())
    assert Measurement(lambda image: image.mean(1), x.mean(1, keepdim=True)[:, 0]).floor == 0


def test_floor_is_what_noise_leaves():
    x = noise(1, 3, 64, 64)
    for operator in (Inpaint(torch.rand(64, 64) > 0.5), SuperResolution(2), GaussianBlur(9, 2.0)):
        y = measure(operator, x, 0.05, torch.Generator().manual_seed(1))
        loss = Measurement(operator, y, 0.05)
        assert loss(x).item() == pytest.approx(loss.floor, rel=0.05)


def test_unobserved_values_do_not_matter():
    operator, x = Inpaint(MASK), noise(2, 3, 12, 16)
    clean, spoilt = operator(x), operator(x)
    spoilt[~MASK.expand_as(spoilt)] = float("nan")
    other = noise(2, 3, 12, 16, seed=1)
    assert torch.equal(Measurement(operator, clean)(other), Measurement(operator, spoilt)(other))
    noisy = measure(operator, x, 0.1)
    assert (noisy[~MASK.expand_as(noisy)] == 0).all()


def test_copies_of_a_batch_meet_their_own_measurements():
    operator, x = Inpaint(MASK), noise(2, 3, 12, 16)
    loss = Measurement(operator, operator(noise(2, 3, 12, 16, seed=1)))
    torch.testing.assert_close(loss(x.repeat(3, 1, 1, 1)), loss(x).repeat(3))


def test_measure_repeats_with_a_generator():
    draws = [measure(SuperResolution(2), torch.zeros(1, 3, 4, 4), 0.1, torch.Generator().manual_seed(3)) for _ in "12"]
    assert torch.equal(*draws)
    assert draws[0].std() > 0


def test_measurement_errors():
    with pytest.raises(ValueError, match="but y is"):
        Measurement(SuperResolution(2), torch.zeros(1, 3, 5, 5))(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="not negative"):
        Measurement(SuperResolution(2), torch.zeros(1, 3, 4, 4), -1.0)
