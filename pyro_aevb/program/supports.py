"""Data outside the support of their likelihood, where the likelihood checks its values: a density of them is a wrong number."""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.distributions import Independent, constraints
from torch.distributions.constraints import Constraint

from pyro_aevb._types import Args, Kwargs, PyroProgram, SiteDistribution
from pyro_aevb.errors import AEVBError, DataError
from pyro_aevb.program.batch import batch_rows, take_rows
from pyro_aevb.program.parameters import preserved_state
from pyro_aevb.program.reach import find_modules
from pyro_aevb.program.sites import plain_support, unmasked_value, value_mask
from pyro_aevb.program.structure import Structure

__all__ = ["BatchSupports", "Inside", "check_supports"]

_SHOWN = 5
"""Rows that a message lists."""
_ROWS_PER_RUN = 10_000
_FEW_ROWS = 100
"""Rows that tell which arguments a model observes as they are."""


def check_supports(model: PyroProgram, structure: Structure, args: Args, kwargs: Kwargs) -> None:
    """Refuse observed data outside supports that do not depend on latents; a model whose likelihoods take any number is not run.

    Latents are drawn from the prior, and the state of everything is left as it was. A model that takes these rows in no such
    parts, or draws its own, is not asked.

    Args:
        model: The model.
        structure: Its structure.
        args: All rows, as positional arguments.
        kwargs: All rows, as keyword arguments.

    Raises:
        DataError: Naming the site and the first such rows.
    """
    count = batch_rows(args, kwargs) or 1
    if not _is_restricted(structure) or (count > _FEW_ROWS and _is_clear(model, structure, args, kwargs)):
        return
    size = count if structure.data_plate is None else _ROWS_PER_RUN
    for start in range(0, count, size):
        inside = Inside(structure.data_dim, start)
        part = (args, kwargs) if size >= count else take_rows(args, kwargs, slice(start, start + size))
        if not _run(model, inside, *part):
            return  # runs that follow say what is wrong


def _is_clear(model: PyroProgram, structure: Structure, args: Args, kwargs: Kwargs) -> bool:
    """Tell from a run of a few rows, and a look at the arguments that it observes, that nothing in any row is outside."""
    if structure.data_plate is None:
        return False
    few, inside = take_rows(args, kwargs, slice(0, _FEW_ROWS)), Inside(structure.data_dim, 0)
    try:
        observed = inside.find_arguments(_by_name(*few)) if _run(model, inside, *few) else None
    except DataError:
        return False
    return observed is not None and _hold(_by_name(args, kwargs), observed)


def _by_name(args: Args, kwargs: Kwargs) -> dict[int | str, Any]:
    return dict([*enumerate(args), *kwargs.items()])


def _hold(arguments: Mapping[int | str, Any], observed: list[tuple[int | str, Constraint]]) -> bool:
    """Tell whether arguments lie inside of the supports that they are observed under."""
    values = [(arguments.get(name), support) for name, support in observed]
    return all(isinstance(value, Tensor) and bool(support.check(value).all()) for value, support in values)


def _is_restricted(structure: Structure) -> bool:
    """Tell whether any data can be outside a support, and be found there."""
    is_any = any(not _takes_all(site.support) for site in structure.select("observed"))
    return is_any and not structure.draws_own_rows


def _run(model: PyroProgram, inside: "Inside", args: Args, kwargs: Kwargs) -> bool:
    """Run a model with latents from its prior; tell whether it ran to its end, and raise what was found outside."""
    is_whole = False
    try:
        with preserved_state(find_modules(model)), torch.enable_grad(), pyro.validation_enabled(True):
            with inside, _Latents():
                model(*args, **kwargs)
            is_whole = True
    except AEVBError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError):
        pass  # it may come after a value that is outside
    if inside.error is not None:
        raise inside.error
    return is_whole


class BatchSupports:
    """Batches on their way, held against supports as :func:`check_supports` does.

    Where a model observes its arguments as they are, and their supports are constants, batches after the first are compared with
    these alone; else the model runs on each.

    Args:
        model: The model.
        structure: Its structure.
    """

    def __init__(self, model: PyroProgram, structure: Structure) -> None:
        self.model, self.structure = model, structure
        self._is_needed = _is_restricted(structure)
        self._has_run = False
        self._observed: list[tuple[int | str, Constraint]] | None = None

    def check(self, args: Args, kwargs: Kwargs) -> None:
        """Refuse a batch with data outside a support.

        Raises:
            DataError: Naming the site and the first such rows.
        """
        if not self._is_needed:
            return
        named = _by_name(args, kwargs)
        if not self._has_run:
            inside = Inside(self.structure.data_dim, 0)
            if _run(self.model, inside, args, kwargs):
                self._has_run, self._observed = True, inside.find_arguments(named)
        elif self._observed is None or not _hold(named, self._observed):
            check_supports(self.model, self.structure, args, kwargs)


def _takes_all(support: Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


class _Latents(Messenger):
    """Let what is computed from latents tell so: they require a gradient."""

    def _pyro_post_sample(self, message: Message) -> None:
        value = message["value"]
        if not message["is_observed"] and isinstance(value, Tensor) and value.is_floating_point():
            message["value"] = value.detach().requires_grad_()


class Inside(Messenger):
    """Find observed values outside supports that do not depend on latents.

    Attributes:
        error: What is wrong at the first such site; raised here, Pyro's trace would put an error of its own in its place.
    """

    def __init__(self, data_dim: int | None, first_row: int) -> None:
        super().__init__()
        self.data_dim, self.first_row = data_dim, first_row
        self.error: DataError | None = None
        self._observed: list[tuple[Any, Constraint, bool]] = []

    def _pyro_post_sample(self, message: Message) -> None:
        fn: SiteDistribution = message["fn"]
        is_data = message["is_observed"] and type(fn).__name__ not in ("Unit", "_Subsample")
        if self.error is not None or not is_data or not _checks_values(fn):
            return
        support = plain_support(fn)
        if _is_computed(support):
            return
        self._observed.append((message["value"], support, _is_constant(support) and value_mask(dict(message)) is None))
        value: Any = unmasked_value(dict(message))
        outside = ~support.check(value.detach())
        # where NaN and infinity are, others look: they may be skipped
        outside &= _events(value.detach().isfinite(), outside.dim())
        if outside.any():
            self.error = DataError(
                f"The data observed at site {message['name']!r} lie outside the support {support} of its distribution"
                f"{self._where(outside, fn)}: the first such value is {_first_outside(value, outside)}. Change the data or the "
                f"likelihood (grey levels under a Bernoulli need validate_args=False).",
                site=message["name"],
            )

    def find_arguments(self, arguments: Mapping[Any, Any]) -> list[tuple[int | str, Constraint]] | None:
        """Return the arguments that were observed as they are, with constant supports; ``None`` if anything else was too."""
        found = [
            (next((name for name, item in arguments.items() if item is value), None), support, is_constant)
            for value, support, is_constant in self._observed
        ]
        named = [(name, support) for name, support, is_constant in found if name is not None and is_constant]
        return named if len(named) == len(found) else None

    def _where(self, outside: Tensor, fn: SiteDistribution) -> str:
        """List the first rows."""
        outside = outside.expand(torch.broadcast_shapes(outside.shape, fn.batch_shape))
        if self.data_dim is None or outside.dim() < -self.data_dim:
            return ""
        bad = outside.movedim(self.data_dim, 0).flatten(1).any(1) if outside.dim() > 1 else outside
        rows = (bad.nonzero()[:, 0] + self.first_row).tolist()
        return f" in {len(rows)} rows, {rows[:_SHOWN]} first" if len(rows) > _SHOWN else f" in rows {rows}"


def _events(finite: Tensor, dim: int) -> Tensor:
    """Tell which events are finite, of as many dimensions as a support's check has."""
    return finite.flatten(dim).all(-1) if finite.dim() > dim else finite


def _first_outside(value: Tensor, outside: Tensor) -> list[Any] | float:
    """Return the first event that is outside."""
    index = tuple(outside.nonzero()[0].tolist())
    return value.detach()[index].tolist()


def _checks_values(fn: SiteDistribution) -> bool:
    """Tell whether a distribution checks values, rather than was told not to."""
    while isinstance(fn, (Independent, MaskedDistribution, ExpandedDistribution)):
        fn = fn.base_dist
    return bool(fn._validate_args)


def _is_computed(support: Constraint) -> bool:
    """Tell whether a support depends on latents, so that a value outside it has density 0 and is no mistake."""
    return any(
        item.requires_grad if isinstance(item, Tensor) else isinstance(item, Constraint) and _is_computed(item)
        for item in vars(support).values()
    )


def _is_constant(support: Constraint) -> bool:
    """Tell whether a support depends on nothing, so that it is that of other batches too."""
    return all(
        _is_constant(item) if isinstance(item, Constraint) else isinstance(item, (int, float, bool))
        for item in vars(support).values()
    )
