"""Pyro's NUTS row by row: against exact posteriors, with scales, masks and globals as a row's posterior has them."""

import warnings
from itertools import count
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from pyro_aevb.errors import DataError, ModelError, SettingError, UnreliableWarning
from pyro_aevb.mcmc import nuts
from pyro_aevb.mcmc.convergence import mean_ess
from pyro_aevb.mcmc.draws import PosteriorDraws
from pyro_aevb.mcmc.nuts import check_cost, nuts_posterior
from pyro_aevb.program.density import LogDensity
from pyro_aevb.testing import GammaPoisson, NormalNormal


def draw(*args: Any, **settings: Any) -> PosteriorDraws:
    chosen = {"num_chains": 2, "num_samples": 100, "warmup_steps": 60, "seed": 0, "progress": False, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)  # few draws
        return nuts_posterior(*args, **chosen)


def check(values: Tensor, mean: Tensor, sd: Tensor) -> None:
    """Hold draws ``[chains, draws, ...]`` to means and sds of next to normal posteriors, within 4.5 standard errors."""
    assert ((values.mean((0, 1)) - mean).abs() < 4.5 * sd / mean_ess(values).sqrt()).all()
    scores = ((values - mean) / sd).square()
    assert ((scores.mean((0, 1)) - 1).abs() < 4.5 * scores.std((0, 1)) / mean_ess(scores).sqrt()).all()


def test_moments_are_those_of_the_exact_posterior() -> None:
    exact, _ = GammaPoisson.fixture()
    x, _ = exact.simulate(2, seed=5)
    draws = draw(exact.model, x, num_samples=150)
    (name, posterior) = next(iter(exact.posterior(x).items()))
    values = draws.samples[name]
    assert values.shape == (2, 150, 2)
    # probabilities are uniform if the posterior is right, the Jacobian of the map from the line included
    a, b = posterior.concentration.numpy(), posterior.rate.numpy()
    u = torch.from_numpy(stats.gamma.cdf(values.numpy(), a, scale=1 / b))
    check(u, torch.full((2,), 0.5), torch.full((2,), 12**-0.5))
    density = LogDensity(exact.model, x)
    torch.testing.assert_close(density.constrain(draws.unconstrained)[name], values, rtol=1e-9, atol=0)
    torch.testing.assert_close(density.log_joint(draws.unconstrained), draws.log_joint, rtol=1e-9, atol=1e-9)
    assert draws.seconds > 0
    assert ((draws.acceptance > 0.6) & (draws.acceptance < 1)).all()
    assert (draws.step_size > 0).all()


def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_generators() -> None:
    exact, x = NormalNormal.fixture()
    given = {"g": torch.tensor(1.5, dtype=torch.float64)}
    state = torch.get_rng_state()
    first = draw(exact.model, x[:2], given=given, num_samples=20, warmup_steps=10)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    other = torch.cat((x[:1], x[1:2] + 1))
    second = draw(exact.model, other, given=given, num_samples=20, warmup_steps=10)
    assert torch.equal(first.samples["z"][:, :, 0], second.samples["z"][:, :, 0])
    assert not torch.equal(first.samples["z"][:, :, 1], second.samples["z"][:, :, 1])


def test_a_row_is_conditioned_on_globals_and_has_no_scale() -> None:
    # the plate's scale of 50 would make the posterior seven times too narrow
    def model(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(x.new_tensor(0.0), 1.0))
        with poutine.scale(scale=1.0), pyro.plate("data", 100, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.0, 4.0], dtype=torch.float64)
    given = torch.tensor(2.0, dtype=torch.float64)
    draws = draw(model, x, given={"g": given}, data_plate="data")
    check(draws.samples["z"], (given + x) / 2, torch.full((2,), 0.5**0.5, dtype=torch.float64))


def test_inner_plates_and_events_come_rows_first() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("groups", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x.transpose(0, 1))

    x = torch.arange(12, dtype=torch.float64).reshape(2, 2, 3)  # rows, groups, event
    draws = draw(model, x, num_samples=80, warmup_steps=60)
    assert draws.samples["z"].shape == (2, 80, 2, 2, 3)
    check(draws.samples["z"], 0.8 * x, torch.full_like(x, 0.2**0.5))


def test_masked_latents_keep_their_prior() -> None:
    def model(x: Tensor, known: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=known):
            z = pyro.sample("z", dist.Normal(x.new_tensor(3.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, known = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([True, False])
    draws = draw(model, x, known)
    check(draws.samples["z"], torch.tensor([2.0, 3.0]), torch.tensor([0.5**0.5, 1.0]))


def test_the_unobserved_half_of_a_site_is_no_latent() -> None:
    def model(x: Tensor, known: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(9.0), 3.0))
            pyro.sample("x", dist.Poisson(z), obs=x, obs_mask=known)

    x, known = torch.tensor([4.0, 4.0], dtype=torch.float64), torch.tensor([True, False])
    draws = draw(model, x, known)
    assert list(draws.samples) == ["z"]
    check(draws.samples["z"], torch.tensor([13 / 4, 3.0]), torch.tensor([13**0.5 / 4, 1.0]))


def test_the_whole_model_as_one_row() -> None:
    exact, x = NormalNormal.fixture()
    draws = draw(exact.model, x, data_plate=None)
    assert draws.samples["g"].shape == (2, 100)
    assert draws.samples["z"].shape == (2, 100, len(x))
    posterior = exact.posterior(x)
    for name in ("g", "z"):
        check(draws.samples[name], posterior[name].mean, posterior[name].stddev)


# What it costs


def tick(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let each look at the clock, of which there is one a transition, take so long."""
    clock = count(0.0, seconds)
    monkeypatch.setattr(nuts, "time", SimpleNamespace(perf_counter=lambda: next(clock)))


@pytest.mark.parametrize("seconds", [0.01, 0.25, 3.0])
def test_the_cost_is_that_of_every_transition_of_every_row(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = GammaPoisson.fixture()
    x, _ = exact.simulate(3, seed=5)
    tick(monkeypatch, seconds)
    settings = {"num_chains": 6, "num_samples": 30, "warmup_steps": 40, "seed": 0, "progress": False}
    for rows in (1, 3):
        assert check_cost(exact.model, x[:rows], **settings) == pytest.approx(rows * 6 * (30 + 40) * seconds)
    assert check_cost(exact.model, x, **(settings | {"num_samples": 60})) == pytest.approx(3 * 6 * 100 * seconds)
    assert check_cost(exact.model, x, progress=False) == pytest.approx(3 * 4 * 1000 * seconds)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1, "about 12 s"), (1.0, "about 2 min"), (60.0, "about 2 h"), (999.0, "about 33 h"), (5e4, "about 1,667 h")],
)
def test_the_cost_is_told(
    seconds: float, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, _ = GammaPoisson.fixture()
    x, _ = exact.simulate(2, seed=5)
    tick(monkeypatch, seconds)
    settings = {"num_samples": 20, "warmup_steps": 10, "seed": 0}  # 2 rows of 2 chains: 120 transitions
    draw(exact.model, x, progress=True, **settings)
    shown = capsys.readouterr().err
    assert f"NUTS, {text}: " in shown
    assert "120/120" in shown
    tick(monkeypatch, seconds)
    check_cost(exact.model, x, num_chains=2, **settings)
    assert capsys.readouterr().err == f"NUTS, {text}\n"


# Refused


def test_many_rows_are_refused_with_the_hours_they_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = GammaPoisson.fixture()
    x, _ = exact.simulate(2, seed=5)
    many = x.repeat(30_000, *(1,) * (x.dim() - 1))
    for seconds, hours in ((0.0006, "3.2"), (0.006, "32"), (0.6, "3,200")):
        tick(monkeypatch, seconds)
        with pytest.raises(SettingError, match=rf"max_rows = 100.*60,000 rows.*about {hours} hours.*max_rows=60000"):
            draw(exact.model, many)
        with pytest.raises(SettingError, match=rf"about {hours} hours"):
            check_cost(exact.model, many, num_chains=2, num_samples=100, warmup_steps=60)
    with pytest.raises(SettingError, match=r"max_rows = 1 of"):
        draw(exact.model, x, max_rows=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chains": 3}, "even"),
        ({"num_samples": 0}, "num_samples"),
        ({"warmup_steps": 0}, "warmup_steps"),
        ({"target_accept_prob": 1.0}, "target_accept_prob"),
        ({"max_rows": 0}, "max_rows"),
        ({"num_sample": 10}, "num_samples"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    exact, x = NormalNormal.fixture()
    with pytest.raises(SettingError, match=message):
        draw(exact.model, x, **settings)


def test_globals_must_be_given() -> None:
    exact, x = NormalNormal.fixture()
    with pytest.raises(ModelError, match="'g'"):
        draw(exact.model, x)


def test_a_model_of_a_fixed_number_of_rows_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    with pytest.raises(ModelError, match="runs with 2 rows at once"):
        draw(model, torch.zeros(6))


def test_a_row_without_a_finite_start_is_named() -> None:
    class Narrow(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value).masked_fill(value < 5.0, -torch.inf)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(20.0), 1.0))
            pyro.sample("x", Narrow(z, 1.0), obs=x)
            pyro.factor("wall", torch.where(z > 5.0, 0.0, -torch.inf))

    with pytest.raises(DataError, match="row 0 in 100 tries"):
        draw(model, torch.full((1,), 20.0))
