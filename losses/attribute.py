"""What a picture should have and what not, judged by a head over features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F

from .loss import Loss
from .network import FrozenNetwork, describe_network, logits_of


class Attribute(Loss):
    """The mean cross-entropy of attributes to what is wanted: `-log p` of those wanted, `-log(1 - p)` of the others.

    Args:
        network: module or callable, images `(B, 3, h, w)` -> features `(B, ...)`.
        head: module or callable, features -> logits `(B, A)`; None where the network returns logits itself.
        want: `{"smiling": (31, 1), "glasses": (15, 0)}`: of each name the index of its logit and whether it is wanted,
            1 or 0, or the probability wanted, in between.
        activation: what makes probabilities of logits: 'sigmoid', each for itself, or 'softmax', all together.
        mean, std, size: the network's own preprocessing of images in [0, 1]; None leaves that part out.

    Raises:
        ValueError: nothing is wanted, or an index or probability is none; (when called) the head returns other logits.

    Source: classifier guidance, Dhariwal and Nichol 2021 (arXiv 2105.05233).
    """

    pictures = True
    name = "attribute"

    def __init__(
        self,
        network: Callable[[torch.Tensor], Any],
        head: Callable[[torch.Tensor], torch.Tensor] | None,
        want: Mapping[str, tuple[int, float]],
        *,
        activation: str = "sigmoid",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
    ):
        if activation not in ("sigmoid", "softmax"):
            raise ValueError(f"activation is 'sigmoid' or 'softmax', got {activation!r}")
        if not isinstance(want, Mapping) or not want:
            raise ValueError(f"what is wanted is a mapping, name -> (index, 1 or 0), got {want!r}")
        for name, pair in want.items():
            known = isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], Integral)
            if not known or pair[0] < 0 or not isinstance(pair[1], Real) or not 0 <= pair[1] <= 1:
                raise ValueError(f"'{name}' is (index from 0 on, wanted 1 or 0), got {pair!r}")
        self.network = FrozenNetwork(network, size=size, mean=mean, std=std)
        self.head = None if head is None else FrozenNetwork(head)
        self.want = {name: (int(index), float(wanted)) for name, (index, wanted) in want.items()}
        self.activation = activation
        self.settings = {"network": describe_network(network), "head": head and describe_network(head)}
        self.settings |= {"want": {name: list(pair) for name, pair in self.want.items()}, "activation": activation}
        self.arguments = self.settings | {"network": network, "head": head, "want": self.want}
        self.arguments |= {"mean": mean, "std": std, "size": size}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        output = self.network(image)
        logits = logits_of(output if self.head is None else self.head(logits_of(output)))
        if logits.ndim != 2 or len(logits) != len(image):
            raise ValueError(f"a head returns logits ({len(image)}, A), got {tuple(logits.shape)}")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = []
        for name, (index, wanted) in self.want.items():
            if index >= logits.shape[1]:
                raise ValueError(f"'{name}' is logit {index}, and the head has {logits.shape[1]}")
            yes, no = self._logs(logits, index)
            losses.append(-wanted * yes - (1 - wanted) * no)
        return torch.stack(losses).mean(0)

    def _logs(self, logits: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """log p and log(1 - p) of one attribute; finite whatever the logits."""
        if self.activation == "sigmoid":
            return F.logsigmoid(logits[:, index]), F.logsigmoid(-logits[:, index])
        if logits.shape[1] < 2:
            raise ValueError("a softmax needs two logits; of one take activation='sigmoid'")
        others = torch.cat([logits[:, :index], logits[:, index + 1 :]], 1)
        every = logits.logsumexp(1)
        return logits[:, index] - every, others.logsumexp(1) - every
