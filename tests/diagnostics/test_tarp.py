"""Coverage with random points, against the paper's algorithm written out."""

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_aevb.diagnostics.tarp import TarpCoverage, scaled_distances


def test_coverage_is_that_of_the_algorithm_written_out():
    rng = np.random.default_rng(0)
    truth, draws, points = rng.normal(size=(60, 2)), 0.5 * rng.normal(size=(9, 60, 2)), rng.normal(size=(60, 2))
    credibility = []
    for row in range(60):
        radius = np.hypot(*(truth[row] - points[row]))
        credibility.append(np.mean([np.hypot(*(draw - points[row])) < radius for draw in draws[:, row]]))
    every = torch.from_numpy(np.concatenate((truth[None], draws)))
    distances = scaled_distances(every, torch.from_numpy(points), torch.ones(2, dtype=torch.float64))
    coverage = TarpCoverage((distances[1:] < distances[0]).sum(0), 9)
    for level, share in zip(coverage.levels, coverage.coverage, strict=True):
        # 9 draws: a credibility of r / 9 lies below i / 10 if r < i
        assert share == pytest.approx(np.mean([round(9 * own) < round(10 * level) for own in credibility]))


def test_distances_are_in_units_of_each_coordinate():
    points, references = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[0.0, 8.0]])
    assert scaled_distances(points, references, torch.tensor([1.0, 2.0])).item() == pytest.approx(5.0)


def test_the_area_is_the_integral_and_its_error_that_of_chance():
    ranks = torch.randint(101, (2000, 40))
    levels = np.linspace(0.5, 1.0, 20_001)
    credibility = (ranks[0].numpy() + 0.5) / 101
    curve = (credibility[:, None] < levels).mean(0)
    assert TarpCoverage(ranks[0], 100).area == pytest.approx(np.trapezoid(curve - levels, levels), abs=1e-4)
    areas = [TarpCoverage(each, 100).area for each in ranks]
    error = TarpCoverage(ranks[0], 100).standard_error
    assert np.std(areas) == pytest.approx(error, rel=4 / np.sqrt(2 * 2000) * 1.5)
    assert abs(np.mean(areas)) < 4 * error / np.sqrt(2000)


@pytest.mark.parametrize(("scale", "sign"), [(0.5, -1), (2.0, 1)])
def test_the_sign_tells_regions_too_small_from_too_large(scale, sign):
    # far points see one dimension: ranks of a normal among draws of another width
    share = torch.from_numpy(stats.norm.cdf(stats.norm.ppf(torch.linspace(0.001, 0.999, 500)) / scale))
    coverage = TarpCoverage((100 * share).round().long(), 100)
    assert sign * coverage.area > 3 * coverage.standard_error
    assert coverage.p_value < 1e-6
    assert f"{coverage.area:+.4f}" in repr(coverage)
