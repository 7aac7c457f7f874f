"""What a recorded graph takes for granted about modules, and whether it still holds."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_aevb.program.reach import modules_below

__all__ = ["Unchanged", "module_hooks"]


def module_hooks(module: nn.Module) -> list[dict[int, Any]]:
    """Return what a module calls before and after it runs, forward and backward."""
    return [module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks]


class Unchanged:
    """Modules as they are now: their parts, modes and hooks, their tensors with their layouts, and which of these are trained.

    A graph holds the tensors and the mode that modules had when it was recorded. Python numbers are in it too, and can't be
    watched: whoever runs a graph for long compares it with an eager run now and then.

    Args:
        modules: The modules, with all that they hold.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        every = modules_below(modules)
        self.modes = [(module, module.training) for module in every]
        held = [place for module in every for place in (module._modules, module._parameters, module._buffers)]
        self.items: list[tuple[dict[str, Any], dict[str, Any]]] = [(place, dict(place)) for place in held if place]
        parameters = {id(item): item for module in every for item in module._parameters.values() if item is not None}
        self.trained = [(item, item.requires_grad) for item in parameters.values()]
        buffers = {id(item): item for module in every for item in module._buffers.values() if item is not None}
        tensors = [item for item in (*parameters.values(), *buffers.values()) if not is_lazy(item)]
        self.hooks = [hooks for module in every for hooks in module_hooks(module)]
        self.num_hooks = list(map(len, self.hooks))
        self.layouts = [(item, item.data_ptr(), _layout(item)) for item in tensors]

    @property
    def holds(self) -> bool:
        """Whether all is as it was."""
        return (
            all(module.training == mode for module, mode in self.modes)
            and all(len(place) == len(items) for place, items in self.items)
            and all(place.get(name) is item for place, items in self.items for name, item in items.items())
            and all(item.requires_grad == is_trained for item, is_trained in self.trained)
            and list(map(len, self.hooks)) == self.num_hooks
            # a tensor that was converted or moved in place, as module.to does, lies elsewhere
            and all(item.data_ptr() == place or _layout(item) == layout for item, place, layout in self.layouts)
        )


def _layout(item: Tensor) -> tuple[Any, ...]:
    return item.shape, item.stride(), item.dtype, item.device
