r"""Where the chains of a row have been, and which of them sit in a mode that holds no mass.

Chains that start in many places find many modes, and each stays in its own. How many chains are in a mode then says where they
started, not how much mass it holds. A chain's own draws say how much, roughly: for a density p without its normaliser,

.. math:: \log \int_A p = E_{p | A}[\log p] + H[p | A] \approx \overline{\log p} + \sum_d \log s_d + \text{const}

for the region A that the chain visits, with H the entropy, here that of a normal distribution with the chain's standard deviations
s. It takes correlations for nothing and is off by a nat or a few, which is enough to tell a mode from one of a thousandth of its
mass.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb.mcmc.hmc import HMCState, PerChain, Positions

__all__ = ["Visited", "leave_empty_modes"]

_EMPTY = 3.0
"""A mode with less than a twentieth of the mass of another one, in nats, and beyond doubt, is no place for a chain."""


class Visited(NamedTuple):
    """Moments of what each chain has visited so far (Welford's recursion).

    Attributes:
        mean: Mean position.
        squares: Sum of squares about it.
        log_density: Sum of log densities, in nats.
        size: Draws of each chain.
    """

    mean: Positions
    squares: Positions
    log_density: PerChain
    size: int

    @classmethod
    def start(cls, like: HMCState) -> "Visited":
        """Begin with nothing."""
        zeros = torch.zeros_like(like.position)
        return cls(zeros, zeros, torch.zeros_like(like.log_density), 0)

    def update(self, state: HMCState) -> "Visited":
        """Take notice of where the chains are."""
        size, shift = self.size + 1, state.position - self.mean
        mean = self.mean + shift / size
        squares = self.squares + shift * (state.position - mean)
        return Visited(mean, squares, self.log_density + state.log_density, size)

    def pooled(self) -> tuple[Float[Tensor, "rows dim"], int]:
        """Return the variance of all chains' draws about their common mean, and their number."""
        size = self.size * len(self.mean)
        between = (self.mean - self.mean.mean(0)).square().sum(0) * self.size
        return (self.squares.sum(0) + between) / max(size - 1, 1), size

    def log_mass(self) -> PerChain:
        """Return the log mass of the region that each chain visits, up to a constant; minus infinity for one that stands still."""
        log_sd = 0.5 * (self.squares / max(self.size - 1, 1)).log().sum(-1)
        mass = self.log_density / self.size + log_sd
        return mass.where(mass.isfinite(), -math.inf)


def leave_empty_modes(state: HMCState, log_mass: PerChain, uniform: PerChain) -> HMCState:
    """Let chains whose mode holds next to nothing go on from where another chain of the row is.

    Next to nothing is less than a twentieth of the largest, where the estimates can tell: their standard errors grow with the
    square root of the dimension, and two of them are allowed for. Chains that mix have the same mass up to these errors and stay
    where they are; so do all of a row if none of them moves.

    Args:
        state: Where the chains are.
        log_mass: Log mass of the region of each (:meth:`Visited.log_mass`).
        uniform: Numbers in (0, 1), which choose among the chains that stay.

    Example:
        >>> state = HMCState(torch.arange(4.0)[:, None, None], torch.zeros(4, 1), torch.zeros(4, 1, 1))
        >>> log_mass = torch.tensor([-30.0, -2.0, -25.0, -3.0])[:, None]
        >>> leave_empty_modes(state, log_mass, torch.tensor([0.1, 0.2, 0.9, 0.4])[:, None]).position[:, 0, 0]
        tensor([1., 1., 3., 3.])
    """
    limit = _EMPTY + math.sqrt(2 * state.position.shape[-1])
    is_kept = (log_mass >= log_mass.amax(0) - limit) | (log_mass.amax(0) == -math.inf)
    kept_first = is_kept.int().argsort(dim=0, descending=True, stable=True)
    choice = (uniform.double() * is_kept.sum(0)).long()
    chains = torch.arange(len(log_mass), device=log_mass.device)[:, None]
    index = torch.where(is_kept, chains, kept_first.gather(0, choice))
    return HMCState(
        state.position.take_along_dim(index[..., None], 0),
        state.log_density.take_along_dim(index, 0),
        state.gradient.take_along_dim(index[..., None], 0),
    )
