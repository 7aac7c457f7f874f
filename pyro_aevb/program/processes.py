"""The processes that a program runs in: what they share, what each has for itself, and what happens when one of them ends.

All talk goes through Lightning Fabric and ``torch.distributed``. What is called here has to be called by all of them, in one order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pyro_aevb.errors import ProcessError, SettingError
from pyro_aevb.randomness import check_seed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Processes", "fork_seed", "launched"]

T = TypeVar("T")

_LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "connection refused", "nccl", "gloo")
"""What backends say when another process does not answer, in lower case."""
_STRIDE = 0x9E3779B97F4A7C15
"""The golden ratio in 64 bits, as in SplitMix (Steele et al. 2014)."""


def fork_seed(seed: int, number: int) -> int:
    """Return a seed of torch's own for one of several parts of what is drawn under a seed."""
    return (seed + number * _STRIDE) % 2**63


def launched(fabric: "Fabric | None") -> "Fabric | None":
    """Start the processes of a Fabric that has not started them yet, as ``fabric.launch()`` does.

    Raises:
        SettingError: If it is no Fabric, or one whose processes do not each run the script with all parameters.
    """
    if fabric is None:
        return None
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.strategies.single_device import SingleDeviceStrategy

    if not isinstance(fabric, Fabric):
        raise SettingError(
            f"fabric must be a Fabric of lightning_fabric, Fabric(accelerator=..., devices=..., strategy='ddp'), got {fabric!r}."
        )
    strategy = fabric.strategy
    is_forked = isinstance(strategy, DDPStrategy) and getattr(strategy, "_start_method", "popen") != "popen"
    if is_forked or not isinstance(strategy, (DDPStrategy, SingleDeviceStrategy)):
        raise SettingError(
            f"fabric has the strategy {type(strategy).__name__}{' in forked processes' if is_forked else ''}; what is known to "
            f"work is one process, or strategy='ddp', whose processes each run the script and hold all parameters."
        )
    if isinstance(strategy, DDPStrategy) and not fabric._launched:  # one process alone has a group of processes too
        fabric.launch()
    return fabric


class Processes:
    """The processes of a Fabric, as seen from one of them; without a Fabric there is one.

    Args:
        fabric: A Fabric; its processes are started if they are not yet.

    Raises:
        SettingError: If it is none, or has a strategy that is not known to work.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.

    Example:
        >>> processes = Processes(None)
        >>> processes.count, processes.is_first, processes.gather(["a", "b"])
        (1, True, ['a', 'b'])
    """

    def __init__(self, fabric: "Fabric | None") -> None:
        self.fabric = launched(fabric)
        self.rank = 0 if fabric is None else fabric.global_rank
        self.count = 1 if fabric is None else fabric.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def agree_on_seed(self, seed: int | None) -> int | None:
        """Return one seed for all processes: the given one, else a number that the first draws.

        Raises:
            SettingError: If it is no seed.
        """
        check_seed(seed)
        if self.count == 1 or seed is not None:
            return seed
        return self.share(int(torch.randint(2**31, ())))

    def draw_apart(self) -> None:
        """Let each process draw its own numbers from here on: those of a seed that the first draws, and of the rank."""
        if self.count > 1:
            torch.manual_seed(fork_seed(self.share(int(torch.randint(2**62, ()))), self.rank + 1))

    def share(self, value: T) -> T:
        """Return the first process's value, in all of them."""
        if self.count == 1:
            return value
        fabric: Any = self.fabric
        with self.watching():
            return fabric.broadcast(value)

    def follow_first(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors the values that they have in the first process."""
        with self.watching(), torch.no_grad():
            for tensor in tensors:
                value = tensor.contiguous()
                torch.distributed.broadcast(value, 0)
                tensor.copy_(value)

    def total(self, *numbers: float | int) -> list[Any]:
        """Return sums over all processes, in float64."""
        if self.count == 1:
            return list(numbers)
        fabric: Any = self.fabric
        is_apple = fabric.device.type == "mps"  # which has no float64
        sums = torch.tensor(numbers, dtype=torch.float32 if is_apple else torch.float64, device=fabric.device)
        with self.watching():
            torch.distributed.all_reduce(sums)  # Fabric's own waits at a barrier first, which doubles the time
        return sums.tolist()

    def any(self, *, is_true: bool) -> bool:
        """Tell whether something is true of any process."""
        return self.total(float(is_true))[0] > 0

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's run of items; the runs of all, in the order of ranks, are the items."""
        start, stop = self.bounds(len(items))
        return items[start:stop]

    def bounds(self, count: int) -> tuple[int, int]:
        """Return where this process's part of so many items begins and ends: parts differ by one at most, longer ones first."""
        size, longer = divmod(count, self.count)
        start = self.rank * size + min(self.rank, longer)
        return start, start + size + (self.rank < longer)

    def gather(self, items: Sequence[T]) -> list[T]:
        """Return the items of all processes, in the order of ranks, on each of them; what was on a device comes to its own."""
        if self.count == 1:
            return list(items)
        fabric: Any = self.fabric
        every: list[Any] = [None] * self.count
        with self.watching():
            torch.distributed.all_gather_object(every, _packed(list(items)))
        return [item for part, are_away in every for item in _unpacked(part, are_away, fabric.device)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn what a backend says when another process is gone into an error that says so.

        Raises:
            ProcessError: If one is.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            is_lost = isinstance(error, torch.distributed.DistError) or any(word in text.lower() for word in _LOST)
            if self.count == 1 or not is_lost:
                raise
            raise ProcessError(
                f"Process {self.rank} of {self.count} waited for another that has ended, or did not answer within the process "
                f"group's timeout: {text.splitlines()[0][:300]}. Look at the other processes' errors, start all again, and "
                f"continue from a checkpoint."
            ) from error


def _packed(items: list[Any]) -> tuple[list[Any], list[bool]]:
    """Put tensors on the host, as one on a GPU would be unpacked on the sender's; tell which were elsewhere."""
    are_away: list[bool] = []

    def pack(tensor: Tensor) -> Tensor:
        are_away.append(tensor.device.type != "cpu")
        return tensor.detach().cpu().clone()  # a view would bring all that it is a part of

    return _mapped(items, pack), are_away


def _unpacked(items: list[Any], are_away: list[bool], device: torch.device) -> list[Any]:
    """Put tensors that were not on the host on a device."""
    pending = iter(are_away)
    return _mapped(items, lambda tensor: tensor.to(device) if next(pending) else tensor)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor in a value, in one order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_mapped(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{entry.name: _mapped(getattr(value, entry.name), change) for entry in fields(value)})
    return value
