"""Rows simulated from a model, whose latents are known: the ground on which guides and estimators are tested."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import ModelError, SettingError
from pyro_aevb.program.batch import batch_rows, describe_batch, take_rows
from pyro_aevb.program.compiling import Compile
from pyro_aevb.program.coordinates import Layout
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.model_rows import given_globals
from pyro_aevb.program.observations import ToBatch, write_observations
from pyro_aevb.program.particles import ParticleAxes, Records, as_draws, run_program
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.program.rows import Rows
from pyro_aevb.program.settings import as_values
from pyro_aevb.program.simulation import simulate_rows
from pyro_aevb.program.structure import Structure, read_structure

__all__ = ["SimulatedRows", "Simulator"]


@dataclass(frozen=True)
class SimulatedRows:
    """Rows that were drawn from a model, with what the model and a guide say of them.

    Attributes:
        density: log p(x_n, z_n | g) of the rows.
        guide: q(z_n | x_n, g) in the same coordinates, or ``None``.
        latents: The unconstrained latents that the rows were made from: exact draws from p(z_n | x_n, g).
        is_counted: Which of them no mask drops.
    """

    density: LogDensity
    guide: GuideDensity | None
    latents: Float[Tensor, "rows latent"]
    is_counted: Bool[Tensor, "rows latent"]


class Simulator:
    """Draws rows from a model and feeds them back as its data. Made and used inside ``program.rows.inferring``.

    Args:
        model: The model.
        guide: The guide, or ``None``.
        batch: A template, as positional and keyword arguments: its covariates are used, its observations ignored, its rows
            recycled.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None``: then each simulation is a data set.
        given: Values of the globals; without them they are drawn once from the guide where there is one.
        to_batch: Puts simulated values into a batch, for observations that are no views of an argument.

    Attributes:
        structure: The model's structure.
        given: Values of the globals that rows are simulated under.

    Raises:
        SettingError: If there are no rows to recycle, or what is given is not one value of each global.
        ModelError: If the model is not supported or draws its own rows.
        GuideError: If the guide does not fit the model.
    """

    def __init__(
        self,
        model: PyroProgram,
        guide: PyroProgram | None,
        batch: tuple[Args, Kwargs],
        *,
        data_plate: str | None = "auto",
        given: Mapping[str, Tensor] | None = None,
        to_batch: ToBatch | None = None,
    ) -> None:
        self._model, self._guide, self._to_batch = model, guide, to_batch
        self._args, self._kwargs = batch
        self._rows = batch_rows(*batch) or 0
        if not self._rows and data_plate is not None:
            raise SettingError(
                f"num_simulations recycles the rows of a template, and there are none: give a batch with one, as tensors; got "
                f"({describe_batch(*batch)})."
            )
        self.structure = read_structure(model, *batch, data_plate=data_plate)
        if self.structure.draws_own_rows:
            plate = self.structure.data_plate
            raise ModelError(
                f"The model draws rows of plate {plate!r} by itself, so that simulated rows can't be put in order. Size the plate "
                f"by the batch, pyro.plate({plate!r}, len(x)), without subsample_size."
            )
        is_open = self.structure.has_globals and self.structure.data_plate is not None
        self.given: Values = as_values(given)
        if self.given and (leading := given_globals(self.structure, self.given).leading):
            raise SettingError(
                f"Rows are simulated under one value of each global; the given ones have leading axes {list(leading)}. Give one "
                f"draw of them after the other."
            )
        if given is None and guide is not None and is_open:
            self.given = _draw_globals(Rows(model, guide, *batch, self.structure.data_plate))

    def draw(
        self,
        num_simulations: int,
        *,
        compile: Compile = False,  # noqa: A002  torch's own word
    ) -> Iterator[SimulatedRows]:
        """Yield simulated rows: all at once, or data set by data set where the whole model is one row.

        Args:
            num_simulations: Rows, or data sets.
            compile: Whether densities are compiled, as of :class:`~pyro_aevb.LogDensity`; data sets never are, for each would be
                compiled for itself.

        Raises:
            ModelError: If a global is neither given nor drawn, or an observation can't be written back.
            GuideError: If the guide does not fit the model.
        """
        for args, kwargs in self._templates(num_simulations):
            yield self._simulate(args, kwargs, compile if self.structure.data_plate is not None else False)

    def _templates(self, num_simulations: int) -> list[tuple[Args, Kwargs]]:
        """Return one template of as many rows as are simulated, or each simulation's own where the whole model is one row."""
        if self.structure.data_plate is None:
            return [(self._args, self._kwargs)] * num_simulations
        return [take_rows(self._args, self._kwargs, torch.arange(num_simulations) % self._rows)]

    def _simulate(self, args: Args, kwargs: Kwargs, compile: Compile) -> SimulatedRows:  # noqa: A002
        """Draw a batch from the model and read the densities of its latents."""
        plate = self.structure.data_plate
        structure = read_structure(self._model, args, kwargs, data_plate=plate)
        values = simulate_rows(self._model, structure, args, kwargs, given=self.given)
        args, kwargs = write_observations(
            self._model, args, kwargs, values, structure=structure, to_batch=self._to_batch
        )
        density = LogDensity(self._model, *args, data_plate=plate, given=self.given, compile=compile, **kwargs)
        density.require_latents()
        guide = None if self._guide is None else GuideDensity(self._guide, density)
        latents = {site.name: values[site.name] for site in structure.select("latent") if site.name not in self.given}
        if plate is None:
            latents = {name: value[None] for name, value in latents.items()}
        records = run_program(self._model, structure, ParticleAxes(), args, kwargs)
        return SimulatedRows(density, guide, density.unconstrain(latents), _is_counted(records, structure))


def _draw_globals(rows: Rows) -> Values:
    """Draw a model's globals once from its guide, given as many of the rows as are run at once."""
    args, kwargs, _ = next(iter(rows.chunks(None, 1, progress=False)))
    records = rows.sample_guide(args, kwargs, rows.program.axes(1, 1))
    sites = rows.structure.select("latent", is_local=False)
    return {site.name: as_draws(records[site.name], rows.structure)[0] for site in sites}


def _is_counted(records: Records, structure: Structure) -> Bool[Tensor, "rows latent"]:
    """Lay the masks of a run's latents out as their unconstrained coordinates."""
    layout = Layout(structure)
    parts: Values = {}
    for name, slot in layout.slots.items():
        value, event_dim = records[name].value, len(slot.site.event_shape)
        mask = torch.as_tensor(records[name].mask, device=value.device).expand(value.shape)
        if slot.event != slot.site.event_shape:
            batch = value.shape[: value.dim() - event_dim]
            mask = mask.reshape(*batch, -1).all(-1).reshape(*batch, *(1,) * len(slot.event)).expand(*batch, *slot.event)
        parts[name] = mask
    rows = 1 if structure.data_plate is None else structure.rows
    return layout.join(parts, torch.ones(1, 1, rows, dtype=torch.bool, device=mask.device))[0, 0]
