"""Seeds: run a block under a seed of its own, or leave the generators as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from pyro.util import get_rng_state, set_rng_state

__all__ = ["preserved_rng", "seeded"]


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the states of torch (every device), random and numpy on leaving the block."""
    state = get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw under ``seed`` and leave the generators as they were; ``None`` draws from them as they are.

    Example:
        >>> with seeded(0): a = torch.randn(2)
        >>> with seeded(0): b = torch.randn(2)
        >>> torch.equal(a, b)
        True
    """
    if seed is None:
        yield
        return
    with preserved_rng():
        pyro.set_rng_seed(seed)
        yield
