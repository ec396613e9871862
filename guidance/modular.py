"""diffusers' modular pipelines: their denoising loop with gradients, and whatever guider they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from .steering import Steering, instead


def is_modular(pipe: Any) -> bool:
    """Whether a pipeline is made of blocks."""
    return hasattr(getattr(pipe, "_blocks", None), "sub_blocks")


@contextmanager
def undecorated(pipe: Any, steering: Steering) -> Iterator[None]:
    """For the time, gradients pass through the blocks of the denoising loop, which switch them off by themselves.

    The steering switches them on where a step needs them; all other blocks run without.
    """
    with ExitStack() as stack:
        for block in _below(pipe._blocks):
            if hasattr(block, "get_timesteps"):
                stack.enter_context(instead(block, "get_timesteps", steering.get_timesteps))
        for loop in _loops(pipe._blocks):
            for block in _below(loop):
                stack.enter_context(_without_decorator(block))
            stack.enter_context(instead(loop, "loop_step", _first_told(steering)))
        yield


def _first_told(steering: Steering) -> Callable:
    def loop_step(own: Callable, components: Any, state: Any, **kwargs: Any) -> Any:
        if steering.position is None:
            told = state.as_dict() if hasattr(state, "as_dict") else vars(state)
            steering.arguments.update({name: value for name, value in told.items() if value is not None})
            state.latents = steering.first_latents(state.latents)
        return own(components, state, **kwargs)

    return loop_step


def _children(block: Any) -> list[Any]:
    return list((getattr(block, "sub_blocks", None) or {}).values())


def _below(block: Any) -> Iterator[Any]:
    for child in _children(block):
        yield child
        yield from _below(child)


def _loops(block: Any) -> Iterator[Any]:
    if hasattr(block, "loop_step"):
        yield block
        return
    for child in _children(block):
        yield from _loops(child)


@contextmanager
def _without_decorator(block: Any) -> Iterator[None]:
    found = type(block)
    bare = getattr(found.__call__, "__wrapped__", None)
    if bare is None:
        yield
        return
    block.__class__ = type(found.__name__, (found,), {"__call__": bare, "__module__": found.__module__})
    try:
        yield
    finally:
        block.__class__ = found
