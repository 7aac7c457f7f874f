"""log p(x) by importance sampling: equal to closed forms under exact guides, unbiased within its error under others."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from known_evidence import bernoulli_decoder
from torch import nn

from pyro_aevb import log_marginal
from pyro_aevb.errors import ModelError, SettingError, UnreliableWarning
from pyro_aevb.evidence.gaussian import RowGaussian
from pyro_aevb.evidence.importance import Importance, _propose_around
from pyro_aevb.evidence.problem import Problem
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.testing import (
    BetaBinomial,
    EightSchools,
    GammaPoisson,
    LinearGaussian,
    LinearGaussianStateSpace,
    NormalNormal,
)

ROWWISE = [BetaBinomial, GammaPoisson, LinearGaussian, LinearGaussianStateSpace]
quiet = functools.partial(log_marginal, progress=False)


@pytest.mark.filterwarnings("ignore::pyro_aevb.errors.UnreliableWarning")  # one draw leaves no error to estimate
@pytest.mark.parametrize("num_samples", [1, 2, 100, 5000])
@pytest.mark.parametrize("family", ROWWISE)
def test_with_the_exact_posterior_every_number_of_draws_gives_the_closed_form(family, num_samples):
    exact, fixture = family.fixture()
    rows = torch.cat([fixture, exact.simulate(4, seed=1)[0].reshape(-1, *fixture.shape[1:])])
    result = quiet(exact.model, exact.guide, rows, num_samples=num_samples, seed=0)
    assert result.value.dtype == torch.float64
    assert torch.allclose(result.value, exact.log_marginal(rows), rtol=0, atol=1e-8)
    if num_samples > 1:
        assert result.standard_error.max() < 1e-8
        assert torch.allclose(result.ess, torch.full_like(result.ess, num_samples), rtol=1e-8)
    assert not (result.k_hat > 0.7).any()


@pytest.mark.filterwarnings("ignore::pyro_aevb.errors.UnreliableWarning")
@pytest.mark.parametrize("num_samples", [1, 2, 100, 5000])
def test_joint_evidence_of_a_model_without_rows(num_samples):
    exact, x = NormalNormal.fixture()
    result = quiet(exact.model, exact.guide, x, num_samples=num_samples, data_plate=None, seed=0)
    assert result.value.shape == (1,)
    assert result.value.item() == pytest.approx(exact.log_marginal(x).item(), abs=1e-8)
    assert "joint log evidence" in repr(result)


class PriorGuide:
    """Draws the linear-Gaussian latents from a normal that is somewhat too wide, so that weights vary and stay bounded."""

    def __init__(self, exact):
        self.exact = exact

    def __call__(self, x):
        best = self.exact.posterior(x)["z"]
        wide = dist.MultivariateNormal(best.mean + 0.1, covariance_matrix=1.5 * best.covariance_matrix)
        with pyro.plate("data", len(x)):
            pyro.sample("z", wide)


class TestError:
    exact = LinearGaussian.fixture()[0]
    x = exact.simulate(200, seed=3)[0]

    def test_the_standard_error_is_that_of_the_value(self):
        result = quiet(self.exact.model, PriorGuide(self.exact), self.x, num_samples=1000, seed=0)
        z = (result.value - self.exact.log_marginal(self.x)) / result.standard_error
        # 200 independent standard normals but for the small bias of a logarithm: 5 standard errors of their moments
        assert z.abs().max() < 5
        assert abs(z.mean().item()) < 5 / math.sqrt(200)
        assert abs(z.std().item() - 1) < 5 / math.sqrt(400)
        assert set(result.status) == {"ok"}

    def test_the_default_is_5000_draws(self):
        assert quiet(self.exact.model, self.exact.guide, self.x[:2]).num_samples == 5000

    def test_the_mean_field_guide_is_flagged(self):
        # its weights have a tail of k = .92 even when it is trained perfectly; one row of 5000 draws may miss that
        guide = self.exact.mean_field_guide(at_optimum=True)
        with pytest.warns(UnreliableWarning):
            result = quiet(self.exact.model, guide, self.x[:50], num_samples=2000, seed=0)
        assert result.k_hat.median() > 0.7
        assert result.standard_error[result.k_hat > 0.7].isnan().all()


class TestChunks:
    exact = LinearGaussian.fixture()[0]
    x = exact.simulate(10, seed=3)[0]

    @pytest.mark.parametrize("chunk_size", [1, 3, 10, 99])
    def test_rows_keep_their_order_and_place(self, chunk_size):
        result = quiet(self.exact.model, self.exact.guide, self.x, num_samples=5, chunk_size=chunk_size)
        assert torch.allclose(result.value, self.exact.log_marginal(self.x), rtol=0, atol=1e-8)

    def test_chunks_bound_what_is_in_memory(self):
        rows = []

        def model(x):
            if x.shape[0] > 2:
                rows.append(len(x))
            self.exact.model(x)

        quiet(model, self.exact.guide, self.x, num_samples=5, chunk_size=4)
        assert max(rows) == 4

    def test_one_seed_and_chunk_size_give_the_same_numbers(self):
        guide = PriorGuide(self.exact)

        def run(seed, chunk_size):
            return quiet(self.exact.model, guide, self.x, num_samples=50, seed=seed, chunk_size=chunk_size).value

        before = torch.get_rng_state()
        first = run(1, 4)
        assert torch.equal(before, torch.get_rng_state())
        torch.randn(3)
        assert torch.equal(first, run(1, 4))
        assert not torch.equal(first, run(2, 4))

    def test_the_bar_can_be_silent(self, capsys):
        quiet(self.exact.model, self.exact.guide, self.x, num_samples=5)
        assert capsys.readouterr().err == ""
        log_marginal(self.exact.model, self.exact.guide, self.x, num_samples=5)
        assert "10/10" in capsys.readouterr().err


class TestGlobals:
    exact, data = NormalNormal.fixture()
    new = torch.tensor([-3.0, 0.0, 0.7, 5.0], dtype=torch.float64)

    def run(self, **settings):
        guide = functools.partial(self.exact.guide, data=self.data)
        return quiet(self.exact.model, guide, self.new, **({"seed": 0, "num_samples": 1} | settings))

    def test_it_is_the_predictive_density_under_q_of_the_globals(self):
        # given g the guide is exact: a weight is p(x | g), and all error is that of 4000 draws of g
        result = self.run(num_global_samples=4000)
        error = (result.value - self.exact.log_predictive(self.new, self.data)).abs()
        assert (error < 4.5 * result.standard_error).all()
        assert (result.standard_error > 0).all()
        assert (result.standard_error < 0.1).all()
        assert "predictive" in result.label

    def test_rows_share_the_draws_of_the_globals_whatever_the_chunks(self):
        values = [self.run(num_global_samples=8, chunk_size=chunk_size).value for chunk_size in (1, 2, 4)]
        # the first chunk's globals come first from the generator, and a weight depends on nothing else
        assert torch.allclose(values[0], values[2], rtol=0, atol=1e-10)
        assert torch.allclose(values[1], values[2], rtol=0, atol=1e-10)

    @pytest.mark.filterwarnings("ignore::pyro_aevb.errors.UnreliableWarning")
    def test_one_draw_of_the_globals_is_called_that(self):
        result = self.run(num_samples=200)
        assert "one draw" in result.label
        spread = self.exact.local_scale**2 + self.exact.noise_scale**2
        # log p(x | g) of the same g in all rows: a quadratic in x whose curvature is known
        left, middle, right = result.value[[0, 1, 3]].tolist()
        slope_left, slope_right = (middle - left) / 3, (right - middle) / 5
        assert slope_right - slope_left == pytest.approx(-(5 + 3) / 2 / spread, rel=1e-8)


class SchoolsGuide(nn.Module):
    """A guide for eight schools that is wide enough for bounded weights: prior of mu and tau, exact effects given them."""

    def forward(self, y):
        mu = pyro.sample("mu", dist.Normal(y.new_tensor(4.4), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
        variance = y.new_tensor(EightSchools().standard_errors) ** 2
        with pyro.plate("schools", len(y)):
            spread = variance + tau**2
            pyro.sample("theta_trans", dist.Normal(tau * (y - mu) / spread, (variance / spread).sqrt()))


def test_joint_evidence_of_eight_schools():
    exact, y = EightSchools.fixture()
    result = quiet(exact.model, SchoolsGuide(), y, data_plate=None, num_samples=20_000, seed=0)
    assert result.value.item() == pytest.approx(-31.3113474, abs=4 * result.standard_error.item())
    assert result.standard_error.item() < 0.05
    assert result.label == "joint log evidence"


class TestPrograms:
    def own_rows(self, size):
        exact = LinearGaussian.fixture()[0]

        def model(x):
            with pyro.plate("data", len(x), subsample_size=size) as index:
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                loc = z @ exact.weight.T + exact.bias
                pyro.sample("x", dist.Normal(loc, exact.noise_variance.sqrt()).to_event(1), obs=x[index])

        def guide(x):
            with pyro.plate("data", len(x), subsample_size=size) as index:
                posterior = exact.posterior(x[index])["z"]
                pyro.sample("z", dist.MultivariateNormal(posterior.mean, posterior.covariance_matrix))

        return exact, model, guide

    @pytest.mark.parametrize("size", [1, 2, 4, 7])
    def test_a_model_that_draws_its_own_rows_runs_in_chunks_of_that_size(self, size):
        exact, model, guide = self.own_rows(size)
        x = exact.simulate(10, seed=1)[0]
        result = quiet(model, guide, x, num_samples=3)
        assert torch.allclose(result.value, exact.log_marginal(x), rtol=0, atol=1e-8)

    def test_one_that_draws_from_a_fixed_number_of_rows_is_refused(self):
        def program(x):
            with pyro.plate("data", 10, subsample_size=4) as index:
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        def guide(x):
            with pyro.plate("data", 10, subsample_size=4):
                pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

        with pytest.raises(ModelError, match=r"by itself|index 4 is out of|out of bounds"):
            quiet(program, guide, torch.zeros(10), num_samples=3)

    def test_a_plate_of_the_whole_data_set_is_left_alone(self):
        exact = LinearGaussian.fixture()[0]
        x = exact.simulate(30, seed=1)[0]

        def sized(program):
            def run(batch):
                with pyro.plate("data", 20, subsample_size=len(batch)):
                    z = pyro.sample("z", exact.posterior(batch)["z"] if program == "guide" else PRIOR)
                    if program == "model":
                        likelihood = dist.Normal(z @ exact.weight.T + exact.bias, exact.noise_variance.sqrt())
                        pyro.sample("x", likelihood.to_event(1), obs=batch)

            return run

        PRIOR = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
        # no scale of the plate enters a weight, and 30 rows run through a plate of 20
        result = quiet(sized("model"), sized("guide"), x, num_samples=3)
        assert torch.allclose(result.value, exact.log_marginal(x), rtol=0, atol=1e-8)

    def test_masked_rows_weigh_nothing(self):
        def model(x, seen):
            with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x, seen):
            with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen):
                pyro.sample("z", dist.Normal(torch.where(seen, x, 0.0) / 2, 0.5**0.5))

        x, seen = torch.tensor([1.0, math.nan, -2.0]).double(), torch.tensor([True, False, True])
        result = quiet(model, guide, x, seen=seen, num_samples=200)
        expected = np.where(seen, dist.Normal(0.0, 2**0.5).log_prob(torch.nan_to_num(x)).numpy(), 0.0)
        assert np.allclose(result.value.numpy(), expected, atol=1e-8)

    def test_batchnorm_runs_in_eval_mode_and_stays_as_it_was(self):
        exact, x = LinearGaussian.fixture()
        rows = x.expand(4, -1)

        class Guide(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(6, affine=False, eps=0.0).double()

            def forward(self, x):
                exact.guide(self.norm(x))

        guide = Guide()
        result = quiet(
            exact.model, guide, rows, num_samples=50
        )  # with batch statistics of equal rows all would be 0 / 0
        assert torch.allclose(result.value, exact.log_marginal(rows), atol=1e-8)
        assert guide.training
        assert guide.norm.num_batches_tracked == 0

    def test_the_param_store_is_left_alone(self):
        exact, x = LinearGaussian.fixture()
        quiet(exact.model, exact.mean_field_guide(), x, num_samples=300)
        assert len(pyro.get_param_store()) == 0


def counts(x):
    """Observe counts of an exponential rate: its logarithm has a tail that is heavier than any Gaussian's."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(1.0), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


@pytest.mark.slow
def test_a_fitted_proposal_covers_tails_heavier_than_a_gaussians():
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    result = quiet(counts, None, x, proposal="fitted", num_samples=2000, seed=0)
    exact = dist.GammaPoisson(1.0, x.new_tensor(1.0)).log_prob(x)
    assert (result.k_hat < 0.5).all()
    assert (result.standard_error < 0.05).all()
    assert ((result.value - exact).abs() < 4 * result.standard_error).all()


def test_a_fitted_proposal_needs_a_draw_of_each_part():
    with pytest.raises(SettingError, match="at least 5, got 4"):
        quiet(counts, None, torch.ones(2), proposal="fitted", num_samples=4)


def test_a_problems_rows_are_weighed_by_their_guide():
    exact, x = LinearGaussian.fixture()
    x = torch.cat([x, x + 0.5])
    noise = RowNoise(0, torch.arange(2), dtype=torch.float64)
    with torch.no_grad():
        density = LogDensity(exact.model, x)
        problem = Problem(density=density, guide=GuideDensity(exact.guide, density), noise=noise)
        result = Importance(num_samples=200).estimate(problem)
    torch.testing.assert_close(result.value, exact.log_marginal(x), rtol=0, atol=1e-8)
    assert result.k_hat.isneginf().all()


def test_the_prior_as_the_guide_of_the_nonlinear_decoder():
    known = bernoulli_decoder()

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    result = quiet(known.model, prior, known.x, num_samples=5000, seed=0)
    # 3.5 of the standard errors of .023 that 5,000 draws of the prior have
    assert result.value.item() == pytest.approx(known.log_evidence, abs=0.08)
    assert 0.015 < result.standard_error.item() < 0.03


def test_draws_of_a_fitted_proposal_are_weighed_where_the_model_is_evaluated():
    noise = RowNoise(0, torch.arange(2), dtype=torch.float32)
    with torch.no_grad():
        problem = Problem(density=LogDensity(counts, torch.ones(2)), guide=None, noise=noise)
    q = RowGaussian(torch.full((2, 1), 1e4).double(), torch.ones(2, 1).double())
    u, log_density = _propose_around(problem, q, 100)
    assert torch.equal(u, u.float().double())
    narrow, wide = (dist.Normal(1e4, torch.tensor(sd).double()).log_prob(u[..., 0]).exp() for sd in (1.0, 2.0))
    assert torch.allclose(log_density(u), ((narrow + wide) / 2).log(), rtol=0, atol=1e-9)


def test_an_unknown_method_lists_the_known():
    exact, x = LinearGaussian.fixture()
    with pytest.raises(SettingError, match=r"'aiss'.*'importance'"):
        quiet(exact.model, exact.guide, x, method="aiss")


def wide_guide(exact):
    """The exact posterior's mean with 1.5 times its covariance: weights are bounded, and their errors are honest."""

    def guide(x):
        best = exact.posterior(x)["z"]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(best.mean, covariance_matrix=1.5 * best.covariance_matrix))

    return guide


def test_two_standard_errors_cover_the_truth_as_often_as_they_should():
    exact = LinearGaussian.fixture()[0]
    x = exact.simulate(1000, seed=11)[0]
    result = quiet(exact.model, wide_guide(exact), x, num_samples=5000, seed=0)
    is_covered = (result.value - exact.log_marginal(x)).abs() <= 2 * result.standard_error
    # 95.4 % of 1,000 rows, 4 standard errors of a share
    assert 0.925 <= is_covered.double().mean().item() <= 0.98
    assert not result.is_flagged.any()


@pytest.mark.filterwarnings("ignore::pyro_aevb.errors.UnreliableWarning")
def test_the_best_mean_field_guide_is_flagged_in_most_rows():
    exact = LinearGaussian.fixture()[0]
    x = exact.simulate(1000, seed=12)[0]
    result = quiet(exact.model, exact.mean_field_guide(at_optimum=True), x, num_samples=5000, seed=0)
    assert result.is_flagged.double().mean() >= 0.8
