"""Sample sites of a trace, and values given to them."""

from typing import Any, TypeAlias

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Independent, constraints, transform_to

from pyro_aevb._types import SiteDistribution, Values
from pyro_aevb.errors import GuideError

__all__ = [
    "Nodes",
    "ReplayValues",
    "SharedIndices",
    "SpentNoise",
    "plain_support",
    "sample_sites",
    "unmasked_value",
    "value_mask",
    "without_masks",
]

Nodes: TypeAlias = dict[str, Any]
"""Sample sites of a trace by name."""


class ReplayValues(Messenger):
    """Give latent sites the values of a dictionary; sites that it lacks are sampled."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, message: Message) -> None:
        if message["name"] in self.values and not message["is_observed"]:
            message["value"] = self.values[message["name"]]
            message["done"] = True


class SharedIndices(Messenger):
    """Let every run inside see the rows that the first one drew, where plates subsample.

    Attributes:
        indices: Drawn indices by plate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.indices: Values = {}

    def _pyro_sample(self, message: Message) -> None:
        own = message["value"]
        if message["name"] not in self.indices or not (
            _draws_indices(message) or (_is_plate(message) and own is not None)
        ):
            return
        shared = self.indices[message["name"]]
        if own is not None and not torch.compiler.is_compiling() and not torch.equal(own, shared):
            raise GuideError(
                f"The model's plate {message['name']!r} has subsample={own.tolist()[:5]}... but the guide's plate drew "
                f"{shared.tolist()[:5]}..., so latents and data of different rows would meet. Give the guide's plate the same "
                f"subsample=.",
                site=message["name"],
            )
        message["value"] = shared
        message["done"] = True

    def _pyro_post_sample(self, message: Message) -> None:
        name, index = message["name"], message["value"]
        fn: Any = message["fn"]
        if _is_plate(message) and name is not None and index is not None and len(index) < fn.size:
            self.indices[name] = index


class SpentNoise(Messenger):
    """Draw what replayed sites would have drawn and drop it, so that other noise, of dropout, comes out as it did.

    Not while a graph is recorded: it can't go back to earlier noise, and would draw more than an eager run does.
    """

    def _pyro_post_sample(self, message: Message) -> None:
        if not message["is_observed"] and not torch.compiler.is_compiling():
            with torch.no_grad():
                message["fn"]()


def _is_plate(message: Message) -> bool:
    """Tell whether a message is a plate's choice of its indices."""
    return type(message["fn"]).__name__ == "_Subsample"


def _draws_indices(message: Message) -> bool:
    """Tell whether a plate chooses some of its indices by itself."""
    fn: Any = message["fn"]
    return _is_plate(message) and fn.subsample_size is not None and fn.subsample_size < fn.size


def sample_sites(trace: Trace) -> Nodes:
    """Return a trace's sample sites that have a density: no subsampling, no ``pyro.deterministic``."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and type(node["fn"]).__name__ != "_Subsample"
        and not (node["infer"] or {}).get("_deterministic", False)
    }


def value_mask(node: dict[str, Any]) -> Tensor | None:
    """Return which entries of a site's value its density counts, of a shape that broadcasts to the value; ``None`` for all.

    That is the mask of ``poutine.mask`` joined with those of ``fn.mask(...)``, inside ``to_event`` too.
    """
    fn = node["fn"]
    masks = [(node["mask"], fn.event_dim)]
    while isinstance(fn, (Independent, ExpandedDistribution, MaskedDistribution)):
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    joined: Tensor | None = None
    for mask, event_dim in masks:
        if mask is not None and mask is not True:
            mask = torch.as_tensor(mask, device=node["value"].device)
            mask = mask.reshape(mask.shape + (1,) * event_dim)
            joined = mask if joined is None else joined & mask
    return joined


def unmasked_value(node: dict[str, Any]) -> Any:
    """Return a site's value with masked entries moved to a point inside the support.

    A missing value that is coded as NaN would else put NaN into the gradient, also where the mask drops its density.
    """
    value, mask = node["value"], value_mask(node)
    if not node["is_observed"] or mask is None or not isinstance(value, Tensor):
        return value
    return torch.where(mask, value, _inside(plain_support(node["fn"]), value))


def plain_support(fn: SiteDistribution) -> constraints.Constraint:
    """Return a distribution's support, that of a mixture being its components'."""
    support: Any = fn.support
    while isinstance(support, constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    return support


def _inside(support: constraints.Constraint, value: Tensor) -> Tensor:
    """Return a value of the same shape inside a support; 0 for the discrete families, which all hold it."""
    if support.is_discrete:
        return torch.zeros_like(value)
    transform = transform_to(support)
    return transform(value.new_zeros(transform.inverse_shape(value.shape)))


def without_masks(fn: SiteDistribution) -> SiteDistribution:
    """Return a distribution without the masks of ``fn.mask(...)``, inside ``to_event`` too."""
    if isinstance(fn, MaskedDistribution):
        return without_masks(fn.base_dist)
    if not isinstance(fn, (Independent, ExpandedDistribution)):
        return fn
    base = without_masks(fn.base_dist)
    if base is fn.base_dist:
        return fn
    return base.to_event(fn.reinterpreted_batch_ndims) if isinstance(fn, Independent) else base.expand(fn.batch_shape)
