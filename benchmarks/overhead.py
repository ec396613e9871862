"""What a guided call costs beyond its necessary passes: a denoiser's forward, its input-only backward, the loss's own.

The same guided steps are written out by hand, without records, checks or choices, and timed in turn with the plug-in.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMPipeline
from lossguide.guidance import guide, recipes
from lossguide.samplers.denoiser import frozen

from . import floor, real, small

RESULTS = Path(__file__).parent / "results"


def loss(image: torch.Tensor) -> torch.Tensor:
    """Squared distance `(B,)` from grey: next to nothing to compute."""
    return (image - 0.5).square().flatten(1).sum(1)


def by_hand(pipe, forward: Callable, decode: Callable, shape: tuple, steps: int, guided: bool, eta: float) -> None:
    """DPS as one would write it for this pipeline alone: a step along the gradient's direction after the solver's."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    source = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=source)
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[int(t)]
        x = x.detach().requires_grad_(guided)
        with torch.set_grad_enabled(guided):
            epsilon = forward(x, t)
            x0 = (x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
        if guided:
            leaf = x0.detach().requires_grad_(True)
            with torch.enable_grad():
                image = decode(leaf)
                seen = image.detach().requires_grad_(True)
                value = loss(seen)
                (g,) = torch.autograd.grad(value.sum(), seen)
            g0 = g if image is leaf else torch.autograd.grad(image, leaf, g)[0]
            (g,) = torch.autograd.grad(x0, x, g0)
        with torch.no_grad():
            x = scheduler.step(epsilon.detach(), t, x.detach(), eta=eta, generator=source).prev_sample
            if guided:
                x = x - 0.1 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)


def latent_case(**size: int) -> tuple:
    """A Stable Diffusion of random weights, as `cases` returns it."""
    pipe = small.stable_diffusion(**size)
    text = small.embeddings(1)
    both = torch.cat([text["negative_prompt_embeds"], text["prompt_embeds"]])

    def forward(x, t):
        negative, positive = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample.chunk(2)
        return negative + text["guidance_scale"] * (positive - negative)

    def decode(z):
        return pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample / 2 + 0.5

    side = pipe.unet.config.sample_size
    return pipe, text, forward, decode, (1, 4, side, side), 0.0


def cases(quick: bool) -> dict[str, tuple]:
    """By name: a pipeline, its call's arguments, and its forward, decoder, shape and eta for the version by hand."""
    found = {
        "Stable Diffusion, 8x8 latents, 32 channels": latent_case(latent=8, width=32),
        "Stable Diffusion, 32x32 latents, 64 channels": latent_case(latent=16 if quick else 32),
    }
    if real.available():
        model = real.model()
        pixels = DDIMPipeline(model.model, model.scheduler)
        pixels.set_progress_bar_config(disable=True)
        shape = (1, *model.shape)
        call = dict(batch_size=1, eta=1.0)
        found["real 64x64 model"] = (
            pixels,
            call,
            lambda x, t: model.model(x, t).sample,
            lambda x: x / 2 + 0.5,
            shape,
            1.0,
        )
    return found


def measure(case: tuple, steps: int, repeats: int) -> dict[str, float]:
    """Median seconds of a whole step: plain call, guided call, and both by hand, timed in turn."""
    pipe, call, forward, decode, shape, eta = case
    guided = guide(pipe, recipes.dps(loss))
    options = call | dict(num_inference_steps=steps, output_type="latent" if "prompt_embeds" in call else "pt")
    ways = {
        "plain": lambda: pipe(**options),
        "guided": lambda: guided(**options),
        "plain by hand": lambda: by_hand(pipe, forward, decode, shape, steps, False, eta),
        "guided by hand": lambda: by_hand(pipe, forward, decode, shape, steps, True, eta),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            with frozen(*modules):
                start = time.perf_counter()
                way()
                if repeat:
                    seconds[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(values) for name, values in seconds.items()}


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure the plug-in, then the library's own loop, and write the tables."""
    torch.set_num_threads(1)
    steps, repeats = (2, 2) if quick else (5, 6)
    lines = [
        "# What a guided call costs beyond its necessary passes",
        "",
        "`python -m benchmarks run overhead`",
        "",
        "Seconds per step, medians of calls timed in turn on one thread. By hand: the denoiser's forward, its backward "
        "to the sample, the decoder's and the loss's passes and the solver's step, with nothing else. Stable Diffusion "
        "has random weights and classifier-free guidance; what a step costs in Python shows in the smallest one.",
        "",
        "| model | plain call | guided call | the same steps by hand | guided / by hand | guided / plain |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in cases(quick).items():
        found = measure(case, steps, repeats)
        ratio, cost = found["guided"] / found["guided by hand"], found["guided"] / found["plain"]
        lines.append(
            f"| {name} | {found['plain']:.3f} | {found['guided']:.3f} | {found['guided by hand']:.3f} "
            f"| **{ratio:.3f}** | {cost:.2f} |"
        )
        print(lines[-1], flush=True)
    lines += floor.tables(quick)
    path = RESULTS / ("overhead-quick.md" if quick else "overhead.md")
    path.write_text("\n".join(lines) + "\n")
    print(path)
