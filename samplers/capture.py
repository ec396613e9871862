"""Functions of tensors that are recorded once and replayed: on a CUDA device as CUDA graphs, elsewhere as they are.

Launching the many small kernels of a network takes Python longer than the device takes to run them; a graph launches
them all at once. The protocol is that of `torch.cuda.make_graphed_callables`: buffers whose addresses never change, a
few passes to warm up, one recording of the forward pass and one of the backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

WARMUPS = 3  # the first one fills caches, the second one is watched, the third one is as the recording will be
_COPIES = ("_to_copy", "copy_")
_INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
_WAITING = ("lift_fresh", "_linalg_check_errors")  # a new tensor from Python's numbers; a look at an error code


class Captures:
    """What one call of `sample` records, by name: `captures(name, function)` is the same `Captured` for each batch."""

    def __init__(self) -> None:
        self._by_name: dict[Hashable, Captured] = {}

    def __call__(self, name: Hashable, function: Callable) -> Captured:
        if name not in self._by_name:
            self._by_name[name] = Captured(function, str(name))
        return self._by_name[name]


class Captured:
    """A function of tensors that works on buffers of its own, recorded once for each kind of call.

    What goes in is copied to the buffers, what comes out is copied from them, so that later calls change nothing that
    was returned. A kind of call is the shapes, dtypes and devices, and whether a gradient will be asked for; a function
    that returns one tensor passes gradients on, once, and before it is called again.

    A recording repeats what was done on the device, not the Python code: the function must depend on the values of its
    tensors alone. One that waits for the device or copies from the host cannot be recorded; that is noticed before, and
    it is called as it is, with a warning.

    Args:
        function: tensors -> a tensor, or a tuple of tensors.
        name: what to call it in messages.
    """

    def __init__(self, function: Callable, name: str = "function"):
        self.function = function
        self.name = name
        self._shared = _Shared()
        self._recordings: dict[tuple, _Recording | None] = {}

    def __call__(self, *tensors: torch.Tensor) -> Any:
        gradient = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
        kind = (gradient, *((one.shape, one.dtype, one.device, one.requires_grad) for one in tensors))
        if kind not in self._recordings:
            self._recordings[kind] = self._recording(tensors, gradient)
        recording = self._recordings[kind]
        if recording is None:
            return self.function(*tensors)
        return _Replayed.apply(recording, *tensors) if gradient else recording.forward(tensors)

    def _recording(self, tensors: tuple[torch.Tensor, ...], gradient: bool) -> _Recording | None:
        try:
            return _Recording(self.function, tensors, gradient, self._shared)
        except Unrecordable as error:
            warnings.warn(
                f"graphs=True: {self.name} runs as it is, without a graph, because it {error}", RuntimeWarning, 3
            )
            return None


class Unrecordable(RuntimeError):
    """A function does what a CUDA graph cannot hold."""


class _Shared:
    """What all recordings of a function share: the memory they take turns in, and how often they have been called."""

    def __init__(self) -> None:
        self.calls = 0
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None


class _Recording:
    """One kind of call: its buffers, and how to do its work on them again."""

    def __init__(self, function: Callable, tensors: tuple[torch.Tensor, ...], gradient: bool, shared: _Shared):
        self._function, self._gradient, self._shared = function, gradient, shared
        self.inputs = [one.detach().clone().requires_grad_(gradient and one.requires_grad) for one in tensors]
        self.outputs: Sequence[torch.Tensor] = ()
        self._single = True
        self._upstream: torch.Tensor | None = None  # the gradient at the output, a buffer too
        self._gradients: Sequence[torch.Tensor | None] = ()
        bodies = [self._run_forward, self._run_backward] if gradient else [self._run_forward]
        self._replays = recorded(bodies, self.inputs, shared)

    def forward(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        """The function's outputs, copied."""
        self._shared.calls += 1
        with torch.no_grad():
            for own, given in zip(self.inputs, tensors):
                own.copy_(given)
        self._replays[0]()
        found = tuple(one.detach().clone() for one in self.outputs)
        return found[0] if self._single else found

    def backward(self, upstream: torch.Tensor, call: int) -> list[torch.Tensor | None]:
        """The gradients at the inputs of the latest call, copied."""
        if call != self._shared.calls:
            raise RuntimeError("a captured function was called again before its gradient was taken")
        self._shared.calls += 1  # the recording gives a gradient once
        self._upstream.copy_(upstream)
        self._replays[1]()
        found = iter(self._gradients)
        taken = [next(found) if one.requires_grad else None for one in self.inputs]
        return [None if one is None else one.clone() for one in taken]

    @property
    def calls(self) -> int:
        return self._shared.calls

    def _run_forward(self) -> None:
        with torch.set_grad_enabled(self._gradient):
            found = self._function(*self.inputs)
        self._single = isinstance(found, torch.Tensor)
        self.outputs = (found,) if self._single else tuple(found)
        if self._gradient and not self._single:
            raise TypeError("a captured function that passes gradients on returns one tensor")
        if self._gradient and self._upstream is None:
            self._upstream = torch.ones(found.shape, dtype=found.dtype, device=found.device)

    def _run_backward(self) -> None:
        (output,) = self.outputs
        if output.requires_grad:
            leaves = [one for one in self.inputs if one.requires_grad]
            self._gradients = torch.autograd.grad(output, leaves, self._upstream, allow_unused=True)
        else:
            self._gradients = [None for one in self.inputs if one.requires_grad]


class _Replayed(torch.autograd.Function):
    """A recording as a step of autograd's graph."""

    @staticmethod
    def forward(ctx, recording: _Recording, *tensors: torch.Tensor) -> torch.Tensor:
        found = recording.forward(tensors)
        ctx.recording, ctx.call = recording, recording.calls
        if not recording.outputs[0].requires_grad:
            ctx.mark_non_differentiable(found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: torch.Tensor):
        return (None, *ctx.recording.backward(upstream, ctx.call))


def recorded(
    bodies: list[Callable[[], None]], inputs: list[torch.Tensor], shared: _Shared
) -> list[Callable[[], object]]:
    """What does the work of `bodies`, in this order, again: graphs where the inputs are on a CUDA device, else they
    themselves.

    Raises:
        Unrecordable: they wait for the device or copy from the host.
    """
    return graphs(bodies, inputs[0].device, shared) if inputs[0].is_cuda else bodies


def graphs(bodies: list[Callable[[], None]], device: torch.device, shared: _Shared) -> list[Callable[[], object]]:
    """CUDA graphs of the bodies, in the memory that the function's recordings share."""
    with torch.cuda.device(device):
        if shared.pool is None:
            shared.pool, shared.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        current = torch.cuda.current_stream()
        shared.stream.wait_stream(current)
        with torch.cuda.stream(shared.stream):
            warm_up(bodies)
        current.wait_stream(shared.stream)
        made = [torch.cuda.CUDAGraph() for _ in bodies]
        for graph, body in zip(made, bodies):
            try:
                with torch.cuda.graph(graph, pool=shared.pool, stream=shared.stream):
                    body()
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(f"a CUDA graph could not be recorded ({error}); use graphs=False") from error
    return [graph.replay for graph in made]


def warm_up(bodies: list[Callable[[], None]]) -> None:
    """Run the bodies a few times, and see whether they can be recorded.

    Raises:
        Unrecordable: they cannot.
    """
    for turn in range(WARMUPS):
        if turn != 1:
            for body in bodies:
                body()
            continue
        with Watch() as watch:
            for body in bodies:
                body()
        if watch.found:
            raise Unrecordable(f"waits for the device or copies from the host: {', '.join(sorted(set(watch.found)))}")


class Watch(TorchDispatchMode):
    """Notes in `found` the operations that wait for a device: reading a value, shapes that depend on values, and copies
    between the host and the device, which a graph cannot hold either.

    Numbers on the host (tensors without dimensions) are no tensors of the device, and combine with those freely.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        result = function(*args, **kwargs)
        if waits(function, tensors, _tensors(result)):
            self.found.append(str(function).removeprefix("aten."))
        return result


def waits(function, given: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    """Whether an operation of these tensors makes the host wait for a device."""
    name = function.overloadpacket.__name__
    if name in _COPIES:
        return len({one.device.type == "cpu" for one in [*given, *results]}) == 2
    away = [one for one in given if one.device.type != "cpu"]
    if not away:
        return False
    host = [one for one in given if one.device.type == "cpu"]
    if torch.Tag.data_dependent_output in function.tags or name in _WAITING or any(one.dim() for one in host):
        return True
    if name in _INDEXING:
        return any(one.dtype in (torch.bool, torch.uint8) for one in away[1:])  # counts what is true
    return torch.Tag.dynamic_output_shape in function.tags or (name == "where" and bool(host))


def _tensors(nested: Any) -> list[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, (list, tuple)):
        return [one for part in nested for one in _tensors(part)]
    return []


class Latest:
    """The newest number that the device has finished: reading it never waits."""

    def __init__(self) -> None:
        self._value: float | None = None
        self._host: torch.Tensor | None = None
        self._done: torch.cuda.Event | None = None

    def __call__(self, number: torch.Tensor) -> float | None:
        """This number, or on a CUDA device one of those given before; None as long as none is finished."""
        if not number.is_cuda:
            return number.item()
        if self._done is not None and self._done.query():
            self._value, self._done = self._host.item(), None
        if self._done is None:
            self._host = number.to("cpu", non_blocking=True)  # to pinned memory
            self._done = torch.cuda.current_stream(number.device).record_event()
        return self._value
