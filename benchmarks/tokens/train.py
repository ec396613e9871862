"""Train a tokenizer in two stages: tokens that foretell a teacher's features (or pixels), then a decoder to pixels.

    python -m benchmarks.tokens.train fashion --kind kd --seed 0

In the first stage, `kd` is VQ-KD: `mean_p(1 - cos(predicted_p, teacher_p)) + mse(norm z, sg e)`, and `plain` is a VQ of
pixels with the same encoder, codebook and steps: `mse(picture) / var + mse(norm z, sg e)`. In the second, tokens are
frozen, and a pixel decoder is trained on them; a plain tokenizer has one already and skips it. Runs that were stopped
go on where they were.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from . import data, teacher
from .fit import fit
from .model import Tokenizer

PEAK = 2e-3


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        data: `fashion` or `cifar10`.
        kind: `kd` or `plain`.
        codes: their number.
        seed: of weights and draws.
        steps, batch: of the first stage.
        pixel_steps: of the second.
        soften: the share of pictures decoded, in the second stage, from mixtures of codes near to theirs.
        sharp: the weight of the absolute error of differences between neighbours, in the second stage.
        semantic, relation: weights of LG-VQ's two losses in the first stage (see `language`).
    """

    data: str
    kind: str = "kd"
    codes: int = 256
    seed: int = 0
    steps: int = 1500
    batch: int = 64
    pixel_steps: int = 1500
    soften: float = 0.0
    sharp: float = 0.0
    semantic: float = 0.0
    relation: float = 0.0


SECOND = dict(pixel_steps=0, soften=0.0, sharp=0.0)
"""What a plan without a second stage has in the fields that concern it."""


def feature_loss(predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """`mean_p (1 - cos)` of features `(B, P, D)`."""
    return (1 - F.cosine_similarity(predicted.float(), wanted.float(), dim=-1)).mean()


def pixel_loss(made: torch.Tensor, images: torch.Tensor, variance: float, sharp: float = 0.0) -> torch.Tensor:
    """Mean squared error over the pictures' variance, and `sharp` times that of neighbours' differences, absolute."""
    made = made.float()
    loss = F.mse_loss(made, images) / variance
    if sharp:
        loss = loss + sharp * sum((made.diff(dim=d) - images.diff(dim=d)).abs().mean() for d in (2, 3)) / variance**0.5
    return loss


def softened(codes: torch.Tensor, tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Code vectors `(B, 64, 32)`; those of a share of the pictures mixed with codes near to them, as logits would.

    The weights are a softmax of the cosines to the code, with noise, at a random temperature.
    """
    cosines = tokens @ codes.T
    temperature = 0.02 + 0.2 * torch.rand(len(tokens), 1, 1)
    mixed = ((cosines + 0.1 * torch.randn_like(cosines)) / temperature).softmax(-1) @ codes
    return torch.where(torch.rand(len(tokens), 1, 1) < share, mixed, tokens)


def build(plan: Plan, features: int) -> Tokenizer:
    """The untrained tokenizer of a plan."""
    torch.manual_seed(plan.seed)
    return Tokenizer(data.CHANNELS[plan.data], plan.codes, features if plan.kind == "kd" else 0)


def first_stage(
    plan: Plan, tokenizer: Tokenizer, images: torch.Tensor, frozen, language, state: Path, until: int | None = None
) -> dict:
    """Train the tokens.

    Args:
        images: `(N, C, 32, 32)`, uint8.
        frozen: the teacher, pictures -> `(B, 64, D)`; unused by a plain tokenizer.
        language: None, or a module `(tokens, index) -> (loss, figures)` that is trained along.
    """
    variance = (images[:5000].float() / 255).var().item()

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        part, index = data.draw(images, plan.batch, mirror=plan.data == "cifar10")
        with torch.autocast("cpu", torch.bfloat16):
            z = tokenizer.encode(part)
        tokens, ids, commitment = tokenizer.quantiser(z)
        if plan.kind == "kd":
            with torch.autocast("cpu", torch.bfloat16):
                predicted = tokenizer.head(tokens)
            main = feature_loss(predicted, frozen(part))
        else:
            with torch.autocast("cpu", torch.bfloat16):
                made = tokenizer.decode(tokens)
            main = pixel_loss(made, part, variance)
        figures = dict(main=main.item(), commitment=commitment.item(), used=len(ids.unique()) / plan.codes)
        total = main + commitment.sum()
        if language is not None:
            more, its = language(tokens, index)
            total, figures = total + more, figures | its
        return total, figures

    tokenizer.train()
    modules = {"tokenizer": tokenizer} | ({} if language is None else {"language": language})
    run = fit(modules, loss, plan.steps, PEAK, plan.seed, state, until, f"{name_of(plan)} tokens")
    tokenizer.export()
    return run


def second_stage(plan: Plan, tokenizer: Tokenizer, images: torch.Tensor, state: Path, until: int | None = None) -> dict:
    """Train the pixel decoder; encoder and codes stay as they are."""
    variance = (images[:5000].float() / 255).var().item()
    tokenizer.requires_grad_(False).eval()
    for module in (tokenizer.vq.post_quant_conv, tokenizer.vq.decoder):
        module.requires_grad_(True)
    codes = F.normalize(tokenizer.codes, dim=1)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        part, _ = data.draw(images, plan.batch, mirror=plan.data == "cifar10")
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                ids = tokenizer.ids(part)
                tokens = softened(codes, codes[ids], plan.soften) if plan.soften else codes[ids]
            made = tokenizer.decode(tokens)
        return pixel_loss(made, part, variance, plan.sharp), {}

    return fit({"tokenizer": tokenizer}, loss, plan.pixel_steps, PEAK, plan.seed, state, until, name_of(plan))


def name_of(plan: Plan) -> str:
    """A name for a plan's folder, of what differs from the defaults."""
    parts = [plan.data, plan.kind]
    for field in dataclasses.fields(plan)[2:]:
        value = getattr(plan, field.name)
        if value != field.default and field.name != "seed":
            parts.append(f"{field.name}{value:g}")
    return "-".join([*parts, f"seed{plan.seed}"])


def language_of(plan: Plan, images: torch.Tensor, labels: torch.Tensor):
    """LG-VQ's losses that a plan asks for, or None.

    Raises:
        ValueError: the pictures are not Fashion-MNIST's, the only ones with captions here.
    """
    if not (plan.semantic or plan.relation):
        return None
    if plan.data != "fashion":
        raise ValueError(f"there are captions of fashion only, got {plan.data!r}")
    from . import language

    torch.manual_seed(plan.seed)
    words = language.captions(images, labels)
    return language.Language(words, plan.semantic, plan.relation, language.class_vectors())


def train(plan: Plan, folder: Path = data.FOLDER, train_set: tuple | None = None, frozen=None):
    """The exported VQModel of a plan, trained unless `folder` has it; and what was logged.

    Args:
        train_set: the training pictures and their labels, by default of the plan's data. Labels serve captions only.
        frozen: the teacher, by default the one in the folder.
    """
    from diffusers import VQModel

    out = folder / name_of(plan)
    if (out / "training.json").is_file():
        return VQModel.from_pretrained(out / "vqvae"), json.loads((out / "training.json").read_text())
    images, labels = data.pictures(plan.data, "train") if train_set is None else train_set
    if plan.kind == "kd" and frozen is None:
        frozen = teacher.load(plan.data, folder)
    tokenizer = build(plan, frozen.dimension if frozen is not None else 0)
    more = language_of(plan, images, labels)
    # plans that differ in the second stage alone share the first, whose state is kept
    state = folder / "tokens" / f"{name_of(dataclasses.replace(plan, **SECOND))}.state"
    runs = {"tokens": first_stage(plan, tokenizer, images, frozen, more, state)}
    if plan.kind == "kd" and plan.pixel_steps:
        runs["pixels"] = second_stage(plan, tokenizer, images, out / "pixels.state")
    vq = tokenizer.export().eval().requires_grad_(False)
    vq.save_pretrained(out / "vqvae")
    for file in (out / "vqvae").glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes a file that only its owner can read
    facts = dataclasses.asdict(plan) | dict(peak=PEAK, torch=torch.__version__, **runs)
    (out / "training.part").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "training.part").replace(out / "training.json")
    (out / "pixels.state").unlink(missing_ok=True)
    return vq, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=list(data.CHANNELS))
    for field in dataclasses.fields(Plan)[1:]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    parser.add_argument("--folder", type=Path, default=data.FOLDER)
    arguments = vars(parser.parse_args())
    folder = arguments.pop("folder")
    train(Plan(**arguments), folder)


if __name__ == "__main__":
    main()
