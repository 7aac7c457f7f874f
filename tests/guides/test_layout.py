"""Layouts against axes written out by hand: plates at any dimensions, particles, globals, arguments."""

from itertools import permutations, product

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_aevb.guides.layout import Layout, read_layout
from pyro_aevb.program.structure import PlateFrame, Site, read_structure

SIZES = {"data": 5, "a": 2, "b": 3}


def frames(dims):
    return {name: PlateFrame(name, dim, SIZES[name], SIZES[name]) for name, dim in dims.items()}


def site_in(plates, dims, *, is_local=True, event=()):
    own = [frames(dims)[name] for name in plates]
    batch = [1] * max((-frame.dim for frame in own), default=0)
    for frame in own:
        batch[frame.dim] = frame.size
    support = dist.constraints.real
    return Site("z", "latent", is_local, support, event, tuple(batch), tuple(own), "Normal")


def layout_of(dims):
    inner = sorted((frame for name, frame in frames(dims).items() if name != "data"), key=lambda frame: frame.dim)
    return Layout(max(-dim for dim in dims.values()), dims["data"], tuple(inner))


def entry_of(value, dims, plates, index, event_dim):
    """Index a value by plate names, without the code under test: plate dimensions count from the right of the batch."""
    place = [0] * (value.dim() - event_dim)
    for name in plates:
        place[dims[name]] = index[name]
    return value[tuple(place)]


ORDERS = [dict(zip(SIZES, dims, strict=True)) for dims in permutations((-1, -2, -3))]
ORDERS += [{"data": -1, "a": -3, "b": -2}, {"data": -4, "a": -2, "b": -1}]
PLATES = [("data",), ("data", "a"), ("data", "b"), ("data", "a", "b"), ("a",), ("b", "a"), ()]


@pytest.mark.parametrize("dims", ORDERS, ids=str)
def test_reading_puts_rows_first_and_inner_plates_behind_them_left_to_right(dims):
    layout = layout_of(dims)
    names = ["data", *(frame.name for frame in layout.inner)]
    assert names[1:] == sorted(names[1:], key=dims.get)
    for plates, event in product(PLATES, [(), (4,), (2, 3)]):
        site = site_in(plates, dims, event=event)
        value = torch.randn((*site.batch_shape, *event))
        read = layout.read(value, site, len(event))
        assert read.shape == (*(SIZES[name] if name in plates else 1 for name in names), *event)
        for place in product(*(range(SIZES[name]) for name in plates)):
            index = dict(zip(plates, place, strict=True))
            canonical = tuple(index.get(name, 0) for name in names)
            assert torch.equal(read[canonical], entry_of(value, dims, plates, index, len(event)))


@pytest.mark.parametrize("dims", ORDERS, ids=str)
def test_writing_undoes_reading(dims):
    """Without particles the batch shape is the site's own; with them it is as long as the model's plates are deep."""
    layout = layout_of(dims)
    for plates, lead in product([plates for plates in PLATES if "data" in plates], [(), (7,), (2, 7)]):
        site = site_in(plates, dims, event=(4,))
        batch = site.batch_shape if not lead else (1,) * (layout.nesting - len(site.batch_shape)) + site.batch_shape
        value = torch.randn(*lead, *batch, 4)
        read = layout.read(value, site, 1)
        assert read.shape[: len(lead)] == lead
        assert torch.equal(layout.write(read, site), value)


@pytest.mark.parametrize("dims", ORDERS, ids=str)
def test_axis_names_the_canonical_axis_of_a_plate(dims):
    layout = layout_of(dims)
    site = site_in(("data", "a", "b"), dims)
    read = layout.read(torch.zeros(site.batch_shape), site, 0)
    assert {name: read.shape[layout.axis(name)] for name in "ab"} == {"a": 2, "b": 3}
    assert layout.num_axes == read.dim() == 3


def test_a_global_keeps_particles_and_puts_its_plates_into_the_event():
    dims = {"data": -1, "a": -2, "b": -3}
    layout, site = layout_of(dims), site_in(("a",), dims, is_local=False, event=(4,))
    value = torch.randn(2, 1, 4)
    assert torch.equal(layout.read(value, site, 1), value.reshape(1, 1, 1, 8))
    particles = torch.randn(6, 7, 1, 2, 1, 4)
    assert torch.equal(layout.read(particles, site, 1), particles.reshape(6, 7, 1, 1, 1, 8))
    alone = site_in((), dims, is_local=False)
    assert layout.read(torch.tensor(3.0), alone, 0).shape == (1, 1, 1, 1)


def test_outputs_of_size_one_along_a_plate_stay_so():
    """A row's latent broadcasts over the plates of a latent that reads it."""
    dims = {"data": -2, "a": -1, "b": -3}
    layout, site = layout_of(dims), site_in(("data", "a"), dims)
    assert layout.write(torch.zeros(5, 1, 2, 9), site).shape == (5, 2, 9)
    assert layout.write(torch.zeros(5, 1, 1, 9), site).shape == (5, 1, 9)


def test_arguments_are_read_by_the_plates_that_their_axes_are():
    dims = {"data": -1, "a": -2, "b": -3}
    layout = layout_of(dims)
    argument = torch.randn(5, 2, 7)
    read = layout.rows(argument, ("a",))
    assert read.shape == (5, 1, 2, 7)
    assert torch.equal(read[3, 0, 1], argument[3, 1])
    assert torch.equal(layout.rows(argument, ())[3, 0, 0], argument[3].flatten())
    both = torch.randn(5, 3, 2)
    assert torch.equal(layout.rows(both, ("b", "a"))[4, 2, 1], both[4, 2, 1][None])
    assert layout.rows(torch.randn(5), ()).shape == (5, 1, 1, 1)


def test_a_layout_is_read_from_the_local_sites():
    def model(x):
        with pyro.plate("features", 4, dim=-1):
            pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("b", 3, dim=-1), pyro.plate("a", 2, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    layout = read_layout(read_structure(model, (torch.randn(5, 2, 3),)))
    assert [frame.name for frame in layout.inner] == ["a", "b"]  # the globals' plate is none of the rows'
    assert (layout.nesting, layout.data_dim) == (3, -3)


def test_without_a_data_plate_everything_is_the_one_row():
    def model(x):
        with pyro.plate("schools", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    structure = read_structure(model, (torch.randn(6),), data_plate=None)
    layout = read_layout(structure)
    assert layout.data_dim is None
    value = torch.randn(6)
    read = layout.read(value, structure.sites["z"], 0)
    assert torch.equal(read, value[None])
    assert torch.equal(layout.write(read[..., None], structure.sites["z"]), value[:, None])
