"""Operators against other implementations; those that are not linear; finite gradients; chains; saving."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from lossguide.guidance import Guidance, recipes
from lossguide.losses import Measurement, measure
from lossguide.losses.operators import (
    Chain,
    Clip,
    Colorize,
    Fourier,
    GaussianBlur,
    Inpaint,
    Jpeg,
    Kernel,
    LinearOperator,
    MotionBlur,
    Outpaint,
    PhaseRetrieval,
    Quantize,
    SuperResolution,
)
from PIL import Image
from scipy import ndimage, signal


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = noise(16, 16, seed=7) > 0.5
NONLINEAR = [
    Jpeg(50),
    Clip(2.0),
    Quantize(256),
    Quantize(2),
    PhaseRetrieval(),
    PhaseRetrieval(1.3),
    Chain(GaussianBlur(5, 1.0), Clip(1.5), Jpeg(90)),
]
LINEAR = [
    Inpaint(MASK),
    Outpaint(),
    Outpaint((0.0, 0.25, 0.5, 1.0)),
    SuperResolution(4),
    SuperResolution(4, "bicubic"),
    GaussianBlur(5, 1.0),
    MotionBlur(6.0, -40.0),
    Kernel(noise(3, 4)),
    Kernel(noise(5, 5).float(), "zeros"),
    Kernel(noise(3, 3), "circular"),
    Colorize(),
    Fourier(MASK),
    Chain(MotionBlur(3.0, 90.0), SuperResolution(2), Colorize()),
]
EVERY = LINEAR + NONLINEAR


# ---- expected values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("padding", "mode"), [("reflect", "mirror"), ("zeros", "constant"), ("circular", "grid-wrap")])
@pytest.mark.parametrize("size", [(3, 5), (5, 1), (7, 7), (1, 1)])
def test_kernel_agrees_with_scipy(padding, mode, size):
    x, kernel = noise(2, 3, 12, 16), noise(*size, seed=1)
    expected = [[ndimage.convolve(plane, kernel.numpy(), mode=mode) for plane in image] for image in x.numpy()]
    torch.testing.assert_close(Kernel(kernel, padding)(x), torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize("size", [(4, 6), (3, 4), (2, 2)])
def test_an_even_kernel_lies_around_its_half(size):
    x, kernel = noise(1, 1, 12, 16), noise(*size, seed=1)
    full = torch.from_numpy(signal.convolve2d(x[0, 0], kernel, mode="full"))
    top, left = size[0] // 2, size[1] // 2
    torch.testing.assert_close(Kernel(kernel, "zeros")(x)[0, 0], full[top : top + 12, left : left + 16])
    point = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    point[..., 4, 4] = 1
    spread = Kernel(kernel)(point)[0, 0, 4 - top : 4 - top + size[0], 4 - left : 4 - left + size[1]]
    torch.testing.assert_close(spread, kernel)


def test_a_circular_kernel_is_a_product_of_spectra():
    x, kernel = noise(1, 1, 9, 10), noise(3, 3, seed=1)
    padded = np.zeros((9, 10))
    padded[:3, :3] = kernel
    spectrum = np.fft.fft2(np.roll(padded, (-1, -1), (0, 1)))
    expected = np.fft.ifft2(spectrum * np.fft.fft2(x[0, 0].numpy())).real
    operator = Kernel(kernel, "circular")
    torch.testing.assert_close(operator(x)[0, 0], torch.from_numpy(expected))
    torch.testing.assert_close(operator.pseudo_inverse(operator(x)), x)  # its spectrum is nowhere zero
    single = operator(x.float())
    torch.testing.assert_close(operator(operator.pseudo_inverse(single)), single)


def test_bicubic_agrees_with_pillow():
    x = noise(1, 1, 24, 32).float()
    small = Image.fromarray(x[0, 0].numpy()).resize((8, 6), Image.Resampling.BICUBIC)
    operator = SuperResolution(4, "bicubic")
    torch.testing.assert_close(operator(x)[0, 0], torch.from_numpy(np.array(small)), rtol=0, atol=1e-6)
    torch.testing.assert_close(operator(torch.full((1, 3, 8, 8), 0.3)), torch.full((1, 3, 2, 2), 0.3))


def test_motion_blur_along_the_axes():
    torch.testing.assert_close(MotionBlur(5, 0).kernel, torch.full((1, 5), 0.2, dtype=torch.float64))
    torch.testing.assert_close(MotionBlur(4, 90).kernel[:, 0], torch.tensor([0.5, 1, 1, 1, 0.5]).double() / 4)
    torch.testing.assert_close(MotionBlur(1, 33).kernel, torch.ones(1, 1, dtype=torch.float64))


@pytest.mark.parametrize("angle", [0.0, 20.0, 45.0, 90.0, 117.0, -60.0, 180.0])
@pytest.mark.parametrize("length", [1.5, 4.0, 9.0, 10.2])
def test_motion_blur_is_a_line(length, angle):
    kernel = MotionBlur(length, angle).kernel
    assert kernel.sum().item() == pytest.approx(1) and (kernel >= 0).all()
    torch.testing.assert_close(kernel, kernel.flip(0, 1))
    height, width = kernel.shape
    assert height % 2 == width % 2 == 1
    path = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000 * length - length / 2  # where a point has been
    columns = (path * np.cos(np.radians(angle))).round().long() + width // 2
    rows = (-path * np.sin(np.radians(angle))).round().long() + height // 2
    counted = torch.zeros_like(kernel)
    counted.index_put_((rows, columns), torch.tensor(1 / 40_000, dtype=torch.float64), accumulate=True)
    torch.testing.assert_close(counted, kernel, rtol=0, atol=2e-4)


def test_brightness_is_pillows():
    pixels = (noise(8, 8, 3) * 255).byte()
    grey = np.array(Image.fromarray(pixels.numpy()).convert("L"))
    found = 255 * Colorize()(pixels.permute(2, 0, 1)[None] / 255)[0, 0]
    assert found.shape == (8, 8) and (found - torch.from_numpy(grey)).abs().max() <= 0.51


def test_outpaint_keeps_the_box():
    picture = torch.ones(1, 3, 10, 20)
    kept = lambda operator: operator(picture)[0, 0].nonzero().aminmax(dim=0)
    low, high = kept(Outpaint(0.5))
    assert (low.tolist(), high.tolist()) == ([2, 5], [7, 14])
    low, high = kept(Outpaint((0.1, 0.2, 0.6, 1.0)))
    assert (low.tolist(), high.tolist()) == ([2, 2], [9, 11])
    assert Outpaint(1.0)(picture).mean() == 1
    mask = Outpaint(0.9)(picture)
    assert torch.equal(mask, mask.flip(-1, -2)), "in the middle, wherever the rounding goes"
    y = Outpaint(0.5)(picture)
    assert Measurement(Outpaint(0.5), y, 0.1).floor == pytest.approx(0.1 * (3 * 6 * 10) ** 0.5)
    noisy = measure(Outpaint(0.5), picture, 0.1)
    assert noisy.count_nonzero() == 3 * 6 * 10


def test_fourier_agrees_with_numpy():
    x, operator = noise(2, 3, 16, 16), Fourier(MASK)
    expected = np.fft.fft2(x.numpy(), norm="ortho") * MASK.numpy()
    torch.testing.assert_close(operator(x), torch.from_numpy(np.concatenate([expected.real, expected.imag], 1)))
    assert Measurement(operator, operator(x), 0.1).floor == pytest.approx(0.1 * (6 * MASK.sum().item()) ** 0.5)


def test_half_of_the_frequencies_determine_a_real_picture():
    half = torch.zeros(8, 8)
    half[:, :5] = 1
    x = noise(1, 3, 8, 8)
    torch.testing.assert_close(Fourier(half).pseudo_inverse(Fourier(half)(x)), x)


def test_phase_retrieval_agrees_with_numpy():
    x = noise(2, 3, 10, 12)
    y = PhaseRetrieval(2.0)(x)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (5, 5), (6, 6)))  # wherever the picture lies
    torch.testing.assert_close(y, torch.from_numpy(np.abs(np.fft.fft2(padded, norm="ortho"))))
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    torch.testing.assert_close(PhaseRetrieval()(x.flip(-1, -2)), y)


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 95])
def test_jpeg_is_close_to_pillows(quality):
    smooth = ndimage.gaussian_filter(noise(64, 80, 3, seed=3).numpy(), (2, 2, 0))
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    pixels = (255 * smooth).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    as_tensor = lambda array: torch.from_numpy(np.array(array)).permute(2, 0, 1)[None].float() / 255
    x, saved = as_tensor(pixels), as_tensor(Image.open(file))
    ours = Jpeg(quality)(x)
    error = lambda a, b: (a - b).square().mean().sqrt().item()
    assert error(ours, saved) < 0.025 and error(ours, saved) < 0.5 * error(x, saved) + 0.006
    assert ours.amin() >= 0 and ours.amax() <= 1


def test_quantize_is_a_round_trip_through_bytes():
    x = 1.4 * noise(2, 3, 8, 8).float() - 0.2
    assert torch.equal(Quantize(256)(x), (255 * x.clamp(0, 1)).round().byte() / 255)
    assert set(Quantize(3)(x).unique().tolist()) == {0, 0.5, 1}


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [op for op in EVERY if not isinstance(op, Quantize)], ids=repr)
def test_gradient_agrees_with_finite_differences(operator):
    x, wanted = 0.1 + 0.3 * noise(1, 3, 16, 16), noise(1, 3, 16, 16, seed=1)
    loss = Measurement(operator, operator(wanted), 0.05)
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(leaf).sum(), leaf)[0]
    way = noise(*x.shape, seed=2) - 0.5
    step = 1e-6 if "Jpeg" not in repr(operator) else 1e-7  # whose rounding has edges
    slope = (loss(x + step * way) - loss(x - step * way)).item() / (2 * step)
    assert (gradient * way).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("operator", [Clip(2.0), Quantize(256)], ids=repr)
def test_clipped_values_can_come_back_and_are_not_driven_further_out(operator):
    gain = getattr(operator, "gain", 1.0)
    x = torch.tensor([-3.0, 0.2, 3.0]).view(1, 1, 1, 3).repeat(1, 3, 1, 1).requires_grad_()
    assert torch.equal(operator(x).detach()[..., ::2], torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2))
    for direction, passed in ((1.0, [0, gain, gain]), (-1.0, [gain, gain, 0])):  # a step goes against the gradient
        gradient = torch.autograd.grad((direction * operator(x)).sum(), x)[0]
        torch.testing.assert_close(gradient[0, 0, 0], direction * torch.tensor(passed))


def test_a_clipped_pixel_comes_back():
    operator = Clip(2.0)
    x = torch.full((1, 3, 2, 2), 3.0)
    loss = Measurement(operator, torch.full((1, 3, 2, 2), 0.5))
    for _ in range(400):
        leaf = x.clone().requires_grad_()
        x = x - 0.02 * torch.autograd.grad(loss(leaf).sum(), leaf)[0]
    assert (x - 0.25).abs().max() < 0.02


PICTURES = {
    "black": torch.zeros(2, 3, 16, 16),
    "white": torch.ones(2, 3, 16, 16),
    "constant": torch.full((2, 3, 16, 16), 0.4),
    "huge": 1e4 * (noise(2, 3, 16, 16, seed=4).float() - 0.5),
    "tiny": 1e-30 * noise(2, 3, 16, 16, seed=4).float(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("operator", EVERY, ids=repr)
def test_finite_everywhere(operator, picture, dtype):
    x = PICTURES[picture].to(dtype).requires_grad_()
    for target in (noise(2, 3, 16, 16, seed=1).float(), PICTURES[picture], PICTURES["black"]):
        loss = Measurement(operator, operator(target), 0.05)
        value = loss(x)
        gradient = torch.autograd.grad(value.sum(), x)[0]
        assert value.shape == (2,) and value.isfinite().all()
        assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("operator", EVERY, ids=repr)
def test_half_precision_is_close(operator):
    x = noise(2, 3, 16, 16)
    y = operator(noise(2, 3, 16, 16, seed=1)).float()
    exact = Measurement(operator, y)(x)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(Measurement(operator, y)(x.bfloat16()).double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("operator", EVERY, ids=repr)
def test_each_sample_by_itself(operator):
    x = noise(3, 3, 16, 16).requires_grad_()
    y = operator(x)
    for i in range(3):
        torch.testing.assert_close(operator(x[i : i + 1]), y[i : i + 1])
    others = torch.autograd.grad(y[0].square().sum(), x)[0]
    assert others[0].abs().sum() > 0 and others[1:].abs().max() == 0


# ---- chains and kinds --------------------------------------------------------------------------------------------


def test_what_is_linear():
    assert all(operator.linear and hasattr(operator, "adjoint") for operator in LINEAR)
    assert not any(operator.linear or hasattr(operator, "adjoint") for operator in NONLINEAR)
    assert not any(hasattr(operator, "pseudo_inverse") for operator in NONLINEAR)
    assert not hasattr(SuperResolution(2, "bicubic"), "pseudo_inverse") and not hasattr(MotionBlur(3), "pseudo_inverse")
    assert not Chain(Colorize(), lambda image: image).linear
    network = torch.nn.Sequential()
    network.linear = network.tight = torch.nn.Identity()  # which says nothing of the network
    assert not Chain(network).linear and not Chain(network).tight
    assert not isinstance(Jpeg(50), LinearOperator)


def test_a_chain_goes_from_left_to_right():
    x = noise(2, 3, 16, 16)
    chain = Chain(GaussianBlur(5, 1.0), SuperResolution(2), Quantize(8))
    assert torch.equal(chain(x), Quantize(8)(SuperResolution(2)(GaussianBlur(5, 1.0)(x))))
    assert repr(chain).startswith("Chain(GaussianBlur(kernel_size=5, sigma=1.0), SuperResolution(factor=2, ")


def test_a_chain_has_a_pseudo_inverse_only_where_the_product_is_one():
    circular, mask = Kernel(noise(3, 3), "circular"), Inpaint(noise(8, 8) > 0.5)
    assert hasattr(Chain(SuperResolution(2), Colorize(), mask), "pseudo_inverse")
    assert not hasattr(Chain(Inpaint(MASK), SuperResolution(2)), "pseudo_inverse")
    assert not hasattr(Chain(circular, SuperResolution(2)), "pseudo_inverse")
    assert not hasattr(Chain(SuperResolution(2), GaussianBlur(3, 1.0)), "pseudo_inverse")
    assert hasattr(Chain(circular), "pseudo_inverse")


@pytest.mark.parametrize("operator", [op for op in LINEAR if op.tight], ids=repr)
def test_tight_means_a_multiple_of_the_identity(operator):
    y = noise(*operator(noise(2, 3, 16, 16)).shape)
    again = operator(operator.adjoint(y, (2, 3, 16, 16)))
    torch.testing.assert_close(again, y * (again.sum() / y.sum()))


def test_the_last_of_a_chain_says_what_is_observed():
    mask = Inpaint(MASK[:8, :8])
    x = noise(1, 3, 16, 16)
    chain = Chain(SuperResolution(2), mask)
    assert Measurement(chain, chain(x), 0.1).floor == pytest.approx(0.1 * (3 * MASK[:8, :8].sum().item()) ** 0.5)
    assert Measurement(Chain(mask, lambda image: image), x[..., :8, :8], 0.1).floor == pytest.approx(0.1 * 192**0.5)


# ---- saving, errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [*EVERY, Chain(Chain(Inpaint(MASK)), Jpeg(7))], ids=repr)
def test_every_operator_comes_back(operator, tmp_path):
    x = noise(2, 3, 16, 16)
    guidance = recipes.auto(Measurement(operator, operator(x), 0.05), time_travel=None)
    guidance.save_pretrained(tmp_path / "once")
    loaded = Guidance.from_pretrained(tmp_path / "once")
    (term,) = loaded.loss.terms()
    assert loaded.to_dict() == guidance.to_dict()
    assert type(term.loss.operator) is type(operator) and repr(term.loss.operator) == repr(operator)
    assert torch.equal(term.loss.operator(x), operator(x))
    loaded.save_pretrained(tmp_path / "twice")
    assert len({(tmp_path / n / "guidance.json").read_text() for n in ("once", "twice")}) == 1


def test_a_chain_of_ones_own_is_not_saved(tmp_path):
    guidance = recipes.auto(Measurement(Chain(Colorize(), torch.sin), noise(1, 1, 8, 8)))
    with pytest.raises(ValueError, match="code is not saved"):
        guidance.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Outpaint(0.0), "a box is a share"),
        (lambda: Outpaint((0.5, 0.0, 0.4, 1.0)), "left < right"),
        (lambda: Outpaint((0.0, 0.0, 1.0)), "left < right"),
        (lambda: Outpaint(0.01)(torch.ones(1, 3, 8, 8)), "holds no pixel of images of 8 x 8"),
        (lambda: SuperResolution(2, "nearest"), "average, bicubic"),
        (lambda: SuperResolution(3, "bicubic")(torch.ones(1, 3, 8, 8)), "does not divide"),
        (lambda: MotionBlur(0.5), "at least 1"),
        (lambda: MotionBlur(3, float("nan")), "degrees"),
        (lambda: Kernel(torch.ones(3)), r"float tensor \(h, w\), got torch.float32 \(3,\)"),
        (lambda: Kernel([[1.0]]), "got list"),
        (lambda: Kernel(torch.tensor([[float("inf")]])), "finite"),
        (lambda: Kernel(torch.ones(3, 3), "same"), "reflect, zeros, circular"),
        (lambda: Kernel(torch.ones(17, 3))(torch.ones(1, 3, 8, 8)), "17 x 3 is too large for reflect edges of 8 x 8"),
        (lambda: Colorize()(torch.ones(1, 1, 8, 8)), "colour pictures"),
        (lambda: Fourier(torch.ones(1, 8, 8)), r"is \(H, W\)"),
        (lambda: Fourier(torch.ones(8, 8))(torch.ones(1, 3, 8, 9)), "8 x 8 frequencies does not suit images of 8 x 9"),
        (lambda: Fourier(torch.full((8, 8), 0.5)), "1 where"),
        (lambda: PhaseRetrieval(0.5), "from 1 up"),
        (lambda: Jpeg(0), "1 to 100"),
        (lambda: Jpeg(50)(torch.ones(1, 1, 8, 8)), "colour pictures"),
        (lambda: Clip(0.0), "positive"),
        (lambda: Quantize(1), "at least 2"),
        (lambda: Chain(), "at least one"),
    ],
)
def test_errors(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_a_chain_is_of_operators():
    with pytest.raises(TypeError, match="an operator is a callable"):
        Chain(Colorize)
