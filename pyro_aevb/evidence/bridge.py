r"""log p(x) of each row by bridge sampling between posterior draws and a Gaussian fitted to them.

Meng and Wong (1996, "Simulating ratios of normalizing constants via a simple identity"); errors by Fruehwirth-Schnatter (2004,
"Estimating marginal likelihoods for mixture and Markov switching models using bridge sampling techniques").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import override

from pyro_aevb._types import PerRow
from pyro_aevb.evidence.chains import ChainEstimator, Half, check_with_prior, effective_size, halve, propose
from pyro_aevb.evidence.gaussian import fit_gaussian
from pyro_aevb.evidence.mixture import evaluate
from pyro_aevb.evidence.problem import Problem
from pyro_aevb.evidence.result import Bound, LogMarginal
from pyro_aevb.evidence.rules import rate

__all__ = ["Bridge", "BridgeRoot", "bridge_error", "find_bridge"]

_TOLERANCE = 1e-10
_MAX_STEPS = 200
_SHARE_OF_CHAINS = 0.9  # of the time, for the progress bar
_SHARE_OF_CHECK = 0.04


class BridgeRoot(NamedTuple):
    r"""The bridge estimate of each row, and what its error is made of.

    Attributes:
        value: :math:`\log \hat r`, the estimate of log p(x), in nats.
        posterior_share: :math:`s_2 \hat r / (s_1 l_1 + s_2 \hat r)` at each posterior draw, between 0 and 1.
        proposal_share: :math:`s_1 l_2 / (s_1 l_2 + s_2 \hat r)` at each proposal draw, between 0 and 1.
    """

    value: PerRow
    posterior_share: Float[Tensor, "posterior_draws rows"]
    proposal_share: Float[Tensor, "proposal_draws rows"]


def find_bridge(
    log_ratio_posterior: Float[Tensor, "posterior_draws rows"],
    log_ratio_proposal: Float[Tensor, "proposal_draws rows"],
    effective_size: PerRow,
) -> BridgeRoot:
    r"""Find the fixed point of Meng and Wong's iteration with the optimal bridge, row by row, in float64.

    .. math:: \hat r = \frac{\frac1{N_2} \sum_j l_{2j} / (s_1 l_{2j} + s_2 \hat r)}
                            {\frac1{N_1} \sum_i 1 / (s_1 l_{1i} + s_2 \hat r)},
              \quad l = \frac{p(x, u)}{q(u)}, \quad s_1 = \frac{N_{\mathrm{eff}}}{N_{\mathrm{eff}} + N_2}, \quad s_2 = 1 - s_1

    (Meng and Wong 1996, Eq 4.1; :math:`N_{\mathrm{eff}}` in place of :math:`N_1` as Fruehwirth-Schnatter 2004). Times
    :math:`\hat r` the equation says that two means of shares are equal: one grows with :math:`\hat r` and one falls. So there is
    exactly one root, between the least and the greatest log ratio. It is found by Newton's method on its logarithm, kept
    inside a bracket that shrinks: the same number as the iteration's, also where that one creeps. Consistent for log p(x), biased
    to neither side by more than the order of its variance. No density evaluation, no gradient.

    Args:
        log_ratio_posterior: log p(x, u) - log q(u) at draws from the posterior, in nats.
        log_ratio_proposal: The same at draws from q; minus infinity outside the posterior's support.
        effective_size: Effective number of posterior draws of each row, positive.

    Returns:
        The estimate. A row with a NaN, or with no proposal draw inside the support, has the value NaN.

    Example:
        >>> constant = find_bridge(torch.full((50, 1), -3.0), torch.full((80, 1), -3.0), torch.tensor([20.0]))
        >>> round(constant.value.item(), 9)
        -3.0
    """
    first, second = log_ratio_posterior.double(), log_ratio_proposal.double()
    log_odds = effective_size.double().log() - math.log(len(second))  # log s_1 / s_2
    both = torch.cat([first, second])
    is_weight = both.isfinite()
    is_sound = (both < math.inf).all(0) & is_weight[len(first) :].any(0) & is_weight[: len(first)].all(0)
    first, second = first.where(is_sound, 0.0), second.where(is_sound, 0.0)
    both = torch.cat([first, second])
    # where proposals fall outside the support, the second mean is below 1 by their share at most
    low = both.masked_fill(both == -math.inf, math.inf).amin(0) - math.log(len(second))
    high = both.amax(0)
    value = first.median(0).values.clamp(low, high)
    is_moving = torch.ones_like(is_sound)
    for _ in range(_MAX_STEPS):
        excess, slope = _excess(first, second, log_odds, value)
        low, high = torch.where(excess < 0, value, low), torch.where(excess < 0, high, value)
        step = value - excess / slope
        step = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
        # a row that has arrived stays, so that rows beside it do not change its last digits
        value, moved = torch.where(is_moving, step, value), (step - value).abs()
        is_moving = is_moving & (moved > _TOLERANCE)
        if not is_moving.any():
            break
    value = value.where(is_sound, math.nan)
    return BridgeRoot(
        value,
        torch.sigmoid(value - log_odds - log_ratio_posterior),
        torch.sigmoid(log_ratio_proposal + log_odds - value),
    )


def _excess(
    first: Float[Tensor, "posterior_draws rows"],
    second: Float[Tensor, "proposal_draws rows"],
    log_odds: PerRow,
    value: PerRow,
) -> tuple[PerRow, PerRow]:
    """Return the log of one side of the equation over the other, and its slope in log r."""
    posterior, proposal = value - log_odds - first, second + log_odds - value
    log_left = logsigmoid(posterior).logsumexp(0) - math.log(len(first))
    log_right = logsigmoid(proposal).logsumexp(0) - math.log(len(second))
    slope = _mean_slope(posterior) + _mean_slope(proposal)
    return log_left - log_right + log_odds, slope


def _mean_slope(logits: Float[Tensor, "draws rows"]) -> PerRow:
    """Return the derivative of the log of a mean of sigmoids: their complements, averaged by their size."""
    return (logsigmoid(logits).softmax(0) * torch.sigmoid(-logits)).sum(0)


def bridge_error(roots: Sequence[BridgeRoot], effective_sizes: Sequence[PerRow]) -> PerRow:
    r"""Return the standard error of the mean of two (or any number of) bridge estimates from one set of draws, in nats.

    For one estimate the relative mean squared error is

    .. math:: re^2 = \frac1{N_2} \frac{\mathrm{Var}_q f_1}{(E_q f_1)^2}
                     + \frac1{N_{\mathrm{eff}}} \frac{\mathrm{Var}_p f_2}{(E_p f_2)^2},
              \quad f_1 = \frac{p}{s_1 p + s_2 q}, \quad f_2 = \frac{q}{s_1 p + s_2 q}

    (Fruehwirth-Schnatter 2004, Eq 21; the shares of :class:`BridgeRoot` are :math:`f_1` and :math:`f_2` up to constants), and
    the error of the logarithm :math:`\sqrt{\log(1 + re^2)}`, that of a log-normal variable. Swapped halves use the same posterior
    draws twice, to fit and to estimate; both estimates then err alike: around a Gaussian posterior the leading error of each is the
    product of the two halves' errors. So the second terms count as fully correlated, the first ones as independent.

    Args:
        roots: The estimates.
        effective_sizes: Effective number of posterior draws for the mean of each one's ``posterior_share``.
    """
    from_proposal = torch.stack([_relative_variance(root.proposal_share) / len(root.proposal_share) for root in roots])
    from_posterior = torch.stack(
        [_relative_variance(root.posterior_share) / size for root, size in zip(roots, effective_sizes, strict=True)]
    )
    total = from_proposal.sum(0) + from_posterior.sqrt().sum(0).square()
    return (total / len(roots) ** 2).log1p().sqrt()


def _relative_variance(share: Float[Tensor, "draws rows"]) -> PerRow:
    """Return the squared coefficient of variation."""
    return share.var(0) / share.mean(0).square()


@dataclass(frozen=True, kw_only=True)
class Bridge(ChainEstimator):
    r"""Bridge sampling between posterior draws and a Gaussian fitted to them (Meng and Wong 1996), both halves.

    Chains are cut in the middle. A Gaussian in unconstrained space is fitted to one half and bridged to the other half, then the
    halves are swapped; the value is the mean of the two. An estimate of log p(x): consistent, biased to neither side by more than
    the order of its squared error, whatever the posterior's shape. The further that is from a Gaussian, the larger the
    error, and the standard error knows (:func:`bridge_error`). What it cannot know is a mode that no chain visited: then the value
    is that of the modes seen. R-hat between the chains' two kinds of start may tell (without a guide both are of one kind, and
    know the same modes), and a check may: ``lower`` is importance sampling from a mixture of the fitted density and the prior
    (:func:`~pyro_aevb.evidence.chains.check_with_prior`), and where it lies above the value, or the prior's draws find mass where
    no chain has been, the row is unreliable.

    Cost: the chains' gradients, and twice as many densities as draws: one set for the two bridges, one for the check. No gradient.
    Settings are those of :class:`~pyro_aevb.evidence.chains.ChainEstimator`.
    """

    method: ClassVar[str] = "bridge"

    @override
    def estimate(self, problem: Problem) -> LogMarginal:
        draws = self.sample(problem, share=_SHARE_OF_CHAINS)
        first, second = halve(draws)
        parts = [_cross(problem, *pair, step) for step, pair in enumerate([(first, second), (second, first)])]
        roots = [part.root for part in parts]
        value = (roots[0].value + roots[1].value) / 2
        standard_error = bridge_error(roots, [part.effective_size for part in parts])
        everywhere = draws.unconstrained.flatten(0, 1)
        num_check = first.log_joint[..., 0].numel()
        check = check_with_prior(problem, fit_gaussian(everywhere), everywhere, num_draws=num_check)
        problem.advance(_SHARE_OF_CHECK)
        return LogMarginal(
            value=value,
            standard_error=standard_error,
            lower=check.value,
            upper=torch.full_like(value, math.nan),
            k_hat=torch.full_like(value, math.nan),
            ess=draws.ess.double(),
            status=rate(
                standard_error,
                r_hat=draws.nested_r_hat,
                is_refuted=draws.is_flagged | check.refutes(value, standard_error),
            ),
            method=self.method,
            num_samples=self.num_chains * self.num_draws,
            bound=Bound.ESTIMATE,
            acceptance=draws.acceptance.double(),
            r_hat=draws.nested_r_hat.double(),
            num_divergent=draws.num_divergent.double(),
        )


class _Cross(NamedTuple):
    """One half's estimate under the density that was fitted to the other half.

    Attributes:
        root: The estimate.
        effective_size: Effective number of posterior draws for its error.
    """

    root: BridgeRoot
    effective_size: PerRow


def _cross(problem: Problem, fitted: Half, kept: Half, step: int) -> _Cross:
    """Fit to one half and bridge to the other."""
    q = fit_gaussian(fitted.position.flatten(0, 1))
    log_ratio = kept.log_joint - q.log_density(kept.position)
    num_chains, num_draws, num_rows = log_ratio.shape
    u = propose(problem, q, num_chains * num_draws, step=step)
    log_weights = evaluate(problem.density, u).log_joint - q.log_density(u)
    problem.advance((1 - _SHARE_OF_CHAINS - _SHARE_OF_CHECK) / 2)
    root = find_bridge(log_ratio.flatten(0, 1), log_weights, effective_size(log_ratio))
    shares = root.posterior_share.reshape(num_chains, num_draws, num_rows)
    return _Cross(root, effective_size(shares))
