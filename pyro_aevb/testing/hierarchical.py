"""A hierarchical normal model whose spread between groups is unknown, by quadrature over it."""

import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_aevb._types import Scalar
from pyro_aevb.testing.base import ExactModel

__all__ = ["HierarchicalNormal"]

SEARCH_NODES = 2001
NEGLIGIBLE = 40.0
"""Nats below the highest density at which the posterior of log tau ends."""


@dataclass(frozen=True)
class HierarchicalNormal(ExactModel):
    r"""Groups of observations with unknown mean and spread: globals ``mu``, ``tau``, locals ``theta``, observed ``x``.

    .. math:: \mu \sim N(0, s^2), \quad \log\tau \sim N(m, r^2), \quad \theta_g \sim N(\mu, \tau^2), \quad
              x_{gi} \sim N(\theta_g, \sigma^2)

    (Gelman et al., Bayesian Data Analysis, 5.4). Data are ``[groups, observations]``: rows are the groups, plate ``"data"`` left
    of the plate ``"observations"``, so that ``theta`` is ``[groups, 1]``.

    Given tau all is normal, and the data enter by the G group means alone, those by their mean :math:`\bar x` and their sum of
    squares S about it: with :math:`v = \tau^2 + \sigma^2 / n`,

    .. math:: p(x | \tau) \propto v^{-(G - 1) / 2} e^{-S / 2 v} N(\bar x; 0, s^2 + v / G).

    What remains is an integral over :math:`\log\tau`, taken by the trapezoid rule where its density is above
    :math:`e^{-40}` of the highest: exact to rounding, since the density is smooth and both its ends vanish.

    Args:
        global_scale: Prior standard deviation s of mu.
        spread_loc: Prior mean m of log tau.
        spread_scale: Prior standard deviation r of log tau.
        noise_scale: Standard deviation sigma of an observation.
        num_observations: Observations a group when simulating.
        num_nodes: Nodes of the rule.
    """

    global_scale: float = 2.0
    spread_loc: float = -0.5
    spread_scale: float = 0.5
    noise_scale: float = 1.0
    num_observations: int = 8
    num_nodes: int = 121

    @classmethod
    def fixture(cls, dtype: torch.dtype = torch.float64) -> tuple["HierarchicalNormal", Tensor]:
        """Return the model of the default scales and five groups of four."""
        groups, observations = torch.arange(1, 6, dtype=dtype), torch.arange(1, 5, dtype=dtype)
        return cls(num_observations=4), 0.5 + torch.sin(groups[:, None] * 2) + torch.cos(
            3 * groups[:, None] + 2 * observations
        )

    def model(self, x: Float[Tensor, "groups observations"]) -> None:
        """Run the model."""
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), self.global_scale))
        tau = pyro.sample("tau", dist.LogNormal(x.new_tensor(self.spread_loc), self.spread_scale))
        with pyro.plate("data", len(x), dim=-2):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            with pyro.plate("observations", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(theta, self.noise_scale), obs=x)

    def guide(
        self, x: Float[Tensor, "groups observations"], data: Float[Tensor, "num_data observations"] | None = None
    ) -> None:
        """Sample ``tau`` from p(tau | data), ``mu`` from p(mu | tau, data), then ``theta`` from p(theta | x, mu, tau).

        Args:
            x: The batch.
            data: The whole data set of which ``x`` is a part (``functools.partial(m.guide, data=data)``); else ``x``.
        """
        whole = x if data is None else data
        tau = pyro.sample("tau", _SpreadPosterior(self, whole))
        mean, variance = self._mean_given_spread(whole, tau)
        mu = pyro.sample("mu", dist.Normal(mean, variance.sqrt()))
        pull, variance = self._pull(x, tau)
        with pyro.plate("data", len(x), dim=-2):
            group_mean = x.mean(-1, keepdim=True)
            pyro.sample("theta", dist.Normal(pull * group_mean + (1 - pull) * mu, variance.sqrt()))

    def log_marginal(self, x: Float[Tensor, "groups observations"]) -> Scalar:
        """Integrate over log tau; the joint evidence of all groups."""
        return _SpreadPosterior(self, x).log_evidence.to(x)

    def posterior(self, x: Float[Tensor, "groups observations"]) -> dict[str, Distribution]:
        """Return the posterior of ``tau`` and, as mixtures over the nodes of tau, of ``mu`` and ``theta`` ``[groups, 1]``."""
        spread = _SpreadPosterior(self, x)
        tau, logits = spread.nodes.exp().to(x), spread.log_weights.to(x)
        mean, variance = self._mean_given_spread(x, tau)
        pull, own_variance = self._pull(x, tau)
        theta_mean = pull * x.mean(-1)[:, None, None] + (1 - pull) * mean
        theta_scale = (own_variance + (1 - pull) ** 2 * variance).sqrt().expand_as(theta_mean)
        return {
            "mu": dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(mean, variance.sqrt())),
            "tau": spread,
            "theta": dist.MixtureSameFamily(
                dist.Categorical(logits=logits.expand_as(theta_mean)), dist.Normal(theta_mean, theta_scale)
            ),
        }

    def _pull(self, x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of a group's own mean in the mean of p(theta | x, mu, tau), and its variance."""
        noise = self.noise_scale**2 / x.shape[1]
        pull = tau**2 / (tau**2 + noise)
        return pull, pull * noise

    def _mean_given_spread(self, x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of p(mu | tau, x)."""
        variance = 1 / (self.global_scale**-2 + len(x) / (tau**2 + self.noise_scale**2 / x.shape[1]))
        return (1 - variance * self.global_scale**-2) * x.mean(), variance

    def _log_joint(self, x: Tensor, log_tau: Tensor) -> Tensor:
        """Compute log p(x, log tau), mu and theta integrated out; in float64."""
        x, log_tau = x.double(), log_tau.double()
        (groups, size), noise, centre = x.shape, self.noise_scale**2, x.mean()
        within = x - x.mean(-1, keepdim=True)
        square = ((x.mean(-1) - centre) ** 2).sum()
        spread = (2 * log_tau).exp() + noise / size
        inside = groups * ((size - 1) * math.log(2 * math.pi * noise) + math.log(size)) + (within**2).sum() / noise
        between = (groups - 1) * (2 * math.pi * spread).log() + math.log(groups) + square / spread
        centred = dist.Normal(torch.zeros_like(spread), (self.global_scale**2 + spread / groups).sqrt())
        prior = dist.Normal(self.spread_loc, self.spread_scale)
        return prior.log_prob(log_tau) - (inside + between) / 2 + centred.log_prob(centre)

    def _template(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(num_rows, self.num_observations, dtype=dtype)


class _SpreadPosterior(TorchDistribution):
    """p(tau | x), its density exact and its draws by the inverse of the piecewise linear distribution function.

    A draw carries no gradient to x.

    Args:
        model: The model.
        x: The data.
        batch_shape: How many, all alike.
    """

    arg_constraints = {}
    support = constraints.positive
    has_rsample = True

    def __init__(self, model: HierarchicalNormal, x: Tensor, batch_shape: Any = ()) -> None:
        self.model, self.x = model, x
        self.nodes = self._place_nodes(model.num_nodes)
        step = self.nodes[1] - self.nodes[0]
        log_density = model._log_joint(x, self.nodes)
        self.log_evidence = (log_density + step.log()).logsumexp(0)
        self.log_weights = log_density + step.log() - self.log_evidence
        super().__init__(torch.Size(batch_shape), validate_args=False)

    def _place_nodes(self, count: int) -> Float[Tensor, " nodes"]:
        """Return values of log tau, evenly over all that is not negligible."""
        reach = 10 * self.model.spread_scale
        search = self.model.spread_loc + torch.linspace(-reach, reach, SEARCH_NODES, dtype=torch.float64)
        log_density = self.model._log_joint(self.x, search.to(self.x.device))
        (kept,) = torch.where(log_density > log_density.max() - NEGLIGIBLE)
        first, last = search[max(int(kept[0]) - 1, 0)], search[min(int(kept[-1]) + 1, SEARCH_NODES - 1)]
        return torch.linspace(float(first), float(last), count, dtype=torch.float64, device=self.x.device)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_SpreadPosterior":
        return _SpreadPosterior(self.model, self.x, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        cumulative = self.log_weights.detach().exp().cumsum(0)
        cumulative = (cumulative - cumulative[0]) / (cumulative[-1] - cumulative[0])
        level = torch.rand(
            self._extended_shape(torch.Size(sample_shape)), dtype=cumulative.dtype, device=cumulative.device
        )
        above = torch.searchsorted(cumulative, level).clamp(1, len(cumulative) - 1)
        low, high = cumulative[above - 1], cumulative[above]
        share = (level - low) / (high - low).clamp_min(torch.finfo(level.dtype).tiny)
        # The sum up to a node is the distribution function half a step above it.
        log_tau = self.nodes[above - 1] + (share + 0.5) * (self.nodes[1] - self.nodes[0])
        return log_tau.exp().to(self.x)

    def log_prob(self, value: Tensor) -> Tensor:
        log_tau = value.double().log()
        log_density = self.model._log_joint(self.x, log_tau) - log_tau - self.log_evidence
        return log_density.to(self.x).expand(torch.broadcast_shapes(self.batch_shape, value.shape))

    @property
    def mean(self) -> Tensor:
        return self._moment(1).to(self.x).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        return (self._moment(2) - self._moment(1) ** 2).to(self.x).expand(self.batch_shape)

    def _moment(self, power: int) -> Tensor:
        return (self.log_weights.exp() * (power * self.nodes).exp()).sum()
