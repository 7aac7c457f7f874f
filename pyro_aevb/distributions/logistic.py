"""The logistic family with draws that are finite in both tails."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from pyro import distributions as dist
from torch import Tensor

__all__ = ["Logistic"]


class Logistic(dist.Logistic):
    r"""Pyro's ``Logistic``, drawn from exponential noise.

    .. math:: z = \mu + s \log(e^\epsilon - 1), \quad \epsilon \sim \mathrm{Exponential}(1)

    Pyro takes the logit of a uniform draw, which in float32 is 0 once in :math:`2^{24}` draws, and z minus infinity.

    Attributes:
        loc: :math:`\mu`.
        scale: s.

    Example:
        >>> Logistic(torch.zeros(3), 1.0).rsample().shape
        torch.Size([3])
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw; the gradient passes to location and scale."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.empty(shape, dtype=self.loc.dtype, device=self.loc.device).exponential_()
        return self.loc + self.scale * (noise + (-(-noise).expm1()).log())
