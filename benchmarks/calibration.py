r"""Simulation-based calibration of 1,000 rows: what it costs, that the exact guide passes, and that two wrong ones fail.

The posterior of the linear-Gaussian model is known (:class:`pyro_aevb.testing.LinearGaussian`), so that p-values of the exact
guide are right, and two guides wrong in known ways: 0.7 times the posterior's standard deviations, and the prior whatever the
data, whose coordinates no rank tells from the posterior's (Modrák et al. 2023, arXiv 2211.02383).
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
from torch import Tensor

from benchmarks.result import Result, Row
from benchmarks.timing import threads
from pyro_aevb import calibrate
from pyro_aevb.diagnostics.calibration import TEST_QUANTITIES, Calibration
from pyro_aevb.testing import LinearGaussian

__all__ = ["run"]

NUM_SIMULATIONS = 1000
JOINT = "log p(x,z)"
FACTOR = 0.7
PASSES, FAILS = 1e-3, 1e-6
MOST_SECONDS = 30
"""For all simulations of one guide."""


class Measured(NamedTuple):
    """What calibration says of each guide, and how long it took."""

    results: dict[str, Calibration]
    seconds: dict[str, float]


def run(*, quick: bool) -> Result:
    num_draws = 100 if quick else 200
    model, template = LinearGaussian.fixture()
    measured = Measured({}, {})
    with threads(1):
        for name, guide in _guides(model).items():
            start = time.perf_counter()
            measured.results[name] = calibrate(
                model.model,
                guide,
                template,
                num_simulations=NUM_SIMULATIONS,
                num_draws=num_draws,
                seed=0,
                progress=False,
            )
            measured.seconds[name] = time.perf_counter() - start
    return Result(
        title="Calibration of guides that are right and wrong in known ways",
        setting=f"6 pixels, 3 latents, float64. {NUM_SIMULATIONS:,} simulated rows, {num_draws} draws of the guide for each, one "
        "thread. Seeds fixed. p-values: least or largest of the quantities named.",
        rows=_table(measured),
        notes=(
            "The prior passes by its coordinates, which are as uniform as the posterior's; that is why log p(x, z) is ranked too.",
            "Times hold the simulation, the draws, all densities and the ranks.",
        ),
    )


def _guides(model: LinearGaussian) -> dict[str, Callable[[Tensor], object]]:
    def narrow(x: Tensor) -> None:
        posterior = model.posterior(x)["z"]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(posterior.mean, FACTOR**2 * posterior.covariance_matrix))

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))

    return {"exact posterior": model.guide, f"sd times {FACTOR}": narrow, "prior": prior}


def _table(measured: Measured) -> list[Row]:
    exact, narrow, prior = measured.results
    p = {name: result.p_values for name, result in measured.results.items()}
    coordinates = measured.results[prior].coordinates
    return [
        _row(f"{exact}: least p-value", min(p[exact].values()), passes=True),
        _row(
            f"{narrow}: largest p-value of test quantities",
            max(p[narrow][name] for name in TEST_QUANTITIES),
            passes=False,
        ),
        _row(f"{prior}: least p-value of coordinates", min(p[prior][name] for name in coordinates), passes=True),
        _row(f"{prior}: p-value of {JOINT}", p[prior][JOINT], passes=False),
        *(
            Row(f"{name}: time", f"{seconds:.1f} s", "", f"< {MOST_SECONDS} s", seconds < MOST_SECONDS)
            for name, seconds in measured.seconds.items()
        ),
    ]


def _row(quantity: str, p: float, *, passes: bool) -> Row:
    """Hold a p-value to what the guide deserves."""
    bar, is_met = (f"> {PASSES:g}", p > PASSES) if passes else (f"< {FAILS:g}", p < FAILS)
    return Row(quantity, f"{p:.2g}", "", bar, is_met)
