"""Conjugate models of counts."""

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyro_aevb.testing.base import ExactModel, sample_marginal

__all__ = ["BetaBinomial", "GammaPoisson"]


@dataclass(frozen=True)
class GammaPoisson(ExactModel):
    r"""Counts with a rate per row: sites ``rate`` and ``x``.

    .. math:: \lambda \sim \mathrm{Gamma}(a, b), \quad x_i | \lambda \sim \mathrm{Poisson}(\lambda), \quad
              p(\lambda | x) = \mathrm{Gamma}(a + S, b + n), \quad S = \sum_i x_i,

    .. math:: \log p(x) = a \log b - \log\Gamma(a) + \log\Gamma(a + S) - (a + S) \log(b + n) - \sum_i \log x_i!

    (Gelman et al., Bayesian Data Analysis, 2.6). Data are ``[rows, counts]``.

    Args:
        concentration: Prior shape a.
        rate: Prior rate b.
        num_counts: Counts a row when simulating.
    """

    concentration: float = 2.0
    rate: float = 1.5
    num_counts: int = 5

    @classmethod
    def fixture(cls, dtype: torch.dtype = torch.float64) -> tuple["GammaPoisson", Tensor]:
        """Return Gamma(2, 1.5) and one row: log p(x) = -10.9959383, posterior mean 2.4615385."""
        return cls(), torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0]], dtype=dtype)

    def model(self, x: Float[Tensor, "rows counts"]) -> None:
        """Run the model."""
        prior = dist.Gamma(x.new_tensor(self.concentration), x.new_tensor(self.rate))
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", prior)
            counts = dist.Poisson(rate[..., None].expand(*rate.shape, x.shape[-1]))
            pyro.sample("x", counts.to_event(1), obs=x)

    def guide(self, x: Float[Tensor, "rows counts"]) -> None:
        """Sample the gamma posterior."""
        sample_marginal("rate", self.posterior(x), len(x))

    def log_marginal(self, x: Float[Tensor, "rows counts"]) -> Float[Tensor, " rows"]:
        """Evaluate the formula above."""
        concentration = self.concentration + x.sum(-1)
        prior = self.concentration * math.log(self.rate) - math.lgamma(self.concentration)
        posterior = concentration * math.log(self.rate + x.shape[-1]) - concentration.lgamma()
        return prior - posterior - (x + 1).lgamma().sum(-1)

    def posterior(self, x: Float[Tensor, "rows counts"]) -> dict[str, Distribution]:
        """Return the gamma of ``rate``."""
        return {"rate": dist.Gamma(self.concentration + x.sum(-1), x.new_tensor(self.rate + x.shape[-1]))}

    def _template(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(num_rows, self.num_counts, dtype=dtype)


@dataclass(frozen=True)
class BetaBinomial(ExactModel):
    r"""Successes with a probability per row: sites ``probability`` and ``x``.

    .. math:: \pi \sim \mathrm{Beta}(a, b), \quad x_i | \pi \sim \mathrm{Binomial}(m, \pi), \quad
              p(\pi | x) = \mathrm{Beta}(a + S, b + n m - S), \quad S = \sum_i x_i,

    .. math:: \log p(x) = \log B(a + S, b + n m - S) - \log B(a, b) + \sum_i \log \tbinom{m}{x_i}

    (Gelman et al., Bayesian Data Analysis, 2.4). Data are ``[rows, counts]``.

    Args:
        concentration1: Prior a, of success.
        concentration0: Prior b, of failure.
        total_count: Trials m behind each count.
        num_counts: Counts a row when simulating.
    """

    concentration1: float = 2.0
    concentration0: float = 3.0
    total_count: int = 10
    num_counts: int = 1

    @classmethod
    def fixture(cls, dtype: torch.dtype = torch.float64) -> tuple["BetaBinomial", Tensor]:
        """Return Beta(2, 3) and 7 successes of 10: log p(x) = -2.5267281, posterior mean .6."""
        return cls(), torch.tensor([[7.0]], dtype=dtype)

    def model(self, x: Float[Tensor, "rows counts"]) -> None:
        """Run the model."""
        prior = dist.Beta(x.new_tensor(self.concentration1), x.new_tensor(self.concentration0))
        with pyro.plate("data", len(x)):
            probability = pyro.sample("probability", prior)
            probs = probability[..., None].expand(*probability.shape, x.shape[-1])
            pyro.sample("x", dist.Binomial(self.total_count, probs).to_event(1), obs=x)

    def guide(self, x: Float[Tensor, "rows counts"]) -> None:
        """Sample the beta posterior."""
        sample_marginal("probability", self.posterior(x), len(x))

    def log_marginal(self, x: Float[Tensor, "rows counts"]) -> Float[Tensor, " rows"]:
        """Evaluate the formula above."""
        prior = (x.new_tensor(self.concentration1), x.new_tensor(self.concentration0))
        total = x.new_tensor(self.total_count)
        log_choose = (total + 1).lgamma() - (x + 1).lgamma() - (total - x + 1).lgamma()
        return _log_beta(*self._concentrations(x)) - _log_beta(*prior) + log_choose.sum(-1)

    def posterior(self, x: Float[Tensor, "rows counts"]) -> dict[str, Distribution]:
        """Return the beta of ``probability``."""
        return {"probability": dist.Beta(*self._concentrations(x))}

    def _concentrations(self, x: Float[Tensor, "rows counts"]) -> tuple[Tensor, Tensor]:
        successes = x.sum(-1)
        return self.concentration1 + successes, self.concentration0 + self.total_count * x.shape[-1] - successes

    def _template(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(num_rows, self.num_counts, dtype=dtype)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return a.lgamma() + b.lgamma() - (a + b).lgamma()
