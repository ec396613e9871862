"""Train the diffusion model of CIFAR-10: an unconditional UNet2DModel, v-prediction, bfloat16, averaged weights.

    python -m benchmarks.cifar10.train                                # CUDA: 36 M parameters, 8 minutes
    python -m benchmarks.cifar10.train --device cpu                   # one core: 4.5 M parameters, 45 minutes, weak
    python -m benchmarks.cifar10.train --device cpu --steps 20 --width 16 --out SCRATCH        # to see that it runs

The model goes to a folder outside of the repository, as diffusers saves it. Progress, and with it the learning rate, is
the larger of steps done and time spent. A run that was stopped goes on where it was; `--fresh` begins again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from . import model as models
from .data import available, cifar10, fetch

CHECKPOINT_SECONDS = 60
DEFAULTS = {
    "cuda": dict(minutes=8.0, width=128, patch=1, batch=256, peak=4e-4),
    "cpu": dict(minutes=45.0, width=64, patch=2, batch=32, peak=1e-3),
}
RELATIVE_WIDTH = 17.0  # of the average: deviation 0.05 of the steps so far, whatever their number


def learning_rate(progress: float, peak: float) -> float:
    """Short warm-up, constant, then a cosine over the last 60 %."""
    if progress < 0.02:
        return peak * (progress + 1e-4) / 0.02
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, (progress - 0.4) / 0.6))))


def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Average the weights with a memory that grows with the run (power-function EMA, Karras et al. 2024)."""
    decay = (1 - 1 / (step + 1)) ** (RELATIVE_WIDTH + 1)
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], 1 - decay)


def batches(images: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
    """Random pictures `(B, 3, 32, 32)` in [0, 1], epoch by epoch, half of them mirrored, without end."""
    while True:
        order = torch.randperm(len(images), device=images.device)
        for index in order[: len(order) - len(order) % batch].split(batch):
            part = images[index].float() / 255
            mirrored = torch.rand(len(part), 1, 1, 1, device=part.device) < 0.5
            yield torch.where(mirrored, part.flip(3), part)


def loss_of(model: torch.nn.Module, x0: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """Mean squared error of v over stratified times: the expectation of uniform ones, with less variance."""
    n = len(x0)
    t = ((torch.arange(n, device=x0.device) + torch.rand(n, device=x0.device)) * len(alphas) / n).long()
    t = t.clamp_max(len(alphas) - 1)
    noise = torch.randn_like(x0)
    a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
    with torch.autocast(x0.device.type, torch.bfloat16):
        prediction = model(a * x0 + s * noise, t).sample
    return (prediction.float() - (a * noise - s * x0)).square().mean()


def train(
    device: str,
    steps: float,
    minutes: float,
    width: int,
    patch: int,
    batch: int,
    peak: float,
    seed: int,
    out: Path,
    images: torch.Tensor,
) -> dict:
    """Train a model on pictures `(N, 3, 32, 32)`, uint8, save it in `out`, and return how it was trained."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True  # every batch is of one size
    images = images.to(device)
    alphas = models.build_scheduler().alphas_cumprod.to(device)
    # channels-last is the fast layout on a GPU, and slower for GroupNorm on a processor
    layout = torch.channels_last if device.startswith("cuda") else torch.contiguous_format
    model = models.build_unet(width, patch).to(device, memory_format=layout)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    facts = dict(width=width, patch=patch, batch=batch, peak=peak, seed=seed)
    step, spent, state = 0, 0.0, out / "state.pt"
    out.mkdir(parents=True, exist_ok=True)
    if state.exists():
        held = torch.load(state, map_location=device, weights_only=True)
        if held["facts"] != facts:
            raise SystemExit(f"{state} is of a run with {held['facts']}: go on with these, or use --fresh or --out")
        model.load_state_dict(held["model"])
        average.load_state_dict(held["average"])
        optimizer.load_state_dict(held["optimizer"])
        step, spent = held["step"], held["spent"]
    torch.manual_seed(seed + step)  # other draws than before the stop

    def checkpoint() -> None:
        whole = dict(model=model, average=average, optimizer=optimizer)
        held = {name: one.state_dict() for name, one in whole.items()}
        torch.save(held | dict(step=step, spent=time.time() - start, facts=facts), out / "state.tmp")
        (out / "state.tmp").replace(state)

    start, saved, losses = time.time() - spent, time.time(), []
    progress = max(step / steps, spent / (60 * minutes))
    source = batches(images, batch)
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak)
        loss = loss_of(model, models.pack(next(source), patch).contiguous(memory_format=layout), alphas)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        update_average(average, model, step)
        losses.append(loss.detach())  # read once in a while: reading waits for the device
        if step % 100 == 0:
            losses = losses[-500:]
            mean = torch.stack(losses).mean().item()
            print(f"{step} {progress:.1%} loss {mean:.4f} {(time.time() - start) / 60:.1f} min", flush=True)
        progress = max(step / steps, (time.time() - start) / (60 * minutes))
        if time.time() - saved > CHECKPOINT_SECONDS:
            checkpoint()
            saved = time.time()
    checkpoint()
    average.save_pretrained(out / "unet")
    models.build_scheduler().save_pretrained(out / "scheduler")
    facts |= dict(
        steps=step,
        pictures=step * batch,
        minutes=round((time.time() - start) / 60, 1),
        parameters=sum(p.numel() for p in model.parameters()),
        loss=round(torch.stack(losses[-500:]).mean().item(), 4) if losses else None,
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=float, default=math.inf, help="end after so many steps, if that is earlier")
    for name, kind in dict(minutes=float, width=int, patch=int, batch=int, peak=float).items():
        parser.add_argument(f"--{name}", type=kind, help=f"by default as the device suits: {_by_device(name)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=models.MODEL)
    parser.add_argument("--fresh", action="store_true", help="begin again, whatever the folder holds")
    arguments = vars(parser.parse_args())
    for name, value in DEFAULTS["cuda" if arguments["device"].startswith("cuda") else "cpu"].items():
        arguments[name] = value if arguments[name] is None else arguments[name]
    if arguments.pop("fresh"):
        for name in ("unet", "scheduler"):
            shutil.rmtree(arguments["out"] / name, ignore_errors=True)
        for name in ("state.pt", "training.json"):
            (arguments["out"] / name).unlink(missing_ok=True)
    if not available():
        fetch()
    print(json.dumps(train(**arguments, images=cifar10("train")[0]), indent=1))


def _by_device(name: str) -> str:
    return ", ".join(f"{values[name]:g} ({device})" for device, values in DEFAULTS.items())


if __name__ == "__main__":
    main()
