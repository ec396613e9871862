"""Whose face it is, judged by any network of face embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .areas import check_box
from .images import Picture, digest, keep, read_image
from .loss import Loss
from .network import FrozenNetwork, describe_network, logits_of, moved

_FACENET = ("vggface2", "casia-webface")


class FaceIdentity(Loss):
    """The distance of a face from that in a picture: `1 - cos` of the network's embeddings, in [0, 2].

    Args:
        network: module or callable, faces `(B, 3, h, w)` -> embeddings `(B, D)`; or 'vggface2' or 'casia-webface',
            facenet-pytorch's InceptionResnetV1 with those weights, which it downloads when the loss is made.
        picture: whose face is wanted: a path, a Pillow image, or a tensor `(3, H, W)` in [0, 1].
        crop: where the face is in the images, a box `(x0, y0, x1, y1)` in fractions; the whole image unless given.
        picture_crop: the same of the picture.
        align: callable, images `(B, 3, H, W)` -> faces `(B, 3, h, w)` as the network wants them, differentiable; it
            sees images and picture, after their crops.
        mean, std, size: the network's own preprocessing of faces in [0, 1]; None leaves that part out, or to what
            the named ones were trained with.

    Raises:
        FileNotFoundError, ValueError: the picture cannot be read, or a crop is no box.
        ImportError: a network by name, and facenet-pytorch is not installed.
        OSError: its weights cannot be downloaded.

    Source: FaceNet, Schroff et al. 2015 (arXiv 1503.03832); as guidance: FreeDoM, Yu et al. 2023 (arXiv 2303.09833).
    """

    pictures = True
    name = "face-identity"

    def __init__(
        self,
        network: Callable[[torch.Tensor], Any] | str,
        picture: Picture,
        *,
        crop: Sequence[float] | None = None,
        picture_crop: Sequence[float] | None = None,
        align: Callable[[torch.Tensor], torch.Tensor] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
    ):
        self.crop = None if crop is None else check_box(crop)
        picture_crop = None if picture_crop is None else check_box(picture_crop)
        self.augment = crop is None  # what is shifted would leave the box
        self.align, picture = align, keep(picture)
        self.settings = {"network": describe_network(network), "picture": digest(picture)}
        self.settings |= {"crop": self.crop and list(self.crop), "picture_crop": picture_crop and list(picture_crop)}
        self.settings["align"] = align and describe_network(align)
        self.arguments = self.settings | {"network": network, "picture": picture, "align": align}
        self.arguments |= {"mean": mean, "std": std, "size": size}
        if isinstance(network, str):
            network = _facenet(network)
            # (255 x - 127.5) / 128, on faces of 160 x 160
            mean, std, size = mean or (0.5,) * 3, std or (128 / 255,) * 3, size or 160
        self.network = FrozenNetwork(network, size=size, mean=mean, std=std)
        with torch.no_grad():
            self.target = self._embedding(read_image(picture)[None], picture_crop)

    def _embedding(self, image: torch.Tensor, crop: Sequence[float] | None) -> torch.Tensor:
        if crop is not None:
            (height, width), (x0, y0, x1, y1) = image.shape[2:], crop
            image = image[:, :, _pixels(y0, y1, height), _pixels(x0, x1, width)]
        if self.align is not None:
            image = self.align(image)
        embedding = logits_of(self.network(image))
        if embedding.ndim != 2 or len(embedding) != len(image):
            raise ValueError(f"a face network returns embeddings ({len(image)}, D), got {tuple(embedding.shape)}")
        return embedding.to(torch.promote_types(embedding.dtype, torch.float32))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        embedding = self._embedding(image, self.crop)
        return 1 - F.cosine_similarity(embedding, moved(self.target, embedding), dim=1)


def _pixels(start: float, stop: float, side: int) -> slice:
    """The whole pixels between two fractions of a side, at least one."""
    first = math.floor(round(start * side, 6))
    return slice(first, max(math.ceil(round(stop * side, 6)), first + 1))


def _facenet(name: str) -> torch.nn.Module:
    if name not in _FACENET:
        raise ValueError(f"network is {', '.join(map(repr, _FACENET))}, a module or a callable, got {name!r}")
    try:
        from facenet_pytorch import InceptionResnetV1
    except ImportError as error:
        raise ImportError(
            f"network='{name}' needs facenet-pytorch, which is not installed: pip install facenet-pytorch --no-deps"
        ) from error
    try:
        return InceptionResnetV1(pretrained=name)
    except Exception as error:
        raise OSError(
            f"facenet-pytorch's weights '{name}' could not be downloaded ({error}); pass a module as network="
        ) from error
