"""Picture of the latents that are used: what each unit adds to the KL term, in the end and over training.

As in :mod:`pyro_aevb.plots`, figures belong to nobody but the caller.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyro_aevb.canvas import GREY, MUTED, name_axes, number
from pyro_aevb.diagnostics.collapse_result import CollapseReport
from pyro_aevb.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_collapse"]

_DEAD = "#c8c8c8"


def plot_collapse(reports: Mapping[int, CollapseReport], *, max_units: int = 30, title: str | None = None) -> "Figure":
    """Draw the KL term unit by unit.

    Args:
        reports: Reports by epoch, as a :class:`~pyro_aevb.diagnostics.collapse.CollapseMonitor` holds them.
        max_units: Units that have a bar: those whose posterior mean varies most.
        title: By default how many units are active in the end.

    Returns:
        Two axes in nats. Left, each unit's KL in the last report, the unit whose posterior mean varies most on top; dead units are
        grey, and units whose KL is not known have no bar. Right, the same over epochs, stacked, under the whole KL term, with the
        mutual information as a dashed line.

    Raises:
        DataError: If there are no reports.
    """
    if not reports:
        raise DataError("Expected at least one report; the monitor has none. Fit for as many epochs as its `every`.")
    from matplotlib.figure import Figure  # 0.4 s, which only those who look at pictures pay

    last = reports[max(reports)]
    order = last.variance.argsort(descending=True, stable=True).tolist()
    is_active = last.is_active.tolist()
    colors = [MUTED[place % len(MUTED)] if is_active[unit] else _DEAD for place, unit in enumerate(order)]
    num_shown = min(len(order), max_units)
    figure = Figure(figsize=(8.0, max(3.2, 1.2 + 0.2 * num_shown)), layout="constrained", facecolor="white")
    bars, stack = figure.subplots(1, 2, width_ratios=(1.0, 1.5))
    for ax in (bars, stack):
        ax.spines[["top", "right"]].set_visible(False)
    kl = last.kl.nan_to_num().tolist()
    bars.barh(range(num_shown), [kl[unit] for unit in order[:num_shown]], color=colors[:num_shown], height=0.75)
    bars.set_yticks(range(num_shown), [last.units[unit] for unit in order[:num_shown]])
    bars.invert_yaxis()
    heading = f"{last.num_active} of {len(order)} units are active"
    name_axes(bars, "KL in the end (nats a row)", "", title or heading)
    _draw_epochs(stack, reports, order, colors)
    return figure


def _draw_epochs(ax: "Axes", reports: Mapping[int, CollapseReport], order: list[int], colors: list[str]) -> None:
    """Draw the units' KL over epochs one upon the other, and the totals as lines."""
    epochs = sorted(reports)
    heights = [[reports[epoch].kl[unit].nan_to_num().item() for epoch in epochs] for unit in order]
    ax.stackplot(epochs, *heights, colors=colors, linewidth=0)
    total = [reports[epoch].total_kl for epoch in epochs]
    information = [reports[epoch].mutual_information for epoch in epochs]
    ax.plot(epochs, total, color=GREY, linewidth=1.2, label=f"KL term, {number(total[-1])} at the end")
    ax.plot(
        epochs, information, "k--", linewidth=1.2, label=f"mutual information, {number(information[-1])} at the end"
    )
    ax.set_ylim(0.0, 1.3 * max(total))
    ax.legend(frameon=False, loc="upper left", fontsize=9)
    name_axes(ax, "epoch", "KL (nats a row)", "over training, one colour a unit")
