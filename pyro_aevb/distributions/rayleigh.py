"""The Rayleigh family: the length of a Gaussian vector in the plane."""

import math

from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints

from pyro_aevb.distributions.base import InverseCDF

__all__ = ["Rayleigh"]


class Rayleigh(InverseCDF):
    r"""Rayleigh distribution on the positive numbers.

    .. math:: z = \sigma \sqrt{2 \epsilon}, \quad p(z) = \frac{z}{\sigma^2} e^{-z^2 / 2 \sigma^2}

    Args:
        scale: :math:`\sigma`, the mode.
        validate_args: Check parameters and values; ``None`` takes Pyro's setting.

    Example:
        >>> Rayleigh(2.0).cdf(torch.tensor(2.0))
        tensor(0.3935)
    """

    arg_constraints = {"scale": constraints.positive}
    support = constraints.positive
    scale: Tensor

    def __init__(self, scale: Tensor | float, *, validate_args: bool | None = None) -> None:
        super().__init__(scale=scale, validate_args=validate_args)

    def _transform(self, noise: Tensor) -> Tensor:
        return self.scale * (2 * noise).sqrt()

    def log_prob(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the log density in nats."""
        z = self._checked(value) / self.scale
        return z.log() - self.scale.log() - z.square() / 2

    def cdf(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the probability of a smaller value."""
        return -(-(self._checked(value) / self.scale).square() / 2).expm1()

    @property
    def mean(self) -> Float[Tensor, "..."]:
        """Mean."""
        return self.scale * math.sqrt(math.pi / 2)

    @property
    def variance(self) -> Float[Tensor, "..."]:
        """Variance."""
        return self.scale.square() * (2 - math.pi / 2)

    @property
    def mode(self) -> Float[Tensor, "..."]:
        """The scale."""
        return self.scale
