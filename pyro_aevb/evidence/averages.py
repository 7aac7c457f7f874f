"""Averages of weights as results: over a row's importance weights, and over draws of the globals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb._types import GlobalWeights, LocalWeights, PerRow
from pyro_aevb.errors import SettingError
from pyro_aevb.evidence.pareto import pareto_k_hat
from pyro_aevb.evidence.result import Bound, LogMarginal
from pyro_aevb.evidence.rules import degrees_of_freedom, rate, void_error
from pyro_aevb.evidence.summary import JointEvidence

__all__ = ["average_over_globals", "from_log_weights", "joint_evidence"]


def from_log_weights(log_weights: LocalWeights, *, label: str = "log p(x)", method: str = "importance") -> LogMarginal:
    r"""Estimate each row's log marginal likelihood from its importance weights.

    .. math:: \widehat{\log p}(x_n) = \log \tfrac1S \sum_s \tfrac1K \sum_k w[s, k, n]

    (Burda et al. 2015, arXiv 1509.00519, Eq 8), accumulated in float64. The mean weight is unbiased for p(x), so its log is
    a stochastic **lower** bound: :math:`E[\widehat{\log p}] \le \log p(x)`, low by about half the squared standard error.

    The standard error is the delta method's: for S = 1 the relative one of a mean of K weights,
    :math:`\sqrt{1/ESS - 1/K}`; for S > 1 particles, in each of which the K weights share a draw of the globals, that of a
    mean of S particle means, :math:`\sqrt{\mathrm{Var}_s(\bar w_s) / S} / \bar w` (with few particles the interval is Student's
    t of S - 1 degrees of freedom). It is void (NaN) where k-hat > 0.7, where all weights are zero, and where one
    weight is all there is. k-hat and ESS are those of all S K weights; a handful of particles cannot show that the
    weights of the globals themselves have a heavy tail.

    Costs no density evaluation. No gradient.

    Args:
        log_weights: log w[s, k, n] in nats, with pointwise densities and never a closed-form KL. Minus infinity is zero.
        label: Name of the quantity, such as ``"log predictive under q(globals)"``.
        method: Name of the estimator.

    Returns:
        One entry a row, in float64: ``lower`` equals ``value``, ``upper`` is NaN. A row whose weights are all zero has the
        value minus infinity and is unreliable; one whose weights are all equal has standard error 0.

    Raises:
        DataError: If there are no weights.
        NonFiniteError: If a log weight is NaN or plus infinity.

    Example:
        >>> result = from_log_weights(torch.full((1, 200, 2), -3.0))  # an exact guide: constant weights
        >>> result.value.tolist(), result.standard_error.tolist(), [str(status) for status in result.status]
        ([-3.0, -3.0], [0.0, 0.0], ['ok', 'ok'])
    """
    num_particles, num_samples, _ = log_weights.shape
    log_weights = log_weights.detach()
    k_hat = pareto_k_hat(log_weights.flatten(0, 1))
    log_max = log_weights.amax((0, 1)).double()
    log_max = log_max.where(log_max.isfinite(), 0.0)
    weights = (log_weights.double() - log_max).exp()
    value = log_max + weights.mean((0, 1)).log()
    standard_error = void_error(_relative_error(weights), k_hat)
    return LogMarginal(
        value=value,
        standard_error=standard_error,
        lower=value,
        upper=torch.full_like(value, math.nan),
        k_hat=k_hat,
        ess=(weights.sum((0, 1)).square() / weights.square().sum((0, 1))).nan_to_num(nan=0.0),
        status=rate(standard_error, k_hat=k_hat),
        method=method,
        num_samples=num_samples,
        bound=Bound.LOWER,
        label=label,
        num_global_samples=num_particles,
        degrees_of_freedom=degrees_of_freedom(num_particles),
    )


def average_over_globals(results: Sequence[LogMarginal]) -> LogMarginal:
    r"""Average the rows' estimates given each of S draws of the globals: :math:`\log \frac1S \sum_s \hat p(x_n | g_s)`.

    With one draw the result is returned as it is: that of :math:`\log p(x_n | g_1)`. With more, the standard error is that of a
    mean of S terms, :math:`\sqrt{\mathrm{Var}_s(\hat p_s) / S} / \overline{\hat p}`, which holds the error given each draw too.
    A lower bound stays one. An upper bound given each draw is none of their average, since the logarithm of a mean over draws
    of the globals is low. k-hat and R-hat are the worst of the draws, acceptance and audit their means; a row is unreliable by the
    rules for its average, or if more than a tenth of its draws are for another reason than their standard error.

    Args:
        results: One result a draw, of the same rows.

    Raises:
        SettingError: If there are none.

    Example:
        >>> low, high = (from_log_weights(torch.full((1, 200, 2), level)) for level in (-1.0, 1.0))
        >>> [round(value, 4) for value in average_over_globals([low, high]).value.tolist()]  # log cosh 1
        [0.4338, 0.4338]
    """
    if not results:
        raise SettingError("Expected the result of at least one draw of the globals, got none.")
    first, num_draws = results[0], len(results)
    if num_draws == 1:
        return first
    values = torch.stack([result.value for result in results])
    value, standard_error = _log_mean(values)
    entries = {name: _known(results, name) for name in ("acceptance", "r_hat", "num_divergent", "change", "audit")}
    k_hat = torch.stack([result.k_hat for result in results]).amax(0)
    standard_error = void_error(standard_error, k_hat)
    shares = (values - value).exp()
    ess = num_draws**2 / (shares.square() / torch.stack([result.ess for result in results])).sum(0)
    errors = torch.stack([result.standard_error for result in results])
    is_bad = torch.stack([result.is_flagged for result in results]) & (errors <= 0.5)
    return replace(
        first,
        value=value,
        standard_error=standard_error,
        lower=_log_mean(torch.stack([result.lower for result in results]))[0],
        upper=torch.full_like(value, math.nan),
        upper_kind="none",
        bound=first.bound if first.bound is Bound.LOWER else Bound.ESTIMATE,
        k_hat=k_hat,
        ess=ess,
        status=rate(standard_error, k_hat=k_hat, is_refuted=is_bad.double().mean(0) > 0.1),
        num_global_samples=num_draws,
        degrees_of_freedom=degrees_of_freedom(num_draws),
        acceptance=_reduced(entries["acceptance"], torch.mean),
        r_hat=_reduced(entries["r_hat"], torch.amax),
        num_divergent=_reduced(entries["num_divergent"], torch.sum),
        change=_reduced(entries["change"], torch.amax),
        audit=_reduced(entries["audit"], torch.mean),
    )


def joint_evidence(
    log_global: GlobalWeights,
    values: Float[Tensor, "particles rows"],
    standard_errors: PerRow,
    *,
    is_unbiased: bool,
) -> JointEvidence:
    r"""Estimate the joint log evidence of all rows, :math:`\log \frac1S \sum_s w_g[s] \prod_n \hat p(x_n | g_s)`.

    Given the globals the rows are independent, so that a product of unbiased estimates is unbiased and the logarithm of the
    average a stochastic lower bound. The standard error is that of a mean of S weights; for S = 1 it is
    :math:`\sqrt{\sum_n se_n^2}`, given the one draw. Weights of whole data sets differ much: their ESS and k-hat tell whether
    q(globals) is close enough to average over.

    Args:
        log_global: log w_g[s], in nats.
        values: Estimates of log p(x_n | g_s).
        standard_errors: Those given the one draw; they count for S = 1 only.
        is_unbiased: Whether each exp(value) is unbiased for p(x_n | g_s).

    Example:
        >>> joint = joint_evidence(torch.zeros(2), torch.ones(2, 3), torch.zeros(3), is_unbiased=True)
        >>> joint.value, joint.standard_error
        (3.0, 0.0)
    """
    log_weights = log_global.double() + values.double().sum(1)
    num_draws = len(log_weights)
    value, error = _log_mean(log_weights[:, None])
    k_hat = pareto_k_hat(log_weights[:, None])
    error = void_error(error if num_draws > 1 else standard_errors.double().square().sum().sqrt()[None], k_hat)
    shares = (log_weights - log_weights.amax()).exp()
    return JointEvidence(
        value=value.item(),
        standard_error=error.item(),
        bound=Bound.LOWER if is_unbiased else Bound.ESTIMATE,
        ess=(shares.sum().square() / shares.square().sum()).nan_to_num(nan=0.0).item(),
        k_hat=k_hat.item(),
        num_global_samples=num_draws,
        status=rate(error, k_hat=k_hat)[0],
        degrees_of_freedom=degrees_of_freedom(num_draws),
    )


def _log_mean(values: Float[Tensor, "particles rows"]) -> tuple[PerRow, PerRow]:
    """Return the log of the mean of exponentials over the first axis, and its standard error, NaN for a single term."""
    log_max = values.amax(0).double()
    log_max = log_max.where(log_max.isfinite(), 0.0)
    terms = (values.double() - log_max).exp()
    return log_max + terms.mean(0).log(), _relative_error(terms[:, None])


def _known(results: Sequence[LogMarginal], name: str) -> list[PerRow]:
    """Return an entry of those results that know it."""
    return [entry for result in results if (entry := getattr(result, name)) is not None]


def _reduced(entries: list[PerRow], reduce: Callable[..., Tensor]) -> PerRow | None:
    """Reduce an entry over the draws of the globals; ``None`` where no result knows it."""
    return reduce(torch.stack(entries), 0) if entries else None


def _relative_error(weights: Float[Tensor, "particles importance_samples rows"]) -> PerRow:
    """Return the relative standard error of each row's mean weight, NaN where it cannot be known."""
    num_particles, num_samples, _ = weights.shape
    # With one particle this is sqrt(1/ESS - 1/K) without the cancellation. Particles are few: unbiased variance.
    units, correction = (weights.mean(1), 1) if num_particles > 1 else (weights[0], 0)
    if num_particles == num_samples == 1:
        return torch.full_like(units[0], math.nan)
    return (units.var(0, correction=correction) / len(units)).sqrt() / units.mean(0)
