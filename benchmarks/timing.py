"""Times of several contenders in one process: interleaved blocks of steps, after a warm-up, with medians and spread."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

__all__ = ["interleave", "ratios", "spread", "threads"]

Block = Callable[[int], None]
"""Runs that many steps."""


def interleave(
    contenders: Mapping[str, Block], *, num_rounds: int, num_steps: int, num_warmup: int
) -> dict[str, list[float]]:
    """Time blocks in the order A B C A B C, so that whatever else the machine does falls on all of them.

    What Python left to collect of one contender is collected before the next one's time is taken.

    Returns:
        Milliseconds a step of each block, one entry a round, by contender.
    """
    for run in contenders.values():
        run(num_warmup)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(num_rounds):
        for name, run in contenders.items():
            gc.collect()
            start = time.perf_counter()
            run(num_steps)
            times[name].append(1e3 * (time.perf_counter() - start) / num_steps)
    return times


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Divide the times of two contenders round by round, neighbours in time by each other."""
    return [time_ / other for time_, other in zip(times, others, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the range of the middle half and the whole range."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{low:.{digits}f} to {high:.{digits}f} (all {min(values):.{digits}f} to {max(values):.{digits}f})"


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Let torch use that many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
