r"""One trajectory length for all rows, chosen by how far it carries chains (ChEES; Hoffman, Radul and Sountsov 2021).

A trajectory is long enough where the squared distance to the posterior's centre forgets where it began. Hoffman et al. ("An
adaptive MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo", AISTATS) climb the expected squared change of that
distance by stochastic gradients. Here no gradient is needed: the leapfrog steps of one trajectory pass through the ends of all
shorter ones, so that one pass has the criterion at each length.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb._types import PerRow
from pyro_aevb.mcmc.hmc import HMCState, PerChain, Positions, Target, leapfrog, metropolis, start
from pyro_aevb.mcmc.noise import RowNoise, Stream

__all__ = ["choose_num_leapfrog", "measure_lengths"]

_NUM_PASSES = 4
_ENOUGH = 0.95
"""The shortest length that reaches so much of the largest criterion is long enough: it costs less, and the criterion's second
peak, at a trajectory more than twice as long, is within the noise of the first on few rows."""

Criterion = Float[Tensor, "lengths rows"]


def measure_lengths(
    target: Target,
    state: HMCState,
    noise: RowNoise,
    *,
    step_size: PerRow,
    scale: Float[Tensor, "rows dim"],
    max_num_leapfrog: int,
) -> Criterion:
    r"""Return how much trajectories of 1, 2, ... leapfrog steps change distances to each row's centre.

    For chains at q, whitened by ``scale``, and the end :math:`q_l` of l leapfrog steps, accepted with probability
    :math:`\alpha_l`, both centred at their means over the row's chains,

    .. math:: C_l = \tfrac14 E\big[\alpha_l (\|q_l\|^2 - \|q\|^2)^2\big]

    (Hoffman et al. 2021, section 3). Costs ``4 * max_num_leapfrog`` gradients of each chain.

    Args:
        target: Log density of each row.
        state: Where the chains are, at best after a warm-up; they stay there.
        noise: Where momenta come from.
        step_size: As in :func:`~pyro_aevb.mcmc.hmc.transition`.
        scale: As in :func:`~pyro_aevb.mcmc.hmc.transition`.
        max_num_leapfrog: The largest number to look at.
    """
    chains, _, dim = state.position.shape
    drift = step_size[:, None] * scale

    def distance(position: Positions) -> PerChain:
        # from a mean of their own, since that of few chains is off the centre, and its error would turn with them
        return ((position - position.mean(0)) / scale).square().sum(-1)

    criterion = torch.zeros(max_num_leapfrog, len(step_size), dtype=scale.dtype, device=scale.device)
    for number in range(_NUM_PASSES):
        noise_now = noise.normal(Stream.LENGTH_MOMENTUM, number, chains, dim)
        point, momentum = state, noise_now
        for length in range(max_num_leapfrog):
            point, momentum = leapfrog(lambda position: start(target, position), point, momentum, drift, 1)
            acceptance, _ = metropolis(state, noise_now, point, momentum)
            end = torch.where(acceptance[..., None] > 0, point.position, state.position)
            criterion[length] += (acceptance * (distance(end) - distance(state.position)).square() / 4).mean(0)
    return criterion / _NUM_PASSES


def choose_num_leapfrog(criterion: Criterion) -> int:
    r"""Choose one number of leapfrog steps for all rows.

    A chain runs 1 to L steps, equally often (:func:`~pyro_aevb.mcmc.hmc.jittered`), so that :math:`\frac1L \sum_{l \le L} C_l` is
    what a transition achieves. The shortest L that reaches 0.95 of the largest is returned, of the mean over rows of each row's
    criterion over its largest value.

    A heuristic for speed: any length leaves the target invariant, as long as it is frozen before draws that count.

    Args:
        criterion: Of each length and row (:func:`measure_lengths`).

    Example:
        >>> target = lambda u: -0.5 * u.square().sum(-1)
        >>> noise = RowNoise(0, torch.arange(50), dtype=torch.float32)
        >>> state = start(target, noise.normal(Stream.START, 0, 16, 3))
        >>> settings = dict(step_size=torch.full((50,), 0.2), scale=torch.ones(50, 3), max_num_leapfrog=30)
        >>> 7 < choose_num_leapfrog(measure_lengths(target, state, noise, **settings)) < 13
        True
    """
    # a row's criterion grows with the square of its dimension's spread, and one lost row must not speak for all
    share = (criterion / criterion.amax(0)).nan_to_num(nan=0.0, posinf=0.0).mean(1)
    counts = torch.arange(1, len(share) + 1, dtype=share.dtype, device=share.device)
    mean = share.cumsum(0) / counts
    return int((mean >= _ENOUGH * mean.amax()).int().argmax()) + 1
