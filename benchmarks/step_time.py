r"""One training step of the paper's MNIST model: this package beside Pyro's ``SVI`` and hand-written PyTorch, without compilation.

784-500-20-500-784, batches of 100 (arXiv 1312.6114, section 5). Contenders: the loop's ``Stepper.step``, as ``fit`` calls it;
``pyro.infer.SVI`` with ``Trace_ELBO`` and ``pyro.optim.Adam``, with Pyro's validation off and on (its default); a hand-written step
with the analytic KL. All take the same batches from the same initial weights, one after the other in turn.
"""

import statistics
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.optim import Adam

from benchmarks import peers
from benchmarks.programs import VAE
from benchmarks.result import Result, Row
from benchmarks.steps import stepper_of_fit
from benchmarks.timing import Block, interleave, ratios, spread, threads
from pyro_aevb import AEVB
from pyro_aevb.datasets import mnist
from pyro_aevb.training.data import Batch

__all__ = ["run"]

OURS = "AEVB"
SVI_FAST = "Pyro SVI, validation off"
SVI_DEFAULT = "Pyro SVI, defaults"
SVI_FUSED = "Pyro SVI, validation off, fused Adam"
HAND_WRITTEN = "hand-written PyTorch"
THREADS = (2, 1)


class Measured(NamedTuple):
    """Milliseconds a step of each block by contender, for one number of threads."""

    num_threads: int
    times: dict[str, list[float]]


def run(*, quick: bool) -> Result:
    num_rounds, num_steps = (5, 10) if quick else (21, 50)
    batches = mnist().train[:2000].split(100)
    measured = []
    for num_threads in THREADS:
        with threads(num_threads):
            times = interleave(_contenders(batches), num_rounds=num_rounds, num_steps=num_steps, num_warmup=num_steps)
        measured.append(Measured(num_threads, times))
    return Result(
        title="One training step of the paper's MNIST model, without compilation",
        setting=f"784-500-20-500-784, batches of 100, Adam 1e-3 (fused; `pyro.optim.Adam` as it comes). {num_rounds} rounds of "
        f"{num_steps} steps of each contender in turn after {num_steps} steps of warm-up. Medians over rounds; ratios are taken "
        f"round by round; spread: the middle half and all rounds.",
        rows=[row for item in measured for row in _table(item)],
        notes=(
            "A step of AEVB includes moving the batch, loss, gradient, the check that both are finite, Adam, and the bound as a "
            "number. `fit` turns Pyro's validation off for its steps, so it is off here.",
            "`pyro.optim.Adam` steps each parameter by itself and is not fused unless asked; the fused row tells how much of the "
            "difference that is.",
            "A range far beyond the middle half means that another process held a core; two threads on two cores feel it most.",
            "Pyro's `Trace_ELBO` draws log q, AEVB and the hand-written step take the KL in closed form.",
        ),
    )


def _contenders(batches: Sequence[Tensor]) -> dict[str, Block]:
    """Make every contender anew, from the same weights."""
    return {
        OURS: _ours(batches),
        SVI_FAST: _svi(batches, validate=False, fused=False),
        SVI_DEFAULT: _svi(batches, validate=True, fused=False),
        SVI_FUSED: _svi(batches, validate=False, fused=True),
        HAND_WRITTEN: _hand_written(batches),
    }


def _ours(batches: Sequence[Tensor]) -> Block:
    torch.manual_seed(0)
    vae = VAE()
    module = AEVB(vae.model, vae.guide, num_data=60_000).module
    module.build(batches[0]).train()
    stepper = stepper_of_fit(module)
    source = cycle([Batch((x,), {}) for x in batches])

    def block(num_steps: int) -> None:
        with pyro.validation_enabled(False):
            for _ in range(num_steps):
                stepper.step(next(source))

    return block


def _svi(batches: Sequence[Tensor], *, validate: bool, fused: bool) -> Block:
    torch.manual_seed(0)
    vae = VAE()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3, "fused": fused}), Trace_ELBO())
    source = cycle(batches)
    store = pyro.get_param_store()
    own: dict[str, dict] = {"params": {}, "constraints": {}}  # the names are every contender's, the values its own

    def block(num_steps: int) -> None:
        with store.scope(own), pyro.validation_enabled(validate):
            for _ in range(num_steps):
                svi.step(next(source))

    return block


def _hand_written(batches: Sequence[Tensor]) -> Block:
    torch.manual_seed(0)
    vae = peers.HandWrittenVAE()
    optimizer = Adam(vae.parameters(), lr=1e-3, fused=True)
    source = cycle(batches)

    def block(num_steps: int) -> None:
        for _ in range(num_steps):
            peers.step(vae, optimizer, next(source))

    return block


def _table(measured: Measured) -> list[Row]:
    where = f"{measured.num_threads} thread{'s' if measured.num_threads > 1 else ''}"
    times = measured.times
    rows = [
        Row(f"{name}, {where}", f"{statistics.median(values):.2f} ms", spread(values)) for name, values in times.items()
    ]
    for other in (SVI_FAST, SVI_DEFAULT, SVI_FUSED, HAND_WRITTEN):
        values = ratios(times[OURS], times[other])
        ratio = statistics.median(values)
        has_bar = other in (SVI_FAST, SVI_DEFAULT)
        row = Row(f"AEVB / {other}, {where}", f"{ratio:.2f}", spread(values))
        rows.append(row._replace(bar="<= 1.0", is_met=ratio <= 1.0) if has_bar else row)
    return rows
