"""Several processes share the rows of each batch.

A batch of all processes has ``batch_size`` rows of each. Of rows whose order is drawn here (tensors, Datasets) every process draws
the order of the whole epoch and takes, and loads, its own part of each batch: parts differ by one row at most. What keeps its own
order goes on doing so: a DataLoader of a Dataset gets a ``DistributedSampler`` by Fabric, and the rows that this repeats to make
processes equal are cut off; of a stream every process reads its own. They agree on the number of rows batch by batch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler

from pyro_aevb.errors import SettingError
from pyro_aevb.program.batch import take_rows
from pyro_aevb.program.processes import Processes
from pyro_aevb.program.scaling import Shard
from pyro_aevb.training.data import Batch, BatchSource, as_batch

__all__ = ["ShardedBatch", "ShardedSource", "share"]

_EPOCHS = "epochs"


class ShardedBatch(Batch):
    """A process's part of a batch.

    Attributes:
        shard: How many rows it has, of how many.
    """

    shard: Shard

    @classmethod
    def of(cls, batch: Batch, shard: Shard) -> "ShardedBatch":
        """Make it of the rows at hand."""
        part = cls(*batch)
        part.shard = shard
        return part

    @property
    def rows(self) -> int:
        """Number of rows of the whole batch."""
        return self.shard.batch_rows


def share(source: BatchSource, processes: Processes) -> BatchSource:
    """Give each process its part of the batches of a source.

    Args:
        source: Batches of one process, before any was taken.
        processes: The processes.

    Returns:
        The source itself for a single process.

    Raises:
        SettingError: If the order of a given loader can't be divided among processes.
    """
    if processes.count == 1:
        return source
    if source.can_skip:
        return _DrawnOrder(source, processes)
    return _OwnOrder(source, processes) if source.num_batches() is None else _DividedLoader(source, processes)


class ShardedSource(BatchSource):
    """A process's part of the batches of a source. What is asked about the data, but for their batches, the source answers.

    Args:
        source: Batches of one process.
        processes: The processes.
    """

    def __init__(self, source: BatchSource, processes: Processes) -> None:
        self.source = source
        self.processes = processes
        self.num_rows = source.num_rows
        self.batch_size = source.batch_size

    @property
    def can_skip(self) -> bool:
        """Whether an epoch can be entered in its middle."""
        return self.source.can_skip

    @property
    def is_spent(self) -> bool:  # type: ignore[override]
        """Whether nothing is left for another epoch, for any process."""
        return self.source.is_spent

    def state(self) -> dict[str, Any]:
        """Return where the data stand between two epochs, beside the generator of the order."""
        return self.source.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where :meth:`state` was taken."""
        self.source.load_state(state)

    def first(self) -> Batch:
        """Return a first batch, of one process's size: the same on all of them, but for a stream."""
        return self.source.first()

    def whole(self) -> Batch | None:
        """Return all rows of all processes as one batch, where they are in memory."""
        return self.source.whole()

    def _part(self, batch: Batch, rows: int, batch_rows: int) -> ShardedBatch:
        return ShardedBatch.of(batch, Shard(rows, batch_rows, self.processes.count))


class _DrawnOrder(ShardedSource):
    """Rows whose order is drawn here, by all processes alike."""

    @property
    def _rows_at_once(self) -> int:
        """Rows of a batch of all processes."""
        return min((self.batch_size or 1) * self.processes.count, self.num_rows or 0)

    def num_batches(self) -> int:
        """Number of batches in an epoch."""
        return -(-(self.num_rows or 0) // self._rows_at_once)

    def batches(self, generator: torch.Generator | None = None, *, skip: int = 0) -> Iterator[Batch]:
        """Yield this process's part of the batches of one epoch; where it has no row, one stands in that counts for nothing."""
        is_shuffled = generator is not None and self.num_batches() > 1
        num_rows = self.num_rows or 0
        order = torch.randperm(num_rows, generator=generator) if is_shuffled else torch.arange(num_rows)
        whole = order.split(self._rows_at_once)[skip:]
        own = [rows[slice(*self.processes.bounds(len(rows)))] for rows in whole]
        taken = (rows if len(rows) else every[:1] for rows, every in zip(own, whole, strict=True))
        for batch, rows, every in zip(self._take(taken), own, whole, strict=True):
            yield self._part(batch, len(rows), len(every))

    def _take(self, parts: Iterator[torch.Tensor]) -> Iterator[Batch]:
        """Load rows, part by part."""
        whole = self.source.whole()
        if whole is None:
            source: Any = self.source
            indices = (rows.tolist() for rows in parts)
            yield from map(as_batch, DataLoader(source.dataset, batch_sampler=indices, generator=torch.Generator()))
            return
        for rows in parts:
            yield Batch(*take_rows(*whole, rows))


class _OwnOrder(ShardedSource):
    """Rows that come as each process's stream gives them."""

    def num_batches(self) -> int | None:
        """Number of batches in an epoch; ``None`` for a stream."""
        return None

    def batches(self, generator: torch.Generator | None = None, *, skip: int = 0) -> Iterator[Batch]:
        """Yield this process's batches as long as any process has one; the last one's first row stands in for those it lacks."""
        pending, last = self._own(generator, skip), None
        while True:
            batch = next(pending, None)
            (batch_rows,) = self.processes.total(0 if batch is None else batch.rows)
            if batch_rows == 0:
                return
            if batch is not None and batch.rows:
                last = batch
                yield self._part(batch, batch.rows, int(batch_rows))
            else:
                last = Batch(*take_rows(*(last or self.first()), slice(0, 1)))
                yield self._part(last, 0, int(batch_rows))

    def _own(self, generator: torch.Generator | None, skip: int) -> Iterator[Batch]:
        """Yield the batches of this process's own stream."""
        return self.source.batches(generator, skip=skip)


class _DividedLoader(_OwnOrder):
    """Rows of a given loader, to which Fabric gives a sampler of this process's part."""

    def __init__(self, source: BatchSource, processes: Processes) -> None:
        super().__init__(source, processes)
        given: Any = source
        from lightning_fabric.utilities.distributed import DistributedSamplerWrapper

        self._loader = _divide(given.data, processes)
        self._sampler: Any = self._loader.batch_sampler.sampler
        if isinstance(self._sampler, DistributedSamplerWrapper):
            self._sampler.dataset = _OneOrder(given.data.sampler, processes)  # type: ignore[assignment]
        self._num_epochs = 0
        self.num_rows = len(self._sampler.dataset)

    def num_batches(self) -> int:
        """Number of batches in an epoch."""
        return len(self._loader)

    def state(self) -> dict[str, Any]:
        """Return where the data stand between two epochs: the epochs behind them too, by which rows are shuffled."""
        return super().state() | {_EPOCHS: self._num_epochs}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where :meth:`state` was taken."""
        super().load_state({name: value for name, value in state.items() if name != _EPOCHS})
        self._num_epochs = int(state.get(_EPOCHS, 0))

    def _own(self, generator: torch.Generator | None, skip: int) -> Iterator[Batch]:
        """Yield the loader's batches, without the rows that the sampler repeats at its end."""
        sampler = self._sampler
        # Fabric counts epochs for the sampler, which shuffles by their number, from 0 in each process that is started
        self._loader._num_iter_calls = self._num_epochs
        self._num_epochs += 1
        left = min(len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas)), sampler.num_samples)
        for item in self._loader:
            batch = as_batch(item)
            kept = min(batch.rows, left)
            left -= kept
            yield Batch(*take_rows(*batch, slice(0, kept)))


class _OneOrder:
    """The order of a sampler of one's own, one for all processes: each would draw another. Fabric's wrapper divides it.

    Args:
        sampler: Draws the order of an epoch.
        processes: The processes.
    """

    def __init__(self, sampler: Any, processes: Processes) -> None:
        self._sampler = sampler  # Fabric tells it the number of the epoch
        self._processes = processes
        self._order: list[Any] = []

    def __len__(self) -> int:
        return len(self._sampler)

    def __getitem__(self, index: int) -> Any:
        return self._order[index]

    def reset(self) -> None:
        """Draw the order of another epoch."""
        self._order = self._processes.share(list(self._sampler))


def _divide(loader: DataLoader[Any], processes: Processes) -> Any:
    """Let Fabric give a loader a sampler of this process's rows, unless it has one."""
    drawn = loader.sampler
    if isinstance(drawn, RandomSampler) and (drawn.replacement or drawn.num_samples != len(loader.dataset)):  # type: ignore[arg-type]
        raise SettingError(
            f"The DataLoader has a RandomSampler with replacement={drawn.replacement} and num_samples={drawn.num_samples}, which "
            f"Fabric replaces in {processes.count} processes by one that gives every row once. Use shuffle=True, or a sampler of "
            f"another kind (WeightedRandomSampler(torch.ones(rows), num_samples))."
        )
    if loader.batch_size is None or not hasattr(loader.sampler, "__len__"):
        how = "a batch_sampler or whole batches as items" if loader.batch_size is None else "a sampler without a length"
        raise SettingError(
            f"The DataLoader has {how}, which {processes.count} processes can't divide. Give the Dataset itself with batch_size=, "
            f"or a DataLoader with a batch_size and a sampler of known length."
        )
    fabric: Any = processes.fabric
    return fabric.setup_dataloaders(loader, move_to_device=False)
