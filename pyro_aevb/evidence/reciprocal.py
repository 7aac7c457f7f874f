r"""log p(x) of each row by reciprocal importance sampling: the marginal likelihood estimator of the AEVB paper, appendix D.

Gelfand and Dey (1994, "Bayesian model choice: asymptotics and exact calculations"); Kingma and Welling, arXiv 1312.6114, App. D;
truncation by Geweke (1999, "Using simulation methods for Bayesian econometric models").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from scipy.special import chdtri
from torch import Tensor
from typing_extensions import override

from pyro_aevb._types import PerRow
from pyro_aevb.errors import SettingError, UnreliableWarning, warn_user
from pyro_aevb.evidence.chains import ChainEstimator, check_with_prior, effective_size, halve, relative_weights
from pyro_aevb.evidence.gaussian import RowGaussian, fit_gaussian
from pyro_aevb.evidence.pareto import pareto_k_hat
from pyro_aevb.evidence.problem import Problem
from pyro_aevb.evidence.result import Bound, LogMarginal
from pyro_aevb.evidence.rules import rate, void_error
from pyro_aevb.program.settings import check_count
from pyro_aevb.weights import log_mean_exp

__all__ = ["Reciprocal", "reciprocal_error", "reciprocal_value"]

_SHARE_OF_CHAINS = 0.9
_PAPER_DIM = 5
_PAPER_DRAWS = 50


def reciprocal_value(log_weights: Float[Tensor, "draws rows"]) -> PerRow:
    r"""Return :math:`-\log \frac1L \sum_l q(u_l) / p(x, u_l)`, in nats, of log q(u) - log p(x, u) at posterior draws.

    The mean is unbiased for 1/p(x) if the draws are exact, so minus its logarithm is a stochastic **upper** bound on log p(x).

    Example:
        >>> reciprocal_value(torch.full((50, 2), 3.0)).allclose(torch.tensor(-3.0).double())
        True
    """
    return -log_mean_exp(log_weights.double(), 0)


def reciprocal_error(log_weights: Float[Tensor, "draws rows"], effective_size: PerRow) -> PerRow:
    """Return the standard error of :func:`reciprocal_value` by the delta method, in nats.

    Args:
        log_weights: log q(u) - log p(x, u) at posterior draws.
        effective_size: Effective number of draws for the mean weight.
    """
    weights = relative_weights(log_weights)
    return (weights.var(0) / effective_size).sqrt() / weights.mean(0)


@dataclass(frozen=True, kw_only=True)
class Reciprocal(ChainEstimator):
    r"""Reciprocal importance sampling with a Gaussian fitted to posterior draws (arXiv 1312.6114, App. D).

    1. L draws from the posterior by Hamiltonian Monte Carlo; 2. a density q fitted to them; 3. with L new draws

    .. math:: \hat p(x) = \Bigl[ \frac1L \sum_l \frac{q(u_l)}{p(x, u_l)} \Bigr]^{-1}

    in unconstrained space. A stochastic upper bound on log p(x), if the chains are exact draws; its variance is finite if q has
    lighter tails than the posterior. The first L draws are from the first half of every chain, the new ones from the second half.
    Cost: the chains' gradients, and L densities for the check. No gradient.

    The paper found it unreliable from five latents on. With its 50 draws that is the error of a Gaussian fitted to so few:
    a warning says so. The bound fails, without a trace in its own error, where chains miss a mode: the value is then that of
    the modes seen. Therefore a row is checked by importance sampling from a mixture of q and the prior
    (:func:`~pyro_aevb.evidence.chains.check_with_prior`), which is ``lower``. It is unreliable where that lies above the value,
    where the prior's draws find mass that no chain has seen, or where the chains' two kinds of start disagree (without a guide
    both are of one kind).

    The other settings are those of :class:`~pyro_aevb.evidence.chains.ChainEstimator`.

    Args:
        num_kept: L, at most half of all draws, evenly spaced; ``None`` for that half.
        truncate: Cut q to the ellipsoid that holds this share of it, so that weights are bounded where p(x, u) is (Geweke 1999,
            who takes 0.95 or so); ``None`` for the whole density, which is the paper's. It mends rows whose k-hat says that
            q's tails are heavier than the posterior's, as they are for logarithms of gamma variables.

    Raises:
        SettingError: If a setting is out of range.
    """

    method: ClassVar[str] = "reciprocal"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"num_kept": _PAPER_DRAWS, "num_leapfrog": 4}}

    num_kept: int | None = None
    truncate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_kept", self.num_kept, is_optional=True)
        half = self.num_chains * self.num_draws // 2
        if self.num_kept is not None and not 2 <= self.num_kept <= half:
            raise SettingError(
                f"num_kept must lie between 2 and half of the {2 * half} draws of a row; got {self.num_kept}. More chains or draws "
                "give more to keep."
            )
        if self.truncate is not None and not 0 < self.truncate < 1:
            raise SettingError(f"truncate is the share of q that is kept, between 0 and 1; got {self.truncate!r}.")

    @override
    def estimate(self, problem: Problem) -> LogMarginal:
        draws = self.sample(problem, share=_SHARE_OF_CHAINS)
        first, second = halve(draws)
        num_kept = self.num_kept or first.log_joint[..., 0].numel()
        self._warn_beyond_the_paper(problem.density.dim, num_kept)
        q = fit_gaussian(_spread(first.position, num_kept))
        log_weights = self._log_density(q, second.position) - second.log_joint
        kept = _spread(log_weights, num_kept)
        value, k_hat = reciprocal_value(kept), self._k_hat(kept)
        size = effective_size(relative_weights(log_weights)).clamp(max=num_kept)
        standard_error = void_error(reciprocal_error(kept, size), k_hat)
        check = check_with_prior(problem, q, draws.unconstrained.flatten(0, 1), num_draws=num_kept)
        problem.advance(1 - _SHARE_OF_CHAINS)
        return LogMarginal(
            value=value,
            standard_error=standard_error,
            lower=check.value,
            upper=value,
            upper_kind="reciprocal",
            k_hat=k_hat,
            ess=draws.ess.double(),
            status=rate(
                standard_error,
                k_hat=k_hat,
                r_hat=draws.nested_r_hat,
                is_refuted=draws.is_flagged | check.refutes(value, standard_error),
            ),
            method=self.method,
            num_samples=num_kept,
            bound=Bound.UPPER,
            acceptance=draws.acceptance.double(),
            r_hat=draws.nested_r_hat.double(),
            num_divergent=draws.num_divergent.double(),
        )

    def _log_density(self, q: RowGaussian, u: Float[Tensor, "*draws rows latent"]) -> Float[Tensor, "*draws rows"]:
        """Return the log density of q, cut to its ellipsoid."""
        log_density = q.log_density(u)
        if self.truncate is None:
            return log_density
        distance = q.standardise(u).square().sum(-1)
        is_inside = distance <= chdtri(q.dim, 1 - self.truncate)
        return (log_density - math.log(self.truncate)).where(is_inside, -math.inf)

    def _k_hat(self, log_weights: Float[Tensor, "draws rows"]) -> PerRow:
        """Return Pareto k-hat of the weights q / p; NaN where q is cut, since bounded weights have no tail to judge."""
        if self.truncate is not None:
            return torch.full_like(log_weights[0], math.nan)
        return pareto_k_hat(log_weights.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf))

    def _warn_beyond_the_paper(self, dim: int, num_kept: int) -> None:
        """Say where the paper's own settings are known to fail."""
        if dim >= _PAPER_DIM and num_kept <= _PAPER_DRAWS:
            warn_user(
                f"The estimator of the paper's appendix D is unreliable from {_PAPER_DIM} latents on with {_PAPER_DRAWS} draws or "
                f"fewer; got {dim} unconstrained coordinates and num_kept={num_kept}. Keep more draws, or use method='bridge', "
                "which halves the error of the same draws.",
                UnreliableWarning,
            )


def _spread(values: Tensor, count: int) -> Tensor:
    """Take so many draws, evenly from all chains and far apart within each: ``[chains, draws, ...]`` becomes ``[count, ...]``."""
    chains = values.flatten(0, 1)
    return chains[torch.linspace(0, len(chains) - 1, count, device=values.device).round().long()]
