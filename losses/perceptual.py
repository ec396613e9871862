"""The perceptual distance from a picture (LPIPS), by the lpips package's networks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .images import Picture, digest, keep, read_images
from .loss import Loss
from .network import FrozenNetwork, describe_network, per_image, read_weights, resize

_SMALLEST = {"alex": 31, "vgg": 16, "squeeze": 17}  # pixels of a side: less is pooled away


class Perceptual(Loss):
    """The perceptual distance of an image from a picture, LPIPS; zero for the picture itself.

    `L = sum over layers of mean over pixels of w . (f(image) - f(picture))^2`, f the unit feature vector of a pixel in
    that layer and w the package's weights of channels, which were fitted to what people see. The picture is brought to
    the image's size.

    Args:
        picture: a path, a Pillow image, or a tensor `(3, H, W)` in [0, 1]; a list of B of them, or a tensor
            `(B, 3, H, W)`, is one per image of the batch.
        net: 'alex', 'vgg' or 'squeeze'; an `lpips.LPIPS`; or a module or callable, images and pictures
            `(B, 3, h, w)` in [-1, 1] -> distances `(B, ...)`, which are averaged.
        weights: for a net given by name: a file with the state dict of torchvision's network, or of its `features`;
            torchvision's own download unless given.
        size: images and picture are brought to this size first; the image's own unless given.

    Raises:
        FileNotFoundError, ValueError: the picture or the weights cannot be read; (when called) the image is too small
            for the network.
        OSError: torchvision's weights cannot be downloaded.
        ImportError: the lpips package is missing.

    Source: Zhang et al. 2018 (CVPR, arXiv 1801.03924); https://github.com/richzhang/PerceptualSimilarity.
    """

    pictures = True
    name = "perceptual"
    augment = False  # the picture would have to be augmented alike

    def __init__(
        self,
        picture: Picture | Sequence[Picture],
        net: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = "alex",
        *,
        weights: str | os.PathLike[str] | None = None,
        size: int | tuple[int, int] | None = None,
    ):
        if isinstance(net, str) and net not in _SMALLEST:
            raise ValueError(f"net is one of {', '.join(_SMALLEST)}, a module or a callable, got {net!r}")
        if weights is not None and not isinstance(net, str):
            raise ValueError("weights= are for a net given by name; one of your own has its weights already")
        picture = keep(picture)
        self.targets = read_images(picture)  # before a network may have to be downloaded
        self.batch = len(self.targets)
        network = _named(net, weights) if isinstance(net, str) else net
        self.own = not _is_lpips(network)
        self.smallest = _SMALLEST.get(net if isinstance(net, str) else getattr(network, "pnet_type", ""), 1)
        self.network = FrozenNetwork(
            network if self.own else _Features(network), size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        )
        self._kept: tuple[Any, list[torch.Tensor]] | None = None  # the picture's side, for one size at a time
        self.settings = {"picture": digest(picture), "net": describe_network(net), "size": self.network.size}
        if isinstance(net, str):
            self.settings["weights"] = None if weights is None else os.fspath(weights)
        self.arguments = self.settings | {"picture": picture, "net": net}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        seen = self.network.prepare(image)
        if min(seen.shape[-2:]) < self.smallest:
            raise ValueError(
                f"this network compares pictures of at least {self.smallest} pixels a side, got "
                f"{seen.shape[-2]} x {seen.shape[-1]}; pass size="
            )
        network, key = self.network.on(image), (image.device, image.dtype, seen.shape[-2:])
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._picture_side(seen, network)
        others = [per_image(one, len(image), "pictures") for one in self._kept[1]]
        if self.own:
            return network(seen, others[0]).reshape(len(image), -1).mean(1)
        pairs = zip(network(seen), others, network.channels(), strict=True)
        return sum(((got - wanted).square() * w).sum(1).mean((1, 2)) for got, wanted, w in pairs)

    @torch.no_grad()
    def _picture_side(self, seen: torch.Tensor, network: Callable) -> list[torch.Tensor]:
        targets = torch.cat([resize(one[None].to(seen.device), seen.shape[-2:]) for one in self.targets])
        targets = self.network.prepare(targets.to(seen.dtype))
        return [targets] if self.own else network(targets)


class _Features(nn.Module):
    """The unit feature vectors of an LPIPS, at least in float32: its own forward divides zero by zero in float16."""

    def __init__(self, metric: nn.Module):
        super().__init__()
        self.metric = metric

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        scaled = self.metric.scaling_layer(image) if self.metric.version == "0.1" else image
        return [_unit(features) for features in self.metric.net(scaled)]

    def channels(self) -> list[Any]:
        if not self.metric.lpips:
            return [1.0] * self.metric.L
        return [_wide(lin.model[-1].weight) for lin in self.metric.lins]


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))  # in half precision squares overflow


def _unit(features: torch.Tensor) -> torch.Tensor:
    features = _wide(features)
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _is_lpips(network: Any) -> bool:
    return any(f"{kind.__module__}.{kind.__name__}" == "lpips.lpips.LPIPS" for kind in type(network).__mro__)


def _named(net: str, weights: str | os.PathLike[str] | None) -> nn.Module:
    try:
        import lpips
    except ImportError as error:
        raise ImportError("Perceptual takes its networks from the lpips package: pip install lpips") from error
    state = None if weights is None else read_weights(weights, f"the trunk of LPIPS '{net}'")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of the way in which lpips asks torchvision for its networks
        try:
            metric = lpips.LPIPS(net=net, pnet_rand=state is not None, verbose=False)
        except Exception as error:
            raise OSError(
                f"torchvision's weights for LPIPS '{net}' could not be downloaded ({error}); pass weights=, a file "
                "with their state dict"
            ) from error
    if state is not None:
        state = {key.removeprefix("features."): value for key, value in state.items()}
        try:  # lpips cuts torchvision's `features` into slices and keeps their numbers
            metric.net.load_state_dict({key: state[key.split(".", 1)[1]] for key in metric.net.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"'{os.fspath(weights)}' does not hold the state dict of torchvision's network for LPIPS '{net}' "
                f"({str(error).splitlines()[0]})"
            ) from error
    return metric
