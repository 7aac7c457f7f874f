"""What pictures have in common: colours, an empty figure, labels and numbers.

Blue and vermillion are those of Okabe & Ito, which colour-blind readers tell apart.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREY", "MUTED", "VERMILLION", "blank_figure", "name_axes", "number"]

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#666666"
MUTED = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499", "#777777")
"""Paul Tol's muted colours, for classes."""


def blank_figure(width: float, height: float, heights: Sequence[float] = (1.0,)) -> tuple["Figure", "list[Axes]"]:
    """Return a figure, free of any global state, and its axes one below the other."""
    from matplotlib.figure import Figure  # 0.4 s, which only those who look at pictures pay

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    rows = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    for ax in rows[:, 0]:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(rows[:, 0])


def name_axes(ax: "Axes", x: str, y: str, title: str) -> None:
    """Name both axes and set the title at the left."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, loc="left", fontsize=11)


def number(value: float) -> str:
    """Format a number with two decimals and a true minus sign, and none before zero."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")
