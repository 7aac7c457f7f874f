"""Handlers that set a program's latents from unconstrained coordinates, or read the coordinates off."""

from collections.abc import Collection
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_aevb._types import SiteDistribution, Values
from pyro_aevb.program.coordinates import Layout, Slot, site_kind, turn_of
from pyro_aevb.program.sites import plain_support, without_masks

__all__ = ["Placing", "Reading", "Unmasked"]


class Unmasked(Messenger):
    """Take the masks off latents: a masked one keeps its prior, so that its density stays proper.

    Args:
        names: The latents.
        dropped: Sites without a density of their own, the unobserved halves of ``obs_mask`` sites: nothing reads them, and a
            draw would take noise from draws that count.
        device: Where values live.
    """

    def __init__(self, names: Collection[str], dropped: Collection[str], device: torch.device) -> None:
        super().__init__()
        self.names = frozenset(names)
        self.dropped = frozenset(dropped)
        self.device = device

    def _pyro_sample(self, message: Message) -> None:
        fn: Any = message["fn"]
        if message["name"] in self.dropped:
            # as pyro.deterministic marks its sites, which are not weighed
            message["infer"] = {**(message["infer"] or {}), "_deterministic": True}
            if message["value"] is None:
                message["value"] = torch.zeros(fn.batch_shape + fn.event_shape, device=self.device)
                message["done"] = True
        elif message["name"] in self.names and not message["is_observed"]:
            message["mask"] = None
            message["fn"] = without_masks(fn)


class Placing(Messenger):
    """Give local latents the values that u stands for, each on the support that it has in this run.

    Args:
        layout: Where each latent lies in u.
        u: ``[S, K, rows, D]``.

    Attributes:
        log_jacobians: Per site log|dz/du| in the site's batch shape; sites whose map is the identity lack one.
    """

    def __init__(self, layout: Layout, u: Tensor) -> None:
        super().__init__()
        self.layout, self.u = layout, u
        self.log_jacobians: Values = {}

    def _pyro_sample(self, message: Message) -> None:
        name = str(message["name"])
        slot = self.layout.slots.get(name)
        if slot is None or message["is_observed"]:
            return
        fn: SiteDistribution = message["fn"]
        part = self.layout.part(self.u, name).reshape(fn.batch_shape + slot.event)
        transform = slot.transform(plain_support(fn))
        if transform is None:
            message["value"] = part
        else:
            message["value"] = value = transform(part)
            self.log_jacobians[name] = _jacobian(slot, transform.log_abs_det_jacobian(part, value), fn)
        message["done"] = True


class Reading(Messenger):
    """Read the coordinates of local latents off their values, drawn or given.

    Args:
        layout: Where each latent lies in u.

    Attributes:
        parts: Per site its coordinates, in the site's plates.
        log_jacobians: As of :class:`Placing`.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.parts: Values = {}
        self.log_jacobians: Values = {}

    def _pyro_post_sample(self, message: Message) -> None:
        name = str(message["name"])
        slot = self.layout.slots.get(name)
        if slot is None or message["is_observed"]:
            return
        fn: SiteDistribution = message["fn"]
        value: Any = message["value"]
        if site_kind(slot.site) == "circle":
            value = turn_of(value)
        transform = slot.transform(plain_support(fn))
        self.parts[name] = value if transform is None else transform.inv(value)
        if transform is not None:
            jacobian = transform.log_abs_det_jacobian(self.parts[name], value)
            self.log_jacobians[name] = _jacobian(slot, jacobian, fn)


def _jacobian(slot: Slot, jacobian: Tensor, fn: SiteDistribution) -> Tensor:
    """Sum a log Jacobian over what is left of the event."""
    return sum_rightmost(jacobian, jacobian.dim() - len(fn.batch_shape))
