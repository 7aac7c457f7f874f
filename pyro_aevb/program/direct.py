"""Pyro's ``AutoNormal`` as a guide that samples each latent itself, so that its density is known at any value."""

from functools import partial
from typing import Any

import pyro.distributions as dist
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch.distributions import ComposeTransform, biject_to
from torch.distributions.constraints import Constraint
from typing_extensions import override

from pyro_aevb._types import PyroProgram, SiteDistribution

__all__ = ["directly"]

_SUFFIX = "_unconstrained"
"""What ``AutoNormal`` adds to a latent's name to call the normal that the latent is read off."""


def directly(guide: PyroProgram) -> PyroProgram:
    r"""Return a guide of the same q whose latents are no points; other guides than ``AutoNormal`` as they are.

    ``AutoNormal`` draws an auxiliary v ~ N(m, s), and a point at z = T(v), which has a density where it lies alone. Here z is drawn
    from the distribution of T(v) instead,

    .. math:: \log q(z) = \log N(T^{-1}(z); m, s) - \log |\partial T(v) / \partial v|.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide, x = pyro.infer.autoguide.AutoNormal(model), torch.zeros(3)
        >>> _ = guide(x)
        >>> pyro.poutine.trace(directly(guide)).get_trace(x).stochastic_nodes
        ['data', 'z']
    """
    # a class of its own below AutoNormal may sample otherwise
    return partial(_sample, guide) if type(guide) is AutoNormal else guide


def _sample(guide: AutoNormal, *args: Any, **kwargs: Any) -> None:
    """Run the guide with each pair of sites as one."""
    if guide.prototype_trace is None:
        guide(*args, **kwargs)
    prototype: Any = guide.prototype_trace
    with _Merging({name: node["fn"] for name, node in prototype.iter_stochastic_nodes()}):
        guide(*args, **kwargs)


class _Onto(ComposeTransform):
    """The map of unconstrained numbers onto a support, which knows that support; torch's own knows but its last part's."""

    def __init__(self, support: Constraint) -> None:
        super().__init__([biject_to(support)])
        self._support = support

    @property
    @override
    def codomain(self) -> Constraint:  # type: ignore[override]
        return self._support


class _Merging(Messenger):
    """Hide each normal, and sample the latent that is read off it from the distribution that it has."""

    def __init__(self, fns: dict[str, SiteDistribution]) -> None:
        super().__init__()
        self.transforms = {name: _Onto(fn.support) for name, fn in fns.items()}
        self.normals: dict[str, SiteDistribution] = {}

    def _pyro_sample(self, message: Message) -> None:
        name = str(message["name"])
        latent = name.removesuffix(_SUFFIX)
        if latent != name and latent in self.transforms:
            self.normals[latent] = message["fn"]
            message["stop"] = True  # nothing outside sees the site
        elif name in self.normals:
            message["fn"] = dist.TransformedDistribution(self.normals[name], [self.transforms[name]])
