"""The networks of the scenes: how they are built and loaded; `benchmarks.relations.train` trains them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from lossguide.losses.demo import _Residual
from lossguide.samplers import Denoiser, denoiser
from torch import nn

from .scenes import CLASSES, FOLDER, Layout

MEAN, STD = 0.12, 0.26
CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 32, "patch_size": 4, "layers": 4, "width": 64, "head_width": 32, "pool_type": "avg",
        },
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
}  # fmt: skip
"""A ViT of 8x8 patches whose embedding is the mean of its patches': then each patch is in the space of the texts."""
NAMES = ("clip", "clip-plain", "unet", "judge")
PATCH = 2
"""Side of the pixel blocks that become channels of the diffusion model, which is faster for it."""


class Judge(nn.Module):
    """Scenes `(B, 1 or 3, 32, 32)` in [0, 1] -> logits of the axis `(B, 2)`, of what is first and second `(B, 6)` each.

    Convolutions with BatchNorm and ReLU, another kind of network than the ViT that guides.
    """

    def __init__(self, width: int = 24):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv2d(1, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            _Residual(w, 2 * w, 2), _Residual(2 * w, 4 * w, 2), _Residual(4 * w, 4 * w, 2), nn.Flatten(),
            nn.Dropout(0.3),
        )  # fmt: skip
        self.head = nn.Linear(16 * 4 * w, 2 + 2 * len(CLASSES))

    def forward(self, scenes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grey = scenes.mean(1, keepdim=True)
        return self.head(self.body((grey - MEAN) / STD)).split([2, len(CLASSES), len(CLASSES)], 1)


def build_unet():
    """An unconditional UNet2DModel of grey 32x32 scenes whose pixel blocks are channels."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32 // PATCH,
        in_channels=PATCH**2,
        out_channels=PATCH**2,
        layers_per_block=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
    )


def missing(folder: Path = FOLDER) -> str | None:
    """What the task lacks on this machine, in one sentence."""
    lacking = [name for name in NAMES if not (folder / f"{name}_training.json").is_file()]
    if lacking:
        return (
            f"there is no {' and no '.join(lacking)} of the scenes in {folder}: `python -m benchmarks.relations.train` "
            "trains them (half an hour of one core), or set RELATIONS to a folder that has them"
        )
    return None


def load_judge(folder: Path = FOLDER) -> Judge:
    """The trained judge, frozen."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.eval().requires_grad_(False)


def load_model(folder: Path = FOLDER) -> Denoiser:
    """The trained diffusion model; its pictures are grey, `(B, 1, 32, 32)`, which losses see in three channels."""
    from diffusers import DDIMScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    return denoiser(unet, scheduler, decode=lambda x: F.pixel_shuffle(x, PATCH).expand(-1, 3, -1, -1) / 2 + 0.5)


def targets(layouts: Sequence[Layout]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the judge is to say of layouts: axis, first and second, `(B,)` each."""
    rows = torch.tensor([(int(layout.vertical), layout.first, layout.second) for layout in layouts])
    return rows[:, 0], rows[:, 1], rows[:, 2]


@torch.no_grad()
def judged(judge: Judge, pictures: torch.Tensor, layouts: Sequence[Layout]) -> dict[str, torch.Tensor]:
    """Whether each scene shows its layout, `(B,)` each, by the judge.

    `all`: both things and where they are. `things`: both, wherever. `thing`: the share of the two that is there.
    `relation`: the axis and, of things that are there, the place.
    """
    vertical, first, second = (torch.cat(part) for part in zip(*(
        [one.argmax(1) for one in judge(some.clamp(0, 1))] for some in pictures.split(500)
    )))  # fmt: skip
    axis, a, b = targets(layouts)
    placed = (vertical == axis) & ((first == a) | (second == b)) & (first != b) & (second != a)
    there = ((first == a) | (second == a)).float() + ((first == b) | (second == b)).float()
    return {
        "all": (vertical == axis) & (first == a) & (second == b),
        "things": there == 2,
        "thing": there / 2,
        "axis": vertical == axis,
        "relation": placed,
    }
