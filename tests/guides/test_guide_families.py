"""Families of the guide: quadrature, SciPy and the Jacobian of the draw as oracles."""

import math
import subprocess
import sys

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import zuko
from scipy import stats
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_aevb.errors import SettingError
from pyro_aevb.guides.coordinates import Coordinates
from pyro_aevb.guides.families import Circular, Diagonal, Flow, FullCovariance, Spherical, neural_spline_flow
from pyro_aevb.program.divergence import closed_form_kl

INIT_SCALE = 0.3


@pytest.fixture(autouse=True)
def double():
    """Compute in double precision, so that quadrature is the only error; put back by the suite's own fixture."""
    torch.set_default_dtype(torch.float64)


def coordinates(event_shape=(), shape=None, *, kind="euclidean"):
    shape = event_shape if shape is None else shape
    size = math.prod(shape)
    return Coordinates(event_shape, shape, torch.linspace(-0.5, 0.7, size), torch.linspace(0.6, 1.4, size), kind)


def make(family, own):
    settings = {} if family is not Flow else {"make_flow": neural_spline_flow, "num_context": 4}
    made = family(own, INIT_SCALE, **settings)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def outputs_of(family, *batch):
    """Return parameters away from 0, wide enough to show the shape."""
    return 0.5 * torch.randn(*batch, family.num_outputs)


SUPPORTS = {
    "real": (constraints.real, lambda u: u),
    "positive": (constraints.positive, np.exp),
    "unit interval": (constraints.unit_interval, lambda u: 1 / (1 + np.exp(-u))),
    "interval": (constraints.interval(-2.0, 3.0), lambda u: -2 + 5 / (1 + np.exp(-u))),
}
"""Supports, and a map that spreads nodes over them."""
EUCLIDEAN = [Diagonal, FullCovariance, Flow]


@pytest.mark.parametrize("name", SUPPORTS)
@pytest.mark.parametrize("kind", EUCLIDEAN)
def test_densities_of_numbers_integrate_to_one(kind, name):
    support, spread = SUPPORTS[name]
    family = make(kind, coordinates())
    fn = family(outputs_of(family), support)
    assert (fn.batch_shape, fn.event_shape) == ((), ())
    nodes = spread(np.linspace(-20, 20, 40_001))
    middle = (nodes[1:] + nodes[:-1]) / 2
    with torch.no_grad():
        density = fn.log_prob(torch.as_tensor(middle)).exp().numpy()
    assert (density * np.diff(nodes)).sum() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("kind", EUCLIDEAN)
def test_densities_of_vectors_integrate_to_one(kind):
    """The trapezoid rule in the plane: exact to rounding for smooth densities, to 1e-3 where splines have kinks."""
    family = make(kind, coordinates((2,)))
    fn = family(outputs_of(family), constraints.real_vector)
    with torch.no_grad():
        draws = fn.sample((10_000,))
        first, second = (torch.linspace(part.min() - 1, part.max() + 1, 401) for part in draws.T)
        total = fn.log_prob(torch.stack(torch.meshgrid(first, second, indexing="ij"), -1)).exp().sum()
    assert (total * (first[1] - first[0]) * (second[1] - second[0])).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("kind", EUCLIDEAN)
def test_densities_on_the_simplex_integrate_to_one(kind):
    """Over the first two of three shares, by the midpoint rule."""
    family = make(kind, coordinates((3,), (2,)))
    fn = family(outputs_of(family), constraints.simplex)
    axis = (torch.arange(400) + 0.5) / 400
    first, second = torch.meshgrid(axis, axis, indexing="ij")
    shares = torch.stack([first, second, 1 - first - second], -1)[first + second < 1]
    with torch.no_grad():
        total = fn.log_prob(shares).exp().sum() / 400**2
    assert total.item() == pytest.approx(1.0, abs=5e-3)


def test_densities_of_angles_integrate_to_one_over_a_turn():
    family = make(Circular, coordinates(kind="circle"))
    angle = torch.linspace(-math.pi, math.pi, 2001)[:-1]
    for raw in (-2.0, 0.0, 3.0, 20.0):
        fn = family(torch.tensor([-1.4, -0.3, raw]), constraints.real)
        assert fn.log_prob(angle).exp().mean().item() * 2 * math.pi == pytest.approx(1.0, abs=1e-6)


def test_densities_on_the_sphere_integrate_to_one():
    family = make(Spherical, coordinates((3,), (3,), kind="sphere"))
    fn = family(torch.tensor([1.0, -2.0, 0.5]), dist.constraints.sphere)
    height, turn = torch.meshgrid(
        (torch.arange(400) + 0.5) / 200 - 1, torch.arange(400) * 2 * math.pi / 400, indexing="ij"
    )
    radius = (1 - height**2).sqrt()
    points = torch.stack([radius * turn.cos(), radius * turn.sin(), height], -1)
    total = fn.log_prob(points).exp().mean().item() * 4 * math.pi
    assert total == pytest.approx(1.0, abs=1e-4)
    assert (fn.batch_shape, fn.event_shape) == ((), (3,))


@pytest.mark.parametrize(
    ("event_shape", "shape", "support", "free"),
    [
        ((3,), (3,), constraints.real_vector, None),
        ((3,), (3,), constraints.independent(constraints.positive, 1), None),
        ((4,), (3,), constraints.simplex, slice(3)),
        ((2, 2), (2, 2), constraints.independent(constraints.unit_interval, 2), None),
        ((), (), constraints.positive, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", EUCLIDEAN)
def test_density_is_that_of_the_noise_over_the_volume_of_the_draws_jacobian(kind, event_shape, shape, support, free):
    family = make(kind, coordinates(event_shape, shape))
    parameters = outputs_of(family)
    noise = torch.randn(max(family.coordinates.size, 1))

    def draw(flat):
        """Push noise through the family's own transforms, base first."""
        fn = family(parameters, support)
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        transforms = getattr(fn, "transforms", [])
        base = getattr(fn, "base_dist", fn)
        while isinstance(base, torch.distributions.Independent):
            base = base.base_dist
        if isinstance(base, torch.distributions.MultivariateNormal) and kind is FullCovariance:
            z = base.loc + base.scale_tril @ flat
        elif kind is Diagonal:
            z = base.loc + base.scale * flat.reshape(base.loc.shape)
        else:
            z = flat
        for transform in transforms:
            z = transform(z)
        z = z.reshape(event_shape)
        return z if free is None else z[free]

    jacobian = torch.autograd.functional.jacobian(draw, noise)
    volume = torch.linalg.slogdet(jacobian.reshape(noise.numel(), noise.numel())).logabsdet
    expected = stats.norm.logpdf(noise.numpy()).sum() - volume.item()
    z = draw(noise)
    full = z if free is None else torch.cat([z, 1 - z.sum(-1, keepdim=True)])
    assert family(parameters, support).log_prob(full.detach()).item() == pytest.approx(expected, rel=1e-6, abs=1e-5)


def lower_triangle(size, raw, off):
    """Write the Cholesky factor entry by entry: rows of what lies below the diagonal, one after another."""
    factor, entries = np.zeros((size, size)), iter(off)
    for row in range(size):
        factor[row, row] = math.log1p(math.exp(10 * math.tanh(raw[row] / 10) + math.log(math.expm1(INIT_SCALE)))) + 1e-6
        for column in range(row):
            factor[row, column] = 3 * factor[row, row] * next(entries)
    return factor


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_covariance_is_that_of_the_factor_in_units_of_the_prior(size):
    own = coordinates((size,))
    family = make(FullCovariance, own)
    loc, raw, off = (torch.randn(count) for count in (size, size, size * (size - 1) // 2))
    fn = family(torch.cat([loc, raw, off]), constraints.real_vector)
    units = own.scale.numpy()
    factor = units[:, None] * lower_triangle(size, raw.tolist(), off.tolist())
    oracle = stats.multivariate_normal(own.loc.numpy() + units * loc.numpy(), factor @ factor.T)
    points = torch.randn(6, size)
    np.testing.assert_allclose(fn.log_prob(points), oracle.logpdf(points.numpy().squeeze()), rtol=1e-8)
    location, spread = family.units(torch.cat([loc, raw, off]))
    np.testing.assert_allclose(own.loc + own.scale * location, np.atleast_1d(oracle.mean))
    np.testing.assert_allclose(own.scale * spread, np.sqrt(np.diag(np.atleast_2d(oracle.cov))))


def test_the_diagonal_is_that_of_normals_in_units_of_the_prior():
    own = coordinates((3,))
    family = make(Diagonal, own)
    loc, raw = torch.randn(3), torch.randn(3)
    fn = family(torch.cat([loc, raw]), constraints.real)
    scale = own.scale * (softplus(10 * (raw / 10).tanh() + math.log(math.expm1(INIT_SCALE))) + 1e-6)
    oracle = stats.norm((own.loc + own.scale * loc).numpy(), scale.numpy())
    points = torch.randn(6, 3)
    np.testing.assert_allclose(fn.log_prob(points), oracle.logpdf(points.numpy()).sum(1), rtol=1e-8)
    location, spread = family.units(torch.cat([loc, raw]))
    np.testing.assert_allclose(own.loc + own.scale * location, oracle.mean())
    np.testing.assert_allclose(own.scale * spread, oracle.std())


@pytest.mark.parametrize("kind", [Diagonal, FullCovariance])
def test_outputs_of_zero_are_the_middle_of_the_prior_at_the_initial_scale(kind):
    own = coordinates((3,))
    fn = kind(own, INIT_SCALE)(torch.zeros(kind(own, INIT_SCALE).num_outputs), constraints.real_vector)
    np.testing.assert_allclose(fn.mean, own.loc)
    np.testing.assert_allclose(fn.variance.sqrt(), INIT_SCALE * own.scale, rtol=1e-5)


@pytest.mark.parametrize("kind", [Diagonal, FullCovariance])
def test_scales_never_reach_zero(kind):
    family = kind(coordinates((2,)), INIT_SCALE)
    fn = family(torch.full((family.num_outputs,), -1e4), constraints.real_vector)
    assert (fn.variance > 0).all()


@pytest.mark.parametrize("kind", [FullCovariance, Flow])
def test_what_is_weighed_where_scales_are_small_is_not_rounding(kind):
    """In units of the coordinates entries far above the diagonal had 1 in 100 rows of digits weighed as NaN or 1e16."""
    family = make(kind, coordinates((20,))).float()
    outputs = 0.2 * torch.randn(200, family.num_outputs)
    outputs[:, 20:40] = -4 + 2 * torch.randn(200, 20)
    z = family(outputs.float(), constraints.real_vector).sample()
    log_prob = family(outputs.float(), constraints.real_vector).log_prob(z)
    exact = family.double()(outputs.double(), constraints.real_vector).log_prob(z.double())
    assert (log_prob - exact).abs().max() < 0.1


# Flows.


@pytest.mark.parametrize(
    "support", [constraints.real_vector, constraints.independent(constraints.positive, 1)], ids=str
)
def test_a_draw_remembered_is_weighed_as_one_that_is_inverted(support):
    """With its gradient: of log q at its own draw, through the parameters and through the draw."""
    family = make(Flow, coordinates((3,)))
    parameters = outputs_of(family, 5).requires_grad_()
    results = []
    for is_remembered in (True, False):
        torch.manual_seed(3)
        fn = family(parameters, support)
        z = fn.rsample()
        weighed = fn if is_remembered else family(parameters, support)
        log_prob = weighed.log_prob(z if is_remembered else z.clone())
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), parameters)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flow", [neural_spline_flow, zuko.flows.MAF, zuko.flows.NSF], ids=["couplings", "MAF", "NSF"])
def test_any_invertible_flow_will_do(flow):
    family = Flow(coordinates((2,)), INIT_SCALE, flow, 4).double()
    fn = family(outputs_of(family, 7), constraints.real_vector)
    z = fn.rsample()
    again = family(outputs_of(family, 7), constraints.real_vector)
    assert z.shape == (7, 2)
    assert fn.log_prob(z).isfinite().all()
    assert again.log_prob(z.clone()).isfinite().all()


def test_the_checks_of_distributions_stay_on():
    """Importing Zuko alone switches them off in the whole process, which is why this takes one of its own."""
    program = """
import torch
from pyro_aevb.guides.families import neural_spline_flow
assert torch.distributions.Distribution._validate_args
neural_spline_flow(2, 1)
assert torch.distributions.Distribution._validate_args
torch.distributions.Distribution.set_default_validate_args(False)
neural_spline_flow(2, 1)
assert not torch.distributions.Distribution._validate_args
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_rows_have_flows_of_their_own():
    """In a batch as alone."""
    family = make(Flow, coordinates((2,)))
    parameters, z = outputs_of(family, 4), torch.randn(4, 2)
    both = family(parameters, constraints.real_vector).log_prob(z)
    alone = [family(parameters[row], constraints.real_vector).log_prob(z[row]) for row in range(4)]
    torch.testing.assert_close(both, torch.stack(alone))
    first, *others = (family(parameters[row], constraints.real_vector).log_prob(z[0]) for row in range(4))
    assert all(abs(first - other) > 1e-3 for other in others)


def test_a_flow_without_context_is_one_for_all():
    family = Flow(coordinates((2,)), INIT_SCALE, neural_spline_flow, 0)
    assert family.num_outputs == FullCovariance(coordinates((2,)), INIT_SCALE).num_outputs
    fn = family(torch.zeros(family.num_outputs), constraints.real_vector)
    assert fn.rsample((6,)).shape == (6, 2)


def test_a_flow_that_has_no_inverse_is_refused():
    with pytest.raises(SettingError, match=r"zuko\.flows\.NSF.*GMM"):
        Flow(coordinates((2,)), INIT_SCALE, lambda features, context: zuko.flows.GMM(features, context), 2)


# Angles.


def test_a_direction_in_the_plane_is_the_location_of_an_angle():
    family = Circular(coordinates(kind="circle"), INIT_SCALE)
    for angle in (0.0, 1.0, 3.0, -3.0):
        outputs = torch.tensor([2 * math.cos(angle) - 1, 2 * math.sin(angle), 0.0])
        fn = family(outputs, constraints.real)
        assert fn.mean.item() == pytest.approx(angle)
        z = torch.linspace(-3, 3, 7)
        turns = np.arange(-5, 6)[:, None] * 2 * np.pi
        expected = stats.norm(angle, INIT_SCALE).pdf(z.numpy() + turns).sum(0)
        np.testing.assert_allclose(fn.log_prob(z).exp(), expected, rtol=1e-4, atol=1e-12)


def test_several_angles_are_an_event():
    family = Circular(coordinates((2,), kind="circle"), INIT_SCALE)
    fn = family(outputs_of(family, 5), constraints.real)
    assert (fn.batch_shape, fn.event_shape) == ((5,), (2,))
    assert fn.log_prob(fn.rsample()).shape == (5,)


# Closed forms.


@pytest.mark.parametrize(
    ("prior", "event_shape"),
    [
        (dist.Normal(0.4, 1.3), ()),
        (dist.LogNormal(0.4, 1.3), ()),
        (dist.Normal(torch.tensor([0.4, -1.0]), 1.3).to_event(1), (2,)),
        (dist.LogNormal(torch.tensor([0.4, -1.0]), 1.3).to_event(1), (2,)),
        (dist.Normal(torch.zeros(2, 3), 1.3).to_event(2), (2, 3)),
    ],
    ids=["normal", "lognormal", "normals", "lognormals", "matrix"],
)
def test_the_divergence_from_a_prior_of_independent_normals_is_in_closed_form(prior, event_shape):
    """KL(N(m, s) || N(a, b)) = log(b / s) + (s^2 + (m - a)^2) / (2 b^2) - 1/2, whatever both are mapped to."""
    family = Diagonal(coordinates(event_shape), INIT_SCALE)
    outputs = outputs_of(family, 4)
    kl = closed_form_kl(family(outputs, prior.support), prior)
    location, spread = family.units(outputs)
    m = family.coordinates.loc + family.coordinates.scale * location
    s = family.coordinates.scale * spread
    a = torch.tensor([0.4, -1.0]) if event_shape == (2,) else torch.tensor(0.4 if event_shape == () else 0.0)
    expected = ((1.3 / s).log() + (s**2 + (m - a) ** 2) / (2 * 1.3**2) - 0.5).reshape(4, -1).sum(1)
    torch.testing.assert_close(kl, expected)


def test_the_divergence_of_two_multivariate_normals_is_in_closed_form():
    family = FullCovariance(coordinates((2,)), INIT_SCALE)
    q = family(outputs_of(family), constraints.real_vector)
    p = dist.MultivariateNormal(torch.tensor([0.5, -0.5]), torch.tensor([[1.0, 0.3], [0.3, 2.0]]))
    kl, z = closed_form_kl(q, p), q.sample((100_000,))
    difference = q.log_prob(z) - p.log_prob(z)
    assert abs(difference.mean() - kl) < 5 * difference.std() / 100_000**0.5
