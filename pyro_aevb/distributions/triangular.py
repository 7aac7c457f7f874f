"""The triangular family: a density that rises to a peak and falls, both along straight lines."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints

from pyro_aevb.distributions.base import InverseCDF
from pyro_aevb.errors import SettingError

__all__ = ["Triangular"]


class Triangular(InverseCDF):
    r"""Triangular distribution on [low, high], whose ends move with what is trained.

    .. math:: z = \begin{cases} a + \sqrt{u (b - a) (c - a)} & u < (c - a) / (b - a) \\
              b - \sqrt{(1 - u) (b - a) (b - c)} & \text{else} \end{cases} \qquad u = 1 - e^{-\epsilon}

    With a fixed fraction (c - a) / (b - a) this is the paper's location a plus scale b - a times standard noise.

    Args:
        low: a.
        peak: c, the mode, from a to b.
        high: b, above a.
        validate_args: Check parameters and values; ``None`` takes Pyro's setting.

    Raises:
        SettingError: If arguments are validated and are not in this order.

    Example:
        >>> Triangular(0.0, 1.0, 4.0).log_prob(torch.tensor([1.0, 2.5])).exp()
        tensor([0.5000, 0.2500])
    """

    arg_constraints = {
        "low": constraints.real,
        "peak": constraints.real,
        "high": constraints.real,
    }
    low: Tensor
    peak: Tensor
    high: Tensor

    def __init__(
        self,
        low: Tensor | float,
        peak: Tensor | float,
        high: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(low=low, peak=peak, high=high, validate_args=validate_args)
        is_ordered = (self.low <= self.peak) & (self.peak <= self.high) & (self.low < self.high)
        if self._validate_args and not is_ordered.all():
            raise SettingError(
                f"Triangular needs low <= peak <= high and low < high everywhere, got low={low}, peak={peak} and high={high}."
            )

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The interval from low to high."""
        return constraints.interval(self.low, self.high)

    def _sides(self, is_left: Tensor) -> tuple[Tensor, Tensor]:
        """Return the end on a point's side of the peak, and the length of that side."""
        end = torch.where(is_left, self.low, self.high)
        return end, torch.where(is_left, self.peak - self.low, self.high - self.peak)

    def _transform(self, noise: Tensor) -> Tensor:
        width = self.high - self.low
        below, above = -(-noise).expm1(), (-noise).exp()
        is_left = below * width < self.peak - self.low
        end, length = self._sides(is_left)
        distance = torch.where(is_left, below, above).sqrt() * (width * length).sqrt()
        return torch.clamp(torch.where(is_left, end + distance, end - distance), self.low, self.high)

    def log_prob(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the log density in nats, minus infinity at a corner and outside."""
        is_inside = (self._checked(value) >= self.low) & (value <= self.high)
        is_left = value < self.peak
        end, length = self._sides(is_left)
        # a peak at an end has a side of length 0, where the density is that of the top
        height = torch.where(length > 0, (value - end).abs() / torch.where(length > 0, length, 1), 1)
        return torch.where(is_inside, (2 * height / (self.high - self.low)).log(), -torch.inf)

    def cdf(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the probability of a smaller value."""
        value = torch.clamp(self._checked(value), self.low, self.high)
        is_left = value < self.peak
        end, length = self._sides(is_left)
        tail = (value - end).square() / ((self.high - self.low) * torch.where(length > 0, length, 1))
        return torch.where(is_left, tail, 1 - tail)

    @property
    def mean(self) -> Float[Tensor, "..."]:
        """Mean."""
        return (self.low + self.peak + self.high) / 3

    @property
    def variance(self) -> Float[Tensor, "..."]:
        """Variance."""
        width, left = self.high - self.low, self.peak - self.low
        return (width.square() - width * left + left.square()) / 18

    @property
    def mode(self) -> Float[Tensor, "..."]:
        """The peak."""
        return self.peak

    def entropy(self) -> Float[Tensor, "..."]:
        """Return the differential entropy in nats."""
        return ((self.high - self.low) / 2).log() + 0.5
