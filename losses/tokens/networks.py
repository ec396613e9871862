"""Patch features out of the networks of open_clip, timm, torchvision and transformers, each read its library's way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..clip import Clip, load_clip
from ..network import IMAGENET_MEAN, IMAGENET_STD, read_weights
from ..pretrained import opened as opened_folder

LIBRARIES = ("open_clip", "timm", "torchvision", "transformers")
_FURTHER = 16  # tokens that stand for no patch: a class token, registers; more of them means another patch size
_LAST = ("features", "layer4", "trunk_output", "encoder")  # torchvision's names for what comes before pooling


def library_of(network: Any) -> str | None:
    """The library that a module's class, or one that it derives from, comes from."""
    homes = [kind.__module__.partition(".")[0] for kind in type(network).__mro__]
    return next((home for home in homes if home in LIBRARIES), None)


def opened(encoder: Any, weights: str | os.PathLike[str] | None) -> tuple[Any, dict[str, Any]]:
    """A network, and its own preprocessing: of `size`, `mean` and `std` those that it has.

    See `PatchFeatures` for what an encoder is, and for the errors.
    """
    if isinstance(encoder, (str, os.PathLike)):
        return _named(os.fspath(encoder), weights)
    if weights is not None:
        raise ValueError("weights= are for a network given by name; one of your own has its weights already")
    if isinstance(encoder, Clip):
        return _with(encoder.image)
    if not callable(encoder):
        raise TypeError(f"an encoder is a name, a folder, a module or a callable, got {encoder!r}")
    library = library_of(encoder)
    if library == "open_clip":
        import open_clip

        own = open_clip.get_model_preprocess_cfg(encoder if hasattr(encoder, "visual") else _Visual(encoder))
        return getattr(encoder, "visual", encoder), {key: own[key] for key in ("size", "mean", "std") if key in own}
    if library == "timm":
        return encoder, _of_timm(encoder)
    if library == "torchvision":
        side = getattr(encoder, "image_size", None)
        return encoder, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | ({"size": side} if side else {})
    return getattr(encoder, "vision_model", encoder) if library == "transformers" else encoder, {}


class _Visual:
    """An image side without its CLIP, for open_clip's function, which takes the whole."""

    def __init__(self, visual: nn.Module):
        self.visual = visual


def _with(network: Any) -> tuple[Any, dict[str, Any]]:
    return network.network, {"size": network.size, "mean": network.mean, "std": network.std}


def _of_timm(network: nn.Module) -> dict[str, Any]:
    from timm.data import resolve_model_data_config

    own = resolve_model_data_config(network)
    built = getattr(getattr(network, "patch_embed", None), "img_size", None)  # img_size=, which the config leaves out
    return {"size": tuple(built or own["input_size"][1:]), "mean": own["mean"], "std": own["std"]}


def _named(name: str, weights: str | os.PathLike[str] | None) -> tuple[Any, dict[str, Any]]:
    library, colon, model = name.partition(":")
    if not colon or library not in ("open_clip", "timm", "torchvision"):
        if weights is not None:
            raise ValueError(f"weights= are for a network of timm or torchvision by name, got the encoder '{name}'")
        if name == "demo" or (Path(name) / "open_clip_config.json").is_file():
            return _with(load_clip(name).image)
        if (Path(name) / "config.json").is_file():
            network, own = _with(opened_folder(name, "AutoModel"))
            return getattr(network, "vision_model", network), own
        raise FileNotFoundError(
            f"'{name}' is neither 'demo', nor 'open_clip:MODEL/TAG', 'timm:MODEL' or 'torchvision:MODEL', nor a folder "
            "with open_clip_config.json or a transformers config.json"
        )
    if library == "open_clip":
        if weights is not None:
            raise ValueError("a checkpoint of open_clip stands in its name: 'open_clip:MODEL/path/to/file'")
        model, slash, tag = (model, "", "") if model.startswith(("hf-hub:", "local-dir:")) else model.partition("/")
        return _with(load_clip(model, tag or None).image)
    return (_by_timm if library == "timm" else _by_torchvision)(model, weights)


def _by_timm(name: str, weights: str | os.PathLike[str] | None) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"'timm:{name}' needs timm, which is not installed: pip install timm") from error
    if not timm.is_model(name.partition(".")[0]):
        raise LookupError(f"timm has no model '{name}'")
    try:
        network = timm.create_model(name, pretrained=weights is None)
    except Exception as error:
        raise OSError(
            f"timm's weights for '{name}' could not be downloaded ({_first(error)}); pass weights="
        ) from error
    return _filled(network, weights, f"timm's {name}"), _of_timm(network)


def _by_torchvision(name: str, weights: str | os.PathLike[str] | None) -> tuple[nn.Module, dict[str, Any]]:
    from torchvision import models

    if name not in models.list_models(models):
        raise LookupError(f"torchvision has no model '{name}' of images")
    kinds = models.get_model_weights(name)
    own = kinds.DEFAULT.transforms()
    try:
        network = models.get_model(name, weights=None if weights is not None else kinds.DEFAULT)
    except Exception as error:
        reason = f"torchvision's weights for '{name}' could not be downloaded ({_first(error)}); pass weights="
        raise OSError(reason) from error
    own = {"size": own.crop_size[0], "mean": tuple(own.mean), "std": tuple(own.std)}
    return _filled(network, weights, f"torchvision's {name}"), own


def _filled(network: nn.Module, weights: str | os.PathLike[str] | None, what: str) -> nn.Module:
    if weights is not None:
        try:
            network.load_state_dict(read_weights(weights, f"weights of {what}"))
        except RuntimeError as error:
            raise ValueError(f"'{os.fspath(weights)}' does not hold the weights of {what} ({_first(error)})") from error
    return network


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- a layer of them ---------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A layer of a module, or a callable: prepared images `(B, 3, H, W)` -> `(B, c, h, w)`; `(B, P, d)` where no grid
    is known.

    Raises:
        ValueError: there is no such layer, or it is not one of maps or tokens.
    """

    def __init__(self, network: Callable[[torch.Tensor], Any], layer: int | str | None):
        super().__init__()
        self.network, self.library = network, library_of(network)
        if layer is not None and not isinstance(network, nn.Module):
            raise ValueError(f"a callable has no layers to choose from, got layer {layer!r}")
        if layer is None and self.library == "torchvision":
            layer = next((name for name in _LAST if hasattr(network, name)), None)
        if isinstance(layer, int) and self.library == "torchvision":
            layer = _block(network, layer)
        self.place = layer
        if isinstance(layer, str) and layer not in dict(network.named_modules()):
            names = [name for name, _ in network.named_children()]
            raise ValueError(f"{type(network).__name__} has no layer '{layer}'; at its top are {', '.join(names)}")
        if isinstance(layer, int) and self.library is None:
            raise ValueError(f"a layer of {type(network).__name__} is named, as in named_modules(), got {layer}")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if isinstance(self.place, str):
            return self._map(_stopped_at(self.network, self.place, image), image)
        indices = [-1 if self.place is None else self.place]
        if self.library == "open_clip":
            return self.network.forward_intermediates(
                image,
                indices=indices,
                stop_early=hasattr(self.network, "transformer"),  # its ResNet stops early where this is not asked
                normalize_intermediates=self.place is None,
                intermediates_only=True,
                output_fmt="NCHW",
            )["image_intermediates"][0]
        if self.library == "timm":
            return self.network.forward_intermediates(
                image,
                indices=indices,
                norm=self.place is None,
                stop_early=self.place is not None,
                output_fmt="NCHW",
                intermediates_only=True,
            )[0]
        if self.library == "transformers":
            return self._map(_of_transformers(self.network, self.place, image), image)
        return self._map(self.network(image), image)

    def _map(self, output: Any, image: torch.Tensor) -> torch.Tensor:
        """A layer's output as a map, without tokens that stand for no patch."""
        if isinstance(output, (tuple, list)) and output:
            output = output[0]
        if not isinstance(output, torch.Tensor) or output.ndim not in (3, 4) or len(output) != len(image):
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(
                f"patch features are a map (B, c, h, w) or tokens (B, P, d), got {got} of {type(self.network).__name__}"
                + ("; name a layer before its pooling" if self.place is None else f" at '{self.place}'")
            )
        if output.ndim == 4:  # torchvision's Swin keeps channels last
            last = self.library == "torchvision" and "Swin" in type(self.network).__name__
            return output.permute(0, 3, 1, 2) if last else output
        return tokens_to_map(output, _patch(self.network), image)


def tokens_to_map(tokens: torch.Tensor, patch: tuple[int, int] | None, image: torch.Tensor) -> torch.Tensor:
    """Tokens `(B, N, d)` as a map `(B, d, h, w)`, those in front that stand for no patch left out.

    Without a patch size they come back as they are.
    """
    if patch is None:
        return tokens
    height, width = (side // p for side, p in zip(image.shape[-2:], patch))
    further = tokens.shape[1] - height * width
    if not 0 <= further <= _FURTHER:
        return tokens
    return tokens[:, further:].transpose(1, 2).unflatten(2, (height, width))


class _Reached(Exception):
    def __init__(self, output: Any):
        self.output = output


def _stopped_at(network: nn.Module, layer: str, image: torch.Tensor) -> Any:
    """What a layer returns when it is first called; what would come after, and might overwrite it, is not run."""

    def reached(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Reached(output)

    handle = network.get_submodule(layer).register_forward_hook(reached)
    try:
        network(image)
    except _Reached as found:
        return found.output
    finally:
        handle.remove()
    raise ValueError(f"the layer '{layer}' of {type(network).__name__} is not run for an image")


def _block(network: nn.Module, index: int) -> str:
    """The name of a block of torchvision's transformer, or of a stage of its `features`."""
    for name in ("encoder.layers", "features"):
        try:
            blocks = list(network.get_submodule(name).named_children())
        except AttributeError:
            continue
        if -len(blocks) <= index < len(blocks):
            return f"{name}.{blocks[index][0]}"
        raise ValueError(f"{type(network).__name__} has {len(blocks)} layers, got {index}")
    raise ValueError(f"a layer of {type(network).__name__} is named, as in named_modules(), got {index}")


def _patch(network: nn.Module) -> tuple[int, int] | None:
    """A transformer's patch size, (height, width)."""
    config = getattr(network, "config", None)
    for holder in (network, config, getattr(config, "vision_config", None), getattr(network, "patch_embed", None)):
        size = getattr(holder, "patch_size", None)
        if size is not None:
            return (size, size) if isinstance(size, int) else tuple(size)
    return None


def _of_transformers(network: nn.Module, layer: int | None, image: torch.Tensor) -> torch.Tensor:
    output = network(pixel_values=image, output_hidden_states=True)
    if layer is None:
        maps = getattr(output, "feature_maps", None)  # of a backbone
        if maps is not None:
            return maps[-1]
        tokens = output.last_hidden_state
        maps = getattr(output, "reshaped_hidden_states", None)  # of one whose grid shrinks
        return tokens.transpose(1, 2).unflatten(2, maps[-1].shape[2:]) if maps is not None else tokens
    states = getattr(output, "reshaped_hidden_states", None) or output.hidden_states
    blocks = len(states) - 1  # the first is what the blocks are given
    if not -blocks <= layer < blocks:
        raise ValueError(f"{type(network).__name__} has {blocks} layers, got {layer}")
    return states[1 + layer % blocks]
