r"""A Gaussian fitted to each row's posterior draws: the density that bridge and reciprocal sampling compare the posterior with.

It lives in unconstrained space. A full covariance needs many draws a coordinate; with fewer the fitted correlations are noise, and
a diagonal one is closer to the posterior.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pyro_aevb.errors import SettingError

__all__ = ["DRAWS_PER_COORDINATE", "RowGaussian", "fit_gaussian"]

DRAWS_PER_COORDINATE = 10
"""A full covariance is fitted from at least so many draws a coordinate; else a diagonal one."""


@dataclass(frozen=True)
class RowGaussian:
    r"""A Gaussian of each row, :math:`u = m + s \odot L \epsilon`, with :math:`L L^T` the matrix of correlations.

    Attributes:
        mean: m.
        scale: Standard deviations s, positive.
        factor: The lower triangular L with rows of length 1; ``None`` where coordinates are independent.
    """

    mean: Float[Tensor, "rows event"]
    scale: Float[Tensor, "rows event"]
    factor: Float[Tensor, "rows event event"] | None = None

    @property
    def dim(self) -> int:
        """Number of coordinates D."""
        return self.mean.shape[-1]

    def standardise(self, u: Float[Tensor, "*draws rows event"]) -> Float[Tensor, "*draws rows event"]:
        r"""Return :math:`\epsilon`, standard normal if u is a draw."""
        standard = (u - self.mean) / self.scale
        if self.factor is None:
            return standard
        identity = torch.eye(self.dim, dtype=u.dtype, device=u.device).expand_as(self.factor)
        inverse = torch.linalg.solve_triangular(self.factor, identity, upper=False)
        return torch.einsum("rij,...rj->...ri", inverse, standard)

    def log_density(self, u: Float[Tensor, "*draws rows event"]) -> Float[Tensor, "*draws rows"]:
        """Return log q(u) in nats."""
        log_volume = self.scale.log().sum(-1)
        if self.factor is not None:
            log_volume = log_volume + self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return torch.distributions.Normal(0.0, 1.0).log_prob(self.standardise(u)).sum(-1) - log_volume

    def transform(self, noise: Float[Tensor, "*draws rows event"]) -> Float[Tensor, "*draws rows event"]:
        """Turn standard normals into draws."""
        if self.factor is not None:
            noise = torch.einsum("rij,...rj->...ri", self.factor, noise)
        return self.mean + self.scale * noise


def fit_gaussian(draws: Float[Tensor, "draws rows event"], *, is_full: bool | None = None) -> RowGaussian:
    r"""Fit mean and covariance of each row's draws, in float64.

    The covariance is full with at least ten draws a coordinate (:data:`DRAWS_PER_COORDINATE`), else diagonal; diagonal too in rows
    whose correlations are singular. A row with a draw that is not finite gets the standard normal, so that others are not touched.

    Args:
        draws: At least two posterior draws.
        is_full: Whether to fit correlations; ``None`` for the rule above.

    Raises:
        SettingError: If there are fewer than two draws.

    Example:
        >>> q = fit_gaussian(3 + 2 * torch.randn(1000, 5, 2, generator=torch.Generator().manual_seed(0)))
        >>> q.mean.shape, bool((q.mean - 3).abs().max() < 0.4), bool((q.scale - 2).abs().max() < 0.3)
        (torch.Size([5, 2]), True, True)
    """
    num_draws, _, dim = draws.shape
    if num_draws < 2:
        raise SettingError(f"A Gaussian is fitted to at least 2 posterior draws of a row, got {num_draws}.")
    draws = draws.detach().double()
    is_finite = draws.isfinite().all(-1).all(0)
    draws = draws.where(is_finite[:, None], 0.0)
    mean, scale = draws.mean(0), draws.std(0)
    # a coordinate that never moved still needs a density; what it is does not matter, since such a row is no estimate
    scale = scale.where(scale > 0, 1.0)
    if is_full is None:
        is_full = num_draws >= DRAWS_PER_COORDINATE * dim
    if not is_full:
        return RowGaussian(mean, scale)
    return RowGaussian(mean, scale, _correlation_factor((draws - mean) / scale))


def _correlation_factor(standard: Float[Tensor, "draws rows event"]) -> Float[Tensor, "rows event event"]:
    """Return the Cholesky factor of each row's correlations, the identity where they are singular."""
    correlation = torch.einsum("nri,nrj->rij", standard, standard) / (len(standard) - 1)
    identity = torch.eye(standard.shape[-1], dtype=standard.dtype, device=standard.device)
    factor, failure = torch.linalg.cholesky_ex(correlation)
    return factor.where(_succeeded(failure, factor)[:, None, None], identity)


def _succeeded(failure: Int[Tensor, " rows"], factor: Float[Tensor, "rows event event"]) -> Bool[Tensor, " rows"]:
    """Say which rows have a factor that can be inverted without losing half of the digits."""
    return (failure == 0) & (factor.diagonal(dim1=-2, dim2=-1).nan_to_num(nan=0.0).amin(-1) > 1e-7)
