"""Networks whose tensors have a fixed rank (convolutions, BatchNorm, recurrent ones) see particles as more rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["flattened", "module_ranks"]

_FIXED_RANK = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.Flatten,
    nn.Unflatten,
    nn.Upsample,
    nn.PixelShuffle,
)


def module_ranks(modules: list[nn.Module], run: Callable[[], Any]) -> dict[nn.Module, tuple[int, ...]]:
    """Run a program without particles and return the ranks of the tensors that modules of fixed rank are called with."""
    ranks: dict[nn.Module, tuple[int, ...]] = {}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        ranks[module] = tuple(item.dim() for item in args if isinstance(item, Tensor))

    fixed = [module for root in modules for module in root.modules() if isinstance(module, _FIXED_RANK)]
    handles = [module.register_forward_pre_hook(record) for module in fixed]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return ranks


@contextmanager
def flattened(ranks: dict[nn.Module, tuple[int, ...]]) -> Iterator[None]:
    """Let modules of fixed rank see particles as rows: leading axes are flattened before and restored after each call."""
    handles: list[RemovableHandle] = []
    try:
        for module, expected in ranks.items():
            hook = _Flatten(expected)
            handles += [module.register_forward_pre_hook(hook.before), module.register_forward_hook(hook.after)]
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Flatten:
    """Hooks of one module of fixed rank."""

    def __init__(self, expected: tuple[int, ...]) -> None:
        self.expected = expected
        self.leading: list[torch.Size | None] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Flatten the axes left of the expected rank into the rows."""
        extra = args[0].dim() - self.expected[0] if args and self.expected else 0
        self.leading.append(args[0].shape[: extra + 1] if extra > 0 else None)
        if extra <= 0:
            return None
        flat = [args[0].flatten(0, extra)]
        for item, rank in zip(args[1:], self.expected[1:], strict=False):
            flat.append(self._flatten_other(item, rank, is_state=isinstance(module, nn.RNNBase)))
        return tuple(flat)

    def _flatten_other(self, item: Tensor, rank: int, *, is_state: bool) -> Tensor:
        """Flatten a further argument; a recurrent state has its layers before its rows."""
        leading = self.leading[-1]
        first = int(is_state)
        if item.dim() == rank and leading is not None:
            item = item.reshape(item.shape[:first] + (1,) * (len(leading) - 1) + item.shape[first:])
            item = item.expand(*item.shape[:first], *leading, *item.shape[first + len(leading) :])
        return item.flatten(first, first + item.dim() - rank)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Restore the axes in every tensor of the output."""
        leading = self.leading.pop()
        if leading is None:
            return None
        if isinstance(module, nn.RNNBase):
            states = output[1] if isinstance(output[1], tuple) else (output[1],)
            restored = tuple(state.unflatten(1, leading) for state in states)
            return output[0].unflatten(0, leading), restored if isinstance(output[1], tuple) else restored[0]
        if isinstance(output, tuple):
            return tuple(item.unflatten(0, leading) if isinstance(item, Tensor) else item for item in output)
        return output.unflatten(0, leading)
