"""The registry of model classes itself: models run, references are reproduced and hold over simulated rows."""

from collections.abc import Callable

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from model_classes.base import DATA, ModelClass, Moments
from model_classes.oracles import gaussian, quadrature
from model_classes.registry import CLASSES, REGISTRY
from model_classes.series import volatility_by_grid
from pyro import poutine
from scipy import integrate, stats
from torch import Tensor

from pyro_aevb.program.structure import read_structure
from pyro_aevb.testing import LinearGaussian

every_entry = pytest.mark.parametrize("entry", REGISTRY.values(), ids=REGISTRY.keys())
every_solved_entry = pytest.mark.parametrize(
    "entry", [pytest.param(item, id=name) for name, item in REGISTRY.items() if item.method != "nuts"]
)
every_entry_of_rows = pytest.mark.parametrize(
    "entry", [pytest.param(item, id=name) for name, item in REGISTRY.items() if not item.joint]
)


COSTLY = {"chain", "correlation", "fork", "images_convolutional", "images_linear", "ordered"}
"""Solved on a grid of three dimensions, or through many pixels."""


def solve(entry: ModelClass, args, kwargs) -> dict[str, Moments]:
    return entry.oracle(entry.model, args, kwargs)


def test_every_class_has_an_entry_and_every_file_too() -> None:
    assert {entry.number for entry in REGISTRY.values()} == set(CLASSES)
    assert {path.stem for path in DATA.glob("*.json")} == set(REGISTRY)


@every_entry
def test_the_reference_has_the_shape_of_the_model_on_the_test_rows(entry: ModelClass) -> None:
    args, kwargs = entry.test_batch()
    nodes = poutine.trace(entry.model).get_trace(*args, **kwargs).nodes
    assert len(args[0]) == entry.num_test_rows
    assert {name for name in entry.reference if not nodes[name]["is_observed"]} == set(entry.reference)
    for site, moments in entry.reference.items():
        shape = entry.feature(site, nodes[site]["value"]).shape
        assert moments.mean.shape == moments.sd.shape == shape
        assert moments.mean.isfinite().all()
        assert (moments.sd >= 0).all()
        assert entry.is_compared(site).any()


@every_entry
def test_the_training_batch_is_the_same_at_each_call_and_has_the_form_of_the_test_batch(entry: ModelClass) -> None:
    (first, first_named), (second, second_named), (test, test_named) = entry.batch(), entry.batch(), entry.test_batch()
    assert len(first[0]) == entry.num_rows
    assert first_named.keys() == test_named.keys()
    for left, right, few in zip(
        (*first, *first_named.values()), (*second, *second_named.values()), (*test, *test_named.values()), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        assert few.dtype == left.dtype
        assert few.shape[1:] == left.shape[1:]
        assert left.dtype != torch.float64


@every_entry
def test_the_package_reads_its_latents(entry: ModelClass) -> None:
    args, kwargs = entry.test_batch()
    structure = read_structure(entry.model, args, kwargs)
    assert structure.data_plate == entry.data_plate
    assert {site.name for site in structure.select("latent")} == set(entry.reference)
    assert structure.has_globals == any(not site.is_local for site in structure.select("latent"))


@every_solved_entry
def test_the_reference_is_reproduced(entry: ModelClass) -> None:
    args, kwargs = entry.batch() if entry.joint else entry.test_batch()
    for site, solved in solve(entry, args, kwargs).items():
        stored = entry.reference[site]
        rows = tuple(slice(size) for size in stored.mean.shape)
        torch.testing.assert_close(solved.mean[rows].float(), stored.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(solved.sd[rows].float(), stored.sd, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@every_entry_of_rows
def test_what_was_drawn_lies_about_the_posterior_mean_as_its_sd_says(entry: ModelClass) -> None:
    """Over rows from the model, (z - E[z|x]) / sd[z|x] has mean 0 and mean square 1 at each element, whatever the model."""
    rows = 80 if entry.name in COSTLY else 300
    with poutine.trace() as drawn:
        args, kwargs = entry.simulate(rows, seed=7)
    solved = volatility_by_grid(*args) if entry.name == "volatility" else solve(entry, args, kwargs)
    for site, (mean, sd) in solved.items():
        truth = entry.feature(site, drawn.trace.nodes[site]["value"]).double()
        axis = truth.shape.index(rows)
        truth, mean, sd = (item.movedim(axis, 0).reshape(rows, -1) for item in (truth, mean, sd))
        free = (sd > 1e-6).all(0)  # what is constant, as the corner of a Cholesky factor, has no score
        score = ((truth - mean) / sd)[:, free]
        for statistic, expected in ((score, 0.0), (score**2, 1.0)):
            error = statistic.std(0) / rows**0.5
            assert ((statistic.mean(0) - expected).abs() < 5 * error).all()


def test_the_angle_agrees_with_adaptive_quadrature_over_one_turn() -> None:
    entry = REGISTRY["circular"]
    ((x,), _), reference = entry.test_batch(), entry.reference["angle"]
    for row, stored in zip(x.double(), map(Moments, *reference), strict=True):

        def joint(angle: float, data: Tensor = row) -> np.ndarray:
            point = np.array([np.cos(angle), np.sin(angle)])
            density = stats.vonmises(0.5, loc=0.5).pdf(angle) * stats.norm(point, 0.6).pdf(data.numpy()).prod()
            return density * np.r_[1, point, point**2]

        evidence, *moments = integrate.quad_vec(joint, -np.pi, np.pi)[0]
        mean, second = np.array(moments[:2]) / evidence, np.array(moments[2:]) / evidence
        np.testing.assert_allclose(stored.mean, mean, atol=1e-5)
        np.testing.assert_allclose(stored.sd, np.sqrt(second - mean**2), atol=1e-5)


def test_smoothing_of_the_loop_agrees_with_normal_algebra() -> None:
    entry = REGISTRY["markov_loop"]
    args, kwargs = entry.test_batch()
    for site, (mean, sd) in gaussian(entry.model, args, kwargs).items():
        torch.testing.assert_close(entry.reference[site].mean, mean.float(), rtol=0, atol=1e-5)
        torch.testing.assert_close(entry.reference[site].sd, sd.float(), rtol=0, atol=1e-5)


# NUTS, against integrals of models that it solved.


def assert_close_to_draws(entry: ModelClass, exact: dict[str, Moments]) -> None:
    """Means within 5 Monte Carlo errors, standard deviations within 10 (theirs are larger for tails that are not normal)."""
    assert set(exact) == set(entry.reference)
    for site, stored in entry.reference.items():
        error = entry.stored()["sites"][site]["mcse"]
        mean, sd = (moment.reshape(-1)[: stored.mean.numel()].reshape(stored.mean.shape) for moment in exact[site])
        assert ((stored.mean - mean) / sd).abs().max() < 5 * error
        assert (stored.sd / sd - 1).abs().max() < 10 * error


def two_levels(log_likelihood: Callable[[Tensor], Tensor], mu_prior, tau_prior) -> tuple[dict[str, Moments], Moments]:
    """Integrate theta_n ~ N(mu, tau) row by row at each (mu, log tau) of a grid, then over the grid.

    Returns:
        Moments of mu and tau, and of theta ``[rows]``.
    """
    theta = torch.linspace(-9, 9, 901, dtype=torch.float64)
    mu, log_tau = torch.linspace(-6, 6, 201).double()[:, None], torch.linspace(-2.5, 1.5, 61).double()
    likelihood = log_likelihood(theta)
    likelihood = (likelihood - likelihood.amax(1, keepdim=True)).exp()
    kernel = dist.Normal(mu, log_tau.exp()).log_prob(theta[:, None, None]).exp().flatten(1)
    evidence = likelihood @ kernel
    prior = mu_prior.log_prob(mu) + tau_prior.log_prob(log_tau.exp()) + log_tau
    weights = (prior.flatten() + evidence.log().sum(0)).softmax(0)
    first, second = ((likelihood * theta**k @ kernel / evidence) @ weights for k in (1, 2))
    grids = {"mu": mu.expand(-1, len(log_tau)).flatten(), "tau": log_tau.exp().expand(len(mu), -1).flatten()}
    moments = {name: Moments(weights @ v, (weights @ v**2 - (weights @ v) ** 2).sqrt()) for name, v in grids.items()}
    return moments, Moments(first, (second - first**2).sqrt())


def test_nuts_agrees_with_quadrature_on_ragged_groups_with_globals() -> None:
    entry = REGISTRY["globals_ragged"]
    x, present = entry.batch()[0]

    def log_likelihood(theta: Tensor) -> Tensor:
        return (dist.StudentT(5.0, theta, 0.8).log_prob(x.double()[..., None]) * present[..., None]).sum(1)

    both, theta = two_levels(log_likelihood, dist.Normal(0.0, 2.0), dist.LogNormal(-0.5, 0.5))
    assert_close_to_draws(entry, {**both, "theta": theta})


def test_nuts_agrees_with_quadrature_on_counts_with_globals() -> None:
    entry = REGISTRY["globals_counts"]
    ((x,), _) = entry.batch()

    def log_likelihood(z: Tensor) -> Tensor:
        return dist.Poisson(z.exp()).log_prob(x.double()[..., None]).sum(1)

    both, z = two_levels(log_likelihood, dist.Normal(0.5, 1.0), dist.LogNormal(-0.7, 0.4))
    assert_close_to_draws(entry, {**both, "z": z})


def test_nuts_agrees_with_smoothing_on_a_grid() -> None:
    entry = REGISTRY["volatility"]
    assert_close_to_draws(entry, volatility_by_grid(entry.test_batch()[0][0]))


# The solvers.


def test_quadrature_and_normal_algebra_agree_with_the_closed_form() -> None:
    model, _ = LinearGaussian.fixture()
    x, _ = model.simulate(3, seed=1)
    exact = model.posterior(x)["z"]
    for solver in (quadrature, gaussian):
        mean, sd = solver(model.model, (x,), {})["z"]
        torch.testing.assert_close(mean, exact.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(sd, exact.variance.sqrt(), rtol=0, atol=1e-6)


def test_quadrature_through_a_bijection_agrees_with_the_closed_form() -> None:
    entry = REGISTRY["simplex"]
    args, kwargs = entry.test_batch()
    by_grid = quadrature(entry.model, args, kwargs)["weights"]
    torch.testing.assert_close(by_grid.mean, solve(entry, args, kwargs)["weights"].mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(by_grid.sd, solve(entry, args, kwargs)["weights"].sd, rtol=0, atol=1e-6)
