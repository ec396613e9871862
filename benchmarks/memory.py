"""Peak memory of guided calls, each in a process of its own, against the plain call and naive backpropagation.

With a GPU: the allocator's peak, for a pipeline of Stable Diffusion 1.5's size in float16. Without: the process's peak
of resident memory, for a small one in float32. Weights are random, which costs the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lossguide.guidance import guide, recipes

from . import small

RESULTS = Path(__file__).parent / "results"
CASES = {
    "plain call": "no guidance",
    "naive backpropagation": "weights not frozen, one graph through denoiser, decoder and loss",
    "guide": "the default: frozen weights, the decoder's graph let go before the denoiser's is walked",
    "guide, checkpointing": "`checkpointing=True`",
    "guide, tiny decoder": "`vae=AutoencoderTiny(...)`",
    "guide, tiny decoder, checkpointing": "both",
    "guide, bfloat16": "denoiser and decoder in bfloat16, levels and losses in float32",
    "guide, x0": '`through="x0"`: no graph of the denoiser',
    "guide, x0, checkpointing": "of the decoder only",
    "guide, x0, tiny decoder": "",
    "guide, x0, tiny decoder, model offload": "`pipe.enable_model_cpu_offload()`",
    "guide, x0, tiny decoder, group offload": "the denoiser's blocks come and go one by one",
}
GPU_ONLY = ("guide, x0, tiny decoder, model offload", "guide, x0, tiny decoder, group offload")
STEPS = 3


def loss(image: torch.Tensor) -> torch.Tensor:
    """Squared distance `(B,)` from grey: next to nothing to keep."""
    return (image - 0.5).square().flatten(1).sum(1)


def naive(pipe, call: dict) -> None:
    """How research code does it: `loss(decode(x0(x))).backward()` with all weights waiting for their gradients."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    side, weight = pipe.unet.config.sample_size, pipe.unet.dtype
    x = torch.randn(1, 4, side, side, device=pipe.unet.device, dtype=weight)
    both = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[int(t)].to(x)
        x = x.detach().requires_grad_(True)
        negative, positive = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample.chunk(2)
        epsilon = negative + call["guidance_scale"] * (positive - negative)
        x0 = (x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
        image = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample / 2 + 0.5
        loss(image.float()).sum().backward()
        with torch.no_grad():
            x = scheduler.step(epsilon, t, x).prev_sample - 0.01 * x.grad


def build(case: str, quick: bool) -> Callable[[], object]:
    """What to run for a case; the pipeline is made here."""
    cuda = torch.cuda.is_available()
    big = dict(latent=64, width=320, vae_width=128)
    pipe = small.stable_diffusion(**(big if cuda else dict(latent=16 if quick else 32)))
    half = torch.float16 if cuda else torch.bfloat16 if "bfloat16" in case else torch.float32
    device = "cuda" if cuda else "cpu"
    tiny = small.tiny_decoder().to(device, half) if "tiny" in case else None
    pipe.to(device, torch.bfloat16 if "bfloat16" in case else half)
    if "model offload" in case:
        pipe.enable_model_cpu_offload()
    if "group offload" in case:
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    call = small.embeddings(1, device, pipe.unet.dtype)
    options = call | dict(num_inference_steps=STEPS, output_type="pt")
    if case == "plain call":
        return lambda: pipe(**options)
    if case == "naive backpropagation":
        return lambda: naive(pipe, call)
    guidance = recipes.mpgd(loss) if "x0" in case else recipes.dps(loss)
    guided = guide(pipe, guidance, vae=tiny, checkpointing="checkpointing" in case)
    return lambda: guided(**options)


def peak_of(work: Callable[[], object]) -> tuple[float, float, float]:
    """MiB at rest, the peak's MiB on top of that, and seconds."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        rest, start = torch.cuda.memory_allocated(), time.perf_counter()
        work()
        torch.cuda.synchronize()
        return rest / 2**20, (torch.cuda.max_memory_allocated() - rest) / 2**20, time.perf_counter() - start
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    rest, start = _resident("VmRSS"), time.perf_counter()
    work()
    return rest, _resident("VmHWM") - rest, time.perf_counter() - start


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure every case in a process of its own and write the table."""
    cuda = torch.cuda.is_available()
    about = (
        f"{torch.cuda.get_device_name()}, Stable Diffusion 1.5's size (512x512), float16"
        if cuda
        else "One thread of a processor, Stable Diffusion with 64 channels (256x256), float32"
    )
    lines = [
        "# Peak memory of a guided call",
        "",
        "`python -m benchmarks run memory`",
        "",
        f"{about}, random weights, one picture with classifier-free guidance, {STEPS} steps. "
        "MiB on top of the weights.",
        "",
        "| call | peak, MiB | of naive | of the plain call | seconds |",
        "|---|---|---|---|---|",
    ]
    found = {}
    for case in CASES:
        if case in GPU_ONLY and not cuda:
            continue
        command = [sys.executable, "-m", "benchmarks.memory", case, *(["quick"] if quick else [])]
        eager = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}  # give back at once
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=eager)
        if done.returncode:
            print(f"{case}: {done.stderr.strip().splitlines()[-1]}")
            continue
        found[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, found[case], flush=True)
    for case, (_, peak, seconds) in found.items():
        naively, plainly = (peak / found[one][1] for one in ("naive backpropagation", "plain call"))
        about = f" ({CASES[case]})" if CASES[case] else ""
        lines.append(f"| {case}{about} | {peak:.0f} | {naively:.2f} | {plainly:.2f} | {seconds:.1f} |")
    path = RESULTS / f"memory{'-gpu' if cuda else ''}{'-quick' if quick else ''}.md"
    path.write_text("\n".join(lines) + "\n")
    print(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(peak_of(build(sys.argv[1], "quick" in sys.argv[2:]))))
