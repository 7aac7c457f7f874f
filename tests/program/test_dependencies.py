"""Who depends on whom, read from programs that hide it in every way: each edge is known from the program's text."""

import functools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_aevb.errors import AEVBWarning, ModelError
from pyro_aevb.program.dependencies import prior_parents, read_dependencies
from pyro_aevb.program.structure import read_structure

X = torch.linspace(-1.0, 1.0, 4)


def read(model, *args, data_plate="data", **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        structure = read_structure(model, args, kwargs, data_plate=data_plate)
        return read_dependencies(model, args, kwargs, structure)


def parents(model, *args, **kwargs):
    return {name: set(found) for name, found in read(model, *args, **kwargs).parents.items()}


def counted(model):
    """Return a model that counts its runs in ``runs``."""

    @functools.wraps(model)
    def run(*args, **kwargs):
        run.runs += 1
        return model(*args, **kwargs)

    run.runs = 0
    return run


def test_edges_are_direct_and_values_observed_are_no_edges():
    def model(x):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(g, 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.deterministic("twice", 2 * z2)
            pyro.sample("x", dist.Normal(2 * z2, 1.0), obs=x)

    found = read(model, X)
    assert found.parents == {"g": set(), "z1": {"g"}, "z2": {"z1"}, "x": {"z2"}}
    assert found.arguments.keys() == {"@x"}
    assert found.arguments["@x"] is X
    assert found.ordered == frozenset()


def test_an_observed_value_that_is_read_again_is_an_edge_from_its_site_or_from_the_argument():
    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("x1", dist.Normal(0.0, 1.0), obs=x[:, 0])
            z = pyro.sample("z", dist.Normal(first, 1.0))
            pyro.sample("x2", dist.Normal(z + x[:, 0], 1.0), obs=x[:, 1])

    assert parents(model, torch.randn(4, 2)) == {"x1": set(), "z": {"x1"}, "x2": {"z", "@x"}}


def test_an_observed_count_that_is_read_again_is_an_edge():
    def model(x):
        with pyro.plate("data", len(x)):
            count = pyro.sample("count", dist.Poisson(2.0), obs=x)
            z = pyro.sample("z", dist.Normal((count > 1).float(), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(len(x)))

    assert parents(model, torch.tensor([1, 2, 3]))["z"] == {"count"}


def test_autograd_sees_what_assignment_into_a_tensor_hides_from_provenance():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            out = torch.zeros(len(x), 2)
            out[..., 0] = z
            pyro.sample("x", dist.Normal(out.sum(-1), 1.0), obs=x)

    assert parents(model, X)["x"] == {"z"}


def test_provenance_sees_what_a_step_without_derivative_hides_from_autograd():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((z > 0).float(), 1.0), obs=x)

    assert parents(model, X)["x"] == {"z"}


def through_numpy(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(torch.as_tensor(np.sin(z1.detach().numpy())), 1.0))
        other = pyro.sample("other", dist.Gamma(1.0, 1.0))
        noise = torch.randn(len(x))
        pyro.sample("x", dist.Normal(torch.as_tensor(z2.detach().numpy()) + other + noise, 1.0), obs=x)


def test_moving_a_latent_shows_what_both_miss():
    assert parents(through_numpy, X) == {"z1": set(), "z2": {"z1"}, "other": set(), "x": {"z2", "other"}}


def test_the_model_runs_twice_and_once_more_for_each_lost_latent():
    plain, lost = counted(read_me), counted(through_numpy)
    for model, runs in ((plain, 2), (lost, 4)):
        structure = read_structure(model, (X,))
        model.runs = 0
        read_dependencies(model, (X,), {}, structure)
        assert model.runs == runs


def read_me(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_latent_without_effect_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            above = pyro.sample("above", dist.Normal(0.0, 1.0))
            pyro.sample("idle", dist.Normal(above, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    structure = read_structure(model, (X,))
    with pytest.warns(AEVBWarning) as caught:
        found = read_dependencies(model, (X,), {}, structure)
    assert [str(item.message).split("'")[1] for item in caught] == ["above", "idle"]
    assert found.parents == {"z": set(), "above": set(), "idle": {"above"}, "x": {"z"}}


def test_a_factor_is_an_effect_and_its_argument_a_parent():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("fit", -((x - z) ** 2))

    assert parents(model, X) == {"z": set(), "fit": {"z", "@x"}}


@pytest.mark.parametrize("how", ["index", "embedding", "one_hot", "comparison"])
def test_an_integer_argument_is_a_parent(how):
    table = torch.randn(5, 1)
    lookup = {
        "index": lambda label: table[label, 0],
        "embedding": lambda label: nn.functional.embedding(label, table)[..., 0],
        "one_hot": lambda label: (nn.functional.one_hot(label, 5).float() @ table)[..., 0],
        "comparison": lambda label: (label > 2).float(),
    }[how]

    def model(x, label):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + lookup(label), 1.0), obs=x)

    found = read(model, X, torch.tensor([0, 1, 2, 3]))
    assert found.parents == {"z": set(), "x": {"z", "@label"}}
    assert set(found.arguments) == {"@x", "@label"}


def test_shapes_and_types_taken_from_an_argument_are_no_edges():
    def model(x):
        with pyro.plate("data", len(x)):
            loc = x.new_zeros(len(x)) + torch.zeros_like(x) + torch.zeros(1).to(x).expand_as(x)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(x)))
            scale = x.new_full((len(x),), 2.0)
            pyro.sample("x", dist.Normal(z.type_as(x), scale), obs=x)

    assert parents(model, X) == {"z": set(), "x": {"z"}}


@pytest.mark.parametrize("where", ["handler", "distribution", "inside"])
def test_masks_are_no_edges(where):
    def model(x, lengths):
        mask = torch.arange(3) < lengths[:, None]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.Normal(z[:, None].expand(-1, 3), 1.0)
            if where == "inside":
                pyro.sample("x", fn.mask(mask).to_event(1), obs=x)
            else:
                row = mask[:, 0]
                fn = fn.to_event(1)
                with poutine.mask(mask=row if where == "handler" else torch.ones(()) > 0):
                    pyro.sample("x", fn.mask(row) if where == "distribution" else fn, obs=x)

    assert parents(model, torch.randn(4, 3), torch.tensor([3, 2, 1, 0])) == {"z": set(), "x": {"z"}}


def test_a_mask_computed_from_a_latent_is_an_edge():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=z > 0):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    assert parents(model, X)["x"] == {"z"}


def test_what_is_switched_off_has_no_parents_and_is_no_effect():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=False):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    structure = read_structure(model, (X,))
    with pytest.warns(AEVBWarning, match="'z'"):
        assert read_dependencies(model, (X,), {}, structure).parents == {"z": set(), "x": set()}


def test_missing_values_do_not_hide_edges():
    def model(x):
        seen = ~x.isnan()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen).to_event(1), obs=x)

    x = torch.randn(4, 3)
    x[1, 2] = float("nan")
    assert parents(model, x) == {"z": set(), "x": {"z"}}


def test_missing_values_in_every_row_do_not_hide_what_moving_a_latent_shows():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            loc = torch.as_tensor(z.detach().numpy())
            pyro.sample("x", dist.Normal(loc, 1.0).mask(~x.isnan()).to_event(1), obs=x)

    x = torch.randn(4, 3)
    x[:, 1] = float("nan")
    assert parents(model, x)["x"] == {"z"}


def test_missing_covariates_do_not_make_a_plate_ordered():
    def model(x, c):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.where(c.isnan(), 0.0, z * c), 1.0), obs=x)

    c = torch.randn(4, 3)
    c[:, 1] = float("nan")
    assert read(model, torch.randn(4, 3), c).ordered == frozenset()


def test_half_observed_values_reach_what_is_computed_from_them():
    def model(x, y, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            label = pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=seen)
            pyro.sample("x", dist.Normal(label + z, 1.0), obs=x)

    found = parents(model, X, X, torch.tensor([True, False, True, False]))
    assert found["y_observed"] == found["y_unobserved"] == {"z"}
    assert found["x"] == {"z", "y_observed", "y_unobserved", "@seen"}


def walk(x):
    time = pyro.plate("time", 5, dim=-2)
    with pyro.plate("data", x.shape[1], dim=-1):
        start = pyro.sample("start", dist.Normal(0.0, 1.0))
        with time:
            steps = pyro.sample("steps", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(start + steps.cumsum(-2), 1.0), obs=x)


def test_a_cumulative_sum_makes_a_plate_ordered():
    assert read(walk, torch.randn(5, 4)).ordered == {"time"}


def test_a_shift_of_observed_vectors_makes_a_plate_ordered():
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("time", x.shape[1], dim=-1):
            past = torch.cat(
                [torch.zeros(len(x), 1, 2), pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=x)[:, :-1]], 1
            )
            z = pyro.sample("z", dist.Normal(past, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    assert read(model, torch.randn(4, 5, 2)).ordered == {"time"}


def test_plates_of_exchangeable_indices_are_not_ordered():
    def model(x, *, size):
        with pyro.plate("data", len(x), dim=-2):
            group = pyro.sample("group", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", size, dim=-1):
                z = pyro.sample("z", dist.Normal(group, 1.0))
                pyro.sample("x", dist.Normal(z.cumsum(-1) if size == 1 else z, 1.0), obs=x)
            pyro.sample("total", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x.sum(-1, keepdim=True))

    for size in (1, 3):
        assert read(functools.partial(model, size=size), torch.randn(4, size)).ordered == frozenset()


def test_rows_that_meet_do_not_make_the_data_plate_ordered():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.cumsum(0), 1.0), obs=x)

    assert read(model, X).ordered == frozenset()


def test_arguments_bear_the_names_of_the_signature():
    class Network(nn.Module):
        def forward(self, x, *more, scale, flag=True):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + more[0] + more[1], scale), obs=x)

    found = read(Network(), X, X, X + 1, scale=torch.tensor(2.0), flag=False)
    assert found.parents["x"] == {"z", "@more[0]", "@more[1]"}
    assert found.arguments["@more[1]"][0] == 0.0
    partial = read(functools.partial(lambda kind, x: read_me(x), "any"), X)
    assert set(partial.arguments) == {"@x"}
    handled = read(poutine.scale(read_me, scale=2.0), X)
    assert set(handled.arguments) == {"@x"}


def test_programs_may_write_into_their_arguments():
    def model(x, c):
        c[c > 1] = 0.0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            out = torch.zeros(len(x), 2)
            out[..., 0], out[..., 1] = z, c
            pyro.sample("x", dist.Normal(out.sum(-1), 1.0), obs=x)

    assert parents(model, X, X.clone())["x"] == {"z", "@c"}


def test_programs_that_work_on_plain_tensors_only_are_read():
    def model(x):
        x.numpy()  # refuses leaves of the autograd graph
        x[x.isnan()] = 0.0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if type(z) is not torch.Tensor:
                raise NotImplementedError("no subclasses here")
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert parents(model, X.clone()) == {"z": set(), "x": {"z"}}


def test_rows_that_the_model_draws_are_the_same_in_every_run():
    rows = []

    def model(x):
        pyro.sample("g", dist.Normal(0.0, 1.0))  # drawn in the first run only
        with pyro.plate("data", len(x), subsample_size=2) as index:
            rows.append(index.tolist())
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.as_tensor(z.detach().numpy()), 1.0), obs=x[index])

    x = torch.randn(20)
    structure = read_structure(model, (x,))
    rows.clear()
    with pytest.warns(AEVBWarning, match="'g'"):
        assert read_dependencies(model, (x,), {}, structure).parents["x"] == {"z"}
    assert len(rows) == 4
    assert all(drawn == rows[0] for drawn in rows)


def test_reading_leaves_nothing_behind():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x):
            scale = pyro.param("scale", torch.ones(()))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, scale))
                pyro.sample("x", dist.Normal(self.norm(z[:, None])[:, 0], 1.0), obs=x)

    model, x = Decoder(), X.clone()
    structure = read_structure(model, (x,))
    state = torch.get_rng_state()
    read_dependencies(model, (x,), {}, structure)
    assert torch.equal(torch.get_rng_state(), state)
    assert not pyro.get_param_store().keys()
    assert int(model.norm.num_batches_tracked) == 0
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(x, X)
    assert not x.requires_grad


def test_sites_that_change_from_run_to_run_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            model.runs += 1
            if model.runs > 1:
                z = pyro.sample("late", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model.runs = 0
    structure = read_structure(model, (X,))
    with pytest.raises(ModelError, match=r"first \['z', 'x'\], then \['z', 'late', 'x'\]") as caught:
        read_dependencies(model, (X,), {}, structure)
    assert caught.value.site == "late"


def test_a_failing_model_is_an_error_of_ours():
    def model(x):
        read_me(x)
        if model.fails:
            raise RuntimeError("inside")

    model.fails = False
    structure = read_structure(model, (X,))
    model.fails = True
    with pytest.raises(ModelError, match="inside"):
        read_dependencies(model, (X,), {}, structure)


def test_prior_parents_are_the_latents_among_the_parents():
    def model(x, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            y = pyro.sample("y", dist.Normal(z, 1.0), obs=x)
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    assert prior_parents(model, {"z": torch.zeros(4)}, (X, X), {}) == {"z": set(), "y": {"z"}, "x": {"z"}}
