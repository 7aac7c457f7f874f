"""Bridge sampling: the fixed point, its error on draws of known law, and models of known evidence."""

import functools
import math

import numpy as np
import posteriordb
import pytest
import scipy.optimize
import torch
from known_evidence import Known, TwoModes, bernoulli_decoder, dirichlet_multinomial, gamma_exponential
from torch.distributions import Normal

from pyro_aevb import log_marginal
from pyro_aevb.errors import SettingError
from pyro_aevb.evidence import chains
from pyro_aevb.evidence.bridge import Bridge, bridge_error, find_bridge
from pyro_aevb.evidence.chains import Check, check_with_prior, effective_size
from pyro_aevb.evidence.gaussian import fit_gaussian
from pyro_aevb.evidence.problem import Problem
from pyro_aevb.evidence.result import Bound, Status
from pyro_aevb.evidence.running import EstimatorRun
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.program.density import LogDensity
from pyro_aevb.randomness import preserved_rng
from pyro_aevb.testing import (
    BetaBinomial,
    EightSchools,
    GammaPoisson,
    LinearGaussian,
    LinearGaussianStateSpace,
)

bridge = functools.partial(log_marginal, method="bridge", progress=False, seed=0)


def standard_log_joint(u):
    return Normal(0.0, 1.0).log_prob(u).sum(-1)


class TestFindBridge:
    def ratios(self):
        torch.manual_seed(0)
        scale = torch.tensor([0.6, 0.9, 1.3, 3.0]).double()
        first, second = torch.randn(300, 4).double(), scale * torch.randn(500, 4).double()

        def log_ratio(u):
            return Normal(0.0, 1.0).log_prob(u) - 2.5 - Normal(0.0, scale).log_prob(u)

        return log_ratio(first), log_ratio(second), torch.tensor([300.0, 150.0, 30.0, 600.0]).double()

    def test_it_solves_meng_and_wongs_equation(self):
        first, second, size = self.ratios()
        value = find_bridge(first, second, size).value
        for row in range(4):
            l1, l2 = first[:, row].exp().numpy(), second[:, row].exp().numpy()
            s1 = size[row].item() / (size[row].item() + 500)

            def move(r, l1=l1, l2=l2, s1=s1):
                numerator = np.mean(l2 / (s1 * l2 + (1 - s1) * r))
                return numerator / np.mean(1 / (s1 * l1 + (1 - s1) * r)) - r

            assert math.exp(value[row]) == pytest.approx(scipy.optimize.brentq(move, 1e-6, 10, xtol=1e-14), rel=1e-9)

    def test_shifts_of_a_thousand_nats_and_of_rows_change_nothing(self):
        first, second, size = self.ratios()
        value = find_bridge(first, second, size).value
        shift = torch.tensor([1e3, -1e3, 0.0, 5.0]).double()
        shifted = find_bridge(first + shift, second + shift, size).value
        assert torch.allclose(shifted, value + shift, rtol=0, atol=1e-8)
        assert torch.equal(find_bridge(first[:, 1:2], second[:, 1:2], size[1:2]).value, value[1:2])

    def test_proposals_outside_the_support_count(self):
        # q is a normal, the posterior its upper half: half of the proposals have no density, and p(x) = 1/2
        torch.manual_seed(0)
        first = torch.zeros(4000, 1).double()
        second = torch.where(torch.rand(4000, 1) < 0.5, -math.inf, 0.0).double()
        value = find_bridge(first, second, torch.tensor([4000.0]).double()).value
        assert value.exp().item() == pytest.approx((second == 0).double().mean().item(), rel=1e-9)

    def test_far_apart_it_still_converges(self):
        first, second = torch.full((100, 1), 400.0), torch.full((100, 1), -700.0)
        assert find_bridge(first, second, torch.tensor([100.0])).value.item() == pytest.approx(-150.0, abs=1e-6)

    def test_broken_rows_are_nan_and_alone(self):
        first, second, size = self.ratios()
        value = find_bridge(first, second, size).value
        first[3, 0], second[:, 1], second[4, 2] = math.nan, -math.inf, math.inf
        broken = find_bridge(first, second, size).value
        assert broken[:3].isnan().all()
        assert torch.equal(broken[3:], value[3:])


def both_halves(first, second, log_joint, chains: int, **settings):
    """Bridge halves ``[draws, rows, D]`` both ways, as the estimator does."""
    roots, sizes = [], []
    for fitted, kept in ((first, second), (second, first)):
        q = fit_gaussian(fitted, **settings)
        u = q.transform(torch.randn_like(kept))
        ratio = log_joint(kept) - q.log_density(kept)
        cut = functools.partial(torch.unflatten, dim=0, sizes=(chains, -1))
        root = find_bridge(ratio, log_joint(u) - q.log_density(u), effective_size(cut(ratio)))
        roots.append(root)
        sizes.append(effective_size(cut(root.posterior_share)))
    return (roots[0].value + roots[1].value) / 2, bridge_error(roots, sizes), roots


class TestExactDraws:
    def test_gaussian_draws_in_twenty_dimensions(self):
        # 50 draws for a full covariance of 20 coordinates: the same draws leave the reciprocal estimator .3 nats high
        torch.manual_seed(1)
        first, second = torch.randn(2, 50, 1000, 20).double()
        value, _, roots = both_halves(first, second, standard_log_joint, 1, is_full=True)
        assert abs(roots[0].value.mean()) < 0.03
        assert roots[0].value.std() < 0.35
        assert abs(value.mean()) < 0.03
        assert value.std() < roots[0].value.std()

    @pytest.mark.parametrize(("dim", "draws"), [(3, 400), (8, 100)])
    def test_the_error_of_both_halves_is_right_around_gaussians(self, dim, draws):
        # the halves' errors are correlated (.5): errors that called them independent would be too small by a fifth
        torch.manual_seed(2)
        first, second = torch.randn(2, draws, 1500, dim).double()
        value, error, _ = both_halves(first, second, standard_log_joint, 4)
        z = value / error
        assert 0.9 < z.std() < 1.1
        # a binomial of 1500 at .9545: 4 standard errors
        assert abs((z.abs() < 2).double().mean() - 0.9545) < 0.0215 + 0.01

    def test_and_around_skewed_densities(self):
        # log of a gamma variable: no Gaussian fits, the error is larger and must say so; it may be too large
        torch.manual_seed(3)
        shape = torch.tensor(1.5).double()
        gamma = torch.distributions.Gamma(shape, 1.0)
        first, second = gamma.sample((2, 200, 1500, 1)).log()
        value, error, _ = both_halves(first, second, lambda u: (shape * u - u.exp()).sum(-1) - shape.lgamma(), 4)
        z = value / error
        assert 0.75 < z.std() < 1.1
        assert abs(z.mean()) < 0.15

    def test_and_with_correlated_draws(self):
        torch.manual_seed(4)
        chains, steps, rows, dim, rho = 8, 100, 1000, 2, 0.7
        u = torch.randn(chains, rows, dim).double()
        path = []
        for _ in range(2 * steps):
            u = rho * u + math.sqrt(1 - rho**2) * torch.randn_like(u)
            path.append(u)
        draws = torch.stack(path, 1)
        first, second = draws[:, :steps].flatten(0, 1), draws[:, steps:].flatten(0, 1)
        value, error, roots = both_halves(first, second, standard_log_joint, chains)
        assert 0.85 < (value / error).std() < 1.15
        independent = bridge_error(roots, [torch.full((rows,), chains * steps).double()] * 2)
        assert (value / independent).std() > 1.15


def rows_of(exact, rows: int):
    """Return the linear-Gaussian fixture as plain functions: the same density, at the cost of a product."""
    x = exact.simulate(rows, seed=5)[0]
    density = LogDensity.from_function(
        standard_log_joint,
        lambda u: Normal(u @ exact.weight.T + exact.bias, 0.5).log_prob(x).sum(-1),
        3,
        rows=rows,
        dtype=torch.float64,
        draw_prior=lambda n: torch.randn(n, rows, 3).double(),
    )
    return Problem(density, None, RowNoise(0, torch.arange(rows), dtype=torch.float64)), exact.log_marginal(x)


def log_gammas(dim: int, rows: int):
    """Return a problem of logarithms of gamma variables, exact draws of its posterior, and log p(x).

    A rate with an exponential prior and one count: its posterior is Gamma(1 + count, 2), and its logarithm has a heavy left tail.
    """
    count = torch.arange(dim).remainder(3).double()
    prior = torch.distributions.Gamma(torch.ones(rows, dim).double(), 1.0)
    density = LogDensity.from_function(
        lambda u: (u - u.exp()).sum(-1),
        lambda u: (count * u - u.exp() - (count + 1).lgamma()).sum(-1),
        dim,
        rows=rows,
        dtype=torch.float64,
        draw_prior=lambda n: prior.sample((n,)).log(),
    )
    torch.manual_seed(0)
    draws = torch.distributions.Gamma(count + 1, 2.0).sample((3200, rows)).log()
    problem = Problem(density, None, RowNoise(0, torch.arange(rows), dtype=torch.float64))
    return problem, draws, -(count + 1).sum().item() * math.log(2)


class TestEstimator:
    def test_rows_are_covered(self):
        problem, truth = rows_of(LinearGaussian.fixture()[0], 150)
        fractions = []
        problem = Problem(problem.density, None, problem.noise, fractions.append)
        result = Bridge(num_draws=100, warmup_steps=100).estimate(problem)
        z = (result.value - truth) / result.standard_error
        assert (result.standard_error < 0.02).all()
        # a binomial of 150 at .95 lies in [.88, .99] but for 3 times in 1,000
        assert 0.88 < (z.abs() < 2).double().mean() < 0.995
        assert result.bound is Bound.ESTIMATE
        assert result.num_samples == 1600
        assert (result.lower - truth).abs().max() < 0.2
        assert result.upper.isnan().all()
        assert (result.acceptance - 0.8).abs().max() < 0.15
        assert sum(fractions) == pytest.approx(1.0)

    @pytest.mark.slow
    def test_a_thousand_rows_are_covered(self):
        problem, truth = rows_of(LinearGaussian.fixture()[0], 1000)
        result = Bridge().estimate(problem)
        z = (result.value - truth) / result.standard_error
        assert 0.925 <= (z.abs() <= 2).double().mean() <= 0.98
        assert 0.9 < z.std() < 1.15
        assert result.standard_error.max() < 0.01

    def test_half_of_the_proposals_outside_the_support(self):
        # a half-normal as the upper half of a normal: p(x) = 1/2, and HMC meets a wall
        def upper(u):
            return torch.zeros_like(u[..., 0]).masked_fill(u[..., 0] < 0, -math.inf)

        density = LogDensity.from_function(
            standard_log_joint,
            upper,
            1,
            rows=20,
            dtype=torch.float64,
            draw_prior=lambda n: torch.randn(n, 20, 1).double(),
        )
        problem = Problem(density, None, RowNoise(0, torch.arange(20), dtype=torch.float64))
        result = Bridge(num_draws=100, warmup_steps=100).estimate(problem)
        z = (result.value + math.log(2)) / result.standard_error
        assert z.abs().max() < 4.5
        assert result.standard_error.max() < 0.1
        assert (result.lower + math.log(2)).abs().max() < 0.2

    def test_a_mode_that_chains_miss_or_share_wrongly_is_told(self):
        modes = TwoModes(dim=2, scale=0.3, place=3.0, rows=12)
        density = modes.density()
        torch.manual_seed(0)
        problem = Problem(density, None, RowNoise(0, torch.arange(12), dtype=density.dtype))
        result = Bridge(num_draws=100, warmup_steps=100).estimate(problem)
        wrong = (result.value - modes.log_evidence).abs() > 0.1
        assert wrong.any()
        assert all(result.status[row] is Status.UNRELIABLE for row in wrong.nonzero().flatten())

    @pytest.mark.parametrize(("dim", "scale", "place"), [(2, 0.3, 4.0), (3, 0.5, 3.0), (5, 0.5, 3.0)])
    def test_the_check_finds_a_mode_that_no_chain_saw(self, dim, scale, place):
        modes = TwoModes(dim, scale, place, rows=20)
        torch.manual_seed(0)
        density = modes.density()
        problem = Problem(density, None, RowNoise(0, torch.arange(20), dtype=density.dtype))
        low = modes.draw_low_mode(1600)
        check = check_with_prior(problem, fit_gaussian(low), low, num_draws=1600)
        # the bridge of these draws, which lies .36 nats low; with an error of .1 that alone is no contradiction
        value = torch.full((20,), modes.log_evidence + math.log(0.7)).double()
        assert check.refutes(value, torch.full_like(value, 0.1)).double().mean() >= 0.9
        whole = torch.where(torch.rand(1600, 20, 1) < 0.3, -low, low)
        value = torch.full((20,), modes.log_evidence).double()
        sound = check_with_prior(problem, fit_gaussian(whole), whole, num_draws=1600)
        assert not sound.refutes(value, torch.full_like(value, 1e-3)).any()
        # unbiased for p(x)
        ratio = (sound.value - modes.log_evidence).exp()
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(20)

    def test_heavy_tails_are_no_missed_mode(self):
        # 35 coordinates: one draw of the prior in a tail of the posterior may carry a tenth, and the lower bound falls short
        problem, draws, truth = log_gammas(35, 150)
        check = check_with_prior(problem, fit_gaussian(draws), draws, num_draws=1600)
        value = torch.full((150,), truth).double()
        # a fiftieth of the rows by chance at most: a binomial of 150 and 4 of its standard errors
        assert check.refutes(value, torch.full_like(value, 0.02)).sum() <= 3 + 4 * math.sqrt(3)
        assert (value - check.value > 3 * check.standard_error).sum() > 0

    def test_a_lower_bound_refutes_from_above_only(self):
        value, error = torch.tensor([0.0, 0.0, 0.0]).double(), torch.full((3,), 0.04).double()
        check = Check(torch.tensor([-9.0, 0.16, 0.14]).double(), torch.full_like(value, 0.03), torch.zeros_like(value))
        assert check.refutes(value, error).tolist() == [False, True, False]
        assert check._replace(missed=torch.tensor([0.06, 0.0, 0.04]).double()).refutes(value, error).tolist() == [
            True, True, False,
        ]  # fmt: skip

    def test_rows_of_heavy_tails_are_right_and_not_refuted(self):
        problem, _, truth = log_gammas(20, 60)
        result = Bridge().estimate(problem)
        assert (result.value - truth).abs().max() < 0.1
        # nested R-hat is above its limit by chance, in 20 coordinates more often than in few; nothing else may flag a row
        assert (result.is_flagged & (result.r_hat <= 1.01)).sum() <= 1

    @pytest.mark.slow
    def test_rows_at_once_are_bounded_by_what_is_stored(self, monkeypatch):
        sizes = []

        class Watched(Bridge):
            def estimate(self, problem):
                sizes.append(problem.density.num_rows)
                return super().estimate(problem)

        exact, x = LinearGaussian.fixture()
        estimator = Watched(num_chains=2, num_draws=8, warmup_steps=3)
        monkeypatch.setattr(chains, "_STORED_NUMBERS", 200)  # 48 of a row with three coordinates
        with preserved_rng():
            EstimatorRun(exact.model, None, ((x.repeat(9, 1),), {}), "auto", 1).estimate(
                estimator, None, progress=False
            )
        assert max(sizes) == 4
        assert sum(sizes) == 9
        monkeypatch.undo()
        assert Bridge().rows_at_once(1) == Bridge().rows_at_once(3) > 500
        assert Bridge().rows_at_once(50) == 50  # of 3,200 draws each
        assert Bridge().rows_at_once(10**6) == 1

    def test_chunks_and_seeds(self):
        problem, _ = rows_of(LinearGaussian.fixture()[0], 5)
        density, noise = problem.density, problem.noise
        estimator = Bridge(num_chains=4, num_draws=40, warmup_steps=40)
        whole, other = estimator.estimate(problem), estimator.estimate(Problem(density, None, noise.fork(1)))
        for part in (slice(0, 2), slice(2, 5)):
            result = estimator.estimate(Problem(density.rows(part), None, noise.rows(part)))
            assert torch.allclose(whole.value[part], result.value, rtol=0, atol=1e-10)
            assert torch.allclose(whole.standard_error[part], result.standard_error, rtol=0, atol=1e-10)
            assert torch.allclose(whole.lower[part], result.lower, rtol=0, atol=1e-10)
        assert not torch.equal(whole.value, other.value)

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("num_chains", 0), ("num_chains", 3), ("num_draws", -2), ("num_draws", 6), ("num_draws", 9),
            ("warmup_steps", 0), ("num_leapfrog", 0), ("target_accept_prob", 1.0),
        ],
    )  # fmt: skip
    def test_bad_settings(self, setting, value):
        with pytest.raises(SettingError, match=setting):
            Bridge(**{setting: value})


def assert_known(known: Known, tolerance: float, **settings) -> None:
    result = bridge(known.model, None, known.x, **settings)
    assert result.value.item() == pytest.approx(known.log_evidence, abs=tolerance)
    assert abs(result.value.item() - known.log_evidence) < 4 * result.standard_error.item()


@pytest.mark.slow
class TestKnownEvidence:
    @pytest.mark.parametrize("make", [bernoulli_decoder, gamma_exponential, dirichlet_multinomial])
    def test_nonlinear_and_conjugate_models(self, make):
        assert_known(make(), 0.02)

    @pytest.mark.parametrize("family", [GammaPoisson, BetaBinomial, LinearGaussian, LinearGaussianStateSpace])
    def test_rows(self, family):
        exact, fixture = family.fixture()
        x = torch.cat([fixture, exact.simulate(50, seed=1)[0].reshape(-1, *fixture.shape[1:])])
        result = bridge(exact.model, None, x)
        errors = result.value - exact.log_marginal(x)
        assert errors.abs().max() < 0.02
        assert (errors / result.standard_error).abs().max() < 4.5
        assert result.is_flagged.double().mean() < 0.1

    def test_eight_schools(self):
        exact, y = EightSchools.fixture()
        result = bridge(exact.model, None, y, data_plate=None)
        assert result.value.item() == pytest.approx(-31.3113474, abs=0.1)
        assert result.label == "joint log evidence"

    @pytest.mark.parametrize("read", [posteriordb.sblrc, posteriordb.ark])
    def test_posteriordb(self, read):
        regression = read()
        result = bridge(regression.model, None, *regression.batch, data_plate=None, warmup_steps=400)
        assert result.value.item() == pytest.approx(regression.log_evidence, abs=0.05)
