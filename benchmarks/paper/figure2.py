"""Figure 2: the lower bound against training samples evaluated, AEVB beside wake-sleep, on MNIST and Frey Face."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.paper.curves import divergence_of, read_vae, train_curve
from benchmarks.paper.pictures import draw_both, panels, save
from benchmarks.paper.settings import (
    HIDDEN,
    INITIAL_SD,
    INITIAL_SDS,
    LATENTS,
    METHODS,
    NUM_TRAIN,
    SEEDS,
    Curve,
    Job,
    load_images,
)
from benchmarks.paper.tables import Row, merge, read_table, write_table

__all__ = ["Best", "best_bounds", "curves", "picture_of", "run"]

Best = dict[tuple[str, int, str], tuple[float, int]]
"""``{(data, latent, method): (bound, samples of both methods)}``."""

_SAMPLES = 3e6
_MORE_SAMPLES = 1e7
"""For MNIST with 20 latents."""
_QUICK_LATENTS = {"mnist": (3, 20), "frey": (2,)}
_SHOWN_FROM = 3e4
_KEYS = ("data", "latent", "method", "initial_sd", "seed")
_NAMES = {"mnist": "MNIST", "frey": "Frey Face"}


def curves(job: Job) -> list[Curve]:
    """List the curves of the figure, those first that say most."""
    latents = _QUICK_LATENTS if job.is_quick else {"mnist": (20, 3, 5, 10, 200), "frey": LATENTS["frey"]}
    return [
        job.shrink(Curve(data, latent, method, HIDDEN[data], NUM_TRAIN[data], job.seed, job.initial_sd))
        for data in ("mnist", "frey")
        for latent in latents[data]
        for method in ("aevb", "wake_sleep")
    ]


def run(job: Job) -> None:
    """Train the curves one after the other, and write table and picture after each."""
    for curve in curves(job) if job.trains else ():
        train_curve(curve, job.samples(_MORE_SAMPLES if curve.latent == 20 and curve.is_grey else _SAMPLES), job.state)
        _write(job)
    _write(job)


def _write(job: Job) -> None:
    """Write what the state holds; curves that it does not hold stay as they were."""
    found = [(curve, job.state / f"{curve.name}.csv") for curve in _known_curves(job)]
    rows, rates = [], []
    for curve, path in found:
        noted = read_table(path.with_name(f"{curve.name}_rates.csv"))
        best = max(noted, key=lambda row: row["train_bound"])["rate"] if noted else None
        rows += [{**curve.keys, "rate": best, **row} for row in _with_divergence(curve, path)]
        rates += [{**curve.keys, **row} for row in noted]
    rows = merge(read_table(job.out / "figure2.csv"), rows, _KEYS)
    write_table(job.out / "figure2.csv", sorted(rows, key=lambda row: (*(row[key] for key in _KEYS), row["samples"])))
    write_table(job.out / "rates.csv", merge(read_table(job.out / "rates.csv"), rates, _KEYS))
    for initial_sd in INITIAL_SDS:
        _draw([row for row in rows if row["initial_sd"] == initial_sd], job.out / picture_of(initial_sd))


def _with_divergence(curve: Curve, path: Path) -> list[Row]:
    """Return a curve's points; the last one with its KL, should it lack that, by the networks that are kept."""
    rows, networks = read_table(path), path.with_suffix(".pt")
    if rows and not isinstance(rows[-1].get("train_kl"), int | float) and networks.is_file():
        rows[-1]["train_kl"] = divergence_of(read_vae(curve, networks), load_images(curve.data, curve.num_train).train)
    return rows


def _known_curves(job: Job) -> list[Curve]:
    """List the figure's curves under every start and seed that the state may hold."""
    return [replace(curve, seed=s, initial_sd=sd) for curve in curves(job) for sd in INITIAL_SDS for s in SEEDS]


def picture_of(initial_sd: float) -> str:
    """Name the picture of the curves that start so."""
    return "figure2.png" if initial_sd == INITIAL_SD else f"figure2_sd{initial_sd}.png"


def best_bounds(rows: Sequence[Row], *, part: str = "test", seed: int = 0) -> Best:
    """Return each curve's best bound, nats a row, up to the number of samples that both methods of its panel reached.

    Args:
        rows: Rows of ``figure2.csv``.
        part: ``"test"`` or ``"train"``.
        seed: Seed of the curves.

    Returns:
        Bound and samples by curve.
    """
    grouped: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if row["seed"] == seed:
            grouped.setdefault((row["data"], row["latent"], row["method"]), []).append(row)
    best = {}
    for (data, latent, method), own in grouped.items():
        panel = [items for key, items in grouped.items() if key[:2] == (data, latent)]
        reached = min(max(row["samples"] for row in items) for items in panel)
        best[data, latent, method] = max(row[f"{part}_bound"] for row in own if row["samples"] <= reached), reached
    return best


def _lowest(rows: Sequence[Row], latent: int) -> float:
    """Return where the axis of a panel of digits begins: where the paper's does, or below what the runs end at."""
    own = [row for row in rows if (row["data"], row["latent"]) == ("mnist", latent)]
    ends = [
        max((r for r in own if r["method"] == name), key=lambda row: row["samples"])
        for name in {r["method"] for r in own}
    ]
    return min(-175.0, *(row["test_bound"] - 10 for row in ends))


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each number of latents, MNIST above and Frey Face below, as far as there are runs."""
    first = [row for row in rows if row["seed"] == 0]
    present = [data for data in LATENTS if any(row["data"] == data for row in first)]
    if not present:
        return
    columns = max(len({row["latent"] for row in first if row["data"] == data}) for data in present)
    most = max(row["samples"] for row in first)
    figure, axes = panels(len(present), columns)
    for line, data in enumerate(present):
        latents = sorted({row["latent"] for row in first if row["data"] == data})
        own = axes[line * columns : (line + 1) * columns]
        for ax, latent in zip(own, latents, strict=False):
            for method in ("aevb", "wake_sleep"):
                part = [row for row in first if (row["data"], row["latent"], row["method"]) == (data, latent, method)]
                draw_both(ax, sorted(part, key=lambda row: row["samples"]), method, METHODS[method])
            ax.set_title(f"{_NAMES[data]}, $N_z$ = {latent}", fontsize=9)
            ax.set_ylim(*((_lowest(first, latent), -100) if data == "mnist" else (0, 1600)))
            if most > 2 * _SHOWN_FROM:
                ax.set_xlim(_SHOWN_FROM, 1.1 * most)
            ax.set_xlabel("training samples evaluated", fontsize=8)
        for ax in own[len(latents) :]:
            ax.set_visible(False)
        own[0].set_ylabel("lower bound (nats a row)", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)
