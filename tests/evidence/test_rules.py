"""The rules of trust: each quantity at its limits, and what is not known."""

import math

import pytest
import torch

from pyro_aevb.evidence.rules import degrees_of_freedom, rate, void_error


def entry(*values):
    return torch.tensor(values, dtype=torch.float64)


GOOD = entry(0.1)


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("k_hat", 0.49, "ok"),
        ("k_hat", 0.51, "warn"),
        ("k_hat", 0.71, "unreliable"),
        ("k_hat", math.nan, "ok"),
        ("k_hat", -math.inf, "ok"),
        ("acceptance", 0.39, "unreliable"),
        ("acceptance", 0.41, "ok"),
        ("acceptance", 0.97, "ok"),
        ("acceptance", 0.985, "unreliable"),
        ("r_hat", 1.009, "ok"),
        ("r_hat", 1.011, "unreliable"),
        ("change", 0.009, "ok"),
        ("change", 0.011, "unreliable"),
    ],
)
def test_each_quantity_is_judged_at_its_limits(name, value, verdict):
    assert rate(GOOD, **{name: entry(value)}) == (verdict,)


def test_the_standard_error_is_judged_always():
    assert rate(entry(0.0, 0.24, 0.26, 0.49, 0.51, math.inf, math.nan)) == (
        "ok", "ok", "warn", "warn", "unreliable", "unreliable", "unreliable",
    )  # fmt: skip


def test_a_row_that_another_estimate_contradicts_is_unreliable():
    assert rate(entry(0.1, 0.1), is_refuted=torch.tensor([True, False])) == ("unreliable", "ok")


def test_one_bad_sign_is_enough():
    assert rate(GOOD, k_hat=entry(0.1), acceptance=entry(0.65), r_hat=entry(1.2)) == ("unreliable",)


def test_heavy_tails_void_the_error():
    error = void_error(entry(0.1, 0.1, 0.1), entry(0.6, 0.8, math.nan))
    assert error.isnan().tolist() == [False, True, False]


def test_few_terms_have_degrees_of_freedom():
    assert [degrees_of_freedom(count) for count in (1, 2, 16, 63, 64, 1000)] == [None, 1, 15, 62, None, None]
