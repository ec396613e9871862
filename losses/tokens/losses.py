"""Losses of what patches show: near to a reference's features, of the same words, or of as many of each word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..areas import Area, Region
from ..images import Picture, digest, keep, read_images
from ..loss import Loss
from ..network import moved, per_image, resize
from .codebook import Codebook
from .features import PatchFeatures, directions


class _Patches(Loss):
    """What an encoder sees in images against what it sees in references, patch by patch, where a mask says.

    A reference is a picture, several, or what `_remembered` keeps of them.
    """

    pictures = True
    augment = False  # the reference would have to be augmented alike

    def __init__(
        self,
        encoder: PatchFeatures,
        reference: Any,
        mask: Area | None,
        given: torch.Tensor | None,
        settings: dict[str, Any],
    ):
        self.encoder, self.given = encoder, given
        self.region = None if mask is None else Region(mask)
        self.pictures_wanted = read_images(reference) if given is None else []
        targets, masks = len(self.pictures_wanted or given), 1 if self.region is None else self.region.batch
        if targets != masks and 1 not in (targets, masks):
            raise ValueError(f"{targets} references and {masks} masks: give one, or as many")
        self.batch = max(targets, masks)
        self._kept: tuple[Any, torch.Tensor] | None = None  # the references' side, for one size at a time
        if given is None and encoder.network.size is not None:
            self._wanted(self.pictures_wanted[0][None])  # so that errors come early
        told = None if self.region is None else self.region.describe()
        self.settings = {"reference": digest(reference), "mask": told, **settings}
        self.arguments = {"reference": reference, "mask": None if self.region is None else self.region.area}

    @torch.no_grad()
    def _wanted(self, image: torch.Tensor) -> torch.Tensor:
        """What is remembered of the references, seen at the encoder's own size or else at the image's: `(R, ...)`."""
        if self.given is not None:
            return self.given
        size = image.shape[-2:] if self.encoder.network.size is None else None
        if self._kept is None or self._kept[0] != size:
            seen = [directions(self.encoder(resize(one[None].float(), size))) for one in self.pictures_wanted]
            self._kept = size, self._remembered(torch.cat(seen))
        return self._kept[1]

    def _remembered(self, seen: torch.Tensor) -> torch.Tensor:
        """What is kept of the references' directions `(R, P, d)`."""
        return seen

    def _weights(self, values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The weights `(B, P)` of images' patches, of sum one, for values `(B, P, ...)`."""
        plain = values.new_zeros(values.shape[:2])
        if self.region is None:
            return plain + 1 / plain.shape[1]
        drawn = self.region.over(plain.unflatten(1, self.encoder.grid_at(*image.shape[-2:]))).flatten(1)
        return drawn / drawn.sum(1, keepdim=True)


class FeatureLoss(_Patches):
    """How far an image's patches are from a reference's, in a network's features: `sum_p w_p (1 - cos)`, in [0, 2].

    Args:
        encoder: see `PatchFeatures`.
        reference: a path, a Pillow image, or a tensor `(3, H, W)` in [0, 1]; a list of B of them, or a tensor
            `(B, 3, H, W)`, is one per image of the batch.
        mask: where it counts: a box `(x0, y0, x1, y1)` in fractions, 'left', 'center', 'disc' and the like, a picture
            (white counts), or a tensor `(H, W)` or `(B, H, W)` in [0, 1]; everywhere alike unless given.

    Raises:
        FileNotFoundError, ValueError: the reference or the mask cannot be read; (when called) no grid of patches is
            known to lay the mask on.

    Source: the loss of VQ-KD's decoder, Wang et al. 2024 (arXiv 2411.17762).
    """

    name = "features"

    def __init__(self, encoder: PatchFeatures, reference: Picture | Sequence[Picture], *, mask: Area | None = None):
        super().__init__(encoder, keep(reference), mask, None, encoder.settings)
        self.arguments["encoder"] = encoder

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        seen = directions(self.encoder(image))
        wanted = per_image(moved(self._wanted(image), seen), len(image), "references")
        return (self._weights(seen, image) * (1 - (seen * wanted).sum(2))).sum(1)


class _Tokens(_Patches):
    def __init__(
        self,
        codebook: Codebook,
        reference: Picture | Sequence[Picture],
        *,
        temperature: float = 0.07,
        mask: Area | None = None,
    ):
        if not 0 < temperature < math.inf:
            raise ValueError(f"a temperature is above 0, got {temperature}")
        self.codebook, self.temperature = codebook, float(temperature)
        reference, given = keep(reference), None
        if isinstance(reference, torch.Tensor) and not reference.is_floating_point():
            codebook.tokens(reference)  # are they its own?
            if reference.ndim not in (1, 2) or not reference.numel():
                raise ValueError(f"tokens are (P,) or (B, P), got {tuple(reference.shape)}")
            given = self._of_ids(reference.reshape(-1, reference.shape[-1]).long())
        settings = {"temperature": self.temperature, **codebook.settings}
        super().__init__(codebook.encoder, reference, mask, given, settings)
        self.arguments |= {"codebook": codebook, "temperature": self.temperature}

    def _scores(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(B, P, d)` -> their cosines to the codes over the temperature, `(B, P, K)`."""
        seen = directions(features)
        return seen @ moved(self.codebook.codes, seen).T / self.temperature

    def _of_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """What `_remembered` would keep of patches that show tokens `(R, P)`."""
        raise NotImplementedError


class TokenLoss(_Tokens):
    """How unsure a codebook is that each patch shows what it shows in a reference: what, but not how.

    `-sum_p w_p log softmax_k(cos(phi_p, e_k) / temperature)[k*_p]`, k* the reference's tokens. The gradient in a
    patch's direction is at most `2 w_p / temperature` long, and fades where the wanted code has won.

    Args:
        codebook: see `Codebook`.
        reference: pictures, as in `FeatureLoss`; or their tokens, whole numbers `(P,)` or `(B, P)`.
        temperature: of the softmax over the codes, above 0.
        mask: as in `FeatureLoss`.

    Raises:
        FileNotFoundError, ValueError: the reference or the mask cannot be read, or tokens are not of this codebook;
            (when called) there are not as many tokens as patches.

    Source: the cosine codebook of VQ-KD, Wang et al. 2024 (arXiv 2411.17762).
    """

    name = "token"

    def _remembered(self, seen: torch.Tensor) -> torch.Tensor:
        return self.codebook.nearest(seen)

    def _of_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        scores, ids = self._scores(self.encoder(image)), self._wanted(image)
        if ids.shape[1] != scores.shape[1]:
            raise ValueError(f"{ids.shape[1]} tokens for {scores.shape[1]} patches")
        ids = per_image(moved(ids, scores, torch.long), len(image), "references")
        unsure = F.cross_entropy(scores.transpose(1, 2), ids, reduction="none")
        return (self._weights(scores, image) * unsure).sum(1)


class TokenHistogramLoss(_Tokens):
    """How far an image's shares of the codes are from a reference's, wherever in the picture: `KL(h_ref || h)`.

    `h = sum_p w_p softmax_k(cos(phi_p, e_k) / temperature)`; zero where the shares are the same.

    Args:
        codebook: see `Codebook`.
        reference: pictures, as in `FeatureLoss`; or tokens, whole numbers `(P,)` or `(B, P)`, which count as sure.
        temperature: of the softmax over the codes, above 0.
        mask: as in `FeatureLoss`, of the image; the reference counts as a whole.

    Raises:
        FileNotFoundError, ValueError: the reference or the mask cannot be read, or tokens are not of this codebook.

    Source: soft assignments of patches to a codebook: van Gemert et al. 2008 (ECCV).
    """

    name = "token-histogram"
    augment = True  # places do not count

    def _remembered(self, seen: torch.Tensor) -> torch.Tensor:
        return self._scores(seen).softmax(2).mean(1)

    def _of_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return F.one_hot(ids, len(self.codebook.codes)).float().mean(1)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        sure = self._scores(self.encoder(image)).log_softmax(2)
        shares = torch.logsumexp(sure + self._weights(sure, image).log()[:, :, None], 1)  # their logarithms
        wanted = per_image(moved(self._wanted(image), shares), len(image), "references")
        return (torch.special.xlogy(wanted, wanted) - wanted * shares).sum(1)
