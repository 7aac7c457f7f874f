"""Sections 2.2 and 2.3: the variance of each estimator of the gradient, while the autoencoder of digits is trained."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.paper.contenders import snapshots
from benchmarks.paper.curves import read_vae, train_curve
from benchmarks.paper.pictures import panels, save
from benchmarks.paper.settings import BATCH_SIZE, HIDDEN, NUM_TRAIN, Curve, Job, load_images
from benchmarks.paper.tables import Row, read_table, write_table
from pyro_aevb import gradient_report

__all__ = ["run"]

_SAMPLES = 1e6
_POINTS = (0, 5e4, 3e5, 1e6)
_GRADIENTS, _REFERENCES = 100, 20
_QUICK_GRADIENTS, _QUICK_REFERENCES = 4, 2
_COLOURS = {"score": "#666666", "A": "#0072B2", "B": "#56B4E9", "STL": "#117733", "IWAE": "#D55E00", "DReG": "#CC79A7"}


def run(job: Job) -> None:
    """Measure all estimators on one batch at some points of training, and write ``variance.csv`` and ``variance.png``."""
    curve, state = job.shrink(Curve("mnist", 20, "aevb", HIDDEN["mnist"], NUM_TRAIN["mnist"])), job.state / "variance"
    if job.trains:
        train_curve(curve, job.samples(_SAMPLES), state, keeps_snapshots=True)
        _measure(job, curve, state)
    rows = read_table(state / "variance.csv") or read_table(job.out / "variance.csv")
    write_table(job.out / "variance.csv", rows)
    _draw(rows, job.out / "variance.png")


def _measure(job: Job, curve: Curve, state: Path) -> None:
    """Add the points that are missing."""
    kept, rows = snapshots(curve, state), read_table(state / "variance.csv")
    num_samples, num_reference = (_QUICK_GRADIENTS, _QUICK_REFERENCES) if job.is_quick else (_GRADIENTS, _REFERENCES)
    x = load_images(curve.data, curve.num_train).train[:BATCH_SIZE]
    chosen = sorted({max(samples for samples in kept if samples <= point) for point in _POINTS})
    for samples in chosen[:: len(chosen) - 1] if job.is_quick else chosen:
        if any(row["samples"] == samples for row in rows):
            continue
        vae = read_vae(curve, kept[samples])
        report = gradient_report(
            vae.model,
            vae.guide,
            x,
            num_samples=num_samples,
            num_reference=num_reference,
            num_data=curve.num_train,
            seed=0,
            progress=False,
        )
        rows += [{"samples": samples, **asdict(entry)} for entry in report.estimates]
        write_table(state / "variance.csv", rows)
        sys.stderr.write(f"variance after {samples:,} samples: {report.recommendation}\n")


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the variance of the encoder's and of the decoder's gradient over training."""
    if not rows:
        return
    points = sorted({row["samples"] for row in rows})
    figure, axes = panels(1, 2, width=4.2, height=3.4)
    for ax, group, name in zip(axes, ("guide", "model"), ("encoder", "decoder"), strict=True):
        for estimator, colour in _COLOURS.items():
            values = [
                row["variance"]
                for samples in points
                for row in rows
                if (row["samples"], row["estimator"], row["group"]) == (samples, estimator, group)
            ]
            ax.plot(range(len(values)), values, marker=".", color=colour, label=estimator)
        ax.set_yscale("log")
        ax.set_xticks(range(len(points)), [f"{samples:,}" for samples in points], fontsize=7)
        ax.set_xlabel("training samples evaluated", fontsize=9)
        ax.set_title(f"gradient of the {name}", fontsize=10)
    axes[0].set_ylabel("summed variance (nats² over the data set)", fontsize=9)
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, path)
