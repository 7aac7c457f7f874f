"""What a batch says to a guide: observations, masks, plates and their indices, read from the model itself.

A guide is given the model's arguments and must know which of them is observed where, which entries are missing, and which rows
a subsampling plate holds. The model knows: it is run once, its latents at fixed values so that no noise is drawn. Where every
observation is a plain argument, or a view of one, and nothing is masked or subsampled, the run is left out.
"""

import inspect
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import DataError, ModelError
from pyro_aevb.guides.coordinates import feasible, is_same_support
from pyro_aevb.guides.inputs import Observation
from pyro_aevb.guides.layout import Layout
from pyro_aevb.program.batch import batch_rows, explained
from pyro_aevb.program.parameters import preserved_state
from pyro_aevb.program.reach import find_modules
from pyro_aevb.program.sites import Nodes, plain_support, sample_sites, value_mask
from pyro_aevb.program.structure import PlateFrame, Structure

__all__ = ["Probe", "Reading", "bind"]


@dataclass(frozen=True)
class Reading:
    """What one batch says.

    Attributes:
        observations: By source, in canonical layout.
        masks: Which entries of a latent's batch shape count, by latent; those without a mask are missing.
        frames: The plates that are to be opened, by name.
        indices: The rows of subsampling plates, by name.
        nodes: The model's sites, if the model was run.
    """

    observations: dict[str, Observation]
    masks: dict[str, Tensor]
    frames: dict[str, PlateFrame]
    indices: Values
    nodes: Nodes = field(default_factory=dict)


class _Feasible(Messenger):
    """Put latents at fixed values, so that a run draws no noise; give plates the rows that were chosen for them.

    Attributes:
        drawn: Plates that choose their rows by themselves: full size, number of rows.
    """

    def __init__(self, indices: Values) -> None:
        super().__init__()
        self.indices = indices
        self.drawn: dict[str, tuple[int, int]] = {}
        self.given: Values = {}

    def _pyro_sample(self, message: Message) -> None:
        fn: Any = message["fn"]
        name = str(message["name"])
        if type(fn).__name__ == "_Subsample":
            if message["value"] is None and fn.subsample_size is not None and fn.subsample_size < fn.size:
                self.drawn[name] = (fn.size, fn.subsample_size)
                index = self.indices.get(name, torch.arange(fn.subsample_size))
                message["value"], message["done"] = index, True
            elif message["value"] is not None:
                self.given[name] = torch.as_tensor(message["value"])
        elif message["value"] is None:
            message["value"], message["done"] = feasible(fn), True


@dataclass(frozen=True, eq=False)
class _Door:
    """How an observed value is seen in an argument: as the whole of it, or as some entries of each row.

    Attributes:
        argument: Name of the argument.
        entries: Which entries of a flattened row the value holds, in the value's shape without rows; ``None`` for the argument.
        span: First entry and the one behind the last, where they lie side by side.
        rows_axis: Axis of the value along which rows lie.
    """

    argument: str
    entries: Tensor | None = None
    span: tuple[int, int] | None = None
    rows_axis: int = 0

    def read(self, arguments: Values) -> Tensor:
        """Return the observed value in other arguments of the same shapes."""
        argument = arguments[self.argument]
        if self.entries is None:
            return argument
        rows = argument.reshape(len(argument), -1)
        chosen = rows[:, slice(*self.span)] if self.span else rows[:, self.entries.flatten().to(rows.device)]
        return chosen.reshape(len(argument), *self.entries.shape).movedim(0, self.rows_axis)


def bind(model: PyroProgram, args: Args, kwargs: Kwargs) -> Values:
    """Return the tensor arguments of a program by name: the parameter's, ``args[0]`` without one, each with an ``@`` in front."""
    try:
        bound = (
            inspect.signature(model.forward if isinstance(model, nn.Module) else model).bind(*args, **kwargs).arguments
        )
    except (TypeError, ValueError):
        bound = {"args": args, "kwargs": dict(kwargs)}
    named: dict[str, Any] = {}
    for name, item in bound.items():
        if isinstance(item, tuple):
            named |= {f"{name}[{index}]": part for index, part in enumerate(item)}
        elif isinstance(item, dict):
            named |= item
        else:
            named[name] = item
    return {f"@{name}": item for name, item in named.items() if isinstance(item, Tensor) and item.dim() > 0}


class Probe:
    """Reads batches of a model.

    Args:
        model: The model.
        structure: The model's structure.
        layout: Positions of its plates.

    Attributes:
        argument_plates: Inner plates that the axes of an argument behind its rows belong to, by argument.
        nan_arguments: Arguments in which NaN stands for a missing entry.
        moving_supports: Latents whose support is computed from arguments.
    """

    def __init__(self, model: PyroProgram, structure: Structure, layout: Layout) -> None:
        self.model = model
        self.structure = structure
        self.layout = layout
        self.argument_plates: dict[str, tuple[str, ...]] = {}
        self.nan_arguments: frozenset[str] = frozenset()
        self.drawn: dict[str, tuple[int, int]] = {}
        self._modules = find_modules(model)
        self._doors: dict[str, _Door] | None = None
        self.moving_supports: frozenset[str] = frozenset()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._constants: list[Any] = []
        self._takes_rows = False

    def learn(self, args: Args, kwargs: Kwargs) -> Reading:
        """Run the model once on an example batch, and find out whether later batches can be read without a run."""
        nodes, handler = self._run(args, kwargs, {})
        arguments = bind(self.model, args, kwargs)
        self.drawn = handler.drawn
        self.nan_arguments = frozenset(
            name for name, item in arguments.items() if item.is_floating_point() and bool(item.isnan().any())
        )
        self._shapes = {name: tuple(item.shape[1:]) for name, item in arguments.items()}
        self._constants = _constants(args, kwargs)
        observed_sites = [nodes[site.name]["value"] for site in self.structure.select("observed", is_local=True)]
        is_given = (self.structure.data_plate or "") in handler.given
        self._takes_rows = is_given and not any(_shares(value, arguments) for value in observed_sites)
        self._doors = self._find_doors(nodes, handler, arguments, batch_rows(args, kwargs))
        observed = tuple(site.name for site in self.structure.select("observed"))
        return self._read_nodes(nodes, arguments, (*observed, *arguments), handler.given)

    def run_quietly(self, args: Args, kwargs: Kwargs) -> Nodes:
        """Run the model on another batch and return its sites."""
        return self._run(args, kwargs, {})[0]

    def always_run(self) -> None:
        """Run the model for every batch."""
        self._doors = None

    @property
    def runs_model(self) -> bool:
        """Whether the model is run to read a batch."""
        return self._doors is None

    def read(self, args: Args, kwargs: Kwargs, sources: Collection[str], indices: Values) -> Reading:
        """Read a batch: from its arguments where they tell everything, else from a run of the model.

        Args:
            args: The batch, as positional arguments.
            kwargs: The batch, as keyword arguments.
            sources: The observed sites and arguments that are wanted.
            indices: The rows of plates that choose them by themselves.

        Raises:
            ModelError: If the model has other sites than when the guide was built.
        """
        arguments = bind(self.model, args, kwargs)
        if self._doors is not None and self._fits(arguments) and _is_equal(_constants(args, kwargs), self._constants):
            return self._read_arguments(self._doors, arguments, sources)
        nodes, handler = self._run(args, kwargs, indices)
        self._check_sites(nodes)
        return self._read_nodes(nodes, arguments, sources, handler.given | indices)

    def _run(self, args: Args, kwargs: Kwargs, indices: Values) -> tuple[Nodes, _Feasible]:
        handler = _Feasible(indices)
        with preserved_state(self._modules), torch.no_grad(), explained("model", args, kwargs), handler:
            nodes = sample_sites(poutine.trace(self.model).get_trace(*args, **kwargs))
        return nodes, handler

    def _check_sites(self, nodes: Nodes) -> None:
        """Refuse a model that has other sites, or events of other shapes, or observes others, than when the guide was built."""
        built = {
            name: (site.kind in ("observed", "factor"), site.event_shape) for name, site in self.structure.sites.items()
        }
        found = {name: (bool(node["is_observed"]), tuple(node["fn"].event_shape)) for name, node in nodes.items()}
        if built == found:
            self._check_supports(nodes)
            return
        changed = sorted(name for name in built.keys() | found.keys() if built.get(name) != found.get(name))
        raise ModelError(
            f"The model has other sites than when the guide was built: expected {_listed(built, changed)}, got "
            f"{_listed(found, changed)}. The guide needs one structure for every batch: pad to one length and mask, draw a count "
            f"that varies inside a plate, and give what is observed for some rows with obs_mask=.",
            site=changed[0],
        )

    def _check_supports(self, nodes: Nodes) -> None:
        """Refuse supports that have moved since the guide was built; a recording can't look at values."""
        if torch.compiler.is_compiling():
            return
        for site in self.structure.select("latent"):
            support = plain_support(nodes[site.name]["fn"])
            if site.name not in self.moving_supports and not is_same_support(site.support, support):
                raise ModelError(
                    f"The support of latent site {site.name!r} was {site.support} when the guide was built and is {support} now. "
                    f"Give what its ends are computed from as a tensor argument with rows, or build another guide.",
                    site=site.name,
                )

    def _read_nodes(self, nodes: Nodes, arguments: Values, sources: Collection[str], indices: Values) -> Reading:
        latents = {site.name for site in self.structure.select("latent")}
        frames = {
            frame.name: PlateFrame(frame.name, frame.dim, frame.size, frame.full_size or frame.size)
            for name in nodes
            if name in latents
            for frame in nodes[name]["cond_indep_stack"]
        }
        masks = {name: mask for name in nodes if name in latents and (mask := _batch_mask(nodes[name])) is not None}
        observations = {name: self._observation(nodes[name]) for name in sources if name in nodes}
        observations |= {name: self._argument(name, arguments[name], indices) for name in sources if name in arguments}
        return Reading(observations, masks, frames, indices, nodes)

    def _read_arguments(self, doors: dict[str, _Door], arguments: Values, sources: Collection[str]) -> Reading:
        rows = len(next(iter(arguments.values()))) if arguments else self.structure.rows
        frames = {
            frame.name: replace(frame, size=rows, full_size=rows) if frame.name == self.structure.data_plate else frame
            for site in self.structure.select("latent")
            for frame in site.frames
        }
        observations = {
            name: Observation(self._canonical(name, doors[name].read(arguments)), None)
            for name in sources
            if name in doors
        }
        observations |= {name: self._argument(name, arguments[name], {}) for name in sources if name in arguments}
        return Reading(observations, {}, frames, {})

    def _observation(self, node: dict[str, Any]) -> Observation:
        name, fn = node["name"], node["fn"]
        shape = fn.batch_shape + fn.event_shape
        if any(own > given for own, given in zip(reversed(node["value"].shape), reversed(shape), strict=False)):
            raise ModelError(
                f"Site {name!r} observes data of shape {list(node['value'].shape)} under a distribution of shape {list(shape)}. "
                f"Give it parameters of the data's shape, or .expand(...) before .to_event(...).",
                site=name,
            )
        value, mask = node["value"].expand(shape), value_mask(node)
        known = None if mask is None else self._canonical(name, mask.expand(shape))
        return Observation(self._canonical(name, value), known)

    def _canonical(self, name: str, value: Tensor) -> Tensor:
        site = self.structure.sites[name]
        return self.layout.read(value, site, len(site.event_shape))

    def _argument(self, name: str, argument: Tensor, indices: Values) -> Observation:
        plates = self.argument_plates.get(name, ())
        index = indices.get(self.structure.data_plate or "")
        if self.structure.data_plate is None:
            argument = argument[None]
        elif index is not None and argument is not index and (len(argument) > len(index) or self._takes_rows):
            argument = argument[index]  # the model takes its rows out of all of them
        for axis, plate in enumerate(plates, start=1):
            if plate in indices and argument.shape[axis] > len(indices[plate]):
                argument = argument.index_select(axis, indices[plate])
        is_new = name not in self.nan_arguments and argument.is_floating_point() and not torch.compiler.is_compiling()
        if is_new and bool(argument.isnan().any()):
            raise DataError(
                f"Argument {name.removeprefix('@')!r} holds NaN in this batch and did not in the batch that the guide was built "
                f"on. Fill or drop these entries, or build the guide on a batch that holds some: its encoders are then told."
            )
        value = self.layout.rows(argument, plates)
        return Observation(value, ~value.isnan() if name in self.nan_arguments else None)

    def _fits(self, arguments: Values) -> bool:
        """Tell whether arguments have the shapes, behind their rows, and as many rows, as doors were found for."""
        shapes = {name: tuple(item.shape[1:]) for name, item in arguments.items()}
        return shapes == self._shapes and len({len(item) for item in arguments.values()}) == 1

    def _find_doors(
        self, nodes: Nodes, handler: _Feasible, arguments: Values, rows: int | None
    ) -> dict[str, _Door] | None:
        """Find every observation in the arguments; ``None`` if a run of the model is needed to read a batch."""
        frames = [frame for node in nodes.values() for frame in node["cond_indep_stack"]]
        is_subsampled = bool(handler.drawn or handler.given) or any(frame.size != frame.full_size for frame in frames)
        if is_subsampled or rows != self.structure.rows or any(value_mask(node) is not None for node in nodes.values()):
            return None
        doors = {}
        for site in self.structure.select("observed", is_local=True):
            door = _find_door(nodes[site.name]["value"], arguments)
            if door is None or nodes[site.name]["fn"].batch_shape + site.event_shape != nodes[site.name]["value"].shape:
                return None
            doors[site.name] = door
        return doors


def _shares(observed: Any, arguments: Values) -> bool:
    """Tell whether an observed value is memory of an argument, rather than taken out of it by an index."""
    memory = {item.untyped_storage().data_ptr() for item in arguments.values()}
    return isinstance(observed, Tensor) and observed.untyped_storage().data_ptr() in memory


def _constants(args: Args, kwargs: Kwargs) -> list[Any]:
    """Return the arguments that are no tensors with rows."""
    named = [*enumerate(args), *sorted(kwargs.items())]
    return [pair for pair in named if not (isinstance(pair[1], Tensor) and pair[1].dim() > 0)]


def _is_equal(a: list[Any], b: list[Any]) -> bool:
    """Compare constants; what can't be compared counts as different."""
    try:
        return len(a) == len(b) and all(one is other or bool(one == other) for one, other in zip(a, b, strict=True))
    except (RuntimeError, ValueError, TypeError):
        return False


def _find_door(observed: Any, arguments: Values) -> _Door | None:
    """Find the argument that an observed value is, or is a view of."""
    if not isinstance(observed, Tensor) or not observed.numel():
        return None
    for name, argument in arguments.items():
        if observed is argument:
            return _Door(name)
        same = observed.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()
        if same and argument.is_contiguous() and len(argument) > 1 and observed.dtype == argument.dtype:
            return _entries_of(name, observed, argument)
    return None


def _entries_of(name: str, observed: Tensor, argument: Tensor) -> _Door | None:
    """Find which entries of each row a view shows; ``None`` if rows do not lie along one axis of it."""
    sizes, strides = observed.shape, observed.stride()
    rows = [axis for axis, size in enumerate(sizes) if (size, strides[axis]) == (len(argument), argument.stride(0))]
    if len(rows) != 1:
        return None
    offset = int(observed.storage_offset() - argument.storage_offset())
    numbers = torch.arange(argument.numel()).as_strided(sizes, strides, offset)
    entries = numbers.select(rows[0], 0).clone()
    first, stop = int(entries.min()), int(entries.max()) + 1
    is_span = torch.equal(entries.flatten(), torch.arange(first, stop))
    return _Door(name, entries, (first, stop) if is_span else None, rows[0])


def _batch_mask(node: dict[str, Any]) -> Tensor | None:
    """Return the mask of a latent, of its batch shape.

    Raises:
        ModelError: If it masks a part of an event.
    """
    mask = value_mask(node)
    if mask is None:
        return None
    event_dim = node["fn"].event_dim
    if any(size > 1 for size in mask.shape[mask.dim() - event_dim :]):
        raise ModelError(
            f"The mask at latent site {node['name']!r} has shape {list(mask.shape)} and splits its event of shape "
            f"{list(node['fn'].event_shape)}. Put the entries into a plate instead of .to_event(), or mask whole events.",
            site=node["name"],
        )
    return mask.reshape(mask.shape[: mask.dim() - event_dim])


def _listed(sites: dict[str, tuple[bool, tuple[int, ...]]], names: list[str]) -> str:
    """Write sites with their event shapes."""
    known = [(name, *sites[name]) for name in names[:5] if name in sites]
    parts = [f"{'observed' if is_observed else 'latent'} {name}: {list(shape)}" for name, is_observed, shape in known]
    return ", ".join(parts) or "none of them"
