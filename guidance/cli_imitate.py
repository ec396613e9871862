"""`lossguide imitate`: do to a picture what was done to others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F

from ..losses import PairTask, read_image
from . import cli_output as output
from .cli_job import BAD, Job, Problem, told
from .cli_model import check_model
from .cli_options import shared
from .cli_restore import fitted
from .cli_tokens import NAME as TOKENS
from .contact_sheet import Block
from .files import write_whole

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@click.command("imitate", short_help="Do to a picture what was done to others.")
@click.argument("query", type=click.Path(path_type=Path))
@click.option(
    "--pair",
    "pairs",
    nargs=2,
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="BEFORE AFTER",
    help="An example of what is to be done, two pictures; also several times.",
)
@click.option("--inverse", is_flag=True, help="Go the other way: the query is like the pictures AFTER.")
@click.option(
    "--mode",
    type=click.Choice(["auto", "operator", "direction", "analogy"]),
    default="auto",
    show_default=True,
    help="What the pairs have in common: a degradation or colour change, or a change that CLIP sees.",
)
@click.option("--resize", is_flag=True, help="Crop and resize pairs and query to the size that the model needs.")
@click.option(
    "--clip-model", help="open_clip model or folder that sees a change; default: demo for --model demo, else ViT-B-32."
)
@click.option("--clip-pretrained", default="openai", show_default=True, help="Its weights, where it is given by name.")
@shared(num_images=4)
@click.pass_context
def imitate_command(
    context: click.Context, query, pairs, inverse, mode, resize, clip_model, clip_pretrained, **run: Any
) -> None:
    """Do to the QUERY what was done to the pictures of pairs, by a model of such pictures.

    From one pair up: a blur, a colour cast, missing pixels or a reduction that the pairs show is undone (or done), and
    its strength is found from them; any other change is followed as far as CLIP sees it. Pairs that have nothing in
    common are refused. Several answers suit a query; each of --num-images is one.

    Writes the answers as PNG, sheet.png (the pairs and, in the last row, the query and an answer), report.txt (what the
    pairs have in common), record.json, record.png and settings.json.

    \b
    Examples:
      lossguide imitate blurred.png --pair blurred-1.png sharp-1.png
      lossguide imitate photo.png --pair a1.png b1.png --pair a2.png b2.png --inverse
      lossguide imitate photo.png --pair before.png after.png --model ./my-model --resize
    """
    if not pairs:
        raise Problem("there is nothing to imitate: give an example with --pair before.png after.png")
    with told(*BAD):
        check_model(run["model"])
        asked = read_image(query)
        examples = [(read_image(before), read_image(after)) for before, after in pairs]
    job = Job(context, run)
    size = job.model.size
    if size is None:
        raise Problem(f"the model '{run['model']}' does not tell the size of its pictures, which imitating needs")
    clip_model = clip_model or ("demo" if run["model"] in ("demo", TOKENS) else "ViT-B-32")
    with told(*BAD):
        if resize:
            examples, asked = resized(examples, asked, size, inverse)
        task = _fitted_task(examples, mode, inverse, clip_model, clip_pretrained)
        _check_size(task, asked, size)
        loss = task.loss(asked)
        guidance = job.guidance(loss)
    report = task.report()
    job.say(report.split("\n\n")[0])  # the scores of all that was tried are in the file
    with job.folder(output.default_folder(query.stem, "imitated")) as folder:
        job.say(f"Drawing {len(job.seeds)} answers, guided by {run['recipe']}.")
        images, record = job.draw(guidance)
        output.save_pictures(folder, images, job.seeds)
        write_whole(folder / "report.txt", (report + "\n").encode())
        reached = job.mean_loss(loss, images)
        results: dict[str, Any] = {"mode": task.mode, "family": task.family, "way": task.way, "loss": reached}
        summary = f"{task.mode}: {task.family}, from {len(pairs)} pair{'s' * (len(pairs) > 1)}; "
        if task.mode == "operator":
            results["floor"] = floor = float(torch.as_tensor(loss.floor).mean())
            summary += f"residual {reached:.4g}, of which the pairs' noise explains {floor:.4g}"
        else:
            summary += f"loss {reached:.4g}"
        blocks = _sheet(examples, asked, images, inverse, size)
        job.write(folder, guidance, record, blocks, summary, results, clip_model=clip_model)
        job.finish(folder, record, summary)
        if task.mode == "operator" and reached > 3 * floor + 0.02 * loss.y[0].numel() ** 0.5:
            job.say("The answers do not fit the query: take more --steps, or a --model of such pictures.")


def resized(pairs: Pairs, query: torch.Tensor, size: tuple[int, int], inverse: bool) -> tuple[Pairs, torch.Tensor]:
    """Pairs and query at the size of a model's pictures: those that are like answers at `size`, those that are like the
    query at the same share of it as before.

    Args:
        pairs: (before, after), `(3, H, W)` each.
        query: `(3, H, W)`.
        size: height and width of the answers.
        inverse: whether the query is like the pictures after.
    """
    asked, answer = pairs[0][::-1] if inverse else pairs[0]
    shares = {a / b for a, b in zip(asked.shape[-2:], answer.shape[-2:])}
    whole = [share for share in shares if max(share, 1 / share).is_integer() and not any(a * share % 1 for a in size)]
    other = tuple(round(side * whole[0]) for side in size) if len(shares) == len(whole) == 1 else size
    sizes = (size, other) if inverse else (other, size)
    cut = [tuple(fitted(one, wanted, "a picture", True) for one, wanted in zip(pair, sizes)) for pair in pairs]
    return cut, fitted(query, other, "the query", True)


def _fitted_task(pairs: Pairs, mode: str, inverse: bool, clip_model: str, clip_pretrained: str) -> PairTask:
    """The task of the pairs; CLIP is only loaded where no operator explains them."""
    if mode in ("auto", "operator"):
        try:
            return PairTask.fit(pairs, mode=mode, inverse=inverse)
        except ValueError as error:
            if mode == "operator":
                raise
            refusal = error
        try:
            encoder = _encoder(clip_model, clip_pretrained)
        except OSError as error:
            raise ValueError(f"{refusal}, and {error}") from error
    else:
        encoder = _encoder(clip_model, clip_pretrained)
    return PairTask.fit(pairs, encoder, mode, inverse=inverse)


def _encoder(model: str, pretrained: str) -> Any:
    """CLIP's image network: features, and patches where it has them."""
    from ..losses.clip import load_clip
    from ..losses.network import FrozenNetwork

    image = load_clip(model, pretrained).image
    if not hasattr(image.network, "output_tokens"):
        return image
    network = copy.deepcopy(image.network)
    network.output_tokens = True
    return FrozenNetwork(network, size=image.size, mean=image.mean, std=image.std)


def _check_size(task: PairTask, query: torch.Tensor, size: tuple[int, int]) -> None:
    answer = task.answer_size(query)
    if answer != size:
        height, width = query.shape[-2:]
        raise ValueError(
            f"the query has {width} x {height} pixels and its answer {answer[1]} x {answer[0]}, but the model draws "
            f"{size[1]} x {size[0]}; --resize crops and resizes pairs and query"
        )


def _sheet(
    pairs: Pairs, query: torch.Tensor, answers: torch.Tensor, inverse: bool, size: tuple[int, int]
) -> list[Block]:
    """The grid that an in-context model would see, its last panel filled; further answers beside it."""
    rows = [pair[::-1] if inverse else pair for pair in pairs]
    rows.append((query, answers[0]))
    grid = torch.stack([_shown(one, size) for row in rows for one in row])
    blocks = [Block("pairs, then query and answer", grid, columns=2)]
    if len(answers) > 1:
        blocks.append(Block("more answers", answers[1:], columns=min(len(answers) - 1, 3)))
    return blocks


def _shown(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A picture at the size of the answers, for the sheet; small ones keep their pixels."""
    smaller = image.shape[-1] <= size[1]
    how: dict[str, Any] = dict(mode="nearest") if smaller else dict(mode="bilinear", antialias=True)
    return image if image.shape[-2:] == size else F.interpolate(image[None], size, **how)[0]
