"""What a frozen network sees of pictures, and changes in it as losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..loss import Loss
from ..network import FrozenNetwork, describe_network, moved, per_image

NEARNESS = 0.05  # temperature of the softmax over cosines of patches
STILL = 1e-3  # a change shorter than this share of the features' length is none


class Encoder:
    """A frozen network's features `(B, d)` of pictures, and where it has them patches `(B, P, c)`.

    Args:
        network: `FrozenNetwork`, module or callable, images `(B, 3, h, w)` -> features `(B, d)`, a map `(B, c, h, w)`
            or patches `(B, P, c)`, such as a `PatchFeatures` (their mean is the features), or both, `(features, patches
            or map)`.
    """

    def __init__(self, network: Callable[[torch.Tensor], Any], size=None, mean=None, std=None):
        own = isinstance(network, FrozenNetwork)
        self.network = network if own else FrozenNetwork(network, size=size, mean=mean, std=std)
        self.name = describe_network(self.network.network)

    def __call__(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = self.network(image)
        if isinstance(output, (tuple, list)) and len(output) == 2:
            features, patches = output
        else:
            features, patches = output, None
        if isinstance(features, torch.Tensor) and features.ndim in (3, 4):
            patches = features if patches is None else patches
            features = features.mean((2, 3) if features.ndim == 4 else 1)
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(image):
            got = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(
                f"an encoder makes features (B, d), a map (B, c, h, w), patches (B, P, c) or (features, patches) of "
                f"images, got {got}"
            )
        if patches is not None and patches.ndim == 4:
            patches = patches.flatten(2).transpose(1, 2)
        wide = torch.promote_types(features.dtype, torch.float32)
        return features.to(wide), None if patches is None else patches.to(wide)


def shift_of(changes: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The mean of the unit directions of changes `(N, d)`, of length one (zeros where they cancel), and the mean
    length."""
    lengths = changes.norm(dim=1)
    return F.normalize(F.normalize(changes, dim=1).mean(0), dim=0), float(lengths.mean())


def agreement(changes: torch.Tensor) -> float:
    """The mean cosine of each change of `(N, d)` to the direction of the others; N is at least 2."""
    whole = range(len(changes))
    cosines = [
        F.cosine_similarity(changes[i], shift_of(changes[[j for j in whole if j != i]])[0], dim=0).item() for i in whole
    ]
    return sum(cosines) / len(cosines)


class Direction(Loss):
    """How far the change from a query is from the examples' change, in a network's features.

    `1 - cos(c, d) + content * (1 - cos(patches(x), patches(q))) + length * relu(|c| / r - 1)`, where c is
    `phi(x) - phi(q)`, d the examples' direction and r their length. Of the query itself the cosine counts as 0 and has
    a gradient toward d. Where the examples change nothing (r is 0) only the query's content is kept.

    Args:
        encoder: see `Encoder`.
        query: `(B, 3, H, W)` in [0, 1].
        direction: `(d,)`, of length one.
        radius: the mean length of the examples' changes.
        content, length: weights of what keeps the query, and of what keeps the change as short as theirs.
    """

    pictures = True
    name = "direction"
    augment = False  # the query would have to be augmented alike

    def __init__(
        self,
        encoder: Encoder,
        query: torch.Tensor,
        direction: torch.Tensor,
        radius: float,
        content: float = 0.5,
        length: float = 0.5,
    ):
        self.encoder, self.direction, self.radius = encoder, direction, float(radius)
        self.content, self.length = float(content), float(length)
        self.batch = len(query)
        with torch.no_grad():
            self.features, self.patches = encoder(query)
        self.still = self.radius < STILL * float(self.features.norm(dim=1).mean())
        self.settings = {"encoder": encoder.name, "radius": self.radius, "content": content, "length": length}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        features, patches = self.encoder(image)
        change = features - per_image(moved(self.features, features), len(image), "queries")
        if self.still:
            total = (change.square().sum(1) + 1e-12).sqrt()
        else:
            squares = change.square().sum(1)
            length = (squares + (1e-3 * self.radius) ** 2).sqrt()
            total = 1 - (change @ moved(self.direction, change)) / length
            total = total + self.length * F.relu(length / self.radius - 1)
        if patches is not None and self.content:
            wanted = per_image(moved(self.patches, patches), len(image), "queries")
            total = total + self.content * (1 - F.cosine_similarity(patches, wanted, dim=2)).mean(1)
        return total


class Analogy(Loss):
    """Each patch changed as the examples' patches were that are near to the query's, in a network's features.

    `mean_p w_p (1 - cos(patches(x)_p, patches(q)_p + sum_n a_pn (after_n - before_n)))`, a a softmax over the examples'
    patches n of their cosine to the query's at p; w, of mean one, is a softmax over p of the largest of these. The
    change is taken over rather than the patch after itself, which would bring the example's content along, and the mean
    of the near ones rather than the nearest, which is a matter of chance.

    Args:
        encoder: see `Encoder`; it must have patches.
        query: `(B, 3, H, W)` in [0, 1].
        before, after: the examples' patches `(N, c)`.
        temperature: of the weights' softmax.
    """

    pictures = True
    name = "analogy"
    augment = False

    def __init__(
        self, encoder: Encoder, query: torch.Tensor, before: torch.Tensor, after: torch.Tensor, temperature: float = 0.1
    ):
        self.encoder = encoder
        self.batch = len(query)
        with torch.no_grad():
            patches = encoder(query)[1]
            self.wanted, near = foretold(patches, before.to(patches), after.to(patches))
            self.weights = torch.softmax(near / temperature, 1) * near.shape[1]
        self.settings = {"encoder": encoder.name, "patches": len(before), "temperature": temperature}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        patches = self.encoder(image)[1]
        wanted = per_image(moved(self.wanted, patches), len(image), "queries")
        weights = per_image(moved(self.weights, patches), len(image), "queries")
        return (weights * (1 - F.cosine_similarity(patches, wanted, dim=2))).mean(1)


def foretold(patches: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches `(B, P, c)` with the mean change of the `before` `(N, c)` near to each; the largest cosine `(B, P)`."""
    cosines = F.normalize(patches, dim=2) @ F.normalize(before, dim=1).T
    return patches + torch.softmax(cosines / NEARNESS, 2) @ (after - before), cosines.amax(2)


def analogy_agreement(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """How much of the patches after the other pairs foretell, beyond what is known of them: 1 is all, of unrelated
    pairs it is 0 or less.

    Known are the patch before and the mean patch after, whichever is nearer.

    Args:
        pairs: patches before and after, `(P, c)` each.
    """
    missed = kept = spread = 0.0
    for i, (before, after) in enumerate(pairs):
        others = [pair for j, pair in enumerate(pairs) if j != i]
        all_after = torch.cat([a for _, a in others])
        wanted, _ = foretold(before[None], torch.cat([b for b, _ in others]), all_after)
        missed += float((wanted[0] - after).square().sum())
        kept += float((before - after).square().sum())
        spread += float((all_after.mean(0) - after).square().sum())
    return 1 - missed / max(min(kept, spread), 1e-12)


def alike(x: torch.Tensor, y: torch.Tensor) -> float:
    """How alike the outlines of two pictures `(3, H, W)` are: the correlation of their brightness's steps, of any
    sign, -1 to 1."""

    def outlines(picture: torch.Tensor) -> torch.Tensor:
        grey = F.avg_pool2d(picture.mean(0)[None, None].float(), 2)[0, 0]
        down, right = grey[1:, :-1] - grey[:-1, :-1], grey[:-1, 1:] - grey[:-1, :-1]
        steps = (down**2 + right**2).sqrt()
        return steps - steps.mean()

    if y.shape != x.shape:
        y = F.interpolate(y[None], x.shape[-2:], mode="bilinear", antialias=True)[0]
    a, b = outlines(x).flatten(), outlines(y).flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-12))
