"""The guided step on a real pretrained network; skipped where the shared weights are not at hand."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from lossguide.guidance import recipes
from lossguide.losses import Measurement, measure, operators
from lossguide.samplers import denoiser, sample


@pytest.fixture(scope="module")
def load(shared):
    spec = importlib.util.spec_from_file_location("real_load", shared / "real" / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_half_of_the_pixels_come_back_on_a_real_model(load):
    """LPIPS of the restored picture far below that of the hole-filled one, and the residual at the noise's floor."""
    model = denoiser(load.anime64_unet(), load.anime64_scheduler())
    picture = load.anime64_images()[[75]] / 2 + 0.5
    mask = (torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(77)) > 0.5).float()
    operator = operators.Inpaint(mask)
    y = measure(operator, picture, 0.025, torch.Generator().manual_seed(1))
    loss = Measurement(operator, y, 0.025)
    guidance = recipes.auto(loss, time_travel=None)
    restored = sample(model, guidance, steps=25, seeds=[3]).images
    filled = y + (1 - mask) * (y.sum((2, 3), keepdim=True) / mask.sum())
    metric = load.lpips_metric()
    with torch.no_grad():
        before, after = (metric(image * 2 - 1, picture * 2 - 1).item() for image in (filled, restored))
    assert after < 0.4 * before, (before, after)
    assert loss(restored).item() < 1.2 * loss.floor
