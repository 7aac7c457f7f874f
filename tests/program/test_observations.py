"""A simulated observation goes back into the batch, and the model then observes it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_aevb.errors import ModelError, SettingError
from pyro_aevb.prediction import simulate
from pyro_aevb.program.observations import write_observations
from pyro_aevb.program.structure import read_structure
from pyro_aevb.testing import EightSchools, LinearGaussian, LinearGaussianStateSpace


def observed_by(model, args, kwargs):
    """Run the model anew and read what it observes."""
    nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
    return {
        name: node["value"]
        for name, node in nodes.items()
        if node["type"] == "sample" and node["is_observed"] and "_Subsample" not in type(node["fn"]).__name__
    }


def whole(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x), 3]).to_event(1), obs=x)


def column_each(x):
    with pyro.plate("data", len(x)):
        for t in range(x.shape[1]):
            pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0), obs=x[..., t])


def reshaped(x):
    with pyro.plate("data", len(x)):
        flat = x.view(len(x), -1)
        pyro.sample("x", dist.Normal(torch.zeros(flat.shape[-1]), 1.0).to_event(1), obs=flat)


def keyword(*, length, x):
    with pyro.plate("data", len(length)):
        pyro.sample("x", dist.Normal(length[:, None], 1.0).expand([len(length), 2]).to_event(1), obs=x[:, 1:])


def inner_plate_left(x):
    with pyro.plate("inner", x.shape[1], dim=-2), pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.t())


def inner_plate_right(x):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", x.shape[1], dim=-1):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def nested_argument(batch):
    with pyro.plate("data", len(batch["x"])):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=batch["x"])


def two_windows(x):
    with pyro.plate("data", len(x)):
        pyro.sample("odd", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x[:, 1::2])
        pyro.sample("even", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x[:, ::2])


VIEWS = {
    "whole": (whole, (torch.zeros(4, 3),), {}),
    "column each": (column_each, (torch.zeros(4, 3),), {}),
    "view": (reshaped, (torch.zeros(4, 3, 2),), {}),
    "keyword and slice": (keyword, (), {"x": torch.zeros(4, 3), "length": torch.arange(4.0)}),
    "inner plate left of the data plate": (inner_plate_left, (torch.zeros(4, 3),), {}),
    "inner plate right of the data plate": (inner_plate_right, (torch.zeros(4, 3),), {}),
    "two strided windows": (two_windows, (torch.zeros(4, 4),), {}),
    "non-contiguous argument": (whole, (torch.zeros(3, 4).t(),), {}),
    "expanded argument": (whole, (torch.zeros(1, 3).expand(4, 3),), {}),
    "state space": (LinearGaussianStateSpace().model, (torch.zeros(4, 3),), {}),
    "linear-Gaussian": (
        LinearGaussian.fixture()[0].model,
        (torch.zeros(4, 6, dtype=torch.float64),),
        {},
    ),
}


@pytest.mark.parametrize(("model", "args", "kwargs"), VIEWS.values(), ids=VIEWS.keys())
def test_the_model_observes_what_was_simulated(model, args, kwargs):
    values = simulate(model, *args, **kwargs, seed=1)
    new_args, new_kwargs = write_observations(model, args, kwargs, values)
    found = observed_by(model, new_args, new_kwargs)
    assert found
    for name, value in found.items():
        natural = value.movedim(1, 0) if name == "x" and model is inner_plate_left else value
        torch.testing.assert_close(natural, values[name].to(value.dtype), rtol=0, atol=0)
        assert float(value.abs().min()) > 0  # nothing is left of the zeros


def test_the_given_batch_and_its_unobserved_parts_stay():
    x, length = torch.zeros(4, 3), torch.arange(4.0)
    _, kwargs = write_observations(keyword, (), {"x": x, "length": length}, {"x": torch.ones(4, 2)})
    assert torch.equal(x, torch.zeros(4, 3))
    assert torch.equal(kwargs["x"], torch.tensor([[0.0, 1.0, 1.0]]).expand(4, 3))
    assert torch.equal(kwargs["length"], length)
    assert kwargs["length"] is not length


def test_an_argument_in_a_dictionary_is_written():
    values = {"x": torch.arange(3.0)}
    structure = read_structure(nested_argument, ({"x": torch.zeros(3)},))
    args, _ = write_observations(nested_argument, ({"x": torch.zeros(3)},), {}, values, structure=structure)
    assert torch.equal(args[0]["x"], torch.arange(3.0))


def test_one_tensor_given_twice_is_written_once_and_seen_twice():
    def model(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(y.detach() * 0, 1.0), obs=x)

    x = torch.zeros(3)
    args, _ = write_observations(model, (x, x), {}, {"x": torch.ones(3)})
    assert args[0] is args[1]


def test_a_model_without_rows_is_written_too():
    model, y = EightSchools.fixture()
    values = {"y": torch.full_like(y, 2.0)}
    structure = read_structure(model.model, (y,), data_plate=None)
    args, _ = write_observations(model.model, (y,), {}, values, structure=structure)
    assert torch.equal(args[0], torch.full_like(y, 2.0))


def test_sites_that_are_not_given_keep_their_value():
    args, _ = write_observations(column_each, (torch.zeros(2, 3),), {}, {"x_1": torch.ones(2), "z": torch.ones(2)})
    assert args[0].tolist() == [[0.0, 1.0, 0.0]] * 2


def by_index(x):
    with pyro.plate("data", len(x)) as i:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[torch.as_tensor(i)])


def computed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.log1p())


def cast(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.double())


def repeated(x):
    with pyro.plate("inner", 2, dim=-2), pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.expand(2, -1))


def closed_over(x, constant=torch.zeros(3)):  # noqa: B008
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(x, 1.0), obs=constant)


@pytest.mark.parametrize("model", [by_index, computed, cast, repeated, closed_over])
def test_what_is_no_view_of_an_argument_needs_to_batch(model):
    shape = (3, 2) if model is repeated else (3,)
    with pytest.raises(ModelError, match=r"'x'.*to_batch=") as error:
        write_observations(model, (torch.zeros(3),), {}, {"x": torch.ones(shape)})
    assert error.value.site == "x"


def test_to_batch_does_it():
    def to_batch(values, args, kwargs):
        return (values["x"].expm1(),), kwargs

    args, kwargs = write_observations(computed, (torch.zeros(3),), {}, {"x": torch.ones(3)}, to_batch=to_batch)
    torch.testing.assert_close(observed_by(computed, args, kwargs)["x"], torch.ones(3))


def test_to_batch_that_returns_a_tensor_is_refused():
    with pytest.raises(SettingError, match="args, kwargs"):
        write_observations(whole, (torch.zeros(4, 3),), {}, {}, to_batch=lambda values, args, kwargs: args[0])


def test_two_sites_that_observe_the_same_entries_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(0.0, 1.0), obs=x)
            pyro.sample("b", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ModelError, match="another site"):
        write_observations(model, (torch.zeros(3),), {}, {"a": torch.ones(3), "b": torch.ones(3)})


def test_a_value_of_another_shape_is_refused():
    with pytest.raises(ModelError, match=r"\[5, 3\].*\[4, 3\]"):
        write_observations(whole, (torch.zeros(4, 3),), {}, {"x": torch.zeros(5, 3)})


def test_nothing_else_changes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.norm(z), 1.0).to_event(1), obs=x)

    model, state = Model(), torch.get_rng_state()
    write_observations(model, (torch.zeros(4, 3),), {}, {"x": torch.ones(4, 3)})
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model.norm.num_batches_tracked) == 0
    assert model.training
    assert model.norm.training
