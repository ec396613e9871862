"""Networks from a local folder, as transformers saves them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from .network import FrozenNetwork
from .reading import check_folder, first_line, no_code, read_json


def opened(
    network: Callable[[torch.Tensor], Any] | str | os.PathLike[str],
    auto: str,
    *,
    size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FrozenNetwork:
    """A frozen network with its preprocessing: a module or callable, or a local folder of a transformers model.

    A folder's own preprocessing holds where none is given (a 'shortest_edge' becomes a square of that size). Nothing
    is downloaded, weights are read from safetensors only, and no code of the folder's own is run.

    Args:
        auto: the transformers class that opens a folder, 'AutoModelForDepthEstimation'.

    Raises:
        FileNotFoundError: there is no such folder with a config.json.
        ImportError: a folder, and transformers is not installed.
        OSError: the folder's model cannot be loaded.
        ValueError: its preprocessing cannot be read, or wants blue before red.
    """
    if not isinstance(network, (str, os.PathLike)):
        return FrozenNetwork(network, size=size, mean=mean, std=std)
    folder = Path(network)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no folder '{folder}' with a config.json; a network is a module, a callable or the folder of a "
            "transformers model"
        )
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"the network in '{folder}' needs transformers, which is not installed: pip install transformers"
        ) from error
    try:
        check_folder(folder)
        with no_code():
            model = getattr(transformers, auto).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
    except Exception as error:
        raise OSError(f"the network in '{folder}' could not be loaded by {auto}: {first_line(error)}") from error
    own = _preprocessing(folder / "preprocessor_config.json", transformers)
    given = {"size": size, "mean": mean, "std": std}
    try:
        return FrozenNetwork(model, **{key: own.get(key) if value is None else value for key, value in given.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the preprocessing of the network in '{folder}' cannot be followed: {error}") from error


def _preprocessing(path: Path, transformers: Any) -> dict[str, Any]:
    """Size, mean and standard deviation, as the folder's own image processor has them."""
    if not path.is_file():
        return {}
    config, own = read_json(path), {}
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' does not describe an image processor: it holds a {type(config).__name__}")
    try:  # what the file leaves out is as the processor's class has it
        processor = transformers.AutoImageProcessor.from_pretrained(
            path.parent, local_files_only=True, trust_remote_code=False
        )
    except Exception:
        processor = None
    does = {
        name: bool(
            getattr(processor, name, None) if getattr(processor, name, None) is not None else config.get(name, usual)
        )
        for name, usual in (("do_normalize", True), ("do_resize", True), ("do_flip_channel_order", False))
    }
    if does["do_flip_channel_order"]:
        raise ValueError(
            f"the network in '{path.parent}' wants blue before red: give a callable that flips the channels, such as "
            "lambda image: network(image.flip(1))"
        )
    if does["do_normalize"] and "image_mean" in config:
        own |= {"mean": config["image_mean"], "std": config.get("image_std")}
    size = config.get("size")
    if does["do_resize"] and size:
        if isinstance(size, dict):
            size = (size["height"], size.get("width")) if "height" in size else size.get("shortest_edge")
        own["size"] = size
    return own


def label_index(label: int | str, network: Any) -> int:
    """The index of a class: itself, or of a name in the `config.label2id` of a transformers model.

    Raises:
        ValueError: the network has no such name, or the index is negative.
    """
    if isinstance(label, str):
        known = getattr(getattr(network, "config", None), "label2id", None) or {}
        if label not in known:
            names = f"; it has {', '.join(sorted(known, key=known.get)[:20])}" if known else "; give the class's index"
            raise ValueError(f"the network has no class of the name '{label}'{names}")
        return int(known[label])
    if not isinstance(label, Integral) or isinstance(label, bool) or label < 0:
        raise ValueError(f"a label is a class index from 0 on, or a name that the network knows, got {label!r}")
    return int(label)
