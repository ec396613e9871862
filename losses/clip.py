"""CLIP losses: how far images are from a text or from a picture, by any open_clip model."""

from __future__ import annotations

import difflib
import functools
import logging
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .images import Picture, digest, keep, read_image, read_images
from .loss import Loss
from .network import FrozenNetwork, constant, moved, per_image
from .reading import check_folder, no_code

DEFAULT_MODEL, DEFAULT_PRETRAINED = "ViT-B-32", "openai"
_WITH_WEIGHTS = ("local-dir:", "hf-hub:")  # where open_clip finds the weights by itself


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP: `image` embeds images in [0, 1] (call `embed`), `text` is the whole model, for its text side."""

    image: FrozenNetwork
    text: Any
    tokenizer: Any
    pretrained: str | None

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1] -> embeddings `(B, D)`, not normalised."""
        features = self.image(image)
        return features[0] if isinstance(features, (tuple, list)) else features

    def embed_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Texts -> embeddings `(N, D)`, not normalised.

        Raises:
            ValueError: a text is empty, or longer than the tokenizer takes.
        """
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"a prompt is a text that is not empty, got {prompt!r}")
            length = self.tokenizer.context_length
            tokens = self.tokenizer([prompt], context_length=4 * length)[0]  # open_clip would cut it without a word
            if (tokens[length:] != tokens[-1]).any():  # more than padding beyond the model's length
                raise ValueError(
                    f"the prompt is longer than the {length} tokens that the model takes; shorten it: "
                    f"'{prompt[:60]}{'...' if len(prompt) > 60 else ''}'"
                )
        with torch.no_grad():
            return self.text.encode_text(self.tokenizer(list(prompts)))


def load_clip(model: str = DEFAULT_MODEL, pretrained: str | None = DEFAULT_PRETRAINED) -> Clip:
    """A frozen open_clip model with its own preprocessing, loaded once per process.

    Args:
        model: a name that open_clip lists ('ViT-B-32'), 'demo' (the small model shipped here), a folder with
            `open_clip_config.json` and weights, or open_clip's own 'hf-hub:...' and 'local-dir:...'.
        pretrained: a tag that open_clip lists for the model, or a checkpoint file; only for a model given by name.

    Raises:
        LookupError: open_clip knows no such model or tag.
        ValueError: a name without `pretrained`.
        OSError: the weights cannot be downloaded or read.
    """
    model = os.fspath(model)
    if model == "demo":
        from .demo import clip_folder

        model = os.fspath(clip_folder())
        if not (Path(model) / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"the demo's CLIP model is not where it belongs, '{model}'")
    if (Path(model) / "open_clip_config.json").is_file():
        model = f"local-dir:{Path(model).resolve()}"
    by_name = not model.startswith(_WITH_WEIGHTS)
    return _load_clip(model, os.fspath(pretrained) if by_name and pretrained is not None else None)


@functools.cache
def _load_clip(model: str, pretrained: str | None) -> Clip:
    import open_clip

    quick_gelu = False
    if not model.startswith(_WITH_WEIGHTS):
        given, model = model, model.replace("/", "-")  # OpenAI writes ViT-B/32
        if model not in open_clip.list_models():
            close = difflib.get_close_matches(model, ["demo", *open_clip.list_models()], n=3, cutoff=0.4)
            raise LookupError(
                f"open_clip has no model '{given}', and it is no folder with open_clip_config.json"
                + (f"; close to it: {', '.join(close)}" if close else "")
            )
        if pretrained is None:
            raise ValueError(f"model '{model}' needs pretrained=, a tag or a checkpoint file; or pass model='demo'")
        tags = open_clip.list_pretrained_tags_by_model(model)
        if not os.path.isfile(pretrained) and pretrained not in tags:
            raise LookupError(
                f"'{pretrained}' is neither a file nor a pretrained tag of '{model}', which has: "
                f"{', '.join(tags) or 'none'}"
            )
        # Some tags (openai) were trained with another activation than the plain name stands for; open_clip only warns.
        quick_gelu = bool(open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False))
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # open_clip logs at length what the error below says once
    try:
        if model.startswith("local-dir:"):
            check_folder(model.removeprefix("local-dir:"))
        with no_code():
            network = open_clip.create_model(
                model, pretrained=pretrained, force_quick_gelu=quick_gelu, require_pretrained=True
            )
        text = (open_clip.get_model_config(model) or {}).get("text_cfg", {})
        # a model's folder or repository may ask for code of its own to be run
        safe = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
        tokenizer = open_clip.get_tokenizer(model, **safe)
    except Exception as error:
        weights = f" with '{pretrained}'" if pretrained else ""
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise OSError(
            f"the CLIP model '{model}'{weights} could not be loaded or downloaded ({reason}); pass a local checkpoint "
            "as pretrained=, a local folder as model=, or model='demo'"
        ) from error
    finally:
        logging.disable(disabled)
    network.eval().requires_grad_(False)
    config = open_clip.get_model_preprocess_cfg(network)
    image = FrozenNetwork(network.visual, size=config["size"], mean=config["mean"], std=config["std"])
    return Clip(image, network, tokenizer, pretrained)


def _cosine(embedding: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 1 - (embedding * target).sum(-1)


def _spherical(embedding: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # 2 arcsin(||a - b|| / 2)^2 = angle^2 / 2; by arctan2 the slope stays finite for opposite and equal directions
    chord, other = (torch.linalg.vector_norm(v, dim=-1) for v in (embedding - target, embedding + target))
    return 2 * torch.atan2(chord, other).square()


_DISTANCES = {"cosine": _cosine, "spherical": _spherical}


class _ClipLoss(Loss):
    pictures = True

    def __init__(self, model: str | Sequence[str], pretrained: str | None | Sequence[str | None]):
        single = isinstance(model, (str, os.PathLike))
        models = [model] if single else list(model)
        same = pretrained is None or isinstance(pretrained, (str, os.PathLike))
        tags = [pretrained] * len(models) if same else list(pretrained)
        if not models or len(tags) != len(models):
            raise ValueError(
                f"a list of models, not empty, takes one pretrained for all, or a list of one each, got {models!r} and "
                f"{pretrained!r}"
            )
        self.clips = [load_clip(one, tag) for one, tag in zip(models, tags)]
        names, tags = [os.fspath(one) for one in models], [clip.pretrained for clip in self.clips]
        self.settings = {"model": names[0] if single else names, "pretrained": tags[0] if single else tags}
        self.targets: list[Any]  # one of each model, as `_judge` takes it

    def _judge(self, embedding: torch.Tensor, target: Any) -> torch.Tensor:
        raise NotImplementedError

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.clips, self.targets, strict=True)
        losses = [self._judge(F.normalize(clip.embed(image), dim=-1), target) for clip, target in pairs]
        return sum(losses) / len(losses)


class _ClipDistance(_ClipLoss):
    """The weighted sum of the distances from targets `(1 or B, K, D)`."""

    def __init__(self, model: str | Sequence[str], pretrained: str | None | Sequence[str | None], distance: str):
        if distance not in _DISTANCES:
            raise ValueError(f"distance is one of {', '.join(_DISTANCES)}, got {distance!r}")
        super().__init__(model, pretrained)
        self.settings["distance"] = distance
        self._distance = _DISTANCES[distance]
        self.weights = [1.0]

    def _judge(self, embedding: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = per_image(moved(target, embedding), len(embedding), "targets")
        return (self._distance(embedding[:, None], target) * constant(self.weights, embedding)).sum(1)


class ClipText(_ClipDistance):
    """The distance of an image from a text in CLIP's space: `1 - cos(image, text)`.

    `distance='spherical'`: `2 arcsin(||image - text|| / 2)^2` of the unit embeddings (half the squared angle).
    Several texts with weights: the sum of `weight * distance`. Texts to keep away from add
    `negative_weight * distance(image, -negative)`, which is `1 + cos(image, negative)` or half the square of what the
    angle lacks to pi: never negative, and strongest for an image that is just what is not wanted.

    Args:
        prompt: one text for every image; several with their weights, `{"a red fox": 1.0, "snow": 0.5}`, for every
            image; or a list of B texts, one per image of the batch.
        model, pretrained: any open_clip model: a name with a pretrained tag or a checkpoint file; a folder with
            `open_clip_config.json`; or 'demo', the small model shipped here (`pretrained` is for names only). A list
            of models: the mean of their losses; `pretrained` is then one for all or a list.
        distance: 'cosine', in [0, 2], or 'spherical', in [0, pi^2 / 2].
        negative: a text to keep every image away from, or several.
        negative_weight: of each of them, not negative.

    Raises:
        ValueError: a text is empty or longer than the tokenizer takes, or a weight is negative or not finite.
        LookupError: no such model or tag.
        OSError: the weights cannot be downloaded or read.

    Source: Radford et al. 2021 (arXiv 2103.00020); the spherical distance, weighted texts and several models: Crowson
    et al. 2022 (arXiv 2204.08583).
    """

    name = "clip-text"

    def __init__(
        self,
        prompt: str | Sequence[str] | Mapping[str, float],
        *,
        model: str | Sequence[str] = DEFAULT_MODEL,
        pretrained: str | None | Sequence[str | None] = DEFAULT_PRETRAINED,
        distance: str = "cosine",
        negative: str | Sequence[str] | None = None,
        negative_weight: float = 1.0,
    ):
        super().__init__(model, pretrained, distance)
        if isinstance(prompt, Mapping):
            prompt = {text: _weight(weight, text) for text, weight in prompt.items()}
            wanted, self.weights = [list(prompt)], list(prompt.values())
        else:
            prompt = prompt if isinstance(prompt, str) else list(prompt)
            wanted = [[prompt]] if isinstance(prompt, str) else [[text] for text in prompt]
        if not prompt and not isinstance(prompt, str):
            raise ValueError("a list of prompts must not be empty")
        unwanted = [negative] if isinstance(negative, str) else list(negative or [])
        self.weights = [*self.weights, *(_weight(negative_weight, "negative") for _ in unwanted)]
        self.targets = [_directions(clip, wanted, unwanted) for clip in self.clips]
        self.batch = len(wanted)
        self.settings = {"prompt": prompt, **self.settings}
        if unwanted:
            negative = negative if isinstance(negative, str) else unwanted
            self.settings |= {"negative": negative, "negative_weight": float(negative_weight)}
        self.arguments = self.settings


def _weight(weight: Any, of: str) -> float:
    if not isinstance(weight, numbers.Real) or not 0 <= weight < float("inf"):
        raise ValueError(
            f"the weight of '{of}' is a number, finite and not negative, got {weight!r}; what to keep away from is "
            "negative="
        )
    return float(weight)


def _directions(clip: Clip, wanted: Sequence[Sequence[str]], unwanted: Sequence[str]) -> torch.Tensor:
    """Unit vectors to be near to: `(B, K, D)` of B rows of K texts, those that are not wanted turned about."""
    flat = F.normalize(clip.embed_text([text for row in wanted for text in row]), dim=-1)
    rows = flat.view(len(wanted), -1, flat.shape[-1])
    if not unwanted:
        return rows
    away = -F.normalize(clip.embed_text(unwanted), dim=-1)
    return torch.cat([rows, away.expand(len(rows), -1, -1)], 1)


class ClipImage(_ClipDistance):
    """The distance of an image from a picture in CLIP's space: `1 - cos(image, picture)`.

    Args:
        picture: a path, a Pillow image, or a tensor `(3, H, W)` in [0, 1].
        model, pretrained, distance: as in `ClipText`.

    Raises:
        FileNotFoundError, ValueError: the picture cannot be read.
        LookupError, OSError: as in `ClipText`.

    Source: Radford et al. 2021 (arXiv 2103.00020).
    """

    name = "clip-image"

    def __init__(
        self,
        picture: Picture,
        *,
        model: str | Sequence[str] = DEFAULT_MODEL,
        pretrained: str | None | Sequence[str | None] = DEFAULT_PRETRAINED,
        distance: str = "cosine",
    ):
        super().__init__(model, pretrained, distance)
        picture = keep(picture)
        with torch.no_grad():
            image = read_image(picture)[None]
            self.targets = [F.normalize(clip.embed(image), dim=-1)[:, None] for clip in self.clips]
        self.settings = {"picture": digest(picture), **self.settings}
        self.arguments = self.settings | {"picture": picture}


class ClipDirection(_ClipLoss):
    """How far an image's change from a picture is from the change between two texts, in CLIP's space.

    `1 - cos(E(image) - E(picture), E(target) - E(source))` of the unit embeddings E, in [0, 2]. Of the picture itself
    it is 1, and there its gradient is finite: the length of the change counts as `sqrt(length^2 + 0.001^2)`.

    Args:
        source: the text that describes the picture, "a photo".
        target: the text that describes what is wanted, "a watercolour".
        picture: what to start from: a path, a Pillow image, or a tensor `(3, H, W)` in [0, 1]; a list of B of them,
            or a tensor `(B, 3, H, W)`, is one per image of the batch.
        model, pretrained: as in `ClipText`.

    Raises:
        ValueError: as in `ClipText`; or the two texts are the same to the model.
        FileNotFoundError, ValueError: a picture cannot be read.
        LookupError, OSError: as in `ClipText`.

    Source: StyleGAN-NADA, Gal et al. 2022 (arXiv 2108.00946).
    """

    name = "clip-direction"
    shortest = 1e-3

    def __init__(
        self,
        source: str,
        target: str,
        picture: Picture | Sequence[Picture],
        *,
        model: str | Sequence[str] = DEFAULT_MODEL,
        pretrained: str | None | Sequence[str | None] = DEFAULT_PRETRAINED,
    ):
        super().__init__(model, pretrained)
        picture = keep(picture)
        images = read_images(picture)
        self.batch = len(images)
        self.targets = []
        for clip in self.clips:
            before, after = F.normalize(clip.embed_text([source, target]), dim=-1)
            if torch.linalg.vector_norm(after - before) < 1e-5:
                raise ValueError(f"'{source}' and '{target}' are the same to the model: there is no direction")
            with torch.no_grad():
                start = torch.cat([F.normalize(clip.embed(image[None]), dim=-1) for image in images])
            self.targets.append((start, F.normalize(after - before, dim=-1)))
        self.settings = {"source": source, "target": target, "picture": digest(picture), **self.settings}
        self.arguments = self.settings | {"picture": picture}

    def _judge(self, embedding: torch.Tensor, target: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        start, direction = (moved(one, embedding) for one in target)
        change = embedding - per_image(start, len(embedding), "pictures")
        length = (change.square().sum(-1) + self.shortest**2).sqrt()
        return 1 - (change @ direction) / length
