"""Latents of rows unit by unit: where the guide puts them, and what each adds to the KL term.

A *unit* is one coordinate of a site in unconstrained space; a site's units are laid out as ``[inner plates, *event]``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Independent, IndependentTransform, Transform, TransformedDistribution

from pyro_aevb._types import SiteDistribution
from pyro_aevb.program.coordinates import Slot, inner_sizes, rows_first, site_kind, turn_of, unconstrained_shape
from pyro_aevb.program.divergence import closed_form_kl
from pyro_aevb.program.particles import SiteRecord
from pyro_aevb.program.sites import plain_support
from pyro_aevb.program.structure import Site, Structure

__all__ = ["SiteUnits", "split_kl", "to_units"]


@dataclass(frozen=True)
class SiteUnits:
    """The units of one latent site.

    Attributes:
        site: The site.
        structure: The model's structure.
    """

    site: Site
    structure: Structure

    @property
    def slot(self) -> Slot:
        """The site's coordinates by themselves."""
        return Slot(self.site, 0, inner_sizes(self.site, self.structure), unconstrained_shape(self.site))

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each unit, such as ``z[3, 0]``; of a single one the site's."""
        shape = (*self.slot.inner, *self.slot.event)
        places = torch.ones(shape).nonzero().tolist()
        return tuple(f"{self.site.name}{place}" if place else self.site.name for place in places)

    def lay_out(self, parts: list[Tensor], event_dim: int) -> Float[Tensor, "draws rows units"]:
        """Join tensors in plates, one per run, and flatten what is no draw and no row."""
        joined = torch.cat([rows_first(part, self.site, self.structure, event_dim) for part in parts]).squeeze(1)
        return joined.reshape(*joined.shape[:2], -1)


class _Run(NamedTuple):
    """One run's distributions and value of a site."""

    p: SiteDistribution
    q: SiteDistribution
    value: Tensor


def _runs(p: SiteRecord, q: SiteRecord) -> list[_Run]:
    """Return the site in each run of the programs: one for all draws, or one a draw."""
    if len(q.fns) == 1:
        return [_Run(p.fns[0], q.fns[0], q.value)]
    return [_Run(fn_p, fn_q, value) for fn_p, fn_q, value in zip(p.fns, q.fns, q.value[:, 0], strict=True)]


def to_units(p: SiteRecord, q: SiteRecord, units: SiteUnits) -> Float[Tensor, "draws rows units"]:
    """Return numbers whose mean over draws is unbiased for E_q[u | x]: u, or its mean given the draw's parents where known."""
    parts = []
    for run in _runs(p, q):
        transform = _transform(units, run.p)
        value = turn_of(run.value) if site_kind(units.site) == "circle" else run.value
        parts.append(_mean(run) if transform is None else transform.inv(value))
    return units.lay_out(parts, len(units.slot.event))


def _transform(units: SiteUnits, fn: SiteDistribution) -> Transform | None:
    """Return the map onto the support; directions on a sphere stay as they are."""
    return None if site_kind(units.site) == "sphere" else units.slot.transform(plain_support(fn))


def _mean(run: _Run) -> Tensor:
    """Return the mean of q given the parents, whose mean over draws is the same with less noise; else the draw."""
    try:
        mean = run.q.mean
    except NotImplementedError:
        return run.value
    return mean.expand_as(run.value) if mean.isfinite().all() else run.value


def split_kl(
    p: SiteRecord, q: SiteRecord, units: SiteUnits, *, is_closed: bool
) -> Float[Tensor, "draws rows units"] | None:
    r"""Return what each unit adds to KL(q || p), estimated at each draw, in nats; ``None`` where units depend on each other.

    .. math:: KL(q(z|x) \| p(z)) = \sum_j E_q[\log q(z_j|x) - \log p(z_j)] \text{ if both factorise}

    Masks and scales are those of the densities, so that the sum over units is the site's part of the bound.

    Args:
        p: The site in the model.
        q: The site in the guide, at the same values.
        units: Its units.
        is_closed: Whether to take closed forms, where there are any, in place of log q - log p.
    """
    event_dim = len(units.site.event_shape)
    parts = []
    for run in _runs(p, q):
        single_p, single_q = _single(run.p), _single(run.q)
        if single_p is None or single_q is None or units.slot.event != units.site.event_shape:
            return None
        kl = closed_form_kl(single_q, single_p) if is_closed else None
        kl = single_q.log_prob(run.value) - single_p.log_prob(run.value) if kl is None else kl.expand_as(run.value)
        scale = torch.as_tensor(p.scale)
        scaled = kl * scale.reshape(scale.shape + (1,) * event_dim)
        parts.append(torch.where(torch.as_tensor(p.mask, device=kl.device), scaled, 0.0))
    return units.lay_out(parts, event_dim)


def _single(fn: SiteDistribution) -> SiteDistribution | None:
    """Return the distribution whose events are single numbers and whose batch is all of them; ``None`` if there is none."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    if fn.event_dim == 0:
        return fn
    if not isinstance(fn, TransformedDistribution):
        return None
    base, steps = _single(fn.base_dist), [_inner(step) for step in fn.transforms]
    if base is None or any(step.domain.event_dim or step.codomain.event_dim for step in steps):
        return None
    return TransformedDistribution(base, steps)


def _inner(transform: Transform) -> Transform:
    """Return what a transform does to each entry, where it treats them alike."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform
