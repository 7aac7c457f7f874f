"""What a row costs when there are many of them: time per row from 1,000 to 1,000,000 rows, and memory over epochs.

A hierarchy's groups (`compiled_step`, P2) as uint8 counts, which stay uint8 until their batch; each size in a process of its own.
"""

import math
import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.result import Result, Row
from pyro_aevb import AEVB
from pyro_aevb.training.loop import EpochEnd

__all__ = ["run"]

SIZES = (1_000, 10_000, 100_000, 1_000_000)
FEW_SIZES = (1_000, 10_000)
BATCH, PIXELS = 250, 32
EPOCHS_OF_MOST = 1
"""Epochs over the largest number of rows; as many steps are taken with fewer."""


class Counts(nn.Module):
    """Counts of 32 kinds with four latents."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 64), nn.Tanh(), nn.Linear(64, 8))
        self.decoder = nn.Linear(4, PIXELS)

    def model(self, x: Tensor) -> None:
        """Generate counts ``x``."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(nn.functional.softplus(self.decoder(z))).to_event(1), obs=x.float())

    def guide(self, x: Tensor) -> None:
        """Sample the latents of counts ``x``."""
        loc, log_scale = self.encoder(x.float()).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Measured(NamedTuple):
    """Fits over one number of rows.

    Attributes:
        rows: How many.
        microseconds: Time per row of each epoch after the first.
        resident: Resident set in MiB after each epoch, less that before the data were made and the data themselves.
    """

    rows: int
    microseconds: list[float]
    resident: list[float]


def run(*, quick: bool) -> Result:
    sizes = FEW_SIZES if quick else SIZES
    measured = [_apart(rows, steps=40 if quick else max(sizes) // BATCH) for rows in sizes]
    fastest = [min(item.microseconds) for item in measured]
    middle = [sorted(item.microseconds)[len(item.microseconds) // 2] for item in measured]
    spread_ = max(middle) / min(middle) - 1
    memory = _apart(min(100_000, max(sizes)), steps=11 * min(100_000, max(sizes)) // BATCH)
    growth = memory.resident[-1] / memory.resident[0] - 1
    return Result(
        title="Time per row and memory",
        setting=f"{PIXELS} uint8 counts a row, four latents, batches of {BATCH}, compiled, as many steps at every size, each in a "
        "fresh process, 2 threads. Medians over epochs after the first.",
        rows=[
            *(
                Row(f"{item.rows:,} rows", f"{median:.3f} microseconds a row", f"fastest {low:.3f}")
                for item, median, low in zip(measured, middle, fastest, strict=True)
            ),
            Row("slowest over fastest of these, less one", f"{spread_:.0%}", bar="<= 15%", is_met=spread_ <= 0.15),
            Row(
                f"memory above data and libraries after epochs 1 and {len(memory.resident)}, {memory.rows:,} rows",
                f"{memory.resident[0]:.0f} and {memory.resident[-1]:.0f} MiB",
                bar="flat, 5%",
                is_met=abs(growth) <= 0.05,
            ),
        ],
        notes=("An epoch shuffles all rows and gathers each batch by index, in the data's own type.",),
    )


def _apart(rows: int, *, steps: int) -> Measured:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_fit, rows, steps).result()


def _fit(rows: int, steps: int) -> Measured:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    program = Counts()
    before = _resident()
    data = torch.randint(0, 5, (rows, PIXELS), dtype=torch.uint8)
    held = data.numel() / 2**20
    seconds, resident = [], []

    def note(end: EpochEnd) -> None:
        seconds.append(end.record["seconds"])
        resident.append(_resident() - before - held)

    epochs = max(2, math.ceil(steps * BATCH / rows))
    vi = AEVB(program.model, program.guide, compile=True)
    vi.fit(data, num_epochs=epochs, batch_size=BATCH, seed=0, progress=False, callbacks=[note])
    return Measured(rows, [1e6 * value / rows for value in seconds[1:]], resident)


def _resident() -> float:
    """Return the resident set of this process, in MiB; the largest so far where the system does not tell the present one."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
