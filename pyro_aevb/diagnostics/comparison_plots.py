"""A picture of a comparison: every row, furthest apart first, from moments down to importance weights, on one page.

As in :mod:`pyro_aevb.plots`, figures belong to nobody but the caller.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb.canvas import BLUE, GREY, MUTED, VERMILLION, blank_figure, name_axes, number
from pyro_aevb.diagnostics.comparison_result import Comparison, WorstCoordinates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_comparison"]

_COLORS = (BLUE, MUTED[6], MUTED[0], MUTED[8], MUTED[3])


def plot_comparison(comparison: Comparison, *, max_rows: int = 100, title: str | None = None) -> "Figure":
    """Draw how far guide and posterior are apart, row by row.

    Args:
        comparison: What :func:`~pyro_aevb.diagnostics.comparison.compare_posteriors` found.
        max_rows: Rows to draw, those furthest apart.
        title: By default the mean divergence of the rows with reliable chains.

    Returns:
        One page of six panels that share their rows: mean error and its two standard errors, ratio of standard deviations,
        Wasserstein distance over what chance makes, C2ST over two standard errors about 0.5, symmetric divergence, k-hat with its
        limit. A point is the worst coordinate of a site. Rows with unreliable chains stand at the right, as crosses.
    """
    rows = torch.tensor(comparison.worst_rows(max_rows), dtype=torch.long)
    figure, axes = blank_figure(8.0, 10.5, (1.0,) * 6)
    for place, (name, site) in enumerate(comparison.sites.items()):
        worst = WorstCoordinates(*(value.cpu()[rows] for value in WorstCoordinates.of(site)))
        _draw_site(axes, comparison, rows, worst, _COLORS[place % len(_COLORS)], name)
    _draw_row_numbers(axes[4], axes[5], comparison, rows)
    sound = ~comparison.reference.is_flagged
    flagged = comparison.num_flagged
    left_out = f"; {flagged} row{'s' * (flagged > 1)} with unreliable chains left out" if flagged else ""
    heading = f"Guide beside posterior: KL both ways {number(comparison.divergence[sound].mean().item())} nats a row{left_out}"
    labels = ("mean error (sd)", "sd ratio", "Wasserstein (sd)", "C2ST", "KL both ways (nats)", "k-hat")
    for ax, label in zip(axes, labels, strict=True):
        ax.set_ylabel(label)
    name_axes(axes[0], "", labels[0], title or heading)
    axes[-1].set_xlabel("rows, furthest apart first")
    axes[-1].set_xticks(
        range(len(rows)), [str(row) for row in rows.tolist()], fontsize=max(3, min(9, 400 // len(rows)))
    )
    if len(comparison.sites) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    return figure


def _draw_site(
    axes: "list[Axes]", comparison: Comparison, rows: Tensor, worst: WorstCoordinates, color: str, name: str
) -> None:
    """Draw a site's points into the first four panels."""
    places = torch.arange(len(rows), dtype=torch.float64)
    axes[0].errorbar(places, worst.mean_error, 2 * worst.mean_error_se, fmt="none", ecolor=color, elinewidth=0.8)
    _draw_points(axes[0], comparison, rows, worst.mean_error, color, name)
    axes[1].errorbar(places, worst.sd_ratio, 2 * worst.sd_ratio_se, fmt="none", ecolor=color, elinewidth=0.8)
    _draw_points(axes[1], comparison, rows, worst.sd_ratio, color)
    _draw_points(axes[2], comparison, rows, worst.wasserstein, color)
    axes[2].step(places, worst.wasserstein_null, where="mid", color=GREY, linewidth=0.8, linestyle=":")
    _draw_points(axes[3], comparison, rows, worst.c2st, color)
    axes[3].fill_between(places, 0.5 - 2 * worst.c2st_se, 0.5 + 2 * worst.c2st_se, color=GREY, alpha=0.15, linewidth=0)
    for ax, value in ((axes[0], 0.0), (axes[1], 1.0), (axes[2], 0.0), (axes[3], 0.5)):
        ax.axhline(value, color=GREY, linestyle="--", linewidth=0.8)


def _draw_row_numbers(divergence: "Axes", k_hat: "Axes", comparison: Comparison, rows: Tensor) -> None:
    """Draw what belongs to rows as a whole into the last two panels."""
    places = torch.arange(len(rows), dtype=torch.float64)
    value, error = comparison.divergence.cpu()[rows], comparison.divergence_se.cpu()[rows]
    divergence.errorbar(places, value, 2 * error, fmt="none", ecolor=BLUE, elinewidth=0.8)
    _draw_points(divergence, comparison, rows, value, BLUE)
    divergence.axhline(0.0, color=GREY, linestyle="--", linewidth=0.8)
    found = comparison.k_hat.cpu()[rows].clamp(min=-0.5)  # weights that are all alike have k-hat minus infinity
    _draw_points(k_hat, comparison, rows, found, BLUE)
    k_hat.axhline(0.7, color=VERMILLION, linestyle="--", linewidth=0.8)


def _draw_points(
    ax: "Axes", comparison: Comparison, rows: Tensor, values: Float[Tensor, " shown"], color: str, name: str = ""
) -> None:
    """Draw rows as points, flagged ones as crosses."""
    flagged = comparison.reference.is_flagged.cpu()[rows]
    places = torch.arange(len(rows))
    ax.plot(places[~flagged], values[~flagged], ".", color=color, label=name)
    ax.plot(places[flagged], values[flagged], "x", color=VERMILLION, markersize=5)
