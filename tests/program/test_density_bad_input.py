"""What a density of rows refuses, and what the message says."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_aevb.errors import DataError, ModelError, SettingError
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.rows import inferring
from pyro_aevb.testing import EightSchools, NormalNormal

X = torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7, -0.2])


def one_latent(x, observe):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z)


def plain(x):
    one_latent(x, lambda z: pyro.sample("x", dist.Normal(z, 1.0), obs=x))


def by_neighbours(x):
    one_latent(x, lambda z: pyro.sample("x", dist.Normal(z + z.roll(1, -1), 1.0), obs=x))


def by_later_rows(x):
    one_latent(x, lambda z: pyro.sample("x", dist.Normal(z.flip(-1).cumsum(-1).flip(-1), 1.0), obs=x))


def by_earlier_rows(x):
    one_latent(x, lambda z: pyro.sample("x", dist.Normal(z.cumsum(-1), 1.0), obs=x))


def by_mean_of_latents(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(z.mean(-1, keepdim=True), 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def by_moving_support(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        w = pyro.sample("w", dist.Uniform(0.0, z.sum(-1, keepdim=True)))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "site"),
    [
        (by_neighbours, "x"),
        (by_later_rows, "x"),
        (by_earlier_rows, "x"),
        (by_mean_of_latents, "w"),
        (by_moving_support, "w"),
    ],
)
def test_rows_that_are_not_independent(model, site):
    with pytest.raises(ModelError, match=rf"Rows are not independent: .* site '{site}'.*data_plate=None") as caught:
        LogDensity(model, X)
    assert caught.value.site == site
    assert LogDensity(model, X, data_plate=None).num_rows == 1


def test_rows_computed_from_their_batch():
    def model(x):
        one_latent(x, lambda z: pyro.sample("x", dist.Normal(z + x.mean(0), 1.0), obs=x))

    with pytest.raises(
        ModelError, match=r"Site 'x' has other log densities for the first 2 rows alone .* of 4.*partial"
    ):
        LogDensity(model, X)

    def mended(x, mean):
        one_latent(x, lambda z: pyro.sample("x", dist.Normal(z + mean, 1.0), obs=x))

    assert LogDensity(partial(mended, mean=X.mean()), X).log_joint(torch.zeros(6, 1)).isfinite().all()


def test_a_site_outside_the_plate_that_hangs_on_rows():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("total", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ModelError, match="'total' lies outside the data plate but depends on latents inside it"):
        LogDensity(model, X)


def test_a_model_with_noise_of_its_own():
    def model(x):
        one_latent(x, lambda z: pyro.sample("x", dist.Normal(z + torch.randn(len(x)), 1.0), obs=x))

    with pytest.raises(ModelError, match="Site 'x' has another log density in a second run with the same latents"):
        LogDensity(model, X)


@pytest.mark.parametrize("where", ["latent", "observed"])
def test_scales(where):
    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.5 if where == "latent" else 1.0):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=2.0 if where == "observed" else 1.0):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ModelError, match=f"Site '{'z' if where == 'latent' else 'x'}' has a scale"):
        LogDensity(model, X)


def test_the_data_plate_s_own_scale_is_taken_out():
    def model(x):
        with pyro.plate("data", 60_000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    u = torch.randn(3, 6, 1)
    assert torch.equal(LogDensity(model, X).log_joint(u), LogDensity(plain, X).log_joint(u))


def test_subsampled_inner_plates():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 4, subsample_size=2, dim=-1) as index:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, index])

    with pytest.raises(ModelError, match="Site 'x' has a scale"):
        LogDensity(model, torch.zeros(6, 4))


def test_discrete_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ModelError, match="'z' is discrete"):
        LogDensity(model, X)


def test_directions_on_a_sphere():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ProjectedNormal(torch.ones(3)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    with pytest.raises(ModelError, match=r"'z' \(ProjectedNormal\) is a direction on a sphere.*VonMises"):
        LogDensity(model, X)


def test_globals():
    model, x = NormalNormal.fixture()
    with pytest.raises(ModelError, match=r"Latents \['g'\] lie outside the data plate 'data'.*given=\{'g': \.\.\.\}"):
        LogDensity(model.model, x)
    with pytest.raises(SettingError, match=r"\['h'\], which are not globals of the model; its globals are \['g'\]"):
        LogDensity(model.model, x, given={"g": torch.tensor(0.0), "h": torch.tensor(0.0)})
    with pytest.raises(SettingError, match="are not globals"):
        LogDensity(model.model, x, given={"z": torch.zeros(8)})
    schools, y = EightSchools.fixture()
    with pytest.raises(SettingError, match=r"its globals are \[\]"):
        LogDensity(schools.model, y, data_plate=None, given={"mu": torch.tensor(0.0)})
    density = LogDensity(model.model, x, given={"g": torch.zeros(3)})
    with pytest.raises(SettingError, match=r"u must have shape \[3, \.\.\., rows = 8, D = 1\], got \[2, 8, 1\]"):
        density.log_joint(torch.zeros(2, 8, 1))
    with pytest.raises(ModelError, match="lie outside"):
        density.given({})


def test_values_of_globals_of_a_wrong_shape():
    def model(x):
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        one_latent(x, lambda z: pyro.sample("x", dist.Normal(z * weights[..., :1] + weights[..., 1:], scale), obs=x))

    with pytest.raises(SettingError, match=r"given\['weights'\] must have shape \[\.\.\., \[2\]\], got \[3\]"):
        LogDensity(model, X, given={"weights": torch.zeros(3), "scale": torch.ones(())})
    with pytest.raises(SettingError, match="the same leading axes"):
        LogDensity(model, X, given={"weights": torch.zeros(3, 2), "scale": torch.ones(2)})


def test_shapes_of_u_and_of_values():
    density = LogDensity(plain, X)
    for u in (torch.zeros(5, 1), torch.zeros(6, 2)):
        with pytest.raises(SettingError, match=r"u must have shape \[\.\.\., rows = 6, D = 1\]"):
            density.log_joint(u)
    with pytest.raises(SettingError, match=r"sites \['z'\], got \['x'\]"):
        density.unconstrain({"x": X})
    with pytest.raises(SettingError, match="site 'z' must have shape"):
        density.unconstrain({"z": torch.zeros(5)})
    with pytest.raises(SettingError, match="num_draws must be an integer of at least 1, got 0"):
        density.draw_prior(0)


def test_settings():
    with pytest.raises(SettingError, match=r"There is no setting 'dataplate'\. Did you mean 'data_plate'"):
        LogDensity(plain, X, dataplate="rows")
    with pytest.raises(ModelError, match="no plate 'rows'"):
        LogDensity(plain, X, data_plate="rows")


def test_no_rows_and_unequal_rows():
    with pytest.raises(DataError, match="no rows"):
        LogDensity(plain, X[:0])
    with pytest.raises(DataError, match="as many of them"):
        LogDensity(lambda x, y: plain(x), X, X[:3])


def test_a_plate_that_is_not_the_batch_s():
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.mean().expand(3))

    with pytest.raises(ModelError, match="plate 'data' has 3 indices in a run on 2 rows"):
        LogDensity(model, X)


# Data


def test_nan_in_the_data():
    x = X.clone()
    x[4] = torch.nan
    with pytest.raises(DataError, match="argument 0, row 4"):
        LogDensity(plain, x)

    def masked(x):
        one_latent(x, lambda z: pyro.sample("x", dist.Normal(z, 1.0).mask(~x.isnan()), obs=x))

    likelihood = LogDensity(masked, x).log_likelihood(torch.zeros(6, 1))
    assert likelihood[4] == 0
    assert likelihood.isfinite().all()


def observing(likelihood):
    def model(x, *more):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood(z, *more), obs=x)

    return model


@pytest.mark.parametrize("context", [inferring, None])
def test_data_outside_the_support_of_the_likelihood(context):
    counts = torch.ones(2010)
    counts[[1203, 1500, 2009]] = torch.tensor([2.5, -1.0, 0.3])
    with context(0) if context else torch.no_grad():
        with pytest.raises(DataError, match=r"site 'x' lie outside .* in rows \[1203, 1500\]: .* is 2.5") as caught:
            LogDensity(observing(lambda z: dist.Poisson(z.exp())), counts)
        assert caught.value.site == "x"
        grey = torch.full((9,), 0.5)
        with pytest.raises(DataError, match=r"in 9 rows, \[0, 1, 2, 3, 4\] first: .* 0\.5\. .* validate_args=False"):
            LogDensity(observing(lambda z: dist.Bernoulli(logits=z)), grey)
        with pytest.raises(DataError, match=r"in rows \[0, 1\]"):
            LogDensity(observing(lambda z: dist.Dirichlet(z.exp()[..., None].expand(*z.shape, 3))), torch.ones(2, 3))


def test_grey_levels_under_a_bernoulli_that_does_not_check():
    for wrapped in (False, True):

        def likelihood(z, wrapped=wrapped):
            fn = dist.Bernoulli(logits=z[..., None].expand(*z.shape, 4), validate_args=False).to_event(1)
            return fn.mask(torch.tensor(True)) if wrapped else fn

        grey = torch.linspace(0, 1, 24).reshape(6, 4)
        found = LogDensity(observing(likelihood), grey).log_likelihood(torch.zeros(6, 1))
        torch.testing.assert_close(found, torch.full((6,), 4 * torch.tensor(0.5).log().item()))


def test_masked_data_may_be_anything():
    seen = torch.tensor([True, False, True])

    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x, obs_mask=seen)

    assert LogDensity(model, torch.tensor([1.0, -7.5, 2.0]), seen).log_joint(torch.zeros(3, 1)).isfinite().all()
    with pytest.raises(DataError, match=r"in rows \[0\]"):
        LogDensity(model, torch.tensor([1.5, -7.5, 2.0]), seen)


def test_data_beyond_an_end_that_a_latent_sets_have_density_0():
    def model(x):
        with pyro.plate("data", len(x)):
            end = pyro.sample("end", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Uniform(torch.zeros(()), end), obs=x)

    density = LogDensity(model, torch.tensor([0.5, 30.0]))
    found = density.log_likelihood(torch.tensor([[0.0], [0.0]]))
    assert torch.equal(found, torch.tensor([0.0, -torch.inf]))
    assert torch.equal(density.log_joint(torch.zeros(2, 1))[1], torch.tensor(-torch.inf))


def test_plain_functions():
    with pytest.raises(SettingError, match="dim must be an integer of at least 1, got 0"):
        LogDensity.from_function(torch.sum, torch.sum, 0)
    with pytest.raises(SettingError, match="rows must be an integer of at least 1"):
        LogDensity.from_function(torch.sum, torch.sum, 1, rows=0)
    density = LogDensity.from_function(lambda u: u.sum(-1), lambda u: u.sum(-1), 2, rows=3)
    with pytest.raises(SettingError, match=r"u must have shape \[\.\.\., rows = 3, D = 2\], got \[2, 2\]"):
        density.log_joint(torch.zeros(2, 2))
    with pytest.raises(SettingError, match="draw_prior="):
        density.draw_prior(3)
    with pytest.raises(SettingError, match="no globals"):
        density.given({"g": torch.zeros(())})
    with pytest.raises(SettingError, match="asked for twice"):
        density.rows(torch.tensor([1, 1]))
