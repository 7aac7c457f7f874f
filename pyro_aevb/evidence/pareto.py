r"""How heavy is the tail of importance weights? Pareto k-hat, for many rows at once.

The largest of the importance weights :math:`w = p / q` decide whether a mean of weights can be trusted. Vehtari,
Simpson, Gelman, Yao and Gabry (2015, 2024, arXiv 1507.02646) fit a generalised Pareto distribution to them; its shape
:math:`\hat k` estimates how many moments the weights have (:math:`1/k`): below 0.5 the variance is finite, above 0.7
neither the mean nor its standard error is to be believed at any practical number of samples.

:func:`pareto_k_hat` runs on all rows together, in float64, in chunks of rows that bound the memory. It has no gradient.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pyro_aevb._types import PerRow
from pyro_aevb.errors import DataError, NonFiniteError, SettingError

__all__ = ["MIN_SAMPLES", "pareto_k_hat"]

MIN_SAMPLES = 100
"""Fewer weights than this have no tail to fit: k-hat is NaN."""

_LOG_TINY = math.log(torch.finfo(torch.float64).tiny)
_MIN_TAIL = 5  # the fit has two parameters; ArviZ draws the line here too
_CHUNK_ELEMENTS = 2**22  # float64 numbers in the largest temporary: 32 MiB


class _Tail(NamedTuple):
    r"""The largest weights of each row, in decreasing order.

    Attributes:
        excess: :math:`y = w/u - 1` above the threshold :math:`u`; zero where the weight does not exceed it.
        size: How many exceed the threshold: fewer than asked for where weights tie or underflow.
        is_flat: Whether the tail is constant up to rounding, so that it has no shape.
    """

    excess: Float[Tensor, "rows tail"]
    size: Int[Tensor, " rows"]
    is_flat: Bool[Tensor, " rows"]


def pareto_k_hat(log_weights: Float[Tensor, "samples rows"], *, r_eff: float = 1.0) -> PerRow:
    r"""Estimate the shape k of the tail of each row's importance weights.

    The :math:`\min(S/5,\, 3\sqrt{S / r_{\mathrm{eff}}})` largest of S weights are fitted by a generalised Pareto
    distribution with the estimator of Zhang and Stephens (2009), and the shape is shrunk by
    :math:`\hat k \leftarrow (n \hat k + 5) / (n + 10)` for a tail of n (Vehtari et al. 2024, arXiv 1507.02646). Where
    the proposal and the target are Gaussians of precisions P and :math:`\Lambda` about one mean, the true value is
    :math:`1 - \lambda_{\min}(P^{-1/2} \Lambda P^{-1/2})`.

    A biased but consistent estimate of the shape (off by about 0.1 at a few thousand samples), and no bound. It sees
    only regions that the proposal visited: a mode that was never drawn leaves no trace. Costs no density evaluation. No
    gradient.

    Args:
        log_weights: Log importance weights in nats, up to a constant per row. Minus infinity is a weight of zero.
        r_eff: Relative efficiency of the draws, effective over nominal number; 1 for independent draws.

    Returns:
        k-hat of each row, in float64. NaN for fewer than 100 samples. Minus infinity where the tail's weights are
        equal up to rounding (an exact proposal), infinity where fewer than five weights stand out above the rest
        or none is positive.

    Raises:
        DataError: If there are no weights.
        NonFiniteError: If a log weight is NaN or plus infinity.
        SettingError: If ``r_eff`` is not positive.

    Example:
        Weights :math:`u^{-k}` with uniform u have a Pareto tail of shape k:

        >>> u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        >>> log_weights = -torch.log(u)[:, None] * torch.tensor([0.2, 0.5, 0.9])
        >>> [round(k, 1) for k in pareto_k_hat(log_weights).tolist()]
        [0.2, 0.5, 0.9]
    """
    tail_size = _checked_tail_size(log_weights, r_eff)
    num_samples, num_rows = log_weights.shape
    if num_samples < MIN_SAMPLES:
        return log_weights.new_full((num_rows,), math.nan, dtype=torch.float64)
    chunks = _chunks(log_weights.detach(), tail_size)
    return torch.cat([_fit_tail(_tail(chunk, tail_size)) for chunk in chunks])


def _checked_tail_size(log_weights: Float[Tensor, "samples rows"], r_eff: float) -> int:
    """Check the arguments of a public function and return the number of weights that make the tail."""
    if not r_eff > 0:
        raise SettingError(f"r_eff must be positive, got {r_eff}. Use 1.0 for independent draws.")
    if log_weights.numel() == 0:
        shape = tuple(log_weights.shape)
        raise DataError(f"Expected log weights [samples, rows] with at least one of each, got shape {shape}.")
    is_bad = (log_weights.isnan() | log_weights.isposinf()).any(0)
    if is_bad.any():
        rows = is_bad.nonzero().flatten()
        raise NonFiniteError(
            f"Log weights must be finite or -inf, got NaN or +inf in {len(rows)} of {len(is_bad)} rows, first in rows "
            f"{rows[:5].tolist()}. Check the model's and the guide's densities there."
        )
    num_samples = log_weights.shape[0]
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples / r_eff)))


def _chunks(log_weights: Float[Tensor, "samples rows"], tail_size: int) -> Iterator[Float[Tensor, "chunk samples"]]:
    """Yield the rows in chunks, small enough that the fit's grid by tail stays within the memory budget."""
    num_samples = log_weights.shape[0]
    per_row = max(num_samples, tail_size * _grid_size(tail_size))
    for chunk in log_weights.split(max(1, _CHUNK_ELEMENTS // per_row), dim=1):
        yield chunk.T.contiguous()


def _grid_size(tail_size: int) -> int:
    """Return the number of points of the profile likelihood that a tail of this size is given."""
    return 30 + math.isqrt(tail_size)


def _tail(log_weights: Float[Tensor, "rows samples"], tail_size: int) -> _Tail:
    """Cut the tail off: weights strictly above the threshold, the largest weight that is not in the tail."""
    top = log_weights.topk(tail_size + 1, dim=1).values.double()
    log_max = top[:, 0].where(top[:, 0].isfinite(), 0.0)
    top = top - log_max[:, None]
    # Weights that underflow against the largest one are zero; this also keeps the threshold finite where most are -inf.
    log_threshold = top[:, -1].clamp_min(_LOG_TINY)
    log_ratio = top[:, :-1] - log_threshold[:, None]
    excess = log_ratio.clamp_min(0).expm1()
    size = (log_ratio > 0).sum(1)
    # Rounding noise has no tail: 64 ulps of the given precision, and never less than a relative 1e-6. A few weights
    # that stand above a tie by less than 0.1 % are rounding too (float32 densities summed in float64).
    rounding = (64 * torch.finfo(log_weights.dtype).eps * log_max.abs()).clamp_min(1e-6)
    height = top[:, 0] - log_threshold
    is_flat = (height <= rounding) | ((size < _MIN_TAIL) & (height <= 1e-3))
    return _Tail(excess, size, is_flat & top[:, 0].isfinite())


def _fit_tail(tail: _Tail) -> PerRow:
    r"""Return the shape of a generalised Pareto distribution of y (Zhang and Stephens 2009, Technometrics 51:3), shrunk to 0.5.

    With :math:`\theta = -k/\sigma` the shape given :math:`\theta` is :math:`k = \mathrm{mean} \log(1 - \theta y)`, and
    the estimate of :math:`\theta` is its posterior mean over a grid under the profile likelihood.
    """
    theta = _profile_mean(tail)
    shape = _shape_given(theta[:, None], tail)[:, 0]
    shape = (tail.size * shape + 5) / (tail.size + 10)
    shape = shape.where(tail.size >= _MIN_TAIL, math.inf)
    return shape.where(~tail.is_flat, -math.inf)


def _profile_mean(tail: _Tail) -> Float[Tensor, " rows"]:
    r"""Return the posterior mean of :math:`\theta`.

    The grid has :math:`m = 30 + \lfloor \sqrt n \rfloor` points
    :math:`\theta_i = 1/y_{\max} + (1 - \sqrt{m / (i - 1/2)}) / (3 y_{1/4})`, weighted by :math:`e^{\ell(\theta_i)}`
    with :math:`\ell(\theta) = n [\log(-\theta/k) - k - 1]`. Tails differ in size, so grids do: unused points get no
    weight.
    """
    excess, size = tail.excess, tail.size[:, None].double()
    index = torch.arange(1, _grid_size(excess.shape[1]) + 1, dtype=torch.float64, device=excess.device)
    grid_size = 30 + size.sqrt().floor()
    quartile = excess.gather(1, (size - (size / 4 + 0.5).floor()).long().clamp(0, excess.shape[1] - 1))
    theta = 1 / excess[:, :1] + (1 - (grid_size / (index - 0.5)).sqrt()) / (3 * quartile)
    shape = _shape_given(theta, tail)
    profile = size * (_rate(theta, shape, excess.sum(1, keepdim=True) / size).log() - shape - 1)
    weight = profile.where(index <= grid_size, -math.inf).softmax(1)
    weight = weight.where(weight >= 10 * torch.finfo(weight.dtype).eps, 0.0)
    return (theta.where(index <= grid_size, 0.0) * weight).sum(1) / weight.sum(1)


def _shape_given(theta: Float[Tensor, "rows grid"], tail: _Tail) -> Float[Tensor, "rows grid"]:
    r"""Return :math:`k(\theta) = \mathrm{mean} \log(1 - \theta y)`; y is 0 outside the tail and adds nothing."""
    return torch.log1p(-theta[:, :, None] * tail.excess[:, None, :]).sum(2) / tail.size[:, None]


def _rate(
    theta: Float[Tensor, "*shape"], shape: Float[Tensor, "*shape"], mean: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    r"""Return :math:`1/\sigma = -\theta / k`, which is one over the mean excess in the exponential limit."""
    return torch.where(theta == 0, 1 / mean, -theta / shape)
