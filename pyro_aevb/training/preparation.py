"""A module and its data are made ready for each other before the first step."""

from collections.abc import Iterator

import torch

from pyro_aevb.errors import AEVBError, DataError, SettingError
from pyro_aevb.program.staging import ObjectiveModule
from pyro_aevb.training.data import Batch, BatchSource
from pyro_aevb.training.stepper import non_finite_site

__all__ = ["check_data", "prepare"]


def prepare(module: ObjectiveModule, source: BatchSource, batch_size: int | None) -> BatchSource:
    """Read the structure, make the parameters, and give a model that draws its own rows the whole data each step."""
    batch = source.first()
    try:
        module.build(*batch.args, **batch.kwargs)
    except AEVBError:
        whole = source.whole()
        if batch_size is not None or whole is None:
            raise
        module.build(*whole.args, **whole.kwargs)
    structure = module.structure
    if structure is None:
        return source
    if structure.draws_own_rows or structure.data_plate is None:
        return _WholeSource(source, structure.full_size if structure.draws_own_rows else 1, structure.rows)
    if structure.rows != batch.rows:
        raise DataError(
            f"The data plate {structure.data_plate!r} has {structure.rows} rows and the batch {batch.rows}. Size the plate by the "
            f"batch, pyro.plate({structure.data_plate!r}, len(x)), or name another plate with data_plate='...'."
        )
    if module.num_data is None:
        module.num_data = source.num_rows
    if module.num_data is None and structure.has_globals:
        raise SettingError(
            f"A stream has no length, and the global latents {[site.name for site in structure.select('latent', is_local=False)]} "
            f"need one to be weighed against its rows: give num_data=."
        )
    return source


class _WholeSource(BatchSource):
    """All rows at each step, for a model that draws its own rows or has none."""

    def __init__(self, source: BatchSource, full_size: int, rows: int) -> None:
        whole = source.whole()
        if whole is None:
            raise DataError("A model that draws its own rows, or has none, needs its data as tensors.")
        self.batch = whole
        self.num_rows: int = full_size
        self.batch_size: int = rows

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Yield all rows, as often as there are batches in an epoch."""
        return iter([self.batch] * self.num_batches())

    def num_batches(self) -> int:
        """Number of steps in an epoch."""
        return -(-self.num_rows // self.batch_size)


def check_data(module: ObjectiveModule, source: BatchSource) -> None:
    """Refuse NaN and infinity in data where they reach a density that no mask drops.

    Raises:
        DataError: Naming the argument, the first such row and the site.
    """
    whole = source.whole()
    if whole is None or isinstance(source, _WholeSource):
        return
    for name, tensor in [*enumerate(whole.args), *whole.kwargs.items()]:
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
            continue
        bad = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.dim() > 1 else ~torch.isfinite(tensor)
        row = int(bad.nonzero()[0, 0])
        stop = min(row + (source.batch_size or 1), len(tensor))
        rows = slice(max(0, stop - (source.batch_size or 1)), stop)
        part = Batch(tuple(x[rows] for x in whole.args), {key: x[rows] for key, x in whole.kwargs.items()})
        found = non_finite_site(module, part)
        if found is not None:
            raise DataError(
                f"The data hold NaN or infinity in argument {name}, first in row {row}, which reach the density of site "
                f"{found.site!r}. Remove these rows, or mask the entries with obs_mask= or poutine.mask.",
                site=found.site,
            )
