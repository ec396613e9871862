"""Train a diffusion together with its noise schedule, by the variational bound.

    python -m benchmarks.adaptive.train --variant polynomial-latent --seed 0          # 2 minutes of one core
    python -m benchmarks.adaptive.train --steps 20 --out SCRATCH                      # to see that it runs

The same number of steps for every variant, whatever the machine does meanwhile. A run that was stopped goes on where it
was; `--fresh` begins again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from pathlib import Path

import torch

from ..cifar10.train import learning_rate, update_average
from .bound import diffusion_nats, latent_nats, low_discrepancy_times
from .data import as_sample, pictures
from .model import FOLDER, VARIANTS, AdaptiveModel, available, folder_of, scheduler_of, training

CHECKPOINT_SECONDS = 45
STEPS, BATCH, PEAK = 1200, 32, 4e-3
GAMMA_RATE = 0.25  # of the schedule's learning rate: its gradient is mostly noise


def bound_of(model: AdaptiveModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What of the bound training can lower, `(B,)` in nats: the diffusion's part and the latent's. At fixed ends of
    the schedule the prior's part and the reconstruction do not depend on any weight."""
    z, kl = None, torch.zeros(len(x))
    if model.config.latent:
        mean, log_variance = model.encode(x)
        z, kl = mean + (0.5 * log_variance).exp() * torch.randn_like(mean), latent_nats(mean, log_variance)

    def predict(x: torch.Tensor, gamma: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return model(x, gamma, z)

    t = low_discrepancy_times(len(x)).to(x.device)
    return diffusion_nats(predict, model.gamma, x, t, torch.randn_like(x), z), kl


def train(
    variant: str,
    seed: int,
    out: Path,
    images: torch.Tensor,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    peak: float = PEAK,
    minutes: float = math.inf,
    **options,
) -> dict | None:
    """Train a model of a variant on pictures `(N, C, H, W)`, uint8, save it in `out`, and return how it was trained.

    Args:
        variant: one of `VARIANTS`.
        seed: of weights and draws.
        out: the folder of the model, and of the state to go on from.
        images: to train on.
        steps, batch, peak: of AdamW; `peak` is the largest learning rate.
        minutes: stop after so many, to go on at another time; then nothing is returned.
        options: of `AdaptiveModel`.
    """
    torch.manual_seed(seed)
    model = AdaptiveModel(**VARIANTS[variant], **options).train()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    schedule = list(model.gamma.parameters())
    network = [one for name, one in model.named_parameters() if not name.startswith("gamma.")]
    groups = [dict(params=network, rate=1.0), dict(params=schedule, rate=GAMMA_RATE)]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    facts = dict(variant=variant, seed=seed, steps=steps, batch=batch, peak=peak, **options)
    parts = dict(model=model, average=average, optimizer=optimizer)
    step, spent, curve, state = 0, 0.0, [], out / "state.pt"
    out.mkdir(parents=True, exist_ok=True)
    if state.exists():
        held = torch.load(state, weights_only=True)
        if held["facts"] != facts:
            raise ValueError(f"{state} is of a run with {held['facts']}: go on with these, or use --fresh or --out")
        for name, part in parts.items():
            part.load_state_dict(held[name])
        step, spent, curve = held["step"], held["spent"], held["curve"]
    torch.manual_seed(1_000_003 * seed + step)  # other draws than before the stop

    def checkpoint() -> None:
        held = {name: part.state_dict() for name, part in parts.items()}
        held |= dict(step=step, spent=spent + time.process_time() - cpu, facts=facts, curve=curve)
        torch.save(held, out / "state.tmp")
        (out / "state.tmp").replace(state)

    start, cpu, saved, seen = time.time(), time.process_time(), time.time(), []
    per_dim = model.shape[0] * model.shape[1] * model.shape[2] * math.log(2)
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(step / steps, peak)
        diffusion, kl = bound_of(model, as_sample(images[torch.randint(len(images), (batch,))]))
        loss = (diffusion + kl).mean() / per_dim
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        update_average(average, model, step)
        seen.append([loss.item(), kl.mean().item() / per_dim])
        if step % 100 == 0:
            mean = torch.tensor(seen[-100:]).mean(0).tolist()
            curve.append([step, *mean])
            print(f"{step} bits/dim {mean[0]:.4f}, of the latent {mean[1]:.4f}", flush=True)
        if time.time() - saved > CHECKPOINT_SECONDS:
            checkpoint()
            saved = time.time()
            if saved - start > 60 * minutes:
                return None
    checkpoint()
    average.save_pretrained(out / "model")
    scheduler_of(average).save_pretrained(out / "scheduler")
    facts |= dict(
        pictures=steps * batch,
        core_minutes=round((spent + time.process_time() - cpu) / 60, 2),
        parameters=sum(p.numel() for p in model.parameters()),
        curve=[[step, *(round(value, 4) for value in values)] for step, *values in curve],
        torch=torch.__version__,
    )
    (out / "training.json").write_text(json.dumps(facts) + "\n")
    return facts


def trained(variant: str, seed: int, folder: Path | None = None, fresh: bool = False, **options) -> dict:
    """How the model of a variant and a seed was trained; trains it first where it has not been."""
    out = folder_of(variant, seed, folder)
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    if available(out):
        return training(out)
    return train(variant, seed, out, pictures("train"), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, default="polynomial-latent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, to go on another time")
    parser.add_argument("--out", type=Path, default=FOLDER, help="a folder for this model's folder")
    parser.add_argument("--fresh", action="store_true", help="begin again, whatever the folder holds")
    given = parser.parse_args()
    options = dict(steps=given.steps, minutes=given.minutes)
    facts = trained(given.variant, given.seed, given.out, given.fresh, **options)
    print("stopped, to go on another time" if facts is None else json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
