"""What every automatic guide owes every model class.

Guides are compared through log q of values that are held fixed, site by site and row by row, so that no law rests on draws.
"""

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import pyro
import pytest
import torch
from model_classes.base import Batch, ModelClass
from model_classes.registry import REGISTRY
from pyro import poutine
from torch import Tensor, nn

from pyro_aevb import IWELBO, SGVB, AutoAmortizedFlow, AutoAmortizedMultivariateNormal, AutoAmortizedNormal, stage
from pyro_aevb.errors import AEVBWarning, ParticleWarning, StagingWarning
from pyro_aevb.guides.base import AmortizedGuide
from pyro_aevb.guides.building import read_model
from pyro_aevb.guides.inputs import Observation
from pyro_aevb.program.batch import take_rows
from pyro_aevb.program.importance import ImportanceProgram

GUIDES: dict[str, type[AmortizedGuide]] = {
    "normal": AutoAmortizedNormal,
    "multivariate_normal": AutoAmortizedMultivariateNormal,
    "flow": AutoAmortizedFlow,
}
LOOPED = {"regression"}
"""Entries whose model does not broadcast over particles: what it adds to a global's right is the rows' axis."""

ALIKE: dict[str, dict[str, int]] = {
    "groups": {"inner": 1},
    "groups_right": {"inner": 1},
    "groups_named": {"pupils": 1},
    "ragged_groups": {"inner": 1},
    "nested_latents": {"inner": 1},
    "nested_counts": {"inner": 1},
    "crossed": {"lines": 1, "columns": 2},
    "globals_hierarchical": {"observations": 1},
    "globals_ragged": {"inner": 1},
    "mixed_regression": {"inner": 1},
}
"""Entries with plates whose indices are alike, and the axis of the arguments that each plate is."""

MASKED: dict[str, tuple[tuple[str, ...], Any]] = {
    "ragged_groups": (("x",), lambda x, present: {"x": present}),
    "globals_ragged": (("x",), lambda x, present: {"x": present}),
    "ragged_series": (("x",), lambda x, lengths: {"x": torch.arange(x.shape[1]) < lengths[:, None]}),
    "obs_mask_normal": (("x",), lambda x, observed: {"x": observed}),
    "obs_mask_counts": (("x",), lambda x, observed: {"x": observed}),
    "obs_mask_rows": (("x",), lambda x, y, observed: {"x": observed[:, None].expand_as(x)}),
    "masked_event": (("x",), lambda x, observed: {"x": observed}),
    "mixed_table": (
        ("height", "smoker"),
        lambda height, smoker, height_known, smoker_known: {"height": height_known, "smoker": smoker_known},
    ),
    "label_and_style": (("y",), lambda x, y, labelled: {"y": labelled}),
    "dose_and_effect": (("y",), lambda x, y, labelled: {"y": labelled}),
}
"""Entries with missing entries: the arguments that have them, and which of their entries are known."""

Names = Iterable[str]


def every(names: Names = tuple(REGISTRY)) -> Any:
    return pytest.mark.parametrize("entry", [pytest.param(REGISTRY[name], id=name) for name in names])


def every_pair(names: Names = tuple(REGISTRY), *, every_nth: int = 1) -> Any:
    """Pair entries with guides; all are slow but, of every so many entries, one guide in turn."""
    places = {name: index for index, name in enumerate(REGISTRY)}
    pairs = [
        pytest.param(
            REGISTRY[name],
            kind,
            id=f"{name}-{kind}",
            marks=() if places[name] % (len(GUIDES) * every_nth) == number * every_nth else pytest.mark.slow,
        )
        for name in names
        for number, kind in enumerate(GUIDES)
    ]
    return pytest.mark.parametrize(("entry", "kind"), pairs)


@cache
def built(name: str, kind: str, *, reads_by_run: bool = False) -> AmortizedGuide:
    """Build a guide and move its parameters off their start, where heads are 0 and nothing that encoders say shows."""
    entry = REGISTRY[name]
    args, kwargs = entry.test_batch()
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(1)
        guide = GUIDES[kind](entry.model, data_plate=entry.data_plate).build(*args, **kwargs)
        for parameter in guide.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    if reads_by_run:
        guide.built.probe.always_run()
    return guide


def draw(guide: AmortizedGuide, batch: Batch) -> dict[str, Tensor]:
    """Draw every site of the guide, auxiliary ones too."""
    return {name: node["value"] for name, node in sample_nodes(guide, batch).items()}


def sample_nodes(program: Any, batch: Batch) -> dict[str, Any]:
    with torch.no_grad():
        nodes = poutine.trace(program).get_trace(*batch[0], **batch[1]).nodes
    return {name: node for name, node in nodes.items() if node["type"] == "sample" and not is_plate(node)}


def is_plate(node: Any) -> bool:
    return type(node["fn"]).__name__ == "_Subsample"


def log_q(guide: AmortizedGuide, batch: Batch, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weigh values under the guide, ``{site: [*batch_shape]}``, masks applied."""
    nodes = sample_nodes(poutine.condition(guide, data=values), batch)
    found = {}
    for name, node in nodes.items():
        log_prob = node["fn"].log_prob(node["value"])
        found[name] = log_prob if node["mask"] is None else torch.where(node["mask"], log_prob, 0.0)
    return found


def local_sites(guide: AmortizedGuide) -> list[Any]:
    return list(guide.built.structure.select("latent", is_local=True))


def take(guide: AmortizedGuide, values: dict[str, Tensor], plate: str, index: Tensor) -> dict[str, Tensor]:
    """Take indices of a plate out of the values of the sites that lie in it."""
    dims = {
        site.name: frame.dim - len(site.event_shape)
        for site in guide.built.structure.select("latent")
        for frame in site.frames
        if frame.name == plate
    }
    return {
        name: value.index_select(value.dim() + dims[name], index) if name in dims else value
        for name, value in values.items()
    }


def assert_same_q(
    guide: AmortizedGuide, whole: dict[str, Tensor], part: dict[str, Tensor], plate: str, index: Tensor
) -> None:
    """Compare log q with that of other indices of a plate; to float32's rounding in sums of other lengths."""
    assert whole.keys() == part.keys()
    sites = guide.built.structure.sites
    for name, expected in whole.items():
        frames = sites[name].frames if name in sites else ()
        dim = next((frame.dim for frame in frames if frame.name == plate), None)
        expected = expected if dim is None else expected.index_select(expected.dim() + dim, index)
        torch.testing.assert_close(part[name], expected, rtol=1e-3, atol=1e-3)


# Parameters.


@every_pair()
def test_all_parameters_exist_after_building_and_each_is_trained(entry: ModelClass, kind: str) -> None:
    guide, (args, kwargs) = built(entry.name, kind), entry.test_batch()
    names = [name for name, _ in guide.named_parameters()]
    guide.zero_grad()
    loss = SGVB(data_plate=entry.data_plate).differentiable_loss(entry.model, guide, *args, **kwargs)
    loss.backward()
    assert [name for name, _ in guide.named_parameters()] == names
    gradients = {name: parameter.grad for name, parameter in guide.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


# Sites.


@every_pair()
def test_sites_are_the_models(entry: ModelClass, kind: str) -> None:
    guide, batch = built(entry.name, kind), entry.test_batch()
    own = sample_nodes(guide, batch)
    values = {name: node["value"] for name, node in own.items()}
    of_model = sample_nodes(poutine.condition(entry.model, data=values), batch)
    assert {name for name, node in own.items() if not node["infer"].get("is_auxiliary")} == set(entry.reference)
    for name in entry.reference:
        q, p = own[name], of_model[name]
        assert q["fn"].batch_shape == p["fn"].batch_shape, name
        assert q["fn"].event_shape == p["fn"].event_shape, name
        assert own[name]["value"].shape == of_model[name]["value"].shape
        assert {(f.name, f.dim, f.size) for f in q["cond_indep_stack"]} == {
            (f.name, f.dim, f.size) for f in p["cond_indep_stack"]
        }, name
        assert p["fn"].support.check(q["value"]).all(), name
        assert q["fn"].log_prob(q["value"]).isfinite().all(), name
        if p["mask"] is not None:
            assert torch.equal(*torch.broadcast_tensors(q["mask"], p["mask"])), name


@every_pair()
def test_a_call_returns_the_latents(entry: ModelClass, kind: str) -> None:
    guide, (args, kwargs) = built(entry.name, kind), entry.test_batch()
    with torch.no_grad():
        values = guide(*args, **kwargs)
    assert set(values) == set(entry.reference)
    for name, value in values.items():
        assert entry.feature(name, value).shape == entry.reference[name].mean.shape


# Objectives and particles.


@every_pair(every_nth=3)
def test_every_objective_takes_it(entry: ModelClass, kind: str) -> None:
    guide, (args, kwargs) = built(entry.name, kind), entry.test_batch()
    for objective in (
        SGVB(gradient="stl", data_plate=entry.data_plate),
        IWELBO(3, data_plate=entry.data_plate),
        IWELBO(3, gradient="dreg", data_plate=entry.data_plate),
    ):
        guide.zero_grad()
        is_looped = entry.name in LOOPED and isinstance(objective, IWELBO)
        with pytest.warns(ParticleWarning) if is_looped else nullcontext():
            objective.differentiable_loss(entry.model, guide, *args, **kwargs).backward()
        bad = [name for name, item in guide.named_parameters() if item.grad is None or not item.grad.isfinite().all()]
        assert bad == [], objective


@every_pair(name for name in REGISTRY if name not in LOOPED)
def test_particles_are_run_at_once_and_give_the_numbers_of_single_runs(entry: ModelClass, kind: str) -> None:
    guide, (args, kwargs) = built(entry.name, kind), entry.test_batch()
    program = ImportanceProgram(entry.model, guide, args, kwargs, data_plate=entry.data_plate)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AEVBWarning)
        axes = program.axes(2, 3)
    assert axes.is_vectorized
    terms = program.draw_terms(args, kwargs, 2, 3)
    values = {item.name: item.value[1, 2] if item.is_local else item.value[1, 0] for item in terms.latents}
    alone = log_q(guide, (args, kwargs), values)
    for latent in terms.latents:
        weighed = latent.log_q[1, 2] if latent.is_local else latent.log_q[1]
        torch.testing.assert_close(weighed, by_row(guide, latent.name, alone), rtol=1e-3, atol=1e-3)


def by_row(guide: AmortizedGuide, name: str, log_prob: dict[str, Tensor]) -> Tensor:
    """Sum a site over its inner plates, ``[rows]``; over all of its plates if it is global."""
    structure = guide.built.structure
    if name not in structure.sites or not structure.sites[name].is_local:
        return log_prob[name].sum()
    rows_first = log_prob[name].movedim(log_prob[name].dim() + structure.data_dim, 0)
    return rows_first.reshape(len(rows_first), -1).sum(-1)


# Rows.


@every_pair()
def test_a_rows_posterior_depends_on_that_row_alone(entry: ModelClass, kind: str) -> None:
    """By itself, with others, in another order, and in a batch of another size than the guide was built on."""
    guide = built(entry.name, kind)
    rows = 9
    args, kwargs = entry.simulate(rows, seed=5)
    plate = guide.built.structure.data_plate
    values = draw(guide, (args, kwargs))
    whole = log_q(guide, (args, kwargs), values)
    for index in (torch.tensor([4]), torch.tensor([7, 2]), torch.randperm(rows)):
        part = log_q(guide, take_rows(args, kwargs, index), take(guide, values, plate, index))
        assert_same_q(guide, whole, part, plate, index)


@every_pair(name for name, entry in REGISTRY.items() if entry.name != "regression")
def test_a_rows_posterior_depends_on_that_row(entry: ModelClass, kind: str) -> None:
    guide = built(entry.name, kind)
    args, kwargs = entry.simulate(4, seed=6)
    values = draw(guide, (args, kwargs))
    whole = log_q(guide, (args, kwargs), values)
    other = log_q(guide, take_rows(args, kwargs, torch.tensor([0, 2, 2, 0])), values)
    changes = [by_row(guide, site.name, other) - by_row(guide, site.name, whole) for site in local_sites(guide)]
    assert all((change[[0, 2]].abs() < 1e-3).all() for change in changes)
    assert any((change[[1, 3]].abs() > 1e-3).any() for change in changes)


@every_pair(name for name, entry in REGISTRY.items() if len(entry.reference) > 1)
def test_a_latent_is_given_the_latents_that_it_is_wired_to_and_no_others(entry: ModelClass, kind: str) -> None:
    guide, batch = built(entry.name, kind), entry.test_batch()
    values, others = draw(guide, batch), draw(guide, batch)
    whole = log_q(guide, batch, values)
    wiring = {name: {source.name for source in sources} for name, sources in guide.built.wiring.items()}
    for moved in entry.reference:
        part = log_q(guide, batch, values | {moved: others[moved]})
        changed = {name for name in wiring if name != moved and not torch.allclose(part[name], whole[name], atol=1e-5)}
        assert changed == {name for name, sources in wiring.items() if moved in sources and name != moved}, moved


@every_pair(name for name, entry in REGISTRY.items() if name != "regression")
def test_a_latent_is_given_the_observations_that_it_is_wired_to_and_no_others(entry: ModelClass, kind: str) -> None:
    """Each source by itself is read with its rows moved on by one."""
    guide, batch = built(entry.name, kind), entry.test_batch()
    values = draw(guide, batch)
    whole, probe = log_q(guide, batch, values), guide.built.probe
    wiring = {name: {source.name for source in sources} for name, sources in guide.built.wiring.items()}
    read = probe.read
    for moved in guide.built.sources:

        def read_moved(*args: Any, moved: str = moved) -> Any:
            reading = read(*args)
            value, mask = reading.observations[moved]
            turned = Observation(value.roll(1, 0), None if mask is None else mask.roll(1, 0))
            return replace(reading, observations=reading.observations | {moved: turned})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "read", read_moved)
            part = log_q(guide, batch, values)
        changed = {name for name in wiring if not torch.allclose(part[name], whole[name], rtol=1e-6, atol=1e-6)}
        assert changed == {name for name, sources in wiring.items() if moved in sources}, moved


# Plates whose indices are alike, and missing entries.


def permuted(batch: Batch, axis: int, index: Tensor) -> Batch:
    args, kwargs = batch
    return tuple(item.index_select(axis, index) for item in args), dict(kwargs)


@every_pair(ALIKE)
def test_the_order_in_a_set_does_not_matter(entry: ModelClass, kind: str) -> None:
    guide, batch = built(entry.name, kind), entry.test_batch()
    values = draw(guide, batch)
    whole = log_q(guide, batch, values)
    inner = {frame.name for frame in guide.built.probe.layout.inner}
    assert inner == set(ALIKE[entry.name])
    assert not inner & guide.built.asymmetric
    for plate, axis in ALIKE[entry.name].items():
        index = torch.arange(batch[0][0].shape[axis]).roll(1).flip(0)
        part = log_q(guide, permuted(batch, axis, index), take(guide, values, plate, index))
        assert_same_q(guide, whole, part, plate, index)


@every_pair(["obs_mask_normal", "nan_coded"])
def test_the_order_matters_where_indices_are_not_alike(entry: ModelClass, kind: str) -> None:
    guide, batch = built(entry.name, kind), entry.test_batch()
    assert guide.built.asymmetric == {"features"}
    values = draw(guide, batch)
    index = torch.arange(batch[0][0].shape[1]).flip(0)
    whole, part = log_q(guide, batch, values), log_q(guide, permuted(batch, 1, index), values)
    assert not torch.allclose(whole["z"], part["z"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("filler", [float("nan"), 1e6, -3.0])
@every_pair(MASKED)
def test_what_stands_at_missing_entries_does_not_matter(entry: ModelClass, kind: str, filler: float) -> None:
    guide = built(entry.name, kind)
    args, kwargs = entry.test_batch()
    names, known = MASKED[entry.name]
    values = draw(guide, (args, kwargs))
    whole = log_q(guide, (args, kwargs), values)
    arguments = dict(zip(entry.model.__code__.co_varnames, args, strict=False))
    masks = known(**arguments)
    for name in names:
        arguments[name] = torch.where(masks[name], arguments[name], filler)
    filled = log_q(guide, (tuple(arguments.values()), kwargs), values)
    for name, expected in whole.items():
        torch.testing.assert_close(filled[name], expected, rtol=0, atol=0)


@every_pair(["ragged_series", "label_and_style", "dose_and_effect"])
def test_values_of_latents_that_are_masked_do_not_matter(entry: ModelClass, kind: str) -> None:
    guide, batch = built(entry.name, kind), entry.test_batch()
    values, others = draw(guide, batch), draw(guide, batch)
    masks = {name: node["mask"] for name, node in sample_nodes(guide, batch).items() if node["mask"] is not None}
    assert masks
    moved = values | {name: torch.where(mask, values[name], others[name]) for name, mask in masks.items()}
    assert any(not torch.equal(moved[name], values[name]) for name in masks)
    whole, part = log_q(guide, batch, values), log_q(guide, batch, moved)
    assert all(torch.equal(part[name], whole[name]) for name in whole)


@every_pair(["ragged_groups", "globals_ragged"])
def test_padding_does_not_matter(entry: ModelClass, kind: str) -> None:
    guide = built(entry.name, kind)
    (x, present), kwargs = entry.test_batch()
    values = draw(guide, ((x, present), kwargs))
    longer = torch.cat([x, torch.full_like(x, torch.nan)], 1), torch.cat([present, torch.zeros_like(present)], 1)
    whole, padded = log_q(guide, ((x, present), kwargs), values), log_q(guide, (longer, kwargs), values)
    for name, expected in whole.items():
        torch.testing.assert_close(padded[name], expected, rtol=1e-3, atol=1e-3)


# Building.


def count_runs(model: Any) -> tuple[Any, list[int]]:
    """Return a model that counts its runs."""
    runs = [0]

    @wraps(model)
    def counted(*args: Any, **kwargs: Any) -> Any:
        runs[0] += 1
        return model(*args, **kwargs)

    return counted, runs


@every()
def test_building_takes_at_most_five_runs(entry: ModelClass) -> None:
    args, kwargs = entry.test_batch()
    model, runs = count_runs(entry.model)
    AutoAmortizedNormal(model, data_plate=entry.data_plate).build(*args, **kwargs)
    assert runs[0] <= 5


@every()
def test_reading_a_model_leaves_generators_and_parameters_alone(entry: ModelClass) -> None:
    args, kwargs = entry.test_batch()
    offset = pyro.param("mine", torch.tensor(1.0))
    before = torch.get_rng_state()
    read_model(entry.model, entry.data_plate, args, kwargs)
    assert torch.equal(torch.get_rng_state(), before)
    assert dict(pyro.get_param_store().items()) == {"mine": offset}


def test_building_leaves_buffers_and_mode_alone() -> None:
    norm = nn.BatchNorm1d(3)

    def model(x: Tensor) -> None:
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", pyro.distributions.Normal(norm(z), 1.0).to_event(1), obs=x)

    before = {name: item.clone() for name, item in norm.state_dict().items()}
    guide = AutoAmortizedNormal(model).build(torch.randn(8, 3))
    assert all(torch.equal(item, before[name]) for name, item in norm.state_dict().items())
    assert norm.training
    guide(torch.randn(5, 3))
    assert all(torch.equal(item, before[name]) for name, item in norm.state_dict().items())


@every()
def test_reading_arguments_and_running_the_model_say_the_same(entry: ModelClass) -> None:
    """Bit for bit: on the batch that the guide was built on, on one row, and on rows never seen."""
    direct, by_run = (built(entry.name, "normal", reads_by_run=flag) for flag in (False, True))
    assert all(torch.equal(*pair) for pair in zip(direct.parameters(), by_run.parameters(), strict=True))
    rows = entry.simulate(9, seed=3)
    for args, kwargs in (entry.test_batch(), take_rows(*rows, slice(1)), rows, take_rows(*rows, slice(4, 7))):
        values = draw(direct, (args, kwargs))
        first, second = (log_q(guide, (args, kwargs), values) for guide in (direct, by_run))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_most_classes_are_read_without_a_run_of_the_model() -> None:
    """Those whose observations are masked, coded, or computed are read by a run, the others are not."""
    by_run = {name for name, entry in REGISTRY.items() if built(name, "normal").built.probe._doors is None}
    assert by_run == {*MASKED, "nan_coded"}


# Recording.

RECORDED = {
    ("collider", "normal"),
    ("nested_counts", "multivariate_normal"),
    ("obs_mask_counts", "normal"),
    ("vector_poisson", "flow"),
}


def recorded_pairs() -> list[Any]:
    """Pair entries that take their batch by position with guides; all but a few are slow."""
    return [
        pytest.param(entry, kind, id=f"{name}-{kind}", marks=() if (name, kind) in RECORDED else pytest.mark.slow)
        for name, entry in REGISTRY.items()
        for kind in GUIDES
        if not entry.test_batch()[1]
    ]


@pytest.mark.parametrize(("entry", "kind"), recorded_pairs())
def test_it_is_recorded(entry: ModelClass, kind: str) -> None:
    """The graph's loss and gradients are those of an eager run, or it would warn and run eagerly."""
    args, _ = entry.test_batch()
    guide = GUIDES[kind](entry.model, data_plate=entry.data_plate)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StagingWarning)
        stage(SGVB(data_plate=entry.data_plate), entry.model, guide, *args)
