"""Rows simulated from a model: their latents, their data and their densities belong together."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_aevb.errors import ModelError, SettingError
from pyro_aevb.program.rows import inferring
from pyro_aevb.program.simulated import SimulatedRows, Simulator
from pyro_aevb.testing import GammaPoisson, LinearGaussian, NormalNormal


def simulate(model, guide, template: Tensor, count: int, **settings) -> list[SimulatedRows]:
    with inferring(0, model, *([] if guide is None else [guide])):
        return list(Simulator(model, guide, ((template,), {}), **settings).draw(count))


def test_latents_and_data_are_drawn_together():
    exact, template = LinearGaussian.fixture()
    kept = []

    def to_batch(values, args, kwargs):
        kept.append(values)
        return (values["x"],), {}

    (rows,) = simulate(exact.model, exact.guide, template, 500, to_batch=to_batch)
    z, x = kept[0]["z"], kept[0]["x"]
    assert torch.equal(rows.latents, z)
    noise = x - z @ exact.weight.T - exact.bias
    assert noise.std().item() == pytest.approx(0.5, abs=4 * 0.5 / (2 * 3000) ** 0.5)
    # an exact guide: log p(x, z) - log q(z | x) is log p(x) of the data that were fed back
    log_q, log_p = rows.guide.path(rows.latents[None])
    torch.testing.assert_close((log_p - log_q)[0], exact.log_marginal(x))
    assert rows.is_counted.all()


def test_latents_are_unconstrained():
    exact, template = GammaPoisson.fixture()
    (rows,) = simulate(exact.model, None, template, 2000)
    assert rows.guide is None
    rate = rows.density.constrain(rows.latents)["rate"]
    assert torch.allclose(rows.latents[:, 0].exp(), rate)
    assert rate.mean().item() == pytest.approx(2 / 1.5, abs=4 * (2**0.5 / 1.5) / 2000**0.5)


def test_globals_are_drawn_once_from_the_guide_or_given():
    exact, template = NormalNormal.fixture()
    with inferring(0, exact.model, exact.guide):
        drawn = Simulator(exact.model, exact.guide, ((template,), {})).given["g"]
        given = Simulator(exact.model, exact.guide, ((template,), {}), given={"g": torch.tensor(9.0).double()}).given
    center = exact.posterior(template)["g"]
    assert abs(drawn - center.mean) < 5 * center.stddev
    assert given["g"] == 9.0
    with pytest.raises(ModelError, match="'g'"):
        simulate(exact.model, None, template, 3)
    with pytest.raises(SettingError, match="leading axes"):
        simulate(exact.model, None, template, 3, given={"g": torch.zeros(4).double()})


def masked(x: Tensor) -> None:
    """Count the first row, and the first entry of a masked event."""
    count = len(x)
    with pyro.plate("data", count):
        with pyro.poutine.mask(mask=torch.arange(count) < 1):
            pyro.sample("simplex", dist.Dirichlet(torch.ones(count, 3)))
        entries = dist.Normal(torch.zeros(count, 2), 1.0).mask(torch.tensor([True, False])).to_event(1)
        z = pyro.sample("z", entries)
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def test_masks_are_laid_out_as_unconstrained_coordinates():
    (rows,) = simulate(masked, None, torch.zeros(2), 2)
    # a simplex of three has two coordinates
    assert rows.is_counted.tolist() == [[True, True, True, False], [False, False, True, False]]


def test_models_that_draw_their_own_rows_are_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    with pytest.raises(ModelError, match="subsample_size"):
        simulate(model, None, torch.zeros(5), 3)
    exact, template = LinearGaussian.fixture()
    with pytest.raises(SettingError, match="none"):
        simulate(exact.model, None, template[:0], 3)
