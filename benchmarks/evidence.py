r"""log p(x) of 100 MNIST digits under a VAE with three latents, by every estimator, against quadrature.

Figure 3's model of the paper (arXiv 1312.6114): 100 tanh units on either side, three latents, grey levels as Bernoulli
means, so that the integral over z can be done on a grid. Each estimator reports an error with each row; rows that differ from
the quadrature by more than three of them (Student-t's equivalent for few chains) are listed, and must be rows that the estimator
itself flags, but for the few that chance makes. A log p(x) of grey levels is no log-likelihood of binary data.
"""

import math
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.programs import VAE
from benchmarks.result import Result, Row
from benchmarks.timing import threads
from pyro_aevb import AEVB
from pyro_aevb.datasets import mnist
from pyro_aevb.evidence.result import LogMarginal
from pyro_aevb.status import Status

__all__ = ["run"]

METHODS: dict[str, dict[str, Any]] = {
    "importance": {},
    "bridge": {},
    "ais": {"start": "prior", "num_temperatures": 1000},
    "reciprocal": {"preset": "paper"},
}
THREE_SIGMA = math.erf(3 / math.sqrt(2))
"""Probability of three standard errors; of few chains, intervals are Student-t's."""
MOST_BY_CHANCE = 2
"""Of 100 rows whose errors are right, more than two lie outside by chance in three runs of a thousand."""
BARS = {"bridge": 0.05, "ais": 0.1}


class Measured(NamedTuple):
    """What the estimators said about the rows.

    Attributes:
        bound: ELBO of each row.
        quadrature: The reference.
        results: Each method's estimate.
        seconds: Time of each.
    """

    bound: Tensor
    quadrature: LogMarginal
    results: dict[str, LogMarginal]
    seconds: dict[str, float]


def run(*, quick: bool) -> Result:
    num_epochs, num_rows = (1, 10) if quick else (20, 100)
    with threads(1):
        vi, x = _train(num_epochs, num_rows)
        measured = _estimate(vi, x, quick=quick)
    return Result(
        title=f"log p(x) of {num_rows} MNIST digits under a VAE with three latents",
        setting=f"784-100-3-100-784, {num_epochs} epochs on grey levels, Adam 1e-3; the first {num_rows} test digits, float32, 1 "
        "thread. Settings of the estimators: "
        + "; ".join(f"`{name}` {_told(settings)}" for name, settings in METHODS.items())
        + ". nats.",
        rows=_table(measured),
        notes=(
            "Differences are estimate - quadrature. Their mean over all rows, flagged ones too, is held against the bar.",
            "Quadrature starts from the prior's range and knows nothing of the encoder.",
        ),
    )


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "as it comes"


def _train(num_epochs: int, num_rows: int) -> tuple[AEVB, Tensor]:
    data = mnist()
    torch.manual_seed(0)
    vae = VAE(hidden=100, latent=3)
    vi = AEVB(vae.model, vae.guide)
    vi.fit(data.train, num_epochs=num_epochs, batch_size=100, seed=0, progress=False)
    return vi, data.test[:num_rows]


def _estimate(vi: AEVB, x: Tensor, *, quick: bool) -> Measured:
    results, seconds = {}, {}
    for name, settings in {"quadrature": {}, **METHODS}.items():
        own = settings | ({"num_temperatures": 50} if quick and name == "ais" else {})
        start = time.perf_counter()
        results[name] = vi.log_marginal(x, method=name, seed=0, progress=False, **own)
        seconds[name] = time.perf_counter() - start
    quadrature = results.pop("quadrature")
    with vi.module.program.running(), torch.no_grad():
        bounds = torch.stack([vi.objective.bounds(vi.model, vi.guide, x).local for _ in range(100)])
    return Measured(bounds.double().mean(0), quadrature, results, seconds)


def _table(measured: Measured) -> list[Row]:
    exact = measured.quadrature
    rows = [
        Row(
            "quadrature",
            f"{exact.value.mean():.3f}",
            f"largest last change {exact.standard_error.max():.4f}; {_flagged(exact)}; {measured.seconds['quadrature']:.0f} s",
        ),
        Row("ELBO - quadrature", f"{(measured.bound - exact.value).mean():+.3f}"),
    ]
    for name, result in measured.results.items():
        rows += _compare(name, result, exact, measured.seconds[name])
    return rows


def _compare(name: str, result: LogMarginal, exact: LogMarginal, seconds: float) -> list[Row]:
    difference = result.value - exact.value
    mean = difference.mean().item()
    bar = BARS.get(name)
    low, high = result.interval(THREE_SIGMA)
    error = (result.standard_error.square() + exact.standard_error.square()).sqrt()
    width = (((high - low) / 2).square() + (3 * exact.standard_error).square()).sqrt()
    is_off = ~(difference.abs() <= width)
    is_told = is_off & torch.tensor([status != Status.OK for status in result.status])
    unflagged = int((is_off & ~is_told).sum())
    listed = is_off.nonzero()[:, 0].tolist()
    return [
        Row(
            f"{name} - quadrature, mean",
            f"{mean:+.4f}",
            f"median row {statistics.median(difference.tolist()):+.4f}, rows {difference.min():+.3f} to {difference.max():+.3f}; "
            f"{_flagged(result)}; {seconds:.0f} s",
            f"within {bar}" if bar else "",
            abs(mean) <= bar if bar else None,
        ),
        Row(
            f"{name}, rows beyond their 99.7 % interval",
            f"{len(listed)}",
            "; ".join(
                f"row {row}: {difference[row]:+.3f} (SE {error[row]:.3f}) {result.status[row]}" for row in listed[:8]
            ),
        ),
        Row(
            f"{name}, of these neither warned nor unreliable",
            f"{unflagged}",
            "chance alone: 0.27 expected",
            f"<= {MOST_BY_CHANCE}" if bar else "",
            unflagged <= MOST_BY_CHANCE if bar else None,
        ),
    ]


def _flagged(result: LogMarginal) -> str:
    summary = result.summary()
    return f"{summary.num_warned} warned, {summary.num_flagged} unreliable"
