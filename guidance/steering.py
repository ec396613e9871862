"""Stands between a pipeline and its scheduler for the time of one call, and guides each step there.

The pipeline gets a copy of its scheduler, whose `step` first performs the guided step. The model output that arrives
there carries the graph back to the latents through the pipeline's own classifier-free guidance and adapters, so that no
second model call is needed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..samplers.change import Change, UnsuitableChange
from ..samplers.random import generators
from ..samplers.solver import Solver
from .adapters import Adapter
from .guidance import Guidance
from .preview import Preview
from .step import Run

# what a scheduler looks up in its own timesteps, in which no step may stand twice
_LOOKUPS = ("scale_model_input", "add_noise", "scale_noise", "get_velocity", "index_for_timestep", "set_begin_index")
_MODELS = ("unet", "transformer", "transformer_2", "prior", "decoder")
_PREPARING = ("prepare_latents", "prepare_intermediate_images")


class Steering:
    """One call of a pipeline under a guidance: counts the visits and guides each step.

    Args:
        pipe: the pipeline, which runs on a copy of its scheduler while `in_place`.
        guidance: what to carry out.
        adapter: what is known of the pipeline.
        decode: latents -> what the losses see.
        seeds: batch size -> seeds of guidance's own draws.
        preview: shows x0 on the way; None for nothing.
    """

    def __init__(
        self,
        pipe: Any,
        guidance: Guidance,
        adapter: Adapter,
        decode: Callable[[torch.Tensor], torch.Tensor],
        seeds: Callable[[int], list[int]],
        preview: Preview | None = None,
    ):
        self.pipe, self.guidance, self.adapter = pipe, guidance, adapter
        self.decode, self.seeds, self.preview = decode, seeds, preview
        self.arguments: dict[str, Any] = {}
        self.after_last: Callable[[], None] = lambda: None  # called when the last step has been guided
        self.movable: Callable[[torch.Tensor], torch.Tensor | None] = lambda x: None  # see `Run`
        self.change: Callable[[torch.Tensor], Change] | None = None  # for the first latents; see `Run`
        self.run: Run | None = None
        self.visits: list = []
        self.position: int | None = None
        self._schedule: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._single: torch.Tensor | None = None  # of latents that the pipeline carries twice, the leaf
        self._handed: torch.Tensor | None = None  # the leaf that the pipeline was given, of which it may make a copy
        self._first: torch.Tensor | None = None  # latents that wait for the source, until there is a schedule
        self._inside = False
        self._of: dict[str, Callable] = {}
        self.started = time.perf_counter()

    @contextmanager
    def in_place(self) -> Iterator[Steering]:
        """The pipeline with this steering in it, and as found afterwards."""
        found = self.pipe.scheduler
        with ExitStack() as stack:
            self.scheduler = self.pipe.scheduler = copy.deepcopy(found)
            stack.callback(setattr, self.pipe, "scheduler", found)
            self.scheduler.__deepcopy__ = self._unsteered
            for name in ("set_timesteps", "step", *_LOOKUPS):
                if hasattr(self.scheduler, name):  # pipelines look at the signature to see which options there are
                    self._of[name] = getattr(self.scheduler, name)
                    own = getattr(self, name, None) or functools.partial(self._looked_up, name)
                    setattr(self.scheduler, name, functools.wraps(self._of[name])(functools.partial(own)))
            own = {"get_timesteps": self.get_timesteps, "progress_bar": self.progress_bar}
            own |= dict.fromkeys(_PREPARING, self.prepare_latents) | {"prepare_mask_latents": self.prepare_mask}
            for name, stand_in in own.items():
                if hasattr(self.pipe, name):
                    stack.enter_context(instead(self.pipe, name, stand_in))
            guider = getattr(self.pipe, "guider", None)
            if hasattr(guider, "set_state"):
                stack.enter_context(instead(guider, "set_state", self.set_state))
            if not any(hasattr(self.pipe, name) for name in _PREPARING):
                for name in _MODELS:
                    model = getattr(self.pipe, name, None)
                    if isinstance(model, torch.nn.Module):
                        hook = model.register_forward_pre_hook(self._first_input, with_kwargs=True)
                        stack.callback(hook.remove)
            yield self

    # What the pipeline calls, in the order in which it does

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Set the scheduler's timesteps, then let the pipeline see each as often as it will be visited."""
        self._of["set_timesteps"](*args, **kwargs)
        solver, earlier = Solver(self.scheduler), self.run
        if list(inspect.signature(type(self.scheduler).step).parameters)[1:4] != ["model_output", "timestep", "sample"]:
            raise ValueError(
                f"{type(self.scheduler).__name__} takes more for a step than a sample and what the model made of it, "
                "and cannot be guided; choose another scheduler of pipe.scheduler.compatibles"
            )
        self.run = self.guidance.begin(solver, self.decode, self.seeds)
        self.run.preview, self.run.movable = self.preview, self.movable
        if earlier is not None:  # pipelines that sample several times, such as long videos piece by piece
            self.run.go_on_from(earlier)
        self.position = None
        if self._first is not None:
            self._first.data.copy_(self._from_source(self._first))
        self._expect(self.run.visits)

    def get_timesteps(self, own: Callable, *args: Any, **kwargs: Any) -> Any:
        """Where a pipeline that starts in the middle of its schedule (image-to-image) says so."""
        if self.run is None:
            return own(*args, **kwargs)
        times = self.run.solver.timesteps
        bound = inspect.signature(own).bind(*args, **kwargs)
        if bound.arguments.get("num_inference_steps") == len(self.visits):  # counted in what the pipeline sees
            bound.arguments["num_inference_steps"] = len(times)
        if len(_numbers(bound.arguments.get("timesteps"))) == len(self.visits):
            bound.arguments["timesteps"] = times
        with self._true_schedule():
            result = own(*bound.args, **bound.kwargs)
        mine = result[0] if isinstance(result, tuple) else result
        if not isinstance(mine, torch.Tensor) or not torch.equal(mine.cpu(), times[len(times) - len(mine) :].cpu()):
            return result
        self._expect([visit for visit in self.run.visits if visit.step >= len(times) - len(mine)])
        return (self.scheduler.timesteps, *result[1:]) if isinstance(result, tuple) else self.scheduler.timesteps

    def prepare_latents(self, own: Callable, *args: Any, **kwargs: Any) -> Any:
        """The first latents, as a leaf that requires grad where gradients are taken through the denoiser."""
        made = own(*args, **kwargs)
        self.arguments.update(inspect.signature(own).bind(*args, **kwargs).arguments, prepared=made)
        first, *rest = made if isinstance(made, tuple) else (made,)
        if self.change is not None and self.run is None:  # FLUX and its kin choose their timesteps afterwards
            self._first = first = self._leaf(first.clone())
        else:
            first = self._leaf(self._from_source(first))
        return (first, *rest) if isinstance(made, tuple) else first

    def prepare_mask(self, own: Callable, *args: Any, **kwargs: Any) -> Any:
        """Where an inpainting pipeline says what is to be painted, in pixels and in latents."""
        made = own(*args, **kwargs)
        pixels = next(iter(inspect.signature(own).bind(*args, **kwargs).arguments.values()))
        self.arguments.update(mask_pixels=pixels, mask_latents=made[0] if isinstance(made, tuple) else made)
        return made

    def first_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents as the loop of a modular pipeline begins: a leaf, and gradients switched on where needed."""
        torch.set_grad_enabled(bool(self.visits) and self.run.needs_graph(self.visits[0]))
        return self._leaf(self._from_source(latents))

    @torch.no_grad()
    def _from_source(self, latents: torch.Tensor) -> torch.Tensor:
        """The first latents, with the source and noise in place of what does not move yet."""
        self._first = None
        if self.change is None or self.run is None:
            return latents
        latents = latents.detach()
        self.run.change = self.change(latents)
        return self.run.change.begin(latents, self.run.solver, generators(self.seeds(len(latents)), "source"))

    def _leaf(self, latents: torch.Tensor) -> torch.Tensor:
        if not self.guidance.active or self.guidance.through != "denoiser":
            return latents
        self._handed = latents.detach().requires_grad_(True)
        return self._handed

    def progress_bar(self, own: Callable, *args: Any, **kwargs: Any) -> Any:
        """The loop ends where its progress bar does, also when it is cut short."""
        return _Ending(own(*args, **kwargs), self.ended)

    def ended(self) -> None:
        """No step is left to be guided: what comes is the pipeline's own decoding, without gradients."""
        if self.position is not None:
            torch.set_grad_enabled(False)
            self.after_last()

    def set_state(self, own: Callable, *args: Any, **kwargs: Any) -> Any:
        """A guider of a modular pipeline counts solver steps, not visits."""
        bound = inspect.signature(own).bind(*args, **kwargs)
        if "step" in bound.arguments and self.visits:
            here = min(bound.arguments["step"], len(self.visits) - 1)
            bound.arguments["step"] = self.visits[here].step - self.visits[0].step
        return own(*bound.args, **bound.kwargs)

    def scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The scheduler's own scaling of the model's input; the first latents become a leaf where they are not yet."""
        if torch.is_grad_enabled() and self.position is None and sample.is_leaf and not self._inside:
            sample.requires_grad_(True)
        if self.adapter.doubled and not self._inside and (self.arguments.get("guidance_scale") or 0) > 1:
            self._single = sample[: len(sample) // 2].detach().requires_grad_(torch.is_grad_enabled())
            sample = torch.cat([self._single, self._single])
        return self._looked_up("scale_model_input", sample, *args, **kwargs)

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The guided step in place of the scheduler's; same arguments and output."""
        if self._inside or self.run is None:
            return self._of["step"](model_output, timestep, sample, *args, **kwargs)
        if self.position is None:
            self._find_start(timestep)
            self.position = 0
        if self.position == len(self.visits):
            raise ValueError(
                f"{type(self.pipe).__name__} calls its scheduler more often than it has steps, which is not known here"
            )
        if kwargs.get("per_token_timesteps") is not None:
            raise ValueError(f"{type(self.pipe).__name__} gives each token a noise of its own, which is not known here")
        visit = self.visits[self.position]
        if self.change is not None and (self.run.change is None or len(self.visits) != len(self.run.visits)):
            raise UnsuitableChange(
                f"{type(self.pipe).__name__} does not begin with noise of its own at the first of its timesteps, and "
                "cannot take a change map: use its text-to-image pipeline, or sample(...) with a model of pixels"
            )
        kwargs["return_dict"] = kwargs.get("return_dict", True)
        x, single, output = sample, self._single, None
        if single is not None:
            x, model_output = single, model_output[: len(single)]
        channels = x.shape[1]
        variance = model_output[:, channels:].detach()  # not empty where the model also predicts a variance

        def solve(prediction: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            nonlocal output
            if variance.shape[1]:
                prediction = torch.cat([prediction, variance], 1)
            x = x.detach()
            if single is not None:
                prediction, x = torch.cat([prediction, prediction]), torch.cat([x, x])
            output = self._of["step"](prediction, timestep, x, *args, **kwargs)
            return output[0] if single is None else output[0][: len(single)]

        with self._true_schedule():
            x = self.run.step(x, model_output[:, :channels], visit, solve, self.started, self._handed)
        self.position += 1
        more = self.position < len(self.visits) and self.run.needs_graph(self.visits[self.position])
        torch.set_grad_enabled(more)
        if self.position == len(self.visits):
            self.ended()
        if single is not None:
            x = torch.cat([x, x])
        elif more:
            x = x.detach().requires_grad_(True)
        self._single, self._handed = None, x if more else None
        self.started = time.perf_counter()
        if kwargs["return_dict"]:
            output.prev_sample = x
            return output
        landed, rest = output[0], output[1:]
        if self.position == len(
            self.visits
        ):  # some schedulers (LCM) say twice where they end; pipelines read the second
            rest = (x if _same(one, landed) else one for one in rest)
        return (x, *rest)

    # Its own affairs

    def _looked_up(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with self._true_schedule():
            return self._of[name](*args, **kwargs)

    def _expect(self, visits: list) -> None:
        """From here on the pipeline sees the schedule as these visits take it."""
        self.visits, solver = visits, self.run.solver
        steps = [visit.step for visit in visits]
        self._schedule = {"timesteps": (solver.timesteps, solver.timesteps[steps])}
        sigmas = solver.sigmas
        if sigmas is not None:
            self.scheduler.sigmas = sigmas
        if sigmas is not None and len(sigmas) == len(solver) + 1 and len(steps) > len(solver):
            self._schedule["sigmas"] = (sigmas, sigmas[[*steps, len(solver)]])
        for name, (_, visited) in self._schedule.items():
            setattr(self.scheduler, name, visited)
        torch.set_grad_enabled(bool(visits) and self.run.needs_graph(visits[0]))

    def _unsteered(self, memo: dict) -> Any:
        """What a pipeline gets that copies its scheduler: the scheduler alone."""
        with self._true_schedule():
            own = {k: v for k, v in vars(self.scheduler).items() if k not in self._of and k != "__deepcopy__"}
        bare = copy.copy(type(self.scheduler).from_config(self.scheduler.config))
        vars(bare).update(copy.deepcopy(own, memo))
        return bare

    @contextmanager
    def _true_schedule(self) -> Iterator[None]:
        """The scheduler itself must not see repeated timesteps: it looks its place up in them."""
        if self._inside:
            yield
            return
        self._inside = True
        try:
            for name, (true, _) in self._schedule.items():
                setattr(self.scheduler, name, true)
            yield
        finally:
            self._inside = False
            for name, (_, visited) in self._schedule.items():
                setattr(self.scheduler, name, visited)

    def _find_start(self, timestep: Any) -> None:
        """Where the pipeline starts, should it have cut its schedule by itself."""
        first = float(torch.as_tensor(timestep).flatten()[0])
        times = self.run.solver.times
        if first == times[self.visits[0].step]:
            return
        places = [i for i, visit in enumerate(self.visits) if times[visit.step] == first]
        if len(self.visits) > len(times) or not places:
            raise ValueError(
                f"{type(self.pipe).__name__} starts in the middle of its schedule, at timestep {first:g}, in a way "
                "that is not known here: use time_travel=None, or a pipeline with get_timesteps"
            )
        self.visits = self.visits[places[0] :]

    def _first_input(self, module, args, kwargs) -> None:
        # pipelines that hand their noise to the model as it is (DDPM) neither prepare latents nor scale the input
        if torch.is_grad_enabled() and self.position is None:
            x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
            if isinstance(x, torch.Tensor) and x.is_leaf and x.is_floating_point():
                x.requires_grad_(True)


class _Ending:
    """A progress bar, as a context or to iterate over, that tells when it is left."""

    def __init__(self, bar: Any, ended: Callable[[], None]):
        self._bar, self._ended = bar, ended

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._ended()
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        yield from self._bar
        self._ended()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def _numbers(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.dim()) else ()


def _same(one: Any, other: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)


@contextmanager
def instead(owner: Any, name: str, own: Callable) -> Iterator[None]:
    """For the time, `owner.name(...)` is `own(what was there, ...)`, on this object alone."""
    there, found = getattr(owner, name), vars(owner).get(name)
    stand_in = functools.partial(own, there)
    vars(owner)[name] = functools.wraps(there)(stand_in) if hasattr(there, "__name__") else stand_in
    try:
        yield
    finally:
        if found is None:
            vars(owner).pop(name, None)
        else:
            vars(owner)[name] = found
