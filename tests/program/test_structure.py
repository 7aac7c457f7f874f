"""What is read from a model, what is refused, and that reading leaves nothing behind."""

import functools
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_aevb import SGVB
from pyro_aevb.errors import AEVBError, DataError, ModelError, NonFiniteError
from pyro_aevb.program.dependencies import prior_parents
from pyro_aevb.program.structure import read_structure
from pyro_aevb.testing import EightSchools, LinearGaussianStateSpace

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)


def hierarchy(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("features", 3, dim=-2):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("features_", 3, dim=-2):
            w = pyro.sample("w", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(w + z.sum(-1), scale), obs=x.t())


def test_sites_are_local_or_global_with_their_plates_and_shapes():
    structure = read_structure(hierarchy, (X,))
    sites = structure.sites
    assert list(sites) == ["mean", "scale", "z", "w", "x"]
    assert {name: site.is_local for name, site in sites.items()} == {
        "mean": False, "scale": False, "z": True, "w": True, "x": True,
    }  # fmt: skip
    assert sites["z"].event_shape == (2,)
    assert sites["z"].batch_shape == (4,)
    assert sites["w"].batch_shape == (3, 4)
    assert sites["w"].plates == ("data", "features_")
    assert sites["x"].kind == "observed"
    assert sites["scale"].family == "LogNormal"
    assert (structure.data_plate, structure.data_dim, structure.rows, structure.full_size) == ("data", -1, 4, 4)
    assert structure.max_plate_nesting == 2
    assert structure.has_globals
    assert structure.num_observed == 3
    assert read_structure(hierarchy, (X,), data_plate=None).num_observed == 12
    assert structure.ranks == {"mean": 0, "scale": 2, "z": 2, "w": 2, "x": 2}
    assert [site.name for site in structure.select("latent", is_local=True)] == ["z", "w"]
    assert "global latent   mean: Normal []" in str(structure)
    assert "w: Normal [] in plates ['features_']" in str(structure)


def chain(x, *, plate):
    with pyro.plate(plate, len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def test_one_plate_of_the_batchs_rows_is_found_whatever_its_name():
    assert read_structure(functools.partial(chain, plate="people"), (X,)).data_plate == "people"
    assert read_structure(functools.partial(chain, plate="people"), (), {"x": X}).data_plate == "people"


def two_plates(x):
    with pyro.plate("a", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("b", len(x), dim=-1):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])


def outer_plate(x):
    with pyro.plate("groups", 2, dim=-2), pyro.plate("items", len(x), dim=-1):
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([2, len(x)]), obs=x[:, :2].t())


def no_plate(x):
    pyro.sample("x", dist.Normal(torch.zeros(x.shape), 1.0).to_event(2), obs=x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (two_plates, r"2 plates fit: \['a', 'b'\].*'a' \(size 4\)"),
        (outer_plate, r"none fits.*'groups' \(size 2\), 'items' \(size 4\)"),
        (no_plate, r"The model has no plates.*data_plate=None"),
    ],
)
def test_without_one_candidate_the_error_lists_the_plates(model, message):
    with pytest.raises(ModelError, match=message):
        read_structure(model, (X,))


def test_a_named_plate_is_taken_and_the_others_are_inner():
    structure = read_structure(outer_plate, (X,), data_plate="items")
    assert (structure.data_plate, structure.data_dim) == ("items", -1)
    assert read_structure(outer_plate, (X,), data_plate="groups").data_dim == -2


def test_an_unknown_plate_name_is_refused_with_those_there_are():
    with pytest.raises(ModelError, match=r"no plate 'rows'.*'a'"):
        read_structure(two_plates, (X,), data_plate="rows")


def test_without_a_data_plate_everything_belongs_to_the_one_row():
    model, y = EightSchools.fixture()
    structure = read_structure(model.model, (y,), data_plate=None)
    assert structure.data_plate is None
    assert structure.data_dim is None
    assert structure.rows == structure.full_size == 1
    assert all(site.is_local for site in structure.sites.values())
    assert not structure.has_globals


def test_a_data_plate_that_is_a_python_loop_is_refused():
    def model(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x_{i}", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x[i])

    for data_plate in ("auto", "data"):
        with pytest.raises(ModelError, match="Python loop"):
            read_structure(model, (X,), data_plate=data_plate)


def test_an_inner_plate_may_be_a_python_loop():
    def model(x):
        with pyro.plate("data", len(x)):
            for j in pyro.plate("inner", 3):
                pyro.sample(f"x_{j}", dist.Normal(0.0, 1.0), obs=x[:, j])

    structure = read_structure(model, (X,))
    assert structure.sites["x_0"].plates == ("data", "inner")
    assert structure.sites["x_0"].is_local
    assert structure.max_plate_nesting == 1


def test_a_state_space_model_is_read():
    model, x = LinearGaussianStateSpace.fixture()
    structure = read_structure(model.model, (x,))
    assert len(structure.select("latent", is_local=True)) == len(structure.select("observed")) == 5


def test_a_forgotten_to_event_is_named():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, 3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pyro.validation_enabled(False), pytest.raises(ModelError, match=r"'z'.*\[4, 3\].*to_event") as error:
        read_structure(model, (X,))
    assert error.value.site == "z"


def test_a_forgotten_to_event_that_pyro_refuses_first_is_an_error_of_ours():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, 3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ModelError, match=r"(?s)to_event|shape"):
        read_structure(model, (X,))


def test_a_discrete_latent_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    with pytest.raises(ModelError, match=r"'z' is discrete \(Bernoulli\).*TraceEnum_ELBO") as error:
        read_structure(model, (X,))
    assert error.value.site == "z"


def own_rows(x):
    with pyro.plate("data", 12, subsample_size=5) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def sized(x):
    with pyro.plate("data", 12, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_model_that_draws_its_own_rows_is_told_from_one_that_is_sized():
    drawing = read_structure(own_rows, (torch.zeros(12),))
    assert (drawing.draws_own_rows, drawing.rows, drawing.full_size) == (True, 5, 12)
    given = read_structure(sized, (torch.zeros(5),))
    assert (given.draws_own_rows, given.rows, given.full_size) == (False, 5, 12)


def masked(x, mask, *, is_used, discrete=False):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        family = dist.Poisson(z.exp()) if discrete else dist.Normal(z, 1.0)
        y = pyro.sample("y", family, obs=x, obs_mask=mask)
        pyro.sample("w", dist.Normal(y if is_used else z, 1.0), obs=x)


@pytest.mark.parametrize("discrete", [False, True])
def test_missing_values_with_nothing_downstream_are_imputed(discrete):
    x, mask = torch.tensor([1.0, torch.nan, 2.0]), torch.tensor([True, False, True])
    model = functools.partial(masked, mask=mask, is_used=False, discrete=discrete)

    def filled(x):
        return model(torch.where(mask, x, 0.0))

    structure = read_structure(filled, (x,))
    assert structure.sites["y_unobserved"].kind == "imputed"
    assert [site.name for site in structure.select("latent")] == ["z"]
    assert {site.name for site in structure.select("observed")} == {"y_observed", "w"}


def test_missing_values_that_others_depend_on_are_latents():
    x, mask = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([True, False, True])
    structure = read_structure(functools.partial(masked, mask=mask, is_used=True), (x,))
    assert structure.sites["y_unobserved"].kind == "latent"
    with pytest.raises(ModelError, match="y_unobserved"):
        read_structure(functools.partial(masked, mask=mask, is_used=True, discrete=True), (x,))


def test_nan_is_allowed_under_a_mask_and_named_elsewhere():
    def model(x, mask):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.tensor([1.0, torch.nan])
    with pyro.validation_enabled(False):
        read_structure(model, (x, torch.tensor([True, False])))
        with pytest.raises(DataError, match="'x' hold 1 entries"):
            read_structure(_plain, (x,))


def _plain(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def test_a_nan_that_the_model_makes_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)) / 0.0, 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match="'z'") as error:
        read_structure(model, (torch.zeros(3),))
    assert error.value.site == "z"


def test_factors_and_deterministic_sites():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.deterministic("y", 2 * z)
            pyro.factor("penalty", -z.square())
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    structure = read_structure(model, (torch.zeros(3),))
    assert {name: site.kind for name, site in structure.sites.items()} == {
        "z": "latent", "penalty": "factor", "x": "observed",
    }  # fmt: skip


def test_a_subsampled_inner_plate_is_read():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, subsample_size=2, dim=-1) as j:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, j])

    structure = read_structure(model, (X,))
    assert structure.sites["x"].batch_shape == (4, 2)
    assert (structure.data_dim, structure.max_plate_nesting) == (-2, 2)
    assert not structure.draws_own_rows


def test_the_guides_plates_count():
    def guide(x):
        with pyro.plate("extra", 2, dim=-3):
            pyro.sample("aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        chain(x, plate="data")

    model = functools.partial(chain, plate="data")
    assert read_structure(model, (X,)).max_plate_nesting == 1
    guide_only = poutine.block(guide, hide=["x"])
    assert read_structure(model, (X,), guide=guide_only).max_plate_nesting == 3


# Programs of every form


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.5), dist.constraints.positive)
        self.linear = PyroModule[nn.Linear](1, 3)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 1]).to_event(2))

    def forward(self, x):
        weight = self.linear.weight
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.t(), self.scale).to_event(1), obs=x)


def with_params(x):
    scale = pyro.param("kept", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.param("new", torch.zeros(()))
    noise = torch.tensor(np.random.rand() + random.random())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(noise, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], scale).expand([*z.shape, 3]).to_event(1), obs=x)


FORMS = {
    "function": lambda: with_params,
    "method": lambda: Methods().model,
    "module": lambda: Bayesian(),
    "partial": lambda: functools.partial(chain, plate="data"),
    "scaled": lambda: poutine.scale(functools.partial(chain, plate="data"), scale=2.0),
    "conditioned": lambda: poutine.condition(Bayesian(), data={"z": torch.zeros(4, 1)}),
    "decorated": lambda: poutine.mask(mask=torch.tensor(True))(functools.partial(chain, plate="data")),
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS.keys())
def test_programs_of_every_form_are_read(make):
    structure = read_structure(make(), (X,))
    assert structure.data_plate == "data"
    assert structure.sites["x"].kind == "observed"


def snapshot(*modules):
    """Everything that a probing run could change; but ``random``, which the type checks of the tests draw from themselves."""
    store = pyro.get_param_store()
    return {
        "torch": torch.get_rng_state().clone(),
        "numpy": np.random.get_state()[1].copy(),
        "store": {name: (id(p), p.detach().clone()) for name, p in store._params.items()},
        "constraints": dict(store._constraints),
        "buffers": [(id(b), b.clone()) for module in modules for b in module.buffers()],
        "modes": [m.training for module in modules for m in module.modules()],
        "parameters": [(id(p), p.detach().clone()) for module in modules for p in module.parameters()],
    }


def is_same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(is_same(*pair) for pair in zip(a, b, strict=True))
    return bool((a == b).all()) if isinstance(a, (torch.Tensor, np.ndarray)) else a == b


class Broken(Methods):
    def model(self, x):
        super().model(x)
        pyro.param("late", torch.zeros(()))
        np.random.rand()
        raise ZeroDivisionError("broken")


@pytest.mark.parametrize("form", ["function", "method", "module", "broken"])
def test_reading_leaves_everything_as_it_was(form):
    pyro.param("kept", torch.tensor(3.0), constraint=dist.constraints.positive)
    module = {"method": Methods, "module": Bayesian, "broken": Broken}.get(form, nn.Module)()
    if form == "method":
        module.decoder[1].eval()  # a mixture of modes
    model = {"function": with_params, "module": module}.get(form) or module.model
    before = snapshot(module)
    if form == "broken":
        with pytest.raises(ModelError, match="broken"):
            read_structure(model, (X,))
    else:
        read_structure(model, (X,))
    assert is_same(before, snapshot(module))


def test_reading_inside_svi_registers_nothing_with_its_optimizer():
    module = Methods()
    seen = []

    class Reading(SGVB):
        def differentiable_loss(self, model, guide, *args, **kwargs):
            with poutine.trace(param_only=True) as capture:
                read_structure(model, args, kwargs)
            seen.append(list(capture.trace.nodes))
            return super().differentiable_loss(model, guide, *args, **kwargs)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    svi = SVI(module.model, guide, pyro.optim.Adam({"lr": 0.01}), Reading())
    svi.step(X)
    svi.step(X)
    assert seen == [[], []]
    assert set(pyro.get_param_store().keys()) == {"loc"} | {
        f"decoder$$${name}" for name, _ in module.decoder.named_parameters()
    }
    assert int(module.decoder[1].num_batches_tracked) == 2


def test_reading_with_an_automatic_guide_leaves_the_store_alone():
    model = functools.partial(chain, plate="data")
    guide = AutoNormal(model)
    state = torch.get_rng_state()
    structure = read_structure(model, (X,), guide=guide)
    assert not pyro.get_param_store().keys()
    assert torch.equal(torch.get_rng_state(), state)
    assert structure.data_plate == "data"
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X)
    assert set(pyro.get_param_store().keys()) == {"AutoNormal.locs.z", "AutoNormal.scales.z"}


def test_every_failure_of_a_model_is_an_error_of_ours():
    for error in (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError):

        def model(x, error=error):
            raise error("inside")

        with pytest.raises(AEVBError, match=r"float32 \[4, 3\].*inside"):
            read_structure(model, (X,))


def test_parents_are_seen_through_assignment_and_through_steps_without_gradient():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal((a > 0).float(), 1.0))  # no gradient
            out = torch.zeros(len(x), 2)
            out[..., 0] = b  # no provenance
            pyro.sample("c", dist.Normal(out.sum(-1), 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    values = {name: torch.zeros(3) for name in "abc"}
    parents = prior_parents(model, values, (torch.zeros(3),), {})
    assert parents["b"] == {"a"}
    assert "b" in parents["c"]
    assert parents["x"] == frozenset()
