"""What checkpoints cost: the paper's autoencoder (784-500-20-500-784, batches of 100) with and without one every 100 steps."""

import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.programs import VAE
from benchmarks.result import Result, Row
from benchmarks.timing import ratios, spread, threads
from pyro_aevb import AEVB
from pyro_aevb.datasets import mnist

__all__ = ["run"]

WITHOUT, WITH = "without", "a checkpoint every 100 steps"


class Measured(NamedTuple):
    """What was measured.

    Attributes:
        times: Milliseconds a step of each block, by contender.
        size: Bytes of a checkpoint.
    """

    times: dict[str, list[float]]
    size: int


def run(*, quick: bool) -> Result:
    num_rounds, num_epochs = (3, 1) if quick else (11, 4)
    rows = mnist().train[:10_000]  # 100 steps an epoch
    times: dict[str, list[float]] = {WITHOUT: [], WITH: []}
    with threads(2), tempfile.TemporaryDirectory() as folder:
        for number in range(num_rounds):
            place = Path(folder) / str(number)
            times[WITHOUT].append(_fit(rows, num_epochs, None))
            times[WITH].append(_fit(rows, num_epochs, place))
        size = max(place.glob("*.safetensors")).stat().st_size
    return Result(
        title="Checkpoints",
        setting=f"784-500-20-500-784, batches of 100 of 10,000 digits, compiled Adam, 2 threads. {num_rounds} rounds of a `fit` "
        f"of {100 * num_epochs} steps of each in turn, compiling left out. Medians over rounds; ratios are taken round by round; "
        "spread: the middle half and all rounds.",
        rows=_table(Measured(times, size)),
        notes=(
            "Parameters, Adam's two averages and the generators are written between two steps; a thread flushes them to disk.",
        ),
    )


def _fit(rows: Tensor, num_epochs: int, folder: Path | None) -> float:
    """Fit and return milliseconds a step."""
    program = VAE()
    settings: dict[str, Any] = {} if folder is None else {"checkpoint": folder, "every": 100}
    vi = AEVB(program.model, program.guide, compile=True)
    result = vi.fit(rows, num_epochs=num_epochs, batch_size=100, seed=0, progress=False, **settings)
    return 1e3 * result.seconds_per_step


def _table(measured: Measured) -> list[Row]:
    times, size = measured
    values = ratios(times[WITH], times[WITHOUT])
    cost = statistics.median(values) - 1
    return [
        *(
            Row(name, f"{statistics.median(entries):.3f} ms a step", spread(entries, 3))
            for name, entries in times.items()
        ),
        Row("size of a checkpoint", f"{size / 1e6:.1f} MB"),
        Row("what a checkpoint every 100 steps adds", f"{cost:+.1%}", spread(values, 3), "< 3%", cost < 0.03),
    ]
