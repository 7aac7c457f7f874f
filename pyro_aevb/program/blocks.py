"""Draws of rows that are the same whatever selection of rows is asked for."""

import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_aevb.randomness import seeded

__all__ = ["BLOCK_DRAWS", "draw_in_blocks"]

T = TypeVar("T")

BLOCK_DRAWS = 16_384
"""Draws that are made together by default."""


def draw_in_blocks(rows: Tensor, size: int, seed: int | None, draw: Callable[[int], T]) -> T:
    """Draw every block that holds a row asked for, each under a seed of its own, and keep these rows.

    A program's draws of a row depend on the rows that it runs with. These are fixed by the row's place in the whole batch, so
    that draws are the same for chunks of any size; the price is the rows of a block that were not asked for.

    Args:
        rows: Places of the rows in the whole batch.
        size: Rows of a block: block b holds the rows from b * size on.
        seed: Seed of all blocks; ``None`` takes one from the generator.
        draw: From a block's number to tensors with the block's rows on axis 2.

    Returns:
        The tensors with the rows asked for.
    """
    base = int(torch.randint(2**62, ())) if seed is None else seed
    numbers = rows // size
    parts, places = [], []
    for block in numbers.unique().tolist():
        place = (numbers == block).nonzero()[:, 0]
        inside = rows[place] - block * size
        with seeded(_seed(base, block)):
            parts.append(_select(draw(block), inside))
        places.append(place)
    joined = tree_map(lambda *items: torch.cat(items, 2), *parts)
    return _select(joined, torch.cat(places).argsort())


def _select(tree: T, index: Tensor) -> T:
    return tree_map(lambda item: item.index_select(2, index.to(item.device)), tree)


def _seed(base: int, block: int) -> int:
    """Return a seed of a block that no other pair of seed and block is likely to have."""
    return int.from_bytes(hashlib.blake2b(f"{base} {block}".encode(), digest_size=4).digest(), "little")
