"""The demo's questions to its guide: is it the posterior, where is its bound lost, and which latents does it use?"""

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_aevb.demo import page
from pyro_aevb.demo.trial import Trial, nats
from pyro_aevb.diagnostics.collapse_plots import plot_collapse
from pyro_aevb.diagnostics.collapse_result import CollapseReport
from pyro_aevb.diagnostics.comparison_plots import plot_comparison
from pyro_aevb.diagnostics.comparison_result import Comparison, WorstCoordinates
from pyro_aevb.diagnostics.gap import InferenceGap
from pyro_aevb.diagnostics.gap_plots import plot_gap
from pyro_aevb.diagnostics.report import TrustReport
from pyro_aevb.errors import UnreliableWarning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TRUST_CAPTIONS", "draw_trust", "examine", "trust_sections"]

NUM_EXAMINED = 12
"""Digits whose posterior is sampled by Hamiltonian Monte Carlo, too."""
SAMPLING: dict[str, Any] = {"num_samples": 400, "warmup_steps": 300}
"""Chains that converge on nearly every digit: with half as many steps, those of one digit in twelve do not."""
EVIDENCE: dict[str, Any] = {}
"""Settings of the ledger; its own defaults."""

TRUST_CAPTIONS = {
    "comparison": "Guide beside chains, digit by digit (numbers: rows of the test set), those furthest apart on the left. A point "
    "is the worst of the digit's latents. Dashed: where the points would lie if q were the posterior. Bars and the grey band: two "
    "standard errors; dotted: what chance alone makes. Red line: k-hat of 0.7, above which weights are of no use. Crosses: "
    "digits whose chains are unreliable.",
    "gap": "What the guide's bound lacks of log p(x), digit by digit. Blue: what no normal with independent coordinates could get "
    "back. Vermillion: what this encoder loses against the best such normal for that very digit.",
    "collapse": "Left: what each latent adds to the KL term after training, latents that vary most over the digits on top; grey "
    "ones are not used. Right: the same over training, stacked, and how much the latents tell of which digit they belong to "
    "(dashed).",
}


def examine(trial: Trial, unseen: Tensor, *, seed: int, progress: bool) -> TrustReport:
    """Hold the guide against Hamiltonian Monte Carlo on the first digits, and split what its bound lacks there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)  # the page counts them
        settings: dict[str, Any] = {"sampling": SAMPLING, "evidence": EVIDENCE, "num_simulations": 0}
        return trial.vi.compare(unseen[:NUM_EXAMINED], seed=seed, progress=progress, **settings)


def draw_trust(trial: Trial, trust: TrustReport) -> dict[str, "Figure"]:
    """Draw the parts that have something to show: a ledger without reliable rows has nothing."""
    figures = {"comparison": plot_comparison(trust.comparison)}
    if trust.gap is not None and not trust.gap.is_flagged.all():
        figures["gap"] = plot_gap(trust.gap)
    return figures | {"collapse": plot_collapse(trial.reports)}


def trust_sections(trial: Trial, trust: TrustReport, pictures: Mapping[str, str]) -> list[page.Section]:
    """Return the sections of the page.

    Args:
        trial: The first model.
        trust: What :func:`examine` found of it.
        pictures: The page's pictures by name, as HTML.
    """
    sections: list[page.Section] = [("Beside HMC", _beside_chains(trust.comparison, pictures["comparison"]))]
    if trust.gap is not None:
        sections.append(("Where the bound is lost", _ledger(trust.gap, pictures.get("gap"))))
    return [*sections, ("Which latents are used", _units(trial.reports[max(trial.reports)], pictures["collapse"]))]


def _beside_chains(comparison: Comparison, shown: str) -> list[str]:
    """Say how far the guide's draws are from those of the chains, and what the numbers mean."""
    sound = ~comparison.reference.is_flagged
    if not sound.any():
        text = (
            f"Nothing can be said: the chains of all {len(comparison)} digits are unreliable. Longer ones are needed."
        )
        return [page.paragraph(text), shown]
    line = comparison.summary().iloc[0]
    k_hat = comparison.k_hat[sound]
    table = {
        "mean error, in sd": (f"{line['mean_error']:.3f}", f"{line['by_chance']:.3f}"),
        "sd of the guide / sd of the posterior": (f"{line['sd_ratio']:.3f}", "1"),
        "1-Wasserstein distance, in sd": (f"{line['wasserstein']:.3f}", f"{line['w_by_chance']:.3f}"),
        "C2ST, accuracy of a classifier": ("unknown" if math.isnan(line["c2st"]) else f"{line['c2st']:.1%}", "50.0%"),
        "KL both ways, nats": (f"{comparison.divergence[sound].mean().item():.3f}", "0"),
        "k-hat, median": (f"{k_hat.median().item():.2f}", "below 0.5"),
        "digits with k-hat above 0.7": (f"{int((k_hat > 0.7).sum())} of {len(k_hat)}", "0"),
    }
    return [
        page.paragraph(_how_far_apart(comparison, line["mean_error"], line["c2st"])),
        page.table(("found", "if q were the posterior"), table),
        page.paragraph(READING_COMPARISON),
        page.paragraph(_times(comparison)),
        shown,
    ]


READING_COMPARISON = (
    "How to read it. Sd is the standard deviation of a latent under the posterior. Mean error: how far the guide's means lie from "
    "the true ones. Ratio of sds: below 1 the guide is too sure, above 1 not sure enough. Wasserstein distance: how far draws "
    "have to be moved, on average, to turn one set into the other; it sees shapes, too. C2ST: how often a classifier that is shown "
    "a draw can tell where it is from; 50% is guessing, 100% is never the same. k-hat: whether the guide's draws can be "
    "given weights that make them draws of the posterior; above 0.7 they cannot. Mean error (a root mean square), ratio and "
    "distance are averages over all latents of all digits, so that latents that the model does not use make them smaller."
)


def _how_far_apart(comparison: Comparison, error: float, accuracy: float) -> str:
    """Put the comparison into a sentence or two."""
    verdict = (
        "close to the posterior" if error < 0.1 else "near the posterior, not the same" if error < 0.5 else "far off"
    )
    furthest = comparison.worst_rows(1)[0]
    worst = WorstCoordinates.of(next(iter(comparison.sites.values()))).mean_error.abs()[furthest].item()
    told = (
        "the chains hold too few effective draws for a classifier"
        if math.isnan(accuracy)
        else f"a classifier tells its draws from the posterior's in {accuracy:.0%} of cases, where guessing makes 50%"
    )
    return (
        f"The guide is {verdict}: its means are off by {error:.2f} posterior standard deviations, and {told}. Furthest off is "
        f"row {furthest}, with a mean {worst:.2f} standard deviations away."
    )


def _times(comparison: Comparison) -> str:
    """Say what draws cost, and whether to believe the chains."""
    chains, guide = comparison.reference, next(iter(comparison.guide_samples.values()))
    flagged = comparison.num_flagged
    doubt = (
        f"{flagged} of {len(comparison)} digits have unreliable chains and are left out of the table."
        if flagged
        else f"All {len(comparison)} digits have chains that agree."
    )
    return (
        f"The posterior is that of Hamiltonian Monte Carlo (HMC), which needs no guide and is exact if it runs long enough: "
        f"{chains.num_chains} chains of {chains.num_samples} draws for each of the first {len(comparison)} test digits, those that "
        f"the pictures above show (rows 0 to {len(comparison) - 1}), in "
        f"{comparison.reference_seconds:.1f} s. The guide gave {len(guide):,} draws of each in "
        f"{comparison.guide_seconds:.3f} s, once it was trained. {doubt} R-hat, 1 where chains agree: at most "
        f"{chains.r_hat.max().item():.2f}; effective draws: at least {chains.ess.min().item():.0f} a digit."
    )


def _ledger(gap: InferenceGap, shown: str | None) -> list[str]:
    """Say where the bound is lost, and show the ledger."""
    if shown is None:
        return [page.paragraph(f"Nothing can be said: the ledgers of all {len(gap)} digits are unreliable.")]
    frame = gap.summary()
    lines = {
        name.replace("- ", "\N{MINUS SIGN} "): (
            nats(row["mean"]),
            f"{row['standard_error']:.3f}",
            f"{row['sd_over_rows']:.2f}",
        )
        for name, row in frame.iterrows()
    }
    return [
        page.paragraph(_where_lost(gap, frame["mean"].to_dict())),
        page.table(("nats a digit", "Monte Carlo error of it", "sd over digits"), lines),
        page.paragraph(
            f"Read it from the top: log p(x) by {gap.log_marginal.method} sampling, less what the family loses, is the best bound "
            f"that a digit's own parameters reach; less what the encoder loses, it is the guide's bound, the one that training "
            f"maximized. Bounds are means of {gap.num_draws:,} draws."
        ),
        shown,
    ]


def _where_lost(gap: InferenceGap, mean: Mapping[str, float]) -> str:
    """Name the larger gap and what would help; a mean may be that of a few digits."""
    sound, family, encoder = ~gap.is_flagged, mean["- approximation gap"], mean["- amortization gap"]
    num_sound, num_flagged = int(sound.sum()), int(gap.is_flagged.sum())
    num_family = int((gap.approximation_gap > gap.amortization_gap)[sound].sum())
    if family >= encoder:
        advice = "A richer family, such as AutoAmortizedMultivariateNormal or AutoAmortizedFlow, would help most."
    elif 2 * num_family > num_sound:
        advice = (
            f"But on {num_family} of {num_sound} digits the family loses more: the encoder fails on a few, row "
            f"{gap.worst_rows(1)[0]} above all, and guide.refine(x) mends those."
        )
    else:
        advice = "Longer training or a wider encoder would help most."
    left_out = f" {num_flagged} of {len(gap)} digits are unreliable and left out." if num_flagged else ""
    return (
        f"Of {mean['inference gap']:.2f} nats that the bound lacks on these digits, {family:.2f} are lost because normals with "
        f"independent coordinates can't be the posterior, and {encoder:.2f} because the encoder does not find the best of them for "
        f"each digit. {advice}{left_out}"
    )


def _units(report: CollapseReport, shown: str) -> list[str]:
    """Say which latents are used, and show what each is worth."""
    dead = report.dead_units
    unused = f" {', '.join(dead)} stay at the prior whatever the digit: fewer latents would do." if dead else ""
    frame = report.to_pandas()
    lines = {
        str(unit): (nats(row["kl"]), f"{row['variance']:.3f}", "yes" if row["is_active"] else "no")
        for unit, row in frame.iterrows()
    }
    return [
        page.paragraph(
            f"{report.num_active} of {len(report.units)} latents are used.{unused} All together tell "
            f"{report.mutual_information:.2f} ± {report.mutual_information_error:.2f} nats (mutual information) of which of "
            f"{report.num_rows} test digits they belong to, out of "
            f"{nats(report.total_kl)} nats of KL term that the bound pays for them."
        ),
        page.table(("KL, nats", "variance of its mean over digits", "used"), lines),
        page.paragraph(
            f"A latent is used if the mean of q(z | x) varies over the digits by more than {report.threshold:g}; under the prior "
            f"its variance is 1. A latent whose KL is 0 is the prior's noise, and the decoder has learned to ignore it."
        ),
        shown,
    ]
