"""Bidirectional Monte Carlo: bounds on both sides of exact evidences, and the data that it simulates."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_aevb._types import Args, Kwargs, Values
from pyro_aevb.errors import GuideError, ModelError, SettingError
from pyro_aevb.evidence.ais import AIS
from pyro_aevb.evidence.bdmc import BDMCResult, _bound, bdmc
from pyro_aevb.evidence.problem import Problem
from pyro_aevb.evidence.result import Status
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.program.density import LogDensity
from pyro_aevb.testing import EightSchools, GammaPoisson, LinearGaussian, NormalNormal


class Recorder:
    """Puts simulated values of site ``x`` into the batch and keeps them."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []

    def __call__(self, values: Values, args: Args, kwargs: Kwargs) -> tuple[Args, dict[str, Any]]:
        self.x.append(values["x"])
        return (values["x"],), {}


def run(model, guide, *template: Tensor, **settings) -> BDMCResult:
    return bdmc(model, guide, *template, progress=False, **{"seed": 0, **settings})


def test_bounds_lie_on_both_sides_of_the_truth_and_meet():
    exact, template = LinearGaussian.fixture()
    gaps = []
    for temperatures in (10, 60):
        recorder = Recorder()
        settings = {"num_simulations": 200, "num_temperatures": temperatures, "num_leapfrog": 4}
        result = run(exact.model, None, template, to_batch=recorder, **settings)
        truth = exact.log_marginal(recorder.x[0])
        summary = result.summary()
        assert summary.lower - truth.mean() < 3 * (result.lower - truth).std() / 200**0.5
        assert truth.mean() - summary.upper < 3 * (result.upper - truth).std() / 200**0.5
        # Markov: a bound is wrong by more than b nats with a probability of at most exp(-b)
        assert ((result.lower - truth) < math.log(1e5)).all()
        assert ((truth - result.upper) < math.log(1e5)).all()
        gaps.append(summary.gap)
    assert gaps[0] > 0.5
    assert gaps[1] < 0.25


def test_a_start_at_the_exact_guide_leaves_no_gap():
    exact, template = GammaPoisson.fixture()
    result = run(exact.model, exact.guide, template, num_simulations=1, num_temperatures=4, data_plate="data")
    assert abs(result.gap) < 1e-9
    assert result.start == "guide"
    assert result.status == (Status.OK,)


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_data_sets_share_no_random_numbers(start):
    x = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.2))

    # the data are the same and nothing moves: what is left are the starts of each data set
    settings = {"num_simulations": 4, "num_temperatures": 1, "data_plate": None, "start": start}
    result = run(model, guide, x, to_batch=lambda values, args, kwargs: ((x,), {}), **settings)
    assert len(result.lower.unique()) == 4


@pytest.mark.slow
def test_a_rows_upper_error_is_that_of_its_bound():
    exact, x = LinearGaussian.fixture()
    rows = x[:1].expand(300, -1)
    torch.manual_seed(0)
    latents = exact.posterior(rows)["z"].sample()
    with torch.no_grad():
        density = LogDensity(exact.model, rows)
        noise = RowNoise(0, torch.arange(300), dtype=torch.float64)
        bounds = _bound(AIS(num_temperatures=100, start="prior"), Problem(density, None, noise), latents)
    errors = bounds.upper - exact.log_marginal(rows)
    # a delta method with 16 skewed weights: .85 here; a standard deviation of 300 is known to 5 %
    assert 0.7 < bounds.upper_standard_error.square().mean().sqrt() / errors.std() < 1.05


def test_the_mean_upper_error_is_not_too_small():
    exact, template = LinearGaussian.fixture()
    recorder = Recorder()
    settings = {"num_simulations": 400, "num_temperatures": 20}
    result = run(exact.model, None, template, to_batch=recorder, **settings)
    true = (result.upper - exact.log_marginal(recorder.x[0])).std().item() / 20
    # above by the lower bound's part, 1.3 times here; each standard deviation is known to 5 %
    assert 1.1 < result.summary().upper_standard_error / true < 1.5
    # that of the rows' own errors is too small, for which reason it is not the summary's
    assert result.upper_standard_error.square().sum().sqrt().item() / 400 < 0.8 * true


def test_a_guide_for_another_model_is_refused():
    exact, template = LinearGaussian.fixture()

    def other(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("other", dist.Normal(x.new_zeros(3), 1.0).to_event(1))

    with pytest.raises(GuideError, match=r"\['z'\]"):
        run(exact.model, other, template, num_simulations=2, num_temperatures=2)


def test_globals_are_given_or_drawn_from_the_guide():
    exact, template = NormalNormal.fixture()
    settings = {"num_simulations": 300, "num_temperatures": 3, "num_leapfrog": 2}
    recorder = Recorder()
    given = run(exact.model, None, template, given={"g": torch.tensor(50.0).double()}, to_batch=recorder, **settings)
    x = recorder.x[0]
    spread = math.sqrt(exact.local_scale**2 + exact.noise_scale**2)
    assert abs(x.mean() - 50) < 4 * spread / 300**0.5
    truth = dist.Normal(50.0, spread).log_prob(x)
    assert given.label == "log p(x | globals)"
    assert (given.lower - truth).mean() < 3 * (given.lower - truth).std() / 300**0.5
    assert (truth - given.upper).mean() < 3 * (truth - given.upper).std() / 300**0.5
    drawn = run(exact.model, exact.guide, template, to_batch=recorder, **settings)
    center = exact.posterior(template)["g"]
    assert abs(recorder.x[1].mean() - center.mean) < 4 * (center.stddev + spread / 300**0.5)
    assert (drawn.gap.abs() < 1e-9).all()


@pytest.mark.slow
def test_a_whole_model_is_simulated_data_set_by_data_set():
    exact, template = EightSchools.fixture()
    settings = {"num_chains": 100, "num_temperatures": 20, "num_leapfrog": 3}
    result = run(exact.model, None, template, num_simulations=2, data_plate=None, **settings)
    assert result.label == "joint log evidence"
    assert len(result) == 2
    assert result.lower[0] != result.lower[1]
    errors = 4 * (result.lower_standard_error + result.upper_standard_error)
    assert (result.gap.abs() < errors + 0.5).all()


def conditional(x: Tensor, weight: Tensor) -> None:
    """Observe x by a covariate."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(weight), 1.0))
        pyro.sample("x", dist.Normal(z * weight, 0.5), obs=x)


def test_covariates_are_used_observations_ignored_and_rows_recycled():
    weight = torch.tensor([0.0, 30.0], dtype=torch.float64)
    settings = {"num_simulations": 6, "num_temperatures": 5, "num_leapfrog": 1}
    first = run(conditional, None, torch.zeros(2).double(), weight=weight, **settings)
    second = run(conditional, None, torch.full((2,), 1e6).double(), weight=weight, **settings)
    assert torch.equal(first.lower, second.lower)
    # rows of weight 0 have log p(x) = log N(x; 0, .5) whatever z is: no gap
    assert (first.gap[::2].abs() < 1e-9).all()
    assert (first.gap[1::2].abs() > 1e-9).all()


def test_rows_do_not_hang_on_chunks_and_seeds_reproduce():
    exact, template = LinearGaussian.fixture()
    settings = {"num_simulations": 7, "num_temperatures": 4, "num_leapfrog": 1}
    whole, parts = (run(exact.model, None, template, chunk_size=size, **settings) for size in (None, 3))
    torch.testing.assert_close(parts.lower, whole.lower, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(parts.upper, whole.upper, rtol=1e-10, atol=1e-10)
    assert not torch.isclose(run(exact.model, None, template, **{**settings, "seed": 1}).lower, whole.lower).any()


def test_the_summary_and_the_table_hold_the_rows():
    rows = {"lower": [1.0, 3.0], "upper": [2.0, 3.5], "lower_standard_error": [0.3, 0.4]}
    rest = {"upper_standard_error": [0.6, 0.8], "acceptance": [0.6, 0.7], "reverse_acceptance": [0.6, 0.7]}
    entries = {name: torch.tensor(entry, dtype=torch.float64) for name, entry in (rows | rest).items()}
    status = (Status.OK, Status.UNRELIABLE)
    result = BDMCResult(**entries, status=status, label="log p(x)", start="prior", num_chains=16, num_temperatures=9)
    summary = result.summary()
    assert (summary.lower, summary.upper, summary.gap) == (2.0, 2.75, 0.75)
    assert summary.lower_standard_error == pytest.approx(0.25)
    assert summary.upper_standard_error == pytest.approx(0.25)
    assert summary.gap_standard_error == pytest.approx(0.25)
    assert summary.num_flagged == 1
    table = result.to_pandas()
    assert table["gap"].tolist() == [1.0, 0.5]
    assert table["status"].tolist() == ["ok", "unreliable"]
    assert table.attrs["num_temperatures"] == 9
    for text in (repr(result), result._repr_html_()):
        assert "simulated from the model" in text
        assert "0.7500" in text


def test_what_cannot_be_bounded_is_refused():
    exact, template = LinearGaussian.fixture()
    hierarchical, rows = NormalNormal.fixture()
    with pytest.raises(SettingError, match="num_simulations"):
        run(exact.model, None, template, num_simulations=0)
    with pytest.raises(SettingError, match="num_chains"):
        run(exact.model, None, template, num_chains=-1)
    with pytest.raises(SettingError, match="num_temperatures"):
        run(exact.model, None, template, num_temperatures=0)
    with pytest.raises(SettingError, match="Did you mean 'num_temperatures'"):
        run(exact.model, None, template, num_temperature=10)
    with pytest.raises(SettingError, match="guide"):
        run(exact.model, None, template, start="guide")
    with pytest.raises(ModelError, match="'g'"):
        run(hierarchical.model, None, rows)

    def own_rows(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    with pytest.raises(ModelError, match="draws rows"):
        run(own_rows, None, torch.zeros(6))

    def computed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    with pytest.raises(ModelError, match="to_batch"):
        run(computed, None, torch.zeros(3))


@pytest.mark.slow
@pytest.mark.parametrize("temperatures", [20, 200, 400])
def test_the_mean_bounds_hold_the_truth_and_meet(temperatures):
    exact, template = LinearGaussian.fixture()
    recorder = Recorder()
    result = run(exact.model, None, template, to_batch=recorder, num_temperatures=temperatures)
    truth, summary = exact.log_marginal(recorder.x[0]).mean().item(), result.summary()
    assert summary.lower - 3 * summary.lower_standard_error <= truth
    assert truth <= summary.upper + 3 * summary.upper_standard_error
    assert summary.gap <= {20: 1.0, 200: 0.1, 400: 0.05}[temperatures]


@pytest.mark.slow
def test_the_gap_falls_with_temperatures():
    # 16 chains leave a gap of a hundredth at 200 temperatures, which hundreds of rows can't tell from that at 400; two leave more
    exact, template = LinearGaussian.fixture()
    settings = {"num_chains": 2, "num_simulations": 1500}
    first, *others = (
        run(exact.model, None, template, num_temperatures=count, **settings).summary() for count in (20, 200, 400)
    )
    for second in others:
        error = math.hypot(first.gap_standard_error, second.gap_standard_error)
        assert first.gap - second.gap > 3 * error
        first = second


@pytest.mark.slow
def test_bounds_hold_in_twenty_repetitions():
    exact, template = LinearGaussian.fixture()
    lower, upper, truths = [], [], []
    for seed in range(20):
        recorder = Recorder()
        result = run(exact.model, None, template, to_batch=recorder, num_temperatures=50, seed=seed)
        truth, summary = exact.log_marginal(recorder.x[0]).mean().item(), result.summary()
        assert summary.lower - 3 * summary.lower_standard_error <= truth
        assert truth <= summary.upper + 3 * summary.upper_standard_error
        lower.append(summary.lower)
        upper.append(summary.upper)
        truths.append(truth)
    assert sum(lower) <= sum(truths) <= sum(upper)
