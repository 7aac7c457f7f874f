r"""Annealed importance sampling: from draws of one density to weights that estimate the normaliser of another.

Between a density f_0 (``log_start``) with exact draws and a density f_1 (``log_end``) lie the bridging densities

.. math:: \log f_\beta(u) = (1 - \beta) \log f_0(u) + \beta \log f_1(u), \quad 0 = \beta_0 < \beta_1 < \dots < \beta_T = 1.

A chain starts at :math:`u_0 \sim f_0` and moves by :math:`u_t \sim K_t(\cdot | u_{t-1})`, a Hamiltonian transition that leaves
:math:`f_{\beta_t}` invariant. Its weight (Neal 2001, "Annealed importance sampling", eq 4)

.. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \left( \log f_1(u_{t-1}) - \log f_0(u_{t-1}) \right)

has expectation :math:`Z_1 / Z_0` for **any** schedule, step sizes and number of leapfrog steps, as long as they do not depend on
the run itself: steps that adapt to acceptance inside the weighted run bias it. So :func:`tune` finds them in a pilot run of its own
noise, and :func:`anneal` takes them as they are. No transition follows the last weight, so T temperatures need T - 1 of them.

A path run backwards (``schedule.flip(0)``, ``step_size.flip(0)``) from an exact draw of f_1 passes the same transitions in reverse
and estimates :math:`Z_0 / Z_1`: the upper half of bidirectional Monte Carlo (Grosse, Ghahramani and Adams 2015, arXiv 1511.02543).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pyro_aevb._types import PerRow
from pyro_aevb.mcmc.hmc import Advance, HMCInfo, PerChain, Positions, move
from pyro_aevb.mcmc.noise import RowNoise, Stream

__all__ = ["PILOT_CHAINS", "Annealed", "Path", "anneal", "sigmoid_schedule", "tune"]

Path: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From u ``[..., rows, dim]`` to ``(log_start, log_end)``, each ``[..., rows]`` in nats."""
Schedule: TypeAlias = Float[Tensor, " temperatures"]
StepSizes: TypeAlias = Float[Tensor, "transitions rows"]

PILOT_CHAINS = 4
"""Chains of a row that are enough to tune its steps."""

_PILOT_SHARE = 0.5
_FEW_PILOT_STEPS, _MOST_PILOT_STEPS = 60, 300
"""The pilot takes a step for every other temperature; where these are fewer than 60, up to three for each, and never over 300."""
_WARM_UP_STEPS = 10
_GAIN = 0.2
"""Change of a log step size for each unit that acceptance is off its target."""
_SLOPE = 0.5
"""Change of a log step size for each unit that acceptance lagged behind its target in the pilot. Acceptance falls by 1 to 2 for
each unit of log step size; half of the lag is mended, since smoothing the noise away raises acceptance too."""
_SMOOTHING = 10.0
"""Width, in steps of the pilot, of the normal kernel that smooths step sizes along temperatures."""
_SPREAD = 0.2
_GOLDEN = (math.sqrt(5) - 1) / 2


class Annealed(NamedTuple):
    """What an annealing run leaves.

    Attributes:
        position: Where the chains end: with their weights, draws from the end density.
        log_weights: Log weight of each chain in nats; minus infinity is a weight of zero.
        acceptance: Mean probability of acceptance over chains and temperatures; NaN where there was no transition.
    """

    position: Positions
    log_weights: Float64[Tensor, "chains rows"]
    acceptance: PerRow


class _PathState(NamedTuple):
    """Where chains are on a path: both ends' log densities and gradients, and those of the bridging density in force."""

    position: Positions
    log_density: PerChain
    gradient: Positions
    log_start: PerChain
    log_end: PerChain
    start_gradient: Positions
    end_gradient: Positions


def sigmoid_schedule(num_temperatures: int, *, steepness: float = 4.0) -> Schedule:
    r"""Return inverse temperatures 0 .. 1 that lie densely at both ends.

    .. math:: \beta_t = \frac{s_t - s_0}{s_T - s_0}, \quad s_t = \sigma\left(\delta (2 t / T - 1)\right)

    (Wu, Burda, Salakhutdinov and Grosse 2017, arXiv 1611.04273, section 4).

    Args:
        num_temperatures: T, at least 1.
        steepness: delta, positive.

    Returns:
        T + 1 increasing numbers, in float64.

    Example:
        >>> [round(beta, 3) for beta in sigmoid_schedule(4).tolist()]
        [0.0, 0.105, 0.5, 0.895, 1.0]
    """
    steps = torch.linspace(-steepness, steepness, num_temperatures + 1, dtype=torch.float64).sigmoid()
    return (steps - steps[0]) / (steps[-1] - steps[0])


def anneal(
    path: Path,
    position: Positions,
    schedule: Schedule,
    noise: RowNoise,
    *,
    step_size: StepSizes,
    scale: Float[Tensor, "rows dim"],
    num_leapfrog: int,
    advance: Advance = lambda fraction: None,
) -> Annealed:
    r"""Anneal chains along a schedule and weigh them, with steps as given.

    The mean weight of a row's chains is unbiased for :math:`Z_1 / Z_0`, so its logarithm is a stochastic **lower** bound. Weights
    add up in float64. A chain that starts where a density is zero or NaN has weight zero and leaves the others alone. Costs
    ``1 + (T - 1) * num_leapfrog`` evaluations of the path with its gradients for each chain.

    Args:
        path: Both ends of the path.
        position: Exact draws from the start density (from the end density, if the schedule runs backwards).
        schedule: T + 1 inverse temperatures, from 0 to 1 or from 1 to 0.
        noise: Where random numbers come from.
        step_size: Step of each transition, in units of ``scale``; for the temperatures strictly between the ends.
        scale: Standard deviations that make steps comparable across coordinates.
        num_leapfrog: Leapfrog steps of each transition.
        advance: Is told of the progress.

    Example:
        >>> path = lambda u: (-0.5 * u.square().sum(-1), -2.0 * u.square().sum(-1))
        >>> noise, schedule = RowNoise(0, torch.arange(2), dtype=torch.float64), sigmoid_schedule(50)
        >>> start, scale = noise.normal(Stream.START, 0, 1000, 1), torch.ones(2, 1).double()
        >>> steps = tune(path, start[:4], schedule, noise, scale=scale, num_leapfrog=3)
        >>> run = anneal(path, start[4:], schedule, noise, step_size=steps, scale=scale, num_leapfrog=3)
        >>> bool((run.log_weights.exp().mean(0) - 0.5).abs().max() < 0.02)  # sd 1 to sd 1/2
        True
    """
    betas = schedule.tolist()
    state = _start(path, position, betas[1])
    log_weights = torch.zeros_like(state.log_start, dtype=torch.float64)
    acceptance = torch.zeros_like(position[0, :, 0])
    for number in range(1, len(betas)):
        if number > 1:
            drift = step_size[number - 2, :, None] * scale
            streams = (Stream.MOMENTUM, Stream.ACCEPT)
            state, info = _move(path, state, betas[number - 1], noise, (*streams, number - 1), drift, num_leapfrog)
            acceptance = acceptance + info.acceptance.mean(0)
        log_weights = log_weights + _increment(state, betas[number] - betas[number - 1])
        advance(1 / (len(betas) - 1))
    transitions = len(betas) - 2
    return Annealed(state.position, log_weights, acceptance / transitions if transitions else acceptance / math.nan)


def tune(
    path: Path,
    position: Positions,
    schedule: Schedule,
    noise: RowNoise,
    *,
    scale: Float[Tensor, "rows dim"],
    num_leapfrog: int,
    target_accept_prob: float = 0.65,
    advance: Advance = lambda fraction: None,
) -> StepSizes:
    r"""Find the step size of each row and temperature in a pilot run, for :func:`anneal` to take as it is.

    Along the temperatures, the log step size follows a row's acceptance a (Robbins and Monro 1951):
    :math:`\log \varepsilon \leftarrow \log \varepsilon + \gamma (a - a^*)`. What came of it is smoothed, corrected for the lag
    behind a moving optimum, interpolated to all temperatures, and spread by up to 20 % from one to the next in a fixed sequence:
    steps of one size could make each trajectory a period of the dynamics (Neal 2011, section 5.4.2.2), after which chains stand
    where they stood; on three normal latents that makes the variance of log weights five times larger.

    Costs about ``T / 2 * num_leapfrog`` evaluations of each of the pilot's chains (more for fewer than 120 temperatures, and no
    more than for 600); ``PILOT_CHAINS`` are enough.

    Args:
        path: As in :func:`anneal`.
        position: Draws from the start density, other ones than :func:`anneal` gets.
        schedule: As in :func:`anneal`.
        noise: Where random numbers come from; its streams for pilots are used.
        scale: As in :func:`anneal`.
        num_leapfrog: As in :func:`anneal`.
        target_accept_prob: The acceptance a* that rows shall have.
        advance: Is told of the progress.

    Returns:
        One line for each temperature strictly between the ends.
    """
    between = schedule[1:-1]
    if not len(between):
        advance(1.0)
        return scale.new_ones(0, len(scale))
    betas = [float(between[0])] * _WARM_UP_STEPS + between[_visited(len(between))].tolist()
    spread = _spread(len(betas)).tolist()
    state = _start(path, position, betas[0])
    log_step = scale.new_full((len(scale),), -0.25 * math.log(scale.shape[-1]))
    log_steps, acceptances = [], []
    for number, (beta, factor) in enumerate(zip(betas, spread, strict=True)):
        drift = (factor * log_step.exp())[:, None] * scale
        streams = (Stream.PILOT_MOMENTUM, Stream.PILOT_ACCEPT)
        before = state
        state, info = _move(path, state, beta, noise, (*streams, number), drift, num_leapfrog)
        acceptance = _mean_acceptance(before, info, target_accept_prob)
        log_steps.append(log_step)
        acceptances.append(acceptance)
        gain = max(_GAIN, 2 / (1 + number) ** 0.7) if number < _WARM_UP_STEPS else _GAIN
        log_step = log_step + gain * (acceptance - target_accept_prob)
        advance(1 / len(betas))
    kept = slice(_WARM_UP_STEPS, None)
    error = _smooth(torch.stack(acceptances[kept])) - target_accept_prob
    smooth = _smooth(torch.stack(log_steps[kept])) + _SLOPE * error
    return _spread(len(between)).to(scale)[:, None] * _interpolate(smooth, len(between)).exp()


def _start(path: Path, position: Positions, beta: float) -> _PathState:
    """Evaluate a path and its gradients once."""
    with torch.enable_grad():
        position = position.detach().requires_grad_()
        log_start, log_end = path(position)
        ones = torch.ones_like(log_start)
        # both, not the one that the leapfrog needs: the next temperature combines them anew without another evaluation
        (start_gradient,) = torch.autograd.grad(log_start, position, ones, retain_graph=True)
        (end_gradient,) = torch.autograd.grad(log_end, position, ones)
    ends = (log_start.detach(), log_end.detach(), start_gradient, end_gradient)
    return _PathState(position.detach(), *_bridge(*ends, beta), *ends)


def _bridge(
    log_start: PerChain, log_end: PerChain, start_gradient: Positions, end_gradient: Positions, beta: float
) -> tuple[PerChain, Positions]:
    """Return log density and gradient strictly between the ends; zero density where either has no finite one."""
    log_density = (1 - beta) * log_start + beta * log_end
    gradient = (1 - beta) * start_gradient + beta * end_gradient
    # Any field that is a function of the position keeps the leapfrog reversible and volume preserving.
    return log_density.nan_to_num(-math.inf, -math.inf, -math.inf), gradient.nan_to_num(0.0, 0.0, 0.0)


def _move(
    path: Path,
    state: _PathState,
    beta: float,
    noise: RowNoise,
    draw: tuple[Stream, Stream, int],
    drift: Float[Tensor, "rows dim"],
    num_leapfrog: int,
) -> tuple[_PathState, HMCInfo]:
    """Run one transition that leaves the bridging density of ``beta`` invariant."""
    momentum, accept, number = draw
    chains, _, dim = state.position.shape
    log_density, gradient = _bridge(*state[3:], beta)
    return move(
        partial(_start, path, beta=beta),
        state._replace(log_density=log_density, gradient=gradient),
        noise.normal(momentum, number, chains, dim),
        noise.uniform(accept, number, chains),
        drift=drift,
        num_leapfrog=num_leapfrog,
    )


def _increment(state: _PathState, change: float) -> Float64[Tensor, "chains rows"]:
    """Return what a change of the inverse temperature adds to log weights; minus infinity where it is no finite number."""
    ratio = state.log_end.double() - state.log_start.double()
    return (change * ratio).nan_to_num(-math.inf, -math.inf, -math.inf)


def _mean_acceptance(before: _PathState, info: HMCInfo, target: float) -> PerRow:
    """Average over chains that had a density to lose; where no chain had, the target, which changes no step."""
    counts = before.log_density.isfinite()
    total = torch.where(counts, info.acceptance, 0.0).sum(0)
    return torch.where(counts.any(0), total / counts.sum(0).clamp(min=1), target)


def _visited(num_between: int) -> Tensor:
    """Choose the temperatures of the pilot's steps, evenly; where they are few, each for several steps."""
    count = max(round(_PILOT_SHARE * num_between), min(_FEW_PILOT_STEPS, 3 * num_between))
    count = min(count, _MOST_PILOT_STEPS)
    return torch.linspace(0, num_between - 1, count, dtype=torch.float64).round().long()


def _spread(count: int) -> Float[Tensor, " count"]:
    """Return factors around 1 that cover their range evenly wherever one looks: multiples of the golden ratio."""
    multiples = torch.arange(count, dtype=torch.float64) * _GOLDEN
    return 1 - _SPREAD + 2 * _SPREAD * multiples.frac()


def _smooth(curves: Float[Tensor, "points rows"]) -> Float[Tensor, "points rows"]:
    """Average each row's curve under a normal kernel, renormalised at the ends."""
    points = torch.arange(len(curves), dtype=curves.dtype, device=curves.device)
    kernel = (-0.5 * ((points[:, None] - points) / _SMOOTHING).square()).exp()
    return (kernel / kernel.sum(1, keepdim=True)) @ curves


def _interpolate(curves: Float[Tensor, "points rows"], count: int) -> StepSizes:
    """Stretch or shrink curves to another number of points, linearly, ends on ends."""
    if count == 1:
        return curves.mean(0, keepdim=True)
    return torch.nn.functional.interpolate(curves.T[None], size=count, mode="linear", align_corners=True)[0].T
