"""What bridge and reciprocal sampling share: posterior draws of each row, cut into two halves, and draws of a fitted density."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from pyro_aevb._types import PerRow
from pyro_aevb.errors import SettingError
from pyro_aevb.evidence.gaussian import RowGaussian
from pyro_aevb.evidence.mixture import weigh_with_prior
from pyro_aevb.evidence.problem import Estimator, Problem
from pyro_aevb.mcmc.convergence import mean_ess
from pyro_aevb.mcmc.draws import PosteriorDraws
from pyro_aevb.mcmc.noise import Stream
from pyro_aevb.mcmc.posterior import sample_rows
from pyro_aevb.mcmc.starts import count_starts
from pyro_aevb.program.settings import check_count
from pyro_aevb.weights import log_mean_exp

__all__ = [
    "ChainEstimator",
    "Check",
    "Half",
    "check_with_prior",
    "effective_size",
    "halve",
    "propose",
    "relative_weights",
]

_STORED_NUMBERS = 8_000_000
"""Coordinates of all draws of the rows at once: 64 MB in float64, of which an estimate holds a few copies."""
_FORK = 0xC4EC
"""Which fork of a row's noise is for the check: other numbers than those of the chains and their starts."""
_OUTLIER = 10.0
"""A prior draw lies where the fitted density is not, if it weighs so many times the mean and the prior is so many times denser."""
_RARE = 1e-3
"""And where the chains are not, if fewer of their draws lie as far out. Where they do lie, a posterior has but a tail. On average
a tail of a thousandth carries a thousandth of the weight, so that chance makes it ``_MAX_MISSED`` in one row of fifty at most."""
_MAX_MISSED = 0.05


@dataclass(frozen=True, kw_only=True)
class ChainEstimator(Estimator):
    """An estimator that starts from posterior draws of each row (:func:`~pyro_aevb.mcmc.posterior.hmc_posterior`).

    Args:
        num_chains: Chains of a row; even.
        num_draws: Draws of each chain after the warm-up; even and at least 8, since one half fits and the other estimates.
        warmup_steps: Transitions before that.
        num_leapfrog: Most leapfrog steps of a transition.
        target_accept_prob: Acceptance probability that step sizes are tuned to.

    Raises:
        SettingError: If a setting is out of range.
    """

    num_chains: int = 16
    num_draws: int = 200
    warmup_steps: int = 200
    num_leapfrog: int = 10
    target_accept_prob: float = 0.8

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_draws", "warmup_steps", "num_leapfrog"):
            check_count(name, getattr(self, name))
        if self.num_chains % 2:
            raise SettingError(
                f"num_chains must be even: half of the chains start in each of two ways; got {self.num_chains}."
            )
        if self.num_draws < 8 or self.num_draws % 2:
            raise SettingError(
                "num_draws, those of one chain, must be even and at least 8: one half fits a density and the other half "
                f"estimates; got {self.num_draws}."
            )
        if not 0 < self.target_accept_prob < 1:
            raise SettingError(f"target_accept_prob must lie between 0 and 1; got {self.target_accept_prob!r}.")

    @property
    @override
    def draws_per_row(self) -> int:
        return count_starts(self.num_chains)

    @override
    def rows_at_once(self, dim: int) -> int:
        num_stored = self.num_chains * self.num_draws * dim
        return min(super().rows_at_once(dim), max(1, _STORED_NUMBERS // num_stored))

    def sample(self, problem: Problem, *, share: float) -> PosteriorDraws:
        """Draw from each row's posterior.

        Args:
            problem: The rows.
            share: Fraction of the estimator's work that this is.
        """
        return sample_rows(
            problem.density,
            problem.guide,
            problem.noise,
            num_chains=self.num_chains,
            num_samples=self.num_draws,
            warmup_steps=self.warmup_steps,
            target_accept_prob=self.target_accept_prob,
            num_leapfrog=self.num_leapfrog,
            advance=lambda fraction: problem.advance(share * fraction),
        )


@dataclass(frozen=True)
class Half:
    """The first or the second half of every chain, in float64.

    Attributes:
        position: Draws in unconstrained space.
        log_joint: log p(x, u) at each, in nats.
    """

    position: Float[Tensor, "chains draws rows latent"]
    log_joint: Float[Tensor, "chains draws rows"]


def halve(draws: PosteriorDraws) -> tuple[Half, Half]:
    """Cut every chain in the middle of its time: halves of well mixed chains are nearly independent."""
    middle = draws.num_samples // 2
    position, log_joint = draws.unconstrained.double(), draws.log_joint.double()
    return Half(position[:, :middle], log_joint[:, :middle]), Half(position[:, middle:], log_joint[:, middle:])


def propose(problem: Problem, density: RowGaussian, num_draws: int, *, step: int) -> Float[Tensor, "draws rows latent"]:
    """Draw from a fitted density, each row by numbers of its own; rounded to what the model is evaluated at."""
    noise = problem.noise.normal(Stream.PROPOSAL, step, num_draws, density.dim)
    return density.transform(noise.double()).to(problem.density.dtype).double()


def effective_size(values: Float[Tensor, "chains draws rows"]) -> PerRow:
    """Return the effective number of draws for the mean of a quantity; all of them where it is constant."""
    num_draws = values.shape[0] * values.shape[1]
    return mean_ess(values).nan_to_num(nan=float(num_draws)).clamp(min=1.0)


def relative_weights(log_weights: Float[Tensor, "*draws rows"]) -> Float[Tensor, "*draws rows"]:
    """Return weights over the largest of their row."""
    log_max = log_weights.flatten(0, -2).amax(0)
    return (log_weights - log_max.where(log_max.isfinite(), 0.0)).exp()


class Check(NamedTuple):
    """Importance sampling from a mixture of a fitted density and the prior.

    Attributes:
        value: Its estimate of log p(x), in nats: a stochastic lower bound.
        standard_error: By the delta method.
        missed: Share of the mass that prior draws found where the fitted density hardly is, and no chain has been.
    """

    value: PerRow
    standard_error: PerRow
    missed: PerRow

    def refutes(self, value: PerRow, standard_error: PerRow) -> Bool[Tensor, " rows"]:
        """Say where another estimate lies more than three standard errors below, or the chains miss a twentieth.

        An estimate above is no contradiction: a lower bound falls short where its proposal does, and its error does not tell.
        """
        error = (standard_error.square() + self.standard_error.square()).sqrt()
        return (self.value - value > 3 * error) | (self.missed > _MAX_MISSED)


def check_with_prior(
    problem: Problem, fitted: RowGaussian, draws: Float[Tensor, "draws rows latent"], *, num_draws: int
) -> Check:
    """Weigh draws of a fitted density and as many of the prior under the mixture of the two.

    Chains that all missed a mode cannot know of it: the prior's draws may (:func:`~pyro_aevb.evidence.mixture.weigh_with_prior`).

    Args:
        problem: The rows.
        fitted: The density.
        draws: Where the chains have been.
        num_draws: Draws of the density, and of the prior.
    """
    problem = replace(problem, noise=problem.noise.fork(_FORK))
    log_weights, log_prior, log_fitted = weigh_with_prior(
        problem,
        propose(problem, fitted, num_draws, step=0),
        lambda u: fitted.log_density(u.double()),
        num_prior=num_draws,
    )
    weights = relative_weights(log_weights)
    is_outlier = (weights > _OUTLIER * weights.mean(0)) & (log_prior > log_fitted + math.log(_OUTLIER))
    reach = fitted.log_density(draws.double()).kthvalue(math.ceil(_RARE * len(draws)), 0).values
    is_outlier &= ~(log_fitted >= reach)
    total = weights.sum(0)
    return Check(
        log_mean_exp(log_weights, 0),
        weights.std(0) * math.sqrt(len(weights)) / total,
        (weights * is_outlier)[num_draws:].sum(0) / total,
    )
