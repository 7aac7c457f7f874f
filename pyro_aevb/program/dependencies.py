"""Which latents a site's distribution is computed from."""

import functools
from typing import Any

import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.program.parameters import preserved_state
from pyro_aevb.program.reach import find_modules
from pyro_aevb.program.sites import ReplayValues, sample_sites

__all__ = ["prior_parents"]


def prior_parents(model: PyroProgram, values: Values, args: Args, kwargs: Kwargs) -> dict[str, frozenset[str]]:
    """Say which latents each site's distribution depends on in the model.

    Two readings are joined, since each misses what the other sees: Pyro's provenance (lost by assignment into a tensor) and
    the autograd graph (lost by non-differentiable steps).

    Args:
        model: The model.
        values: Values of its latent sites.
        args: The batch, as positional arguments.
        kwargs: The batch, as keyword arguments.

    Returns:
        For each site the names of the latents that its parameters are computed from.
    """
    with preserved_state(find_modules(model)):
        by_gradient = _parents_by_gradient(model, values, args, kwargs)
        replayed = ReplayValues({name: value.detach() for name, value in values.items()})

        @functools.wraps(getattr(model, "__func__", model), updated=())
        def run(*args: Any, **kwargs: Any) -> Any:
            with replayed:
                return model(*args, **kwargs)

        dependencies: Any = get_dependencies(run, args, dict(kwargs))["prior_dependencies"]
    by_provenance = {name: frozenset(parents) - {name} for name, parents in dependencies.items()}
    names = by_gradient.keys() | by_provenance.keys()
    return {name: by_gradient.get(name, frozenset()) | by_provenance.get(name, frozenset()) for name in names}


def _parents_by_gradient(model: PyroProgram, values: Values, args: Args, kwargs: Kwargs) -> dict[str, frozenset[str]]:
    """Return, for each site, the latents whose values receive a gradient from its density at a fixed value."""
    leaves = {
        name: value.detach().clone().requires_grad_() for name, value in values.items() if value.is_floating_point()
    }
    with torch.enable_grad(), ReplayValues(leaves):
        nodes = sample_sites(poutine.trace(model).get_trace(*args, **kwargs))
    parents = {}
    for name, node in nodes.items():
        density = node["fn"].log_prob(node["value"].detach()).sum()
        if not density.requires_grad or not leaves:
            parents[name] = frozenset[str]()
            continue
        gradients = torch.autograd.grad(density, list(leaves.values()), retain_graph=True, allow_unused=True)
        parents[name] = frozenset(
            leaf for leaf, gradient in zip(leaves, gradients, strict=True) if gradient is not None
        )
    return parents
