"""Settings and records as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


def plain(value: Any) -> Any:
    """Plain data for JSON: tensors as lists, dataclasses with their type, numbers that are not finite as None, and what
    else there is as text."""
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
