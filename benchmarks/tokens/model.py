"""A tokenizer of 32x32 pictures: diffusers' VQModel around a codebook of unit vectors, and a decoder of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

GRID = 8
"""Tokens on a side: a picture of 32x32 has 64."""
DIMENSION = 32
DEAD = 2.0
"""A code used by fewer of a batch's tokens than this, on average, is put where a random token of the batch is."""


def build(channels: int, codes: int):
    """An untrained VQModel: pictures `(B, C, 32, 32)` in [0, 1], 8x8 tokens of `codes` vectors of 32 numbers."""
    from diffusers import VQModel

    widths = (16, 32, 64)
    return VQModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=DIMENSION,
        vq_embed_dim=DIMENSION,
        sample_size=32,
        num_vq_embeddings=codes,
        norm_num_groups=8,
        lookup_from_codebook=True,  # `decode(ids, force_not_quantize=True, shape=...)`, as aMUSEd's pipeline calls it
    )


class FeatureDecoder(nn.Module):
    """From tokens to a teacher's features in one transformer block (BEiT v2's VQ-KD, Peng et al. 2022, has one to
    three): tokens `(B, 64, 32)` -> `(B, 64, D)`."""

    def __init__(self, features: int, width: int = 128):
        super().__init__()
        self.enter = nn.Linear(DIMENSION, width)
        self.place = nn.Parameter(0.02 * torch.randn(GRID**2, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.leave = nn.Linear(width, features)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.leave(self.block(self.enter(tokens) + self.place))


class Tokenizer(nn.Module):
    """A VQModel whose codebook is trained by `vector-quantize-pytorch`: cosines, k-means at first, running means then.

    Codes have unit norm, so that the nearest code by VQModel's Euclidean distance is the one of the largest cosine.

    Args:
        channels: of the pictures.
        codes: how many.
        features: of the teacher; 0 for a tokenizer trained on pixels alone.
    """

    def __init__(self, channels: int, codes: int, features: int = 0):
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.vq = build(channels, codes)
        self.quantiser = VectorQuantize(
            dim=DIMENSION,
            codebook_size=codes,
            decay=0.99,
            rotation_trick=False,
            use_cosine_sim=True,
            kmeans_init=True,
            threshold_ema_dead_code=DEAD,
            commitment_weight=1.0,
        )
        self.head = FeatureDecoder(features) if features else None

    @property
    def codes(self) -> torch.Tensor:
        """The code vectors `(K, 32)`, of unit norm."""
        return self.quantiser.codebook

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Vectors `(B, 64, 32)` before quantisation, float32, of pictures `(B, C, 32, 32)` in [0, 1]."""
        return self.vq.quant_conv(self.vq.encoder(images)).float().flatten(2).transpose(1, 2)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pictures `(B, C, 32, 32)`, nominally in [0, 1], of code vectors `(B, 64, 32)` or mixtures of them."""
        grid = tokens.transpose(1, 2).unflatten(2, (GRID, GRID))
        return self.vq.decoder(self.vq.post_quant_conv(grid))

    @torch.no_grad()
    def ids(self, images: torch.Tensor) -> torch.Tensor:
        """Token ids `(B, 64)` by the training quantiser."""
        return (F.normalize(self.encode(images), dim=-1, eps=1e-6) @ self.codes.T).argmax(-1)

    @torch.no_grad()
    def export(self):
        """The VQModel with the codes in place."""
        self.vq.quantize.embedding.weight.copy_(F.normalize(self.codes, dim=1))
        return self.vq


@torch.no_grad()
def ids_of(vq, images: torch.Tensor, batch: int = 500) -> torch.Tensor:
    """Token ids `(N, 64)` that a VQModel gives pictures `(N, C, 32, 32)`: uint8, or floats in [0, 1]."""
    found = []
    for part in images.split(batch):
        part = part if part.is_floating_point() else part.float() / 255
        found.append(vq.quantize(vq.encode(part).latents)[2][2].view(len(part), -1))
    return torch.cat(found)


@torch.no_grad()
def pictures_of(vq, ids: torch.Tensor, batch: int = 500) -> torch.Tensor:
    """Pictures `(N, C, 32, 32)` in [0, 1] that a VQModel decodes from token ids `(N, 64)`."""
    shape = lambda part: (len(part), GRID, GRID, vq.config.vq_embed_dim)
    parts = ids.split(batch)
    return torch.cat([vq.decode(p, force_not_quantize=True, shape=shape(p)).sample.clamp(0, 1) for p in parts])
