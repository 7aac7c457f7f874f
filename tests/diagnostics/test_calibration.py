"""Calibration finds guides that are wrong, lets exact ones pass, and simulates what it says it does."""

import html
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_aevb import AEVB
from pyro_aevb.diagnostics.calibration import TEST_QUANTITIES, Calibration, calibrate
from pyro_aevb.errors import GuideError, ModelError, NonFiniteError, SettingError
from pyro_aevb.guides.normal import AutoAmortizedNormal
from pyro_aevb.testing import BetaBinomial, GammaPoisson, HierarchicalNormal, LinearGaussian, NormalNormal


def run(model, guide, *template: Tensor, **settings) -> Calibration:
    return calibrate(model, guide, *template, **{"num_draws": 100, "seed": 0, "progress": False, **settings})


def scaled_guide(exact: LinearGaussian, factor: float, x: Tensor) -> None:
    """Sample the exact posterior with another spread."""
    q = exact.posterior(x)["z"]
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.MultivariateNormal(q.mean, factor**2 * q.covariance_matrix))


def prior_guide(x: Tensor) -> None:
    """Ignore the data."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))


class TestLinearGaussian:
    """1,000 simulations, 100 draws each."""

    def test_an_exact_guide_passes(self):
        exact, template = LinearGaussian.fixture()
        result = run(exact.model, exact.guide, template)
        assert result.quantities == ("z[0]", "z[1]", "z[2]", *TEST_QUANTITIES)
        assert result.ranks.shape == (1000, 6)
        assert min(result.p_values.values()) > 1e-3
        assert result.failures() == ()
        # the level is shared among six quantities
        assert result.failures(0.999) == tuple(name for name, p in result.p_values.items() if p < 0.999 / 6)
        assert abs(result.tarp.area) < 4 * result.tarp.standard_error
        assert result.tarp.p_value > 1e-3

    def test_a_guide_that_is_too_narrow_fails_everywhere(self):
        exact, template = LinearGaussian.fixture()
        result = run(exact.model, partial(scaled_guide, exact, 0.7), template)
        p = result.p_values
        assert max(p[name] for name in TEST_QUANTITIES) < 1e-6
        assert max(p[name] for name in result.coordinates) < 1e-3
        assert result.failures() == result.quantities
        assert result.tarp.area < -5 * result.tarp.standard_error
        findings = result.summary()["finding"]
        assert set(findings[:3]) == {"guide too narrow"}
        assert findings["log q(z|x)"] == "guide too narrow or off"
        assert findings["log p(x,z)"] == "draws too probable"

    def test_a_guide_that_is_too_wide_is_told_from_one_too_narrow(self):
        exact, template = LinearGaussian.fixture()
        result = run(exact.model, partial(scaled_guide, exact, 1.5), template)
        assert result.tarp.area > 5 * result.tarp.standard_error
        findings = result.summary()["finding"]
        assert set(findings[:3]) == {"guide too wide"}
        assert findings["log q(z|x)"] == "guide too wide"
        assert findings["log p(x,z)"] == "draws too improbable"

    def test_the_prior_as_guide_passes_the_coordinates_and_fails_the_joint_density(self):
        exact, template = LinearGaussian.fixture()
        result = run(exact.model, prior_guide, template)
        assert min(result.p_values[name] for name in result.coordinates) > 1e-3
        assert result.p_values["log p(x,z)"] < 1e-6
        assert result.failures() == ("log p(x,z)",)

    def test_a_shifted_guide_is_named_so(self):
        exact, template = LinearGaussian.fixture()

        def high(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                q = exact.posterior(x)["z"]
                pyro.sample("z", dist.MultivariateNormal(q.mean + torch.tensor([0.5, -0.5, 0.0]), q.covariance_matrix))

        findings = run(exact.model, high, template).summary()["finding"]
        assert list(findings[:2]) == ["guide too high", "guide too low"]


@pytest.mark.parametrize("kind", [GammaPoisson, BetaBinomial, HierarchicalNormal, NormalNormal])
def test_exact_guides_pass_on_other_supports_and_under_globals(kind):
    exact, template = kind.fixture()
    result = run(exact.model, exact.guide, template, num_simulations=500)
    assert min(result.p_values.values()) > 1e-3
    assert result.tarp.p_value > 1e-3


def flat_model(x: Tensor, concentration: float) -> None:
    """Hide a probability that the data know nothing of."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Beta(torch.full((len(x),), concentration), concentration))
        pyro.sample("x", dist.Normal(torch.zeros(len(x)), 1.0), obs=x)


def flat_guide(x: Tensor, concentration: float) -> None:
    """Sample it from another law."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Beta(torch.full((len(x),), concentration), concentration))


def test_densities_are_those_of_the_latents_on_their_supports():
    # a flat density gives truth and draws the same value, so that chance ranks them; unconstrained it would be a logistic one
    flat_q = run(partial(flat_model, concentration=3.0), partial(flat_guide, concentration=1.0), torch.zeros(1))
    assert flat_q.p_values["log q(z|x)"] > 1e-3
    assert flat_q.p_values["z"] < 1e-6
    assert flat_q.summary()["finding"]["z"] == "guide too wide"


def test_mean_ranks_are_those_of_the_closed_form():
    exact, template = LinearGaussian.fixture()
    table = run(exact.model, partial(scaled_guide, exact, 0.7), template).summary()
    # squared distances from the posterior's mean: chi-square with 3 degrees of freedom, that of draws times 0.7 squared
    share = stats.f(3, 3).cdf(0.7**2)
    for name in ("log p(x,z)", "log q(z|x)"):
        assert table["mean"][name] == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 1000))
    # a coordinate has the rank Phi(t / 0.7), t standard normal
    t = stats.norm.ppf((torch.arange(20_000).numpy() + 0.5) / 20_000)
    spread = 12 * stats.norm.cdf(t / 0.7).var()
    # norms by simulation: the posterior's mean, and two draws around it
    truth, _ = exact.simulate(20_000, seed=1)
    q = exact.posterior(truth)["z"]
    one, other = q.sample(), q.mean + 0.7 * (q.sample() - q.mean)
    share = (other.norm(dim=-1) < one.norm(dim=-1)).double().mean().item()
    assert table["mean"]["|z|"] == pytest.approx(share, abs=0.04)
    assert table["spread"][:3].to_list() == pytest.approx([spread] * 3, abs=0.12)


class TestGlobals:
    def test_the_guide_is_tested_at_the_globals_that_made_the_data(self):
        exact, template = NormalNormal.fixture()

        def elsewhere(x: Tensor) -> None:
            g = pyro.sample(
                "g", dist.Normal(x.new_tensor(50.0), 0.1)
            )  # as wrong as can be, and nothing is claimed of it
            gain = exact.local_scale**-2 / (exact.local_scale**-2 + exact.noise_scale**-2)
            scale = (exact.local_scale**-2 + exact.noise_scale**-2) ** -0.5
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(gain * g + (1 - gain) * x, scale))

        result = run(exact.model, elsewhere, template, num_simulations=400)
        assert result.given["g"].item() == pytest.approx(50.0, abs=0.6)
        assert min(result.p_values.values()) > 1e-3
        assert "nothing is claimed" in repr(result)

    def test_given_values_are_used(self):
        exact, template = NormalNormal.fixture()

        def blind(x: Tensor) -> None:
            # right if g is 0, and only then
            pyro.sample("g", dist.Normal(x.new_tensor(0.0), 1.0))
            precision = exact.local_scale**-2 + exact.noise_scale**-2
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(exact.noise_scale**-2 / precision * x, precision**-0.5))

        right, wrong = (
            run(exact.model, blind, template, given={"g": torch.tensor(g).double()}, num_simulations=300)
            for g in (0.0, 20.0)
        )
        assert min(right.p_values.values()) > 1e-3
        assert wrong.p_values["z"] < 1e-6
        assert wrong.given["g"] == 20.0
        assert wrong.summary()["finding"]["z"] == "guide too low"


def regression(x: Tensor, weight: Tensor) -> None:
    """Observe x by a covariate."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(weight), 1.0))
        pyro.sample("x", dist.Normal(z * weight, 0.5), obs=x)


def regression_guide(x: Tensor, weight: Tensor) -> None:
    """Sample the posterior."""
    precision = 1 + weight.square() / 0.25
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * x / 0.25 / precision, precision.rsqrt()))


def test_covariates_are_used_observations_ignored_and_rows_recycled():
    weight = torch.tensor([0.0, 3.0])
    first = run(regression, regression_guide, torch.zeros(2), weight=weight, num_simulations=401)
    second = run(regression, regression_guide, torch.full((2,), 1e3), weight=weight, num_simulations=401)
    assert torch.equal(first.ranks, second.ranks)
    assert min(first.p_values.values()) > 1e-3
    other = run(regression, regression_guide, torch.zeros(2), weight=torch.tensor([0.0, 1.0]), num_simulations=401)
    assert torch.equal(first.ranks[::2], other.ranks[::2])
    assert not torch.equal(first.ranks[1::2], other.ranks[1::2])
    # a guide that takes the second row's covariate for the first's is right in every other row only
    turned = partial(swapped_guide, regression_guide)
    assert run(regression, turned, torch.zeros(2), weight=weight, num_simulations=401).p_values["z"] < 1e-6


def swapped_guide(guide, x: Tensor, weight: Tensor) -> None:
    """Run a guide with the covariates turned round."""
    guide(x, weight=3.0 - weight)


def test_ranks_do_not_hang_on_chunks_and_seeds_reproduce():
    exact, template = GammaPoisson.fixture()
    settings = {"num_simulations": 60, "num_draws": 500}
    whole, parts = (run(exact.model, exact.guide, template, chunk_size=size, **settings) for size in (None, 7))
    assert torch.equal(whole.ranks, parts.ranks)
    assert torch.equal(whole.tarp.ranks, parts.tarp.ranks)
    state = torch.get_rng_state()
    other = run(exact.model, exact.guide, template, seed=1, **settings)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(other.ranks, whole.ranks)


def ragged(x: Tensor, mask: Tensor) -> None:
    """Observe some of three numbers in each row."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 3, dim=-1), pyro.poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def ragged_guide(x: Tensor, mask: Tensor, scale: float = math.sqrt(0.5)) -> None:
    """Be right where a number counts."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 3, dim=-1), pyro.poutine.mask(mask=mask):
        pyro.sample("z", dist.Normal(torch.where(mask, x / 2, 9.0), torch.where(mask, scale, 0.1)))


def test_masked_latents_do_not_count():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    result = run(ragged, ragged_guide, torch.zeros(2, 3), mask=mask)
    assert result.coordinates == ("z[0]", "z[1]", "z[2]")
    assert min(result.p_values.values()) > 1e-3
    assert result.tarp.p_value > 1e-3
    narrow = run(ragged, partial(ragged_guide, scale=0.3), torch.zeros(2, 3), mask=mask).p_values
    assert narrow["z[0]"] < 1e-6
    assert narrow["z[2]"] > 1e-3


def test_a_whole_model_is_calibrated_data_set_by_data_set():
    exact, template = LinearGaussian.fixture()
    kept = []

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            kept.append(pyro.sample("z", exact.posterior(x)["z"]) - exact.posterior(x)["z"].mean)

    result = run(exact.model, guide, template.repeat(2, 1), data_plate=None, num_simulations=12, num_draws=50)
    assert result.coordinates == tuple(f"z[{row}, {place}]" for row in range(2) for place in range(3))
    assert len(result.ranks[:, 0].unique()) > 6
    noise = torch.stack([drawn for drawn in kept if drawn.shape[0] == 50]).flatten()
    assert len((1e6 * noise).round().unique()) > 0.9 * 12 * 300  # every data set has draws of its own
    assert min(result.p_values.values()) > 1e-3


def logarithmic(x: Tensor) -> None:
    """Observe what is computed from the data."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.log())


def logarithmic_guide(x: Tensor) -> None:
    """Sample the posterior."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.log() / 2, math.sqrt(0.5)))


def test_observations_that_are_computed_go_back_by_a_function():
    with pytest.raises(ModelError, match="to_batch="):
        run(logarithmic, logarithmic_guide, torch.ones(2))
    result = run(logarithmic, logarithmic_guide, torch.ones(2), to_batch=lambda values, *_: ((values["x"].exp(),), {}))
    assert min(result.p_values.values()) > 1e-3


def test_tables_hold_every_quantity_and_say_what_fails():
    exact, template = LinearGaussian.fixture()
    result = run(exact.model, partial(scaled_guide, exact, 0.5), template, num_simulations=300)
    table = result.summary()
    assert list(table.index) == list(result.quantities)
    assert table["p"].to_dict() == result.p_values
    scaled = (result.ranks[:, 0].double() + 0.5) / 101
    assert table["mean"].iloc[0] == pytest.approx(scaled.mean().item())
    assert table["spread"].iloc[0] == pytest.approx(12 * scaled.numpy().var())
    ranks = result.to_pandas()
    assert ranks["log q(z|x)"].tolist() == result.ranks[:, -2].tolist()
    assert ranks["TARP"].tolist() == result.tarp.ranks.tolist()
    assert len(ranks) == len(result) == 300
    for text in (repr(result), result._repr_html_()):
        assert "Säilynoja" in text
        assert f"6 of 6 quantities fail at 0.05 shared among them: {', '.join(result.quantities)}" in html.unescape(
            text
        )
        assert "guide too narrow" in text
        assert "TARP" in text
    with pytest.raises(SettingError, match="level"):
        result.failures(0.0)


def delta_guide(x: Tensor) -> None:
    """Give a point."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x.new_zeros(len(x), 3)).to_event(1))


def lost_guide(x: Tensor, weight: Tensor) -> None:
    """Lose its way far out."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.where(x > 3, math.nan, x), weight))


def test_a_guide_that_was_refined_is_refused():
    """Its offsets belong to the rows that it was refined on, and simulated rows would be given the encoder's output."""
    exact, template = LinearGaussian.fixture()
    guide = AutoAmortizedNormal(exact.model)
    refined = guide.refine(template, num_steps=2, num_particles=2)
    with pytest.raises(GuideError, match=r"AutoAmortizedNormal was refined.*num_simulations=0"):
        run(exact.model, refined, template)
    assert len(run(exact.model, guide, template, num_simulations=20)) == 20
    few = {"sampling": {"num_samples": 20, "warmup_steps": 10}, "ledger": False, "seed": 0, "progress": False}
    with pytest.raises(GuideError, match="was refined"):
        AEVB(exact.model, refined).compare(template, **few)
    assert AEVB(exact.model, refined).compare(template, num_simulations=0, **few).calibration is None


def test_what_cannot_be_calibrated_is_refused():
    exact, template = LinearGaussian.fixture()
    hierarchical, rows = NormalNormal.fixture()
    with pytest.raises(SettingError, match="num_simulations must be an integer of at least 1, got 0"):
        run(exact.model, exact.guide, template, num_simulations=0)
    with pytest.raises(SettingError, match="num_draws"):
        run(exact.model, exact.guide, template, num_draws=0)
    with pytest.raises(SettingError, match="chunk_size"):
        run(exact.model, exact.guide, template, chunk_size=0)
    with pytest.raises(SettingError, match="Did you mean 'num_simulations'"):
        run(exact.model, exact.guide, template, num_simulation=5)
    with pytest.raises(SettingError, match="there are none"):
        run(exact.model, exact.guide, template[:0])
    with pytest.raises(GuideError, match="point"):
        run(exact.model, delta_guide, template)
    with pytest.raises(GuideError, match="AutoNormal holds numbers of its own data's rows"):
        run(exact.model, pyro.infer.autoguide.AutoNormal(exact.model), template)
    with pytest.raises(GuideError, match="lacks"):
        run(exact.model, lambda x: None, template)
    with pytest.raises(SettingError, match=r"leading axes \[2\]"):
        run(hierarchical.model, hierarchical.guide, rows, given={"g": torch.zeros(2).double()})
    with pytest.raises(SettingError, match="'h'"):
        run(hierarchical.model, hierarchical.guide, rows, given={"h": torch.zeros(()).double()})
    with pytest.raises(NonFiniteError, match=r"z is NaN in draws of \d+ of \d+ simulated rows"):
        run(regression, lost_guide, torch.zeros(2), weight=torch.ones(2))
