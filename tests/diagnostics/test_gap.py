"""The ledger: both gaps in closed form on linear-Gaussian rows, with globals, positive latents, and estimates that are wrong."""

import functools
import math
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from torch import nn

from pyro_aevb import SGVB, AutoAmortizedMultivariateNormal, AutoAmortizedNormal, fit
from pyro_aevb.diagnostics.gap import InferenceGap, _judge, inference_gap
from pyro_aevb.diagnostics.gap_plots import plot_gap
from pyro_aevb.diagnostics.row_bounds import RowBounds, Search, draw_bounds
from pyro_aevb.errors import DataError, GuideError, SettingError, UnreliableWarning
from pyro_aevb.evidence.averages import from_log_weights
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.status import Status
from pyro_aevb.testing import GammaPoisson, LinearGaussian, NormalNormal

quiet = functools.partial(inference_gap, seed=0, progress=False)
EXACT, X = LinearGaussian.fixture()


def within(value, exact, error, times=5.0):
    """Compare rows within standard errors: 5 of them for up to some hundred rows."""
    return bool(((value - exact).abs() < times * error + 1e-9).all())


@functools.cache
def trained(family):
    """Train an automatic guide."""
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    x = EXACT.simulate(2000, seed=1)[0]
    guide = family(EXACT.model).build(x)
    objective = SGVB(gradient="stl")
    for rate in (5e-3, 5e-4):
        fit(EXACT.model, guide, objective, x, num_epochs=40, batch_size=100, learning_rate=rate, progress=False, seed=0)
    return guide, EXACT.simulate(60, seed=2)[0]


# --- The linear-Gaussian model ---


@pytest.mark.slow
@pytest.mark.parametrize("family", [AutoAmortizedNormal, AutoAmortizedMultivariateNormal])
def test_gaps_of_a_trained_guide_are_the_known_ones(family):
    guide, x = trained(family)
    gap = quiet(EXACT.model, guide, torch.cat([X, x]), num_draws=4000)
    expected = EXACT.approximation_gap().item() if family is AutoAmortizedNormal else 0.0
    assert gap.approximation_gap.mean().item() == pytest.approx(expected, abs=0.02)
    assert abs(gap.amortization_gap.mean().item()) <= 0.02
    assert family.__name__ in gap.family
    assert within(gap.log_marginal.value, EXACT.log_marginal(torch.cat([X, x])), gap.log_marginal.standard_error)


def test_errors_of_bounds_are_their_spread_over_many_rows():
    """1,000 rows: the variance of a standard score has standard deviation 0.045, that of a sample's variance adds little."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def other(x, shift, ratio):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.5**0.5 * shift, 0.5**0.5 * ratio))

    x = torch.linspace(-3.0, 3.0, 1000, dtype=torch.float64)
    density, pair = LogDensity(model, x), ((0.5, 0.7), (0.3, 0.8))
    guide, best = (GuideDensity(functools.partial(other, shift=a, ratio=b), density) for a, b in pair)
    found = draw_bounds(density, guide, best, 700, Search(1, 0.1, 1, None, progress=False))  # two blocks of draws
    log_p = torch.distributions.Normal(0.0, 2.0**0.5).log_prob(x)
    first, second = (log_p - (b**2 + a**2 - 1) / 2 + math.log(b) for a, b in pair)
    for value, error in (
        (found.bound - first, found.bound_error),
        (found.best_bound - second, found.best_error),
        (found.best_bound - found.bound - (second - first), found.amortization_error),
    ):
        score = value / error
        assert abs(score.mean()) < 0.15
        assert 0.8 < score.var() < 1.25
    # common noise: the difference is known better than two bounds of draws of their own would tell
    assert (found.amortization_error < 0.95 * found.bound_error.hypot(found.best_error)).double().mean() > 0.9


@dataclass(eq=False)
class Shifted:
    """The best factorised guide, its first mean off by ``shift`` standard deviations and all scales by a factor."""

    shift: float = 0.0
    factor: float = 1.0

    def __call__(self, x):
        best = EXACT.mean_field_posterior(x).base_dist
        with pyro.plate("data", len(x)):
            loc = best.loc + self.shift * best.scale * torch.eye(3)[0]
            pyro.sample("z", dist.Normal(loc, self.factor * best.scale).to_event(1))

    def amortization_gap(self):
        """shift^2 / 2, and per latent (factor^2 - 1) / 2 - log factor, since the precision's diagonal is 1 / scale^2."""
        return self.shift**2 / 2 + 3 * ((self.factor**2 - 1) / 2 - math.log(self.factor))


@pytest.mark.parametrize("guide", [Shifted(0.7, 1.2), Shifted(-0.4, 0.6)], ids=repr)
def test_a_guide_written_by_hand_loses_what_it_is_off(guide):
    x = torch.cat([X, EXACT.simulate(9, seed=2)[0]])
    gap = quiet(EXACT.model, guide, x, method="quadrature", num_draws=4000, num_steps=80)
    exact, best = guide.amortization_gap(), EXACT.approximation_gap()
    assert within(gap.inference_gap, best + exact, gap.inference_error)
    # the search stops short of the best by a little, and never beyond it
    assert within(gap.amortization_gap, exact - 0.005, (gap.amortization_error.square() + 0.005**2).sqrt())
    assert gap.approximation_gap.mean().item() == pytest.approx(best.item(), abs=0.02)
    assert torch.allclose(gap.approximation_gap + gap.amortization_gap, gap.inference_gap)
    assert torch.equal(
        gap.log_marginal.value - gap.approximation_gap - gap.amortization_gap, gap.bound
    ) or torch.allclose(gap.log_marginal.value - gap.approximation_gap - gap.amortization_gap, gap.bound)


def test_the_exact_posterior_loses_nothing():
    gap = quiet(EXACT.model, EXACT.guide, X, method="quadrature", num_draws=200, num_steps=5)
    assert gap.inference_gap.item() == pytest.approx(0.0, abs=1e-5)
    assert gap.amortization_gap.item() == 0.0  # no normal of independent coordinates is better
    assert gap.bound_error.item() < 1e-8


def test_chunks_of_rows_and_seeds():
    x, guide = EXACT.simulate(7, seed=3)[0], Shifted(0.3, 0.8)
    first, second = (
        quiet(EXACT.model, guide, x, num_draws=520, num_steps=3, method="quadrature", chunk_size=size)
        for size in (7, 3)
    )
    assert torch.allclose(first.bound, second.bound, rtol=1e-10)
    assert torch.allclose(first.best_bound, second.best_bound, rtol=1e-10)
    again = quiet(EXACT.model, guide, x, num_draws=520, num_steps=3, method="quadrature", chunk_size=7)
    assert torch.equal(first.bound, again.bound)
    state = torch.get_rng_state()
    quiet(EXACT.model, guide, x, num_draws=10, num_steps=1, method="quadrature")
    assert torch.equal(state, torch.get_rng_state())


# --- Other models ---


def test_positive_latents_reach_the_best_log_normal():
    exact = GammaPoisson()
    x = exact.simulate(3, seed=3)[0]

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(x.double().mean(-1).add(0.5).log(), 0.3 * torch.ones(len(x)).double()))

    gap = quiet(exact.model, guide, x, method="quadrature", num_draws=5000, num_steps=100, num_particles=32)
    posterior = exact.posterior(x)["rate"]

    def kl(loc, scale, row):
        """KL(log-normal || Gamma) by the closed form of E_q log p, with E rate = exp(loc + scale^2 / 2)."""
        a, b = (getattr(posterior, name)[row].item() for name in ("concentration", "rate"))
        log_p = a * math.log(b) - math.lgamma(a) + (a - 1) * loc - b * math.exp(loc + scale**2 / 2)
        return -log_p - stats.norm(loc, scale).entropy() - loc

    for row in range(3):
        loc = x[row].double().mean().add(0.5).log().item()
        best = optimize.minimize(lambda at, row=row: kl(at[0], math.exp(at[1]), row), [loc, -1.0]).fun
        assert abs(gap.inference_gap[row] - kl(loc, 0.3, row)) < 5 * gap.inference_error[row] + 0.01
        assert abs(gap.approximation_gap[row] - best) < 5 * gap.approximation_error[row] + 0.015


def test_with_globals_everything_is_given_one_draw_of_them():
    exact, x = NormalNormal.fixture()

    class Wide(nn.Module):
        """p(g | x) and, at any g, the row's posterior with its scale doubled: KL = 3 / 2 - log 2."""

        def forward(self, x):
            mean, variance = exact._global_posterior(x)
            g = pyro.sample("g", dist.Normal(mean, math.sqrt(variance)))
            slope, variance = exact._local_posterior()
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(slope * g + (1 - slope) * x, 2 * math.sqrt(variance)))

    gap = quiet(exact.model, Wide(), x, method="quadrature", num_draws=4000, num_steps=100)
    assert "one draw from q(globals)" in gap.log_marginal.label
    assert within(gap.inference_gap, 1.5 - math.log(2), gap.inference_error)
    assert gap.approximation_gap.abs().max() < 0.02


def test_a_whole_model_is_one_row():
    """The posterior of a mean m of n rows is N(sum x / (n + 1), 1 / (n + 1)); the guide's sd is 0.6 of it."""

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    x = torch.tensor([0.3, -1.0, 2.0, 0.7])
    sd = (len(x) + 1) ** -0.5

    def guide(x):
        pyro.sample("m", dist.Normal(x.sum() * sd**2, 0.6 * sd))

    found = quiet(model, guide, x, method="quadrature", data_plate=None, num_steps=100, num_draws=1000)
    assert len(found) == 1
    rows = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1.0)
    assert within(found.log_marginal.value, rows.log_prob(x), found.log_marginal.standard_error)
    kl = 0.6**2 / 2 - 0.5 - math.log(0.6)
    assert within(found.inference_gap, kl, found.inference_error)
    assert within(found.amortization_gap, kl, found.amortization_error)
    assert within(found.approximation_gap, 0.0, found.approximation_error)


@pytest.mark.slow
def test_an_automatic_guide_with_globals_is_refined():
    exact, x = NormalNormal.fixture()
    guide = AutoAmortizedNormal(exact.model, init_scale=0.7).build(x)
    gap = quiet(exact.model, guide, x, method="quadrature", num_draws=1000, num_steps=200)
    assert gap.amortization_gap.mean() > 0.3
    assert (
        gap.approximation_gap.abs().max() < 1e-3
    )  # at that draw: an offset for the mean over q(globals) lacks 0.1 and more


# --- The result ---


def result_of(status=("ok", "ok", "ok"), **settings):
    """A ledger with given numbers."""
    value = torch.tensor([-10.0, -12.0, -50.0]).double()
    evidence = replace(
        from_log_weights(torch.zeros(1, 200, 3)), value=value, standard_error=torch.tensor([0.3, 0.4, 9.0]).double()
    )
    entries = {
        "bound": value - torch.tensor([3.0, 1.0, 40.0]),
        "bound_error": torch.full((3,), 0.4).double(),
        "best_bound": value - torch.tensor([1.0, 0.5, 30.0]),
        "best_error": torch.full((3,), 0.3).double(),
        "amortization_error": torch.full((3,), 0.1).double(),
    }
    return InferenceGap(
        log_marginal=evidence,
        **entries,
        status=tuple(map(Status, status)),
        family="normals",
        num_draws=100,
        **settings,
    )


def test_the_table_leaves_flagged_rows_out_and_counts_them():
    table = result_of(("ok", "warn", "unreliable")).summary()
    assert table["mean"].tolist() == pytest.approx([-11.0, 0.75, -11.75, 1.25, -13.0, 2.0])
    errors = table["standard_error"]
    assert errors.iloc[0] == pytest.approx(0.25)  # sqrt(.3^2 + .4^2) / 2
    assert errors["- approximation gap"] == pytest.approx(math.sqrt(0.3**2 + 0.4**2 + 2 * 0.3**2) / 2)
    assert errors["- amortization gap"] == pytest.approx(math.sqrt(2) * 0.1 / 2)
    assert errors["inference gap"] == pytest.approx(math.sqrt(0.3**2 + 0.4**2 + 2 * 0.4**2) / 2)
    assert table["sd_over_rows"].iloc[0] == pytest.approx(math.sqrt(2))
    text = repr(result_of(("ok", "warn", "unreliable")))
    assert "1 of 3 rows are unreliable and left out" in text
    assert "is at least what is shown" in text  # importance sampling is a lower bound
    assert result_of(("ok", "warn", "unreliable")).worst_rows(5) == (0, 1)
    assert "<table" in result_of()._repr_html_()


def test_all_rows_flagged_have_no_mean():
    gap = result_of(("unreliable",) * 3)
    assert gap.summary()["mean"].isna().all()
    assert "3 of 3 rows" in repr(gap)


def test_the_table_of_rows():
    frame = result_of().to_pandas()
    assert frame["inference_gap"].tolist() == pytest.approx([3.0, 1.0, 40.0])
    assert (frame["approximation_gap"] + frame["amortization_gap"]).tolist() == pytest.approx([3.0, 1.0, 40.0])
    assert frame.attrs["family"] == "normals"


def test_log_p_below_a_bound_is_flagged():
    evidence = replace(
        from_log_weights(torch.zeros(1, 200, 3)),
        value=torch.tensor([-2.0, -2.0, -2.0]).double(),
        status=(Status.OK,) * 3,
    )
    evidence = replace(evidence, standard_error=torch.full((3,), 0.03).double())
    error = torch.full((3,), 0.04).double()
    low = torch.tensor([-3.0, -3.0, -math.inf]).double()
    best = torch.tensor([-1.81, -1.79, -3.0]).double()  # above by 3.8 and by 4.2 times .05
    assert _judge(evidence, RowBounds(low, error, best, error, error)) == (
        Status.OK,
        Status.UNRELIABLE,
        Status.UNRELIABLE,
    )


def test_unreliable_rows_are_told_in_a_warning():
    def far(x):
        best = EXACT.mean_field_posterior(x).base_dist
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(best.loc + 3.0, 0.2 * best.scale).to_event(1))

    with pytest.warns(UnreliableWarning) as warned:
        gap = quiet(EXACT.model, far, X, method="importance", num_samples=400, num_draws=200, num_steps=5)
    assert gap.is_flagged.all()
    assert any("ledger of 1 of 1 rows" in str(item.message) for item in warned)


# --- The picture ---


def test_bars_are_the_gaps_and_start_where_the_other_ends():
    gap = result_of(("ok", "warn", "unreliable"))
    (ax,) = plot_gap(gap).axes
    approximation, amortization = ax.containers[:2]
    assert [bar.get_width() for bar in approximation] == pytest.approx([0.75, 1.0, 0.5])  # the mean, then the worst row
    assert [bar.get_width() for bar in amortization] == pytest.approx([1.25, 2.0, 0.5])
    assert [bar.get_x() for bar in amortization] == pytest.approx([0.75, 1.0, 0.5])
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["mean of 2 rows", "0", "1"]
    assert "1 of 3 rows left out" in ax.get_title(loc="left")
    assert "nats" in ax.get_xlabel()


def test_no_picture_without_sound_rows():
    with pytest.raises(DataError, match="all 3 rows are unreliable"):
        plot_gap(result_of(("unreliable",) * 3))


# --- Bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_draws": 1}, "num_draws must be at least 2"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"method": "exact"}, "Unknown method 'exact'"),
        ({"num_chain": 3}, "Did you mean 'num_chains'"),
        ({"num_step": 3}, "Did you mean 'num_steps'"),
        ({"particles": 3}, "Did you mean 'num_particles'.*Known are method, num_draws"),
        ({"num_sample": 3}, "Did you mean 'num_samples'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SettingError, match=message):
        quiet(EXACT.model, EXACT.guide, X, **settings)


def test_a_point_has_no_bound():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.zeros(len(x), 3).double(), event_dim=1))

    with pytest.raises(GuideError, match="point"):
        quiet(EXACT.model, guide, X)
