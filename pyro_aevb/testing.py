r"""Models whose posterior and evidence are known exactly: oracles for whatever infers or estimates.

Each model is a small frozen object: its ``model`` and ``guide`` methods are Pyro programs for a batch, with the data
plate ``"data"``, and its guide *is* the posterior, so that :math:`\log p(x, z) - \log q(z | x) = \log p(x)` for
**every** z. Numbers are in nats. Methods compute in the dtype and on the device of the ``x`` they are given; what makes
its own tensors takes a ``dtype``, float64 by default, because an oracle should be exact.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_aevb._types import Scalar, Values
from pyro_aevb.errors import SettingError

__all__ = [
    "BetaBinomial",
    "EightSchools",
    "ExactModel",
    "GammaPoisson",
    "LinearGaussian",
    "LinearGaussianMeanField",
    "LinearGaussianStateSpace",
    "Moments",
    "NormalNormal",
]


class ExactModel(ABC):
    """A Pyro model of rows of data with its exact posterior and evidence."""

    @classmethod
    @abstractmethod
    def fixture(cls, dtype: torch.dtype = torch.float64) -> tuple["ExactModel", Tensor]:
        """Return one instance with data whose numbers are known from elsewhere.

        Args:
            dtype: Floating type of the data.

        Returns:
            The model and ``x``, the batch that its methods take.
        """

    @abstractmethod
    def model(self, x: Float[Tensor, "rows *event"]) -> None:
        """Run the generative model with ``x`` observed, as a Pyro program for a batch of rows."""

    @abstractmethod
    def guide(self, x: Float[Tensor, "rows *event"]) -> None:
        """Sample all latents from the exact posterior, as a Pyro guide for the same batch."""

    @abstractmethod
    def log_marginal(self, x: Float[Tensor, "rows *event"]) -> Float[Tensor, "*rows"]:
        r"""Compute :math:`\log p(x)` in closed form.

        Args:
            x: The batch.

        Returns:
            Nats, one entry a row; one number for the whole batch where the model has globals, which tie its rows.
        """

    @abstractmethod
    def posterior(self, x: Float[Tensor, "rows *event"]) -> dict[str, Distribution]:
        """Return the exact posterior marginal of each latent site.

        Args:
            x: The batch.

        Returns:
            Per site a distribution of batch shape ``[rows]``, or ``[]`` for a global.
        """

    @abstractmethod
    def _template(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        """Return any valid batch of that many rows; only its shape and dtype are used."""

    def simulate(self, num_rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Values]:
        """Draw data and their latents from the model.

        Args:
            num_rows: Number of rows, at least 1.
            seed: Seed of the draw, made on the CPU; the global random state is left as it was.
            dtype: Floating type of the draws.

        Returns:
            ``x`` and the value of each latent site.

        Raises:
            SettingError: If ``num_rows`` is below 1.
        """
        if num_rows < 1:
            raise SettingError(f"num_rows must be at least 1; got {num_rows}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trace = poutine.trace(poutine.uncondition(self.model)).get_trace(self._template(num_rows, dtype))
        sites: list[Any] = [site for site in trace.nodes.values() if site["type"] == "sample"]
        observed = [site["value"] for site in sites if site["infer"].get("was_observed")]
        latents = {
            site["name"]: site["value"]
            for site in sites
            if not site["infer"].get("was_observed") and not site_is_subsample(site)
        }
        return observed[0] if len(observed) == 1 else torch.stack(observed, -1), latents


def _sample_marginal(site: str, posterior: dict[str, Any], num_rows: int) -> None:
    """Run the guide of a model with one latent a row."""
    with pyro.plate("data", num_rows):
        pyro.sample(site, posterior[site])


@dataclass(frozen=True, eq=False)
class LinearGaussian(ExactModel):
    r"""Factor analysis, or probabilistic PCA where the noise variances are equal; sites ``z`` and ``x``.

    .. math:: z \sim N(0, I), \quad x | z \sim N(W z + b, \Psi), \quad
              \log p(x) = \log N(x; b, W W^T + \Psi), \quad p(z | x) = N(m, \Lambda^{-1}),

    with :math:`\Lambda = I + W^T \Psi^{-1} W` and :math:`m = \Lambda^{-1} W^T \Psi^{-1} (x - b)` (Tipping and Bishop
    1999; Bishop 2006, eq. 12.41). Data are ``[rows, observed]``.

    Args:
        weight: The loadings W.
        bias: The mean b of the data.
        noise_variance: The diagonal of Psi, positive.
    """

    weight: Float[Tensor, "observed latent"]
    bias: Float[Tensor, " observed"]
    noise_variance: Float[Tensor, " observed"]

    @classmethod
    def fixture(cls, dtype: torch.dtype = torch.float64) -> tuple["LinearGaussian", Tensor]:
        """Return 6 pixels, 3 latents, one row: log p(x) = -12.2620864, approximation gap .9138322 nats."""
        i, j = torch.arange(1, 7, dtype=dtype), torch.arange(1, 4, dtype=dtype)
        model = cls(torch.sin(i[:, None] + 2 * j), torch.cos(i), torch.full_like(i, 0.25))
        return model, torch.tensor([[0.5, -1.0, 0.25, 1.5, -0.75, 0.1]], dtype=dtype)

    def model(self, x: Float[Tensor, "rows observed"]) -> None:
        """Run the model."""
        weight, bias, scale = self.weight.to(x), self.bias.to(x), self.noise_variance.to(x).sqrt()
        prior = dist.Normal(weight.new_zeros(weight.shape[1]), weight.new_ones(weight.shape[1])).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ weight.T + bias, scale).to_event(1), obs=x)

    def guide(self, x: Float[Tensor, "rows observed"]) -> None:
        """Sample z from its full-covariance posterior."""
        _sample_marginal("z", self.posterior(x), len(x))

    def log_marginal(self, x: Float[Tensor, "rows observed"]) -> Float[Tensor, " rows"]:
        """Evaluate the normal marginal of each row."""
        weight = self.weight.to(x)
        covariance = weight @ weight.T + self.noise_variance.to(x).diag()
        return dist.MultivariateNormal(self.bias.to(x), covariance).log_prob(x)

    def posterior(self, x: Float[Tensor, "rows observed"]) -> dict[str, Distribution]:
        """Return the multivariate normal of ``z``."""
        gain, precision = self._encoder(x)
        return {"z": dist.MultivariateNormal((x - self.bias.to(x)) @ gain.T, precision_matrix=precision)}

    def mean_field_posterior(self, x: Float[Tensor, "rows observed"]) -> Distribution:
        r"""Return the best factorised q(z | x): exact mean, variances :math:`1 / \Lambda_{jj}` (Bishop 2006, 10.1.2).

        Args:
            x: The batch.

        Returns:
            A normal of batch shape ``[rows]``; its ELBO is ``log_marginal(x) - approximation_gap()``.
        """
        gain, precision = self._encoder(x)
        return dist.Normal((x - self.bias.to(x)) @ gain.T, precision.diagonal().rsqrt()).to_event(1)

    def approximation_gap(self) -> Scalar:
        r"""Return :math:`\frac12 (\sum_j \log \Lambda_{jj} - \log |\Lambda|)`.

        Returns:
            Nats that the ELBO of :meth:`mean_field_posterior` lies below ``log_marginal``, the same for every row.
        """
        precision = self._encoder(self.weight)[1]
        return (precision.diagonal().log().sum() - precision.logdet()) / 2

    def mean_field_guide(
        self, *, at_optimum: bool = False, dtype: torch.dtype = torch.float64
    ) -> "LinearGaussianMeanField":
        """Make a trainable factorised guide, whose family holds the best one.

        Args:
            at_optimum: Start at :meth:`mean_field_posterior`; else at the prior.
            dtype: Floating type of its parameters.

        Returns:
            A guide with parameters of its own.
        """
        observed, latent = self.weight.shape
        guide = LinearGaussianMeanField(observed, latent).to(dtype)
        if at_optimum:
            gain, precision = self._encoder(guide.weight)
            with torch.no_grad():
                guide.weight.copy_(gain)
                guide.bias.copy_(-gain @ self.bias.to(gain))
                guide.log_scale.copy_(-precision.diagonal().log() / 2)
        return guide

    def _encoder(self, like: Tensor) -> tuple[Float[Tensor, "latent observed"], Float[Tensor, "latent latent"]]:
        """Return the matrix that takes x - b to the posterior mean, and the posterior precision."""
        weight = self.weight.to(like)
        scaled = weight.T / self.noise_variance.to(like)
        precision = torch.eye(weight.shape[1]).to(like) + scaled @ weight
        return torch.linalg.solve(precision, scaled), precision

    def _template(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(num_rows, len(self.bias), dtype=dtype)


class LinearGaussianMeanField(nn.Module):
    r"""The trainable guide :math:`q(z | x) = N(A x + c, \mathrm{diag}(s^2))` of :class:`LinearGaussian`.

    It starts at the prior. It is a plain module: an objective called as a module finds its parameters; for
    ``pyro.infer.SVI`` wrap it by ``pyro.module``.

    Args:
        observed: Length of a row of data.
        latent: Number of latents.
    """

    def __init__(self, observed: int, latent: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(latent, observed))
        self.bias = nn.Parameter(torch.zeros(latent))
        self.log_scale = nn.Parameter(torch.zeros(latent))

    def forward(self, x: Float[Tensor, "rows observed"]) -> None:
        """Sample ``z``, as a Pyro guide.

        Args:
            x: The batch.
        """
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.weight.T + self.bias, self.log_scale.exp()).to_event(1))


@dataclass(frozen=True)
class NormalNormal(ExactModel):
    r"""Row means around a global mean: sites ``g`` (global), ``z`` and ``x``.

    .. math:: g \sim N(0, s^2), \quad z_n | g \sim N(g, \tau^2), \quad x_n | z_n \sim N(z_n, \sigma^2), \quad
              x \sim N(0, v I + s^2 1 1^T), \quad v = \tau^2 + \sigma^2,

    the two-level normal model (Gelman et al., Bayesian Data Analysis, 5.4). Data are ``[rows]``.

    Args:
        global_scale: Prior standard deviation s of the global mean.
        local_scale: Standard deviation tau of a row's mean about the global one.
        noise_scale: Standard deviation sigma of an observation.
    """

    global_scale: float = 2.0
    local_scale: float = 0.7
    noise_scale: float = 0.5

    @classmethod
    def fixture(cls, dtype: torch.dtype = torch.float64) -> tuple["NormalNormal", Tensor]:
        """Return the model of the default scales and eight rows."""
        return cls(), torch.tensor([1.2, 0.3, -0.4, 2.1, 0.9, 1.7, -0.2, 0.6], dtype=dtype)

    def model(self, x: Float[Tensor, " rows"]) -> None:
        """Run the model."""
        g = pyro.sample("g", dist.Normal(x.new_zeros(()), self.global_scale))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, self.local_scale))
            pyro.sample("x", dist.Normal(z, self.noise_scale), obs=x)

    def guide(self, x: Float[Tensor, " rows"], data: Float[Tensor, " num_data"] | None = None) -> None:
        """Sample ``g`` from p(g | data), then ``z`` from p(z | x, g).

        Args:
            x: The batch.
            data: The whole data set of which ``x`` is a part (``functools.partial(m.guide, data=data)``); else ``x``.
        """
        mean, global_variance = self._global_posterior(x if data is None else data)
        g = pyro.sample("g", dist.Normal(mean, math.sqrt(global_variance)))
        slope, variance = self._local_posterior()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * g + (1 - slope) * x, math.sqrt(variance)))

    def log_marginal(self, x: Float[Tensor, " rows"]) -> Scalar:
        """Compute the joint evidence of all rows, by the matrix determinant and inversion lemmas."""
        variance = self.local_scale**2 + self.noise_scale**2
        shrunk = 1 / self.global_scale**2 + len(x) / variance
        independent = dist.Normal(x.new_zeros(()), math.sqrt(variance)).log_prob(x).sum()
        return independent - math.log(shrunk * self.global_scale**2) / 2 + (x.sum() / variance) ** 2 / shrunk / 2

    def log_predictive(self, x: Float[Tensor, " rows"], data: Float[Tensor, " num_data"]) -> Float[Tensor, " rows"]:
        r"""Compute :math:`\log p(x_n | \mathrm{data})` of new rows, one by one, each without the others.

        Args:
            x: New rows.
            data: Rows seen before.

        Returns:
            Nats, one entry a row.
        """
        mean, variance = self._global_posterior(data)
        return dist.Normal(mean, math.sqrt(variance + self.local_scale**2 + self.noise_scale**2)).log_prob(x)

    def posterior(self, x: Float[Tensor, " rows"]) -> dict[str, Distribution]:
        """Return the normals of ``g`` and, ``g`` integrated out, of ``z``."""
        mean, variance = self._global_posterior(x)
        slope, local_variance = self._local_posterior()
        z = dist.Normal(slope * mean + (1 - slope) * x, math.sqrt(local_variance + slope**2 * variance))
        return {"g": dist.Normal(mean, math.sqrt(variance)), "z": z}

    def _global_posterior(self, data: Float[Tensor, " num_data"]) -> tuple[Scalar, float]:
        """Return mean and variance of p(g | data)."""
        variance = self.local_scale**2 + self.noise_scale**2
        precision = 1 / self.global_scale**2 + len(data) / variance
        return data.sum() / variance / precision, 1 / precision

    def _local_posterior(self) -> tuple[float, float]:
        """Return the weight of g in the mean of p(z_n | x_n, g), and its variance."""
        precision = self.local_scale**-2 + self.noise_scale**-2
        return self.local_scale**-2 / precision, 1 / precision

    def _template(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(num_rows, dtype=dtype)


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
        _sample_marginal("rate", self.posterior(x), len(x))

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
        _sample_marginal("probability", self.posterior(x), len(x))

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
