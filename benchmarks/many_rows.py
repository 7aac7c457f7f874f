"""What a row costs when there are many of them: time per row from 1,000 to 1,000,000 rows, and memory over epochs.

Counts of 32 kinds, uint8 until the model converts its batch.
"""

import multiprocessing
import resource
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.result import Result, Row
from benchmarks.steps import stepper_of_fit
from benchmarks.timing import Block, interleave, ratios, spread, threads
from pyro_aevb import AEVB
from pyro_aevb.training.data import as_source
from pyro_aevb.training.loop import EpochEnd
from pyro_aevb.training.preparation import build

__all__ = ["run"]

SIZES = (1_000, 10_000, 100_000, 1_000_000)
FEW_SIZES = (1_000, 10_000)
BATCH, KINDS = 250, 32


class Counts(nn.Module):
    """Counts of 32 kinds with four latents."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(KINDS, 64), nn.Tanh(), nn.Linear(64, 8))
        self.decoder = nn.Linear(4, KINDS)

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
    """What was measured.

    Attributes:
        times: Milliseconds a step of each block, by number of rows.
        resident: Resident set after each epoch, less that before the data were made and the data's own, in MiB.
    """

    times: dict[str, list[float]]
    resident: list[float]


def run(*, quick: bool) -> Result:
    sizes, num_rounds, num_steps = (FEW_SIZES, 5, 40) if quick else (SIZES, 15, 500)
    with threads(2):
        blocks = {f"{rows:,} rows": _steps(rows) for rows in sizes}
        times = interleave(blocks, num_rounds=num_rounds, num_steps=num_steps, num_warmup=num_steps)
    measured = Measured(times, _apart(FEW_SIZES[-1] if quick else SIZES[-2]))
    return Result(
        title="Time per row and memory",
        setting=f"{KINDS} uint8 counts a row, four latents, batches of {BATCH} gathered from a shuffled epoch, compiled, 2 "
        f"threads. {num_rounds} rounds of {num_steps} steps at each number of rows in turn after as many. Medians over rounds; "
        "ratios are taken round by round; spread: the middle half and all rounds. Memory: a process of its own.",
        rows=_table(measured),
        notes=(
            "An epoch shuffles all rows and gathers each batch by index, in the data's own type; both are in the time.",
        ),
    )


def _table(measured: Measured) -> list[Row]:
    times, resident = measured
    few = next(iter(times))
    per_row = {name: [1e3 * value / BATCH for value in values] for name, values in times.items()}
    slower = {name: statistics.median(ratios(values, times[few])) - 1 for name, values in times.items()}
    most, growth = max(abs(value) for value in slower.values()), resident[-1] / resident[0] - 1
    return [
        *(
            Row(name, f"{statistics.median(values):.3f} microseconds a row", spread(values, 3))
            for name, values in per_row.items()
        ),
        *(Row(f"{name} against {few}", f"{value:+.0%}") for name, value in slower.items() if name != few),
        Row("the largest of these differences", f"{most:.0%}", bar="<= 15%", is_met=most <= 0.15),
        Row(
            f"memory above data and libraries after epochs 1 and {len(resident)}",
            f"{resident[0]:.0f} and {resident[-1]:.0f} MiB",
            bar="flat, 5%",
            is_met=abs(growth) <= 0.05,
        ),
    ]


def _data(rows: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 5, (rows, KINDS), dtype=torch.uint8)


def _steps(rows: int) -> Block:
    """Return a block of steps over shuffled epochs, as ``fit`` takes them."""
    source = as_source(_data(rows), BATCH)
    program = Counts()
    module = AEVB(program.model, program.guide, num_data=rows).module
    build(module, source.first())
    module.train()
    stepper = stepper_of_fit(module, compile=True)
    generator = torch.Generator().manual_seed(0)
    batches = (batch for _ in count() for batch in source.batches(generator))

    def block(num_steps: int) -> None:
        with pyro.validation_enabled(False):
            for _ in range(num_steps):
                stepper.step(next(batches))

    return block


def _apart(rows: int) -> list[float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_fit, rows).result()


def _fit(rows: int) -> list[float]:
    """Return the resident set after each of eleven epochs, less that before the data were made and the data's own, in MiB."""
    torch.set_num_threads(2)
    program = Counts()
    before = _resident()
    data = _data(rows)
    resident: list[float] = []

    def note(end: EpochEnd) -> None:
        resident.append(_resident() - before - data.numel() / 2**20)

    vi = AEVB(program.model, program.guide, compile=True)
    vi.fit(data, num_epochs=11, batch_size=BATCH, seed=0, progress=False, callbacks=[note])
    return resident


def _resident() -> float:
    """Return the resident set of this process, in MiB; the largest so far where the system does not tell the present one."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
