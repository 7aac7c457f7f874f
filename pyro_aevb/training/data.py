"""Data in any of the accepted forms become batches: positional and keyword arguments of model and guide."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from pyro_aevb.errors import DataError, SettingError
from pyro_aevb.program.settings import check_count
from pyro_aevb.training.batches import Batch, BatchSource, as_batch, check_lengths, check_skip
from pyro_aevb.training.streaming import IteratorSource, filled

__all__ = ["Batch", "BatchSource", "as_batch", "as_source"]

DEFAULT_BATCH_SIZE = 100
"""M of arXiv 1312.6114, Algorithm 1."""


class TensorSource(BatchSource):
    """Tensors with rows on axis 0, in their own dtype, gathered by index."""

    def __init__(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], batch_size: int | None) -> None:
        named: list[tuple[int | str, Tensor]] = [*enumerate(args), *kwargs.items()]
        lengths = [_length(name, tensor) for name, tensor in named]
        if not lengths:
            raise DataError("The data hold no tensors.")
        check_lengths(Batch(args, kwargs))
        self.num_rows: int = lengths[0]
        if self.num_rows == 0:
            raise DataError("The data are empty: expected at least one row.")
        self.args = args
        self.kwargs = kwargs
        self.batch_size: int = _check_batch_size(batch_size, self.num_rows)

    def batches(self, generator: torch.Generator | None = None, *, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, shuffled if there is a generator."""
        check_skip(skip, self)
        # the order of all rows at once means nothing to a bound, and much to a guide with parameters of each row
        is_shuffled = generator is not None and self.batch_size < self.num_rows
        order = torch.randperm(self.num_rows, generator=generator) if is_shuffled else None
        for start in range(skip * self.batch_size, self.num_rows, self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self._take(rows if order is None else order[rows])

    def _take(self, rows: slice | Tensor) -> Batch:
        args = tuple(tensor[_on(rows, tensor)] for tensor in self.args)
        return Batch(args, {name: tensor[_on(rows, tensor)] for name, tensor in self.kwargs.items()})

    def num_batches(self) -> int:
        """Number of batches in an epoch."""
        return -(-self.num_rows // self.batch_size)

    def whole(self) -> Batch:
        """Return all rows as one batch."""
        return Batch(self.args, self.kwargs)


class LoaderSource(BatchSource):
    """A ``DataLoader``, or a ``Dataset`` that gets one."""

    def __init__(self, data: DataLoader[Any] | Dataset[Any], batch_size: int | None) -> None:
        self.is_given = isinstance(data, DataLoader)
        if self.is_given and batch_size is not None:
            raise SettingError(f"A DataLoader has its own batch size; leave batch_size={batch_size} out.")
        dataset = self.dataset = _dataset(data)
        is_stream = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
        if is_stream and not self.is_given and not isinstance(dataset, IterableDataset):
            raise DataError(
                f"The Dataset {type(dataset).__name__} has no length: give it __len__, or make rows without end an IterableDataset."
            )
        self.num_rows = None if is_stream else _count_rows(data)
        if self.num_rows == 0:
            raise DataError("The data are empty: expected at least one row.")
        self.data = data
        self.is_stream = is_stream
        self._resumed: Iterator[Batch] | None = None
        self._state_before: dict[str, Any] = {}
        rows = self.num_rows if self.num_rows is not None else batch_size or DEFAULT_BATCH_SIZE
        self.batch_size = data.batch_size if isinstance(data, DataLoader) else _check_batch_size(batch_size, rows)

    def batches(self, generator: torch.Generator | None = None, *, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch; a given loader keeps its own order, and a stream begins where it was left."""
        check_skip(skip, self)
        if self._resumed is not None:
            resumed, self._resumed = self._resumed, None
            yield from resumed
            return
        loader = self.data if isinstance(self.data, DataLoader) else self._loader(self.data, generator, skip)
        yield from filled(loader) if self.is_stream else map(as_batch, loader)

    def _loader(self, dataset: Dataset[Any], generator: torch.Generator | None, skip: int) -> DataLoader[Any]:
        """Make a loader for one epoch, whose own seed does not come from torch's generator."""
        own = torch.Generator() if generator is None else generator
        if self.num_rows is None or self.batch_size is None:
            return DataLoader(dataset, self.batch_size, generator=own)
        rows = _index_batches(self.num_rows, self.batch_size, generator, skip)
        return DataLoader(dataset, batch_sampler=rows, generator=own)

    @property
    def can_skip(self) -> bool:
        """Whether an epoch can be entered in its middle: not that of a given loader or a stream."""
        return not (self.is_given or self.is_stream)

    def first(self) -> Batch:
        """Return the first batch, in the given order; what keeps its own place, as a stream does, yields it again later."""
        if not self.is_stream and not self._stateful():
            before = {name: generator.get_state() for name, generator in self._generators().items()}
            try:
                return super().first()
            finally:
                for name, generator in self._generators().items():
                    generator.set_state(before[name])
        state = self.state()
        passing = self.batches()
        batch = next(passing, None)
        if batch is None or batch.rows == 0:
            raise DataError("The data are empty: expected at least one row.")
        self._resumed, self._state_before = chain([batch], passing), state
        return batch

    def state(self) -> dict[str, Any]:
        """Return the states of a given loader's generators, and of the loader or a stream that tells its own (``state_dict``)."""
        if self._resumed is not None:
            return self._state_before
        held = {name: item.state_dict() for name, item in self._stateful().items()}
        return held | {name: generator.get_state() for name, generator in self._generators().items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where :meth:`state` was taken."""
        super().load_state(state)
        for name, item in self._stateful().items():
            item.load_state_dict(state[name])
            self._resumed = None
        for name, generator in self._generators().items():
            generator.set_state(state[name])

    def _stateful(self) -> dict[str, Any]:
        """Return what keeps its own place: a loader such as torchdata's, else a stream such as Hugging Face's."""
        candidates = {
            "loader": self.data if self.is_given else None,
            "stream": self.dataset if self.is_stream else None,
        }
        able = {name: item for name, item in candidates.items() if hasattr(item, "load_state_dict")}
        return dict(list(able.items())[:1])

    def _generators(self) -> dict[str, torch.Generator]:
        """Return the generators of a given loader and its samplers."""
        if not isinstance(self.data, DataLoader):
            return {}
        batch_sampler: Any = self.data.batch_sampler
        holders = {
            "generator": self.data,
            "sampler's generator": self.data.sampler,
            "inner sampler's generator": getattr(batch_sampler, "sampler", None),
        }
        found = {name: getattr(holder, "generator", None) for name, holder in holders.items()}
        return {name: generator for name, generator in found.items() if isinstance(generator, torch.Generator)}

    @property
    def num_data(self) -> int | None:
        """Rows of the data set; ``None`` for a stream, and for a loader whose items are whole batches (``batch_size=None``)."""
        data = self.data
        has_batches = isinstance(data, DataLoader) and data.batch_size is None and data.batch_sampler is None
        is_indexed_by_batches = isinstance(data, DataLoader) and isinstance(data.sampler, BatchSampler)
        return None if has_batches and not is_indexed_by_batches else self.num_rows

    def num_batches(self) -> int | None:
        """Number of batches in an epoch; ``None`` for a stream."""
        if isinstance(self.data, DataLoader) and not self.is_stream:
            return len(self.data)
        return None if self.num_rows is None or self.batch_size is None else -(-self.num_rows // self.batch_size)


def _index_batches(num_rows: int, size: int, generator: torch.Generator | None, skip: int) -> Iterator[list[int]]:
    """Yield the rows of each batch, which a loader asks for once it has drawn its own seed."""
    order = torch.arange(num_rows) if generator is None else torch.randperm(num_rows, generator=generator)
    for start in range(skip * size, num_rows, size):
        yield order[start : start + size].tolist()


def _count_rows(data: Any) -> int:
    """Return the rows of one epoch: those that a loader's sampler gives, where it has one."""
    sampler: Any = data.sampler if isinstance(data, DataLoader) and data.batch_size is not None else _dataset(data)
    return len(sampler)


def _dataset(data: Any) -> Any:
    return data.dataset if isinstance(data, DataLoader) else data


def as_source(data: Any, batch_size: int | None = None) -> BatchSource:
    """Accept a tensor, a tuple or list of tensors, a mapping, numpy arrays, a Dataset, a DataLoader or an iterator of batches.

    A tensor becomes ``model(x)``, a tuple or list ``model(*batch)``, a mapping ``model(**batch)``; every tensor has rows on
    axis 0.

    Raises:
        DataError: If the data are of another type, empty, or of unequal lengths.
        SettingError: If the batch size is not between 1 and the number of rows.
    """
    if isinstance(data, (DataLoader, Dataset)):
        return LoaderSource(data, batch_size)
    if isinstance(data, Iterator):
        return IteratorSource(data, batch_size)
    batch = as_batch(data)
    return TensorSource(batch.args, batch.kwargs, batch_size)


def _length(name: int | str, tensor: Tensor) -> int:
    if tensor.dim() == 0:
        raise DataError(
            f"Argument {name} is a single number; every tensor has rows on axis 0. Bind it with functools.partial."
        )
    return len(tensor)


def _check_batch_size(batch_size: int | None, num_rows: int) -> int:
    """Return the batch size, the paper's 100 where none is given."""
    if batch_size is None:
        return min(DEFAULT_BATCH_SIZE, num_rows)
    check_count("batch_size", batch_size)
    if batch_size > num_rows:
        raise SettingError(f"batch_size must lie between 1 and the number of rows, {num_rows}; got {batch_size}.")
    return batch_size


def _on(rows: slice | Tensor, tensor: Tensor) -> slice | Tensor:
    return rows.to(tensor.device) if isinstance(rows, Tensor) else rows
