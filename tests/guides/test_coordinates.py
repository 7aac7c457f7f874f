"""Coordinates against SciPy's quantiles of known priors; maps onto every support; points inside them."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import OrderedTransform
from scipy import stats
from torch.distributions import biject_to, constraints

from pyro_aevb.errors import ModelError
from pyro_aevb.guides.coordinates import feasible, read_coordinates, transformed
from pyro_aevb.program.structure import Site


def site_of(fn, family=None):
    name = type(fn.base_dist if type(fn).__name__ == "Independent" else fn).__name__
    return Site("z", "latent", True, fn.support, tuple(fn.event_shape), tuple(fn.batch_shape), (), family or name)


def read(fn, **settings):
    torch.manual_seed(0)
    return read_coordinates(site_of(fn, **settings), fn)


def ordered():
    return dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), OrderedTransform())


PRIORS = {
    "normal": (dist.Normal(5.0, 3.0), stats.norm(5, 3), lambda z: z),
    "student": (dist.StudentT(3.0, 5.0, 3.0), stats.t(3, 5, 3), lambda z: z),
    "gamma": (dist.Gamma(3.0, 0.01), stats.gamma(3, scale=100), np.log),
    "lognormal": (dist.LogNormal(2.0, 0.5), stats.lognorm(0.5, scale=np.exp(2)), np.log),
    "beta": (dist.Beta(2.0, 8.0), stats.beta(2, 8), lambda z: np.log(z / (1 - z))),
    "uniform": (
        dist.Uniform(10.0, 30.0),
        stats.uniform(10, 20),
        lambda z: np.log((z - 10) / (30 - z)),
    ),
    "halfnormal": (dist.HalfNormal(4.0), stats.halfnorm(scale=4), np.log),
}


@pytest.mark.parametrize("name", PRIORS)
def test_units_are_median_and_spread_of_the_prior(name):
    """To 5 standard errors of quantiles of 4,096 draws: sqrt(p (1 - p) / n) in probability."""
    fn, oracle, unconstrain = PRIORS[name]
    own = read(fn)
    levels = np.array([0.25, 0.5, 0.75])
    error = 5 * np.sqrt(levels * (1 - levels) / 4096)
    low, high = (np.sort(unconstrain(oracle.ppf(levels + sign * error))) for sign in (-1, 1))
    assert low[1] < own.loc.item() < high[1]
    assert (low[2] - high[0]) / 1.349 < own.scale.item() < (high[2] - low[0]) / 1.349


def test_each_coordinate_of_an_event_has_its_own_units():
    scales = torch.tensor([0.01, 1.0, 100.0])
    own = read(dist.Normal(torch.tensor([1.0, -2.0, 300.0]), scales).to_event(1))
    torch.testing.assert_close(own.scale, scales, rtol=0.1, atol=0)
    assert ((own.loc - torch.tensor([1.0, -2.0, 300.0])).abs() < 0.1 * scales).all()


def test_draws_of_a_prior_of_many_rows_are_pooled():
    own = read(dist.Normal(torch.linspace(-10, 10, 2001), 0.1))
    assert abs(own.loc.item()) < 0.5
    assert own.scale.item() == pytest.approx(10 / 1.349, rel=0.05)  # quartiles of a uniform on [-10, 10] at -5 and 5


@pytest.mark.parametrize(
    ("fn", "shape"),
    [
        (dist.Dirichlet(torch.ones(4)), (3,)),
        (dist.LKJCholesky(3, torch.tensor(2.0)), (3,)),
        (ordered(), (3,)),
        (dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), (2, 3)),
        (dist.Gamma(1.0, 1.0), ()),
    ],
    ids=lambda item: "" if isinstance(item, tuple) else type(item).__name__,
)
def test_size_is_that_of_unconstrained_space(fn, shape):
    own = read(fn)
    assert own.shape == shape
    assert own.size == own.num_inputs == int(np.prod(shape))
    inputs = own.inputs(fn.sample((50,)), fn.support)
    assert inputs.shape == (50, own.size)
    assert inputs.isfinite().all()


@pytest.mark.parametrize("name", PRIORS)
def test_a_network_reads_the_coordinate_less_its_median_over_its_spread(name):
    fn, oracle, unconstrain = PRIORS[name]
    own, levels = read(fn), np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    quantiles = oracle.ppf(levels)
    inputs = own.inputs(torch.as_tensor(quantiles, dtype=torch.float32), fn.support)
    expected = (unconstrain(quantiles) - own.loc.item()) / own.scale.item()
    np.testing.assert_allclose(inputs[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_values_at_the_end_of_their_support_are_cut():
    own = read(dist.Beta(1.0, 1.0))
    inputs = own.inputs(torch.tensor([0.0, 1.0, 0.5]), constraints.unit_interval)
    assert inputs[0] == -10.0
    assert inputs[1] > 9.0
    assert inputs.abs().max() <= 10.0


def test_angles_are_read_as_points_on_the_circle():
    own = read(dist.VonMises(torch.zeros(2), torch.ones(2)).to_event(1))
    assert (own.kind, own.size, own.num_inputs) == ("circle", 2, 4)
    angle = torch.tensor([[0.3, 3.1]])
    first, second = (own.inputs(value, constraints.real) for value in (angle, angle - 2 * torch.pi))
    torch.testing.assert_close(first, second)
    np.testing.assert_allclose(first[0], [np.cos(0.3), np.cos(3.1), np.sin(0.3), np.sin(3.1)], rtol=1e-5)


def test_points_on_spheres_are_read_as_they_are():
    fn = dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.0]))
    own = read(fn)
    value = fn.sample((5,))
    assert own.kind == "sphere"
    assert torch.equal(own.inputs(value, fn.support), value)


def test_an_improper_prior_keeps_the_units_of_unconstrained_space():
    own = read(dist.ImproperUniform(constraints.positive, (), ()))
    assert (own.loc.item(), own.scale.item()) == (0.0, 1.0)


def test_a_prior_without_spread_keeps_a_unit_of_one():
    own = read(dist.Delta(torch.tensor([2.0, 2.0])).to_event(1))
    assert own.scale.tolist() == [1.0, 1.0]


def test_a_support_without_a_map_onto_it_is_named():
    class Odd(constraints.Constraint):
        event_dim = 0

        def check(self, value):
            return value > 0

    class Strange(dist.Gamma):
        support = Odd()

    fn = Strange(1.0, 1.0)
    with pytest.raises(ModelError, match=r"'z' \(Strange\).*biject_to.*by hand") as caught:
        read(fn)
    assert caught.value.site == "z"


# Carrying distributions to supports.

SUPPORTS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "unit interval": constraints.unit_interval,
    "interval": constraints.interval(-2.0, 5.0),
    "greater than": constraints.greater_than(3.0),
    "less than": constraints.less_than(3.0),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_density_on_a_support_is_that_of_the_coordinate_times_the_jacobian(name):
    support = SUPPORTS[name]
    fn = transformed(dist.Normal(0.3, 0.8), support, 0)
    u = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    z = biject_to(support)(u)
    (slope,) = torch.autograd.grad(z.sum(), u)
    expected = stats.norm(0.3, 0.8).logpdf(u.detach()) - slope.abs().log().numpy()
    np.testing.assert_allclose(fn.log_prob(z.detach()), expected, rtol=1e-5, atol=1e-5)


def test_events_are_independent_over_their_axes():
    base = dist.Normal(torch.randn(4, 2, 3), torch.rand(4, 2, 3) + 0.5)
    fn = transformed(base, constraints.independent(constraints.positive, 2), 2)
    assert (fn.batch_shape, fn.event_shape) == ((4,), (2, 3))
    z = fn.sample()
    expected = stats.lognorm(base.scale.numpy(), scale=base.loc.exp().numpy()).logpdf(z.numpy()).sum((1, 2))
    np.testing.assert_allclose(fn.log_prob(z), expected, rtol=1e-4)


def test_vectors_are_carried_to_simplices_and_cholesky_factors():
    base = dist.Normal(torch.zeros(4, 3), 1.0)
    simplex = transformed(base, constraints.simplex, 1)
    assert (simplex.batch_shape, simplex.event_shape) == ((4,), (4,))
    factor = transformed(base, constraints.corr_cholesky, 2)
    assert (factor.batch_shape, factor.event_shape) == ((4,), (3, 3))
    assert constraints.corr_cholesky.check(factor.sample()).all()


# Points inside supports.


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(torch.zeros(4), 1.0),
        dist.Normal(torch.zeros(4, 3), 1.0).to_event(1),
        dist.Gamma(torch.ones(2), 1.0),
        dist.Beta(1.0, 1.0),
        dist.Uniform(10.0, 30.0),
        dist.Dirichlet(torch.ones(2, 4)),
        dist.LKJCholesky(3, torch.tensor(2.0)),
        ordered(),
        dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
        dist.VonMises(0.0, 1.0),
        dist.ProjectedNormal(torch.ones(3)),
        dist.Bernoulli(torch.full((3,), 0.5)),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_a_feasible_point_lies_in_the_support_and_is_the_same_for_all_rows(fn):
    point = feasible(fn)
    assert point.shape == fn.batch_shape + fn.event_shape
    assert fn.log_prob(point).isfinite().all()
    flat = point.reshape(-1, *fn.event_shape)
    assert (flat == flat[:1]).all()


def test_a_feasible_point_is_not_zero_where_a_weight_would_not_show():
    assert (feasible(dist.Normal(torch.zeros(4), 1.0).to_event(1)) != 0).all()
    assert feasible(dist.Normal(torch.zeros(4).double(), 1.0)).dtype == torch.float64
