"""What the page says of figure 3, from its tables."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper.markdown import command, missing, table
from benchmarks.paper.settings import METHODS
from benchmarks.paper.tables import Row, read_table

__all__ = ["figure3"]

_ESTIMATORS = {"reciprocal": "App. D", "bridge": "bridge", "ais": "AIS", "quadrature": "quadrature"}
_CLOSE = 0.1
"""Nats that estimators may differ by in the mean."""
_FULL = 1_000
"""Digits that the estimators are to be compared on."""
Ends = dict[tuple[int, str], int]
"""The most samples of each contender."""


def figure3(out: Path) -> list[str]:
    """Return the section of figure 3."""
    title, rows = "## Figure 3: log p(x) over training", read_table(out / "figure3.csv")
    if not rows:
        return missing(rows, title)
    ends: Ends = {}
    for row in rows:
        key = (row["num_train"], row["method"])
        ends[key] = max(ends.get(key, 0), row["samples"])
    heads = ("N_train", "method", "step", "samples", *_ESTIMATORS.values())
    return [
        title,
        "",
        "![Figure 3](figure3.png)",
        "",
        "100 hidden units, three latents. Mean log p(x) of the first test digits, nats, ± the error of having few digits (their "
        "number). No encoder helps: chains and annealing start from the prior. Steps are chosen as in figure 2; that of Monte "
        "Carlo EM, which has no bound, by quick annealing of 20 training digits.",
        "",
        *table(heads, [_contender(rows, key, samples) for key, samples in sorted(ends.items())]),
        "",
        "- In the paper, after up to 6e7 samples, AEVB is above wake-sleep in both panels, and ends near -127 with 50,000 training "
        "digits (as recalled, not measured off its figure).",
        *_order(rows, ends),
        *_peaks(rows),
        *_estimators(out),
        "",
        "Monte Carlo EM takes trajectories of 10 leapfrog steps at an acceptance of 0.9 and 5 updates of the weights after each "
        "(App. E). With 1,000 rows a step takes all of them; its variant on minibatches of 50,000 rows is not the paper's, which "
        "left it out there. A sample costs it 11 gradients by the latents and 5 by the weights.",
        "",
        command("figure3", samples=max(ends.values()), rows=max(row["rows"] for row in rows)),
    ]


def _contender(rows: Sequence[Row], key: tuple[int, str], samples: int) -> list[str]:
    """Return a contender's line of the table."""
    num_train, method = key
    own = [row for row in rows if (row["num_train"], row["method"], row["samples"]) == (num_train, method, samples)]
    found = {row["estimator"]: row for row in own if row["part"] == "test"}
    told = [
        f"{found[name]['mean']:.2f} ± {found[name]['rows_error']:.2f} ({found[name]['rows']})" if name in found else ""
        for name in _ESTIMATORS
    ]
    return [f"{num_train:,}", METHODS[method], f"{own[0]['rate']}", f"{samples:,}", *told]


def _order(rows: Sequence[Row], ends: Ends) -> list[str]:
    """Say how the contenders end, by the first digits, new ones and those that they learned from."""
    lines = []
    for num_train in sorted({num_train for num_train, _ in ends}):
        told, counts = {}, set()
        for method, name in METHODS.items():
            found = {
                row["part"]: row
                for row in rows
                if (row["num_train"], row["method"], row["estimator"]) == (num_train, method, "bridge")
                and row["samples"] == ends.get((num_train, method))
            }
            if len(found) == 2:
                told[name] = (found["test"]["mean_of_first"], found["train"]["mean_of_first"])
                counts |= {row["first"] for row in found.values()}
        if told and len(counts) == 1:
            best = max(told, key=lambda name: told[name][0])
            values = ", ".join(f"{name} {test:.1f} ({train:.1f})" for name, (test, train) in told.items())
            lines.append(
                f"- Bridge sampling, {num_train:,} training digits, the first {counts.pop()} new digits (training digits): "
                f"{values}. Highest on new digits: {best}."
            )
    return lines


def _peaks(rows: Sequence[Row]) -> list[str]:
    """Say which contenders were better on new digits before the end."""
    lines = []
    own = [row for row in rows if (row["estimator"], row["part"]) == ("bridge", "test")]
    for num_train, method in sorted({(row["num_train"], row["method"]) for row in own}):
        part = sorted(
            (row for row in own if (row["num_train"], row["method"]) == (num_train, method)),
            key=lambda row: row["samples"],
        )
        same = [row for row in part if row["first"] == part[-1]["first"]]
        best = max(same, key=lambda row: row["mean_of_first"])
        if best["samples"] < part[-1]["samples"]:
            lines.append(
                f"- {METHODS[method]}, {num_train:,} training digits: new digits are likeliest, {best['mean_of_first']:.1f}, after "
                f"{best['samples']:,} samples, and {part[-1]['mean_of_first']:.1f} after {part[-1]['samples']:,}."
            )
    return lines


def _estimators(out: Path) -> list[str]:
    """Return the table of differences to quadrature, and what it says."""
    rows = read_table(out / "estimators.csv")
    if not rows:
        return []
    last: Ends = {}
    for row in rows:
        key = (row["num_train"], row["method"])
        last[key] = max(last.get(key, 0), row["samples"])
    final = [
        row
        for row in sorted(rows, key=lambda row: (row["num_train"], row["method"], row["estimator"]))
        if row["samples"] == last[row["num_train"], row["method"]]
    ]
    cells = [
        [
            f"{row['num_train']:,}, {METHODS[row['method']]}",
            _ESTIMATORS[row["estimator"]],
            f"{row['difference']:+.4f} ± {row['monte_carlo_error']:.4f} ({row['kept']})",
            f"{row['difference_all']:+.4f} ({row['rows']})",
            f"{row['largest']:+.2f}",
            f"{row['misses']}",
        ]
        for row in final
    ]
    heads = (
        "N_train, method",
        "estimator",
        "mean ± Monte Carlo error (digits)",
        "mean over all",
        "largest",
        "unflagged misses",
    )
    return [
        "",
        "Differences to quadrature, nats: the mean over digits that neither flags as unreliable, over all, and the largest of one "
        "digit; digits off by more than half a nat and four standard errors without a flag. App. D is the paper's estimator on 50 "
        "draws after 4 leapfrog steps each, here taken at equal distances from 16 long chains, once for the density and once more "
        "for the mean: with more care than the paper tells of.",
        "",
        *table(heads, cells),
        "",
        *_agreement(final),
    ]


def _agreement(rows: Sequence[Row]) -> list[str]:
    """Say which estimators agree with quadrature, and how far App. D is off."""
    lines = []
    for num_train in sorted({row["num_train"] for row in rows}):
        checked = [row for row in rows if row["num_train"] == num_train and row["estimator"] in ("bridge", "ais")]
        apart = [row for row in checked if abs(row["difference"]) > _CLOSE]
        few = min((row["rows"] for row in checked), default=0)
        lines.append(
            f"- {num_train:,} training digits: bridge sampling and AIS are within {_CLOSE} nats of quadrature in the mean in "
            f"{len(checked) - len(apart)} of {len(checked)} cases, on {few:,} test digits{'' if few >= _FULL else ' so far'}."
        )
        lines += [
            f"- Further off: {_ESTIMATORS[row['estimator']]}, {METHODS[row['method']]} with {num_train:,} digits, by "
            f"{row['difference']:+.3f} ± {row['monte_carlo_error']:.3f}."
            for row in apart
        ]
    misses = []
    for name in ("bridge", "ais"):
        own = [row for row in rows if row["estimator"] == name]
        total, missed = (sum(row[column] for row in own) for column in ("rows", "misses"))
        misses.append(f"{missed} of {total:,} by {_ESTIMATORS[name]}")
    lines.append(
        "- Without an encoder all chains start where annealing ends, and of a mode that it never finds no flag tells: so misled "
        f"are {' and '.join(misses)}."
    )
    paper = [row for row in rows if row["estimator"] == "reciprocal"]
    if paper:
        low, high = (pick(row["difference_all"] for row in paper) for pick in (min, max))
        worst = max(paper, key=lambda row: abs(row["largest"]))
        lines.append(
            f"- App. D is off by {low:+.3f} to {high:+.3f} nats in the mean over all digits, and by {worst['largest']:+.2f} in the "
            f"worst ({METHODS[worst['method']]}, {worst['num_train']:,} training digits)."
        )
    return lines
