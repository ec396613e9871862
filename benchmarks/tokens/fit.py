"""The training loop that teachers and tokenizers share: every step's draws depend on the seed and the step alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

CHECKPOINT_SECONDS = 60


def learning_rate(progress: float, peak: float) -> float:
    """Linear over the first twentieth, then a cosine to zero."""
    if progress < 0.05:
        return peak * (progress + 1e-3) / 0.051
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


def fit(
    modules: dict[str, nn.Module],
    loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    peak: float,
    seed: int,
    state: Path,
    until: int | None = None,
    title: str = "",
) -> dict:
    """Train what asks for gradients in some modules, with AdamW; a run that was stopped goes on where it was.

    Before each step torch's generator is set from the seed and the step, so that a run that was stopped gives what one
    that was not does, bit for bit.

    Args:
        modules: by name; their state is kept in checkpoints.
        loss: step -> the loss, and figures worth printing.
        state: the checkpoint file, removed by whoever is done with it.
        until: stop after so many steps, with a checkpoint.

    Returns:
        `step` reached, `seconds` spent, and a `log` of `(step, figures)`.
    """
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    step, spent, log = 0, 0.0, []
    state.parent.mkdir(parents=True, exist_ok=True)
    if state.exists():
        held = torch.load(state, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(held["modules"][name])
        optimizer.load_state_dict(held["optimizer"])
        step, spent, log = held["step"], held["spent"], held["log"]

    def save() -> None:
        held = {name: module.state_dict() for name, module in modules.items()}
        facts = dict(modules=held, optimizer=optimizer.state_dict(), step=step, spent=time.time() - start, log=log)
        torch.save(facts, state.with_suffix(".part"))
        state.with_suffix(".part").replace(state)

    start, saved, recent = time.time() - spent, time.time(), []
    while step < (steps if until is None else min(steps, until)):
        torch.manual_seed(1_000_003 * seed + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps, peak)
        value, figures = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        recent.append({"loss": value.item()} | figures)
        if step % 100 == 0 or step == steps:
            mean = {key: round(sum(one[key] for one in recent) / len(recent), 4) for key in recent[-1]}
            log.append([step, mean])
            recent = []
            print(f"{title} {step}/{steps} {mean} {time.time() - start:.0f} s", flush=True)
        if time.time() - saved > CHECKPOINT_SECONDS:
            save()
            saved = time.time()
    save()
    return dict(step=step, seconds=round(time.time() - start, 1), log=log)
