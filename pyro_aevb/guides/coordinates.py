"""Unconstrained coordinates of a latent site, in units of its prior."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.constraints import Constraint

from pyro_aevb._types import SiteDistribution
from pyro_aevb.program.coordinates import bijection, inverse_event, site_kind, unconstrained_shape
from pyro_aevb.program.sites import plain_support
from pyro_aevb.program.structure import Site

__all__ = [
    "Coordinates",
    "feasible",
    "has_ends",
    "is_same_support",
    "read_coordinates",
    "transformed",
]

_LARGEST = 10.0
"""Standardised coordinates that networks read are cut here: a value at the end of its support has infinite ones."""

_NUM_DRAWS = 4096


class Coordinates(nn.Module):
    r"""Coordinates :math:`(T^{-1}(z) - m) / s` of a site: T the bijection onto its support, m and s of the prior.

    Args:
        event_shape: Shape of an event.
        shape: Shape of its unconstrained coordinates.
        loc: m, of each coordinate, flat.
        scale: s, of each coordinate, flat.
        kind: ``"euclidean"``, ``"circle"`` (von Mises) or ``"sphere"`` (projected normal).

    Attributes:
        size: D, number of unconstrained coordinates of an event.
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, event_shape: Sequence[int], shape: Sequence[int], loc: Tensor, scale: Tensor, kind: str = "euclidean"
    ) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.shape = tuple(shape)
        self.kind = kind
        self.size = math.prod(self.shape)
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    @property
    def num_inputs(self) -> int:
        """Number of inputs that a network gets of a value."""
        return 2 * self.size if self.kind == "circle" else self.size

    def inputs(self, value: Tensor, support: Constraint, units: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Turn values into what a network reads of them.

        Args:
            value: ``[..., *event]``.
            support: The site's support.
            units: Location and scale of the coordinates under q, in units of the prior. A global's posterior is far narrower than
                its prior, and a network that sees it in units of the prior alone hardly learns what depends on it.

        Returns:
            ``[..., num_inputs]``, twice as many with ``units``.
        """
        lead = value.shape[: value.dim() - len(self.event_shape)]
        if self.kind == "circle":
            flat = value.reshape(*lead, self.size)
            return torch.cat([flat.cos(), flat.sin()], -1)
        if self.kind == "sphere":
            return value.reshape(*lead, self.size)
        flat = biject_to(support).inv(value).reshape(*lead, self.size)
        inputs = (flat - self.loc) / self.scale
        if units is None:
            return inputs.clamp(-_LARGEST, _LARGEST)
        own = (inputs - units[0]) / units[1]
        return torch.cat([inputs, own], -1).clamp(-_LARGEST, _LARGEST)


def read_coordinates(site: Site, fn: SiteDistribution) -> Coordinates:
    """Choose coordinates of a site in units of its prior.

    Median m and spread s (interquartile range / 1.349) come from draws of the site's distribution in one run of the model, its
    parents at the centre of their supports, so that networks work with numbers near 1 whatever the model's units.

    Args:
        site: The site.
        fn: Its distribution in that run.

    Raises:
        ModelError: If there is no bijection onto the support.
    """
    kind, shape = site_kind(site), unconstrained_shape(site)
    size = math.prod(shape)
    dtype = getattr(feasible(fn), "dtype", torch.float32)
    loc, scale = torch.zeros(size, dtype=dtype), torch.ones(size, dtype=dtype)
    if kind == "euclidean" and size:
        loc, scale = _prior_units(fn, loc, scale)
    return Coordinates(site.event_shape, shape, loc, scale, kind)


def _prior_units(fn: SiteDistribution, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return median and spread of each coordinate under the prior; what is given where it can't be drawn from."""
    try:
        count = max(16, _NUM_DRAWS // max(1, math.prod(fn.batch_shape)))
        draws: Any = biject_to(plain_support(fn)).inv(fn.sample((count,)))
    except (NotImplementedError, RuntimeError, ValueError):  # an improper prior
        return loc, scale
    flat = draws.detach().reshape(-1, len(loc))
    flat = torch.nan_to_num(flat[:: max(1, len(flat) // (4 * _NUM_DRAWS))])
    lower, median, upper = flat.quantile(torch.tensor([0.25, 0.5, 0.75]).to(flat), dim=0)
    spread = (upper - lower) / 1.349
    is_usable = torch.isfinite(spread) & (spread > 0) & torch.isfinite(median)
    return torch.where(is_usable, median, loc), torch.where(is_usable, spread, scale)


def transformed(base: SiteDistribution, support: Constraint, event_dim: int) -> SiteDistribution:
    """Carry a distribution on unconstrained coordinates, each of its own batch element, to a support.

    Args:
        base: Independent over the coordinates' axes, which are the last of its batch shape.
        support: The site's support.
        event_dim: Dimensions of the site's event.
    """
    while isinstance(support, constraints.independent):  # as the model's own families are built, so that a KL is found
        support = support.base_constraint
    transform = bijection(support)
    if transform is not None:
        base = dist.TransformedDistribution(base.to_event(transform.domain.event_dim), [transform])
    return base.to_event(event_dim - base.event_dim) if event_dim > base.event_dim else base


def _ends(support: Constraint) -> list[Tensor]:
    """Return the ends of a support, or of the support below it."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    found = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    return [torch.as_tensor(end) for end in found if end is not None]


def has_ends(support: Constraint) -> bool:
    """Tell whether a support's ends are numbers that a program may compute, rather than 0 or 1."""
    return any(end.dim() > 0 or float(end) not in (0.0, 1.0) for end in _ends(support))


def is_same_support(a: Constraint, b: Constraint) -> bool:
    """Tell whether two supports are of one kind and have the same ends."""
    ends = _ends(a), _ends(b)
    if type(a) is not type(b) or len(ends[0]) != len(ends[1]):
        return False
    return all(one.shape == other.shape and bool((one == other).all()) for one, other in zip(*ends, strict=True))


def feasible(fn: SiteDistribution) -> Tensor:
    """Return a point inside a distribution's support, the same for each batch element.

    Its unconstrained coordinates are near 0 and not 0, where a weight that multiplies the latent would not show.
    """
    shape = fn.batch_shape + fn.event_shape
    if plain_support(fn).is_discrete:
        return torch.zeros(shape)
    transform = transform_to(plain_support(fn))
    like = _like(fn)
    event = inverse_event(transform, fn.batch_shape, fn.event_shape)
    point = torch.arange(1.0, 1.0 + math.prod(event), device=like.device).sin().div(2).reshape(event)
    return transform(point.to(like.dtype)).expand(shape)


def _like(fn: SiteDistribution) -> Tensor:
    """Return a tensor of a distribution's type and device: one of its parameters, or of those below its wrappers."""
    for value in vars(fn).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    below = [getattr(fn, name, None) for name in ("base_dist", "component_distribution")]
    return next((_like(item) for item in below if item is not None), torch.zeros(()))
