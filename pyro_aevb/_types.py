"""Names of types and of tensor dimensions that the whole package shares.

The axis names used in annotations: ``particles`` S draws averaged outside the logarithm, ``importance_samples`` K inside it,
``rows`` N indices of the data plate in this batch, ``draws`` posterior draws, ``event`` a site's event shape.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

__all__ = [
    "Args",
    "GlobalWeights",
    "Kwargs",
    "LocalWeights",
    "PerRow",
    "PyroProgram",
    "Scalar",
    "SiteDistribution",
    "Values",
]

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = Mapping[str, Any]
PyroProgram: TypeAlias = Callable[..., Any]
"""A Pyro program: a model or a guide."""
SiteDistribution: TypeAlias = Any
"""A distribution at a sample site: torch's ``Distribution`` with Pyro's mixin, which no one class joins."""
Values: TypeAlias = dict[str, Tensor]
"""Values of sample sites by name."""

LocalWeights: TypeAlias = Float[Tensor, "particles importance_samples rows"]
GlobalWeights: TypeAlias = Float[Tensor, " particles"]
PerRow: TypeAlias = Float[Tensor, " rows"]
Scalar: TypeAlias = Float[Tensor, ""]
