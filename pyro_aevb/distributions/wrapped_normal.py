"""The normal distribution wrapped around the circle."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints

from pyro_aevb.distributions.base import Univariate

__all__ = ["WrappedNormal"]

_TURN = 2 * math.pi
_SCALE_OF_EQUAL_SPEED = math.sqrt(_TURN)
"""Where the terms of both series fall off equally fast, as exp(-pi n^2)."""
_NUM_TERMS = 3
"""Terms on each side; the first one left out is below 1e-16 of the density."""


class WrappedNormal(Univariate):
    r"""Normal distribution wrapped around the circle, as angles in [-pi, pi].

    .. math:: z = \mathrm{wrap}(\mu + \sigma \epsilon), \quad \epsilon \sim \mathcal N(0, 1), \quad
              \mathrm{wrap}(y) = (y + \pi) \bmod 2 \pi - \pi

    .. math:: p(z) = \sum_k \mathcal N(z + 2 \pi k; \mu, \sigma^2)
              = \frac{1}{2 \pi} \Big( 1 + 2 \sum_{n \geq 1} e^{-n^2 \sigma^2 / 2} \cos n (z - \mu) \Big)

    (Mardia & Jupp, Directional Statistics, 3.5.7). The first series serves small scales, the second large ones; both are exact to
    rounding. A posterior for angles with a ``VonMises`` prior, which has no rsample.

    The gradient of E[f(z)] is right for f of period :math:`2 \pi`, as the densities of angles have: any other f jumps where a
    draw passes from pi to -pi.

    Args:
        loc: :math:`\mu`, any number.
        scale: :math:`\sigma`, of the normal before it is wrapped; the distribution tends to the uniform one as it grows.
        validate_args: Check parameters and values; ``None`` takes Pyro's setting.

    Example:
        >>> WrappedNormal(3.0, torch.tensor([0.5, 50.0])).log_prob(torch.tensor(-3.0)).exp()
        tensor([0.6796, 0.1592])
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.interval(-math.pi, math.pi)
    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor | float, scale: Tensor | float, *, validate_args: bool | None = None) -> None:
        super().__init__(loc=loc, scale=scale, validate_args=validate_args)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw; the gradient passes to location and scale."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.empty(shape, dtype=self.loc.dtype, device=self.loc.device).normal_()
        return _wrap(self.loc + self.scale * noise)

    def log_prob(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the log density in nats."""
        angle = _wrap(self._checked(value) - self.loc)
        narrow = _log_sum_of_images(angle, self.scale)
        # three waves are no density at small scales: their sum passes 0, where even a gradient that is not taken is NaN
        wide = _log_fourier_sum(angle, self.scale.clamp(min=_SCALE_OF_EQUAL_SPEED))
        return torch.where(self.scale < _SCALE_OF_EQUAL_SPEED, narrow, wide)

    @property
    def mean(self) -> Float[Tensor, "..."]:
        """The mean direction."""
        return _wrap(self.loc)

    @property
    def variance(self) -> Float[Tensor, "..."]:
        r"""The circular variance :math:`1 - |E e^{i z}|`, as of ``VonMises``."""
        return -(-self.scale.square() / 2).expm1()


def _wrap(angle: Tensor) -> Tensor:
    return torch.remainder(angle + math.pi, _TURN) - math.pi


def _log_sum_of_images(angle: Tensor, scale: Tensor) -> Tensor:
    turns = torch.arange(-_NUM_TERMS, _NUM_TERMS + 1, dtype=angle.dtype, device=angle.device)
    z = (angle[..., None] + _TURN * turns) / scale[..., None]
    return (-z.square() / 2).logsumexp(-1) - scale.log() - math.log(_TURN) / 2


def _log_fourier_sum(angle: Tensor, scale: Tensor) -> Tensor:
    n = torch.arange(1, _NUM_TERMS + 1, dtype=angle.dtype, device=angle.device)
    waves = (-(n * scale[..., None]).square() / 2).exp() * (n * angle[..., None]).cos()
    return (2 * waves.sum(-1)).log1p() - math.log(_TURN)
