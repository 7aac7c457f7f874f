"""Pictures of estimates of log p(x) side by side: rows with their bounds, tails of weights, one method against another.

As in :mod:`pyro_aevb.plots`, figures belong to nobody but the caller.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from pyro_aevb.canvas import BLUE, GREY, MUTED, VERMILLION, blank_figure, name_axes, number
from pyro_aevb.errors import DataError
from pyro_aevb.evidence.result import LogMarginal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_agreement", "plot_forest", "plot_k_hat"]


def plot_forest(
    results: Mapping[str, LogMarginal],
    *,
    max_rows: int = 30,
    level: float = 0.95,
    title: str = "Each row by each method, with its bounds",
) -> "Figure":
    """Draw rows one below the other, each with every method's interval and bounds.

    Args:
        results: Results for the same rows by name, such as ``{"ais": ..., "importance": ...}``.
        max_rows: Rows to draw: the first result's least trustworthy ones come first.
        level: Probability that an interval covers the truth.
        title: Title of the figure.

    Returns:
        One axis in nats. A point with a bar is a value with its interval, a triangle that points right a lower bound, one that
        points left an upper bound. Unreliable rows are crosses, without a bar where there is no standard error.

    Raises:
        DataError: If there are no results or no rows, or they differ in number.
        SettingError: If the level is no probability.
    """
    _check_same_rows(results)
    first = next(iter(results.values()))
    chosen = torch.tensor(first.worst_rows(max_rows))
    figure, (ax,) = blank_figure(7.0, 1.2 + 0.22 * len(chosen) * max(1.0, len(results) / 2))
    for place, (name, result) in enumerate(results.items()):
        height = torch.arange(len(chosen)) + (place + 0.5) / len(results) * 0.8 - 0.4
        _draw_method(ax, result, chosen, height, level=level, color=_color(place), name=name)
    ax.set_yticks(range(len(chosen)), [str(row) for row in chosen.tolist()])
    ax.invert_yaxis()
    ax.grid(color="#e6e6e6", linewidth=0.8, axis="x")
    ax.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    name_axes(ax, f"{first.label} (nats)", "row, least trustworthy first", title)
    return figure


def _draw_method(
    ax: "Axes", result: LogMarginal, rows: Tensor, height: Tensor, *, level: float, color: str, name: str
) -> None:
    """Draw one method's rows at their heights."""
    is_flagged = result.is_flagged.cpu()[rows]
    value = result.value.cpu()[rows]
    low, high = (end.cpu()[rows] for end in result.interval(level))
    ax.hlines(height, low, high, color=color, linewidth=1.4)  # an interval that is NaN is not drawn
    ax.plot(value[~is_flagged], height[~is_flagged], ".", color=color, label=name)
    ax.plot(
        value[is_flagged], height[is_flagged], "x", color=color, label=f"{name}, unreliable" if is_flagged.any() else ""
    )
    for bound, marker in ((result.lower, ">"), (result.upper, "<")):
        place = bound.cpu()[rows]
        if not (torch.equal(place, value) or place.isnan().all()):
            ax.plot(place, height, marker, color=color, markersize=4, markerfacecolor="none")


def plot_k_hat(result: LogMarginal, *, title: str | None = None) -> "Figure":
    """Draw how heavy the tails of the rows' importance weights are.

    Args:
        result: A result by importance sampling with at least 100 samples.
        title: By default the share of rows above 0.7.

    Returns:
        A histogram of Pareto k-hat over rows with its limits 0.5 and 0.7; what lies above 0.7 is another colour. Rows whose
        weights are all alike, with k-hat minus infinity, are in the leftmost bar.

    Raises:
        DataError: If no row has a k-hat.
    """
    k_hat = result.k_hat.cpu()[~result.k_hat.cpu().isnan()].clamp(-0.5, 2.0)
    if not len(k_hat):
        raise DataError(
            f"No row has a Pareto k-hat: method {result.method!r} with {result.num_samples} samples a row has none. Importance "
            "sampling with at least 100 samples does."
        )
    figure, (ax,) = blank_figure(7.0, 3.4)
    edges = torch.arange(-0.5, 2.0 + 0.05, 0.05).tolist()
    ax.hist(k_hat[k_hat <= 0.7].tolist(), bins=edges, color=BLUE)
    ax.hist(k_hat[k_hat > 0.7].tolist(), bins=edges, color=VERMILLION)
    for limit in (0.5, 0.7):
        ax.axvline(limit, color=GREY, linestyle="--", linewidth=1)
    ax.set_xlim(min(-0.1, k_hat.min().item() - 0.05), max(1.0, k_hat.max().item() + 0.05))
    share = (k_hat > 0.7).double().mean().item()
    heading = f"{share:.0%} of {len(k_hat)} rows have k-hat above 0.7: no standard error there"
    name_axes(ax, "Pareto k-hat of the row's weights", "rows", title or heading)
    return figure


def plot_agreement(
    first: LogMarginal,
    second: LogMarginal,
    *,
    names: tuple[str, str] | None = None,
    title: str | None = None,
) -> "Figure":
    """Draw how far one method's rows lie above another's, such as AIS above importance sampling.

    Args:
        first: Results of one method.
        second: Results of another for the same rows.
        names: Their names; by default those of the methods.
        title: By default the mean difference with its Monte Carlo error, and how many rows differ by more than three of theirs
            and how many have none, in either method.

    Returns:
        First minus second, in nats, over the first's value, with bars of one joint standard error. Rows that either method calls
        unreliable are crosses.

    Raises:
        DataError: If there are no rows, or they differ in number.
    """
    one, other = names or (first.method, second.method)
    _check_same_rows({one: first, f"{other} (second)": second})
    difference = (first.value - second.value).cpu()
    error = (first.standard_error.square() + second.standard_error.square()).sqrt().cpu()
    is_flagged: Bool[Tensor, " rows"] = (first.is_flagged | second.is_flagged).cpu()
    figure, (ax,) = blank_figure(7.0, 3.8)
    value = first.value.cpu()
    sound, flagged = ~is_flagged, is_flagged
    ax.errorbar(value[sound], difference[sound], error[sound], fmt=".", color=BLUE, ecolor="#7fb8d8", label="rows")
    if flagged.any():
        ax.plot(value[flagged], difference[flagged], "x", color=VERMILLION, markersize=5, label="unreliable by either")
    ax.axhline(0.0, color=GREY, linestyle="--", linewidth=1)
    ax.legend(frameon=False, loc="best")
    num_apart = int((difference.abs() > 3 * error).sum())
    heading = (
        f"{one} minus {other}: {number(difference.mean().item())} nats on average, {num_apart} rows over 3 errors apart"
    )
    num_void = int(error.isnan().sum())
    if num_void:
        heading += f", {num_void} without an error"
    name_axes(ax, f"{first.label} by {one} (nats)", f"{one} minus {other} (nats)", title or heading)
    return figure


def _color(place: int) -> str:
    """Return the colour of a method."""
    return (BLUE, VERMILLION, *MUTED[2:])[place % (len(MUTED))]


def _check_same_rows(results: Mapping[str, LogMarginal]) -> None:
    """Refuse results that can't be drawn side by side."""
    lengths = {name: len(result) for name, result in results.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(f"Expected results for the same rows, at least one; got numbers of rows {lengths}.")
