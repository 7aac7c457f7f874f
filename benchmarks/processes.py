"""Two processes beside one: rows a second of P1's training steps, with one thread in each process.

Both run in one pair of processes that Lightning Fabric starts: blocks of steps that the two take together, each on batches of its
own, alternate with blocks that the first takes by itself while the second waits. So whatever else the machine does falls on both.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from lightning_fabric import Fabric

from benchmarks.programs import VAE
from benchmarks.result import Result, Row
from benchmarks.steps import stepper_of_fit
from benchmarks.timing import interleave, ratios, spread
from pyro_aevb import AEVB, SGVB
from pyro_aevb.datasets import mnist
from pyro_aevb.program.processes import Processes
from pyro_aevb.training.data import as_source
from pyro_aevb.training.sharding import share

__all__ = ["run"]

BATCH_SIZE = 100
LEAST = 1.6
"""Rows a second of two processes over those of one."""


class Measured(NamedTuple):
    """Milliseconds a step of each block, for steps of one kind.

    Attributes:
        kind: ``"compiled"`` or ``"eager"``.
        together: Of two processes, each with a batch.
        alone: Of one process.
    """

    kind: str
    together: list[float]
    alone: list[float]


def run(*, quick: bool) -> Result:
    num_rounds, num_steps = (5, 20) if quick else (21, 100)
    found = _run_both(num_rounds, num_steps)
    return Result(
        title="Two processes beside one",
        setting=f"P1: 784-500-20-500-784, batches of {BATCH_SIZE} of 4,000 digits for each process, Adam 1e-3, one thread a "
        f"process, gloo. {num_rounds} rounds of {num_steps} steps of each contender in turn after {num_steps} of warm-up. Medians "
        "over rounds; ratios are taken round by round; spread: the middle half and all rounds.",
        rows=[row for measured in found for row in _table(measured)],
        notes=(
            "Two processes take twice the rows in a step, send each other 3.3 MB of gradients, and agree on whether to skip it.",
            "One process compiles loss, gradient and Adam into one graph; two compile loss and gradient, as gradients travel next.",
        ),
    )


def _run_both(num_rounds: int, num_steps: int) -> list[Measured]:
    """Measure in a process of its own, which starts the second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.processes", str(num_rounds), str(num_steps), str(path)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True)
        return [Measured(*item) for item in json.loads(path.read_text(encoding="utf-8"))]


def _main(num_rounds: str, num_steps: str, path: str) -> None:
    """Take part as one of the two processes; the first writes what was found."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    found = _measure(fabric, int(num_rounds), int(num_steps))
    if fabric.is_global_zero:
        Path(path).write_text(json.dumps(found), encoding="utf-8")


def _measure(fabric: Fabric, num_rounds: int, num_steps: int) -> list[Measured]:
    """Time blocks in each of the two processes; the first one's times are returned."""
    torch.set_num_threads(1)
    processes = Processes(fabric)
    found = []
    for kind in ("compiled", "eager"):
        together = _steps(processes, fabric, is_compiled=kind == "compiled")
        alone = _steps(Processes(None), None, is_compiled=kind == "compiled") if processes.is_first else None

        def only_first(num_steps: int, alone: Callable[[int], None] | None = alone) -> None:
            if alone is not None:
                alone(num_steps)
            fabric.barrier()

        contenders = {"together": together, "alone": only_first}
        times = interleave(contenders, num_rounds=num_rounds, num_steps=num_steps, num_warmup=num_steps)
        found.append(Measured(kind, times["together"], times["alone"]))
    return found


def _steps(processes: Processes, fabric: Fabric | None, *, is_compiled: bool) -> Callable[[int], None]:
    """Return what takes so many steps."""
    torch.manual_seed(0)
    program = VAE()
    data = mnist().train[:4000]
    module = AEVB(program.model, program.guide, SGVB(), num_data=60_000).module
    module.build(data[:BATCH_SIZE]).train()
    stepper = stepper_of_fit(module, compile=is_compiled, fabric=fabric)
    source = cycle(list(share(as_source(data, BATCH_SIZE), processes).batches()))

    def block(num_steps: int) -> None:
        with pyro.validation_enabled(False):
            for _ in range(num_steps):
                stepper.step(next(source))

    return block


def _table(measured: Measured) -> list[Row]:
    kind, together, alone = measured
    rates = [1e3 * BATCH_SIZE * count / statistics.median(times) for count, times in ((2, together), (1, alone))]
    speedups = [2 * ratio for ratio in ratios(alone, together)]
    ratio = statistics.median(speedups)
    row = Row(f"{kind}: two processes / one, rows a second", f"{ratio:.2f}", spread(speedups))
    return [
        Row(f"{kind}: two processes, a step", f"{statistics.median(together):.2f} ms", spread(together)),
        Row(f"{kind}: one process, a step", f"{statistics.median(alone):.2f} ms", spread(alone)),
        Row(f"{kind}: two processes, rows a second", f"{rates[0]:,.0f}"),
        Row(f"{kind}: one process, rows a second", f"{rates[1]:,.0f}"),
        row._replace(bar=f">= {LEAST}", is_met=ratio >= LEAST),
    ]


if __name__ == "__main__":
    _main(*sys.argv[1:])
