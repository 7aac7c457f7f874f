"""Step sizes and metrics: the formulas, targets met in every unit, moments, and rows that know only themselves."""

import math

import pytest
import torch
from scipy import optimize

from pyro_aevb.mcmc.adaptation import DualAveraging, _shrink, find_step_size, warm_up
from pyro_aevb.mcmc.convergence import mean_ess
from pyro_aevb.mcmc.hmc import sample, start, transition
from pyro_aevb.mcmc.noise import RowNoise, Stream

DOUBLE = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def row_noise(num_rows, seed=0):
    return RowNoise(seed, torch.arange(num_rows), dtype=DOUBLE)


class Normals:
    """A normal distribution a row, each with its own location and covariance.

    The row's size runs from 1e-3 to 1e3, its coordinates' from 0.3 to 3 of that, and they are correlated.
    """

    def __init__(self, rows, dim, *, correlation=0.5, sizes=3.0):
        self.size = torch.logspace(-sizes, sizes, rows, dtype=DOUBLE)
        self.sd = self.size[:, None] * torch.logspace(-0.5, 0.5, dim, dtype=DOUBLE)
        self.loc = 5 * self.size[:, None] * randn(rows, dim, seed=7)
        matrix = torch.full((dim, dim), correlation, dtype=DOUBLE).fill_diagonal_(1)
        self.whitening = torch.linalg.inv(torch.linalg.cholesky(matrix)).T
        self.correlation = correlation

    def __call__(self, u):
        return -0.5 * ((u - self.loc) / self.sd @ self.whitening).square().sum(-1)


def warmed_up(target, *, chains=16, noise=None, num_steps=200, accept=0.8, num_leapfrog=5, **settings):
    rows, dim = target.sd.shape
    noise = noise or row_noise(rows)
    state = start(target, target.loc + target.sd * noise.normal(Stream.START, 0, chains, dim))
    settings = {"scale": torch.ones(rows, dim, dtype=DOUBLE), **settings}
    return warm_up(
        target, state, noise, num_steps=num_steps, target_accept_prob=accept, num_leapfrog=num_leapfrog, **settings
    )


# Formulas


def test_dual_averaging_is_the_papers_recursion():
    """The closed form of the recursion: the error is a weighted sum, the average a weighted mean, both written out."""
    acceptance = torch.rand(30, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    averaging = DualAveraging.start(torch.full((4,), 0.2, dtype=DOUBLE))
    steps = []
    for t in range(1, 31):
        averaging = averaging.update(acceptance[t - 1], target=0.8)
        # prod_{j > i} (1 - 1 / (j + 10)) / (i + 10) telescopes to 1 / (t + 10)
        error = (0.8 - acceptance[:t]).sum(0) / (t + 10)
        steps.append(math.log(0.2) - math.sqrt(t) / 0.5 * error)
        torch.testing.assert_close(averaging.log_step, steps[-1])
    weights = [t**-0.75 * math.prod(1 - later**-0.75 for later in range(t + 1, 31)) for t in range(1, 31)]
    assert sum(weights) == pytest.approx(1)
    torch.testing.assert_close(averaging.log_average, sum(w * step for w, step in zip(weights, steps, strict=True)))


def test_dual_averaging_finds_the_root_of_a_curve():
    """Acceptance exp(-eps * stiffness), without noise: the average goes to where that is the target.

    From a step size wrong by a factor of e the acceptance is still off by gamma / sqrt(1500) = 0.013, the step size by 5 %.
    """
    stiffness = torch.logspace(-2, 2, 9, dtype=DOUBLE)
    averaging = DualAveraging.start(torch.linspace(0.37, 2.7, 9, dtype=DOUBLE) * -math.log(0.65) / stiffness)
    for _ in range(1500):
        averaging = averaging.update((-averaging.log_step.exp() * stiffness).exp(), target=0.65)
    torch.testing.assert_close(averaging.log_average.exp(), -math.log(0.65) / stiffness, rtol=0.05, atol=0)


def test_scales_are_standard_deviations_on_the_logarithmic_scale_and_old_ones_where_nothing_moved():
    variance = torch.tensor([[4.0, 1e-12], [0.0, math.nan]], dtype=DOUBLE)
    before = torch.tensor([[1e-3, 1.0], [1e3, 7.0]], dtype=DOUBLE)
    expected = torch.tensor([[2 ** (320 / 325) * 1e-3 ** (5 / 325), 1e-6 ** (320 / 325)], [1e3, 7.0]], dtype=DOUBLE)
    torch.testing.assert_close(_shrink(variance, torch.full((2, 1), 320.0, dtype=DOUBLE), before), expected)


def test_a_first_step_size_accepts_as_asked_in_any_unit():
    """One normal coordinate: the search must end within a factor of two of the size at which E[acceptance] is 0.8."""
    sd = torch.logspace(-4, 4, 9, dtype=DOUBLE)[:, None]
    noise = row_noise(9)

    def target(u):
        return -0.5 * (u / sd).square().sum(-1)

    state = start(target, sd * noise.normal(Stream.START, 0, 2000, 1))
    found = find_step_size(target, state, noise, scale=torch.ones(9, 1, dtype=DOUBLE))

    def excess(log_step):
        q, p, eps = randn(20_000, seed=1), randn(20_000, seed=2), math.exp(log_step)
        middle = p - 0.5 * eps * q
        end = q + eps * middle
        error = 0.5 * (end.square() + (middle - 0.5 * eps * end).square() - q.square() - p.square())
        return float((-error).clamp(max=0).exp().mean()) - 0.8

    exact = math.exp(optimize.brentq(excess, math.log(0.1), math.log(1.99)))
    ratio = found / sd[:, 0] / exact
    assert (ratio > 0.5 - 0.02).all()
    assert (ratio < 2 + 0.02).all()


def test_a_search_that_finds_nothing_leaves_the_first_try():
    def target(u):
        return u.sum(-1) * math.nan

    state = start(target, randn(3, 2, 16))
    found = find_step_size(target, state, row_noise(2), scale=torch.ones(2, 16, dtype=DOUBLE))
    torch.testing.assert_close(found, torch.full((2,), 0.5, dtype=DOUBLE))


# Targets and moments


@pytest.mark.parametrize(
    ("accept", "dim", "chains", "num_steps"),
    [(0.8, 3, 16, 200), (0.9, 3, 16, 200), (0.65, 3, 32, 400), (0.8, 20, 16, 200), (0.8, 2, 8, 400)],
)
def test_rows_of_all_scales_reach_their_acceptance(accept, dim, chains, num_steps):
    target = Normals(25, dim)
    state, step_size, scale = warmed_up(target, chains=chains, num_steps=num_steps, accept=accept)
    settings = {"step_size": step_size, "scale": scale, "num_leapfrog": 5}
    draws = sample(target, state, row_noise(25, seed=1), num_draws=200, **settings)
    assert (draws.acceptance - accept).abs().max() < 0.05
    assert (scale / target.sd).log().abs().max() < 0.4
    assert draws.num_divergent.sum() == 0


def test_moments_are_the_posteriors():
    """Mean and variance of 40 correlated normals within 4.5 standard errors: one of 320 fails in 500 runs."""
    target = Normals(40, 4, correlation=0.7)
    state, step_size, scale = warmed_up(target, num_leapfrog=8)
    settings = {"step_size": step_size, "scale": scale, "num_leapfrog": 8}
    draws = sample(target, state, row_noise(40, seed=1), num_draws=400, **settings).position
    z = (draws - target.loc) / target.sd
    for values, exact, variance in [(z, 0, 1), (z.square(), 1, 2)]:
        error = values.mean((0, 1)) - exact
        assert (error.abs() < 4.5 * (variance / mean_ess(values)).sqrt()).all()
    product = z[..., 0] * z[..., 1]
    error = product.mean((0, 1)) - target.correlation
    assert (error.abs() < 4.5 * ((1 + target.correlation**2) / mean_ess(product)).sqrt()).all()


def test_a_row_far_from_its_start_comes_in():
    target = Normals(20, 3)
    state = start(target, target.loc + 100 * target.sd * randn(16, 20, 3))
    settings = {"num_steps": 300, "target_accept_prob": 0.8, "num_leapfrog": 5}
    state, step_size, scale = warm_up(target, state, row_noise(20), scale=torch.ones(20, 3, dtype=DOUBLE), **settings)
    assert (scale / target.sd).log().abs().max() < 0.5
    draws = sample(
        target, state, row_noise(20, seed=1), num_draws=100, step_size=step_size, scale=scale, num_leapfrog=5
    )
    assert (draws.acceptance - 0.8).abs().max() < 0.1


def test_a_stuck_chain_goes_on_from_where_others_are():
    """One of 16 chains starts where the density is NaN, from where no trajectory leads away."""
    target = Normals(5, 2, sizes=0.0)

    def walled(u):
        return target(u) + 0 * (1e3 - u[..., 0]).sqrt()

    position = target.loc + target.sd * randn(16, 5, 2)
    position[0, 2] = 1e4
    settings = {"num_steps": 200, "target_accept_prob": 0.8, "num_leapfrog": 5, "scale": torch.ones(5, 2, dtype=DOUBLE)}
    state, step_size, scale = warm_up(walled, start(walled, position), row_noise(5), **settings)
    draws = sample(walled, state, row_noise(5, 1), num_draws=100, step_size=step_size, scale=scale, num_leapfrog=5)
    assert draws.position.max() < 1e3
    assert draws.num_divergent.tolist() == [0] * 5
    assert (draws.acceptance - 0.8).abs().max() < 0.07


def test_a_row_that_is_stuck_as_a_whole_stays_and_leaves_the_others_alone():
    target = Normals(5, 2, sizes=0.0)

    def lost(u):
        is_lost = torch.arange(5) == 2
        return torch.where(is_lost, torch.nan, target(u))

    position = target.loc + target.sd * randn(16, 5, 2)
    settings = {"num_steps": 50, "target_accept_prob": 0.8, "num_leapfrog": 5, "scale": torch.ones(5, 2, dtype=DOUBLE)}
    state, _, _ = warm_up(lost, start(lost, position), row_noise(5), **settings)
    whole, _, _ = warm_up(target, start(target, position), row_noise(5), **settings)
    assert torch.equal(state.position[:, 2], position[:, 2])
    others = [0, 1, 3, 4]
    assert torch.equal(state.position[:, others], whole.position[:, others])


# Rows and settings


def test_rows_are_warmed_up_alike_jointly_and_in_chunks():
    rows = 23
    whole = Normals(rows, 3)
    joint = warmed_up(whole, chains=4, num_steps=60)
    for begin in range(0, rows, 7):
        index = slice(begin, min(begin + 7, rows))
        part = Normals(rows, 3)
        part.sd, part.loc = whole.sd[index], whole.loc[index]
        some = warmed_up(part, chains=4, num_steps=60, noise=row_noise(rows).rows(index))
        torch.testing.assert_close(some.step_size, joint.step_size[index], rtol=1e-10, atol=0)
        torch.testing.assert_close(some.scale, joint.scale[index], rtol=1e-10, atol=0)
        torch.testing.assert_close(some.state.position, joint.state.position[:, index], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
def test_a_broken_row_changes_no_bit_of_the_others(value):
    target = Normals(6, 3)

    def broken(u):
        density = target(u)
        return torch.cat([density[..., :2], u[..., [2], :].sum(-1) * value, density[..., 3:]], -1)

    broken.sd, broken.loc = target.sd, target.loc
    with_it, without_it = warmed_up(broken, num_steps=60), warmed_up(target, num_steps=60)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(with_it.step_size[others], without_it.step_size[others])
    assert torch.equal(with_it.scale[others], without_it.scale[others])
    assert torch.equal(with_it.state.position[:, others], without_it.state.position[:, others])
    assert with_it.scale.isfinite().all()


def test_the_step_size_found_is_the_first_and_no_step_changes_nothing():
    target, noise, scale = Normals(4, 2), row_noise(4), torch.ones(4, 2, dtype=DOUBLE)
    state = start(target, target.loc + target.sd * noise.normal(Stream.START, 0, 16, 2))
    step_size = find_step_size(target, state, noise, scale=scale, accept_prob=0.8)
    unmoved = warmed_up(target, num_steps=0)
    torch.testing.assert_close(unmoved.step_size, step_size)
    assert torch.equal(unmoved.scale, scale)

    numbers = noise.normal(Stream.WARM_UP_MOMENTUM, 0, 16, 2), noise.uniform(Stream.WARM_UP_ACCEPT, 0, 16)
    expected, _ = transition(target, state, *numbers, step_size=step_size, scale=scale, num_leapfrog=1)
    moved = warmed_up(target, num_steps=1, num_leapfrog=1)
    torch.testing.assert_close(moved.state, expected)


def test_few_steps_leave_the_metric_alone_and_progress_is_told():
    told = []
    few = warmed_up(Normals(4, 2), num_steps=19, advance=told.append)
    assert torch.equal(few.scale, torch.ones(4, 2, dtype=DOUBLE))
    assert sum(told) == pytest.approx(1)
    assert not torch.equal(warmed_up(Normals(4, 2), num_steps=20).scale, few.scale)
