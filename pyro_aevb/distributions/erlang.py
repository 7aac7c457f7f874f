"""The Erlang family: the waiting time for several events."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from pyro import distributions as dist
from torch import Tensor

from pyro_aevb.errors import SettingError

__all__ = ["Erlang"]


class Erlang(dist.Gamma):
    r"""Erlang distribution: a Gamma of integer shape, drawn as a sum (arXiv 1312.6114, section 2.4).

    .. math:: z = \frac1\lambda \sum_{i=1}^k \epsilon_i, \quad \epsilon_i \sim \mathrm{Exponential}(1)

    Density, moments, distribution function and closed-form KL are the Gamma's. A draw costs k exponential ones; the gradient in
    the rate is explicit, and k is fixed.

    Args:
        num_events: k, at least 1.
        rate: :math:`\lambda`.
        validate_args: Check parameters and values; ``None`` takes Pyro's setting.

    Raises:
        SettingError: If ``num_events`` is not an integer of at least 1.

    Example:
        >>> Erlang(3, torch.tensor(2.0)).mean
        tensor(1.5000)
    """

    def __init__(self, num_events: int, rate: Tensor | float, *, validate_args: bool | None = None) -> None:
        if not isinstance(num_events, int) or num_events < 1:
            raise SettingError(
                f"num_events must be an integer of at least 1, got {num_events!r}. Use Gamma for others."
            )
        self.num_events = num_events
        super().__init__(float(num_events), rate, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: "Erlang | None" = None) -> "Erlang":
        """Return the family with its rate expanded to a batch shape."""
        new = self._get_checked_instance(Erlang, _instance)
        new.num_events = self.num_events
        return super().expand(torch.Size(batch_shape), _instance=new)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw; the gradient passes to the rate."""
        shape = (self.num_events, *self._extended_shape(torch.Size(sample_shape)))
        return torch.empty(shape, dtype=self.rate.dtype, device=self.rate.device).exponential_().sum(0) / self.rate
