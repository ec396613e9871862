"""Train the demo's diffusion model: an unconditional UNet2DModel on Fashion-MNIST at 32x32, v-prediction.

    python -m benchmarks.demo.train_unet --steps 12000

Progress, and with it the learning rate, is the larger of steps done and time spent, so that `--hours` ends a run with a
properly decayed learning rate on a slow machine. Stops and resumes from the folder `--work`. Several processes share
each batch (on a CPU a process per core is far less disturbed by other work than a thread per core):

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.demo.train_unet
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, UNet2DModel

from .data import fashion_mnist

OUT = Path(__file__).parents[2] / "samplers" / "demo" / "unet"


def build_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=True,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def learning_rate(progress: float, peak: float) -> float:
    """Short warm-up, constant, then a cosine over the second half."""
    if progress < 0.02:
        return peak * progress / 0.02
    return peak * 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.5) / 0.5)))


def average_over_processes(model: UNet2DModel, progress: float, world: int) -> float:
    """Average the gradients over the processes, and the progress with them, so that all end at the same step."""
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([torch.tensor([progress]).to(gradients[0])] + [g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat[1:].split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))
    return flat[0].item()


def train(steps: int, hours: float, batch: int, peak: float, device: str, work: Path, out: Path, seed: int) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    images = fashion_mnist("train")[0].to(device) * 2 - 1
    alphas = build_scheduler().alphas_cumprod.to(device)
    model = build_unet().to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    step, spent = 0, 0.0
    work.mkdir(parents=True, exist_ok=True)
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    torch.manual_seed(seed + step + 1_000_003 * rank)  # the same weights everywhere, different draws

    batch //= world
    mean_loss, start, progress = None, time.time() - spent, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak)
        x0 = images[torch.randint(len(images), (batch,), device=device)]
        # one draw per stratum: the same expectation as uniform times, with less variance
        t = ((torch.arange(batch, device=device) + torch.rand(batch, device=device)) * 1000 / batch).long()
        noise = torch.randn_like(x0)
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            prediction = model(a * x0 + s * noise, t).sample
        loss = (prediction.float() - (a * noise - s * x0)).square().mean()
        loss.backward()
        progress = max((step + 1) / steps, (time.time() - start) / (hours * 3600))
        if world > 1:
            progress = average_over_processes(model, progress, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(0.9995, (1 + step) / (10 + step))
        for slow, fast in zip(average.parameters(), model.parameters()):
            slow.lerp_(fast.detach(), 1 - decay)
        mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
        if step % 100 == 0 and rank == 0:
            print(f"{step} loss {mean_loss:.4f} {(time.time() - start) / 60:.1f} min", flush=True)
        if step % 250 == 0 and rank == 0:
            _checkpoint(work, model, average, optimizer, step, time.time() - start)
    if rank:
        return
    _checkpoint(work, model, average, optimizer, step, time.time() - start)
    average.half().save_pretrained(out, safe_serialization=True)
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes 0600, which a wheel would carry
    build_scheduler().save_pretrained(out.parent / "scheduler")
    facts = dict(
        steps=step,
        batch=batch * world,
        learning_rate=peak,
        seed=seed,
        minutes=round((time.time() - start) / 60),
        loss=mean_loss,
    )
    (out.parent / "unet_training.json").write_text(json.dumps(facts, indent=1) + "\n")


def _checkpoint(work, model, average, optimizer, step, spent) -> None:
    state = dict(
        model=model.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict(), step=step, spent=spent
    )
    torch.save(state, work / "state.tmp")
    (work / "state.tmp").replace(work / "state.pt")
    average.save_pretrained(work / "average")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--hours", type=float, default=math.inf)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--peak", type=float, default=6e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path(".train/unet"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
