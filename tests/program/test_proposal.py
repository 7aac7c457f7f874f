"""Guides as densities of u: exact posteriors give the evidence at any u; draws, gradients, chunks and refusals."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from model_classes.registry import REGISTRY
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from torch import nn

from pyro_aevb import AutoAmortizedFlow, AutoAmortizedMultivariateNormal, AutoAmortizedNormal
from pyro_aevb.distributions.wrapped_normal import WrappedNormal
from pyro_aevb.errors import GuideError, ModelError, ParticleWarning, SettingError
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.testing import (
    BetaBinomial,
    GammaPoisson,
    HierarchicalNormal,
    LinearGaussian,
    LinearGaussianStateSpace,
    NormalNormal,
)

X = torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7, -0.2])


def noise(density, *leading, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*leading, density.num_rows, density.dim, generator=generator, dtype=dtype)


def both(model, guide, *batch, **settings):
    density = LogDensity(model, *batch, **settings)
    return density, GuideDensity(guide, density)


# Exact posteriors


@pytest.mark.parametrize("kind", [LinearGaussian, GammaPoisson, BetaBinomial, LinearGaussianStateSpace])
def test_the_joint_less_an_exact_posterior_is_the_evidence(kind):
    model, _ = kind.fixture()
    x, _ = model.simulate(5, seed=1)
    density, guide = both(model.model, model.guide, x)
    u, log_q = guide.draw(7, seed=0)
    exact = model.log_marginal(x)
    torch.testing.assert_close(density.log_joint(u) - log_q, exact.expand(7, 5), rtol=0, atol=1e-9)
    anywhere = noise(density, 2, 3)
    log_q, log_joint = guide.path(anywhere)
    torch.testing.assert_close(log_joint - log_q, exact.expand(2, 3, 5), rtol=0, atol=1e-9)
    assert torch.equal(log_joint, density.log_joint(anywhere))
    assert torch.equal(log_q, guide.log_density(anywhere))


def test_given_globals_it_is_the_evidence_given_them():
    """p(x_n | g) = N(g, tau^2 + sigma^2), for g with leading axes of their own."""
    model, x = NormalNormal.fixture()
    g = torch.tensor([-1.0, 0.5, 2.0]).double()
    density, guide = both(model.model, model.guide, x, given={"g": g})
    sd = (model.local_scale**2 + model.noise_scale**2) ** 0.5
    exact = torch.distributions.Normal(g[:, None], sd).log_prob(x)
    u, log_q = guide.draw(4, seed=0)
    assert u.shape == (3, 4, 8, 1)
    torch.testing.assert_close(density.log_joint(u) - log_q, exact[:, None].expand(3, 4, 8), rtol=0, atol=1e-10)
    other = guide.given({"g": g[2]})
    log_q, log_joint = other.path(u[0])
    torch.testing.assert_close(log_joint - log_q, exact[2].expand(4, 8), rtol=0, atol=1e-10)


def angle(x):
    with pyro.plate("data", len(x)):
        phi = pyro.sample("phi", dist.VonMises(x.new_tensor(2.0), x.new_tensor(1.5)))
        pyro.sample("x", dist.Normal(phi.cos(), 0.5), obs=x)


def angle_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("phi", WrappedNormal(2.8 + x, x.new_tensor(0.9)))


def rate(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))), obs=x)


def rate_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.LogNormal(0.1 * x, 0.5))


@pytest.mark.parametrize(("model", "guide"), [(angle, angle_guide), (rate, rate_guide)])
def test_it_integrates_to_one(model, guide):
    _, proposal = both(model, guide, torch.tensor([1.0, 2.0]).double())
    u = torch.linspace(-30, 30, 20001).double()
    log_q = proposal.log_density(u[:, None, None].expand(-1, 2, 1))
    torch.testing.assert_close(torch.trapezoid(log_q.exp(), u, dim=0), torch.ones(2).double(), rtol=0, atol=1e-6)
    draws, weights = proposal.draw(5, seed=0)
    torch.testing.assert_close(proposal.log_density(draws), weights, rtol=0, atol=1e-9)


def test_draws_have_the_guide_s_moments():
    _, proposal = both(rate, rate_guide, torch.tensor([0.0, 5.0]).double())
    u, _ = proposal.draw(20_000, seed=0)
    # 5 standard errors, two rows: fails once in a million runs
    assert ((u[..., 0].mean(0) - torch.tensor([0.0, 0.5])).abs() < 5 * 0.5 / 20_000**0.5).all()
    assert ((u[..., 0].std(0) - 0.5).abs() < 5 * 0.5 / 40_000**0.5).all()


# Guides that build themselves

BUILT = [
    (AutoAmortizedNormal, "nested_latents"),
    (AutoAmortizedNormal, "ragged_series"),
    (AutoAmortizedNormal, "circular"),
    (AutoAmortizedNormal, "obs_mask_counts"),
    (AutoAmortizedMultivariateNormal, "simplex"),
    (AutoAmortizedFlow, "vector_bernoulli"),
]


@pytest.mark.parametrize(("kind", "name"), BUILT)
def test_what_built_guides_draw_weighs_the_same_when_it_is_placed(kind, name):
    entry = REGISTRY[name]
    args, kwargs = entry.test_batch()
    pyro.set_rng_seed(0)
    auto = kind(entry.model)
    auto.build(*args, **kwargs)
    density = LogDensity(entry.model, *args, **kwargs)
    proposal = GuideDensity(auto, density)
    u, log_q = proposal.draw(6, seed=1)
    torch.testing.assert_close(proposal.log_density(u), log_q, rtol=1e-3, atol=1e-3)
    single = proposal.log_density(u[2])
    torch.testing.assert_close(single, log_q[2], rtol=1e-3, atol=1e-3)
    part = slice(1, 4)
    again, log_q_again = proposal.rows(part).draw(6, seed=1)
    assert torch.equal(again, u[:, part])
    assert torch.equal(log_q_again, log_q[:, part])
    assert not any(parameter.grad is not None for parameter in auto.parameters())


@pytest.mark.parametrize("global_guide", ["normal", "multivariate_normal"])
def test_guides_of_globals_and_locals_take_the_globals_as_given(global_guide):
    model, x = HierarchicalNormal.fixture()
    pyro.set_rng_seed(0)
    auto = AutoAmortizedNormal(model.model, global_guide=global_guide)
    auto.build(x)
    _, latents = model.simulate(2)
    given = {name: torch.stack([value, value + 0.5]) for name, value in latents.items() if value.dim() == 0}
    _, proposal = both(model.model, auto, x, given=given)
    u, log_q = proposal.draw(3, seed=0)
    torch.testing.assert_close(proposal.log_density(u), log_q, rtol=1e-5, atol=1e-5)
    values = {name: value[1] for name, value in given.items()}
    z = u[1, 2, :, 0]
    run = poutine.trace(poutine.condition(auto, data=values | {"theta": z[:, None]})).get_trace(x)
    by_hand = run.nodes["theta"]["fn"].log_prob(z[:, None])[:, 0]
    torch.testing.assert_close(log_q[1, 2], by_hand.detach(), rtol=1e-5, atol=1e-5)


# Gradients, masks, chunks


class Encoder(nn.Module):
    """A guide with parameters and dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()

    def forward(self, x):
        loc, log_scale = self.net(x[:, None]).unbind(-1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(loc, log_scale.exp()))
            pyro.sample("w", dist.Normal(z.log() * x, 1.0))


def two_latents(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def test_gradients_are_finite_differences_and_leave_parameters_alone():
    torch.manual_seed(0)
    encoder = Encoder()
    density, proposal = both(two_latents, encoder, X.double())
    u = noise(density, 3).requires_grad_()
    log_q, log_joint = proposal.path(u)
    total = 0.3 * log_q + 0.7 * log_joint
    (gradient,) = torch.autograd.grad(total.sum(), u)
    for dim in range(2):
        shift = 1e-5 * torch.eye(2).double()[dim]
        pairs = [proposal.path((u + sign * shift).detach()) for sign in (1, -1)]
        slope = [(0.3 * q + 0.7 * p) for q, p in pairs]
        torch.testing.assert_close(gradient[..., dim], (slope[0] - slope[1]) / 2e-5, rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert encoder.net.training
    assert encoder.net[0].weight.requires_grad


def test_masks_are_taken_off():
    present = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=present):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=present):
            pyro.sample("z", dist.Normal(x / 2, 0.5))

    density, proposal = both(model, guide, X[:3])
    u = noise(density, 4, dtype=torch.float32)
    torch.testing.assert_close(proposal.log_density(u), dist.Normal(X[:3] / 2, 0.5).log_prob(u[..., 0]))


def test_draws_in_many_blocks_are_the_same_in_any_chunk(monkeypatch):
    monkeypatch.setattr("pyro_aevb.program.model_rows.BLOCK_DRAWS", 12)
    _, proposal = both(rate, rate_guide, torch.arange(10.0))
    u, log_q = proposal.draw(4, seed=3)
    assert len(u.unique()) == u.numel()
    parts = [proposal.rows(slice(start, start + 7)).draw(4, seed=3) for start in (0, 7)]
    assert torch.equal(torch.cat([part[0] for part in parts], 1), u)
    assert torch.equal(torch.cat([part[1] for part in parts], 1), log_q)


def test_a_guide_that_does_not_broadcast_runs_one_by_one():
    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x, 1.0))
            pyro.sample("w", dist.Normal(torch.stack([z, x])[0] + z.reshape(len(x)), 1.0))

    density = LogDensity(two_latents, X.double())
    with pytest.warns(ParticleWarning, match="one by one"):  # noqa: PT031
        proposal = GuideDensity(guide, density)
        u, log_q = proposal.draw(3, seed=0)
    z = u[..., 0].exp()
    by_hand = dist.LogNormal(X.double(), 1.0).log_prob(z) + u[..., 0] + dist.Normal(2 * z, 1.0).log_prob(u[..., 1])
    torch.testing.assert_close(log_q, by_hand)
    torch.testing.assert_close(proposal.log_density(u), by_hand)


def test_models_that_draw_their_own_rows_and_guides_of_each_row():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=4) as index:
            pyro.sample("x", dist.Poisson(pyro.sample("rate", dist.Gamma(2.0, 1.0))), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=4) as index:
            pyro.sample("rate", dist.LogNormal(0.1 * x[index], 0.5))

    x = torch.arange(10.0)
    _, proposal = both(model, guide, x)
    assert proposal.chunk_rows == 4
    u, log_q = proposal.draw(3, seed=0)
    torch.testing.assert_close(log_q, dist.Normal(0.1 * x, 0.5).log_prob(u[..., 0]))
    torch.testing.assert_close(proposal.log_density(u), log_q)
    rows = torch.tensor([9, 2])
    assert torch.equal(proposal.rows(rows).draw(3, seed=0)[0], u[:, rows])

    locs = torch.linspace(-1, 1, 10)

    def of_each_row(x):
        with pyro.plate("data", 10):
            pyro.sample("rate", dist.LogNormal(locs, 0.5))

    density = LogDensity(rate, x)
    proposal = GuideDensity(of_each_row, density)
    assert (density.chunk_rows, proposal.chunk_rows, proposal.num_rows) == (None, 10, 10)
    u, log_q = proposal.draw(3, seed=0)
    torch.testing.assert_close(log_q, dist.Normal(locs, 0.5).log_prob(u[..., 0]))
    torch.testing.assert_close(proposal.rows(rows).log_density(u[:, rows]), log_q[:, rows])


def test_rows_of_a_plate_with_a_size_of_its_own_run_in_any_number():
    """Such a plate draws indices anew for each number of rows."""

    def model(x):
        with pyro.plate("data", 60_000, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 60_000, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5))

    _, proposal = both(model, guide, X)
    for rows in (slice(0, 4), slice(4, 6)):
        u, log_q = proposal.rows(rows).draw(3, seed=0)
        torch.testing.assert_close(proposal.rows(rows).log_density(u), log_q)
        torch.testing.assert_close(log_q, dist.Normal(X[rows] / 2, 0.5).log_prob(u[..., 0]))


def test_the_whole_model_as_one_row():
    model, x = NormalNormal.fixture()
    density = LogDensity(model.model, x, data_plate=None)
    proposal = GuideDensity(model.guide, density)
    u, log_q = proposal.draw(5, seed=0)
    assert u.shape == (5, 1, 9)
    exact = model.log_marginal(x)
    torch.testing.assert_close(density.log_joint(u) - log_q, exact.expand(5, 1), rtol=0, atol=1e-9)


# Refusals


def plain(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def sampling(fn, name="z"):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(name, fn(x))

    return guide


def auxiliary(x):
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(h, 1.0))


def scaled(x):
    with pyro.plate("data", len(x)), poutine.scale(scale=0.5):
        pyro.sample("z", dist.Normal(x, 1.0))


REFUSED = [
    (lambda x: None, GuideError, "lacks the model's latent sites"),
    (sampling(lambda x: dist.Normal(x, 1.0), "y"), GuideError, "lacks the model's latent sites"),
    (auxiliary, GuideError, "auxiliary site 'h' inside the data plate"),
    (sampling(lambda x: dist.Delta(x)), GuideError, r"'z' is a point \(Delta\)"),
    (scaled, ModelError, "'z' has a scale"),
    (AutoDelta(plain), GuideError, "point"),
    (AutoMultivariateNormal(plain), GuideError, "read off the joint draw"),
]


@pytest.mark.parametrize(("guide", "error", "message"), REFUSED)
def test_guides_without_a_density_of_u(guide, error, message):
    density = LogDensity(plain, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=message):
            GuideDensity(guide, density)


def test_a_guide_outside_the_support():
    density = LogDensity(rate, X.abs().round())
    with pytest.raises(GuideError, match=r"'rate' .* puts mass outside the model's support"):
        GuideDensity(sampling(lambda x: dist.Normal(x, 1.0), "rate"), density)


def test_settings():
    functions = LogDensity.from_function(lambda u: u.sum(-1), lambda u: u.sum(-1), 1)
    with pytest.raises(SettingError, match="of plain functions"):
        GuideDensity(sampling(lambda x: dist.Normal(x, 1.0)), functions)
    _, proposal = both(plain, sampling(lambda x: dist.Normal(x, 1.0)), X)
    with pytest.raises(SettingError, match="num_draws must be an integer of at least 1, got 0"):
        proposal.draw(0)
    with pytest.raises(SettingError, match="u must have shape"):
        proposal.log_density(torch.zeros(5, 1))
