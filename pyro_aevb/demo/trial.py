"""One experiment of the demo: a model of so many latents, trained and then weighed on unseen digits."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_aevb import AEVB, IWELBO, SGVB, FitResult, LogMarginal
from pyro_aevb.datasets import ImageData, digits, mnist
from pyro_aevb.demo.vae import VAE
from pyro_aevb.diagnostics.collapse import CollapseMonitor
from pyro_aevb.diagnostics.collapse_result import CollapseReport
from pyro_aevb.errors import AEVBWarning, UnreliableWarning
from pyro_aevb.randomness import seeded

__all__ = ["PLANS", "Plan", "Trial", "compare_estimators", "nats", "try_model"]

NUM_SAMPLES = 5000
"""Draws per digit behind log p(x)."""
NUM_IMPORTANCE_SAMPLES = 100
"""Draws per digit behind the evidence lower bound and the importance-weighted bound."""
NUM_ANNEALED = 16
"""Digits that are weighed by annealing too, which costs a hundred times as much."""
NUM_LOOKS = 20
"""How often training is asked which latents are used."""


@dataclass(frozen=True)
class Plan:
    """What is trained on a data set: sizes that were tried out to learn it well in about half a minute on two cores.

    Attributes:
        source: The data's name in a sentence.
        load: Returns them.
        hidden: Hidden units of the decoder.
        latent: Latents of the first model.
        num_epochs: Passes over the data, for both models.
        learning_rate: Of Adam.
        num_weighed: Test digits that are weighed.
        num_threads: Threads of torch; ``None`` leaves them alone. Two threads wait for each other where layers are small, and
            take thirty times as long as one on a machine that has other work.
    """

    source: str
    load: Callable[[], ImageData]
    hidden: int
    latent: int
    num_epochs: int
    learning_rate: float
    num_weighed: int
    num_threads: int | None


PLANS = {
    "digits": Plan("scikit-learn's handwritten digits", digits, 200, 10, 500, 3e-3, 297, 1),
    "mnist": Plan("MNIST", mnist, 500, 20, 20, 1e-3, 500, None),
}


@dataclass(frozen=True)
class Trial:
    """One trained model and what it is worth on unseen digits, in nats per digit.

    Attributes:
        vae: The model.
        vi: The model and the guide that was built from it.
        fit: How training went; its validation bound is that of all test digits.
        elbo: Evidence lower bound of the weighed test digits.
        importance_weighted: Their importance-weighted bound.
        evidence: log p(x) of each of them.
        reports: Which latents are used, by epoch, on test digits.
    """

    vae: VAE
    vi: AEVB
    fit: FitResult
    elbo: float
    importance_weighted: float
    evidence: LogMarginal
    reports: Mapping[int, CollapseReport]

    def numbers(self) -> dict[str, str]:
        """Return every number of this trial with its name, as the page prints them."""
        summary, k_hat = self.evidence.summary(), self.evidence.k_hat
        used = self.reports[max(self.reports)]
        unflagged = f"{nats(summary.unflagged_mean)} ± {summary.unflagged_monte_carlo_se:.3f}"
        return {
            "latents": f"{self.vae.latent}",
            "latents in use": f"{used.num_active}",
            "mutual information of latents and digit": f"{used.mutual_information:.2f} ± "
            f"{used.mutual_information_error:.2f}",
            "parameters": f"{sum(parameter.numel() for parameter in self.vi.module.parameters()):,}",
            "epochs": f"{len(self.fit.history)}",
            "time per step": f"{1e3 * self.fit.seconds_per_step:.2f} ms",
            "bound, training digits, last epoch": nats(self.fit.history[-1]["bound"]),
            "bound, all test digits, last epoch": nats(self.fit.history[-1]["validation_bound"]),
            "weighed test digits": f"{len(self.evidence)}",
            "ELBO of these": nats(self.elbo),
            f"importance-weighted bound, K = {NUM_IMPORTANCE_SAMPLES}": nats(self.importance_weighted),
            f"log p(x), K = {self.evidence.num_samples:,}": nats(summary.mean),
            "Monte Carlo standard error": _error(summary.monte_carlo_se),
            "log p(x) without unreliable digits": unflagged,
            "k-hat, median": f"{k_hat.nanmedian().item():.2f}",
            "k-hat, largest": f"{k_hat.nan_to_num(nan=-math.inf).max().item():.2f}",
            "digits with k-hat above 0.7": f"{(k_hat > 0.7).double().mean().item():.1%}",
            "unreliable digits": f"{summary.num_flagged}",
        }


def try_model(plan: Plan, images: ImageData, latent: int, *, seed: int, progress: bool) -> Trial:
    """Train a model of so many latents and weigh unseen digits with it.

    Raises:
        KeyboardInterrupt: If training was interrupted; ``fit`` alone would end with the last state.
    """
    if progress:
        print(f"A model with {latent} latents and {plan.hidden} hidden units, {plan.num_epochs} epochs:", flush=True)
    with seeded(seed):
        vae = VAE(images.train.shape[1], latent, plan.hidden)
    vi = AEVB(vae.model)
    monitor = CollapseMonitor(images.test, every=max(1, plan.num_epochs // NUM_LOOKS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*latent units are dead", AEVBWarning)  # the page names them
        fit = vi.fit(
            images.train,
            num_epochs=plan.num_epochs,
            batch_size=100,
            learning_rate=plan.learning_rate,
            validation=images.test,
            seed=seed,
            callbacks=[monitor],
            progress=progress,
        )
    if fit.stopped_by == "interrupt":
        raise KeyboardInterrupt
    reports = monitor.reports | ({} if monitor.report is None else {plan.num_epochs: monitor.report})
    weighed = images.test[: plan.num_weighed]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)  # the page counts them
        evidence = vi.log_marginal(weighed, num_samples=NUM_SAMPLES, seed=seed, progress=progress)
    with seeded(seed):
        elbo = _mean_bound(SGVB(NUM_IMPORTANCE_SAMPLES), vi, weighed)
        importance_weighted = _mean_bound(IWELBO(NUM_IMPORTANCE_SAMPLES), vi, weighed)
    return Trial(vae, vi, fit, elbo, importance_weighted, evidence, reports)


def compare_estimators(trial: Trial, unseen: Tensor, *, seed: int, progress: bool) -> dict[str, LogMarginal]:
    """Weigh the first digits by annealing too: a lower bound that knows more of the posterior than draws of the guide do."""
    few = unseen[:NUM_ANNEALED]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)  # the picture marks them
        settings: dict[str, Any] = {"seed": seed, "progress": progress}
        return {
            "ais": trial.vi.log_marginal(few, method="ais", preset="fast", **settings),
            "importance": trial.vi.log_marginal(few, num_samples=NUM_SAMPLES, **settings),
        }


def _mean_bound(objective: SGVB | IWELBO, vi: AEVB, rows: Tensor) -> float:
    """Return an objective's bound in nats per row, in chunks that fit into memory."""
    parts = [objective.bounds(vi.model, vi.guide, part).local for part in rows.split(100)]
    return torch.cat(parts).mean().item()


def nats(value: float) -> str:
    """Format a number of nats with a true minus sign."""
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _error(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3f}"
