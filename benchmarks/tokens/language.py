"""LG-VQ's two auxiliary losses (Liang et al. 2024): tokens that agree with captions, and with the relations of words.

Captions of Fashion-MNIST name the class and three things measured from the pixels: "a bright wide plain sneaker". They
hold the label, so what is trained with them has seen it: a probe for labels then says how far language reached the
tokens, not how well they do without labels. Word vectors: the demo CLIP's text tower for the class names, frozen; for
the other words, which it does not know, vectors learned along.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lossguide.losses import demo
from lossguide.losses.words import relation_distance, soft_matches
from torch import nn

from .model import DIMENSION

ATTRIBUTES = (("dark", "grey", "bright"), ("narrow", "square", "wide"), ("plain", "patterned"))
VOCABULARY = (*demo.CLASSES, *(word for words in ATTRIBUTES for word in words))
TEMPERATURE = 0.1


def attributes(images: torch.Tensor) -> torch.Tensor:
    """Which word of each of `ATTRIBUTES` fits pictures `(N, 1, 32, 32)`, uint8, of garments on black: `(N, 3)`.

    Brightness of the garment: under 0.56, to 0.72, above. Its width over its height: under 0.75, to 1.15, above. Mean
    absolute difference of neighbours inside it: patterned from 0.11.
    """
    x = images[:, 0].float() / 255
    mask = x > 0.08
    area = mask.sum((1, 2)).clamp_min(1)
    brightness = (x * mask).sum((1, 2)) / area
    width, height = mask.any(1).sum(1), mask.any(2).sum(1).clamp_min(1)
    aspect = width / height
    inside = mask[:, :, 1:] & mask[:, :, :-1]
    texture = ((x[:, :, 1:] - x[:, :, :-1]).abs() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp_min(1)
    bins = ((brightness, (0.56, 0.72)), (aspect, (0.75, 1.15)), (texture, (0.11,)))
    return torch.stack([torch.bucketize(value, torch.tensor(edges)) for value, edges in bins], 1)


def captions(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The four words of each picture's caption, as indices of `VOCABULARY`, `(N, 4)`; the class is the first."""
    offsets = torch.tensor([len(demo.CLASSES), len(demo.CLASSES) + 3, len(demo.CLASSES) + 6])
    return torch.cat([labels[:, None], attributes(images) + offsets], 1)


def class_vectors() -> torch.Tensor:
    """The demo CLIP's vectors `(10, 64)` of "a photo of a ...", of unit norm."""
    import open_clip

    folder = f"local-dir:{demo.clip_folder()}"
    model, tokenizer = open_clip.create_model(folder).eval(), open_clip.get_tokenizer(folder)
    with torch.no_grad():
        return model.encode_text(tokenizer([demo.caption(name) for name in demo.CLASSES]), normalize=True).float()


def semantic_loss(images: torch.Tensor, texts: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """`L_gsa = -log e^{cos(v, t)} / sum_j e^{cos(v, t_j)}`, its mean, at a temperature.

    Args:
        images, texts: vectors `(B, d)`; text i is of picture i.
        same: `(B, B)`, which texts are the very caption of which picture: those are no negatives.
    """
    cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T / TEMPERATURE
    own = torch.eye(len(same), dtype=torch.bool)
    return F.cross_entropy(cosines.masked_fill(same & ~own, -torch.inf), torch.arange(len(same)))


class Language(nn.Module):
    """The losses of a batch's tokens `(B, 64, 32)` against the captions of its pictures.

    Args:
        words: captions `(N, 4)` of the training pictures.
        semantic, relation: weights.
        vectors: frozen vectors `(10, d)` of the class names.
    """

    def __init__(self, words: torch.Tensor, semantic: float, relation: float, vectors: torch.Tensor):
        super().__init__()
        self.words, self.semantic, self.relation = words, semantic, relation
        self.register_buffer("classes", vectors)
        self.others = nn.Parameter(torch.randn(len(VOCABULARY) - len(vectors), vectors.shape[1]))
        self.image, self.patch = (nn.Linear(DIMENSION, vectors.shape[1]) for _ in range(2))

    def forward(self, tokens: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        caption = self.words[index]
        vectors = torch.cat([self.classes, F.normalize(self.others, dim=1)])[caption]
        same = (caption[:, None] == caption[None]).all(2)
        semantic = semantic_loss(self.image(tokens.mean(1)), vectors.sum(1), same)
        # the words' own relations are the target: only the patches follow it
        matches, _ = soft_matches(vectors.detach(), self.patch(tokens))
        relation = relation_distance(matches, vectors.detach()).mean()
        figures = dict(semantic=semantic.item(), relation=relation.item())
        return self.semantic * semantic + self.relation * relation, figures
