"""Medians and quantiles of the latents in a guide, of a batch whose rows may be new."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import biject_to

from pyro_aevb._types import Args, Kwargs, Values
from pyro_aevb.errors import SettingError
from pyro_aevb.guides.building import Built, Networks
from pyro_aevb.guides.global_latents import Joint, PerSite
from pyro_aevb.program.quantiles import AtQuantile, acts_on_entries, has_marginal_quantiles
from pyro_aevb.program.rows import inferring
from pyro_aevb.program.sites import SharedIndices, sample_sites

__all__ = ["marginal_quantiles", "medians"]

NUM_DRAWS = 1000
"""Joint draws that quantiles without a closed form are read from."""

_SEED = 0


def medians(guide: AutoGuide, args: Args, kwargs: Kwargs) -> Values:
    """Return the median of each latent, each site given the medians of those before it."""
    with _summarizing(guide), AtQuantile(0.5):
        return guide(*args, **kwargs)


def marginal_quantiles(
    guide: AutoGuide, built: Built, levels: Sequence[float] | Tensor, args: Args, kwargs: Kwargs
) -> Values:
    """Return marginal quantiles of each latent, the axis of levels first.

    Raises:
        SettingError: If a level does not lie between 0 and 1.
    """
    chosen = _read_levels(levels)
    with _summarizing(guide):
        closed = _closed_form(guide, built, args, kwargs)
        low = _at_levels(guide, chosen, args, kwargs)
        high = _at_levels(guide, [1 - level for level in chosen], args, kwargs)
        draws = _draw(guide, built, args, kwargs) if len(closed) < len(low) else {}
    return {
        name: _ordered(value, high[name], chosen)
        if name in closed
        else _of_draws(draws[name].reshape(NUM_DRAWS, *value.shape[1:]), chosen)
        for name, value in low.items()
    }


@contextmanager
def _summarizing(guide: AutoGuide) -> Iterator[None]:
    """Run the guide by itself: in eval mode, without gradients, unseen by handlers outside, with plates of its own."""
    master, guide.master = guide.master, None
    try:
        with inferring(_SEED, guide), poutine.block(), SharedIndices():
            yield
    finally:
        guide.master = master


def _read_levels(levels: Sequence[float] | Tensor) -> list[float]:
    chosen = [float(level) for level in levels]
    wrong = [level for level in chosen if not 0 < level < 1]
    if wrong or not chosen:
        raise SettingError(f"quantiles must be numbers between 0 and 1, such as [0.05, 0.5, 0.95], got {chosen}.")
    return chosen


def _closed_form(guide: AutoGuide, built: Built, args: Args, kwargs: Kwargs) -> frozenset[str]:
    """Name the latents that depend on no sampled latent and whose family's marginal quantiles are known."""
    nodes = sample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    latents = {site.name for site in built.structure.select("latent")}
    found = {name for name, sources in built.wiring.items() if not latents.intersection(item.name for item in sources)}
    for part in cast(Networks, guide.networks).of_globals:
        if isinstance(part, Joint) and has_marginal_quantiles(nodes[part.auxiliary]["fn"]):
            found |= {site.name for site in part.sites if acts_on_entries(biject_to(site.support))}
        elif isinstance(part, PerSite):
            found |= {site.name for site in part.sites}
    return frozenset(name for name in found if has_marginal_quantiles(nodes[name]["fn"]))


def _at_levels(guide: AutoGuide, levels: Sequence[float], args: Args, kwargs: Kwargs) -> Values:
    """Run the guide at each level: for each latent ``[levels, *shape]``."""
    runs = []
    for level in levels:
        with AtQuantile(level):
            runs.append(guide(*args, **kwargs))
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def _ordered(low: Tensor, high: Tensor, levels: Sequence[float]) -> Tensor:
    """Choose between images of mirrored quantiles: where a map decreases, that of the upper one is the lower one."""
    is_lower = (torch.tensor(levels, device=low.device) < 0.5).reshape(-1, *(1,) * (low.dim() - 1))
    return torch.where(is_lower, torch.minimum(low, high), torch.maximum(low, high))


def _draw(guide: AutoGuide, built: Built, args: Args, kwargs: Kwargs) -> Values:
    """Draw all latents together, the draws in front of every plate."""
    with pyro.plate("_draws", NUM_DRAWS, dim=-1 - built.structure.max_plate_nesting):
        return dict(guide(*args, **kwargs))


def _of_draws(draws: Tensor, levels: Sequence[float]) -> Tensor:
    """Interpolate between order statistics, as ``torch.quantile``, which takes no more than 16 million numbers."""
    ordered = draws.sort(0).values
    places = [level * (len(draws) - 1) for level in levels]
    lower = torch.tensor([int(place) for place in places], device=draws.device)
    weight = ordered.new_tensor([place - int(place) for place in places]).reshape(-1, *(1,) * (draws.dim() - 1))
    return ordered[lower].lerp(ordered[(lower + 1).clamp(max=len(draws) - 1)], weight)
