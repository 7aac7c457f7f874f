"""What tells a batch's rows from each other, wherever they come again."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from pyro_aevb._types import Args, Kwargs, PyroProgram
from pyro_aevb.guides.probe import bind
from pyro_aevb.program.structure import Structure

__all__ = ["row_keys"]


def row_keys(model: PyroProgram, structure: Structure, args: Args, kwargs: Kwargs) -> list[bytes]:
    """Digest what each row holds in all tensors; nothing if tensors differ in length.

    What has no rows (numbers, names, scalar tensors) counts for every row.
    """
    arguments = bind(model, args, kwargs)
    others = [item for item in (*args, *kwargs.values()) if not (isinstance(item, Tensor) and item.dim())]
    if structure.data_plate is None:
        arguments = {name: item[None] for name, item in arguments.items()}
    arguments = arguments or {"": torch.arange(structure.rows)}  # data that the model itself holds are told by position
    if len({len(item) for item in arguments.values()}) > 1:
        return []
    head: list[Any] = [(name, item.dtype, tuple(item.shape[1:])) for name, item in arguments.items()]
    head += [item.item() if isinstance(item, Tensor) else item for item in others]
    start = hashlib.blake2b(repr(head).encode(), digest_size=16)
    keys = []
    for row in torch.cat([_bytes_of(item) for item in arguments.values()], 1).numpy():
        digest = start.copy()
        digest.update(row)
        keys.append(digest.digest())
    return keys


def _bytes_of(item: Tensor) -> Tensor:
    """Return the bytes of each row, ``[rows, bytes]``."""
    return item.detach().cpu().reshape(len(item), item[:1].numel()).contiguous().view(torch.uint8)
