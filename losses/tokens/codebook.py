"""Codebooks of what patches show: words of a network's features, found by k-means."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from ..network import moved
from ..reading import read_json, read_tensors
from .features import PatchFeatures, directions

CODES, SETTINGS = "codebook.safetensors", "codebook.json"
FORMAT = 1
_ROWS = 1 << 14  # patches that are compared with the codes at once
_SAME = 1e-6  # below this `1 - cos` is rounding in float32: it is the same direction
_NOT_SAME = ("layer", "size", "mean", "std", "digest")  # what two encoders may not differ in


class Codebook:
    """K directions `(K, d)` in an encoder's features; a patch's token is the code that it is nearest to, by cosine.

    Args:
        codes: `(K, d)`; they are brought to length one.
        encoder: whose features they are codes of.
        counts: `(K,)`, how many patches each code had when it was fitted, if known.
        digest: of the encoder's weights when it was fitted; another is an error.

    Raises:
        ValueError: the codes have another shape, one is zero or there twice, or the encoder has other weights.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        encoder: PatchFeatures,
        counts: torch.Tensor | None = None,
        digest: str | None = None,
    ):
        if codes.ndim != 2 or not codes.is_floating_point() or len(codes) < 2:
            raise ValueError(f"codes are floats (K, d), K at least 2, got {codes.dtype} {tuple(codes.shape)}")
        if counts is not None and counts.shape != codes.shape[:1]:
            raise ValueError(f"counts are one number per code, ({len(codes)},), got {tuple(counts.shape)}")
        if digest is not None and digest != encoder.digest:
            raise ValueError(f"the codebook was fitted in an encoder of other weights than this {encoder.name}'s")
        codes = codes.detach().float().cpu().clone()
        off = (torch.linalg.vector_norm(codes, dim=1, keepdim=True) - 1).abs() > 1e-5
        self.codes = torch.where(off, directions(codes), codes)  # those that come from a file stay bit for bit
        if not (self.codes.isfinite().all() and self.codes.any(1).all()):
            raise ValueError("a code is a direction: finite numbers, not all zero")
        if len(self.codes.unique(dim=0)) < len(codes):
            raise ValueError("a code is there twice: no patch would be nearer to one than to the other")
        self.encoder = encoder
        self.counts = None if counts is None else counts.detach().long().cpu().clone()
        self.settings = {"K": len(codes), "codes": self.digest, **encoder.settings}
        self.arguments = {"codes": self.codes, "encoder": encoder, "counts": self.counts, "digest": encoder.digest}

    @classmethod
    def fit(
        cls,
        images: torch.Tensor | Iterable[torch.Tensor],
        encoder: PatchFeatures,
        K: int,
        *,
        seed: int = 0,
        iterations: int = 50,
        batch: int = 32,
    ) -> Codebook:
        """The codebook of pictures, by spherical k-means over all their patches; see `spherical_kmeans`.

        Args:
            images: `(N, 3, H, W)` in [0, 1], or batches of such.
            encoder: whose features are taken.
            K: how many codes, at least 2.
            seed: of the random start.
            iterations: of k-means, at most.
            batch: how many pictures the encoder is given at once.

        Raises:
            ValueError: the patches have fewer directions than there are codes; those without features have none.
        """
        found = [directions(encoder(part)).flatten(0, 1).cpu() for part in _batches(images, batch)]
        codes, ids = spherical_kmeans(torch.cat(found), K, seed=seed, iterations=iterations)
        return cls(codes, encoder, torch.bincount(ids, minlength=K))

    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(..., d)` -> the index `(...)` of the code that each is nearest to."""
        flat = directions(features.detach()).flatten(0, -2).float()
        codes = moved(self.codes, flat)
        return torch.cat([(part @ codes.T).argmax(1) for part in flat.split(_ROWS)]).view(features.shape[:-1])

    def ids(self, images: torch.Tensor | Iterable[torch.Tensor], batch: int = 32) -> torch.Tensor:
        """The tokens `(B, P)` of images `(B, 3, H, W)` in [0, 1], or of batches of them."""
        return torch.cat([self.nearest(self.encoder(part)) for part in _batches(images, batch)])

    def tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """The codes `(..., d)` of tokens `(...)`.

        Raises:
            ValueError: a token is not one of the K.
        """
        if ids.is_floating_point() or ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.codes):
            raise ValueError(f"tokens are whole numbers from 0 to {len(self.codes) - 1}")
        return moved(self.codes, ids, self.codes.dtype)[ids.long()]

    def count(self, images: torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
        """How many patches of the images each code has, `(K,)`."""
        return torch.bincount(self.ids(images).flatten().cpu(), minlength=len(self.codes))

    def usage(self, images: torch.Tensor | Iterable[torch.Tensor]) -> float:
        """The share of the codes that is nearest to some patch of the images, in (0, 1]."""
        return float((self.count(images) > 0).double().mean())

    @property
    def entropy(self) -> float:
        """The entropy in bits of the codes' shares of the patches that they were fitted to, at most log2 K.

        Raises:
            ValueError: these are not known.
        """
        if self.counts is None:
            raise ValueError("the codebook does not know to what patches it was fitted; see entropy_of(count(images))")
        return entropy_of(self.counts)

    @property
    def digest(self) -> str:
        """The SHA-256 of the codes, 16 digits."""
        return hashlib.sha256(self.codes.contiguous().numpy().tobytes()).hexdigest()[:16]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `codebook.safetensors` and `codebook.json`, which tells of what encoder they are."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"codes": self.codes} | ({} if self.counts is None else {"counts": self.counts}), folder / CODES)
        text = isinstance(self.encoder.arguments["encoder"], str)
        told = {
            "format": FORMAT,
            "K": len(self.codes),
            "d": self.codes.shape[1],
            "codes": self.digest,
            "encoder": self.encoder.settings | {"digest": self.encoder.digest},
            "by_name": self.encoder.arguments if text else None,
        }
        (folder / SETTINGS).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: PatchFeatures | None = None) -> Codebook:
        """What `save` wrote.

        Args:
            encoder: the one that it was fitted in; it is opened anew where it was given by its name then.

        Raises:
            FileNotFoundError: there is no codebook in the folder.
            ValueError: it is none, or of another encoder.
        """
        folder = Path(folder)
        for file in (SETTINGS, CODES):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"there is no codebook in '{folder}': {file} is missing")
        try:
            told, tensors = read_json(folder / SETTINGS), read_tensors(folder / CODES)
            fitted, codes, by_name = dict(told["encoder"]), tensors["codes"], told["by_name"]
            if told["format"] != FORMAT or codes.ndim != 2:
                raise ValueError(f"format {told['format']}")
            missing = [key for key in ("encoder", *_NOT_SAME) if key not in fitted]
            if missing or "codes" not in told:
                raise ValueError(f"{SETTINGS} lacks {', '.join(missing) or 'codes'}")
            if not (by_name is None or isinstance(by_name["encoder"], str)):
                raise ValueError(f"an encoder's name is a text, got {by_name['encoder']!r}")
        except Exception as error:
            raise ValueError(f"'{folder}' holds no codebook that can be read: {error!r}") from error
        if encoder is None:
            if by_name is None:
                raise ValueError(
                    f"the codebook in '{folder}' is of an encoder that was given by no name ({fitted['encoder']}): "
                    "pass encoder="
                )
            try:
                encoder = PatchFeatures(**by_name)
            except (TypeError, AttributeError) as error:  # arguments that it does not have
                raise ValueError(f"'{folder}' holds no codebook that can be read: {error}") from error
        own = encoder.settings | {"digest": encoder.digest}
        for key in ("encoder", *_NOT_SAME) if encoder.digest is None else _NOT_SAME:  # a callable has but its name
            got, wanted = (list(v) if isinstance(v, (list, tuple)) else v for v in (own[key], fitted[key]))
            if got != wanted:
                what = "weights" if key == "digest" else key
                raise ValueError(
                    f"the codebook in '{folder}' was fitted in {fitted['encoder']} with {what} {wanted}, not in "
                    f"{encoder.name} with {got}"
                )
        made = cls(codes, encoder, tensors.get("counts"))
        if made.digest != told["codes"]:
            raise ValueError(f"the codes in '{folder}' are not those that {SETTINGS} tells of: the file has changed")
        return made

    def __repr__(self) -> str:
        return f"Codebook({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"


def entropy_of(counts: torch.Tensor) -> float:
    """The entropy in bits of counts `(K,)`, not all zero."""
    shares = counts.double() / counts.sum()
    return float(-torch.special.xlogy(shares, shares).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64)))


def _batches(images: torch.Tensor | Iterable[torch.Tensor], batch: int) -> Iterable[torch.Tensor]:
    with torch.no_grad():
        for part in [images] if isinstance(images, torch.Tensor) else images:
            yield from part.split(batch)


@torch.no_grad()
def spherical_kmeans(
    points: torch.Tensor, K: int, *, seed: int = 0, iterations: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    """K unit vectors `(K, d)` such that points are near to one, by cosine, and the index `(N,)` of each point's.

    The start is greedy k-means++, which also finds a new place for a code that has lost all its points. It ends when no
    point changes its code.

    Args:
        points: `(N, d)`; they are brought to length one, and zeros do not count (their index is the nearest all the
            same).

    Raises:
        ValueError: K is less than 2, or the points have fewer directions than that.

    Source: spherical k-means: Dhillon and Modha 2001; k-means++: Arthur and Vassilvitskii 2007.
    """
    whole = directions(points.float())
    points = whole[whole.any(1)]
    if not 2 <= K <= len(points):
        raise ValueError(f"{K} codes of {len(points)} patches: at least 2, and no more than there are patches")
    generator = torch.Generator().manual_seed(seed)
    codes = _grown(points, points[:0], K, generator)
    ids = _assign(points, codes)[0]
    for _ in range(iterations):
        codes = directions(torch.zeros_like(codes).index_add_(0, ids, points))
        alive = codes.any(1)  # neither without points nor of points that cancel
        codes = _grown(points, codes[alive], K, generator)
        before, ids = ids, _assign(points, codes)[0]
        if alive.all() and torch.equal(before, ids):
            break
    return codes, _assign(whole, codes)[0]


def _assign(points: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest code's index and cosine, `(N,)` each."""
    found = [(part @ codes.T).max(1) for part in points.split(_ROWS)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def _grown(points: torch.Tensor, codes: torch.Tensor, K: int, generator: torch.Generator) -> torch.Tensor:
    """Codes and more of them, K in all, by greedy k-means++.

    The next is the best of some points that are drawn in proportion to `1 - cos` to the nearest code so far.

    Raises:
        ValueError: no point has a direction that is not a code yet.
    """
    if not len(codes):
        codes = points[torch.randint(len(points), (1,), generator=generator)]
    if len(codes) == K:
        return codes
    far = 1 - _assign(points, codes)[1]
    while len(codes) < K:
        far = torch.where(far > _SAME, far, 0)
        sums = far.cumsum(0, dtype=torch.float64)
        if not sums[-1] > 0:
            raise ValueError(f"{K} codes of {len(points)} patches, which have no more than {len(codes)} directions")
        at = torch.rand(2 + int(math.log(K)), generator=generator, dtype=torch.float64) * sums[-1]
        drawn = points[torch.searchsorted(sums, at, right=True).clamp_(max=len(points) - 1)]
        left = torch.minimum(far[:, None], 1 - points @ drawn.T)
        best = int(left.sum(0, dtype=torch.float64).argmin())
        codes, far = torch.cat([codes, drawn[best : best + 1]]), left[:, best]
    return codes
