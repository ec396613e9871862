"""What a frozen network sees patch by patch."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..network import FrozenNetwork, describe_network
from .networks import Reader, opened

_SMALL = 1e-6  # a patch whose features are no longer than this has no direction


class PatchFeatures:
    """The features `(B, P, d)` of an image's patches, row by row, in a layer of a frozen network.

    The network has its own preprocessing where its library tells it (open_clip, timm, transformers, and torchvision's
    by name); what is given here comes first.

    Args:
        encoder: a name: 'demo' (the small CLIP shipped here), 'open_clip:ViT-B-32/openai', 'timm:MODEL' or
            'torchvision:MODEL', which may be downloaded; a local folder of an open_clip or transformers model; such a
            model itself, of any of the four (of a CLIP its image side is read); or any module or callable, images
            `(B, 3, h, w)` -> features `(B, P, d)` or `(B, d, h, w)`. A module is frozen where it is.
        layer: the last before pooling unless given (of transformers after their last normalisation; of a module or
            callable its output). The index of a block or stage, also from the end, -1 the last, as the library counts
            them; or the name of a module within it, 'features.13', whose first output counts. Tokens in front that
            stand for no patch are left out.
        size, mean, std: the preprocessing of images in [0, 1]; None leaves it to the network's own, or out.
        weights: for timm and torchvision by name: a file with the whole network's state dict, instead of a download.

    Attributes:
        name: of the encoder, in records.
        layer: as given.
        settings: plain data that tell one from another, but for the weights.

    Raises:
        FileNotFoundError, LookupError: there is no such folder or model.
        OSError: weights cannot be downloaded or read.
        ValueError: no such layer; (when called) what comes out is neither a map nor tokens.
    """

    def __init__(
        self,
        encoder: Callable[[torch.Tensor], Any] | str | os.PathLike[str],
        layer: int | str | None = None,
        *,
        size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        weights: str | os.PathLike[str] | None = None,
    ):
        network, own = opened(encoder, weights)
        given = {"size": size, "mean": mean, "std": std}
        own = {key: own.get(key) if value is None else value for key, value in given.items()}
        self.network = FrozenNetwork(Reader(network, layer), **own)
        text = isinstance(encoder, (str, os.PathLike))
        self.name, self.layer = describe_network(os.fspath(encoder) if text else encoder), layer
        self.settings = {"encoder": self.name, "layer": layer} | {key: getattr(self.network, key) for key in own}
        self.arguments = {"encoder": os.fspath(encoder) if text else encoder, "layer": layer, **given}
        self.arguments["weights"] = None if weights is None else os.fspath(weights)
        self._grids: dict[tuple[int, int], tuple[int, int] | None] = {}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1] -> features `(B, P, d)`, at least in float32, differentiable."""
        output = self.network(image)
        grid = tuple(output.shape[2:]) if output.ndim == 4 else _square(output.shape[1])
        self._grids[tuple(image.shape[-2:])] = grid
        output = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def maps(self, image: torch.Tensor) -> torch.Tensor:
        """The same as maps `(B, d, h, w)`. Errors as `grid_at`."""
        features = self(image)
        return features.transpose(1, 2).unflatten(2, self.grid_at(*image.shape[-2:]))

    @property
    def grid(self) -> tuple[int, int]:
        """How many patches there are below and beside each other, `(h, w)`.

        Raises:
            ValueError: this depends on the image (see `grid_at`), or the tokens lie on no square.
        """
        size = self.network.size
        if size is None:
            raise ValueError(
                "images are taken at their own size, on which the grid depends: ask grid_at(height, width)"
            )
        return self.grid_at(*((size, size) if isinstance(size, int) else size))

    def grid_at(self, height: int, width: int) -> tuple[int, int]:
        """The grid `(h, w)` of images of that many pixels.

        Raises:
            ValueError: the tokens lie on no square, and of such a network no other grid is known.
        """
        if (height, width) not in self._grids:
            held = next(self.network.network.parameters(), torch.empty(0))
            with torch.no_grad():
                self(held.new_full((1, 3, height, width), 0.5))
        grid = self._grids[height, width]
        if grid is None:
            raise ValueError(f"the tokens of {self.name} lie on no square, and it is not known on what grid they lie")
        return grid

    @functools.cached_property
    def digest(self) -> str | None:
        """The SHA-256 of the network's weights and their names, 16 digits; None of a callable."""
        network = self.network.network.network
        if not isinstance(network, torch.nn.Module):
            return None
        sha = hashlib.sha256()
        for name, value in sorted(network.state_dict().items()):
            value = value.detach().cpu().contiguous()
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.reshape(-1).view(torch.uint8).numpy())
        return sha.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"PatchFeatures({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"


def directions(features: torch.Tensor) -> torch.Tensor:
    """Features `(..., d)` at length one; those without any are zeros, with a gradient of zero."""
    lengths = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return torch.where(lengths > _SMALL, features / lengths.clamp(min=_SMALL), 0)


def _square(patches: int) -> tuple[int, int] | None:
    side = math.isqrt(patches)
    return (side, side) if side**2 == patches else None
