"""Closed-form KL divergence between the guide's and the model's distribution at a site."""

from collections.abc import Iterable, Iterator
from typing import Any

from jaxtyping import Float
from pyro.distributions import Delta, MaskedDistribution
from torch import Tensor, nn
from torch.distributions import (
    ComposeTransform,
    Independent,
    Transform,
    TransformedDistribution,
    constraints,
    kl_divergence,
)
from torch.distributions.constraints import Constraint
from torch.distributions.utils import _sum_rightmost

from pyro_aevb._types import SiteDistribution

__all__ = ["closed_form_kl", "elementwise", "has_known_support", "has_moving_support"]


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
    return _kl(_unmasked(q), _unmasked(p))


def _kl(q: SiteDistribution, p: SiteDistribution) -> Tensor | None:
    """Reduce a pair to one of torch's registry; a mask inside an event is none of its families."""
    if isinstance(q, Delta) or isinstance(p, Delta) or q.event_shape != p.event_shape:
        return None
    if isinstance(q, Independent) or isinstance(p, Independent):
        return _independent_kl(q, p)
    if isinstance(q, TransformedDistribution) and isinstance(p, TransformedDistribution):
        if q.transforms == p.transforms:
            return _transformed_kl(q, p)
    elif isinstance(q, MaskedDistribution) or isinstance(p, MaskedDistribution):
        return None
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _transformed_kl(q: TransformedDistribution, p: TransformedDistribution) -> Tensor | None:
    """Return the KL of the base distributions, which a bijection does not change (folding at 0 does)."""
    kl = _kl(q.base_dist, p.base_dist) if all(transform.bijective for transform in q.transforms) else None
    extra = len(q.event_shape) - len(q.base_dist.event_shape)
    return None if kl is None or extra < 0 else _sum_rightmost(kl, extra)


def _independent_kl(q: SiteDistribution, p: SiteDistribution) -> Tensor | None:
    """Sum the KL of the base distributions over the dimensions that are reinterpreted as an event."""
    num_q = q.reinterpreted_batch_ndims if isinstance(q, Independent) else 0
    num_p = p.reinterpreted_batch_ndims if isinstance(p, Independent) else 0
    base_q = q.base_dist if isinstance(q, Independent) else q
    base_p = p.base_dist if isinstance(p, Independent) else p
    if num_q != num_p:
        return None
    kl = _kl(base_q, base_p)
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
    fn = _unwrapped(fn)
    if _is_generic(fn):
        # a trained transform moves the ends of a support that is not its whole domain
        return has_moving_support(fn.base_dist) or any(
            _is_trained(transform) for transform, is_whole in _stages(fn) if not is_whole
        )
    bounds = (getattr(fn.support, name, None) for name in ("lower_bound", "upper_bound"))
    return any(isinstance(bound, Tensor) and bound.requires_grad for bound in bounds)


def has_known_support(fn: SiteDistribution) -> bool:
    """Tell whether ``support`` is what a distribution's draws fill; of a transformed one it may be less."""
    fn = _unwrapped(fn)
    return not _is_generic(fn) or all(is_whole for _, is_whole in _stages(fn))


def _unwrapped(fn: SiteDistribution) -> SiteDistribution:
    while isinstance(fn, MaskedDistribution | Independent):
        fn = fn.base_dist
    return fn


def _is_generic(fn: SiteDistribution) -> bool:
    """Tell whether a distribution's support is only what torch says of any transform's codomain."""
    return type(fn).support is TransformedDistribution.support


def _stages(fn: TransformedDistribution) -> Iterator[tuple[Transform, bool]]:
    """Yield each transform and whether it acts on its whole domain."""
    support: Any = fn.base_dist.support
    for transform in _parts(fn.transforms):
        is_whole = type(elementwise(support)) is type(elementwise(transform.domain))
        yield transform, is_whole
        # the image of a part is a part of what follows, whatever its name
        support = transform.codomain if is_whole else constraints.dependent


def _parts(transforms: Iterable[Transform]) -> Iterator[Transform]:
    """Yield the steps of composed transforms, whose codomain torch takes to be the last step's."""
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _parts(transform.parts)
        else:
            yield transform


def elementwise(support: Constraint) -> Constraint:
    """Return the support of one element of an event."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _is_trained(transform: Transform) -> bool:
    """Tell whether a transform holds a tensor that is trained, itself or in its parts."""
    pending: list[Any] = [transform]
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor) and item.requires_grad:
            return True
        if id(item) in seen:  # a transform and its inverse hold each other
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            pending.extend(item.parameters())
        if isinstance(item, Transform):
            pending.extend(value for name, value in vars(item).items() if not name.startswith("_cached"))
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
    return False
