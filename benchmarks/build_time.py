"""How long it takes to build a guide for the paper's MNIST model, and how many runs of the model that costs.

784 pixels, 500 hidden units, 20 latents (arXiv 1312.6114, section 5); a batch of 1,000 digits. Built anew each time, for
each of the three automatic guides.
"""

import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.programs import VAE
from benchmarks.result import Result, Row
from benchmarks.timing import spread, threads
from pyro_aevb import AutoAmortizedFlow, AutoAmortizedMultivariateNormal, AutoAmortizedNormal
from pyro_aevb.datasets import mnist
from pyro_aevb.guides.base import AmortizedGuide

__all__ = ["run"]

GUIDES = (AutoAmortizedNormal, AutoAmortizedMultivariateNormal, AutoAmortizedFlow)
MOST_SECONDS = 1.0
MOST_RUNS = 5
NUM_ROWS = 1000


class Measured(NamedTuple):
    """Seconds of each build of one guide, and runs of the model during one."""

    guide: str
    seconds: list[float]
    num_runs: int
    num_parameters: int


def run(*, quick: bool) -> Result:
    x = torch.rand(NUM_ROWS, 784) if quick else mnist().train[:NUM_ROWS]
    with threads(1):
        measured = [_measure(kind, x, 3 if quick else 11) for kind in GUIDES]
    return Result(
        title="Building a guide for the paper's MNIST model",
        setting=f"784-500-20, {NUM_ROWS:,} rows, 1 thread; {len(measured[0].seconds)} builds after one of warm-up. Medians; "
        f"spread: the middle half and all.",
        rows=[row for item in measured for row in _table(item)],
        notes=(
            "Runs of the model are counted at its own call. The first build of a process also imports what it needs.",
        ),
    )


class _Counted:
    """A model that counts its runs."""

    def __init__(self, vae: VAE) -> None:
        self.vae = vae
        self.count = 0

    def model(self, x: Tensor) -> None:
        self.count += 1
        self.vae.model(x)


def _measure(kind: type[AmortizedGuide], x: Tensor, num_builds: int) -> Measured:
    seconds = []
    for _ in range(num_builds + 1):
        counted = _Counted(VAE())
        start = time.perf_counter()
        guide = kind(counted.model).build(x)
        seconds.append(time.perf_counter() - start)
    parameters = sum(parameter.numel() for parameter in guide.parameters())
    return Measured(kind.__name__, seconds[1:], counted.count, parameters)


def _table(measured: Measured) -> list[Row]:
    median = statistics.median(measured.seconds)
    return [
        Row(
            f"{measured.guide}: time to build",
            f"{median:.2f} s",
            spread(measured.seconds),
            f"< {MOST_SECONDS:.0f} s",
            median < MOST_SECONDS,
        ),
        Row(
            f"{measured.guide}: runs of the model",
            f"{measured.num_runs}",
            "",
            f"<= {MOST_RUNS}",
            measured.num_runs <= MOST_RUNS,
        ),
        Row(f"{measured.guide}: parameters", f"{measured.num_parameters:,}"),
    ]
