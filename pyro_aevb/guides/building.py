"""From a model and one batch to the networks of its guide: at most five runs of the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_aevb._types import Args, Kwargs, PyroProgram
from pyro_aevb.errors import DataError, GuideError, ModelError
from pyro_aevb.guides.amortized import Blueprint, LocalGuide
from pyro_aevb.guides.coordinates import Coordinates, has_ends, is_same_support, read_coordinates
from pyro_aevb.guides.families import Family
from pyro_aevb.guides.global_latents import GlobalGuide, Joint, OwnGuide, PerSite
from pyro_aevb.guides.inputs import Scale
from pyro_aevb.guides.layout import Layout, read_layout
from pyro_aevb.guides.plan import Unit, numbered_sites, plan_units
from pyro_aevb.guides.probe import Probe, Reading
from pyro_aevb.guides.record import Record
from pyro_aevb.guides.symmetry import asymmetric_plates, uneven_units, unlike_steps
from pyro_aevb.guides.wiring import Node, Source, sampling_order, wire
from pyro_aevb.program.batch import batch_rows
from pyro_aevb.program.coordinates import unconstrained_shape
from pyro_aevb.program.dependencies import Dependencies, read_dependencies
from pyro_aevb.program.sites import plain_support
from pyro_aevb.program.structure import Structure, decide_imputed, read_structure
from pyro_aevb.randomness import seeded

__all__ = ["Built", "Networks", "build_networks", "read_model"]


@dataclass(frozen=True)
class Built:
    """What a guide knows of its model.

    Attributes:
        structure: The model's structure.
        dependencies: Who depends on whom in it.
        wiring: What each local latent reads.
        units: Which latents share networks.
        probe: Reads batches.
        moving_supports: Latents whose support is computed from arguments.
        asymmetric: Inner plates whose indices the model does not treat alike.
        uneven: Units, by index, whose steps it does not treat alike.
        apart: Latents that share a head with no other step of their loop, their priors being of other units.
        inputs: How an earlier build read each input, and whether entries may be missing; ``None`` if the example tells.
        rows: Rows that the example batch offered.
    """

    structure: Structure
    dependencies: Dependencies
    wiring: Mapping[str, tuple[Source, ...]]
    units: tuple[Unit, ...]
    probe: Probe
    moving_supports: frozenset[str]
    asymmetric: frozenset[str]
    uneven: frozenset[int]
    apart: frozenset[str]
    inputs: tuple[tuple[Scale, bool], ...] | None
    rows: int | None

    @property
    def order(self) -> list[str]:
        """Local latents in the order in which they are sampled."""
        return list(self.wiring)

    @property
    def dims(self) -> dict[str, int]:
        """Dimensions of plates."""
        frames = [frame for site in self.structure.sites.values() for frame in site.frames]
        return {frame.name: frame.dim for frame in frames if frame.dim is not None}

    @property
    def sources(self) -> tuple[str, ...]:
        """Observed sites and arguments that some latent reads."""
        latents = {site.name for site in self.structure.select("latent")}
        names = [source.name for sources in self.wiring.values() for source in sources]
        return tuple(dict.fromkeys(name for name in names if name not in latents))


class Networks(nn.Module):
    """All parameters of a guide.

    Args:
        of_globals: Guides of the global latents.
        of_locals: The guide of the local latents.
    """

    like: Tensor

    def __init__(self, of_globals: list[GlobalGuide], of_locals: LocalGuide) -> None:
        super().__init__()
        self.of_globals = nn.ModuleList(of_globals)
        self.of_locals = of_locals
        self.register_buffer("like", torch.zeros(()), persistent=False)


def read_model(
    model: PyroProgram,
    data_plate: str | None,
    args: Args,
    kwargs: Kwargs,
    *,
    encoder: nn.Module | Mapping[str, nn.Module] | None = None,
    record: Record | None = None,
) -> tuple[Built, Reading]:
    """Read structure, dependencies and an example from a model, and wire its latents.

    Args:
        model: The model.
        data_plate: Name of the plate of rows, as in :func:`~pyro_aevb.program.structure.read_structure`.
        args: An example batch, as positional arguments.
        kwargs: An example batch, as keyword arguments.
        encoder: The user's encoders, where there are any.
        record: What an earlier build found, in place of what this batch would show.

    Raises:
        ModelError: If the model is not supported.
    """
    structure = read_structure(model, args, kwargs, data_plate=data_plate, decides_imputed=False)
    _check_observed(structure)
    dependencies = record.dependencies if record else read_dependencies(model, args, kwargs, structure)
    structure = decide_imputed(structure, dependencies.parents)
    for site in structure.select("latent"):
        unconstrained_shape(site)  # said before the model is run at fixed values, which needs the map
    _check_lengths(structure, dependencies.arguments)
    layout = read_layout(structure)
    probe = Probe(model, structure, layout)
    probe.argument_plates = (
        dict(record.argument_plates) if record else _argument_plates(structure, dependencies, layout)
    )
    example = probe.learn(args, kwargs)
    moving = record.moving_supports if record else _moving_supports(structure, example, dependencies)
    probe.moving_supports = moving
    if moving or (record and record.runs_model):
        probe.always_run()
    wiring = _wire(structure, dependencies, probe.argument_plates)
    apart = record.apart if record else unlike_steps(structure, _coordinates(structure, example))
    units = plan_units(structure, wiring, apart | _steps_with_own_encoders(structure, encoder))
    built = Built(
        structure=structure,
        dependencies=replace(dependencies, arguments={}),  # data are not kept
        wiring=wiring,
        units=units,
        probe=probe,
        moving_supports=moving,
        asymmetric=record.asymmetric
        if record
        else asymmetric_plates(probe, args, kwargs, example) - dependencies.ordered,
        uneven=record.uneven if record else uneven_units(structure, units, example),
        apart=apart,
        inputs=record.inputs if record else None,
        rows=record.rows if record else batch_rows(args, kwargs),
    )
    if record:
        probe.nan_arguments = record.nan_arguments
    return built, example


@runtime_checkable
class Maker(Protocol):
    """What is asked of the guide that is built."""

    encoder: nn.Module | Mapping[str, nn.Module] | None
    global_guide: str | type[AutoGuide]

    @property
    def name(self) -> str:
        """Name of the guide's class."""

    def choose_family(self, coordinates: Coordinates) -> Family:
        """Make the family of a local latent."""

    def global_family(self, kind: str) -> Callable[[Coordinates], Family]:
        """Return what makes the joint family of the globals."""


def build_networks(
    maker: Maker, model: PyroProgram, built: Built, example: Reading, batch: tuple[Args, Kwargs]
) -> Networks:
    """Make all parameters of a guide, of the type and on the device of the model's own tensors.

    Raises:
        GuideError: If ``encoder`` names sites that are no local latents, or returns what is no features.
    """
    structure = built.structure
    coordinates = _coordinates(structure, example)
    of_globals = _global_guides(maker, model, built, coordinates, batch)
    blueprint = Blueprint(
        structure=structure,
        layout=built.probe.layout,
        units=built.units,
        coordinates=coordinates,
        example=example,
        ordered=built.dependencies.ordered,
        asymmetric=built.asymmetric,
        uneven=built.uneven,
        inputs=built.inputs,
        with_units=frozenset(name for guide in of_globals for name in guide.units()),
        encoders=_encoders_by_site(maker.encoder, built),
        make_family=maker.choose_family,
    )
    networks = Networks(of_globals, LocalGuide(blueprint))
    like = next((own.loc for own in coordinates.values()), torch.zeros(()))
    return networks.to(dtype=like.dtype, device=like.device)


def _coordinates(structure: Structure, example: Reading) -> dict[str, Coordinates]:
    """Return the coordinates of every latent, the same at each call."""
    with seeded(0), torch.no_grad():
        latents = structure.select("latent")
        return {site.name: read_coordinates(site, example.nodes[site.name]["fn"]) for site in latents}


def _steps_with_own_encoders(
    structure: Structure, encoder: nn.Module | Mapping[str, nn.Module] | None
) -> frozenset[str]:
    """Return the steps of loops to which the user gave different encoders."""
    if not isinstance(encoder, Mapping):
        return frozenset()
    families = [list(members.values()) for members in numbered_sites(structure).values()]
    return frozenset(name for names in families if len({id(encoder.get(name)) for name in names}) > 1 for name in names)


def _encoders_by_site(encoder: nn.Module | Mapping[str, nn.Module] | None, built: Built) -> dict[str, nn.Module]:
    """Give each local latent the user's encoder for it."""
    if encoder is None:
        return {}
    if isinstance(encoder, nn.Module):
        return dict.fromkeys(built.wiring, encoder)
    unknown = sorted(set(encoder) - set(built.wiring))
    if unknown:
        raise GuideError(
            f"encoder names sites {unknown}, which are no latents inside the data plate {built.structure.data_plate!r}; these are "
            f"{list(built.wiring)}. Encoders belong to local latents; globals have none.",
            site=unknown[0],
        )
    return dict(encoder)


def _global_guides(
    maker: Maker, model: PyroProgram, built: Built, coordinates: dict[str, Coordinates], batch: tuple[Args, Kwargs]
) -> list[GlobalGuide]:
    """Make the guides of the globals: one joint one, and one a site where a circle or a sphere has its own family."""
    structure, kind = built.structure, maker.global_guide
    sites = structure.select("latent", is_local=False)
    if not sites:
        return []
    if not isinstance(kind, str):
        own = OwnGuide(sites, model, kind)
        with poutine.block(), seeded(0), torch.no_grad():
            own.guide(*batch[0], **batch[1])  # makes its parameters
        return [own]
    flat = tuple(site for site in sites if coordinates[site.name].kind == "euclidean")
    apart = sites if kind == "normal" else tuple(site for site in sites if site not in flat)
    guides: list[GlobalGuide] = []
    if flat and kind != "normal":
        name = f"_{maker.name}_globals"
        guides.append(Joint(name, flat, coordinates, maker.global_family(kind), structure.max_plate_nesting))
    if apart:
        make = maker.global_family(kind)
        families = {
            site.name: (make if site in flat else maker.choose_family)(coordinates[site.name]) for site in apart
        }
        guides.append(PerSite(apart, families))
    return guides


def _nodes(
    structure: Structure, dependencies: Dependencies, argument_plates: Mapping[str, tuple[str, ...]]
) -> list[Node]:
    """Return the graph's nodes: sites in the model's order, then arguments."""
    nodes = []
    for site in structure.sites.values():
        if site.kind != "imputed":
            inner = {frame.name for frame in site.frames if frame.dim is not None} - {structure.data_plate}
            nodes.append(Node(site.name, site.kind, frozenset(inner), site.is_local))
    return nodes + [Node(name, "argument", frozenset(argument_plates[name]), True) for name in argument_plates]


def _wire(
    structure: Structure, dependencies: Dependencies, argument_plates: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[Source, ...]]:
    """Return what each local latent reads, in the order in which they are sampled."""
    nodes = _nodes(structure, dependencies, argument_plates)
    wiring = wire(nodes, dependencies.parents, ordered=dependencies.ordered)
    return {name: wiring[name] for name in sampling_order(nodes) if name in wiring}


def _argument_plates(structure: Structure, dependencies: Dependencies, layout: Layout) -> dict[str, tuple[str, ...]]:
    """Return the inner plates that the axes of each argument belong to."""
    return {
        name: _plates_of_argument(name, item, structure, dependencies, layout)
        for name, item in dependencies.arguments.items()
    }


def _plates_of_argument(
    name: str, argument: Tensor, structure: Structure, dependencies: Dependencies, layout: Layout
) -> tuple[str, ...]:
    """Find the inner plates whose sizes the axes of an argument behind its rows have, where a site in them reads it."""
    if name in dependencies.whole:
        return ()
    shape = tuple(argument.shape if structure.data_plate is None else argument.shape[1:])
    best: tuple[str, ...] = ()
    for site in structure.sites.values():
        if name in dependencies.parents.get(site.name, ()) and site.is_local:
            own = {frame.name for frame in site.frames}
            inner = [frame for frame in layout.inner if frame.name in own]
            is_alike = len(shape) >= len(inner) and all(
                size in (frame.size, frame.full_size) for size, frame in zip(shape, inner, strict=False)
            )
            if is_alike and len(inner) > len(best):
                best = tuple(frame.name for frame in inner)
    return best


def _check_lengths(structure: Structure, arguments: Mapping[str, Tensor]) -> None:
    """Refuse tensors that have no rows on axis 0: a batch of other rows would not know what to do with them."""
    for name, item in arguments.items():
        if structure.data_plate is not None and len(item) not in (structure.rows, structure.full_size):
            raise DataError(
                f"Argument {name.removeprefix('@')!r} has {len(item)} entries on axis 0, and the data plate "
                f"{structure.data_plate!r} has {structure.rows} rows. Give tensors with rows on axis 0, and bind constants to the "
                f"model with functools.partial."
            )


def _check_observed(structure: Structure) -> None:
    """Refuse a model whose rows show no observation, as a part of a list of guides that exposes its latents does."""
    sites = [site.name for site in structure.select("latent", is_local=True)]
    if structure.data_plate is None or not sites or structure.select("observed") or structure.select("factor"):
        return
    raise GuideError(
        f"The model shows no observation that its latents {sites} could be guided by. In an AutoGuideList hide what other parts "
        f"guide, poutine.block(model, hide=[...]), rather than expose what this part guides, which hides the observations too.",
        site=sites[0],
    )


def _moving_supports(structure: Structure, example: Reading, dependencies: Dependencies) -> frozenset[str]:
    """Name the latents whose support is computed from arguments, and refuse those whose support depends on other latents."""
    moving = set()
    for site in structure.select("latent"):
        other = plain_support(example.nodes[site.name]["fn"])
        if not is_same_support(site.support, other):
            raise ModelError(
                f"The support of latent site {site.name!r} changes between runs on one batch, from {site.support} to {other}: its "
                f"ends are computed from another latent. Sample on a fixed support and transform, such as upper * u with u in "
                f"the unit interval.",
                site=site.name,
            )
        has_arguments = any(name in dependencies.parents.get(site.name, ()) for name in dependencies.arguments)
        if has_arguments and has_ends(site.support):
            moving.add(site.name)
    return frozenset(moving)
