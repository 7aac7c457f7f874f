"""A Gaussian fitted to each row's draws: its moments, density and draws, in rows of any scale and of any trouble."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from pyro_aevb.errors import SettingError
from pyro_aevb.evidence.gaussian import fit_gaussian


def correlated(num_draws: int, rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    mix = torch.randn(rows, dim, dim).double()
    scale = torch.logspace(-3, 3, rows).double()[:, None]
    return 5 * scale + scale * torch.einsum("rij,nrj->nri", mix, torch.randn(num_draws, rows, dim).double())


@pytest.mark.parametrize(("num_draws", "dim"), [(200, 4), (30, 4), (40, 4), (39, 4), (50, 1)])
def test_it_is_scipys_normal_with_the_draws_moments(num_draws, dim):
    draws = correlated(num_draws, 7, dim)
    q = fit_gaussian(draws)
    density = q.log_density(draws[:5])
    for row in range(7):
        covariance = np.cov(draws[:, row].numpy(), rowvar=False).reshape(dim, dim)
        if num_draws < 10 * dim:
            covariance = np.diag(np.diag(covariance))
        oracle = scipy.stats.multivariate_normal(draws[:, row].mean(0).numpy(), covariance, allow_singular=True)
        assert np.allclose(density[:, row], oracle.logpdf(draws[:5, row].numpy()), atol=1e-6)


def test_the_rule_for_correlations_can_be_overruled():
    draws = correlated(50, 3, 20)
    assert fit_gaussian(draws).factor is None
    assert fit_gaussian(draws, is_full=True).factor is not None
    assert fit_gaussian(correlated(500, 3, 20), is_full=False).factor is None


@pytest.mark.parametrize("num_draws", [500, 30])
def test_draws_have_the_fitted_moments_and_standardise_back(num_draws):
    q = fit_gaussian(correlated(num_draws, 5, 4))
    noise = torch.randn(20_000, 5, 4, generator=torch.Generator().manual_seed(1)).double()
    u = q.transform(noise)
    assert torch.allclose(q.standardise(u), noise, atol=1e-8)
    # 20 means and 20 scales, each a standard normal after division by its error
    assert ((u.mean(0) - q.mean) / q.scale * math.sqrt(20_000)).abs().max() < 4.5
    assert ((u.std(0) / q.scale - 1) * math.sqrt(40_000)).abs().max() < 4.5


def test_rows_in_trouble_leave_the_others_bit_for_bit():
    draws = correlated(100, 5, 2)
    broken = draws.clone()
    broken[3, 1, 0] = math.nan
    broken[:, 2, 1] = 7.0
    broken[:, 3, 1] = 2 * broken[:, 3, 0]
    q, sound = fit_gaussian(broken), fit_gaussian(draws)
    noise = torch.randn(9, 5, 2).double()
    assert q.transform(noise).isfinite().all()
    assert q.log_density(q.transform(noise)).isfinite().all()
    assert torch.equal(q.transform(noise)[:, [0, 4]], sound.transform(noise)[:, [0, 4]])


def test_one_draw_fits_nothing():
    with pytest.raises(SettingError, match="at least 2 posterior draws of a row, got 1"):
        fit_gaussian(torch.zeros(1, 3, 2))
