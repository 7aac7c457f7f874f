"""The learned trajectory length against the exact criterion of a normal distribution, and rows that are lost."""

import math

import pytest
import torch
from scipy import optimize

from pyro_aevb.mcmc.convergence import mean_ess
from pyro_aevb.mcmc.hmc import sample, start
from pyro_aevb.mcmc.length import learn_num_leapfrog
from pyro_aevb.mcmc.noise import RowNoise, Stream

DOUBLE = torch.float64


def row_noise(num_rows):
    return RowNoise(0, torch.arange(num_rows), dtype=DOUBLE)


def normal(u):
    return -0.5 * u.square().sum(-1)


def learned(target, step_size, *, rows=100, dim=3, max_num_leapfrog=60):
    noise = row_noise(rows)
    state = start(target, noise.normal(Stream.START, 0, 16, dim))
    settings = {"step_size": torch.full((rows,), step_size, dtype=DOUBLE), "scale": torch.ones(rows, dim, dtype=DOUBLE)}
    return learn_num_leapfrog(target, state, noise, max_num_leapfrog=max_num_leapfrog, **settings)


@pytest.mark.parametrize("step_size", [0.05, 0.1, 0.2])
def test_on_a_normal_the_exact_criterion_is_maximised(step_size):
    """There the criterion at length t is dim * sin(t)^2, and the mean over 0 to T a cost of T / 2: T of (2T - sin 2T) / T^2."""
    exact = optimize.minimize_scalar(lambda t: -(2 * t - math.sin(2 * t)) / t**2, bounds=(0.5, 4), method="bounded").x
    assert learned(normal, step_size) * step_size == pytest.approx(exact, abs=0.15 + step_size)


def test_a_lost_row_has_no_say():
    def target(u):
        return torch.cat([normal(u[..., :1, :]) * math.nan, normal(u[..., 1:, :])], -1)

    assert learned(target, 0.1) == pytest.approx(learned(normal, 0.1), abs=1)


def test_a_length_for_longer_distances_is_longer():
    """A normal of standard deviations 5 in a metric of 1: its period is five times as long."""
    ratio = learned(lambda u: normal(u / 5), 0.2) / learned(normal, 0.2)
    assert ratio > 2


def test_the_learned_length_is_near_the_most_effective_one():
    """Effective draws of the squares for each gradient: at least 0.7 of the best of five lengths."""
    rows = 25
    settings = {"step_size": torch.full((rows,), 0.3, dtype=DOUBLE), "scale": torch.ones(rows, 3, dtype=DOUBLE)}

    def efficiency(num_leapfrog):
        state = start(normal, row_noise(rows).normal(Stream.START, 0, 4, 3))
        draws = sample(normal, state, row_noise(rows), num_draws=300, num_leapfrog=num_leapfrog, **settings)
        return float(mean_ess(draws.position.square()).mean()) / (num_leapfrog + 1)

    best = max(efficiency(number) for number in (1, 3, 6, 9, 13))
    assert efficiency(learned(normal, 0.3)) > 0.7 * best
