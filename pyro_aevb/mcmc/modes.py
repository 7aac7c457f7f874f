r"""Where the chains of a row have been, and which of them sit in a mode that holds no mass.

Chains that start in many places find many modes, and each stays in its own. How many chains are in a mode then says where they
started, not how much mass it holds. A chain's own draws say how much, roughly: for a density p without its normaliser and the
region A that the chain visits,

.. math:: \log \int_A p = E_{p | A}[\log p] + H[p | A] \approx \overline{\log p} + \tfrac12 \log \det S + \text{const},

with H the entropy, here that of a normal distribution with the covariance S of the chain's draws. A normal has the largest entropy
of all densities with that covariance, so that a region looks larger than it is, the more so the less it is like a normal; few
draws make it look smaller. Both are allowed for by a nat a coordinate. That is enough to tell a mode that holds next to nothing,
and a chain whose estimate can't be trusted is never judged by it.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_aevb.mcmc.hmc import HMCState, PerChain, Positions

__all__ = ["Visited", "move_chains"]

_EMPTY = 3.0
"""A mode with less than a twentieth of another one's mass, in nats, is no place for a chain, if the estimates are that good."""
_DRAWS_PER_COORDINATE = 5
"""Draws of a chain that a covariance needs before its determinant means something."""
_MAX_DIM = 30
_LEAST_ACCEPTANCE = 0.4
"""A chain that accepts less often may be where steps of the row's common size are too long: its draws say little of the region."""


class Visited(NamedTuple):
    """Moments of what each chain has visited so far (Welford's recursion).

    Attributes:
        mean: Mean position.
        products: Sums of products of deviations from it; ``None`` where no mass is asked for, to save memory.
        squares: Sums of squares about it.
        log_density: Sum of log densities, in nats.
        acceptance: Sum of acceptance probabilities.
        size: Draws of each chain.
    """

    mean: Positions
    products: Float[Tensor, "chains rows dim dim"] | None
    squares: Positions
    log_density: PerChain
    acceptance: PerChain
    size: int

    @classmethod
    def start(cls, like: HMCState, num_draws: int) -> "Visited":
        """Begin with nothing.

        Args:
            like: Where the chains are.
            num_draws: Draws that are to come: if they are too few for a covariance, none is kept.
        """
        dim, zeros, none = like.position.shape[-1], torch.zeros_like(like.position), torch.zeros_like(like.log_density)
        can_judge = num_draws >= _DRAWS_PER_COORDINATE * dim and dim <= _MAX_DIM
        products = zeros[..., None].expand(*zeros.shape, dim) if can_judge else None
        return cls(zeros, products, zeros, none, none, 0)

    def update(self, state: HMCState, acceptance: PerChain) -> "Visited":
        """Take notice of where the chains are, and of the probability that their last step was accepted with."""
        size, shift = self.size + 1, state.position - self.mean
        mean = self.mean + shift / size
        rest = state.position - mean
        products = None if self.products is None else self.products + shift[..., None] * rest[..., None, :]
        sums = (self.log_density + state.log_density, self.acceptance + acceptance)
        return Visited(mean, products, self.squares + shift * rest, *sums, size)

    def pooled(self, is_out: Bool[Tensor, "chains rows"]) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, "rows 1"]]:
        """Return the variance of the draws about their common mean, and their number, leaving chains out."""
        weight = (~is_out)[..., None].to(self.mean)
        size = self.size * weight.sum(0)
        mean = (weight * self.mean).sum(0) * self.size / size
        between = (weight * (self.mean - mean).square()).sum(0) * self.size
        return ((weight * self.squares).sum(0) + between) / (size - 1).clamp(min=1), size

    def log_mass(self) -> PerChain:
        """Return the log mass of the region that each chain visits, up to a constant; NaN where that can't be told."""
        if self.products is None:
            return torch.full_like(self.log_density, math.nan)
        squares = self.squares.where(self.squares > 0, math.nan)
        scale = squares.rsqrt()
        correlation = (scale[..., None] * self.products * scale[..., None, :]).nan_to_num()
        factor, info = torch.linalg.cholesky_ex(correlation.double())
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + (squares / (self.size - 1)).log().sum(-1)
        is_known = (info == 0) & (self.acceptance >= _LEAST_ACCEPTANCE * self.size)
        mass = self.log_density / self.size + 0.5 * log_det
        return mass.where(is_known & mass.isfinite(), math.nan).to(self.log_density)

    def is_empty(self) -> Bool[Tensor, "chains rows"]:
        """Tell which chains sit in a mode that holds next to nothing, or where there is no density at all.

        The first are those whose log mass lies more than 3 + D nats below the largest of the row's: 3 for a twentieth, one nat a
        coordinate for what the estimate may be off. A chain that hardly accepts is where the row's steps are too long, in a narrow
        place: it counts with the volume of that largest one, which is more than it has. Other chains whose mass is not known are
        not among them. The second are empty as soon as any chain of the row has a density.
        """
        mass, log_density = self.log_mass(), self.log_density / self.size
        best, place = mass.nan_to_num(nan=-math.inf).max(0)
        volume = best - log_density.gather(0, place[None])[0]
        hardly_moves = self.acceptance < _LEAST_ACCEPTANCE * self.size
        most = torch.where(hardly_moves & best.isfinite(), log_density + volume, mass)
        is_low = most < best - (_EMPTY + self.mean.shape[-1])
        is_nowhere = ~self.log_density.isfinite()
        return is_low | (is_nowhere & ~is_nowhere.all(0))


def move_chains(state: HMCState, is_empty: Bool[Tensor, "chains rows"], uniform: PerChain) -> HMCState:
    """Let chains go on from where other chains of their row are, chosen at random among those that stay.

    Args:
        state: Where the chains are.
        is_empty: Those that go; never all of a row.
        uniform: Numbers in (0, 1), which choose.

    Example:
        >>> state = HMCState(torch.arange(4.0)[:, None, None], torch.zeros(4, 1), torch.zeros(4, 1, 1))
        >>> is_empty = torch.tensor([True, False, True, False])[:, None]
        >>> move_chains(state, is_empty, torch.tensor([0.1, 0.2, 0.9, 0.4])[:, None]).position[:, 0, 0]
        tensor([1., 1., 3., 3.])
    """
    stays_first = is_empty.int().argsort(dim=0, stable=True)
    choice = (uniform.double() * (~is_empty).sum(0)).long()
    chains = torch.arange(len(is_empty), device=is_empty.device)[:, None]
    index = torch.where(is_empty, stays_first.gather(0, choice), chains)
    return HMCState(
        state.position.take_along_dim(index[..., None], 0),
        state.log_density.take_along_dim(index, 0),
        state.gradient.take_along_dim(index[..., None], 0),
    )
