"""Rows without end: batches that an iterator gives once, and a data set that grows as its rows are seen."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from pyro_aevb.errors import DataError, SettingError
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.training.batches import Batch, BatchSource, as_batch, check_lengths, check_skip

__all__ = ["GrowingSource", "IteratorSource", "filled"]


def filled(items: Iterable[Any]) -> Iterator[Batch]:
    """Yield the batches of a stream, and pass over empty ones: an interval of time without rows ends nothing.

    Raises:
        DataError: If an item is no batch, or its tensors differ in length.
    """
    for item in items:
        batch = as_batch(item)
        check_lengths(batch)
        if batch.rows:
            yield batch


class IteratorSource(BatchSource):
    """Batches of an iterator, such as a generator's: one pass, as long as it lasts.

    Args:
        items: Gives batches, each in any form that a batch may have.
        batch_size: Must be ``None``: the iterator chose it.

    Raises:
        SettingError: If there is a batch size.
    """

    num_rows = None
    batch_size = None

    def __init__(self, items: Iterator[Any], batch_size: int | None = None) -> None:
        if batch_size is not None:
            raise SettingError(
                f"An iterator gives whole batches; leave batch_size={batch_size} out, or give rows one by one as a torch "
                f"IterableDataset."
            )
        self._passing: Iterator[Batch] = filled(items)

    def batches(self, generator: torch.Generator | None = None, *, skip: int = 0) -> Iterator[Batch]:
        """Yield what the iterator still has."""
        check_skip(skip, self)
        yield from self._passing
        self.is_spent = True

    @property
    def can_skip(self) -> bool:
        """Whether an epoch can be entered in its middle: never."""
        return False

    def num_batches(self) -> None:
        """Nobody knows how many batches there are."""

    def first(self) -> Batch:
        """Return the first batch, which comes again later."""
        batch = next(self._passing, None)
        if batch is None:
            raise DataError(
                "The iterator gives no batch with rows. One that was used before is spent: make it anew for each fit."
            )
        self._passing = chain([batch], self._passing)
        return batch


class GrowingSource(BatchSource):
    """A stream whose rows are counted as they come: the module's number of rows is that of the rows so far, with the batch at hand.

    Args:
        source: The stream.
        module: Model, guide and objective, whose data set grows.
    """

    def __init__(self, source: BatchSource, module: ObjectiveModule) -> None:
        self.source = source
        self.module = module
        self.num_rows = source.num_rows
        self.batch_size = source.batch_size

    def batches(self, generator: torch.Generator | None = None, *, skip: int = 0) -> Iterator[Batch]:
        """Count and yield the stream's batches."""
        for batch in self.source.batches(generator, skip=skip):
            self.module.count(batch.rows)
            yield batch

    @property
    def is_spent(self) -> bool:  # type: ignore[override]
        """Whether nothing is left for another epoch."""
        return self.source.is_spent

    @property
    def can_skip(self) -> bool:
        """Whether an epoch can be entered in its middle."""
        return self.source.can_skip

    def num_batches(self) -> int | None:
        """Number of batches in an epoch; ``None`` for a stream."""
        return self.source.num_batches()

    def first(self) -> Batch:
        """Return the first batch, uncounted: it comes again."""
        return self.source.first()

    def state(self) -> dict[str, Any]:
        """Return where the stream stands."""
        return self.source.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where :meth:`state` was taken."""
        self.source.load_state(state)
