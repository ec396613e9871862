"""The scenes of the task `relations`: where things lie, what is said of them, and what the judge's answers mean."""

from __future__ import annotations

import pytest
import torch

from benchmarks.relations import evaluate, networks, scenes, train
from benchmarks.relations.scenes import CLASSES, LAYOUTS, Layout

KINDS = len(CLASSES)


@pytest.fixture
def pool():
    """Plain squares, each class of another grey."""
    return [torch.full((2, scenes.SIDE, scenes.SIDE), (i + 1) / 10) for i in range(KINDS)]


def test_things_lie_where_the_layout_says(pool):
    found = scenes.compose(pool, LAYOUTS, torch.Generator().manual_seed(0))
    assert found.shape == (60, 1, 32, 32)
    for layout, scene in zip(LAYOUTS, found[:, 0]):
        first, second = (torch.isclose(scene, torch.tensor((i + 1) / 10)).nonzero() for i in
                         (layout.first, layout.second))  # fmt: skip
        along = 0 if layout.vertical else 1
        ahead, across = first.float().mean(0) - second.float().mean(0), 1 - along
        assert ahead[along] < -12 and abs(ahead[across]) <= 9
        assert max(len(first), len(second)) == scenes.SIDE**2 and ((scene > 0).sum() == len(first) + len(second))
    again = scenes.compose(pool, LAYOUTS, torch.Generator().manual_seed(0))
    assert torch.equal(found, again) and not torch.equal(found, scenes.compose(pool, LAYOUTS))


def test_captions_are_true_of_their_layouts_alone():
    assert len(set(LAYOUTS)) == 60
    boot_bag = Layout(False, CLASSES.index("boot"), CLASSES.index("bag"))
    assert scenes.prompt(boot_bag) == "a boot left of a bag" and scenes.prompt(boot_bag, 1) == "a bag right of a boot"
    assert len({scenes.prompt(layout, phrase) for layout in LAYOUTS for phrase in (0, 1)}) == 120
    forms, true, kinds = train.captions()
    assert true.shape == (len(forms), 60) == (60 + 15 + 6, 60)
    assert [true[kind].sum(1).unique().tolist() for kind in kinds] == [[1], [4], [20]]
    place = LAYOUTS.index(boot_bag)
    assert "a photo of an ankle boot to the left of a handbag" in forms[place]
    said = {text for form, of in zip(forms, true) if of[place] for text in form}
    assert {"a boot left of a bag", "a bag right of a boot", "a bag and a boot", "a boot", "handbag"} <= said
    assert not said & {"a bag left of a boot", "a boot right of a bag", "a boot above a bag", "a dress"}
    assert len(said) == len({text for text in said if "dress" not in text and "sandal" not in text})


def test_prompts_of_search_and_evaluation_are_others():
    size = evaluate.SIZES[False]
    tried, measured = ({*evaluate.layouts(which, size)} for which in ("search", "first"))
    assert (len(tried), len(measured)) == size.prompts and not tried & measured
    assert measured == {*evaluate.layouts("second", size)} and sum(one.vertical for one in measured) == 12
    layouts, texts = evaluate.prompts("first", size, range(48))
    assert layouts[:24] == layouts[24:] and texts[:24] == texts[24:]
    for relation in scenes.RELATIONS:
        assert sum(f" {relation} " in text for text in texts) == 12
    for layout, text in zip(layouts, texts):
        assert text in (scenes.prompt(layout), scenes.prompt(layout, 1))


@pytest.mark.parametrize(
    ("says", "right"),
    [
        ((0, 5, 4), dict(all=1, things=1, thing=1, axis=1, relation=1)),
        ((0, 4, 5), dict(all=0, things=1, thing=1, axis=1, relation=0)),
        ((1, 5, 4), dict(all=0, things=1, thing=1, axis=0, relation=0)),
        ((0, 5, 2), dict(all=0, things=0, thing=0.5, axis=1, relation=1)),
        ((0, 2, 5), dict(all=0, things=0, thing=0.5, axis=1, relation=0)),
        ((0, 5, 5), dict(all=0, things=0, thing=0.5, axis=1, relation=0)),
        ((0, 1, 2), dict(all=0, things=0, thing=0, axis=1, relation=0)),
    ],
)
def test_what_the_judge_says(says, right):
    """Of a boot (5) left of a bag (4)."""

    def judge(pictures):
        sizes = (2, KINDS, KINDS)
        return [torch.eye(n)[one].expand(len(pictures), -1) for n, one in zip(sizes, says)]

    found = networks.judged(judge, torch.zeros(2, 1, 32, 32), [Layout(False, 5, 4)] * 2)
    assert {name: float(values[0]) for name, values in found.items()} == right


def test_the_judge_and_the_models_take_scenes():
    logits = networks.Judge().eval()(torch.rand(2, 3, 32, 32))
    assert [tuple(one.shape) for one in logits] == [(2, 2), (2, KINDS), (2, KINDS)]
    assert networks.build_unet().config.in_channels == networks.PATCH**2
    rows = [part.tolist() for part in networks.targets([Layout(True, 1, 2), Layout(False, 3, 0)])]
    assert rows == [[1, 0], [1, 3], [2, 0]]


def test_it_says_what_is_missing(tmp_path):
    assert "no clip and no clip-plain and no unet and no judge" in networks.missing(tmp_path)
    assert "python -m benchmarks.relations.train" in networks.missing(tmp_path)


def test_verdict_asks_for_five_points_and_twice_the_error_and_no_loss_elsewhere():
    gains = dict(a=([0.2, 0.03], [0, 0.01]), b=([0.06, 0.05],), c=([0.04, 0.001],), d=([0.3, 0.03], [-0.2, 0.03]))
    rows = [dict(method="ClipText", gain=None), dict(method="unguided", gain=[0.5, 0.01])]
    rows += [dict(method=name, gain=gain) for name, own in gains.items() for gain in own]
    said = evaluate.verdict(rows)
    assert "over ClipText: a. No" in said and said.endswith("not recommended: b, c, d.")


def test_the_report_holds_what_was_measured(monkeypatch):
    facts = dict(all=0.95, thing=0.97, axis=1.0, accuracy=0.8, accuracy_of_places=0.9, parameters=4e6, steps=10)
    monkeypatch.setattr(evaluate, "_facts", lambda name: facts)
    figures = dict.fromkeys(evaluate.FIGURES, (0.5, 0.05))
    row = dict(method="ClipText", guide="plain", pictures=48, figures=figures, sets=[0.4, 0.6], gain=None, seconds=1.5)
    more = row | dict(method="ClipText + WordRelation", weight=0.25, gain=[-0.125, 0.02])
    said = evaluate.report([row, more], evaluate.SIZES[False], "relations")
    assert "| plain | ClipText |  | 0.500 ± 0.050 |  | 0.400, 0.600 |" in said
    assert "| plain | ClipText + WordRelation | 0.25 | 0.500 ± 0.050 | -0.125 ± 0.020 |" in said
    assert "`python -m benchmarks run relations`" in said and "24 prompts" in said and "48 pictures" in said


def test_weights_make_gradients_as_long_as_they_say(monkeypatch):
    monkeypatch.setattr(evaluate, "reference", lambda: (torch.rand(4, 3, 16, 16), [""] * 4))

    def maker(scale):
        return lambda texts, guide: lambda image: scale * image.flatten(1).sum(1)

    monkeypatch.setitem(evaluate.METHODS, "both", (maker(6.0), maker(2.0), 1 / 3))
    evaluate.weight.cache_clear()
    assert evaluate.weight("both", "plain") == 1.0 and evaluate.weight("ClipText", "plain") == 0.0
