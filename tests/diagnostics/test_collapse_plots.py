"""The picture of collapse shows each unit's KL, in the end and over epochs, and which units are dead."""

import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from pyro_aevb.diagnostics.collapse_plots import plot_collapse
from pyro_aevb.diagnostics.collapse_result import CollapseReport
from pyro_aevb.errors import DataError


def report_of(*kl: float, information: float = 0.5) -> CollapseReport:
    """A report whose second unit varies most and whose third one is dead."""
    return CollapseReport(
        units=("z[0]", "z[1]", "z[2]"),
        variance=torch.tensor([0.5, 0.9, 0.001], dtype=torch.float64),
        kl=torch.tensor(kl, dtype=torch.float64),
        site_kl={"z": float(np.nansum(kl))},
        kl_error=0.01,
        mutual_information=information,
        mutual_information_error=0.01,
        num_rows=100,
        threshold=0.01,
    )


REPORTS = {10: report_of(0.2, 0.8, 0.1), 5: report_of(0.1, 0.4, 0.2, information=0.3)}


def test_bars_are_the_kl_of_the_last_report_most_varied_first():
    bars, _ = plot_collapse(REPORTS).axes
    assert [patch.get_width() for patch in bars.patches] == [0.8, 0.2, 0.1]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["z[1]", "z[0]", "z[2]"]
    assert bars.get_title(loc="left") == "2 of 3 units are active"
    colors = [to_hex(patch.get_facecolor()) for patch in bars.patches]
    assert colors[2] == "#c8c8c8"
    assert len(set(colors)) == 3


def test_epochs_are_stacked_in_order_under_the_whole_term():
    bars, stack = plot_collapse(REPORTS).axes
    layers = [layer.get_paths()[0] for layer in stack.collections]
    tops = [[path.vertices[path.vertices[:, 0] == epoch, 1].max() for epoch in (5, 10)] for path in layers]
    assert np.allclose(tops, [[0.4, 0.8], [0.5, 1.0], [0.7, 1.1]])
    faces = [to_hex(layer.get_facecolor()[0]) for layer in stack.collections]
    assert faces == [to_hex(patch.get_facecolor()) for patch in bars.patches]
    total, information = stack.lines
    assert np.allclose(total.get_xdata(), [5, 10])
    assert np.allclose(total.get_ydata(), [0.7, 1.1])
    assert np.allclose(information.get_ydata(), [0.3, 0.5])


def test_units_without_a_kl_of_their_own_have_no_bar():
    bars, _ = plot_collapse({1: report_of(0.2, math.nan, 0.1)}).axes
    assert [patch.get_width() for patch in bars.patches] == [0.0, 0.2, 0.1]


def test_many_units_are_cut_and_a_title_is_taken():
    bars, _ = plot_collapse(REPORTS, max_units=2, title="Mine").axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["z[1]", "z[0]"]
    assert bars.get_title(loc="left") == "Mine"


def test_nothing_is_refused():
    with pytest.raises(DataError, match="at least one report"):
        plot_collapse({})
