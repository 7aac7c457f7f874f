"""From a model to a guide that is built: what is read, what it is built from, and what the users' encoders are given."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_aevb import SGVB, AutoAmortizedFlow, AutoAmortizedMultivariateNormal, AutoAmortizedNormal
from pyro_aevb.errors import AEVBWarning
from pyro_aevb.guides.families import Circular, Diagonal, Flow, FullCovariance, Spherical

X = torch.randn(40, 3)
GUIDES = [AutoAmortizedNormal, AutoAmortizedMultivariateNormal, AutoAmortizedFlow]


def chain(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Gamma(z1.exp(), 1.0))
        pyro.sample("x", dist.Normal(z2[..., None], torch.ones(3)).to_event(1), obs=x)


def test_building_again_changes_nothing():
    guide = AutoAmortizedNormal(chain).build(X)
    built, parameters = guide.built, [parameter.clone() for parameter in guide.parameters()]
    guide.build(torch.randn(40, 3) * 100)
    assert guide.built is built
    assert all(torch.equal(*pair) for pair in zip(guide.parameters(), parameters, strict=True))


@pytest.mark.parametrize("kind", GUIDES)
def test_one_seed_builds_one_guide(kind):
    guides = []
    for _ in range(2):
        torch.manual_seed(5)
        guides.append(kind(chain).build(X))
    assert all(torch.equal(*pair) for pair in zip(*(guide.state_dict().values() for guide in guides), strict=True))


@pytest.mark.parametrize(("kind", "family"), zip(GUIDES, [Diagonal, FullCovariance, Flow], strict=True))
def test_a_guide_has_its_own_family_and_circles_and_spheres_have_theirs(kind, family):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
            point = pyro.sample("point", dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.0])))
            pyro.sample("x", dist.Normal(point + z.sum(-1, keepdim=True) + angle[..., None], 1.0).to_event(1), obs=x)

    guide = kind(model).build(X)
    found = {name: type(guide.networks.of_locals.family(name)) for name in ("z", "angle", "point")}
    assert found == {"z": family, "angle": Circular, "point": Spherical}
    loss = SGVB().differentiable_loss(model, guide, X)
    assert loss.isfinite()


def test_a_first_draw_is_the_middle_of_the_prior_at_the_initial_scale():
    """Whatever the units of the model: z2 given z1 at its feasible point is Gamma about 1."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(500.0, 20.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortizedNormal(model, init_scale=0.05).build(torch.randn(40))
    fn = poutine.trace(guide).get_trace(torch.randn(40)).nodes["z"]["fn"]
    assert (fn.mean - 500).abs().max() < 0.1 * 20
    assert ((fn.stddev / (0.05 * 20) - 1).abs() < 0.1).all()


def test_double_models_have_double_guides():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    guide = AutoAmortizedNormal(model).build(torch.randn(40, dtype=torch.float64))
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float64}
    assert guide(torch.randn(5, dtype=torch.float64))["z"].dtype == torch.float64


def test_sources_are_what_some_latent_reads():
    guide = AutoAmortizedNormal(chain).build(X)
    built = guide.built
    assert (built.sources, built.order, built.dims) == (("x",), ["z1", "z2"], {"data": -1})
    assert built.rows == 40


def test_a_latent_that_nothing_observes_is_told_and_guided_by_its_parents():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("idle", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.warns(AEVBWarning, match="'idle' reaches no observed site"):
        guide = AutoAmortizedNormal(model).build(torch.randn(20))
    assert [source.name for source in guide.built.wiring["idle"]] == ["z"]


def test_globals_alone_need_no_rows_of_latents():
    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    guide = AutoAmortizedNormal(model).build(torch.randn(20), torch.randn(20))
    assert guide.built.order == []
    assert set(guide(torch.randn(7), torch.randn(7))) == {"slope"}


def test_without_a_data_plate_the_model_is_one_row():
    def model(x):
        with pyro.plate("schools", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortizedNormal(model, data_plate=None).build(torch.randn(6))
    assert guide(torch.randn(6))["z"].shape == (6,)
    assert SGVB(data_plate=None).bounds(model, guide, torch.randn(6)).local.shape == (1,)


# Supports that are computed.


def bounded(x, top):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(torch.zeros(len(x)), top))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_supports_of_rows_follow_their_arguments():
    top = torch.linspace(1.0, 9.0, 20)
    guide = AutoAmortizedNormal(bounded).build(torch.rand(20), top)
    assert guide.built.moving_supports == {"z"}
    for low in (0.5, 20.0):
        new = torch.linspace(low, 2 * low, 7)
        z = guide(torch.rand(7), new)["z"]
        assert ((z > 0) & (z < new)).all()
        trace = poutine.trace(guide).get_trace(torch.rand(7), new)
        trace.compute_log_prob()
        assert trace.nodes["z"]["log_prob"].isfinite().all()


# Users' encoders.


class Recording(nn.Module):
    """Linear features of a flat event, and the shapes that came."""

    def __init__(self, inputs, features=8):
        super().__init__()
        self.linear = nn.Linear(inputs, features)
        self.shapes = []

    def forward(self, x):
        parts = list(x.values()) if isinstance(x, dict) else [x]
        self.shapes.append({name: tuple(v.shape) for name, v in x.items()} if isinstance(x, dict) else tuple(x.shape))
        return self.linear(torch.cat([part.reshape(len(part), -1) for part in parts], -1))


def test_one_encoder_serves_all_latents_and_runs_once_for_equal_inputs():
    encoder = Recording(3)
    guide = AutoAmortizedNormal(chain, encoder=encoder).build(X)
    encoder.shapes.clear()
    guide(X[:7])
    assert encoder.shapes == [(7, 3)]
    parameters = {id(parameter) for parameter in guide.parameters()}
    assert {id(parameter) for parameter in encoder.parameters()} <= parameters


def test_encoders_by_latent_leave_the_others_to_the_guide():
    encoder = Recording(3)
    guide = AutoAmortizedNormal(chain, encoder={"z2": encoder}).build(X)
    assert guide.networks.of_locals.encoder_labels("z2") == ["Recording 2"]
    assert guide.networks.of_locals.encoder_labels("z1") == ["MLPEncoder 1"]


def test_several_inputs_come_by_name():
    def model(x, y, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] + c, torch.ones(3)).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    encoder = Recording(7)
    guide = AutoAmortizedNormal(model, encoder=encoder).build(X, X[:, 0], X)
    encoder.shapes.clear()
    guide(X[:5], X[:5, 0], X[:5])
    assert encoder.shapes == [{"x": (5, 3), "y": (5, 1), "@c": (5, 3)}]


def test_an_encoder_reads_standardised_values_without_gradient_to_them():
    class Keeping(Recording):
        def forward(self, x):
            self.x = x
            return super().forward(x)

    encoder, x = Keeping(3), 100 + 7 * torch.randn(400, 3)
    AutoAmortizedNormal(chain, encoder=encoder).build(x)(x)
    assert encoder.x.mean().abs() < 1e-3
    assert (encoder.x.std(0) - 1).abs().max() < 0.01
    assert not encoder.x.requires_grad


# Parameters of the model that have changed since.


def test_a_guide_stays_as_built_when_the_models_parameters_move():
    """Coordinates are buffers: units of the prior at the build."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortizedNormal(model).build(torch.randn(20))
    before = {name: value.clone() for name, value in guide.named_buffers()}
    pyro.get_param_store()["loc"] = torch.tensor(-50.0)
    guide(torch.randn(20))
    assert all(torch.equal(value, before[name]) for name, value in guide.named_buffers())
