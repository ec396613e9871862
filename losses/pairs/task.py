"""What was done to some pictures, found from examples before and after, as a loss for other pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ..images import Picture, read_image, read_images
from ..loss import Loss
from ..measurement import Measurement
from ..operators import Chain, Filter, Inpaint, Operator, SuperResolution
from ..reading import first_line, read_json, read_tensors
from .choice import MODES, Found, Score, choose
from .features import Analogy, Direction, Encoder
from .mask import Holes

FORMAT = 1
SETTINGS, TENSORS = "pairs.json", "pairs.safetensors"


@dataclass(frozen=True, eq=False)
class PairTask:
    """What example pairs have in common: `PairTask.fit(pairs).loss(query)`.

    Modes. "operator": one picture of a pair is the other through a colour matrix, a kernel, a reduction or holes, with
    noise. "direction": the pairs change a network's features in one direction. "analogy": patches that look alike
    before look alike after.

    Attributes:
        mode: "operator", "direction" or "analogy".
        way: of an operator: "restore", it makes the picture before of the one after, as of a blurred picture before and
            a sharp one after; "apply", it makes the one after of the one before, and so the answer of the query. Else
            "change".
        family: what the operator is, or what the mode works with.
        operator: of pictures; `operator(answer)` is the query to "restore", `operator(query)` the answer to "apply".
            None in the other modes, and where the holes are those of the query.
        sigma: standard deviation of the noise that the operator leaves unexplained, in [0, 1]; None in other modes.
        ratio: an answer's side over its query's: 4 where a picture four times as large is asked for.
        pairs: how many pairs it was found from.
        inverse: whether they were taken the other way round.
        scores: every mode and family that was tried, on what it was not fitted to.
    """

    found: Found
    scores: tuple[Score, ...]
    pairs: int
    inverse: bool
    encoder: Encoder | None = None

    mode = property(lambda self: self.found.mode)
    way = property(lambda self: self.found.way)
    family = property(lambda self: self.found.family)
    operator = property(lambda self: self.found.operator)
    sigma = property(lambda self: self.found.sigma)
    ratio = property(lambda self: self.found.ratio)

    @classmethod
    def fit(
        cls,
        pairs: Sequence[tuple[Picture, Picture]],
        encoder: Callable[[torch.Tensor], Any] | None = None,
        mode: str = "auto",
        *,
        inverse: bool = False,
        size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> PairTask:
        """The mode and family that explain pairs left out of the fit; of one pair, a half is left out.

        Args:
            pairs: (before, after), one or more: paths, Pillow images or tensors `(3, H, W)` in [0, 1]. For an operator
                a pair's pictures may differ in size, by one whole factor.
            encoder: for the modes "direction" and "analogy": a frozen network, images `(B, 3, h, w)` -> features
                `(B, d)`, a map `(B, c, h, w)`, or (features, patches); patches are `(B, P, c)` or a map.
            mode: "auto" takes an operator where one explains the pairs, and else, with an encoder, what agrees most
                from pair to pair; or one of the three.
            inverse: the other way round: queries are like the pictures after, answers like those before.
            size, mean, std: the encoder's preprocessing of images in [0, 1].

        Raises:
            ValueError: no mode explains the pairs, or not the one asked for; or a picture, `mode` or the encoder is not
                what it should be.
            FileNotFoundError: a picture is not there.

        Source: for the direction, StyleGAN-NADA, Gal et al. 2022 (arXiv 2108.00946), with pictures for texts; for the
        analogy, Hertzmann et al. 2001; for the task, VisualCloze, Li et al. 2025 (arXiv 2504.07960).
        """
        if mode not in ("auto", *MODES):
            raise ValueError(f"mode is one of auto, {', '.join(MODES)}, got {mode!r}")
        if mode in ("direction", "analogy") and encoder is None:
            raise ValueError(f"mode '{mode}' needs an encoder, images (B, 3, h, w) -> features (B, d)")
        pictures = _read(pairs)
        if mode in ("auto", "operator") and all(torch.equal(before, after) for before, after in pictures):
            raise ValueError("the pairs show no change: each picture before is the picture after")
        if inverse:
            pictures = [(after, before) for before, after in pictures]
        eyes = None if encoder is None else Encoder(encoder, size, mean, std)
        found, scores = choose(pictures, eyes, mode)
        return cls(found, tuple(scores), len(pictures), inverse, eyes)

    def loss(self, query: Picture | Sequence[Picture]) -> Loss:
        """What the answers to queries should be: a `Measurement` in operator mode, with the noise's floor.

        Args:
            query: a picture like those before (after, where inverse), or B of one size: a list, or `(B, 3, h, w)`.

        Raises:
            ValueError: queries differ in size, or have no holes where the pairs have; the encoder is missing.
        """
        pictures = read_images(query)
        if len({picture.shape for picture in pictures}) > 1:
            raise ValueError("queries of one loss have one size; make a loss for each")
        q = torch.stack([picture.float() for picture in pictures])
        if self.mode == "operator":
            return self._measurement(q.cpu())
        if self.encoder is None:
            raise ValueError(f"a loss of the mode '{self.mode}' needs the encoder: PairTask.load(folder, encoder=...)")
        tensors = self.found.tensors
        if self.mode == "direction":
            return Direction(self.encoder, q, tensors["direction"], float(tensors["radius"]))
        return Analogy(self.encoder, q, tensors["before"], tensors["after"])

    def _measurement(self, q: torch.Tensor) -> Measurement:
        holes, operator = self.found.holes, self.operator
        if self.way == "apply":
            if holes is not None and q.shape[-2:] != holes.holes.shape:
                size = " x ".join(map(str, holes.holes.shape))
                raise ValueError(f"where the holes come is known for pictures of {size} pixels, got {tuple(q.shape)}")
            answer = operator(q) if holes is None else torch.where(holes.holes, holes.fill.view(-1, 1, 1), q)
            return Measurement(Filter(torch.ones(1, 1, 1)), answer, self.sigma)
        if holes is not None:
            return Measurement(Inpaint(holes.seen(q)), q, self.sigma)
        if isinstance(operator, Filter) and operator.offset is not None:  # what remains is linear
            q = q - operator.offset.view(-1, 1, 1)
            operator = Filter(operator.kernel, operator.stride, operator.padding)
        return Measurement(operator, q, self.sigma)

    def answer_size(self, query: Picture) -> tuple[int, int]:
        """Height and width of the answer to a query."""
        height, width = read_image(query).shape[-2:]
        return round(height * self.ratio), round(width * self.ratio)

    def report(self) -> str:
        """What was found, and how every mode and family did on what it was not fitted to."""
        count = f"{self.pairs} pair{'s' * (self.pairs > 1)}" + (", taken the other way round" if self.inverse else "")
        lines = [f"{self.mode}: {self.family}", f"from {count}", *self.found.told(), "", "tried, on what was left out:"]
        width = max(len(score.name) for score in self.scores) if self.scores else 0
        for score in self.scores:
            lines.append(f"  {score.name:{width}}  {score.told}" + ("  <- chosen" if score.chosen else ""))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"PairTask(mode={self.mode!r}, family={self.family!r}, pairs={self.pairs})"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `pairs.json` and `pairs.safetensors`; an encoder is code, and is not saved."""
        folder, found = Path(folder), self.found
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in found.tensors.items()}
        data = {
            "format": FORMAT,
            "mode": found.mode,
            "way": found.way,
            "family": found.family,
            "sigma": found.sigma,
            "ratio": found.ratio,
            "notes": list(found.notes),
            "operator": _written(found, tensors),
            "pairs": self.pairs,
            "inverse": self.inverse,
            "encoder": None if self.encoder is None or found.mode == "operator" else self.encoder.name,
            "scores": [vars(score) for score in self.scores],
        }
        (folder / TENSORS).write_bytes(safetensors.torch.save(tensors))
        (folder / SETTINGS).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        encoder: Callable[[torch.Tensor], Any] | None = None,
        *,
        size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> PairTask:
        """What `save` wrote; the modes "direction" and "analogy" need their encoder again for a loss.

        Raises:
            FileNotFoundError: there is nothing of the kind in the folder.
            ValueError: the files are not what `save` writes, or the encoder is not the one that the task was fitted
                with.
        """
        folder = Path(folder)
        for name in (SETTINGS, TENSORS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"there is no {name} in '{folder}'; PairTask.save writes it")
        try:
            data, tensors = read_json(folder / SETTINGS), read_tensors(folder / TENSORS)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, and this version reads {FORMAT}")
            _check(data, tensors)
            operator, holes = _opened(data["operator"], tensors)
            fields = {name: data[name] for name in _FIELDS}
            found = Found(**fields, operator=operator, holes=holes, notes=tuple(data["notes"]), tensors=tensors)
            scores = tuple(Score(**score) for score in data["scores"])
            task = cls(found, scores, data["pairs"], data["inverse"])
            task.report()
        except Exception as error:
            raise ValueError(f"'{folder}' does not hold what PairTask.save writes: {first_line(error)}") from error
        if encoder is None or found.mode == "operator":
            return task
        eyes = Encoder(encoder, size, mean, std)
        found.check(eyes)
        return cls(found, scores, task.pairs, task.inverse, eyes)


_FIELDS = ("mode", "way", "family", "sigma", "ratio")
_WAYS = {"operator": ("restore", "apply"), "direction": ("change",), "analogy": ("change",)}
_NEEDED = {"direction": ("direction", "radius"), "analogy": ("before", "after"), "operator": ()}


def _check(data: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError, TypeError or KeyError where a file's values are not of the kind that `save` writes."""
    mode, sigma, ratio = data["mode"], data["sigma"], data["ratio"]
    if mode not in MODES or data["way"] not in _WAYS[mode] or (mode == "operator") != isinstance(sigma, (int, float)):
        raise ValueError(f"the mode {mode!r}, the way {data['way']!r} and the noise {sigma!r} do not go together")
    if not 0 < ratio <= 64 or (sigma is not None and not 0 <= sigma < math.inf):
        raise ValueError(f"the ratio {ratio!r} and the noise {sigma!r} are not positive numbers")
    texts = [data["family"], *data["notes"], *(score[key] for score in data["scores"] for key in ("name", "told"))]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is not one")
    if type(data["pairs"]) is not int or data["pairs"] < 1 or type(data["inverse"]) is not bool:
        raise ValueError(f"it tells of {data['pairs']!r} pairs, inverse {data['inverse']!r}")
    missing = [name for name in _NEEDED[mode] if name not in tensors]
    if missing:
        raise ValueError(f"{TENSORS} lacks {', '.join(missing)}")
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"the tensor {name} holds values that are not finite")


def _read(pairs: Sequence[tuple[Picture, Picture]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if not isinstance(pairs, (list, tuple)) or not pairs:
        raise ValueError("pairs is a list of (before, after) pictures, at least one")
    read = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"pair {i + 1} is not two pictures, (before, after)")
        before, after = (read_image(one).float() for one in pair)
        if min(*before.shape[-2:], *after.shape[-2:]) < 2:
            raise ValueError(f"pair {i + 1} holds a picture of less than 2 x 2 pixels")
        if not (before.isfinite().all() and after.isfinite().all()):
            raise ValueError(f"pair {i + 1} holds values that are not finite")
        read.append((before, after))
    return read


def _written(found: Found, tensors: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """The operator as plain data; its tensors go to the others."""
    operator, holes = found.operator, found.holes
    if holes is not None:
        tensors["fill"] = holes.fill.contiguous()
        if holes.holes is not None:
            tensors |= {"holes": holes.holes.contiguous(), "shown": holes.shown.contiguous()}
        return {"kind": "holes"}
    if operator is None:
        return None
    clipped = isinstance(operator, Chain)
    operator = operator.operators[0] if clipped else operator
    data: dict[str, Any] = {"clipped": clipped}
    if isinstance(operator, SuperResolution):
        return data | {"kind": "SuperResolution", **operator.arguments}
    tensors["kernel"] = operator.kernel.contiguous()
    if operator.offset is not None:
        tensors["offset"] = operator.offset.contiguous()
    return data | {"kind": "Filter", "stride": operator.stride, "padding": operator.padding}


def _opened(data: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> tuple[Operator | None, Holes | None]:
    from ..operators import Clip

    if data is None:
        return None, None
    if data["kind"] == "holes":
        holes, shown, fill = tensors.pop("holes", None), tensors.pop("shown", None), tensors.pop("fill")
        maps = [one for one in (holes, shown) if one is not None]
        if fill.shape != (3,) or any(one.ndim != 2 or one.dtype != torch.bool for one in maps) or len(maps) == 1:
            raise ValueError("the holes are no maps (H, W) with a colour (3,)")
        operator = None if holes is None else Inpaint(~holes)
        return operator, Holes(None, fill, holes, shown, 0.0, 0.0)
    if data["kind"] == "SuperResolution":
        operator: Operator = SuperResolution(data["factor"], data["method"])
    elif data["kind"] != "Filter":
        raise ValueError(f"there is no operator {data['kind']!r}")
    else:
        offset = tensors.pop("offset", None)
        operator = Filter(tensors.pop("kernel"), data["stride"], data["padding"], offset)
    return (Chain(operator, Clip(1.0)) if data["clipped"] else operator), None
