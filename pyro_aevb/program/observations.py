"""Simulated observations go back into a batch through the door that they came from."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import ModelError, SettingError
from pyro_aevb.program.batch import explained
from pyro_aevb.program.parameters import preserved_state
from pyro_aevb.program.reach import find_modules
from pyro_aevb.program.sites import sample_sites
from pyro_aevb.program.structure import Structure, read_structure

__all__ = ["ToBatch", "check_to_batch", "write_observations"]

ToBatch: TypeAlias = Callable[[Values, Args, Kwargs], tuple[Args, dict[str, Any]]]
"""Puts observed values into a batch: from ``(values, args, kwargs)`` to new ``(args, kwargs)``."""


def check_to_batch(to_batch: ToBatch | None) -> None:
    """Refuse what is neither ``None`` nor a function.

    Raises:
        SettingError: Naming what came.
    """
    if to_batch is not None and not callable(to_batch):
        raise SettingError(
            f"to_batch must be a function of (values, args, kwargs) that returns the new (args, kwargs), got {to_batch!r}."
        )


def write_observations(
    model: PyroProgram,
    args: Args,
    kwargs: Kwargs,
    values: Values,
    *,
    structure: Structure | None = None,
    to_batch: ToBatch | None = None,
) -> tuple[Args, dict[str, Any]]:
    """Return a batch under which the model observes given values.

    The model runs once on copies of the batch's tensors. An observed value that is a view of one of them (the whole tensor,
    ``x[:, t]``, ``x.view(...)``) is written through that view. Everything else in the batch stays as it was.

    Args:
        model: The model.
        args: A batch of the model, as positional arguments.
        kwargs: The same, as keyword arguments.
        values: Values by site, ``[rows, inner plates, *event]`` as :func:`pyro_aevb.prediction.simulate` returns them; sites
            that the model does not observe are ignored, observed sites that are missing keep the batch's value.
        structure: The model's structure, if it was read before.
        to_batch: Does the job instead, for observations that are computed from the batch.

    Returns:
        The new batch, as positional and keyword arguments. Its tensors share no memory with the given ones.

    Raises:
        ModelError: If an observed value is no view of an argument, if two sites observe the same entries, or if a value has
            another shape than what the site observes.
        SettingError: If ``to_batch`` is no function, or does not return a pair of a tuple and a dictionary.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         for t in range(2):
        ...             pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0), obs=x[:, t])
        >>> args, kwargs = write_observations(model, (torch.zeros(3, 2),), {}, {"x_1": torch.ones(3)})
        >>> args[0][0]
        tensor([0., 1.])
    """
    check_to_batch(to_batch)
    if to_batch is not None:
        return _checked(to_batch(values, args, kwargs))
    structure = structure or read_structure(model, args, kwargs)
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        fresh = tensor.detach().clone(memory_format=torch.contiguous_format)
        return copies.setdefault(id(tensor), fresh)

    new_args, new_kwargs = tree_map_only(Tensor, copy, (tuple(args), dict(kwargs)))
    with preserved_state(find_modules(model)), torch.no_grad(), explained("model", args, kwargs):
        nodes = sample_sites(poutine.trace(model).get_trace(*new_args, **new_kwargs))
    doors = {tensor.untyped_storage().data_ptr(): tensor for tensor in copies.values() if tensor.numel()}
    written = {key: torch.zeros_like(tensor, dtype=torch.bool) for key, tensor in doors.items()}
    for name, node in nodes.items():
        if node["is_observed"] and name in values:
            key = _door(name, node["value"], doors)
            _through(node["value"], doors[key]).copy_(_as_observed(node, values[name], structure))
            _mark(name, _through(node["value"], written[key]))
    return new_args, new_kwargs


def _checked(batch: Any) -> tuple[Args, dict[str, Any]]:
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], Mapping):
        return batch[0], dict(batch[1])
    raise SettingError(
        f"to_batch must return the new batch as (args, kwargs), a tuple and a dictionary; got {type(batch).__name__}. Write "
        f"'return (x,), {{}}' for a model that takes one tensor."
    )


def _door(name: str, observed: Any, doors: dict[int, Tensor]) -> int:
    """Return the storage of the argument that an observed value is a view of."""
    is_view = isinstance(observed, Tensor) and observed.numel() > 0
    key = observed.untyped_storage().data_ptr() if is_view else 0
    if key in doors and doors[key].dtype == observed.dtype and not _repeats(observed):
        return key
    raise ModelError(
        f"The value observed at site {name!r} is not a view of an argument of the model, such as x, x[:, t] or x.view(...): it is "
        f"indexed by a tensor, computed, cast or repeated, so a simulated value can't be written back. Give to_batch=, a function "
        f"of (values, args, kwargs) that returns the new (args, kwargs).",
        site=name,
    )


def _repeats(view: Tensor) -> bool:
    """Tell whether a view shows one entry several times."""
    return any(stride == 0 and size > 1 for size, stride in zip(view.shape, view.stride(), strict=True))


def _as_observed(node: dict[str, Any], value: Tensor, structure: Structure) -> Tensor:
    """Lay a value ``[rows, inner plates, *event]`` out as the model observes it, plates where they are."""
    name, fn, observed = node["name"], node["fn"], node["value"]
    plates, dim = list(fn.batch_shape), structure.data_dim
    if structure.sites[name].is_local and dim is not None:
        plates.insert(0, plates.pop(dim))
    if value.numel() != observed.numel() or _without_ones(value.shape) != _without_ones((*plates, *fn.event_shape)):
        raise ModelError(
            f"The value for site {name!r} has shape {list(value.shape)}, expected {[*plates, *fn.event_shape]}, and what the "
            f"model observes there has {list(observed.shape)}. Give one value for each observed entry, or to_batch=.",
            site=name,
        )
    value = value.reshape(*plates, *fn.event_shape)
    if structure.sites[name].is_local and dim is not None:
        value = value.movedim(0, len(plates) + dim)
    return value.reshape(observed.shape)


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size > 1]


def _through(view: Tensor, tensor: Tensor) -> Tensor:
    """Return the same view of another tensor of the same layout."""
    return torch.as_strided(tensor, view.shape, view.stride(), view.storage_offset())


def _mark(name: str, written: Tensor) -> None:
    if bool(written.any()):
        raise ModelError(
            f"Site {name!r} observes entries that another site observes too, so that no batch holds both simulated values. Give "
            f"to_batch=.",
            site=name,
        )
    written.fill_(True)
