"""Many rows on disk: an epoch over 10,000,000 rows of 32 numbers in a memory map, and draws of all of them written to a file.

Resident memory is looked at every few milliseconds, by kind: a process's own pages, and pages of files that it has mapped, which
are the system's cache and can be dropped at any time. Everything in a process of its own, counted from its start.
"""

import multiprocessing
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray
from torch.optim import Adam

from benchmarks.result import Result, Row
from pyro_aevb import AEVB, export_posterior
from pyro_aevb.testing import LinearGaussian

__all__ = ["run"]

ROWS, QUICK_ROWS, OBSERVED, LATENT = 10_000_000, 200_000, 32, 2
BATCH, DRAWS, BLOCK = 1000, 4, 100_000
MOST_GIB, MOST_UNEVEN = 1.5, 1.25


class Memory(NamedTuple):
    """Largest growth of a process since its start, in GiB.

    Attributes:
        own: Of its own pages.
        files: Of pages of files.
        total: Of all.
    """

    own: float
    files: float
    total: float


class Measured(NamedTuple):
    """What one process found.

    Attributes:
        num_rows: Rows in the file.
        fit_memory: While it trained.
        rates: Rows a second in each tenth of the epoch.
        own_rates: Rows a second of the process's own time, which other processes don't take.
        export_memory: While it wrote draws.
        export_rate: Rows a second, written and brought to the disk.
        error: Root mean square of the written draws' mean against the exact posterior mean, in posterior standard deviations.
    """

    num_rows: int
    fit_memory: Memory
    rates: list[float]
    own_rates: list[float]
    export_memory: Memory
    export_rate: float
    error: float


def run(*, quick: bool) -> Result:
    num_rows = QUICK_ROWS if quick else ROWS
    measured = _apart(num_rows)
    return Result(
        title="Rows on disk: one epoch from a memory map, and draws of all rows written to a file",
        setting=f"{num_rows:,} rows of {OBSERVED} numbers in float32 ({num_rows * OBSERVED * 4 / 1e9:.2f} GB), linear-Gaussian "
        f"model of {LATENT} latents, `AutoAmortizedNormal`, batches of {BATCH:,} in random order, eager, 1 thread; {DRAWS} draws "
        "of each row by `export_posterior`.",
        rows=_table(measured),
        notes=(
            "Memory is resident memory above that of the process at its start, libraries included in the start. Pages of files are "
            "the mapped data, which an epoch in random order touches all of; the system drops them where it needs room.",
        ),
    )


def _apart(num_rows: int) -> Measured:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, num_rows).result()


def _measure(num_rows: int) -> Measured:
    torch.set_num_threads(1)
    start = _resident()
    with tempfile.TemporaryDirectory() as folder:
        exact = _model()
        _write_rows(exact, Path(folder) / "x.npy", num_rows)
        x = np.load(Path(folder) / "x.npy", mmap_mode="r")
        vi = AEVB(exact.model)
        times: list[tuple[float, float]] = []
        with _watched(start) as fit_memory:
            vi.fit(x, num_epochs=1, batch_size=BATCH, optimizer=_timed(times), seed=0, compile=False, progress=False)
        before = time.perf_counter()
        path = Path(folder) / "draws.nc"
        with _watched(start) as export_memory:
            export_posterior(vi.model, vi.guide, x, path=path, num_samples=DRAWS, seed=0)
        seconds = time.perf_counter() - before
        wall, own = (_rates(column) for column in zip(*times, strict=True))
        error = _error(exact, x, path)
        return Measured(num_rows, fit_memory(), wall, own, export_memory(), num_rows / seconds, error)


def _model() -> LinearGaussian:
    i, j = torch.arange(1.0, OBSERVED + 1), torch.arange(1.0, LATENT + 1)
    return LinearGaussian(torch.sin(i[:, None] + 2 * j) / 4, torch.cos(i), torch.full_like(i, 0.25))


def _write_rows(exact: LinearGaussian, path: Path, num_rows: int) -> None:
    """Write rows of the model to a file, block by block."""
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_rows, OBSERVED))
    for seed, begin in enumerate(range(0, num_rows, BLOCK)):
        count = min(BLOCK, num_rows - begin)
        file[begin : begin + count] = exact.simulate(count, seed=seed, dtype=torch.float32)[0].numpy()
    file.flush()


def _timed(times: list[tuple[float, float]]) -> Callable[[Any], Adam]:
    """Return a maker of Adam that notes when it steps."""

    class Timed(Adam):
        def step(self, closure: Any = None) -> Any:
            times.append((time.perf_counter(), time.process_time()))
            return super().step(closure)

    return lambda parameters: Timed(parameters, lr=1e-3, fused=True)


def _rates(times: Sequence[float]) -> list[float]:
    """Return rows a second in each tenth."""
    size = len(times) // 10
    return [(size - 1) * BATCH / (times[begin + size - 1] - times[begin]) for begin in range(0, 10 * size, size)]


def _error(exact: LinearGaussian, x: np.ndarray, path: Path) -> float:
    """Hold the last rows' written draws to the closed form."""
    rows = torch.from_numpy(np.array(x[-1000:]))
    truth = exact.posterior(rows)["z"]
    with xarray.open_dataset(path, group="posterior") as found:
        draws = torch.from_numpy(found["z"][0, :, -1000:].values)
        if found["z"].shape != (1, DRAWS, len(x), LATENT):
            return float("nan")
    # a mean of 4 draws scatters by half a standard deviation
    return float(((draws.mean(0) - truth.mean) / truth.stddev).square().mean().sqrt())


def _resident() -> dict[str, int]:
    """Return resident memory by kind, in bytes, as Linux tells it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {kind: 1024 * int(size) for kind, size in re.findall(r"(VmRSS|RssAnon|RssFile):\s*(\d+) kB", status)}


@contextmanager
def _watched(start: dict[str, int]) -> Iterator[Callable[[], Memory]]:
    """Look at resident memory from a thread, and tell its largest growth."""
    most, done = dict(start), threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            for kind, size in _resident().items():
                most[kind] = max(most[kind], size)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: Memory(*((most[kind] - start[kind]) / 2**30 for kind in ("RssAnon", "RssFile", "VmRSS")))
    finally:
        done.set()
        thread.join()


def _table(measured: Measured) -> list[Row]:
    rates, own = sorted(measured.rates), sorted(measured.own_rates)
    typical, uneven = rates[len(rates) // 2], own[len(own) // 2] / own[0]
    tenths = f"{rates[0]:,.0f} to {rates[-1]:,.0f} over tenths of the epoch"
    return [
        _memory_row("memory of an epoch", measured.fit_memory),
        Row("rows a second", f"{typical:,.0f}", tenths),
        Row(
            "middle tenth over the slowest, in the process's own time",
            f"{uneven:.2f}",
            f"{own[0]:,.0f} to {own[-1]:,.0f} rows a second",
            f"< {MOST_UNEVEN}",
            uneven < MOST_UNEVEN,
        ),
        _memory_row("memory of the draws of all rows", measured.export_memory),
        Row("rows a second, drawn and written", f"{measured.export_rate:,.0f}"),
        Row(
            "written means against the exact ones, in sd",
            f"{measured.error:.2f}",
            "of 4 draws: 0.5",
            "< 1",
            measured.error < 1,
        ),
    ]


def _memory_row(name: str, memory: Memory) -> Row:
    parts = f"own {memory.own:.2f}, of files {memory.files:.2f} GiB"
    return Row(name, f"{memory.total:.2f} GiB", parts, f"< {MOST_GIB} GiB", memory.total < MOST_GIB)
