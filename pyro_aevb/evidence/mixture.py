"""Importance sampling from a mixture of a proposal and the prior, which finds modes that the proposal misses."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pyro_aevb.evidence.problem import Problem
from pyro_aevb.program.density import Density, LogDensity
from pyro_aevb.program.rows import CHUNK_DRAWS

__all__ = ["MixtureWeights", "evaluate", "few_rows", "weigh_with_prior"]

LogProposal = Callable[[Tensor], Tensor]


class MixtureWeights(NamedTuple):
    """Weights under a mixture with the prior, the proposal's draws first.

    Attributes:
        log_weights: In nats; minus infinity where there is no density.
        log_prior: Log prior at each draw.
        log_proposal: Log density of the proposal at each draw.
    """

    log_weights: Float64[Tensor, "draws rows"]
    log_prior: Float64[Tensor, "draws rows"]
    log_proposal: Float64[Tensor, "draws rows"]


def evaluate(density: LogDensity, u: Float[Tensor, "draws rows latent"]) -> Density:
    """Return log prior and log likelihood in float64, in pieces that bound the memory; NaN is no density, as for the chains."""
    pieces = _pieces(u.to(density.dtype))
    parts = [density(piece) for piece in pieces]
    terms = (torch.cat(entries).double() for entries in zip(*parts, strict=True))
    return Density(*(term.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf) for term in terms))


def weigh_with_prior(
    problem: Problem,
    u: Float[Tensor, "draws rows latent"],
    log_proposal: LogProposal,
    *,
    num_prior: int,
) -> MixtureWeights:
    r"""Weigh draws of a proposal q and draws of the prior, all under the density of their mixture.

    .. math:: w = \frac{p(x, u)}{\alpha \, p(u) + (1 - \alpha) \, q(u)}

    with :math:`\alpha` the prior's share of the draws. Fixed numbers of draws from each leave the mean weight unbiased for p(x)
    (Owen and Zhou 2000, "Safe and effective importance sampling"), and no weight exceeds the likelihood over :math:`\alpha`. So
    the logarithm of the mean is a stochastic lower bound, which knows of modes that q misses as far as the prior's draws meet
    them: in few coordinates they do, in many a narrow mode escapes them.

    Costs a density and a log q a draw. No gradient.

    Args:
        problem: The rows; its noise is for these draws alone.
        u: Draws of the proposal, rounded to what the model is evaluated at.
        log_proposal: Its log density, in nats.
        num_prior: Draws of the prior.
    """
    prior = problem.density.draw_prior(num_prior, seed=problem.noise.seed % 2**31)
    both = torch.cat([u.to(prior.dtype), prior])
    density = evaluate(problem.density, both)
    log_q = torch.cat([log_proposal(piece) for piece in _pieces(both)]).double()
    share = num_prior / len(both)
    mixture = torch.logaddexp(log_q + math.log1p(-share), density.log_prior + math.log(share))
    log_weights = density.log_joint - mixture
    return MixtureWeights(log_weights.where(~log_weights.isnan(), -math.inf), density.log_prior, log_q)


def few_rows(problem: Problem, draws_per_row: int) -> Iterator[tuple[Tensor, Problem]]:
    """Cut a problem so that all draws of a part's rows fit into memory: yield the places of rows, and the problem of these."""
    size = problem.density.chunk_rows or max(1, CHUNK_DRAWS // draws_per_row)
    for rows in torch.arange(problem.density.num_rows).split(size):
        guide = problem.guide and problem.guide.rows(rows)
        yield rows, Problem(density=problem.density.rows(rows), guide=guide, noise=problem.noise.rows(rows))


def _pieces(u: Float[Tensor, "draws rows latent"]) -> tuple[Tensor, ...]:
    """Cut draws so that a piece of all rows bounds the memory."""
    return u.split(max(1, CHUNK_DRAWS // u.shape[1]))
