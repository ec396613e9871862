"""CLIP losses: how far images are from a text or from a picture, by any open_clip model."""

from __future__ import annotations

import difflib
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .images import Picture, digest, keep, read_image
from .loss import Loss
from .network import FrozenNetwork, per_image

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

    def __init__(self, model: str, pretrained: str | None, distance: str):
        if distance not in _DISTANCES:
            raise ValueError(f"distance is one of {', '.join(_DISTANCES)}, got {distance!r}")
        self.clip = load_clip(model, pretrained)
        self._distance = _DISTANCES[distance]
        self.settings = {"model": os.fspath(model), "pretrained": self.clip.pretrained, "distance": distance}
        self.target: torch.Tensor

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        target = per_image(self.target, len(image), "targets").to(image)
        return self._distance(F.normalize(self.clip.embed(image), dim=-1), target)


class ClipText(_ClipLoss):
    """The distance of an image from a text in CLIP's space: `1 - cos(image, text)`.

    `distance='spherical'`: `2 arcsin(||image - text|| / 2)^2` of the unit embeddings (half the squared angle).

    Args:
        prompt: one text for every image, or a list of B texts, one per image of the batch.
        model, pretrained: any open_clip model: a name with a pretrained tag or a checkpoint file; a folder with
            `open_clip_config.json`; or 'demo', the small model shipped here (`pretrained` is for names only).
        distance: 'cosine', in [0, 2], or 'spherical', in [0, pi^2 / 2].

    Raises:
        ValueError: the prompt is empty or longer than the tokenizer takes.
        LookupError: no such model or tag.
        OSError: the weights cannot be downloaded or read.

    Source: Radford et al. 2021 (arXiv 2103.00020); the spherical distance: Crowson et al. 2022 (arXiv 2204.08583).
    """

    name = "clip-text"

    def __init__(
        self,
        prompt: str | Sequence[str],
        *,
        model: str = DEFAULT_MODEL,
        pretrained: str | None = DEFAULT_PRETRAINED,
        distance: str = "cosine",
    ):
        super().__init__(model, pretrained, distance)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("a list of prompts must not be empty")
        self.target = F.normalize(self.clip.embed_text(prompts), dim=-1)
        self.batch = len(prompts)
        self.settings = {"prompt": prompt if isinstance(prompt, str) else prompts, **self.settings}
        self.arguments = self.settings


class ClipImage(_ClipLoss):
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
        model: str = DEFAULT_MODEL,
        pretrained: str | None = DEFAULT_PRETRAINED,
        distance: str = "cosine",
    ):
        super().__init__(model, pretrained, distance)
        picture = keep(picture)
        with torch.no_grad():
            self.target = F.normalize(self.clip.embed(read_image(picture)[None]), dim=-1)
        self.settings = {"picture": digest(picture), **self.settings}
        self.arguments = self.settings | {"picture": picture}
