"""A batch as the arguments of a program: its rows, its description, and errors that name it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_aevb._types import Args, Kwargs
from pyro_aevb.errors import AEVBError, DataError, ModelError

__all__ = ["as_tensors", "batch_rows", "check_dense", "describe_batch", "explained", "take_rows", "to_tensor"]


def as_tensors(args: Args, kwargs: Kwargs) -> tuple[Args, dict[str, Any]]:
    """Turn a batch's numpy arrays to tensors, which share their memory."""

    def convert(name: int | str, item: Any) -> Any:
        if isinstance(item, Tensor):
            check_dense(item, f"argument {name}")
        return to_tensor(item, f"argument {name}") if isinstance(item, np.ndarray) else item

    return tuple(convert(*named) for named in enumerate(args)), {
        name: convert(name, item) for name, item in kwargs.items()
    }


def check_dense(tensor: Tensor, name: str) -> None:
    """Refuse tensors whose rows can't be taken by index: sparse, nested, quantized, or without numbers.

    Raises:
        DataError: Saying which.
    """
    kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        raise DataError(f"Expected a dense tensor as {name}, got one that is {kind}: give .to_dense(), or padded rows.")
    if tensor.is_meta:
        raise DataError(f"Expected numbers as {name}, got a tensor on the meta device, which has none.")


def to_tensor(array: np.ndarray, name: str) -> Tensor:
    """Turn a numpy array to a tensor that shares its memory, read-only and memory-mapped ones too.

    What torch can't read in place is copied: negative strides, fields of records, another byte order.

    Raises:
        DataError: If it holds no numbers, or numbers of a type that torch lacks, or has a mask, which would be lost.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise DataError(
            f"A masked array as {name} would lose its mask. Give its values (.filled(0)) and ~mask as two arguments, and mask the "
            f"site by the second, obs_mask=."
        )
    try:
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if any(stride < 0 or stride % array.itemsize for stride in array.strides):
            array = array.copy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array)
    except (TypeError, ZeroDivisionError) as error:
        raise DataError(
            f"Expected numbers as {name}, got an array of type {array.dtype}, which torch does not have: convert it with "
            f".astype."
        ) from error


def batch_rows(args: Args, kwargs: Kwargs) -> int | None:
    """Return the length of the first tensor argument, the number of rows that a batch offers; ``None`` without tensors."""
    tensors = (item for item in (*args, *kwargs.values()) if isinstance(item, Tensor) and item.dim() > 0)
    return next((len(tensor) for tensor in tensors), None)


def take_rows(args: Args, kwargs: Kwargs, rows: slice | Tensor) -> tuple[Args, dict[str, Any]]:
    """Take rows out of every tensor of a batch."""

    def take(item: Any) -> Any:
        return item[rows] if isinstance(item, Tensor) and item.dim() > 0 else item

    return tuple(take(item) for item in args), {name: take(item) for name, item in kwargs.items()}


def describe_batch(args: Args, kwargs: Kwargs) -> str:
    """Say what a batch is, for messages: each argument's type and shape."""
    named = [(str(index), item) for index, item in enumerate(args)] + list(kwargs.items())
    return ", ".join(
        f"{name}: {str(item.dtype).removeprefix('torch.')} {list(item.shape)}"
        if isinstance(item, Tensor)
        else f"{name}: {item!r}"
        for name, item in named
    )


@contextmanager
def explained(what: str, args: Args, kwargs: Kwargs) -> Iterator[None]:
    """Turn a failure inside a user's program into an error that names the program's input and a likely cause."""
    try:
        yield
    except AEVBError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        tensors = {name: item for name, item in enumerate(args) if isinstance(item, Tensor)}
        if any(item.dim() and not len(item) for item in tensors.values()):
            raise DataError(
                f"The batch has no rows: expected at least one, got ({describe_batch(args, kwargs)})."
            ) from error
        text = str(error).split("\nTrace Shapes:")[
            0
        ]  # Pyro's table of all sites is in the error that this one comes from
        hint = "check that the batch has the shapes that the program expects"
        if any(word in text for word in ("dtype", "expected scalar type", "Float but", "bool tensor")):
            hint = "convert the argument with .float() or to the dtype of the program's parameters"
        foreign = [
            f"{name} is a {type(item).__name__}" for name, item in enumerate(args) if not isinstance(item, Tensor)
        ]
        if foreign:
            hint = f"give tensors or numpy arrays as data (argument {foreign[0]}), and bind what is none with functools.partial"
        nan = [name for name, item in tensors.items() if not item.isfinite().all()]
        if nan:
            message = f"The {what} failed on data with NaN or infinity in argument {nan[0]}: {text}. Remove or mask these entries."
            raise DataError(message) from error
        raise ModelError(
            f"The {what} failed on a batch of ({describe_batch(args, kwargs)}): {text}. Likely mend: {hint}."
        ) from error
