"""Is a plate a set? A second run of the model, on the second half of the rows and with the inner plates moved on by one index.

The same networks may serve every index of a plate, and a set encoder may pool over it, only if the model treats all indices
alike: a plate of exchangeable observations does, a plate of features with weights of their own does not.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor

from pyro_aevb._types import Args, Kwargs, SiteDistribution
from pyro_aevb.errors import AEVBError, ModelError
from pyro_aevb.guides.coordinates import Coordinates
from pyro_aevb.guides.layout import Layout
from pyro_aevb.guides.plan import Unit, numbered_sites
from pyro_aevb.guides.probe import Probe, Reading
from pyro_aevb.program.batch import batch_rows, take_rows
from pyro_aevb.program.sites import Nodes, unmasked_value
from pyro_aevb.program.structure import Structure

__all__ = ["asymmetric_plates", "uneven_units", "unlike_steps"]

_MOST_UNLIKE = 4.0
"""Ratio of prior spreads, and distance of prior medians in spreads, up to which steps of a series share a head."""


def asymmetric_plates(probe: Probe, args: Args, kwargs: Kwargs, example: Reading) -> frozenset[str]:
    """Return the inner plates whose indices the model does not treat alike, and refuse a structure that depends on data.

    A plate that global latents lie in is one of them: each index has weights of its own. The data plate is one if the model takes
    all its rows at once and treats them differently (known standard errors of each school that are no argument).

    Raises:
        ModelError: If the second half of the rows has other sites than the whole batch.
    """
    structure = probe.structure
    # the indices of a subsampled plate are other ones in each batch, so that nothing can be learned of each
    inner = {frame.name for frame in probe.layout.inner if frame.size == frame.full_size}
    of_globals = {frame.name for site in structure.select("latent", is_local=False) for frame in site.frames}
    found = inner & of_globals
    shifted = _run_shifted(probe, args, kwargs, example)
    if shifted is None:
        return frozenset(found)
    _check_same_sites(example.nodes, shifted.nodes)
    rows = {structure.data_plate} & shifted.steps.keys()
    for name, site in structure.sites.items():
        plates = {frame.name for frame in site.frames} & (inner | rows)
        if site.is_local and plates - found and not _is_shifted(example.nodes[name], shifted, structure):
            found |= plates
    return frozenset(found)


class _Shifted(NamedTuple):
    """A run of the model in which each index of a plate has the data of one before it.

    Attributes:
        nodes: Its sites.
        start: First row of the batch that it ran on.
        steps: By how much each plate was moved on; rows, if they were, by one.
    """

    nodes: Nodes
    start: int
    steps: Mapping[str, int]


def _run_shifted(probe: Probe, args: Args, kwargs: Kwargs, example: Reading) -> _Shifted | None:
    """Run the model on the second half of the rows, inner plates moved on, or on all rows if it takes no fewer."""
    rows, plate = batch_rows(args, kwargs) or 0, probe.structure.data_plate
    # rows that the model takes out of the data by an index are not where its arguments have them
    has_rows = plate is not None and rows == probe.structure.rows and plate not in {*example.indices, *probe.drawn}
    for start in [rows // 2, 0] if has_rows and rows > 1 else [0]:
        part = take_rows(args, kwargs, slice(start, None)) if start else (args, dict(kwargs))
        shifts_rows = has_rows and not start
        try:
            nodes = probe.run_quietly(*_shifted_batch(probe, *part, with_rows=shifts_rows))
        except (AEVBError, RuntimeError, ValueError, IndexError, TypeError):
            continue  # a model that needs all rows, or whose arguments are no plates where their sizes say so
        if start and not _has_rows(nodes, probe.structure, rows - start):
            continue  # constants of all rows were met by half of them, which shows only when they are weighed
        return _Shifted(nodes, start, _steps(probe.layout) | ({str(plate): 1} if shifts_rows else {}))
    return None


def _has_rows(nodes: Nodes, structure: Structure, rows: int) -> bool:
    """Tell whether every site has as many rows as there are, or one for all."""
    dim = structure.data_dim
    shapes = [
        nodes[name]["fn"].batch_shape for name, site in structure.sites.items() if site.is_local and name in nodes
    ]
    return dim is None or all(len(shape) < -dim or shape[dim] in (1, rows) for shape in shapes)


def _shifted_batch(probe: Probe, args: Args, kwargs: Kwargs, *, with_rows: bool) -> tuple[Args, dict[str, Any]]:
    """Move the axes of tensors that have the sizes of the inner plates on, and those of the rows where asked to."""
    first = 0 if probe.structure.data_plate is None else 1
    sizes, steps = [frame.size for frame in probe.layout.inner], _steps(probe.layout)

    def shift(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        axes = [first + k for k, size in enumerate(sizes) if item.shape[first + k : first + k + 1] == (size,)]
        axes = axes if axes == list(range(first, first + len(axes))) else []
        moves = [steps[probe.layout.inner[axis - first].name] for axis in axes]
        if with_rows and item.dim():
            axes, moves = [*axes, 0], [*moves, 1]
        return item.roll(moves, axes) if axes else item

    return tuple(map(shift, args)), {name: shift(item) for name, item in kwargs.items()}


def _steps(layout: Layout) -> dict[str, int]:
    """Return by how much each plate is moved on: by another step in each, so that bands of a table do not meet themselves.

    A step without a common divisor with the size leads through all indices.
    """
    steps = {}
    for place, frame in enumerate(layout.inner):
        through = [step for step in range(1, frame.size + 1) if math.gcd(step, frame.size) == 1]
        steps[frame.name] = through[place % len(through)]
    return steps


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


def _is_shifted(node: Any, shifted: _Shifted, structure: Structure) -> bool:
    """Tell whether a site's densities are those of the shifted run, moved back."""
    site, other = structure.sites[node["name"]], shifted.nodes[node["name"]]["fn"]
    event_dim, fn, data_dim = len(site.event_shape), node["fn"], structure.data_dim
    # one value for both, so that what was observed or is missing tells nothing, only the parameters do
    value = unmasked_value(node).expand(fn.batch_shape + fn.event_shape)
    first = _density(fn, value)
    if shifted.start and data_dim is not None:
        count = first.shape[data_dim] - shifted.start
        first = first.narrow(data_dim, shifted.start, count)
        value = value.narrow(data_dim - event_dim, shifted.start, count)
    if other.batch_shape != first.shape:
        return False
    moves = {frame.dim: shifted.steps.get(frame.name, 0) for frame in site.frames if frame.dim is not None}
    dims, steps = list(moves), list(moves.values())
    if dims:
        value = value.roll(steps, [dim - event_dim for dim in dims])
    second = _density(other, value)
    second = second.roll([-step for step in steps], dims) if dims else second
    return torch.allclose(first, second, rtol=1e-4, atol=1e-4, equal_nan=True)


def _density(fn: SiteDistribution, value: Tensor) -> Tensor:
    """Return a distribution's log density without its masks."""
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return fn.log_prob(value).expand(fn.batch_shape)


def unlike_steps(structure: Structure, coordinates: Mapping[str, Coordinates]) -> frozenset[str]:
    """Return the latents that differ in a number of their names alone and whose priors are of other units.

    Args:
        structure: The model's structure.
        coordinates: Coordinates of the latents, in units of their priors.
    """
    unlike: set[str] = set()
    for members in numbered_sites(structure).values():
        names = [name for _, name in sorted(members.items()) if name in coordinates]
        if not _is_alike([coordinates[name] for name in names]):
            # the start of a chain has a prior of its own
            unlike |= set(names[:1] if _is_alike([coordinates[name] for name in names[1:]]) else names)
    return frozenset(unlike)


def _is_alike(own: list[Coordinates]) -> bool:
    """Tell whether coordinates are of comparable units."""
    if len(own) < 2:
        return True
    locs, scales = torch.stack([item.loc for item in own]), torch.stack([item.scale for item in own])
    widest, distance = scales.amax(0), locs.amax(0) - locs.amin(0)
    is_apart = (widest > _MOST_UNLIKE * scales.amin(0)) | (distance > _MOST_UNLIKE * widest)
    return not bool(is_apart.any())


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
    value = unmasked_value(nodes[names[0]])
    densities = [_density(nodes[name]["fn"], value) for name in names]
    return all(torch.allclose(densities[0], item, rtol=1e-4, atol=1e-4, equal_nan=True) for item in densities)
