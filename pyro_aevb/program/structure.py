"""Read a model once: its sites, plates, supports, what is local and what is global, and what is not supported."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from pyro import poutine
from pyro.distributions import Distribution
from pyro.infer.inspect import get_dependencies
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import AEVBError, DataError, ModelError, NonFiniteError
from pyro_aevb.program.parameters import find_modules, preserved_state

__all__ = ["ReplayValues", "Site", "Structure", "batch_rows", "describe_batch", "prior_parents", "read_structure", "sample_sites", "take_rows"]

Nodes: TypeAlias = dict[str, dict[str, Any]]
"""Sample sites of a trace by name."""

Kind = Literal["latent", "observed", "factor", "imputed"]


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
        plates: Names of its plates, outermost first.
        family: Name of its distribution.
    """

    name: str
    kind: Kind
    is_local: bool
    support: constraints.Constraint
    event_shape: tuple[int, ...]
    batch_shape: tuple[int, ...]
    plates: tuple[str, ...]
    family: str


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


class ReplayValues(Messenger):
    """Give latent sites the values of a dictionary; sites that it lacks are sampled."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, message: Message) -> None:
        if message["name"] in self.values and not message["is_observed"]:
            message["value"] = self.values[message["name"]]
            message["done"] = True


def sample_sites(trace: Trace) -> Nodes:
    """Return a trace's sample sites that have a density: no subsampling, no ``pyro.deterministic``."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and type(node["fn"]).__name__ != "_Subsample"
        and not node["infer"].get("_deterministic", False)
    }


def batch_rows(args: Args, kwargs: Kwargs) -> int | None:
    """Return the length of the first tensor argument, the number of rows that a batch offers; ``None`` without tensors."""
    tensors = (item for item in (*args, *kwargs.values()) if isinstance(item, Tensor) and item.dim() > 0)
    return next((len(tensor) for tensor in tensors), None)


def take_rows(args: Args, kwargs: Kwargs, rows: slice | Tensor) -> tuple[Args, dict[str, Any]]:
    """Take rows out of every tensor of a batch."""

    def take(item: Any) -> Any:
        return item[rows] if isinstance(item, Tensor) and item.dim() > 0 else item

    return tuple(take(item) for item in args), {name: take(item) for name, item in kwargs.items()}


def describe_batch(args: Args, kwargs: Kwargs) -> str:
    """Say what a batch is, for messages: each argument's type and shape."""
    named = [(str(index), item) for index, item in enumerate(args)] + list(kwargs.items())
    return ", ".join(
        f"{name}: {str(item.dtype).removeprefix('torch.')} {list(item.shape)}" if isinstance(item, Tensor) else f"{name}: {item!r}"
        for name, item in named
    )


@contextmanager
def explained(what: str, args: Args, kwargs: Kwargs) -> Iterator[None]:
    """Turn a failure inside a user's program into an error that names the program's input and a likely cause."""
    try:
        yield
    except AEVBError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        text = str(error)
        hint = "check that the batch has the shapes that the program expects"
        if "dtype" in text or "expected scalar type" in text or "Float but" in text:
            hint = "convert the argument with .float() or to the dtype of the program's parameters"
        nan = [name for name, item in enumerate(args) if isinstance(item, Tensor) and not item.isfinite().all()]
        if nan:
            message = f"The {what} failed on data with NaN or infinity in argument {nan[0]}: {text}. Remove or mask these entries."
            raise DataError(message) from error
        raise ModelError(f"The {what} failed on a batch of ({describe_batch(args, kwargs)}): {text}. Likely mend: {hint}.") from error


def read_structure(
    model: PyroProgram,
    args: Args = (),
    kwargs: Kwargs | None = None,
    *,
    guide: PyroProgram | None = None,
    data_plate: str | None = "auto",
) -> Structure:
    """Run a model once on a batch and read its structure; random state, buffers and param store stay as they were.

    Args:
        model: The model.
        args: The batch, as positional arguments.
        kwargs: The batch, as keyword arguments.
        guide: Its guide, run first, so that plates of both count.
        data_plate: Name of the plate whose indices are rows; ``"auto"`` for the plate called "data", else the only
            outermost plate with as many indices as the batch has rows; ``None`` to treat the whole model as one row.

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
    sites = {name: _read_site(node, frame, nodes) for name, node in nodes.items()}
    imputed = [name for name, site in sites.items() if site.kind == "imputed"]
    if imputed:
        values = {name: nodes[name]["value"] for name, site in sites.items() if site.kind in ("latent", "imputed")}
        used = frozenset[str]().union(*prior_parents(model, values, args, kwargs).values())
        sites |= {name: replace(sites[name], kind="latent") for name in imputed if name in used}
    for name, node in nodes.items():
        _check_site(sites[name], node)
    full_size = 1 if frame is None else frame.full_size or frame.size
    return Structure(
        sites=sites,
        data_plate=frame.name if frame else None,
        data_dim=frame.dim if frame else None,
        rows=frame.size if frame else 1,
        full_size=full_size,
        max_plate_nesting=nesting,
        draws_own_rows=frame is not None and frame.size != full_size and offered == full_size,
        ranks={node["name"]: node["value"].dim() for node in both},
    )


def _read_nodes(model: PyroProgram, guide: PyroProgram | None, args: Args, kwargs: Kwargs) -> tuple[Nodes, Nodes]:
    """Run guide and model once and return the sample sites of the model and of the guide."""
    guide_nodes: Nodes = {}
    with preserved_state(find_modules(model, guide)), torch.no_grad():
        if guide is not None:
            with explained("guide", args, kwargs):
                guide_nodes = sample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
        replay = ReplayValues({name: node["value"] for name, node in guide_nodes.items()})
        with explained("model", args, kwargs), replay:
            nodes = sample_sites(poutine.trace(model).get_trace(*args, **kwargs))
    return nodes, guide_nodes


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
        support=fn.support,
        event_shape=tuple(fn.event_shape),
        batch_shape=tuple(fn.batch_shape),
        plates=tuple(item.name for item in stack),
        family=_family(fn),
    )


def _family(fn: Distribution) -> str:
    """Return the name of a distribution below its wrappers."""
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__


def _check_site(site: Site, node: dict[str, Any]) -> None:
    """Refuse what is not supported, naming the site."""
    if site.kind == "latent" and site.support.is_discrete:
        raise ModelError(
            f"Latent site {site.name!r} is discrete ({site.family}); only continuous latents can be reparameterized. Sum it out "
            f"by hand, or use pyro.infer.TraceEnum_ELBO.",
            site=site.name,
        )
    covered = {frame.dim for frame in node["cond_indep_stack"]}
    batch_shape = node["fn"].batch_shape
    if any(batch_shape[dim] > 1 and dim not in covered for dim in range(-len(batch_shape), 0)):
        raise ModelError(
            f"Site {site.name!r} has batch shape {list(site.batch_shape)} but plates {list(site.plates)}: declare the remaining "
            f"dimensions as an event with .to_event(...), or put the site into a plate for each.",
            site=site.name,
        )
    if node["mask"] is None or node["mask"] is True:
        _check_density(site, node)


def _check_density(site: Site, node: dict[str, Any]) -> None:
    """Refuse a NaN log density, and say whether the data or the model made it."""
    value = node["value"]
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
        raise DataError(
            f"The value at site {site.name!r} does not fit its distribution {site.family}: {error}. Change the data or the "
            f"likelihood (grey levels under a Bernoulli need validate_args=False).",
            site=site.name,
        ) from error
    if torch.isnan(log_prob).any():
        raise NonFiniteError(
            f"The log density of site {site.name!r} ({site.family}) is NaN. Look at the parameters that the program gives it: "
            f"a NaN weight, the logarithm of a negative number, a scale of 0.",
            site=site.name,
        )


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

        dependencies = get_dependencies(run, args, dict(kwargs))["prior_dependencies"]
    by_provenance = {name: frozenset(parents) - {name} for name, parents in dependencies.items()}
    names = by_gradient.keys() | by_provenance.keys()
    return {name: by_gradient.get(name, frozenset()) | by_provenance.get(name, frozenset()) for name in names}


def _parents_by_gradient(model: PyroProgram, values: Values, args: Args, kwargs: Kwargs) -> dict[str, frozenset[str]]:
    """Return, for each site, the latents whose values receive a gradient from its density at a fixed value."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items() if value.is_floating_point()}
    with torch.enable_grad(), ReplayValues(leaves):
        nodes = sample_sites(poutine.trace(model).get_trace(*args, **kwargs))
    parents = {}
    for name, node in nodes.items():
        density = node["fn"].log_prob(node["value"].detach()).sum()
        if not density.requires_grad:
            parents[name] = frozenset[str]()
            continue
        gradients = torch.autograd.grad(density, list(leaves.values()), retain_graph=True, allow_unused=True)
        parents[name] = frozenset(leaf for leaf, gradient in zip(leaves, gradients, strict=True) if gradient is not None)
    return parents
