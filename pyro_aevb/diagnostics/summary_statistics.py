"""What data sets are compared by, where nobody says it: a few numbers that suit the kind of an observed site.

A missing entry is NaN, and every statistic here leaves it out.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints

from pyro_aevb.program.divergence import elementwise
from pyro_aevb.program.structure import Site

__all__ = ["Statistic", "default_statistics"]

Statistic = Callable[[Tensor], Tensor | float]
"""From an observed site's data, ``[rows, inner plates, *event]``, to a number or a tensor of numbers."""


def default_statistics(site: Site, data: Float[Tensor, "..."]) -> dict[str, Statistic]:
    """Choose statistics for an observed site.

    Args:
        site: The site.
        data: Its data, ``[rows, inner plates, *event]``, or without rows.

    Returns:
        Yes or no: the share of ones, and over rows the spread of a row's share. Categories: the share of each. Other numbers:
        mean, sd, least and largest, and the share of zeros where the numbers are counts or the data hold zeros.

    Example:
        >>> from pyro_aevb.program.structure import read_structure
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Poisson(2.0), obs=x)
        >>> x = torch.tensor([0.0, 3.0, 1.0, 0.0])
        >>> found = default_statistics(read_structure(model, (x,)).sites["x"], x)
        >>> {name: float(statistic(x)) for name, statistic in found.items() if name != "sd"}
        {'mean': 1.0, 'min': 0.0, 'max': 3.0, 'zeros': 0.5}
    """
    support: Any = elementwise(site.support)
    found: dict[str, Statistic] = {"mean": _mean}
    if support is constraints.boolean:
        has_spread = site.is_local and data.dim() > 1 and len(data) > 1
        return found | ({"row_mean_sd": _row_mean_sd} if has_spread else {})
    if site.family == "Categorical":
        return {"shares": _Shares(1 + int(torch.as_tensor(support.upper_bound).max()))}
    if support is constraints.one_hot:
        return {"shares": _entries}
    found |= {"sd": _sd, "min": _min, "max": _max}
    return found | ({"zeros": _zeros} if support.is_discrete or (data == 0).any() else {})


def _mean(data: Tensor) -> Tensor:
    return data.nanmean()


def _sd(data: Tensor) -> Tensor:
    return (data - data.nanmean()).square().nanmean().sqrt()


def _min(data: Tensor) -> Tensor:
    return data.where(~data.isnan(), math.inf).amin()


def _max(data: Tensor) -> Tensor:
    return data.where(~data.isnan(), -math.inf).amax()


def _zeros(data: Tensor) -> Tensor:
    return (data == 0).sum() / (~data.isnan()).sum()


def _row_mean_sd(data: Tensor) -> Tensor:
    return _sd(data.flatten(1).nanmean(1))


def _entries(data: Tensor) -> Tensor:
    """Return the mean of each entry of the last axis: of one-hot codes, the share of each category."""
    return data.flatten(0, -2).nanmean(0)


class _Shares:
    """Share of each of so many categories, numbered from 0."""

    def __init__(self, num_categories: int) -> None:
        self.categories = torch.arange(num_categories)

    def __call__(self, data: Tensor) -> Tensor:
        known = data[~data.isnan()]
        return (known[:, None] == self.categories.to(known)).to(known).mean(0)
