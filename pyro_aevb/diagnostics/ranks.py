r"""Ranks of a true value among posterior draws, and an exact test that they are uniform.

If z* is drawn from the prior, x from p(x | z*), and draws :math:`z_1 .. z_L` from the exact posterior of x, then the rank of
f(z*, x) among the :math:`f(z_l, x)` is uniform on 0 .. L for any function f of latents and data (Talts et al. 2018,
arXiv 1804.06788, Theorem 1; Modrak et al. 2023, arXiv 2211.02383, for functions that look at the data too).
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrc, gammaln, xlogy
from torch import Tensor

from pyro_aevb.errors import SettingError

__all__ = ["RankTest", "rank_among"]

_MAX_POINTS = 100
"""Points at which the distribution of ranks is compared: more of them hardly gain power."""
_BISECTIONS = 30
_ROUNDING = 1e-9

Floats = NDArray[np.float64]


def rank_among(
    truth: Float[Tensor, "*shape"], draws: Float[Tensor, "draws *shape"], noise: Float[Tensor, "*shape"]
) -> Int[Tensor, "*shape"]:
    """Return how many draws lie below the truth, its place among equals by chance.

    Args:
        truth: True values.
        draws: Draws to rank them among.
        noise: Uniform numbers in [0, 1) that break ties.

    Returns:
        Ranks from 0 to the number of draws.

    Example:
        >>> rank_among(torch.tensor([2.5, 1.0]), torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]), torch.tensor([0.9, 0.9]))
        tensor([2, 3])
    """
    num_equal = (draws == truth).sum(0)
    chosen = (noise * (num_equal + 1)).long().minimum(num_equal)  # the product can round up
    return (draws < truth).sum(0) + chosen


class RankTest:
    r"""A test of uniform ranks that sees the whole distribution, with simultaneous bands that belong to it.

    The number of ranks below :math:`i` of N simulations is binomial, :math:`C_i \sim B(N, i / (L + 1))`. The statistic is the
    smallest two-sided tail probability over the points i,

    .. math:: T = \min_i 2 \min\{ P(B_i \le C_i), P(B_i \ge C_i) \},

    and the p-value :math:`P(T \le t)` of uniform ranks: a band of pointwise binomial intervals is widened until the whole curve
    lies inside with a stated probability (Säilynoja, Bürkner and Vehtari 2022, arXiv 2103.10522, section 2.3). The curve
    leaves the band of level c if and only if p is at most about 1 - c: not more, and less by what steps of a count make.

    The p-value is exact but for rounding, also where it is tiny: the counts are a Poisson process given its total, so that the
    probabilities of leaving the band for the first time at each point follow one another by convolution, and are summed.

    Args:
        num_simulations: Number of ranks N.
        num_draws: Largest rank L.

    Attributes:
        levels: Points :math:`i / (L + 1)`: all of them, or 100 if there are more.

    Example:
        >>> test = RankTest(500, 100)
        >>> test.p_value(torch.arange(500) % 101) > 0.9, test.p_value(torch.arange(500) % 50) < 1e-10
        (True, True)
    """

    name = "simultaneous ECDF test (Säilynoja et al. 2022)"

    def __init__(self, num_simulations: int, num_draws: int) -> None:
        self.num_simulations, self.num_draws = num_simulations, num_draws
        places = np.linspace(1, num_draws, min(num_draws, _MAX_POINTS)).round().astype(np.int64)
        self._places = torch.from_numpy(places)
        self.levels: Floats = places / (num_draws + 1)
        counts = np.arange(num_simulations + 1, dtype=np.float64)
        self._below: Floats = bdtr(counts, num_simulations, self.levels[:, None])
        self._above: Floats = bdtrc(counts - 1, num_simulations, self.levels[:, None])
        steps = np.diff(self.levels, prepend=0.0)
        self._steps = [_trimmed(_poisson(counts, num_simulations * step)) for step in steps]
        # that the count arrives at N in the end, given where it stands
        rest = _poisson(num_simulations - counts, num_simulations * (1 - self.levels[:, None]))
        self._arrivals: Floats = rest / _poisson(counts[-1:], float(num_simulations))

    def ecdf(self, ranks: Int[Tensor, " simulations"]) -> Floats:
        """Return the share of ranks below each point, to be held against ``levels``."""
        return self._counts(ranks) / self.num_simulations

    def p_value(self, ranks: Int[Tensor, " simulations"]) -> float:
        """Return the probability that uniform ranks stray at least as far.

        Raises:
            SettingError: If there are more or fewer ranks than simulations, or one is out of range.
        """
        if len(ranks) != self.num_simulations or bool(((ranks < 0) | (ranks > self.num_draws)).any()):
            raise SettingError(
                f"Expected {self.num_simulations} ranks between 0 and {self.num_draws}, got {len(ranks)} between "
                f"{int(ranks.min())} and {int(ranks.max())}."
            )
        counts = self._counts(ranks)
        points = np.arange(len(counts))
        tails = np.minimum(self._below[points, counts], self._above[points, counts])
        # tails of equal size, such as those of mirrored counts, must not differ by rounding
        return self._escape(float(tails.min()) * (1 + _ROUNDING))

    def band(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Return lower and upper ends between which the whole curve of :meth:`ecdf` lies with a probability of ``level`` or more.

        Raises:
            SettingError: If the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise SettingError(f"level must lie between 0 and 1; got {level!r}.")
        lower, upper = self._limits(self._tail(level))
        return lower / self.num_simulations, upper / self.num_simulations

    def _counts(self, ranks: Tensor) -> NDArray[np.int64]:
        """Count ranks below each point."""
        below = torch.bincount(ranks.cpu(), minlength=self.num_draws + 1).cumsum(0)
        return below[self._places - 1].numpy()

    def _limits(self, tail: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the least and the largest count at each point whose tail probabilities both exceed ``tail``."""
        lower = (self._below > tail).argmax(1)
        upper = self.num_simulations - (self._above > tail)[:, ::-1].argmax(1)
        return lower, upper

    def _tail(self, level: float) -> float:
        """Return the largest tail probability whose limits are left with a probability of at most 1 - level."""
        # the union over points bounds it from below, a single point from above
        low, high = np.log((1 - level) / 4 / len(self.levels)), np.log(0.5)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._escape(np.exp(middle)) <= 1 - level else (low, middle)
        return float(np.exp(low))

    def _escape(self, tail: float) -> float:
        """Return the probability that uniform ranks leave the limits of a tail probability somewhere."""
        weights, start, escaped = np.ones(1), 0, 0.0
        for step, arrivals, low, high in zip(self._steps, self._arrivals, *self._limits(tail), strict=True):
            grown = np.convolve(weights, step)[: self.num_simulations - start + 1]
            counts = start + np.arange(len(grown))
            is_inside = (counts >= low) & (counts <= high)
            escaped += float((grown * arrivals[counts])[~is_inside].sum())
            if not is_inside.any():
                break
            weights, start = grown[is_inside], int(counts[is_inside][0])
        return min(escaped, 1.0)


def _poisson(counts: Floats, mean: Floats | float) -> Floats:
    """Return Poisson probabilities."""
    mass: Floats = np.exp(xlogy(counts, mean) - mean - gammaln(counts + 1))
    return mass


def _trimmed(mass: Floats) -> Floats:
    """Drop the end that is zero for all purposes."""
    return mass[: np.flatnonzero(mass > 1e-300)[-1] + 1]
