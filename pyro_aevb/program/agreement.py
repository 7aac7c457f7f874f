"""Do a model and its guide fit each other, and can an estimator be used with them?"""

import math
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_aevb._types import SiteDistribution
from pyro_aevb.errors import GuideError, ModelError
from pyro_aevb.program.divergence import elementwise, has_known_support, has_moving_support
from pyro_aevb.program.particles import Records, SiteRecord
from pyro_aevb.program.structure import Structure, check_event_shape
from pyro_aevb.randomness import preserved_rng

__all__ = ["check_gradient", "check_guide", "check_masks", "check_points", "check_separable", "is_delta"]


def check_guide(structure: Structure, guide: Records) -> None:
    """Hold the guide's sites against the model's."""
    latents = {site.name for site in structure.select("latent")}
    known = latents | {site.name for site in structure.select("imputed")}
    observed = {site.name for site in structure.select("observed")}
    missing = [name for name in structure.sites if name in latents and name not in guide]
    extra = [name for name, site in guide.items() if name not in known and not site.is_auxiliary]
    if missing:
        raise GuideError(
            f"The guide lacks the model's latent sites {missing}; it has {list(guide)}. Sample them in the guide, inside the same "
            f"plates.",
            site=missing[0],
        )
    if extra:
        role = "observed in the model" if extra[0] in observed else "not in the model"
        raise GuideError(
            f"The guide samples site {extra[0]!r}, which is {role} (latents: {sorted(latents)}). Remove it, or mark it with "
            f"infer={{'is_auxiliary': True}}.",
            site=extra[0],
        )
    for name in latents:
        _check_guide_site(structure, name, guide[name])


def _check_guide_site(structure: Structure, name: str, q: SiteRecord) -> None:
    """Hold one guide site's plate, event shape and support against the model's site."""
    site = structure.sites[name]
    fn = q.fns[0]
    check_event_shape(name, site, fn)
    if q.is_local != site.is_local:
        where = ("inside", "outside") if site.is_local else ("outside", "inside")
        raise GuideError(
            f"Site {name!r} lies {where[0]} the data plate {structure.data_plate!r} in the model and {where[1]} it in the guide. "
            f"Open the same plates in the guide.",
            site=name,
        )
    if not _is_inside(fn, site.support):
        raise GuideError(
            f"The guide's distribution at site {name!r} ({type(fn).__name__} on {fn.support}) puts mass outside the model's "
            f"support, {site.support}. Use a family on that support, or transform one with biject_to.",
            site=name,
        )


def _is_inside(fn: SiteDistribution, support: Constraint, num_draws: int = 100) -> bool:
    """Tell whether a distribution lies in a support: by the ends of both, and by draws, for what has no ends (a simplex)."""
    if isinstance(fn, Delta):
        return bool(support.check(fn.v).all())
    inner, outer = _ends(fn.support), _ends(support)
    if inner and outer and has_known_support(fn) and not ((inner[0] >= outer[0]) & (inner[1] <= outer[1])).all():
        return False
    with preserved_rng(), torch.no_grad():
        return bool(support.check(fn.sample((num_draws,))).all())


def _ends(support: Constraint) -> tuple[Tensor, Tensor] | None:
    """Return the lower and upper end of an interval; ``None`` for a support that is not one."""
    support = elementwise(support)
    lower, upper = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if support is constraints.real or lower is not None or upper is not None:
        lower = -math.inf if lower is None else lower
        return torch.as_tensor(lower), torch.as_tensor(math.inf if upper is None else upper)
    return None


def check_masks(p: SiteRecord, q: SiteRecord) -> None:
    """Refuse a latent whose density counts on one side and not on the other; a recording can't look at values."""
    if torch.compiler.is_compiling() or (p.mask is q.mask and p.scale is q.scale):
        return
    what = ""
    if not _is_same(p.mask, q.mask):
        what = "mask"
    elif not _is_same(p.scale, q.scale):
        what = "scale"
    if what:
        raise GuideError(
            f"Model and guide give site {p.name!r} a different {what}: its density would count on one side only. Put the same "
            f"poutine.{what} around the site in both.",
            site=p.name,
        )


def _is_same(a: Any, b: Any) -> bool:
    """Compare masks or scales, up to rounding; a tensor with all entries equal counts as one number."""
    a, b = (torch.as_tensor(item, dtype=torch.float64) for item in (a, b))
    return bool(torch.isclose(a, b, rtol=1e-6, atol=0.0).all())


def is_delta(site: SiteRecord) -> bool:
    """Tell whether a site's distribution is a point, through wrappers."""
    return _point(site) is not None


def _point(site: SiteRecord) -> SiteDistribution | None:
    """Return the point mass below a distribution's wrappers, if it is one."""
    fn: Any = site.fns[0]
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn if isinstance(fn, Delta) else None


def check_separable(purpose: str, records: Records, guide: Records) -> None:
    """Refuse scales inside the logarithm, and guides whose local sites share one joint draw.

    Raises:
        ModelError: If a site is scaled apart from the data plate's own scale.
        GuideError: If local sites are read off a global auxiliary site.
    """
    for name, site in records.items():
        if not isinstance(site.scale, float) or site.scale != 1.0:
            raise ModelError(
                f"Site {name!r} has a scale besides the data plate's own (poutine.scale or a subsampled inner plate), which "
                f"has no meaning inside {purpose}. Remove it, or train with SGVB.",
                site=name,
            )
    joint = [name for name, site in guide.items() if site.is_auxiliary and not site.is_local]
    local = [name for name, site in guide.items() if not site.is_auxiliary and site.is_local and is_delta(site)]
    own = [name for name, site in guide.items() if site.is_auxiliary and site.is_local]
    if joint and local and not own:
        raise GuideError(
            f"Local sites {local} are read off the joint draw {joint[0]!r} outside the data plate, so rows have no weights of "
            f"their own, which {purpose} needs. Use a guide that samples them inside the data plate.",
            site=local[0],
        )


def check_gradient(gradient: str, guide: Records) -> None:
    """Refuse sites that an estimator of the gradient is wrong for.

    Raises:
        GuideError: If a site is not reparameterized, or its support depends on parameters and the estimator needs that
            it does not.
    """
    for name, site in guide.items():
        fn = site.fns[0]
        if gradient != "score" and not fn.has_rsample and not is_delta(site):
            raise GuideError(
                f"The guide's site {name!r} ({type(fn).__name__}) has no rsample, so the gradient {gradient!r} can't pass "
                f"through it. Use a reparameterized family (Normal, LogNormal, Gamma, a flow), or SGVB(gradient='score').",
                site=name,
            )
        if gradient != "reparam" and has_moving_support(fn):
            raise GuideError(
                f"The support of the guide's site {name!r} ({type(fn).__name__}) depends on its parameters, where the gradient "
                f"{gradient!r} is biased. Use gradient='reparam', or a family of fixed support.",
                site=name,
            )


def check_points(gradient: str, guide: Records) -> None:
    """Refuse point masses that an estimator of the gradient would not train, or train wrongly.

    Args:
        gradient: The estimator, any but ``"reparam"``.
        guide: Sites of a run of the guide with every value given and fixed, so that only parameters are differentiated.

    Raises:
        GuideError: If a point, or its log density, is computed from parameters.
    """
    for name, site in guide.items():
        point = _point(site)
        if point is None or (gradient == "dreg" and not site.is_local):
            continue
        if point.log_density.requires_grad or (gradient != "stl" and point.v.requires_grad):
            raise GuideError(
                f"The guide's site {name!r} is a point (Delta) computed from parameters, where the gradient {gradient!r} is wrong: "
                f"it has no density to differentiate. Use gradient='reparam', or a distribution with a density.",
                site=name,
            )
