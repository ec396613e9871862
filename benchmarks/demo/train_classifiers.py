"""Train the demo's two classifiers on Fashion-MNIST: one to guide, one to judge, each on its own half.

    python -m benchmarks.demo.train_classifiers

Weights go to `losses/demo/{guide,judge}.safetensors` (fp16), figures to `losses/demo/classifiers_training.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from lossguide.losses import demo
from safetensors.torch import load_file, save_file
from torch import nn

from .data import fashion_mnist, jitter

OUT = Path(__file__).parents[2] / "losses" / "demo"
NOISE = {"guide": 0.1, "judge": 0.05}


def roughen(images: torch.Tensor, noise: float) -> torch.Tensor:
    """Gaussian noise of deviation up to `noise` on half of the pictures, a mild blur on a quarter.

    A network that guides meets pictures that are not quite clean: its gradient there should still point at the class.
    One that judges should not mistake faint grain for another class.
    """
    n = len(images)
    sigma = torch.rand(n, 1, 1, 1) * noise * (torch.rand(n, 1, 1, 1) < 0.5)
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(images.shape[1], 1, 3, 3)
    blurred = F.conv2d(images, kernel, padding=1, groups=images.shape[1])
    images = torch.where(torch.rand(n, 1, 1, 1) < 0.25, blurred, images)
    return images + sigma * torch.randn_like(images)


def batches(split: str, epochs: int, batch: int, noise: float) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
    """Progress in [0, 1), augmented pictures (B, 1, 32, 32) and labels (B,), epoch by epoch."""
    images, labels = fashion_mnist(split)
    per_epoch = len(images) // batch
    for epoch in range(epochs):
        order = torch.randperm(len(images))
        for i in range(per_epoch):
            index = order[i * batch : (i + 1) * batch]
            yield (epoch + i / per_epoch) / epochs, roughen(jitter(images[index]), noise), labels[index]


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first tenth, then a cosine to zero."""
    if progress < 0.1:
        return peak * (progress + 0.002) / 0.102
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def update_average(average: nn.Module, model: nn.Module, step: int, decay: float = 0.995) -> None:
    """Exponential moving average of weights and buffers."""
    decay = min(decay, (1 + step) / (10 + step))
    for slow, fast in zip(average.state_dict().values(), model.state_dict().values()):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - decay)
        else:
            slow.copy_(fast)


def save(model: nn.Module, path: Path) -> None:
    """Weights and buffers as safetensors, floating-point ones in fp16."""
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    save_file(state, path)
    path.chmod(0o644)  # safetensors writes a file that only its owner can read


def load(which: str, folder: Path) -> nn.Module:
    """A saved classifier, ready to be measured."""
    network = demo.NETWORKS[which]()
    network.load_state_dict(load_file(folder / f"{which}.safetensors"))
    return network.eval()


@torch.no_grad()
def accuracy(model: nn.Module, split: str = "test") -> dict[str, float]:
    """Accuracy in all and per class."""
    images, labels = fashion_mnist(split)
    right = torch.cat([model(part).argmax(1) for part in images.split(500)]) == labels
    figures = {name: right[labels == i].float().mean().item() for i, name in enumerate(demo.CLASSES)}
    return {k: round(v, 4) for k, v in {"all": right.float().mean().item(), **figures}.items()}


def train(which: str, epochs: int, batch: int, peak: float, seed: int, out: Path) -> dict:
    torch.manual_seed(seed)
    # channels_last is twice as fast for BatchNorm on a CPU, and half as fast for GroupNorm
    layout = torch.channels_last if which == "judge" else torch.contiguous_format
    model = demo.NETWORKS[which]().to(memory_format=layout)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    start, mean_loss = time.time(), None
    for step, (progress, images, labels) in enumerate(batches(which, epochs, batch, NOISE[which])):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images.contiguous(memory_format=layout))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, model, step)
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"{which} {progress:.0%} loss {mean_loss:.4f} {time.time() - start:.0f} s", flush=True)
    minutes = (time.time() - start) / 60
    save(average, out / f"{which}.safetensors")
    figures = accuracy(load(which, out))
    print(which, figures)
    return {
        "split": which,
        "epochs": epochs,
        "batch": batch,
        "learning_rate": peak,
        "seed": seed,
        "noise": NOISE[which],
        "minutes": round(minutes, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_accuracy": figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(demo.NETWORKS), nargs="+", default=list(demo.NETWORKS))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", action="store_true", help="measure the networks that are there; do not train")
    arguments = vars(parser.parse_args())
    torch.set_num_threads(arguments.pop("threads"))
    if arguments.pop("measure"):
        for which in arguments["only"]:
            print(which, accuracy(load(which, arguments["out"])))
        return
    record = arguments["out"] / "classifiers_training.json"
    facts = json.loads(record.read_text()) if record.exists() else {}
    for which in arguments.pop("only"):
        facts[which] = train(which, **arguments)
        record.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
