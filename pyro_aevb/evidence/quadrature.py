r"""log p(x) of each row by numerical integration over up to three latent coordinates: the reference that other methods are held to.

A grid of cells covers the prior's range, nothing else: a posterior mode that no encoder and no chain has found is in it too. The
cells that can hold most of a row's mass are halved along each axis, again and again, until halving all that matters changes the
row by less than a hundredth of a nat. Cells are midpoint rules: on a uniform grid around smooth mass their error falls faster than
any power of the spacing (Trefethen and Weideman 2014, "The exponentially convergent trapezoidal rule").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import max_pool1d, max_pool2d, max_pool3d
from typing_extensions import override

from pyro_aevb._types import PerRow
from pyro_aevb.errors import SettingError
from pyro_aevb.evidence.problem import Estimator, Problem
from pyro_aevb.evidence.result import Bound, LogMarginal
from pyro_aevb.evidence.rules import rate
from pyro_aevb.mcmc.hmc import value_and_gradient
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.rows import CHUNK_DRAWS
from pyro_aevb.program.settings import check_count

__all__ = ["Integral", "Quadrature", "integrate"]

_GRID = {1: 256, 2: 96, 3: 32}
"""Cells along each axis of the first grid, by the number of coordinates."""

_SPLIT = {1: 64, 2: 512, 3: 1024}
"""Cells of a row that are halved in a round: more than resolved unimodal mass fills."""

_STEEP = 1.0
"""A cell that may hold more than e times its mass is not resolved. Cells of no density are among them."""
_MAX_SLOPE = 1e6
_FADING = math.log(4)  # a cell without density whose parts have none either is worth a look, but less at each level
_RIM = 1 / 8
_MAX_TAIL = 3e-4
"""A rim with more mass than this means that there may be as much beyond: 1e-3 nats under a Cauchy density's tails."""
_MARGIN = 1.5
"""The box is so much wider than the range of prior draws, which then lies within the rims."""
_PRIOR_DRAWS = 4096
_PRIOR_SEED = 0
"""Prior draws only say where to begin: one seed for all, so that the method has no randomness."""
_MAX_GROWTHS = 24
_MIN_EVALUATIONS = 50_000
_DRAWS_PER_ROW = 5000
"""Cells kept in memory count as so many draws: ten rows at once."""
_CACHED_NUMBERS = 3_000_000
"""Numbers of a likelihood's intermediate results at once: more of them leave the caches, at half the speed."""

Target = Callable[[Tensor], Tensor]
"""From ``[cells, rows, D]`` to log densities ``[cells, rows]``."""


class Integral(NamedTuple):
    """Log integrals over a box.

    Attributes:
        value: Of each row, in nats.
        change: How far the last halving of every cell moved it, and the share that may be in cells which never
            were, or are not resolved.
        tails: Share of the mass in the lowest and in the highest eighth of each axis.
    """

    value: PerRow
    change: PerRow
    tails: Float[Tensor, "2 rows latent"]


class _Cells(NamedTuple):
    """Cells of each row.

    Attributes:
        centre: Their midpoints.
        depth: How often each was halved.
        log_mass: Log of density at the midpoint times volume.
        log_parent: Log of the cell's part of its parent's mass; minus infinity on the first grid.
        score: Log of the mass that the cell may hold.
    """

    centre: Float[Tensor, "cells rows latent"]
    depth: Float[Tensor, "cells rows"]
    log_mass: Float[Tensor, "cells rows"]
    log_parent: Float[Tensor, "cells rows"]
    score: Float[Tensor, "cells rows"]

    @property
    def is_empty(self) -> Bool[Tensor, "cells rows"]:
        """Where the midpoint has no density; on the end of a support such a cell may hold as much as its neighbours."""
        return self.log_mass == -math.inf


class _Box(NamedTuple):
    """Where to integrate, and how.

    Attributes:
        low: Lower corner of each row's box, in float64.
        width: Its width.
        dtype: Type that the target takes.
        piece: Densities that are evaluated at once.
    """

    low: Float[Tensor, "rows latent"]
    width: Float[Tensor, "rows latent"]
    dtype: torch.dtype
    piece: int


def integrate(
    target: Target,
    low: Float[Tensor, "rows latent"],
    high: Float[Tensor, "rows latent"],
    *,
    tolerance: float = 0.01,
    max_evaluations: int = 300_000,
    piece: int = CHUNK_DRAWS,
) -> Integral:
    r"""Integrate a density of each row over a box of its own, on a grid that follows the mass.

    A cell's score is the integral over the cell of the exponential of the log density's tangent at the midpoint,
    :math:`f(m) \prod_d h_d\, \sinh(g_d h_d / 2) / (g_d h_d / 2)`: for a log-concave density no cell holds more than that, so that
    mass much narrower than a cell is seen from the slope beside it. The cells with the highest scores are halved first. Each leaf
    remembers its part of its parent's mass, so the change is that of one halving of the whole grid, however many rounds it took;
    cells that were never halved, or whose score is more than e times their mass, count with their score on top.

    What cannot be seen: mass much narrower than a cell of the first grid where other mass drowns its slope.

    Args:
        target: Log densities, in nats; NaN counts as no density.
        low: Lower corner of the box.
        high: Upper corner.
        tolerance: A row is settled when its change is below.
        max_evaluations: Densities (with gradients) evaluated for each row at most; memory grows in proportion.
        piece: Densities evaluated at once, of all rows together.

    Returns:
        Value, change and tails. A row that did not settle has the change of its last round.

    Example:
        >>> corner = torch.full((1, 2), 8.0, dtype=torch.float64)
        >>> log_density = lambda u: -0.5 * u.square().sum(-1) - math.log(2 * math.pi)
        >>> bool(integrate(log_density, -corner, corner).value.abs() < 1e-3)
        True
    """
    dim = low.shape[-1]
    box = _Box(low.double(), (high - low).double(), low.dtype, piece)
    cells = _root(target, box)
    result = _assess(cells, box)
    is_done = _is_done(result, tolerance)
    for _ in range((max_evaluations - _GRID[dim] ** dim) // (_SPLIT[dim] * 2**dim)):
        if is_done.all():
            break
        cells = _refine(target, box, cells)
        fresh = _assess(cells, box)
        # a settled row stays as it is, so that rows beside it do not change its last digits
        result = Integral(
            *(
                torch.where(is_done.unsqueeze(-1) if new.ndim == 3 else is_done, old, new)
                for old, new in zip(result, fresh, strict=True)
            )
        )
        is_done = is_done | _is_done(fresh, tolerance)
    return result


def _root(target: Target, box: _Box) -> _Cells:
    """Cover the box by the first grid."""
    low, width = box.low, box.width
    dim = low.shape[-1]
    axis = (torch.arange(_GRID[dim], dtype=low.dtype, device=low.device) + 0.5) / _GRID[dim]
    places = torch.cartesian_prod(*[axis] * dim).reshape(-1, 1, dim)
    centre = low + width * places
    nothing = torch.full(centre.shape[:-1], -math.inf, dtype=low.dtype, device=low.device)
    cells = _evaluate(target, box, centre, torch.zeros_like(nothing), nothing)
    return cells._replace(score=torch.where(cells.is_empty, _neighbours(cells.log_mass, dim), cells.score))


def _neighbours(values: Float[Tensor, "cells rows"], dim: int) -> Float[Tensor, "cells rows"]:
    """Return the largest value among the cells that touch each cell of the first grid."""
    grid = values.T.unflatten(1, (_GRID[dim],) * dim)[:, None]
    pool = {1: max_pool1d, 2: max_pool2d, 3: max_pool3d}[dim]
    return pool(grid, kernel_size=3, stride=1, padding=1).flatten(1).T


def _refine(target: Target, box: _Box, cells: _Cells) -> _Cells:
    """Halve the cells of the highest scores along each axis."""
    width = box.width
    dim = width.shape[-1]
    chosen = cells.score.T.contiguous().topk(_SPLIT[dim], -1).indices.T
    signs = torch.tensor(list(product((-0.25, 0.25), repeat=dim)), dtype=width.dtype, device=width.device)
    depth = cells.depth.gather(0, chosen)
    centre = cells.centre.gather(0, chosen[..., None].expand(-1, -1, dim))
    centre = (centre + signs[:, None, None] * _size(box, depth)).flatten(0, 1)
    children = _evaluate(target, box, centre, (depth + 1).repeat(2**dim, 1), cells.log_mass.gather(0, chosen))
    heaviest = children.log_mass.unflatten(0, (2**dim, -1)).amax(0)
    inherited = cells.score.gather(0, chosen) - dim * math.log(2) - _FADING
    hope = torch.where(heaviest > -math.inf, heaviest, inherited).repeat(2**dim, 1)
    children = children._replace(score=torch.where(children.is_empty, hope, children.score))
    left = [entry.scatter(0, chosen, -math.inf) for entry in cells[2:]]
    return _Cells(*(torch.cat(parts) for parts in zip(children, (*cells[:2], *left), strict=True)))


def _evaluate(
    target: Target,
    box: _Box,
    centre: Float[Tensor, "cells rows latent"],
    depth: Float[Tensor, "cells rows"],
    log_parent: Float[Tensor, "parents rows"],
) -> _Cells:
    """Evaluate density and slope at the midpoints, in pieces that bound the memory."""
    size = _size(box, depth)
    pieces = centre.to(box.dtype).split(max(1, box.piece // centre.shape[1]))
    values, gradients = zip(*(value_and_gradient(target, piece) for piece in pieces), strict=True)
    log_mass = torch.cat(values).double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf) + size.log().sum(
        -1
    )
    slope = (torch.cat(gradients).double() * size / 2).abs().nan_to_num(nan=0.0).clamp(max=_MAX_SLOPE)
    excess = log_mass + _log_expm1(_log_sinhc(slope).sum(-1))
    num_siblings = len(centre) // len(log_parent)
    family = log_mass.unflatten(0, (num_siblings, -1)).logsumexp(0)
    doubt = torch.maximum(family, log_parent) + _log_expm1(-(family - log_parent).abs().nan_to_num(nan=math.inf))
    per = math.log(num_siblings)
    return _Cells(
        centre,
        depth,
        log_mass,
        (log_parent - per).repeat(num_siblings, 1),
        torch.logaddexp(excess, (doubt - per).repeat(num_siblings, 1)),
    )


def _log_expm1(x: Tensor) -> Tensor:
    """Return log |exp(x) - 1|."""
    return torch.where(x > 1, x + torch.log1p(-torch.exp(-x)), torch.expm1(x).abs().log())


def _log_sinhc(x: Tensor) -> Tensor:
    """Return log(sinh(x) / x) of numbers that are not negative."""
    safe = x.clamp(min=1e-2)
    return torch.where(x < 1e-2, x.square() / 6, safe + (-torch.expm1(-2 * safe) / (2 * safe)).log())


def _size(box: _Box, depth: Float[Tensor, "cells rows"]) -> Float[Tensor, "cells rows latent"]:
    """Return the widths of cells."""
    width = box.width
    return width / _GRID[width.shape[-1]] * torch.exp2(-depth)[..., None]


def _assess(cells: _Cells, box: _Box) -> Integral:
    """Add the cells up."""
    low, width = box.low, box.width
    value = cells.log_mass.logsumexp(0)
    is_undivided = cells.depth == 0
    before = torch.where(is_undivided, cells.log_mass, cells.log_parent).logsumexp(0)
    is_unresolved = is_undivided | (cells.score > cells.log_mass + _STEEP)
    doubtful = torch.where(is_unresolved, cells.score, -math.inf).logsumexp(0)
    change = (value - before).abs() + (doubtful - value).exp()
    share = (cells.log_mass - value).exp()[..., None]
    place = (cells.centre - low) / width
    tails = torch.stack([(share * (place < _RIM)).sum(0), (share * (place > 1 - _RIM)).sum(0)])
    return Integral(value, change, tails)


def _is_done(result: Integral, tolerance: float) -> Bool[Tensor, " rows"]:
    """Say which rows are settled, or hold nothing that could be refined."""
    return (result.change < tolerance) | (result.value == -math.inf)


@dataclass(frozen=True, kw_only=True)
class Quadrature(Estimator):
    r"""Numerical integration over unconstrained space, for rows of up to three latent coordinates.

    The first grid covers the range of the row's prior draws and half as much again, and knows nothing of the guide. Where a rim of
    the box holds mass, the box is doubled on that side and the row integrated anew, so that heavy tails and posteriors far from
    the prior end up inside. Then :func:`integrate` refines the grid until a row moves by less than 0.01 nats. The last move is
    ``change``; with the mass in the rims, beyond which there may be as much, it is the standard error too. The true error is mostly
    far less. A row that did not settle within ``max_evaluations``, or whose box still leaks after 24 doublings, is unreliable.

    An estimate, biased to neither side, without randomness. Cost: at most ``max_evaluations`` gradients of a row for each box,
    in practice about 500, 15,000 and 50,000 for one, two and three coordinates.

    Args:
        max_evaluations: Densities evaluated for a row at most; memory grows in proportion.

    Raises:
        SettingError: If ``max_evaluations`` is below 50,000, which three coordinates need to begin with.
    """

    method: ClassVar[str] = "quadrature"

    max_evaluations: int = 300_000

    def __post_init__(self) -> None:
        check_count("max_evaluations", self.max_evaluations)
        if self.max_evaluations < _MIN_EVALUATIONS:
            raise SettingError(f"max_evaluations must be at least {_MIN_EVALUATIONS}; got {self.max_evaluations}.")

    @property
    @override
    def draws_per_row(self) -> int:
        return _DRAWS_PER_ROW

    @override
    def estimate(self, problem: Problem) -> LogMarginal:
        density = problem.density
        if density.dim not in _GRID:
            raise SettingError(
                f"Quadrature takes rows of up to {max(_GRID)} unconstrained latent coordinates; these have {density.dim}. "
                "Use method='bridge' or 'ais'."
            )

        result = self._grow(density)
        problem.advance(1.0)
        nothing = torch.full_like(result.value, math.nan)
        return LogMarginal(
            value=result.value,
            standard_error=result.change + result.tails.sum((0, -1)),
            lower=nothing,
            upper=nothing,
            k_hat=nothing,
            ess=nothing,
            status=rate(result.change, change=result.change, is_refuted=_leaks(result).any(0).any(-1)),
            method=self.method,
            num_samples=self.max_evaluations,
            bound=Bound.ESTIMATE,
            change=result.change,
        )

    def _grow(self, density: LogDensity) -> Integral:
        """Integrate over boxes that are doubled where mass leaks, each row until its own holds it."""
        low, high = _prior_range(density)
        result = self._integrate(density, low, high)
        for _ in range(_MAX_GROWTHS - 1):
            leaks = _leaks(result)
            rows = leaks.any(0).any(-1).nonzero().squeeze(-1)
            if not len(rows):
                break
            width = high - low
            low, high = low - width * leaks[0], high + width * leaks[1]
            grown = self._integrate(density.rows(rows), low[rows], high[rows])
            result = Integral(
                result.value.index_copy(0, rows, grown.value),
                result.change.index_copy(0, rows, grown.change),
                result.tails.index_copy(1, rows, grown.tails),
            )
        return result

    def _integrate(self, density: LogDensity, low: Tensor, high: Tensor) -> Integral:
        """Integrate the joint density of rows over boxes of theirs."""

        def log_joint(u: Tensor) -> Tensor:
            return density.log_joint(u.to(density.dtype))  # networks take their own dtype; cells stay in float64

        numbers = 1 if density.structure is None else density.structure.num_observed
        piece = min(CHUNK_DRAWS, max(1, _CACHED_NUMBERS // max(1, numbers)))
        return integrate(log_joint, low, high, max_evaluations=self.max_evaluations, piece=piece)


def _leaks(result: Integral) -> Bool[Tensor, "2 rows latent"]:
    """Say in which rims there is so much mass that there may be as much beyond."""
    return result.tails > _MAX_TAIL


def _prior_range(density: LogDensity) -> tuple[Float[Tensor, "rows latent"], Float[Tensor, "rows latent"]]:
    """Return a box of each row that holds its prior draws, with a margin."""
    draws = density.draw_prior(_PRIOR_DRAWS, seed=_PRIOR_SEED).double()
    # draws that were rounded to the end of a support are infinite
    low = draws.where(draws.isfinite(), math.inf).amin(0)
    high = draws.where(draws.isfinite(), -math.inf).amax(0)
    margin = (_MARGIN - 1) / 2 * (high - low)
    return low - margin, high + margin
