"""A guide as a density of the model's unconstrained coordinates: where importance samples, chains and annealing paths start."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import GuideError, SettingError
from pyro_aevb.program.agreement import check_separable, is_delta
from pyro_aevb.program.blocks import BLOCK_DRAWS, draw_in_blocks
from pyro_aevb.program.compiled_rows import CompiledRows
from pyro_aevb.program.coordinates import in_plates, rows_first
from pyro_aevb.program.density import Density, LogDensity
from pyro_aevb.program.direct import directly
from pyro_aevb.program.importance import ImportanceProgram
from pyro_aevb.program.model_rows import ModelRows
from pyro_aevb.program.parameters import evaluating
from pyro_aevb.program.particles import Records
from pyro_aevb.program.placing import Unmasked
from pyro_aevb.program.row_model import Placed, evaluating_only
from pyro_aevb.program.rows import read_rows
from pyro_aevb.program.settings import check_count

__all__ = ["GuideDensity"]


class GuideDensity:
    r"""log q(z_n | x_n, g) of each row in the coordinates u of a :class:`~pyro_aevb.program.density.LogDensity`, in nats.

    .. math:: \log q(u_n | x_n, g) = \log q(z_n | x_n, g) + \log |\partial z_n / \partial u_n|, \quad z_n = T(u_n)

    Masks are taken off, as in the model's density: where a latent is masked, q is a proper density of it all the same.

    Args:
        guide: The guide: same arguments as the model, one site for each latent.
        density: The density of the model, rows and values of the globals.

    Raises:
        GuideError: If the guide does not fit the model, or has no density at a given u: it draws local auxiliary sites, or points.
        ModelError: If a site of the guide is scaled.
        SettingError: If the density is one of plain functions.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.LogNormal(x, 0.5))
        >>> density = LogDensity(model, torch.zeros(3))
        >>> GuideDensity(guide, density).log_density(torch.zeros(5, 3, 1)).shape
        torch.Size([5, 3])
    """

    def __init__(self, guide: PyroProgram, density: LogDensity) -> None:
        rows = density.source
        if not isinstance(rows, ModelRows):
            raise SettingError("A guide needs the density of a Pyro model; this one is of plain functions.")
        model, guide = rows.model.model, directly(guide)

        def read(args: Args, kwargs: Kwargs, data_plate: str | None) -> ImportanceProgram:
            return ImportanceProgram(model, guide, args, kwargs, data_plate=data_plate)

        with evaluating(model, guide), torch.no_grad(), pyro.validation_enabled(False):
            found = read_rows(model, *rows.batch, rows.structure.data_plate, read)
        self._program = found.program
        _check_sites(self._program)
        # the guide may need more rows at once than the model
        joined = replace(
            rows.read, drawn=found.drawn or rows.read.drawn, needs_all=found.needs_all or rows.read.needs_all
        )
        self._rows = ModelRows(joined, rows.batch, rows.rows, rows.given)
        self._evaluate = CompiledRows(self._weigh, self._program.modules, rows.model.evaluate.compile)

    def _of(self, rows: ModelRows) -> "GuideDensity":
        """Return the same guide on other rows."""
        guide = copy.copy(self)
        guide._rows = rows
        return guide

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self._rows.num_rows

    @property
    def chunk_rows(self) -> int | None:
        """A fixed number of rows that each run of model and guide needs, else ``None``."""
        return self._rows.chunk_rows

    def rows(self, index: slice | Tensor) -> "GuideDensity":
        """Select rows; what was read of the guide is shared."""
        return self._of(self._rows.select(index))

    def given(self, values: Mapping[str, Tensor]) -> "GuideDensity":
        """Put other values of the globals, as :meth:`LogDensity.given` does."""
        return self._of(self._rows.with_given(dict(values)))

    def log_density(self, u: Float[Tensor, "*leading rows latent"]) -> Float[Tensor, "*leading rows"]:
        """Return log q of u in nats; differentiable in u. Costs one run of the guide and one of the model."""
        return self.path(u)[0]

    def path(
        self, u: Float[Tensor, "*leading rows latent"]
    ) -> tuple[Float[Tensor, "*leading rows"], Float[Tensor, "*leading rows"]]:
        """Return log q and the model's log joint of u in nats, by one run of each: the two ends of an annealing path."""
        log_q, *density = self._rows.evaluate_by(self._evaluate, u)
        return log_q, Density(*density).log_joint

    def draw(
        self, num_draws: int, *, seed: int | None = None
    ) -> tuple[Float[Tensor, "*globals draws rows latent"], Float[Tensor, "*globals draws rows"]]:
        """Draw u from q, with its log density; a row's draws under a seed are the same in whatever selection of rows it is."""
        check_count("num_draws", num_draws)
        leading = torch.Size((*self._rows.given.leading, num_draws))
        counts = self._rows.split_leading(leading)
        # as many rows as can be: a guide that holds a table of its rows runs with all of them alone
        size = self._rows.chunk_rows or min(self._rows.total, max(1, BLOCK_DRAWS // math.prod(counts)))

        def draw(block: int) -> tuple[Tensor, Tensor]:
            args, kwargs = self._rows.data_of(self._rows.rows_of_block(block, size))
            return self._draw(args, kwargs, counts)

        with torch.no_grad():
            u, log_q = draw_in_blocks(self._rows.rows, size, seed, draw)
        return u.reshape(*leading, *u.shape[2:]), log_q.reshape(*leading, -1)

    def _weigh(self, u: Tensor, args: Args, kwargs: Kwargs, given: Values) -> tuple[Tensor, ...]:
        """Return log q, log prior and log likelihood, by a run of the model that places the values and one of the guide."""
        model, structure = self._rows.model, self._rows.structure
        placed = model.place(u, args, kwargs, given)
        values = {name: in_plates(value, structure.sites[name], structure) for name, value in placed.values.items()}
        records = self._run(args, kwargs, (u.shape[0], u.shape[1]), values | given)
        return self._sum(records, placed), *model.sums(placed)

    def _draw(self, args: Args, kwargs: Kwargs, counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Draw from the guide and read u off by a run of the model."""
        model, given = self._rows.model, self._rows.given.values
        records = self._run(args, kwargs, counts, given)
        values = {}
        for name, slot in model.layout.slots.items():
            first = rows_first(records[name].value, slot.site, self._program.structure, len(slot.site.event_shape))
            values[name] = in_plates(first, slot.site, model.structure)
        placed = model.read(values, args, kwargs, given)
        return placed.u, self._sum(records, placed)

    def _sum(self, records: Records, placed: Placed) -> Tensor:
        """Sum log q and the Jacobian over sites."""
        densities = [records[name].log_prob for name in placed.values]
        return sum([*densities, *placed.jacobians.values()], placed.u.new_zeros(placed.u.shape[:3]))

    def _run(self, args: Args, kwargs: Kwargs, counts: tuple[int, int], values: Values) -> Records:
        """Run the guide with values in the model's plates; sites without one are drawn."""
        program, model = self._program, self._rows.model
        axes = program.axes(*counts)
        deeper = program.structure.max_plate_nesting - model.structure.max_plate_nesting
        own: Values = {}
        for name, value in values.items():
            value = value.reshape(*value.shape[:2], *(1,) * deeper, *value.shape[2:])
            rank = program.structure.ranks[name]
            own[name] = value.reshape(value.shape[value.dim() - rank :]) if axes.is_single else value
        program.forget_indices()  # other rows may have run before
        with evaluating_only(program.modules), Unmasked(model.layout.slots, (), model.device):
            return program.sample_guide(args, kwargs, axes, values=own)


def _check_sites(program: ImportanceProgram) -> None:
    """Refuse guides whose log q is not known at any u.

    Raises:
        GuideError: Naming the auxiliary site or the point.
    """
    for name, site in program.guide_sites.items():
        if site.is_local and site.is_auxiliary:
            raise GuideError(
                f"The guide draws the auxiliary site {name!r} inside the data plate, from which it reads latents off, so that its "
                f"density of a given latent is not known. Use a guide that samples each latent itself (AutoAmortizedNormal, or "
                f"a distribution at each site).",
                site=name,
            )
    check_separable("a row's log density", program.guide_sites, program.guide_sites)
    for name, site in program.guide_sites.items():
        if site.is_local and is_delta(site):
            raise GuideError(
                f"The guide's site {name!r} is a point (Delta), which has no density. Use a guide with a distribution there.",
                site=name,
            )
