"""Ranks, and the test that they are uniform: against enumeration, closed forms and simulation."""

import itertools
import math

import numpy as np
import pytest
import torch
from arviz.stats.ecdf_utils import ecdf_confidence_band
from scipy import stats

from pyro_aevb.diagnostics.ranks import RankTest, rank_among
from pyro_aevb.errors import SettingError


def statistic(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    """Compute the smallest two-sided binomial tail of the counts below every point, row by row."""
    below = (ranks[..., None] < np.arange(1, num_draws + 1)).sum(-2)
    law = stats.binom(ranks.shape[-1], np.arange(1, num_draws + 1) / (num_draws + 1))
    return np.minimum(law.cdf(below), law.sf(below - 1)).min(-1)


def test_ranks_are_counts_of_draws_below():
    draws = torch.randn(50, 4, 3)
    truth = torch.randn(4, 3)
    ranks = rank_among(truth, draws, torch.rand(4, 3))
    for row, column in itertools.product(range(4), range(3)):
        expected = sum(draw < truth[row, column].item() for draw in draws[:, row, column].tolist())
        assert ranks[row, column] == expected


def test_ties_are_broken_evenly():
    draws = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0])[:, None].expand(5, 4000)
    ranks = rank_among(torch.ones(4000), draws, torch.rand(4000))
    counts = torch.bincount(ranks, minlength=6)
    assert counts[[0, 5]].tolist() == [0, 0]
    assert stats.chisquare(counts[1:5]).pvalue > 1e-3
    assert rank_among(torch.ones(1), draws[:, :1], torch.ones(1)) == 4  # a product of noise that was rounded up


@pytest.mark.parametrize(("num_simulations", "num_draws"), [(1, 3), (4, 3), (5, 2), (6, 1)])
def test_p_values_are_those_of_all_ranks_enumerated(num_simulations, num_draws):
    every = np.array(list(itertools.product(range(num_draws + 1), repeat=num_simulations)))
    extremes = statistic(every, num_draws)
    test = RankTest(num_simulations, num_draws)
    for ranks, own in list(zip(every, extremes, strict=True))[:: max(1, len(every) // 40)]:
        exact = (extremes <= own * (1 + 1e-9)).mean()
        assert test.p_value(torch.from_numpy(ranks)) == pytest.approx(exact, abs=1e-12)


def test_tiny_p_values_are_exact():
    # N heads: two outcomes of 2^N are as extreme
    assert RankTest(900, 1).p_value(torch.zeros(900).long()) == pytest.approx(2 * 0.5**900, rel=1e-9)
    # all N below the first of L points: its own tail, and what little the others add
    p = RankTest(40, 9).p_value(torch.zeros(40).long())
    assert 1e-40 < p < 20 * 1e-40


@pytest.mark.parametrize(("num_simulations", "num_draws"), [(300, 20), (100, 400)])
def test_p_values_of_uniform_ranks_are_uniform(num_simulations, num_draws):
    test = RankTest(num_simulations, num_draws)
    p = np.array([test.p_value(ranks) for ranks in torch.randint(num_draws + 1, (1200, num_simulations))])
    for level in (0.05, 0.2, 0.5):
        error = 4 * math.sqrt(level * (1 - level) / len(p))
        # never above, and below by what steps of counts make
        assert level - 0.03 - error < (p <= level).mean() < level + error


def test_the_curve_leaves_the_band_where_p_says_so():
    test = RankTest(150, 30)
    low, high = test.band(0.8)
    found = set()
    for ranks in torch.randint(31, (300, 150)):
        curve = test.ecdf(ranks)
        is_outside = bool(((curve < low) | (curve > high)).any())
        assert is_outside == (test.p_value(ranks) <= 0.2)
        found.add(is_outside)
    assert found == {True, False}
    wide_low, wide_high = test.band(0.99)
    assert (wide_low <= low).all()
    assert (wide_high >= high).all()


@pytest.mark.parametrize(("num_simulations", "num_draws"), [(200, 50), (500, 20)])
def test_bands_are_those_of_arviz(num_simulations, num_draws):
    test = RankTest(num_simulations, num_draws)
    theirs = ecdf_confidence_band(num_simulations, test.levels, test.levels, prob=0.9, method="optimized")
    for own, other in zip(test.band(0.9), theirs, strict=True):
        # theirs has the nearest probability, ours at least the one asked for: a step of one count here and there
        assert np.abs(own - other).max() < 1.5 / num_simulations
        assert (np.abs(own - other) > 1e-9).mean() <= 0.2


def test_the_curve_counts_ranks_below_its_points():
    test = RankTest(4, 4)
    assert test.levels.tolist() == [0.2, 0.4, 0.6, 0.8]
    assert test.ecdf(torch.tensor([0, 0, 3, 4])).tolist() == [0.5, 0.5, 0.5, 0.75]
    assert len(RankTest(10, 5000).levels) == 100


def test_what_is_no_rank_or_no_probability_is_refused():
    test = RankTest(3, 10)
    for ranks in ([0, 1], [0, 1, 11], [-1, 0, 1]):
        with pytest.raises(SettingError, match="Expected 3 ranks between 0 and 10"):
            test.p_value(torch.tensor(ranks))
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(SettingError, match="between 0 and 1"):
            test.band(level)
