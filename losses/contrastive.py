"""CLIP losses of what is where: a text against what it must not be taken for, and words against their patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .clip import DEFAULT_MODEL, DEFAULT_PRETRAINED, Clip, _ClipLoss, load_clip
from .loss import Loss
from .network import moved, per_image
from .phrases import content_words, hard_negatives
from .tokens.features import PatchFeatures
from .words import calibrate, overlap, relation_distance, soft_matches


class ContrastiveText(_ClipLoss):
    """How much more an image looks like other texts than like its own: `-log softmax(cos(image, texts) / T)[0]`.

    The texts are the prompt and its negatives, by default those that share its words and are wrong: "a boot right of a
    bag", "a bag left of a boot" or "a boot" for "a boot left of a bag" (see `hard_negatives`). Its gradient fades once
    the prompt has won, and it asks for what tells the prompt from the others rather than for what they share: alone it
    lets a thing become another that no negative names.

    It is not recommended as a guide: by a judge, scenes of two things are right no more often than by `ClipText`, and
    far less often with a CLIP that knows places well; beside `ClipText` it changes little (benchmark `relations`).

    Args:
        prompt: one text for every image, or a list of B texts, one per image of the batch.
        negatives: what the image must not be taken for, the prompt itself left out, so that those of a list may be each
            other's; None makes them of each prompt.
        model, pretrained: as in `ClipText`, also a list of them: the mean of their losses.
        temperature: T in cosines, above 0; None takes each model's own, 1 over its logit scale.

    Raises:
        ValueError: no negatives follow from a prompt, or those given are none; a text is empty or too long;
            `temperature` is not above 0.
        LookupError, OSError: as in `ClipText`.

    Source: Radford et al. 2021 (arXiv 2103.00020), with the semantic alignment of LG-VQ, Liang et al. 2024 (arXiv
    2405.14206); negatives of the prompt's own words: Yuksekgonul et al. 2023 (arXiv 2210.01936).
    """

    name = "contrast"

    def __init__(
        self,
        prompt: str | Sequence[str],
        negatives: Sequence[str] | None = None,
        *,
        model: str | Sequence[str] = DEFAULT_MODEL,
        pretrained: str | None | Sequence[str | None] = DEFAULT_PRETRAINED,
        temperature: float | None = None,
    ):
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature is above 0, got {temperature}")
        prompts = _texts(prompt)
        given = [negatives] if isinstance(negatives, str) else None if negatives is None else list(negatives)
        rows = [_row(text, given) for text in prompts]
        super().__init__(model, pretrained)
        self.batch = len(prompts)
        longest = max(map(len, rows))
        # rows of fewer texts are filled up with the prompt, which does not count there
        counts = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
        filled = [text for row in rows for text in (*row, *row[:1] * (longest - len(row)))]
        self.targets = []
        for clip in self.clips:
            texts = F.normalize(clip.embed_text(filled), dim=-1).view(len(rows), longest, -1)
            own = 1 / clip.text.logit_scale.detach().exp().item() if temperature is None else float(temperature)
            self.targets.append((texts, counts, own))
        plain = prompt if isinstance(prompt, str) else prompts
        made = [row[1:] for row in rows]
        self.arguments = {"prompt": plain, "negatives": given, **self.settings, "temperature": temperature}
        self.settings = self.arguments | {"negatives": made[0] if isinstance(prompt, str) else made}

    def _judge(self, embedding: torch.Tensor, target: tuple[torch.Tensor, torch.Tensor, float]) -> torch.Tensor:
        texts, counts, temperature = target
        embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        texts = per_image(moved(texts, embedding), len(embedding), "prompts")
        counts = per_image(moved(counts, embedding, torch.bool), len(embedding), "prompts")
        scores = (texts * embedding[:, None]).sum(-1) / temperature
        ahead = (scores[:, 1:] - scores[:, :1]).masked_fill(~counts[:, 1:], -torch.inf).logsumexp(1)
        return F.softplus(ahead)  # log(1 + sum exp): exact also where the prompt has all but won


def _texts(prompt: str | Sequence[str]) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts:
        raise ValueError("a list of prompts must not be empty")
    return texts


def _row(prompt: str, negatives: list[str] | None) -> list[str]:
    """A prompt and its negatives."""
    if negatives is None:
        negatives = hard_negatives(prompt)
        if not negatives:
            raise ValueError(
                f"nothing in '{prompt}' can be swapped or left out for a negative; say how things stand, as in 'a boot "
                "left of a bag', or, in Python, pass negatives="
            )
    others = [text for text in negatives if text != prompt]
    if not others:
        raise ValueError(f"negatives are texts other than the prompt '{prompt}', at least one, got {negatives}")
    return [prompt, *others]


class WordRelation(Loss):
    """Whether the patches that a prompt's words find are as alike as the words, and are not the same ones.

    Words i and j attend to the patches by `softmax_p(cos(word, patch) / tau)` and find their means `y`; the loss is the
    mean over pairs of words of `(cos(y_i, y_j) - (k cos(w_i, w_j) + b))^2` plus `overlap` times the cosine of the two
    attention maps. Only words that name things and their attributes count; with fewer than two it is 0.

    Alone it does not say what is to be seen, only how things are apart: add it to `ClipText`. It is not
    recommended as a guide: there it gained nothing (benchmark `relations`). It asks for patches in
    the space of the texts: a ViT's last patches or a ResNet's last map, projected as its embedding is. Models that pool
    patches by their mean have them by construction, others roughly.

    Args:
        prompt: one text for every image, or a list of B texts, one per image of the batch.
        model, pretrained: as in `ClipText`, one model.
        scale, offset: k and b. Take them from pictures of such things by `calibrated`.
        tau: of the attention, in cosines, above 0; a CLIP tells words from patches by a few hundredths.
        overlap: the weight of the attention's overlap, not negative.
        template: what a word is embedded in, with {} for it.

    Raises:
        ValueError: a setting or text that cannot be; the model's patches are not in the space of its texts.
        LookupError, OSError: as in `ClipText`.

    Source: LG-VQ's relationship alignment, Liang et al. 2024 (arXiv 2405.14206), as guidance; patches as text
    embeddings see them: MaskCLIP, Zhou et al. 2022 (arXiv 2112.01071).
    """

    name = "word-relation"
    pictures = True

    def __init__(
        self,
        prompt: str | Sequence[str],
        *,
        model: str = DEFAULT_MODEL,
        pretrained: str | None = DEFAULT_PRETRAINED,
        scale: float = 1.0,
        offset: float = 0.0,
        tau: float = 0.02,
        overlap: float = 1.0,
        template: str = "a photo of a {}",
    ):
        if not tau > 0 or not 0 <= overlap < float("inf") or "{}" not in template:
            raise ValueError(
                f"tau is above 0, overlap not negative, and a template has {{}}, got {tau}, {overlap} and {template!r}"
            )
        prompts = _texts(prompt)
        self.clip = load_clip(model, pretrained)
        self.patches = PatchFeatures(self.clip)
        self.words = [content_words(text) for text in prompts]
        self.batch = len(prompts)
        longest = max(1, *map(len, self.words))
        self.mask = torch.tensor([[i < len(words) for i in range(longest)] for words in self.words])
        known = list(dict.fromkeys(word for words in self.words for word in words))
        embedded = self.clip.embed_text([template.format(word) for word in known]) if known else torch.zeros(1, 1)
        self.targets = embedded.new_zeros(len(prompts), longest, embedded.shape[1])
        for row, words in zip(self.targets, self.words):
            row[: len(words)] = embedded[[known.index(word) for word in words]]
        self.arguments = {
            "prompt": prompt if isinstance(prompt, str) else prompts,
            "model": str(model),
            "pretrained": self.clip.pretrained,
            "scale": float(scale),
            "offset": float(offset),
            "tau": float(tau),
            "overlap": float(overlap),
            "template": template,
        }
        self.settings = self.arguments | {"words": self.words[0] if isinstance(prompt, str) else self.words}

    def _matched(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Matches, attention, words and mask of images."""
        patches = in_text_space(self.clip, self.patches(image))
        words = per_image(moved(self.targets, patches), len(image), "prompts")
        mask = per_image(moved(self.mask, patches, torch.bool), len(image), "prompts")
        return (*soft_matches(words, patches, self.arguments["tau"]), words, mask)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if not self.mask[:, 1:].any():
            return image.flatten(1).sum(1) * 0
        matches, attention, words, mask = self._matched(image)
        scale, offset, weight = (self.arguments[name] for name in ("scale", "offset", "overlap"))
        return relation_distance(matches, words, mask, scale, offset) + weight * overlap(attention, mask)

    @torch.no_grad()
    def calibrated(self, images: torch.Tensor) -> WordRelation:
        """The same loss with k and b from pictures `(R, 3, H, W)` in [0, 1] that are as the prompts say.

        Of a list of prompts there is one picture per prompt, or a whole number of such batches.

        Raises:
            ValueError: no prompt has two words.
        """
        matches, _, words, mask = self._matched(images)
        scale, offset = calibrate(matches, words, mask)
        return WordRelation(**self.arguments | {"scale": scale, "offset": offset})


def in_text_space(clip: Clip, features: torch.Tensor) -> torch.Tensor:
    """Last patch features `(B, P, d)` of a CLIP's image side, projected as its embedding is, `(B, P, D)`.

    Raises:
        ValueError: it is not known how this network projects them.
    """
    visual: Any = clip.image.network
    projection, pool = getattr(visual, "proj", None), getattr(visual, "attnpool", None)
    if isinstance(projection, torch.Tensor) and len(projection) == features.shape[-1]:
        return features @ moved(projection, features)
    if pool is not None and hasattr(pool, "v_proj"):  # a place's value, as if all attention went to it
        for layer in (pool.v_proj, pool.c_proj):
            features = F.linear(features, moved(layer.weight, features), moved(layer.bias, features))
        return features
    raise ValueError(
        f"the patches of {type(visual).__name__} are not in the space of its texts; take a CLIP with open_clip's own "
        "ViT or ResNet"
    )
