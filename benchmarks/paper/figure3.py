"""Figure 3: log p(x) against training samples, AEVB, wake-sleep and Monte Carlo EM, by the paper's estimator and better ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.paper.contenders import chosen_rate, snapshots, train
from benchmarks.paper.evidence import compare, summarize, weigh
from benchmarks.paper.pictures import COLOURS, panels, save
from benchmarks.paper.settings import METHODS, Curve, Job
from benchmarks.paper.tables import Row, merge, read_table, write_table

__all__ = ["curves", "run"]

_SAMPLES = 3e6
_HIDDEN = 100
_LATENT = 3
_ON_THE_WAY = ("reciprocal", "bridge")
_AT_THE_END = ("reciprocal", "bridge", "ais", "quadrature")
_POINTS = (1e5, 3e5, 1e6, 3e6)
_POINT_ROWS = 100
_ROWS = 1_000
_QUICK_ROWS = 2
_KEYS = ("method", "num_train")
"""A curve's rows replace all that the tables have of it: networks of other points may be gone."""


def curves(job: Job) -> list[Curve]:
    """List the contenders; the last one, Monte Carlo EM on minibatches, is not the paper's."""
    return [
        job.shrink(Curve("mnist", _LATENT, method, _HIDDEN, num_train))
        for num_train in ((200,) if job.is_quick else (1_000, 50_000))
        for method in ("aevb", "wake_sleep", "mcem")
    ]


def run(job: Job) -> None:
    """Train the contenders and weigh a few digits under each, then more."""
    most = job.num_rows or (_QUICK_ROWS if job.is_quick else _ROWS)
    for curve in curves(job) if job.trains else ():
        train(curve, job.samples(_SAMPLES), job.state)
        _weigh(job, curve, min(most, _POINT_ROWS))
    for curve in curves(job) if job.trains else ():
        _weigh(job, curve, most)
    _write(job)


def _weigh(job: Job, curve: Curve, num_rows: int) -> None:
    """Weigh digits by all estimators at the end, by two of them on the way, and write what there is."""
    points = _points(curve, job)
    for estimator in _AT_THE_END if points else ():
        weigh(job, curve, points[-1], "test", estimator, num_rows=num_rows)
    for samples in points:
        for part in ("test", "train"):
            for estimator in _ON_THE_WAY[: 1 if job.is_quick else None]:
                weigh(job, curve, samples, part, estimator, num_rows=min(num_rows, _POINT_ROWS))
    _write(job)


def _points(curve: Curve, job: Job) -> list[int]:
    """Choose the kept networks nearest below each point of the picture."""
    kept = [samples for samples in snapshots(curve, job.state) if samples]
    if not kept or job.is_quick:
        return kept[-1:]
    below = [[samples for samples in kept if samples <= 1.05 * point] for point in _POINTS]
    return sorted({found[-1] for found in below if found})


def _write(job: Job) -> None:
    """Write what the state holds."""
    means, differences, places = [], [], list(_places(job))
    few: dict[int, int] = {}  # first rows that every point of a panel has
    for place, found in places:
        few[place["num_train"]] = min(few.get(place["num_train"], _POINT_ROWS), len(found.get("bridge", range(_ROWS))))
    for place, found in places:
        means += [
            {**place, "estimator": name, **summarize(rows, few[place["num_train"]])} for name, rows in found.items()
        ]
        differences += [
            {**place, "estimator": name, **compare(rows, found["quadrature"])}
            for name, rows in found.items()
            if "quadrature" in found and name != "quadrature"
        ]
    means = merge(read_table(job.out / "figure3.csv"), means, _KEYS)
    write_table(job.out / "figure3.csv", means)
    write_table(job.out / "estimators.csv", merge(read_table(job.out / "estimators.csv"), differences, _KEYS))
    _draw(means, job.out / "figure3.png")


def _places(job: Job) -> Iterator[tuple[Row, dict[str, list[Row]]]]:
    """Yield each network and part of the data with the rows that are weighed there, by estimator."""
    idle = Job(job.state, job.out, is_quick=job.is_quick, trains=False)
    for curve in curves(job):
        for samples in _points(curve, job):
            for part in ("test", "train"):
                found = {name: weigh(idle, curve, samples, part, name, num_rows=_ROWS) for name in _AT_THE_END}
                place = {**curve.keys, "rate": chosen_rate(curve, job.state), "samples": samples, "part": part}
                yield place, {name: rows for name, rows in found.items() if rows}


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each number of training rows; every point is of the same first rows, as far as they are weighed."""
    numbers = sorted({row["num_train"] for row in rows})
    if not numbers:
        return
    figure, axes = panels(1, len(numbers), width=4.2, height=3.4)
    for ax, num_train in zip(axes, numbers, strict=True):
        own = [row for row in rows if row["num_train"] == num_train]
        for method, name in METHODS.items():
            for part, style in (("test", "-"), ("train", "--")):
                points = sorted(
                    (row["samples"], row["mean_of_first"])
                    for row in own
                    if (row["method"], row["part"], row["estimator"]) == (method, part, "bridge")
                )
                if points:
                    ax.plot(
                        *zip(*points, strict=True), style, marker=".", color=COLOURS[method], label=f"{name}, {part}"
                    )
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(lambda value, place: "")
        ax.set_title(f"$N_{{train}}$ = {num_train:,}", fontsize=10)
        ax.set_xlabel("training samples evaluated", fontsize=9)
    axes[0].set_ylabel("log p(x), by bridge sampling (nats a row)", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, path)
