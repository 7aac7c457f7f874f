"""Rows of a batch under a model, as a source of densities: which rows run together, and with which values of the globals."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import ModelError, SettingError
from pyro_aevb.program.batch import batch_rows, take_rows
from pyro_aevb.program.blocks import BLOCK_DRAWS, draw_in_blocks
from pyro_aevb.program.compiled_rows import CompiledRows, Rows
from pyro_aevb.program.compiling import Compile
from pyro_aevb.program.coordinates import in_plates, inner_sizes
from pyro_aevb.program.parameters import evaluating
from pyro_aevb.program.row_checks import check_globals, check_independent_rows, check_observed
from pyro_aevb.program.row_model import Placed, RowModel
from pyro_aevb.program.rows import ReadRows, check_finite, read_rows
from pyro_aevb.program.structure import Site, Structure

__all__ = ["Given", "ModelRows", "Part", "given_globals"]

T = TypeVar("T")

_FEW = 4
"""Rows on which their independence is tried."""
_BLOCK_ROWS = 64
"""Rows that draw together at most: a batch of fewer pays for so many."""
_CHECKED_ROWS = 1000
"""Rows whose data are checked at once."""


class Given(NamedTuple):
    """Values of a model's globals.

    Attributes:
        leading: Axes of the values left of plates and events.
        values: In plates, ``[S, 1, *plates, *event]``, S the product of these axes.
    """

    leading: torch.Size
    values: Values


class Part(NamedTuple):
    """Rows that run together.

    Attributes:
        args: Their data, as positional arguments.
        kwargs: Their data, as keyword arguments.
        own: For each row of the run the place among the rows asked for of the one that it stands for; ``None`` if it runs them all.
        taken: Rows of the run that count.
    """

    args: Args
    kwargs: Kwargs
    own: Tensor | None
    taken: Tensor | None


class ModelRows:
    """Rows of a batch under a model, a :class:`~pyro_aevb.program.density.Source`.

    Args:
        read: The model, read on a few rows.
        batch: The whole batch.
        rows: Places of the rows in it.
        given: Values of the globals.
    """

    def __init__(self, read: ReadRows[RowModel], batch: tuple[Args, Kwargs], rows: Tensor, given: Given) -> None:
        self.read, self.batch, self.rows, self.given = read, batch, rows, given
        self.model = read.program
        self.dim, self.dtype, self.device = self.model.layout.dim, self.model.dtype, self.model.device
        self.total = 1 if self.structure.data_plate is None else batch_rows(*batch) or self.structure.rows
        self.chunk_rows = self.total if read.needs_all else read.drawn
        self._parts: list[Part] | None = None

    @classmethod
    def of(
        cls,
        model: PyroProgram,
        batch: tuple[Args, Kwargs],
        data_plate: str | None,
        given: Values,
        *,
        compile: Compile = False,  # noqa: A002  torch's own word
    ) -> "ModelRows":
        """Read a model on a batch, and check both."""

        def read(args: Args, kwargs: Kwargs, data_plate: str | None) -> RowModel:
            return RowModel(model, args, kwargs, data_plate, compile=compile)

        with evaluating(model), torch.no_grad(), pyro.validation_enabled(False):
            found = _with_any_rows(read_rows(model, *batch, data_plate, read), batch)
            structure = found.program.structure
            globals_ = given_globals(structure, given)
            check_finite(model, None, structure, *batch, rows_per_run=_CHECKED_ROWS)
            rows = cls(found, batch, torch.arange(1), globals_)
            rows = cls(found, batch, torch.arange(rows.total), globals_)
            rows._check()
        return rows

    def _check(self) -> None:
        """Check that rows are independent and data in their supports, of the data of all rows."""
        takes_any = self.chunk_rows is None
        if self.structure.data_plate is not None:
            few = self.select(slice(0, self.chunk_rows or _FEW)).parts[0]
            check_independent_rows(self.model, few.args, few.kwargs, self.given.values, takes_any=takes_any)
        size = self.chunk_rows or _CHECKED_ROWS
        for start in range(0, self.total, size):
            part = self.select(slice(start, start + size)).parts[0]
            check_observed(self.model, part.args, part.kwargs, self.given.values, first_row=start)

    @property
    def structure(self) -> Structure:
        """The model's structure."""
        return self.model.structure

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def select(self, index: slice | Tensor) -> "ModelRows":
        """Return some of these rows."""
        return ModelRows(self.read, self.batch, self.rows[index], self.given)

    def with_given(self, given: Values) -> "ModelRows":
        """Return the same rows under other values of the globals."""
        other = ModelRows(self.read, self.batch, self.rows, given_globals(self.structure, given))
        other._parts = self._parts
        return other

    @property
    def parts(self) -> list[Part]:
        """The runs that these rows take."""
        if self._parts is None:
            self._parts = self._split()
        return self._parts

    def _split(self) -> list[Part]:
        rows, size = self.rows, self.chunk_rows
        if self.read.needs_all:
            if len(rows.unique()) < len(rows):
                raise SettingError(
                    "The model runs with all rows of its batch at once, so that no row can be asked for twice."
                )
            places = torch.zeros(self.total, dtype=torch.long).index_copy(0, rows, torch.arange(len(rows)))
            return [Part(*self.batch, places, rows)]
        if size is None:
            return [Part(*self.data_of(rows), None, None)]
        parts = []
        for start in range(0, len(rows), size):
            places = torch.arange(start, start + size).clamp(max=len(rows) - 1)
            taken = torch.arange(min(size, len(rows) - start))
            parts.append(Part(*self.data_of(rows[places]), places, taken))
        return parts

    def data_of(self, rows: Tensor) -> tuple[Args, Kwargs]:
        """Take rows of the whole batch, without a copy where they follow one another."""
        if self.structure.data_plate is None or not len(rows):
            return self.batch
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows) and torch.equal(rows, torch.arange(first, last + 1)):
            is_whole = len(rows) == self.total
            return self.batch if is_whole else take_rows(*self.batch, slice(first, last + 1))
        return take_rows(*self.batch, rows)

    def split_leading(self, leading: torch.Size) -> tuple[int, int]:
        """Return S and K of leading axes, those of the globals first."""
        count = len(self.given.leading) if self.structure.data_plate is not None else len(leading)
        return math.prod(leading[:count]), math.prod(leading[count:])

    def place(self, u: Tensor) -> Placed:
        """Run the model at u ``[*G, ..., rows, D]``."""
        leading = self._leading(u)
        flat = u.reshape(*self.split_leading(leading), *u.shape[-2:])
        return self._each(
            lambda part: self.model.place(_pick(flat, part.own), part.args, part.kwargs, self.given.values)
        )

    def _each(self, run: Callable[[Part], T]) -> T:
        """Run part by part and join the rows."""
        found = [
            run(part) if part.taken is None else tree_map(lambda item, part=part: _pick(item, part.taken), run(part))
            for part in self.parts
        ]
        return found[0] if len(found) == 1 else tree_map(lambda *items: torch.cat(items, 2), *found)

    def _leading(self, u: Tensor) -> torch.Size:
        """Return axes left of rows."""
        given = self.given.leading
        if u.dim() < 2 or tuple(u.shape[-2:]) != (self.num_rows, self.dim) or u.shape[: len(given)] != given:
            expected = ", ".join([*map(str, given), "...", f"rows = {self.num_rows}", f"D = {self.dim}"])
            raise SettingError(f"u must have shape [{expected}], got {list(u.shape)}.")
        return u.shape[:-2]

    def evaluate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return log prior and log likelihood."""
        prior, likelihood = self.evaluate_by(self.model.evaluate, u)
        return prior, likelihood

    def evaluate_by(self, run: CompiledRows, u: Tensor) -> tuple[Tensor, ...]:
        """Return densities of all rows by runs on their parts."""
        leading = self._leading(u)
        flat = u.reshape(*self.split_leading(leading), *u.shape[-2:])
        found = self._each(lambda part: run(_pick(flat, part.own), Rows(part.args, part.kwargs, self.given.values)))
        return tuple(item.reshape(*leading, -1) for item in found)

    def constrain(self, u: Tensor) -> Values:
        """Carry u to the supports."""
        leading = self._leading(u)
        return {name: self.as_result(value, name, leading) for name, value in self.place(u).values.items()}

    def as_result(self, value: Tensor, name: str, leading: torch.Size) -> Tensor:
        """Give a value, rows first, its leading axes, and drop inner plates of size 1."""
        slot = self.model.layout.slots[name]
        event = value.shape[3 + len(slot.inner) :]
        return value.reshape(*leading, value.shape[2], *(size for size in slot.inner if size > 1), *event)

    def unconstrain(self, values: Values) -> Tensor:
        """Read u off values of all latents."""
        leading = self._leading_of_values(values)
        counts = self.split_leading(leading)
        slots = self.model.layout.slots
        flat = {
            name: values[name].reshape(*counts, self.num_rows, *slot.inner, *slot.site.event_shape)
            for name, slot in slots.items()
        }

        def read(part: Part) -> Placed:
            picked = {
                name: in_plates(_pick(value, part.own), slots[name].site, self.structure)
                for name, value in flat.items()
            }
            return self.model.read(picked, part.args, part.kwargs, self.given.values)

        return self._each(read).u.reshape(*leading, self.num_rows, self.dim)

    def _leading_of_values(self, values: Values) -> torch.Size:
        """Check the sites and shapes of values and return the axes left of rows."""
        slots = self.model.layout.slots
        if values.keys() != slots.keys():
            raise SettingError(f"Expected a value of each of the sites {list(slots)}, got {list(values)}.")
        leading: torch.Size | None = None
        for name, slot in slots.items():
            own = (self.num_rows, *(size for size in slot.inner if size > 1), *slot.site.event_shape)
            found = _split_shape(values[name], own)
            if found is None or (leading is not None and found != leading):
                raise SettingError(
                    f"The value of site {name!r} must have shape [{'...' if leading is None else list(leading)}, {list(own)}], "
                    f"got {list(values[name].shape)}."
                )
            leading = found
        return torch.Size() if leading is None else leading

    def draw_prior(self, num_draws: int, seed: int | None) -> Tensor:
        """Draw ``[*G, num_draws, rows, D]`` from the prior."""
        leading = torch.Size((*self.given.leading, num_draws))
        counts = self.split_leading(leading)
        size = self.block_rows(math.prod(counts))

        def draw(block: int) -> Tensor:
            args, kwargs = self.data_of(self.rows_of_block(block, size))
            return self.model.draw(counts[1], args, kwargs, self.given.values, counts[0]).u

        with torch.no_grad():
            return draw_in_blocks(self.rows, size, seed, draw).reshape(*leading, self.num_rows, self.dim)

    def block_rows(self, num_draws: int) -> int:
        """Return how many rows draw together."""
        return self.chunk_rows or max(1, min(_BLOCK_ROWS, BLOCK_DRAWS // num_draws))

    def rows_of_block(self, block: int, size: int) -> Tensor:
        """Return places of a block's rows in the whole batch, the last row repeated: fewer rows must not change the draws."""
        return torch.arange(block * size, (block + 1) * size).clamp(max=self.total - 1)


def _with_any_rows(read: ReadRows[RowModel], batch: tuple[Args, Kwargs]) -> ReadRows[RowModel]:
    """Tell a model whose rows follow its arguments from one that has rows of its own.

    Raises:
        ModelError: If the plate's rows are neither those of the batch nor all that there are.
    """
    structure, offered = read.program.structure, batch_rows(*batch)
    if structure.data_plate is None or read.needs_all or read.drawn is not None:
        return read
    if offered is None or structure.rows == offered > 2:
        return replace(read, needs_all=True)
    if structure.rows != min(2, offered):
        raise ModelError(
            f"The data plate {structure.data_plate!r} has {structure.rows} indices in a run on {min(2, offered)} rows of the "
            f"batch. Size it by the data, pyro.plate({structure.data_plate!r}, len(x)), rows on axis 0 of every tensor."
        )
    return read


def _pick(item: Tensor, places: Tensor | None) -> Tensor:
    return item if places is None else item.index_select(2, places.to(item.device))


def _split_shape(value: Tensor, own: tuple[int, ...]) -> torch.Size | None:
    """Return the axes left of a site's own, ``None`` if these do not fit."""
    count = value.dim() - len(own)
    return value.shape[:count] if count >= 0 and tuple(value.shape[count:]) == own else None


def given_globals(structure: Structure, given: Values) -> Given:
    """Check values of globals and bring them to plates.

    Raises:
        ModelError: If a global is missing.
        SettingError: If a value is not the model's, or has a wrong shape.
    """
    check_globals(structure, given)
    sites = {name: structure.sites[name] for name in given}
    leading = {name: _leading_of_global(value, sites[name], structure) for name, value in given.items()}
    try:
        joined = torch.broadcast_shapes(*leading.values())
    except RuntimeError as error:
        raise SettingError(f"Values of globals must have the same leading axes, got {leading}.") from error
    values = {}
    for name, value in given.items():
        own = value.shape[len(leading[name]) :]
        plates = inner_sizes(sites[name], structure)
        flat = value.expand((*joined, *own)).reshape(-1, 1, *plates, *sites[name].event_shape)
        values[name] = in_plates(flat, sites[name], structure)
    return Given(torch.Size(joined), values)


def _leading_of_global(value: Tensor, site: Site, structure: Structure) -> torch.Size:
    own = (*(size for size in inner_sizes(site, structure) if size > 1), *site.event_shape)
    leading = _split_shape(value, own)
    if leading is None:
        raise SettingError(f"given[{site.name!r}] must have shape [..., {list(own)}], got {list(value.shape)}.")
    return leading
