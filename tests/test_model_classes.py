"""The registry of model classes itself: models run, references are reproduced and hold over simulated rows."""

import pytest
import torch
from model_classes.base import DATA, ModelClass, Moments
from model_classes.oracles import gaussian, quadrature
from model_classes.registry import CLASSES, REGISTRY
from pyro import poutine

from pyro_aevb.program.structure import read_structure
from pyro_aevb.testing import LinearGaussian

every_entry = pytest.mark.parametrize("entry", REGISTRY.values(), ids=REGISTRY.keys())
every_solved_entry = pytest.mark.parametrize(
    "entry", [pytest.param(item, id=name) for name, item in REGISTRY.items() if item.method != "nuts"]
)
every_entry_of_rows = pytest.mark.parametrize(
    "entry", [pytest.param(item, id=name) for name, item in REGISTRY.items() if not item.joint]
)


def solve(entry: ModelClass, args, kwargs) -> dict[str, Moments]:
    return entry.oracle(entry.model, args, kwargs)


def test_every_class_has_an_entry_and_every_file_too() -> None:
    assert {entry.number for entry in REGISTRY.values()} == set(CLASSES)
    assert {path.stem for path in DATA.glob("*.json")} == set(REGISTRY)


@every_entry
def test_the_reference_has_the_shape_of_the_model_on_the_test_rows(entry: ModelClass) -> None:
    args, kwargs = entry.test_batch()
    nodes = poutine.trace(entry.model).get_trace(*args, **kwargs).nodes
    assert len(args[0]) == entry.num_test_rows
    assert {name for name in entry.reference if not nodes[name]["is_observed"]} == set(entry.reference)
    for site, moments in entry.reference.items():
        shape = entry.feature(site, nodes[site]["value"]).shape
        assert moments.mean.shape == moments.sd.shape == shape
        assert moments.mean.isfinite().all()
        assert (moments.sd >= 0).all()
        assert entry.is_compared(site).any()


@every_entry
def test_the_training_batch_is_the_same_at_each_call_and_has_the_form_of_the_test_batch(entry: ModelClass) -> None:
    (first, first_named), (second, second_named), (test, test_named) = entry.batch(), entry.batch(), entry.test_batch()
    assert len(first[0]) == entry.num_rows
    assert first_named.keys() == test_named.keys()
    for left, right, few in zip(
        (*first, *first_named.values()), (*second, *second_named.values()), (*test, *test_named.values()), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        assert few.dtype == left.dtype
        assert few.shape[1:] == left.shape[1:]
        assert left.dtype != torch.float64


@every_entry
def test_the_package_reads_its_latents(entry: ModelClass) -> None:
    args, kwargs = entry.test_batch()
    structure = read_structure(entry.model, args, kwargs)
    assert structure.data_plate == entry.data_plate
    assert {site.name for site in structure.select("latent")} == set(entry.reference)
    assert structure.has_globals == any(not site.is_local for site in structure.select("latent"))


@every_solved_entry
def test_the_reference_is_reproduced(entry: ModelClass) -> None:
    args, kwargs = entry.batch() if entry.joint else entry.test_batch()
    for site, solved in solve(entry, args, kwargs).items():
        stored = entry.reference[site]
        rows = tuple(slice(size) for size in stored.mean.shape)
        torch.testing.assert_close(solved.mean[rows].float(), stored.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(solved.sd[rows].float(), stored.sd, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@every_entry_of_rows
def test_what_was_drawn_lies_about_the_posterior_mean_as_its_sd_says(entry: ModelClass) -> None:
    """Over rows from the model, (z - E[z|x]) / sd[z|x] has mean 0 and mean square 1, whatever the model."""
    if entry.method == "nuts":
        pytest.skip("too slow for many rows")
    with poutine.trace() as drawn:
        args, kwargs = entry.simulate(150, seed=7)
    for site, moments in solve(entry, args, kwargs).items():
        truth = entry.feature(site, drawn.trace.nodes[site]["value"]).double()
        free = moments.sd > 1e-6  # what is constant, as the corner of a Cholesky factor, has no score
        score = ((truth - moments.mean) / moments.sd)[free]
        independent = 150  # elements of a row are not
        spread = 5 * float((score**2).std()) * (score.numel() / independent) ** 0.5 / score.numel() ** 0.5
        assert abs(float(score.mean())) < 5 / independent**0.5
        assert abs(float((score**2).mean()) - 1) < spread
        assert float((score**2).mean()) > 0.5


# The solvers.


def test_quadrature_and_normal_algebra_agree_with_the_closed_form() -> None:
    model, _ = LinearGaussian.fixture()
    x, _ = model.simulate(3, seed=1)
    exact = model.posterior(x)["z"]
    for solver in (quadrature, gaussian):
        mean, sd = solver(model.model, (x,), {})["z"]
        torch.testing.assert_close(mean, exact.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(sd, exact.variance.sqrt(), rtol=0, atol=1e-6)


def test_quadrature_through_a_bijection_agrees_with_the_closed_form() -> None:
    entry = REGISTRY["simplex"]
    args, kwargs = entry.test_batch()
    by_grid = quadrature(entry.model, args, kwargs)["weights"]
    torch.testing.assert_close(by_grid.mean, solve(entry, args, kwargs)["weights"].mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(by_grid.sd, solve(entry, args, kwargs)["weights"].sd, rtol=0, atol=1e-6)
