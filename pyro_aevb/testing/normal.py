"""Linear-Gaussian models: factor analysis, and row means around a global mean."""

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_aevb._types import Scalar
from pyro_aevb.testing.base import ExactModel, sample_marginal

__all__ = ["LinearGaussian", "LinearGaussianMeanField", "NormalNormal"]


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
        sample_marginal("z", self.posterior(x), len(x))

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
