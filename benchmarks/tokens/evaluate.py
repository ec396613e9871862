"""What a tokenizer is worth: the use of its codes, what its tokens know, and what its pictures lose."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..metrics import frechet
from .model import pictures_of

PROBE_STEPS = 60


def usage(ids: torch.Tensor, codes: int) -> dict[str, float]:
    """`usage`: the share of codes that token ids of any shape use at all; `perplexity`: e to the entropy of use."""
    share = torch.bincount(ids.flatten(), minlength=codes).double() / ids.numel()
    entropy = -(share * share.clamp_min(1e-30).log()).sum().item()
    return {"usage": (share > 0).double().mean().item(), "perplexity": math.exp(entropy)}


def probe(
    train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, wanted: torch.Tensor, decay: float = 1e-3
) -> float:
    """Test accuracy of a linear classifier on features `(N, d)`, scaled to unit deviation: LBFGS, full batch.

    Args:
        decay: weight of the squared weights, half of their sum, beside the mean cross-entropy.
    """
    mean, deviation = train.mean(0), train.std(0).clamp_min(1e-4)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    classes = int(labels.max()) + 1
    weight = torch.zeros(train.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=PROBE_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return ((test @ weight + bias).argmax(1) == wanted).float().mean().item()


def psnr(made: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Decibels `(N,)` of pictures in [0, 1]."""
    return -10 * (made - images).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def recall(
    train: torch.Tensor, captions: torch.Tensor, test: torch.Tensor, wanted: torch.Tensor, words: int, nearest: int
) -> tuple[float, int]:
    """Caption-to-image recall: of the captions that test pictures have, the share that finds one of its own.

    Pictures and captions meet in the space of word indicators, where a ridge regression of features, fitted on the
    training pictures, puts the pictures: the same for every tokenizer, whatever it was trained with.

    Args:
        train, test: features `(N, d)` and `(M, d)`.
        captions, wanted: their words, `(N, n)` and `(M, n)`, below `words`.
        nearest: pictures that a caption may name.

    Returns:
        the share, and how many captions there are.
    """
    indicator = lambda caption: F.one_hot(caption, words).sum(1).float()
    target = indicator(captions)
    mean, centre = train.mean(0), target.mean(0)
    x = train - mean
    gram = x.T @ x + 1e-3 * len(x) * x.var() * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, x.T @ (target - centre))
    pictures = F.normalize((test - mean) @ weight, dim=1)
    asked = wanted.unique(dim=0)
    found = (F.normalize(indicator(asked) - centre, dim=1) @ pictures.T).topk(nearest, dim=1).indices
    right = (wanted[found] == asked[:, None]).all(2).any(1)
    return right.float().mean().item(), len(asked)


@torch.no_grad()
def judged(name: str, images: torch.Tensor) -> torch.Tensor:
    """Features `(N, 64)` of pictures in [0, 1] by a classifier of the data set, for Frechet distances.

    `fashion`: the demo's judge; `cifar10`: the ResNet56 of `../shared/real`.
    """
    if name == "fashion":
        from lossguide.losses import demo

        judge = demo.classifier("judge")
        return torch.cat([judge.features(part) for part in images.split(500)])
    from lossguide.losses.network import IMAGENET_MEAN, IMAGENET_STD

    from ..cifar10.classifiers import classifier

    network = classifier("judge")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    features = []
    hook = network.linear.register_forward_hook(lambda module, inside, out: features.append(inside[0]))
    for part in images.split(500):
        network((part - mean) / std)
    hook.remove()
    return torch.cat(features)


def understood(
    vq, known: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor, wanted: torch.Tensor
) -> dict[str, float]:
    """The use of codes by token ids `(M, 64)`, and probes of their labels, fitted on other ids `(N, 64)` and labels.

    `probe_pooled` is of the mean of a picture's code vectors, `probe_flat` of all of them.
    """
    codes = vq.quantize.embedding.weight.detach()
    row = usage(ids, len(codes))
    for title, pool in (
        ("pooled", lambda found: codes[found].mean(1)),
        ("flat", lambda found: codes[found].flatten(1)),
    ):
        row[f"probe_{title}"] = probe(pool(known), labels, pool(ids), wanted)
    return row


def copied(vq, name: str, ids: torch.Tensor, images: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """Mean PSNR with its standard error, and Frechet distance, of what a VQModel decodes from the ids of pictures.

    Args:
        images: the pictures `(N, C, 32, 32)`, uint8, of a data set.
        real: their `judged` features.
    """
    made = pictures_of(vq, ids)
    decibels = psnr(made, images.float() / 255)
    error = decibels.std() / len(decibels) ** 0.5
    return {"psnr": decibels.mean().item(), "psnr_se": error.item(), "frechet": frechet(judged(name, made), real)}


def recalled(
    vq, known: torch.Tensor, captions: torch.Tensor, ids: torch.Tensor, wanted: torch.Tensor, words: int
) -> dict[str, float]:
    """`recall` of all code vectors of a picture, at 1 and at 10, and the number of captions."""
    codes = vq.quantize.embedding.weight.detach()
    features, row = (codes[known].flatten(1), codes[ids].flatten(1)), {}
    for nearest in (1, 10):
        row[f"recall_{nearest}"], row["captions"] = recall(features[0], captions, features[1], wanted, words, nearest)
    return row
