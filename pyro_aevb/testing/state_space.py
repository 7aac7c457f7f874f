"""A linear-Gaussian state-space model."""

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyro_aevb.testing.base import ExactModel

__all__ = ["LinearGaussianStateSpace"]


@dataclass(frozen=True)
class LinearGaussianStateSpace(ExactModel):
    r"""A noisy autoregression watched through noise: sites ``z_1`` to ``z_T`` and ``x_1`` to ``x_T`` within each row.

    .. math:: z_1 \sim N(0, s^2), \quad z_t | z_{t-1} \sim N(a z_{t-1}, Q), \quad x_t | z_t \sim N(z_t, R), \quad
              \log p(x) = \sum_t \log N(x_t; \hat z_t, \hat P_t + R),

    with the one-step predictions of the Kalman filter (Kalman 1960). The guide runs forward, by the conditionals
    :math:`p(z_t | z_{t-1}, x_{t:T})` of the backward information filter; their marginals are those of the smoother of
    Rauch, Tung and Striebel (1965). Data are ``[rows, steps]``; the number of steps is read from them.

    Args:
        transition: The coefficient a.
        initial_scale: Standard deviation s of the first state.
        transition_scale: Standard deviation of the state noise, the root of Q.
        noise_scale: Standard deviation of an observation, the root of R.
        num_steps: Steps T when simulating.
    """

    transition: float = 0.9
    initial_scale: float = 1.0
    transition_scale: float = 0.5
    noise_scale: float = 0.3
    num_steps: int = 5

    @classmethod
    def fixture(cls, dtype: torch.dtype = torch.float64) -> tuple["LinearGaussianStateSpace", Tensor]:
        """Return z_1 ~ N(0, 1), a = .9, Q = .25, R = .09 and three rows of five steps."""
        rows, steps = torch.arange(1, 4, dtype=dtype), torch.arange(1, 6, dtype=dtype)
        return cls(), torch.sin(rows[:, None] * steps)

    def model(self, x: Float[Tensor, "rows steps"]) -> None:
        """Run the model."""
        prior = dist.Normal(x.new_zeros(()), self.initial_scale)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t + 1}", prior)
                pyro.sample(f"x_{t + 1}", dist.Normal(z, self.noise_scale), obs=x[:, t])
                prior = dist.Normal(self.transition * z, self.transition_scale)

    def guide(self, x: Float[Tensor, "rows steps"]) -> None:
        """Sample the states forward in time, each given the one before and the observations from it on."""
        z = x.new_zeros(len(x))
        with pyro.plate("data", len(x)):
            for t, (slope, intercept, variance) in enumerate(self._conditionals(x)):
                z = pyro.sample(f"z_{t + 1}", dist.Normal(slope * z + intercept, math.sqrt(variance)))

    def log_marginal(self, x: Float[Tensor, "rows steps"]) -> Float[Tensor, " rows"]:
        """Sum the log densities of the Kalman filter's prediction errors."""
        mean, variance = torch.zeros_like(x[:, 0]), self.initial_scale**2
        total = torch.zeros_like(mean)
        for t in range(x.shape[1]):
            innovation = variance + self.noise_scale**2
            total = total + dist.Normal(mean, math.sqrt(innovation)).log_prob(x[:, t])
            gain = variance / innovation
            mean = self.transition * (mean + gain * (x[:, t] - mean))
            variance = self.transition**2 * (1 - gain) * variance + self.transition_scale**2
        return total

    def posterior(self, x: Float[Tensor, "rows steps"]) -> dict[str, Distribution]:
        """Return the smoothed normal of each state."""
        mean, variance = torch.zeros_like(x[:, 0]), 0.0
        marginals: dict[str, Distribution] = {}
        for t, (slope, intercept, conditional) in enumerate(self._conditionals(x)):
            mean, variance = slope * mean + intercept, slope**2 * variance + conditional
            marginals[f"z_{t + 1}"] = dist.Normal(mean, math.sqrt(variance))
        return marginals

    def _conditionals(self, x: Float[Tensor, "rows steps"]) -> list[tuple[float, Tensor, float]]:
        r"""Return slope, intercept and variance of each p(z_t | z_{t-1}, x_t, ..., x_T).

        Backwards in time, the observations after t enter as
        :math:`p(x_{t+1:T} | z_t) \propto \exp(h z_t - J z_t^2 / 2)`.
        """
        information, linear = 0.0, torch.zeros_like(x[:, 0])
        conditionals = []
        for t in reversed(range(x.shape[1])):
            slope = self.transition if t else 0.0
            precision = (self.transition_scale if t else self.initial_scale) ** -2
            variance = 1 / (precision + self.noise_scale**-2 + information)
            linear = linear + x[:, t] / self.noise_scale**2
            conditionals.append((slope * precision * variance, linear * variance, variance))
            information = slope**2 * precision * (1 - precision * variance)
            linear = slope * precision * variance * linear
        return conditionals[::-1]

    def _template(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(num_rows, self.num_steps, dtype=dtype)
