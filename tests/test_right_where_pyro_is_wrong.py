"""Numbers that Pyro 1.9.2 gets wrong without an error, beside ours and the exact ones."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, ReweightedWakeSleep, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.distributions import Normal

from pyro_aevb.errors import GuideError
from pyro_aevb.objectives.importance_weighted import IWELBO
from pyro_aevb.objectives.sgvb import SGVB
from pyro_aevb.testing import NormalNormal

Program = Callable[[Tensor], None]


def normal_model(num_data: int) -> Program:
    def model(x: Tensor) -> None:
        with pyro.plate("data", num_data, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def normal_guide(num_data: int, slope: float) -> Program:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", num_data, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.9))

    return guide


def test_importance_weighted_bound_under_subsampling_is_a_bound() -> None:
    """Pyro's RenyiELBO takes num_data / rows into the exponent, and overshoots the evidence."""
    x = torch.randn(100)[:10]
    exact = 10 * Normal(0.0, math.sqrt(2)).log_prob(x).sum().item()
    model, guide = normal_model(100), normal_guide(100, 0.3)
    ours = IWELBO(2000).bounds(model, guide, x).total.item()
    # sd of a row's bound is below .6 / sqrt(2000); times 10 * sqrt(10 rows)
    assert abs(ours - exact) < 4 * 10 * 10**0.5 * 0.6 / 2000**0.5
    assert -RenyiELBO(num_particles=2000).loss(model, guide, x) > exact + 8


def test_rows_keep_their_own_weights_beside_a_global() -> None:
    """Pyro's RenyiELBO weighs all rows jointly as soon as one site lies outside their plate."""
    normal = NormalNormal()
    x = normal.simulate(100, seed=1, dtype=torch.float32)[0]
    q = normal.posterior(x)["g"]

    def guide(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(q.mean, q.stddev))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * (g + x), 0.6))

    exact = normal.log_marginal(x).item()
    ours = IWELBO(50, 50).bounds(normal.model, guide, x).total.item()
    elbo = SGVB(500).bounds(normal.model, guide, x).total.item()
    joint = [
        -RenyiELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1).loss(normal.model, guide, x)
        for _ in range(20)
    ]
    assert abs(ours - exact) < 0.6
    assert elbo < exact - 5
    assert sum(joint) / 20 < exact - 2


def test_rows_keep_their_own_weights_in_a_sum_over_a_batch() -> None:
    """Pyro's ReweightedWakeSleep weighs the batch's sum."""
    x = torch.randn(100)
    model, guide = normal_model(100), normal_guide(100, 0.5)
    exact = Normal(0.0, math.sqrt(2)).log_prob(x).sum().item()
    assert abs(IWELBO(50).bounds(model, guide, x).total.item() - exact) < 1.0
    rws = [ReweightedWakeSleep(num_particles=50).loss(model, guide, x)[0].item() for _ in range(5)]
    assert -sum(rws) / 5 < exact - 1.5


# Points with a Jacobian


def log_normal() -> None:
    pyro.sample("s", dist.LogNormal(1.0, 1.0))


def auto_normal(loc: float, scale: float) -> AutoNormal:
    guide = AutoNormal(log_normal, init_scale=scale, init_loc_fn=init_to_value(values={"s": torch.tensor(loc).exp()}))
    guide()
    return guide


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_loss_of_the_true_posterior_of_a_positive_site_is_zero(kl: Any) -> None:
    """Pyro's TraceMeanField_ELBO drops the Jacobian in a Delta's log_density and says 1, the mean of log s."""
    guide = auto_normal(1.0, 0.9999999)
    assert abs(SGVB(50, kl=kl, data_plate=None).loss(log_normal, guide)) < 1e-4
    theirs = TraceMeanField_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=0)
    assert theirs.loss(log_normal, guide) == pytest.approx(1.0, abs=5 / 2000**0.5)


def test_training_a_positive_site_finds_the_true_posterior() -> None:
    """Pyro's TraceMeanField_ELBO ends at loc 0 instead of 1."""
    guide = auto_normal(0.0, 0.5)
    svi = SVI(log_normal, guide, pyro.optim.Adam({"lr": 0.05}), SGVB(20, gradient="stl", data_plate=None))
    for _ in range(200):
        svi.step()
    assert guide.locs.s.item() == pytest.approx(1.0, abs=0.02)
    assert guide.scales.s.item() == pytest.approx(1.0, abs=0.02)


# Masks


MASK = torch.tensor([True, True, False])


def masked_model() -> None:
    with pyro.plate("a", 3), poutine.mask(mask=MASK):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))


def half_masked_guide() -> None:
    with pyro.plate("a", 3):
        pyro.sample("z", dist.Normal(5.0, 1.0))


def masked_guide() -> None:
    with pyro.plate("a", 3), poutine.mask(mask=MASK):
        pyro.sample("z", dist.Normal(5.0, 1.0))


@pytest.mark.parametrize("plate", ["a", None])
def test_a_mask_counts_on_both_sides_or_is_an_error(plate: str | None) -> None:
    """Loss per kept row: KL 12.5, and E (z^2 + log 2 pi) / 2 = 13.919; Pyro's mean field counts the KL of all three."""
    with pytest.raises(GuideError, match="'z' a different mask"):
        SGVB(data_plate=plate).loss(masked_model, half_masked_guide)
    exact = 2 * (12.5 + 13 + math.log(2 * math.pi) / 2)
    # z^2 / 2 of two rows has a standard deviation of 7.2
    ours = SGVB(5000, data_plate=plate).loss(masked_model, masked_guide)
    assert ours == pytest.approx(exact, abs=4 * 7.2 / 5000**0.5)
    theirs = TraceMeanField_ELBO(num_particles=5000, vectorize_particles=True, max_plate_nesting=1)
    assert theirs.loss(masked_model, half_masked_guide) == pytest.approx(exact + 12.5, abs=4 * 7.2 / 5000**0.5)


# One objective, several models


def test_one_objective_serves_models_of_other_plate_depths() -> None:
    """Pyro's ELBO keeps the plate depth of the first model that it saw, and then collides."""

    def deep(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def deep_guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 0.6))

    shallow_x, deep_x = torch.randn(3), torch.randn(4, 2)
    pairs = [(normal_model(3), normal_guide(3, 0.5), shallow_x), (deep, deep_guide, deep_x)]
    for objective in (SGVB(3), IWELBO(3, 2), IWELBO(3, gradient="dreg"), SGVB(2, gradient="stl")):
        for model, guide, x in (*pairs, *pairs):
            torch.manual_seed(0)
            loss = objective.differentiable_loss(model, guide, x)
            fresh = type(objective)(**objective.settings)
            fresh.read(model, guide, x)
            torch.manual_seed(0)
            torch.testing.assert_close(loss, fresh.differentiable_loss(model, guide, x))
