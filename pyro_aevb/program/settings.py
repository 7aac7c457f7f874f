"""Settings of public functions: misspelt ones are told from the model's own keyword arguments."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from pyro_aevb.errors import SettingError

__all__ = ["NOTE", "check_count", "check_covariates", "check_settings"]


NOTE = " The model's own keyword arguments are tensors or numpy arrays; bind constants with functools.partial."
"""Said of an unknown setting where the model's keyword arguments are taken too."""


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
    if not isinstance(count, Integral) or count < 1:
        raise SettingError(f"{name} must be an integer of at least 1, got {count!r}.")
