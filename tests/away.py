"""A device that is not there: tensors on it compute on the host, and what the host would wait for is noted.

Its tensors say that they are on "meta", which torch knows everywhere and initialises nothing for.
"""

from __future__ import annotations

import torch
from lossguide.losses import network
from lossguide.samplers.capture import _tensors, waits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")


class Away(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("a tensor of the device is used outside of it")

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.cpu().tolist()  # which torch itself does not do for such classes


class Device(TorchDispatchMode):
    """Context in which the device is there; `found` tells the operations that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __enter__(self):
        network._COPIES.clear()  # of constants, on torch's own "meta"
        return super().__enter__()

    def __exit__(self, *error):
        network._COPIES.clear()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
        name = function.overloadpacket.__name__
        target = kwargs.get("device")
        there = torch.device(target) == DEVICE if target is not None else any(isinstance(one, Away) for one in given)
        if target is not None:
            kwargs["device"] = "cpu"
        inner_args, inner_kwargs = tree_map(lambda one: one.inner if isinstance(one, Away) else one, (args, kwargs))
        result = function(*inner_args, **inner_kwargs)
        known = {id(one.inner): one for one in given if isinstance(one, Away)}  # operations in place
        if there:
            result = tree_map(lambda one: _away(one, known), result)
        self.count += any(isinstance(one, Away) for one in _tensors(result))
        later = name in ("_to_copy", "copy_") and (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if waits(function, given, _tensors(result)) and not later:
            self.found.append(str(function).removeprefix("aten."))
        return result


def _away(value, known: dict):
    if not isinstance(value, torch.Tensor):
        return value
    return known.get(id(value)) if id(value) in known else Away(value)


def moved_away(module: torch.nn.Module) -> torch.nn.Module:
    """The module, with its weights on the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(Away(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Away(buffer)
    return module
