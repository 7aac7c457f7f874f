"""The page beside the tables and pictures, written from them: each figure, what the paper shows, what agrees and what differs."""

from pathlib import Path

from benchmarks.paper.markdown import NAMES, command, missing, table
from benchmarks.paper.models import LEAST_SCALE
from benchmarks.paper.page_bounds import figure2, other_start, rates
from benchmarks.paper.page_evidence import figure3
from benchmarks.paper.settings import RATES, Job
from benchmarks.paper.tables import read_table
from benchmarks.result import environment

__all__ = ["run", "write"]

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
    sections = (figure2, other_start, rates, figure3, _pictures, _variance, _full_bayes, _after)
    lines = [line for section in sections for line in ["", *section(out)]]
    (out / "README.md").write_text("\n".join([*_preface(), *lines, *_differences()]) + "\n", encoding="utf-8")


def _preface() -> list[str]:
    """Return the head of the page and the settings."""
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
        "| first parameters | N(0, 0.01), 0.01 the standard deviation if nothing else is said, biases too | N(0, 0.01) |",
        "| prior of weights | N(0, I) on weight matrices, not on biases, as weight decay 1 of a loss summed over the data; in the "
        "sleep phase, a sum over the dreams of a batch, the encoder's decay is M / N | N(0, I), as weight decay |",
        "| MNIST | grey levels as Bernoulli means; first 50,000 train, 10,000 test | not said; 50,000 in figure 3 |",
        "| Frey Face | divided by 256; first 1,600 of 1,965 frames train, the later 365 test | not said |",
        f"| Frey Face's decoder | Gaussian, means by a sigmoid, variance plus ({LEAST_SCALE:.4f})², one grey level | Gaussian, "
        "means by a sigmoid, no floor said |",
        "| curves | both bounds from one draw a row under a fixed seed: first 10,000 training rows, all test rows | not said |",
        "| dreams | binary draws of the Bernoulli decoder, where the encoder meets grey levels awake | not said |",
    ]


def _pictures(out: Path) -> list[str]:
    """Return the section of figures 4 and 5."""
    names = sorted(path.name for path in out.glob("figure[45]_*.png"))
    if not names:
        return missing([], "## Figures 4 and 5: manifolds and draws")
    rows = read_table(out / "figures45.csv")
    told = "; ".join(f"{NAMES[row['data']]}, N_z = {row['latent']}: {row['samples']:,} samples" for row in rows)
    return [
        "## Figures 4 and 5: manifolds and draws",
        "",
        "Points of a regular grid on the unit square go through the inverse Gaussian distribution function; draws are means of the "
        f"decoder at draws from the prior. AEVB, {told}.",
        "",
        *(f"![{name}]({name})" for name in names),
        "",
        command("figure4 figure5"),
    ]


def _variance(out: Path) -> list[str]:
    """Return the section of the gradient's variance."""
    title, rows = "## Sections 2.2 and 2.3: variance of the gradient", read_table(out / "variance.csv")
    if not rows:
        return missing(rows, title)
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
        "the estimator that section 2.2 rejects, B is Eq 7; STL, IWAE and DReG came after the paper, the last two of another bound "
        "and with K = 5 draws a row, which alone divide a variance by 5 and cost as much more:",
        "",
        *table(("samples", "gradient of", *names), cells),
        "",
        command("variance", samples=max(row["samples"] for row in rows)),
    ]


def _full_bayes(out: Path) -> list[str]:
    """Return the section of App. F."""
    title, rows = "## App. F: variational Bayes over the decoder's weights", read_table(out / "full_vb.csv")
    if not rows:
        return missing(rows, title)
    names = {"ml": "maximum likelihood", "map": "MAP", "full_vb": "full variational Bayes"}
    cells = [
        [
            names[row["kind"]],
            f"{row['rate']}",
            f"{row['samples']:,}",
            f"{row['train_bound']:.1f}" if row["kind"] == "full_vb" else "",
            f"{row['train_bound_without_weights']:.1f}",
            f"{row['test_bound']:.1f}",
            f"{row['test_log_marginal']:.1f} ± {row['rows_error']:.1f} ({row['rows']} digits, {row['flagged']} flagged)",
        ]
        for row in rows
    ]
    most = max(row["samples"] for row in rows)
    gaps = ", ".join(
        f"{names[row['kind']]} {row['train_bound_without_weights'] - row['test_bound']:.1f}"
        for row in rows
        if row["samples"] == most
    )
    heads = (
        "method",
        "step",
        "samples",
        "training bound, weights' KL too",
        "training bound of rows",
        "test bound of rows",
        "test log p(x)",
    )
    return [
        title,
        "",
        f"1,000 training digits, 100 hidden units, three latents; Eq 24, closed-form KL of weights "
        "and latents. The paper has no experiment for it. Test log p(x) by bridge sampling, under full variational Bayes the mean "
        f"of p(x | weights) over {max(row['global_draws'] for row in rows)} draws of the weights. Its prior N(0, I) covers biases "
        "too, that of MAP matrices alone. Nats a row; values of flagged digits are not to be relied on.",
        "",
        *table(heads, cells),
        "",
        f"Training less test bound of rows after {most:,} samples, which says how much is learned by heart: {gaps}.",
        "",
        command("full_vb", samples=most, rows=max(row["rows"] for row in rows)),
    ]


def _after(out: Path) -> list[str]:
    """Return the section of what came after the paper."""
    title, rows = "## After the paper", read_table(out / "after.csv")
    if not rows:
        return missing(rows, title)
    cells = [
        [
            row["contender"],
            f"{row['parameters']:,}",
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
        "parameters",
        "samples",
        "time",
        "test ELBO",
        "L_5000",
        "log p(x), AIS",
        "published, as -log p(x), budgets of their own",
    )
    return [
        title,
        "",
        f"Digits binarised anew at every presentation, 784-100-20-100-784, Adam 1e-3. L_5000 and AIS (1,000 temperatures from the "
        f"prior) on the first {rows[0]['rows']} test digits, binarised once: compare contenders with each other (the error of "
        f"having few digits, {rows[0]['rows_error']:.1f}, is shared). Automatic guides differ from each other in their family "
        "alone; from the first line in their encoder too, which is larger, has SiLU units and standardises its input. "
        "Published values are of 200-200-50 networks, those of Burda et al. after 2e8 presentations with a falling step, on "
        "all test digits: another budget by a factor of 200.",
        "",
        *table(heads, cells),
        "",
        command("after", samples=rows[0]["samples"], rows=rows[0]["rows"]),
    ]


def _differences() -> list[str]:
    """Return what differs from the paper."""
    return [
        "",
        "## What differs from the paper, and why",
        "",
        "- **Budget.** The paper's curves run to 1e8 samples, these to the numbers in the tables; most bounds still rise there.",
        "- **Grey levels.** A Bernoulli likelihood of grey levels is no likelihood of binary data. A reproduction that thresholds "
        "the digits (GerardoObeid/AutoencodersVariationalBayes) ends more than 20 nats higher, at -80 for N_z = 20 after 1e8 "
        "samples, and finds wake-sleep level with AEVB at 3 and 5 latents.",
        "- **Seeds.** One seed a curve, if nothing else is said (`--seed` makes others); the paper shows one curve a method.",
        "- **The rate.** Chosen early, the step is the one that starts best, which need not be the one that ends best.",
        "- **Frey Face.** A Gaussian likelihood has no upper bound without a floor under its deviation; numbers are comparable "
        "under the same floor alone. The test frames are later in time than the training frames.",
        "- **Adam.** With Adam 1e-3 and 1.2e6 samples of 60,000 digits the same model is within 0.5 nat of hand-written PyTorch: "
        "section `mnist` of [the benchmarks](../RESULTS.md).",
    ]
