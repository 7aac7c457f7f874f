"""Pareto k-hat against ArviZ, exact tails, and a plain numpy fit of one row."""

import math

import arviz as az
import numpy as np
import pytest
import torch
from torch.distributions import Normal

from pyro_aevb.errors import DataError, NonFiniteError, SettingError
from pyro_aevb.evidence import pareto
from pyro_aevb.evidence.pareto import pareto_k_hat

needs_arviz_0 = pytest.mark.skipif(not hasattr(az, "psislw"), reason="ArviZ 1.x has no psislw on arrays")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_normal_weights(num_samples, scale, seed=0):
    """Log weights whose tails get heavier from row to row, at offsets that overflow without a shift."""
    scale = torch.as_tensor(scale, dtype=torch.float64)
    noise = torch.randn(num_samples, len(scale), dtype=torch.float64, generator=generator(seed))
    return noise * scale + torch.linspace(-1000, 1000, len(scale), dtype=torch.float64)


def hundred_rows(num_samples):
    """Fifty log-normal rows and fifty Pareto ones (shape 0.05 to 2)."""
    log_normal = log_normal_weights(num_samples, torch.linspace(0.05, 8, 50))
    uniform = torch.rand(num_samples, 50, dtype=torch.float64, generator=generator(1))
    return torch.cat([log_normal, -uniform.log() * torch.linspace(0.05, 2, 50, dtype=torch.float64)], 1)


def fit_one_row(log_weights):
    """Zhang and Stephens' estimator for one row, written from the paper, sample by sample."""
    weights = np.sort(np.exp(log_weights - log_weights.max()))[::-1]
    n = math.ceil(min(len(weights) / 5, 3 * math.sqrt(len(weights))))
    y = weights[:n] - weights[n]
    m = 30 + int(math.sqrt(n))
    quartile = np.sort(y)[int(n / 4 + 0.5) - 1]
    theta = [1 / y.max() + (1 - math.sqrt(m / (i - 0.5))) / (3 * quartile) for i in range(1, m + 1)]
    k = [np.mean([math.log1p(-t * v) for v in y]) for t in theta]
    likelihood = np.array([n * (math.log(-t / s) - s - 1) for t, s in zip(theta, k, strict=True)])
    posterior = np.exp(likelihood - likelihood.max())
    mean = float(np.sum(posterior * theta) / posterior.sum())
    return (n * np.mean(np.log1p(-mean * y)) + 5) / (n + 10)


@needs_arviz_0
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("num_samples", [100, 225, 1000, 5000])
@pytest.mark.parametrize("r_eff", [1.0, 0.3, 2.5])
def test_equals_arviz_row_by_row(num_samples, r_eff):
    log_weights = hundred_rows(num_samples)
    _, k_hat = az.psislw(log_weights.T.numpy().copy(), reff=r_eff)
    torch.testing.assert_close(pareto_k_hat(log_weights, r_eff=r_eff), torch.from_numpy(k_hat), rtol=1e-8, atol=1e-8)


@needs_arviz_0
def test_equals_arviz_where_tails_differ_in_size():
    """Ties and zero weights shorten the tail of some rows and not of others."""
    log_weights = log_normal_weights(1000, torch.full((4,), 1.5))
    log_weights[:, 1] = log_weights[:, 1].round(decimals=1)
    log_weights[30:, 2] = -math.inf  # 30 of the tail's 95 weights are positive
    log_weights[::3, 3] = -math.inf
    _, k_hat = az.psislw(log_weights.T.numpy().copy())
    torch.testing.assert_close(pareto_k_hat(log_weights), torch.from_numpy(k_hat), rtol=1e-8, atol=1e-8)


def test_equals_plain_fit_of_one_row():
    log_weights = log_normal_weights(700, [0.2, 1.0, 3.0])
    expected = [fit_one_row(row) for row in log_weights.T.numpy()]
    assert pareto_k_hat(log_weights).tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("precision", [0.25, 0.36, 0.5, 0.64, 0.81])
def test_gaussian_anchor(precision):
    """Target N(0, 1/precision) under the proposal N(0, 1) has k = 1 - precision; evaluation by ten repetitions."""
    z = torch.randn(100_000, 10, dtype=torch.float64, generator=generator(2))
    k_hat = pareto_k_hat(0.5 * (1 - precision) * z.square())
    assert k_hat.mean().item() == pytest.approx(1 - precision, abs=0.08)


def test_chunks_of_rows_change_nothing(monkeypatch):
    log_weights = hundred_rows(500)
    k_hat = pareto_k_hat(log_weights)
    monkeypatch.setattr(pareto, "_CHUNK_ELEMENTS", 7 * 500 * 40)
    torch.testing.assert_close(pareto_k_hat(log_weights), k_hat, rtol=0, atol=1e-12)


def test_shift_and_order_change_nothing():
    log_weights = log_normal_weights(1000, [0.5, 2.0])
    shuffled = log_weights[torch.randperm(1000, generator=generator())]
    torch.testing.assert_close(pareto_k_hat(shuffled + 123.0), pareto_k_hat(log_weights), rtol=0, atol=1e-8)


def test_float32_is_fitted_in_float64():
    log_weights = log_normal_weights(1000, [0.5, 2.0]).float()
    k_hat = pareto_k_hat(log_weights)
    assert k_hat.dtype == torch.float64
    torch.testing.assert_close(k_hat, pareto_k_hat(log_weights.double()), rtol=0, atol=1e-12)


def test_gradients_are_not_recorded():
    log_weights = log_normal_weights(200, [1.0]).requires_grad_()
    assert not pareto_k_hat(log_weights).requires_grad


def test_constant_weights_do_not_crash():
    """ArviZ raises "All tail values are the same" on the weights of an exact guide."""
    log_weights = torch.full((5000, 2), -12.25, dtype=torch.float64)
    log_weights[:, 1] += 1e-14 * torch.randn(5000, dtype=torch.float64, generator=generator())
    assert pareto_k_hat(log_weights).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_noise_is_never_unreliable(dtype):
    """An exact guide in float32 leaves weights that differ by units in the last place, also when cast to float64."""
    x = 3 * torch.randn(200, 30, generator=generator())
    posterior = Normal(0.8 * x, math.sqrt(0.2))  # z ~ N(0, 1), x ~ N(z, 0.5)
    z = posterior.mean + posterior.stddev * torch.randn(2000, 200, 30, generator=generator(1))
    log_weights = (Normal(0.0, 1.0).log_prob(z) + Normal(z, 0.5).log_prob(x) - posterior.log_prob(z)).sum(-1)
    assert 0 < log_weights.std(0).mean() < 1e-3
    assert (pareto_k_hat(log_weights.to(dtype)) < 0.5).all()


@pytest.mark.parametrize("num_positive", [0, 1, 4])
def test_few_positive_weights_are_the_worst_case(num_positive):
    log_weights = torch.full((1000, 1), -math.inf)
    log_weights[:num_positive] = torch.arange(float(num_positive))[:, None]
    assert pareto_k_hat(log_weights).item() == math.inf


def test_one_dominating_weight_is_the_worst_case():
    log_weights = torch.zeros(1000, 1)
    log_weights[17] = 20.0
    assert pareto_k_hat(log_weights).item() == math.inf


def test_ties_at_the_maximum_have_no_tail():
    log_weights = torch.where(torch.arange(1000)[:, None] < 500, 0.0, -math.inf)
    assert pareto_k_hat(log_weights).item() == -math.inf


def test_fewer_than_hundred_samples_have_no_k_hat():
    log_weights = log_normal_weights(99, [1.0, 2.0])
    assert pareto_k_hat(log_weights).isnan().all()
    assert not pareto_k_hat(log_normal_weights(100, [1.0, 2.0])).isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_plus_infinity_name_the_rows(bad):
    log_weights = torch.zeros(150, 4)
    log_weights[7, 2] = bad
    with pytest.raises(NonFiniteError, match=r"1 of 4 rows, first in rows \[2\]"):
        pareto_k_hat(log_weights)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_weights_are_an_error(shape):
    with pytest.raises(DataError, match="at least one of each"):
        pareto_k_hat(torch.zeros(shape))


@pytest.mark.parametrize("r_eff", [0.0, -1.0, math.nan])
def test_efficiency_must_be_positive(r_eff):
    with pytest.raises(SettingError, match="r_eff must be positive"):
        pareto_k_hat(torch.zeros(100, 1), r_eff=r_eff)
