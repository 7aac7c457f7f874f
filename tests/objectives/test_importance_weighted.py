"""The importance-weighted bound: below the evidence, tight in K, with weights of each row's own."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Normal

from pyro_aevb.errors import ModelError
from pyro_aevb.objectives.importance_weighted import IWELBO
from pyro_aevb.objectives.sgvb import SGVB
from pyro_aevb.program.importance import ImportanceProgram
from pyro_aevb.testing import EightSchools, NormalNormal

NUM_DATA = 100


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def model(x: Tensor) -> None:
    with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
        pyro.sample("z", dist.Normal(0.3 * x, 0.9))


def quadrature_bound(x: Tensor, importance_samples: int) -> Tensor:
    """Integrate log((w_1 + ... + w_K) / K) over the noise of K = 1 or 2 draws; ``[rows]``."""
    points, weights = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(40))
    weights = weights / weights.sum()
    z = 0.3 * x[:, None] + 0.9 * points
    log_w = Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x[:, None])
    log_w = log_w - Normal(0.3 * x[:, None], 0.9).log_prob(z)
    if importance_samples == 1:
        return log_w @ weights
    pairs = torch.logaddexp(log_w[:, :, None], log_w[:, None, :]) - math.log(2)
    return torch.einsum("nij,i,j->n", pairs, weights, weights)


@pytest.mark.parametrize("importance_samples", [1, 2])
def test_bound_per_row_is_the_integral_over_its_draws(importance_samples: int) -> None:
    x = torch.tensor([0.5, -2.0, 3.0])
    draws = torch.stack([IWELBO(importance_samples, 2000).bounds(model, guide, x).local for _ in range(25)])
    errors = (draws.mean(0) - quadrature_bound(x, importance_samples)).abs() / (draws.std(0) / 5)
    assert errors.max() < 5


def test_bound_under_subsampling_stays_below_the_evidence_and_agrees_with_the_whole() -> None:
    torch.manual_seed(1)
    x = torch.randn(NUM_DATA) * math.sqrt(2)
    exact = Normal(0.0, math.sqrt(2)).log_prob(x)
    whole = IWELBO(2000).bounds(model, guide, x)
    parts = [IWELBO(2000).bounds(model, guide, part) for part in x.split(10)]
    for part, rows in zip(parts, exact.split(10), strict=True):
        assert part.scale == 10.0
        assert abs(part.total - 10 * rows.sum()) < 1.5
        assert (part.local - rows).max() < 0.1
    total = sum(part.total for part in parts) / 10
    # one row's log-mean-exp has a standard deviation below .6 / sqrt(2000)
    error = 0.6 / 2000**0.5 * NUM_DATA**0.5
    assert abs(total - exact.sum()) < 5 * error
    assert abs(whole.total - total) < 5 * error * 2**0.5


def test_bound_rises_with_importance_samples_to_the_evidence() -> None:
    x = torch.tensor([0.5, -2.0, 3.0])
    means = [IWELBO(k, 20_000 // k).bounds(model, guide, x).local.sum().item() for k in (1, 5, 50, 5000)]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(Normal(0.0, math.sqrt(2)).log_prob(x).sum().item(), abs=0.05)


# Globals


def inexact_guide(x: Tensor, data: Tensor) -> None:
    """The exact q(g) and a wrong q(z | x, g)."""
    exact = NormalNormal().posterior(data)["g"]
    g = pyro.sample("g", dist.Normal(exact.mean, exact.stddev))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * (g + x), 0.6))


def test_rows_keep_their_own_weights_under_a_global() -> None:
    """With the exact q(g) the bound rises to the joint evidence, which joint weights of all rows would not reach."""
    normal = NormalNormal()
    x = normal.simulate(100, seed=1)[0]

    def each(x: Tensor) -> None:
        inexact_guide(x, x)

    exact = normal.log_marginal(x)
    totals = torch.stack([IWELBO(50, 20).bounds(normal.model, each, x).total for _ in range(20)])
    error = totals.std() / len(totals) ** 0.5
    assert exact - 0.6 < totals.mean() < exact + 4 * error
    elbo = SGVB(200).bounds(normal.model, each, x).total
    assert elbo < exact - 5


def test_the_bound_under_a_global_is_the_mean_over_it_of_the_rows_bounds() -> None:
    """Given g the rows' K = 2 bound is a Gauss-Hermite integral; so is the mean over g."""
    normal, x = NormalNormal(), torch.tensor([1.2, -0.4])
    points, weights = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(30))
    weights = weights / weights.sum()
    q = normal.posterior(x)["g"]
    g = (q.mean + q.stddev * points)[:, None, None]
    z = 0.5 * (g + x[:, None]) + 0.6 * points
    log_w = Normal(g, normal.local_scale).log_prob(z) + Normal(z, normal.noise_scale).log_prob(x[:, None])
    log_w = log_w - Normal(0.5 * (g + x[:, None]), 0.6).log_prob(z)
    pairs = torch.logaddexp(log_w[..., :, None], log_w[..., None, :]) - math.log(2)
    rows = weights @ torch.einsum("gnij,i,j->gn", pairs, weights, weights)
    log_w_g = weights @ (Normal(0.0, normal.global_scale).log_prob(g) - q.log_prob(g))[:, 0, 0]

    draws = [IWELBO(2, 2000).bounds(normal.model, lambda x: inexact_guide(x, x), x) for _ in range(25)]
    local, global_ = torch.stack([b.local for b in draws]), torch.stack([b.global_ for b in draws])
    assert ((local.mean(0) - rows).abs() / (local.std(0) / 5)).max() < 5
    assert abs(global_.mean() - log_w_g) / (global_.std() / 5) < 5


def test_importance_samples_share_the_globals_of_their_particle() -> None:
    normal, x = NormalNormal.fixture()
    terms = ImportanceProgram(normal.model, normal.guide, (x,), {}).draw_terms((x,), {}, 3, 4)
    assert terms.values["g"].squeeze().shape == (3,)
    assert terms.values["z"].shape == (3, 4, 8)


def test_a_global_observation_that_depends_on_rows_has_no_weight_in_the_bound() -> None:
    def tied(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("total", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x.sum())

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ModelError, match=r"'total' lies outside the data plate.*SGVB"):
        IWELBO(3).bounds(tied, prior, torch.ones(4))
    assert torch.isfinite(IWELBO(3, data_plate=None).bounds(tied, prior, torch.ones(4)).total)


def test_a_global_observation_and_a_factor_count_once_and_unscaled() -> None:
    def with_extras(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("y", dist.Normal(g, 0.5), obs=torch.tensor(0.3))
        pyro.factor("penalty", -(g**2))
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)

    def point(x: Tensor) -> None:
        pyro.sample("g", dist.Normal(torch.tensor(0.4), 1e-6))

    x = torch.tensor([0.5, -2.0])
    bounds = IWELBO(3, 2).bounds(with_extras, point, x)
    g = torch.tensor(0.4)
    q = Normal(g, 1e-6)
    kl = torch.distributions.kl_divergence(q, Normal(0.0, 1.0))
    expected = Normal(g, 0.5).log_prob(torch.tensor(0.3)) - g**2 - kl
    assert bounds.global_.item() == pytest.approx(expected.item(), abs=5)  # log q of a draw varies by about 1
    torch.testing.assert_close(bounds.local, Normal(g, 1.0).log_prob(x), atol=1e-4, rtol=0)
    assert bounds.scale == NUM_DATA / 2


# Particles against a loop of single runs


def plain(x: Tensor) -> None:
    g = pyro.sample("g", dist.Gamma(torch.tensor(2.0), 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 20, subsample_size=len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(w[..., 0], g))
        v = pyro.sample("v", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("inner", x.shape[1], dim=-1):
            u = pyro.sample("u", dist.Gamma(g, 1.0))
            pyro.sample("x", dist.Normal(z + u * v[..., 0] + w[..., 1], 0.7), obs=x)


def plain_guide(x: Tensor) -> None:
    g = pyro.sample("g", dist.Gamma(torch.tensor(3.0), 1.5))
    pyro.sample("w", dist.Normal(torch.tensor([0.1, -0.2]), 0.4).to_event(1))
    with pyro.plate("data", 20, subsample_size=len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.3 * x.sum(-1, keepdim=True), g))
        pyro.sample("v", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        with pyro.plate("inner", x.shape[1], dim=-1):
            pyro.sample("u", dist.Gamma(1 + z.exp(), 1.2))


def single_run(x: Tensor, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weigh one draw by Pyro's own traces: log w of each row, and log w_g."""
    local, global_ = torch.zeros(len(x), dtype=x.dtype), torch.zeros((), dtype=x.dtype)
    for program, sign in ((plain, 1), (plain_guide, -1)):
        trace = poutine.trace(poutine.condition(program, values)).get_trace(x)
        trace.compute_log_prob()
        for name in ("g", "w", "z", "v", "u", "x"):
            if name not in trace.nodes:
                continue
            log_prob = trace.nodes[name]["unscaled_log_prob"]
            if name in ("g", "w"):
                global_ = global_ + sign * log_prob
            else:
                local = local + sign * log_prob.sum(-1)
    return local, global_


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("particles", "samples"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_particles_are_single_runs(particles: int, samples: int, dtype: torch.dtype, tolerance: float) -> None:
    """To 1e-5 relative in float32, whose log-weights of magnitude 10 carry 1e-6 of rounding, and 1e-10 in float64."""
    torch.set_default_dtype(dtype)
    x = torch.tensor([[0.5, 1.0], [-0.3, 0.2], [0.1, 0.4]])
    program = ImportanceProgram(plain, plain_guide, (x,), {})
    assert program.axes(particles, samples).is_vectorized
    terms = program.draw_terms((x,), {}, particles, samples)
    weights = terms.log_weights()
    assert weights.local.shape == (particles, samples, 3)
    assert weights.scale == pytest.approx(20 / 3)
    shapes = {"g": (), "w": (2,), "z": (3, 1), "v": (3, 1, 3), "u": (3, 2)}
    values = terms.values
    if particles * samples > 1:
        extents = {name: (particles, 1 if name in "gw" else samples) for name in shapes}
        values = {name: values[name].reshape(*extents[name], *shape) for name, shape in shapes.items()}
    for s in range(particles):
        for k in range(samples):
            given = {
                name: value if particles * samples == 1 else value[s, 0 if name in "gw" else k]
                for name, value in values.items()
            }
            local, global_ = single_run(x, given)
            torch.testing.assert_close(weights.local[s, k], local, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(weights.global_[s], global_, rtol=tolerance, atol=tolerance)


# No data plate


def test_without_a_data_plate_the_whole_model_is_one_row() -> None:
    """Eight schools: the joint bound lies below the joint evidence of -31.3113 and rises to it."""
    schools, y = EightSchools.fixture()
    exact = schools.log_marginal(y).item()
    assert exact == pytest.approx(-31.3113474, abs=1e-6)

    def decent(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(torch.tensor(4.4), 3.4))
        pyro.sample("tau", dist.LogNormal(torch.tensor(0.9), 1.2))
        with pyro.plate("schools", 8):
            pyro.sample("theta_trans", dist.Normal(torch.zeros(()), 1.0))

    bounds = SGVB(2000, data_plate=None).bounds(schools.model, decent, y)
    assert bounds.local.shape == (1,)
    assert bounds.global_.item() == 0.0
    assert exact - 4 < bounds.total.item() < exact
    many = torch.stack([IWELBO(2000, data_plate=None).bounds(schools.model, decent, y).total for _ in range(25)])
    error = many.std() / 5
    assert exact - 0.05 - 4 * error < many.mean() < exact + 4 * error
