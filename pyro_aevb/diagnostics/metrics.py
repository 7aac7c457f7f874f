r"""How far do two sets of draws lie apart? Moments, Wasserstein distance and a classifier, coordinate by coordinate.

One set comes from chains, ``[chains, draws, *quantities]``, and is the standard: errors are counted in its standard deviations, and
its Monte Carlo error in its effective number of draws. The other is independent draws, ``[draws, *quantities]``.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb.mcmc.convergence import mean_ess

__all__ = ["MIN_DRAWS", "Accuracy", "Distance", "Moments", "classify", "compare_moments", "wasserstein"]

Draws = Float[Tensor, "draws *quantities"]
Chains = Float[Tensor, "chains steps *quantities"]
PerQuantity = Float[Tensor, "*quantities"]

MIN_DRAWS = 100
"""Fewer draws of either set tell nothing: a classifier's accuracy is then known to 0.05 at best, and weights have no tail."""

_MAX_CLASSIFIED = 1000
_NUM_FOLDS = 5
_MIN_CLASSIFIED = 50


class Moments(NamedTuple):
    """Error of first and second moments.

    Attributes:
        mean_error: Mean of the draws minus that of the chains, in the chains' standard deviations.
        mean_error_se: Its Monte Carlo standard error.
        sd_ratio: Standard deviation of the draws over that of the chains.
        sd_ratio_se: Its Monte Carlo standard error.
    """

    mean_error: PerQuantity
    mean_error_se: PerQuantity
    sd_ratio: PerQuantity
    sd_ratio_se: PerQuantity


class Distance(NamedTuple):
    """A distance that is never negative, and what chance alone makes of it.

    Attributes:
        value: The distance.
        null: Its expectation if both sets were of one distribution.
    """

    value: PerQuantity
    null: PerQuantity


class Accuracy(NamedTuple):
    """How well a classifier tells two sets of draws apart.

    Attributes:
        value: Share of draws that are put into the right set: 0.5 by guessing, 1 where the sets have nothing in common.
        null_se: Standard error about 0.5 if both sets were of one distribution.
    """

    value: float
    null_se: float


def compare_moments(draws: Draws, reference: Chains) -> Moments:
    r"""Compare means and standard deviations.

    The standard error of a mean of draws is :math:`\sigma / \sqrt{S}`, that of a standard deviation :math:`\sigma
    \sqrt{(\kappa - 1) / 4S}` with the kurtosis :math:`\kappa` (:math:`\sigma / \sqrt{2S}` for a normal). S is the effective number
    of draws, for chains that of the quantity and of its squared distance from the mean. Both sets' errors are added in squares.

    Example:
        >>> noise = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
        >>> found = compare_moments(2 * noise.flatten() + 1, noise)
        >>> bool((found.mean_error - 1).abs() < 0.1), bool((found.sd_ratio - 2).abs() < 1e-3)
        (True, True)
    """
    draws, chains = draws.double(), reference.double()
    pooled = chains.flatten(0, 1)
    mean, sd = pooled.mean(0), pooled.std(0)
    ratio = draws.std(0) / sd
    count = len(draws)
    error = (1 / mean_ess(chains) + ratio.square() / count).sqrt()
    spread = _excess(chains - mean, (0, 1)) / mean_ess((chains - mean).square())
    relative = (spread + _excess(draws - draws.mean(0), (0,)) / count).sqrt()
    return Moments((draws.mean(0) - mean) / sd, error, ratio, ratio * relative)


def _excess(centred: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return a quarter of kurtosis minus 1: the variance of the log standard deviation, times the number of draws."""
    return (centred.pow(4).mean(dims) / centred.square().mean(dims).square() - 1) / 4


def wasserstein(draws: Draws, reference: Chains) -> Distance:
    r"""Compute the 1-Wasserstein distance of each quantity, in the chains' standard deviations.

    .. math:: W_1 = \frac1\sigma \int |F(z) - G(z)| \, dz

    of the empirical distribution functions. It is what a unit of mass has to move on average; a shift by one standard deviation
    is 1. Between finite sets of one distribution it is not 0 but about :math:`\sqrt{2 / \pi} \sqrt{1/S + 1/S'} \int \sqrt{F (1 -
    F)} / \sigma`, since :math:`F - G` is next to normal at each z. S' is the effective number of draws for the mean; tails mix
    faster, so that this is up to a fifth too much for autocorrelated chains.

    Example:
        >>> noise = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
        >>> bool((wasserstein(noise.flatten() + 1, noise).value - 1).abs() < 0.05)
        True
    """
    draws, chains = draws.double(), reference.double()
    pooled = chains.flatten(0, 1)
    sd = pooled.std(0)
    weights = torch.cat(
        (draws.new_full((len(draws),), 1 / len(draws)), draws.new_full((len(pooled),), -1 / len(pooled)))
    )
    ordered, order = torch.cat((draws, pooled)).sort(0)
    difference = weights[order].cumsum(0)[:-1].abs()
    value = (difference * ordered.diff(dim=0)).sum(0) / sd
    places = torch.arange(1, len(pooled), dtype=torch.float64, device=draws.device) / len(pooled)
    spread = (places * (1 - places)).sqrt().reshape(-1, *(1,) * (draws.dim() - 1))
    width = (spread * pooled.sort(0).values.diff(dim=0)).sum(0) / sd
    null = math.sqrt(2 / math.pi) * (1 / mean_ess(chains) + 1 / len(draws)).sqrt() * width
    return Distance(value, null)


def classify(draws: Float[Tensor, "draws dim"], reference: Float[Tensor, "chains steps dim"], seed: int) -> Accuracy:
    r"""Let a classifier tell draws from chains: the two-sample test of Lopez-Paz and Oquab (2017, arXiv 1610.06545).

    Boosted trees (scikit-learn's ``HistGradientBoostingClassifier``, small ones) are trained on four fifths of equally many draws
    of either set and asked about the last fifth, five times. The accuracy sees what moments of single coordinates do not:
    correlations, modes, skewness; it is a lower bound on what the best classifier reaches, :math:`(1 + TV) / 2` with the total
    variation distance. Chains are thinned to their effective number of draws, least over coordinates, since a classifier learns
    autocorrelated neighbours by heart. The standard error under one distribution is that of independent guesses; folds share
    training data, and over many equal pairs the spread was 0.8 to 1.2 times that.

    Args:
        draws: Independent draws.
        reference: Chains.
        seed: Of folds and thinning.

    Returns:
        NaN where fewer than 50 effective draws of the chains are left.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier  # a second, which only those who compare pay
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    pooled = reference.flatten(0, 1)
    ess = mean_ess(reference).amin().nan_to_num(nan=0.0).item()
    count = min(_MAX_CLASSIFIED, len(draws), len(pooled), int(ess))
    if count < _MIN_CLASSIFIED:
        return Accuracy(math.nan, math.nan)
    every = torch.linspace(0, len(pooled) - 1, count, dtype=torch.float64, device=pooled.device).round().long()
    points = torch.cat((draws[:count], pooled[every])).double().cpu().numpy()
    classifier = HistGradientBoostingClassifier(max_iter=30, max_leaf_nodes=8, random_state=seed)
    folds = StratifiedKFold(_NUM_FOLDS, shuffle=True, random_state=seed)
    accuracy = cross_val_score(classifier, points, np.repeat([0, 1], count), cv=folds).mean()
    return Accuracy(float(accuracy), 0.5 / math.sqrt(2 * count))
