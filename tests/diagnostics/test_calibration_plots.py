"""The picture of a calibration shows its curves, in and out of the band."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pyro_aevb.diagnostics.calibration import TEST_QUANTITIES, Calibration
from pyro_aevb.diagnostics.calibration_plots import plot_calibration
from pyro_aevb.diagnostics.tarp import TarpCoverage
from pyro_aevb.errors import SettingError


@pytest.fixture
def result() -> Calibration:
    """Ten coordinates, of which nine have ranks that are too low, the second one most."""
    ranks = torch.randint(51, (400, 13))
    ranks[:, :9] = (ranks[:, :9] * 0.7).long()
    ranks[:, 1] //= 2
    names = (*(f"z[{place}]" for place in range(10)), *TEST_QUANTITIES)
    return Calibration(names, ranks, 50, TarpCoverage(torch.randint(51, (400,)), 50))


def curves(ax: Axes) -> dict[str, Line2D]:
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def test_every_quantity_has_its_curve_and_the_worst_coordinates_a_name(result):
    figure = plot_calibration(result)
    upper, lower = figure.axes
    assert len(upper.lines) == 13 + 1  # and the line at zero
    named = curves(upper)
    assert set(TEST_QUANTITIES) < set(named)
    coordinates = sorted(result.coordinates, key=result.p_values.__getitem__)
    assert set(named) - set(TEST_QUANTITIES) == {*coordinates[:6], "other coordinates"}
    assert "z[9]" not in named
    ecdf = [(result.ranks[:, 1] < rank).double().mean().item() for rank in range(1, 51)]
    assert np.allclose(named["z[1]"].get_xdata()[1:-1], np.arange(1, 51) / 51)
    assert np.allclose(named["z[1]"].get_ydata()[1:-1], np.array(ecdf) - np.arange(1, 51) / 51)
    assert named["z[1]"].get_ydata()[0] == named["z[1]"].get_ydata()[-1] == 0
    assert upper.get_title(loc="left") == "9 of 13 quantities fail, 400 simulations"
    (line,) = [line for line in lower.lines if len(line.get_xdata()) == 52]
    assert np.allclose(line.get_ydata()[1:-1], result.tarp.coverage - result.tarp.levels)


@pytest.mark.parametrize(("num_coordinates", "name"), [(1, "z[0]"), (3, "coordinates")])
def test_coordinates_inside_of_the_band_are_in_the_legend(num_coordinates, name):
    ranks = (torch.arange(400)[:, None] + torch.arange(3 + num_coordinates)) % 51  # uniform but for a remainder
    names = (*(f"z[{place}]" for place in range(num_coordinates)), *TEST_QUANTITIES)
    figure = plot_calibration(Calibration(names, ranks, 50, TarpCoverage(torch.arange(400) % 51, 50)))
    assert set(curves(figure.axes[0])) == {name, *TEST_QUANTITIES}


def test_the_band_is_the_tests(result):
    low, high = result.test.band(0.8)
    for ax in plot_calibration(result, level=0.8).axes:
        vertices = ax.collections[0].get_paths()[0].vertices
        assert vertices[:, 1].max() == pytest.approx((high - result.test.levels).max())
        assert vertices[:, 1].min() == pytest.approx((low - result.test.levels).min())


def test_the_figure_can_be_saved_and_named(result, tmp_path):
    figure = plot_calibration(result, title="Mine")
    figure.savefig(tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    assert figure.axes[0].get_title(loc="left") == "Mine"
    with pytest.raises(SettingError, match="between 0 and 1"):
        plot_calibration(result, level=95.0)
