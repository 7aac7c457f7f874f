"""Families of q(z | ...) at one site: from the outputs of a network to a distribution on the site's support."""

import abc
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ReshapeTransform
from torch.nn.functional import softplus
from typing_extensions import override

from pyro_aevb._types import SiteDistribution
from pyro_aevb.distributions.wrapped_normal import WrappedNormal
from pyro_aevb.errors import SettingError
from pyro_aevb.guides.coordinates import Coordinates, transformed
from pyro_aevb.program.coordinates import bijection

__all__ = ["Circular", "Diagonal", "Family", "Flow", "FullCovariance", "Spherical", "neural_spline_flow"]

_LARGEST_RAW = 10.0
_STRETCH = 3.0
"""Outputs of 1 are strong dependence, as they are large scales and locations: refinement and training are even-handed."""
_SMALLEST_SCALE = 1e-6
"""In units of the prior; a scale that underflows to 0 has no density."""


class Family(nn.Module, abc.ABC):
    """A family of distributions on a site's support, whose parameters a network gives.

    Args:
        coordinates: The site's unconstrained coordinates.
        init_scale: Scale at outputs of 0, in units of the prior.

    Attributes:
        num_outputs: Number of outputs of the network.
        label: Name of the family, for tables.
    """

    num_outputs: int
    label: str

    def __init__(self, coordinates: Coordinates, init_scale: float) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.shift = math.log(math.expm1(init_scale))

    @abc.abstractmethod
    def forward(self, outputs: Tensor, support: Constraint) -> SiteDistribution:
        """Return the distribution of outputs ``[*batch, num_outputs]``, of batch shape ``batch`` and the site's event shape."""

    def units(self, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return location and scale of each coordinate, in units of the prior, ``[*batch, D]``; ``None`` without coordinates."""
        return None

    def _scale(self, raw: Tensor) -> Tensor:
        # bounded, so that a scale that an early step has driven to 0 still has a gradient to come back by
        bounded = _LARGEST_RAW * (raw / _LARGEST_RAW).tanh()
        return softplus(bounded + self.shift) + _SMALLEST_SCALE


class Diagonal(Family):
    """Independent normals on the coordinates: loc = m + s * l, scale = s * softplus(10 tanh(r / 10) + c)."""

    label = "Normal"

    def __init__(self, coordinates: Coordinates, init_scale: float) -> None:
        super().__init__(coordinates, init_scale)
        self.num_outputs = 2 * coordinates.size

    def forward(self, outputs: Tensor, support: Constraint) -> SiteDistribution:
        """Return the distribution."""
        own = self.coordinates
        loc, raw = outputs.chunk(2, -1)
        shape = (*outputs.shape[:-1], *own.shape)
        loc, scale = (own.loc + own.scale * loc).reshape(shape), (own.scale * self._scale(raw)).reshape(shape)
        return transformed(dist.Normal(loc, scale), support, len(own.event_shape))

    @override
    def units(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = outputs.chunk(2, -1)
        return loc, self._scale(raw)


class FullCovariance(Family):
    """A multivariate normal on the coordinates, by its Cholesky factor L = diag(s) (I + 3 T), T strictly lower triangular."""

    label = "MultivariateNormal"

    def __init__(self, coordinates: Coordinates, init_scale: float) -> None:
        super().__init__(coordinates, init_scale)
        size = coordinates.size
        self.num_outputs = size + size * (size + 1) // 2
        rows, columns = torch.tril_indices(size, size, -1)
        below = torch.full((size, size), len(rows))
        below[rows, columns] = torch.arange(len(rows))
        self.register_buffer("below", below, persistent=False)

    def forward(self, outputs: Tensor, support: Constraint) -> SiteDistribution:
        """Return the distribution."""
        own = self.coordinates
        loc, factor = self.affine(outputs)
        base = dist.MultivariateNormal(own.loc + own.scale * loc, scale_tril=own.scale[:, None] * factor)
        return _onto(base, own, support)

    @override
    def units(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        loc, factor = self.affine(outputs)
        return loc, factor.square().sum(-1).sqrt()

    def affine(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and Cholesky factor in units of the prior."""
        size = self.coordinates.size
        loc, raw, off = outputs.split([size, size, self.num_outputs - 2 * size], -1)
        entries = torch.cat([off, torch.zeros_like(loc[..., :1])], -1)
        index: Any = self.below
        scale = self._scale(raw)
        # T and not L is what the network gives: entries of L far above its diagonal would have a solve blow up its rounding
        return loc, torch.diag_embed(scale) + _STRETCH * scale[..., None] * entries[..., index]


class Flow(Family):
    r"""A normalizing flow on the coordinates: :math:`z = T(m + s (l + L f(\epsilon; c)))`.

    The flow f and the affine map after it both depend on the network's outputs, so that the family holds the multivariate
    normals.

    Args:
        coordinates: The site's unconstrained coordinates.
        init_scale: Scale of the affine map at outputs of 0, in units of the prior.
        make_flow: Makes a Zuko flow from its number of features and of context.
        num_context: Length of the context c, part of the network's outputs; 0 for a flow that depends on nothing.

    Raises:
        SettingError: If the flow has no invertible transform.
    """

    label = "Flow"

    def __init__(
        self, coordinates: Coordinates, init_scale: float, make_flow: Callable[[int, int], nn.Module], num_context: int
    ) -> None:
        super().__init__(coordinates, init_scale)
        self.normal = FullCovariance(coordinates, init_scale)
        self.num_context = num_context
        self.num_outputs = self.normal.num_outputs + num_context
        self.flow = make_flow(coordinates.size, num_context)
        if not hasattr(self.flow, "transform"):
            raise SettingError(
                f"flow must make a Zuko flow with an invertible transform (zuko.flows.NSF, MAF, ...), got "
                f"{type(self.flow).__name__}."
            )

    def forward(self, outputs: Tensor, support: Constraint) -> SiteDistribution:
        """Return the distribution."""
        own = self.coordinates
        affine, context = outputs.split([self.normal.num_outputs, self.num_context], -1)
        loc, factor = self.normal.affine(affine)
        flow = self.flow(context) if self.num_context else self.flow()
        base = flow.base.expand(outputs.shape[:-1])
        steps = [_FlowStep(flow.transform), _CholeskyStep(own.loc + own.scale * loc, own.scale[:, None] * factor)]
        return _onto(base, own, support, steps)

    @override
    def units(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.normal.units(outputs[..., : self.normal.num_outputs])


def neural_spline_flow(features: int, context: int) -> nn.Module:
    """Make the default flow: two neural spline couplings (Durkan et al. 2019, arXiv 1906.04032), drawn from and weighed fast."""
    is_validated = Distribution._validate_args
    from zuko.flows import NSF

    Distribution.set_default_validate_args(is_validated)  # importing Zuko switches the checks of all distributions off
    return NSF(features, context, transforms=2, passes=2, hidden_features=(64, 64))


class Circular(Family):
    """Wrapped normals on circles; a network gives a direction in the plane, so that it need not cut the circle."""

    label = "WrappedNormal"

    def __init__(self, coordinates: Coordinates, init_scale: float) -> None:
        super().__init__(coordinates, init_scale)
        self.num_outputs = 3 * coordinates.size

    def forward(self, outputs: Tensor, support: Constraint) -> SiteDistribution:
        """Return the distribution."""
        east, north, raw = outputs.chunk(3, -1)
        shape = (*outputs.shape[:-1], *self.coordinates.shape)
        loc = torch.atan2(north, 1.0 + east).reshape(shape)
        return WrappedNormal(loc, self._scale(raw).reshape(shape)).to_event(len(self.coordinates.event_shape))


class Spherical(Family):
    """Projected normals on spheres."""

    label = "ProjectedNormal"

    def __init__(self, coordinates: Coordinates, init_scale: float) -> None:
        super().__init__(coordinates, init_scale)
        self.num_outputs = coordinates.size

    def forward(self, outputs: Tensor, support: Constraint) -> SiteDistribution:
        """Return the distribution."""
        return dist.ProjectedNormal(outputs)


def _onto(
    base: SiteDistribution, coordinates: Coordinates, support: Constraint, steps: list[Transform] | None = None
) -> SiteDistribution:
    """Carry a distribution of flat coordinates ``[D]`` to the site's support."""
    steps = list(steps or [])
    if coordinates.shape != (coordinates.size,):
        steps.append(ReshapeTransform(torch.Size((coordinates.size,)), torch.Size(coordinates.shape)))
    transform = bijection(support)
    if transform is not None:
        steps.append(transform)
    return dist.TransformedDistribution(base, steps) if steps else base


class _FlowStep(Transform):
    """A Zuko flow from noise to data, remembering its last pair, so that a draw is weighed without inverting the flow."""

    domain = constraints.independent(constraints.real, 1)
    codomain = constraints.independent(constraints.real, 1)
    bijective = True

    def __init__(self, transform: Transform) -> None:
        super().__init__(cache_size=1)
        self.transform = transform

    def _call(self, x: Tensor) -> Tensor:
        return self.transform.inv(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.transform(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return minus the log Jacobian of the flow from data to noise."""
        return -self.transform.log_abs_det_jacobian(y, x)


class _CholeskyStep(Transform):
    """The affine map loc + L x, remembering its last pair."""

    domain = constraints.independent(constraints.real, 1)
    codomain = constraints.independent(constraints.real, 1)
    bijective = True

    def __init__(self, loc: Tensor, factor: Tensor) -> None:
        super().__init__(cache_size=1)
        self.loc = loc
        self.factor = factor

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + (self.factor @ x[..., None])[..., 0]

    def _inverse(self, y: Tensor) -> Tensor:
        centred = (y - self.loc)[..., None]
        shape = torch.broadcast_shapes(centred.shape[:-2], self.factor.shape[:-2])
        factor = self.factor.expand(*shape, *self.factor.shape[-2:])
        return torch.linalg.solve_triangular(factor, centred.expand(*shape, *centred.shape[-2:]), upper=False)[..., 0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log determinant of L."""
        return self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(x.shape[:-1])
