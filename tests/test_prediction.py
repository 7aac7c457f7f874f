"""Draws and summaries of rows: shapes of the contract, moments within standard errors of closed forms, seeds."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_aevb import embed, posterior, predict, reconstruct, simulate
from pyro_aevb.errors import ParticleWarning
from pyro_aevb.testing import BetaBinomial, GammaPoisson, LinearGaussian, LinearGaussianStateSpace, NormalNormal

EXACT = [BetaBinomial, GammaPoisson, LinearGaussian, LinearGaussianStateSpace]


def assert_mean(draws, expected, stddev, failures=5.0):
    """Hold the mean over axis 0 against its expectation, within that many standard errors."""
    error = stddev / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= failures * error).all()


class TestShapes:
    def shapes(self, draws):
        return {name: tuple(value.shape) for name, value in draws.items()}

    def programs(self, dims):
        def run(x, *, site):
            with pyro.plate("features", 5):
                pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), dim=dims[0]):
                a = pyro.sample("a", dist.Normal(0.0, 1.0))
                if site == "model":
                    observed = x.reshape(-1, *[1] * (-(dims[0] or -1) - 1))
                    pyro.sample("x", dist.Normal(a, 1.0), obs=observed)
                with pyro.plate("outer", 3, dim=dims[1]):
                    b = pyro.sample("b", dist.Normal(a, 1.0))
                    with pyro.plate("inner", 2, dim=dims[2]):
                        pyro.sample("c", dist.Normal(b[..., None], torch.ones(4)).to_event(1))

        return functools.partial(run, site="model"), functools.partial(run, site="guide")

    @pytest.mark.parametrize("dims", [(-3, -2, -1), (-1, -2, -3), (None, None, None)])
    @pytest.mark.parametrize("rows", [1, 6])
    def test_rows_come_first_then_inner_plates_from_outer_to_inner_then_the_event(self, dims, rows):
        model, guide = self.programs(dims)
        settings = {"num_samples": 7}
        draws = posterior(model, guide, torch.zeros(rows), **settings)
        expected = {"g": (7, 5), "a": (7, rows), "b": (7, rows, 3), "c": (7, rows, 3, 2, 4)}
        assert self.shapes(draws) == expected
        chunked = posterior(model, guide, torch.zeros(rows), chunk_size=4, **settings)
        assert self.shapes(chunked) == expected
        assert self.shapes(posterior(model, guide, torch.zeros(rows), num_samples=1)) == {
            name: (1, *shape[1:]) for name, shape in expected.items()
        }

    @pytest.mark.parametrize("dims", [(-3, -2, -1), (-1, -2, -3), (None, None, None)])
    def test_inner_plates_hold_what_belongs_to_them(self, dims):
        model, guide = self.programs(dims)
        draws = posterior(model, guide, torch.zeros(2), num_samples=4000, seed=0)
        # c - b is noise of variance 1; another order of the plates would compare strangers, of variance 3 and more
        residual = draws["c"] - draws["b"][..., None, None]
        assert residual.var().item() == pytest.approx(1.0, abs=0.05)

    @pytest.mark.parametrize("dims", [(-1, -2), (None, None)])
    def test_rows_come_first_wherever_their_plate_is(self, dims):
        def run(x, *, site):
            with pyro.plate("data", len(x), dim=dims[0]):
                a = pyro.sample("a", dist.Normal(0.0, 1.0))
                if site == "model":
                    pyro.sample("x", dist.Normal(a, 1.0), obs=x)
                with pyro.plate("inner", 3, dim=dims[1]):
                    pyro.sample("b", dist.Normal(a[..., None], torch.ones(4)).to_event(1))

        programs = functools.partial(run, site="model"), functools.partial(run, site="guide")
        draws = posterior(*programs, torch.zeros(6), num_samples=4000, seed=0)
        assert self.shapes(draws) == {"a": (4000, 6), "b": (4000, 6, 3, 4)}
        assert (draws["b"] - draws["a"][..., None, None]).var().item() == pytest.approx(1.0, abs=0.05)

    def test_embedding_and_reconstruction_have_no_axis_of_draws(self):
        model, guide = self.programs((-3, -2, -1))
        shapes = self.shapes(embed(model, guide, torch.zeros(6)))
        assert shapes == {"g": (5,), "a": (6,), "b": (6, 3), "c": (6, 3, 2, 4)}
        assert self.shapes(reconstruct(model, guide, torch.zeros(6))) == {"x": (6,)}
        assert self.shapes(predict(model, guide, torch.zeros(6), num_samples=2)) == {"x": (2, 6)}

    def test_simulated_rows(self):
        model, _ = self.programs((-3, -2, -1))
        shapes = self.shapes(simulate(model, torch.zeros(4), num_rows=9))
        assert shapes == {"g": (5,), "a": (9,), "b": (9, 3), "c": (9, 3, 2, 4), "x": (9,)}


class TestPosterior:
    @pytest.mark.parametrize("family", EXACT)
    def test_moments_of_an_exact_guide(self, family):
        exact, fixture = family.fixture()
        x = torch.cat([fixture, exact.simulate(5, seed=1)[0].reshape(-1, *fixture.shape[1:])])
        draws = posterior(exact.model, exact.guide, x, num_samples=4000, seed=0)
        for name, marginal in exact.posterior(x).items():
            mean, variance = marginal.mean, marginal.variance
            assert draws[name].shape == (4000, *mean.shape)
            assert_mean(draws[name], mean, variance.sqrt())
            squares = (draws[name] - mean) ** 2
            assert_mean(squares, variance, squares.std(0))

    @pytest.mark.parametrize("chunk_size", [None, 3])
    def test_draws_of_one_index_belong_together(self, chunk_size):
        exact, x = NormalNormal.fixture()
        guide = functools.partial(exact.guide, data=x)
        draws = posterior(exact.model, guide, x, num_samples=4000, chunk_size=chunk_size, seed=0)
        marginals = exact.posterior(x)
        assert_mean(draws["g"], marginals["g"].mean, marginals["g"].stddev)
        assert_mean(draws["z"], marginals["z"].mean, marginals["z"].stddev)
        # z = slope g + ... + noise in every row, those of the last chunk too
        slope, variance = exact._local_posterior()
        residual = draws["z"] - slope * draws["g"][:, None]
        assert_mean((residual - residual.mean(0)) ** 2, variance, variance * math.sqrt(2))
        together = torch.cov(torch.stack([draws["g"], draws["z"][:, -1]]))[0, 1]
        expected = slope * marginals["g"].stddev ** 2
        spread = marginals["g"].stddev * marginals["z"].stddev[-1]
        assert abs(together - expected) < 5 * math.sqrt(2) * spread / math.sqrt(4000)

    def test_the_param_store_and_the_modes_are_left_alone(self):
        exact, x = LinearGaussian.fixture(torch.float32)
        guide = exact.mean_field_guide(dtype=torch.float32)
        posterior(exact.model, guide, x, num_samples=3)
        assert guide.training
        assert len(pyro.get_param_store()) == 0

    def test_two_pyro_modules_of_one_name_keep_their_own_parameters(self):
        class Guide(pyro.nn.PyroModule):
            def __init__(self, loc):
                super().__init__()
                self.loc = pyro.nn.PyroParam(torch.tensor(loc))

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(self.loc, 1e-6))

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        first, second = Guide(1.0), Guide(2.0)
        for guide, loc in ((first, 1.0), (second, 2.0), (first, 1.0)):
            assert posterior(model, guide, torch.zeros(2), num_samples=2)["z"].mean().item() == pytest.approx(
                loc, abs=1e-4
            )

    def test_a_model_that_draws_its_own_rows(self):
        exact = LinearGaussian.fixture()[0]
        x = exact.simulate(10, seed=1)[0]

        def run(x, *, site):
            with pyro.plate("data", len(x), subsample_size=4) as index:
                rows = x[index]
                z = pyro.sample("z", exact.posterior(rows)["z"] if site == "guide" else PRIOR)
                if site == "model":
                    pyro.sample("x", dist.Normal(z @ exact.weight.T + exact.bias, 1.0).to_event(1), obs=rows)

        PRIOR = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
        programs = functools.partial(run, site="model"), functools.partial(run, site="guide")
        draws = posterior(*programs, x, num_samples=2000, seed=0)["z"]
        marginal = exact.posterior(x)["z"]
        assert_mean(draws, marginal.mean, marginal.variance.sqrt())
        assert embed(*programs, x)["z"].shape == (10, 3)
        assert torch.allclose(embed(*programs, x)["z"], marginal.mean)

    def test_programs_that_do_not_broadcast_run_one_by_one(self):
        exact, x = LinearGaussian.fixture()

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
                loc = torch.einsum("nd,od->no", z, exact.weight) + exact.bias
                pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

        rows = x.expand(4, -1)
        with pytest.warns(ParticleWarning):
            draws = predict(model, exact.guide, rows, num_samples=3)
        assert draws["x"].shape == (3, 4, 6)


class TestPredict:
    def test_moments_of_the_posterior_predictive(self):
        exact = LinearGaussian.fixture()[0]
        x = exact.simulate(4, seed=1)[0]
        draws = predict(exact.model, exact.guide, x, num_samples=4000, seed=0)["x"]
        z = exact.posterior(x)["z"]
        mean = z.mean @ exact.weight.T + exact.bias
        variance = (exact.weight @ z.covariance_matrix @ exact.weight.T).diagonal(
            dim1=-2, dim2=-1
        ) + exact.noise_variance
        assert_mean(draws, mean, variance.sqrt())
        assert_mean((draws - mean) ** 2, variance, variance * math.sqrt(2))

    def test_new_observations_do_not_copy_the_old(self):
        exact = LinearGaussian.fixture()[0]
        x = exact.simulate(4, seed=1)[0]
        assert (predict(exact.model, exact.guide, x, num_samples=2)["x"] != x).all()


def guide_of(sample):
    def guide(x):
        with pyro.plate("data", len(x)):
            sample(x)

    return guide


def real_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def positive_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def vector_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def simplex_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def simplex_guide(x):
    base = dist.Normal(torch.stack([x, 2 * x], -1), 1.0).to_event(1)
    stick = torch.distributions.transforms.StickBreakingTransform()
    pyro.sample("z", dist.TransformedDistribution(base, [stick]))


def simplex_median(x):
    return torch.distributions.transforms.StickBreakingTransform()(torch.stack([x, 2 * x], -1))


def both(x):
    return torch.stack([x, 2 * x], -1)


MEDIANS = {
    "Normal": (real_model, lambda x: pyro.sample("z", dist.Normal(x, 2.0)), lambda x: x),
    "Laplace": (real_model, lambda x: pyro.sample("z", dist.Laplace(x, 2.0)), lambda x: x),
    "StudentT": (real_model, lambda x: pyro.sample("z", dist.StudentT(3.0, x, 2.0)), lambda x: x),
    "LogNormal": (positive_model, lambda x: pyro.sample("z", dist.LogNormal(x, 2.0)), torch.exp),
    "Exponential": (
        positive_model,
        lambda x: pyro.sample("z", dist.Exponential(x.exp())),
        lambda x: math.log(2) / x.exp(),
    ),
    "masked": (
        real_model,
        lambda x: pyro.sample("z", dist.Normal(x, 2.0).mask(torch.ones_like(x).bool())),
        lambda x: x,
    ),
    "independent": (vector_model, lambda x: pyro.sample("z", dist.Normal(both(x), 1.0).to_event(1)), both),
    "point": (real_model, lambda x: pyro.sample("z", dist.Delta(x)), lambda x: x),
    "full covariance": (
        vector_model,
        lambda x: pyro.sample("z", dist.MultivariateNormal(both(x), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))),
        both,
    ),
    "simplex": (simplex_model, simplex_guide, simplex_median),
}


class TestEmbed:
    x = torch.linspace(-1.0, 1.5, 5)

    @pytest.mark.parametrize("family", MEDIANS)
    def test_median_of_a_family(self, family):
        model, sample, median = MEDIANS[family]
        if family == "masked":
            model_body = model

            def model(x):
                with pyro.poutine.mask(mask=torch.ones_like(x).bool()):
                    model_body(x)

        assert torch.allclose(embed(model, guide_of(sample), self.x)["z"], median(self.x), rtol=1e-5)

    def test_families_without_a_quantile_get_the_median_of_draws(self):
        from scipy import stats

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Gamma(1.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = guide_of(lambda x: pyro.sample("z", dist.Gamma(torch.full_like(x, 3.0), 2.0)))
        value = embed(model, guide, self.x)["z"]
        median = stats.gamma(3.0, scale=0.5).median()
        # the median of n draws has standard deviation 1 / (2 f(median) sqrt n)
        error = 1 / (2 * stats.gamma(3.0, scale=0.5).pdf(median) * math.sqrt(101))
        assert ((value - median).abs() < 5 * error).all()
        assert torch.equal(value, embed(model, guide, self.x)["z"])

    def test_each_site_is_conditioned_on_the_medians_before_it(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.LogNormal(x, 1.0))
                pyro.sample("w", dist.Normal(z**2, 1.0))

        medians = embed(model, guide, self.x)
        assert torch.allclose(medians["z"], self.x.exp())
        assert torch.allclose(medians["w"], (2 * self.x).exp())

    def test_globals_have_no_rows(self):
        exact, x = NormalNormal.fixture()
        medians = embed(exact.model, exact.guide, x)
        assert medians["g"].item() == pytest.approx(exact.posterior(x)["g"].mean.item())
        assert torch.allclose(medians["z"], exact.posterior(x)["z"].mean)


class TestReconstruct:
    def test_it_is_the_mean_at_the_embedding(self):
        exact = LinearGaussian.fixture()[0]
        x = exact.simulate(4, seed=1)[0]
        expected = exact.posterior(x)["z"].mean @ exact.weight.T + exact.bias
        assert torch.allclose(reconstruct(exact.model, exact.guide, x)["x"], expected)

    def test_probabilities_of_binary_data(self):
        net = nn.Linear(1, 4)

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 1.0).to_event(1))

        x = torch.ones(3, 4)
        assert torch.allclose(reconstruct(model, guide, x)["x"], net(torch.ones(3, 1)).sigmoid())


class TestSimulate:
    def test_moments_are_those_of_the_model(self):
        exact, x = LinearGaussian.fixture()
        draws = simulate(exact.model, x, num_rows=5000, seed=0)
        assert draws["x"].shape == (5000, 6)
        variance = (exact.weight @ exact.weight.T).diagonal() + exact.noise_variance
        assert_mean(draws["x"], exact.bias, variance.sqrt())
        residual = draws["x"] - draws["z"] @ exact.weight.T - exact.bias
        assert_mean(residual**2, exact.noise_variance, exact.noise_variance * math.sqrt(2))

    def test_covariates_of_the_template_are_recycled_and_observations_ignored(self):
        def model(x, shift):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(shift, 1e-6), obs=x)

        template = torch.full((3,), 99.0)
        draws = simulate(model, template, shift=torch.tensor([0.0, 1.0, 2.0]), num_rows=7)
        assert torch.allclose(draws["x"], torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 0.0]), atol=1e-4)

    def test_all_rows_share_one_draw_of_the_globals(self):
        exact, x = NormalNormal.fixture()
        draws = simulate(exact.model, x, num_rows=4000, seed=1)
        assert draws["g"].shape == ()
        assert_mean(draws["z"], draws["g"], exact.local_scale)

    def test_a_model_without_rows(self):
        exact, x = NormalNormal.fixture()
        assert simulate(exact.model, x, data_plate=None)["z"].shape == (8,)


class TestSeeds:
    @pytest.mark.parametrize("draw", [posterior, predict, simulate])
    def test_a_seed_reproduces_and_leaves_the_generators(self, draw):
        exact, x = LinearGaussian.fixture()
        programs = (exact.model,) if draw is simulate else (exact.model, exact.guide)

        def run(seed):
            return torch.cat([value.flatten() for value in draw(*programs, x, seed=seed).values()])

        before = torch.get_rng_state()
        first = run(1)
        assert torch.equal(before, torch.get_rng_state())
        torch.randn(2)
        assert torch.equal(first, run(1))
        assert not torch.equal(first, run(2))
        assert not torch.equal(run(None), run(None))

    @pytest.mark.parametrize("summary", [embed, reconstruct])
    def test_summaries_leave_the_generators(self, summary):
        exact, x = GammaPoisson.fixture()
        before = torch.get_rng_state()
        first = summary(exact.model, exact.guide, x)
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(value, first[name]) for name, value in summary(exact.model, exact.guide, x).items())
