r"""Have the chains converged, and how many independent draws are they worth: for thousands of quantities at once.

The definitions are ArviZ's, whose functions take one quantity a call: chains are cut into halves, so that a drift shows, and draws
are replaced by normal scores of their ranks, so that heavy tails do no harm (Vehtari et al. 2021, arXiv 1903.08008). Draws are
``[chains, draws, *quantities]`` and results ``[*quantities]`` in float64; everything is computed in float64. A quantity with a NaN,
with fewer than 4 draws, or, for R-hat, with fewer than 2 chains, has the result NaN.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb.errors import SettingError

__all__ = ["Convergence", "bulk_ess", "diagnose", "mean_ess", "nested_r_hat", "split_r_hat"]

Draws = Float[Tensor, "chains draws *quantities"]
PerQuantity = Float[Tensor, "*quantities"]
_Chains = Float[Tensor, "quantities _chains _draws"]

_BLOCK = 4_000_000
"""Draws of quantities that are sorted and transformed at once: some 300 MB."""


class Convergence(NamedTuple):
    """What :func:`diagnose` finds for each quantity.

    Attributes:
        ess: As :func:`bulk_ess`.
        r_hat: As :func:`split_r_hat`.
        nested_r_hat: As :func:`nested_r_hat`.
    """

    ess: PerQuantity
    r_hat: PerQuantity
    nested_r_hat: PerQuantity


def diagnose(draws: Draws, num_superchains: int) -> Convergence:
    """Compute the three that judge chains at once, at a third of their costs.

    Args:
        draws: As in :func:`nested_r_hat`.
        num_superchains: As there.

    Raises:
        SettingError: As there.

    Example:
        >>> found = diagnose(torch.randn(8, 100, 5, generator=torch.Generator().manual_seed(0)), num_superchains=2)
        >>> torch.equal(found.ess, bulk_ess(torch.randn(8, 100, 5, generator=torch.Generator().manual_seed(0))))
        True
    """
    _check_superchains(draws, num_superchains)

    def statistics(block: _Chains) -> Tensor:
        bulk, tail = _bulk_and_tail(block)
        nested = _larger(_nested(bulk, num_superchains), _nested(tail, num_superchains))
        return torch.stack((_ess(bulk), _larger(_r_hat(bulk), _r_hat(tail)), nested))

    return Convergence(*_per_quantity(draws, statistics, min_chains=2))


def bulk_ess(draws: Draws) -> PerQuantity:
    r"""Estimate the effective number of draws of each quantity, by rank-normalised halves of chains.

    .. math:: ESS = M N / \tau, \quad \tau = -1 + 2 \sum_k \hat P_k, \quad \hat P_k = \hat\rho_{2k} + \hat\rho_{2k+1}

    with Geyer's initial positive and monotone sequence (Vehtari et al. 2021, Eq 10-14), the same as ``az.ess(method="bulk")``.
    Draws that are all equal count in full, as there.

    Example:
        >>> noise = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> bool(bulk_ess(noise) > 1500), bool(bulk_ess(noise.cumsum(1)) < 50)
        (True, True)
    """
    return _per_quantity(draws, lambda block: _ess(_normal_scores(_split(block))[0])[None])[0]


def mean_ess(draws: Draws) -> PerQuantity:
    """Estimate the effective number of draws for the mean of each quantity itself, the same as ``az.ess(method="mean")``."""
    return _per_quantity(draws, lambda block: _ess(_split(block))[None])[0]


def split_r_hat(draws: Draws) -> PerQuantity:
    r"""Compare the spread between halves of chains with the spread within them.

    .. math:: \hat R = \sqrt{\frac{N - 1}{N} + \frac{B}{N W}}

    of rank-normalised draws, or of their rank-normalised distances from the median where these are further apart (Vehtari et al.
    2021, section 4), the same as ``az.rhat(method="rank")``. Near 1 if all chains draw from one distribution.

    Example:
        >>> noise = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> bool(split_r_hat(noise) < 1.01), bool(split_r_hat(noise + torch.arange(4.0)[:, None]) > 1.3)
        (True, True)
    """
    return _per_quantity(draws, lambda block: _larger(*map(_r_hat, _bulk_and_tail(block)))[None], min_chains=2)[0]


def nested_r_hat(draws: Draws, num_superchains: int) -> PerQuantity:
    r"""Compare groups of chains that started alike: with many short chains this tells whether the starts are forgotten.

    .. math:: \hat R_\nu = \sqrt{1 + \hat B / \hat W}

    where B is the variance of the means of superchains, and W the mean over superchains of the variance within their chains plus
    that of their chains' means (Margossian et al. 2024, arXiv 2110.13017), on rank-normalised halves of chains or on their
    distances from the median like :func:`split_r_hat`, the same as ``rhat_nested(method="rank")`` of arviz-stats.

    Args:
        draws: Chains of one superchain lie next to each other.
        num_superchains: Number of superchains K, at least 2; it divides the number of chains.

    Raises:
        SettingError: If the chains do not fall into so many groups of equal size.
    """
    _check_superchains(draws, num_superchains)

    def statistic(block: _Chains) -> Tensor:
        return _larger(*(_nested(scores, num_superchains) for scores in _bulk_and_tail(block)))[None]

    return _per_quantity(draws, statistic, min_chains=2)[0]


def _check_superchains(draws: Draws, num_superchains: int) -> None:
    """Refuse groups that chains do not fall into."""
    num_chains = draws.shape[0]
    if num_superchains < 2 or num_chains % num_superchains:
        raise SettingError(
            f"Expected at least 2 superchains of equal size, got num_superchains={num_superchains} of {num_chains} chains."
        )


def _per_quantity(
    draws: Draws, statistics: Callable[[_Chains], Tensor], *, min_chains: int = 1
) -> Float[Tensor, "statistics *quantities"]:
    """Apply statistics of ``[quantities, chains, draws]`` block by block, NaN where they have no meaning."""
    num_chains, num_draws, *shape = draws.shape
    count = math.prod(shape)
    flat = draws.detach().reshape(num_chains, num_draws, count)
    if num_draws < 4 or num_chains < min_chains or not count:
        return flat.new_full((3, *shape), math.nan, dtype=torch.float64)
    parts = []
    for part in flat.split(max(1, _BLOCK // (num_chains * num_draws)), dim=-1):
        block = part.movedim(-1, 0).double().contiguous()
        parts.append(statistics(block).masked_fill(block.isnan().any(-1).any(-1), math.nan))
    return torch.cat(parts, -1).reshape(-1, *shape)


def _split(draws: _Chains) -> Float[Tensor, "quantities half_chains half_draws"]:
    """Cut chains into halves that follow each other; an odd draw in the middle is left out."""
    half = draws.shape[-1] // 2
    return torch.stack((draws[..., :half], draws[..., -half:]), 2).flatten(1, 2)


def _normal_scores(draws: _Chains) -> tuple[_Chains, Float[Tensor, " quantities"]]:
    """Replace draws by normal quantiles of their ranks (Blom 1958), equal draws by that of their mean rank.

    Returns:
        The scores, and the median of the draws.
    """
    flat = draws.flatten(1)
    size = flat.shape[1]
    ordered, order = flat.sort(dim=1)
    position = torch.arange(size, device=flat.device).expand_as(order)
    is_first, is_last = torch.ones_like(ordered, dtype=torch.bool), torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[:, 1:], ordered[:, :-1], out=is_first[:, 1:])
    is_last[:, :-1] = is_first[:, 1:]
    first = position.where(is_first, 0).cummax(1).values
    last = position.where(is_last, size).flip(1).cummin(1).values.flip(1)
    scores = torch.special.ndtri(((first + last).double() / 2 + 1 - 3 / 8) / (size + 1 / 4))
    median = (ordered[:, (size - 1) // 2] + ordered[:, size // 2]) / 2
    return torch.empty_like(flat).scatter_(1, order, scores).reshape(draws.shape), median


def _bulk_and_tail(draws: _Chains) -> tuple[_Chains, _Chains]:
    """Return the scores of halves of chains, and those of their distances from the median."""
    halves = _split(draws)
    bulk, median = _normal_scores(halves)
    return bulk, _normal_scores((halves - median[:, None, None]).abs())[0]


def _larger(bulk: Float[Tensor, " quantities"], tail: Float[Tensor, " quantities"]) -> Float[Tensor, " quantities"]:
    """Return the larger statistic, that of the bulk where the tail has none."""
    return tail.where(tail > bulk, bulk)


def _r_hat(chains: _Chains) -> Float[Tensor, " quantities"]:
    """Compute R-hat of chains as they are."""
    num_draws = chains.shape[-1]
    between, within = num_draws * chains.mean(-1).var(-1), chains.var(-1).mean(-1)
    return ((between / within + num_draws - 1) / num_draws).sqrt()


def _nested(chains: _Chains, num_superchains: int) -> Float[Tensor, " quantities"]:
    """Compute nested R-hat of chains as they are; halves of chains leave at least 2 to a superchain."""
    grouped = chains.unflatten(1, (num_superchains, -1))
    means = grouped.mean(-1)
    within = (grouped.var(-1).mean(-1) + means.var(-1)).mean(-1)
    return (1 + means.mean(-1).var(-1) / within).sqrt()


def _ess(chains: _Chains) -> Float[Tensor, " quantities"]:
    """Compute the effective number of draws of chains as they are."""
    _, num_chains, num_draws = chains.shape
    total = num_chains * num_draws
    covariance = _autocovariance(chains).mean(1)
    within = covariance[:, 0] * num_draws / (num_draws - 1)
    variance = covariance[:, 0] + (chains.mean(-1).var(-1) if num_chains > 1 else 0.0)
    rho = 1 - (within[:, None] - covariance) / variance[:, None]
    rho[:, 0] = 1.0
    time = _autocorrelation_time(rho).clamp(min=1 / math.log10(total))
    is_constant = chains.amax((1, 2)) - chains.amin((1, 2)) < 1e-15
    return (total / time).masked_fill(is_constant, float(total))


def _autocorrelation_time(rho: Float[Tensor, "quantities lags"]) -> Float[Tensor, " quantities"]:
    """Sum autocorrelations as far as their pairs stay positive, made monotone (Geyer 1992)."""
    # ArviZ stops three lags before the end, and adds half of the pair at which it stopped if that is positive.
    num_pairs = max(0, (rho.shape[1] - 3) // 2)
    pairs = rho[:, : 2 * num_pairs + 2].unflatten(1, (-1, 2))
    is_going_on = (pairs.sum(-1)[:, :num_pairs] > 0).long().cumprod(1).bool()
    summed = pairs.sum(-1)[:, :num_pairs]
    summed = summed.cummin(1).values.masked_fill(~is_going_on, 0.0).sum(1) if num_pairs else summed.sum(1)
    last = pairs.take_along_dim(is_going_on.sum(1)[:, None, None], 1)[:, 0]
    counts = (last[:, 0] > 0) | (last.sum(-1) >= 0)
    # NaN is left to show: it comes from infinite draws
    return -1 + 2 * summed + last[:, 0].where(counts | last[:, 0].isnan(), 0.0) + 0 * rho[:, :2].sum(1)


def _autocovariance(chains: _Chains) -> _Chains:
    """Compute the autocovariance of each chain at every lag, divided by the number of draws, by FFT."""
    num_draws = chains.shape[-1]
    centred = chains - chains.mean(-1, keepdim=True)
    power = torch.fft.rfft(centred, n=2 * num_draws).abs().square()
    return torch.fft.irfft(power, n=2 * num_draws)[..., :num_draws] / num_draws
