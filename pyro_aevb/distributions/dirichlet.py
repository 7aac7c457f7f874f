"""Dirichlet and Beta as normalised Gammas, which a recorded graph can differentiate."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from pyro import distributions as dist
from torch import Tensor

__all__ = ["Beta", "Dirichlet"]


class Dirichlet(dist.Dirichlet):
    r"""torch's ``Dirichlet``, drawn as normalised Gammas (arXiv 1312.6114, section 2.4, 3).

    .. math:: z_i = g_i / \sum_j g_j, \quad g_i \sim \mathrm{Gamma}(\alpha_i, 1)

    torch's own draws have no derivative in a recorded graph. Gammas are kept as logarithms, so that small concentrations do not
    underflow. Density, moments and closed-form KL are torch's.

    Attributes:
        concentration: :math:`\alpha`, ``[..., event]``.

    Example:
        >>> Dirichlet(torch.tensor([0.5, 1.0, 2.0])).rsample((4,)).sum(-1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000])
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "... event"]:
        """Draw; the gradient passes to the concentrations."""
        shape = self._extended_shape(torch.Size(sample_shape))
        z = _log_gamma_draw(self.concentration.expand(shape)).softmax(-1)
        return z.clamp(min=torch.finfo(z.dtype).tiny)


class Beta(dist.Beta):
    r"""torch's ``Beta``, drawn from two Gammas (arXiv 1312.6114, section 2.4, 3).

    .. math:: z = \frac{g_1}{g_1 + g_0}, \quad g_1 \sim \mathrm{Gamma}(a, 1), \quad g_0 \sim \mathrm{Gamma}(b, 1)

    torch's own draws have no derivative in a recorded graph. Draws keep off 0 and 1, where the density can be infinite. Density,
    moments and closed-form KL are torch's.

    Attributes:
        concentration1: a, of values near 1.
        concentration0: b, of values near 0.

    Example:
        >>> Beta(torch.full((3,), 2.0), 3.0).rsample().shape
        torch.Size([3])
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw; the gradient passes to both concentrations."""
        shape = self._extended_shape(torch.Size(sample_shape))
        logit = _log_gamma_draw(self.concentration1.expand(shape)) - _log_gamma_draw(self.concentration0.expand(shape))
        limits = torch.finfo(logit.dtype)
        return logit.sigmoid().clamp(limits.tiny, 1 - limits.eps)


def _log_gamma_draw(concentration: Tensor) -> Tensor:
    r"""Draw the logarithm of a Gamma of rate 1.

    Below shape 1, :math:`\mathrm{Gamma}(a) = \mathrm{Gamma}(a + 1) U^{1/a}` (Marsaglia & Tsang 2000), whose logarithm is finite
    however small a is. Not above: it would add noise to the gradient.
    """
    is_small = concentration < 1
    gamma = dist.Gamma(concentration + is_small.to(concentration), 1.0, validate_args=False).rsample()
    noise = torch.empty_like(concentration).exponential_()
    return gamma.log() - torch.where(is_small, noise / concentration, 0)
