"""What the command line draws with: the demo, a folder or a hub id, adapted to one way of drawing pictures."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..losses.loss import said
from ..losses.reading import check_folder, no_code, read_json
from ..samplers import Denoiser, Record, Solver, denoiser, prediction_kind, sample
from .cli_tokens import NAME as TOKENS
from .cli_tokens import TokenModel, load_tokens
from .guidance import Guidance
from .plugin import guide

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Short names of schedulers: the diffusers class, and what it is told besides the model's own scheduler's config."""

_ETA = 1.0  # DDIM as stochastic as DDPM: guidance works best with it, and `sample` has the same default
_MODELS = f"a model is 'demo', '{TOKENS}', a folder in diffusers' format, or a hub id"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class PixelModel:
    """A model of pixels, drawn with the library's own loop.

    Attributes:
        denoiser: the adapted model.
        change: a picture `(3, H, W)` to change, and how far, see `sample`; None to draw from noise alone.
    """

    denoiser: Denoiser
    change: tuple[torch.Tensor, torch.Tensor] | None = None
    largest_batch = 64
    takes_prompt = False

    @property
    def scheduler(self) -> Any:
        """The diffusers scheduler that it is drawn with."""
        return self.denoiser.scheduler

    @property
    def channels(self) -> int:
        """1 for a model of grey pictures, 3 for one in colour."""
        return self.denoiser.shape[0]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of its pictures; None where they cannot be told."""
        return self.denoiser.shape[1], self.denoiser.shape[2]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.denoiser.device

    def draw(
        self,
        guidance: Guidance | None,
        seeds: list[int],
        steps: int,
        batch_size: int,
        prompt: str = "",
        progress: bool = False,
    ) -> tuple[torch.Tensor, Record]:
        """Pictures `(N, 3, H, W)` in [0, 1] on the CPU, one per seed, and the record; plain ones without guidance."""
        options = dict(steps=steps, seeds=seeds, eta=_ETA, batch_size=batch_size, progress=progress)
        if self.change is not None:
            options |= dict(source=self.change[0], change_map=self.change[1])
        result = sample(self.denoiser, guidance, **options)
        return result.images.float().expand(-1, 3, -1, -1), result.record


@dataclass(frozen=True)
class PipelineModel:
    """A text-to-image pipeline, drawn by its own call through the plug-in.

    Attributes:
        pipe: the diffusers pipeline.
        change: as in `PixelModel`.
    """

    pipe: Any
    change: tuple[torch.Tensor, torch.Tensor] | None = None
    largest_batch = 1
    channels = 3
    takes_prompt = True

    @property
    def scheduler(self) -> Any:
        """The diffusers scheduler that it is drawn with."""
        return self.pipe.scheduler

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of its pictures; None where they cannot be told."""
        network = getattr(self.pipe, "unet", None) or getattr(self.pipe, "transformer", None)
        side = getattr(getattr(network, "config", None), "sample_size", None)
        if side is None:
            return None
        factor = getattr(self.pipe, "vae_scale_factor", 1)
        height, width = (side, side) if isinstance(side, int) else side
        return height * factor, width * factor

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.pipe.device

    def draw(
        self,
        guidance: Guidance | None,
        seeds: list[int],
        steps: int,
        batch_size: int,
        prompt: str = "",
        progress: bool = False,
    ) -> tuple[torch.Tensor, Record]:
        """Pictures `(N, 3, H, W)` in [0, 1] on the CPU, one per seed, and the record; plain ones without guidance."""
        self.pipe.set_progress_bar_config(disable=not progress)
        change = {} if self.change is None else dict(source=self.change[0], change_map=self.change[1])
        call = self.pipe if guidance is None and not change else guide(self.pipe, guidance, **change)
        known = {"eta": _ETA} if "eta" in inspect.signature(type(self.pipe).__call__).parameters else {}
        pictures, records = [], []
        for start in range(0, len(seeds), batch_size):
            sources = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            output = call(
                prompt=[prompt] * len(sources), num_inference_steps=steps, generator=sources, output_type="pt", **known
            )
            pictures.append(output.images.float().cpu())
            if guidance is not None:
                records.append(output.record)
        return torch.cat(pictures), Record.joined(records) if records else Record()


def find_device(name: str) -> torch.device:
    """The device of a name; 'auto' is CUDA where there is one, else the CPU. Of processes that `accelerate launch`
    starts, each gets a CUDA device of its own as far as they go.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = os.environ.get("LOCAL_RANK")
        return torch.device("cuda" if local is None else f"cuda:{int(local) % torch.cuda.device_count()}")
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here.append("mps")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (str(device) not in here and not (name == "cuda" and len(here) > 1 and "cuda:0" in here)):
        raise ValueError(f"there is no device '{name}' here; there are {', '.join(here)} (or auto)")
    return device


def known_scheduler(name: str) -> str:
    """The name, where it is one of `SCHEDULERS`.

    Raises:
        LookupError: it is not; the message names the closest.
    """
    if name not in SCHEDULERS:
        close = difflib.get_close_matches(name, SCHEDULERS, 1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise LookupError(f"there is no scheduler '{name}'; {hint}there are {', '.join(SCHEDULERS)}")
    return name


def check_model(name: str) -> None:
    """See whether there can be a model of that name, before anything is loaded.

    Raises:
        OSError: it is a file, or a folder that is not there.
    """
    if name in ("demo", TOKENS):
        return
    folder = Path(name).expanduser()
    if folder.exists() and not folder.is_dir():
        raise OSError(f"the model '{name}' is a file; {_MODELS}")
    if not folder.exists() and not _HUB_ID.fullmatch(name):
        raise OSError(f"there is no folder '{name}'; {_MODELS}")


def load_model(
    name: str, scheduler: str | None, steps: int, device: torch.device, dtype: torch.dtype
) -> PixelModel | PipelineModel | TokenModel:
    """The model of a name: 'demo', 'demo-tokens', a folder in diffusers' format, or a hub id.

    Args:
        name: a folder holds a pipeline (`model_index.json`), or `unet/` and `scheduler/`.
        scheduler: one of `SCHEDULERS`, built from the config of the model's own; None for its own.
        steps: solver steps, to see whether the scheduler can make so many.
        device, dtype: where and in what precision to run.

    Raises:
        OSError: there is no such model, or it cannot be read.
        ValueError: the model is of another kind, or does not go with the scheduler.
    """
    import diffusers

    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # errors are told in a sentence below
    diffusers.utils.logging.disable_progress_bar()
    if name == TOKENS:
        return load_tokens(scheduler, device, dtype)
    model = _load(name, device, dtype)
    if scheduler is not None:
        model = _with_scheduler(model, scheduler)
    _check_steps(model.scheduler, steps)
    return model


def _check_steps(scheduler: Any, steps: int) -> None:
    """Find an unreadable noise level, or too many steps, before the work."""
    trained = getattr(scheduler.config, "num_train_timesteps", None)
    try:
        Solver.of(scheduler, steps)
    except ValueError as error:
        if trained is None or steps <= trained:
            raise
        raise ValueError(
            f"{type(scheduler).__name__} makes at most {trained} steps with this model, got {steps}"
        ) from error


def _load(name: str, device: torch.device, dtype: torch.dtype) -> PixelModel | PipelineModel:
    if name == "demo":
        from ..samplers.demo import FOLDER, load_demo

        try:
            return PixelModel(load_demo(device, dtype, folder=FOLDER))
        except (OSError, ValueError) as error:
            raise OSError(f"the demo's weights are not where they belong, '{FOLDER}': {said(error)}") from error
    from diffusers import DiffusionPipeline

    check_model(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            return _load_parts(folder, device, dtype)
        name = str(folder)
    try:
        place = folder if folder.is_dir() else Path(DiffusionPipeline.download(name, trust_remote_code=False))
        check_folder(place)
        for index in (place / "model_index.json", *place.glob("*/model_index.json")):
            check_index(read_json(index))
        with no_code():
            pipe = DiffusionPipeline.from_pretrained(place, torch_dtype=dtype, trust_remote_code=False).to(device)
    except Exception as error:  # what a broken or a foreign folder raises is not limited to a few kinds
        what = "the pipeline in" if folder.is_dir() else "no folder of that name is here, and from the hub"
        raise OSError(f"the model '{name}' cannot be loaded: {what} '{name}' gave {said(error)}") from error
    return _of_pipeline(pipe, name)


def check_index(index: Any) -> None:
    """See that a pipeline's `model_index.json` names classes of diffusers, transformers and lossguide only.

    Others would come out of code that lies beside it, which older diffusers run unasked.

    Raises:
        ValueError: it names others, or is no description of a pipeline.
    """
    from diffusers import pipelines

    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError("its model_index.json does not name a class of diffusers, and code of its own is not run")
    for part, value in index.items():
        pair = isinstance(value, (list, tuple)) and len(value) == 2 and any(isinstance(one, str) for one in value)
        if part.startswith("_") or not pair:
            continue
        library, kind = map(str, value)
        known = library.partition(".")[0] in ("diffusers", "transformers", "lossguide") or hasattr(pipelines, library)
        if not known or re.match(r"Auto[A-Z]", kind):  # such classes look for code in the folder
            raise ValueError(f"its {part} is {library}.{kind}, which may be code of its own, and that is not run")


def _load_parts(folder: Path, device: torch.device, dtype: torch.dtype) -> PixelModel:
    """A folder with `unet/` and `scheduler/`, or such a `unet` itself beside its scheduler."""
    from diffusers import DDIMScheduler, UNet2DModel

    root = folder if (folder / "unet").is_dir() else folder.resolve().parent
    unet = root / "unet" if root == folder else folder
    if not (unet / "config.json").is_file() or not (root / "scheduler" / "scheduler_config.json").is_file():
        raise OSError(
            f"the folder '{folder}' holds no model in diffusers' format: it has neither model_index.json nor "
            "unet/config.json and scheduler/scheduler_config.json"
        )
    try:
        for part in (unet, root / "scheduler"):
            check_folder(part)
        with no_code():
            network = UNet2DModel.from_pretrained(unet, torch_dtype=dtype).to(device).eval()
        config = DDIMScheduler.load_config(root / "scheduler")
        import diffusers

        scheduler = getattr(diffusers, config.get("_class_name", ""), DDIMScheduler).from_config(config)
    except Exception as error:  # as above
        raise OSError(f"the model in '{folder}' cannot be loaded: {said(error)}") from error
    return PixelModel(denoiser(network, scheduler))


def _of_pipeline(pipe: Any, name: str) -> PixelModel | PipelineModel:
    from diffusers import UNet2DModel

    unet = getattr(pipe, "unet", None)
    latent = any("vae" in part for part in pipe.components)
    if isinstance(unet, UNet2DModel) and not latent:
        return PixelModel(denoiser(unet.eval(), pipe.scheduler))
    parameters = inspect.signature(type(pipe).__call__).parameters
    needed = [
        key
        for key, p in parameters.items()
        if key not in ("self", "prompt") and p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD
    ]
    if "prompt" not in parameters or "image" in parameters or needed:
        raise ValueError(
            f"'{name}' is a {type(pipe).__name__}, which the command line cannot call; it takes models of pixels "
            "(DDPMPipeline, DDIMPipeline) and text-to-image pipelines; lossguide.guidance.guide takes others in Python"
        )
    return PipelineModel(pipe)


def _with_scheduler(model: PixelModel | PipelineModel, name: str) -> PixelModel | PipelineModel:
    import dataclasses

    import diffusers

    kind = prediction_kind(model.scheduler)
    class_name, options = SCHEDULERS[name]
    made = getattr(diffusers, class_name).from_config(model.scheduler.config, **options)
    if prediction_kind(made) != kind:
        raise ValueError(
            f"the scheduler '{name}' ({class_name}) is not for a model that predicts {kind}, as this one does; leave "
            f"out --scheduler for the model's own {type(model.scheduler).__name__}"
        )
    if isinstance(model, PixelModel):
        return PixelModel(dataclasses.replace(model.denoiser, scheduler=made))
    model.pipe.scheduler = made
    return model
