"""Pyro's ``AutoNormal`` as a density: the normal of its own loc and scale in unconstrained coordinates, on every support."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.distributions import biject_to

from pyro_aevb import collapse_report, compare_posteriors, hmc_posterior
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.direct import directly
from pyro_aevb.program.proposal import GuideDensity

X = torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7])
SITES = ("real", "positive", "simplex", "factor", "bounded")


def model(x):
    with pyro.plate("data", len(x)):
        real = pyro.sample("real", dist.Normal(0.0, 1.0))
        positive = pyro.sample("positive", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        simplex = pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
        factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
        bounded = pyro.sample("bounded", dist.Uniform(-1.0, 3.0))
        loc = real + positive.sum(-1) + simplex[..., 0] + factor[..., 1, 0] + bounded
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def fitted(program, **settings):
    """Return a guide whose numbers are none that it began with."""
    pyro.set_rng_seed(0)
    guide = AutoNormal(program, init_scale=0.3, **settings)
    guide(X)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return guide


def test_the_density_is_the_normal_of_unconstrained_coordinates():
    guide = fitted(model)
    density = LogDensity(model, X)
    proposal = GuideDensity(guide, density)
    loc, scale = (
        torch.cat([getattr(part, name).detach().reshape(5, -1) for name in SITES], -1)
        for part in (guide.locs, guide.scales)
    )
    normal = dist.Normal(loc, scale).to_event(1)
    u, log_q = proposal.draw(2000, seed=0)
    torch.testing.assert_close(log_q, normal.log_prob(u), rtol=0, atol=1e-4)
    error = (u.mean(0) - loc) / scale
    assert error.abs().max() < 4.5 / math.sqrt(2000)
    anywhere = torch.randn(3, 5, density.dim, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(proposal.log_density(anywhere), normal.log_prob(anywhere), rtol=0, atol=1e-4)


def test_sites_are_those_of_the_guide_and_lie_on_their_supports():
    guide = fitted(model)
    trace = poutine.trace(directly(guide)).get_trace(X)
    assert [name for name in trace.stochastic_nodes if name != "data"] == list(SITES)
    prior = poutine.trace(model).get_trace(X)
    for name in SITES:
        fn, support = trace.nodes[name]["fn"], prior.nodes[name]["fn"].support
        assert str(fn.support) == str(support)
        assert support.check(trace.nodes[name]["value"]).all()
        v = biject_to(support).inv(trace.nodes[name]["value"])
        assert v.shape == getattr(guide.locs, name).shape


def test_other_guides_are_left_as_they_are():
    class Own(AutoNormal):
        """May sample otherwise."""

    for guide in (AutoDelta(model), Own(model), lambda x: None):
        assert directly(guide) is guide


def test_globals_are_given_and_rows_are_weighed():
    def with_global(x):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = fitted(with_global)
    proposal = GuideDensity(guide, LogDensity(with_global, X, given={"g": torch.tensor(0.3)}))
    u, log_q = proposal.draw(4, seed=0)
    normal = dist.Normal(guide.locs.z.detach(), guide.scales.z.detach())
    torch.testing.assert_close(log_q, normal.log_prob(u[..., 0]), rtol=0, atol=1e-5)


def conjugate(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def at_posterior(shift=0.0):
    """Return AutoNormal at the posterior of the conjugate model, N(x/2, 1/2), or beside it."""
    guide = AutoNormal(conjugate)
    guide(X)
    with torch.no_grad():
        guide.locs.z = X / 2 + shift
        guide.scales.z = torch.full((5,), 0.5**0.5)
    return guide


@pytest.mark.slow
def test_it_is_compared_with_chains():
    """KL(q, p) + KL(p, q) of two normals of variance 1/2 that are 0.5 apart is 0.5; the guide names its model itself."""
    chains = hmc_posterior(conjugate, X, num_samples=100, warmup_steps=60, num_chains=4, seed=0, progress=False)
    right, wrong = (compare_posteriors(at_posterior(shift), chains, X, seed=0, progress=False) for shift in (0.0, 0.5))
    assert right.divergence.abs().max() < 1e-5
    assert ((wrong.divergence - 0.5).abs() < 4.5 * wrong.divergence_se).all()
    assert (wrong.sites["z"].moments.mean_error - 0.5**0.5).abs().max() < 0.3


def test_its_units_collapse_or_not():
    """KL(N(x/2, 1/2), N(0, 1)) = (x^2/4 + 1/2 - 1 + log 2) / 2 per row, exactly or by draws; the means' variance is that of x/2."""
    found = collapse_report(conjugate, at_posterior(), X, num_samples=2000, seed=0)
    kl = (X.square() / 4 - 0.5 + math.log(2)) / 2
    assert abs(found.kl.item() - kl.mean().item()) < 0.03
    assert abs(found.variance.item() - (X / 2).var(correction=0).item()) < 0.15
