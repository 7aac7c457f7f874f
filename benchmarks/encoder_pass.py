"""Posterior draws of new rows: one pass of the encoder and 100 draws of each of 10,000 digits, beside hand-written PyTorch."""

import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.programs import VAE
from benchmarks.result import Result, Row
from benchmarks.timing import Block, interleave, ratios, spread, threads
from pyro_aevb import AEVB
from pyro_aevb.datasets import mnist

__all__ = ["run"]

OURS, HAND_WRITTEN = "AEVB.posterior", "hand-written PyTorch"
DRAWS = 100


class Measured(NamedTuple):
    """Milliseconds a call of each block, by contender."""

    times: dict[str, list[float]]


def run(*, quick: bool) -> Result:
    num_rounds, rows = (5, 1000) if quick else (15, 10_000)
    x = mnist().test[:rows]
    torch.manual_seed(0)
    vae = VAE()
    with threads(2):
        times = interleave(
            {OURS: _ours(vae, x), HAND_WRITTEN: _hand_written(vae, x)}, num_rounds=num_rounds, num_steps=1, num_warmup=2
        )
    return Result(
        title="Posterior draws of rows that training never saw",
        setting=f"{len(x):,} digits, {DRAWS} draws each of 20 latents, encoder 784-500-40, float32, 2 threads. {num_rounds} rounds "
        "of one call of each in turn after two. Medians over rounds; ratios round by round; spread: the middle half, all.",
        rows=_table(Measured(times)),
        notes=(
            "A call of AEVB reads model and guide, checks the data for NaN and draws in chunks of rows. The hand-written one runs "
            "the encoder on all rows and draws at once.",
        ),
    )


def _ours(vae: VAE, x: Tensor) -> Block:
    vi = AEVB(vae.model, vae.guide)

    def block(num_steps: int) -> None:
        for _ in range(num_steps):
            vi.posterior(x, num_samples=DRAWS)

    return block


def _hand_written(vae: VAE, x: Tensor) -> Block:
    @torch.no_grad()
    def block(num_steps: int) -> None:
        for _ in range(num_steps):
            loc, log_variance = vae.encoder(x).chunk(2, -1)
            loc + (log_variance / 2).exp() * torch.randn(DRAWS, *loc.shape)

    return block


def _table(measured: Measured) -> list[Row]:
    times = measured.times
    values = ratios(times[OURS], times[HAND_WRITTEN])
    ratio = statistics.median(values)
    return [
        *(Row(name, f"{statistics.median(found):.0f} ms", spread(found, 0)) for name, found in times.items()),
        Row(f"{OURS} / {HAND_WRITTEN}", f"{ratio:.2f}", spread(values), "<= 1.1", ratio <= 1.1),
    ]
