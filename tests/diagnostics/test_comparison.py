"""Guides whose error is known in closed form beside exact posterior draws; flagged rows; what is refused."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_aevb.diagnostics import comparison
from pyro_aevb.diagnostics.comparison import compare_posteriors
from pyro_aevb.diagnostics.comparison_plots import plot_comparison
from pyro_aevb.diagnostics.comparison_result import Comparison
from pyro_aevb.errors import DataError, GuideError, SettingError
from pyro_aevb.guides.normal import AutoAmortizedNormal
from pyro_aevb.mcmc.draws import PosteriorDraws, assess
from pyro_aevb.program.density import LogDensity
from pyro_aevb.status import Status
from pyro_aevb.testing import LinearGaussian, NormalNormal


def as_chains(density: LogDensity, samples: dict[str, Tensor], *, is_joint: bool = False) -> PosteriorDraws:
    """Make what chains would have returned of exact draws ``[chains, draws, rows, ...]``."""
    u = density.unconstrain({name: value.unsqueeze(2) if is_joint else value for name, value in samples.items()})
    ones = u.new_ones(density.num_rows)
    judged = assess(
        u,
        density.log_joint(u),
        acceptance=0.8 * ones,
        step_size=ones,
        num_divergent=torch.zeros(density.num_rows, dtype=torch.long),
    )
    return replace(judged, samples=samples, seconds=2.5)


def compare(guide: Any, reference: PosteriorDraws, *batch: Any, **settings: Any) -> Comparison:
    return compare_posteriors(guide, reference, *batch, **{"seed": 0, "progress": False, **settings})


@pytest.fixture
def exact() -> tuple[LinearGaussian, Tensor, PosteriorDraws]:
    """A linear-Gaussian model, six rows, and 2,000 exact draws of each."""
    model, _ = LinearGaussian.fixture()
    x, _ = model.simulate(6, seed=5)
    draws = model.posterior(x)["z"].sample((8, 250))
    reference = as_chains(LogDensity(model.model, x), {"z": draws})
    return model, x, replace(reference, status=(Status.OK,) * 6)


# Numbers


def test_the_posterior_itself_shows_no_difference(exact: tuple[LinearGaussian, Tensor, PosteriorDraws]) -> None:
    model, x, reference = exact
    found = compare(model.guide, reference, x, model=model.model)
    torch.testing.assert_close(found.guide_log_ratio, -model.log_marginal(x), atol=1e-8, rtol=0)
    torch.testing.assert_close(found.reference_log_ratio, -model.log_marginal(x), atol=1e-8, rtol=0)
    assert found.divergence.abs().max() < 1e-8
    assert bool((found.k_hat == -math.inf).all())
    site = found.sites["z"]
    assert ((site.moments.mean_error / site.moments.mean_error_se).abs() < 4.5).all()
    assert (((site.moments.sd_ratio - 1) / site.moments.sd_ratio_se).abs() < 4.5).all()
    assert ((site.wasserstein.value / site.wasserstein.null) < 3).all()
    assert ((site.c2st - 0.5).abs() < 4.5 * site.c2st_se).all()
    assert found.reference_seconds == 2.5
    assert found.guide_seconds > 0


def test_divergences_of_a_mean_field_guide_are_those_of_two_normals(
    exact: tuple[LinearGaussian, Tensor, PosteriorDraws],
) -> None:
    model, x, reference = exact
    mean_field, posterior = model.mean_field_posterior(x), model.posterior(x)["z"]

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.mean_field_posterior(x))

    found = compare(guide, reference, x, model=model.model, num_samples=4000)
    q = MultivariateNormal(mean_field.mean, torch.diag_embed(mean_field.variance))
    p = MultivariateNormal(posterior.mean, posterior.covariance_matrix)
    log_p = model.log_marginal(x)
    error = found.divergence_se
    assert ((found.guide_log_ratio + log_p - kl_divergence(q, p)).abs() < 4.5 * error).all()
    assert ((found.guide_log_ratio + log_p - model.approximation_gap()).abs() < 4.5 * error).all()
    assert ((found.reference_log_ratio + log_p + kl_divergence(p, q)).abs() < 4.5 * error).all()
    assert ((found.divergence - kl_divergence(q, p) - kl_divergence(p, q)).abs() < 4.5 * error).all()
    moments = found.sites["z"].moments
    assert ((moments.sd_ratio - q.stddev / p.stddev).abs() < 4.5 * moments.sd_ratio_se).all()
    assert (moments.mean_error.abs() < 4.5 * moments.mean_error_se).all()
    assert found.k_hat.median() > 0.7
    assert (found.sites["z"].c2st > 0.6).all()


def halves(x: Tensor) -> None:
    """Give each row the posterior N(x / 2, 1 / 2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_errors_of_divergences_are_their_spread_over_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 rows: the variance of a standard score has standard deviation 0.045, and estimated ESS widens it a little."""
    monkeypatch.setattr(comparison, "classify", lambda *draws: (math.nan, math.nan))  # nearly all of the time
    x, shift, ratio = torch.linspace(-3.0, 3.0, 1000, dtype=torch.float64), 0.3, 0.8
    noise = torch.randn(4, 250, 1000, dtype=torch.float64)
    for step in range(1, 250):  # chains as they are: autocorrelated
        noise[:, step] = 0.6 * noise[:, step - 1] + 0.8 * noise[:, step]

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.5**0.5 * shift, 0.5**0.5 * ratio))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = as_chains(LogDensity(halves, x), {"z": x / 2 + 0.5**0.5 * noise})
        found = compare(guide, reference, x, model=halves, num_samples=300)
    exact = (ratio**2 + ratio**-2 - 2) / 2 + shift**2 * (1 + ratio**-2) / 2
    score = (found.divergence - exact) / found.divergence_se
    assert abs(score.mean()) < 0.15
    assert 0.8 < score.var() < 1.25


def test_a_whole_model_is_one_row() -> None:
    model, x = NormalNormal.fixture()
    density = LogDensity(model.model, x, data_plate=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = {name: [] for name in ("g", "z")}
        for _ in range(400):
            trace = pyro.poutine.trace(model.guide).get_trace(x)  # the exact joint posterior
            for name, values in draws.items():
                values.append(trace.nodes[name]["value"].detach())
    samples = {name: torch.stack(values).unflatten(0, (4, 100)) for name, values in draws.items()}
    reference = as_chains(density, samples, is_joint=True)
    found = compare(model.guide, reference, x, model=model.model, data_plate=None)
    torch.testing.assert_close(found.guide_log_ratio, -model.log_marginal(x)[None], atol=1e-8, rtol=0)
    assert found.guide_samples["g"].shape == (1000,)
    assert found.guide_samples["z"].shape == (1000, len(x))
    assert found.sites["z"].moments.mean_error.shape == (1, len(x))


def test_globals_are_those_that_the_chains_were_given() -> None:
    model, x = NormalNormal.fixture()
    given = {"g": torch.tensor(1.5, dtype=torch.float64)}
    precision = model.local_scale**-2 + model.noise_scale**-2

    def mean(g: Tensor, x: Tensor) -> Tensor:
        return (g * model.local_scale**-2 + x * model.noise_scale**-2) / precision

    def guide(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean(g, x), precision**-0.5))

    draws = dist.Normal(mean(given["g"], x), precision**-0.5).sample((4, 100))
    reference = as_chains(LogDensity(model.model, x, given=given), {"z": draws})
    found = compare(guide, reference, x, model=model.model, given=given)
    assert found.divergence.abs().max() < 1e-8
    with pytest.raises(DataError, match="must be of these data"):
        compare(guide, reference, x, model=model.model, given={"g": given["g"] + 1})


# Tables and pictures


def test_flagged_rows_are_counted_and_left_out_of_means(exact: tuple[LinearGaussian, Tensor, PosteriorDraws]) -> None:
    model, x, reference = exact
    sound = compare(model.guide, reference, x, model=model.model)
    wild = reference.samples["z"].clone()
    wild[:4, :, 2] += 30.0  # half of the chains of row 2 are elsewhere
    flagged = as_chains(LogDensity(model.model, x), {"z": wild})
    found = compare(model.guide, flagged, x, model=model.model)
    assert found.reference.status[2] is Status.UNRELIABLE
    keep = torch.tensor([0, 1, 3, 4, 5])
    expected = sound.sites["z"].moments.mean_error[keep].square().mean().sqrt().item()
    still = replace(found, reference=replace(flagged, status=(*[Status.OK] * 2, Status.UNRELIABLE, *[Status.OK] * 3)))
    assert still.summary().loc["z", "mean_error"] == pytest.approx(expected, rel=1e-10)
    assert still.num_flagged == 1
    for text in (repr(still), still._repr_html_()):
        assert "1 with unreliable chains left out" in text
        assert "KL(q, p) + KL(p, q): mean" in text
        assert "rows furthest apart:" in text
        assert f"{still.summary().loc['z', 'mean_error']:.3f}" in text
    assert still._repr_html_().count("<table") == 2
    assert plot_comparison(still).axes[0].get_title(loc="left").endswith("; 1 row with unreliable chains left out")
    assert still.worst_rows(6)[-1] == 2
    table = found.to_pandas()
    assert len(table) == 6
    assert table.loc[(2, "z"), "mean_error"] < -0.5
    assert table.loc[(2, "z"), "reference"] == "unreliable"
    assert table.loc[(0, "z"), "divergence"] == pytest.approx(found.divergence[0].item())


def test_nothing_is_pooled_where_every_row_is_flagged(exact: tuple[LinearGaussian, Tensor, PosteriorDraws]) -> None:
    model, x, reference = exact
    found = compare(model.guide, replace(reference, status=(Status.UNRELIABLE,) * 6), x, model=model.model)
    assert found.summary().isna().all(axis=None)
    for text in (repr(found), found._repr_html_()):
        assert "6 with unreliable chains" in text
        assert "KL(q, p)" not in text


def test_what_a_support_holds_fixed_leaves_no_hole_in_tables() -> None:
    """A Cholesky factor of a correlation matrix; its first correlation has variance 1 / (2 a + 1), a = concentration + 1/2."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("factor", dist.LKJCholesky(3, 2.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("factor", dist.LKJCholesky(3, 8.0))

    x = torch.zeros(2)
    draws = dist.LKJCholesky(3, 2.0).sample((4, 250, 2))
    reference = replace(as_chains(LogDensity(model, x), {"factor": draws}), status=(Status.OK,) * 2)
    found = compare(guide, reference, x, model=model)
    ratio = found.sites["factor"].moments.sd_ratio
    assert ratio[:, 0].isnan().all()  # 1, 0, 0
    torch.testing.assert_close(ratio[:, 1, 0], torch.full((2,), (6 / 18) ** 0.5, dtype=torch.float64), rtol=0.1, atol=0)
    assert found.summary().notna().all(axis=None)
    assert found.to_pandas().notna().all(axis=None)


def test_the_worst_row_comes_first(exact: tuple[LinearGaussian, Tensor, PosteriorDraws]) -> None:
    model, x, reference = exact
    shift = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)

    def guide(x: Tensor) -> None:
        posterior = model.posterior(x)["z"]
        with pyro.plate("data", len(x)):
            moved = posterior.mean + shift[: len(x), None]
            pyro.sample("z", dist.MultivariateNormal(moved, posterior.covariance_matrix))

    found = compare(guide, reference, x, model=model.model)
    assert found.worst_rows(1) == (3,)
    figure = plot_comparison(found)
    assert [ax.get_ylabel() for ax in figure.axes][-1] == "k-hat"
    assert figure.axes[-1].get_xticklabels()[0].get_text() == "3"
    shown = figure.axes[4].lines[0].get_ydata()[0]
    assert shown == pytest.approx(found.divergence[3].item())


# Refused


def test_a_guide_that_knows_its_model_needs_none(exact: tuple[LinearGaussian, Tensor, PosteriorDraws]) -> None:
    model, x, reference = exact
    guide = AutoAmortizedNormal(model.model).double()
    guide.build(x)
    assert len(compare(guide.double(), reference, x)) == 6
    with pytest.raises(SettingError, match="model=model"):
        compare(model.guide, reference, x)


def _other_rows(reference: PosteriorDraws) -> PosteriorDraws:
    samples = {"z": reference.samples["z"][:, :, :5]}
    per_row = ("acceptance", "step_size", "num_divergent", "r_hat", "nested_r_hat", "ess", "status")
    return replace(
        reference,
        samples=samples,
        unconstrained=reference.unconstrained[:, :, :5],
        log_joint=reference.log_joint[..., :5],
        **{name: getattr(reference, name)[:5] for name in per_row},
    )


def _permuted(reference: PosteriorDraws) -> PosteriorDraws:
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    return replace(
        reference,
        samples={"z": reference.samples["z"][:, :, order]},
        unconstrained=reference.unconstrained[:, :, order],
        log_joint=reference.log_joint[..., order],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_rows, "expected 6 rows, got 5"),
        (_permuted, r"2 of 6 rows \(\[0, 1\]\)"),
        (lambda draws: replace(draws, samples={"w": draws.samples["z"]}), r"missing \['z'\], unknown \['w'\]"),
        (lambda draws: replace(draws, samples={"z": draws.samples["z"][..., :2]}), r"'z' must have shape.*6, 3"),
    ],
)
def test_reference_draws_of_something_else_are_refused(
    exact: tuple[LinearGaussian, Tensor, PosteriorDraws],
    change: Callable[[PosteriorDraws], PosteriorDraws],
    message: str,
) -> None:
    model, x, reference = exact
    with pytest.raises(DataError, match=message):
        compare(model.guide, change(reference), x, model=model.model)


def test_too_few_draws_are_counted(exact: tuple[LinearGaussian, Tensor, PosteriorDraws]) -> None:
    model, x, reference = exact
    with pytest.raises(SettingError, match=r"at least 100 draws.*Got 50 of the guide"):
        compare(model.guide, reference, x, model=model.model, num_samples=50)
    few = as_chains(LogDensity(model.model, x), {"z": reference.samples["z"][:, :5]})
    with pytest.raises(SettingError, match=r"Got 40 of the reference \(8 chains of 5\)"):
        compare(model.guide, few, x, model=model.model)


def test_a_guide_without_a_density_is_refused(exact: tuple[LinearGaussian, Tensor, PosteriorDraws]) -> None:
    model, x, reference = exact
    guide = AutoDelta(model.model)
    guide(x)
    with pytest.raises(GuideError, match="point"):
        compare(guide, reference, x)
