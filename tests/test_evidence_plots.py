"""Pictures of estimates side by side show each method's numbers, in the right place."""

import math
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

from pyro_aevb.errors import DataError, SettingError
from pyro_aevb.evidence.averages import from_log_weights
from pyro_aevb.evidence.result import Status
from pyro_aevb.evidence_plots import plot_agreement, plot_forest, plot_k_hat


def weights(seed, num_rows=12):
    return torch.randn(1, 400, num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def importance():
    result = from_log_weights(0.3 * weights(0))
    flags = [Status.UNRELIABLE if row == 4 else status for row, status in enumerate(result.status)]
    return replace(result, status=tuple(flags), k_hat=torch.linspace(-0.4, 1.3, 12, dtype=torch.float64))


@pytest.fixture
def ais(importance):
    value = importance.value + 0.05
    return replace(
        importance, value=value, lower=value - 0.2, upper=value + 0.3, method="ais", status=(Status.OK,) * 12
    )


class TestForest:
    def test_every_row_has_its_interval_and_bounds(self, importance, ais):
        figure = plot_forest({"ais": ais, "importance": importance}, max_rows=5, level=0.9)
        (ax,) = figure.axes
        rows = ais.worst_rows(5)
        assert [int(label.get_text()) for label in ax.get_yticklabels()] == list(rows)
        bars = ax.collections
        low, high = ais.interval(0.9)
        for place, row in enumerate(rows):
            segment = bars[0].get_segments()[place]
            assert segment[:, 0].tolist() == pytest.approx([low[row].item(), high[row].item()])
        triangles = {line.get_marker(): line.get_xdata() for line in ax.lines if line.get_marker() in "<>"}
        assert np.allclose(triangles[">"], ais.lower[list(rows)])
        assert np.allclose(triangles["<"], ais.upper[list(rows)], equal_nan=True)

    def test_a_lower_bound_that_is_the_value_is_drawn_once(self, importance):
        figure = plot_forest({"importance": replace(importance, upper=importance.value)})
        assert not [line for line in figure.axes[0].lines if line.get_marker() in ("<", ">")]

    def test_unreliable_rows_are_crosses(self, importance):
        figure = plot_forest({"importance": importance})
        (crosses,) = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
        assert crosses.get_xdata().tolist() == [importance.value[4].item()]
        assert "nats" in figure.axes[0].get_xlabel()

    def test_what_does_not_fit_is_refused(self, importance, ais):
        with pytest.raises(DataError, match="same rows"):
            plot_forest({})
        with pytest.raises(DataError, match=r"'ais': 12, 'importance': 3"):
            plot_forest({"ais": ais, "importance": from_log_weights(weights(0, 3))})
        with pytest.raises(SettingError, match="between 0 and 1"):
            plot_forest({"ais": ais}, level=95.0)


class TestKHat:
    def test_rows_are_counted_and_coloured_above_the_limit(self, importance):
        (ax,) = plot_k_hat(importance).axes
        counts = {}
        for patch in ax.patches:
            counts[patch.get_facecolor()] = counts.get(patch.get_facecolor(), 0) + patch.get_height()
        num_heavy = int((importance.k_hat > 0.7).sum())
        assert sorted(counts.values()) == sorted([num_heavy, 12 - num_heavy])
        assert f"{num_heavy / 12:.0%} of 12 rows" in ax.get_title(loc="left")

    def test_infinite_ones_are_in_the_outer_bars_and_unknown_ones_left_out(self, importance):
        k_hat = torch.tensor([-math.inf, math.inf, math.nan] + [0.2] * 9, dtype=torch.float64)
        (ax,) = plot_k_hat(replace(importance, k_hat=k_hat)).axes
        assert sum(patch.get_height() for patch in ax.patches) == 11

    def test_a_method_without_k_hat_is_told(self, importance):
        nothing = replace(importance, k_hat=torch.full((12,), math.nan), method="ais")
        with pytest.raises(DataError, match=r"'ais' with 400 samples"):
            plot_k_hat(nothing)


class TestAgreement:
    def test_points_are_differences_with_joint_errors(self, importance, ais):
        (ax,) = plot_agreement(ais, importance).axes
        line, _, (bars,) = ax.containers[0]
        sound = [row for row in range(12) if row != 4]
        assert np.allclose(line.get_ydata(), 0.05)
        assert np.allclose(line.get_xdata(), ais.value[sound])
        lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
        error = (ais.standard_error**2 + importance.standard_error**2).sqrt()[sound]
        assert np.allclose(lengths, 2 * error)

    def test_the_title_tells_the_mean_and_the_rows_apart(self, importance, ais):
        apart = replace(ais, value=ais.value + torch.eye(12, dtype=torch.float64)[7] * 3)
        title = plot_agreement(apart, importance).axes[0].get_title(loc="left")
        assert title == "ais minus importance: 0.30 nats on average, 1 rows over 3 errors apart"

    def test_the_title_tells_the_rows_without_an_error(self, importance, ais):
        void = ais.standard_error.index_fill(0, torch.tensor([2, 5, 7]), math.nan)
        title = plot_agreement(replace(ais, standard_error=void), importance).axes[0].get_title(loc="left")
        assert title.endswith("0 rows over 3 errors apart, 3 without an error")

    def test_rows_that_either_flags_are_crosses(self, importance, ais):
        (crosses,) = [line for line in plot_agreement(ais, importance).axes[0].lines if line.get_marker() == "x"]
        assert crosses.get_xdata().tolist() == [ais.value[4].item()]

    def test_other_rows_are_refused(self, ais):
        with pytest.raises(DataError, match="same rows"):
            plot_agreement(ais, from_log_weights(weights(0, 3)))


def test_pictures_leave_the_global_state_alone(tmp_path, importance, ais):
    before = dict(matplotlib.rcParams)
    for name, figure in {
        "forest": plot_forest({"ais": ais, "importance": importance}),
        "k_hat": plot_k_hat(importance),
        "agreement": plot_agreement(ais, importance),
    }.items():
        figure.savefig(tmp_path / f"{name}.png")
    assert dict(matplotlib.rcParams) == before
