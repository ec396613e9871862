"""A frozen network with its own preprocessing, and what its output means."""

from __future__ import annotations

import copy
import functools
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from .reading import first_line, no_code, open_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LARGEST_SIDE = 8192  # of a network's input: what a file asks for must fit into the memory


def resize(image: torch.Tensor, size: int | tuple[int, int] | None) -> torch.Tensor:
    """Images `(B, C, H, W)` at `size` (height, width), antialiased bicubic, differentiable; None leaves them alone.

    The whole picture is kept: one that is not square is squeezed rather than cropped, so every pixel has a gradient.
    """
    if size is None:
        return image
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[-2:] == (height, width):
        return image
    wide = image.to(torch.promote_types(image.dtype, torch.float32))  # torch has no half-precision kernel on the CPU
    return F.interpolate(wide, (height, width), mode="bicubic", align_corners=False, antialias=True).to(image.dtype)


class FrozenNetwork:
    """A network that judges images in [0, 1]: resized to its own size, normalised with its own mean and deviation.

    A module is put in eval mode and its weights stop requiring gradients; it follows the image's device and dtype in a
    copy, so that the original never loses precision. Values are never clamped: an image that overshoots [0, 1] keeps
    its gradient.

    Args:
        network: `torch.nn.Module`, or any callable, of images `(B, 3, h, w)`.
        size: the network's input size, one number or (height, width); None takes images as they are.
        mean, std: per channel, for images in [0, 1]; None leaves that part out.

    Raises:
        TypeError: the network cannot be called.
        ValueError: size, mean or std are no such numbers.
    """

    def __init__(
        self,
        network: Callable[[torch.Tensor], Any],
        *,
        size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        if not callable(network):
            raise TypeError(f"a network is a module or a callable (images) -> output, got {network!r}")
        if isinstance(network, torch.nn.Module):
            network.eval().requires_grad_(False)
        self.network = network
        self.size = size if size is None or isinstance(size, int) else tuple(size)
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        _check_preprocessing(self.size, self.mean, self.std)
        self._copy: tuple[torch.device, torch.dtype, torch.nn.Module] | None = None

    def on(self, image: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        """The network on the image's device, in the image's dtype."""
        if not isinstance(self.network, torch.nn.Module):
            return self.network
        device, dtype = image.device, image.dtype
        held = [*self.network.parameters(), *self.network.buffers()]
        if all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in held):
            return self.network
        if self._copy is None or self._copy[:2] != (device, dtype):
            self._copy = None  # frees the last one first
            self._copy = (device, dtype, copy.deepcopy(self.network).to(device, dtype))
        return self._copy[2]

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1] as the network wants them."""
        image = resize(image, self.size)
        if self.mean is not None:
            image = image - constant(self.mean, image).view(-1, 1, 1)
        if self.std is not None:
            image = image / constant(self.std, image).view(-1, 1, 1)
        return image

    def __call__(self, image: torch.Tensor) -> Any:
        return self.on(image)(self.prepare(image))


def _check_preprocessing(size: Any, mean: Any, std: Any) -> None:
    sides = (size, size) if size is None or isinstance(size, int) else size
    right = size is None or all(isinstance(side, Integral) and 0 < side <= _LARGEST_SIDE for side in sides)
    if not right or len(sides) != 2:
        raise ValueError(f"a network's size is one number or (height, width), from 1 to {_LARGEST_SIDE}, got {size!r}")
    for name, values in (("mean", mean), ("std", std)):
        try:
            right = values is None or all(math.isfinite(value) and (name == "mean" or value > 0) for value in values)
        except (TypeError, ValueError, OverflowError):
            right = False
        if not right or (values is not None and len(values) not in (1, 3)):
            raise ValueError(f"a network's {name} is a finite number per channel (std above 0), got {values!r}")


def describe_network(network: Any) -> str:
    """What to call a network in a record: its name where it is a string, else its class or function."""
    if isinstance(network, str):
        return network
    return getattr(network, "__qualname__", None) or type(network).__qualname__


def logits_of(output: Any) -> torch.Tensor:
    """The map or vector of scores in what a network returns: a tensor, torchvision's dict, transformers' output.

    Raises:
        TypeError: none of those.
    """
    if isinstance(output, torch.Tensor):
        return output
    for key in ("logits", "out"):
        if isinstance(output, dict) and key in output:
            return output[key]
        if hasattr(output, key):
            return getattr(output, key)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    raise TypeError(
        f"expected the network to return a tensor, a dict with 'out' or 'logits', or an object with .logits, "
        f"got {type(output).__name__}"
    )


def read_weights(path: str | os.PathLike[str], what: str) -> dict[str, torch.Tensor]:
    """The state dict in a file, safetensors or PyTorch's own (weights only: no code is run); `what` it is to hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    path = os.fspath(path)
    with open_file(path, f"file of {what}") as file:
        try:
            if path.endswith(".safetensors"):
                from safetensors.torch import load_file

                return load_file(path)
            if zipfile.is_zipfile(file) and any(part.compress_type for part in zipfile.ZipFile(file).infolist()):
                raise ValueError("its parts are compressed, as torch.save never leaves them")  # they may be of any size
            file.seek(0)
            with no_code(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about old files, which are read all the same
                state = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not all(map(_whole, state, state.values())):
                raise TypeError("it is not a dict of tensors")
            return state
        except Exception as error:
            raise ValueError(f"'{path}' does not hold the state dict of {what} ({first_line(error)})") from error


def _whole(name: Any, value: Any) -> bool:
    """Whether it is a named tensor with all its values: one that repeats a few can claim to be of any size."""
    plain = isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
    if not plain or value.is_meta or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def per_image(targets: torch.Tensor, images: int, what: str) -> torch.Tensor:
    """One target per image: one serves all; B serve every whole number of batches in turn, as augmented copies come.

    Raises:
        ValueError: the numbers do not match.
    """
    if len(targets) == 1:
        return targets.expand(images, *targets.shape[1:])
    if images % len(targets):
        raise ValueError(f"{len(targets)} {what} for {images} images; give one, or one per image")
    return targets.repeat(images // len(targets), *(1 for _ in targets.shape[1:]))


_COPIES = WeakTensorKeyDictionary()  # not on the tensors themselves, with which they would be pickled


def moved(tensor: torch.Tensor, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor that stays the same, on the device of `like` and in its dtype unless another is given.

    It is copied to another device once and kept there, as long as the tensor is there and does not change: a copy at
    each call would make the host wait for the device.
    """
    dtype = dtype or like.dtype
    if tensor.device == like.device or tensor.is_inference():
        return tensor.to(like.device, dtype)
    copies = _COPIES.setdefault(tensor, {})
    version, copied = copies.get((like.device, dtype), (None, None))
    if version != tensor._version:
        with torch.inference_mode(False), torch.no_grad():
            copied = tensor.to(like.device, dtype)
        copies[like.device, dtype] = tensor._version, copied
    return copied


@functools.cache  # for good: a recorded CUDA graph reads a copy after its function is done
def _numbers(values: tuple[float, ...]) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64)


def constant(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Numbers as a tensor of the device and dtype of `like`, as `moved` keeps it there."""
    return moved(_numbers(tuple(values)), like)


def distance(difference: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each sample, `(B, ...) -> (B,)`; its gradient at exactly zero is zero, not NaN.

    At least in float32, where the squares of many half-precision values do not overflow.
    """
    difference = difference.to(torch.promote_types(difference.dtype, torch.float32))
    return torch.linalg.vector_norm(difference.reshape(len(difference), -1), dim=1)
