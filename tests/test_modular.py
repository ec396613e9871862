"""The plug-in on diffusers' modular pipelines, whatever guider they have."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance, FluxAutoBlocks, StableDiffusionXLAutoBlocks
from lossguide.guidance import guide, recipes
from lossguide.samplers import TimeTravel
from pipelines import PIPELINES
from test_pipelines import Near, generators

BLOCKS = {"sdxl": StableDiffusionXLAutoBlocks, "sdxl-img2img": StableDiffusionXLAutoBlocks, "flux": FluxAutoBlocks}


@functools.cache
def made(name: str):
    pipe = BLOCKS[name]().init_pipeline()
    parts = PIPELINES[name].build().components
    pipe.update_components(**{k: v for k, v in parts.items() if v is not None and k in pipe.component_names})
    for block in pipe._blocks.sub_blocks.values():
        block.set_progress_bar_config(disable=True) if hasattr(block, "set_progress_bar_config") else None
    return pipe


def call(pipe, name: str, *seeds: int, steps: int = 10, **options):
    given = PIPELINES[name].options(len(seeds), 0) | dict(num_inference_steps=steps, output="images") | options
    given.pop("guidance_scale", None)
    return pipe(**given, generator=generators(*seeds)).float()


def blocks(block) -> list:
    below = [one for child in (getattr(block, "sub_blocks", None) or {}).values() for one in blocks(child)]
    return [(type(block), sorted(vars(block))), *below]


@pytest.fixture(params=BLOCKS)
def name(request) -> str:
    return request.param


def test_strength_zero_is_bitwise_the_plain_call_and_losses_see_what_comes_out(name):
    pipe, seen = made(name), []

    def looks(image):
        seen.append(image.detach())
        return image.flatten(1).sum(1) * 0

    plain = call(pipe, name, 1, 2)
    assert torch.equal(call(guide(pipe, recipes.dps(looks, strength=0)), name, 1, 2), plain)
    torch.testing.assert_close(seen[-1].clamp(0, 1), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("through", ["denoiser", "x0"])
def test_the_loss_falls_with_time_travel_and_nothing_stays(name, through):
    pipe = made(name)
    call(pipe, name, 1)
    before = blocks(pipe._blocks), sorted(vars(pipe)), pipe.scheduler, dict(vars(pipe.scheduler))
    loss, plain = Near(call(pipe, name, 3, 4)), call(pipe, name, 1, 2)
    guided = guide(pipe, recipes.auto(loss, through=through, time_travel=TimeTravel(2, 0.3, 0.7)))
    assert (loss(call(guided, name, 1, 2)) < 0.7 * loss(plain)).all()
    assert any(row["visit"] == 1 for row in guided.record.rows)
    after = blocks(pipe._blocks), sorted(vars(pipe)), pipe.scheduler, dict(vars(pipe.scheduler))
    assert str(after) == str(before)


@pytest.mark.parametrize("guider", [ClassifierFreeGuidance(5.0, stop=0.5), AdaptiveProjectedGuidance(3.0, stop=0.5)])
def test_guiders_stay_and_count_solver_steps(guider, monkeypatch):
    pipe, told = made("sdxl"), []
    monkeypatch.setattr(pipe, "guider", guider)
    own = guider.set_state
    monkeypatch.setattr(guider, "set_state", lambda step, **kwargs: (told.append(step), own(step=step, **kwargs))[1])
    guided = guide(pipe, recipes.dps(lambda image: image.square().mean((1, 2, 3)), time_travel=TimeTravel(2, 0.0, 1.0)))
    call(guided, "sdxl", 1, steps=4)
    assert told == [0, 0, 1, 1, 2, 2, 3, 3]
