"""Both samplers against reference draws of other people's posteriors, and against quadrature."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from posteriordb import find_posterior
from torch import Tensor

from pyro_aevb.errors import UnreliableWarning
from pyro_aevb.mcmc.convergence import bulk_ess, mean_ess
from pyro_aevb.mcmc.draws import PosteriorDraws
from pyro_aevb.mcmc.nuts import nuts_posterior
from pyro_aevb.mcmc.posterior import hmc_posterior
from pyro_aevb.testing import EightSchools

NAMES = ("eight_schools-eight_schools_noncentered", "kidiq-kidscore_momiq", "sblrc-blr", "arK-arK")
NUM_REFERENCE = 10_000


def by_hmc(model: Callable[..., None], *batch: Tensor) -> PosteriorDraws:
    return hmc_posterior(
        model, *batch, data_plate=None, num_chains=128, num_samples=500, warmup_steps=400, seed=1, progress=False
    )


def by_nuts(model: Callable[..., None], *batch: Tensor) -> PosteriorDraws:
    return nuts_posterior(
        model, *batch, data_plate=None, num_chains=4, num_samples=5000, warmup_steps=500, seed=1, progress=False
    )


def check_moments(values: Tensor, mean: float, sd: float, num_reference: float) -> None:
    """Hold draws ``[chains, draws]`` to a mean and sd, within 4 combined Monte Carlo standard errors.

    The error of an sd counts the kurtosis: sd * sqrt((kurtosis - 1) / 4 ESS). A right sampler fails one check in 16,000.
    """
    found, spread = values.mean(), values.std()
    squares = (values - found).square()
    ess, ess_of_squares = mean_ess(values), mean_ess(squares)
    assert bulk_ess(values) > 10_000
    assert abs(found - mean) < 4 * spread * math.sqrt(1 / ess + 1 / num_reference)
    excess = (squares.square().mean() / squares.mean().square() - 1) / 4
    assert abs(spread - sd) < 4 * spread * math.sqrt(excess * (1 / ess_of_squares + 1 / num_reference))


@pytest.mark.slow
@pytest.mark.parametrize("draw", [by_hmc, by_nuts], ids=["hmc", "nuts"])
@pytest.mark.parametrize("name", NAMES)
def test_moments_are_those_of_the_reference(name: str, draw: Callable[..., PosteriorDraws]) -> None:
    posterior = find_posterior(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnreliableWarning)
        draws = draw(posterior.model, *posterior.batch)
    quantities = posterior.derive(draws.samples)
    assert quantities.keys() == posterior.mean.keys()
    for line, values in quantities.items():
        check_moments(values, posterior.mean[line], posterior.sd[line], NUM_REFERENCE)
    if name.startswith("eight_schools"):
        _check_quadrature(quantities)


def _check_quadrature(quantities: dict[str, Any]) -> None:
    """Hold eight schools to its integrals, whose error is none."""
    exact, y = EightSchools.fixture()
    for site, moments in exact.posterior(y).items():
        if site in quantities:
            check_moments(quantities[site], float(moments.mean), float(moments.stddev), math.inf)
    known_mean, known_sd = torch.tensor([4.39682, 3.59771]), torch.tensor([3.31770, 3.21996])
    for place, site in enumerate(("mu", "tau")):
        check_moments(quantities[site], known_mean[place].item(), known_sd[place].item(), math.inf)
