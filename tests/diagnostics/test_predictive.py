"""Predictive checks: p-values against posterior and prior predictive distributions that are known."""

import dataclasses
import functools
import itertools
import math

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine

from pyro_aevb.diagnostics.predictive import predictive_check
from pyro_aevb.diagnostics.predictive_plots import plot_check
from pyro_aevb.diagnostics.predictive_result import StatisticCheck
from pyro_aevb.errors import DataError, SettingError
from pyro_aevb.testing import GammaPoisson, LinearGaussian, NormalNormal

DRAWS = 4000
QUIET = {"num_samples": DRAWS, "seed": 0, "progress": False}


def assert_p(found, expected, draws=DRAWS):
    """Hold Monte Carlo p-values against exact ones, within 5 standard errors and a little for those at the ends."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = (expected * (1 - expected) / draws).clamp(min=0).sqrt()
    assert ((found - expected).abs() <= 5 * error + 3 / draws).all(), (found, expected)


def first_entries(x):
    return x[:, 0]


class TestConjugateModels:
    def test_rows_of_a_linear_gaussian_model(self):
        exact, _ = LinearGaussian.fixture()
        x, _ = exact.simulate(40, seed=2)
        x[3] += 3.0
        check = predictive_check(
            exact.model, exact.guide, x, statistics={"first": first_entries, "mean": torch.mean}, **QUIET
        )
        q = exact.posterior(x)["z"]
        weight, bias, noise = exact.weight.double(), exact.bias.double(), exact.noise_variance.double()
        covariance = weight @ q.covariance_matrix @ weight.T + noise.diag()
        mean = q.mean @ weight.T + bias
        assert_p(check.p_values["first(x)"], 1 - dist.Normal(mean[:, 0], covariance[:, 0, 0].sqrt()).cdf(x[:, 0]))
        spread = covariance.sum((1, 2)).sum().sqrt() / x.numel()
        assert_p(check.p_values["mean(x)"], 1 - dist.Normal(mean.mean(), spread).cdf(x.mean()))
        prior = weight @ weight.T + noise.diag()
        first = next(entry for entry in check.checks if entry.statistic == "first")
        assert_p(first.prior_p_value, 1 - dist.Normal(bias[0], prior[0, 0].sqrt()).cdf(x[:, 0]))
        whole = next(entry for entry in check.checks if entry.statistic == "mean")
        expected = dist.Normal(bias.mean(), (prior.sum() * 40).sqrt() / x.numel()).cdf(x.mean())
        assert_p(whole.prior_p_value, 1 - expected)

    def test_ties_of_counts_are_split(self):
        exact = GammaPoisson(num_counts=1)
        x = torch.tensor([[0.0], [2.0], [9.0], [1.0]], dtype=torch.float64)
        check = predictive_check(exact.model, exact.guide, x, statistics={"count": first_entries}, **QUIET)
        # a Poisson count whose rate is Gamma(a, b) is negative binomial
        predictive = scipy.stats.nbinom(exact.concentration + x[:, 0], (exact.rate + 1) / (exact.rate + 2))
        expected = predictive.sf(x[:, 0]) + predictive.pmf(x[:, 0]) / 2
        assert_p(check.p_values["count(x)"], expected)
        prior = scipy.stats.nbinom(exact.concentration, exact.rate / (exact.rate + 1))
        assert_p(check.checks[0].prior_p_value, prior.sf(x[:, 0]) + prior.pmf(x[:, 0]) / 2)

    def test_default_statistics_of_counts(self):
        exact = GammaPoisson(num_counts=1)
        x = torch.tensor([[0.0], [2.0], [9.0], [1.0]], dtype=torch.float64)
        check = predictive_check(exact.model, exact.guide, x, **QUIET)
        by_name = {entry.statistic: entry for entry in check.checks}
        assert list(by_name) == ["mean", "sd", "min", "max", "zeros"]
        observed = {name: entry.observed.item() for name, entry in by_name.items()}
        assert observed == pytest.approx(
            {"mean": 3.0, "sd": x.std(correction=0).item(), "min": 0.0, "max": 9.0, "zeros": 0.25}
        )
        predictive = scipy.stats.nbinom(exact.concentration + x[:, 0], (exact.rate + 1) / (exact.rate + 2))
        zeros = predictive.pmf(0)
        error = math.sqrt((zeros * (1 - zeros)).sum()) / 4 / math.sqrt(DRAWS)
        assert by_name["zeros"].posterior.mean().item() == pytest.approx(zeros.mean(), abs=5 * error)
        none_above = np.prod(predictive.cdf(9)) + np.prod(predictive.cdf(8))
        assert_p(by_name["max"].p_value, 1 - none_above / 2)

    @staticmethod
    def expected_of_normal_normal(exact, x):
        """Mean and sd of the mean of replicated data, from the posterior and from the prior predictive."""
        g, (slope, variance) = exact.posterior(x)["g"], exact._local_posterior()
        own = (variance + exact.noise_scale**2) / len(x)
        posterior = dist.Normal(slope * g.mean + (1 - slope) * x.mean(), (slope**2 * g.variance + own).sqrt())
        of_row = (exact.local_scale**2 + exact.noise_scale**2) / len(x)
        prior = dist.Normal(x.new_zeros(()), math.sqrt(exact.global_scale**2 + of_row))
        return posterior, prior

    @pytest.mark.parametrize("data_plate", ["auto", None])
    def test_globals_are_one_draw_for_all_rows(self, data_plate):
        exact, x = NormalNormal.fixture()
        check = predictive_check(
            exact.model, exact.guide, x, statistics={"mean": torch.mean}, data_plate=data_plate, **QUIET
        )
        posterior, prior = self.expected_of_normal_normal(exact, x)
        (entry,) = check.checks
        for draws, expected in ((entry.posterior, posterior), (entry.prior, prior)):
            assert draws.mean().item() == pytest.approx(
                expected.mean.item(), abs=5 * expected.stddev.item() / DRAWS**0.5
            )
            assert draws.std().item() == pytest.approx(expected.stddev.item(), rel=5 / (2 * DRAWS) ** 0.5)
        assert_p(entry.p_value, 1 - posterior.cdf(x.mean()))
        assert check.posterior_predictive["x"].shape == (1, 100, 8)

    def test_models_that_draw_their_own_rows_share_globals_between_chunks(self):
        exact, data = NormalNormal.fixture()
        data = data[:7]  # the second chunk of four is padded

        def model(x):
            g = pyro.sample("g", dist.Normal(x.new_zeros(()), exact.global_scale))
            with pyro.plate("data", len(x), subsample_size=4) as rows:
                z = pyro.sample("z", dist.Normal(g, exact.local_scale))
                pyro.sample("x", dist.Normal(z, exact.noise_scale), obs=x[rows])

        def guide(x):
            g = pyro.sample("g", dist.Normal(x.new_zeros(()), 3.0))
            with pyro.plate("data", len(x), subsample_size=4):
                pyro.sample("z", dist.Normal(g, 0.1))

        check = predictive_check(model, guide, data, statistics={"mean": torch.mean}, **QUIET)
        (entry,) = check.checks
        assert check.observed_data["x"].shape == (7,)
        assert check.posterior_predictive["x"].shape == (1, 100, 7)
        assert entry.observed.item() == pytest.approx(data.mean().item())
        posterior = math.sqrt(3.0**2 + (0.1**2 + exact.noise_scale**2) / 7)
        prior = math.sqrt(exact.global_scale**2 + (exact.local_scale**2 + exact.noise_scale**2) / 7)
        for draws, expected in ((entry.posterior, posterior), (entry.prior, prior)):
            assert draws.std().item() == pytest.approx(expected, rel=5 / (2 * DRAWS) ** 0.5)

    def test_blocks_of_draws_are_independent_of_each_other(self):
        exact, x = NormalNormal.fixture()
        many = x.repeat(3000)  # two draws a block
        guide = functools.partial(exact.guide, data=x)
        check = predictive_check(
            exact.model,
            guide,
            many,
            statistics={"mean": torch.mean},
            num_samples=101,
            num_kept=3,
            seed=0,
            progress=False,
        )
        (entry,) = check.checks
        slope, _ = exact._local_posterior()
        expected = slope * exact.posterior(x)["g"].stddev.item()
        assert entry.posterior.std().item() == pytest.approx(expected, rel=5 / 200**0.5)
        assert entry.posterior.shape == (101,)
        assert check.posterior_predictive["x"].shape == (1, 3, len(many))

    def test_a_wrong_likelihood_is_told(self):
        x = 2**0.5 * dist.StudentT(2.0).sample((500,))

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

        check = predictive_check(model, guide, x, num_samples=300, seed=0, progress=False)
        extreme = {entry.statistic for entry in check.checks if entry.is_extreme}
        assert {"sd", "max"} <= extreme


class TestMissingData:
    x = torch.tensor([[1.0, -0.5, 2.0], [0.3, 0.8, -1.0], [2.2, 1.9, 1.0], [-1.0, 0.2, 0.1]])
    known = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)

    @staticmethod
    def with_obs_mask(x, known):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=known)

    @staticmethod
    def with_mask(x, known):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("columns", 3, dim=-1), poutine.mask(mask=known):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @staticmethod
    def guide(x, known):
        count = known.sum(1, keepdim=True)
        total = torch.where(known, x, 0.0).sum(1, keepdim=True)
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(total / (1 + count), (1.0 + count) ** -0.5))

    @pytest.mark.parametrize("name", ["with_obs_mask", "with_mask"])
    def test_missing_entries_are_left_out_of_both_sides(self, name):
        model = getattr(self, name)
        x = self.x.where(self.known, 1e3)
        check = predictive_check(model, self.guide, x, self.known, **QUIET)
        observed = torch.from_numpy(check.observed_data["x"])
        assert torch.equal(observed.isnan(), ~self.known)
        assert torch.equal(observed[self.known], self.x[self.known])
        replicated = check.posterior_predictive["x"]
        assert (np.isnan(replicated) == ~self.known.numpy()).all()
        count, total = self.known.sum(1), torch.where(self.known, self.x, 0.0).sum(1)
        by_name = {entry.statistic: entry for entry in check.checks}
        assert by_name["max"].observed.item() == pytest.approx(2.2)
        # row sums are independent: mean k m, variance k^2 / (1 + k) + k
        size = int(self.known.sum())
        mean = (count * total / (1 + count)).sum() / size
        variance = (count**2 / (1 + count) + count).sum() / size**2
        expected = 1 - dist.Normal(mean, variance.sqrt()).cdf(total.sum() / size)
        assert_p(by_name["mean"].p_value, expected)
        prior = 1 - dist.Normal(0.0, ((count**2 + count).sum() / size**2).sqrt()).cdf(total.sum() / size)
        assert_p(by_name["mean"].prior_p_value, prior)

    def test_statistics_of_the_users_see_nan(self):
        seen = []

        def share_missing(data):
            seen.append(data.isnan().sum().item())
            return data.nansum(-1)

        predictive_check(
            self.with_obs_mask,
            self.guide,
            self.x,
            self.known,
            statistics={"sum": share_missing},
            num_samples=3,
            progress=False,
        )
        assert set(seen) == {3}


class TestSites:
    def test_statistics_suit_the_site(self):
        def model(yes, kind, code, level):
            with pyro.plate("data", len(yes)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("yes", dist.Bernoulli(logits=z[..., None].expand(*z.shape, 5)).to_event(1), obs=yes)
                pyro.sample("kind", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])), obs=kind)
                pyro.sample("code", dist.OneHotCategorical(torch.tensor([0.1, 0.9])), obs=code)
                pyro.sample("level", dist.Normal(z, 1.0), obs=level)

        def guide(yes, kind, code, level):
            with pyro.plate("data", len(yes)):
                pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

        kind = torch.tensor([0, 1, 1, 1])
        code = torch.tensor([[0.0, 1.0]] * 4)
        yes = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]] * 4)
        batch = (yes, kind, code, torch.randn(4))
        check = predictive_check(model, guide, *batch, **QUIET | {"num_samples": 2000})
        by_name = {entry.name: entry for entry in check.checks}
        names = "mean(yes) row_mean_sd(yes) shares(kind) shares(code) mean(level) sd(level) min(level) max(level)"
        assert list(by_name) == names.split()
        assert by_name["mean(yes)"].observed.item() == pytest.approx(0.6)
        assert by_name["shares(kind)"].observed.tolist() == [0.25, 0.75, 0.0]
        expected = torch.tensor([0.5, 0.3, 0.2]).double()
        error = (expected * (1 - expected) / 8000).sqrt()
        assert ((by_name["shares(kind)"].posterior.mean(0) - expected).abs() < 5 * error).all()
        assert by_name["shares(code)"].observed.tolist() == [0.0, 1.0]
        assert_p(by_name["shares(code)"].p_value[1], 0.9**4 / 2, draws=2000)
        text = repr(check)
        assert "mean(yes)" in text
        assert "shares(kind): " in text
        frame = check.to_pandas()
        assert "shares(kind)[2]" in frame.index
        assert frame.loc["mean(yes)", "observed"] == pytest.approx(0.6)

    def test_functions_for_one_site_and_a_site_outside_the_rows(self):
        def model(x):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            pyro.sample("anchor", dist.Normal(g, 1.0), obs=torch.tensor(0.5))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(g, 1.0), obs=x)

        def guide(x):
            pyro.sample("g", dist.Normal(0.25, 1e-3))

        check = predictive_check(
            model, guide, torch.randn(6), statistics={"anchor": {"itself": lambda value: value}}, **QUIET
        )
        assert list(check.p_values) == ["itself(anchor)"]
        assert_p(check.p_values["itself(anchor)"], 1 - dist.Normal(0.25, 1.0).cdf(torch.tensor(0.5)))
        assert check.posterior_predictive["anchor"].shape == (1, 100)
        assert check.posterior_predictive["x"].shape == (1, 100, 6)


class TestResult:
    def check(self, **settings):
        exact, _ = LinearGaussian.fixture()
        x, _ = exact.simulate(10, seed=2)
        settings = {"num_samples": 50, "num_kept": 20, "seed": 0, "progress": False} | settings
        return predictive_check(exact.model, exact.guide, x, **settings)

    def test_a_seed_reproduces_and_leaves_the_generator(self):
        state = torch.get_rng_state()
        one, other = self.check(), self.check()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(one.p_values[name], other.p_values[name]) for name in one.p_values)

    def test_arviz_takes_it(self):
        matplotlib.use("Agg")
        check = self.check()
        data = az.from_dict(
            posterior_predictive=check.posterior_predictive,
            prior_predictive=check.prior_predictive,
            observed_data=check.observed_data,
        )
        assert dict(data.posterior_predictive.sizes)["draw"] == 20
        for group in ("posterior", "prior"):
            axes = az.plot_ppc(data, group=group, num_pp_samples=5, random_seed=0)
            assert len(np.atleast_1d(axes)) == 1
        matplotlib.pyplot.close("all")

    def test_p_values_count_ties_by_half_and_carry_nan(self):
        draws = torch.tensor([[0.0, 1.0], [1.0, math.nan], [1.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
        entry = StatisticCheck("x", "t", torch.tensor([1.0, 1.0], dtype=torch.float64), draws, draws)
        assert entry.p_value[0].item() == (1 + 2 / 2) / 4
        assert entry.p_value[1].isnan()
        assert not entry.is_extreme[1]

    @pytest.mark.parametrize("place", [0.0, 1.5])
    def test_the_error_is_that_of_a_share(self, place):
        draws = torch.randn(300, 1000, dtype=torch.float64)  # a thousand p-values of one truth, each of 300 draws
        entry = StatisticCheck("x", "t", torch.full((1000,), place, dtype=torch.float64), draws, draws)
        spread = (entry.p_value - dist.Normal(0.0, 1.0).cdf(torch.tensor(-place))).square().mean().sqrt().item()
        assert entry.p_error.mean().item() == pytest.approx(spread, rel=5 / 2000**0.5)

    def test_the_error_is_never_0(self):
        draws = torch.randn(100, dtype=torch.float64)
        entry = StatisticCheck("x", "t", torch.tensor(9.0, dtype=torch.float64), draws, draws)
        assert entry.p_value.item() == 0.0
        assert entry.p_error.item() == pytest.approx(1 / 102, rel=0.01)

    def test_picture(self):
        check = self.check(statistics={"mean": torch.mean, "first": first_entries, "max": torch.max, "sd": torch.std})
        figure = plot_check(check)
        assert len([ax for ax in figure.axes if ax.axison]) == 4
        first = figure.axes[0]
        line = first.lines[0].get_xdata()[0]
        assert line == pytest.approx(check.checks[0].observed.item())
        assert first.get_xlabel() == "mean(x)"
        assert f"{check.checks[0].p_value.item():.3f}" in first.get_title(loc="left")
        heights = sum(patch.get_height() for patch in figure.axes[1].patches)
        assert heights == 10  # a p-value for each row

    def test_long_numbers_do_not_run_into_each_other(self):
        draws = torch.linspace(0.2872, 0.2997, 100, dtype=torch.float64)
        entry = StatisticCheck("x", "black", draws[40], draws, draws)
        figure = plot_check(dataclasses.replace(self.check(), checks=(entry,) * 3))
        figure.draw_without_rendering()
        ticks = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
        assert len(ticks) >= 3
        assert all(left.x1 + 10 < right.x0 for left, right in itertools.pairwise(ticks))  # a digit's width


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_samples": 0}, "num_samples must be an integer of at least 1"),
            ({"num_kept": 0}, "num_kept"),
            ({"num_sample": 3}, "num_samples"),
            ({"statistics": {}}, "statistics is empty"),
            ({"statistics": {"mean": 3.0}}, "got float for 'mean'"),
            ({"statistics": {"y": {"mean": torch.mean}}}, r"sites \['y'\]; the model observes \['x'\]"),
            ({"statistics": {"bad": lambda x: x.reshape(7)}}, "'bad' failed on data of site 'x' of shape"),
            ({"statistics": {"odd": lambda x: x[x > 0]}}, "'odd' of site 'x' has shape"),
        ],
    )
    def test_settings(self, settings, message):
        exact, x = LinearGaussian.fixture()
        with pytest.raises(SettingError, match=message):
            predictive_check(exact.model, exact.guide, x, progress=False, **settings)

    def test_no_rows(self):
        exact, x = LinearGaussian.fixture()
        with pytest.raises(DataError, match="no rows"):
            predictive_check(exact.model, exact.guide, x[:0], progress=False)

    def test_nothing_observed(self):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        with pytest.raises(ValueError, match="observes nothing"):
            predictive_check(model, model, torch.zeros(3), progress=False)
