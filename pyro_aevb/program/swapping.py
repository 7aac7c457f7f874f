"""Other tensors in the place of those that modules hold, for the length of a block."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pyro_aevb.program.reach import modules_below

__all__ = ["swapped_buffers", "swapped_parameters"]


@contextmanager
def swapped_buffers(modules: Iterable[nn.Module], replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put other tensors in the place of modules' buffers; a buffer that two modules share is replaced in each."""
    every = modules_below(modules)
    saved = [dict(module._buffers) for module in every]
    try:
        for module in every:
            swapped = {name: item if item is None else replace(item) for name, item in module._buffers.items()}
            module._buffers.update(swapped)
        yield
    finally:
        for module, buffers in zip(every, saved, strict=True):
            module._buffers.update(buffers)


@contextmanager
def swapped_parameters(modules: Iterable[nn.Module], replace: Callable[[nn.Parameter], Tensor]) -> Iterator[None]:
    """Put other tensors in the place of modules' parameters.

    ``torch.func.functional_call`` does not serve: it loses the parameters of a module that is registered under two names.

    Args:
        modules: The modules, with all that they hold.
        replace: From a parameter to what stands in its place; called once for each parameter.
    """
    every = modules_below(modules)
    saved = [dict(module._parameters) for module in every]
    others = {id(item): replace(item) for held in saved for item in held.values() if item is not None}
    try:
        for module, held in zip(every, saved, strict=True):
            swapped: Any = {name: item if item is None else others[id(item)] for name, item in held.items()}
            module._parameters.update(swapped)
        yield
    finally:
        for module, held in zip(every, saved, strict=True):
            module._parameters.update(held)
