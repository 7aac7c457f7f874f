"""A module and its data are made ready for each other before the first step."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from pyro.infer.autoguide.effect import AutoMessenger

from pyro_aevb.errors import AEVBError, DataError, GuideError, NonFiniteError, SettingError
from pyro_aevb.guides.base import AmortizedGuide
from pyro_aevb.guides.inputs import STANDARDISING_ROWS
from pyro_aevb.program.batch import explained, take_rows
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.rows import check_finite, located
from pyro_aevb.program.structure import Structure, read_structure
from pyro_aevb.program.supports import check_supports
from pyro_aevb.training.data import Batch, BatchSource, as_source
from pyro_aevb.training.sharding import ShardedSource
from pyro_aevb.training.streaming import GrowingSource

__all__ = ["build", "check_rows", "check_size", "prepare", "prepare_validation"]


def prepare(module: ObjectiveModule, source: BatchSource, batch_size: int | None) -> BatchSource:
    """Read the structure, make the parameters, and refuse data that the model can't take.

    Returns:
        The source; for a model that draws its own rows, or has none, one that gives it the whole data at each step.

    Raises:
        DataError: If the rows are not those of the data plate, or NaN reaches a density.
        SettingError: If the number of rows is needed and unknown.
    """
    batch = _build(module, source, batch_size)
    structure = module.structure
    if structure is None:
        return source
    whole = source.whole()
    if structure.draws_own_rows or structure.data_plate is None:
        if whole is None:
            raise DataError("A model that draws its own rows, or has none, needs its data as tensors.")
        if batch_size is not None:
            raise SettingError(
                f"The model {'draws its own rows' if structure.draws_own_rows else 'has no rows'}, so that each step gets all "
                f"data: leave batch_size={batch_size} out."
            )
        source = _WholeSource(whole, -(-whole.rows // structure.rows) if structure.draws_own_rows else 1)
    else:
        check_rows(structure, batch)
        _check_rows_of_guide(module, structure, source)
        check_size(module, source.num_data)
        if module.is_growing and source.num_data is None:
            return GrowingSource(source, module)
        if module.num_data is None:
            module.num_data = source.num_data
    if whole is not None:
        with module.running():
            check_finite(module.model, module.guide, structure, *whole, rows_per_run=source.batch_size or 1)
            check_supports(module.model, structure, *whole)
    return source


def prepare_validation(module: ObjectiveModule, data: Any) -> BatchSource:
    """Return held-out data in batches, all at once for a model without rows, and refuse what the model can't take.

    Args:
        module: Model, guide and objective, built.
        data: As a fit takes them, but for iterators.

    Raises:
        SettingError: If they are an iterator.
        DataError: If there are none, NaN reaches a density, or some are outside a support; of a loader or stream, in its first
            batch.
        ModelError: If model or guide fail on them.
    """
    if isinstance(data, Iterator):
        raise SettingError(
            "Held-out data are passed through after each epoch, and an iterator lasts for one: give tensors, a Dataset or a "
            "DataLoader as validation=."
        )
    source, structure = as_source(data), module.structure
    if structure is None:
        return source
    if structure.data_plate is None:
        source = as_source(data, source.num_rows)
    try:
        first = source.first()
        rows = source.whole() or first
        # densities that are NaN by the parameters may become better
        with module.running(), explained("program", *first), suppress(NonFiniteError):
            read_structure(module.model, *first, guide=module.guide, data_plate=structure.data_plate)
        with module.running():
            check_finite(module.model, module.guide, structure, *rows, rows_per_run=source.batch_size or 1)
            check_supports(module.model, structure, *rows)
    except AEVBError as error:
        raise type(error)(f"Held-out data, validation=: {error}", site=error.site) from error
    return source


def build(module: ObjectiveModule, batch: Batch) -> None:
    """Make the parameters, read the structure, and let the objective refuse what it can't train, before anything is drawn."""
    with located(*batch), explained("program", *batch):
        module.build(*batch.args, **batch.kwargs)
    if hasattr(module.objective, "read"):
        with module.running():
            module.objective.read(module.model, module.guide, *batch.args, **batch.kwargs)


def _build(module: ObjectiveModule, source: BatchSource, batch_size: int | None) -> Batch:
    """Build on the first batch; a model that needs all rows at once is tried with them."""
    batch = source.first()
    _build_guide(module, source)
    try:
        build(module, batch)
    except AEVBError as error:
        whole = source.whole()
        if batch_size is not None or whole is None:
            raise
        try:
            build(module, whole)
        except AEVBError:
            raise error from error.__cause__
    return batch


def _build_guide(module: ObjectiveModule, source: BatchSource) -> None:
    """Let a guide that builds itself standardise its inputs by rows from all over the data, rather than by the first batch."""
    guide, whole = getattr(module.guide, "__self__", module.guide), source.whole()
    if not isinstance(guide, AmortizedGuide) or guide.is_built or whole is None:
        return
    rows = torch.linspace(0, whole.rows - 1, min(whole.rows, STANDARDISING_ROWS)).round().long()
    args, kwargs = take_rows(whole.args, whole.kwargs, rows)
    # a model that takes no other number of rows gets the first batch
    with suppress(AEVBError), module.program.building():
        guide.build(*args, **kwargs)


def _check_rows_of_guide(module: ObjectiveModule, structure: Structure, source: BatchSource) -> None:
    """Refuse batches for a guide with parameters of each row: they would belong to another row at every step."""
    local = {site.name for site in structure.select("latent", is_local=True)}
    sites = sorted(local & _sites_per_row(getattr(module.guide, "__self__", module.guide), structure))
    is_shared = isinstance(source, ShardedSource)
    if sites and (is_shared or source.whole() is None or source.num_batches() != 1):
        raise GuideError(
            f"Pyro's automatic guide holds parameters of each row for sites {sites}, which batches would mix up. Give all rows at "
            f"each step (a tensor, batch_size={source.num_rows}){' in one process' if is_shared else ''}, or use a guide that "
            f"computes them from the row.",
            site=sites[0],
        )


def _sites_per_row(guide: Any, structure: Structure) -> set[str]:
    """Return the sites whose parameters one of Pyro's automatic guides holds, rather than computes from the row."""
    if isinstance(guide, AutoGuideList):
        return set().union(*(_sites_per_row(part, structure) for part in guide))
    if isinstance(guide, AmortizedGuide):
        return set()
    if isinstance(guide, AutoMessenger):
        return set() if structure.data_plate in guide.amortized_plates else set(structure.sites)
    if isinstance(guide, AutoGuide) and not isinstance(guide, AutoCallable) and guide.prototype_trace is not None:
        return set(guide.prototype_trace.stochastic_nodes)
    return set()


def check_rows(structure: Structure, batch: Batch) -> None:
    """Refuse a batch whose rows are not those of the data plate.

    Raises:
        DataError: With both numbers.
    """
    if structure.rows != batch.rows:
        raise DataError(
            f"The data plate {structure.data_plate!r} has {structure.rows} rows and the batch {batch.rows}. Size the plate by the "
            f"batch, pyro.plate({structure.data_plate!r}, len(x)), or name another plate with data_plate='...'."
        )


def check_size(module: ObjectiveModule, num_rows: int | None) -> None:
    """Refuse data of unknown number where globals have to be weighed against it, and to count where the model has its own number.

    Args:
        module: Model, guide and objective, built.
        num_rows: Rows of the data at hand; ``None`` for a stream.

    Raises:
        SettingError: Naming the globals, or the plate.
    """
    structure = module.structure
    if structure is None or structure.data_plate is None:
        return
    if module.is_growing and structure.full_size != structure.rows:
        raise SettingError(
            f"The model sizes its plate {structure.data_plate!r} by itself, {structure.full_size} rows, so that num_data='growing' "
            f"would not reach it: size it by the batch, pyro.plate({structure.data_plate!r}, len(x))."
        )
    is_known = module.num_data is not None or num_rows is not None or structure.full_size != structure.rows
    if structure.has_globals and not is_known and not module.is_growing:
        names = [site.name for site in structure.select("latent", is_local=False)]
        raise SettingError(
            f"Nothing says how many rows there are, and the global latents {names} are weighed against that number: give num_data= "
            f"(the rows of all data), num_data='growing' (the rows seen so far), or for data that drift effective_num_data= (how "
            f"many recent rows the globals should know)."
        )


class _WholeSource(BatchSource):
    """All rows at each step, for a model that draws its own rows or has none."""

    def __init__(self, whole: Batch, num_batches: int) -> None:
        self.batch = whole
        self.num_rows: int = whole.rows
        self.batch_size: int = whole.rows
        self._num_batches = num_batches

    def batches(self, generator: torch.Generator | None = None, *, skip: int = 0) -> Iterator[Batch]:
        """Yield all rows, as often as there are batches in an epoch."""
        return iter([self.batch] * (self._num_batches - skip))

    def num_batches(self) -> int:
        """Number of steps in an epoch."""
        return self._num_batches
