"""The size of the whole data set reaches a program's data plate, also where several processes share a batch."""

from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

__all__ = ["DataPlateScale", "Shard"]


@dataclass(frozen=True)
class Shard:
    """The rows of a batch that one of several processes has.

    Attributes:
        rows: How many of them count: 0 where the process has none, and runs on a row that stands in.
        batch_rows: Rows of the whole batch, over all processes.
        num_processes: Processes that share it.
    """

    rows: int
    batch_rows: int
    num_processes: int

    @property
    def share(self) -> float:
        """Rows of this process over the mean number of rows of a process; those of a stand-in count as one."""
        return max(self.rows, 1) * self.num_processes / self.batch_rows


class DataPlateScale(Messenger):
    r"""Give a data plate that knows only its batch the size of the whole data set.

    Sites in the plate get the scale num_data / rows (arXiv 1312.6114, Eq 8). A plate that is sized or subsampled by the model,
    ``pyro.plate("data", 60_000, subsample_size=len(x))``, is left alone: it has its scale already.

    Where W processes share a batch of B rows and the loss is the mean of theirs, every row has to count alike, whatever part of
    the batch its process has: the scale is num_data W / B on each of them, for a sized plate too, and without ``num_data`` W, as
    if the batch were all data. Rows that stand in are masked.

    Args:
        data_plate: Name of the plate whose indices are rows; ``None`` leaves everything alone.
        num_data: Rows of the whole data set; ``None`` leaves everything alone. As a tensor, which a recording reads, it gets into
            the plate's frame alone: whoever weighs a site finds there that its own scale is without it.
        shard: The rows of this process in a batch that several share; ``None`` for a batch of its own.
    """

    def __init__(self, data_plate: str | None, num_data: int | Tensor | None, shard: Shard | None = None) -> None:
        super().__init__()
        self.data_plate = data_plate
        self.num_data = num_data
        self.shard = shard

    def _pyro_sample(self, message: Message) -> None:
        if self.data_plate is None or (self.num_data is None and self.shard is None):
            return
        stack = message["cond_indep_stack"]
        for index, frame in enumerate(stack):
            if frame.name != self.data_plate:
                continue
            own = frame.full_size or frame.size
            if own != frame.size and self.shard is None:
                continue
            represented: Any = self._represented(own if own != frame.size else None)
            if not isinstance(represented, Tensor):
                message["scale"] = message["scale"] * (represented / own)
            message["cond_indep_stack"] = (*stack[:index], frame._replace(full_size=represented), *stack[index + 1 :])
            if self.shard is not None and self.shard.rows == 0:
                _mask(message)

    def _represented(self, full_size: int | None) -> float | int | Tensor:
        """Return how many rows of the data set the plate's rows stand for."""
        # a recording can't ask a tensor whether it is 0
        num_data = self.num_data if isinstance(self.num_data, Tensor) else self.num_data or 0
        if self.shard is None:
            return num_data
        if isinstance(num_data, Tensor) and not full_size:
            return num_data * self.shard.share
        return (full_size or num_data or self.shard.batch_rows) * self.shard.share


def _mask(message: Message) -> None:
    """Let a site count for nothing, by a tensor: parameters keep gradients, of 0, which other processes wait for."""
    nothing = torch.tensor(False)
    mask = message["mask"]
    message["mask"] = nothing if mask is None else nothing & torch.as_tensor(mask)
