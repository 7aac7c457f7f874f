"""The paper's estimator (appendix D): its formula, its side, its known failures and their flags."""

import functools
import math
import warnings

import numpy as np
import pytest
import torch
from known_evidence import TwoModes, bernoulli_decoder
from torch.distributions import Gamma, Normal

from pyro_aevb import hmc_posterior, log_marginal
from pyro_aevb.errors import SettingError, UnreliableWarning
from pyro_aevb.evidence.gaussian import fit_gaussian
from pyro_aevb.evidence.problem import Problem
from pyro_aevb.evidence.reciprocal import Reciprocal, reciprocal_error, reciprocal_value
from pyro_aevb.evidence.result import Bound, Status
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.program.density import LogDensity
from pyro_aevb.testing import LinearGaussian

SMALL = {"num_draws": 100, "warmup_steps": 100}


def standard_log_joint(u):
    return Normal(0.0, 1.0).log_prob(u).sum(-1)


def problem_of(log_likelihood, dim: int, rows: int) -> Problem:
    density = LogDensity.from_function(
        standard_log_joint,
        log_likelihood,
        dim,
        rows=rows,
        dtype=torch.float64,
        draw_prior=lambda n: torch.randn(n, rows, dim).double(),
    )
    return Problem(density, None, RowNoise(0, torch.arange(rows), dtype=torch.float64))


def linear_gaussian(rows: int) -> tuple[Problem, torch.Tensor]:
    exact, _ = LinearGaussian.fixture()
    x = exact.simulate(rows, seed=5)[0]
    problem = problem_of(lambda u: Normal(u @ exact.weight.T + exact.bias, 0.5).log_prob(x).sum(-1), 3, rows)
    return problem, exact.log_marginal(x)


class TestFormula:
    def test_it_is_minus_the_log_of_a_mean_with_the_delta_methods_error(self):
        log_weights = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double() + 700
        weights = np.exp(log_weights.numpy() - 700)
        assert np.allclose(reciprocal_value(log_weights), -np.log(weights.mean(0)) - 700, atol=1e-10)
        size = torch.tensor([50.0, 25.0, 10.0, 5.0]).double()
        expected = weights.std(0, ddof=1) / np.sqrt(size.numpy()) / weights.mean(0)
        assert np.allclose(reciprocal_error(log_weights, size), expected, rtol=1e-10)

    def test_twenty_dimensions_and_fifty_draws_leave_it_high(self):
        # the paper's limit of five latents is one of 50 draws; the same fit leaves importance sampling low
        torch.manual_seed(1)
        first, second = torch.randn(2, 50, 1000, 20).double()
        q = fit_gaussian(first, is_full=True)
        high = reciprocal_value(q.log_density(second) - standard_log_joint(second))
        u = q.transform(torch.randn_like(first))
        low = (standard_log_joint(u) - q.log_density(u)).logsumexp(0) - math.log(50)
        assert 0.2 < high.mean() < 0.4
        assert -0.9 < low.mean() < -0.5

    def test_five_hundred_draws_mend_it(self):
        torch.manual_seed(1)
        first, second = torch.randn(2, 500, 300, 20).double()
        q = fit_gaussian(first, is_full=True)
        assert reciprocal_value(q.log_density(second) - standard_log_joint(second)).mean().abs() < 0.02


class TestTruncation:
    def test_the_cut_density_is_normalised(self):
        torch.manual_seed(0)
        q = fit_gaussian(torch.randn(1000, 2, 3).double())
        u = q.transform(torch.randn(40_000, 2, 3).double())
        inside = (Reciprocal(truncate=0.7)._log_density(q, u) - q.log_density(u)).exp()
        # E_q[q_cut / q] = 1, of numbers that are 0 or 1 / .7
        assert (inside.mean(0) - 1).abs().max() < 4 * inside.std() / 200
        assert set(inside.unique().numpy().round(6)) == {0.0, round(1 / 0.7, 6)}

    def test_it_bounds_the_weights_where_the_posterior_has_light_tails(self):
        # log of a gamma variable falls doubly exponentially on the right: a Gaussian's tail is heavier, and k-hat says so
        torch.manual_seed(0)
        first, second = Gamma(torch.tensor(2.0).double(), 1.0).sample((2, 2000, 200, 1)).log()
        q = fit_gaussian(first)

        def log_weights(truncate):
            return Reciprocal(truncate=truncate)._log_density(q, second) - (2 * second - second.exp()).sum(-1)

        assert (Reciprocal()._k_hat(log_weights(None)) > 0.7).double().mean() > 0.9
        assert Reciprocal(truncate=0.95)._k_hat(log_weights(0.95)).isnan().all()
        assert log_weights(None).amax(0).mean() > log_weights(0.95).amax(0).mean() + 1
        z = reciprocal_value(log_weights(0.95)) / reciprocal_error(
            log_weights(0.95), torch.full((200,), 2000.0).double()
        )
        # 200 standard normals: 4 standard errors of their standard deviation and of their mean
        assert abs(z.std() - 1) < 0.2
        assert abs(z.mean()) < 0.28


class TestEstimator:
    @pytest.mark.parametrize("settings", [{}, {"truncate": 0.95}])
    def test_rows_lie_at_their_errors_from_the_truth(self, settings):
        problem, truth = linear_gaussian(150)
        result = Reciprocal(**SMALL, **settings).estimate(problem)
        z = (result.value - truth) / result.standard_error
        # 150 standard normals: four standard errors below their share of .954, of their mean (.33) and of their standard
        # deviation (.23). Bounded weights are skewed, which adds a fifth of an error to the mean
        assert (z.abs() < 2).double().mean() > 0.954 - 4 * math.sqrt(0.954 * 0.046 / 150)
        assert abs(z.mean()) < 0.33 + 0.2
        assert 0.77 < z.std() < 1.23
        assert torch.equal(result.upper, result.value)
        assert result.bound is Bound.UPPER
        assert result.upper_kind == "reciprocal"
        assert result.num_samples == 800
        # below and above the truth on average
        assert result.lower.mean() < truth.mean() + 0.01
        assert result.is_flagged.double().mean() < 0.1

    def test_the_papers_settings(self):
        problem, truth = linear_gaussian(150)
        counts = []
        estimator = Reciprocal.preset("paper", warmup_steps=100, num_draws=100)
        assert (estimator.num_kept, estimator.num_leapfrog, estimator.truncate) == (50, 4, None)
        result = estimator.estimate(Problem(problem.density, None, problem.noise, counts.append))
        errors = result.value - truth
        assert result.num_samples == 50
        # 50 draws at three latents: an error of .07 and no visible bias
        assert 0.05 < errors.std() < 0.1
        assert errors.mean().abs() < 0.025
        # 50 numbers know their error to a tenth; taken for all the draws, it would be four times too small
        assert 0.75 < (errors / result.standard_error).std() < 1.4
        assert sum(counts) == pytest.approx(1.0)

    def test_draws_that_estimate_are_new_ones(self):
        # a Gaussian of 44 parameters fits the 80 draws that it was fitted to better than the posterior does: on them the value
        # would be .3 low
        problem = problem_of(lambda u: u.new_zeros(u.shape[:-1]), 8, 60)
        result = Reciprocal(num_kept=80, **SMALL).estimate(problem)
        assert abs(result.value.mean()) < 0.1

    def test_the_papers_limit_is_told(self):
        with pytest.warns(UnreliableWarning, match=r"from 5 latents on .* got 8 .* num_kept=50"):
            Reciprocal.preset("paper")._warn_beyond_the_paper(8, 50)

    def test_more_draws_or_fewer_latents_are_not_warned_of(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Reciprocal(num_kept=50)._warn_beyond_the_paper(4, 50)
            Reciprocal(num_kept=51)._warn_beyond_the_paper(9, 51)

    def test_a_missed_mode_is_told(self):
        modes = TwoModes(dim=2, scale=0.3, place=3.0, rows=12)
        torch.manual_seed(0)
        problem = Problem(modes.density(), None, RowNoise(0, torch.arange(12), dtype=torch.float64))
        result = Reciprocal(**SMALL).estimate(problem)
        wrong = (result.value - modes.log_evidence).abs() > 0.1
        assert wrong.any()
        assert all(result.status[row] is Status.UNRELIABLE for row in wrong.nonzero().flatten())

    def test_a_row_without_density_is_flagged_and_alone(self):
        def shift(u):
            return -0.5 * (u - 1).square().sum(-1)

        def broken(u):
            return torch.where(torch.arange(4) == 2, math.nan, shift(u))

        estimator = Reciprocal(num_chains=4, num_draws=20, warmup_steps=30)
        sound, beside = estimator.estimate(problem_of(shift, 2, 4)), estimator.estimate(problem_of(broken, 2, 4))
        assert torch.equal(sound.value[[0, 1, 3]], beside.value[[0, 1, 3]])
        assert beside.status[2] is Status.UNRELIABLE

    @pytest.mark.parametrize(
        ("setting", "value", "told"),
        [
            ("num_kept", 0, "num_kept"), ("num_kept", 1, "between 2 and half"), ("num_kept", 1601, "3200 draws"),
            ("truncate", 0.0, "truncate"), ("truncate", 1.0, "truncate"), ("num_chains", 5, "num_chains"),
        ],
    )  # fmt: skip
    def test_bad_settings(self, setting, value, told):
        with pytest.raises(SettingError, match=told):
            Reciprocal(**{setting: value})

    def test_an_unknown_preset(self):
        with pytest.raises(SettingError, match="paper"):
            Reciprocal.preset("wu2017")


@pytest.mark.slow
def test_posterior_means_of_the_nonlinear_decoder():
    known = bernoulli_decoder()
    grid = torch.linspace(-7, 7, 701).double()
    density = LogDensity(known.model, known.x)
    u = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        log_joint = torch.cat([density.log_joint(part[:, None])[:, 0] for part in u.split(50_000)])
    assert (log_joint.logsumexp(0) + 2 * math.log(grid[1] - grid[0])).item() == pytest.approx(
        known.log_evidence, abs=1e-4
    )
    mean = log_joint.softmax(0) @ u
    settings = {"num_chains": 64, "num_samples": 200, "warmup_steps": 100}
    draws = hmc_posterior(known.model, known.x, seed=0, progress=False, **settings)
    # 3,000 effective draws of sd .62: an error of .011
    assert (draws.samples["z"].mean((0, 1))[0] - mean).abs().max() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("method", "tolerance"), [("reciprocal", 0.03), ("importance", 0.04)])
def test_the_nonlinear_decoder(method, tolerance):
    known = bernoulli_decoder()
    fitted = {"proposal": "fitted"} if method == "importance" else {}
    door = functools.partial(log_marginal, method=method, progress=False, seed=0)
    assert door(known.model, None, known.x, **fitted).value.item() == pytest.approx(known.log_evidence, abs=tolerance)
