"""Moments of what chains visited, the mass of their regions, and which chains leave."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_aevb.mcmc.adaptation import warm_up
from pyro_aevb.mcmc.hmc import HMCState, start
from pyro_aevb.mcmc.modes import Visited, move_chains
from pyro_aevb.mcmc.noise import RowNoise

DOUBLE = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def visit(draws, log_density, acceptance=0.8):
    """Show draws ``[draws, chains, rows, dim]`` one after the other."""
    gradient = torch.zeros_like(draws[0])
    visited = Visited.start(HMCState(draws[0], log_density[0], gradient), len(draws))
    for position, density in zip(draws, log_density, strict=True):
        state = HMCState(position, density, gradient)
        visited = visited.update(state, torch.as_tensor(acceptance).expand(density.shape).to(density))
    return visited


def test_pooled_variance_is_that_of_all_draws_of_the_chains_that_stay():
    draws = 1000 + randn(40, 8, 3, 2) + 3 * randn(1, 8, 3, 2, seed=1)
    is_out = torch.zeros(8, 3, dtype=torch.bool)
    is_out[:5, 1] = True
    variance, size = visit(draws, torch.zeros(40, 8, 3, dtype=DOUBLE)).pooled(is_out)
    assert size[:, 0].tolist() == [320, 120, 320]
    for row, left in enumerate((slice(0, 8), slice(5, 8), slice(0, 8))):
        expected = draws[:, left, row].flatten(0, 1).var(0)
        torch.testing.assert_close(variance[row], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("correlation", [0.0, 0.9, -0.49])
def test_mass_of_a_normal_region_is_its_normaliser(correlation):
    """p = w N(m, C) integrates to w; the constant of the entropy is half a log(2 pi e) a dimension."""
    num_draws, dim = 4000, 3
    scale = torch.tensor([1e-3, 1.0, 30.0], dtype=DOUBLE)[:, None] * torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE)
    within = torch.full((dim, dim), correlation, dtype=DOUBLE).fill_diagonal_(1.0)
    factor = scale[..., None] * torch.linalg.cholesky(within)
    log_weight = torch.tensor([-7.0, 0.0, 4.0], dtype=DOUBLE)
    noise = (factor @ randn(num_draws, 2, 3, dim)[..., None])[..., 0]
    normal = MultivariateNormal(torch.zeros(3, dim, dtype=DOUBLE), scale_tril=factor)
    mass = visit(5 + noise, log_weight + normal.log_prob(noise)).log_mass()
    mass = mass + 0.5 * dim * math.log(2 * math.pi * math.e)
    # sd of the mean log density: sqrt(dim / 2 / draws), of half the log determinant the same; they cancel in part
    error = 2 * math.sqrt(dim / 2 / num_draws)
    assert ((mass - log_weight).abs() < 4 * error).all()


def test_a_region_that_is_no_normal_looks_larger_than_it_is():
    """An exponential density has an entropy of 1, a normal of its variance 1.42."""
    draws = torch.distributions.Exponential(torch.ones(1, dtype=DOUBLE)).sample((4000,))
    mass = visit(draws[:, None, None], -draws[:, None]).log_mass().item() + 0.5 * math.log(2 * math.pi * math.e)
    assert mass == pytest.approx(0.5 * math.log(2 * math.pi * math.e) - 1, abs=4 * 2 / math.sqrt(4000))


def test_mass_is_known_only_of_chains_that_move_accept_and_have_draws_enough():
    draws = randn(20, 5, 1, 2)
    draws[:, 0] = 1.0
    log_density = torch.zeros(20, 5, 1, dtype=DOUBLE)
    log_density[5, 1] = -math.inf
    acceptance = torch.tensor([0.8, 0.8, 0.3, 0.5, 0.8])[:, None]
    known = visit(draws, log_density, acceptance).log_mass()[:, 0].isfinite()
    assert known.tolist() == [False, False, False, True, True]
    few = visit(draws[:9], log_density[:9], 0.8)
    assert few.log_mass().isnan().all()
    assert few.products is None


def empty(*log_masses, dim=3, nowhere=()):
    """Show chains of these masses, ``None`` one that stands still, and tell which are empty."""
    draws = randn(400, 1, 1, dim).expand(400, len(log_masses), 1, dim).clone()
    for chain, mass in enumerate(log_masses):
        draws[:, chain] = 0.0 if mass is None else draws[:, chain]
    log_density = torch.tensor([0.0 if mass is None else mass for mass in log_masses], dtype=DOUBLE)[:, None]
    log_density = log_density.expand(400, -1, 1).clone()
    for chain in nowhere:
        log_density[:, chain] = math.nan
    return visit(draws, log_density).is_empty()[:, 0].tolist()


@pytest.mark.parametrize("dim", [1, 3, 10])
def test_chains_are_empty_beyond_three_nats_and_one_a_coordinate(dim):
    assert empty(0.0, -2.9 - dim, -3.1 - dim, 5.0 - 5.0, dim=dim) == [False, False, True, False]


def test_a_chain_that_stands_still_is_left_alone_and_one_without_a_density_is_not():
    assert empty(0.0, None, -20.0) == [False, False, True]
    assert empty(None, None, 0.0, nowhere=[0]) == [True, False, False]
    assert empty(None, 0.0, nowhere=[0, 1]) == [False, False]


def test_a_chain_that_hardly_accepts_is_judged_by_its_density_alone():
    """It is in a narrow place: with a lower density than another's it holds less, with a higher one it may hold more."""
    draws = randn(100, 4, 1, 3)
    draws[:, 1:] = 5.0
    log_density = torch.tensor([0.0, -5.0, -7.0, 9.0], dtype=DOUBLE)[:, None].expand(100, 4, 1).clone()
    acceptance = torch.tensor([0.8, 0.1, 0.0, 0.0])[:, None]
    assert visit(draws, log_density, acceptance).is_empty()[:, 0].tolist() == [False, False, True, False]


def numbered(chains, rows):
    number = torch.arange(chains * rows, dtype=DOUBLE).reshape(chains, rows)
    return HMCState(number[..., None].repeat(1, 1, 3), 10 * number, 100 * number[..., None].repeat(1, 1, 3))


def test_chains_go_where_others_of_their_row_are_with_all_that_belongs_to_them():
    is_empty = torch.zeros(64, 3, dtype=torch.bool)
    is_empty[:32, 1] = True
    is_empty[1:, 2] = True
    state = numbered(64, 3)
    moved = move_chains(state, is_empty, torch.rand(64, 3, generator=torch.Generator().manual_seed(0)))
    was = moved.position[..., 0]
    assert torch.equal(moved.log_density, 10 * was)
    assert torch.equal(moved.gradient, 100 * moved.position)
    assert torch.equal(was[:, 0], state.position[:, 0, 0])
    assert torch.equal(was[32:, 1], state.position[32:, 1, 0])
    # 32 chains choose among 32: some 20 different ones, all of them full
    chosen = set(was[:32, 1].tolist())
    assert chosen <= set(state.position[32:, 1, 0].tolist())
    assert len(chosen) >= 12
    assert (was[:, 2] == state.position[0, 2, 0]).all()


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_the_ends_of_the_uniform_numbers_choose_chains_that_stay(edge):
    is_empty = torch.tensor([True, False, True, False])[:, None]
    moved = move_chains(numbered(4, 1), is_empty, torch.full((4, 1), edge))
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


def test_a_round_mode_with_most_of_the_mass_is_kept_beside_a_correlated_one():
    """A tenth of the mass is in a normal whose correlations make its coordinates look three hundred times as wide as it is."""
    dim, share = 5, 0.9
    within = torch.full((dim, dim), 0.97, dtype=DOUBLE).fill_diagonal_(1.0)
    factor = torch.linalg.cholesky(within)
    loc = torch.eye(dim, dtype=DOUBLE)[0] * 15
    narrow = MultivariateNormal(loc, scale_tril=factor)

    def target(u):
        round_ = -0.5 * (u + loc).square().sum(-1) - 0.5 * dim * math.log(2 * math.pi)
        return torch.logaddexp(round_ + math.log(share), narrow.log_prob(u) + math.log(1 - share))

    is_round = torch.arange(16) % 2 == 0
    z = randn(16, 3, dim)
    position = torch.where(is_round[:, None, None], z - loc, z @ factor.T + loc)
    settings = {"num_steps": 200, "target_accept_prob": 0.8, "num_leapfrog": 10}
    noise, scale = RowNoise(0, torch.arange(3), dtype=DOUBLE), torch.ones(3, dim, dtype=DOUBLE)
    state, _, _ = warm_up(target, start(target, position), noise, scale=scale, **settings)
    assert (state.position[..., 0] < 0).sum(0).tolist() == [8, 8, 8]


def test_a_narrow_mode_is_kept_where_the_steps_of_the_row_are_too_long_for_it():
    dim, sd = 3, 0.1

    def target(u):
        narrow = -0.5 * ((u + 10) / sd).square().sum(-1) - dim * math.log(sd)
        return torch.logaddexp(narrow + math.log(0.9), -0.5 * (u - 10).square().sum(-1) + math.log(0.1))

    position = randn(16, 3, dim) + 10
    position[::8] = sd * randn(2, 3, dim, seed=1) - 10
    settings = {"num_steps": 200, "target_accept_prob": 0.8, "num_leapfrog": 10}
    noise, scale = RowNoise(0, torch.arange(3), dtype=DOUBLE), torch.ones(3, dim, dtype=DOUBLE)
    state, _, _ = warm_up(target, start(target, position), noise, scale=scale, **settings)
    assert (state.position[::8, :, 0] < 0).all()
