"""The plug-in: guide any diffusers pipeline through its own `__call__`, without copying or subclassing it."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..samplers.denoiser import frozen
from ..samplers.record import Record
from .adapters import Adapter, Call, adapter_of, autoencoder_of
from .guidance import Guidance
from .modular import is_modular, undecorated
from .panels import panels_of
from .preview import Preview
from .proximal import Proximal
from .source import change_in
from .steering import Steering


class Guided:
    """A pipeline and a guidance; call it like the pipeline itself. Made by `guide`.

    Attributes:
        pipe: the pipeline, as found before and after every call.
        guidance: what steers it.
        record: of the latest call; also an attribute `record` of what that call returned, where its class allows.
    """

    def __init__(
        self,
        pipe,
        guidance: Guidance,
        adapter: Adapter,
        decode: Callable | str | None,
        vae: torch.nn.Module | None,
        checkpointing: bool,
        preview: Preview | None,
        panel: int | str | None = None,
        change: tuple[Any, Any] | None = None,
    ):
        self.pipe = pipe
        self.guidance = guidance
        self.record: Record | None = None
        self._adapter, self._decode, self._vae = adapter, decode, vae
        self._checkpointing, self._preview, self._change = checkpointing, preview, change
        guided = pipe if adapter.part is None else getattr(pipe, adapter.part)
        self._panel, self._panels = panel, panels_of(guided, panel)

    def __repr__(self) -> str:
        return f"Guided({type(self.pipe).__name__}, {self.guidance.name}: {self.guidance.loss!r})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline with its own arguments; returns its own output, with the record."""
        if self._adapter.part is not None:
            return self._by_part(*args, **kwargs)
        pipe, own = self.pipe, type(self.pipe).__call__
        own = getattr(own, "__wrapped__", own)
        with torch.inference_mode(False), ExitStack() as stack:
            args, kwargs = _outside_inference_mode((args, kwargs))
            given = _given(own, pipe, args, kwargs)
            if self._panels is not None:
                self._panels.check(given)
            steering = Steering(pipe, self.guidance, self._adapter, None, _seeds(given), self._preview)
            steering.arguments.update(given)
            full = _Full(self._vae if self._vae is not None else autoencoder_of(pipe))
            stack.callback(full.back)
            steering.decode, steering.after_last = self._decoder(steering.arguments, full), full.back
            if self._panels is not None:
                steering.movable = lambda x: self._panels.movable(x, steering.arguments)
            if self._change is not None:
                steering.change = lambda latents: change_in(pipe, *self._change, latents)
            kwargs = _with_callbacks(kwargs)
            modules = [m for m in getattr(pipe, "components", {}).values() if isinstance(m, torch.nn.Module)]
            modules += [self._vae] if self._vae is not None else []
            if self.guidance.through == "denoiser":
                _check_offload(pipe, modules, self.guidance)
            if self.guidance.active:  # else nothing needs freezing, and torch rounds frozen layers differently
                stack.enter_context(frozen(*modules))
                if self._checkpointing:
                    stack.enter_context(_checkpointed(modules))
            if is_modular(pipe):
                stack.enter_context(undecorated(pipe, steering))
            stack.enter_context(steering.in_place())
            stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            torch.set_grad_enabled(False)
            try:
                output = own(pipe, *args, **kwargs)
            except RuntimeError as error:
                raise _in_plain_words(error, pipe) or error from error
        self.record = steering.run.record if steering.run is not None else Record()
        self.record.warn_of_nonfinite()
        return _with_record(output, self.record)

    def _decoder(self, arguments: dict[str, Any], full: _Full) -> Callable[[torch.Tensor], torch.Tensor]:
        """Latents -> what the losses see, for one call."""
        if callable(self._decode):
            return self._decode
        call = Call(self.pipe, full.vae, arguments)
        view = self._adapter.decoder(self._decode)

        def plain(latents: torch.Tensor) -> torch.Tensor:
            try:
                return view(latents, call)
            except (RuntimeError, TypeError, AttributeError) as error:
                if isinstance(error, torch.OutOfMemoryError) or "Inference tensors" in str(error):
                    raise
                raise ValueError(
                    f"how {type(self.pipe).__name__} decodes its latents {tuple(latents.shape)} is not known here: "
                    f"pass guide(..., decode=function), from latents to pictures (B, 3, H, W) in [0, 1] ({error})"
                ) from error

        def decode(latents: torch.Tensor) -> torch.Tensor:
            full.precision()
            if not self._checkpointing or not torch.is_grad_enabled() or len(latents) == 1:
                image = plain(latents)  # the autoencoder's own checkpointing is on, too
            else:
                image = torch.cat([checkpoint(plain, one, use_reentrant=False) for one in latents.split(1)])
            return image if self._panels is None else self._panels.seen(image, arguments)

        return decode

    def _by_part(self, *args: Any, **kwargs: Any) -> Any:
        """A pipeline made of others: the part that the adapter names is guided while the whole is called."""
        name = self._adapter.part
        found = getattr(self.pipe, name)
        settings = (self._decode, self._vae, self._checkpointing, self._preview, self._panel, self._change)
        part = Guided(found, self.guidance, _adapter(found, self._decode), *settings)
        try:
            vars(self.pipe)[name] = part
            output = self.pipe(*args, **kwargs)
        finally:
            vars(self.pipe)[name] = found
        self.record = part.record
        return _with_record(output, self.record)


def guide(
    pipe,
    guidance: Guidance | None,
    *,
    decode: Callable[[torch.Tensor], torch.Tensor] | str | None = None,
    vae: torch.nn.Module | None = None,
    checkpointing: bool = False,
    preview: str | os.PathLike | Callable | None = None,
    preview_every: int = 5,
    panel: int | str | None = None,
    source: torch.Tensor | None = None,
    change_map: torch.Tensor | float | None = None,
) -> Guided:
    """Plug a guidance into a diffusers pipeline: `guide(pipe, recipes.auto(loss))(num_inference_steps=50).images`.

    The returned object takes the pipeline's own arguments and returns its own output, plus `record`. The pipeline and
    its scheduler are left as found, also after an exception. With strength 0 or no loss the output is bitwise the plain
    one. Pass a generator per picture for pictures that do not depend on their batch. A call raises `FloatingPointError`
    at its first step where the prediction is not finite for any picture, as where float16 overflows, and warns there
    where the loss is not; what is not finite for some pictures is reported at the end.

    Args:
        pipe: a diffusers pipeline, or modular pipeline, with a scheduler.
        guidance: what a recipe returned; None, with a source, only changes that.
        decode: latents -> what the losses see, differentiable: pictures `(B, 3, H, W)` in [0, 1], videos
            `(B, F, 3, H, W)`, waveforms `(B, channels, T)`; or the name of a view that the pipeline has ("spectrogram",
            "waveform"). By default the pipeline's own autoencoder, or the pixels.
        vae: an autoencoder that decodes for the losses in place of the pipeline's own, such as diffusers'
            `AutoencoderTiny`.
        checkpointing: compute parts of the denoiser and of the decoder twice, picture by picture, instead of keeping
            them for the gradient: less memory, about half more time.
        preview: a file that shows x0 on the way, or a callable; see `lossguide.guidance.preview.Preview`.
        preview_every: visited steps from one preview to the next.
        panel: where part of a picture is given, what the losses see of it: "target", what is to be painted
            (VisualCloze: the empty panels of the last row, side by side; inpainting: the smallest box around the mask);
            "picture", all of it (VisualCloze: the last row); or an index of a panel in VisualCloze's last row. By
            default VisualCloze's target, and an inpainted picture as a whole. Whatever they see, only what is to be
            painted moves, and what is given gets no gradient.
        source: a picture `(3, H, W)` in [0, 1] to change, or `(B, 3, H, W)` with one per picture, as large as what the
            pipeline draws; for latent pipelines of text to image. The autoencoder encodes it: what is kept is kept in
            latents, and looks as the autoencoder paints it.
        change_map: how far each pixel of the source may change, `(H, W)` or `(B, 1, H, W)` in [0, 1], or one number;
            see `lossguide.samplers.sample`. A latent gets the mean of its pixels.

    Raises:
        TypeError: the pipeline cannot be guided, or `guidance` is not a `Guidance`.
        ValueError: the pipeline does not have the view that `decode` names, or that `panel`.
    """
    if guidance is None and source is not None:
        guidance = Guidance(None)
    if not isinstance(guidance, Guidance):
        raise TypeError(
            f"guide(pipe, guidance) takes what a recipe returns, such as recipes.auto(loss); "
            f"got {type(guidance).__name__}"
        )
    _check_scheduler(pipe)
    if vae is not None and not (hasattr(vae, "decode") and hasattr(vae, "config")):
        raise TypeError(f"vae is a diffusers autoencoder, such as AutoencoderTiny.from_pretrained(...), got {vae!r}")
    if isinstance(guidance.toward, Proximal) and autoencoder_of(pipe) is not None:
        raise TypeError(f"{guidance.name} needs a pixel model: through a VAE no measurement is linear")
    if guidance.candidates > 1:
        raise TypeError(f"{guidance.name} draws particles, which pipelines cannot; use sample(denoiser(...), guidance)")
    adapter = _adapter(pipe, decode)
    if not callable(decode) and adapter.part is None:
        adapter.decoder(decode)  # a view that is not there is told here
    shown = None if preview is None else Preview(preview, preview_every)
    if (source is None) != (change_map is None):
        raise ValueError("a source and a change_map (0 where it stays, 1 where it is free) belong together: pass both")
    if source is not None and hasattr(pipe, "prepare_mask_latents"):
        raise ValueError(
            f"{type(pipe).__name__} has a picture and a mask of its own: use these, or a text-to-image pipeline"
        )
    change = None if source is None else (source, change_map)
    return Guided(pipe, guidance, adapter, decode, vae, checkpointing, shown, panel, change)


class _Full:
    """An autoencoder that overflows in half precision, in full precision while the losses decode with it."""

    def __init__(self, vae: Any):
        self.vae, self._found = vae, None

    def precision(self) -> None:
        """From the first decoding on."""
        upcast = getattr(getattr(self.vae, "config", None), "force_upcast", False)
        if upcast and self.vae.dtype == torch.float16:
            self._found = self.vae.dtype
            self.vae.to(torch.float32)

    def back(self) -> None:
        """As found: before the pipeline's own decoding, which sees to it itself, and at the latest after the call."""
        if self._found is not None:
            self.vae.to(self._found)
            self._found = None


def _adapter(pipe: Any, decode: Callable | str | None) -> Adapter:
    try:
        return adapter_of(pipe)
    except TypeError:
        if not callable(decode):
            raise
        return Adapter(lambda pipe: True, lambda latents, call: latents)  # the user's function decodes


def _check_scheduler(pipe: Any) -> None:
    name, scheduler = type(pipe).__name__, getattr(pipe, "scheduler", None)
    if isinstance(pipe, (type, str)):
        what = f"the class {pipe.__name__}" if isinstance(pipe, type) else f"the name {pipe!r}"
        raise TypeError(f"guide takes a pipeline that is loaded, not {what}: pipe = ....from_pretrained(...)")
    if "Onnx" in name or "OpenVINO" in name or name.startswith("Flax"):
        raise TypeError(
            f"{name} runs outside torch, so that no gradient passes it: use the torch pipeline of the model"
        )
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "set_timesteps"):
        raise TypeError(f"{name} cannot be guided: it has no scheduler with set_timesteps and step")
    if hasattr(scheduler, "config") and "mask_token_id" in scheduler.config:
        raise TypeError(
            f"{name} draws masked tokens: use sample(token_generator(pipe.transformer, pipe.vqvae, pipe.scheduler, "
            "condition=...), guidance) with its encoded prompt"
        )
    if getattr(scheduler, "per_pixel", False):
        raise TypeError(
            f"{name} tells its network one time for all pixels, and {type(scheduler).__name__} gives each a level of "
            "its own: use sample(denoiser(network, scheduler, per_pixel=True), guidance) with a network made for it"
        )


def _check_offload(pipe: Any, modules: list[torch.nn.Module], guidance: Guidance) -> None:
    if guidance.active and any(_offloaded(part) for module in modules for part in module.modules()):
        raise ValueError(
            f"parts of {type(pipe).__name__} are offloaded, and their weights would be gone when the gradient passes "
            'them: choose through="x0", which needs no gradient of the denoiser, or no offloading'
        )


def _offloaded(module: torch.nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or any("offload" in name for name in getattr(registry, "hooks", ()))


def _given(call: Callable, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of those that are not given."""
    bound = inspect.signature(call).bind_partial(pipe, *args, **kwargs)
    bound.apply_defaults()
    return {**bound.arguments.pop("kwargs", {}), **bound.arguments}


def _seeds(given: dict[str, Any]) -> Callable[[int], list[int]]:
    """Seeds of guidance's own draws for a batch: those of the caller's generators, else torch's and the next ones."""
    generator = given.get("generator")
    drawn = None if generator is None else [_seed_of(g) for g in (generator if _several(generator) else [generator])]

    def seeds(batch: int) -> list[int]:
        if drawn is not None and _several(generator) and len(drawn) == batch:
            return drawn
        first = drawn[0] if drawn else _seed_of(torch.default_generator)
        return [first + i for i in range(batch)]

    return seeds


def _several(generator: Any) -> bool:
    return isinstance(generator, (list, tuple))


def _seed_of(generator: torch.Generator) -> int:
    """The seed of a generator that has not been used yet; another number, by its state, for one that has."""
    seed, state = generator.initial_seed(), generator.get_state()
    if torch.equal(torch.Generator(generator.device).manual_seed(seed).get_state(), state):
        return seed
    return int.from_bytes(hashlib.sha256(state.cpu().numpy().tobytes()).digest()[:7], "big")


def _with_callbacks(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Step callbacks see latents without gradients, and the next step can be guided from latents of their own."""
    own = kwargs.get("callback_on_step_end")
    if own is None:
        return kwargs
    wanted = {}
    if hasattr(own, "tensor_inputs"):  # diffusers' PipelineCallback, which pipelines ask by its class
        wanted["callback_on_step_end_tensor_inputs"] = list(own.tensor_inputs)
    return kwargs | wanted | {"callback_on_step_end": _called_back(own)}


def _called_back(own: Callable) -> Callable:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen = {name: one.detach() if isinstance(one, torch.Tensor) else one for name, one in tensors.items()}
        shown = dict(seen)
        with torch.no_grad():
            back = own(pipe, step, timestep, seen) or {}
        changed = {}
        for name, one in back.items():
            if name in tensors and one is shown.get(name):
                changed[name] = tensors[name]
            else:
                graph = torch.is_grad_enabled() and name == "latents"
                changed[name] = one.detach().requires_grad_(True) if graph else one
        return changed

    return callback


@contextmanager
def _checkpointed(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Gradient checkpointing in the denoisers that know it; those that had it on before keep it."""
    switched = [
        m for m in modules if getattr(m, "_supports_gradient_checkpointing", False) and not m.is_gradient_checkpointing
    ]
    try:
        for module in switched:
            module.enable_gradient_checkpointing()
        yield
    finally:
        for module in switched:
            module.disable_gradient_checkpointing()


def _outside_inference_mode(value: Any) -> Any:
    """The same, with tensors made in inference mode, which autograd refuses, copied."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) is dict:
        return {key: _outside_inference_mode(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_outside_inference_mode(one) for one in value)
    return value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value


def _in_plain_words(error: RuntimeError, pipe: Any) -> RuntimeError | None:
    if "Inference tensors" in str(error):
        return RuntimeError(
            f"{type(pipe).__name__} holds tensors that were made in torch.inference_mode(), through which no gradient "
            'passes: load or quantise it outside of it, or choose through="x0", which needs none'
        )
    return None


def _with_record(output: Any, record: Record) -> Any:
    if isinstance(output, dict):
        for name, value in output.items():
            output[name] = _detached(value)
    elif type(output) in (list, tuple):
        output = type(output)(_detached(value) for value in output)
    else:
        output = _detached(output)
    try:
        output.record = record
    except AttributeError:
        pass  # a plain tuple (return_dict=False) takes no attribute; `Guided.record` has it
    return output
