"""Read a model once: its sites, plates, supports, what is local and what is global, and what is not supported."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import constraints

from pyro_aevb._types import Args, Kwargs, PyroProgram, SiteDistribution
from pyro_aevb.errors import DataError, GuideError, ModelError, NonFiniteError
from pyro_aevb.program.batch import batch_rows, explained
from pyro_aevb.program.dependencies import prior_parents
from pyro_aevb.program.parameters import preserved_state
from pyro_aevb.program.reach import find_modules
from pyro_aevb.program.sites import Nodes, ReplayValues, plain_support, sample_sites, unmasked_value, value_mask

__all__ = ["PlateFrame", "Site", "Structure", "check_event_shape", "decide_imputed", "read_structure"]

Kind = Literal["latent", "observed", "factor", "imputed"]


@dataclass(frozen=True)
class PlateFrame:
    """What one run of a model tells about a plate that a site lies in.

    Attributes:
        name: The plate.
        dim: Its dimension, negative; ``None`` for a Python loop over its indices.
        size: Its indices in the run.
        full_size: Its indices in all; more than ``size`` where it subsamples.
    """

    name: str
    dim: int | None
    size: int
    full_size: int


@dataclass(frozen=True)
class Site:
    """What one run of a model tells about a sample site.

    Attributes:
        name: The site.
        kind: ``latent``, ``observed``, ``factor`` or ``imputed`` (the unobserved half of an ``obs_mask`` site).
        is_local: Whether it lies inside the data plate.
        support: The support of its distribution.
        event_shape: Shape of one event.
        batch_shape: Shape of its plates, the data plate included, in a run without particles.
        frames: Its plates, outermost first.
        family: Name of its distribution.
    """

    name: str
    kind: Kind
    is_local: bool
    support: constraints.Constraint
    event_shape: tuple[int, ...]
    batch_shape: tuple[int, ...]
    frames: tuple[PlateFrame, ...]
    family: str

    @property
    def plates(self) -> tuple[str, ...]:
        """Names of its plates, outermost first."""
        return tuple(frame.name for frame in self.frames)

    @property
    def plate_dims(self) -> tuple[int, ...]:
        """Dimensions of its plates, Python loops left out."""
        return tuple(frame.dim for frame in self.frames if frame.dim is not None)


@dataclass(frozen=True)
class Structure:
    """What one run of a model tells about it.

    Attributes:
        sites: Sites by name, in the model's order.
        data_plate: Name of the plate whose indices are rows; ``None`` when the whole model is one row.
        data_dim: Dimension of that plate, negative.
        rows: Rows in the batch that was read.
        full_size: The data plate's own full size.
        max_plate_nesting: Number of dimensions that plates use.
        draws_own_rows: Whether the model subsamples the data that it is given by itself.
        ranks: Number of dimensions of each site's value in a run without particles, the guide's auxiliary sites included.
    """

    sites: dict[str, Site]
    data_plate: str | None
    data_dim: int | None
    rows: int
    full_size: int
    max_plate_nesting: int
    draws_own_rows: bool
    ranks: dict[str, int]

    def select(self, kind: Kind, *, is_local: bool | None = None) -> tuple[Site, ...]:
        """Return the sites of one kind, all of them or the local or global ones."""
        chosen = (site for site in self.sites.values() if site.kind == kind)
        return tuple(site for site in chosen if is_local is None or site.is_local == is_local)

    @property
    def has_globals(self) -> bool:
        """Whether any latent lies outside the data plate."""
        return bool(self.select("latent", is_local=False))

    @property
    def num_observed(self) -> int:
        """Numbers that are observed of a row."""
        sites = self.select("observed", is_local=None if self.data_plate is None else True)
        return sum(math.prod((*site.batch_shape, *site.event_shape)) for site in sites) // max(1, self.rows)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the model whatever the batch: sites, kinds, event shapes, supports and plates."""
        sites = {
            name: [site.kind, site.is_local, list(site.event_shape), str(site.support), list(site.plates)]
            for name, site in self.sites.items()
        }
        return {"data_plate": self.data_plate, "sites": sites}

    def __str__(self) -> str:
        """Tell what was read, a line per site."""
        plate = f"data plate {self.data_plate!r}" if self.data_plate else "no data plate: the whole model is one row"
        lines = [plate]
        for site in self.sites.values():
            where = "local" if site.is_local else "global"
            inner = [name for name in site.plates if name != self.data_plate]
            inside = f" in plates {inner}" if inner else ""
            lines.append(f"  {where:6} {site.kind:8} {site.name}: {site.family} {list(site.event_shape)}{inside}")
        return "\n".join(lines)


def read_structure(
    model: PyroProgram,
    args: Args = (),
    kwargs: Kwargs | None = None,
    *,
    guide: PyroProgram | None = None,
    data_plate: str | None = "auto",
    decides_imputed: bool = True,
) -> Structure:
    """Run a model once on a batch and read its structure; random state, buffers and param store stay as they were.

    Args:
        model: The model.
        args: The batch, as positional arguments.
        kwargs: The batch, as keyword arguments.
        guide: Its guide, run first, so that plates of both count.
        data_plate: Name of the plate whose indices are rows; ``"auto"`` for the plate called "data", else the only
            outermost plate with as many indices as the batch has rows; ``None`` to treat the whole model as one row.
        decides_imputed: Whether to find out, by two more runs, if the unobserved half of an ``obs_mask`` site is a latent; else
            :func:`decide_imputed` does.

    Returns:
        The structure.

    Raises:
        ModelError: If there is no data plate or several candidates, a latent is discrete, a batch shape is not covered by
            plates, or the model fails on the batch.
        NonFiniteError: If the log density of a site is NaN.
        DataError: If data hold NaN or infinity where a density reads them.
    """
    kwargs = kwargs or {}
    nodes, guide_nodes = _read_nodes(model, guide, args, kwargs)
    offered = batch_rows(args, kwargs)
    frame = _find_data_frame(nodes, data_plate, offered)
    both = [*guide_nodes.values(), *nodes.values()]
    dims = [-frame.dim for node in both for frame in node["cond_indep_stack"] if frame.dim is not None]
    nesting = max([0, *dims, *(len(node["fn"].batch_shape) for node in nodes.values())])
    _check_event_shapes(nodes, guide_nodes)
    sites = {name: _read_site(node, frame, nodes) for name, node in nodes.items()}
    for name, node in nodes.items():
        _check_site(sites[name], node)
    full_size = 1 if frame is None else frame.full_size or frame.size
    structure = Structure(
        sites=sites,
        data_plate=frame.name if frame else None,
        data_dim=frame.dim if frame else None,
        rows=frame.size if frame else 1,
        full_size=full_size,
        max_plate_nesting=nesting,
        draws_own_rows=frame is not None and frame.size != full_size and offered == full_size,
        ranks={node["name"]: node["value"].dim() for node in both},
    )
    if decides_imputed and structure.select("imputed"):
        values = {name: nodes[name]["value"] for name, site in sites.items() if site.kind in ("latent", "imputed")}
        structure = decide_imputed(structure, prior_parents(model, values, args, kwargs))
    return structure


def decide_imputed(structure: Structure, parents: Mapping[str, frozenset[str]]) -> Structure:
    """Make the unobserved half of an ``obs_mask`` site a latent where another site depends on it.

    Args:
        structure: A model's structure.
        parents: What each site's distribution is computed from.

    Raises:
        ModelError: If such a site is discrete.
    """
    used = frozenset[str]().union(*parents.values())
    latent = {site.name: replace(site, kind="latent") for site in structure.select("imputed") if site.name in used}
    for site in latent.values():
        _check_continuous(site)
    return replace(structure, sites=structure.sites | latent)


def _read_nodes(model: PyroProgram, guide: PyroProgram | None, args: Args, kwargs: Kwargs) -> tuple[Nodes, Nodes]:
    """Run guide and model once and return the sample sites of the model and of the guide."""
    guide_nodes: Nodes = {}
    with preserved_state(find_modules(model, guide)), torch.no_grad():
        if guide is not None:
            with explained("guide", args, kwargs):
                guide_nodes = sample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
        replay = ReplayValues({name: node["value"] for name, node in guide_nodes.items()})
        try:
            with explained("model", args, kwargs), replay:
                nodes = sample_sites(poutine.trace(model).get_trace(*args, **kwargs))
        except ModelError:
            if guide is not None:
                with explained("model", args, kwargs):
                    own = sample_sites(poutine.trace(model).get_trace(*args, **kwargs))
                _check_event_shapes(own, guide_nodes)
                _check_value_shapes(own, guide_nodes, batch_rows(args, kwargs))
            raise
    return nodes, guide_nodes


def _check_event_shapes(nodes: Nodes, guide_nodes: Nodes) -> None:
    """Tell a model that fails on the guide's values for their shape from one that fails by itself."""
    for name in nodes.keys() & guide_nodes.keys():
        if not nodes[name]["is_observed"]:
            check_event_shape(name, nodes[name]["fn"], guide_nodes[name]["fn"])


def _check_value_shapes(nodes: Nodes, guide_nodes: Nodes, rows: int | None) -> None:
    """Tell a guide that holds values of rows of its own, rather than of the batch's, from a model that fails.

    Raises:
        ModelError: Naming the site and both shapes.
    """
    for name in nodes.keys() & guide_nodes.keys():
        own, theirs = tuple(nodes[name]["value"].shape), tuple(guide_nodes[name]["value"].shape)
        if own != theirs and rows not in theirs:
            raise ModelError(
                f"The model fails on the guide's values: site {name!r} has the shape {list(theirs)} in the guide and {list(own)} "
                "in the model. A guide that holds numbers for each row, as Pyro's automatic guides do, runs with all of its rows "
                "alone, in their order: give these, or use a guide that reads the data.",
                site=name,
            )


def check_event_shape(name: str, p: "SiteDistribution | Site", q: SiteDistribution) -> None:
    """Refuse a guide's distribution whose event shape is not the model's.

    Raises:
        GuideError: Naming the site and both shapes.
    """
    if tuple(q.event_shape) != tuple(p.event_shape):
        raise GuideError(
            f"Site {name!r} has event shape {list(q.event_shape)} in the guide and {list(p.event_shape)} in the model. Give the "
            f"guide's distribution the model's event shape, with .to_event(...) where needed.",
            site=name,
        )


def _find_data_frame(nodes: Nodes, data_plate: str | None, rows: int | None) -> CondIndepStackFrame | None:
    """Choose the plate whose indices are rows."""
    if data_plate is None:
        return None
    stacks = [node["cond_indep_stack"] for node in nodes.values()]
    frames = {frame.name: frame for stack in stacks for frame in stack}
    if data_plate == "auto" and "data" in frames:
        data_plate = "data"
    if data_plate == "auto":
        outermost = {stack[0].name for stack in stacks if stack}
        inside = {frame.name for stack in stacks for frame in stack[1:]}
        candidates = [name for name in outermost - inside if frames[name].vectorized and frames[name].size == rows]
        if len(candidates) != 1:
            raise ModelError(_no_data_plate(frames, rows, candidates))
        return frames[candidates[0]]
    if data_plate not in frames:
        raise ModelError(f"There is no plate {data_plate!r} in the model. {_list_plates(frames)}")
    if not frames[data_plate].vectorized:
        raise ModelError(
            f"The data plate {data_plate!r} is a Python loop over its indices; rows must be vectorized: write "
            f"'with pyro.plate({data_plate!r}, ...)' instead of 'for i in pyro.plate({data_plate!r}, ...)'."
        )
    return frames[data_plate]


def _no_data_plate(frames: dict[str, CondIndepStackFrame], rows: int | None, candidates: list[str]) -> str:
    found = f"{len(candidates)} plates fit: {sorted(candidates)}" if candidates else "none fits"
    return (
        f"Expected a plate called 'data', or one outermost plate with the batch's {rows} rows; {found}. {_list_plates(frames)} "
        f"Name the plate of the rows with data_plate='...', or pass data_plate=None to treat the whole model as one row."
    )


def _list_plates(frames: dict[str, CondIndepStackFrame]) -> str:
    if not frames:
        return "The model has no plates."
    return "Plates of the model: " + ", ".join(f"{name!r} (size {frame.size})" for name, frame in frames.items()) + "."


def _read_site(node: dict[str, Any], frame: CondIndepStackFrame | None, nodes: Nodes) -> Site:
    """Describe one site; with no data plate every site belongs to the one row."""
    fn, stack, name = node["fn"], node["cond_indep_stack"], node["name"]
    base = name.removesuffix("_unobserved")
    kind: Kind = "latent"
    if node["is_observed"]:
        kind = "factor" if type(fn).__name__ == "Unit" else "observed"
    elif base != name and f"{base}_observed" in nodes:
        kind = "imputed"
    return Site(
        name=name,
        kind=kind,
        is_local=frame is None or any(item.name == frame.name for item in stack),
        support=plain_support(fn),
        event_shape=tuple(fn.event_shape),
        batch_shape=tuple(fn.batch_shape),
        frames=tuple(PlateFrame(item.name, item.dim, item.size, item.full_size or item.size) for item in stack),
        family=_family(fn),
    )


def _family(fn: SiteDistribution) -> str:
    """Return the name of a distribution below its wrappers."""
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__


def _check_continuous(site: Site) -> None:
    if site.kind == "latent" and site.support.is_discrete:
        raise ModelError(
            f"Latent site {site.name!r} is discrete ({site.family}); only continuous latents can be reparameterized. Sum it out "
            f"by hand, or use pyro.infer.TraceEnum_ELBO.",
            site=site.name,
        )


def _check_site(site: Site, node: dict[str, Any]) -> None:
    """Refuse what is not supported, naming the site."""
    _check_continuous(site)
    covered = {frame.dim for frame in node["cond_indep_stack"]}
    batch_shape = node["fn"].batch_shape
    if any(batch_shape[dim] > 1 and dim not in covered for dim in range(-len(batch_shape), 0)):
        raise ModelError(
            f"Site {site.name!r} has batch shape {list(site.batch_shape)} but plates {list(site.plates)}: declare the remaining "
            f"dimensions as an event with .to_event(...), or put the site into a plate for each.",
            site=site.name,
        )
    _check_density(site, node)


def _check_density(site: Site, node: dict[str, Any]) -> None:
    """Refuse a NaN log density that no mask drops, and say whether the data or the model made it."""
    value, mask = unmasked_value(node), value_mask(node)
    if not isinstance(value, Tensor):
        raise ModelError(
            f"Site {site.name!r} has the value {value!r}, expected a tensor: give tensors or arrays as data, tensors as obs=.",
            site=site.name,
        )
    if node["is_observed"] and not torch.isfinite(value).all():
        count = int((~torch.isfinite(value)).sum())
        raise DataError(
            f"The data observed at site {site.name!r} hold {count} entries that are NaN or infinite. Remove them, or mask them "
            f"with obs_mask= or poutine.mask.",
            site=site.name,
        )
    try:
        log_prob = node["fn"].log_prob(value)
    except ValueError as error:
        if not node["is_observed"]:
            return  # the guide's value: whether it fits is told when the two are compared
        raise DataError(
            f"The value at site {site.name!r} does not fit its distribution {site.family}: {error}. Change the data or the "
            f"likelihood (grey levels under a Bernoulli need validate_args=False).",
            site=site.name,
        ) from error
    if torch.isnan(log_prob).any() and mask is None:
        raise NonFiniteError(
            f"The log density of site {site.name!r} ({site.family}) is NaN. Look at the parameters that the program gives it: "
            f"a NaN weight, the logarithm of a negative number, a scale of 0.",
            site=site.name,
        )
