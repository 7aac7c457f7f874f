"""log p(x) of digits under one kept network by one estimator, row by row, so that more rows can be added later."""

import math
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.contenders import snapshots
from benchmarks.paper.curves import read_vae
from benchmarks.paper.settings import Curve, Job, load_images
from benchmarks.paper.tables import Row, read_table, write_table
from pyro_aevb import log_marginal
from pyro_aevb.errors import AEVBWarning

__all__ = ["ESTIMATORS", "compare", "settings_of", "summarize", "weigh"]

ESTIMATORS: dict[str, dict[str, Any]] = {
    "reciprocal": {"preset": "paper"},
    "bridge": {},
    "ais": {"start": "prior", "num_temperatures": 1000},
    "quadrature": {},
}
"""Settings of each; ``"reciprocal"`` is the paper's App. D, 50 draws by HMC of 4 leapfrog steps."""
_FEW_DRAWS = {"num_draws": 30, "warmup_steps": 30, "compile": False}
_QUICK: dict[str, dict[str, Any]] = {
    "reciprocal": {"preset": "paper", **_FEW_DRAWS},
    "bridge": _FEW_DRAWS,
    "ais": {"start": "prior", "num_temperatures": 50, "compile": False},
    "quadrature": {"max_evaluations": 60_000, "compile": False},
}
_ROWS_AT_ONCE = 100
_FAR = 0.5
"""Nats that a row may be off without a flag, unless its error says so: an error above it flags the row."""


def _path(job: Job, network: Path, part: str, estimator: str) -> Path:
    """Return where the rows of an estimate are kept: a network trained anew is another, unless its weights are the same."""
    content, mark = torch.load(network, weights_only=True), 0
    for name, value in sorted(content.items()):
        mark = zlib.crc32(value.numpy().tobytes(), zlib.crc32(name.encode(), mark))
    return job.state / "evidence" / f"{network.stem}_{mark:08x}_{part}_{estimator}.csv"


def settings_of(job: Job, estimator: str) -> dict[str, Any]:
    """Return the settings of an estimator, poorer ones for a quick run."""
    return (_QUICK if job.is_quick else ESTIMATORS)[estimator]


def weigh(job: Job, curve: Curve, samples: int, part: str, estimator: str, *, num_rows: int) -> list[Row]:
    """Estimate log p(x) of the first rows without help from an encoder, for contenders without one must be judged alike.

    Args:
        job: Where the networks are; without training, only rows that are done are returned.
        curve: The run.
        samples: Training samples after which its networks were kept.
        part: ``"train"`` or ``"test"``.
        estimator: One of :data:`ESTIMATORS`.
        num_rows: Rows to weigh.

    Returns:
        ``value``, ``standard_error`` (nats), ``is_flagged`` of each row in order.
    """
    network = snapshots(curve, job.state)[samples]
    path = _path(job, network, part, estimator)
    rows = read_table(path)
    if not job.trains or len(rows) >= num_rows:
        return rows[:num_rows]
    vae = read_vae(curve, network)
    x = getattr(load_images(curve.data, curve.num_train), part)[:num_rows]
    while len(rows) < len(x):
        begin, place = time.perf_counter(), len(rows)
        chunk = x[place : place + _ROWS_AT_ONCE]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AEVBWarning)  # flagged rows are counted in the table
            found = log_marginal(
                vae.model, None, chunk, method=estimator, seed=place, progress=False, **settings_of(job, estimator)
            )
        columns = zip(found.value.tolist(), found.standard_error.tolist(), found.is_flagged.int().tolist(), strict=True)
        rows += [dict(zip(("value", "standard_error", "is_flagged"), entry, strict=True)) for entry in columns]
        write_table(path, rows)
        seconds = time.perf_counter() - begin
        sys.stderr.write(f"{path.stem}: {len(rows)} rows, mean {found.value.mean():.2f}, {seconds:.0f} s\n")
    return rows


def summarize(rows: list[Row], few: int) -> Row:
    """Return the mean over rows, its Monte Carlo error and the error of having few rows, nats; and the mean of the first few."""
    value = torch.tensor([row["value"] for row in rows], dtype=torch.float64)
    error = torch.tensor([row["standard_error"] for row in rows], dtype=torch.float64)
    return {
        "rows": len(rows),
        "mean": float(value.mean()),
        "monte_carlo_error": float(error.nan_to_num(0.0).square().sum().sqrt()) / len(rows),
        "rows_error": float(value.std()) / len(rows) ** 0.5 if len(rows) > 1 else 0.0,
        "mean_of_first": float(value[:few].mean()),
        "first": min(few, len(rows)),
        "flagged": sum(row["is_flagged"] for row in rows),
    }


def compare(rows: list[Row], exact: list[Row]) -> Row:
    """Return the mean difference over rows that neither flags with its Monte Carlo error, that over all, and the largest, nats.

    A row whose error is unknown has no part in the mean, as if it were flagged. ``misses`` are rows that no flag tells of, further
    off than half a nat and than four standard errors.
    """
    pairs = list(zip(rows, exact, strict=False))
    sound = [(a, b) for a, b in pairs if not (a["is_flagged"] or b["is_flagged"] or math.isnan(a["standard_error"]))]
    kept = [a["value"] - b["value"] for a, b in sound]
    noise = [a["standard_error"] ** 2 for a, _ in sound]
    every = [a["value"] - b["value"] for a, b in pairs]
    return {
        "rows": len(pairs),
        "kept": len(kept),
        "difference": sum(kept) / len(kept) if kept else math.nan,
        "monte_carlo_error": math.sqrt(sum(noise)) / len(kept) if kept else math.nan,
        "difference_all": sum(every) / len(every),
        "largest": max(every, key=abs),
        "misses": sum(abs(a["value"] - b["value"]) > max(_FAR, 4 * a["standard_error"]) for a, b in sound),
    }
