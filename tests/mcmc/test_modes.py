"""Moments of what chains visited, the mass of their regions, and which chains leave."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_aevb.mcmc.adaptation import warm_up
from pyro_aevb.mcmc.hmc import HMCState, start
from pyro_aevb.mcmc.modes import Visited, leave_empty_modes
from pyro_aevb.mcmc.noise import RowNoise

DOUBLE = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def visit(draws, log_density):
    """Show draws ``[draws, chains, rows, dim]`` one after the other."""
    state = HMCState(draws[0], log_density[0], torch.zeros_like(draws[0]))
    visited = Visited.start(state)
    for position, density in zip(draws, log_density, strict=True):
        visited = visited.update(HMCState(position, density, torch.zeros_like(position)))
    return visited


def test_pooled_variance_is_that_of_all_draws_together():
    draws = 1000 + randn(40, 8, 3, 2) + 3 * randn(1, 8, 3, 2, seed=1)
    variance, size = visit(draws, torch.zeros(40, 8, 3, dtype=DOUBLE)).pooled()
    assert size == 320
    torch.testing.assert_close(variance, draws.flatten(0, 1).var(0), rtol=1e-9, atol=0)


def test_mass_of_a_normal_region_is_its_normaliser():
    """p = w N(m, s^2) integrates to w; the constant of the entropy is half a log(2 pi e) a dimension."""
    num_draws, dim = 4000, 3
    scale = torch.tensor([1e-3, 1.0, 30.0], dtype=DOUBLE)[:, None] * torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE)
    log_weight = torch.tensor([-7.0, 0.0, 4.0], dtype=DOUBLE)
    noise = randn(num_draws, 2, 3, dim)
    log_density = log_weight + torch.distributions.Normal(0.0, scale).log_prob(noise * scale).sum(-1)
    mass = visit(5 + noise * scale, log_density).log_mass() + 0.5 * dim * math.log(2 * math.pi * math.e)
    # sd of mean log density: sqrt(dim / 2 / draws), of the sum of log sds the same; they cancel in part
    error = 2 * math.sqrt(dim / 2 / num_draws)
    assert ((mass - log_weight).abs() < 4 * error).all()


def test_a_region_with_a_correlation_looks_larger_by_its_log_determinant():
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=DOUBLE)
    normal = MultivariateNormal(torch.zeros(2, dtype=DOUBLE), covariance)
    draws = randn(4000, 2) @ torch.linalg.cholesky(covariance).T
    mass = visit(draws[:, None, None], normal.log_prob(draws)[:, None, None]).log_mass()
    excess = mass.item() + math.log(2 * math.pi * math.e)
    assert excess == pytest.approx(-0.5 * math.log(1 - 0.9**2), abs=4 * 2 / math.sqrt(4000))


def test_a_chain_that_stands_still_or_has_no_density_has_no_mass():
    draws = randn(20, 3, 1, 2)
    draws[:, 0] = 1.0
    log_density = torch.zeros(20, 3, 1, dtype=DOUBLE)
    log_density[5, 1] = -math.inf
    assert visit(draws, log_density).log_mass()[:, 0].isfinite().tolist() == [False, False, True]


def numbered(log_mass):
    chains, rows = log_mass.shape
    number = torch.arange(chains * rows, dtype=DOUBLE).reshape(chains, rows)
    return HMCState(number[..., None].repeat(1, 1, 3), 10 * number, 100 * number[..., None].repeat(1, 1, 3))


def test_chains_go_where_others_of_their_row_are_with_all_that_belongs_to_them():
    log_mass = torch.zeros(64, 5, dtype=DOUBLE)
    log_mass[:32, 1] = -100.0
    log_mass[1:, 2] = -math.inf
    log_mass[:, 3] = -math.inf
    log_mass[10:, 4] = -3.0 - math.sqrt(6) + 0.01
    state = numbered(log_mass)
    uniform = torch.rand(64, 5, generator=torch.Generator().manual_seed(0))
    moved = leave_empty_modes(state, log_mass, uniform)
    was = moved.position[..., 0]
    assert torch.equal(moved.log_density, 10 * was)
    assert torch.equal(moved.gradient, 100 * moved.position)
    for row in (0, 3, 4):
        assert torch.equal(was[:, row], state.position[:, row, 0])
    assert torch.equal(was[32:, 1], state.position[32:, 1, 0])
    # 32 chains choose among 32: some 20 different ones, all of them full
    chosen = set(was[:32, 1].tolist())
    assert chosen <= set(state.position[32:, 1, 0].tolist())
    assert len(chosen) >= 12
    assert (was[:, 2] == state.position[0, 2, 0]).all()


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_the_ends_of_the_uniform_numbers_choose_chains_that_stay(edge):
    log_mass = torch.tensor([[-90.0], [0.0], [-90.0], [0.0]], dtype=DOUBLE)
    moved = leave_empty_modes(numbered(log_mass), log_mass, torch.full((4, 1), edge))
    assert set(moved.position[:, 0, 0].tolist()) == {1.0, 3.0}


def test_a_warm_up_leaves_the_empty_mode_and_keeps_the_full_ones():
    """Row 0 has e^-12 of its mass in the mode where half of its chains start, row 1 a third."""
    share = torch.tensor([math.exp(-12), 1 / 3], dtype=DOUBLE)

    def target(u):
        low, high = -0.5 * (u + 20).square().sum(-1), -0.5 * (u - 20).square().sum(-1)
        return torch.logaddexp(low + share.log(), high + (-share).log1p())

    position = torch.where(torch.arange(16) < 8, -20.0, 20.0).double()[:, None, None] + 0.1 * randn(16, 2, 2)
    noise, scale = RowNoise(0, torch.arange(2), dtype=DOUBLE), torch.ones(2, 2, dtype=DOUBLE)
    settings = {"num_steps": 100, "target_accept_prob": 0.8, "num_leapfrog": 4, "scale": scale}
    warm = warm_up(target, start(target, position), noise, **settings)
    assert (warm.state.position[..., 0] < 0).sum(0).tolist() == [0, 8]
    # and the metric is that of the mode alone; of row 1 that of both
    assert 0.6 < warm.scale[0].max() < 1.6
    assert (warm.scale[1] > 10).all()
