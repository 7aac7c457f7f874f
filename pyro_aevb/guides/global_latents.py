"""Guides of global latents: full variational Bayes, Kingma and Welling (2014), appendix F.

Globals lie outside the data plate, so that their variational parameters are free rather than computed from a row.
"""

import abc
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import biject_to
from typing_extensions import override

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import ModelError, SettingError
from pyro_aevb.guides.coordinates import Coordinates
from pyro_aevb.guides.families import Family
from pyro_aevb.program.structure import Site

__all__ = ["GlobalGuide", "Joint", "OwnGuide", "PerSite"]

_GAIN = 8.0
"""Parameters of globals are an eighth of what they stand for: under Adam, where a parameter moves by about the
learning rate a step, a network's output moves by the rates of all weights below it and a global's by one."""

OpenPlates = Callable[[ExitStack, Site], None]
"""Opens the plates and the mask of a site."""


class GlobalGuide(nn.Module, abc.ABC):
    """Samples all global latents of a model.

    Attributes:
        sites: The global latents, in the model's order.
    """

    def __init__(self, sites: tuple[Site, ...]) -> None:
        super().__init__()
        self.sites = sites
        for site in sites:
            if any(frame.size != frame.full_size for frame in site.frames):
                raise ModelError(
                    f"Global latent {site.name!r} lies in a subsampled plate {list(site.plates)}; its guide holds parameters for "
                    f"each index and needs them all. Leave subsampling to the data plate.",
                    site=site.name,
                )

    @abc.abstractmethod
    def sample(self, open_plates: OpenPlates, args: Args, kwargs: Kwargs) -> Values:
        """Sample the globals, in the plates of the model, inside the guide's run."""

    def units(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return location and scale of sites' coordinates under q, in units of the prior, ``[*batch, D]``, where it tells them."""
        return {}

    @abc.abstractmethod
    def label(self, name: str) -> str:
        """Return the family of a site, for tables."""


class PerSite(GlobalGuide):
    """An independent distribution at each global site.

    Args:
        sites: The global latents.
        families: The family of each, on the coordinates of all its plates' indices.
    """

    def __init__(self, sites: tuple[Site, ...], families: dict[str, Family]) -> None:
        super().__init__(sites)
        self.families = nn.ModuleList(families[site.name] for site in sites)
        self.outputs = nn.ParameterList(
            torch.zeros((*site.batch_shape, families[site.name].num_outputs)) for site in sites
        )

    def sample(self, open_plates: OpenPlates, args: Args, kwargs: Kwargs) -> Values:
        """Sample site by site."""
        values: Values = {}
        for site, family, outputs in zip(self.sites, self.families, self.outputs, strict=True):
            with ExitStack() as stack:
                open_plates(stack, site)
                values[site.name] = pyro.sample(site.name, family(_GAIN * outputs, site.support))
        return values

    @override
    def units(self) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = zip(cast(Iterable[Family], self.families), self.outputs, strict=True)
        found = [family.units(_GAIN * outputs) for family, outputs in pairs]
        return {site.name: units for site, units in zip(self.sites, found, strict=True) if units is not None}

    def label(self, name: str) -> str:
        """Return the family's name."""
        index = [site.name for site in self.sites].index(name)
        return str(self.families[index].label)


class Joint(GlobalGuide):
    """One distribution of all globals together, drawn at an auxiliary site, from which the sites are read off.

    Args:
        name: Name of the auxiliary site.
        sites: The global latents.
        coordinates: Coordinates of each site.
        make_family: Makes the family of the joined coordinates.
        nesting: Number of dimensions that the model's plates use.
    """

    def __init__(
        self,
        name: str,
        sites: tuple[Site, ...],
        coordinates: dict[str, Coordinates],
        make_family: Callable[[Coordinates], Family],
        nesting: int,
    ) -> None:
        super().__init__(sites)
        self.auxiliary = name
        self.nesting = nesting
        self.coordinates = nn.ModuleList(coordinates[site.name] for site in sites)
        loc = torch.cat([own.loc.expand(size).reshape(-1) for own, size in self._sizes()])
        scale = torch.cat([own.scale.expand(size).reshape(-1) for own, size in self._sizes()])
        self.family = make_family(Coordinates((len(loc),), (len(loc),), loc, scale))
        self.outputs = nn.Parameter(torch.zeros(self.family.num_outputs))

    def _sizes(self) -> list[tuple[Coordinates, tuple[int, ...]]]:
        pairs = zip(self.sites, cast(Iterable[Coordinates], self.coordinates), strict=True)
        return [(own, (*site.batch_shape, own.size)) for site, own in pairs]

    def sample(self, open_plates: OpenPlates, args: Args, kwargs: Kwargs) -> Values:
        """Sample the joined coordinates and carry each site's part to its support."""
        fn = self.family(_GAIN * self.outputs, dist.constraints.real_vector)
        joined = pyro.sample(self.auxiliary, fn, infer={"is_auxiliary": True})
        values: Values = {}
        start = 0
        for site, (own, size) in zip(self.sites, self._sizes(), strict=True):
            stop = start + torch.Size(size).numel()
            value, log_density = self._read_off(joined[..., start:stop], site, own)
            with ExitStack() as stack:
                open_plates(stack, site)
                fn = dist.Delta(value, log_density=log_density, event_dim=len(site.event_shape))
                values[site.name] = pyro.sample(site.name, fn)
            start = stop
        return values

    def _read_off(self, part: Tensor, site: Site, own: Coordinates) -> tuple[Tensor, Tensor]:
        """Return a site's value and minus the log Jacobian of its map, from its coordinates ``[..., size]``."""
        lead: tuple[int, ...] = ()
        batch = site.batch_shape
        if part.dim() > 1:  # particles lie left of every plate
            lead = tuple(part.shape[: part.dim() - 1 - self.nesting])
            batch = (1,) * (self.nesting - len(batch)) + batch
        flat = part.reshape((*lead, *batch, *own.shape))
        transform = biject_to(site.support)
        value = transform(flat)
        jacobian = transform.log_abs_det_jacobian(flat, value)
        return value, -jacobian.reshape((*lead, *batch, -1)).sum(-1)

    @override
    def units(self) -> dict[str, tuple[Tensor, Tensor]]:
        loc, scale = self.family.units(_GAIN * self.outputs) or (self.outputs, self.outputs)
        sizes = [torch.Size(size) for _, size in self._sizes()]
        parts = [part.split([size.numel() for size in sizes]) for part in (loc, scale)]
        return {
            site.name: (loc.reshape(size), scale.reshape(size))
            for site, size, loc, scale in zip(self.sites, sizes, *parts, strict=True)
        }

    def label(self, name: str) -> str:
        """Return the joint family's name."""
        return f"joint {self.family.label}"


class OwnGuide(GlobalGuide):
    """One of Pyro's automatic guides, on the model's globals alone.

    Args:
        sites: The global latents.
        model: The model.
        kind: The guide's class.
    """

    def __init__(self, sites: tuple[Site, ...], model: PyroProgram, kind: type[AutoGuide]) -> None:
        super().__init__(sites)
        if not (isinstance(kind, type) and issubclass(kind, AutoGuide)):
            raise SettingError(
                f"global_guide must be 'normal', 'multivariate_normal', 'flow' or a Pyro AutoGuide class, got {kind!r}."
            )
        self.kind = kind.__name__
        self.guide: Any = kind(poutine.block(model, expose=[site.name for site in sites]))

    def sample(self, open_plates: OpenPlates, args: Args, kwargs: Kwargs) -> Values:
        """Run the guide, which opens the plates of its sites by itself: they are open already and are shown once."""
        with poutine.block(hide=[frame.name for site in self.sites for frame in site.frames]):
            return dict(self.guide(*args, **kwargs))

    def label(self, name: str) -> str:
        """Return the guide's class."""
        return self.kind
