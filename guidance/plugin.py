"""The plug-in: guide any diffusers pipeline through its own `__call__`, without copying or subclassing it.

For the time of one call the pipeline gets a copy of its scheduler, whose `step` first performs the guided step. The
model output that arrives there carries the graph back to the latents through the pipeline's own classifier-free
guidance and adapters, so that no second model call is needed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..samplers.denoiser import as_picture, frozen
from ..samplers.record import Record
from ..samplers.solver import Solver
from .guidance import Guidance
from .proximal import Proximal
from .step import Run


class Guided:
    """A pipeline and a guidance; call it like the pipeline itself. Made by `guide`.

    Attributes:
        pipe: the pipeline, as found before and after every call.
        guidance: what steers it.
        record: of the latest call; also an attribute `record` of what that call returned, where its class allows.
    """

    def __init__(self, pipe, guidance: Guidance, decode: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.pipe = pipe
        self.guidance = guidance
        self.record: Record | None = None
        self._decode = decode or _decoder(pipe)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline with its own arguments; returns its own output, with the record."""
        call = getattr(type(self.pipe).__call__, "__wrapped__", type(self.pipe).__call__)
        arguments = inspect.signature(call).bind_partial(self.pipe, *args, **kwargs).arguments
        modules = [m for m in getattr(self.pipe, "components", {}).values() if isinstance(m, torch.nn.Module)]
        if not self.guidance.active:
            modules = []  # without a graph nothing needs freezing, and torch rounds frozen layers differently
        grad = torch.is_grad_enabled()
        with (
            _own_scheduler(self.pipe) as scheduler,
            frozen(*modules),
            _steered(self, scheduler, _seeds(arguments)) as steering,
        ):
            try:
                torch.set_grad_enabled(False)
                output = call(self.pipe, *args, **kwargs)
            finally:
                torch.set_grad_enabled(grad)
        self.record = steering.run.record if steering.run is not None else Record()
        self.record.warn_of_nonfinite()
        try:
            output.record = self.record
        except AttributeError:
            pass  # a plain tuple (return_dict=False) takes no attribute; `self.record` has it
        return output


def guide(pipe, guidance: Guidance, *, decode: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Guided:
    """Plug a guidance into a diffusers pipeline: `guide(pipe, recipes.auto(loss))(num_inference_steps=50).images`.

    The returned object takes the pipeline's own arguments and returns its own output, plus `record`. The pipeline and
    its scheduler are left as found, also after an exception. With strength 0 or no loss the output is bitwise the plain
    one. Pass a generator per picture for pictures that do not depend on their batch.

    Args:
        pipe: a diffusers pipeline with a scheduler: DDPM, DDIM and Stable Diffusion pipelines are tested.
        guidance: what a recipe returned.
        decode: latents -> picture `(B, 3, H, W)` in [0, 1], differentiable; by default the pipeline's own VAE, or the
            pixels.

    Raises:
        TypeError: the pipeline has no scheduler with `set_timesteps` and `step`, or `guidance` is not a `Guidance`.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "set_timesteps"):
        raise TypeError(f"{type(pipe).__name__} cannot be guided: it has no scheduler with set_timesteps and step")
    if isinstance(guidance, Guidance) and isinstance(guidance.toward, Proximal) and hasattr(pipe, "vae"):
        raise TypeError(f"{guidance.name} needs a pixel model: through a VAE no measurement is linear")
    if isinstance(guidance, Guidance) and guidance.candidates > 1:
        raise TypeError(f"{guidance.name} draws particles, which pipelines cannot; use sample(denoiser(...), guidance)")
    if not isinstance(guidance, Guidance):
        raise TypeError(
            f"guide(pipe, guidance) takes what a recipe returns, such as recipes.auto(loss); "
            f"got {type(guidance).__name__}"
        )
    return Guided(pipe, guidance, decode)


def _decoder(pipe) -> Callable[[torch.Tensor], torch.Tensor]:
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return as_picture

    def decode(latents: torch.Tensor) -> torch.Tensor:
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        z = (latents / vae.config.scaling_factor + shift).to(vae.dtype)
        return as_picture(vae.decode(z, return_dict=False)[0].float())

    return decode


def _seeds(arguments: dict[str, Any]) -> Callable[[int], list[int]]:
    """Seeds of guidance's own draws for a batch: those of the caller's generators, else torch's and the next ones."""
    generator = arguments.get("generator")

    def seeds(batch: int) -> list[int]:
        if isinstance(generator, (list, tuple)) and len(generator) == batch:
            return [g.initial_seed() for g in generator]
        first = generator.initial_seed() if isinstance(generator, torch.Generator) else torch.initial_seed()
        return [first + i for i in range(batch)]

    return seeds


@contextmanager
def _own_scheduler(pipe) -> Iterator[Any]:
    """For the time of the call the pipeline uses a copy of its scheduler, which is yielded."""
    found = pipe.scheduler
    try:
        pipe.scheduler = copy.deepcopy(found)
        yield pipe.scheduler
    finally:
        pipe.scheduler = found


class _Steering:
    """Stands between a pipeline and the copy of its scheduler for one call: counts the visits and guides each step."""

    def __init__(self, guided: Guided, scheduler, seeds: Callable[[int], list[int]]):
        self.guided, self.scheduler, self.seeds = guided, scheduler, seeds
        self.run: Run | None = None
        self.position: int | None = None
        self.timesteps = self.visited = None
        self.started = time.perf_counter()
        self._of: dict[str, Callable] = {}
        for own in (self.set_timesteps, self.step, self.scale_model_input, self.set_begin_index):
            name = own.__name__
            if hasattr(scheduler, name):  # pipelines look at the signature to see which options there are
                self._of[name] = getattr(scheduler, name)
                setattr(scheduler, name, functools.wraps(self._of[name])(functools.partial(own)))

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Set the scheduler's timesteps, then let the pipeline see each as often as it will be visited."""
        self._of["set_timesteps"](*args, **kwargs)
        solver = Solver(self.scheduler)
        self.run = self.guided.guidance.begin(solver, self.guided._decode, self.seeds)
        self.position, self.timesteps, self.visited = None, solver.timesteps, solver.timesteps
        if len(self.run.visits) > len(solver):
            self.visited = solver.timesteps[[visit.step for visit in self.run.visits]]
        self.scheduler.timesteps = self.visited
        torch.set_grad_enabled(self.run.needs_graph(self.run.visits[0]))

    @contextmanager
    def _true_timesteps(self) -> Iterator[None]:
        """The scheduler itself must not see repeated timesteps: it looks its place up in them."""
        self.scheduler.timesteps = self.timesteps
        try:
            yield
        finally:
            self.scheduler.timesteps = self.visited

    def scale_model_input(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The scheduler's own scaling of the model's input."""
        with self._true_timesteps():
            return self._of["scale_model_input"](*args, **kwargs)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines that start in the middle say so here."""
        if begin_index:
            raise self._starts_in_the_middle()
        self._of["set_begin_index"](begin_index)

    def _starts_in_the_middle(self) -> ValueError:
        return ValueError(
            f"{type(self.guided.pipe).__name__} starts in the middle of its schedule (image-to-image), which is not "
            "supported yet; use a pipeline that starts from noise, or strength=1.0"
        )

    def leaf(self, x: torch.Tensor) -> torch.Tensor:
        """The first latents, as a leaf that requires grad where gradients are taken through the denoiser."""
        guidance = self.guided.guidance
        return x.detach().requires_grad_(True) if guidance.goes_through(0) else x

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The guided step in place of the scheduler's; same arguments and output."""
        run, visits = self.run, self.run.visits
        if self.position is None:
            if self.guided.guidance.active and timestep != self.visited[0]:
                raise self._starts_in_the_middle()
            self.position = 0
        visit = visits[self.position]
        kwargs["return_dict"] = kwargs.get("return_dict", True)
        channels, output = sample.shape[1], None
        variance = model_output[:, channels:].detach()  # not empty where the model also predicts a variance

        def solve(prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
            nonlocal output
            if variance.shape[1]:
                prediction = torch.cat([prediction, variance], 1)
            output = self._of["step"](prediction, timestep, sample.detach(), *args, **kwargs)
            return output[0]

        with self._true_timesteps():
            x = run.step(sample, model_output[:, :channels], visit, solve, self.started)
        self.position += 1
        more = self.position < len(visits) and run.needs_graph(visits[self.position])
        torch.set_grad_enabled(more)
        x.requires_grad_(more)
        self.started = time.perf_counter()
        if not kwargs["return_dict"]:
            return (x, *output[1:])
        output.prev_sample = x
        return output


@contextmanager
def _steered(guided: Guided, scheduler, seeds: Callable[[int], list[int]]) -> Iterator[_Steering]:
    """The steering in place for one call: on the scheduler's copy, and where the pipeline makes its first latents."""
    pipe, steering = guided.pipe, _Steering(guided, scheduler, seeds)

    def first_input(module, args, kwargs):
        # pipelines that hand their noise to the model as it is (DDPM, DDIM) have no prepare_latents to wrap
        if torch.is_grad_enabled() and steering.position is None:
            x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
            if isinstance(x, torch.Tensor) and x.is_leaf and x.is_floating_point():
                x.requires_grad_(True)

    own = "prepare_latents" in vars(pipe)
    prepare = getattr(pipe, "prepare_latents", None)
    models = [getattr(pipe, name, None) for name in ("unet", "transformer")]
    hooks = []
    if prepare is None:
        models = [m for m in models if isinstance(m, torch.nn.Module)]
        hooks = [m.register_forward_pre_hook(first_input, with_kwargs=True) for m in models]
    else:

        @functools.wraps(prepare)
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            made = prepare(*args, **kwargs)
            return (steering.leaf(made[0]), *made[1:]) if isinstance(made, tuple) else steering.leaf(made)

        vars(pipe)["prepare_latents"] = prepare_latents
    try:
        yield steering
    finally:
        for hook in hooks:
            hook.remove()
        if prepare is not None:
            if own:
                vars(pipe)["prepare_latents"] = prepare
            else:
                vars(pipe).pop("prepare_latents", None)
