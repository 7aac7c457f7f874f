"""Pictures of predictive checks: where the data lie among replicated data.

As in :mod:`pyro_aevb.plots`, figures belong to nobody but the caller.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_aevb.canvas import BLUE, GREY, VERMILLION, name_axes
from pyro_aevb.diagnostics.predictive_result import PredictiveCheck, StatisticCheck
from pyro_aevb.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_check"]


def plot_check(check: PredictiveCheck, *, columns: int = 3, title: str | None = None) -> "Figure":
    """Draw each statistic of the data among those of replicated data.

    Args:
        check: The check.
        columns: Pictures side by side at most.
        title: By default how many statistics lie in the outer 5 % of the posterior predictive.

    Returns:
        One picture a statistic. A single number: a histogram over the posterior predictive, the outline of that over the
        prior predictive, and a line where the data are. A tensor of numbers: a histogram of its entries' p-values.

    Raises:
        DataError: If there are no statistics.
    """
    from matplotlib.figure import Figure  # 0.4 s, which only those who look at pictures pay

    if not check.checks:
        raise DataError("The check holds no statistics, so there is nothing to draw.")
    across = min(columns, len(check.checks))
    down = math.ceil(len(check.checks) / across)
    figure = Figure(figsize=(3.2 * across, 2.5 * down + 0.5), layout="constrained", facecolor="white")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for ax, entry in zip(axes, check.checks, strict=False):
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_yticks([])
        (_draw_number if entry.observed.numel() == 1 else _draw_p_values)(ax, entry)
    for ax in axes[len(check.checks) :]:
        ax.set_axis_off()
    numbers = [entry for entry in check.checks if entry.observed.numel() == 1]
    extreme = sum(bool(entry.is_extreme) for entry in numbers)
    figure.suptitle(title or f"{extreme} of {len(numbers)} statistics in the outer 5 % of replicated data", fontsize=11)
    return figure


def _draw_number(ax: "Axes", entry: StatisticCheck) -> None:
    """Draw where a number lies among its replicates."""
    low, high = _range(entry.posterior, entry.observed)
    edges = torch.linspace(low, high, 31).tolist()
    # shares of all draws: the prior's that lie outside the picture count too
    posterior, prior = (draws.reshape(-1) for draws in (entry.posterior, entry.prior))
    ax.hist(posterior.numpy(), edges, weights=_equal(posterior), color=BLUE, alpha=0.7, label="posterior")
    ax.hist(prior.numpy(), edges, weights=_equal(prior), histtype="step", color=GREY, label="prior")
    ax.axvline(entry.observed.item(), color=VERMILLION, linewidth=2, label="data")
    ax.locator_params(axis="x", nbins=4)  # numbers such as 0.2975 run into each other otherwise
    name_axes(ax, entry.name, "", f"p = {entry.p_value.item():.3f} ± {entry.p_error.item():.3f}")
    ax.legend(frameon=False, fontsize=8)


def _equal(draws: Tensor) -> list[float]:
    return [1 / len(draws)] * len(draws)


def _range(posterior: Tensor, observed: Tensor) -> tuple[float, float]:
    """Return ends that hold the posterior's replicates and the data; what is wider is the prior's."""
    low, high = (min(posterior.min(), observed).item(), max(posterior.max(), observed).item())
    slack = 0.05 * (high - low) or 0.5
    return low - slack, high + slack


def _draw_p_values(ax: "Axes", entry: StatisticCheck) -> None:
    """Draw the p-values of many numbers."""
    p_values = entry.p_value.reshape(-1)
    ax.hist(p_values[~p_values.isnan()].numpy(), bins=20, range=(0.0, 1.0), color=BLUE, alpha=0.7)
    share = entry.is_extreme.double().mean().item()
    name_axes(ax, f"p-values of {entry.name}", "", f"{share:.1%} of {p_values.numel()} in the outer 5 %")
