"""Bounds of rows under one guide and another, and a normal of each row's own in unconstrained coordinates."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import PerRow
from pyro_aevb.mcmc.noise import RowNoise, Stream
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.program.rows import CHUNK_DRAWS

__all__ = ["Proposal", "RowBounds", "RowNormals", "Search", "draw_bounds", "fit_normals"]

_BLOCK = 512
"""Draws of a row that are weighed at once."""

_NUM_MOMENT_DRAWS = 200
"""Draws of the guide that tell where a row's normal starts."""

_NUM_JUDGING_DRAWS = 2000
"""Fresh draws by which a row's normal is taken or left; the bounds that are reported come from others."""


@dataclass(frozen=True)
class Search:
    """How rows' own parameters are looked for.

    Attributes:
        num_steps: Gradient steps.
        learning_rate: Adam's at the start; it falls to 0 in a line.
        num_particles: Draws of each row in a step.
        chunk_size: Rows at once; ``None`` for so many that some 50,000 draws are in memory.
        progress: Whether to show progress bars.
    """

    num_steps: int
    learning_rate: float
    num_particles: int
    chunk_size: int | None
    progress: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)


@runtime_checkable
class Proposal(Protocol):
    """What draws a row's unconstrained coordinates and knows their density."""

    def rows(self, index: slice | Tensor) -> "Proposal":
        """Select rows."""

    def draw(self, num_draws: int, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw u ``[draws, rows, latent]`` with log q ``[draws, rows]``."""


class RowBounds(NamedTuple):
    """Bounds of each row, in nats.

    Attributes:
        bound: Of the guide.
        bound_error: Its standard error.
        best_bound: Of what may be better.
        best_error: Its standard error.
        amortization_error: Standard error of the difference.
    """

    bound: PerRow
    bound_error: PerRow
    best_bound: PerRow
    best_error: PerRow
    amortization_error: PerRow


def draw_bounds(density: LogDensity, guide: Proposal, best: Proposal, num_draws: int, search: Search) -> RowBounds:
    r"""Estimate :math:`E_q[\log p(x_n, u) - \log q(u)]` of each row under two q, drawn under the same seeds.

    Args:
        density: The rows.
        guide: The first q.
        best: The second.
        num_draws: Draws of each.
        search: Rows at once, and whether to show a bar.
    """
    seeds = torch.randint(2**62, (-(-num_draws // _BLOCK),)).tolist()
    parts = []
    with _row_bar(density.num_rows, "bounds", progress=search.progress) as bar:
        for index, count in _chunks(density, search.chunk_size, _BLOCK):
            rows, pair = density.rows(index), (guide.rows(index), best.rows(index))
            drawn = [
                [_log_weights(rows, q, min(_BLOCK, num_draws - _BLOCK * block), seed) for q in pair]
                for block, seed in enumerate(seeds)
            ]
            first, second = (torch.cat(blocks)[:, :count] for blocks in zip(*drawn, strict=True))
            parts.append(_compare(first, second))
            bar.update(count)
    return RowBounds(*(torch.cat(entries) for entries in zip(*parts, strict=True)))


def _compare(first: Tensor, second: Tensor) -> RowBounds:
    """Average log-weights ``[draws, rows]``; the difference is paired."""
    root = len(first) ** 0.5
    difference = second - first
    return RowBounds(first.mean(0), first.std(0) / root, second.mean(0), second.std(0) / root, difference.std(0) / root)


def _log_weights(density: LogDensity, q: Proposal, num_draws: int, seed: int) -> Float[Tensor, "draws rows"]:
    """Draw log p - log q."""
    u, log_q = q.draw(num_draws, seed=seed)
    return density.log_joint(u).double() - log_q.double()


def _chunks(density: LogDensity, chunk_size: int | None, draws_per_row: int) -> Iterator[tuple[Tensor, int]]:
    """Yield places of rows and how many count; a model that draws its own rows gets as many each time, the last one repeated."""
    size = density.chunk_rows or chunk_size or max(1, CHUNK_DRAWS // draws_per_row)
    for start in range(0, density.num_rows, size):
        count = min(size, density.num_rows - start)
        length = count if density.chunk_rows is None else size
        yield torch.arange(start, start + length).clamp(max=start + count - 1), count


def _row_bar(num_rows: int, what: str, *, progress: bool) -> "tqdm[None]":
    """Show a bar over rows."""
    return tqdm(total=num_rows, desc=what, disable=not progress, unit="row", dynamic_ncols=True)


class RowNormals:
    r"""Normals with independent unconstrained coordinates, :math:`q(u_n) = N(m_n, \mathrm{diag}(s_n^2))`, or the guide.

    Args:
        guide: What rows draw from that have no normal of their own.
        loc: m, ``[rows, latent]``.
        scale: s.
        is_kept: Which rows draw from their normal.
        places: The rows' places in the whole batch, from which their noise follows.
    """

    def __init__(
        self,
        guide: GuideDensity,
        loc: Float[Tensor, "rows latent"],
        scale: Float[Tensor, "rows latent"],
        is_kept: Bool[Tensor, " rows"],
        places: Int[Tensor, " rows"],
    ) -> None:
        self.guide, self.loc, self.scale, self.is_kept, self.places = guide, loc, scale, is_kept, places

    def rows(self, index: slice | Tensor) -> "RowNormals":
        """Select rows."""
        entries = (item[index] for item in (self.loc, self.scale, self.is_kept, self.places))
        return RowNormals(self.guide.rows(index), *entries)

    def draw(self, num_draws: int, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw u with log q; a row's draws under a seed are the same in whatever selection of rows it is."""
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        noise = RowNoise(seed, self.places, dtype=self.loc.dtype, device=self.loc.device)
        epsilon = noise.normal(Stream.PROPOSAL, 0, num_draws, self.loc.shape[-1])
        own_u, own_q = _transform(epsilon, self.loc, self.scale)
        u, log_q = self.guide.draw(num_draws, seed=seed)
        return torch.where(self.is_kept[:, None], own_u, u), torch.where(self.is_kept, own_q.double(), log_q.double())


def _transform(epsilon: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return m + s epsilon and its log density under N(m, s)."""
    log_q = -(epsilon.square() / 2 + scale.log() + math.log(2 * math.pi) / 2).sum(-1)
    return loc + scale * epsilon, log_q


def fit_normals(density: LogDensity, guide: GuideDensity, search: Search) -> RowNormals:
    """Look for each row's best normal with independent unconstrained coordinates.

    Rows keep it if a fresh bound is higher than the guide's.

    Args:
        density: The rows.
        guide: Their guide: where the search starts, and what is to be beaten.
        search: How to look.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    key = int(torch.randint(2**62, ()))
    places = torch.arange(density.num_rows)
    with _row_bar(density.num_rows, "best normals", progress=search.progress) as bar:
        for index, count in _chunks(density, search.chunk_size, search.num_particles):
            noise = RowNoise(key, index, dtype=density.dtype, device=density.device)
            start = guide.rows(index).draw(_NUM_MOMENT_DRAWS, seed=key)[0].to(density.dtype)
            fitted = _climb(density.rows(index), noise, start.mean(0), start.std(0), search)
            parts.append((fitted[0][:count], fitted[1][:count]))
            bar.update(count)
    loc, scale = (torch.cat(entries) for entries in zip(*parts, strict=True))
    all_kept = torch.ones(len(loc), dtype=torch.bool, device=loc.device)
    normals = RowNormals(guide, loc, scale, all_kept, places)
    found = draw_bounds(density, guide, normals, _NUM_JUDGING_DRAWS, search)
    gain = found.best_bound - found.bound
    return RowNormals(guide, loc, scale, (gain > 0) & found.best_bound.isfinite(), places)


def _climb(density: LogDensity, noise: RowNoise, loc: Tensor, scale: Tensor, search: Search) -> tuple[Tensor, Tensor]:
    """Climb the bound from a start, in whose standard deviations the parameters are measured.

    log q is taken at parameters held fixed, which leaves out its score, of expectation 0 (Roeder et al. 2017, arXiv 1703.09194).
    """
    scale = scale.clamp(min=torch.finfo(scale.dtype).eps)
    shift, log_ratio = (torch.zeros_like(loc, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([shift, log_ratio], lr=search.learning_rate, betas=(0.8, 0.9))
    for step in range(search.num_steps):
        optimizer.param_groups[0]["lr"] = search.learning_rate * (1 - step / search.num_steps)
        epsilon = noise.normal(Stream.PROPOSAL, step, search.num_particles, loc.shape[-1])
        with torch.enable_grad():
            m, s = loc + scale * shift, scale * log_ratio.exp()
            u = m + s * epsilon
            standardized = (u - m.detach()) / s.detach()
            loss = -(density.log_joint(u) + standardized.square().sum(-1) / 2).mean(0).sum()
            gradients = torch.autograd.grad(loss, [shift, log_ratio])
        for leaf, gradient in zip((shift, log_ratio), gradients, strict=True):
            leaf.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # a density that overflows says nothing
        optimizer.step()
    return (loc + scale * shift).detach(), (scale * log_ratio.exp()).detach()
