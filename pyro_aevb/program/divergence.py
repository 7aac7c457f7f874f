"""Closed-form KL divergence between the guide's and the model's distribution at a site."""

from jaxtyping import Float
from pyro.distributions import Delta, MaskedDistribution
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution, kl_divergence
from torch.distributions.utils import _sum_rightmost

from pyro_aevb._types import SiteDistribution

__all__ = ["closed_form_kl", "has_moving_support"]


def closed_form_kl(q: SiteDistribution, p: SiteDistribution) -> Float[Tensor, "..."] | None:
    r"""Return :math:`KL(q \| p) = E_q[\log q - \log p]` in nats, one entry per batch element, or ``None``.

    Pairs of ``Independent`` and of ``TransformedDistribution`` with equal transforms are reduced to their bases, since a KL
    divergence does not change under a bijection. A ``Delta`` has no density to compare: its entry in Pyro's registry drops the
    Jacobian in ``log_density`` and is never asked.

    Args:
        q: The guide's distribution.
        p: The model's distribution.

    Example:
        >>> q, p = dist.Normal(0.5, 0.7), dist.Normal(0.0, 1.0)
        >>> closed_form_kl(q, p)
        tensor(0.2267)
        >>> closed_form_kl(dist.Delta(torch.tensor(0.0)), p) is None
        True
    """
    q, p = _unmasked(q), _unmasked(p)
    if isinstance(q, Delta) or isinstance(p, Delta) or q.event_shape != p.event_shape:
        return None
    if isinstance(q, Independent) or isinstance(p, Independent):
        return _independent_kl(q, p)
    if isinstance(q, TransformedDistribution) and isinstance(p, TransformedDistribution):
        if q.transforms != p.transforms:
            return None
        kl = closed_form_kl(q.base_dist, p.base_dist)
        extra = len(q.event_shape) - len(q.base_dist.event_shape)
        return None if kl is None or extra < 0 else _sum_rightmost(kl, extra)
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _independent_kl(q: SiteDistribution, p: SiteDistribution) -> Tensor | None:
    """Sum the KL of the base distributions over the dimensions that are reinterpreted as an event."""
    num_q = q.reinterpreted_batch_ndims if isinstance(q, Independent) else 0
    num_p = p.reinterpreted_batch_ndims if isinstance(p, Independent) else 0
    base_q = q.base_dist if isinstance(q, Independent) else q
    base_p = p.base_dist if isinstance(p, Independent) else p
    if num_q != num_p:
        return None
    kl = closed_form_kl(base_q, base_p)
    return None if kl is None else _sum_rightmost(kl, num_q)


def _unmasked(fn: SiteDistribution) -> SiteDistribution:
    """Return a distribution without its mask, which the caller applies."""
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return fn


def has_moving_support(fn: SiteDistribution) -> bool:
    r"""Tell whether a distribution's support depends on parameters that are trained (Uniform, Pareto, ...).

    For such a family :math:`E_q[\nabla_\phi \log q_\phi] \neq 0`, so estimators that drop or reuse this term are wrong.
    """
    fn = _unmasked(fn)
    if isinstance(fn, Independent):
        return has_moving_support(fn.base_dist)
    if isinstance(fn, TransformedDistribution):
        return has_moving_support(fn.base_dist)
    bounds = (getattr(fn.support, name, None) for name in ("lower_bound", "upper_bound"))
    return any(isinstance(bound, Tensor) and bound.requires_grad for bound in bounds)
