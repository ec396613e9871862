"""The command line: `lossguide generate`, `restore`, `imitate`, `tune`, `check`, `recipes`, `losses`."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import torch

from ..losses import ClipText, Measurement, demo, read_image, registry
from ..losses.loss import Composable, as_losses
from . import cli_output as output
from . import cli_restore as restoring
from . import recipes as methods
from .cli_change import change_options, take_change
from .cli_check import check_command
from .cli_imitate import imitate_command
from .cli_job import BAD, Job, Problem, told
from .cli_large import draw_many, is_large
from .cli_model import check_model
from .cli_options import shared
from .cli_rerank import check_rerank, draw_reranked, rerank_options
from .cli_tokens import NAME as TOKENS
from .cli_tune import tune_command
from .contact_sheet import Block


class _Main(click.Group):
    """A group that tells every problem in one sentence, and ends with status 130 after Ctrl-C."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:  # a shell cannot give such words, another program in Python can
            nul = any(b"\0" in os.fsencode(word) for word in args)
        except UnicodeEncodeError:
            raise click.UsageError("an argument holds half a character, which no text or file name here has") from None
        if nul:
            raise click.UsageError("an argument holds a NUL character, which no text or file name here has")
        return super().parse_args(context, args)

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
                status = super().main(*args, standalone_mode=False, **extra)
        except click.ClickException as error:
            click.echo(f"Error: {output.shown(' '.join(error.format_message().split()))}", err=True)
            sys.exit(error.exit_code)
        except click.Abort:
            click.echo("Stopped.", err=True)
            sys.exit(130)
        sys.exit(status if isinstance(status, int) else 0)


@click.group(cls=_Main, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lossguide", prog_name="lossguide")
@click.pass_context
def main(context: click.Context) -> None:
    """Steer pretrained diffusion models by a loss, without training.

    \b
    Examples:
      lossguide generate "ankle boot"
      lossguide restore photo.png --task super-resolution --degrade --resize
      lossguide imitate query.png --pair before.png after.png
      lossguide tune "ankle boot" --trials 10
      lossguide check my_losses.py:darkness
      lossguide recipes
      lossguide losses
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command(short_help="Draw pictures of a text, or of what losses ask.")
@click.argument("prompt", required=False)
@click.option("--loss", "losses", multiple=True, metavar="TEXT", help="[WEIGHT*]NAME:ARGUMENT, also several times.")
@click.option("--clip-model", help="open_clip model or folder for texts; default: demo for the demos, else ViT-B-32.")
@click.option("--clip-pretrained", default="openai", show_default=True, help="Its weights, where it is given by name.")
@click.option(
    "--tuned",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="best.json of `lossguide tune`: settings in place of --strength and the recipe's own.",
)
@shared(num_images=16)
@click.option("--resume", is_flag=True, help="Go on with the run in --out, or begin it; also beside other processes.")
@click.option("--overwrite", is_flag=True, help="Take --out also where it holds results, which go.")
@rerank_options
@change_options
@click.pass_context
def generate(context: click.Context, prompt, losses, clip_model, clip_pretrained, **run: Any) -> None:
    """Draw pictures that a PROMPT or losses describe, beside what the model draws without them.

    Writes each picture as PNG, sheet.png (unguided beside guided from the same noise), record.json and record.png (what
    happened at each step), and settings.json with the command to run again.

    Many pictures (over 64, or with --resume, or in several processes) go to pictures/ one by one, and are listed in
    manifest.jsonl; after Ctrl-C, a kill or a full disk --resume goes on. `accelerate launch -m lossguide.guidance.cli
    generate ...` shares them among processes, devices and machines with a common disk. Of memory that does not hold a
    batch half is tried. The sheet shows the first 64, the record the first batch.

    \b
    Examples:
      lossguide generate "ankle boot"
      lossguide generate "ankle boot" --num-images 50000 --out boots --resume
      lossguide generate --loss class-label:bag --recipe dps --strength 2
      lossguide generate "ankle boot" --recipe freedom --set rule=rms
      lossguide generate "ankle boot" --rerank likelihood --rerank-from 8
      lossguide generate sandal --model demo-tokens
      lossguide generate dress --source pullover.png --change-map lower-half.png
      lossguide generate "a coat" --loss 0.5*color:red --model ./my-model --clip-model ViT-B-32
      lossguide generate --loss my_losses.py:darkness --scheduler euler-ancestral --steps 100
    """
    if prompt is None and not losses:
        raise Problem(
            'there is nothing to aim at: give a prompt, such as "ankle boot", or --loss, such as class-label:9'
        )
    strong = context.get_parameter_source("strength") == click.core.ParameterSource.COMMANDLINE
    if run["tuned"] is not None and strong:
        raise Problem("--tuned brings a strength of its own: leave out --strength")
    clip_model = clip_model or ("demo" if run["model"] in ("demo", TOKENS) else "ViT-B-32")
    if prompt is not None and clip_model == "demo":
        _in_demo_world(prompt)
    with told(*BAD):
        check_model(run["model"])
        loss = _losses(prompt, losses, clip_model, clip_pretrained)
    job = Job(context, run)
    take_change(job, run["source"], run["change_map"])
    with told(*BAD):
        guidance = job.guidance(loss)
    name = prompt if prompt is not None else " ".join(losses)
    label = " + ".join([prompt, *losses] if prompt is not None else losses)
    check_rerank(job, is_large(run))
    if is_large(run):
        draw_many(job, guidance, prompt or "", label, output.default_folder(name), clip_model=clip_model)
        return
    with job.folder(output.default_folder(name)) as folder:
        job.say(f"Drawing {len(job.seeds)} pictures, guided by {run['recipe']}, and then without.")
        kept, more = "", {}
        if run["rerank"] is None:
            images, record = job.draw(guidance, prompt or "")
        else:
            images, record, kept, more["rerank"] = draw_reranked(job, guidance, prompt or "")
        output.save_pictures(folder, images, job.seeds)
        plain, _ = job.draw(None, prompt or "")
        before, after = job.mean_loss(guidance.loss, plain), job.mean_loss(guidance.loss, images)
        summary = f"loss {before:.4g} -> {after:.4g} (unguided -> guided, mean of {len(images)})"
        summary += f"; {kept}" if kept else ""
        blocks = [Block("unguided", plain), Block(f"guided: {label}", images)]
        results = {"loss": {"unguided": before, "guided": after}, **more}
        job.write(folder, guidance, record, blocks, summary, results, clip_model=clip_model, overwrite=False)
        job.finish(folder, record, summary)


@main.command(short_help="Restore a photo.")
@click.argument("photo", type=click.Path(path_type=Path))
@click.option("--task", type=click.Choice(restoring.TASKS), required=True, help="What happened to the photo.")
@click.option("--mask", type=click.Path(path_type=Path), help="inpaint: white = keep; default: transparent = the hole.")
@click.option("--factor", type=click.IntRange(2), default=4, show_default=True, help="super-resolution: times larger.")
@click.option("--kernel-size", type=click.IntRange(1, 999), default=9, show_default=True, help="deblur: pixels, odd.")
@click.option("--blur-sigma", type=click.FloatRange(0), default=2.0, show_default=True, help="deblur: width in pixels.")
@click.option(
    "--noise",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Deviation of the photo's noise; pixels are 0 to 1.",
)
@click.option("--degrade", is_flag=True, help="Take a clean photo, degrade it by the task, and restore that.")
@click.option(
    "--keep", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="inpaint --degrade: share kept."
)
@click.option("--resize", is_flag=True, help="Crop and resize the photo to the size that the model needs.")
@shared(num_images=4)
@click.pass_context
def restore(context: click.Context, photo, task, mask, degrade, resize, **options: Any) -> None:
    """Restore a PHOTO with a hole, in low resolution, or blurred, by a model of such pictures.

    Several pictures agree with what is left of a photo; each of --num-images is one. Writes them as PNG, degraded.png,
    sheet.png (degraded, restored, and the original where it is known), record.json, record.png and settings.json.

    \b
    Examples:
      lossguide restore small.png --task super-resolution
      lossguide restore photo.png --task inpaint --mask mask.png
      lossguide restore clean.png --task deblur --degrade --resize
    """
    belongs = {
        "mask": "inpaint",
        "keep": "inpaint",
        "factor": "super-resolution",
        "kernel_size": "deblur",
        "blur_sigma": "deblur",
    }
    for name, owner in belongs.items():
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given and owner != task:
            raise Problem(f"--{name.replace('_', '-')} belongs to --task {owner}, and the task is {task}")
        if given and name == "keep" and (mask is not None or not degrade):
            raise Problem("--keep is the share of pixels that --degrade keeps where no --mask is given")
    degrading: dict[str, Any] = {
        key: options.pop(key) for key in ("factor", "kernel_size", "blur_sigma", "noise", "keep")
    }
    with told(*BAD):
        picture, opaque = restoring.read_photo(photo)
        shown = None if mask is None else read_image(mask)
    job = Job(context, options)
    size = job.model.size
    if size is None:
        raise Problem(f"the model '{options['model']}' does not tell the size of its pictures, which restoring needs")
    with told(*BAD):
        degrading |= {"degrade": degrade, "resize": resize, "mask": shown, "seed": job.seeds[0]}
        known = restoring.degraded(picture, opaque, task, size, job.model.channels, **degrading)
        loss = Measurement(known.operator, known.y, sigma=degrading["noise"])
        guidance = job.guidance(loss)
    with job.folder(output.default_folder(photo.stem, task)) as folder:
        job.say(f"Drawing {len(job.seeds)} restorations, guided by {options['recipe']}.")
        images, record = job.draw(guidance)
        output.save_pictures(folder, images, job.seeds)
        known.file.save(folder / "degraded.png")
        residual, floor = job.mean_loss(loss, images), float(torch.as_tensor(loss.floor).mean())
        summary = f"{task}: residual {residual:.4g}, of which noise of {degrading['noise']:g} explains {floor:.4g}"
        results: dict[str, Any] = {"residual": residual, "floor": floor}
        blocks = [Block("degraded", known.picture), Block("restored", images, columns=min(len(images), 4))]
        if known.original is not None:
            output.to_pil(known.original[0]).save(folder / "original.png")
            blocks.append(Block("original", known.original))
            quality, start = (restoring.psnr(pictures, known.original) for pictures in (images, known.filled))
            results["psnr"] = {"restored": quality, "degraded": start.item()}
            told_psnr = (
                f"{quality.mean():.2f} dB to the original (mean of {len(images)}; degraded {start.item():.2f} dB)"
            )
            summary = f"{summary}; PSNR {told_psnr}"
        job.write(folder, guidance, record, blocks, summary, results)
        job.finish(folder, record, summary)
        if residual > 3 * floor > 0:
            job.say("The pictures do not fit the photo: take more --steps, or a --model of such pictures.")


_APART = ("loss", "strength", "project", "changes")  # of a recipe, what --set cannot set


@main.command("recipes")
def list_recipes() -> None:
    """List the methods that --recipe takes."""
    rows = []
    for name, method in methods.available().items():
        own = [one for one in inspect.signature(method).parameters if one not in _APART]
        rows.append((name, (method.__doc__ or "").strip().split("\n")[0] + f" [{', '.join(own)}]" * bool(own)))
    _table(
        rows,
        f"Use one with --recipe NAME; for --model {TOKENS}, auto or tokens. In brackets: settings of its own for "
        "--set NAME=VALUE, which also takes start, stop, every, through and other fields of a Guidance.",
    )


@main.command("losses")
def list_losses() -> None:
    """List the losses that --loss takes."""
    rows = [tuple(entry) for entry in registry.available()]
    _table(rows, "Use them with --loss, also several times, with a weight in front: --loss '2.0*clip-text:a boot'.")


def _table(rows: list[tuple[str, ...]], note: str) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        click.echo("  ".join([*(f"{text:<{width}}" for text, width in zip(row, widths)), row[-1]]).rstrip())
    click.echo(f"\n{note}")


def _losses(prompt: str | None, texts: tuple[str, ...], clip_model: str, clip_pretrained: str) -> Composable:
    """The prompt's CLIP loss and the named ones, summed."""
    parts: list[Composable] = []
    if texts:
        parts.append(registry.parse(texts, clip_model=clip_model, clip_pretrained=clip_pretrained))
    if prompt is not None:
        parts.insert(0, ClipText(prompt, model=clip_model, pretrained=clip_pretrained))
    loss = as_losses(sum(parts))
    for term in loss.terms():
        if isinstance(term.loss, ClipText) and clip_model == "demo":
            _in_demo_world(str(term.loss.settings["prompt"]))
    return loss


def _in_demo_world(prompt: str) -> None:
    if demo.class_of(prompt) is None:
        raise Problem(
            f"the demo draws and knows ten kinds of clothing ({', '.join(demo.CLASSES)}), and '{prompt}' does not name "
            "exactly one of them; name one, or choose another --model and --clip-model"
        )


main.add_command(imitate_command)
main.add_command(tune_command)
main.add_command(check_command)


if __name__ == "__main__":
    main()
