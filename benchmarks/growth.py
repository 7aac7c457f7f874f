"""How the time of a training step grows with the rows of a batch, with latents, and with the rows of the data.

The paper's autoencoder (784-500-20-500-784, batches of 100), one number of it changed at a time. Contenders take the same batches
in turn, as in ``compiled_step``. Beside the table a picture is drawn.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.compiled_step import COMPILED, EAGER, HAND_WRITTEN, PYRO, hand_written, steps, svi
from benchmarks.programs import VAE
from benchmarks.result import Result, Row
from benchmarks.steps import stepper_of_fit
from benchmarks.timing import Block, interleave, spread, threads
from pyro_aevb import AEVB, SGVB
from pyro_aevb.canvas import BLUE, GREY, MUTED, VERMILLION
from pyro_aevb.datasets import mnist
from pyro_aevb.training.data import Batch, as_source
from pyro_aevb.training.stepper import Stepper

__all__ = ["run"]

PICTURE = Path(__file__).parent / "growth.png"
BATCH, LATENT = 100, 20
_TICKS = (1, 2, 5, 10, 20, 40)
BATCHES, LATENTS, ROWS = (25, 50, 100, 200, 400, 800), (2, 5, 10, 20, 50, 200), (1_000, 10_000, 100_000, 400_000)
COLOURS = {COMPILED: BLUE, EAGER: MUTED[4], HAND_WRITTEN: VERMILLION, PYRO: GREY}


class Measured(NamedTuple):
    """What was measured.

    Attributes:
        axis: The number that changes.
        times: Milliseconds a step of each block, by value of that number and contender.
    """

    axis: str
    times: dict[int, dict[str, list[float]]]


def run(*, quick: bool) -> Result:
    num_rounds, num_steps = (3, 5) if quick else (9, 40)
    shorten = slice(0, 2) if quick else slice(None)
    settings = {"num_rounds": num_rounds, "num_steps": num_steps, "num_warmup": num_steps}
    with threads(2):
        found = [
            Measured("rows of a batch", {n: interleave(_contenders(n, LATENT), **settings) for n in BATCHES[shorten]}),
            Measured("latents", {n: interleave(_contenders(BATCH, n), **settings) for n in LATENTS[shorten]}),
            Measured("rows of the data", {n: interleave(_epochs(n), **settings) for n in ROWS[shorten]}),
        ]
    if not quick:
        _draw(found)
    return Result(
        title="Growth of a step's time",
        setting=f"784-500-{LATENT}-500-784, batches of {BATCH}, Adam 1e-3, one number changed at a time, 2 threads. {num_rounds} "
        f"rounds of {num_steps} steps of each contender in turn after as many of warm-up. Medians over rounds; spread: the middle "
        "half and all rounds. Picture: growth.png.",
        rows=[row for measured in found for row in _table(measured)],
        notes=(
            "This machine runs the same matrix products at one of two speeds, which change from minute to minute: compare "
            "contenders at one value rather than values with each other.",
            "Rows of the data: batches are gathered by index from a shuffled epoch of uint8 digits, repeated as often as needed.",
        ),
    )


def _contenders(batch: int, latent: int) -> dict[str, Block]:
    torch.manual_seed(0)
    batches = mnist().train[: 10 * batch].reshape(10, batch, 784)
    found = {
        name: steps(_stepper(batches[0], latent, is_compiled=is_compiled), batches)
        for name, is_compiled in ((COMPILED, True), (EAGER, False))
    }
    hand = peers.HandWrittenVAE(latent=latent)
    found[HAND_WRITTEN] = hand_written(lambda x: -hand.bound(x).mean(), hand, batches)
    return found | {PYRO: svi(VAE(latent=latent), batches)}


def _stepper(x: Tensor, latent: int, *, is_compiled: bool) -> Stepper:
    program = VAE(latent=latent)
    module = AEVB(program.model, program.guide, SGVB(), num_data=60_000).module
    module.build(x).train()
    return stepper_of_fit(module, compile=is_compiled)


def _epochs(rows: int) -> dict[str, Block]:
    """Return a block of compiled steps on batches gathered from so many rows."""
    digits = (255 * mnist().train[:1000]).to(torch.uint8)
    data = digits.repeat(rows // 1000, 1)
    source, generator = as_source(data, BATCH), torch.Generator().manual_seed(0)
    stepper = _stepper(digits[:BATCH] / 255.0, LATENT, is_compiled=True)

    def batches() -> Iterator[Batch]:
        while True:
            yield from source.batches(generator)

    pending = batches()

    def block(num_steps: int) -> None:
        for _ in range(num_steps):
            ((x,), _) = next(pending)
            stepper.step(Batch((x / 255.0,), {}))

    return {COMPILED: block}


def _table(measured: Measured) -> list[Row]:
    return [
        Row(
            f"{measured.axis} {value:,}: {contender}",
            f"{statistics.median(times):.3f} ms",
            spread(times, 3),
        )
        for value, contenders in measured.times.items()
        for contender, times in contenders.items()
    ]


def _draw(found: list[Measured]) -> None:
    """Draw medians and middle halves, a panel for each number that changes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained", facecolor="white")
    for ax, measured in zip(figure.subplots(1, len(found)), found, strict=True):
        for name in next(iter(measured.times.values())):
            values = list(measured.times)
            low, middle, high = zip(
                *(statistics.quantiles(measured.times[value][name], n=4, method="inclusive") for value in values),
                strict=True,
            )
            ax.plot(values, middle, marker="o", markersize=3, color=COLOURS[name], label=name)
            ax.fill_between(values, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        ax.set(xscale="log", yscale="log", xlabel=measured.axis, ylabel="milliseconds a step", ylim=(1.0, 40.0))
        ax.set_xticks(values, [f"{value:,}" for value in values])
        ax.set_yticks(_TICKS, [f"{value:g}" for value in _TICKS])
        ax.minorticks_off()
        ax.grid(color="#e5e5e5", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=110)
