"""Guides of globals: densities at sites against the density of what they are read off, plates, particles, families."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch.distributions import biject_to

from pyro_aevb import SGVB, AutoAmortizedFlow, AutoAmortizedMultivariateNormal, AutoAmortizedNormal
from pyro_aevb.errors import ModelError
from pyro_aevb.guides.global_latents import Joint, OwnGuide, PerSite
from pyro_aevb.program.importance import ImportanceProgram

X = torch.randn(12, 3)


def model(x):
    """Globals of several shapes and supports, one in a plate, one with an event in it."""
    with pyro.plate("features", 3):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(4)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        loc = z[..., None] * slope[..., None, :] + share[..., None, :, 0]
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


SITES = ("slope", "share", "scale")


def guide_of(kind, *, guide=AutoAmortizedNormal, noise=0.3):
    torch.manual_seed(1)
    built = guide(model, global_guide=kind).build(X)
    for parameter in built.networks.of_globals.parameters():
        parameter.data += noise * torch.randn_like(parameter) / 8
    return built


def traced(guide, x=X):
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    return trace


@pytest.mark.parametrize("kind", ["multivariate_normal", "flow"])
def test_the_density_of_a_joint_draw_is_that_of_the_coordinates_carried_to_the_supports(kind):
    """log q(slope, share, scale) = log q(coordinates) - log |det| of each site's own bijection, site by site."""
    guide = guide_of(kind)
    (part,) = guide.networks.of_globals
    assert isinstance(part, Joint)
    trace = traced(guide)
    flat = trace.nodes[part.auxiliary]["value"]
    assert flat.shape == (3 + 3 * 3 + 1,)
    start = 0
    for name, event, size, shape in (("slope", 0, 3, (3,)), ("share", 1, 9, (3, 3)), ("scale", 0, 1, ())):
        node = trace.nodes[name]
        transform = biject_to(model_support(name))
        coordinates = flat[start : start + size].reshape(shape)
        torch.testing.assert_close(node["value"], transform(coordinates))
        volume = transform.log_abs_det_jacobian(coordinates, node["value"])
        torch.testing.assert_close(node["fn"].log_density, -volume)
        assert node["fn"].event_dim == event
        start += size
    total = sum(trace.nodes[name]["log_prob_sum"] for name in (part.auxiliary, *SITES))
    with torch.no_grad():
        fn = trace.nodes[part.auxiliary]["fn"]
        expected = fn.log_prob(flat) - sum(
            biject_to(model_support(name)).log_abs_det_jacobian(biject_to(model_support(name)).inv(value), value).sum()
            for name, value in ((name, trace.nodes[name]["value"]) for name in SITES)
        )
    torch.testing.assert_close(total.detach(), expected, rtol=1e-4, atol=1e-4)


def model_support(name):
    return {"slope": dist.constraints.real, "share": dist.constraints.simplex, "scale": dist.constraints.positive}[name]


def test_independent_globals_have_a_distribution_each():
    guide = guide_of("normal")
    (part,) = guide.networks.of_globals
    assert isinstance(part, PerSite)
    nodes = traced(guide).nodes
    assert {name: tuple(nodes[name]["fn"].batch_shape) for name in SITES} == {"slope": (3,), "share": (3,), "scale": ()}
    assert len(torch.unique(nodes["slope"]["fn"].mean)) == 3  # each index its own
    assert [frame.name for frame in nodes["slope"]["cond_indep_stack"]] == ["features"]


def test_a_joint_guide_holds_dependence_and_an_independent_one_does_not():
    correlations = {}
    for kind in ("normal", "multivariate_normal", "flow"):
        guide = guide_of(kind, noise=1.5)
        with torch.no_grad(), pyro.plate("draws", 3000, dim=-2):
            values = guide(X)
        columns = torch.stack([values["slope"][:, 0], values["slope"][:, 1], values["scale"][:, 0].log()])
        found = torch.corrcoef(columns)
        correlations[kind] = (found - torch.eye(3)).abs().max().item()
    assert correlations["normal"] < 5 / math.sqrt(3000)
    assert min(correlations["multivariate_normal"], correlations["flow"]) > 0.15


@pytest.mark.parametrize("kind", ["normal", "multivariate_normal", "flow"])
def test_globals_do_not_depend_on_rows(kind):
    guide = guide_of(kind)
    values = {name: node["value"] for name, node in traced(guide).nodes.items() if node["type"] == "sample"}
    first, second = (
        {name: traced(poutine.condition(guide, data=values), x).nodes[name]["log_prob_sum"] for name in SITES}
        for x in (X, torch.randn(12, 3))
    )
    assert first == second


def test_units_are_location_and_spread_of_the_coordinates_under_q():
    """Of 20,000 draws in the prior's units, to 5 standard errors (of sds under normal tails, 1 / sqrt(2 n))."""
    for kind in ("normal", "multivariate_normal"):
        guide = guide_of(kind, noise=1.0)
        (part,) = guide.networks.of_globals
        units = part.units()
        with torch.no_grad(), pyro.plate("draws", 20_000, dim=-2):
            values = guide(X)
        own = {site.name: site for site in part.sites}
        for name in ("slope", "scale"):
            coordinates = guide.networks.of_locals._own(name)
            flat = biject_to(own[name].support).inv(values[name])[..., None]
            standard = (flat - coordinates.loc) / coordinates.scale
            location, spread = units[name]
            mean, sd = standard.mean(0).reshape(location.shape), standard.std(0).reshape(spread.shape)
            assert ((mean - location).abs() < 5 * spread / math.sqrt(20_000)).all()
            assert ((sd / spread - 1).abs() < 5 / math.sqrt(40_000)).all()


@pytest.mark.parametrize(
    ("guide", "kind"),
    [(AutoAmortizedNormal, PerSite), (AutoAmortizedMultivariateNormal, Joint), (AutoAmortizedFlow, Joint)],
)
def test_the_default_is_the_guides_own_family(guide, kind):
    (part,) = guide_of(None, guide=guide).networks.of_globals
    assert isinstance(part, kind)
    expected = {AutoAmortizedNormal: "Normal", AutoAmortizedMultivariateNormal: "joint MultivariateNormal"}
    assert part.label("slope") == expected.get(guide, "joint Flow")


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_one_of_pyros_guides_will_do(kind):
    guide = AutoAmortizedNormal(model, global_guide=kind).build(X)
    (part,) = guide.networks.of_globals
    assert isinstance(part, OwnGuide)
    assert part.label("slope") == kind.__name__
    names = [name for name, _ in guide.named_parameters()]
    loss = SGVB().differentiable_loss(model, guide, X)
    loss.backward()
    assert [name for name, _ in guide.named_parameters()] == names
    assert all(parameter.grad is not None for parameter in part.parameters())
    assert set(guide(X)) >= {"z", *SITES}


def test_particles_lie_left_of_the_plates_of_globals():
    for kind in ("normal", "multivariate_normal", "flow"):
        guide = guide_of(kind)
        terms = ImportanceProgram(model, guide, (X,), {}).draw_terms((X,), {}, 4, 2)
        values = terms.values
        assert values["slope"].shape[0] == 4
        assert values["slope"].shape[-1] == 3
        assert values["share"].shape[-2:] == (3, 4)
        parts = [latent.log_q for latent in terms.latents if not latent.is_local]
        assert all(part.shape == (4,) for part in parts)
        assert len(torch.unique(sum(parts))) == 4


def test_angles_among_globals_are_guided_apart_from_the_joint():
    def turned(x):
        angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z + angle.cos(), scale), obs=x)

    guide = AutoAmortizedFlow(turned).build(torch.randn(9))
    joint, apart = guide.networks.of_globals
    assert [site.name for site in joint.sites] == ["scale", "shift"]
    assert [site.name for site in apart.sites] == ["angle"]
    assert guide(torch.randn(9))["angle"].shape == ()


def test_a_global_in_a_plate_that_is_subsampled_is_refused():
    def thinned(x):
        with pyro.plate("features", 30, subsample_size=3):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * slope, 1.0).to_event(1), obs=x)

    with pytest.raises(ModelError, match=r"'slope'.*subsampled plate \['features'\].*data plate") as caught:
        AutoAmortizedNormal(thinned).build(X)
    assert caught.value.site == "slope"
