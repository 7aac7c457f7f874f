"""The uniform family with a density at both ends, where float32 draws fall."""

import torch
from jaxtyping import Float
from pyro import distributions as dist
from torch import Tensor

__all__ = ["Uniform"]


class Uniform(dist.Uniform):
    r"""torch's ``Uniform`` with its upper end inside: :math:`z = a + (b - a) u`, :math:`p(z) = 1 / (b - a)` on [a, b].

    A float32 draw can round to b (once in 3e5 draws on [100, 101]), where torch's log density is minus infinity, and a bound too.

    Attributes:
        low: a.
        high: b, above a.

    Example:
        >>> Uniform(0.0, 2.0).log_prob(torch.tensor([0.0, 2.0])).exp()
        tensor([0.5000, 0.5000])
    """

    def log_prob(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the log density in nats, minus infinity outside the ends."""
        if self._validate_args:
            self._validate_sample(value)
        is_inside = (value >= self.low) & (value <= self.high)
        return torch.where(is_inside, -(self.high - self.low).log(), -torch.inf)
