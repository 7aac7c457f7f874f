"""Pictures of fits, images, latent spaces and evidence, as matplotlib figures that belong to nobody but the caller.

No function touches ``pyplot``, a backend or a global setting: ``figure.savefig("name.png")`` works anywhere, and a notebook
shows a figure that stands last in a cell. Estimates of log p(x) side by side are drawn by :mod:`pyro_aevb.evidence_plots`.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pyro_aevb.canvas import BLUE, GREY, MUTED, VERMILLION, blank_figure, name_axes, number
from pyro_aevb.errors import DataError
from pyro_aevb.evidence.result import LogMarginal
from pyro_aevb.training.loop import FitResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "plot_embedding",
    "plot_history",
    "plot_images",
    "plot_imputations",
    "plot_log_marginal",
    "plot_manifold",
    "plot_reconstructions",
]


def plot_history(result: FitResult, *, title: str | None = None) -> "Figure":
    """Draw the bound over training, on new rows too where there was validation data.

    Args:
        result: What ``fit`` returned.
        title: By default the last bounds.

    Returns:
        One line per bound, nats per row over epochs. Above 20 epochs the axis of epochs is logarithmic.

    Raises:
        DataError: If no epoch was finished.
    """
    if not result.history:
        raise DataError("Expected a fit of at least one epoch; its history is empty.")
    figure, (ax,) = blank_figure(7.0, 3.8)
    lines = (("bound", "training rows", BLUE, "-"), ("validation_bound", "new rows", VERMILLION, "--"))
    last = result.history[-1]
    drawn = [line for line in lines if line[0] in last]
    for name, label, color, style in drawn:
        epochs = [record["epoch"] for record in result.history]
        bounds = [record[name] for record in result.history]
        ax.plot(epochs, bounds, style, color=color, label=f"{label}, {number(last[name])} at the end")
    ends = " and ".join(f"{number(last[name])} nats on {label}" for name, label, _, _ in drawn)
    name_axes(ax, "epoch", "bound (nats per row)", title or f"The bound rises to {ends}")
    if len(result.history) > 20:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(color="#e6e6e6", linewidth=0.8)
    ax.legend(frameon=False, loc="lower right")
    return figure


def plot_images(
    images: Float[Tensor, "*grid height width"], *, columns: int | None = None, title: str = "Images"
) -> "Figure":
    """Draw grey-level images as one grid, ink dark on white.

    Args:
        images: Grey levels in [0, 1], of shape ``[images, height, width]`` or ``[rows, columns, height, width]``.
        columns: Images in a row of the grid, where ``images`` has no grid of its own; by default about a square.
        title: Title of the figure.

    Returns:
        A figure with one picture, images one pixel apart.

    Raises:
        DataError: If there is no image, or the shape is another.
    """
    if images.dim() == 3 and len(images):
        columns = columns or math.ceil(math.sqrt(len(images)))
        blank = images.new_full((-len(images) % columns, *images.shape[1:]), math.nan)
        images = torch.cat([images, blank]).unflatten(0, (-1, columns))
    return _draw_grid(images, title)[0]


def plot_reconstructions(
    originals: Float[Tensor, "images height width"],
    reconstructions: Float[Tensor, "*draws height width"],
    *,
    names: Sequence[str] | None = None,
    title: str = "Above what the guide saw, below what the decoder makes of it",
) -> "Figure":
    """Draw images above their reconstructions.

    Args:
        originals: Grey levels in [0, 1].
        reconstructions: The same images once more, or several times: ``[draws, images, height, width]``.
        names: Name of each line of images, originals first.
        title: Title of the figure.

    Returns:
        A figure with one picture, a column for each image.

    Raises:
        DataError: If the shapes do not fit, or there are more or fewer names than lines.
    """
    copies = reconstructions.unsqueeze(0) if reconstructions.dim() == 3 else reconstructions
    if copies.shape[1:] != originals.shape:
        raise DataError(
            f"Expected reconstructions of shape {list(originals.shape)}, with or without an axis of draws in front; "
            f"got {list(reconstructions.shape)}."
        )
    many = [f"reconstruction {number + 1}" for number in range(len(copies))] if len(copies) > 1 else ["reconstruction"]
    lines = list(names) if names is not None else ["original", *many]
    if len(lines) != len(copies) + 1:
        raise DataError(f"Expected {len(copies) + 1} names, one a line; got {lines}.")
    figure, ax = _draw_grid(torch.cat([originals[None], copies]), title)
    step = originals.shape[1] + 1
    ax.set_yticks([(originals.shape[1] - 1) / 2 + step * line for line in range(len(lines))], lines)
    ax.tick_params(left=False)
    return figure


def plot_imputations(
    originals: Float[Tensor, "images height width"],
    observed: Bool[Tensor, "..."],
    fills: Float[Tensor, "*draws height width"],
    *,
    names: Sequence[str] | None = None,
    title: str = "The images, what is known of them, and how the rest is filled",
) -> "Figure":
    """Draw images, what of them is known, and how the rest is filled.

    Args:
        originals: Grey levels in [0, 1].
        observed: True where a pixel is known, of the shape of the images; the others are blue in the second line.
        fills: Completed images, or several completions: ``[draws, images, height, width]``, such as a mean and some draws.
        names: Name of each line of images: originals, known pixels, completions.
        title: Title of the figure.

    Returns:
        A figure with one picture, a column for each image, and the blue of missing pixels above it.

    Raises:
        DataError: If the shapes do not fit, or there are more or fewer names than lines.
    """
    from matplotlib.colors import (
        ListedColormap,
    )  # as slow as the figure itself, which only those who look at pictures pay

    if observed.shape != originals.shape:
        raise DataError(
            f"Expected observed of shape {list(originals.shape)}, as the images; got {list(observed.shape)}."
        )
    copies = fills.unsqueeze(0) if fills.dim() == 3 else fills
    many = [f"completion {number + 1}" for number in range(len(copies))] if len(copies) > 1 else ["completion"]
    known = originals.masked_fill(~observed, 0.0)[None]
    figure = plot_reconstructions(
        originals,
        torch.cat([known, copies]) if copies.shape[1:] == originals.shape else fills,
        names=names if names is not None else ["original", "known", *many],
        title=title,
    )
    (ax,) = figure.axes
    missing = torch.full_like(torch.cat([known, known]), math.nan)
    missing[1][~observed] = 1.0
    ax.imshow(_tiled(missing).numpy(), cmap=ListedColormap([BLUE]), interpolation="nearest")
    ax.set_ylim(ax.images[0].get_extent()[2:])
    return figure


def plot_manifold(
    decode: Callable[[Float[Tensor, "points 2"]], Float[Tensor, "points pixels"]],
    image_shape: tuple[int, int],
    *,
    size: int = 20,
    title: str = "What the decoder draws across its two latents",
) -> "Figure":
    """Draw the learned manifold of a model with two latents (Kingma & Welling 2013, arXiv 1312.6114, Figure 4).

    Points of a regular grid on the unit square, the centres of its cells, go through the inverse normal CDF: every image
    stands for the same prior probability.

    Args:
        decode: The decoder: E[x | z] for points z, without gradients.
        image_shape: Height and width.
        size: Images along each axis.
        title: Title of the figure.

    Returns:
        A figure with one picture; the first latent grows to the right and the second upwards.
    """
    quantiles = (torch.arange(size) + 0.5) / size
    z = torch.special.ndtri(quantiles)
    points = torch.stack(torch.meshgrid(z, z.flip(0), indexing="xy"), -1)
    with torch.no_grad():
        means = decode(points.flatten(0, 1))
    figure, ax = _draw_grid(means.reshape(size, size, *image_shape), title, width=6.4)
    at = sorted({round(place * (size - 1)) for place in (0.0, 0.25, 0.5, 0.75, 1.0)})
    height, width = image_shape
    ax.set_xticks([(width - 1) / 2 + (width + 1) * i for i in at], [number(z[i].item()) for i in at])
    ax.set_yticks([(height - 1) / 2 + (height + 1) * i for i in at], [number(-z[i].item()) for i in at])
    ax.tick_params(length=2)
    name_axes(ax, "first latent", "second latent", title)
    return figure


def plot_embedding(
    embedding: Float[Tensor, "rows 2"],
    labels: Int[Tensor, " rows"] | None = None,
    *,
    title: str = "Where the guide puts each row",
) -> "Figure":
    """Draw rows as points in a two-dimensional latent space.

    Args:
        embedding: A point for each row, such as the guide's median.
        labels: Class of each row; a class has a colour, and its number stands at its median.
        title: Title of the figure.

    Returns:
        A figure with one scatter for each class.
    """
    figure, (ax,) = blank_figure(6.4, 6.4)
    classes = labels.unique().tolist() if labels is not None else [None]
    for index, name in enumerate(classes):
        points = embedding if labels is None else embedding[labels == name]
        x, y = points.T.numpy(force=True)
        ax.scatter(x, y, s=14, color=MUTED[index % len(MUTED)], alpha=0.75, linewidths=0)
    for name in classes if labels is not None else ():
        x, y = embedding[labels == name].median(0).values.tolist()
        box = {"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": GREY, "alpha": 0.85, "linewidth": 0.6}
        ax.annotate(str(name), (x, y), ha="center", va="center", weight="bold", bbox=box)
    ax.set_aspect("equal", adjustable="datalim")
    ax.grid(color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    name_axes(ax, "first latent", "second latent", title)
    return figure


def plot_log_marginal(result: LogMarginal, *, title: str | None = None) -> "Figure":
    """Draw the estimate of each row with its standard error, and below it the k-hat that says whether to believe them.

    Args:
        result: What ``log_marginal`` returned.
        title: By default the mean with its errors and the number of unreliable rows.

    Returns:
        Two axes that share the rows, sorted by value: nats with bars of one standard error, and Pareto k-hat with the limit
        of 0.7. Unreliable rows are crosses without bars.

    Raises:
        DataError: If there are no rows.
    """
    summary = result.summary()
    figure, (ax, below) = blank_figure(7.0, 5.4, heights=(2.4, 1.0))
    order = result.value.argsort().cpu()
    value, error = (entry.cpu()[order].double() for entry in (result.value, result.standard_error))
    k_hat = result.k_hat.cpu()[order].nan_to_num(nan=math.nan, posinf=math.nan, neginf=math.nan)
    is_flagged = result.is_flagged.cpu()[order]
    place = torch.arange(len(result))
    ax.errorbar(
        place[~is_flagged],
        value[~is_flagged],
        error[~is_flagged],
        fmt=".",
        color=BLUE,
        ecolor="#7fb8d8",
        markersize=4,
        label="value and one standard error",
    )
    below.plot(place[~is_flagged], k_hat[~is_flagged], ".", color=BLUE, markersize=4)
    if is_flagged.any():
        ax.plot(place[is_flagged], value[is_flagged], "x", color=VERMILLION, markersize=5, label="unreliable")
        below.plot(place[is_flagged], k_hat[is_flagged], "x", color=VERMILLION, markersize=5)
    below.axhline(0.7, color=GREY, linestyle="--", linewidth=1)
    below.text(1.005, 0.7, "0.7", color=GREY, fontsize=9, va="center", transform=below.get_yaxis_transform())
    ax.legend(frameon=False, loc="upper left")
    mean = f"{number(summary.mean)} ± {summary.monte_carlo_se:.2g}" if summary.num_void == 0 else number(summary.mean)
    heading = f"{result.label}: mean {mean} nats over {len(result)} rows, {summary.num_flagged} of them unreliable"
    name_axes(ax, "", f"{result.label} (nats)", title or heading)
    name_axes(below, "rows, sorted by value", "Pareto k-hat", "")
    return figure


def _draw_grid(images: Tensor, title: str, *, width: float = 7.0) -> tuple["Figure", "Axes"]:
    """Draw ``[rows, columns, height, width]`` as one picture, one pixel apart."""
    if images.dim() != 4 or images.numel() == 0:
        raise DataError(
            f"Expected images of shape [images, height, width] or [rows, columns, height, width]; got {list(images.shape)}."
        )
    canvas = _tiled(images)
    figure, (ax,) = blank_figure(width, width * canvas.shape[0] / canvas.shape[1] + 0.5)
    ax.imshow(canvas.numpy(), cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_title(title, loc="left", fontsize=11)
    return figure, ax


def _tiled(images: Tensor) -> Tensor:
    """Put ``[rows, columns, height, width]`` side by side, one pixel apart."""
    lines, columns, high, wide = images.shape
    spaced = torch.nn.functional.pad(images.detach().cpu().float(), (0, 1, 0, 1), value=math.nan)
    return spaced.transpose(1, 2).reshape(lines * (high + 1), columns * (wide + 1))[:-1, :-1]
