"""What the benchmarks of cost compute, by hand."""

from __future__ import annotations

import pytest
from lossguide.samplers import sample

pytest.importorskip("fcntl")

from benchmarks import cheap, cost, methods  # noqa: E402


def test_a_line_is_found_again():
    intercept, slope, share = cost.fitted([1, 2, 4], [3.5, 5.5, 9.5])
    assert (intercept, slope, share) == pytest.approx((1.5, 2.0, 1.0))
    assert cost.fitted([1, 2, 3], [0.0, 1.0, 0.0])[2] == pytest.approx(0.0)


def test_a_gain_is_a_share_of_the_way_up_or_down():
    assert cheap.gain(0.06, unguided=0.26, full=0.05) == pytest.approx(0.2 / 0.21)
    assert cheap.gain(0.9, unguided=0.1, full=0.9) == 1.0


def test_times_are_those_of_the_unguided_sampler():
    row = dict(forwards=50, backwards=10, steps=50, pictures=8, batch=4, processor_seconds=30.0)
    passes, everything = cheap.times(row | dict(forward_processor_seconds=0.2), through=2.1, steps=50)
    assert passes == pytest.approx((50 + 1.1 * 10) / 50)
    assert everything == pytest.approx(30.0 / (2 * 50 * 0.2))


def test_a_row_of_the_report_has_every_figure():
    work = next(one for one in methods.WORKS if one.name == "demo-label")
    size = dict(forwards=50, backwards=0, steps=50, pictures=4, batch=4, processor_seconds=20, visits=50)
    size["forward_processor_seconds"] = 0.2
    rows = {name: size | dict(figures=dict(accuracy=value)) for name, value in
            {"unguided": 0.2, "auto": 1.0, "cost 1.3": 0.8, "fewer steps": 0.9, "cost 1": 0.6}.items()}  # fmt: skip
    line = cheap.line(work, rows, through=2.1, steps=50)
    assert "| 0.8 | **75 %** | 1.00 (2.00) | 0.9 |" in line and "| 0.6 | **50 %** |" in line
    rows["cost 1.3"] = None
    assert "| 1 |  |  |  | 0.9 |" in cheap.line(work, rows, through=2.1, steps=50)


@pytest.mark.parametrize("way", cost.WAYS)
def test_what_is_drawn_is_of_the_size_asked_for(way, monkeypatch):
    drawn = []
    monkeypatch.setattr(cost, "sample", lambda *given, **more: drawn.append(sample(*given, **more)))
    cost.draw(way, batch=2, steps=2, copies=2, side=16, pictures=3)
    assert drawn[0].images.shape == (3, 1, 16, 16)
    assert ("loss" in drawn[0].record.rows[0]) == (way != "unguided")
