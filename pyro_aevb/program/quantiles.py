"""Quantiles of the distributions at sample sites, and programs run at them instead of at draws."""

import torch
from pyro.distributions import Delta, MultivariateStudentT, ProjectedNormal
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.distributions import (
    ComposeTransform,
    Independent,
    IndependentTransform,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    ReshapeTransform,
    StudentT,
    Transform,
    TransformedDistribution,
    VonMises,
    constraints,
)
from torch.special import ndtri

from pyro_aevb._types import SiteDistribution
from pyro_aevb.distributions.wrapped_normal import WrappedNormal

__all__ = ["AtQuantile", "acts_on_entries", "has_marginal_quantiles", "marginal_quantile"]

_NUM_DRAWS = 101
_NORMALS = (LowRankMultivariateNormal, MultivariateNormal, Normal)
_SYMMETRIC = (MultivariateStudentT, StudentT)
"""Families without a quantile function whose median is their location."""
_WRAPPERS = ("ExpandedDistribution", "MaskedDistribution")
_DIRECTIONS = (ProjectedNormal, VonMises, WrappedNormal)
"""Families on circles and spheres, where no end is a lowest value: their mean direction stands for the median."""


class AtQuantile(Messenger):
    """Set sampled sites to a quantile of their distribution, each given the quantiles at the sites before it.

    Args:
        level: Probability below the quantile; 0.5 for medians.
    """

    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        self.level = level

    def _pyro_sample(self, message: Message) -> None:
        fn: SiteDistribution = message["fn"]
        if not message["is_observed"] and message["value"] is None and type(fn).__name__ != "_Subsample":
            message["value"] = marginal_quantile(fn, self.level)
            message["done"] = True


def marginal_quantile(fn: SiteDistribution, level: float) -> Tensor:
    """Return a quantile of each entry of a distribution.

    A transformed distribution gets the image of its base's quantile, which is its own where the transform acts on each entry
    alone and increases; where it decreases it is the quantile at 1 - level. Families without a closed form get an order statistic
    of 101 draws, those on circles and spheres their mean direction.

    Args:
        fn: The distribution.
        level: Probability below the quantile.

    Returns:
        ``[*batch, *event]``.

    Example:
        >>> marginal_quantile(dist.LogNormal(0.0, 1.0), 0.5)
        tensor(1.)
    """
    shape = fn.batch_shape + fn.event_shape
    if isinstance(fn, Delta):
        return fn.v.expand(shape)
    if isinstance(fn, _NORMALS):
        return fn.loc + fn.stddev * ndtri(fn.loc.new_tensor(level))
    if isinstance(fn, _DIRECTIONS):
        return fn.mean.expand(shape)
    if isinstance(fn, Independent) or type(fn).__name__ in _WRAPPERS:
        return marginal_quantile(fn.base_dist, level).expand(shape)
    if isinstance(fn, TransformedDistribution) and all(transform.bijective for transform in fn.transforms):
        value = marginal_quantile(fn.base_dist, level)
        for transform in fn.transforms:
            value = transform(value)
        return value.expand(shape)
    return _plain_quantile(fn, level).expand(shape)


def _plain_quantile(fn: SiteDistribution, level: float) -> Tensor:
    """Return a quantile by the family's own formula, else of draws."""
    if level == 0.5 and isinstance(fn, _SYMMETRIC):
        return fn.loc
    try:
        return fn.icdf(torch.tensor(level))
    except NotImplementedError:
        # contiguous, since torch sorts an expanded tensor off wrong memory
        value = fn.sample((_NUM_DRAWS,)).contiguous().sort(0).values[round(level * (_NUM_DRAWS - 1))]
        return value / value.sum(-1, keepdim=True) if fn.support is constraints.simplex else value


def has_marginal_quantiles(fn: SiteDistribution) -> bool:
    """Tell whether the quantiles of each entry are known in closed form: of normals, through maps of each entry alone.

    Example:
        >>> has_marginal_quantiles(dist.LogNormal(0.0, 1.0)), has_marginal_quantiles(dist.Gamma(2.0, 1.0))
        (True, False)
    """
    if isinstance(fn, Independent) or type(fn).__name__ in _WRAPPERS:
        return has_marginal_quantiles(fn.base_dist)
    if isinstance(fn, TransformedDistribution):
        return all(map(acts_on_entries, fn.transforms)) and has_marginal_quantiles(fn.base_dist)
    return isinstance(fn, (Delta, *_NORMALS))


def acts_on_entries(transform: Transform) -> bool:
    """Tell whether a transform is a bijection of each entry by itself."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, ComposeTransform):
        return all(map(acts_on_entries, transform.parts))
    if isinstance(transform, ReshapeTransform):
        return True
    return bool(transform.bijective) and transform.domain.event_dim == transform.codomain.event_dim == 0
