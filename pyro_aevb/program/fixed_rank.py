"""Networks whose tensors have a fixed rank (convolutions, BatchNorm, recurrent ones, attention) see particles as more rows."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

__all__ = ["Ranks", "flattened", "module_ranks"]

Ranks: TypeAlias = dict[nn.Module, dict[str, Any]]
"""For each module of fixed rank and each argument, the rank of the tensor or of the tensors in a tuple."""

_ATTENTION = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)

_FIXED_RANK = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Flatten,
    nn.Unflatten,
    nn.Fold,
    nn.Unfold,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Softmax2d,
    *_ATTENTION,
)


def module_ranks(modules: list[nn.Module], run: Callable[[], Any]) -> Ranks:
    """Run a program without particles and return the ranks of the tensors that modules of fixed rank are called with."""
    ranks: Ranks = {}
    fixed = [module for root in modules for module in root.modules() if _has_fixed_rank(module)]

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        ranks[module] = {name: tree_map_only(Tensor, Tensor.dim, value) for name, value in given.items()}

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in fixed]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return ranks


def _has_fixed_rank(module: nn.Module) -> bool:
    # elementwise dropout is filed among those of whole channels
    return isinstance(module, _FIXED_RANK) and type(module) is not nn.Dropout


@contextmanager
def flattened(ranks: Ranks) -> Iterator[None]:
    """Let modules of fixed rank see particles as rows: leading axes are flattened before and restored after each call."""
    handles: list[RemovableHandle] = []
    try:
        for module, expected in ranks.items():
            hook = _Flatten(module, expected)
            handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
            handles.append(module.register_forward_hook(hook.after))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Flatten:
    """Hooks of one module of fixed rank.

    The axes of particles lie left of the rows: first, or in recurrent states behind the layers.
    """

    def __init__(self, module: nn.Module, expected: dict[str, Any]) -> None:
        self.signature = inspect.signature(module.forward)
        self.expected = expected
        self.leading: list[torch.Size | None] = []

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Bring every argument to the same particles, and flatten these into the rows."""
        bound = self.signature.bind(*args, **kwargs)
        parts = [
            (tensor, rank, _rows_axis(module, name))
            for name, value in bound.arguments.items()
            for tensor, rank in _ranked(name, value, self.expected.get(name))
        ]
        if all(tensor.dim() <= rank for tensor, rank, _ in parts):
            self.leading.append(None)
            return None
        leading = torch.broadcast_shapes(*(_leading(*part) for part in parts))
        self.leading.append(leading)
        flat = {id(tensor): _flat(tensor, rank, axis, leading) for tensor, rank, axis in parts}
        for name, value in bound.arguments.items():
            bound.arguments[name] = tree_map_only(Tensor, lambda tensor: flat.get(id(tensor), tensor), value)
        return bound.args, bound.kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Restore the axes in every tensor of the output."""
        leading = self.leading.pop()
        if leading is None:
            return None
        if isinstance(module, nn.RNNBase):
            states = tree_map_only(Tensor, lambda state: state.unflatten(1, leading), output[1])
            return output[0].unflatten(_rows_axis(module, "input"), leading), states
        is_attention = isinstance(module, nn.MultiheadAttention)
        axis = _rows_axis(module, "output")
        if is_attention:  # the weights, where there are any, have their rows first
            attended, weights = output
            return attended.unflatten(axis, leading), None if weights is None else weights.unflatten(0, leading)
        return tree_map_only(Tensor, lambda tensor: tensor.unflatten(axis, leading), output)


def _ranked(name: str, value: Any, expected: Any) -> list[tuple[Tensor, int]]:
    """Pair the tensors of an argument with their ranks; masks of attention that have no rows are left out."""
    if expected is None or (name.endswith("mask") and "padding" not in name):
        return []
    pairs = zip(tree_leaves(value), tree_leaves(expected), strict=True)
    return [(tensor, rank) for tensor, rank in pairs if isinstance(tensor, Tensor)]


def _rows_axis(module: nn.Module, name: str) -> int:
    """Return the axis of the rows in an argument."""
    if isinstance(module, nn.RNNBase):
        return int(name == "hx" or not module.batch_first)
    if isinstance(module, _ATTENTION) and "padding" not in name:
        attention = next(inner for inner in module.modules() if isinstance(inner, nn.MultiheadAttention))
        return int(not attention.batch_first)
    return 0


def _leading(tensor: Tensor, rank: int, axis: int) -> torch.Size:
    """Return the sizes of particles and rows."""
    return tensor.shape[axis : axis + max(tensor.dim() - rank, 0) + 1]


def _flat(tensor: Tensor, rank: int, axis: int, leading: torch.Size) -> Tensor:
    """Expand a tensor to all particles, and flatten them into the rows."""
    own = _leading(tensor, rank, axis)
    before, behind = tensor.shape[:axis], tensor.shape[axis + len(own) :]
    full = tensor.reshape(*before, *(1,) * (len(leading) - len(own)), *own, *behind).expand(*before, *leading, *behind)
    return full.flatten(axis, axis + len(leading) - 1)
