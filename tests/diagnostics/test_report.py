"""The report of trust: its three parts are those of their own functions, and what is asked of it reaches them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_aevb import AEVB, trust_report
from pyro_aevb.diagnostics import report as module
from pyro_aevb.errors import ModelError, SettingError
from pyro_aevb.mcmc.convergence import mean_ess
from pyro_aevb.testing import LinearGaussian

SHORT = {"num_chains": 8, "num_samples": 50, "warmup_steps": 40, "num_leapfrog": 4}
SUMS = {"method": "quadrature"}


@pytest.fixture(scope="module")
def exact():
    model, _ = LinearGaussian.fixture()
    return model


def rows_of(model, count):
    z = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    return z @ model.weight.T + model.bias + 0.5 * noise


def report(model, guide, *batch, **settings):
    return trust_report(
        model, guide, *batch, **{"sampling": SHORT, "evidence": SUMS, "seed": 0, "progress": False, **settings}
    )


def test_the_exact_guide_passes_all_three(exact):
    x = rows_of(exact, 3)
    found = report(exact.model, exact.guide, x)
    assert found.comparison.divergence.abs().max() < 1e-6
    assert found.gap.inference_gap.abs().max() < 0.05
    torch.testing.assert_close(found.gap.bound, exact.log_marginal(x), rtol=0, atol=1e-6)
    assert found.calibration.failures(1e-3) == ()
    assert found.against == "hmc"
    text = repr(found)
    parts = (found.comparison, found.gap, found.calibration)
    titles = ("Beside draws of hmc", "What the bound lacks", "On data from the model")
    assert text == "\n\n".join(f"{title}\n{part!r}" for title, part in zip(titles, parts, strict=True))
    page = found._repr_html_()
    assert page.count("<table") == 5
    assert all(f"<h4>{title}</h4>{part._repr_html_()}" in page for title, part in zip(titles, parts, strict=True))


def test_a_narrow_guide_fails_all_three(exact):
    def narrow(x):
        posterior = exact.posterior(x)["z"]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(posterior.loc, 0.49 * posterior.covariance_matrix))

    found = report(exact.model, narrow, rows_of(exact, 3), num_simulations=300)
    # KL(q, p) + KL(p, q) of N(0, .49 C) and N(0, C)
    divergence = 0.5 * 3 * (0.49 + 1 / 0.49 - 2)
    error = 5 * found.comparison.divergence_se.max()
    assert (found.comparison.divergence - divergence).abs().max() < error
    assert (found.comparison.sites["z"].moments.sd_ratio - 0.7).abs().max() < 0.15
    kl = 0.5 * 3 * (0.49 - 1 - torch.tensor(0.49).log())
    assert (found.gap.inference_gap - kl).abs().max() < 0.1
    assert "log p(x,z)" in found.calibration.failures(1e-6)


def test_parts_can_be_left_out(exact):
    found = report(exact.model, exact.guide, rows_of(exact, 2), ledger=False, num_simulations=0)
    assert (found.gap, found.calibration) == (None, None)
    for text in (repr(found), found._repr_html_()):
        assert "Beside draws of hmc" in text
        assert "What the bound lacks" not in text


@pytest.mark.slow
def test_nuts_is_the_other_standard(exact):
    settings = {"sampling": {"num_samples": 100, "warmup_steps": 60}, "ledger": False, "num_simulations": 0}
    found = report(exact.model, exact.guide, rows_of(exact, 1), against="nuts", **settings)
    draws = found.comparison.reference.samples["z"]
    assert draws.shape == (4, 100, 1, 3)
    posterior = exact.posterior(rows_of(exact, 1))["z"]
    sd = posterior.covariance_matrix[0].diagonal().sqrt()
    error = (draws[:, :, 0].mean((0, 1)) - posterior.loc[0]) / sd
    assert (error.abs() < 4.5 / mean_ess(draws[:, :, 0]).sqrt()).all()


@pytest.mark.slow
def test_globals_are_drawn_once_or_given():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(0.5, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((mu + x) / 2, 0.5**0.5))

    x = torch.tensor([0.0, 1.0, 3.0])
    for given in (None, {"mu": torch.tensor(-1.0)}):
        found = report(model, guide, x, given=given, ledger=False, num_simulations=0)
        assert found.comparison.divergence.abs().max() < 1e-4  # q(z | x, g) is exact at any g
    centre = found.comparison.reference.samples["z"].mean((0, 1))
    assert (centre - (x - 1) / 2).abs().max() < 0.2
    with pytest.raises(ModelError, match="nowhere"):
        report(model, guide, x, data_plate="nowhere")


@pytest.mark.parametrize(("against", "scale"), [pytest.param("hmc", 0.6, marks=pytest.mark.slow), ("nuts", 1.0)])
def test_a_whole_model_is_one_row(against, scale):
    """Rows share the effect m, whose posterior is N(sum x / (n + 1), 1 / (n + 1)); the guide's sd is that times a scale."""

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(x.sum() / (len(x) + 1), scale * (len(x) + 1) ** -0.5))

    x = torch.tensor([0.3, -1.0, 2.0, 0.7])
    short = SHORT if against == "hmc" else {"num_samples": 50, "warmup_steps": 40}
    evidence = {"method": "quadrature", "num_steps": 20, "num_draws": 1000}
    settings = {"sampling": short, "evidence": evidence, "num_simulations": 10, "data_plate": None}
    found = report(model, guide, x, against=against, **settings)
    assert found.comparison.guide_samples["m"].shape == (1000,)
    divergence = 0.5 * (scale**2 + scale**-2 - 2)
    assert abs(found.comparison.divergence - divergence) < 5 * found.comparison.divergence_se + 1e-5
    kl = scale**2 / 2 - 0.5 - math.log(scale)
    assert abs(found.gap.inference_gap - kl) < 5 * found.gap.inference_error + 1e-5
    assert len(found.calibration) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"against": "gibbs"}, r"against must be one of 'hmc', 'nuts', got 'gibbs'"),
        ({"sampling": {"num_sample": 3}}, "Did you mean 'num_samples'"),
        ({"sampling": {"seed": 3}}, r"settings \['seed'\], which are those of the whole report"),
        ({"sampling": {"num_samples": 3, "num_chains": 4}}, r"Got 12 of the reference \(4 chains of 3\)"),
        ({"sampling": {"num_samples": "many"}}, "num_samples must be an integer of at least 1, got 'many'"),
        ({"num_samples": 20}, r"Got 20 of the guide \(num_samples=20\)"),
        ({"simulations": 3}, "Did you mean 'num_simulations'"),
        ({"num_simulations": -1}, "num_simulations must be an integer of at least 1, got -1"),
        ({"evidence": {"presets": 3}, "num_simulations": 0}, "Did you mean 'preset'"),
    ],
)
def test_settings_are_checked(exact, settings, message):
    with pytest.raises(SettingError, match=message):
        report(exact.model, exact.guide, rows_of(exact, 1), **settings)


def test_rows_that_nuts_refuses_are_refused_before_anything_runs(exact, monkeypatch):
    """Of 60,000 rows, the other parts take minutes."""
    called = []
    for part in ("calibrate", "inference_gap", "nuts_posterior", "compare_posteriors"):
        monkeypatch.setattr(module, part, lambda *batch, part=part, **settings: called.append(part))
    vi = AEVB(exact.model, exact.guide)
    x = rows_of(exact, 2).repeat(30_000, 1)
    with pytest.raises(SettingError, match=r"60,000 rows.*4 chains of 1000 transitions.*hours.*max_rows=60000"):
        vi.compare(x, against="nuts", progress=False)
    small = {"max_rows": 1, "num_chains": 2, "num_samples": 100, "warmup_steps": 20}
    with pytest.raises(SettingError, match=r"2 rows, whose 2 chains of 120 transitions"):
        report(exact.model, exact.guide, x[:2], against="nuts", sampling=small)
    assert called == []


def test_what_nuts_costs_is_told_before_the_other_parts_run(exact, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(module, "calibrate", lambda *batch, **settings: told.append(capsys.readouterr().err))
    short = {"num_samples": 50, "warmup_steps": 20, "num_chains": 2}
    settings = {"sampling": short, "ledger": False, "progress": True}
    report(exact.model, exact.guide, rows_of(exact, 1), against="nuts", **settings)
    assert told[0].startswith("NUTS, about ")


@pytest.mark.slow
def test_the_wrapper_compares_with_its_own_parts(exact):
    vi = AEVB(exact.model, exact.guide)
    x = rows_of(exact, 2)
    settings = {"sampling": SHORT, "ledger": False, "num_simulations": 0, "seed": 0, "progress": False}
    found = vi.compare(x.numpy(), **settings)
    same = trust_report(exact.model, exact.guide, x, **settings)
    assert torch.equal(found.comparison.divergence, same.comparison.divergence)
    with pytest.raises(SettingError, match="Did you mean 'against'"):
        vi.compare(x, agains="nuts")
