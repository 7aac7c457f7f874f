"""How much the guide's latents tell about which row they are of."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb._types import Args, Kwargs, Values
from pyro_aevb.program.batch import batch_rows
from pyro_aevb.program.coordinates import in_plates, rows_first
from pyro_aevb.program.particles import Records, SiteRecord
from pyro_aevb.program.placing import Unmasked
from pyro_aevb.program.rows import Rows
from pyro_aevb.program.structure import Site

__all__ = ["RowDraws", "information_terms", "local_latents"]

BLOCK = 50
"""Draws that are weighed under a chunk of rows at once."""


def local_latents(rows: Rows) -> tuple[Site, ...]:
    """Return the latent sites inside the data plate."""
    return rows.structure.select("latent", is_local=True)


class RowDraws:
    """One draw of each row's latents, with the globals that it was drawn given.

    Row n takes the draw n modulo the number of draws, so that globals are averaged over.

    Args:
        rows: The rows, read.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._local: dict[str, list[Tensor]] = {site.name: [] for site in local_latents(rows)}
        self._global: dict[str, list[Tensor]] = {
            site.name: [] for site in rows.structure.select("latent", is_local=False)
        }
        self._count = 0

    def add(self, records: Records, count: int) -> None:
        """Keep a draw of each of a chunk's first rows."""
        places = torch.arange(count)
        for name, parts in self._local.items():
            site = self.rows.structure.sites[name]
            value = rows_first(records[name].value, site, self.rows.structure, len(site.event_shape)).squeeze(1)
            parts.append(value[(self._count + places) % len(value), places])
        for name, parts in self._global.items():
            value = records[name].value
            parts.append(value[(self._count + places) % len(value)])
        self._count += count

    def in_plates(self, block: slice, num_rows: int) -> Values:
        """Return draws of a block of rows as particles, each the same in all of ``num_rows`` rows."""
        structure = self.rows.structure
        values = {name: torch.cat(parts)[block] for name, parts in self._global.items()}
        for name, parts in self._local.items():
            value = torch.cat(parts)[block][:, None, None]
            value = value.expand(-1, 1, num_rows, *value.shape[3:])
            values[name] = in_plates(value, structure.sites[name], structure)
        return values


def information_terms(rows: Rows, draws: RowDraws) -> Float[Tensor, " rows"]:
    r"""Return :math:`\log q(z_n | x_n) - \log \frac1N \sum_m q(z_n | x_m)` of each row, in nats; their mean is I(n; z).

    Costs :math:`N^2` evaluations of the guide's density. Masks of latents are taken off. NaN where a latent has a scale of its
    own: what is scaled is no density.

    Args:
        rows: The N rows.
        draws: A draw z_n of each from the guide.
    """
    count = int(rows.count or 0)
    if any(_is_scaled(rows.program.guide_sites[site.name]) for site in local_latents(rows)):
        return torch.full((count,), math.nan, dtype=torch.float64)
    columns = []
    for args, kwargs, size in rows.chunks(None, min(BLOCK, count), progress=False):
        blocks = [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]
        columns.append(torch.cat([_weigh(rows, draws, block, args, kwargs)[:, :size] for block in blocks]))
    log_q = torch.cat(columns, 1).double()
    return log_q.diagonal() - torch.logsumexp(log_q, 1) + math.log(count)


def _is_scaled(site: SiteRecord) -> bool:
    return not isinstance(site.scale, float) or site.scale != 1.0


def _weigh(rows: Rows, draws: RowDraws, block: slice, args: Args, kwargs: Kwargs) -> Float[Tensor, "block rows"]:
    """Weigh a block of draws under a chunk's rows."""
    program, names = rows.program, [site.name for site in local_latents(rows)]
    values = draws.in_plates(block, batch_rows(args, kwargs) or 1)
    size = len(values[names[0]])
    axes = program.axes(size, 1)
    if axes.is_single:
        ranks = rows.structure.ranks
        values = {name: value.reshape(value.shape[value.dim() - ranks[name] :]) for name, value in values.items()}
    program.forget_indices()  # other rows have run before
    with Unmasked(names, (), values[names[0]].device):
        records = program.sample_guide(args, kwargs, axes, values=values)
    return sum((records[name].log_prob[:, 0] for name in names[1:]), records[names[0]].log_prob[:, 0])
