"""Simulated observations go back into a batch through the door that they came from."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

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

__all__ = ["Door", "ToBatch", "check_to_batch", "find_doors", "through_doors", "write_observations"]

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
    doors = find_doors(model, args, kwargs, values, structure=structure or read_structure(model, args, kwargs))
    return through_doors(doors, args, kwargs, values)


class Door(NamedTuple):
    """The view of an argument that a site observes.

    Attributes:
        argument: Number of the tensor among those of the batch.
        shape: Sizes of the view.
        stride: Strides of the view.
        offset: Where it begins.
        plates: Sizes of the site's plates, where they are.
        event: Sizes of the site's event.
        rows_dim: Dimension of the data plate, from the right; ``None`` outside it.
    """

    argument: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    plates: tuple[int, ...]
    event: tuple[int, ...]
    rows_dim: int | None


def find_doors(
    model: PyroProgram, args: Args, kwargs: Kwargs, names: Collection[str], *, structure: Structure
) -> dict[str, Door]:
    """Run a model once on copies of a batch, and find the views of it that sites observe.

    The views are the same for every batch of these shapes, strides and constants, unless the model chooses them by values.

    Args:
        model: The model.
        args: A batch of the model, as positional arguments.
        kwargs: The same, as keyword arguments.
        names: The sites to be written; sites that the model does not observe are ignored.
        structure: The model's structure.

    Raises:
        ModelError: As :func:`write_observations`.
    """
    (new_args, new_kwargs), copies = _copied(args, kwargs)
    with preserved_state(find_modules(model)), torch.no_grad(), explained("model", args, kwargs):
        nodes = sample_sites(poutine.trace(model).get_trace(*new_args, **new_kwargs))
    places = {copy.untyped_storage().data_ptr(): number for number, copy in enumerate(copies) if copy.numel()}
    written = [torch.zeros_like(copy, dtype=torch.bool) for copy in copies]
    doors = {}
    for name, node in nodes.items():
        if node["is_observed"] and name in names:
            observed = node["value"]
            argument = _argument(name, observed, places, copies)
            dim = structure.data_dim if structure.sites[name].is_local else None
            batch, event = tuple(node["fn"].batch_shape), tuple(node["fn"].event_shape)
            view = tuple(observed.shape), observed.stride(), int(observed.storage_offset())
            doors[name] = Door(argument, *view, batch, event, dim)
            _mark(name, _through(doors[name], written[argument]))
    return doors


def through_doors(doors: Mapping[str, Door], args: Args, kwargs: Kwargs, values: Values) -> tuple[Args, dict[str, Any]]:
    """Return a batch with values in the place of what sites observe; its tensors share no memory with the given ones.

    Args:
        doors: Views of a batch of the same shapes and strides.
        args: The batch, as positional arguments.
        kwargs: The same, as keyword arguments.
        values: Values by site, ``[rows, inner plates, *event]``.

    Raises:
        ModelError: If a value has another shape than what the site observes.
    """
    batch, copies = _copied(args, kwargs)
    for name, door in doors.items():
        _through(door, copies[door.argument]).copy_(_as_observed(name, door, values[name]))
    return batch


def _copied(args: Args, kwargs: Kwargs) -> tuple[tuple[Args, dict[str, Any]], list[Tensor]]:
    """Copy a batch, a tensor that is in it twice but once, and list the copies."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone(memory_format=torch.contiguous_format)
        return copies[id(tensor)]

    batch = tree_map_only(Tensor, copy, (tuple(args), dict(kwargs)))
    return batch, list(copies.values())


def _checked(batch: Any) -> tuple[Args, dict[str, Any]]:
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], Mapping):
        return batch[0], dict(batch[1])
    raise SettingError(
        f"to_batch must return the new batch as (args, kwargs), a tuple and a dictionary; got {type(batch).__name__}. Write "
        f"'return (x,), {{}}' for a model that takes one tensor."
    )


def _argument(name: str, observed: Any, places: dict[int, int], copies: list[Tensor]) -> int:
    """Return the number of the tensor that an observed value is a view of."""
    is_view = isinstance(observed, Tensor) and observed.numel() > 0
    key = observed.untyped_storage().data_ptr() if is_view else 0
    if key in places and copies[places[key]].dtype == observed.dtype and not _repeats(observed):
        return places[key]
    raise ModelError(
        f"The value observed at site {name!r} is not a view of an argument of the model, such as x, x[:, t] or x.view(...): it is "
        f"indexed by a tensor, computed, cast or repeated, so a simulated value can't be written back. Give to_batch=, a function "
        f"of (values, args, kwargs) that returns the new (args, kwargs).",
        site=name,
    )


def _repeats(view: Tensor) -> bool:
    """Tell whether a view shows one entry several times."""
    return any(stride == 0 and size > 1 for size, stride in zip(view.shape, view.stride(), strict=True))


def _as_observed(name: str, door: Door, value: Tensor) -> Tensor:
    """Lay a value ``[rows, inner plates, *event]`` out as the model observes it, plates where they are."""
    plates = list(door.plates)
    if door.rows_dim is not None:
        plates.insert(0, plates.pop(door.rows_dim))
    if value.numel() != math.prod(door.shape) or _without_ones(value.shape) != _without_ones((*plates, *door.event)):
        raise ModelError(
            f"The value for site {name!r} has shape {list(value.shape)}, expected {[*plates, *door.event]}, and what the "
            f"model observes there has {list(door.shape)}. Give one value for each observed entry, or to_batch=.",
            site=name,
        )
    value = value.reshape(*plates, *door.event)
    if door.rows_dim is not None:
        value = value.movedim(0, len(plates) + door.rows_dim)
    return value.reshape(door.shape)


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size > 1]


def _through(door: Door, tensor: Tensor) -> Tensor:
    """Return a door's view of a tensor of the batch's layout."""
    return torch.as_strided(tensor, door.shape, door.stride, door.offset)


def _mark(name: str, written: Tensor) -> None:
    if bool(written.any()):
        raise ModelError(
            f"Site {name!r} observes entries that another site observes too, so that no batch holds both simulated values. Give "
            f"to_batch=.",
            site=name,
        )
    written.fill_(True)
