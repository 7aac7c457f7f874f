"""How much memory annealing takes: 10,000 rows, 16 chains a row, 300 temperatures.

Chains are annealed in chunks of rows, so the number of rows, and that of temperatures, should not matter. The whole statement is
measured on the linear-Gaussian model of `pyro_aevb.testing`; the paper's decoder, whose evaluation takes most of the memory, at few
temperatures. Each in a process of its own, whose largest resident set the system tells.
"""

import multiprocessing
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.programs import VAE
from benchmarks.result import Result, Row
from pyro_aevb import log_marginal
from pyro_aevb.datasets import mnist
from pyro_aevb.errors import UnreliableWarning
from pyro_aevb.testing import LinearGaussian

__all__ = ["run"]

MOST_GIB = 4.0
ROWS, CHAINS, TEMPERATURES, FEW_TEMPERATURES = 10_000, 16, 300, 3


class Measured(NamedTuple):
    """One run of ais.

    Attributes:
        name: What was run.
        before: Largest resident set before it, in GiB, libraries and data included.
        peak: Largest resident set after it.
        seconds: How long it took.
    """

    name: str
    before: float
    peak: float
    seconds: float


def run(*, quick: bool) -> Result:
    num_rows, num_temperatures = (500, 10) if quick else (ROWS, TEMPERATURES)
    measured = [
        _apart(_linear_gaussian, num_rows, num_temperatures),
        _apart(_decoder, num_rows, FEW_TEMPERATURES),
    ]
    return Result(
        title="Largest memory of annealed importance sampling",
        setting=f"`ais` from the prior, {num_rows:,} rows x {CHAINS} chains, float32, default chunks, 2 threads; each in a fresh "
        "process.",
        rows=_table(measured),
        notes=("The largest resident set of the process, with all that was imported and the data.",),
    )


def _apart(job: Callable[[int, int], Measured], num_rows: int, num_temperatures: int) -> Measured:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, num_rows, num_temperatures).result()


def _linear_gaussian(num_rows: int, num_temperatures: int) -> Measured:
    fixture, _ = LinearGaussian.fixture(torch.float32)
    torch.manual_seed(0)
    z = torch.randn(num_rows, fixture.weight.shape[1])
    x = z @ fixture.weight.T + fixture.bias + fixture.noise_variance.sqrt() * torch.randn(num_rows, len(fixture.bias))
    return _measure(f"linear-Gaussian model, {num_temperatures} temperatures", fixture.model, x, num_temperatures)


def _decoder(num_rows: int, num_temperatures: int) -> Measured:
    torch.manual_seed(0)
    model = VAE(hidden=100, latent=3).model
    return _measure(
        f"3-100-784 decoder, {num_temperatures} temperatures",
        model,
        mnist("threshold").test[:num_rows],
        num_temperatures,
    )


def _measure(name: str, model: Callable[[Tensor], None], x: Tensor, num_temperatures: int) -> Measured:
    torch.set_num_threads(2)
    before, start = _peak(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UnreliableWarning
        )  # few temperatures are no estimate, and only memory counts here
        log_marginal(
            model, None, x, method="ais", num_chains=CHAINS, num_temperatures=num_temperatures, seed=0, progress=False
        )
    return Measured(name, before, _peak(), time.perf_counter() - start)


def _peak() -> float:
    """Return the largest resident set of this process; what the system counts for it may include that of its parent."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8")) if status.is_file() else None
    if found:
        return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _table(measured: list[Measured]) -> list[Row]:
    return [
        Row(
            item.name,
            f"{item.peak:.2f} GiB",
            f"{item.before:.2f} GiB before; {item.seconds:.0f} s",
            f"< {MOST_GIB:.0f} GiB",
            item.peak < MOST_GIB,
        )
        for item in measured
    ]
