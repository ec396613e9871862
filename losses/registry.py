"""Losses by name, as the command line takes them: `2.0*clip-text:an ankle boot`."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .aesthetic import Aesthetic
from .classifier import ClassLabel
from .clip import DEFAULT_PRETRAINED, ClipImage, ClipText
from .color import Color
from .contrastive import ContrastiveText
from .loss import Composable, Losses, as_losses
from .perceptual import Perceptual
from .regular import Symmetry, TotalVariation
from .sketch import Sketch
from .style import Style
from .tokens import Codebook, FeatureLoss, PatchFeatures, TokenHistogramLoss, TokenLoss


class Entry(NamedTuple):
    """A loss that can be named: what it does, an example of how it is written (or that it is for Python), and what it
    needs beside the package itself."""

    name: str
    description: str
    example: str
    needs: str = ""


_CLIP = "open_clip's weights"
_ALEX = "torchvision's AlexNet weights"
_CODEBOOK = "a codebook that Codebook.save wrote, and the weights of its encoder"
_FOLDER = "a network; from a folder: transformers"
_ENTRIES = (
    Entry("clip-text", "a text, by CLIP", "clip-text:an ankle boot", _CLIP),
    Entry("contrast", "a text against its words in other places, by CLIP", "contrast:a boot left of a bag", _CLIP),
    Entry("clip-image", "a picture's content, by CLIP", "clip-image:photo.png", _CLIP),
    Entry("class-label", "a class of the demo classifier, by index or name", "class-label:9"),
    Entry("style", "a picture's style, by Gram matrices", "style:candy.jpg", "torchvision's VGG-16 weights"),
    Entry(
        "color", "a mean colour, a palette, or a picture's colours", "color:red, color:#ff0000,#00ff00, color:photo.png"
    ),
    Entry("perceptual", "a picture as people see it, by LPIPS (AlexNet)", "perceptual:photo.png", _ALEX),
    Entry("features", "what a picture shows where, by CLIP's patches", "features:photo.png", _CLIP),
    Entry("token", "the same in the words of a codebook", "token:codebook_folder@photo.png", _CODEBOOK),
    Entry("token-histogram", "as many of each word, wherever", "token-histogram:codebook_folder@photo.png", _CODEBOOK),
    Entry(
        "aesthetic",
        "LAION's aesthetic score, by a head's file on CLIP ViT-L/14",
        "aesthetic:head.pth",
        "LAION's head, CLIP ViT-L/14",
    ),
    Entry("sketch", "a drawing's lines, by the picture's edges", "sketch:drawing.png"),
    Entry("symmetry", "left like right, or top like bottom", "symmetry, symmetry:vertical"),
    Entry("total-variation", "smoothness from pixel to pixel", "total-variation, total-variation:anisotropic"),
    Entry("file.py:function", "your own: (images (B, 3, H, W) in [0, 1]) -> (B,)", "my_losses.py:darkness"),
    Entry(
        "segmentation",
        "a layout of classes, by any segmentation network",
        "in Python: Segmentation(network, target)",
        _FOLDER,
    ),
    Entry(
        "clip-direction",
        "a picture's change along that from one text to another, by CLIP",
        "in Python: ClipDirection('a photo', 'a watercolour', picture)",
        _CLIP,
    ),
    Entry(
        "word-relation",
        "words that find different things, as alike as the words, by CLIP's patches",
        "in Python: WordRelation('a boot left of a bag').calibrated(pictures)",
        _CLIP,
    ),
    Entry(
        "saliency",
        "where the foreground is, by any saliency network",
        "in Python: Saliency(network, 'disc')",
        "a network",
    ),
    Entry("depth", "what is near and far, by any depth network", "in Python: Depth(network, picture)", _FOLDER),
    Entry("landmarks", "where points of a face or body are", "in Python: Landmarks(network, points)", "a network"),
    Entry(
        "detection", "a thing in a box, by any object detector", "in Python: Detection(network, label, box)", _FOLDER
    ),
    Entry(
        "face-identity",
        "whose face it is, by any face network",
        "in Python: FaceIdentity(network, picture)",
        "a network; by name: facenet-pytorch",
    ),
    Entry(
        "attribute",
        "what it has and has not, by a head over features",
        "in Python: Attribute(network, head, {'smiling': (31, 1)})",
        "a network and a head",
    ),
    Entry("measurement", "agreement with a measurement", "in Python: Measurement(operators.Inpaint(mask), y)"),
    Entry("frames", "any of them on the frames of a video", "in Python: Frames(loss)"),
    Entry("diversity", "pictures of a batch that differ", "in Python: Diversity()"),
)
_ALONE = ("symmetry", "total-variation")  # the argument may be left out
_PYTHON_ONLY = (
    *("segmentation", "clip-direction", "word-relation", "measurement", "frames", "diversity"),
    *("saliency", "depth", "landmarks", "detection", "face-identity", "attribute"),
)

OWN_MODULE = "_lossguide_"  # what the names of modules from the user's files begin with
_WEIGHT = re.compile(r"\s*([^*:\s]+)\s*\*\s*(.*)", re.DOTALL)
_FILE = re.compile(r"(.+\.py):(\w+)")


def available() -> list[Entry]:
    """`(name, description, example)` of each loss, in the order to show them."""
    return list(_ENTRIES)


def parse(
    text: str | Sequence[str],
    *,
    clip_model: str = "demo",
    clip_pretrained: str | None = DEFAULT_PRETRAINED,
    style_weights: str | None = None,
) -> Losses:
    """The loss that a text names, `[weight*]name:argument`; of several texts, their sum.

    Args:
        text: 'clip-text:a boot', 'clip-image:photo.png', 'class-label:9', 'style:candy.jpg', 'color:red' (with commas
            a palette; or a picture), or 'path/to/file.py:function', the user's own. A weight may stand in front:
            '2.0*clip-text:a boot'. `available` tells the others.
        clip_model, clip_pretrained: the model of clip-text, contrast and clip-image, and of style, as in `ClipText`.
        style_weights: a file of VGG-16 weights; with it, style takes its features from VGG-16.

    Raises:
        LookupError: there is no such loss, or no such function in the file.
        ValueError: the text has another form, or its argument does not suit the loss.
        OSError: a file cannot be read, or weights cannot be downloaded.
    """
    if not isinstance(text, str):
        if not text:
            raise ValueError("no loss was given")
        return sum(
            (
                parse(t, clip_model=clip_model, clip_pretrained=clip_pretrained, style_weights=style_weights)
                for t in text
            ),
            start=Losses(()),
        )
    clip = {"model": clip_model, "pretrained": clip_pretrained}
    style = {"backbone": "clip", **clip} if style_weights is None else {"weights": style_weights}
    makers: dict[str, Callable[[str], Composable]] = {
        "clip-text": lambda argument: ClipText(argument, **clip),
        "contrast": lambda argument: ContrastiveText(argument, **clip),
        "clip-image": lambda argument: ClipImage(argument, **clip),
        "class-label": lambda argument: ClassLabel(int(argument) if re.fullmatch(r"[+-]?\d+", argument) else argument),
        "style": lambda argument: Style(argument, **style),
        "color": _color,
        "perceptual": lambda argument: Perceptual(argument),
        "features": lambda argument: FeatureLoss(_clip_patches(clip_model, clip_pretrained), argument),
        "token": lambda argument: TokenLoss(*_in_words("token", argument)),
        "token-histogram": lambda argument: TokenHistogramLoss(*_in_words("token-histogram", argument)),
        "aesthetic": lambda argument: Aesthetic(argument),
        "sketch": lambda argument: Sketch(argument),
        "symmetry": lambda argument: Symmetry(argument) if argument else Symmetry(),
        "total-variation": lambda argument: TotalVariation(argument) if argument else TotalVariation(),
    }
    weight, body = _split_weight(text)
    name, colon, argument = (part.strip() for part in body.partition(":"))
    if name in _PYTHON_ONLY:
        example = next(entry.example for entry in _ENTRIES if entry.name == name)
        raise ValueError(f"'{name}' needs more than a text can say; use it {example}")
    own = _FILE.fullmatch(body)
    if own and name not in makers:
        return weight * as_losses(_own_function(Path(own[1]), own[2]))
    if name not in makers:
        close = difflib.get_close_matches(name, makers, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(makers)} and path/to/file.py:function"
        raise LookupError(f"there is no loss '{name}'; {hint}")
    if not argument and (colon or name not in _ALONE):
        example = next(entry.example for entry in _ENTRIES if entry.name == name)
        raise ValueError(f"'{name}' needs an argument after a colon, such as '{example}', got '{text}'")
    return weight * as_losses(makers[name](argument))


def _split_weight(text: str) -> tuple[float, str]:
    match = _WEIGHT.fullmatch(text)
    if not match:
        return 1.0, text.strip()
    try:
        weight = float(match[1])
    except ValueError:
        raise ValueError(f"the weight in '{text}' is a number before '*', such as 2.0, got '{match[1]}'") from None
    if not 0 <= weight < float("inf"):
        raise ValueError(f"the weight in '{text}' is finite and not negative, got {match[1]}")
    return weight, match[2].strip()


def _color(argument: str) -> Color:
    outside = re.split(r",(?![^(]*\))", argument)  # commas within rgb(...) stay
    return Color([part.strip() for part in outside] if len(outside) > 1 else argument)


def _clip_patches(model: str, pretrained: str | None) -> PatchFeatures:
    if model == "demo" or (Path(model) / "open_clip_config.json").is_file():
        return PatchFeatures(model)
    if model.startswith(("hf-hub:", "local-dir:")):
        return PatchFeatures(f"open_clip:{model}")
    return PatchFeatures(f"open_clip:{model.replace('/', '-')}/{pretrained or ''}")  # OpenAI writes ViT-B/32


def _in_words(name: str, argument: str) -> tuple[Codebook, str]:
    folder, at, picture = argument.partition("@")
    if not (at and folder and picture):
        raise ValueError(f"'{name}' needs a codebook's folder and a picture, '{name}:codebook_folder@photo.png'")
    return Codebook.load(folder), picture


def _own_function(path: Path, function: str) -> Composable | Callable:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}' to take the loss '{function}' from")
    spec = importlib.util.spec_from_file_location(f"{OWN_MODULE}{path.stem}_{abs(hash(path.resolve()))}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"'{path}' cannot be run: {type(error).__name__}: {error}") from error
    own = getattr(module, function, None)
    if own is None:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        close = difflib.get_close_matches(function, names, n=1)
        raise LookupError(f"'{path}' has no '{function}'" + (f"; did you mean '{close[0]}'?" if close else ""))
    if not callable(own):
        raise ValueError(f"'{function}' in '{path}' is not callable; a loss maps images (B, 3, H, W) to (B,)")
    if isinstance(own, type):
        raise ValueError(f"'{function}' in '{path}' is a class; in that file, make one: {function}(...), and name that")
    return own
