"""The learned trajectory length against the exact criterion of a normal distribution, and rows that are lost."""

import math

import pytest
import torch
from scipy import optimize

from pyro_aevb.mcmc.adaptation import warm_up
from pyro_aevb.mcmc.convergence import mean_ess
from pyro_aevb.mcmc.hmc import sample, start
from pyro_aevb.mcmc.length import choose_num_leapfrog, measure_lengths
from pyro_aevb.mcmc.noise import RowNoise, Stream

DOUBLE = torch.float64


def row_noise(num_rows):
    return RowNoise(0, torch.arange(num_rows), dtype=DOUBLE)


def normal(u):
    return -0.5 * u.square().sum(-1)


def measured(target, step_size, *, rows=100, dim=3, chains=16, max_num_leapfrog=60):
    noise = row_noise(rows)
    state = start(target, noise.normal(Stream.START, 0, chains, dim))
    settings = {"step_size": torch.full((rows,), step_size, dtype=DOUBLE), "scale": torch.ones(rows, dim, dtype=DOUBLE)}
    return measure_lengths(target, state, noise, max_num_leapfrog=max_num_leapfrog, **settings)


def test_on_a_normal_the_criterion_is_the_exact_one():
    """With q(t) = q cos t + r sin t, the change of the square is sin^2 t (r^2 - q^2) + sin 2t q r, of variance 4 sin^2 t.

    Centred at a mean of 16 chains, squares have 15 degrees of freedom.
    """
    step_size, dim = 0.05, 2
    exact = 15 / 16 * dim * (step_size * torch.arange(1, 61, dtype=DOUBLE)).sin().square()
    torch.testing.assert_close(measured(normal, step_size, dim=dim).mean(1), exact, rtol=0.08, atol=0.03)


def test_a_change_counts_by_the_probability_that_it_is_accepted():
    """One leapfrog step of 1.9, of which 45 % are rejected, by a million draws written out."""
    q, p = torch.randn(2, 1_000_000, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    middle = p - 0.95 * q
    end = q + 1.9 * middle
    error = 0.5 * (end.square() + (middle - 0.95 * end).square() - q.square() - p.square())
    changes = (-error).clamp(max=0).exp() * (end.square() - q.square()).square() / 4
    rows = measured(normal, 1.9, rows=200, dim=1, chains=100, max_num_leapfrog=1)[0]
    # the mean of 100 chains is 1 % of a variance off
    assert float(rows.mean()) == pytest.approx(float(changes.mean()), abs=4.5 * float(rows.std()) / 200**0.5 + 0.02)


def mean_criterion(t):
    """Return the mean of sin^2 over 0 to t."""
    return 0.5 - math.sin(2 * t) / (4 * t)


@pytest.mark.parametrize("step_size", [0.05, 0.1, 0.2])
def test_the_shortest_length_that_does_nearly_all_is_chosen(step_size):
    peak = optimize.minimize_scalar(lambda t: -mean_criterion(t), bounds=(1, 4), method="bounded").x
    exact = optimize.brentq(lambda t: mean_criterion(t) - 0.95 * mean_criterion(peak), 1, peak)
    chosen = choose_num_leapfrog(measured(normal, step_size))
    # averages of leapfrog steps 1 to L are those of times half a step later
    assert chosen * step_size == pytest.approx(exact, abs=0.1 + step_size)


def test_rows_count_alike_whatever_their_criteria_are():
    criterion = torch.zeros(6, 3)
    criterion[1, :2] = 1.0  # two rows: 2 steps
    criterion[5, 2] = 1e6
    assert choose_num_leapfrog(criterion) == 2


def test_a_lost_row_has_no_say():
    def target(u):
        return torch.cat([normal(u[..., :1, :]) * math.nan, normal(u[..., 1:, :])], -1)

    criterion = measured(target, 0.1)
    assert choose_num_leapfrog(criterion) == choose_num_leapfrog(criterion[:, 1:])
    torch.testing.assert_close(criterion[:, 1:], measured(normal, 0.1)[:, 1:])


def test_rows_are_measured_alike_in_chunks():
    whole = measured(normal, 0.2, rows=7, max_num_leapfrog=10)
    noise, scale = row_noise(7), torch.ones(7, 3, dtype=DOUBLE)
    state = start(normal, noise.normal(Stream.START, 0, 16, 3)[:, 2:5])
    settings = {"step_size": torch.full((3,), 0.2, dtype=DOUBLE), "scale": scale[2:5], "max_num_leapfrog": 10}
    part = measure_lengths(normal, state, noise.rows(slice(2, 5)), **settings)
    torch.testing.assert_close(part, whole[:, 2:5], rtol=1e-10, atol=1e-12)


def test_a_length_for_longer_distances_is_longer():
    """A normal of standard deviations 5 in a metric of 1: its period is five times as long."""
    long, short = (choose_num_leapfrog(measured(lambda u, sd=sd: normal(u / sd), 0.2)) for sd in (5, 1))
    assert long == pytest.approx(5 * short, rel=0.2)


def test_on_a_correlated_normal_a_learned_length_is_worth_its_gradients():
    """20 coordinates, standard deviations of 1 to 30 along turned axes: twice the effective draws of jittered 10 per gradient."""
    rows, dim = 6, 20
    axes, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)))
    sd = torch.logspace(0, math.log10(30), dim, dtype=DOUBLE)

    def target(u):
        return normal((u @ axes) / sd)

    noise = row_noise(rows)
    state = start(target, (sd * noise.normal(Stream.START, 0, 16, dim)) @ axes.T)
    settings = {"num_steps": 80, "target_accept_prob": 0.8, "num_leapfrog": 10, "scale": torch.ones(rows, dim).double()}
    state, step_size, scale = warm_up(target, state, noise, **settings)
    frozen = {"step_size": step_size, "scale": scale}
    chosen = choose_num_leapfrog(measure_lengths(target, state, noise, max_num_leapfrog=60, **frozen))

    def efficiency(num_leapfrog):
        draws = sample(target, state, noise, num_draws=80, num_leapfrog=num_leapfrog, **frozen).position
        ess = torch.minimum(mean_ess(draws), mean_ess(draws.square())).amin(-1).mean()
        return float(ess) / (num_leapfrog + 1)

    assert efficiency(chosen) > 2 * efficiency(10)
