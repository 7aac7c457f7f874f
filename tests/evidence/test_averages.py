"""Averages over draws of the globals: closed forms, coverage, and what becomes of each diagnostic."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from pyro_aevb.errors import SettingError
from pyro_aevb.evidence.averages import average_over_globals, from_log_weights, joint_evidence
from pyro_aevb.evidence.result import Bound, LogMarginal, Status


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def given_one_draw(values, errors=0.01, **entries):
    """What an estimator returns for rows under one draw of the globals."""
    value = torch.as_tensor(values, dtype=torch.float64)
    filled = {
        "standard_error": torch.full_like(value, errors),
        "lower": value,
        "upper": value + 0.1,
        "k_hat": torch.full_like(value, math.nan),
        "ess": torch.full_like(value, 10.0),
        "status": (Status.OK,) * len(value),
        "bound": Bound.LOWER,
        "upper_kind": "reciprocal",
    }
    return LogMarginal(value=value, method="ais", num_samples=16, **(filled | entries))


class TestRows:
    def test_it_is_the_log_of_the_mean(self):
        values = normal(7, 5) * 3 - 100
        result = average_over_globals([given_one_draw(value) for value in values])
        assert np.allclose(result.value, np.log(np.exp(values.numpy() + 100).mean(0)) - 100, rtol=0, atol=1e-12)
        assert result.num_global_samples == 7
        assert torch.equal(result.lower, result.value)

    def test_the_error_is_that_of_a_mean_of_so_many_terms(self):
        values = normal(30, 4)
        result = average_over_globals([given_one_draw(value) for value in values])
        weights = np.exp(values.numpy())
        expected = weights.std(0, ddof=1) / math.sqrt(30) / weights.mean(0)
        assert np.allclose(result.standard_error, expected, rtol=1e-12)
        assert result.degrees_of_freedom == 29

    def test_it_agrees_with_the_weights_taken_together(self):
        log_weights = normal(6, 1, 3) + 0.3 * normal(6, 400, 3, seed=1)
        whole = from_log_weights(log_weights)
        parts = average_over_globals([from_log_weights(part[None]) for part in log_weights])
        for name in ("value", "standard_error", "lower", "ess"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
        assert parts.degrees_of_freedom == whole.degrees_of_freedom == 5

    def test_one_draw_is_left_as_it_is(self):
        result = given_one_draw([1.0, 2.0])
        assert average_over_globals([result]) is result

    def test_no_draw_is_an_error(self):
        with pytest.raises(SettingError, match="at least one draw"):
            average_over_globals([])

    def test_an_upper_bound_is_none_after_averaging(self):
        results = [given_one_draw([0.0], bound=Bound.UPPER), given_one_draw([0.1], bound=Bound.UPPER)]
        result = average_over_globals(results)
        assert (result.bound, result.upper_kind) == (Bound.ESTIMATE, "none")
        assert result.upper.isnan().all()

    def test_diagnostics_are_the_worst_or_the_mean(self):
        def entry(value):
            return torch.tensor([value], dtype=torch.float64)

        results = [
            given_one_draw([0.0], acceptance=entry(a), r_hat=entry(r), num_divergent=entry(d), change=entry(c))
            for a, r, d, c in ((0.6, 1.001, 2.0, 0.001), (0.7, 1.005, 3.0, 0.004))
        ]
        result = average_over_globals(results)
        assert result.acceptance.item() == pytest.approx(0.65)
        assert (result.r_hat.item(), result.num_divergent.item(), result.change.item()) == (1.005, 5.0, 0.004)
        assert average_over_globals([given_one_draw([0.0])] * 2).acceptance is None

    @pytest.mark.parametrize(("num_bad", "verdict"), [(0, "ok"), (1, "ok"), (3, "unreliable")])
    def test_draws_that_are_unreliable_make_the_row_so(self, num_bad, verdict):
        bad = given_one_draw([0.0], status=(Status.UNRELIABLE,))
        results = [bad] * num_bad + [given_one_draw([0.0])] * (20 - num_bad)
        assert average_over_globals(results).status == (verdict,)

    def test_draws_whose_own_error_is_large_do_not(self):
        noisy = given_one_draw([0.0], errors=0.9, status=(Status.UNRELIABLE,))
        assert average_over_globals([noisy] * 100).status == ("ok",)

    def test_a_row_of_zeros_is_unreliable_and_harms_no_other(self):
        results = [given_one_draw([-math.inf, value]) for value in (0.0, 0.1)]
        result = average_over_globals(results)
        assert result.value[0] == -math.inf
        assert result.status[0] == "unreliable"
        alone = average_over_globals([given_one_draw([value]) for value in (0.0, 0.1)])
        assert (result.value[1], result.status[1]) == (alone.value[0], alone.status[0])


class TestJoint:
    def test_it_is_the_log_of_a_mean_of_products(self):
        log_global, values = normal(5), normal(5, 3, seed=1)
        joint = joint_evidence(log_global, values, torch.zeros(3), is_unbiased=True)
        weights = np.exp(log_global.numpy()) * np.exp(values.numpy()).prod(1)
        assert joint.value == pytest.approx(math.log(weights.mean()))
        assert joint.standard_error == pytest.approx(weights.std(ddof=1) / math.sqrt(5) / weights.mean())
        assert joint.ess == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
        assert (joint.bound, joint.num_global_samples, joint.degrees_of_freedom) == (Bound.LOWER, 5, 4)

    def test_one_draw_has_the_rows_errors(self):
        errors = torch.tensor([0.1, 0.2, 0.05])
        joint = joint_evidence(torch.tensor([-1.0]), torch.ones(1, 3), errors, is_unbiased=False)
        assert joint.value == pytest.approx(2.0)
        assert joint.standard_error == pytest.approx(math.sqrt(0.01 + 0.04 + 0.0025))
        assert joint.bound is Bound.ESTIMATE
        assert "one draw" in joint.label
        assert joint.degrees_of_freedom is None

    def test_its_interval_covers_as_often_as_it_says(self):
        # weights exp(s e - s^2 / 2) have mean one: the truth is 0; 1,000 repetitions of 20 draws, two standard errors of a share
        log_weights = 0.2 * normal(1000, 20, seed=3) - 0.02
        low, high = np.array(
            [joint_evidence(w, torch.zeros(20, 1), torch.zeros(1), is_unbiased=True).interval(0.9) for w in log_weights]
        ).T
        share = ((low <= 0) & (high >= 0)).mean()
        assert abs(share - 0.9) < 3 * math.sqrt(0.9 * 0.1 / 1000)

    def test_many_draws_with_a_heavy_tail_are_flagged(self):
        joint = joint_evidence(3 * normal(500), torch.zeros(500, 1), torch.zeros(1), is_unbiased=True)
        assert joint.k_hat > 0.7
        assert (math.isnan(joint.standard_error), joint.status) == (True, Status.UNRELIABLE)

    def test_it_is_told_in_words(self):
        text = str(joint_evidence(torch.zeros(8), torch.zeros(8, 2), torch.zeros(2), is_unbiased=True))
        for part in ("joint log evidence 0.0000", "stochastic lower bound", "8 draws of the globals", "ok"):
            assert part in text


class TestInterval:
    def test_quantiles_are_scipys(self):
        result = given_one_draw([1.0, 2.0], errors=0.3)
        low, high = result.interval(0.9)
        width = 0.3 * scipy.stats.norm.ppf(0.95)
        assert torch.allclose(high - result.value, torch.full((2,), width, dtype=torch.float64))
        assert torch.allclose(result.value - low, high - result.value)
        few_low, few_high = replace(result, degrees_of_freedom=15).interval()
        assert (few_high - few_low)[0].item() == pytest.approx(2 * 0.3 * scipy.stats.t.ppf(0.975, 15))

    @pytest.mark.parametrize("level", [0.0, 1.0, 95.0, math.nan])
    def test_a_level_is_a_probability(self, level):
        with pytest.raises(SettingError, match="between 0 and 1"):
            given_one_draw([0.0]).interval(level)
