"""A batch of data as arguments of model and guide, and what every source of batches offers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_aevb.errors import DataError, SettingError
from pyro_aevb.program.batch import check_dense, describe_batch, to_tensor
from pyro_aevb.randomness import preserved_rng

__all__ = ["Batch", "BatchSource", "as_batch", "check_batch", "check_lengths", "check_skip", "describe"]


class Batch(NamedTuple):
    """Arguments of one call of model and guide.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def rows(self) -> int:
        """Number of rows: the length of the first tensor, 0 without tensors."""
        tensors = (item for item in (*self.args, *self.kwargs.values()) if isinstance(item, Tensor) and item.dim() > 0)
        return next((len(tensor) for tensor in tensors), 0)


class BatchSource(ABC):
    """Rows that can be passed through in batches, several times.

    Attributes:
        num_rows: Number of rows; ``None`` for a stream.
        batch_size: Rows in a batch, the last one may be shorter.
        is_spent: Whether nothing is left for another epoch.
    """

    num_rows: int | None
    batch_size: int | None
    is_spent: bool = False

    @abstractmethod
    def batches(self, generator: torch.Generator | None = None, *, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, shuffled if there is a generator.

        Args:
            generator: Draws the order. It draws as much whatever ``skip`` is, and nothing is drawn from torch's own generator,
                but by a given loader.
            skip: Batches at the epoch's beginning that are passed over, and not loaded.

        Raises:
            SettingError: If there are fewer batches to skip, or they can't be.
        """

    @property
    def num_data(self) -> int | None:
        """Rows of the data set, by which a batch is weighed; ``None`` where nobody knows."""
        return self.num_rows

    @abstractmethod
    def num_batches(self) -> int | None:
        """Number of batches in an epoch; ``None`` for a stream."""

    @property
    def can_skip(self) -> bool:
        """Whether an epoch can be entered in its middle: where the order is drawn here."""
        return True

    def state(self) -> dict[str, Any]:
        """Return where the data stand between two epochs, beside the generator of the order: states of what draws by itself."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where :meth:`state` was taken.

        Raises:
            DataError: If the state is that of another kind of data.
        """
        own = sorted(self.state())
        if sorted(state) != own:
            raise DataError(
                f"The data were a source with states of {sorted(state)} and are one with states of {own}: give the same kind of "
                f"data to go on."
            )

    def first(self) -> Batch:
        """Return the first batch, in the given order."""
        with preserved_rng():  # a DataLoader draws a seed whenever it is asked for batches
            batch = next(iter(self.batches()), None)
        if batch is None or batch.rows == 0:
            raise DataError("The data are empty: expected at least one row.")
        return batch

    def whole(self) -> Batch | None:
        """Return all rows as one batch, where they are in memory."""
        return None


def as_batch(data: Any) -> Batch:
    """Turn one batch in any form to arguments; numpy arrays become tensors that share their memory.

    Raises:
        DataError: If an item is neither a tensor nor an array of numbers, or a mapping's key is no name.
    """
    if isinstance(data, Mapping):
        if strange := [name for name in data if not isinstance(name, str)]:
            raise DataError(
                f"A mapping holds the model's keyword arguments by their names, got the key {strange[0]!r}."
            )
        return Batch((), {name: _as_tensor(name, item) for name, item in data.items()})
    if isinstance(data, (tuple, list)):
        return Batch(tuple(_as_tensor(index, item) for index, item in enumerate(data)), {})
    return Batch((_as_tensor(0, data),), {})


def _as_tensor(name: int | str, item: Any) -> Tensor:
    if isinstance(item, Tensor):
        check_dense(item, f"argument {name}")
        return item.detach()  # data are constants: a graph behind them would be walked, and consumed, at each step
    if isinstance(item, np.ndarray):
        return to_tensor(item, f"argument {name}")
    raise DataError(
        f"Expected a tensor or a numpy array for argument {name}, got {type(item).__name__}. Bind constants to the model with "
        f"functools.partial."
    )


def check_lengths(batch: Batch) -> None:
    """Refuse tensors that have rows, but not the same number of them.

    Raises:
        DataError: With the lengths.
    """
    named = [*enumerate(batch.args), *batch.kwargs.items()]
    lengths = {name: len(item) for name, item in named if isinstance(item, Tensor) and item.dim() > 0}
    if len(set(lengths.values())) > 1:
        raise DataError(f"Every tensor has rows on axis 0 and as many of them, got lengths {lengths}.")


def describe(batch: Batch) -> list[list[Any]]:
    """Return name (``None`` by position), type and shape of every tensor of a batch, as JSON values."""
    named = [*((None, item) for item in batch.args), *batch.kwargs.items()]
    return [
        [name, str(item.dtype).removeprefix("torch."), list(item.shape)]
        for name, item in named
        if isinstance(item, Tensor)
    ]


def check_batch(batch: Batch) -> None:
    """Refuse a batch without rows, or with tensors that differ in their number.

    Raises:
        DataError: With what came.
    """
    check_lengths(batch)
    if batch.rows == 0:
        raise DataError(
            f"The batch has no rows: expected at least one, got ({describe_batch(batch.args, batch.kwargs)})."
        )


def check_skip(skip: int, source: BatchSource) -> None:
    """Refuse to pass over batches that are not there, or that come from elsewhere.

    Raises:
        SettingError: Saying which.
    """
    if skip and not source.can_skip:
        raise SettingError(
            f"A given DataLoader or a stream has an order of its own, so that its first {skip} batches can't be passed over "
            f"without loading them: begin at an epoch's beginning, or give a Dataset with batch_size=."
        )
    count = source.num_batches()
    if skip < 0 or (count is not None and skip > count):
        raise SettingError(f"skip must lie between 0 and the number of batches in an epoch, {count}; got {skip}.")
