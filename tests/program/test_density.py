"""Densities by row against closed forms, against sums by hand with Jacobians by autograd, and against themselves row by row."""

import math
import warnings
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from model_classes.base import ModelClass
from model_classes.registry import REGISTRY
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_aevb.errors import ParticleWarning
from pyro_aevb.program.density import Density, LogDensity
from pyro_aevb.testing import BetaBinomial, EightSchools, GammaPoisson, LinearGaussian, NormalNormal

LEADING = (2, 3)

every_entry = pytest.mark.parametrize("entry", REGISTRY.values(), ids=REGISTRY.keys())


def in_double(batch):
    args, kwargs = batch

    def convert(item):
        return item.double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item

    return tuple(map(convert, args)), {name: convert(item) for name, item in kwargs.items()}


@cache
def of_entry(name: str):
    """Return the density of an entry's test rows; of models with globals all as one row."""
    entry: ModelClass = REGISTRY[name]
    args, kwargs = in_double(entry.test_batch())
    has_globals = entry.joint and entry.name != "learned_offset"
    plate = None if has_globals else entry.data_plate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParticleWarning)
        return LogDensity(entry.model, *args, data_plate=plate, **kwargs), (args, kwargs)


def noise(density: LogDensity, *leading: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, density.num_rows, density.dim, generator=generator, dtype=torch.float64)


# By hand


def as_the_model_has_it(value, node, data_plate):
    """Lay a result ``[rows, inner plates, *event]`` out as a site's value lies in the model's trace."""
    frames = sorted(node["cond_indep_stack"], key=lambda frame: frame.name != data_plate)
    dims = [frame.dim for frame in frames if frame.size > 1]
    if data_plate is None:
        value = value[0]
    batch = len(node["fn"].batch_shape)
    own = value.reshape([frame.size for frame in frames if frame.size > 1] + list(node["fn"].event_shape))
    for _ in range(batch - len(dims)):
        own = own.unsqueeze(len(dims))
    unused = [dim for dim in range(-batch, 0) if dim not in dims]
    order = [(dims + unused).index(dim) for dim in range(-batch, 0)]
    return own.permute((*order, *range(batch, own.dim())))


def to_rows(log_prob, node, data_plate):
    if data_plate is None:
        return log_prob.sum().reshape(1)
    dim = next(frame.dim for frame in node["cond_indep_stack"] if frame.name == data_plate)
    return log_prob.movedim(dim, 0).flatten(1).sum(1) if log_prob.dim() > 1 else log_prob


def by_hand(model, args, kwargs, values, data_plate):
    """Sum torch's densities over a plain run: priors without masks, likelihoods with theirs."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
        own = {name: as_the_model_has_it(value, nodes[name], data_plate) for name, value in values.items()}
        trace = poutine.trace(poutine.condition(model, data=own)).get_trace(*args, **kwargs)
        trace.compute_log_prob()
    prior = likelihood = 0.0
    for name, node in trace.nodes.items():
        if name in values:
            prior = prior + to_rows(node["fn"].log_prob(node["value"]), node, data_plate)
        elif node["type"] == "sample" and node["is_observed"] and type(node["fn"]).__name__ != "_Subsample":
            inside = data_plate is None or any(frame.name == data_plate for frame in node["cond_indep_stack"])
            likelihood = likelihood + to_rows(node["log_prob"], node, data_plate) if inside else likelihood
    return prior, likelihood


def free(value, site):
    """Return the coordinates of an event that its density is with respect to."""
    kind = str(site.support)
    if kind.startswith("Simplex"):
        return value[..., :-1].flatten()
    if kind.startswith("CorrCholesky"):
        lower = torch.ones(value.shape[-2:]).tril(-1).bool()
        return value[..., lower].flatten()
    return value.flatten()


def log_jacobian_by_autograd(density, u):
    """Return log|dz/du| of the first rows, each from its whole Jacobian."""
    sites = density.structure.sites
    rows = []
    for row in range(min(3, density.num_rows)):
        one = density.rows(slice(row, row + 1)) if density.chunk_rows is None else density

        def flat(u, one=one):
            return torch.cat([free(value, sites[name]) for name, value in one.constrain(u[None]).items()])

        jacobian = torch.autograd.functional.jacobian(flat, u[row])
        assert jacobian.shape == (density.dim, density.dim)
        rows.append(torch.linalg.slogdet(jacobian).logabsdet)
    return torch.stack(rows)


@every_entry
def test_prior_and_likelihood_are_the_sums_by_hand(entry):
    density, (args, kwargs) = of_entry(entry.name)
    u = noise(density)
    found = density(u)
    data_plate = density.structure.data_plate
    prior, likelihood = by_hand(entry.model, args, kwargs, density.constrain(u), data_plate)
    jacobian = log_jacobian_by_autograd(density, u)
    rows = len(jacobian)
    torch.testing.assert_close(found.log_prior[:rows], (prior[:rows] + jacobian).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_likelihood, likelihood.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [LinearGaussian, GammaPoisson, BetaBinomial])
def test_joint_less_posterior_is_the_evidence_at_any_u(kind):
    """log p(x, z) - log p(z | x) = log p(x); the Jacobian of both is the same and comes here from autograd."""
    model, _ = kind.fixture()
    x, _ = model.simulate(3, seed=1)
    density = LogDensity(model.model, x)
    u = noise(density)
    ((_, posterior),) = model.posterior(x).items()
    ((_, value),) = density.constrain(u).items()
    joint = density.log_joint(u) - log_jacobian_by_autograd(density, u)
    torch.testing.assert_close(joint - posterior.log_prob(value), model.log_marginal(x), rtol=0, atol=1e-10)


def test_eight_schools_is_one_row():
    model, y = EightSchools.fixture()
    density = LogDensity(model.model, y, data_plate=None)
    assert (density.num_rows, density.dim) == (1, 10)
    u = noise(density, 4)
    mu, tau, theta = u[:, 0, 0], u[:, 0, 1].exp(), u[:, 0, 2:]
    by_hand = (
        torch.distributions.Normal(0.0, 5.0).log_prob(mu)
        + torch.distributions.HalfCauchy(5.0).log_prob(tau)
        + u[:, 0, 1]
        + torch.distributions.Normal(0.0, 1.0).log_prob(theta).sum(-1)
        + torch.distributions.Normal(mu[:, None] + tau[:, None] * theta, torch.tensor(model.standard_errors))
        .log_prob(y)
        .sum(-1)
    )
    torch.testing.assert_close(density.log_joint(u)[:, 0], by_hand, rtol=0, atol=1e-5)


def angle(x):
    with pyro.plate("data", len(x)):
        phi = pyro.sample("phi", dist.VonMises(x.new_tensor(2.0), x.new_tensor(1.5)))
        pyro.sample("x", dist.Normal(phi.cos(), 0.5), obs=x)


def within_another(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.LogNormal(x.new_zeros(()), 0.5))
        part = pyro.sample("part", dist.Uniform(-top, 2 * top))
        pyro.sample("x", dist.Normal(part, 1.0), obs=x)


def test_the_density_of_an_angle_integrates_to_one():
    density = LogDensity(angle, torch.zeros(1).double())
    u = torch.linspace(-30, 30, 20001).double()[:, None, None]
    assert torch.trapezoid(density.log_prior(u)[:, 0].exp(), u[:, 0, 0]).item() == pytest.approx(1, abs=1e-6)
    assert density.unconstrain({"phi": torch.tensor([3 * math.pi / 2], dtype=torch.float64)}).item() == pytest.approx(
        density.unconstrain({"phi": torch.tensor([-math.pi / 2], dtype=torch.float64)}).item(), abs=1e-9
    )


def test_a_support_that_an_earlier_latent_ends_is_that_of_the_same_run():
    density = LogDensity(within_another, torch.zeros(1).double())
    line = torch.linspace(-14, 14, 281).double()
    u = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)[..., None, :]
    values = density.constrain(u)
    assert ((values["part"] > -values["top"]) & (values["part"] < 2 * values["top"])).float().mean() > 0.99
    mass = torch.trapezoid(torch.trapezoid(density.log_prior(u)[..., 0].exp(), line), line)
    assert mass.item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(density.unconstrain(values)[100:180, 100:180], u[100:180, 100:180], rtol=0, atol=1e-8)


# Leading axes, chunks, rows


@every_entry
def test_leading_axes_are_as_many_single_runs(entry):
    density, _ = of_entry(entry.name)
    u = noise(density, *LEADING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParticleWarning)
        whole, values = density(u), density.constrain(u)
    for index in [(0, 0), (1, 2)]:
        single = density(u[index])
        torch.testing.assert_close(whole.log_prior[index], single.log_prior, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(whole.log_likelihood[index], single.log_likelihood, rtol=1e-9, atol=1e-9)
        for name, value in density.constrain(u[index]).items():
            torch.testing.assert_close(values[name][index], value, rtol=1e-12, atol=1e-12)


@every_entry
def test_unconstrain_undoes_constrain(entry):
    density, _ = of_entry(entry.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParticleWarning)
        u = density.draw_prior(5, seed=0).double()
        values = density.constrain(u)
        again = density.constrain(density.unconstrain(values))
    for name, value in values.items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["positive", "simplex", "nested_counts", "ragged_series", "obs_mask_normal"])
def test_chunks_of_seven_rows_are_all_rows(name):
    entry = REGISTRY[name]
    args, kwargs = in_double(entry.simulate(20, seed=3))
    density = LogDensity(entry.model, *args, data_plate=entry.data_plate, **kwargs)
    u = noise(density, 2)
    parts = [slice(start, start + 7) for start in (0, 7, 14)]
    joint = torch.cat([density.rows(part).log_joint(u[:, part]) for part in parts], -1)
    torch.testing.assert_close(joint, density.log_joint(u), rtol=0, atol=1e-10)
    index = torch.tensor([19, 3, 3, 8])
    torch.testing.assert_close(density.rows(index).log_joint(u[:, index]), joint[:, index], rtol=0, atol=1e-10)
    within = density.rows(slice(7, 14)).rows(torch.tensor([2, 0]))
    torch.testing.assert_close(within.log_joint(u[:, [9, 7]]), joint[:, [9, 7]], rtol=0, atol=1e-10)
    draws = density.draw_prior(6, seed=4)
    assert torch.equal(torch.cat([density.rows(part).draw_prior(6, seed=4) for part in parts], 1), draws)
    assert torch.equal(density.rows(index).draw_prior(6, seed=4), draws[:, index])


def test_draws_in_many_blocks_are_the_same_in_any_chunk(monkeypatch):
    monkeypatch.setattr("pyro_aevb.program.model_rows.BLOCK_DRAWS", 12)
    model, _ = GammaPoisson.fixture()
    density = LogDensity(model.model, model.simulate(10)[0])
    draws = density.draw_prior(4, seed=1)
    assert len(draws.unique()) == draws.numel()
    index = torch.tensor([9, 0, 4, 4])
    assert torch.equal(density.rows(index).draw_prior(4, seed=1), draws[:, index])
    assert not torch.equal(density.draw_prior(4, seed=2), draws)


def test_draws_have_the_prior_s_moments():
    model = GammaPoisson()
    density = LogDensity(model.model, model.simulate(3)[0])
    rate = density.constrain(density.draw_prior(20_000, seed=0))["rate"]
    mean, sd = model.concentration / model.rate, model.concentration**0.5 / model.rate
    # 3 rows, 5 standard errors: fails once in 600,000 runs
    assert ((rate.mean(0) - mean).abs() < 5 * sd / 20_000**0.5).all()


@pytest.mark.parametrize("name", ["chain", "correlation", "circular", "crossed", "volatility", "images_convolutional"])
def test_gradients_are_finite_differences(name):
    assert_gradient(of_entry(name)[0])


@pytest.mark.parametrize("kind", [GammaPoisson, BetaBinomial])
def test_gradients_through_bijections_are_finite_differences(kind):
    model, x = kind.fixture()
    assert_gradient(LogDensity(model.model, x))


def test_gradients_through_moving_supports_are_finite_differences():
    assert_gradient(LogDensity(within_another, torch.zeros(2).double()))


def assert_gradient(density):
    u = noise(density).requires_grad_()
    (gradient,) = torch.autograd.grad(density.log_joint(u).sum(), u)
    step = 1e-5
    for dim in range(density.dim):
        shift = torch.zeros(density.dim).double()
        shift[dim] = step
        slope = (density.log_joint(u + shift) - density.log_joint(u - shift)) / (2 * step)
        torch.testing.assert_close(gradient[:, dim], slope.detach(), rtol=1e-5, atol=1e-5)


# Globals


def test_values_of_globals_have_leading_axes_of_their_own():
    """Given g, rows are independent: log p(x_n | g) = log N(x_n; g, tau^2 + sigma^2)."""
    model, x = NormalNormal.fixture()
    g = torch.tensor([-1.0, 0.5, 2.0]).double()
    density = LogDensity(model.model, x, given={"g": g})
    u = noise(density, 3, 2)
    z = u[..., 0]
    prior = torch.distributions.Normal(g[:, None, None], model.local_scale).log_prob(z)
    likelihood = torch.distributions.Normal(z, model.noise_scale).log_prob(x)
    torch.testing.assert_close(density(u).log_prior, prior, rtol=0, atol=1e-12)
    torch.testing.assert_close(density(u).log_likelihood, likelihood, rtol=0, atol=1e-12)
    single = density.given({"g": g[1]}).rows(slice(2, 5))
    torch.testing.assert_close(single.log_prior(u[1, :, 2:5]), prior[1, :, 2:5], rtol=0, atol=1e-12)
    draws = density.draw_prior(4000, seed=0)
    assert draws.shape == (3, 4000, 8, 1)
    error = model.local_scale / (4000 * 8) ** 0.5
    assert ((draws.mean((1, 2, 3)) - g).abs() < 5 * error).all()


def features(x):
    with pyro.plate("features", x.shape[1]):
        loading = pyro.sample("loading", dist.LogNormal(x.new_zeros(()), 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z[..., None] * loading[..., None, :], 0.5).to_event(1), obs=x)


def test_globals_in_a_plate():
    x = torch.linspace(-1, 1, 15).double().reshape(5, 3)
    loading = torch.tensor([[0.5, 1.0, 2.0], [1.5, 0.2, 0.7]]).double()
    for given in (loading, loading[0]):
        density = LogDensity(features, x, given={"loading": given})
        u = noise(density, *given.shape[:-1], 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParticleWarning)
            found = density.log_likelihood(u)
        loc = u * given[..., None, None, :]
        expected = torch.distributions.Normal(loc, 0.5).log_prob(x).sum(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_rows_without_latents_have_a_likelihood_alone():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    x = torch.tensor([0.3, -1.0]).double()
    density = LogDensity(model, x, given={"mean": torch.tensor([0.5, 1.0]).double()})
    assert density.dim == 0
    found = density(torch.empty(2, 7, 2, 0).double())
    assert torch.equal(found.log_prior, torch.zeros(2, 7, 2).double())
    expected = torch.distributions.Normal(torch.tensor([0.5, 1.0]).double()[:, None, None], 1.0).log_prob(x)
    torch.testing.assert_close(found.log_likelihood, expected.expand(2, 7, 2))
    assert density.draw_prior(3).shape == (2, 3, 2, 0)


# Masks


def test_a_masked_latent_keeps_its_prior_and_masked_data_do_not_count():
    def model(x, present):
        with pyro.plate("data", len(x)), poutine.mask(mask=present):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).mask(present[:, None]).to_event(1))
            pyro.sample("x", dist.Normal(z + w.sum(-1), 1.0), obs=x)

    x, present = torch.tensor([1.0, 2.0]).double(), torch.tensor([True, False])
    density = LogDensity(model, x, present)
    u = noise(density, 3)
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(density(u).log_prior, normal.log_prob(u).sum(-1), rtol=0, atol=1e-12)
    likelihood = normal.log_prob(x - u.sum(-1))
    torch.testing.assert_close(density(u).log_likelihood[:, 0], likelihood[:, 0], rtol=0, atol=1e-12)
    assert (density(u).log_likelihood[:, 1] == 0).all()


def test_an_evaluation_draws_nothing_for_what_obs_mask_leaves_out():
    density, _ = of_entry("obs_mask_counts")
    assert set(density.constrain(noise(density))) == {"z"}
    before = torch.get_rng_state()
    first = density.log_joint(noise(density, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, density.log_joint(noise(density, 2)))


# Programs of every kind


class Decoder(nn.Module):
    """Modules of fixed rank and of two modes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)
        self.net = nn.Sequential(
            nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 2)
        )

    def forward(self, z):
        return self.net(self.linear(z))


def test_modules_run_in_eval_mode_with_their_parameters_as_constants():
    torch.manual_seed(0)
    decoder = Decoder().double()
    x = torch.randn(5, 1, 3, 3).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(3), obs=x)

    density = LogDensity(model, x)
    u = noise(density, *LEADING).requires_grad_()
    state = {name: item.clone() for name, item in decoder.state_dict().items()}
    joint = density.log_joint(u)
    joint.sum().backward()
    assert u.grad is not None
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert decoder.training
    assert not pyro.get_param_store()
    assert all(torch.equal(item, state[name]) for name, item in decoder.state_dict().items())
    decoder.eval()
    loc = decoder(u.detach().reshape(-1, 2)).reshape(*u.shape[:-1], 1, 3, 3)
    expected = dist.Normal(loc, 1.0).log_prob(x).sum((-1, -2, -3)) + dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
    torch.testing.assert_close(joint, expected)
    single = density.log_joint(u[0, 1])
    assert torch.autograd.grad(single.sum(), u)[0][0, 1].isfinite().all()


class Model(PyroModule):
    """A model with a parameter on a constrained space."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.5).double(), constraint=dist.constraints.positive)

    def forward(self, x):
        shift = pyro.param("shift", torch.tensor(0.3).double())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + shift, self.scale), obs=x)


def test_parameters_of_pyro_are_constants_and_the_store_stays_as_it_was():
    pyro.clear_param_store()
    x = torch.tensor([0.1, -2.0]).double()
    density = LogDensity(Model(), x)
    assert not pyro.get_param_store()
    u = noise(density, 3).requires_grad_()
    likelihood = density.log_likelihood(u)
    torch.testing.assert_close(likelihood, dist.Normal(u[..., 0] + 0.3, 0.5).log_prob(x))
    assert not pyro.get_param_store()
    pyro.param("shift", torch.tensor(-1.0).double())
    torch.testing.assert_close(density.log_likelihood(u), dist.Normal(u[..., 0] - 1.0, 0.5).log_prob(x))
    likelihood.sum().backward()
    assert pyro.param("shift").grad is None
    pyro.clear_param_store()


def test_a_model_that_does_not_broadcast_runs_chain_by_chain_and_says_so_once():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_ones(()), 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z[:, 0] - z[:, 1], 1.0), obs=x)

    x = torch.linspace(-1, 1, 5).double()
    with pytest.warns(ParticleWarning, match="one by one") as caught:  # noqa: PT031
        density = LogDensity(model, x)
        u = noise(density, *LEADING)
        joint = density.log_joint(u)
        draws = density.draw_prior(3, seed=0)
    assert len([item for item in caught if item.category is ParticleWarning]) == 1
    z = u.exp()
    prior = torch.distributions.Gamma(1.0, 1.0).log_prob(z) + u
    expected = prior.sum(-1) + torch.distributions.Normal(z[..., 0] - z[..., 1], 1.0).log_prob(x)
    torch.testing.assert_close(joint, expected)
    assert draws.shape == (3, 5, 2)
    torch.testing.assert_close(density.unconstrain(density.constrain(u)), u)


def draws_own_rows(x):
    with pyro.plate("data", len(x), subsample_size=4) as index:
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(z), obs=x[index])


def test_a_model_that_draws_its_own_rows_runs_in_chunks_of_them():
    x = torch.arange(10.0)
    density = LogDensity(draws_own_rows, x)
    assert (density.num_rows, density.chunk_rows) == (10, 4)

    def plain(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(pyro.sample("z", dist.Gamma(2.0, 1.0))), obs=x)

    expected = LogDensity(plain, x)
    u = noise(density, 3).float()
    torch.testing.assert_close(density.log_joint(u), expected.log_joint(u))
    rows = torch.tensor([9, 1, 5])
    torch.testing.assert_close(density.rows(rows).log_joint(u[:, rows]), expected.log_joint(u)[:, rows])
    assert torch.equal(density.rows(rows).draw_prior(2, seed=0), density.draw_prior(2, seed=0)[:, rows])


def test_a_model_of_a_fixed_number_of_rows_runs_them_all():
    scale = torch.linspace(0.5, 2.0, 6).double()
    data = torch.linspace(-1, 1, 6).double()

    def sized(x):
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, scale)), 1.0), obs=x)

    def closed():
        sized(data)

    for density in (LogDensity(sized, data), LogDensity(closed)):
        assert density.chunk_rows == density.num_rows == 6
        u = noise(density, 2)
        expected = dist.Normal(0.0, scale).log_prob(u[..., 0]) + dist.Normal(u[..., 0], 1.0).log_prob(data)
        torch.testing.assert_close(density.log_joint(u), expected)
        rows = torch.tensor([4, 1])
        torch.testing.assert_close(density.rows(rows).log_joint(u[:, rows]), expected[:, rows])


def test_dtype_is_that_of_the_latents():
    x = torch.zeros(3)
    assert LogDensity(angle, x).dtype == torch.float32
    density = LogDensity(angle, x.double())
    assert density.dtype == torch.float64
    assert density.log_joint(noise(density)).dtype == torch.float64
    assert density.draw_prior(2).dtype == torch.float64


# Plain functions


def test_plain_functions():
    scale = torch.tensor([1.0, 2.0, 3.0])[:, None]
    density = LogDensity.from_function(
        lambda u: dist.Normal(0.0, 1.0).log_prob(u).sum(-1),
        lambda u: -(u / scale).square().sum(-1),
        2,
        rows=3,
        draw_prior=lambda count: torch.randn(count, 3, 2),
    )
    assert (density.num_rows, density.dim, density.structure, density.chunk_rows) == (3, 2, None, 3)
    u = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    expected = dist.Normal(0.0, 1.0).log_prob(u).sum(-1) - (u / scale).square().sum(-1)
    torch.testing.assert_close(density.log_joint(u), expected)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(density.rows(rows).log_joint(u[:, rows]), expected[:, rows])
    assert torch.equal(density.rows(rows).draw_prior(5, seed=0), density.draw_prior(5, seed=0)[:, rows])
    assert torch.equal(density.unconstrain(density.constrain(u)), u)
    assert density.given({}).log_joint(u).shape == (4, 3)


def test_an_empty_side_empties_the_joint():
    inf = math.inf
    joint = Density(torch.tensor([inf, -inf, -inf, 1.0]), torch.tensor([-inf, inf, 0.0, 2.0])).log_joint
    assert torch.equal(joint, torch.tensor([-inf, -inf, -inf, 3.0]))
