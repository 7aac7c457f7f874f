"""Which plates are sets and which are vectors; that vectors reach their posterior and sets stay sets."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from model_classes.oracles import gaussian
from pyro import poutine

from pyro_aevb import SGVB, AutoAmortizedMultivariateNormal, AutoAmortizedNormal
from pyro_aevb.errors import ModelError

WEIGHTS = torch.tensor([1.0, -2.0, 0.3])
SCALES = torch.tensor([0.3, 0.6, 2.0])
ROWS = 8


def plated(fn, *, latent=None, covariate=False):
    """Return a model with three inner indices, whose observations have the distribution that ``fn`` gives."""

    def model(x, c=None):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", x.shape[1], dim=-1):
                w = z if latent is None else pyro.sample("w", latent(z))
                pyro.sample("x", fn(w, c) if covariate else fn(w), obs=x)

    return model


def asymmetric(model, *batch):
    return AutoAmortizedNormal(model).build(*batch).built.asymmetric


@pytest.mark.parametrize(
    "x",
    [torch.randn(ROWS, 3), torch.ones(ROWS, 3), torch.arange(24.0).reshape(ROWS, 3)],
    ids=["random", "equal", "rising"],
)
def test_data_do_not_tell_a_set_from_a_vector(x):
    assert asymmetric(plated(lambda z: dist.Normal(z, 0.5)), x) == frozenset()
    assert asymmetric(plated(lambda z: dist.Normal(z * WEIGHTS, 0.5)), x) == {"inner"}


def test_any_parameter_may_tell_indices_apart():
    x = torch.randn(ROWS, 3)
    assert asymmetric(plated(lambda z: dist.Normal(z, SCALES)), x) == {"inner"}
    assert asymmetric(plated(lambda w: dist.Normal(w, 0.5), latent=lambda z: dist.Normal(z * WEIGHTS, 1.0)), x) == {
        "inner"
    }
    assert asymmetric(plated(lambda w: dist.Normal(w, 0.5), latent=lambda z: dist.Normal(z, 1.0)), x) == frozenset()


def test_weights_that_are_a_palindrome_are_no_set():
    mirror = torch.tensor([1.0, -2.0, 1.0])
    assert asymmetric(plated(lambda z: dist.Normal(z * mirror, 0.5)), torch.randn(ROWS, 3)) == {"inner"}


def test_covariates_along_a_plate_leave_it_a_set():
    x, c = torch.randn(ROWS, 3), torch.randn(ROWS, 3)
    model = plated(lambda z, c: dist.Normal(z * c, 0.5), covariate=True)
    guide = AutoAmortizedNormal(model).build(x, c)
    assert guide.built.asymmetric == frozenset()
    values = {"z": torch.randn(ROWS, 1)}
    index = torch.tensor([2, 0, 1])
    for parameter in guide.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    found = [
        poutine.trace(poutine.condition(guide, data=values)).get_trace(*batch).nodes["z"]["fn"].log_prob(values["z"])
        for batch in ((x, c), (x[:, index], c[:, index]), (x[:, index], c))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_missing_entries_do_not_tell_indices_apart():
    def model(x, present):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1), poutine.mask(mask=present):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    assert asymmetric(model, torch.randn(ROWS, 3), torch.rand(ROWS, 3) < 0.5) == frozenset()


def test_globals_of_each_index_tell_indices_apart():
    def model(x):
        inner = pyro.plate("inner", 3, dim=-1)
        with inner:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with inner:
                pyro.sample("x", dist.Normal(z * w, 0.5), obs=x)

    assert asymmetric(model, torch.randn(ROWS, 3)) == {"inner"}


def test_one_plate_of_two_is_a_set():
    def model(x):
        features, replicates = pyro.plate("features", 3, dim=-1), pyro.plate("replicates", 4, dim=-2)
        with pyro.plate("data", len(x), dim=-3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with features:
                f = pyro.sample("f", dist.Normal(z * WEIGHTS, 1.0))
            with replicates:
                r = pyro.sample("r", dist.Normal(z, 1.0))
            with replicates, features:
                pyro.sample("x", dist.Normal(f + r, 0.5), obs=x)

    assert asymmetric(model, torch.randn(ROWS, 4, 3)) == {"features"}


@pytest.mark.parametrize(
    "table", [torch.eye(4), torch.ones(4, 4).tril() + torch.eye(4), torch.eye(4).roll(1, 0)], ids=str
)
def test_bands_of_a_table_of_two_plates_are_seen(table):
    def model(x):
        lines, columns = pyro.plate("lines", 4, dim=-1), pyro.plate("columns", 4, dim=-2)
        with pyro.plate("data", len(x), dim=-3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with lines, columns:
                pyro.sample("x", dist.Normal(z * table, 0.5), obs=x)

    assert asymmetric(model, torch.randn(ROWS, 4, 4)) == {"lines", "columns"}


def test_a_model_that_takes_all_rows_or_none_tells_its_rows_apart():
    """Known standard errors of eight schools that are no argument."""
    errors = torch.arange(1.0, 9.0)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", 8):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, errors), obs=y)

    assert asymmetric(model, torch.randn(8)) == {"data"}


def test_a_structure_that_depends_on_data_is_refused_with_both_structures():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if x[0, 0] > 0:
                z = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(2)).to_event(1), obs=x)

    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    with pytest.raises(
        ModelError, match=r"(?s)depends on the data.*\['w'\].*w \[\] in.*second half, which has.*mask"
    ) as caught:
        AutoAmortizedNormal(model).build(x)
    assert caught.value.site == "w"


# Series.


@pytest.mark.parametrize(
    ("scales", "first", "is_even"),
    [((0.5,) * 5, 1.0, True), ((0.5,) * 5, 1.5, True), ((0.5, 0.5, 0.9, 0.5, 0.5), 1.0, False)],
    ids=["even", "another start", "uneven"],
)
def test_steps_that_are_not_alike_are_told_apart(scales, first, is_even):
    def model(x):
        with pyro.plate("data", len(x)):
            prior = dist.Normal(0.0, first)
            for t in range(5):
                z = pyro.sample(f"z_{t}", prior)
                pyro.sample(f"x_{t}", dist.Normal(z, 0.3), obs=x[:, t])
                prior = dist.Normal(0.9 * z, scales[t])

    built = AutoAmortizedNormal(model).build(torch.randn(ROWS, 5)).built
    assert len(built.units) == 1
    assert built.uneven == (frozenset() if is_even else frozenset({0}))


def test_a_diffuse_start_leaves_the_other_steps_a_series():
    def model(x):
        with pyro.plate("data", len(x)):
            prior = dist.Normal(0.0, 10.0)
            for t in range(5):
                z = pyro.sample(f"z_{t}", prior)
                pyro.sample(f"x_{t}", dist.Normal(z, 0.3), obs=x[:, t])
                prior = dist.Normal(0.9 * z, 0.5)

    units = AutoAmortizedNormal(model).build(torch.randn(ROWS, 5)).built.units
    assert [len(unit.latents) for unit in units] == [1, 4]


def test_observations_that_are_not_alike_make_steps_uneven():
    def model(x):
        with pyro.plate("data", len(x)):
            for t in range(4):
                z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 0.1 + t), obs=x[:, t])

    assert AutoAmortizedNormal(model).build(torch.randn(ROWS, 4)).built.uneven == frozenset({0})


# What it is for.


def reach(model, x, *, num_steps, kind=AutoAmortizedMultivariateNormal):
    """Train on a linear-Gaussian model and return the largest error of a posterior mean of eight rows, in posterior sds."""
    torch.manual_seed(0)
    guide = kind(model).build(x)
    module = SGVB()(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        module(x[torch.randint(len(x), (100,))]).backward()
        optimizer.step()
        schedule.step()
    exact = gaussian(model, (x[:8],), {})
    with torch.no_grad(), pyro.plate("draws", 4000, dim=-3):
        values = guide(x[:8])
    return {name: (((values[name].mean(0) - mean).abs() / sd).max().item()) for name, (mean, sd) in exact.items()}


@pytest.mark.slow
def test_a_plate_of_indices_with_their_own_weights_reaches_the_posterior():
    """A set encoder can't: the posterior mean of z is a weighted sum. Errors of 4,000 draws' means are .016 sd each."""
    latent = lambda z: dist.Normal(z * WEIGHTS, 0.5)  # noqa: E731
    model = plated(lambda w: dist.Normal(w, SCALES), latent=latent)
    z = torch.randn(1000, 1)
    x = latent(z).sample() + SCALES * torch.randn(1000, 3)
    errors = reach(model, x, num_steps=600)
    assert errors["z"] < 0.3
    assert errors["w"] < 0.3


@pytest.mark.slow
def test_uneven_steps_reach_the_posterior():
    scales = (0.1, 1.5, 0.1)

    def model(x):
        with pyro.plate("data", len(x)):
            for t in range(3):
                z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, scales[t]), obs=x[:, t])

    x = torch.randn(1000, 3) + torch.tensor(scales) * torch.randn(1000, 3)
    assert max(reach(model, x, num_steps=600).values()) < 0.3
