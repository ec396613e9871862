"""Sums of losses: balance, schedules, a loss over a batch."""

from __future__ import annotations

import pytest
import torch
from lossguide.guidance import recipes
from lossguide.guidance.gradient import balanced_gradient, loss_gradient
from lossguide.losses import Diversity, Measurement, Term, operators
from lossguide.samplers import denoiser, sample
from models import tiny_unet, vp_scheduler


def bright(image):
    return image.square().mean((1, 2, 3))


def loud(image):
    return 1000 * (image[..., :4] - 0.7).square().mean((1, 2, 3))


def plain(*losses, **weights):
    return [Term(loss, augment=False, weight=weights.get(loss.__name__, 1.0)) for loss in losses]


def test_balanced_terms_pull_alike_whatever_their_scale():
    image = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    terms = plain(bright, loud)
    g, loss, values, factors = balanced_gradient(image, terms, None, None)
    alone = [loss_gradient(image, [term], None, None)[0] for term in terms]
    lengths = torch.stack([one.flatten(1).norm(dim=1) for one in alone])
    scaled = [lengths.mean(0) / length for length in lengths]
    expected = sum(factor.view(-1, 1, 1, 1) * one for factor, one in zip(scaled, alone))
    torch.testing.assert_close(g, expected)
    torch.testing.assert_close(torch.stack(factors), torch.stack(scaled))
    torch.testing.assert_close(loss, sum(f * values[t.name] for f, t in zip(factors, terms)))
    singly = torch.cat([balanced_gradient(one[None], terms, None, None)[0] for one in image])
    torch.testing.assert_close(g, singly)


def test_weights_count_after_the_balance_and_a_flat_term_does_not_matter():
    image = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    flat = lambda image: image.flatten(1).sum(1) * 0
    g, *_ = balanced_gradient(image, plain(bright, loud, loud=3.0), None, None)
    alone = [loss_gradient(image, plain(one), None, None)[0] for one in (bright, loud)]
    lengths = [one.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for one in alone]
    mean = sum(lengths) / 2
    torch.testing.assert_close(g, mean * (alone[0] / lengths[0] + 3 * alone[1] / lengths[1]))
    with_flat, *_ = balanced_gradient(image, [*plain(bright), Term(flat, name="flat")], None, None)
    torch.testing.assert_close(with_flat, alone[0])


def test_balance_in_a_run_keeps_terms_apart_and_floors_known():
    unet = tiny_unet()
    model = denoiser(unet, vp_scheduler(prediction_type="v_prediction"))
    sums = Term(bright, augment=False) + Term(loud, augment=False)
    shares = []
    for balance in (False, True):
        record = sample(model, recipes.dps(sums, balance=balance), steps=5, seeds=[1, 2]).record
        shares.append(record.losses("bright")[-1] / record.losses("bright")[0])
        assert record.terms == ["bright", "loud"]
    assert not torch.equal(*shares)
    measured = Measurement(operators.SuperResolution(2), torch.zeros(3, 4, 4), 0.1)
    both = measured + 100 * Measurement(operators.GaussianBlur(3, 1.0), torch.zeros(3, 8, 8), 0.1)
    record = sample(model, recipes.auto(both, balance=True), steps=5, seeds=[1]).record
    assert torch.isfinite(record.losses()).all() and record.losses()[-1] < record.losses()[0]


def test_schedules_weigh_terms_along_lines():
    (term,) = (2.0 * Term(bright)).scheduled((0.2, 0.0), (0.6, 1.0)).terms()
    assert [round(term.at(p).weight, 9) for p in (0.0, 0.2, 0.4, 0.6, 0.9)] == [0.0, 0.0, 1.0, 2.0, 2.0]
    assert not term.acts_at(0.1) and term.acts_at(0.3)
    assert term.describe()["schedule"] == [[0.2, 0.0], [0.6, 1.0]]
    model = denoiser(tiny_unet(), vp_scheduler(prediction_type="v_prediction"))
    rows = sample(model, recipes.dps(Term(bright).scheduled((0.4, 0.0), (0.8, 1.0))), steps=10, seeds=[1]).record.rows
    assert ["loss" in row for row in rows] == [step > 4 for step in range(10)]
    for row, share in zip(rows[5:9], (0.25, 0.5, 0.75, 1.0)):
        torch.testing.assert_close(row["loss"], share * row["terms"]["bright"])
    for wrong in (((0.5, 1.0), (0.2, 1.0)), ((0.0, -1.0),)):
        with pytest.raises(ValueError, match="a schedule is points"):
            Term(bright).scheduled(*wrong)


def test_diversity_is_the_mean_likeness_to_the_others():
    image = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    flat = (image - image.mean((2, 3), keepdim=True)).flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    expected = torch.stack([(flat[0] @ flat[1] + flat[0] @ flat[2]) / 2])
    torch.testing.assert_close(Diversity()(image)[:1], expected.float(), check_dtype=False, rtol=1e-5, atol=1e-6)
    assert Diversity()(image[:1]).item() == 0
    same = image[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(Diversity()(same), torch.ones(3, dtype=torch.float64))
    flat = torch.full((2, 3, 16, 16), 0.5, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(Diversity()(flat).sum(), flat)[0]).all()
    model = denoiser(tiny_unet(), vp_scheduler(prediction_type="v_prediction"))
    record = sample(model, recipes.auto(Diversity(size=8)), steps=10, seeds=[1, 2, 3]).record
    assert record.losses()[-1].mean() < record.losses()[0].mean()
