"""What a batch says: read from arguments and from a run of the model, held against each other and against indexing by hand."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_aevb import AutoAmortizedNormal
from pyro_aevb.errors import ModelError
from pyro_aevb.guides.layout import read_layout
from pyro_aevb.guides.probe import Probe, bind
from pyro_aevb.program.structure import read_structure

X = torch.randn(7, 3)


def probing(model, *args, data_plate="auto", **kwargs):
    structure = read_structure(model, args, kwargs, data_plate=data_plate)
    probe = Probe(model, structure, read_layout(structure))
    return probe, probe.learn(args, kwargs)


def counting(model):
    """Return a model that counts its runs."""

    @functools.wraps(model)
    def counted(*args, **kwargs):
        counted.runs += 1
        return model(*args, **kwargs)

    counted.runs = 0
    return counted


def whole(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)


def columns(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for t in range(3):
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def transposed(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", 3, dim=-2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.t())


def strided(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], torch.ones(2)).to_event(1), obs=x[:, ::2])


def computed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.sum(-1))


def masked(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=x[:, 0] > 0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 1])


# Without a run of the model.


@pytest.mark.parametrize("model", [whole, columns, transposed, strided], ids=lambda model: model.__name__)
def test_arguments_and_their_views_are_read_without_a_run(model):
    probe, _ = probing(counted := counting(model), X)
    sources = [site.name for site in probe.structure.select("observed")]
    before = counted.runs
    long = torch.randn(40, 3)
    batches = [X, torch.randn(4, 3), torch.randn(1, 3), long[20:30], long[::2], torch.randn(3, 9).t()]
    readings = [probe.read((x,), {}, sources, {}) for x in batches]
    assert counted.runs == before
    probe.always_run()
    for x, direct in zip(batches, readings, strict=True):
        by_run = probe.read((x,), {}, sources, {})
        assert direct.observations.keys() == by_run.observations.keys() == set(sources)
        assert all(torch.equal(direct.observations[name].value, by_run.observations[name].value) for name in sources)
        assert direct.frames == by_run.frames
        assert not direct.masks


def test_a_slice_to_learn_from_is_as_good_as_a_tensor():
    long = torch.randn(40, 3)
    for part in (long[5:12], long[:7], long[33:]):
        probe, reading = probing(columns, part)
        new = torch.randn(9, 3)
        assert not probe.runs_model
        assert torch.equal(reading.observations["x_1"].value, part[:, 1])
        assert torch.equal(probe.read((new,), {}, ["x_1"], {}).observations["x_1"].value, new[:, 1])


def test_views_are_read_by_hand_too():
    probe, reading = probing(columns, X)
    new = torch.randn(20, 3)[5:9]
    found = probe.read((new,), {}, ["x_2"], {}).observations
    assert torch.equal(reading.observations["x_1"].value, X[:, 1])
    assert torch.equal(found["x_2"].value, new[:, 2])
    probe, reading = probing(transposed, X)
    assert torch.equal(probe.read((new,), {}, ["x"], {}).observations["x"].value, new)


@pytest.mark.parametrize("model", [computed, masked], ids=lambda model: model.__name__)
def test_what_is_computed_or_masked_is_read_by_a_run(model):
    probe, _ = probing(counted := counting(model), X)
    before = counted.runs
    new = torch.randn(5, 3)
    reading = probe.read((new,), {}, ["x"], {})
    assert counted.runs == before + 1
    value, mask = reading.observations["x"]
    if model is computed:
        assert torch.equal(value, new.sum(-1))
        assert mask is None
    else:
        assert torch.equal(value, new[:, 1])
        assert torch.equal(mask, new[:, 0] > 0)


def test_arguments_of_other_shapes_are_read_by_a_run():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    probe, _ = probing(counted := counting(model), X)
    before = counted.runs
    new = torch.randn(5, 9)
    assert torch.equal(probe.read((new,), {}, ["x"], {}).observations["x"].value, new)
    assert counted.runs == before + 1


def test_an_observation_that_broadcasts_is_expanded():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)

    _, reading = probing(model, torch.randn(7, 1))
    assert reading.observations["x"].value.shape == (7, 3)


# Runs.


def test_a_run_draws_no_noise_and_leaves_buffers_and_modes():
    norm = nn.BatchNorm1d(3)

    def model(x):
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.ones(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(norm(z), 1.0).to_event(1), obs=x)

    probe, _ = probing(model, X)
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        values.append(probe.run_quietly((X,), {})["z"]["value"])
    assert torch.equal(*values)
    state = {name: item.clone() for name, item in norm.state_dict().items()}
    generator = torch.get_rng_state()
    probe.run_quietly((X,), {})
    assert torch.equal(torch.get_rng_state(), generator)
    assert norm.training
    assert all(torch.equal(item, state[name]) for name, item in norm.state_dict().items())


def test_masks_of_latents_are_of_their_batch_shape():
    def model(x, lengths):
        with pyro.plate("data", len(x)):
            for t in range(3):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    pyro.sample(f"x_{t}", dist.Normal(z[..., 0], 1.0), obs=x[:, t])

    lengths = torch.tensor([1, 2, 3, 3, 2, 1, 1])
    probe, reading = probing(model, X, lengths)
    assert {name: mask.tolist() for name, mask in reading.masks.items()} == {
        f"z_{t}": (t < lengths).tolist() for t in range(3)
    }
    assert probe.runs_model


def test_a_mask_that_splits_a_latents_event_is_refused():
    def model(x, known):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(known).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ModelError, match=r"'z'.*splits its event of shape \[3\].*plate instead") as caught:
        probing(model, X, X > 0)
    assert caught.value.site == "z"


# Subsampling.


def subsampling(x):
    with pyro.plate("data", len(x), subsample_size=4) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index, 0])


def given_rows(x, index):
    with pyro.plate("data", 100, subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def test_rows_that_a_model_draws_are_those_that_it_is_given():
    probe, _ = probing(subsampling, X)
    assert probe.drawn == {"data": (7, 4)}
    index = torch.tensor([6, 0, 3, 1])
    reading = probe.read((X,), {}, ["x", "@x"], {"data": index})
    assert torch.equal(reading.observations["x"].value, X[index, 0])
    assert torch.equal(reading.observations["@x"].value, X[index])
    assert reading.frames["data"].size == 4
    assert reading.frames["data"].full_size == 7


def test_rows_that_a_model_is_told_are_read_off():
    index = torch.tensor([90, 3, 5, 8, 1, 2, 40])
    probe, reading = probing(given_rows, X, index)
    assert probe.drawn == {}
    assert torch.equal(reading.indices["data"], index)
    assert torch.equal(reading.observations["x"].value, X[:, 0])


def test_guide_and_model_see_the_same_rows():
    """The guide draws the rows, and the model is given them."""
    guide = AutoAmortizedNormal(subsampling).build(X)
    trace = poutine.trace(guide).get_trace(X)
    model = poutine.trace(poutine.replay(subsampling, trace=trace)).get_trace(X)
    index = trace.nodes["data"]["value"]
    assert torch.equal(model.nodes["x"]["value"], X[index, 0])
    assert trace.nodes["z"]["value"].shape == (4,)


# Arguments.


def test_arguments_are_bound_to_their_names():
    def model(x, y, *rest, scale, **more):
        """Never run."""

    a, b, c, d = (torch.zeros(size) for size in (1, 2, 3, 4))
    bound = bind(model, (a, 3.0, b), {"scale": c, "extra": d})
    assert {name: len(item) for name, item in bound.items()} == {"@x": 1, "@rest[0]": 2, "@scale": 3, "@extra": 4}


def test_single_numbers_are_no_arguments_with_rows():
    assert bind(whole, (torch.tensor(1.0),), {}) == {}


def test_nan_in_an_argument_is_missing():
    def model(x, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c.nan_to_num(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    c = torch.tensor([1.0, float("nan"), 3.0, 4.0])
    probe, _ = probing(model, torch.randn(4), c)
    assert probe.nan_arguments == {"@c"}
    for value, known in ((c, [True, False, True, True]), (c.nan_to_num(), [True] * 4)):
        observation = probe.read((torch.randn(4), value), {}, ["@c"], {}).observations["@c"]
        assert observation.mask.flatten().tolist() == known


# Structures that change.


def test_other_sites_than_at_the_build_are_named_with_both_shapes():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    probe, _ = probing(model, X)
    with pytest.raises(ModelError, match=r"other sites.*expected .*z: \[3\].*got .*z: \[5\].*pad"):
        probe.read((torch.randn(7, 5),), {}, ["x"], {})


def test_row_latents_whose_count_varies_are_named():
    def model(x):
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    guide = AutoAmortizedNormal(model).build(X)
    with pytest.raises(ModelError, match=r"z_3: \[\].*pad to one length and mask"):
        guide(torch.randn(7, 5))
    with pytest.raises(ModelError, match=r"expected .*z_2: \[\].*got none of them"):
        guide(X[:, :2])
