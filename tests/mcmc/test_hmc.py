"""Hamiltonian transitions against a plain integrator, the laws of the dynamics, exact draws that stay exact, and broken rows."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_aevb.mcmc.hmc import HMCState, jittered, leapfrog, move, sample, start, transition, value_and_gradient
from pyro_aevb.mcmc.noise import RowNoise, Stream

DOUBLE = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed=1):
    return torch.rand(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def row_noise(num_rows, seed=0):
    return RowNoise(seed, torch.arange(num_rows), dtype=DOUBLE)


def normal(u):
    return -0.5 * u.square().sum(-1)


def quartic(u):
    """Neither normal nor independent: a quartic well with a coupling."""
    return -(0.25 * u.pow(4) + 0.5 * u.square()).sum(-1) + 0.3 * u[..., 0] * u[..., 1]


def differentiable(u):
    """The quartic with its gradient by hand, through which autograd can look."""
    gradient = -(u.pow(3) + u)
    coupling = torch.zeros_like(u).index_copy(-1, torch.tensor([0, 1]), 0.3 * u[..., [1, 0]])
    return HMCState(u, quartic(u), gradient + coupling)


# One trajectory


def test_value_and_gradient_agree_with_finite_differences():
    u, h = randn(2, 5, 3), 1e-5
    value, gradient = value_and_gradient(quartic, u)
    torch.testing.assert_close(value, quartic(u))
    for d in range(3):
        step = torch.zeros(3, dtype=DOUBLE).index_fill(0, torch.tensor([d]), h)
        torch.testing.assert_close(
            gradient[..., d], (quartic(u + step) - quartic(u - step)) / (2 * h), rtol=1e-6, atol=1e-6
        )
    assert not value.requires_grad
    assert not gradient.requires_grad


def test_gradients_are_taken_where_gradients_are_off_and_of_parameters_none():
    weight = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    with torch.no_grad():
        state = start(lambda u: normal(u * weight), randn(2, 5, 3))
    torch.testing.assert_close(state.gradient, -state.position)
    assert weight.grad is None
    assert not any(field.requires_grad for field in state)


def test_a_transition_is_a_plain_integrator_with_metropolis_accept():
    """Chain by chain in numpy, with mass 1 / scale^2 written out: the metric is no change of variables there."""
    scale, step_size = (
        torch.tensor([[0.5, 2.0, 1.0], [1.0, 3.0, 0.2]], dtype=DOUBLE),
        torch.tensor([0.4, 0.9], dtype=DOUBLE),
    )
    u, noise, uniform = randn(3, 2, 3), randn(3, 2, 3, seed=2), rand(3, 2)
    settings = {"step_size": step_size, "scale": scale, "num_leapfrog": 4}
    state, info = transition(quartic, start(quartic, u), noise, uniform, **settings)

    def gradient(q):
        return -(q**3 + q) + 0.3 * np.array([q[1], q[0], 0])

    def log_density(q):
        return -(0.25 * q**4 + 0.5 * q**2).sum() + 0.3 * q[0] * q[1]

    for chain in range(3):
        for row in range(2):
            mass, eps = 1 / scale[row].numpy() ** 2, float(step_size[row])
            q, p = u[chain, row].numpy(), np.sqrt(mass) * noise[chain, row].numpy()
            before = 0.5 * (p**2 / mass).sum() - log_density(q)
            for _ in range(4):
                p = p + 0.5 * eps * gradient(q)
                q = q + eps * p / mass
                p = p + 0.5 * eps * gradient(q)
            acceptance = min(1, math.exp(before + log_density(q) - 0.5 * (p**2 / mass).sum()))
            assert float(info.acceptance[chain, row]) == pytest.approx(acceptance, rel=1e-9)
            is_accepted = float(uniform[chain, row]) < acceptance
            assert bool(info.is_accepted[chain, row]) == is_accepted
            expected = torch.from_numpy(q) if is_accepted else u[chain, row]
            torch.testing.assert_close(state.position[chain, row], expected, rtol=1e-10, atol=1e-10)
    assert not info.is_accepted.all()
    assert info.is_accepted.any()
    torch.testing.assert_close(state, start(quartic, state.position))


def test_a_trajectory_is_reversible():
    state, momentum, drift = start(quartic, randn(4, 5, 3)), randn(4, 5, 3, seed=2), 0.1 + 0.2 * rand(5, 3)
    end, momentum_end = leapfrog(lambda u: start(quartic, u), state, momentum, drift, 20)
    back, momentum_back = leapfrog(lambda u: start(quartic, u), end, -momentum_end, drift, 20)
    assert (end.position - state.position).abs().mean() > 0.1
    torch.testing.assert_close(back.position, state.position, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(momentum_back, -momentum, rtol=1e-10, atol=1e-10)


def test_a_trajectory_preserves_volume():
    def flow(point: Tensor) -> Tensor:
        position, momentum = point[:3].reshape(1, 1, 3), point[3:].reshape(1, 1, 3)
        end, momentum = leapfrog(differentiable, differentiable(position), momentum, drift, 7)
        return torch.cat([end.position.flatten(), momentum.flatten()])

    drift = torch.tensor([[0.1, 0.4, 0.3]], dtype=DOUBLE)
    jacobian = torch.autograd.functional.jacobian(flow, randn(6))
    assert (jacobian - torch.eye(6, dtype=DOUBLE)).abs().max() > 0.5
    assert float(torch.linalg.slogdet(jacobian).logabsdet) == pytest.approx(0, abs=1e-12)


def test_the_energy_error_is_of_second_order():
    u, noise = randn(50, 3, 3), randn(50, 3, 3, seed=2)

    def error(num_leapfrog):
        settings = {"drift": torch.full((3, 3), 1 / num_leapfrog, dtype=DOUBLE), "num_leapfrog": num_leapfrog}
        end, momentum = leapfrog(lambda v: start(quartic, v), start(quartic, u), noise, *settings.values())
        return (
            (0.5 * (momentum.square() - noise.square()).sum(-1) - end.log_density + quartic(u)).square().mean().sqrt()
        )

    for num_leapfrog in (10, 20, 40):
        assert float(error(num_leapfrog) / error(2 * num_leapfrog)) == pytest.approx(4, rel=0.05)


def test_a_transition_costs_as_many_gradients_as_leapfrogs():
    calls = []

    def counted(u):
        calls.append(u.shape)
        return normal(u)

    state = start(counted, randn(2, 3, 4))
    for _ in range(5):
        settings = {"step_size": torch.ones(3, dtype=DOUBLE), "scale": torch.ones(3, 4, dtype=DOUBLE)}
        state, _ = transition(counted, state, randn(2, 3, 4), rand(2, 3), num_leapfrog=6, **settings)
    assert calls == [(2, 3, 4)] * (1 + 5 * 6)


def test_nothing_in_a_transition_reads_a_value():
    """Tensors without data raise where a program asks for a number."""
    empty = {"device": "meta", "dtype": torch.float32}
    state = start(normal, torch.zeros(2, 3, 4, **empty))
    settings = {"step_size": torch.ones(3, **empty), "scale": torch.ones(3, 4, **empty), "num_leapfrog": 3}
    state, info = transition(normal, state, torch.zeros(2, 3, 4, **empty), torch.zeros(2, 3, **empty), **settings)
    assert state.position.shape == (2, 3, 4)
    assert info.acceptance.is_meta


class Pair(NamedTuple):
    position: Tensor
    log_density: Tensor
    gradient: Tensor
    cubes: Tensor
    norm: Tensor


def test_a_state_carries_what_it_likes():
    def evaluate(u):
        return Pair(*start(quartic, u), u.pow(3).unsqueeze(-1), u.norm(dim=-1))

    arguments = (randn(4, 30, 3, seed=2), rand(4, 30))
    drift = torch.full((30, 3), 0.6, dtype=DOUBLE)
    state, info = move(evaluate, evaluate(randn(4, 30, 3)), *arguments, drift=drift, num_leapfrog=3)
    assert isinstance(state, Pair)
    assert info.is_accepted.any()
    assert not info.is_accepted.all()
    torch.testing.assert_close(state, evaluate(state.position))


# Exact draws stay exact


def banana(u):
    """Haario's banana: u_0 normal, u_1 normal about a parabola."""
    return -0.5 * u[..., 0].square() - 0.5 * (u[..., 1] - 0.5 * (u[..., 0].square() - 1)).square()


def banana_draw(z):
    return torch.stack([z[..., 0], z[..., 1] + 0.5 * (z[..., 0].square() - 1)], -1)


def two_modes(u):
    """0.3 N(-1.5, 0.6^2) + 0.7 N(1, 0.8^2), times a standard normal."""
    x = u[..., 0]
    low = math.log(0.3 / 0.6) - 0.5 * ((x + 1.5) / 0.6).square()
    high = math.log(0.7 / 0.8) - 0.5 * ((x - 1) / 0.8).square()
    return torch.logaddexp(low, high) - 0.5 * u[..., 1].square()


def two_modes_draw(z):
    is_low = rand(*z.shape[:-1], seed=5) < 0.3
    return torch.stack([torch.where(is_low, -1.5 + 0.6 * z[..., 0], 1 + 0.8 * z[..., 0]), z[..., 1]], -1)


def two_modes_cdf(x):
    return 0.3 * stats.norm.cdf(x, -1.5, 0.6) + 0.7 * stats.norm.cdf(x, 1, 0.8)


@pytest.mark.parametrize("steps", [0.3, 0.8, 1.6], ids=lambda size: f"step {size}")
@pytest.mark.parametrize(
    ("target", "draw", "cdf"),
    [(normal, lambda z: z, "norm"), (banana, banana_draw, "norm"), (two_modes, two_modes_draw, two_modes_cdf)],
    ids=["normal", "banana", "two modes"],
)
def test_exact_draws_stay_exact(target, draw, cdf, steps):
    """20,000 exact draws, moved 10 times by steps of any size: each coordinate and the density keep their distribution."""
    chains, rows = 100, 200
    noise = row_noise(rows)
    state = start(target, draw(noise.normal(Stream.START, 0, chains, 2)))
    settings = {"step_size": torch.full((rows,), steps, dtype=DOUBLE), "scale": torch.ones(rows, 2, dtype=DOUBLE)}
    end = sample(target, state, noise, num_draws=10, num_leapfrog=4, **settings)
    position, fresh = end.position[:, -1].reshape(-1, 2), draw(randn(20_000, 2, seed=9))
    assert (position - state.position.reshape(-1, 2)).abs().mean() > 0.1
    assert 0.1 < end.acceptance.mean() < 0.999
    assert stats.kstest(position[:, 0].numpy(), cdf).pvalue > 1e-3
    assert stats.ks_2samp(position[:, 1].numpy(), fresh[:, 1].numpy()).pvalue > 1e-3
    assert stats.ks_2samp(end.log_density[:, -1].flatten().numpy(), target(fresh).numpy()).pvalue > 1e-3


# Broken chains and rows


def walled(value, *, at=0.5):
    """A standard normal that is ``value``, with the gradient that comes of it, beyond a wall."""

    def log_density(u):
        inside = normal(u)
        return torch.where(u[..., 0] > at, inside * 0 + value, inside)

    return log_density


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_no_chain_gets_behind_a_wall(value):
    """NaN, infinite density and density zero are rejected and flagged, and what remains is the truncated normal."""
    rows, target = 500, walled(value)
    state = start(target, -randn(20, rows, 2).abs())
    settings = {"step_size": torch.full((rows,), 0.7, dtype=DOUBLE), "scale": torch.ones(rows, 2, dtype=DOUBLE)}
    end = sample(target, state, row_noise(rows), num_draws=30, num_leapfrog=3, **settings)
    assert end.position.isfinite().all()
    assert end.log_density.isfinite().all()
    assert (end.num_divergent > 0).all()
    last = end.position[:, -1, :, 0].flatten().numpy()
    assert stats.kstest(last, lambda x: stats.norm.cdf(x) / stats.norm.cdf(0.5)).pvalue > 1e-3


def test_rejected_chains_keep_their_state_bit_for_bit():
    target = walled(math.nan, at=0.0)
    state = start(target, -randn(20, 50, 2).abs())
    settings = {
        "step_size": torch.full((50,), 0.7, dtype=DOUBLE),
        "scale": torch.ones(50, 2, dtype=DOUBLE),
        "num_leapfrog": 3,
    }
    after, info = transition(target, state, randn(20, 50, 2, seed=3), rand(20, 50), **settings)
    is_lost = info.is_divergent
    assert is_lost.any()
    assert not (info.is_accepted & is_lost).any()
    assert (info.acceptance[is_lost] == 0).all()
    for field, before in zip(after, state, strict=True):
        assert torch.equal(field[~info.is_accepted], before[~info.is_accepted])


def test_a_chain_that_starts_at_density_zero_comes_in():
    def target(u):
        return torch.where(u[..., 0] > 0, -math.inf, normal(u))

    state = start(target, torch.tensor([[[0.1]], [[-0.1]]], dtype=DOUBLE))
    settings = {"step_size": torch.ones(1, dtype=DOUBLE), "scale": torch.ones(1, 1, dtype=DOUBLE), "num_leapfrog": 1}
    state = HMCState(state.position, state.log_density, torch.zeros_like(state.gradient))
    after, info = transition(target, state, torch.full((2, 1, 1), -0.5, dtype=DOUBLE), rand(2, 1), **settings)
    assert after.log_density.isfinite().all()
    assert float(info.acceptance[0]) == 1
    assert not info.is_divergent.any()


def test_a_chain_that_starts_at_nan_stays_and_is_counted():
    state = start(normal, torch.full((1, 1, 1), 0.1, dtype=DOUBLE))._replace(log_density=torch.full((1, 1), math.nan))
    settings = {"step_size": torch.ones(1, dtype=DOUBLE), "scale": torch.ones(1, 1, dtype=DOUBLE), "num_leapfrog": 1}
    _, info = transition(normal, state, torch.ones(1, 1, 1, dtype=DOUBLE), rand(1, 1), **settings)
    assert float(info.acceptance) == 0
    assert not info.is_accepted
    assert info.is_divergent


def test_a_large_energy_error_is_divergent_and_a_moderate_one_is_not():
    state = start(normal, torch.zeros(1, 2, 1, dtype=DOUBLE))
    settings = {"step_size": torch.tensor([30.0, 100.0], dtype=DOUBLE), "scale": torch.ones(2, 1, dtype=DOUBLE)}
    momentum = torch.tensor(
        [[[0.09], [0.09]]], dtype=DOUBLE
    )  # ends at -log p = 3.6 with r = -40: 820 nats; 101,000 nats
    _, info = transition(normal, state, momentum, rand(1, 2), num_leapfrog=1, **settings)
    assert info.is_divergent.tolist() == [[False, True]]
    assert not info.is_accepted.any()


def test_a_target_is_never_asked_at_nan():
    """As a Cholesky factor would, this target refuses all rows if one is NaN."""

    def strict(u):
        if u.isnan().any():
            raise ValueError("NaN came in")
        return normal(u) + 0.1 * (0.3 - u[..., 0]).sqrt()

    state = start(strict, -randn(10, 20, 2).abs())
    settings = {"step_size": torch.full((20,), 0.9, dtype=DOUBLE), "scale": torch.ones(20, 2, dtype=DOUBLE)}
    end = sample(strict, state, row_noise(20), num_draws=20, num_leapfrog=5, **settings)
    assert end.num_divergent.sum() > 0


BREAKAGES = {
    "nan": lambda u: u[..., 0] * math.nan,
    "density zero": lambda u: torch.where(u[..., 0] < math.inf, -math.inf, u[..., 0]),
    "improper": lambda u: u[..., 0] * 1e30,
    "nowhere smooth": lambda u: -1e12 * u[..., 0].square().square(),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_row_changes_no_bit_of_the_others(name):
    """One row is broken or not: the others' draws are the same."""
    rows, broken = 6, 2

    def target(is_broken):
        def log_density(u):
            before, row, after = u[..., :broken, :], u[..., [broken], :], u[..., broken + 1 :, :]
            middle = BREAKAGES[name](row) if is_broken else quartic(row)
            return torch.cat([quartic(before), middle, quartic(after)], -1)

        return log_density

    def draws(is_broken):
        state = start(target(is_broken), row_noise(rows).normal(Stream.START, 0, 4, 3))
        settings = {"step_size": torch.full((rows,), 0.8, dtype=DOUBLE), "scale": torch.ones(rows, 3, dtype=DOUBLE)}
        return sample(target(is_broken), state, row_noise(rows), num_draws=30, num_leapfrog=4, **settings)

    with_it, without_it = draws(True), draws(False)
    others = [row for row in range(rows) if row != broken]
    assert torch.equal(with_it.position[:, :, others], without_it.position[:, :, others])
    assert torch.equal(with_it.log_density[:, :, others], without_it.log_density[:, :, others])
    assert torch.equal(with_it.acceptance[others], without_it.acceptance[others])
    assert with_it.position.isfinite().all()
    assert not torch.equal(with_it.position[:, :, broken], without_it.position[:, :, broken])


# Draws


def test_rows_are_drawn_alike_jointly_and_in_chunks():
    rows, noise = 23, row_noise(23)
    sd = torch.logspace(-3, 3, rows, dtype=DOUBLE)[:, None]

    def draws(index):
        def target(u):
            return quartic(u / sd[index])

        state = start(target, sd[index] * noise.rows(index).normal(Stream.START, 0, 4, 3))
        settings = {"step_size": torch.full((rows,), 0.5, dtype=DOUBLE)[index], "scale": sd[index].expand(-1, 3)}
        return sample(target, state, noise.rows(index), num_draws=20, num_leapfrog=5, **settings)

    joint = draws(slice(0, rows))
    parts = [draws(slice(at, min(at + 7, rows))) for at in range(0, rows, 7)]
    torch.testing.assert_close(torch.cat([part.position for part in parts], 2), joint.position, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.cat([part.acceptance for part in parts]), joint.acceptance, rtol=1e-10, atol=0)


def test_draws_report_what_happened():
    told = []
    settings = {"step_size": torch.full((5,), 1.3, dtype=DOUBLE), "scale": torch.ones(5, 3, dtype=DOUBLE)}
    draws = sample(
        quartic,
        start(quartic, randn(4, 5, 3)),
        row_noise(5),
        num_draws=40,
        num_leapfrog=3,
        advance=told.append,
        **settings,
    )
    torch.testing.assert_close(draws.log_density, quartic(draws.position))
    state, infos = start(quartic, randn(4, 5, 3)), []
    for step in range(40):
        numbers = row_noise(5).normal(Stream.MOMENTUM, step, 4, 3), row_noise(5).uniform(Stream.ACCEPT, step, 4)
        length = jittered(row_noise(5), Stream.JITTER, step, 3)
        state, info = transition(quartic, state, *numbers, num_leapfrog=length, **settings)
        infos.append(info)
        assert torch.equal(draws.position[:, step], state.position)
    torch.testing.assert_close(draws.acceptance, torch.stack([info.acceptance for info in infos]).mean((0, 1)))
    assert torch.equal(draws.num_divergent, sum(info.is_divergent.sum(0) for info in infos))
    assert sum(told) == pytest.approx(1)
    assert len(told) == 40


def test_lengths_are_equally_likely():
    lengths = [jittered(row_noise(1), Stream.JITTER, step, 5) for step in range(5000)]
    assert stats.chisquare(np.bincount(lengths, minlength=6)[1:]).pvalue > 1e-3
    assert {jittered(row_noise(1), Stream.JITTER, step, 1) for step in range(20)} == {1}
