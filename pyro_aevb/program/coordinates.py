"""Unconstrained coordinates of latents: maps onto supports, and where each site lies in a row's vector u.

A site's tensor has two layouts. In *plates* it stands as the program holds it, ``[S, K, *plates, *event]``, a plate at its own
dimension. *Rows first* it is ``[S, K, rows, *inner plates, *event]``, outer plates first, as results are; globals have no rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    Transform,
    biject_to,
    constraints,
)
from torch.distributions.constraints import Constraint

from pyro_aevb._types import Values
from pyro_aevb.errors import ModelError
from pyro_aevb.program.structure import Site, Structure

__all__ = [
    "Layout",
    "Slot",
    "bijection",
    "in_plates",
    "inner_sizes",
    "inverse_event",
    "rows_first",
    "site_kind",
    "turn_of",
    "unconstrained_shape",
]

_CIRCULAR = frozenset({"VonMises"})
CIRCLE = constraints.interval(-math.pi, math.pi)
"""Support of an angle, of which torch says that it is real: a density over the whole line would be improper."""


def site_kind(site: Site) -> str:
    """Return ``"circle"`` (an angle), ``"sphere"`` (a direction) or ``"euclidean"``."""
    if site.family in _CIRCULAR:
        return "circle"
    return "sphere" if getattr(dist.constraints, "sphere", None) is site.support else "euclidean"


def unconstrained_shape(site: Site) -> tuple[int, ...]:
    """Return the shape of a site's event in unconstrained space.

    Raises:
        ModelError: If there is no bijection onto the support.
    """
    if site_kind(site) != "euclidean":
        return site.event_shape
    try:
        return inverse_event(biject_to(site.support), site.batch_shape, site.event_shape)
    except NotImplementedError as error:
        raise ModelError(
            f"There is no map from unconstrained space onto the support {site.support} of latent site {site.name!r} "
            f"({site.family}). Register one with torch.distributions.biject_to, or write this site's guide by hand.",
            site=site.name,
        ) from error


def inverse_event(transform: Transform, batch_shape: Sequence[int], event_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of an event before a transform; ends of a support that differ between rows have the rows' shape."""
    return tuple(transform.inverse_shape(torch.Size((*batch_shape, *event_shape))))[len(batch_shape) :]


def bijection(support: Constraint) -> Transform | None:
    """Return the map from unconstrained space onto a support, without steps that do nothing; ``None`` for the identity.

    torch reaches the positive numbers by exp and an affine map that is the identity, where its log-normal has exp alone; a KL in
    closed form is found between equal maps only.
    """
    return _simplified(biject_to(support))


def _simplified(transform: Transform) -> Transform | None:
    if isinstance(transform, IndependentTransform):
        base = _simplified(transform.base_transform)
        return None if base is None else IndependentTransform(base, transform.reinterpreted_batch_ndims)
    if isinstance(transform, ComposeTransform):
        parts = [part for part in map(_simplified, transform.parts) if part is not None]
        return ComposeTransform(parts) if len(parts) > 1 else next(iter(parts), None)
    if isinstance(transform, AffineTransform) and not any(
        isinstance(item, Tensor) for item in (transform.loc, transform.scale)
    ):
        return None if (transform.loc, transform.scale) == (0, 1) else transform
    return transform


def turn_of(angle: Tensor) -> Tensor:
    """Bring angles to -pi .. pi."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


@dataclass(frozen=True)
class Slot:
    """Where a local latent lies in a row's u.

    Attributes:
        site: The site.
        start: Its first coordinate.
        inner: Sizes of its inner plates, outermost first.
        event: Unconstrained shape of its event.
    """

    site: Site
    start: int
    inner: tuple[int, ...]
    event: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The coordinate behind its last."""
        return self.start + math.prod(self.inner) * math.prod(self.event)

    def transform(self, support: Constraint) -> Transform | None:
        """Return the map onto the support that the site has in a run; ``None`` for the identity."""
        return bijection(CIRCLE if site_kind(self.site) == "circle" else support)


class Layout:
    """The order of a row's coordinates: sites in the model's order, inner plates, event.

    Args:
        structure: The model's structure.

    Attributes:
        slots: Local latents by name.
        dim: D, coordinates of a row.

    Raises:
        ModelError: If a latent has no bijection, or lies on a sphere.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.slots: dict[str, Slot] = {}
        start = 0
        for site in structure.select("latent", is_local=True):
            _check_euclidean(site)
            slot = Slot(site, start, inner_sizes(site, structure), unconstrained_shape(site))
            self.slots[site.name] = slot
            start = slot.stop
        self.dim = start

    def part(self, u: Tensor, name: str) -> Tensor:
        """Return a site's coordinates in plates, ``[S, K, *plates, *event]``, out of u ``[S, K, rows, D]``."""
        slot = self.slots[name]
        part = u[..., slot.start : slot.stop].reshape(*u.shape[:-1], *slot.inner, *slot.event)
        return in_plates(part, slot.site, self.structure)

    def join(self, parts: Values, like: Tensor) -> Tensor:
        """Return u ``[S, K, rows, D]`` of the sites' coordinates in plates; ``like`` has shape ``[S, K, rows]``."""
        flat = [like.new_empty((*like.shape, 0))]
        for name, slot in self.slots.items():
            part = rows_first(parts[name], slot.site, self.structure, len(slot.event))
            flat.append(part.reshape(*part.shape[:3], slot.stop - slot.start))
        return torch.cat(flat, -1)


def _check_euclidean(site: Site) -> None:
    if site_kind(site) == "sphere":
        raise ModelError(
            f"Latent site {site.name!r} ({site.family}) is a direction on a sphere, which no unconstrained coordinates cover one "
            f"to one. Write it as an angle (VonMises), or as a normal vector that the model normalises.",
            site=site.name,
        )


def _own_dims(site: Site, structure: Structure) -> list[int]:
    """Return dimensions of a site's plates, that of the rows first."""
    rows = [structure.data_dim] if site.is_local and structure.data_dim is not None else []
    return rows + [dim for dim in site.plate_dims if dim not in rows]


def inner_sizes(site: Site, structure: Structure) -> tuple[int, ...]:
    """Return sizes of a site's plates but that of the rows, outermost first."""
    frames = [frame for frame in site.frames if frame.dim is not None and frame.name != structure.data_plate]
    return tuple(frame.size for frame in frames)


def in_plates(value: Tensor, site: Site, structure: Structure) -> Tensor:
    """Bring a site's tensor from rows first to plates."""
    dims = _own_dims(site, structure)
    if site.is_local and structure.data_dim is None:
        value = value.squeeze(2)
    count = len(dims)
    order = sorted(range(count), key=lambda index: dims[index])
    value = value.permute(0, 1, *(2 + index for index in order), *range(2 + count, value.dim()))
    sizes = dict(zip(sorted(dims), value.shape[2 : 2 + count], strict=True))
    plates = [sizes.get(dim, 1) for dim in range(-structure.max_plate_nesting, 0)]
    return value.reshape(*value.shape[:2], *plates, *value.shape[2 + count :])


def rows_first(value: Tensor, site: Site, structure: Structure, event_dim: int) -> Tensor:
    """Bring a site's tensor from plates to rows first; axes that it lacks on the left have size 1."""
    nesting = structure.max_plate_nesting
    value = value.reshape((1,) * (2 + nesting + event_dim - value.dim()) + value.shape)
    dims = _own_dims(site, structure)
    unused = [dim for dim in range(-nesting, 0) if dim not in dims]
    value = value.permute(0, 1, *(2 + nesting + dim for dim in (*dims, *unused)), *range(2 + nesting, value.dim()))
    value = value.reshape(*value.shape[: 2 + len(dims)], *value.shape[2 + nesting :])
    return value.unsqueeze(2) if site.is_local and structure.data_dim is None else value
