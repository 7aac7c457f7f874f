"""Rows that are asked about: NaN found in its row, programs run in eval mode, chunk by chunk."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import AEVBError, DataError, ModelError, NonFiniteError
from pyro_aevb.program.batch import batch_rows, check_dense, explained, take_rows
from pyro_aevb.program.importance import ImportanceProgram, find_non_finite
from pyro_aevb.program.parameters import evaluating, preserved_param_store
from pyro_aevb.program.particles import ParticleAxes, Records
from pyro_aevb.program.processes import Processes, fork_seed
from pyro_aevb.program.settings import check_programs
from pyro_aevb.program.structure import Structure, read_structure
from pyro_aevb.program.supports import check_supports
from pyro_aevb.randomness import preserved_rng, seeded

__all__ = ["ReadRows", "Rows", "check_finite", "inferring", "located", "read_rows"]

CHUNK_DRAWS = 50_000
"""Draws of all local latents of a row that are in memory at once by default: some 300 MB for 784 pixels in float32."""

_CHECKED_AT_ONCE = 1 << 22
"""Numbers among which NaN is looked for at once: 16 MB in float32, so that data on disk need not fit in memory."""


@contextmanager
def inferring(seed: int | None, *programs: PyroProgram) -> Iterator[None]:
    """Run programs in eval mode under a seed, without gradients, and leave the global param store as it is.

    A ``PyroModule`` copies its tensors to the store as it runs, where another module of equal names would take them up.
    """
    check_programs(*programs)
    with ExitStack() as stack:
        stack.enter_context(seeded(seed))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(*programs))
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(preserved_param_store())
        yield


@contextmanager
def located(args: Args, kwargs: Kwargs) -> Iterator[None]:
    """Add to an error where the batch's first NaN or infinity is, if there is one."""
    try:
        yield
    except (DataError, NonFiniteError) as error:
        rows = _non_finite_rows(args, kwargs)
        if not len(rows):
            raise
        where = f"The data's first NaN or infinity is in argument {_argument(args, kwargs, int(rows[0]))}, row {int(rows[0])}."
        raise DataError(f"{error} {where}", site=error.site) from error


def check_finite(
    model: PyroProgram, guide: PyroProgram | None, structure: Structure, args: Args, kwargs: Kwargs, rows_per_run: int
) -> None:
    """Refuse NaN and infinity in data where they reach a density that no mask drops.

    Only the rows that hold some are run. A model that draws its own rows is not asked.

    Raises:
        DataError: Naming the argument, the first such row and the site.
    """
    bad = torch.empty(0) if structure.draws_own_rows else _non_finite_rows(args, kwargs)
    if structure.data_plate is None:
        rows_per_run = max(1, len(bad))

    def find(rows: Tensor) -> str | None:
        part = take_rows(args, kwargs, rows) if structure.data_plate is not None else (args, kwargs)
        found = find_non_finite(model, guide, structure, *part)
        return found.site if found else None

    programs = [model] if guide is None else [model, guide]
    with evaluating(*programs), pyro.validation_enabled(False):
        for rows in bad.split(rows_per_run) if len(bad) else ():
            if find(rows) is None:
                continue
            row, site = next(
                ((int(row), site) for row in rows if (site := find(row[None]))), (int(rows[0]), find(rows))
            )
            raise DataError(
                f"The data hold NaN or infinity in argument {_argument(args, kwargs, row)}, row {row}, which reach the density "
                f"of site {site!r}. Remove such rows, or mask the entries with obs_mask= or poutine.mask.",
                site=site,
            )


def _data_tensors(args: Args, kwargs: Kwargs) -> dict[int | str, Tensor]:
    """Return the tensors with rows, by position or name."""
    named: list[tuple[int | str, object]] = [*enumerate(args), *kwargs.items()]
    return {name: item for name, item in named if isinstance(item, Tensor) and item.dim() > 0}


def _non_finite_rows(args: Args, kwargs: Kwargs) -> Tensor:
    """Return the indices of rows that hold NaN or infinity in any floating tensor."""
    bad = [torch.empty(0, dtype=torch.long)]
    for item in _data_tensors(args, kwargs).values():
        if not item.is_floating_point():
            continue
        width = math.prod(item.shape[1:])
        size = max(1, _CHECKED_AT_ONCE // max(1, width))
        for start in range(0, len(item), size):
            part = item[start : start + size]
            if part.numel() and all(end.isfinite() for end in part.aminmax()):
                continue  # as nearly always, and nothing of the block's size was made
            bad.append((~torch.isfinite(part)).reshape(len(part), width).any(1).nonzero()[:, 0].cpu() + start)
    return torch.cat(bad).unique()


def _argument(args: Args, kwargs: Kwargs, row: int) -> str:
    """Name the first argument whose row holds NaN or infinity."""
    tensors = _data_tensors(args, kwargs)
    return next(repr(name) for name, item in tensors.items() if row < len(item) and not item[row].isfinite().all())


@runtime_checkable
class Readable(Protocol):
    """What is read on a batch: programs, and the model's structure."""

    @property
    def structure(self) -> Structure:
        """The model's structure."""


P = TypeVar("P", bound=Readable)


@dataclass(frozen=True)
class ReadRows(Generic[P]):
    """Programs read on a few rows of a batch, and how many rows they take at once.

    Attributes:
        program: What was read.
        drawn: Rows that the model draws by itself at each run; ``None`` if it takes any number.
        needs_all: Whether it takes all rows of this batch or none.
    """

    program: P
    drawn: int | None = None
    needs_all: bool = False


def read_rows(
    model: PyroProgram,
    args: Args,
    kwargs: Kwargs,
    data_plate: str | None,
    read: Callable[[Args, Kwargs, str | None], P],
) -> ReadRows[P]:
    """Read programs on two rows; if the model draws rows by itself, on as many as it draws; if need be, on all.

    Args:
        model: The model.
        args: The batch, as positional arguments.
        kwargs: The batch, as keyword arguments.
        data_plate: As in :func:`~pyro_aevb.program.structure.read_structure`.
        read: Reads model, and guide if there is one, on a batch under a name of the data plate.

    Raises:
        DataError: If there are no rows, or tensors differ in length.
        ModelError: If the model is not supported.
    """
    lengths = {name: len(item) for name, item in _data_tensors(args, kwargs).items()}
    for name, item in _data_tensors(args, kwargs).items():
        check_dense(item, f"argument {name}")
    if 0 in lengths.values():
        raise DataError(f"The batch has no rows: expected at least one, got lengths {lengths}.")
    if data_plate is not None and len(set(lengths.values())) > 1:
        raise DataError(f"Every tensor has rows on axis 0 and as many of them, got lengths {lengths}.")
    with located(args, kwargs), explained("program", args, kwargs):
        if data_plate is None:
            return ReadRows(read(args, kwargs, None))
        return _read_few(model, args, kwargs, data_plate, read)


def _read_few(
    model: PyroProgram, args: Args, kwargs: Kwargs, data_plate: str, read: Callable[[Args, Kwargs, str | None], P]
) -> ReadRows[P]:
    """Read on two rows; if the model draws rows by itself, on as many as it draws."""

    def first(count: int) -> tuple[Args, Kwargs]:
        return take_rows(args, kwargs, slice(0, count))

    try:
        with explained("program", *first(2)):
            program = read(*first(2), data_plate)
        # two rows do not tell a model that draws two rows from one that takes any number
        structure = read_structure(model, *first(3), data_plate=program.structure.data_plate)
    except ModelError as error:
        try:
            structure = read_structure(model, args, kwargs, data_plate=data_plate)
        except (ModelError, RuntimeError):
            raise error from None
        if not structure.draws_own_rows:
            return _read_whole(args, kwargs, data_plate, read, error)
    if not structure.draws_own_rows:
        return ReadRows(program)
    drawn = structure.rows
    program = read(*first(drawn), structure.data_plate)
    if program.structure.full_size != drawn:
        raise ModelError(
            f"The model draws {drawn} rows of {program.structure.full_size} by itself, so that the rows asked for can't "
            f"be run. Size the plate by the batch: pyro.plate({structure.data_plate!r}, len(x), subsample_size={drawn})."
        )
    return ReadRows(program, drawn=drawn)


def _read_whole(
    args: Args, kwargs: Kwargs, data_plate: str, read: Callable[[Args, Kwargs, str | None], P], error: ModelError
) -> ReadRows[P]:
    """Read what holds parameters of each row, as Pyro's automatic guides do, on all rows or not at all."""
    try:
        return ReadRows(read(args, kwargs, data_plate), needs_all=True)
    except (AEVBError, RuntimeError):
        raise error from None


class Rows:
    """A batch of rows, read and checked, over which a model and its guide run in chunks.

    Args:
        model: The model.
        guide: The guide.
        args: The batch, as positional arguments.
        kwargs: The batch, as keyword arguments.
        data_plate: As in :func:`~pyro_aevb.program.structure.read_structure`.
        processes: Processes that divide the chunks among them; by default this one runs them all.

    Attributes:
        model: The model, as given.
        program: Model and guide, read on the first rows.
        count: Number of rows; ``None`` if the whole model is one row.

    Raises:
        DataError: If there are no rows, tensors differ in length, or NaN reaches a density.
        ModelError: If the model is not supported.
        GuideError: If the guide does not fit the model.
    """

    def __init__(
        self,
        model: PyroProgram,
        guide: PyroProgram,
        args: Args,
        kwargs: Kwargs,
        data_plate: str | None,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.processes = Processes(None) if processes is None else processes
        self._globals: Values = {}

        def read(args: Args, kwargs: Kwargs, data_plate: str | None) -> ImportanceProgram:
            return ImportanceProgram(model, guide, args, kwargs, data_plate=data_plate)

        with evaluating(model, guide):
            self._read = read_rows(model, args, kwargs, data_plate, read)
        self.program = self._read.program
        self.count = batch_rows(args, kwargs) if self.structure.data_plate is not None else None
        check_finite(model, guide, self.structure, args, kwargs, rows_per_run=1000)

    @property
    def structure(self) -> Structure:
        """The model's structure."""
        return self.program.structure

    def checked(self) -> "Rows":
        """Return these rows, which are data and no template: refuse what lies outside the support of its likelihood.

        Raises:
            DataError: Naming the site and the first such rows.
        """
        check_supports(self.model, self.structure, self.args, self.kwargs)
        return self

    def chunks(
        self, chunk_size: int | None, draws_per_row: int, *, progress: bool
    ) -> Iterator[tuple[Args, Kwargs, int]]:
        """Yield arguments of the programs and how many of their rows count, with a progress bar.

        The first chunk draws from torch's generator as it is, each later one under a seed of its own, so that a chunk's draws do
        not depend on who ran those before it. A process that does not run the first chunk still gets it, with no row that
        counts, where globals are drawn with it.

        Args:
            chunk_size: Rows run at once; ``None`` for so many that some 50,000 draws are in memory. A model that draws rows by
                itself runs as many as it draws, the last chunk padded by repeated rows.
            draws_per_row: Draws of each row.
            progress: Whether to show a progress bar.
        """
        size = self._chunk_rows(chunk_size, draws_per_row)
        number, stop = self.processes.bounds(self._num_chunks(size))
        with preserved_rng():
            seed = int(torch.randint(2**62, ()))
        if 0 < number < stop and self.structure.has_globals:
            yield *self._chunk(0, size)[:2], 0
        total = min(stop * size, self._total) - number * size
        with tqdm(total=max(0, total), disable=not progress, unit="row", dynamic_ncols=True) as bar:
            for place in range(number, stop):
                if place:
                    torch.manual_seed(fork_seed(seed, place))
                chunk = self._chunk(place, size)
                yield chunk
                bar.update(chunk[2])

    def num_own(self, chunk_size: int | None, draws_per_row: int) -> int:
        """Return how many rows this process's chunks have together."""
        size = self._chunk_rows(chunk_size, draws_per_row)
        number, stop = self.processes.bounds(self._num_chunks(size))
        return max(0, min(stop * size, self._total) - number * size)

    @property
    def _total(self) -> int:
        """Number of rows; those of the model's own plates where it is one row as a whole."""
        return self.structure.rows if self.count is None else self.count

    def _num_chunks(self, size: int) -> int:
        return -(-self._total // size)

    def _chunk_rows(self, chunk_size: int | None, draws_per_row: int) -> int:
        """Return how many rows are run at once."""
        if self.count is None:
            return max(1, self._total)
        if self._read.needs_all:
            return self.count
        size = self._read.drawn or chunk_size or max(1, CHUNK_DRAWS // draws_per_row)
        return min(size, self.structure.full_size) if self.structure.full_size > self.structure.rows else size

    def _chunk(self, number: int, size: int) -> tuple[Args, Kwargs, int]:
        """Return a chunk's rows and how many of them count."""
        if self.count is None:
            return self.args, self.kwargs, self._total
        start = number * size
        stop = min(start + size, self.count)
        rows: slice | Tensor = slice(start, stop)
        if self._read.drawn is not None and stop - start < size:
            rows = torch.arange(start, start + size).clamp(max=stop - 1)
        return *take_rows(self.args, self.kwargs, rows), stop - start

    def sample_guide(self, args: Args, kwargs: Kwargs, axes: ParticleAxes) -> Records:
        """Draw from the guide; every chunk of rows keeps the globals that the first one drew."""
        self.program.forget_indices()  # another chunk has other rows
        records = self.program.sample_guide(args, kwargs, axes, values=self._globals)
        if not self._globals:
            self._globals = {name: site.value for name, site in records.items() if not site.is_local}
        return records
