"""Is a plate a set? A second run of the model, on the second half of the rows and with the inner plates reversed.

The same networks may serve every index of a plate, and a set encoder may pool over it, only if the model treats all indices
alike: a plate of exchangeable observations does, a plate of features with weights of their own does not.
"""

from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor

from pyro_aevb._types import Args, Kwargs, SiteDistribution
from pyro_aevb.errors import AEVBError, ModelError
from pyro_aevb.guides.coordinates import feasible
from pyro_aevb.guides.layout import Layout
from pyro_aevb.guides.plan import Unit
from pyro_aevb.guides.probe import Probe, Reading
from pyro_aevb.program.batch import batch_rows, take_rows
from pyro_aevb.program.sites import Nodes
from pyro_aevb.program.structure import Structure

__all__ = ["asymmetric_plates", "uneven_units"]


def asymmetric_plates(probe: Probe, args: Args, kwargs: Kwargs, example: Reading) -> frozenset[str]:
    """Return the inner plates whose indices the model does not treat alike, and refuse a structure that depends on data.

    A plate that global latents lie in is one of them: each index has weights of its own. The data plate is one if the model takes
    all its rows at once and treats them differently (known standard errors of each school that are no argument).

    Raises:
        ModelError: If the second half of the rows has other sites than the whole batch.
    """
    structure, layout = probe.structure, probe.layout
    inner = {frame.name for frame in layout.inner}
    of_globals = {frame.name for site in structure.select("latent", is_local=False) for frame in site.frames}
    mirrored = _run_mirrored(probe, args, kwargs)
    if mirrored is None:
        return frozenset(inner & of_globals)
    nodes, start = mirrored
    _check_same_sites(example.nodes, nodes)
    found = set(inner & of_globals)
    rows = {structure.data_plate} if structure.data_plate is not None and not start else set()
    for name, site in structure.sites.items():
        plates = {frame.name for frame in site.frames} & (inner | rows)
        if (
            site.is_local
            and plates - found
            and not _is_mirrored(example.nodes[name], nodes[name], start, layout, structure)
        ):
            found |= plates
    return frozenset(found)


def _run_mirrored(probe: Probe, args: Args, kwargs: Kwargs) -> tuple[Nodes, int] | None:
    """Run the model on the second half of the rows, inner plates reversed, or on all rows if it takes no fewer."""
    rows = batch_rows(args, kwargs) or 0
    has_rows = probe.structure.data_plate is not None and not probe.structure.draws_own_rows
    starts = [rows // 2, 0] if has_rows and rows == probe.structure.rows and rows > 1 else [0]
    for start in starts:
        part = take_rows(args, kwargs, slice(start, None)) if start else (args, dict(kwargs))
        try:
            return probe.run_quietly(*_reversed(probe, *part, with_rows=has_rows and not start)), start
        except (AEVBError, RuntimeError, ValueError, IndexError, TypeError):
            continue  # a model that needs all rows, or whose arguments are no plates where their sizes say so
    return None


def _reversed(probe: Probe, args: Args, kwargs: Kwargs, *, with_rows: bool) -> tuple[Args, dict[str, Any]]:
    """Reverse the axes of tensors that have the sizes of the inner plates, and those of the rows where asked to."""
    first = 0 if probe.structure.data_plate is None else 1
    sizes = [frame.size for frame in probe.layout.inner]

    def reverse(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        axes = [first + k for k, size in enumerate(sizes) if item.shape[first + k : first + k + 1] == (size,)]
        flipped = axes if axes == list(range(first, first + len(axes))) else []
        return item.flip([*flipped, *([0] if with_rows and item.dim() else [])])

    return tuple(map(reverse, args)), {name: reverse(item) for name, item in kwargs.items()}


def _check_same_sites(whole: Nodes, half: Nodes) -> None:
    first, second = (
        {
            name: (node["is_observed"], tuple(node["fn"].event_shape), [f.name for f in node["cond_indep_stack"]])
            for name, node in nodes.items()
        }
        for nodes in (whole, half)
    )
    changed = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    if changed:
        raise ModelError(
            f"The model's structure depends on the data: sites {changed} differ between a batch, which has {_listed(first)}, and "
            f"its second half, which has {_listed(second)}. Give every batch one structure: pad to one length and mask.",
            site=changed[0],
        )


def _listed(sites: dict[str, tuple[bool, tuple[int, ...], list[str]]]) -> str:
    return ", ".join(f"{name} {list(shape)} in {plates}" for name, (_, shape, plates) in sites.items())


def _is_mirrored(node: Any, other: Any, start: int, layout: Layout, structure: Structure) -> bool:
    """Tell whether a site's densities are those of the mirrored run, read backwards."""
    first, second = (_density(each["fn"]) for each in (node, other))
    site = structure.sites[node["name"]]
    if start and structure.data_dim is not None:
        first = first.narrow(structure.data_dim, start, first.shape[structure.data_dim] - start)
    rows = None if not start else structure.data_plate
    dims = [frame.dim for frame in site.frames if frame.dim is not None and frame.name != rows]
    return first.shape == second.shape and torch.allclose(
        first, second.flip(dims), rtol=1e-4, atol=1e-4, equal_nan=True
    )


def _density(fn: SiteDistribution) -> Tensor:
    """Return a distribution's log density at one point, which tells its parameters apart whatever was observed."""
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return fn.log_prob(feasible(fn)).expand(fn.batch_shape)


def uneven_units(structure: Structure, units: tuple[Unit, ...], example: Reading) -> frozenset[int]:
    """Return the series whose steps the model does not treat alike, by index; the first step's prior may differ."""
    uneven = set()
    for index, unit in enumerate(units):
        observed = [] if unit.series is None else [[name for name in times if name] for times in unit.series.sites]
        groups = [list(unit.latents[1:]), *observed]
        if len(unit.latents) > 1 and not all(_is_even(group, example.nodes) for group in groups):
            uneven.add(index)
    return frozenset(uneven)


def _is_even(names: list[str], nodes: Nodes) -> bool:
    """Tell whether sites have one distribution, by their densities at one value."""
    fns = [nodes[name]["fn"] for name in names]
    densities = [fn.log_prob(feasible(fns[0])) for fn in fns if fn.event_shape == fns[0].event_shape]
    return all(torch.allclose(densities[0], item, rtol=1e-4, atol=1e-4, equal_nan=True) for item in densities)
