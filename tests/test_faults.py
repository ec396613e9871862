"""Faults in the numbers: found where they are, told with their place, and never the other samples' trouble."""

from __future__ import annotations

import re
import sys
import warnings
from collections import namedtuple
from dataclasses import dataclass

import diffusers
import pytest
import torch
from click.testing import CliRunner
from diffusers.utils import BaseOutput
from lossguide.guidance import Augment, Guidance, guide, recipes
from lossguide.guidance.cli import main
from lossguide.guidance.gradient import loss_gradient
from lossguide.guidance.particles import Particles, Population
from lossguide.guidance.steps import Adam, Chain, Constant, Squared
from lossguide.guidance.watch import kept
from lossguide.losses import (
    ClassLabel,
    ClipDirection,
    ClipText,
    ContrastiveText,
    Measurement,
    Term,
    WordRelation,
    operators,
)
from lossguide.samplers import Record, denoiser, faults, sample
from models import tiny_stable_diffusion, tiny_unet, vp_scheduler

STEPS, BATCH, BAD, AT = 5, 3, 1, 2  # the sample at fault, and the visit
LINEAR = ("pigdm", "diffpir", "ddnm")
UNMOVED = ("best_of_n", "fk_steering")  # by gradients
REFRESHING = ("red_diff", "flowdps", "fk_steering", "tds")  # what they draw themselves stays when nothing else moves


class Clock:
    """Counts the model's calls, one a visit, so that a fault can be put into one of them."""

    def __init__(self):
        self.visit = -1


class Backward(torch.autograd.Function):
    """The picture itself, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, image, factor):
        ctx.save_for_backward(factor)
        return image.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None


def of_bad(value: torch.Tensor, at_fault: float, otherwise: float) -> torch.Tensor:
    """A number per sample, `(n, 1, ...)`; copies and candidates come batch by batch."""
    bad = torch.arange(len(value)) % BATCH == BAD
    return torch.where(bad, at_fault, otherwise).to(value).view(-1, *[1] * (value.dim() - 1))


VALUES = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}  # of the loss, whose gradient stays as it is
SLOPES = {"gradient nan": torch.nan, "gradient inf": torch.inf, "gradient huge": 1e30}
KINDS = (*VALUES, "nan throughout", *SLOPES)


def spoilt(kind: str | None, recipe: str, clock: Clock, at: int | None = None):
    """A loss that suits the recipe, with a fault of the bad sample at one visit, or at all."""

    def acts():
        return kind is not None and at in (None, clock.visit)

    def through(image):
        return Backward.apply(image, of_bad(image, SLOPES[kind], 1.0)) if kind in SLOPES and acts() else image

    def after(value):
        if kind == "nan throughout" and acts():
            return value * of_bad(value, torch.nan, 1.0)
        return value + of_bad(value, VALUES[kind], 0.0) if kind in VALUES and acts() else value

    if recipe in LINEAR:
        mask = torch.ones(4, 4)
        mask[:, 2:] = 0
        inpaint = operators.Inpaint(mask)
        return Measurement(lambda image: after(inpaint(through(image))), inpaint(torch.full((1, 3, 4, 4), 0.8)), 0.1)
    return Term(lambda image: after((through(image) - 0.8).square().flatten(1).mean(1)), name="plant", augment=True)


def soft(clock: Clock, spoil=lambda output, visit: output):
    """A small denoiser that mixes a sample's own pixels only."""

    def model(x, t):
        clock.visit += 1
        output = 0.3 * torch.tanh(x + 0.5 * x.roll(1, -1)) + 0.1 * x.flatten(1).mean(1).view(-1, 1, 1, 1)
        return spoil(output, clock.visit)

    return model


def drawn(recipe: str, kind=None, at=None, spoil=lambda output, visit: output, scheduler=None, **changes):
    clock = Clock()
    guidance = recipes.get(recipe)(spoilt(kind, recipe, clock, at)).replace(**changes)
    model = denoiser(soft(clock, spoil), scheduler or vp_scheduler(), shape=(3, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return sample(model, guidance, steps=STEPS, seeds=range(BATCH))


def others(samples: torch.Tensor) -> torch.Tensor:
    return samples[[i for i in range(len(samples)) if i != BAD]]


# ---- the guide's faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", recipes.available())
def test_a_fault_of_one_sample_is_that_samples_alone(recipe, kind):
    if recipe == "tokens":
        pytest.skip("steers a token generator")
    sound, whole = drawn(recipe), drawn(recipe, kind)
    assert torch.equal(others(whole.samples), others(sound.samples))
    assert whole.samples.isfinite().all()
    counts = whole.record.nonfinite.tolist()
    assert counts[0] == counts[2] == 0
    if (recipe in UNMOVED and kind in SLOPES) or (recipe in LINEAR and kind == "gradient huge"):
        return
    acted = [row for row in whole.record.rows if "loss" in row]
    assert counts[BAD] == len(acted)
    if recipe not in REFRESHING:
        still = drawn(recipe, kind, time_travel=None)
        plain = sample(denoiser(soft(Clock()), vp_scheduler(), shape=(3, 4, 4)), steps=STEPS, seeds=range(BATCH))
        assert torch.equal(still.samples[BAD], plain.samples[BAD])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", recipes.available())
def test_a_fault_at_one_visit_poisons_no_later_one(recipe, kind):
    if recipe == "tokens":
        pytest.skip("steers a token generator")
    changes = {} if recipe in UNMOVED else dict(start=0.0, stop=1.0)
    sound, whole = drawn(recipe, **changes), drawn(recipe, kind, at=AT, **changes)
    assert torch.equal(others(whole.samples), others(sound.samples)) and whole.samples.isfinite().all()
    if recipe in UNMOVED or (recipe in LINEAR and kind == "gradient huge"):
        return
    assert whole.record.nonfinite.tolist() == [0, 1, 0]
    steps = [row["step_size"][BAD] for row in whole.record.rows if "step_size" in row]
    if steps:  # inner steps alone have none
        assert steps[AT] == 0 and all(step.isfinite() for step in steps)
        assert all(step > 0 for step in steps[AT + 1 : -1])


def test_what_overflows_within_a_rule_does_not_stay_in_its_state():
    """Loss and gradient are finite, their product is not, and Adam's moments would keep it."""
    clock = Clock()

    def steep(image):
        high = 1e7 if clock.visit == AT else 1.0
        return (high**2 * of_bad(image, 1.0, 0.0).flatten() + 1) * (image - 0.8).square().flatten(1).mean(1)

    guidance = Guidance(steep, rule=Chain((Squared(), Squared(), Adam(0.1))), through="x0")
    model = denoiser(soft(clock), vp_scheduler(), shape=(3, 4, 4))
    with pytest.warns(RuntimeWarning, match="the step for the loss 'steep' at step 2"):
        result = sample(model, guidance, steps=STEPS, seeds=range(BATCH))
    sizes = torch.stack([row["step_size"] for row in result.record.rows])[:, BAD]
    assert sizes[AT] == 0 and (sizes[AT + 1 :] > 0).all() and result.record.nonfinite.tolist() == [0, 1, 0]
    assert faults.KINDS[result.record.rows[AT]["fault"][BAD] - 1] == "step"


@pytest.mark.parametrize("solver", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler",
                                    "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])  # fmt: skip
@pytest.mark.parametrize("recipe", ["auto", "dps", "adam_dps", "universal", "red_diff"])
def test_solvers_keep_samples_apart(recipe, solver):
    scheduler = getattr(diffusers, solver)()
    sound = drawn(recipe, scheduler=scheduler)

    def lose(output, visit):
        return output * of_bad(output, torch.nan, 1.0) if visit == AT else output

    for whole in (drawn(recipe, "nan throughout", scheduler=scheduler), drawn(recipe, spoil=lose, scheduler=scheduler)):
        assert torch.equal(others(whole.samples), others(sound.samples)) and others(whole.samples).isfinite().all()


def test_half_precision_keeps_what_it_cannot_move():
    """A step that float16 cannot hold leaves its sample as the solver has it."""

    def far(image):
        return (1e5 * of_bad(image, 1.0, 1e-6) * image).flatten(1).sum(1)

    model = soft(Clock())
    guidance = Guidance(Term(far, augment=False), rule=Constant(1.0), through="x0")
    run = guidance.begin(_solver(), lambda x: x, range(BATCH))
    x = torch.ones(BATCH, 3, 4, 4, dtype=torch.float16)
    moved = run.step(x, model(x, 0), run.visits[0], lambda prediction, x: x - prediction)
    plain = x - soft(Clock())(x, 0)
    assert moved.isfinite().all() and torch.equal(moved[BAD], plain[BAD])
    assert not torch.equal(moved[0], plain[0]) and run.record.nonfinite.tolist() == [0, 1, 0]
    scored = Guidance(Term(far, augment=False), rule=Constant(1.0), through="x0", edit="score")
    run = scored.begin(_solver(), lambda x: x, range(BATCH))
    assert torch.equal(run.step(x, model(x, 0), run.visits[0], lambda prediction, x: x - prediction)[BAD], plain[BAD])


def _solver():
    from lossguide.samplers import Solver

    return Solver.of(vp_scheduler(), STEPS)


# ---- particles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", VALUES.values())
@pytest.mark.parametrize("pick", ["best", "draw"])
def test_a_candidate_whose_loss_is_not_finite_is_not_kept(pick, odd):
    population = Population(
        Particles(3, sharpness=1.0, pick=pick), 1.0, [torch.Generator().manual_seed(i) for i in range(6)]
    )
    population.weigh(torch.tensor([odd, 1.0, 3.0, odd, 2.0, 1.0]))
    assert (population.weights.isfinite()).all() and population.weights[0, 0] == 0 == population.weights[1, 1]
    assert all(not {0, 3} & set(population.chosen().tolist()) for _ in range(20))
    order = population.ancestors()
    assert order is None or not {0, 3} & set(order.tolist())


def test_a_candidate_is_weighed_anew_when_its_loss_is_finite_again():
    population = Population(Particles(3, sharpness=1.0, resample=False), 1.0, [torch.Generator() for _ in range(3)])
    for losses in ([1.0, 2.0, 3.0], [torch.nan, 2.0, 3.0], [9.0, 2.0, 3.0]):
        population.weigh(torch.tensor(losses))
    torch.testing.assert_close(population.weights[0], (-torch.tensor([9.0, 2.0, 3.0]).double()).softmax(0))


def test_a_candidate_that_the_model_loses_is_replaced():
    lost = 4  # the second candidate of the second picture

    def lose(output, visit):
        if visit == AT:
            output[lost] = torch.inf
        return output

    for recipe in ("best_of_n", "fk_steering", "tds"):
        assert drawn(recipe, spoil=lose).samples.isfinite().all(), recipe


def test_where_no_candidate_is_finite_the_first_is_kept():
    best, plain = drawn("best_of_n", "nan"), drawn("best_of_n")
    alone = sample(denoiser(soft(Clock()), vp_scheduler(), shape=(3, 4, 4)), steps=STEPS, seeds=range(BATCH))
    assert torch.equal(best.samples[BAD], alone.samples[BAD]) and torch.equal(
        others(best.samples), others(plain.samples)
    )


# ---- the denoiser's faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("recipe", recipes.available())
def test_a_lost_prediction_loses_its_sample_alone(recipe, odd):
    if recipe == "tokens":
        pytest.skip("steers a token generator")

    def lose(output, visit):
        return output * of_bad(output, odd, 1.0) if visit == AT else output

    sound, whole = drawn(recipe, time_travel=None), drawn(recipe, spoil=lose, time_travel=None)
    assert torch.equal(others(whole.samples), others(sound.samples))
    assert whole.record.nonfinite.tolist() == [0, 0, 0]
    first = [row["fault"].tolist() for row in whole.record.rows][: AT + 1]
    assert first == [[0, 0, 0]] * AT + [[0, 1, 0]]
    if recipe == "red_diff":  # its sample is an anchor, which waits for a better one
        assert whole.samples.isfinite().all()


def test_the_place_of_every_fault_is_told():
    def lose(output, visit):
        return output * of_bad(output, torch.nan, 1.0) if visit == 3 else output

    def warned(*losses, spoil=lambda output, visit: output, **changes):
        model = denoiser(soft(clock, spoil), vp_scheduler(), shape=(3, 4, 4))
        with pytest.warns(RuntimeWarning) as caught:
            sample(model, recipes.dps(sum(losses)).replace(**changes), steps=STEPS, seeds=range(BATCH))
        (warning,) = caught
        return str(warning.message)

    clock = Clock()
    told = warned(spoilt(None, "dps", clock), spoil=lose)
    place = r"picture 1 \(2 times\), first at step 3 \(timestep \d+\)"
    many = "the denoiser's prediction was not finite for 1 of 3 pictures, which guidance cannot mend: "
    assert re.fullmatch(many + place, told)
    other = Term(lambda image: image.flatten(1).mean(1), name="other")
    clock = Clock()
    told = warned(spoilt("inf", "dps", clock, at=AT), other)
    assert re.fullmatch(r"the loss, its gradient or its step was not finite for 1 of 3 pictures, which it did not move "
                        r"then: picture 1 \(1 times\), first the value of the loss 'plant' at step 2 \(timestep \d+\)",
                        told)  # fmt: skip
    clock = Clock()
    told = warned(spoilt("gradient nan", "dps", clock, at=AT), other)
    assert "first the gradient of the loss 'plant' or 'other' at step 2" in told
    clock = Clock()
    told = warned(spoilt("nan", "dps", clock, at=1), spoil=lose)
    assert "cannot mend: picture 1" in told and "; and the loss, its" in told and "'plant' at step 1" in told


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_to_stop_says_where(kind):
    clock = Clock()
    other = Term(lambda image: image.flatten(1).mean(1), name="other")
    guidance = recipes.dps(spoilt(kind, "dps", clock, at=AT) + other).replace(raise_on_nonfinite=True)
    what = "gradient" if kind in SLOPES else "value"
    place = rf"the {what} of the loss 'plant' is not finite at step 2 for pictures \[1\] \(timestep \d+\)"
    with pytest.raises(FloatingPointError, match=f"^{place}$"):
        sample(denoiser(soft(clock), vp_scheduler(), shape=(3, 4, 4)), guidance, steps=STEPS, seeds=range(BATCH))


def test_a_run_that_is_to_stop_stops_at_the_denoisers_fault():
    def lose(output, visit):
        return output * of_bad(output, torch.nan, 1.0) if visit == AT else output

    with pytest.raises(
        FloatingPointError, match=r"^the denoiser's prediction is not finite at step 2 for pictures \[1\]"
    ):
        drawn("auto", spoil=lose, raise_on_nonfinite=True, time_travel=None)


@pytest.mark.parametrize("guidance", [None, "auto", "best_of_n"])
def test_a_model_that_gives_nothing_finite_stops_at_once(guidance):
    calls = []

    def broken(x, t):
        calls.append(t)
        return x * torch.nan

    model = denoiser(broken, vp_scheduler(), shape=(3, 4, 4))
    made = guidance and recipes.get(guidance)(lambda image: image.flatten(1).mean(1))
    with pytest.raises(FloatingPointError, match=r"prediction is not finite at step 0 .*float32") as caught:
        sample(model, made, steps=STEPS, seeds=range(BATCH))
    assert len(calls) == 1
    with pytest.raises(FloatingPointError):
        sample(model, made and made.replace(strength=0.0), steps=STEPS, seeds=range(BATCH))
    assert "\n" not in str(caught.value)


def test_a_guide_that_gives_nothing_finite_is_told_at_the_first_step():
    seen = []

    def broken(image):
        seen.append(1)
        return image.flatten(1).mean(1) * torch.nan

    model = denoiser(soft(Clock()), vp_scheduler(), shape=(3, 4, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(model, recipes.dps(broken), steps=STEPS, seeds=range(BATCH))
    early, late = (str(one.message) for one in caught)
    assert "value of the loss 'broken' is not finite at step 0 for pictures [0, 1, 2]" in early
    assert "which are all" in early and "3 of 3 pictures" in late
    with pytest.raises(RuntimeWarning, match="moves nothing"), warnings.catch_warnings():
        warnings.simplefilter("error")
        seen.clear()
        sample(model, recipes.dps(broken), steps=STEPS, seeds=range(BATCH))
    assert len(seen) == 1


def test_a_decoder_that_overflows_is_told_as_such():
    def decode(x):
        return x * of_bad(x, torch.inf, 1.0)

    model = denoiser(soft(Clock()), vp_scheduler(), shape=(3, 4, 4), decode=decode)
    with pytest.warns(RuntimeWarning, match=r"picture 1 .*what the decoder makes of x0 at step 0"):
        result = sample(model, recipes.dps(lambda image: image.flatten(1).mean(1)), steps=STEPS, seeds=range(BATCH))
    assert result.record.losses()[:, BAD].isnan().all() and result.samples.isfinite().all()


def test_a_guide_that_raises_at_what_is_not_finite_never_meets_it():
    def strict(image):
        assert image.isfinite().all()
        return torch.linalg.svdvals(image.mean(1)).sum(1)

    def lose(output, visit):
        return output * of_bad(output, torch.nan, 1.0) if visit == 1 else output

    model = denoiser(soft(Clock(), lose), vp_scheduler(), shape=(3, 4, 4))
    with pytest.warns(RuntimeWarning, match="prediction"):
        result = sample(model, recipes.auto(strict), steps=STEPS, seeds=range(BATCH))
    assert others(result.samples).isfinite().all() and others(result.record.losses().T).isfinite().all()


def test_the_record_says_it_in_json():
    whole = drawn("dps", "nan", at=AT).record
    rows = whole.to_dict()["rows"]
    assert [row["fault"][BAD] for row in rows] == [None, None, "loss", None, None]
    assert Record().nonfinite is None and Record().to_dict()["nonfinite"] is None


# ---- what losses return, and how they fail ------------------------------------------------------------------------


def in_place(image):
    image.clamp_(0, 1)
    return image.flatten(1).mean(1)


def overwritten(image):
    y = image.exp()
    z = y.square()
    y += 1
    return (y * z).flatten(1).mean(1)


def without(image):
    with torch.no_grad():
        return image.flatten(1).mean(1)


RETURNS = {
    "a scalar": (lambda image: image.mean(), r"shape \(3,\), but returned \(\): .*average over every axis"),
    "a column": (lambda image: image.flatten(1).mean(1, keepdim=True), r"returned \(3, 1\): .*drop all axes"),
    "channels": (lambda image: image.mean((2, 3)), r"returned \(3, 3\): .*not one number each"),
    "twice as many": (lambda image: image.flatten(1).mean(1).repeat(2), r"returned \(6,\)"),
    "a float": (lambda image: image.mean().item(), "returned float: .*without .item"),
    "nothing": (lambda image: None, "returned NoneType: .*end it with return"),
    "whole numbers": (lambda image: (image > 0.5).flatten(1).sum(1), "returned torch.int64: .*have no gradient"),
    "complex": (lambda image: torch.fft.fft2(image).flatten(1).mean(1), "returned torch.complex64"),
    "numpy": (lambda image: torch.from_numpy(image.numpy()).flatten(1).mean(1), "numpy knows no gradient"),
    "detached": (lambda image: image.detach().flatten(1).mean(1), "not differentiable"),
    "argmax": (lambda image: image.flatten(1).argmax(1).float(), "not differentiable: .*argmax"),
    "no_grad": (without, "not differentiable: .*no_grad"),
    "in place": (in_place, r"image\.clone\(\)"),
    "in place on the way": (overwritten, r"has no gradient .*y = y \+ 1"),
    "another device": (
        lambda image: image.flatten(1).mean(1).to("meta"),
        "returned its value on meta for pictures on cpu",
    ),
    "another dtype": (lambda image: image.flatten(1) @ torch.ones(48).double(), r"by \.to\(image\)"),
    "two arguments": (lambda image, other: image, "pictures alone"),
}


@pytest.mark.parametrize("case", RETURNS)
@pytest.mark.parametrize("augmented", [True, False])
def test_a_loss_that_is_none_is_told_at_the_first_step(case, augmented):
    loss, told = RETURNS[case]
    calls = []

    def counted(*images):
        calls.append(1)
        return loss(*images)

    guidance = recipes.dps(Term(loss if case == "two arguments" else counted, name="mine", augment=augmented))
    guidance = guidance.replace(augment=Augment(2, chunk=BATCH))
    model = denoiser(soft(Clock()), vp_scheduler(), shape=(3, 4, 4))
    with pytest.raises(ValueError, match=told) as caught:
        sample(model, guidance, steps=STEPS, seeds=range(BATCH))
    assert "loss 'mine'" in str(caught.value) and "\n" not in str(caught.value) and len(calls) <= 1


def test_a_loss_must_not_change_the_picture_that_others_see():
    """On augmented copies torch itself does not mind, and the second term would see what the first one left."""
    image = torch.rand(2, 3, 8, 8)
    draws = torch.rand(2, 2, 9)
    terms = [Term(in_place, name="first"), Term(lambda image: image.flatten(1).mean(1), name="second")]
    with pytest.raises(ValueError, match="'first' writes into the pictures"):
        loss_gradient(image, terms, Augment(2), draws)
    with pytest.raises(ValueError, match="'first' writes into the pictures"):
        loss_gradient(image, terms[:1], None, None, gradient=False)


def test_whole_numbers_are_a_loss_where_no_gradient_is_asked_for():
    bright = Term(lambda image: image.flatten(1).mean(1) > 0.5, name="bright")
    image = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert bright(image).tolist() == [0.0, 1.0]
    assert loss_gradient(image, [bright], None, None, gradient=False)[1].tolist() == [0.0, 1.0]


def test_a_loss_can_be_compiled_whole():
    term = Term(lambda image: image.flatten(1).mean(1))
    image = torch.rand(2, 3, 4, 4)
    compiled = torch.compile(lambda image: term(image), backend="eager", fullgraph=True)
    assert torch.equal(compiled(image), term(image))


def test_a_rule_s_state_may_be_a_named_tuple():
    state = namedtuple("State", "mean count")
    sound = torch.tensor([True, False])
    after = kept(sound, state(torch.ones(2, 3), 2), state(torch.zeros(2, 3), 1))
    assert isinstance(after, state) and after.mean[:, 0].tolist() == [1, 0] and after.count == 2


def test_a_denoiser_s_output_may_call_its_prediction_otherwise():
    @dataclass
    class Output(BaseOutput):
        prediction: torch.Tensor

    model = denoiser(lambda x, t: Output(0.5 * x), vp_scheduler(), shape=(3, 4, 4))
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(model.predict(x, 0), 0.5 * x)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes of errors are Python 3.11's")
def test_an_error_of_the_loss_keeps_its_kind_and_says_where():
    def broken(image):
        raise KeyError("eyes")

    with pytest.raises(KeyError) as caught:
        sample(denoiser(soft(Clock()), vp_scheduler(), shape=(3, 4, 4)), recipes.auto(broken), steps=STEPS)
    first, second = caught.value.__notes__
    assert "the loss 'broken'" in first and re.search(r"at step 0 \(timestep \d+\) of the guidance 'auto'", second)


# ---- what does not fit ------------------------------------------------------------------------------------------


def mean(image):
    return image.flatten(1).mean(1)


FITS = {
    "size": (lambda: denoiser(tiny_unet(), vp_scheduler(), shape=(3, 9, 9)), mean, "UNet2DModel does not take"),
    "shape": (lambda: denoiser(lambda x, t: x[..., :-1], vp_scheduler(), shape=(3, 4, 4)), mean, "shape it was given"),
    "batch": (lambda: denoiser(lambda x, t: x[:1], vp_scheduler(), shape=(3, 4, 4)), mean, "shape it was given"),
    "nothing": (lambda: denoiser(lambda x, t: None, vp_scheduler(), shape=(3, 4, 4)), mean, "returned NoneType"),
    "whole": (lambda: denoiser(lambda x, t: x.long(), vp_scheduler(), shape=(3, 4, 4)), mean, "returned torch.int64"),
    "decoded batch": (lambda: _decoding(lambda x: x[:1]), mean, r"decode must return .*each of the 3 samples"),
    "decoded numbers": (lambda: _decoding(lambda x: x.detach().numpy()), mean, "decode must return .*ndarray"),
    "decoded channels": (
        lambda: _decoding(lambda x: x[:, :2]), ClassLabel([0, 1, 2]), r"'class-label' looks at pictures \(B, 3, H, W\)"
    ),
    "labels": (lambda: _decoding(None), ClassLabel([0, 1]), "for 2 pictures, one each, and 3 are drawn"),
    "label": (lambda: _decoding(None), ClassLabel(17), "label 17 is not one of the classifier's 10 classes"),
    "measurement": (
        lambda: _decoding(None),
        Measurement(operators.SuperResolution(2), torch.rand(1, 3, 4, 4)), r"makes \(3, 3, 2, 2\) .*but y is \(1, 3, 4",
    ),
    "measurements": (
        lambda: _decoding(None), Measurement(operators.SuperResolution(2), torch.rand(2, 3, 2, 2)), "for 2 pictures"
    ),
}  # fmt: skip


def _decoding(decode):
    return denoiser(soft(Clock()), vp_scheduler(), shape=(3, 4, 4), decode=decode)


@pytest.mark.parametrize("case", FITS)
def test_what_does_not_fit_is_told_in_one_sentence(case):
    make, loss, told = FITS[case]
    with pytest.raises(ValueError, match=told) as caught:
        sample(make(), recipes.dps(loss).replace(augment=None), steps=STEPS, seeds=range(BATCH))
    assert "\n" not in str(caught.value)


def test_a_mask_of_another_size_is_told():
    operator = operators.Inpaint(torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"does not suit measurements \(1, 3, 4, 4\): is a mask of another size"):
        Measurement(operator, torch.rand(1, 3, 4, 4))
    loss = Measurement(operator, torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"does not suit images \(3, 3, 4, 4\): is a mask of another size"):
        sample(_decoding(None), recipes.dps(loss), steps=STEPS, seeds=range(BATCH))


def test_a_projection_that_changes_the_shape_is_told():
    guidance = recipes.mpgd(mean, project=lambda x0: x0[..., :-1])
    with pytest.raises(ValueError, match="project makes .* must return the same"):
        sample(_decoding(None), guidance, steps=STEPS, seeds=range(BATCH))


LONG = " ".join(["word"] * 40)
TEXTS = {
    "ClipText": lambda clip, text: ClipText(text, model=clip),
    "ClipText of several": lambda clip, text: ClipText({"a boot": 1.0, text: 0.5}, model=clip),
    "ClipText negative": lambda clip, text: ClipText("a boot", negative=text, model=clip),
    "ContrastiveText": lambda clip, text: ContrastiveText("a boot", text, model=clip),
    "ClipDirection": lambda clip, text: ClipDirection("a photo", text, torch.rand(3, 32, 32), model=clip),
    "WordRelation": lambda clip, text: WordRelation("boot bag", template=text + " {}", model=clip),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_the_tokenizer_would_cut_is_refused(name, tiny_clip):
    with pytest.raises(ValueError, match="longer than the 16 tokens .* shorten it: 'word") as caught:
        TEXTS[name](str(tiny_clip), LONG)
    assert len(str(caught.value)) < 200
    TEXTS[name](str(tiny_clip), " ".join(["word"] * 13))  # with its start, its end and a word of the template


def test_a_text_may_be_as_long_as_the_tokenizer_takes(tiny_clip):
    ClipText(" ".join(["word"] * 14), model=str(tiny_clip))
    with pytest.raises(ValueError, match="longer than the 16 tokens"):
        ClipText(" ".join(["word"] * 15), model=str(tiny_clip))


# ---- pipelines ---------------------------------------------------------------------------------------------------


class Forward:
    """A module's output at one call, spoilt for the bad sample or for all."""

    def __init__(self, module, factor: float, at: int, everywhere: bool = False):
        self.calls, self.factor, self.at, self.everywhere = -1, factor, at, everywhere
        self.hook = module.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.calls += 1
        if self.calls != self.at:
            return output
        first = output if isinstance(output, torch.Tensor) else output[0]
        spoilt = first * (self.factor if self.everywhere else of_bad(first, self.factor, 1.0))
        return spoilt if isinstance(output, torch.Tensor) else (spoilt, *output[1:])


def called(pipe, guidance):
    generators = [torch.Generator().manual_seed(seed) for seed in range(BATCH)]
    options = dict(prompt=["a b"] * BATCH, height=16, width=16, num_inference_steps=4, guidance_scale=1.0, eta=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = guide(pipe, guidance)(**options, output_type="latent", generator=generators)
    told = [str(one.message) for one in caught if issubclass(one.category, RuntimeWarning)]
    return output.images, output.record, told


def darkness(image):
    return image.flatten(1).mean(1)


@pytest.mark.parametrize("through", ["denoiser", "x0"])
def test_pipelines_keep_samples_apart(through):
    pipe = tiny_stable_diffusion()
    guidance = recipes.auto(Term(darkness, augment=False), through=through, time_travel=None, start=0.0)
    sound, _, told = called(pipe, guidance)
    assert told == []
    forward = Forward(pipe.unet, torch.nan, AT)
    images, record, (told,) = called(pipe, guidance)
    forward.hook.remove()
    assert torch.equal(others(images), others(sound)) and record.nonfinite.tolist() == [0, 0, 0]
    assert "the denoiser's prediction was not finite for 1 of 3 pictures" in told and "at step 2 (timestep" in told
    forward = Forward(pipe.vae.decoder, torch.inf, 1)
    images, record, (told,) = called(pipe, guidance)
    forward.hook.remove()
    assert torch.equal(others(images), others(sound)) and images.isfinite().all()
    assert record.nonfinite.tolist() == [0, 1, 0] and "what the decoder makes of x0 at step 1" in told


def test_a_pipeline_that_gives_nothing_finite_stops_at_once_and_is_left_as_found():
    pipe = tiny_stable_diffusion()
    scheduler, wanted = pipe.scheduler, [p.requires_grad for p in pipe.unet.parameters()]
    forward = Forward(pipe.unet, torch.nan, 0, everywhere=True)
    with pytest.raises(FloatingPointError, match="prediction is not finite at step 0 .*float32"):
        called(pipe, recipes.auto(darkness))
    assert forward.calls == 0 and pipe.scheduler is scheduler and torch.is_grad_enabled()
    assert [p.requires_grad for p in pipe.unet.parameters()] == wanted
    forward.calls = -1
    called(pipe, recipes.auto(darkness, strength=0.0))  # as the plain pipeline, which does not mind either


# ---- token generators --------------------------------------------------------------------------------------------


def token_model(spoil=lambda logits, call: logits):
    from diffusers import AmusedScheduler, VQModel
    from lossguide.samplers import token_generator

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vqvae = VQModel(
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,),
            norm_num_groups=4, latent_channels=3, num_vq_embeddings=12, sample_size=4, lookup_from_codebook=True,
        )  # fmt: skip
        table = torch.randn(13, 12)
    calls = []

    def transformer(tokens):
        calls.append(1)
        return spoil(table[tokens].movedim(-1, 1).contiguous(), len(calls) - 1)

    return token_generator(transformer, vqvae.eval(), AmusedScheduler(12), shape=(4, 4))


@pytest.mark.parametrize("guidance", [None, dict(time_travel=None), dict(inner=0, candidates=3)])
def test_a_transformers_lost_logits_are_that_samples_alone(guidance):
    def lose(logits, call):
        return logits * of_bad(logits, torch.nan, 1.0) if call == 1 else logits

    made = None if guidance is None else recipes.tokens(Term(darkness, augment=False), **guidance)
    sound = sample(token_model(), made, steps=4, seeds=range(BATCH))
    with pytest.warns(RuntimeWarning, match="^the transformer's prediction was not finite for 1 of 3") as caught:
        whole = sample(token_model(lose), made, steps=4, seeds=range(BATCH))
    assert len(caught) == 1 and "at step 1" in str(caught[0].message)
    assert torch.equal(others(whole.samples), others(sound.samples)) and (whole.samples < 12).all()
    with pytest.raises(FloatingPointError, match="transformer's prediction is not finite at step 0"):
        sample(token_model(lambda logits, call: logits * torch.nan), made, steps=4, seeds=range(BATCH))


# ---- the command line --------------------------------------------------------------------------------------------

OWN = """
import torch

def numpy(image):
    return torch.from_numpy(image.numpy()).flatten(1).mean(1)

def nothing(image):
    image.flatten(1).mean(1)

def in_place(image):
    image.clamp_(0, 1)
    return image.flatten(1).mean(1)

def overwritten(image):
    y = image.exp()
    z = y.square()
    y += 1
    return (y * z).flatten(1).mean(1)

def whole(image):
    return (image > 0.5).flatten(1).sum(1)

def unbound(image, target):
    return (image - target).flatten(1).mean(1)

def late(image):
    if image.mean() != 0.5 and len(image) > 1:
        raise ArithmeticError("too bright")
    return image.flatten(1).mean(1)

def nan(image):
    return image.flatten(1).mean(1) * torch.nan
"""


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ("numpy", "numpy knows no gradient"),
        ("nothing", "end it with return"),
        ("in_place", "image.clone()"),
        ("overwritten", "write y = y + 1"),
        ("whole", "returned torch.int64"),
        ("unbound", "functools.partial"),
        ("late", "'late' raised ArithmeticError: too bright (own.py:28)"),
    ],
)
def test_the_command_line_tells_faults_in_one_sentence(loss, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    arguments = ["generate", "--loss", f"own.py:{loss}", "--steps", "2", "--num-images", "2", "-q"]
    result = CliRunner().invoke(main, arguments)
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.exception
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1 and told in result.stderr
    assert f"'{loss}'" in result.stderr


def test_the_command_line_warns_at_the_first_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    arguments = ["generate", "--loss", "own.py:nan", "--steps", "2", "--num-images", "2", "-q"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.exception
    early, late = (line for line in result.stderr.splitlines() if line.startswith("Warning: "))
    assert "value of the loss 'nan' is not finite at step 0 for pictures [0, 1]" in early and "2 of 2 pictures" in late
