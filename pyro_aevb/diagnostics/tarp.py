"""Coverage of credible regions of all latents jointly, by distances from random points."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_aevb.diagnostics.ranks import Floats, RankTest

__all__ = ["TarpCoverage", "scaled_distances"]


@dataclass(frozen=True, repr=False, eq=False)
class TarpCoverage:
    r"""Tests of accuracy with random points (Lemos, Coogan, Hezaveh and Perreault-Levasseur 2023, arXiv 2302.03026).

    A point drawn at random is the centre of a ball whose surface holds the truth; the credibility of the ball is the share of
    posterior draws inside. Credibilities of exact draws are uniform, so that balls of credibility below :math:`\alpha` hold the
    truth in a share :math:`\alpha` of simulations: the expected coverage (algorithm 2).

    The points here are draws from the prior, one a simulation, and know nothing of the data: a guide that ignores the data and
    returns the prior passes, as the paper's section 3.2 says.

    Attributes:
        ranks: Number of draws nearer to the point than the truth, in each simulation.
        num_draws: Draws of each simulation.
    """

    ranks: Int[Tensor, " simulations"]
    num_draws: int

    @cached_property
    def test(self) -> RankTest:
        """The test of uniform credibilities, with its levels and bands."""
        return RankTest(len(self.ranks), self.num_draws)

    @property
    def levels(self) -> Floats:
        r"""Credibilities :math:`\alpha`."""
        return self.test.levels

    @cached_property
    def coverage(self) -> Floats:
        """Share of simulations whose ball has a credibility below each level."""
        return self.test.ecdf(self.ranks)

    @cached_property
    def p_value(self) -> float:
        """Of the same test as the ranks'."""
        return self.test.p_value(self.ranks)

    @property
    def area(self) -> float:
        r"""Area between coverage and the diagonal over levels from 1/2 to 1.

        .. math:: \int_{1/2}^1 (\mathrm{ECP}(\alpha) - \alpha) \, d\alpha

        Above 0 the guide's regions are too large, below 0 too small; it lies between -3/8 and 1/8.
        """
        credibility = (self.ranks.double() + 0.5) / (self.num_draws + 1)
        return (1 - credibility.clamp(min=0.5)).mean().item() - 0.375

    @property
    def standard_error(self) -> float:
        """Standard deviation of ``area`` where the guide is exact."""
        return math.sqrt(1 / 6 - 0.375**2) / math.sqrt(len(self.ranks))

    def __repr__(self) -> str:
        chance = f"{self.standard_error:.4f} by chance; above 0 regions are too large, below too small"
        return f"TARP: area {self.area:+.4f} ({chance}), p = {self.p_value:.2g}"


def scaled_distances(
    points: Float[Tensor, "draws rows latent"],
    references: Float[Tensor, "rows latent"],
    scale: Float[Tensor, " latent"],
) -> Float[Tensor, "draws rows"]:
    """Return Euclidean distances in units of each coordinate's scale.

    Args:
        points: Draws of each row, or truths.
        references: A point for each row.
        scale: Of each coordinate, positive.
    """
    return torch.linalg.vector_norm((points - references) / scale, dim=-1)
