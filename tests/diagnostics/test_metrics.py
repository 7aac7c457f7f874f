"""Distances between sets of draws against closed forms, scipy, and what they are over many pairs of equal sets."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_aevb.diagnostics.metrics import classify, compare_moments, wasserstein


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregressive(chains: int, steps: int, *shape: int, rho: float, seed: int = 0) -> Tensor:
    """Return stationary chains of unit variance with autocorrelation rho."""
    values = noise(chains, steps, *shape, seed=seed)
    for step in range(1, steps):
        values[:, step] = rho * values[:, step - 1] + math.sqrt(1 - rho**2) * values[:, step]
    return values


def heavy(values: Tensor) -> Tensor:
    """Turn normals into Laplace draws, whose kurtosis is 6."""
    uniform = torch.special.ndtr(values) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


# Moments


def test_moments_are_errors_in_units_of_the_chains() -> None:
    found = compare_moments(3.0 + 0.5 * noise(50_000, seed=1), 1.0 + 4.0 * noise(4, 10_000, seed=2))
    assert abs(found.mean_error - 0.5) < 4.5 * found.mean_error_se
    assert abs(found.sd_ratio - 0.125) < 4.5 * found.sd_ratio_se
    assert found.mean_error_se < 0.01
    assert found.sd_ratio_se < 0.001


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_standard_errors_are_the_spread_over_many_pairs(rho: float) -> None:
    # 1,000 quantities: the variance of a standard score has standard deviation 0.045, and estimated ESS widens it a little
    chains = heavy(autoregressive(4, 500, 1000, rho=rho))
    found = compare_moments(heavy(noise(800, 1000, seed=1)), chains)
    for value, error in (
        (found.mean_error, found.mean_error_se),
        (found.sd_ratio.log(), found.sd_ratio_se / found.sd_ratio),
    ):
        score = value / error
        assert abs(score.mean()) < 0.15
        assert 0.8 < score.var() < 1.25


# Wasserstein distance


def test_wasserstein_distance_is_scipys() -> None:
    draws, chains = noise(300, 2, seed=1).exp(), 2 * noise(3, 70, 2, seed=2) - 1
    found = wasserstein(draws, chains)
    for place in range(2):
        pooled = chains[..., place].flatten()
        expected = stats.wasserstein_distance(draws[:, place], pooled) / pooled.std()
        assert found.value[place].item() == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize(("rho", "least"), [(0.0, 0.9), (0.7, 0.75)])
def test_the_null_distance_is_the_mean_over_equal_pairs(rho: float, least: float) -> None:
    found = wasserstein(noise(400, 400, seed=1), autoregressive(4, 250, 400, rho=rho))
    # a distance has about half its mean as standard deviation: 2.5 % of the mean of 400; tails of chains mix faster than means
    assert least < found.value.mean() / found.null.mean() < 1.1


# Classifier


def test_accuracy_is_a_half_between_equal_sets() -> None:
    scores = []
    for seed in range(12):
        found = classify(noise(300, 2, seed=2 * seed), noise(4, 200, 2, seed=2 * seed + 1), seed)
        scores.append((found.value - 0.5) / found.null_se)
    assert abs(sum(scores)) / math.sqrt(len(scores)) < 4.0
    assert torch.tensor(scores).std() < 2.0


def test_accuracy_comes_near_the_best_and_not_above_it() -> None:
    for shift in (0.5, 2.0):
        best = stats.norm.cdf(shift / 2)  # (1 + TV) / 2 of two unit normals
        found = classify(noise(1000, 1, seed=1) + shift, noise(4, 500, 1, seed=2), 0)
        assert best - 0.06 < found.value < best + 3 * found.null_se


def test_accuracy_sees_correlation_that_single_coordinates_do_not() -> None:
    draws, chains = noise(1000, 2, seed=1), noise(4, 500, 2, seed=2)
    chains = torch.stack((chains[..., 0], 0.9 * chains[..., 0] + math.sqrt(1 - 0.81) * chains[..., 1]), -1)
    assert compare_moments(draws, chains).mean_error.abs().max() < 0.15
    assert classify(draws, chains, 0).value > 0.65


def test_autocorrelated_chains_are_not_told_by_their_neighbours() -> None:
    chains = autoregressive(4, 2000, 1, rho=0.97)
    found = classify(noise(1000, 1, seed=1), chains, 0)
    assert abs(found.value - 0.5) < 3.5 * found.null_se
    assert found.null_se > 0.02  # some 120 effective draws


def test_too_few_effective_draws_have_no_accuracy() -> None:
    found = classify(noise(1000, 1), autoregressive(4, 250, 1, rho=0.995), 0)
    assert math.isnan(found.value)
    assert math.isnan(found.null_se)
