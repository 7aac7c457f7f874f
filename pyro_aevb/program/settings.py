"""Settings of public functions: misspelt ones are told from the model's own keyword arguments."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_aevb._types import Values
from pyro_aevb.errors import SettingError

__all__ = [
    "NOTE",
    "NumData",
    "as_values",
    "check_count",
    "check_covariates",
    "check_num_data",
    "check_positive",
    "check_programs",
    "check_settings",
    "check_share",
]


NOTE = " The model's own keyword arguments are tensors or numpy arrays; bind constants with functools.partial."
"""Said of an unknown setting where the model's keyword arguments are taken too."""

NumData: TypeAlias = int | Literal["growing"] | None
"""Rows of the whole data set: a number, ``"growing"`` for the rows seen so far, ``None`` for those of the data at hand."""


def check_settings(
    names: Iterable[str], function: Callable[..., Any], note: str = "", *, also: Iterable[str] = ()
) -> None:
    """Refuse settings that a function does not have, and offer the nearest of those it has.

    Args:
        names: The settings that were given.
        function: What they were given to.
        note: Added to the message.
        also: Settings that the function passes on.

    Raises:
        SettingError: If a name is not among the function's keyword-only arguments.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY] + [*also]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise SettingError(f"There is no setting {name!r}.{hint} Known are {', '.join(known)}.{note}")


def check_covariates(covariates: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Refuse keyword arguments that are no data: misspelt settings would else reach the model."""
    settings = [name for name, item in covariates.items() if not isinstance(item, (Tensor, np.ndarray))]
    check_settings(settings, function, NOTE)


def check_count(name: str, count: Any, *, is_optional: bool = False) -> None:
    """Refuse what is no integer of at least 1; ``None`` leaves the choice to the function where it is optional."""
    if count is None and is_optional:
        return
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise SettingError(f"{name} must be an integer of at least 1, got {count!r}.")


def check_num_data(num_data: Any, effective_num_data: Any) -> NumData:
    """Return the number of rows that a batch stands for: that of the data set, or the effective one of data that drift.

    Raises:
        SettingError: If both are given, or one is no such number.
    """
    if num_data is not None and effective_num_data is not None:
        raise SettingError(
            f"num_data={num_data!r} counts rows that all bear on the globals, effective_num_data={effective_num_data!r} says how "
            f"many recent ones do: give one of the two."
        )
    if isinstance(num_data, str):
        if num_data != "growing":
            raise SettingError(f"num_data must be an integer, 'growing' or None, got {num_data!r}.")
        return "growing"
    check_count("num_data", num_data, is_optional=True)
    check_count("effective_num_data", effective_num_data, is_optional=True)
    return num_data if effective_num_data is None else effective_num_data


def check_share(name: str, value: Any) -> None:
    """Refuse what is no number strictly between 0 and 1."""
    if not _is_number(value) or not 0 < value < 1:
        raise SettingError(f"{name} must lie between 0 and 1; got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no finite number above 0."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise SettingError(f"{name} must be a positive number, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_programs(*programs: Any) -> None:
    """Refuse what is no program of Pyro's: models and guides are called with the batch."""
    for program in programs:
        if not callable(program):
            raise SettingError(
                f"A model or guide must be a function, module or method that is called with the batch; got {program!r}."
            )


def as_values(given: Any) -> Values:
    """Return values of sites as a dictionary, numpy arrays and numbers as tensors.

    Raises:
        SettingError: If they are no mapping from names to numbers.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise SettingError(f"given must be {{site: tensor}}, got {type(given).__name__}: {given!r}.")
    try:
        return {name: torch.as_tensor(value) for name, value in given.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"given must hold a tensor for each site: {error}.") from error
