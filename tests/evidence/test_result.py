"""LogMarginal: values and errors from weights with a known mean, rules of trust, joining, summaries."""

import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from pyro_aevb.errors import DataError, NonFiniteError, SettingError, UnreliableWarning
from pyro_aevb.evidence.averages import average_over_globals, from_log_weights
from pyro_aevb.evidence.pareto import pareto_k_hat
from pyro_aevb.evidence.result import Bound, LogMarginal, Status, concatenate


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_normal(*shape, scale, seed=0):
    """Log weights with mean weight one."""
    return normal(*shape, seed=seed) * scale - 0.5 * scale**2


def clustered(num_particles, num_samples, num_rows, *, between, within, seed=0):
    """Log weights with mean weight one that share a factor inside a particle, as weights share a draw of the globals."""
    shared = log_normal(num_particles, 1, num_rows, scale=between, seed=seed)
    return shared + log_normal(num_particles, num_samples, num_rows, scale=within, seed=seed + 1)


def result_of(value, standard_error, status, **settings):
    """A result with given entries."""
    value, error = torch.tensor(value).double(), torch.tensor(standard_error).double()
    unknown = torch.full_like(value, math.nan)
    return LogMarginal(
        value=value,
        standard_error=error,
        lower=value,
        upper=unknown,
        k_hat=unknown,
        ess=unknown,
        status=tuple(map(Status, status)),
        method="importance",
        num_samples=100,
        bound=Bound.LOWER,
        **settings,
    )


# --- from_log_weights: the numbers ---


@pytest.mark.parametrize("shape", [(1, 300, 4), (5, 60, 4), (7, 1, 4)])
def test_entries_equal_plain_numpy(shape):
    log_weights = log_normal(*shape, scale=0.6) + 3.0
    result = from_log_weights(log_weights)
    for row in range(shape[2]):
        weights = np.exp(log_weights[:, :, row].numpy())
        means = weights.mean(1)
        if shape[0] == 1:
            ess = weights.sum() ** 2 / (weights**2).sum()
            error = math.sqrt(1 / ess - 1 / shape[1])
        else:
            error = means.std(ddof=1) / math.sqrt(shape[0]) / means.mean()
        assert result.value[row].item() == pytest.approx(math.log(weights.mean()), rel=1e-12)
        assert result.standard_error[row].item() == pytest.approx(error, rel=1e-9)
        assert result.ess[row].item() == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-9)
    assert result.lower.tolist() == result.value.tolist()
    assert result.upper.isnan().all()
    torch.testing.assert_close(result.k_hat, pareto_k_hat(log_weights.flatten(0, 1)), equal_nan=True)
    assert (result.bound, result.upper_kind, result.num_samples) == ("lower", "none", shape[1])
    assert result.num_global_samples == shape[0]


@pytest.mark.parametrize("offset", [-1e5, 1e5])
def test_weights_far_from_one_neither_overflow_nor_lose_digits(offset):
    log_weights = log_normal(1, 500, 3, scale=0.5)
    near, far = from_log_weights(log_weights), from_log_weights(log_weights + offset)
    torch.testing.assert_close(far.value - offset, near.value, rtol=0, atol=1e-9)
    torch.testing.assert_close(far.standard_error, near.standard_error, rtol=1e-8, atol=0)


def test_float32_weights_are_accumulated_in_float64():
    log_weights = (log_normal(1, 5000, 3, scale=0.5) - 100).float()
    result = from_log_weights(log_weights)
    assert result.value.dtype == result.standard_error.dtype == torch.float64
    torch.testing.assert_close(result.value, from_log_weights(log_weights.double()).value, rtol=0, atol=1e-12)


def test_two_standard_errors_cover_a_known_mean():
    """Log-normal weights with mean one: |value - 0| <= 2 SE in 95 % of rows, and the value is low by SE^2 / 2."""
    result = from_log_weights(log_normal(1, 1000, 4000, scale=0.8))
    covered = (result.value.abs() <= 2 * result.standard_error).double().mean().item()
    assert covered == pytest.approx(0.954, abs=4 * math.sqrt(0.954 * 0.046 / 4000))
    standardised = result.value / result.standard_error
    assert standardised.std().item() == pytest.approx(1.0, abs=0.05)


def test_value_is_a_lower_bound_in_expectation():
    """With K = 20 the value is low on average, by about half its variance, and seldom far above the truth (Markov)."""
    value = from_log_weights(log_normal(1, 20, 20_000, scale=0.8)).value
    variance = math.expm1(0.8**2) / 20
    assert value.mean().item() == pytest.approx(-variance / 2, abs=0.1 * variance)
    assert value.mean().item() < -5 * value.std().item() / math.sqrt(20_000)
    assert (value > 0.5).double().mean().item() < math.exp(-0.5)


def test_standard_error_counts_particles_not_weights():
    """Weights of one particle share a draw of the globals: 50 particles of 40 weights are 50 draws, not 2,000."""
    log_weights = clustered(50, 40, 3000, between=0.5, within=0.3)
    result = from_log_weights(log_weights)
    spread = result.value.std().item()
    assert result.is_flagged.double().mean().item() < 0.005
    assert result.standard_error.nanmean().item() == pytest.approx(spread, rel=0.05)
    covered = (result.value.abs() <= 2.01 * result.standard_error).double().mean().item()  # Student-t, 49 dof: 95 %
    assert covered == pytest.approx(0.95, abs=0.02)
    naive = from_log_weights(log_weights.flatten(0, 1)[None]).standard_error.nanmean().item()
    assert naive < 0.3 * spread


def test_two_particles_use_the_unbiased_variance():
    log_weights = torch.tensor([1.0, 3.0]).log()[:, None, None].expand(2, 10, 1)
    assert from_log_weights(log_weights).standard_error.item() == pytest.approx(0.5, rel=1e-6)  # sqrt(2/2) / 2


def test_exact_guide_gives_the_closed_form_without_error():
    """q = the posterior: log w = log p(x) for every draw (float64), at any number of samples from two."""
    x, one = normal(6), torch.ones((), dtype=torch.float64)
    exact = Normal(0.0, one * math.sqrt(1.25)).log_prob(x)
    posterior = Normal(0.8 * x, one * math.sqrt(0.2))  # z ~ N(0, 1), x ~ N(z, 0.5)
    for num_samples in (2, 99, 5000):
        z = posterior.mean + posterior.stddev * normal(1, num_samples, 6, seed=1)
        log_weights = Normal(0.0, one).log_prob(z) + Normal(z, one / 2).log_prob(x) - posterior.log_prob(z)
        result = from_log_weights(log_weights)
        torch.testing.assert_close(result.value, exact, rtol=0, atol=1e-12)
        assert (result.standard_error < 1e-14).all()
        assert set(result.status) == {"ok"}
        assert (result.k_hat == -math.inf).all() if num_samples >= 100 else result.k_hat.isnan().all()


# --- from_log_weights: the verdict ---


def test_best_mean_field_guide_is_flagged():
    """Probabilistic PCA with its best factorised guide has k = 0.924: at least 80 % of rows must be flagged."""
    i, j = torch.arange(1.0, 7, dtype=torch.float64)[:, None], torch.arange(1.0, 4, dtype=torch.float64)
    loading = torch.sin(i + 2 * j)
    precision = torch.eye(3, dtype=torch.float64) + loading.T @ loading / 0.25
    sd = precision.diagonal().rsqrt()
    noise = normal(5000, 200, 3)
    log_posterior = MultivariateNormal(torch.zeros(3).double(), precision_matrix=precision).log_prob(noise * sd)
    log_weights = log_posterior - Normal(0.0, sd).log_prob(noise * sd).sum(-1)
    result = from_log_weights(log_weights[None])
    assert result.is_flagged.double().mean().item() >= 0.8
    assert result.k_hat.median().item() == pytest.approx(0.83, abs=0.05)


def test_status_follows_k_hat():
    """Pareto weights of shape k: the fit orders them, and above 0.7 the standard error is void."""
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    shape = torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64)
    result = from_log_weights((-uniform.log()[:, None] * shape)[None])
    assert result.status == ("ok", "warn", "unreliable")
    assert result.standard_error.isnan().tolist() == [False, False, True]
    assert result.value.isfinite().all()


def test_status_follows_the_standard_error_where_there_is_no_k_hat():
    scale = torch.tensor([0.5, 2.0, 4.0, 30.0], dtype=torch.float64)
    result = from_log_weights((torch.linspace(-2, 2, 50).double()[:, None] * scale)[None])
    assert result.k_hat.isnan().all()
    expected = ["ok" if e <= 0.25 else "warn" if e <= 0.5 else "unreliable" for e in result.standard_error.tolist()]
    assert list(result.status) == expected
    assert set(expected) == set(Status)


@pytest.mark.parametrize("shape", [(1, 200), (1, 20), (5, 40), (5, 1), (1, 2)])
def test_constant_weights_are_exact(shape):
    result = from_log_weights(torch.full((*shape, 1), -12.25))
    assert (result.value.item(), result.standard_error.item(), result.status) == (-12.25, 0.0, ("ok",))
    assert result.ess.item() == pytest.approx(shape[0] * shape[1])


@pytest.mark.parametrize("shape", [(1, 200), (1, 20), (5, 40), (1, 1)])
def test_zero_weights_are_unreliable_and_harm_no_other_row(shape):
    log_weights = log_normal(*shape, 2, scale=0.1)
    alone = from_log_weights(log_weights[:, :, 1:])
    log_weights[:, :, 0] = -math.inf
    result = from_log_weights(log_weights)
    assert (result.value[0].item(), result.ess[0].item(), result.status[0]) == (-math.inf, 0.0, "unreliable")
    assert result.standard_error[0].isnan()
    assert result.value[1].item() == alone.value.item()
    assert result.status[1] == alone.status[0]


def test_some_zero_weights_count_as_samples():
    log_weights = torch.zeros(1, 1000, 1)
    log_weights[:, ::2] = -math.inf
    result = from_log_weights(log_weights)
    assert result.value.item() == pytest.approx(math.log(0.5))
    assert result.standard_error.item() == pytest.approx(math.sqrt(1 / 500 - 1 / 1000), rel=1e-9)
    assert result.status == ("ok",)


def test_one_weight_has_no_error():
    result = from_log_weights(torch.tensor([[[-3.0]]]))
    assert result.value.item() == -3.0
    assert result.standard_error.isnan().all()
    assert result.status == ("unreliable",)


@pytest.mark.parametrize("num_samples", [20, 200])
def test_nan_weights_are_an_error(num_samples):
    log_weights = torch.zeros(1, num_samples, 3)
    log_weights[0, 5, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"rows \[1\]"):
        from_log_weights(log_weights)


@pytest.mark.parametrize("shape", [(0, 5, 2), (1, 0, 2), (1, 5, 0)])
def test_no_weights_are_an_error(shape):
    with pytest.raises(DataError, match="at least one"):
        from_log_weights(torch.zeros(shape))


def test_gradients_are_not_recorded():
    result = from_log_weights(torch.zeros(1, 10, 2, requires_grad=True))
    assert not result.value.requires_grad


# --- chunks ---


def test_chunks_of_rows_join_to_the_whole():
    log_weights = clustered(4, 50, 10, between=0.2, within=1.0)
    whole = from_log_weights(log_weights, label="log predictive under q(globals)")
    chunks = [from_log_weights(part, label=whole.label) for part in log_weights.split(3, dim=2)]
    joined = concatenate(chunks)
    for name, entry in vars(whole).items():
        if isinstance(entry, torch.Tensor):
            torch.testing.assert_close(getattr(joined, name), entry, rtol=0, atol=1e-12, equal_nan=True)
        else:
            assert getattr(joined, name) == entry


def test_chunks_of_different_methods_do_not_join():
    with pytest.raises(SettingError, match="at least one"):
        concatenate([])
    with pytest.raises(SettingError, match=r"num_samples = \[10, 20\]"):
        concatenate([from_log_weights(torch.zeros(1, k, 1)) for k in (10, 20)])


def test_rows_that_do_not_match_are_an_error():
    result = result_of([0.0, 1.0], [0.1, 0.1], ["ok", "ok"])
    with pytest.raises(DataError, match="'status': 3"):
        replace(result, status=(Status.OK,) * 3)


def test_entries_that_only_some_methods_know_are_joined_and_tabulated_where_they_are_filled():
    plain = result_of([0.0, 1.0], [0.1, 0.1], ["ok", "ok"])
    chains = replace(plain, acceptance=torch.tensor([0.6, 0.7], dtype=torch.float64))
    assert chains.to_pandas()["acceptance"].tolist() == [0.6, 0.7]
    assert "acceptance" not in plain.to_pandas()
    assert concatenate([chains, chains]).acceptance.tolist() == [0.6, 0.7, 0.6, 0.7]
    mixed = concatenate([plain, chains]).acceptance.tolist()
    assert np.array_equal(mixed, [math.nan, math.nan, 0.6, 0.7], equal_nan=True)
    assert concatenate([plain, plain]).acceptance is None


# --- summaries ---


def test_summary_keeps_the_two_errors_apart():
    result = result_of([-3.0, -1.0, -2.0, -6.0], [0.1, 0.2, 0.2, 0.4], ["ok", "warn", "ok", "unreliable"])
    summary = result.summary()
    assert summary.mean == -3.0
    assert summary.monte_carlo_se == pytest.approx(math.sqrt(0.01 + 0.04 + 0.04 + 0.16) / 4)
    assert summary.data_se == pytest.approx(np.std([-3, -1, -2, -6], ddof=1) / 2)
    assert (summary.num_rows, summary.num_void, summary.num_warned, summary.num_flagged) == (4, 0, 1, 1)
    assert (summary.fraction_warned, summary.fraction_flagged) == (0.25, 0.25)
    assert summary.unflagged_mean == -2.0
    assert summary.unflagged_monte_carlo_se == pytest.approx(0.1)
    assert summary.worst == (3,)
    assert result.is_flagged.tolist() == [False, False, False, True]


def test_summary_does_not_hide_a_void_error():
    summary = result_of([0.0, 1.0], [0.1, math.nan], ["ok", "unreliable"]).summary()
    assert math.isnan(summary.monte_carlo_se)
    assert summary.num_void == 1
    assert summary.unflagged_monte_carlo_se == pytest.approx(0.1)


def test_summary_of_one_row_has_no_data_error():
    assert math.isnan(result_of([0.0], [0.1], ["ok"]).summary().data_se)


def test_summary_of_flagged_rows_only():
    summary = result_of([0.0, 1.0], [0.6, 0.7], ["unreliable", "unreliable"]).summary()
    assert math.isnan(summary.unflagged_mean)
    assert math.isnan(summary.unflagged_monte_carlo_se)


def test_worst_rows_come_by_status_then_error_then_k_hat():
    status = ["ok"] * 60
    status[7] = status[40] = status[9] = "unreliable"
    error = torch.full((60,), 0.1)
    error[7], error[40], error[9], error[12] = math.nan, 0.6, math.nan, 0.2
    result = result_of([0.0] * 60, error.tolist(), status)
    k_hat = torch.full((60,), 0.1).double()
    k_hat[7], k_hat[9], k_hat[40] = 0.8, 0.9, 0.95
    assert replace(result, k_hat=k_hat).summary().worst == (9, 7, 40)


def test_error_of_the_mean_with_shared_globals_is_not_too_small():
    """All rows share the particles' draws: their errors add up, and sqrt(sum se^2) / N would be far too small."""
    means, claimed, independent = [], [], []
    for seed in range(200):
        shared = log_normal(30, 1, 1, scale=0.5, seed=2 * seed)
        log_weights = shared + log_normal(30, 20, 25, scale=0.3, seed=2 * seed + 1)
        result = from_log_weights(log_weights)
        means.append(result.value.mean().item())
        claimed.append(result.summary().monte_carlo_se)
        independent.append(replace(result, num_global_samples=1).summary().monte_carlo_se)
    assert np.isnan(claimed).mean() < 0.05  # a row whose k-hat is too large by chance
    claimed, independent, spread = np.nanmean(claimed), np.nanmean(independent), np.std(means, ddof=1)
    assert independent < 0.4 * spread
    assert 0.85 * spread < claimed < 1.3 * spread


# --- for people ---


def test_table_has_a_line_a_row():
    result = from_log_weights(log_normal(1, 200, 3, scale=0.3))
    frame = result.to_pandas()
    assert list(frame.columns) == ["value", "standard_error", "lower", "upper", "k_hat", "ess", "status"]
    assert frame["value"].tolist() == result.value.tolist()
    assert frame["status"].tolist() == ["ok"] * 3
    assert frame.attrs["method"] == "importance"
    assert frame.attrs["bound"] == "lower"


def test_repr_tells_quantity_direction_error_and_trust_on_one_screen():
    log_weights = log_normal(1, 2000, 100, scale=0.3)
    log_weights[:, :, 17] *= 12
    text = repr(from_log_weights(log_weights))
    for part in ("log p(x)", "100 rows", "importance", "2000 samples", "lower bound", "nats", "Monte Carlo", "data SE"):
        assert part in text
    assert "1 unreliable (1.0%)" in text
    assert "without the unreliable rows" in text
    assert re.search(r"^17 .*unreliable$", text, re.MULTILINE)
    assert len(text.splitlines()) <= 24


def test_repr_tells_of_globals():
    text = repr(from_log_weights(torch.zeros(8, 50, 2), label="log predictive under q(globals)"))
    assert "log predictive under q(globals)" in text
    assert "8 draws of the globals" in text


def test_html_is_escaped_and_complete():
    page = from_log_weights(torch.zeros(1, 200, 2), label="log p(x | <g>)")._repr_html_()
    assert "log p(x | &lt;g&gt;)" in page
    assert "<table" in page
    assert "Monte Carlo" in page


def test_a_result_without_rows_can_be_looked_at():
    empty = result_of([], [], [])
    assert "0 rows" in repr(empty)
    assert "0 rows" in empty._repr_html_()
    with pytest.raises(DataError, match="at least one row"):
        empty.summary()


def test_unreliable_rows_warn_once_with_counts():
    result = result_of([0.0] * 4, [0.1] * 4, ["ok", "unreliable", "unreliable", "warn"])
    with pytest.warns(UnreliableWarning, match="2 of 4 rows are unreliable and 1 more doubtful") as record:
        result.warn_if_unreliable()
    assert len(record) == 1


def test_reliable_rows_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result_of([0.0, 0.0], [0.1, 0.1], ["ok", "warn"]).warn_if_unreliable()


def audited(num_audited, num_differing):
    """A chunk of an annealing run of which every other row is audited."""
    audit = torch.full((2 * num_audited,), math.nan).double()
    audit[::2] = 0.0
    audit[: 2 * num_differing : 2] = 1.0
    rows = len(audit)
    return replace(result_of([0.0] * rows, [0.1] * rows, ["ok"] * rows), method="ais", audit=audit)


@pytest.mark.parametrize(("counts", "told"), [([3, 0], True), ([1, 1], False), ([2, 0], False)])
def test_audits_are_pooled_over_chunks(counts, told):
    # 40 audited rows: two of them are a twentieth, and a chunk of 20 with two is nothing more
    result = concatenate([audited(20, count) for count in counts])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result.warn_if_unreliable()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == told
    assert all("differ by more than their errors in 3 of the 40 rows" in message for message in messages)


def test_one_audited_row_may_differ_by_chance():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audited(10, 1).warn_if_unreliable()
    with pytest.warns(UnreliableWarning, match="in 2 of the 10 rows"):
        audited(10, 2).warn_if_unreliable()


def test_audits_of_several_draws_of_the_globals_are_averaged():
    result = average_over_globals([audited(4, 1), audited(4, 0)])
    assert result.audit is not None
    assert result.audit[::2].tolist() == [0.5, 0.0, 0.0, 0.0]
    assert result.audit[1::2].isnan().all()
    assert "audit" not in result.to_pandas()
    assert "audit" not in result.to_pandas().attrs
