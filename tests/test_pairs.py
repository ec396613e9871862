"""Example pairs: operators found again from what they made, changes in a network's features, and refusals."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F
from lossguide.guidance import Guidance, recipes
from lossguide.losses import Measurement, PairTask, measure
from lossguide.losses.network import IMAGENET_MEAN, IMAGENET_STD
from lossguide.losses.operators import Chain, Clip, Colorize, Filter, Inpaint, Kernel, SuperResolution
from PIL import Image
from torch import nn


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(side=48, seed=0, width=None):
    """A picture of soft shapes with edges, in (0, 1)."""
    source = random(seed)
    coarse = torch.randn(1, 3, 8, 8, generator=source)
    fine = torch.randn(1, 3, side, width or side, generator=source)
    shapes = F.interpolate(coarse, fine.shape[-2:], mode="bicubic")
    return (0.5 + 0.22 * torch.tanh(3 * shapes) + 0.03 * fine)[0].clamp(0.02, 0.98)


KERNEL = torch.rand(5, 5, generator=random(1)) ** 2
KERNEL = KERNEL / KERNEL.sum()
KERNELS = torch.stack([KERNEL, KERNEL.T, KERNEL.flip(0)])
MATRIX = torch.tensor([[0.7, 0.2, 0.0], [0.1, 0.6, 0.1], [0.0, 0.1, 0.5]])
MASK = torch.rand(48, 48, generator=random(2)) > 0.3


def grey(x):
    return Colorize()(x).expand(-1, 3, -1, -1)


def pair(operator, sigma=0.0, seed=0, side=48):
    after = picture(side, seed)
    return measure(operator, after[None], sigma, random(seed + 100))[0], after


# ---- the filter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["reflect", "replicate", "zeros", "circular"])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [
        (torch.randn(1, 3, 5, generator=random(3)), 1),
        (torch.randn(3, 4, 6, generator=random(3)), 2),
        (torch.randn(2, 3, 3, 3, generator=random(3)), 1),
        (torch.randn(3, 3, 1, 1, generator=random(3)), 1),
    ],
)
def test_a_filter_s_adjoint_is_its_transpose(kernel, stride, padding):
    operator = Filter(kernel.double(), stride, padding)
    x = torch.randn(2, 3, 12, 16, generator=random(), dtype=torch.float64)
    y = torch.randn(*operator(x).shape, generator=random(1), dtype=torch.float64)
    torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y, x.shape)).sum())


def test_a_filter_is_what_is_known_already():
    x = torch.rand(2, 3, 12, 16, generator=random())
    torch.testing.assert_close(Filter(KERNEL[None])(x), Kernel(KERNEL)(x))
    torch.testing.assert_close(Filter(torch.full((1, 4, 4), 1 / 16), 4)(x), SuperResolution(4)(x))
    shifted = Filter(MATRIX[:, :, None, None], offset=torch.tensor([0.1, 0.0, 0.2]))
    wanted = torch.einsum("oc,bchw->bohw", MATRIX, x) + torch.tensor([0.1, 0.0, 0.2]).view(3, 1, 1)
    torch.testing.assert_close(shifted(x), wanted)
    assert not shifted.linear and Filter(KERNEL[None]).linear


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.ones(3, 3),), "a kernel is a float tensor"),
        ((torch.full((1, 3, 3), float("nan")),), "finite"),
        ((torch.ones(1, 3, 3), 2), "an even number more"),
        ((torch.ones(1, 3, 3), 0), "stride is a whole number"),
        ((torch.ones(1, 3, 3), 1, "mirror"), "padding is one of"),
    ],
)
def test_what_is_no_filter_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        Filter(*arguments)
    with pytest.raises(ValueError, match="does not divide|too large|channels"):
        Filter(torch.ones(2, 4, 4) / 16, 2)(torch.zeros(1, 3, 7, 8))


# ---- operators from pairs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["reflect", "zeros", "circular"])
def test_a_blur_is_found_exactly_from_one_pair_without_noise(padding):
    task = PairTask.fit([pair(Kernel(KERNEL, padding))])
    assert (task.mode, task.way, task.family, task.ratio) == ("operator", "restore", "kernel 5x5, shared", 1)
    torch.testing.assert_close(task.operator.kernel[0], KERNEL, rtol=0, atol=1e-5)
    assert task.operator.padding == padding and task.sigma < 1e-5


OPERATORS = [
    (Filter(MATRIX[:, :, None, None]), "colour"),
    (Filter(MATRIX[:, :, None, None], offset=torch.tensor([0.1, 0.0, 0.05])), "colour"),
    (grey, "colour"),
    (lambda x: 1 - x, "colour"),
    (lambda x: x, "nothing but noise"),
    (Kernel(KERNEL), "kernel 5x5, shared"),
    (Kernel(torch.full((1, 3), 1 / 3)), "kernel 3x3, shared"),
    (Filter(KERNELS), "kernel 5x5, per channel"),
    (Inpaint(MASK), "mask"),
    (SuperResolution(2), "reduction 2x, average"),
    (SuperResolution(2, "bicubic"), "reduction 2x, bicubic"),
    (Filter(KERNEL[None, :4, :4] / KERNEL[:4, :4].sum(), 2), "reduction 2x, kernel 4x4, shared"),
]


@pytest.mark.parametrize("sigma", [0.0, 0.02])
@pytest.mark.parametrize(
    ("operator", "family"), OPERATORS, ids=[f"{i}-{name}" for i, (_, name) in enumerate(OPERATORS)]
)
def test_families_are_told_apart_with_their_noise(operator, family, sigma):
    sigma = max(sigma, 0.01) if family == "nothing but noise" else sigma
    task = PairTask.fit([pair(operator, sigma)])
    assert (task.way, task.family) == ("restore", family), task.report()
    assert task.sigma == pytest.approx(sigma, rel=0.04, abs=1e-5)
    other = picture(seed=7)[None]  # what the operator makes of another picture is foretold to the noise
    query = measure(operator, other, sigma, random(9))
    loss = task.loss(query)
    assert isinstance(loss, Measurement) and loss.operator.linear
    assert loss(other).item() == pytest.approx(loss.floor, rel=0.06, abs=2e-3)
    assert family in task.report() and "<- chosen" in task.report()


def test_pairs_left_out_are_explained_by_the_others():
    pairs = [pair(Kernel(KERNEL), 0.05, seed, side) for seed, side in ((0, 32), (1, 40), (2, 48))]
    task, one = PairTask.fit(pairs), PairTask.fit(pairs[:1])
    assert task.family == "kernel 5x5, shared" and task.pairs == 3
    assert task.sigma == pytest.approx(0.05, rel=0.03)
    errors = [
        float((each.operator.kernel - KERNEL).norm()) for each in (task, one) if each.operator.kernel.shape[-1] == 5
    ]
    assert len(errors) < 2 or errors[0] < errors[1], "three pairs tell more than one"


def test_a_reduction_s_answer_is_larger():
    task = PairTask.fit([pair(SuperResolution(4), 0.01, side=64)])
    assert task.ratio == 4 and task.answer_size(torch.zeros(3, 10, 12)) == (40, 48)
    assert task.loss(torch.zeros(3, 10, 12))(torch.rand(1, 3, 40, 48)).shape == (1,)
    wide = picture(32, 3, 64)
    assert PairTask.fit([(SuperResolution(2)(wide[None])[0], wide)]).family == "reduction 2x, average"


def test_holes_are_found_in_any_colour_and_wherever_the_query_has_them():
    fill = torch.tensor([0.2, 0.9, 0.4]).view(3, 1, 1)
    after = picture()
    task = PairTask.fit([(torch.where(MASK, after, fill), after)])
    assert task.family == "mask" and (task.operator.mask.bool() == MASK).float().mean() > 0.999
    for mask in (MASK, MASK.flip(0)):
        other = picture(seed=5)
        loss = task.loss(torch.where(mask, other, fill))
        assert torch.equal(loss.operator.mask[0, 0].bool(), mask)
        assert loss(other[None]).item() < 1e-6 and loss(other[None] + 0.1).item() > 0.1
    with pytest.raises(ValueError, match=r"holes of the colour \(0.20, 0.90, 0.40\), but a query has none"):
        task.loss(picture(seed=5))
    moving = PairTask.fit([(torch.where(m, p, fill), p) for m, p in ((MASK, after), (MASK.flip(1), picture(seed=6)))])
    assert moving.family == "mask" and moving.operator is None and "different holes" in moving.report()
    assert torch.equal(moving.loss(torch.where(MASK.T, after, fill)).operator.mask[0, 0].bool(), MASK.T)


def test_values_clipped_by_a_file_do_not_bend_the_operator(tmp_path):
    after = picture()
    gain = torch.diag(torch.tensor([1.6, 1.2, 0.9]))
    before = (Filter(gain[:, :, None, None])(after[None])[0].clamp(0, 1) * 255).round().byte()
    for name, values in (("before", before), ("after", (after * 255).round().byte())):
        Image.fromarray(values.permute(1, 2, 0).contiguous().numpy()).save(tmp_path / f"{name}.png")
    task = PairTask.fit([(tmp_path / "before.png", Image.open(tmp_path / "after.png"))])
    assert isinstance(task.operator, Chain) and task.family == "colour" and "clipped" in task.report()
    torch.testing.assert_close(task.operator.operators[0].kernel[:, :, 0, 0], gain, rtol=0, atol=0.01)
    assert 0.5 / 255 / 3**0.5 < task.sigma < 2.5 / 255
    task.save(tmp_path / "task")
    loaded = PairTask.load(tmp_path / "task")
    assert isinstance(loaded.operator.operators[1], Clip)
    torch.testing.assert_close(loaded.operator(after[None]), task.operator(after[None]), rtol=0, atol=0)


def test_pairs_that_go_the_other_way():
    blurred, sharp = pair(Kernel(KERNEL), 0.01)
    restore, apply = PairTask.fit([(blurred, sharp)]), PairTask.fit([(sharp, blurred)])
    assert (restore.way, apply.way) == ("restore", "apply")
    query = picture(seed=4)
    loss = apply.loss(query)  # the answer is known: it is the query, blurred
    wanted = Kernel(KERNEL)(query[None])
    assert loss(wanted).item() < 0.15 * loss(query[None]).item()
    for inverse, ordinary in (
        (PairTask.fit([(blurred, sharp)], inverse=True), apply),
        (PairTask.fit([(sharp, blurred)], inverse=True), restore),
    ):
        assert inverse.inverse and inverse.way == ordinary.way and "the other way round" in inverse.report()
        torch.testing.assert_close(inverse.loss(query).y, ordinary.loss(query).y)
    holes = PairTask.fit([(sharp, torch.where(MASK, sharp, 0.9))])
    assert (holes.way, holes.family) == ("apply", "mask")
    assert holes.loss(query)(torch.where(MASK, query, 0.9)[None]).item() < 1e-5
    with pytest.raises(ValueError, match="pictures of 48 x 48 pixels"):
        holes.loss(picture(40))
    smaller = PairTask.fit([(sharp, SuperResolution(2)(sharp[None])[0])])
    assert (smaller.way, smaller.ratio, smaller.answer_size(query)) == ("apply", 0.5, (24, 24))
    assert smaller.loss(query)(SuperResolution(2)(query[None])).item() < 1e-4


def test_a_batch_of_queries_is_each_by_itself():
    task = PairTask.fit([pair(Kernel(KERNEL), 0.02)])
    queries, images = torch.rand(3, 3, 20, 24, generator=random()), torch.rand(3, 3, 20, 24, generator=random(1))
    whole = task.loss(queries)(images)
    assert whole.shape == (3,)
    torch.testing.assert_close(whole, torch.cat([task.loss(q)(x[None]) for q, x in zip(queries, images)]))
    torch.testing.assert_close(whole, task.loss(list(queries))(images))
    with pytest.raises(ValueError, match="one size"):
        task.loss([queries[0], images[0, :, :10]])


@pytest.mark.parametrize("operator", [Filter(MATRIX[:, :, None, None], offset=torch.full((3,), 0.1)), Inpaint(MASK)])
def test_the_loss_suits_the_recipes_for_measurements(operator, tmp_path):
    loss = PairTask.fit([pair(operator, 0.02)]).loss(pair(operator, 0.02, 3)[0])
    for recipe in (recipes.auto, recipes.pigdm, recipes.diffpir, recipes.ddnm):
        recipe(loss)
    assert "Reach" in repr(recipes.auto(loss).rule), "auto goes to the floor that it knows"
    recipes.auto(loss).save_pretrained(tmp_path)
    x = picture(seed=8)[None]
    torch.testing.assert_close(Guidance.from_pretrained(tmp_path).loss(x), loss(x), rtol=0, atol=0)


def test_with_a_gaussian_prior_the_fitted_operator_is_as_good_as_the_true_one():
    """Exact posterior means: no sampler, no network, so that only the operators differ."""
    side, sigma = 16, 0.02
    frequency = torch.fft.fftfreq(side)
    power = 1 / (0.003 + frequency[:, None] ** 2 + frequency[None] ** 2) ** 1.5
    power = power / power.mean() * 0.05
    rows = torch.fft.ifft2(power).real
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    shift = (places[:, None] - places[None]) % side
    covariance = rows[shift[..., 0], shift[..., 1]].double()

    def drawn(count, size, seed):  # pictures of the prior's law, the pair's larger ones with the same spectrum
        f = torch.fft.fftfreq(size)
        p = 1 / (0.003 + f[:, None] ** 2 + f[None] ** 2) ** 1.5
        noise = torch.randn(count, 3, size, size, generator=random(seed))
        return 0.5 + torch.fft.ifft2(torch.fft.fft2(noise) * (p / p.mean() * 0.05).sqrt()).real

    true = Kernel(KERNEL)
    after = drawn(1, 48, 0)
    task = PairTask.fit([(measure(true, after, sigma, random(1))[0], after[0])])
    queries = drawn(24, side, 2)
    y = measure(true, queries, sigma, random(3)).double()

    def answered(operator, noise):
        basis = torch.eye(side**2, dtype=torch.float64).view(-1, 1, side, side)
        a = operator(basis.expand(-1, 3, -1, -1))[:, 0].flatten(1).T
        gain = covariance @ a.T @ torch.linalg.inv(a @ covariance @ a.T + noise**2 * torch.eye(side**2))
        rest = y - operator(torch.full_like(y, 0.5))
        return 0.5 + (rest.flatten(2) @ gain.T).view_as(y)

    def psnr(x):
        return -10 * (x - queries).square().mean().log10().item()

    fitted = psnr(answered(Filter(task.operator.kernel), task.sigma))
    best, wrong = psnr(answered(true, sigma)), psnr(answered(SuperResolution(1), sigma))
    assert abs(best - fitted) < 0.2, (best, fitted)
    assert fitted > psnr(y) + 1.5 and fitted > wrong + 1.5, (fitted, psnr(y), wrong)


# ---- changes in features -------------------------------------------------------------------------------------------


class Eyes(nn.Module):
    """A small random network with features and patches."""

    def __init__(self, patches=True, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 24, 5, stride=4)
        self.patches = patches

    def forward(self, x):
        x = torch.tanh(3 * self.conv(x))
        return (x.mean((2, 3)), x) if self.patches else x.mean((2, 3))


def stripes(x):
    """An edit that is no operator of the families: dark stripes where the picture is bright."""
    bands = (torch.arange(x.shape[-1]) // 4 % 2).float()
    return torch.where((x.mean(-3, keepdim=True) > 0.5) & (bands > 0), x * 0.3, x)


EXAMPLES = [(picture(seed=s), stripes(picture(seed=s))) for s in range(10, 14)]


def test_a_change_of_features_is_found_and_fallen_towards():
    task = PairTask.fit(EXAMPLES, Eyes(patches=False))
    assert task.mode == "direction" and task.operator is None and task.ratio == 1
    query = picture(seed=20)
    loss = task.loss(query)
    with torch.no_grad():
        here, there, elsewhere = (loss(x[None]).item() for x in (query, stripes(query), 1 - query))
    assert there < 0.5 * here and there < elsewhere
    assert "agreement" in task.report()


@pytest.mark.parametrize("mode", ["direction", "analogy"])
def test_gradients_are_those_of_the_loss(mode):
    eyes = Eyes().double()
    task = PairTask.fit(EXAMPLES, eyes, mode=mode)
    queries = torch.stack([picture(24, s) for s in (20, 21)])
    loss = task.loss(queries)
    x = torch.stack([stripes(q) * 0.9 for q in queries]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x).sum(), x)
    way = torch.randn(x.shape, generator=random(5), dtype=torch.float64)
    with torch.no_grad():
        slope = (loss(x + 1e-5 * way) - loss(x - 1e-5 * way)) / 2e-5
    torch.testing.assert_close((gradient * way).flatten(1).sum(1), slope, rtol=1e-4, atol=1e-7)


def test_at_the_query_itself_the_gradient_is_finite_and_leads_along_the_direction():
    task = PairTask.fit(EXAMPLES, Eyes(), mode="direction")
    x = picture(seed=20)[None].requires_grad_()
    loss = task.loss(x)
    value = loss(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.item() == pytest.approx(1, abs=1e-4) and gradient.isfinite().all() and gradient.norm() > 0
    step = 1e-4 * gradient / gradient.abs().max()
    assert loss(x - step).item() < value.item() < loss(x + step).item()


def test_examples_that_change_nothing_keep_the_query():
    task = PairTask.fit([(before, before) for before, _ in EXAMPLES[:2]], Eyes(), mode="direction")
    query = picture(seed=20)[None]
    loss = task.loss(query)
    assert loss(query).item() < 1e-5 and loss(stripes(query)).item() > 0.05
    x = query.clone().requires_grad_()
    assert torch.autograd.grad(loss(x).sum(), x)[0].isfinite().all()


def reddened(x):
    """An edit of bright places only: their green and blue go."""
    return torch.where(x.mean(-3, keepdim=True) > 0.5, x * torch.tensor([1.0, 0.3, 0.3]).view(3, 1, 1), x)


def test_an_analogy_changes_patches_as_those_near_them_were_changed():
    colours = nn.Sequential(nn.AvgPool2d(4), nn.BatchNorm2d(3, affine=False))  # a patch's mean colour, less grey
    colours[1].running_mean += 0.5
    task = PairTask.fit([(p, reddened(p)) for p, _ in EXAMPLES], colours, mode="analogy")
    assert task.mode == "analogy" and len(task.found.tensors["before"]) == 4 * 12 * 12
    assert task.scores[-1].value > 0.4, task.report()
    query = picture(seed=20)
    loss = task.loss(query)
    everywhere = query * torch.tensor([1.0, 0.3, 0.3]).view(3, 1, 1)
    with torch.no_grad():
        here, there, too_much = (loss(x[None]).item() for x in (query, reddened(query), everywhere))
    assert there < 0.6 * here and there < 0.6 * too_much, (here, there, too_much)
    with pytest.raises(ValueError, match="needs an encoder with patches"):
        PairTask.fit(EXAMPLES, Eyes(patches=False), mode="analogy")


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("encoder", [None, Eyes()])
def test_unrelated_pictures_are_refused(count, encoder):
    pairs = [(picture(seed=30 + 2 * i), picture(seed=31 + 2 * i)) for i in range(count)]
    with pytest.raises(ValueError, match="nothing in common that could be done to a query"):
        PairTask.fit(pairs, encoder)


def test_pairs_that_contradict_one_another_are_refused():
    pairs = [pair(Kernel(KERNEL)), pair(Filter(MATRIX[:, :, None, None]), seed=1), pair(lambda x: 1 - x, seed=2)]
    with pytest.raises(ValueError, match="nothing in common"):
        PairTask.fit(pairs)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(pairs=[]), "at least one"),
        (dict(pairs=[(picture(),)]), "pair 1 is not two pictures"),
        (dict(pairs=[(picture(), picture() * float("nan"))]), "pair 1 holds values that are not finite"),
        (dict(pairs=[(picture(), picture())], mode="copy"), "mode is one of auto, operator, direction, analogy"),
        (dict(pairs=EXAMPLES, mode="direction"), "mode 'direction' needs an encoder"),
        (dict(pairs=EXAMPLES, encoder=lambda x: x[:, 0, 0, 0], mode="direction"), "an encoder makes features"),
        (dict(pairs=[(picture(), picture(30))]), "no size is a whole multiple of the other"),
        (dict(pairs=[(torch.full((3, 48, 48), 0.5), picture())]), "nothing in common"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        PairTask.fit(**arguments)


def test_real_pictures_and_a_real_network(shared):
    """What is refused of one pair, a network sees; edits of the same pictures are a change that it finds."""
    spec = importlib.util.spec_from_file_location("real_load", shared / "real" / "load.py")
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    pictures, network = load.anime64_images() / 2 + 0.5, load.mobilenet_v2().features
    preparation = dict(size=64, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    for i in (0, 1):
        with pytest.raises(ValueError, match="nothing in common"):
            PairTask.fit([(pictures[i], pictures[50 + i])], network, **preparation)
        found = PairTask.fit([((pictures[i] * 2).round() / 2, pictures[i])], network, **preparation)
        assert found.mode in ("direction", "analogy")
        blurred = measure(Kernel(KERNEL), pictures[[i]], 0.01, random(i))[0]
        assert PairTask.fit([(blurred, pictures[i])], network, **preparation).family == "kernel 5x5, shared"


# ---- to a folder and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operator", "family"), OPERATORS[4:], ids=[name for _, name in OPERATORS[4:]])
def test_an_operator_comes_back_from_a_folder(operator, family, tmp_path):
    task = PairTask.fit([pair(operator, 0.02)])
    task.save(tmp_path)
    loaded = PairTask.load(tmp_path)
    assert loaded.report() == task.report() and repr(loaded) == repr(task)
    assert (loaded.way, loaded.ratio, loaded.sigma) == (task.way, task.ratio, task.sigma)
    query, x = pair(operator, 0.02, 3)[0], picture(seed=8)[None]
    torch.testing.assert_close(loaded.loss(query)(x), task.loss(query)(x), rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.json", "pairs.safetensors"]
    loaded.save(tmp_path / "again")
    assert PairTask.load(tmp_path / "again").report() == task.report()


@pytest.mark.parametrize("mode", ["direction", "analogy"])
def test_a_change_comes_back_with_its_encoder(mode, tmp_path):
    task = PairTask.fit(EXAMPLES, Eyes(), mode=mode)
    task.save(tmp_path)
    loaded, query = PairTask.load(tmp_path, Eyes()), picture(seed=20)
    torch.testing.assert_close(loaded.loss(query)(stripes(query)[None]), task.loss(query)(stripes(query)[None]))
    with pytest.raises(ValueError, match="not the encoder"):
        PairTask.load(tmp_path, Eyes(seed=1))
    bare = PairTask.load(tmp_path)
    assert bare.report() == task.report()
    with pytest.raises(ValueError, match="needs the encoder"):
        bare.loss(query)


def test_files_that_nobody_saved_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pairs.json"):
        PairTask.load(tmp_path)
    PairTask.fit([pair(Kernel(KERNEL))]).save(tmp_path)
    data = json.loads((tmp_path / "pairs.json").read_text())
    for change in ({"format": 2}, {"operator": {"kind": "os.system"}}, {"scores": 3}):
        (tmp_path / "pairs.json").write_text(json.dumps(data | change))
        with pytest.raises(ValueError, match="does not hold what PairTask.save writes"):
            PairTask.load(tmp_path)
    (tmp_path / "pairs.json").write_text(json.dumps(data))
    (tmp_path / "pairs.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="does not hold"):
        PairTask.load(tmp_path)


def test_a_blur_of_pictures_from_files_is_undone():
    sharp = picture(32)
    files = [(255 * one).round() / 255 for one in (Kernel(KERNEL)(sharp[None])[0], sharp)]
    task = PairTask.fit([tuple(files)])
    assert task.way == "restore" and task.sigma < 0.003


def test_pairs_without_a_change_are_refused():
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="show no change"):
        PairTask.fit([(picture, picture.clone())])
