"""The style of a picture, as the correlations of a network's features (Gram matrices)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .clip import DEFAULT_MODEL, DEFAULT_PRETRAINED, load_clip
from .images import Picture, digest, keep, read_image
from .loss import Loss
from .network import IMAGENET_MEAN, IMAGENET_STD, FrozenNetwork, describe_network, moved, read_weights

VGG16_LAYERS = (3, 8, 15, 22)  # relu1_2, relu2_2, relu3_3, relu4_3 of torchvision's vgg16().features


class Style(Loss):
    """The distance between the feature correlations of an image and those of a style picture.

    `L = sum over layers of mean((G(image) - G(picture))^2)`, with `G = F F^T / (C h w)` of a layer's features
    `F (C, h w)`; zero for the picture itself.

    Args:
        picture: a path, a Pillow image, or a tensor `(3, H, W)` in [0, 1].
        backbone: 'vgg16'; 'clip', the patch tokens of transformer blocks of an open_clip model; or a module or
            callable, images `(B, 3, h, w)` -> a feature map `(B, C, h, w)` or a list of them.
        layers: 'vgg16': indices into torchvision's `vgg16().features` (relu1_2, relu2_2, relu3_3, relu4_3 unless
            given). 'clip': transformer blocks, counted from 0 (the third of twelve unless given, in proportion).
        weights: 'vgg16': a file with the state dict of `vgg16()` or of its `features`; torchvision's own download
            unless given.
        model, pretrained: 'clip': as in `ClipText`.
        size: images and picture are brought to this size first: 224 for 'vgg16', the model's own for 'clip', not at
            all for a module, unless given.
        mean, std: preprocessing of images in [0, 1] for a module.

    Raises:
        FileNotFoundError, ValueError: the picture or the weights cannot be read.
        OSError: torchvision's weights cannot be downloaded.
        LookupError: as in `ClipText`.

    Source: Gatys et al. 2016 (CVPR, arXiv 1508.06576); with CLIP: FreeDoM, Yu et al. 2023 (arXiv 2303.09833).
    """

    pictures = True
    name = "style"
    augment = False  # shifted and resized copies have other textures than the picture itself

    def __init__(
        self,
        picture: Picture,
        *,
        backbone: str | Callable[[torch.Tensor], Any] = "vgg16",
        layers: Sequence[int] | None = None,
        weights: str | os.PathLike[str] | None = None,
        model: str = DEFAULT_MODEL,
        pretrained: str | None = DEFAULT_PRETRAINED,
        size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        picture = keep(picture)
        self.settings = {"picture": digest(picture), "backbone": describe_network(backbone)}
        if backbone == "vgg16":
            layers = tuple(VGG16_LAYERS if layers is None else layers)
            self.network = FrozenNetwork(
                _Vgg16(layers, weights), size=size or 224, mean=IMAGENET_MEAN, std=IMAGENET_STD
            )
            self.settings |= {"layers": layers, "weights": None if weights is None else os.fspath(weights)}
        elif backbone == "clip":
            clip = load_clip(model, pretrained)
            layers = tuple(_clip_layers(clip.image.network) if layers is None else layers)
            self.network = FrozenNetwork(
                _ClipBlocks(clip.image.network, layers),
                size=size or clip.image.size,
                mean=clip.image.mean,
                std=clip.image.std,
            )
            self.settings |= {"layers": layers, "model": os.fspath(model), "pretrained": clip.pretrained}
        elif isinstance(backbone, str):
            raise ValueError(f"backbone is 'vgg16', 'clip', a module or a callable, got {backbone!r}")
        else:
            self.network = FrozenNetwork(backbone, size=size, mean=mean, std=std)
        self.settings["size"] = self.network.size
        self.arguments = self.settings | {"picture": picture, "backbone": backbone}
        with torch.no_grad():
            self.targets = self._grams(read_image(picture)[None])

    def _grams(self, image: torch.Tensor) -> list[torch.Tensor]:
        maps = self.network(image)
        return [gram(features) for features in ([maps] if isinstance(maps, torch.Tensor) else maps)]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        pairs = zip(self._grams(image), self.targets, strict=True)
        return sum((got - moved(wanted, got)).square().mean((1, 2)) for got, wanted in pairs)


def gram(features: torch.Tensor) -> torch.Tensor:
    """Feature maps `(B, C, h, w)` -> their Gram matrices `(B, C, C)`, `F F^T / (C h w)`."""
    flat = features.flatten(2)
    flat = flat / (flat.shape[1] * flat.shape[2]) ** 0.5
    return flat @ flat.transpose(1, 2)


class _Vgg16(nn.Module):
    def __init__(self, layers: Sequence[int], weights: str | os.PathLike[str] | None):
        from torchvision.models import VGG16_Weights, vgg16

        super().__init__()
        features = vgg16().features if weights is not None else _downloaded(vgg16, VGG16_Weights.IMAGENET1K_V1).features
        if not layers or not all(0 <= layer < len(features) for layer in layers):
            raise ValueError(f"layers are indices of vgg16().features, 0 to {len(features) - 1}, got {layers!r}")
        if weights is not None:
            _load_features(features, weights)
        for layer in features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # it would overwrite the layer before it, which may be asked for
        self.layers, self.features = tuple(layers), features[: max(layers) + 1]

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for index, layer in enumerate(self.features):
            image = layer(image)
            if index in self.layers:
                maps.append(image)
        return maps


def _downloaded(build: Callable[..., nn.Module], weights: Any) -> Any:
    try:
        return build(weights=weights)
    except Exception as error:
        raise OSError(
            f"torchvision's VGG-16 weights could not be downloaded from {weights.url} ({error}); "
            "pass weights=, a file with their state dict"
        ) from error


def _load_features(features: nn.Module, weights: str | os.PathLike[str]) -> None:
    state = read_weights(weights, "VGG-16 weights")
    state = {key.removeprefix("features."): value for key, value in state.items()}
    try:
        features.load_state_dict({key: value for key, value in state.items() if not key.startswith("classifier.")})
    except Exception as error:
        raise ValueError(
            f"'{os.fspath(weights)}' does not hold the state dict of torchvision's vgg16() or of its features "
            f"({str(error).splitlines()[0]})"
        ) from error


class _ClipBlocks(nn.Module):
    def __init__(self, visual: nn.Module, layers: Sequence[int]):
        super().__init__()
        depth = _depth(visual)
        if not layers or not all(0 <= layer < depth for layer in layers):
            raise ValueError(f"layers are blocks of the CLIP model, 0 to {depth - 1}, got {layers!r}")
        self.layers, self.visual = list(layers), visual

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return self.visual.forward_intermediates(
            image, indices=self.layers, stop_early=True, intermediates_only=True, output_fmt="NCHW"
        )["image_intermediates"]


def _depth(visual: nn.Module) -> int:
    try:
        return len(visual.transformer.resblocks)
    except AttributeError:
        raise ValueError("backbone='clip' needs a model whose image side is a transformer of open_clip") from None


def _clip_layers(visual: nn.Module) -> tuple[int]:
    return ((_depth(visual) - 1) // 4,)  # FreeDoM takes the third block of twelve
