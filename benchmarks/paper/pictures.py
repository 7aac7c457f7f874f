"""What the paper's pictures have in common here: colours, panels, small files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.paper.tables import Row
from pyro_aevb.canvas import BLUE, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "draw_both", "panels", "save"]

COLOURS = {"aevb": BLUE, "wake_sleep": VERMILLION, "mcem": "#117733"}


def panels(rows: int, columns: int, width: float = 2.7, height: float = 2.6) -> tuple["Figure", "list[Axes]"]:
    """Return a figure and its axes, line by line."""
    from matplotlib.figure import Figure  # slow, and training needs none

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e6e6", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
    return figure, axes


def draw_both(ax: "Axes", rows: Sequence[Row], method: str, label: str, column: str = "bound") -> None:
    """Draw a number against samples: of test rows solid, of training rows dashed."""
    samples = [row["samples"] for row in rows]
    for part, style in (("test", "-"), ("train", "--")):
        values = [row[f"{part}_{column}"] for row in rows]
        ax.plot(samples, values, style, color=COLOURS[method], linewidth=1.3, label=f"{label}, {part}")
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(lambda value, place: "")  # labels of parts of a decade would overlap


def save(figure: "Figure", path: Path) -> None:
    """Write a small PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
