r"""Hamiltonian Monte Carlo for chains of many rows at once, each row with its own step size, metric and accept.

Positions u have axes ``[chains, rows, dim]``; a target maps them to log densities ``[chains, rows]``, row by row. With the
posterior's standard deviations s (``scale``) as metric, a momentum r is standard normal, and a leapfrog step of size
:math:`\varepsilon` is

.. math::
    r \leftarrow r + \tfrac{\varepsilon}{2} s \nabla \log p(u), \qquad u \leftarrow u + \varepsilon s r, \qquad
    r \leftarrow r + \tfrac{\varepsilon}{2} s \nabla \log p(u)

(Duane et al. 1987; Neal 2011, arXiv 1206.1901, section 5.2). Steps take effect where a chain accepts, by selection and never
by arithmetic, so that a NaN stays in the chain and the proposal that it came from.

:func:`move` is the transition for a state that carries more than a log density and its gradient; :func:`transition` is the usual
one, :func:`sample` runs chains of it. Nothing here adapts: see :mod:`pyro_aevb.mcmc.adaptation`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pyro_aevb._types import PerRow
from pyro_aevb.mcmc.noise import RowNoise, Stream

__all__ = [
    "Advance",
    "Draws",
    "HMCInfo",
    "HMCState",
    "Target",
    "jittered",
    "leapfrog",
    "metropolis",
    "move",
    "nothing",
    "sample",
    "start",
    "transition",
    "value_and_gradient",
]

Target: TypeAlias = Callable[[Tensor], Tensor]
"""Log density of each row in nats, up to a constant: ``[..., rows, dim]`` to ``[..., rows]``."""
Advance: TypeAlias = Callable[[float], None]
"""Is told the fraction of a job done since the last call; those of one job sum to 1."""

MAX_ENERGY_ERROR = 1000.0
"""A trajectory whose energy moved by more nats is divergent, as in Stan and Pyro."""

PerChain: TypeAlias = Float[Tensor, "chains rows"]
Positions: TypeAlias = Float[Tensor, "chains rows dim"]


@runtime_checkable
class State(Protocol):
    """What a transition needs of a state, a named tuple of tensors ``[chains, rows, ...]``."""

    @property
    def position(self) -> Tensor:
        """Where the chains are, ``[chains, rows, dim]``."""

    @property
    def log_density(self) -> Tensor:
        """Log density there, ``[chains, rows]``."""

    @property
    def gradient(self) -> Tensor:
        """Its gradient, ``[chains, rows, dim]``."""


S = TypeVar("S", bound=State)


class HMCState(NamedTuple):
    """Where chains are, with what the next trajectory needs to know there.

    Attributes:
        position: Unconstrained coordinates.
        log_density: Log density of the target, in nats.
        gradient: Its gradient by the position.
    """

    position: Positions
    log_density: PerChain
    gradient: Positions


class HMCInfo(NamedTuple):
    """What became of one trajectory.

    Attributes:
        acceptance: Probability that it was accepted with; 0 where its end has no finite energy.
        is_accepted: Whether it was.
        is_divergent: Whether the energy moved by more than ``MAX_ENERGY_ERROR`` nats or became NaN or infinite.
    """

    acceptance: PerChain
    is_accepted: Bool[Tensor, "chains rows"]
    is_divergent: Bool[Tensor, "chains rows"]


class Draws(NamedTuple):
    """Draws of chains whose step sizes stood still.

    Attributes:
        position: Unconstrained coordinates.
        log_density: Log density of the target at each, in nats.
        acceptance: Mean probability of acceptance over chains and draws.
        num_divergent: Divergent trajectories of all chains.
    """

    position: Float[Tensor, "chains draws rows dim"]
    log_density: Float[Tensor, "chains draws rows"]
    acceptance: PerRow
    num_divergent: Int[Tensor, " rows"]


def nothing(fraction: float) -> None:
    """Tell nobody."""


def value_and_gradient(
    target: Target, position: Float[Tensor, "*axes rows dim"]
) -> tuple[Float[Tensor, "*axes rows"], Float[Tensor, "*axes rows dim"]]:
    """Evaluate a log density and its gradient once; no graph is left.

    A row that is NaN has a gradient of its own and leaves the others' alone: what is summed is differentiated term by term.
    """
    with torch.enable_grad():
        position = position.detach().requires_grad_()
        log_density = target(position)
        (gradient,) = torch.autograd.grad(log_density, position, torch.ones_like(log_density))
    return log_density.detach(), gradient


def start(target: Target, position: Positions) -> HMCState:
    """Return the state of chains at a position, at the cost of one gradient.

    Example:
        >>> state = start(lambda u: -0.5 * u.square().sum(-1), torch.ones(4, 10, 3))
        >>> state.log_density.shape, float(state.gradient[0, 0, 0])
        (torch.Size([4, 10]), -1.0)
    """
    return HMCState(position.detach(), *value_and_gradient(target, position))


def transition(
    target: Target,
    state: HMCState,
    momentum_noise: Positions,
    uniform: PerChain,
    *,
    step_size: PerRow,
    scale: Float[Tensor, "rows dim"],
    num_leapfrog: int,
) -> tuple[HMCState, HMCInfo]:
    """Run one trajectory of each chain and accept it or stay, leaving the target invariant.

    Exact for any step size and scale that do not depend on the chains' present state. Costs ``num_leapfrog`` gradients. Nothing
    waits for the device.

    Args:
        target: Log density of each row.
        state: Where the chains are.
        momentum_noise: Standard normal numbers.
        uniform: Numbers in (0, 1).
        step_size: Size of a leapfrog step in units of ``scale``.
        scale: Standard deviations of the posterior, as far as they are known: the metric.
        num_leapfrog: Leapfrog steps.

    Returns:
        Where the chains are then, and what became of the trajectories.

    Example:
        >>> target = lambda u: -0.5 * u.square().sum(-1)
        >>> state = start(target, torch.zeros(4, 10, 3))
        >>> noise, uniform = torch.randn(4, 10, 3), torch.rand(4, 10)
        >>> settings = dict(step_size=torch.full((10,), 0.5), scale=torch.ones(10, 3), num_leapfrog=3)
        >>> state, info = transition(target, state, noise, uniform, **settings)
        >>> bool(info.acceptance.mean() > 0.9)
        True
    """
    drift = step_size[:, None] * scale
    return move(partial(start, target), state, momentum_noise, uniform, drift=drift, num_leapfrog=num_leapfrog)


def move(
    evaluate: Callable[[Tensor], S],
    state: S,
    momentum_noise: Tensor,
    uniform: Tensor,
    *,
    drift: Float[Tensor, "rows dim"],
    num_leapfrog: int,
) -> tuple[S, HMCInfo]:
    """Run one trajectory as :func:`transition` does, for states of any kind.

    Args:
        evaluate: The state at a position, at the cost of one gradient. Every field of it is ``[chains, rows, ...]``.
        state: Where the chains are.
        momentum_noise: As in :func:`transition`.
        uniform: As in :func:`transition`.
        drift: Step size times scale.
        num_leapfrog: Leapfrog steps.
    """
    proposal, momentum = leapfrog(evaluate, state, momentum_noise, drift, num_leapfrog)
    acceptance, is_divergent = metropolis(state, momentum_noise, proposal, momentum)
    is_accepted = uniform < acceptance
    return _select(is_accepted, proposal, state), HMCInfo(acceptance, is_accepted, is_divergent)


def metropolis(
    state: S, momentum: Tensor, end: S, momentum_end: Tensor
) -> tuple[PerChain, Bool[Tensor, "chains rows"]]:
    """Return the probability that a trajectory's end is accepted with, and whether the trajectory is divergent."""
    before = 0.5 * momentum.square().sum(-1) - state.log_density
    after = 0.5 * momentum_end.square().sum(-1) - end.log_density
    error = after - before
    # An end of infinite density is as broken as one of NaN. A start of density zero leaves by any finite end.
    is_valid = after.isfinite() & ~error.isnan()
    acceptance = torch.where(is_valid, (-error).clamp(max=0).exp(), torch.zeros_like(error))
    return acceptance, ~is_valid | (error.abs() > MAX_ENERGY_ERROR) & before.isfinite()


def leapfrog(
    evaluate: Callable[[Tensor], S], state: S, momentum: Tensor, drift: Tensor, num_leapfrog: int
) -> tuple[S, Tensor]:
    """Integrate Hamilton's equations; the momentum stays as it is where a chain is lost, and so does its position."""
    momentum = momentum + 0.5 * drift * state.gradient
    for number in range(1, num_leapfrog + 1):
        position = state.position + drift * momentum
        # a momentum that is NaN or infinite is rejected in the end; until then the target is spared positions of NaN, which some
        # (a Cholesky factor) refuse for all rows at once
        is_finite = position.isfinite().all(-1, keepdim=True)
        state = evaluate(torch.where(is_finite, position, state.position))
        momentum = momentum + (0.5 if number == num_leapfrog else 1.0) * drift * state.gradient
    return state, momentum


def _select(is_first: Tensor, first: S, second: S) -> S:
    """Take each chain's state from the first or the second, field by field."""
    fields = [
        torch.where(is_first.reshape(is_first.shape + (1,) * (one.dim() - is_first.dim())), one, other)
        for one, other in zip(first, second, strict=True)  # type: ignore[call-overload]
    ]
    return type(first)(*fields)


def jittered(noise: RowNoise, stream: Stream, step: int, num_leapfrog: int) -> int:
    """Draw the number of leapfrog steps of one iteration: 1 to ``num_leapfrog``, equally likely, the same for all rows.

    A fixed length can be a period of the dynamics, from which a chain never gets away (Neal 2011, section 5.4.2.2).
    """
    return math.ceil(noise.shared_uniform(stream, step) * num_leapfrog)


def sample(
    target: Target,
    state: HMCState,
    noise: RowNoise,
    *,
    num_draws: int,
    step_size: PerRow,
    scale: Float[Tensor, "rows dim"],
    num_leapfrog: int,
    advance: Advance = nothing,
) -> Draws:
    """Draw from each row's target by chains of transitions, step sizes and scales as given.

    The draws of a row depend on the rows beside it in no bit: noise belongs to the row, and the jittered number of steps to the
    seed. Costs ``num_draws * (num_leapfrog + 1) / 2`` gradients of each chain on average.

    Args:
        target: Log density of each row.
        state: Where the chains start.
        noise: Where random numbers come from.
        num_draws: Draws of each chain.
        step_size: As in :func:`transition`.
        scale: As in :func:`transition`.
        num_leapfrog: Most leapfrog steps of an iteration (:func:`jittered`).
        advance: Is told of the progress.

    Example:
        >>> target = lambda u: -0.5 * u.square().sum(-1)
        >>> noise = RowNoise(0, torch.arange(10), dtype=torch.float32)
        >>> settings = dict(step_size=torch.full((10,), 0.8), scale=torch.ones(10, 3), num_leapfrog=4)
        >>> draws = sample(target, start(target, torch.zeros(4, 10, 3)), noise, num_draws=50, **settings)
        >>> draws.position.shape
        torch.Size([4, 50, 10, 3])
    """
    chains, rows, dim = state.position.shape
    positions = state.position.new_empty(chains, num_draws, rows, dim)
    log_densities = state.log_density.new_empty(chains, num_draws, rows)
    acceptance, num_divergent = torch.zeros_like(step_size), torch.zeros_like(step_size, dtype=torch.int64)
    for step in range(num_draws):
        state, info = transition(
            target,
            state,
            noise.normal(Stream.MOMENTUM, step, chains, dim),
            noise.uniform(Stream.ACCEPT, step, chains),
            step_size=step_size,
            scale=scale,
            num_leapfrog=jittered(noise, Stream.JITTER, step, num_leapfrog),
        )
        positions[:, step], log_densities[:, step] = state.position, state.log_density
        acceptance, num_divergent = acceptance + info.acceptance.mean(0), num_divergent + info.is_divergent.sum(0)
        advance(1 / num_draws)
    return Draws(positions, log_densities, acceptance / num_draws, num_divergent)
