r"""Log-weights and the terms that they are made of: the one quantity that everything else reduces.

For particle s, importance sample k and row n, in nats:

    local:   log w[s, k, n] = log p(x_n, z_n | g_s) - log q(z_n | x_n, g_s)
    global:  log w_g[s]     = log p(g_s) - log q(g_s) + every observed site and factor outside the data plate
    bound    = mean_s [ log w_g[s] + scale * sum_n R_k( log w[s, :, n] ) ]

R = mean gives the evidence lower bound (Kingma & Welling, arXiv 1312.6114, Eq 6 and 8), R = log-mean-exp the
importance-weighted bound (Burda et al., arXiv 1509.00519, Eq 8). The scale multiplies a row's bound and never enters a weight.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb._types import GlobalWeights, LocalWeights, PerRow, Scalar, SiteDistribution, Values

__all__ = ["Bounds", "LatentTerm", "LogWeights", "ObservedTerm", "Terms", "log_mean_exp"]


def log_mean_exp(log_weights: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    r"""Return :math:`\log \frac1K \sum_k e^{\ell_k}` along one dimension, without overflow.

    Example:
        >>> log_mean_exp(torch.tensor([0.0, 0.0]), dim=0)
        tensor(0.)
    """
    return torch.logsumexp(log_weights, dim) - math.log(log_weights.shape[dim])


@dataclass(frozen=True)
class LatentTerm:
    """What one latent site adds to the weights.

    Attributes:
        name: The site.
        is_local: Whether the site lies inside the data plate.
        value: The draw from the guide, with the particle axes that the program ran under.
        log_p: Log prior density, ``[S, K, rows]`` (local) or ``[S]`` (global), nats; 0 for a guide's auxiliary site.
        log_q: Log density of the guide, same shape, nats.
        kl: Closed form KL(q || p) of the site, same shape, nats, where it was asked for.
        p: The model's distribution at the site, one per run of the program; empty for an auxiliary site.
        q: The guide's distribution at the site, one per run of the program.
    """

    name: str
    is_local: bool
    value: Tensor
    log_p: Tensor
    log_q: Tensor
    kl: Tensor | None
    p: tuple[SiteDistribution, ...]
    q: tuple[SiteDistribution, ...]

    @property
    def negative_kl(self) -> Tensor:
        """An unbiased estimate of -KL(q || p) of the site: the closed form if there is one, else log p - log q."""
        return self.log_p - self.log_q if self.kl is None else -self.kl


@dataclass(frozen=True)
class ObservedTerm:
    """What one observed site or factor adds to the weights.

    Attributes:
        name: The site.
        is_local: Whether the site lies inside the data plate.
        log_p: Log likelihood, ``[S, K, rows]`` (local) or ``[S]`` (global), nats, masks applied.
    """

    name: str
    is_local: bool
    log_p: Tensor


@dataclass(frozen=True)
class Terms:
    """One run of model and guide, site by site.

    Attributes:
        latents: Latent sites in the model's order, then the guide's auxiliary sites.
        observed: Observed sites and factors.
        scale: num_data / rows in the batch; it multiplies a row's bound.
        shape: Numbers of particles S, importance samples K and rows.
        like: A tensor of the dtype and device of the densities, for models that lack local or global sites.
    """

    latents: tuple[LatentTerm, ...]
    observed: tuple[ObservedTerm, ...]
    scale: float | Tensor
    shape: tuple[int, int, int]
    like: Tensor

    @property
    def values(self) -> Values:
        """Values of the latent sites, auxiliary ones too, by name."""
        return {latent.name: latent.value for latent in self.latents}

    def sum_local(self, terms: list[Tensor]) -> LocalWeights:
        """Sum local terms of shape ``[S, K, rows]``; zeros where there are none."""
        return sum(terms, self.like.new_zeros(self.shape))

    def sum_global(self, terms: list[Tensor]) -> GlobalWeights:
        """Sum global terms of shape ``[S]``; zeros where there are none."""
        return sum(terms, self.like.new_zeros(self.shape[:1]))

    def log_weights(self) -> "LogWeights":
        """Sum the sites to log-weights, with densities alone and never a closed-form KL."""
        differences = [(latent.is_local, latent.log_p - latent.log_q) for latent in self.latents]
        parts = differences + [(site.is_local, site.log_p) for site in self.observed]
        return LogWeights(
            local=self.sum_local([part for is_local, part in parts if is_local]),
            global_=self.sum_global([part for is_local, part in parts if not is_local]),
            scale=self.scale,
        )


@dataclass(frozen=True)
class LogWeights:
    """Log-weights of one run of model and guide, in nats.

    Attributes:
        local: log w[s, k, n], shape ``[S, K, rows]``, unscaled.
        global_: log w_g[s], shape ``[S]``.
        scale: num_data / rows in the batch.
    """

    local: LocalWeights
    global_: GlobalWeights
    scale: float | Tensor

    def elbo(self) -> "Bounds":
        """Average over particles and importance samples: the evidence lower bound (arXiv 1312.6114, Eq 6)."""
        return Bounds(self.local.mean((0, 1)), self.global_.mean(), self.scale)

    def importance_weighted(self) -> "Bounds":
        """Log-mean-exp over importance samples, mean over particles (arXiv 1509.00519, Eq 8)."""
        return Bounds(log_mean_exp(self.local, 1).mean(0), self.global_.mean(), self.scale)


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on the log evidence, in nats, unscaled.

    Attributes:
        local: Bound of each row, ``[rows]``.
        global_: Part of the bound outside the data plate, scalar; 0 in a model without globals.
        scale: num_data / rows in the batch.
    """

    local: PerRow
    global_: Scalar
    scale: float | Tensor

    @property
    def total(self) -> Scalar:
        """The bound on the whole data set, global + scale * sum of local (arXiv 1312.6114, Eq 8)."""
        return self.global_ + self.scale * self.local.sum()
