r"""Where everything is known: factor analysis, trained and exact guides against the closed form.

6 pixels, 3 latents, one row whose log p(x), best factorised guide and approximation gap are known in closed form
(:class:`pyro_aevb.testing.LinearGaussian`; Bishop 2006, eq. 12.41 and 10.1.2). A factorised guide trained by ``AEVB.fit`` must
reach the ELBO of the best one; with the exact posterior as guide every importance weight is p(x), so that the importance-weighted
bound and ``log_marginal`` must equal it with any number of samples. Everything is in float64.
"""

import warnings
from typing import NamedTuple

import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from benchmarks.result import Result, Row
from pyro_aevb import AEVB, IWELBO, SGVB, log_marginal
from pyro_aevb.errors import UnreliableWarning
from pyro_aevb.testing import LinearGaussian, LinearGaussianMeanField

__all__ = ["run"]

NUM_ROWS = 5000
CHUNK = 100_000
NUM_SAMPLES = (1, 2, 10, 5000)
BEST_ELBO = -13.176
APPROXIMATION_GAP = 0.9138322


class Exact(NamedTuple):
    """What the exact posterior as guide gives for one number of importance samples, in nats."""

    num_samples: int
    bound_error: float
    log_marginal_error: float
    standard_error: float
    k_hat: float


class Measured(NamedTuple):
    """What one run found, in nats."""

    log_marginal: float
    elbo: float
    elbo_error: float
    exact_elbo: float
    log_weight_sd: float
    exact: tuple[Exact, ...]


def run(*, quick: bool) -> Result:
    num_epochs, batch_size, num_draws = (40, 500, 200_000) if quick else (60, 100, 2_000_000)
    fixture, x = LinearGaussian.fixture()
    guide = _trained_guide(fixture, x, num_epochs, batch_size)
    elbo, error = _elbo(fixture, guide, x, num_draws)
    with torch.no_grad():
        log_weights = IWELBO(1).bounds(fixture.model, fixture.guide, x.expand(10_000, -1)).local
    measured = Measured(
        log_marginal=float(fixture.log_marginal(x)),
        elbo=elbo,
        elbo_error=error,
        exact_elbo=_exact_elbo(fixture, guide, x),
        log_weight_sd=float(log_weights.std()),
        exact=tuple(_with_exact_guide(fixture, x, num_samples) for num_samples in NUM_SAMPLES),
    )
    return Result(
        title="Linear-Gaussian model against its closed form",
        setting=f"6 pixels, 3 latents, float64. Guide: mean-field, linear; {NUM_ROWS:,} simulated rows and the fixture's row, "
        f"{num_epochs} epochs of batches of {batch_size}, Adam, its rate falling from 0.05 to 0.0005; ELBO of the fixture's row "
        f"from {num_draws:,} draws, estimator A. Seeds fixed.",
        rows=_table(measured),
        notes=(
            "The approximation gap is what the best factorised guide loses; what the trained one loses beyond is training error.",
            "At K = 1 there is one weight and no standard error (NaN by design). Equal weights have k-hat -inf.",
        ),
    )


def _trained_guide(fixture: LinearGaussian, x: Tensor, num_epochs: int, batch_size: int) -> LinearGaussianMeanField:
    """Train a factorised guide on simulated rows and the fixture's."""
    simulated, _ = fixture.simulate(NUM_ROWS, seed=1)
    guide = fixture.mean_field_guide()
    AEVB(fixture.model, guide).fit(
        torch.cat([simulated, x]),
        num_epochs=num_epochs,
        batch_size=batch_size,
        learning_rate=0.05,
        schedule=lambda optimizer: ExponentialLR(optimizer, 0.01 ** (1 / num_epochs)),
        seed=0,
        progress=False,
    )
    return guide


def _elbo(fixture: LinearGaussian, guide: LinearGaussianMeanField, x: Tensor, num_draws: int) -> tuple[float, float]:
    """Estimate the ELBO of the fixture's row, with its standard error."""
    pyro.set_rng_seed(2)
    objective = SGVB(kl="sampled")
    # the same row many times is as many independent draws
    rows = [x.expand(CHUNK, -1)] * (num_draws // CHUNK)
    draws = torch.cat([objective.bounds(fixture.model, guide, part).local for part in rows])
    return float(draws.mean()), float(draws.std()) / num_draws**0.5


def _exact_elbo(fixture: LinearGaussian, guide: LinearGaussianMeanField, x: Tensor) -> float:
    """Compute the same without draws: log p(x) - KL(q || p(z | x)), all of them normal."""
    with torch.no_grad():
        loc, scale = (x @ guide.weight.T + guide.bias)[0], guide.log_scale.exp()
        precision = fixture.posterior(x)["z"].precision_matrix.squeeze(0)
        difference = loc - fixture.posterior(x)["z"].mean[0]
        trace = (precision.diagonal() * scale.square()).sum() + difference @ precision @ difference
        kl = (trace - len(loc) - precision.logdet() - 2 * scale.log().sum()) / 2
        return float(fixture.log_marginal(x)[0] - kl)


def _with_exact_guide(fixture: LinearGaussian, x: Tensor, num_samples: int) -> Exact:
    """Weigh the fixture's row with draws from its exact posterior."""
    exact = fixture.log_marginal(x)
    bound = IWELBO(num_samples).bounds(fixture.model, fixture.guide, x).local
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)  # one weight has no standard error, and says so
        result = log_marginal(fixture.model, fixture.guide, x, num_samples=num_samples, seed=3, progress=False)
    return Exact(
        num_samples,
        bound_error=float((bound - exact).abs().max()),
        log_marginal_error=float((result.value - exact).abs().max()),
        standard_error=float(result.standard_error[0]),
        k_hat=float(result.k_hat[0]),
    )


def _table(measured: Measured) -> list[Row]:
    gap = measured.log_marginal - measured.elbo
    elbo_is_met = abs(measured.elbo - BEST_ELBO) <= 0.02
    return [
        Row("log p(x), closed form", f"{measured.log_marginal:.7f}"),
        Row(
            "ELBO, trained mean-field guide",
            f"{measured.elbo:.4f}",
            f"SE {measured.elbo_error:.4f}",
            f"{BEST_ELBO} +- 0.02",
            elbo_is_met,
        ),
        Row("the same guide's ELBO in closed form", f"{measured.exact_elbo:.4f}"),
        Row(
            "approximation gap recovered",
            f"{gap:.4f}",
            f"SE {measured.elbo_error:.4f}",
            f"closed form {APPROXIMATION_GAP}",
        ),
        *(row for exact in measured.exact for row in _exact_rows(exact)),
        Row(
            "sd of log-weights, exact guide, 10,000 draws",
            f"{measured.log_weight_sd:.1e}",
            bar="<= 1e-12",
            is_met=measured.log_weight_sd <= 1e-12,
        ),
    ]


def _exact_rows(exact: Exact) -> list[Row]:
    name = f"exact guide, K = {exact.num_samples:,}: error of"
    has_no_spread = (
        exact.standard_error != exact.standard_error if exact.num_samples == 1 else exact.standard_error < 1e-8
    )
    is_met = exact.log_marginal_error <= 1e-8 and has_no_spread
    error = f"SE {exact.standard_error:.1e}, k-hat {exact.k_hat}"
    return [
        Row(f"{name} IWELBO", f"{exact.bound_error:.1e}", "", "<= 1e-8", exact.bound_error <= 1e-8),
        Row(f"{name} log_marginal", f"{exact.log_marginal_error:.1e}", error, "<= 1e-8", is_met),
    ]
