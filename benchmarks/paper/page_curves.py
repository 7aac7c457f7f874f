"""What the page says of figures 2 and 3, from their tables."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper.figure2 import Best, best_bounds
from benchmarks.paper.models import LEAST_SCALE
from benchmarks.paper.settings import METHODS, RATES
from benchmarks.paper.tables import Row, read_table

__all__ = ["NAMES", "command", "figure2", "figure3", "missing", "rates", "table"]

_TARGET = 3_000_000
_LATE = 100_000
_CLOSE = 2.0
"""Nats between the test bounds of 20 and 200 latents that are called no difference."""
_DEAD = 0.1
"""Nats of KL below which latents are called dead, after so many samples."""
NAMES = {"mnist": "MNIST", "frey": "Frey Face"}
_BY_EYE = {3: -135, 5: -120, 10: -107, 20: -104, 200: -105}
"""Test bounds of AEVB that figure 2 of the paper ends at, after 1e8 samples; read by eye, good to 3 nats at best."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(row)} |" for row in rows)]


def missing(rows: Sequence[Row], title: str) -> list[str]:
    """Return a section that says that nothing is there yet, unless something is."""
    return [] if rows else [title, "", "No run of this part is in the tables yet."]


def command(part: str, **settings: int) -> str:
    """Return the command that a section is of."""
    return f"`{' '.join(['python -m benchmarks.paper', part, *(f'--{name} {value}' for name, value in settings.items())])}`"


def figure2(out: Path) -> list[str]:
    """Return the section of figure 2."""
    title, rows = "## Figure 2: the bound over training", read_table(out / "figure2.csv")
    if not rows:
        return missing(rows, title)
    test, train = best_bounds(rows), best_bounds(rows, part="train")
    panels = sorted({key[:2] for key in test}, key=lambda key: (key[0] != "mnist", key[1]))
    both = [panel for panel in panels if all((*panel, method) in test for method in ("aevb", "wake_sleep"))]
    ahead = [panel for panel in both if test[*panel, "aevb"][0] > test[*panel, "wake_sleep"][0]]
    lines = [
        title,
        "",
        "![Figure 2](figure2.png)",
        "",
        *table(_HEADS2, [_panel(rows, test, train, key) for key in panels]),
    ]
    verdict = (
        f"AEVB's best test bound, up to the samples that both have reached, is above wake-sleep's in {len(ahead)} of "
    )
    lines += ["", f"- {verdict}{len(both)} panels. In the paper it is in all nine."]
    lines += [
        f"- The exception: {NAMES[data]}, N_z = {latent}." for data, latent in both if (data, latent) not in ahead
    ]
    ends = [max((row for row in rows if _curve_of(row) == key), key=lambda row: row["samples"]) for key in test]
    minutes = sum(row["seconds"] for row in ends) / 60
    return [
        *lines,
        *_notes2(rows),
        "",
        f"`python -m benchmarks.paper figure2`: {minutes:.0f} minutes of training so far.",
    ]


def _curve_of(row: Row) -> tuple[str, int, str]:
    """Return the curve of a row."""
    return row["data"], row["latent"], row["method"]


_HEADS2 = (
    "panel",
    "samples of both",
    "AEVB: best test (train)",
    "wake-sleep: best test (train)",
    "AEVB minus wake-sleep",
    "AEVB: last test, at",
    "AEVB in the paper, 1e8 samples, by eye",
)


def _panel(rows: Sequence[Row], test: Best, train: Best, key: tuple[str, int]) -> list[str]:
    """Return a panel's line of the table."""
    data, latent = key
    cells = [
        f"{test[*key, method][0]:.1f} ({train[*key, method][0]:.1f})" if (*key, method) in test else "not run yet"
        for method in ("aevb", "wake_sleep")
    ]
    has_both = all((*key, method) in test for method in ("aevb", "wake_sleep"))
    gap = f"{test[*key, 'aevb'][0] - test[*key, 'wake_sleep'][0]:+.1f}" if has_both else ""
    reached = next(samples for method in METHODS if (*key, method) in test for samples in [test[*key, method][1]])
    own = [row for row in rows if (row["data"], row["latent"], row["method"], row["seed"]) == (data, latent, "aevb", 0)]
    last = max(own, key=lambda row: row["samples"]) if own else None
    told = f"{last['test_bound']:.1f}, {last['samples']:,}" if last else ""
    by_eye = f"{_BY_EYE[latent]}" if data == "mnist" else "1200 to 1500 over the panels"
    partial = "" if reached >= 0.98 * _TARGET else " (partial)"
    return [f"{NAMES[data]}, N_z = {latent}", f"{reached:,}{partial}", *cells, gap, told, by_eye]


def _notes2(rows: Sequence[Row]) -> list[str]:
    """Say from the numbers what superfluous latents, faces, floors and times come to."""
    own = {
        (row["latent"], row["samples"]): row["test_bound"]
        for row in rows
        if (row["data"], row["method"], row["seed"]) == ("mnist", "aevb", 0)
    }
    common = sorted({samples for latent, samples in own if latent == 200} & {n for latent, n in own if latent == 20})
    lines = []
    if common:
        at = common[-1]
        behind, learned = own[20, at] - own[200, at], max(r["train_bound"] for r in rows if _is_end(r, at))
        lines.append(
            f"- Superfluous latents: after {at:,} samples the test bound of N_z = 200 is {own[200, at]:.1f}, its training bound "
            f"{learned:.1f}, and the test bound of N_z = 20 {own[20, at]:.1f}: {behind:+.1f} nats, "
            f"{'within' if abs(behind) <= _CLOSE else 'more than'} {_CLOSE:.0f}."
        )
    faces = [row for row in rows if row["data"] == "frey" and row["method"] == "aevb"]
    for latent in sorted({row["latent"] for row in faces}):
        part = sorted((row for row in faces if row["latent"] == latent), key=lambda row: row["samples"])
        best = max(part, key=lambda row: row["test_bound"])
        lines.append(
            f"- Frey Face, N_z = {latent}, AEVB: the test bound is highest, {best['test_bound']:.0f}, after {best['samples']:,} "
            f"samples, and {part[-1]['test_bound']:.0f} after {part[-1]['samples']:,}, where the training bound is "
            f"{part[-1]['train_bound']:.0f}."
        )
    lines += _asleep(rows)
    scales = [row["least_scale"] for row in rows if isinstance(row.get("least_scale"), float)]
    if scales:
        lines.append(
            f"- The least standard deviation of a pixel of any Frey Face run is {min(scales):.5f}; the floor is {LEAST_SCALE:.5f}. "
            "Densities of faces depend on it, and so do their bounds."
        )
    seconds = [row["seconds"] / row["samples"] for row in rows if row["data"] == "mnist" and row["method"] == "aevb"]
    if seconds:
        lines.append(
            f"- A million samples of MNIST by AEVB took {min(seconds) * 1e6:.0f} s at best, on one thread; the paper's took 20 to "
            "40 minutes."
        )
    return lines


def _is_end(row: Row, samples: int) -> bool:
    """Tell whether a row is AEVB's with 200 latents after so many samples."""
    return (*_curve_of(row), row["samples"], row["seed"]) == ("mnist", 200, "aevb", samples, 0)


def _asleep(rows: Sequence[Row]) -> list[str]:
    """Tell of wake-sleep runs whose latents are dead."""
    late = [row for row in rows if row["method"] == "wake_sleep" and row["samples"] >= _LATE]
    asleep = [row for row in late if isinstance(kl := row.get("train_kl"), float) and kl < _DEAD]
    lines = []
    for data in sorted({row["data"] for row in asleep}):
        own = [row for row in asleep if row["data"] == data]
        latents = ", ".join(str(latent) for latent in sorted({row["latent"] for row in own}))
        samples, kl = max(row["samples"] for row in own), max(row["train_kl"] for row in own)
        lines.append(
            f"- Wake-sleep on {NAMES[data]} does not begin to use its latents within {samples:,} samples, N_z = {latents}: its "
            f"encoder tells {kl:.3f} nats of a row at most. At the start dreams of a decoder that ignores its latents teach the "
            "encoder nothing, and latents that tell nothing teach the decoder to ignore them. AEVB leaves this point at once."
        )
    return lines


def rates(out: Path) -> list[str]:
    """Return the table that the rates were chosen by."""
    rows = read_table(out / "rates.csv")
    if not rows:
        return []
    grouped: dict[tuple[str, int, str], dict[float, float]] = {}
    for row in rows:
        if row["seed"] == 0:
            grouped.setdefault((row["data"], row["latent"], row["method"]), {})[row["rate"]] = row["train_bound"]
    cells = [
        [f"{NAMES[data]}, N_z = {latent}, {METHODS[method]}", *(f"{found[rate]:.1f}" for rate in sorted(found))]
        for (data, latent, method), found in sorted(
            grouped.items(), key=lambda item: (item[0][0] != "mnist", *item[0][1:])
        )
    ]
    return [
        "Training bounds after the first 50,000 samples, by which the steps are chosen; -inf is a run whose loss overflowed:",
        "",
        *table(("curve", *map(str, RATES)), cells),
    ]


def figure3(out: Path) -> list[str]:
    """Return the section of figure 3."""
    title, rows = "## Figure 3: log p(x) over training", read_table(out / "figure3.csv")
    if not rows:
        return missing(rows, title)
    ends: dict[tuple[int, str], int] = {}
    for row in rows:
        key = (row["num_train"], row["method"])
        ends[key] = max(ends.get(key, 0), row["samples"])
    cells = []
    for (num_train, method), samples in sorted(ends.items()):
        found = {
            row["estimator"]: row
            for row in rows
            if (row["num_train"], row["method"], row["samples"], row["part"]) == (num_train, method, samples, "test")
        }
        told = [
            f"{found[name]['mean']:.2f} ± {found[name]['rows_error']:.2f} ({found[name]['rows']})"
            if name in found
            else ""
            for name in ("reciprocal", "bridge", "ais", "quadrature")
        ]
        cells.append([f"{num_train:,}", METHODS[method], f"{samples:,}", *told])
    heads = ("N_train", "method", "samples", "App. D", "bridge", "AIS", "quadrature")
    return [
        title,
        "",
        "![Figure 3](figure3.png)",
        "",
        "100 hidden units, three latents. Mean log p(x) of the first test digits, nats, ± the error of having few digits (their "
        "number). No encoder helps: chains and annealing start from the prior.",
        "",
        *table(heads, cells),
        "",
        "- In the paper, after up to 6e7 samples, AEVB is above wake-sleep in both panels, and ends near -127 with 50,000 training "
        "digits (by eye, good to 3 nats at best).",
        *_order3(rows, ends),
        *_estimators(out),
        "",
        "Monte Carlo EM takes trajectories of 10 leapfrog steps at an acceptance of 0.9 and 5 updates of the weights after each "
        "(App. E). With 1,000 rows a step takes all of them; its variant on minibatches of 50,000 rows is not the paper's, which "
        "left it out there. A sample costs it 10 gradients by the latents and 5 by the weights.",
        "",
        command("figure3", samples=max(ends.values()), rows=max(row["rows"] for row in rows)),
    ]


def _order3(rows: Sequence[Row], ends: dict[tuple[int, str], int]) -> list[str]:
    """Say how the contenders end, on the same digits, new ones and those that they learned from."""
    lines = []
    for num_train in sorted({num_train for num_train, _ in ends}):
        told = []
        for method, name in METHODS.items():
            found = {
                row["part"]: row["mean"]
                for row in rows
                if (row["num_train"], row["method"], row["estimator"]) == (num_train, method, "bridge")
                and row["samples"] == ends.get((num_train, method))
            }
            if len(found) == 2:
                told.append(f"{name} {found['test']:.1f} ({found['train']:.1f})")
        if told:
            lines.append(
                f"- Bridge sampling, {num_train:,} training digits, new digits (training digits): {', '.join(told)}."
            )
    return lines


def _estimators(out: Path) -> list[str]:
    """Return the table of differences to quadrature."""
    rows = read_table(out / "estimators.csv")
    if not rows:
        return []
    last = {
        (row["num_train"], row["method"]): max(r["samples"] for r in rows if r["method"] == row["method"])
        for row in rows
    }
    cells = [
        [
            f"{row['num_train']:,}, {METHODS[row['method']]}",
            {"reciprocal": "App. D", "bridge": "bridge", "ais": "AIS"}[row["estimator"]],
            f"{row['difference']:+.4f} ± {row['monte_carlo_error']:.4f} ({row['kept']})",
            f"{row['difference_all']:+.4f} ({row['rows']})",
            f"{row['largest']:+.2f}",
        ]
        for row in sorted(rows, key=lambda row: (row["num_train"], row["method"], row["estimator"]))
        if row["samples"] >= 0.9 * last[row["num_train"], row["method"]]
    ]
    return [
        "",
        "Differences to quadrature, nats: the mean over digits that neither flags as unreliable, over all, and the largest of one "
        "digit. App. D is the paper's estimator with its 50 draws by HMC of 4 leapfrog steps:",
        "",
        *table(
            ("N_train, method", "estimator", "mean ± Monte Carlo error (digits)", "mean over all", "largest"), cells
        ),
    ]
