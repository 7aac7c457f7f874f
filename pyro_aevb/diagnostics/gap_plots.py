"""Picture of a ledger: each row's bar is what its bound lacks of log p(x), in two parts.

As in :mod:`pyro_aevb.plots`, figures belong to nobody but the caller.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from pyro_aevb.canvas import BLUE, GREY, VERMILLION, blank_figure, name_axes
from pyro_aevb.diagnostics.gap import InferenceGap
from pyro_aevb.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_gap"]


def plot_gap(gap: InferenceGap, *, max_rows: int = 30, title: str | None = None) -> "Figure":
    """Draw each row's approximation and amortization gap as one bar, the mean over rows first.

    Args:
        gap: The ledger.
        max_rows: Rows to draw: those with the largest inference gap.
        title: By default the means, and how many rows were left out.

    Returns:
        One axis in nats. The bar's first part is the approximation gap, the second one the amortization gap, the whisker at its end
        two standard errors of the sum to either side. Unreliable rows are left out.

    Raises:
        DataError: If no row is reliable.
    """
    rows = list(gap.worst_rows(max_rows))
    if not rows:
        raise DataError(f"There is nothing to draw: all {len(gap)} rows are unreliable. `.status` says so of each.")
    table = gap.summary()
    mean, error = table["mean"], table["standard_error"]
    first = [mean["- approximation gap"], *_picked(gap.approximation_gap, rows)]
    second = [mean["- amortization gap"], *_picked(gap.amortization_gap, rows)]
    whiskers = [2 * error["inference gap"], *(2 * each for each in _picked(gap.inference_error, rows))]
    heights = [0.0, *(place + 1.5 for place in range(len(rows)))]  # the mean stands a little apart
    figure, (ax,) = blank_figure(7.0, 1.6 + 0.24 * len(heights))
    ax.barh(heights, first, color=BLUE, height=0.7, label="approximation gap")
    ax.barh(heights, second, left=first, color=VERMILLION, height=0.7, label="amortization gap")
    ends = [a + b for a, b in zip(first, second, strict=True)]
    ax.errorbar(ends, heights, xerr=whiskers, fmt="none", ecolor=GREY, elinewidth=1.2)
    num_left_out = int(gap.is_flagged.sum())
    num_sound = len(gap) - num_left_out
    ax.set_yticks(heights, [f"mean of {num_sound} row{'s' * (num_sound != 1)}", *map(str, rows)])
    ax.invert_yaxis()
    ax.axvline(0.0, color=GREY, linewidth=0.8)
    ax.legend(frameon=False, loc="best")
    heading = f"approximation {first[0]:.2f}, amortization {second[0]:.2f} nats a row"
    if num_left_out:
        heading += f"; {num_left_out} of {len(gap)} rows left out"
    name_axes(
        ax, f"{gap.log_marginal.label} minus the guide's bound (nats)", "row, largest gap first", title or heading
    )
    return figure


def _picked(entry: Tensor, rows: list[int]) -> list[float]:
    """Return some rows' numbers."""
    return entry[rows].tolist()
