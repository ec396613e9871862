"""What a guided step costs at most, counted rather than timed."""

from __future__ import annotations

import pytest
from lossguide.guidance import Augment, recipes
from lossguide.losses import ClassLabel
from lossguide.samplers import load_demo, sample

pytest.importorskip("fcntl")

from benchmarks import floor  # noqa: E402


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture
def passes(demo):
    """How often the denoiser went forward, and a gradient backward through it."""
    counts = dict(forward=0, backward=0)
    last = demo.model.conv_out

    def forward(module, inputs, output):
        counts["forward"] += 1
        if output.requires_grad:
            output.register_hook(lambda g: counts.update(backward=counts["backward"] + 1))

    hook = last.register_forward_hook(forward)
    yield counts
    hook.remove()


@pytest.mark.parametrize(
    ("recipe", "changes", "backward"),
    [
        ("dps", dict(augment=Augment.geometric(10)), 5),
        ("dps", dict(augment=Augment.geometric(10, chunk=4)), 5),
        ("tfg", {}, 5),
        ("auto", dict(time_travel=None, stop=1.0, through_share=0.4), 2),
        ("mpgd", dict(augment=Augment.geometric(10)), 0),
        ("best_of_n", {}, 0),
    ],
)
def test_copies_and_inner_steps_add_no_pass_through_the_denoiser(demo, passes, recipe, changes, backward):
    sample(demo, recipes.get(recipe)(ClassLabel(3), **changes), steps=5, seeds=range(2))
    assert passes == dict(forward=5, backward=backward)


def test_steps_outside_of_the_window_go_forward_only(demo, passes):
    sample(demo, recipes.dps(ClassLabel(3), start=0.4, stop=0.6), steps=5, seeds=range(2))
    assert passes == dict(forward=5, backward=1)


def test_no_more_is_kept_for_the_backward_pass_than_a_bare_forward_keeps(demo):
    held = floor.kept_bytes(demo, 4)
    assert held["bare"] > 1e6
    assert held["sample"] <= 1.01 * held["bare"]
    assert held["sample, checkpointing"] <= 0.42 * held["bare"]


@pytest.mark.parametrize("way", ["unguided", "at x0", "through"])
def test_the_loops_by_hand_take_the_same_steps(demo, way):
    with demo.frozen():
        by_hand = floor.by_hand(demo, 4, 2, way)
    ours = sample(demo, floor.guidances()[way], steps=4, seeds=range(2)).samples
    assert (ours - by_hand).abs().max() < 1e-5
    if way != "unguided":
        plain = sample(demo, None, steps=4, seeds=range(2)).samples
        assert (ours - plain).abs().max() > 1e-3
