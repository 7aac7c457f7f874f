"""The reciprocal family: uniform in the logarithm."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints

from pyro_aevb.distributions.base import InverseCDF
from pyro_aevb.errors import SettingError

__all__ = ["Reciprocal"]


class Reciprocal(InverseCDF):
    r"""Reciprocal (log-uniform) distribution on [low, high], whose ends move with what is trained.

    .. math:: z = a (b / a)^u, \quad u = 1 - e^{-\epsilon}, \quad p(z) = \frac{1}{z \log(b / a)}

    Args:
        low: a, above 0.
        high: b, above a.
        validate_args: Check parameters and values; ``None`` takes Pyro's setting.

    Raises:
        SettingError: If arguments are validated and ``low`` is not below ``high``.

    Example:
        >>> Reciprocal(1.0, 100.0).icdf(torch.tensor(0.5))
        tensor(10.)
    """

    arg_constraints = {"low": constraints.positive, "high": constraints.positive}
    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor | float, high: Tensor | float, *, validate_args: bool | None = None) -> None:
        super().__init__(low=low, high=high, validate_args=validate_args)
        if self._validate_args and not (self.low < self.high).all():
            raise SettingError(f"Reciprocal needs low < high everywhere, got low={low} and high={high}.")

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The interval from low to high."""
        return constraints.interval(self.low, self.high)

    @property
    def _log_ratio(self) -> Tensor:
        return self.high.log() - self.low.log()

    def _transform(self, noise: Tensor) -> Tensor:
        z = self.low * (-(-noise).expm1() * self._log_ratio).exp()
        return torch.clamp(z, self.low, self.high)  # rounding passes the end by a unit in the last place

    def log_prob(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the log density in nats, minus infinity outside the ends."""
        is_inside = (self._checked(value) >= self.low) & (value <= self.high)
        return torch.where(is_inside, -value.log() - self._log_ratio.log(), -torch.inf)

    def cdf(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the probability of a smaller value."""
        return ((self._checked(value).log() - self.low.log()) / self._log_ratio).clamp(0, 1)

    @property
    def mean(self) -> Float[Tensor, "..."]:
        """Mean."""
        return (self.high - self.low) / self._log_ratio

    @property
    def variance(self) -> Float[Tensor, "..."]:
        """Variance."""
        return (self.high.square() - self.low.square()) / (2 * self._log_ratio) - self.mean.square()

    def entropy(self) -> Float[Tensor, "..."]:
        """Return the differential entropy in nats."""
        return (self.low.log() + self.high.log()) / 2 + self._log_ratio.log()
