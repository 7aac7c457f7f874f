"""What the comparisons of automatic guides share: fits whose time is taken, and moments of many draws in little memory."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from benchmarks.timing import threads
from pyro_aevb import AEVB

__all__ = ["Moments", "Timed", "cosine", "moments_of", "timed_fit"]


class Timed(NamedTuple):
    """How long a fit took.

    Attributes:
        num_steps: Steps of the optimizer.
        seconds: By the clock, the building of the guide included.
        cpu_seconds: Time of the processor, all threads together, which other processes hardly change.
    """

    num_steps: int
    seconds: float
    cpu_seconds: float

    def __str__(self) -> str:
        """Write both times."""
        return f"{self.num_steps:,} steps in {self.seconds:.0f} s ({self.cpu_seconds:.0f} s of processor time)"


class Moments(NamedTuple):
    """Mean and standard deviation over draws."""

    mean: Tensor
    sd: Tensor


def cosine(num_epochs: int) -> Callable[[Optimizer], LRScheduler]:
    """Return a schedule under which the learning rate falls to zero along half a cosine."""
    return lambda optimizer: CosineAnnealingLR(optimizer, num_epochs)


def timed_fit(vi: AEVB, data: Tensor, **settings: Any) -> Timed:
    """Fit with one thread, more of which only get in each other's way in networks this small, and take the time."""
    start, cpu_start = time.perf_counter(), time.process_time()
    with threads(1):
        result = vi.fit(data, progress=False, **settings)
    return Timed(result.num_steps, time.perf_counter() - start, time.process_time() - cpu_start)


def moments_of(draw: Callable[[int], dict[str, Tensor]], num_parts: int) -> dict[str, Moments]:
    """Collect moments over parts of draws, in float64.

    Args:
        draw: Takes a seed and returns draws by site, ``[draws, ...]``.
        num_parts: How often it is called, with the seeds 0, 1, ...
    """
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    centre: dict[str, Tensor] = {}
    count = 0
    for seed in range(num_parts):
        for name, values in draw(seed).items():
            centre.setdefault(name, values.double().mean(0))  # else squares of a mean far from 0 would lose digits
            centred = values.double() - centre[name]
            sums[name] = sums.get(name, torch.zeros(())) + centred.sum(0)
            squares[name] = squares.get(name, torch.zeros(())) + centred.square().sum(0)
            size = len(values)
        count += size
    means = {name: total / count for name, total in sums.items()}
    return {
        name: Moments(centre[name] + mean, (squares[name] / count - mean.square()).sqrt())
        for name, mean in means.items()
    }
