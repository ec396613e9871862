"""Words and the patches that they match: the maths of language-guided relations, on plain tensors.

With unit word features `w_i` and unit patch features `u_p`, word i looks at the patches by `A_ip = softmax_p(cos(w_i,
u_p) / tau)` and finds `y_i = normalised sum_p A_ip u_p`. How alike two matches are should be how alike their words are.
Both may require gradients: a loss that guides has fixed words, the trainer of a tokenizer neither.

Source: LG-VQ, Liang et al. 2024 (arXiv 2405.14206). There the match is the nearest patch, whose choice has no gradient,
and padding and the diagonal count. Here the match is soft, and only pairs of different words count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

TAU = 0.1


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def soft_matches(words: torch.Tensor, patches: torch.Tensor, tau: float = TAU) -> tuple[torch.Tensor, torch.Tensor]:
    """What each word finds in a picture, and where it looks; at least in float32.

    Args:
        words: features `(B, N, d)`, or `(1, N, d)` of the words of every picture; of any length, zero for padding.
        patches: features `(B, P, d)` of any length.
        tau: temperature of the attention, in cosines, above 0: the smaller, the fewer patches.

    Returns:
        matches `(B, N, d)`, of unit length, and attention `(B, N, P)`, whose rows sum to 1.

    Raises:
        ValueError: shapes do not fit, or `tau` is not above 0.
    """
    fit = words.ndim == patches.ndim == 3 and words.shape[-1] == patches.shape[-1]
    if not fit or len(words) not in (1, len(patches)):
        raise ValueError(
            f"words are (B or 1, N, d) and patches (B, P, d), got {tuple(words.shape)} and {tuple(patches.shape)}"
        )
    if not tau > 0:
        raise ValueError(f"tau is above 0, got {tau}")
    words, patches = F.normalize(_wide(words), dim=-1), F.normalize(_wide(patches), dim=-1)
    attention = (words @ patches.mT / tau).softmax(-1)
    return F.normalize(attention @ patches, dim=-1), attention


def _pairs(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Which pairs of different words count, `(B or 1, N, N)`, of `(B, N, ...)`: 1 or 0 in its dtype."""
    count = like.shape[1]
    different = ~torch.eye(count, dtype=torch.bool, device=like.device)
    if mask is None:
        return different[None].to(like.dtype)
    if mask.ndim != 2 or mask.shape[1] != count or len(mask) not in (1, len(like)):
        raise ValueError(f"a mask of words is (B or 1, {count}), got {tuple(mask.shape)}")
    mask = mask.to(like.device).bool()
    return (mask[:, :, None] & mask[:, None, :] & different).to(like.dtype)


def _mean(values: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The mean `(B,)` of `(B, N, N)` over the pairs that count; 0 where none does."""
    pairs = pairs.expand_as(values)
    # a value that does not count may be anything, also not a number
    return torch.where(pairs > 0, values, 0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)


def relation_distance(
    matches: torch.Tensor,
    words: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | torch.Tensor = 1.0,
    offset: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """How far the matches' similarities are from what the words' say: mean over pairs of `(Y Y' - (k W W' + b))^2`.

    Args:
        matches: of unit length, `(B, N, d)`, as `soft_matches` gives them.
        words: features `(B, N, d')` or `(1, N, d')`, of any length.
        mask: which words count, `(B, N)` or `(1, N)`, the others being padding; None counts all.
        scale, offset: k and b, see `calibrate`.

    Returns:
        `(B,)`, not negative; 0 where fewer than two words count. Padding does not change it.

    Raises:
        ValueError: shapes do not fit.
    """
    if words.ndim != 3 or len(words) not in (1, len(matches)) or words.shape[1] != matches.shape[1]:
        raise ValueError(
            f"words are (B or 1, N, d) of the matches (B, N, d), got {tuple(words.shape)} of {tuple(matches.shape)}"
        )
    words = F.normalize(_wide(words), dim=-1)
    difference = matches @ matches.mT - (scale * (words @ words.mT) + offset)
    return _mean(difference.square(), _pairs(mask, matches))


def overlap(attention: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How much words look at the same patches: the mean cosine of pairs of attention maps, `(B, N, P) -> (B,)`.

    0 where they look at different patches, 1 where at the same ones; 0 where fewer than two words count. `mask` as in
    `relation_distance`.
    """
    maps = F.normalize(_wide(attention), dim=-1)
    return _mean(maps @ maps.mT, _pairs(mask, maps))


@torch.no_grad()
def calibrate(matches: torch.Tensor, words: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[float, float]:
    """k and b by least squares of `Y Y'` on `W W'` over the pairs of words of reference pictures.

    Word features are alike by another measure than patch features: without this the relation would ask for similarities
    that no picture has. Where all pairs of words are equally alike k is 0, and b the mean.

    Args:
        matches, words, mask: as in `relation_distance`.

    Raises:
        ValueError: no picture has two words.
    """
    words = F.normalize(_wide(words), dim=-1)
    pairs = _pairs(mask, matches).expand(len(matches), -1, -1).bool()
    if not pairs.any():
        raise ValueError("k and b are found from pairs of words; no picture has two words")
    x = (words @ words.mT).expand(len(matches), -1, -1)[pairs].double()
    y = (matches @ matches.mT)[pairs].double()
    centred = x - x.mean()
    spread = centred.square().sum()
    # at the round-off of equal cosines there is no slope to be found
    k = (centred * y).sum() / spread if spread > 1e-10 * len(x) else torch.zeros_like(spread)
    return k.item(), (y.mean() - k * x.mean()).item()
