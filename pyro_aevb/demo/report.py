"""What the demo's page says around its numbers and pictures."""

import inspect
import platform
import textwrap
from collections.abc import Mapping
from typing import cast

import pyro
import torch

import pyro_aevb
from pyro_aevb.datasets import ImageData
from pyro_aevb.demo import page
from pyro_aevb.demo.trial import Plan, Trial, nats
from pyro_aevb.demo.trust import TRUST_CAPTIONS, trust_sections
from pyro_aevb.demo.vae import VAE
from pyro_aevb.diagnostics.report import TrustReport
from pyro_aevb.evidence.result import LogMarginal
from pyro_aevb.guides.base import AmortizedGuide

__all__ = ["CAPTIONS", "report"]

CAPTIONS = {
    "history": "Evidence lower bound in nats per digit over training: on the training digits as the optimizer saw them, and on "
    "the test digits after each epoch, under fixed noise. A gap that opens would be overfitting.",
    "reconstructions": "Top: test digits. Then E[x | z] at the median of q(z | x), and at three draws of z from q(z | x): where "
    "they differ, the image leaves open what was meant.",
    "samples": "Means of the decoder at latents drawn from the prior N(0, I), as in Figure 5 of the paper.",
    "manifold": "Means of the decoder over a regular grid on the unit square, taken through the inverse normal CDF, as in Figure 4 "
    "of the paper: every image stands for the same prior probability.",
    "embedding": "Median of q(z | x) for test digits, under the model with two latents. Colours and numbers are the labels.",
    "log_marginal": "log p(x) of test digits by importance sampling from the guide, with bars of one Monte Carlo standard error "
    "(most are smaller than the points), and each digit's Pareto k-hat. Above 0.7 the error cannot be known, and the digit is "
    "flagged rather than dropped.",
    "k_hat": "How heavy the tails of the digits' importance weights are, over all weighed digits. Up to 0.5 an error can be "
    "trusted, above 0.7 there is none.",
    "forest": "Digits by two methods, with 95 % intervals: importance sampling draws from the guide, annealing starts there and "
    "goes on to the posterior by Hamiltonian Monte Carlo. Both are lower bounds on log p(x) on average. Triangles: other bounds.",
    "agreement": "The same digits: how far annealing lies above importance sampling, with bars of one joint standard error. What "
    "lies above zero by more than its bar is what draws from the guide missed.",
    **TRUST_CAPTIONS,
}


def report(
    plan: Plan,
    images: ImageData,
    trials: tuple[Trial, Trial],
    estimates: Mapping[str, LogMarginal],
    trust: TrustReport,
    pictures: Mapping[str, bytes],
    seconds: float,
) -> str:
    """Return the page.

    Args:
        plan: What was trained, and on what.
        images: The data.
        trials: The model with many latents and the one with two.
        estimates: log p(x) of a few digits under the first, by method.
        trust: The first guide beside Hamiltonian Monte Carlo, and what its bound lacks.
        pictures: PNGs by the names of ``CAPTIONS``.
        seconds: Wall-clock time of everything.
    """
    many, two = trials
    shown = {name: page.picture(content, CAPTIONS[name]) for name, content in pictures.items()}
    numbers = {name: (value, two.numbers()[name]) for name, value in many.numbers().items()}
    sections: list[page.Section] = [
        ("What was done", _what_was_done(plan, images, many)),
        ("Training", [shown["history"]]),
        ("Posterior of unseen digits", [shown["reconstructions"]]),
        ("Samples", [shown["samples"]]),
        ("Two latents: the manifold", [shown["manifold"], shown["embedding"]]),
        ("How likely is an unseen digit?", [shown["log_marginal"], page.paragraph(_verdict(many)), shown["k_hat"]]),
        ("By another method?", [shown["forest"], shown["agreement"], page.paragraph(_agreement(estimates))]),
        *trust_sections(many, trust, shown),
        ("The numbers", [page.table(("first model", "two latents"), numbers), page.paragraph(READING)]),
        ("The machine", [page.table(("",), _machine(seconds))]),
    ]
    return page.render("Auto-Encoding Variational Bayes on real digits", _lead(seconds), _tiles(many), sections)


def _what_was_done(plan: Plan, images: ImageData, many: Trial) -> list[str]:
    size = " x ".join(map(str, images.image_shape))
    return [
        page.paragraph(
            f"Data: {plan.source}, {len(images.train):,} to train and {len(images.test):,} never trained on, {size} grey "
            f"levels between 0 and 1. The model is the Pyro program below, with {plan.hidden} tanh units in the hidden layer of "
            f"its decoder: section 3 and appendix C of Kingma & Welling, arXiv 1312.6114. It is all that was written; the guide "
            f"q(z | x) built itself from it. AEVB maximized their evidence lower bound by the paper's SGVB (KL term in closed "
            f"form, one draw of z per digit and step), in batches of 100. Unlike the paper: the guide's network, Adam with "
            f"learning rate {plan.learning_rate:g} instead of Adagrad, torch's default initial weights instead of N(0, 0.01), "
            f"and no prior on the weights."
        ),
        page.code(textwrap.dedent(inspect.getsource(VAE.model))),
        page.paragraph("The guide, as it explains itself:"),
        page.code(str(cast(AmortizedGuide, many.vi.guide).explain())),
        page.paragraph(
            "Grey levels enter the Bernoulli density x log p + (1 − x) log(1 − p), as in the paper. "
            "This is no log-likelihood of binary data, and no density of grey levels either: compare the nats on this page only "
            "with nats that were got in the same way."
        ),
    ]


READING = (
    "All bounds are in nats per digit; higher is better. ELBO, importance-weighted bound and log p(x) are of the same test digits, "
    "and rise in this order, up to noise: each is a lower bound on log p(x) that gets tighter with the number of draws. K counts "
    "draws per digit. The standard error is that of the mean over these very digits; it is unknown as long as a digit's is."
)


def _lead(seconds: float) -> str:
    return (
        f"AEVB built a guide from a Pyro model and trained both together; then the guide gave posteriors of digits it never saw, "
        f"and importance sampling weighed them. It took {seconds:.0f} seconds."
    )


def _tiles(many: Trial) -> str:
    summary = many.evidence.summary()
    return page.facts(
        {
            "bound of test digits, nats each": nats(many.elbo),
            "log p(x) of test digits, nats each": nats(summary.mean),
            "of them flagged as unreliable": f"{summary.num_flagged} of {len(many.evidence)}",
            "a training step of 100 digits": f"{1e3 * many.fit.seconds_per_step:.1f} ms",
        }
    )


def _verdict(trial: Trial) -> str:
    summary = trial.evidence.summary()
    gap = (
        f"The bound of the guide is {nats(trial.elbo)} nats a digit and log p(x) is estimated as {nats(summary.mean)}: that "
        f"q(z | x) is not the exact posterior costs about {summary.mean - trial.elbo:.2f} nats. "
    )
    if not summary.num_flagged:
        return f"{gap}No digit is unreliable, {summary.num_warned} are doubtful (k-hat above 0.5 or a large standard error)."
    return (
        f"{gap}{summary.num_flagged} of {len(trial.evidence)} digits are unreliable and {summary.num_warned} more doubtful: their "
        f"importance weights have such heavy tails that a few draws decide, and the estimate is likely to be too low there. "
        f"Without the unreliable the mean is {nats(summary.unflagged_mean)} with a Monte Carlo standard error of "
        f"{summary.unflagged_monte_carlo_se:.3f}; but this is a choice of digits, and the number stands for them alone."
    )


def _agreement(estimates: Mapping[str, LogMarginal]) -> str:
    annealed, weighed = estimates["ais"], estimates["importance"]
    difference = annealed.value - weighed.value
    error = (annealed.standard_error.square() + weighed.standard_error.square()).sqrt()
    count = int((difference.abs() > 3 * error).sum())
    return (
        f"Over these {len(annealed)} digits annealing ({annealed.num_samples} chains) lies "
        f"{difference.mean().item():+.3f} nats from importance sampling ({weighed.num_samples:,} draws) on average, between "
        f"{difference.min().item():+.3f} and {difference.max().item():+.3f}; {count} differ by more than three standard errors. "
        f"Annealing calls {int(annealed.is_flagged.sum())} of them unreliable, importance sampling "
        f"{int(weighed.is_flagged.sum())}. Where both are lower bounds, believe the higher."
    )


def _machine(seconds: float) -> dict[str, tuple[str]]:
    count = torch.get_num_threads()
    return {
        "device": (f"CPU, {count} thread{'s' * (count > 1)}",),
        "wall-clock time": (f"{seconds:.0f} s",),
        "versions": (
            f"pyro_aevb {pyro_aevb.__version__}, Pyro {pyro.__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
        ),
    }
