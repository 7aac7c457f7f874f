"""The page beside the tables and pictures, written from them: each figure, what the paper shows, what agrees and what differs."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper.figure2 import best_bounds
from benchmarks.paper.models import LEAST_SCALE
from benchmarks.paper.settings import METHODS, RATES, Job
from benchmarks.paper.tables import Row, read_table
from benchmarks.result import environment

__all__ = ["run", "write"]

_TARGET = 3_000_000
_NAMES = {"mnist": "MNIST", "frey": "Frey Face"}
_BY_EYE = {3: -135, 5: -120, 10: -107, 20: -104, 200: -105}
"""Test bounds of AEVB that figure 2 of the paper ends at, after 1e8 samples; read by eye, good to 3 nats at best."""
_PUBLISHED = {
    "VAE": "86.76 (Burda et al., Table 1), 87.78 (again by xqding)",
    "IWAE, k = 5": "85.46 (by xqding)",
    "IWAE, k = 50": "84.59 (by xqding)",
}
"""Negative log likelihoods of other networks at other budgets."""


def run(job: Job) -> None:
    """Write ``README.md`` from the tables in the output directory."""
    write(job.out)


def write(out: Path) -> None:
    """Write the page of a directory of tables."""
    sections = (_figure2, _rates, _figure3, _pictures, _variance, _full_bayes, _after)
    lines = [line for section in sections for line in ["", *section(out)]]
    (out / "README.md").write_text("\n".join([*_preface(), *lines, *_differences()]) + "\n", encoding="utf-8")


def _preface() -> list[str]:
    return [
        "# The paper's figures",
        "",
        "Kingma and Welling, *Auto-Encoding Variational Bayes*, [arXiv 1312.6114](https://arxiv.org/abs/1312.6114), on MNIST and "
        "Frey Face, by the public interface of `pyro_aevb` alone: Pyro models, `AEVB.fit`, `SGVB`, `WakeSleep`, `MonteCarloEM`, "
        "`IWELBO`, `log_marginal`, `gradient_report`. This page is written from the tables beside it by "
        "`python -m benchmarks.paper page`.",
        "",
        "```",
        "python -m benchmarks.paper figure2 --state runs         # or figure3, figure4, figure5, variance, full_vb, after",
        "python -m benchmarks.paper all --state runs             # all of them, then this page",
        "python -m benchmarks.paper figure2 --state runs --draw  # train nothing, write what the runs have so far",
        "```",
        "",
        "Runs keep checkpoints in the state directory and go on from them, bit for bit, after an interruption or with more "
        "`--samples`. `PYRO_AEVB_DATA` names the directory of `mnist.npz` and `freyface.npz`.",
        "",
        f"Written on {environment()}; one thread a run, float32, beside other work, so that times are upper limits.",
        "",
        "## Settings",
        "",
        "| what | here | the paper |",
        "|---|---|---|",
        "| networks | one hidden layer of tanh units on either side; MNIST 500, Frey Face 200, figure 3 100 | the same |",
        "| minibatch, draws | M = 100, L = 1 | the same |",
        "| estimator | `SGVB()`: closed-form KL, Eq 7 and 10 | the same |",
        "| optimizer | Adagrad; the step of "
        + ", ".join(map(str, RATES))
        + " with the best training bound after the first 50,000 samples | Adagrad; the same three, by the first iterations |",
        "| first parameters | N(0, 0.01), 0.01 the standard deviation, biases too | N(0, 0.01) |",
        "| prior of weights | N(0, I) on weight matrices, not on biases, as weight decay 1 of a loss summed over the data; in the "
        "sleep phase, a sum over the dreams of a batch, the encoder's decay is M / N | N(0, I), as weight decay |",
        "| MNIST | grey levels as Bernoulli means; first 50,000 train, 10,000 test | not said; 50,000 in figure 3 |",
        "| Frey Face | divided by 256; first 1,600 of 1,965 frames train, the later 365 test | not said |",
        f"| Frey Face's decoder | Gaussian, means by a sigmoid, variance plus ({LEAST_SCALE:.4f})², one grey level | Gaussian, "
        "means by a sigmoid, no floor said |",
        "| curves | both bounds from one draw a row under a fixed seed: first 10,000 training rows, all test rows | not said |",
        "| dreams | binary draws of the Bernoulli decoder, where the encoder meets grey levels awake | not said |",
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(row)} |" for row in rows)]


def _missing(rows: Sequence[Row], title: str) -> list[str]:
    return [] if rows else [title, "", "No run of this part is in the tables yet."]


def _figure2(out: Path) -> list[str]:
    title, rows = "## Figure 2: the bound over training", read_table(out / "figure2.csv")
    if not rows:
        return _missing(rows, title)
    test, train = best_bounds(rows), best_bounds(rows, part="train")
    panels = sorted({key[:2] for key in test}, key=lambda key: (key[0] != "mnist", key[1]))
    both = [panel for panel in panels if all((*panel, method) in test for method in ("aevb", "wake_sleep"))]
    ahead = [panel for panel in both if test[*panel, "aevb"][0] > test[*panel, "wake_sleep"][0]]
    lines = [
        title,
        "",
        "![Figure 2](figure2.png)",
        "",
        *_table(_HEADS2, [_panel(rows, test, train, key) for key in panels]),
    ]
    verdict = (
        f"AEVB's best test bound, up to the samples that both have reached, is above wake-sleep's in {len(ahead)} of "
    )
    lines += ["", f"- {verdict}{len(both)} panels. In the paper it is in all nine."]
    lines += [
        f"- The exception: {_NAMES[data]}, N_z = {latent}." for data, latent in both if (data, latent) not in ahead
    ]
    return [*lines, *_notes2(rows)]


_HEADS2 = (
    "panel",
    "samples of both",
    "AEVB: best test (train)",
    "wake-sleep: best test (train)",
    "AEVB minus wake-sleep",
    "AEVB: last test, at",
    "AEVB in the paper, 1e8 samples, by eye",
)


def _panel(rows: Sequence[Row], test: dict, train: dict, key: tuple[str, int]) -> list[str]:  # type: ignore[type-arg]
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
    return [f"{_NAMES[data]}, N_z = {latent}", f"{reached:,}{partial}", *cells, gap, told, by_eye]


def _notes2(rows: Sequence[Row]) -> list[str]:
    """Say what the issue of overfitting and the rest come to, from the numbers."""
    own = {
        (row["latent"], row["samples"]): row["test_bound"]
        for row in rows
        if (row["data"], row["method"], row["seed"]) == ("mnist", "aevb", 0)
    }
    common = sorted({samples for latent, samples in own if latent == 200} & {n for latent, n in own if latent == 20})
    lines = []
    if common:
        at = common[-1]
        lines.append(
            f"- Superfluous latents do not overfit: after {at:,} samples the test bound of N_z = 200 is {own[200, at]:.1f}, that "
            f"of N_z = 20 is {own[20, at]:.1f}."
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


def _rates(out: Path) -> list[str]:
    rows = read_table(out / "rates.csv")
    if not rows:
        return []
    grouped: dict[tuple[str, int, str], dict[float, float]] = {}
    for row in rows:
        if row["seed"] == 0:
            grouped.setdefault((row["data"], row["latent"], row["method"]), {})[row["rate"]] = row["train_bound"]
    cells = [
        [f"{_NAMES[data]}, N_z = {latent}, {METHODS[method]}", *(f"{found[rate]:.1f}" for rate in sorted(found))]
        for (data, latent, method), found in sorted(
            grouped.items(), key=lambda item: (item[0][0] != "mnist", *item[0][1:])
        )
    ]
    return [
        "Training bounds after the first 50,000 samples, by which the steps are chosen; -inf is a run whose loss overflowed:",
        "",
        *_table(("curve", *map(str, RATES)), cells),
    ]


def _figure3(out: Path) -> list[str]:
    title, rows = "## Figure 3: log p(x) over training", read_table(out / "figure3.csv")
    if not rows:
        return _missing(rows, title)
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
        *_table(heads, cells),
        *_estimators(out),
        "",
        "Monte Carlo EM takes trajectories of 10 leapfrog steps at an acceptance of 0.9 and 5 updates of the weights after each "
        "(App. E). With 1,000 rows a step takes all of them; its variant on minibatches of 50,000 rows is not the paper's, which "
        "left it out there. A sample costs it 10 gradients by the latents and 5 by the weights.",
    ]


def _estimators(out: Path) -> list[str]:
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
            f"{row['difference']:+.4f} ({row['kept']})",
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
        *_table(("N_train, method", "estimator", "mean (digits)", "mean over all", "largest"), cells),
    ]


def _pictures(out: Path) -> list[str]:
    names = sorted(path.name for path in out.glob("figure[45]_*.png"))
    if not names:
        return _missing([], "## Figures 4 and 5: manifolds and draws")
    rows = read_table(out / "figures45.csv")
    told = "; ".join(f"{_NAMES[row['data']]}, N_z = {row['latent']}: {row['samples']:,} samples" for row in rows)
    return [
        "## Figures 4 and 5: manifolds and draws",
        "",
        "Points of a regular grid on the unit square go through the inverse Gaussian distribution function; draws are means of the "
        f"decoder at draws from the prior. AEVB, {told}.",
        "",
        *(f"![{name}]({name})" for name in names),
    ]


def _variance(out: Path) -> list[str]:
    title, rows = "## Sections 2.2 and 2.3: variance of the gradient", read_table(out / "variance.csv")
    if not rows:
        return _missing(rows, title)
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    cells = []
    for samples in sorted({row["samples"] for row in rows}):
        for group, part in (("guide", "encoder"), ("model", "decoder")):
            found = {r["estimator"]: r["variance"] for r in rows if (r["samples"], r["group"]) == (samples, group)}
            cells.append([f"{samples:,}", part, *(f"{found[name] / found['A']:.3g}" for name in names)])
    return [
        title,
        "",
        "![variance](variance.png)",
        "",
        "Variance of the gradient of one batch of 100 digits over that of estimator A (Eq 6), N_z = 20, 500 hidden units. Score is "
        "the estimator that section 2.2 rejects, B is Eq 7; STL, IWAE and DReG (K = 5, another bound) came after the paper:",
        "",
        *_table(("samples", "gradient of", *names), cells),
    ]


def _full_bayes(out: Path) -> list[str]:
    title, rows = "## App. F: variational Bayes over the decoder's weights", read_table(out / "full_vb.csv")
    if not rows:
        return _missing(rows, title)
    names = {"ml": "maximum likelihood", "map": "MAP", "full_vb": "full variational Bayes"}
    cells = [
        [
            names[row["kind"]],
            f"{row['rate']}",
            f"{row['train_bound']:.1f}",
            f"{row['train_bound_without_weights']:.1f}",
            f"{row['test_bound']:.1f}",
            f"{row['test_log_marginal']:.1f} ± {row['rows_error']:.1f} ({row['rows']} digits, {row['flagged']} flagged)",
        ]
        for row in rows
    ]
    heads = (
        "method",
        "step",
        "training bound, weights' KL too",
        "training bound of rows",
        "test bound of rows",
        "test log p(x)",
    )
    return [
        title,
        "",
        f"1,000 training digits, 100 hidden units, three latents, {rows[0]['samples']:,} samples; Eq 24, closed-form KL of weights "
        "and latents. The paper has no experiment for it. Test log p(x) by bridge sampling, under full variational Bayes the mean "
        f"of p(x | weights) over {max(row['global_draws'] for row in rows)} draws of the weights. Nats a row.",
        "",
        *_table(heads, cells),
    ]


def _after(out: Path) -> list[str]:
    title, rows = "## After the paper", read_table(out / "after.csv")
    if not rows:
        return _missing(rows, title)
    cells = [
        [
            row["contender"],
            f"{row['samples']:,}",
            f"{row['seconds']:.0f} s",
            f"{row['test_bound']:.2f}",
            f"{row['importance_weighted']:.2f}",
            f"{row['ais']:.2f} ± {row['monte_carlo_error']:.2f} ({row['flagged']} flagged)",
            _PUBLISHED.get(row["contender"], ""),
        ]
        for row in rows
    ]
    heads = (
        "contender",
        "samples",
        "time",
        "test ELBO",
        "L_5000",
        "log p(x), AIS",
        "published, as -log p(x), at 2e8 samples",
    )
    return [
        title,
        "",
        f"Digits binarised anew at every presentation, 784-100-20-100-784, Adam 1e-3. L_5000 and AIS (1,000 temperatures from the "
        f"prior) on the first {rows[0]['rows']} test digits, binarised once: compare contenders with each other (the error of "
        f"having few digits, {rows[0]['rows_error']:.1f}, is shared). Published values are of 200-200-50 networks after 2e8 "
        "presentations with a falling step, on all test digits: another budget by a factor of 200.",
        "",
        *_table(heads, cells),
    ]


def _differences() -> list[str]:
    return [
        "",
        "## What differs from the paper, and why",
        "",
        "- **Budget.** The paper's curves run to 1e8 samples, these to the numbers in the tables; most bounds still rise there.",
        "- **Grey levels.** A Bernoulli likelihood of grey levels is no likelihood of binary data. A reproduction that thresholds "
        "the digits (GerardoObeid/AutoencodersVariationalBayes) ends more than 20 nats higher, at -80 for N_z = 20 after 1e8 "
        "samples, and finds wake-sleep level with AEVB at 3 and 5 latents.",
        "- **Seeds.** One seed a curve, if nothing else is said; the paper shows one curve a method.",
        "- **The rate.** Chosen early, the step is the one that starts best, which need not be the one that ends best.",
        "- **Frey Face.** A Gaussian likelihood has no upper bound without a floor under its deviation; numbers are comparable "
        "under the same floor alone. The test frames are later in time than the training frames.",
        "- **Adam.** With Adam 1e-3 and 1.2e6 samples of 60,000 digits the same model is within 0.5 nat of hand-written PyTorch: "
        "section `mnist` of [the benchmarks](../RESULTS.md).",
    ]
