"""The rules of trust for estimates of log p(x), in one place: from what an estimator knows about a row to a verdict."""

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from pyro_aevb._types import PerRow
from pyro_aevb.status import Status, judge

__all__ = ["FEW_CHAINS", "MAX_K_HAT", "degrees_of_freedom", "rate", "void_error"]

MAX_K_HAT = 0.7
"""Above it neither a mean of weights nor its standard error is to be believed (arXiv 1507.02646)."""

FEW_CHAINS = 64
"""Below so many independent terms a standard error is itself so uncertain that intervals need Student-t quantiles."""


def rate(
    standard_error: PerRow,
    *,
    k_hat: PerRow | None = None,
    acceptance: PerRow | None = None,
    r_hat: PerRow | None = None,
    change: PerRow | None = None,
    is_refuted: Bool[Tensor, " rows"] | None = None,
) -> tuple[Status, ...]:
    r"""Return the verdict on each row. What a method does not know is left out, and NaN raises no alarm but in the error.

    ======================  ==========================  ==============================
    quantity                doubtful                    unreliable
    ======================  ==========================  ==============================
    standard error (nats)   > 0.25                      > 0.5, infinite or unknown
    k-hat of weights        > 0.5                       > 0.7
    acceptance                                          outside [0.4, 0.98]
    nested R-hat                                        > 1.01
    last change of a grid                               > 0.01 nats
    another estimate                                    contradicts (``is_refuted``)
    ======================  ==========================  ==============================

    The first two are those of importance weights (Vehtari et al. 2024, arXiv 1507.02646); a nested R-hat above 1.01 says that
    chains from different starts have not met (Margossian et al. 2024, arXiv 2110.13017). Without a guide all starts are from
    annealing and differ by chance only: no nested R-hat tells what annealing never finds.

    Args:
        standard_error: Of the row's value, in nats.
        k_hat: Pareto k-hat of its importance weights.
        acceptance: Mean acceptance probability of its chains.
        r_hat: Nested R-hat of its chains.
        change: How far the last refinement of a grid moved its value.
        is_refuted: Whether another estimate of the row contradicts this one: two starts that are more than three standard errors
            apart, or a lower bound that lies so far above the value.

    Example:
        >>> print(*rate(torch.tensor([0.1, 0.3, 0.1]), k_hat=torch.tensor([0.2, 0.2, 0.8])))
        ok warn unreliable
    """
    is_doubtful = standard_error > 0.25
    is_unreliable = ~(standard_error <= 0.5)
    if k_hat is not None:
        is_doubtful, is_unreliable = is_doubtful | (k_hat > 0.5), is_unreliable | (k_hat > MAX_K_HAT)
    if acceptance is not None:
        is_unreliable = is_unreliable | (acceptance < 0.4) | (acceptance > 0.98)
    if r_hat is not None:
        is_unreliable = is_unreliable | (r_hat > 1.01)
    if change is not None:
        is_unreliable = is_unreliable | (change > 0.01)
    if is_refuted is not None:
        is_unreliable = is_unreliable | is_refuted
    return judge(is_doubtful, is_unreliable)


def void_error(standard_error: PerRow, k_hat: PerRow) -> PerRow:
    """Return the standard error, NaN where the weights' tail is so heavy that it would mislead."""
    return torch.where(k_hat > MAX_K_HAT, math.nan, standard_error)


def degrees_of_freedom(num_terms: int) -> int | None:
    """Return those of the Student-t that an error from so many independent terms calls for; ``None`` where a normal will do."""
    return num_terms - 1 if 1 < num_terms < FEW_CHAINS else None
