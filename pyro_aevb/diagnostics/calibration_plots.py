"""Pictures of calibration: how ranks stray from uniform, and what joint coverage is reached.

As in :mod:`pyro_aevb.plots`, figures belong to nobody but the caller.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_aevb.canvas import BLUE, GREY, MUTED, VERMILLION, blank_figure, name_axes
from pyro_aevb.diagnostics.calibration import TEST_QUANTITIES, Calibration
from pyro_aevb.diagnostics.ranks import Floats, RankTest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_calibration"]

_COLORS = tuple(MUTED[place] for place in (5, 8, 7, 6, 4, 3))
"""Of the coordinates that are told apart, the worst ones of those outside the band; the pale ones last."""


def plot_calibration(result: Calibration, *, level: float = 0.95, title: str | None = None) -> "Figure":
    """Draw the ranks of every quantity and the joint coverage, each with the band that an exact guide stays in.

    Args:
        result: A calibration.
        level: Probability that one exact curve lies inside its band everywhere.
        title: By default how many quantities fail.

    Returns:
        Two axes. Above, the share of ranks below each point less that of uniform ranks: coordinates are thin lines, grey but for
        the worst ones that leave the band; the test quantities are thick. A curve above zero on the left and below on the right
        tells of a guide that is too narrow, one above zero all along of draws that lie too high. Below, TARP's coverage less the
        credibility: on the right half it is below zero where regions are too small.

    Raises:
        SettingError: If the level is not between 0 and 1.
    """
    test = result.test
    band = test.band(level)
    figure, (upper, lower) = blank_figure(7.0, 6.4, (1.5, 1.0))
    _draw_band(upper, test, band, f"{level:.0%} band")
    styles = _styles(result, band)
    for name, ranks in zip(result.quantities, result.ranks.unbind(1), strict=True):
        curve = _with_ends(test.ecdf(ranks) - test.levels, 0.0)
        upper.plot(_with_ends(test.levels), curve, **styles[name])
    upper.legend(frameon=False, loc="best", fontsize=8, ncols=2)
    failed = result.failures()
    heading = f"{len(failed)} of {len(result.quantities)} quantities fail, {len(result)} simulations"
    name_axes(upper, "", "share of ranks below, less uniform", title or heading)
    upper.set_xlabel("rank of the truth among the draws, from 0 to 1")
    upper.tick_params(labelbottom=True)
    _draw_band(lower, test, band, f"{level:.0%} band")
    lower.plot(_with_ends(test.levels), _with_ends(result.tarp.coverage - test.levels, 0.0), color=BLUE, linewidth=1.8)
    heading = f"TARP: area from 1/2 on {result.tarp.area:+.3f} \N{PLUS-MINUS SIGN} {result.tarp.standard_error:.3f}"
    name_axes(lower, "credibility", "coverage less credibility", heading.replace("-", "\N{MINUS SIGN}"))
    lower.set_xlim(0, 1)
    return figure


def _draw_band(ax: "Axes", test: RankTest, band: tuple[Floats, Floats], label: str) -> None:
    """Shade where an exact curve lies."""
    low, high = (_with_ends(end - test.levels, 0.0) for end in band)
    ax.fill_between(_with_ends(test.levels), low, high, color="#e6e6e6", label=label, linewidth=0)
    ax.axhline(0.0, color=GREY, linestyle="--", linewidth=1)


def _styles(result: Calibration, band: tuple[Floats, Floats]) -> dict[str, dict[str, Any]]:
    """Choose how each quantity's curve looks."""
    styles: dict[str, dict[str, Any]] = {}
    named = 0
    for name in sorted(result.coordinates, key=result.p_values.__getitem__):
        ecdf = result.test.ecdf(result.ranks[:, result.quantities.index(name)])
        is_outside = bool(((ecdf < band[0]) | (ecdf > band[1])).any())
        if is_outside and named < len(_COLORS):
            styles[name] = {"color": _COLORS[named], "linewidth": 1.0, "label": name}
            named += 1
        else:
            styles[name] = {"color": "#999999", "linewidth": 0.8}
    grey = [name for name in result.coordinates if "label" not in styles[name]]
    if grey:  # one entry of the legend for all of them
        rest = "other coordinates" if named else "coordinates"
        styles[grey[0]]["label"] = grey[0] if len(grey) == 1 else rest
    for name, color, line in zip(TEST_QUANTITIES, (VERMILLION, BLUE, MUTED[2]), ("-", "--", "-"), strict=True):
        styles[name] = {"color": color, "linewidth": 1.8, "linestyle": line, "label": name}
    return styles


def _with_ends(values: Floats, last: float = 1.0) -> Floats:
    """Add the ends 0 and 1 of levels, where every curve is at zero."""
    return np.concatenate(([0.0], values, [last]))
