"""States of optimizers, schedules and generators as JSON values and tensors, and back, without pickle."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_aevb.errors import FileError

__all__ = ["pack", "unpack"]


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return a nested state as JSON values, with its tensors put aside.

    Args:
        value: Numbers, strings, tensors, numpy arrays, and lists, tuples and dicts of them.
        tensors: Receives the tensors, whose JSON values hold their names.
        name: What names of the tensors begin with.

    Returns:
        JSON values. Numbers come back bit for bit: JSON writes the shortest digits that a double is read back from.

    Raises:
        FileError: If a part is of another type.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return value.item()
    if isinstance(value, (Tensor, np.ndarray)) and _is_storable(value):
        key = name if name not in tensors else f"{name}#{len(tensors)}"  # names of parts may come to the same
        tensors[key] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        return {"tensor" if isinstance(value, Tensor) else "array": key}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[pack(key, tensors, name), pack(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    raise FileError(
        f"The state {name!r} is of type {type(value).__name__}, which can't be saved without pickle. Expected numbers, strings, "
        f"tensors, numpy arrays, and lists, tuples and dicts of them."
    )


def _is_storable(value: Tensor | np.ndarray) -> bool:
    """Tell whether a file can hold an array: torch knows its type."""
    return isinstance(value, Tensor) or (value.dtype.kind in "biufc" and value.dtype.isnative)


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what :func:`pack` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind in ("list", "tuple"):
        items = [unpack(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    pairs = {unpack(key, tensors): unpack(item, tensors) for key, item in content}
    return Counter(pairs) if kind == "counter" else pairs
