r"""One trajectory length for all rows, chosen by how far it carries chains (ChEES; Hoffman, Radul and Sountsov 2021).

A trajectory is long enough where the squared distance to the posterior's centre forgets where it began. Hoffman et al. ("An
adaptive MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo", AISTATS) climb the expected squared change of that
distance by stochastic gradients. Here it is weighed against its cost and needs no gradient: the leapfrog steps of one trajectory
pass through the ends of all shorter ones, so that one pass has the criterion at each length.
"""

import torch
from jaxtyping import Float

from pyro_aevb._types import PerRow
from pyro_aevb.mcmc.hmc import HMCState, Target, leapfrog, metropolis, start
from pyro_aevb.mcmc.noise import RowNoise, Stream

__all__ = ["learn_num_leapfrog"]

_NUM_PASSES = 4


def learn_num_leapfrog(
    target: Target,
    state: HMCState,
    noise: RowNoise,
    *,
    step_size: PerRow,
    scale: Float[torch.Tensor, "rows dim"],
    max_num_leapfrog: int,
) -> int:
    r"""Choose the number of leapfrog steps that changes distances to the centre most, for its cost.

    For chains at q, whitened by ``scale`` and centred at the mean of the row's chains, and the end :math:`q_l` of l leapfrog steps,
    accepted with probability :math:`\alpha_l`, the criterion of the row is

    .. math:: C_l = \tfrac14 E\big[\alpha_l (\|q_l\|^2 - \|q\|^2)^2\big].

    A chain runs 1 to L steps, equally often (:func:`~pyro_aevb.mcmc.hmc.jittered`), so that L with the largest
    :math:`\sum_{l \le L} C_l / \sum_{l \le L} l` is returned, of the mean over rows of each row's criterion over its largest value.

    A heuristic for speed: any length leaves the target invariant, as long as it is frozen before draws that count. It is one number
    of all rows that are given, so that draws then depend on the chunk that a row is in. Costs ``4 * max_num_leapfrog`` gradients
    of each chain.

    Args:
        target: Log density of each row.
        state: Where the chains are, at best after a warm-up; they stay there.
        noise: Where momenta come from.
        step_size: As in :func:`~pyro_aevb.mcmc.hmc.transition`.
        scale: As in :func:`~pyro_aevb.mcmc.hmc.transition`.
        max_num_leapfrog: The largest number to look at.

    Example:
        >>> target = lambda u: -0.5 * u.square().sum(-1)
        >>> noise = RowNoise(0, torch.arange(50), dtype=torch.float32)
        >>> state = start(target, noise.normal(Stream.START, 0, 16, 3))
        >>> settings = dict(step_size=torch.full((50,), 0.2), scale=torch.ones(50, 3), max_num_leapfrog=30)
        >>> 5 < learn_num_leapfrog(target, state, noise, **settings) < 15
        True
    """
    chains, _, dim = state.position.shape
    drift, center = step_size[:, None] * scale, state.position.mean(0)

    def distance(point: HMCState) -> Float[torch.Tensor, "chains rows"]:
        return ((point.position - center) / scale).square().sum(-1)

    criterion = torch.zeros(max_num_leapfrog, len(step_size), dtype=scale.dtype, device=scale.device)
    for number in range(_NUM_PASSES):
        noise_now = noise.normal(Stream.LENGTH_MOMENTUM, number, chains, dim)
        point, momentum = state, noise_now
        for length in range(max_num_leapfrog):
            point, momentum = leapfrog(lambda position: start(target, position), point, momentum, drift, 1)
            acceptance, _ = metropolis(state, noise_now, point, momentum)
            gain = acceptance * (distance(point) - distance(state)).square()
            criterion[length] += torch.where(acceptance > 0, gain, torch.zeros_like(gain)).mean(0)
    # a row's criterion grows with the square of its dimension's spread, and one lost row must not speak for all
    share = (criterion / criterion.amax(0)).nan_to_num(nan=0.0, posinf=0.0).mean(1)
    cost = torch.arange(1, max_num_leapfrog + 1, dtype=share.dtype, device=share.device)
    return int((share.cumsum(0) / cost.cumsum(0)).argmax()) + 1
