r"""A step size and a diagonal metric for each row, learned in a warm-up and frozen after it.

Step sizes follow dual averaging (Nesterov 2009; Hoffman and Gelman 2014, arXiv 1111.4246, section 3.2.1) of the acceptance
probability averaged over a row's chains; metrics are standard deviations over a row's chains and draws, in windows that grow, as in
Stan's warm-up. Chains in modes without mass go on from where others are (:mod:`pyro_aevb.mcmc.modes`). Every number belongs to its
row: no row's warm-up touches another's.
"""

import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb._types import PerRow
from pyro_aevb.mcmc.hmc import Advance, HMCState, Target, jittered, nothing, transition
from pyro_aevb.mcmc.modes import Visited, move_chains
from pyro_aevb.mcmc.noise import RowNoise, Stream

__all__ = ["DualAveraging", "WarmUp", "find_step_size", "warm_up"]

_T0, _KAPPA = 10.0, 0.75  # Hoffman and Gelman's, and Stan's
_GAMMA = 0.5
"""Theirs is 0.05, for hundreds of noisy steps of one chain. With it, step sizes swing so widely within a window of 50 that their
average accepts 0.05 to 0.2 too much; with this one, 0.03."""
_WINDOW_ENDS = (0.15, 0.3, 0.5, 0.75, 1.0)
"""Where windows end, as fractions of the warm-up. The first and the last learn step sizes only: in the one the chains are still on
their way, in the other the metric is final. After each of the others chains leave modes that hold no mass."""
_MIN_STEPS_FOR_METRIC = 20
_PRIOR_DRAWS = 5.0  # what the scale before a window counts for against the window's draws; Stan's number
_MAX_DOUBLINGS = 30


class DualAveraging(NamedTuple):
    r"""Step sizes that approach a target acceptance, row by row.

    With the acceptance :math:`\alpha_t` of step t and the target :math:`\delta`,

    .. math::
        \bar H_t = \Big(1 - \frac{1}{t + t_0}\Big) \bar H_{t-1} + \frac{\delta - \alpha_t}{t + t_0}, \quad
        \log \varepsilon_{t+1} = \mu - \frac{\sqrt{t}}{\gamma} \bar H_t, \quad
        \log \bar\varepsilon_{t+1} = t^{-\kappa} \log \varepsilon_{t+1} + (1 - t^{-\kappa}) \log \bar\varepsilon_t

    (Hoffman and Gelman 2014, arXiv 1111.4246, eq. 6 and algorithm 5) with :math:`t_0 = 10`, :math:`\gamma = 0.5` and
    :math:`\kappa = 0.75`.

    Attributes:
        center: :math:`\mu`, which the log step size shrinks to.
        error: :math:`\bar H`.
        log_step: :math:`\log \varepsilon`, to take the next step with.
        log_average: :math:`\log \bar\varepsilon`, to freeze.
        num_updates: Updates so far.

    Example:
        >>> averaging = DualAveraging.start(torch.tensor([0.1, 0.1]))
        >>> averaging = averaging.update(torch.tensor([1.0, 0.2]), target=0.8)
        >>> averaging.log_step.exp() > 0.1
        tensor([ True, False])
    """

    center: PerRow
    error: PerRow
    log_step: PerRow
    log_average: PerRow
    num_updates: int

    @classmethod
    def start(cls, step_size: PerRow) -> "DualAveraging":
        """Begin at a step size."""
        log_step = step_size.log()
        return cls(log_step, torch.zeros_like(log_step), log_step, log_step, 0)

    def update(self, acceptance: PerRow, *, target: float) -> "DualAveraging":
        """Take notice of a step's acceptance, averaged over the row's chains."""
        num_updates = self.num_updates + 1
        weight, decay = 1 / (num_updates + _T0), num_updates**-_KAPPA
        error = (1 - weight) * self.error + weight * (target - acceptance)
        log_step = self.center - math.sqrt(num_updates) / _GAMMA * error
        return DualAveraging(
            self.center, error, log_step, decay * log_step + (1 - decay) * self.log_average, num_updates
        )


class WarmUp(NamedTuple):
    """Where chains are after a warm-up, and the settings that it froze.

    Attributes:
        state: Where the chains are.
        step_size: Size of a leapfrog step in units of ``scale``.
        scale: Standard deviations: the metric.
    """

    state: HMCState
    step_size: PerRow
    scale: Float[Tensor, "rows dim"]


def find_step_size(
    target: Target,
    state: HMCState,
    noise: RowNoise,
    *,
    scale: Float[Tensor, "rows dim"],
    accept_prob: float = 0.8,
    call: int = 0,
) -> PerRow:
    """Double or halve each row's step size until the acceptance of one leapfrog step crosses a value.

    A start for :class:`DualAveraging` (Hoffman and Gelman 2014, algorithm 4), whatever the rows' units are. Costs one gradient a
    doubling, of all rows until the last is done. The first try is dim^(-1/4), about right for a normal distribution whose standard
    deviations are ``scale``; a row that finds no answer keeps it.

    Args:
        target: Log density of each row.
        state: Where the chains are; they stay there.
        noise: Where momenta come from.
        scale: The metric.
        accept_prob: The value to cross, of the mean over a row's chains.
        call: Number of this search among those with the same noise.
    """
    chains, rows, dim = state.position.shape
    first = scale.new_full((rows,), dim**-0.25)
    step_size, is_done = first, torch.zeros_like(first, dtype=torch.bool)
    is_growing = is_done
    for number in range(_MAX_DOUBLINGS):
        momentum = noise.normal(Stream.SEARCH_MOMENTUM, call * _MAX_DOUBLINGS + number, chains, dim)
        never = torch.ones_like(state.log_density)
        _, info = transition(target, state, momentum, never, step_size=step_size, scale=scale, num_leapfrog=1)
        is_high = info.acceptance.mean(0) > accept_prob
        is_growing = is_high if number == 0 else is_growing
        is_done = is_done | (is_high != is_growing)
        step_size = torch.where(is_done, step_size, torch.where(is_growing, step_size * 2, step_size / 2))
        if bool(is_done.all()):
            break
    return torch.where(is_done, step_size, first)


def warm_up(
    target: Target,
    state: HMCState,
    noise: RowNoise,
    *,
    num_steps: int,
    target_accept_prob: float,
    num_leapfrog: int,
    scale: Float[Tensor, "rows dim"],
    advance: Advance = nothing,
) -> WarmUp:
    """Learn each row's step size and scale while its chains approach the target; afterwards both stand still.

    Costs ``num_steps * (num_leapfrog + 1) / 2`` gradients of each chain on average, and twice a search for a first step size. With
    fewer than 20 steps the scale stays as it is.

    Args:
        target: Log density of each row.
        state: Where the chains start.
        noise: Where random numbers come from.
        num_steps: Transitions.
        target_accept_prob: What the acceptance probability, averaged over a row's chains, approaches. 0.65 moves
            furthest for its cost (Beskos et al. 2013, arXiv 1001.4460), 0.8 diverges less.
        num_leapfrog: Most leapfrog steps of a transition (:func:`~pyro_aevb.mcmc.hmc.jittered`).
        scale: First guess of the standard deviations; of any units, as long as it is positive.
        advance: Is told of the progress.

    Example:
        >>> from pyro_aevb.mcmc.hmc import start
        >>> sd = torch.logspace(-3, 3, 10)[:, None]
        >>> target = lambda u: -0.5 * (u / sd).square().sum(-1)
        >>> noise = RowNoise(0, torch.arange(10), dtype=torch.float32)
        >>> settings = dict(num_steps=100, target_accept_prob=0.8, num_leapfrog=4, scale=torch.ones(10, 3))
        >>> _, _, scale = warm_up(target, start(target, torch.zeros(16, 10, 3)), noise, **settings)
        >>> bool(((scale / sd).log().abs() < 0.3).all())
        True
    """
    chains, _, dim = state.position.shape
    windows = _windows(num_steps)
    search = partial(find_step_size, target, noise=noise, accept_prob=target_accept_prob)
    step_size = search(state, scale=scale)
    for window, (begin, end) in enumerate(windows):
        averaging, visited = DualAveraging.start(step_size), Visited.start(state, end - begin)
        for step in range(begin, end):
            state, info = transition(
                target,
                state,
                noise.normal(Stream.WARM_UP_MOMENTUM, step, chains, dim),
                noise.uniform(Stream.WARM_UP_ACCEPT, step, chains),
                step_size=averaging.log_step.exp(),
                scale=scale,
                num_leapfrog=jittered(noise, Stream.WARM_UP_JITTER, step, num_leapfrog),
            )
            averaging = averaging.update(info.acceptance.mean(0), target=target_accept_prob)
            visited = visited.update(state, info.acceptance)
            advance(1 / num_steps)
        step_size = averaging.log_average.exp()
        if 0 < window < len(windows) - 1:
            is_empty = visited.is_empty()
            old, scale = scale, _shrink(*visited.pooled(is_empty), scale)
            state = move_chains(state, is_empty, noise.uniform(Stream.RESAMPLING, window, chains))
            # the first metric may change everything, those after it change little
            is_first = window == 1
            step_size = (
                search(state, scale=scale, call=1) if is_first else step_size * (old / scale).log().mean(-1).exp()
            )
    return WarmUp(state, step_size, scale)


def _windows(num_steps: int) -> list[tuple[int, int]]:
    """Return where windows begin and end; one for all steps if they are few."""
    if num_steps < _MIN_STEPS_FOR_METRIC:
        return [(0, num_steps)]
    ends = [round(num_steps * fraction) for fraction in _WINDOW_ENDS]
    return list(pairwise([0, *ends]))


def _shrink(
    variance: Float[Tensor, "rows dim"], size: Float[Tensor, "rows 1"], scale: Float[Tensor, "rows dim"]
) -> Float[Tensor, "rows dim"]:
    """Return standard deviations, a little nearer to ``scale``; that itself where nothing moved or all is lost.

    Shrunk on the logarithmic scale, which knows no unit: Stan's 1e-3 would be all that a row of scale 1e-3 has.
    """
    weight = size / (size + _PRIOR_DRAWS)
    shrunk = (weight * 0.5 * variance.log() + (1 - weight) * scale.log()).exp()
    return torch.where(shrunk.isfinite() & (shrunk > 0), shrunk, scale)
