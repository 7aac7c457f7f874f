"""Seeds: run a block under a seed of its own, draw the same again, or leave the generators as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import pyro
import torch
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_aevb.errors import SettingError

__all__ = [
    "RandomState",
    "check_seed",
    "preserved_rng",
    "random_state",
    "replayed_rng",
    "restore_random_state",
    "seeded",
]


class RandomState(NamedTuple):
    """States of the generators: torch's on the CPU, random's and numpy's, and torch's on every other device."""

    host: dict[str, Any]
    devices: list[Tensor]


def random_state() -> RandomState:
    """Return the states of torch (every device), random and numpy."""
    return RandomState(get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def restore_random_state(state: RandomState) -> None:
    """Bring the generators to a state."""
    set_rng_state(state.host)
    if state.devices:
        torch.cuda.set_rng_state_all(state.devices)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the states of torch (every device), random and numpy on leaving the block."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


@contextmanager
def replayed_rng(state: RandomState) -> Iterator[None]:
    """Draw again what was drawn from a state on, and leave the generators as they were."""
    with preserved_rng():
        restore_random_state(state)
        yield


def check_seed(seed: Any) -> None:
    """Refuse what is neither ``None`` nor an integer that every generator takes.

    Raises:
        SettingError: Naming what came.
    """
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**32:
        raise SettingError(f"seed must be an integer between 0 and 2**32 - 1, or None for no seed; got {seed!r}.")


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw under ``seed`` and leave the generators as they were; ``None`` draws from them as they are.

    Example:
        >>> with seeded(0): a = torch.randn(2)
        >>> with seeded(0): b = torch.randn(2)
        >>> torch.equal(a, b)
        True
    """
    check_seed(seed)
    if seed is None:
        yield
        return
    with preserved_rng():
        pyro.set_rng_seed(seed)
        yield
