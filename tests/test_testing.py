"""The exact models against oracles that share none of their formulas: joint covariances, quadrature, published numbers."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.util import site_is_subsample
from scipy import integrate, stats

from pyro_aevb.errors import SettingError
from pyro_aevb.testing import (
    BetaBinomial,
    EightSchools,
    ExactModel,
    GammaPoisson,
    HierarchicalNormal,
    LinearGaussian,
    LinearGaussianStateSpace,
    NormalNormal,
)

CLASSES = [LinearGaussian, NormalNormal, HierarchicalNormal, GammaPoisson, BetaBinomial, LinearGaussianStateSpace]
WITH_GLOBALS = (NormalNormal, HierarchicalNormal)
every_model = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
every_model_without_globals = pytest.mark.parametrize(
    "cls", [cls for cls in CLASSES if cls not in WITH_GLOBALS], ids=lambda cls: cls.__name__
)


def sites(trace: poutine.Trace) -> dict[str, dict]:
    """Return the sample sites of a trace, observed or not, without the plates that Pyro counts among them."""
    return {
        name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not site_is_subsample(site)
    }


def log_weight_sites(model: ExactModel, x: torch.Tensor, **guide_kwargs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return log p at each model site minus, for latents, log q, at one draw of the guide."""
    guide = poutine.trace(model.guide).get_trace(x, **guide_kwargs)
    trace = poutine.trace(poutine.replay(model.model, trace=guide)).get_trace(x)
    guide.compute_log_prob()
    trace.compute_log_prob()
    return {
        name: site["log_prob"] - (guide.nodes[name]["log_prob"] if name in guide.nodes else 0)
        for name, site in sites(trace).items()
    }


def condition(mean: np.ndarray, cov: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Condition a joint normal on its last entries: the moments of the first ones."""
    k = len(mean) - len(values)
    gain = cov[:k, k:] @ np.linalg.inv(cov[k:, k:])
    return mean[:k] + gain @ (values - mean[k:]), cov[:k, :k] - gain @ cov[k:, :k]


# The law: log p(x, z) - log q(z | x) is log p(x) at any z whatever, if and only if q is the posterior.


@every_model
@pytest.mark.parametrize("seed", range(3))
def test_guide_is_the_posterior_for_the_whole_batch(cls: type[ExactModel], seed: int) -> None:
    model, x = cls.fixture()
    pyro.set_rng_seed(seed)
    for batch in (x, model.simulate(7, seed=seed)[0]):
        total = sum(values.sum() for values in log_weight_sites(model, batch).values())
        torch.testing.assert_close(total, model.log_marginal(batch).sum(), rtol=0, atol=1e-8)


@every_model_without_globals
def test_guide_is_the_posterior_row_by_row(cls: type[ExactModel]) -> None:
    model = cls.fixture()[0]
    x = model.simulate(7, seed=1)[0]
    rows = sum(log_weight_sites(model, x).values())
    assert rows.shape == (7,)
    torch.testing.assert_close(rows, model.log_marginal(x), rtol=0, atol=1e-8)


@every_model
def test_elbo_of_vectorized_particles_is_the_evidence(cls: type[ExactModel]) -> None:
    model, x = cls.fixture()
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
    assert elbo.loss(model.model, model.guide, x) == pytest.approx(-float(model.log_marginal(x).sum()), abs=1e-8)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_x_is_the_dtype_of_everything(cls: type[ExactModel], dtype: torch.dtype) -> None:
    model, x = cls.fixture(dtype)
    simulated, latents = model.simulate(3, dtype=dtype)
    guide = poutine.trace(model.guide).get_trace(x)
    trace = poutine.trace(poutine.replay(model.model, trace=guide)).get_trace(x)
    trace.compute_log_prob()
    tensors = [x, simulated, *latents.values(), model.log_marginal(x)]
    tensors += [value for site in model.posterior(x).values() for value in (site.mean, site.stddev)]
    tensors += [site[key] for site in sites(trace).values() for key in ("value", "log_prob")]
    assert {tensor.dtype for tensor in tensors} == {dtype}


def test_parameters_in_float64_serve_data_in_float32() -> None:
    model, x = LinearGaussian.fixture(torch.float64)
    low = model.log_marginal(x.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), model.log_marginal(x), rtol=1e-5, atol=0)


# Simulation.


@every_model
def test_simulated_latents_are_uniform_in_the_posterior(cls: type[ExactModel]) -> None:
    model = cls.fixture()[0]
    x, latents = model.simulate(400, seed=3)
    pyro.set_rng_seed(0)
    posterior = model.posterior(x)
    assert set(posterior) == set(latents)
    for name, value in latents.items():
        if value.dim():  # a global is one draw, not a sample
            ranks = (posterior[name].sample((500,)) < value).double().mean(0)
            assert all(stats.kstest(column, "uniform").pvalue > 1e-3 for column in ranks.reshape(400, -1).T.numpy())


@every_model
def test_simulation_repeats_by_seed_and_leaves_the_global_state(cls: type[ExactModel]) -> None:
    model, x = cls.fixture()
    state = torch.get_rng_state()
    first, latents = model.simulate(4, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert first.shape == (4, *x.shape[1:])
    again, same = model.simulate(4, seed=5)
    assert torch.equal(first, again)
    assert all(torch.equal(latents[name], same[name]) for name in latents)
    assert not torch.equal(latents.popitem()[1], model.simulate(4, seed=6)[1].popitem()[1])


@every_model
def test_simulating_no_rows_is_an_error(cls: type[ExactModel]) -> None:
    with pytest.raises(SettingError, match=r"num_rows must be at least 1; got 0"):
        cls.fixture()[0].simulate(0)


# Linear-Gaussian.


def test_linear_gaussian_fixture_has_its_published_numbers() -> None:
    model, x = LinearGaussian.fixture()
    posterior = model.posterior(x)["z"]
    assert model.log_marginal(x).item() == pytest.approx(-12.2620864, abs=1e-7)
    assert model.approximation_gap().item() == pytest.approx(0.9138322, abs=1e-7)
    assert (model.log_marginal(x) - model.approximation_gap()).item() == pytest.approx(-13.1759186, abs=1e-7)
    np.testing.assert_allclose(posterior.mean[0], [-0.634912, 0.788817, -0.021615], atol=1e-6)
    np.testing.assert_allclose(posterior.variance[0], [0.403196, 0.302385, 0.401364], atol=1e-6)


def factor_analysis() -> LinearGaussian:
    pyro.set_rng_seed(0)
    return LinearGaussian(torch.randn(4, 2).double(), torch.randn(4).double(), torch.rand(4).double() + 0.1)


def test_linear_gaussian_agrees_with_conditioning_the_joint_normal() -> None:
    model = factor_analysis()
    weight, bias = model.weight.numpy(), model.bias.numpy()
    x = model.simulate(3, seed=1)[0]
    marginal = weight @ weight.T + np.diag(model.noise_variance.numpy())
    joint = np.block([[np.eye(2), weight.T], [weight, marginal]])
    posterior = model.posterior(x)["z"]
    for n, row in enumerate(x.numpy()):
        mean, cov = condition(np.r_[0, 0, bias], joint, row)
        np.testing.assert_allclose(posterior.mean[n], mean, atol=1e-10)
        np.testing.assert_allclose(posterior.covariance_matrix[n], cov, atol=1e-10)
        assert model.log_marginal(x)[n].item() == pytest.approx(stats.multivariate_normal(bias, marginal).logpdf(row))


def test_linear_gaussian_mean_field_guide_starts_where_it_is_told() -> None:
    model = factor_analysis()
    x = model.simulate(3, seed=1)[0]

    def distribution(guide: torch.nn.Module) -> torch.distributions.Distribution:
        return poutine.trace(guide).get_trace(x).nodes["z"]["fn"].base_dist

    prior, best = (distribution(model.mean_field_guide(at_optimum=flag)) for flag in (False, True))
    assert torch.equal(prior.mean, torch.zeros(3, 2).double())
    assert torch.equal(prior.stddev, torch.ones(3, 2).double())
    torch.testing.assert_close(best.mean, model.mean_field_posterior(x).mean)
    torch.testing.assert_close(best.stddev, model.mean_field_posterior(x).stddev)
    assert next(model.mean_field_guide(dtype=torch.float32).parameters()).dtype == torch.float32


def test_linear_gaussian_mean_field_optimum_is_one_and_its_divergence_is_the_gap() -> None:
    model = factor_analysis()
    x = model.simulate(3, seed=1)[0]
    guide = model.mean_field_guide(at_optimum=True)
    q = poutine.trace(guide).get_trace(x).nodes["z"]["fn"].base_dist
    full = torch.distributions.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
    divergence = torch.distributions.kl_divergence(full, model.posterior(x)["z"])
    torch.testing.assert_close(divergence, model.approximation_gap().expand(3))
    for gradient in torch.autograd.grad(divergence.sum(), guide.parameters()):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


def test_linear_gaussian_carries_gradients_to_its_parameters() -> None:
    model, x = LinearGaussian.fixture()
    weight = model.weight.clone().requires_grad_()
    learnable = LinearGaussian(weight, model.bias, model.noise_variance)
    assert torch.autograd.gradcheck(
        lambda w: LinearGaussian(w, model.bias, model.noise_variance).log_marginal(x), weight
    )
    (exact,) = torch.autograd.grad(learnable.log_marginal(x).sum(), weight)
    (at_a_draw,) = torch.autograd.grad(sum(log_weight_sites(learnable, x).values()).sum(), weight)
    torch.testing.assert_close(at_a_draw, exact)


# Normal-normal, with its global.


def test_normal_normal_agrees_with_the_joint_normal_of_all_rows() -> None:
    model, x = NormalNormal.fixture()
    s2, t2, n2 = model.global_scale**2, model.local_scale**2, model.noise_scale**2
    eye, ones = np.eye(len(x)), np.ones((len(x), len(x)))
    z_cov, x_cov = s2 * ones + t2 * eye, s2 * ones + (t2 + n2) * eye
    column = s2 * ones[:, :1]
    joint = np.block([[s2 * np.eye(1), column.T, column.T], [column, z_cov, z_cov], [column, z_cov, x_cov]])
    mean, cov = condition(np.zeros(len(joint)), joint, x.numpy())
    posterior = model.posterior(x)
    np.testing.assert_allclose(np.r_[posterior["g"].mean, posterior["z"].mean], mean, atol=1e-10)
    np.testing.assert_allclose(np.r_[posterior["g"].variance, posterior["z"].variance], np.diag(cov), atol=1e-10)
    assert model.log_marginal(x).item() == pytest.approx(stats.multivariate_normal(cov=x_cov).logpdf(x.numpy()))


def test_normal_normal_predictive_is_a_ratio_of_evidences() -> None:
    model, x = NormalNormal.fixture()
    data, new = x[:5], x[5:]
    ratios = [model.log_marginal(torch.cat([data, row[None]])) - model.log_marginal(data) for row in new]
    torch.testing.assert_close(model.log_predictive(new, data), torch.stack(ratios))


def test_normal_normal_guide_of_a_minibatch_knows_the_whole_data_set() -> None:
    model, x = NormalNormal.fixture()
    guide = poutine.trace(model.guide).get_trace(x[:3], data=x)
    assert guide.nodes["g"]["fn"].mean == model.posterior(x)["g"].mean
    assert guide.nodes["z"]["value"].shape == (3,)
    # Averaged over the minibatches of a partition, Eq 8 at fixed g and the rows' exact conditionals gives the evidence.
    pyro.set_rng_seed(0)
    g = torch.tensor(0.3, dtype=x.dtype)
    fixed = poutine.condition(model.guide, {"g": g})
    total = torch.zeros((), dtype=x.dtype)
    for batch in x.split(3):
        guide_trace = poutine.trace(fixed).get_trace(batch, data=x)
        trace = poutine.trace(poutine.replay(poutine.condition(model.model, {"g": g}), trace=guide_trace)).get_trace(
            batch
        )
        trace.compute_log_prob()
        guide_trace.compute_log_prob()
        total += (
            trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"] - guide_trace.nodes["z"]["log_prob"]
        ).sum()
        weight_of_g = trace.nodes["g"]["fn"].log_prob(g) - guide_trace.nodes["g"]["fn"].log_prob(g)
    torch.testing.assert_close(total + weight_of_g, model.log_marginal(x), rtol=0, atol=1e-8)


# Hierarchical normal, against quadrature over tau of the joint normal of everything else.


def given_spread(model: HierarchicalNormal, x: np.ndarray, log_tau: float) -> np.ndarray:
    """Return p(x, log tau) times 1 and the first two moments of mu and theta."""
    groups, size = x.shape
    from_noise = np.zeros((1 + groups, 1 + groups))  # mu and theta as they come from standard normals
    from_noise[:, 0] = model.global_scale
    from_noise[1:, 1:] = np.exp(log_tau) * np.eye(groups)
    latent = from_noise @ from_noise.T
    pick = np.repeat(np.eye(1 + groups)[1:], size, 0)
    joint = np.block([[latent, latent @ pick.T], [pick @ latent, pick @ latent @ pick.T]])
    observed = joint[1 + groups :, 1 + groups :] + model.noise_scale**2 * np.eye(x.size)
    joint[1 + groups :, 1 + groups :] = observed
    mean, cov = condition(np.zeros(len(joint)), joint, x.reshape(-1))
    density = stats.multivariate_normal(cov=observed).pdf(x.reshape(-1))
    prior = stats.norm(model.spread_loc, model.spread_scale).pdf(log_tau)
    return density * prior * np.r_[1, mean, np.exp(log_tau), np.diag(cov) + mean**2, np.exp(2 * log_tau)]


def test_hierarchical_normal_agrees_with_adaptive_quadrature_over_joint_normals() -> None:
    model, x = HierarchicalNormal.fixture()
    scale = 1e10
    total, _ = integrate.quad_vec(lambda u: scale * given_spread(model, x.numpy(), u), -5, 4, epsrel=1e-10, epsabs=0)
    mean, second = total[1:8] / total[0], total[8:] / total[0]
    posterior = model.posterior(x)
    assert model.log_marginal(x).item() == pytest.approx(math.log(total[0] / scale), abs=1e-8)
    parts = [posterior[site].mean.reshape(-1) for site in ("mu", "theta", "tau")]
    np.testing.assert_allclose(np.hstack(parts), mean, rtol=1e-7)
    parts = [posterior[site].stddev.reshape(-1) for site in ("mu", "theta", "tau")]
    np.testing.assert_allclose(np.hstack(parts), np.sqrt(second - mean**2), rtol=1e-7)


def test_hierarchical_normal_draws_of_the_spread_follow_its_density() -> None:
    """By the distribution function of the density, integrated by itself."""
    model, x = HierarchicalNormal.fixture()
    spread = model.posterior(x)["tau"]
    tau = torch.linspace(1e-3, 20, 200_001, dtype=x.dtype)
    cumulative = integrate.cumulative_trapezoid(spread.log_prob(tau).exp(), tau, initial=0)
    assert cumulative[-1] == pytest.approx(1, abs=1e-6)
    draws = spread.sample((20_000,)).numpy()
    assert stats.kstest(np.interp(draws, tau, cumulative), "uniform").pvalue > 1e-3


def test_hierarchical_normal_narrows_around_the_truth_with_many_groups() -> None:
    """The grid finds a posterior far narrower than the prior, and more nodes change nothing."""
    model = HierarchicalNormal()
    x, latents = model.simulate(20_000, seed=2)
    few, many = (HierarchicalNormal(num_nodes=count).posterior(x)["tau"] for count in (121, 601))
    assert few.stddev < 0.01 * model.spread_scale
    assert abs(few.mean - latents["tau"]) < 4 * few.stddev
    torch.testing.assert_close(few.mean, many.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(few.stddev, many.stddev, rtol=1e-6, atol=0)


def test_hierarchical_normal_guide_of_a_minibatch_knows_the_whole_data_set() -> None:
    model, x = HierarchicalNormal.fixture()
    guide = poutine.trace(model.guide).get_trace(x[:2], data=x)
    assert guide.nodes["tau"]["fn"].mean == model.posterior(x)["tau"].mean
    assert guide.nodes["theta"]["value"].shape == (2, 1)


# Conjugate counts, against quadrature over the latent.


def test_gamma_poisson_agrees_with_quadrature_and_published_numbers() -> None:
    model, x = GammaPoisson.fixture()
    assert model.log_marginal(x).item() == pytest.approx(-10.9959383, abs=1e-7)
    assert model.posterior(x)["rate"].mean.item() == pytest.approx(2.4615385, abs=1e-7)
    for row in model.simulate(3, seed=2)[0]:

        def joint(rate: float, power: int, counts: torch.Tensor = row) -> float:
            return rate**power * stats.gamma(2, scale=1 / 1.5).pdf(rate) * stats.poisson(rate).pmf(counts).prod()

        evidence, first, second = (integrate.quad(joint, 0, 40, (k,), epsabs=1e-16, limit=200)[0] for k in range(3))
        mean = first / evidence
        posterior = model.posterior(row[None])["rate"]
        assert model.log_marginal(row[None]).item() == pytest.approx(math.log(evidence), rel=1e-7)
        assert posterior.mean.item() == pytest.approx(mean, rel=1e-7)
        assert posterior.variance.item() == pytest.approx(second / evidence - mean**2, rel=1e-6)


def test_beta_binomial_agrees_with_scipy_and_published_numbers() -> None:
    model, x = BetaBinomial.fixture()
    assert model.log_marginal(x).item() == pytest.approx(-2.5267281, abs=1e-7)
    assert model.posterior(x)["probability"].mean.item() == pytest.approx(0.6)
    every_count = torch.arange(11).double()[:, None]
    np.testing.assert_allclose(model.log_marginal(every_count), stats.betabinom(10, 2, 3).logpmf(every_count[:, 0]))


def test_beta_binomial_of_several_counts_agrees_with_quadrature() -> None:
    model = BetaBinomial(concentration1=1.5, concentration0=2.5, total_count=6, num_counts=3)
    x = model.simulate(2, seed=4)[0]
    assert x.shape == (2, 3)
    for n, row in enumerate(x.numpy()):

        def joint(p: float, power: int, counts: np.ndarray = row) -> float:
            return p**power * stats.beta(1.5, 2.5).pdf(p) * stats.binom(6, p).pmf(counts).prod()

        evidence, first = (integrate.quad(joint, 0, 1, (k,), epsabs=1e-14)[0] for k in range(2))
        assert model.log_marginal(x)[n].item() == pytest.approx(math.log(evidence), rel=1e-7)
        assert model.posterior(x)["probability"].mean[n].item() == pytest.approx(first / evidence, rel=1e-7)


# State space, against the assembled covariance of all states and observations.


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_state_space_agrees_with_conditioning_the_joint_normal(num_steps: int) -> None:
    model, x = LinearGaussianStateSpace.fixture()
    x = x[:, :num_steps]
    steps = np.arange(num_steps)
    # z = L e: step t adds its own noise and carries .9 of the past.
    carried = np.tril(0.9 ** np.clip(steps[:, None] - steps, 0, None))
    z_cov = carried @ np.diag(np.r_[1.0, np.full(num_steps - 1, 0.25)]) @ carried.T
    x_cov = z_cov + 0.09 * np.eye(num_steps)
    joint = np.block([[z_cov, z_cov], [z_cov, x_cov]])
    posterior = model.posterior(x)
    assert list(posterior) == [f"z_{t + 1}" for t in range(num_steps)]
    for n, row in enumerate(x.numpy()):
        mean, cov = condition(np.zeros(2 * num_steps), joint, row)
        np.testing.assert_allclose([site.mean[n] for site in posterior.values()], mean, atol=1e-10)
        np.testing.assert_allclose([site.variance[n] for site in posterior.values()], np.diag(cov), atol=1e-10)
        evidence = stats.multivariate_normal(cov=x_cov).logpdf(row)
        assert model.log_marginal(x)[n].item() == pytest.approx(evidence, abs=1e-10)


# Eight schools.


def test_eight_schools_has_its_published_numbers() -> None:
    model, y = EightSchools.fixture()
    posterior = model.posterior(y)
    theta_mean = [6.2119, 4.9402, 3.9270, 4.7571, 3.6155, 4.0426, 6.2967, 4.8543]
    theta_sd = [5.593, 4.674, 5.263, 4.780, 4.658, 4.827, 5.078, 5.291]
    assert model.log_marginal(y).item() == pytest.approx(-31.3113474, abs=1e-7)
    np.testing.assert_allclose([posterior["mu"].mean, posterior["mu"].stddev], [4.39682, 3.31770], atol=1e-5)
    np.testing.assert_allclose([posterior["tau"].mean, posterior["tau"].stddev], [3.59771, 3.21996], atol=1e-5)
    np.testing.assert_allclose(posterior["theta"].mean, theta_mean, atol=1e-4)
    np.testing.assert_allclose(posterior["theta"].stddev, theta_sd, atol=1e-3)


def test_eight_schools_agrees_with_adaptive_quadrature_over_joint_normals() -> None:
    model, y = EightSchools.fixture()
    variance = np.array(model.standard_errors) ** 2

    def given_tau(tau: float) -> np.ndarray:
        """Return p(y, tau) times 1 and the first two moments of mu, tau and theta_trans."""
        from_prior = np.zeros((9, 9))  # mu and theta_trans as they come from standard normals
        from_prior[0, 0], from_prior[1:, 1:] = 5, np.eye(8)
        to_theta = np.c_[np.full(8, 5.0), tau * np.eye(8)]
        linear = np.r_[from_prior, to_theta]
        joint = linear @ linear.T
        joint[9:, 9:] += np.diag(variance)
        mean, cov = condition(np.zeros(17), joint, y.numpy())
        mean, second = np.r_[mean, tau], np.r_[np.diag(cov) + mean**2, tau**2]
        density = stats.multivariate_normal(cov=joint[9:, 9:]).pdf(y.numpy()) * stats.halfcauchy(scale=5).pdf(tau)
        return 1e13 * density * np.r_[1, mean, second]

    total, _ = integrate.quad_vec(lambda u: given_tau(u / (1 - u)) / (1 - u) ** 2, 0, 1, epsrel=1e-8, epsabs=0)
    mean, second = total[1:11] / total[0], total[11:] / total[0]
    posterior = model.posterior(y)
    assert model.log_marginal(y).item() == pytest.approx(math.log(total[0]) - 13 * math.log(10), abs=1e-7)
    order = ("mu", "theta_trans", "tau")
    np.testing.assert_allclose(np.hstack([posterior[site].mean for site in order]), mean, rtol=1e-6)
    np.testing.assert_allclose(
        np.hstack([posterior[site].stddev for site in order]), np.sqrt(second - mean**2), rtol=1e-6
    )


def test_eight_schools_model_has_the_density_that_is_integrated() -> None:
    model, y = EightSchools.fixture()
    theta_trans = np.linspace(-1, 1, 8)
    values = {"mu": torch.tensor(3.0), "tau": torch.tensor(2.0), "theta_trans": torch.tensor(theta_trans)}
    trace = poutine.trace(poutine.condition(model.model, values)).get_trace(y)
    expected = (
        stats.norm(0, 5).logpdf(3.0)
        + stats.halfcauchy(scale=5).logpdf(2.0)
        + stats.norm.logpdf(theta_trans).sum()
        + stats.norm(3.0 + 2.0 * theta_trans, model.standard_errors).logpdf(y.numpy()).sum()
    )
    assert trace.log_prob_sum().item() == pytest.approx(expected)


def test_eight_schools_honours_the_dtype() -> None:
    model, y = EightSchools.fixture(torch.float32)
    trace = poutine.trace(model.model).get_trace(y)
    assert {site["value"].dtype for site in sites(trace).values()} == {torch.float32}
    assert model.log_marginal(y).dtype == torch.float32
    assert model.log_marginal(y).item() == pytest.approx(-31.3113474, abs=1e-3)
