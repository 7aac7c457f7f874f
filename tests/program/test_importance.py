"""Model, guide and batch become terms; masks keep NaN out; a density that is not finite is named."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_aevb import IWELBO, SGVB
from pyro_aevb.errors import GuideError
from pyro_aevb.program.importance import ImportanceProgram, find_non_finite
from pyro_aevb.program.particles import ParticleAxes
from pyro_aevb.program.structure import read_structure
from pyro_aevb.testing import GammaPoisson, LinearGaussian


def test_terms_are_the_densities_of_each_site():
    exact, x = LinearGaussian.fixture()
    program = ImportanceProgram(exact.model, exact.guide, (x,), {})
    terms = program.draw_terms((x,), {}, 2, 3)
    latent = terms.latents[0]
    q = poutine.trace(exact.guide).get_trace(x).nodes["z"]["fn"]
    p = poutine.trace(exact.model).get_trace(x).nodes["z"]["fn"]
    torch.testing.assert_close(latent.log_q, q.log_prob(latent.value))
    torch.testing.assert_close(latent.log_p, p.log_prob(latent.value).expand(2, 3, -1))
    assert terms.shape == (2, 3, len(x))
    assert terms.scale == 1.0
    expected = exact.log_marginal(x).expand(2, 3, -1)
    torch.testing.assert_close(terms.log_weights().local, expected, rtol=0, atol=1e-8)


def masked(x):
    weight = pyro.param("weight", torch.ones(()))
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", 3, dim=-1), poutine.mask(mask=~x.isnan()):
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)


def masked_distribution(x):
    weight = pyro.param("weight", torch.ones(()))
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", 3, dim=-1):
            pyro.sample("x", dist.Normal(weight * z, 1.0).mask(~x.isnan()), obs=x)


def masked_events(x):
    weight = pyro.param("weight", torch.ones(()))
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("one", 1, dim=-1):
            fn = dist.Normal(weight * z[..., None], 1.0).expand([*z.shape, 3]).mask(~x.isnan()[:, None]).to_event(1)
            pyro.sample("x", fn, obs=x[:, None])


def masked_rows(x):
    weight = pyro.param("weight", torch.ones(()))
    known = ~x.isnan()
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", 3, dim=-1):
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x, obs_mask=known)


def guide(x):
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(torch.nan_to_num(x).mean(-1, keepdim=True) + loc, 1.0))


@pytest.mark.parametrize("model", [masked, masked_distribution, masked_events, masked_rows])
@pytest.mark.parametrize(
    "objective",
    [lambda: SGVB(kl="sampled"), lambda: IWELBO(3), lambda: IWELBO(3, gradient="dreg")],
    ids=["SGVB", "IWELBO", "dreg"],
)
def test_missing_values_coded_as_nan_leave_value_and_gradient_finite(model, objective):
    x = torch.tensor([[1.0, torch.nan, 2.0], [torch.nan, torch.nan, torch.nan], [0.5, -1.0, 0.0]])
    with pyro.validation_enabled(False):
        pyro.set_rng_seed(1)
        loss = objective().differentiable_loss(model, guide, x)
        loss.backward()
        gradients = [pyro.param(name).unconstrained().grad.clone() for name in ("weight", "loc")]
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        filled = torch.where(x.isnan(), -40.0, x)  # any other number behind the mask gives the same

        def model_of_filled(_):
            return model_with_mask(filled, ~x.isnan())

        expected = objective().differentiable_loss(model_of_filled, guide, x)
        expected.backward()
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, expected)
    for name, gradient in zip(("weight", "loc"), gradients, strict=True):
        assert torch.isfinite(gradient)
        torch.testing.assert_close(gradient, pyro.param(name).unconstrained().grad)


def model_with_mask(x, known):
    weight = pyro.param("weight", torch.ones(()))
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", 3, dim=-1), poutine.mask(mask=known):
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)


@pytest.mark.parametrize("family", [dist.Poisson, dist.Gamma, dist.Beta], ids=lambda family: family.__name__)
def test_nan_behind_a_mask_is_harmless_for_families_of_any_support(family):
    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=~x.isnan()):
            z = poutine.mask(pyro.sample, mask=True)("z", dist.LogNormal(0.0, 1.0))
            fn = family(z) if family is dist.Poisson else family(z, 2.0)
            pyro.sample("x", fn, obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(len(x)))
        with pyro.plate("data", len(x)), poutine.mask(mask=~x.isnan()):
            pyro.sample("z", dist.LogNormal(loc, 1.0))

    observed = 1.0 if family is not dist.Beta else 0.4
    with pyro.validation_enabled(False):
        SGVB(kl="sampled").differentiable_loss(model, guide, torch.tensor([observed, torch.nan])).backward()
    gradient = pyro.param("loc").unconstrained().grad
    assert torch.isfinite(gradient).all()
    assert float(gradient[0].abs()) > 0


def test_a_mask_inside_the_event_must_stand_on_both_sides():
    mask = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(mask).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x, *, is_masked):
        with pyro.plate("data", len(x)):
            own = mask if is_masked else True
            pyro.sample("z", dist.Normal(torch.ones(len(x), 3), 0.5).mask(own).to_event(1))

    x = torch.zeros(4)
    assert torch.isfinite(SGVB().bounds(model, functools.partial(guide, is_masked=True), x).total)
    with pytest.raises(GuideError, match="'z' a different mask"):
        SGVB().bounds(model, functools.partial(guide, is_masked=False), x)


# Weighing a draw once more


class Noisy(nn.Module):
    """A guide with dropout before and after its first latent, and BatchNorm."""

    def __init__(self):
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(1)
        self.loc = nn.Parameter(torch.ones(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            first = self.dropout(self.norm(x[:, None])[:, 0] + self.loc)
            y = pyro.sample("y", dist.Normal(first, 1.0))
            pyro.sample("z", dist.Normal(self.dropout(y + self.loc), 1.0))


def two_latents(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(y, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("is_detached", [True, False])
@pytest.mark.parametrize("axes", [ParticleAxes(), ParticleAxes(2, 3)], ids=["single", "particles"])
def test_a_draw_weighed_once_more_has_the_same_density(axes, is_detached):
    noisy, x = Noisy(), torch.randn(20)
    program = ImportanceProgram(two_latents, noisy, (x,), {})
    program.axes(2, 3)
    draw = program.sample_guide((x,), {}, axes, keeps_noise=True)
    state = torch.get_rng_state()
    values = {name: site.value for name, site in draw.items()}
    again = program.rescore_guide((x,), {}, axes, values, is_detached=is_detached)
    for name in ("y", "z"):
        assert torch.equal(again[name].log_prob, draw[name].log_prob)
        assert torch.equal(again[name].value, draw[name].value)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(noisy.norm.num_batches_tracked) == 1
    again["z"].log_prob.sum().backward()
    # the values are live: their own dependence on the parameter stays, only that of the density goes
    assert noisy.loc.grad is not None


# What is not finite


def test_the_first_site_that_is_not_finite_is_named_guide_first():
    def model(x, *, bad="none"):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(y, -torch.ones(()) if bad == "z" else 1.0))
            scale = torch.tensor(torch.nan) if bad == "x" else torch.ones(())
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x, *, bad="none"):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.zeros(len(x)), torch.nan if bad == "y" else 1.0))
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.zeros(3)
    structure = read_structure(model, (x,))
    state = torch.get_rng_state()
    with pyro.validation_enabled(False):
        for bad in ("y", "z", "x"):
            found = find_non_finite(model, guide, structure, (x,), {"bad": bad})
            assert found is not None
            assert found.site == bad
            assert ("guide" if bad == "y" else "model") in str(found)
            assert "3 of 3 rows" in str(found)
        assert find_non_finite(model, guide, structure, (x,), {}) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_looking_for_it_changes_no_buffers():
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.norm(x[:, None])[:, 0], 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    encoder, x = Guide(), torch.tensor([1.0, torch.inf])
    structure = read_structure(model, (torch.zeros(2),))
    with pyro.validation_enabled(False):
        found = find_non_finite(model, encoder, structure, (x,), {})
    assert found is not None
    assert int(encoder.norm.num_batches_tracked) == 0


def test_imputed_sites_leave_the_weights_alone():
    exact = GammaPoisson()

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(exact.concentration, exact.rate))
            for j in range(x.shape[1]):
                pyro.sample(f"x_{j}", dist.Poisson(rate), obs=x[:, j], obs_mask=torch.tensor([True, j != 1]))

    def posterior(x):
        known = torch.tensor([[True, True, True], [True, False, True]])
        total, count = torch.where(known, x, 0.0).sum(-1), known.sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(exact.concentration + total, exact.rate + count))

    x = torch.tensor([[3.0, 1.0, 4.0], [2.0, 7.0, 1.0]])
    bounds = IWELBO(5).bounds(model, posterior, x)
    evidence = torch.stack([exact.log_marginal(x[:1])[0], exact.log_marginal(x[1:, ::2])[0]])
    torch.testing.assert_close(bounds.local, evidence, rtol=0, atol=1e-4)
