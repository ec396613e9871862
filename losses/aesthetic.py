"""How much people like a picture, by a small head on CLIP's embeddings."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .clip import DEFAULT_PRETRAINED, load_clip
from .loss import Loss
from .network import FrozenNetwork, describe_network, read_weights

_LAYERS = {(0, 2, 4, 6, 7): False, (0, 3, 6, 9, 11): True}  # of the published heads, and whether ReLUs lie between


class Aesthetic(Loss):
    """How far a picture's aesthetic score is from the best: `10 - score`, the score nominally in [1, 10].

    The score is what a head makes of the image's unit embedding: LAION's, which is one linear layer, or the "improved
    aesthetic predictor" of five.

    Args:
        head: a file with the head's state dict (.pth, of which only tensors are read, or .safetensors): `weight` and
            `bias`, or `layers.0.weight` and so on, as published for ViT-L/14 (sa_0_4_vit_l_14_linear.pth,
            sac+logos+ava1-l14-linearMSE.pth); or a module or callable, unit embeddings `(B, D)` -> scores `(B,)` or
            `(B, 1)`.
        model, pretrained: one open_clip model as in `ClipText`, the one that the head was fitted to.

    Raises:
        FileNotFoundError, ValueError: the head cannot be read, or takes embeddings of another width than the model's.
        LookupError, OSError: as in `ClipText`.

    Source: https://github.com/LAION-AI/aesthetic-predictor and, of five layers,
    https://github.com/christophschuhmann/improved-aesthetic-predictor; Schuhmann et al. 2022 (arXiv 2210.08402).
    """

    pictures = True
    name = "aesthetic"

    def __init__(
        self,
        head: str | os.PathLike[str] | Callable[[torch.Tensor], torch.Tensor],
        *,
        model: str = "ViT-L-14",
        pretrained: str | None = DEFAULT_PRETRAINED,
    ):
        file = isinstance(head, (str, os.PathLike))
        network = read_head(head) if file else head  # which is quick, before a model may have to be downloaded
        self.head = FrozenNetwork(network)
        self.clip = load_clip(model, pretrained)
        if file:
            with torch.no_grad():
                size = self.clip.image.size
                width = self.clip.embed(torch.zeros(1, 3, *((size, size) if isinstance(size, int) else size))).shape[1]
            if network[0].in_features != width:
                raise ValueError(
                    f"the head '{os.fspath(head)}' takes embeddings of {network[0].in_features} numbers, and the model "
                    f"'{os.fspath(model)}' makes {width}; pass the model= that it was fitted to"
                )
        self.settings = {
            "head": os.fspath(head) if file else describe_network(head),
            "model": os.fspath(model),
            "pretrained": self.clip.pretrained,
        }
        self.arguments = self.settings | {"head": self.settings["head"] if file else head}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        embedding = self.clip.embed(image)
        embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        scores = self.head(F.normalize(embedding, dim=-1))
        return 10 - scores.reshape(len(image), -1).squeeze(1)


def read_head(path: str | os.PathLike[str]) -> nn.Sequential:
    """A published head from its file, as in `Aesthetic`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds something else.
    """
    state = read_weights(path, "an aesthetic head")
    if set(state) == {"weight", "bias"}:
        return _linear_layers([(state["weight"], state["bias"])], False, path)
    found = [re.fullmatch(r"layers\.(\d+)\.(weight|bias)", key) for key in state]
    places = tuple(sorted({int(match[1]) for match in found if match}))
    if not all(found) or len(state) != 2 * len(places) or places not in _LAYERS:
        raise _no_head(path, f"keys are {', '.join(list(state)[:4])}")
    pairs = [(state[f"layers.{place}.weight"], state[f"layers.{place}.bias"]) for place in places]
    return _linear_layers(pairs, _LAYERS[places], path)


def _linear_layers(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], relu: bool, path: str | os.PathLike[str]
) -> nn.Sequential:
    shapes = [tuple(weight.shape) for weight, _ in pairs]
    fits = all(len(shape) == 2 for shape in shapes) and shapes[-1][0] == 1
    fits = fits and all(bias.shape == weight.shape[:1] for weight, bias in pairs)
    if not fits or any(a[0] != b[1] for a, b in zip(shapes, shapes[1:])):
        raise _no_head(path, f"shapes are {shapes}")
    if not all(one.is_floating_point() and one.isfinite().all() for pair in pairs for one in pair):
        raise _no_head(path, "its values are not finite floats")
    layers: list[nn.Module] = []
    for place, (weight, bias) in enumerate(pairs):
        layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer]
        if relu and place < len(pairs) - 1:
            layers += [nn.ReLU()]
    return nn.Sequential(*layers)


def _no_head(path: str | os.PathLike[str], why: str) -> ValueError:
    return ValueError(f"'{os.fspath(path)}' is no aesthetic head that is known ({why})")
