"""Eight schools: a joint model without rows, by one-dimensional quadrature."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb._types import Scalar

__all__ = ["EightSchools", "Moments"]


class Moments(NamedTuple):
    """Posterior mean and standard deviation, named as a distribution's are."""

    mean: Tensor
    stddev: Tensor


@dataclass(frozen=True)
class EightSchools:
    r"""Eight schools, non-centred: sites ``mu``, ``tau``, ``theta_trans`` in the plate ``"schools"``, ``y`` observed.

    .. math:: \mu \sim N(0, 5^2), \quad \tau \sim \mathrm{HalfCauchy}(5), \quad \theta_j = \mu + \tau \tilde\theta_j,
              \quad \tilde\theta_j \sim N(0, 1), \quad y_j \sim N(\theta_j, \sigma_j^2)

    (Rubin 1981; Gelman et al., Bayesian Data Analysis, 5.5). All schools together are one observation: there is no data
    plate, and no guide, since the posterior has no closed form. Given tau everything else is normal, so evidence and
    moments are one-dimensional integrals, taken over the prior quantile :math:`u` of :math:`\tau = 5 \tan(\pi u / 2)`
    by Gauss-Legendre quadrature.

    Args:
        standard_errors: The known sigma of each school.
        num_nodes: Quadrature nodes; 400 are exact to rounding.
    """

    standard_errors: tuple[float, ...] = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
    num_nodes: int = 400

    @classmethod
    def fixture(cls, dtype: torch.dtype = torch.float64) -> tuple["EightSchools", Float[Tensor, " schools"]]:
        """Return the model and the eight effects ``y``: log p(y) = -31.3113474.

        Args:
            dtype: Floating type of the data.

        Returns:
            The model and ``y``.
        """
        return cls(), torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=dtype)

    def model(self, y: Float[Tensor, " schools"]) -> None:
        """Run the model.

        Args:
            y: Estimated effect of each school.
        """
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
        with pyro.plate("schools", len(y)):
            theta_trans = pyro.sample("theta_trans", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta_trans, y.new_tensor(self.standard_errors)), obs=y)

    def log_marginal(self, y: Float[Tensor, " schools"]) -> Scalar:
        r"""Integrate :math:`p(y | \tau) = N(y; 0, \mathrm{diag}(\sigma^2 + \tau^2) + 25 \cdot 1 1^T)` over tau's prior.

        Args:
            y: Estimated effect of each school.

        Returns:
            The joint evidence, in nats.
        """
        return self._tau_grid(y)[1].logsumexp(0)

    def posterior(self, y: Float[Tensor, " schools"]) -> dict[str, Moments]:
        """Compute the posterior mean and standard deviation of each site, and of the effects ``theta`` themselves.

        Args:
            y: Estimated effect of each school.

        Returns:
            Moments of ``mu`` and ``tau`` ``[]``, of ``theta`` and ``theta_trans`` ``[schools]``.
        """
        tau, log_weights = self._tau_grid(y)
        variance = y.new_tensor(self.standard_errors) ** 2
        spread = variance + tau[:, None] ** 2
        mu_variance = 1 / (1 / 25 + (1 / spread).sum(-1, keepdim=True))
        mu = mu_variance * (y / spread).sum(-1, keepdim=True)
        pull = tau[:, None] ** 2 / spread  # the weight of a school's own datum in the mean of theta given mu and tau
        slope = tau[:, None] / spread
        given_tau = {
            "mu": (mu[:, 0], mu_variance[:, 0]),
            "tau": (tau, torch.zeros_like(tau)),
            "theta": (pull * y + (1 - pull) * mu, pull * variance + (1 - pull) ** 2 * mu_variance),
            "theta_trans": (slope * (y - mu), 1 - pull + slope**2 * mu_variance),
        }
        weights = log_weights.softmax(0)
        return {site: _mixture_moments(weights, mean, variance) for site, (mean, variance) in given_tau.items()}

    def _tau_grid(self, y: Float[Tensor, " schools"]) -> tuple[Float[Tensor, " nodes"], Float[Tensor, " nodes"]]:
        """Return the nodes of tau and the log of weight times p(y | tau) at each."""
        nodes, weights = (y.new_tensor(values) for values in np.polynomial.legendre.leggauss(self.num_nodes))
        tau = 5 * torch.tan(math.pi / 4 * (nodes + 1))
        diagonal = y.new_tensor(self.standard_errors) ** 2 + tau[:, None] ** 2
        marginal = dist.MultivariateNormal(torch.zeros_like(y), torch.diag_embed(diagonal) + 25)
        return tau, (weights / 2).log() + marginal.log_prob(y)


def _mixture_moments(
    weights: Float[Tensor, " nodes"], mean: Float[Tensor, "nodes *event"], variance: Float[Tensor, "nodes *event"]
) -> Moments:
    """Apply the laws of total expectation and variance."""
    total = torch.tensordot(weights, mean, 1)
    return Moments(total, torch.tensordot(weights, variance + (mean - total) ** 2, 1).sqrt())
