"""q(z | x, g) of local latents: encoders read observations, heads give each latent its distribution."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from pyro_aevb._types import SiteDistribution, Values
from pyro_aevb.errors import DataError
from pyro_aevb.guides.coordinates import Coordinates
from pyro_aevb.guides.families import Family
from pyro_aevb.guides.inputs import Input, Observation, Scale, read_scale
from pyro_aevb.guides.layout import Layout
from pyro_aevb.guides.networks import CustomEncoder, Encoder, Head, Mark, Pooling, SeriesEncoder, concatenate
from pyro_aevb.guides.plan import Group, Series, Unit
from pyro_aevb.guides.probe import Reading
from pyro_aevb.program.parameters import preserved_state
from pyro_aevb.program.structure import Structure

__all__ = ["Blueprint", "LocalGuide", "Row"]

Times = tuple[str | None, ...]
"""A kind of observation of a loop: its site at each time."""


@dataclass(frozen=True)
class Blueprint:
    """What local guides are built from.

    Attributes:
        structure: The model's structure.
        layout: Positions of its plates.
        units: Which latents share networks.
        coordinates: Coordinates of every latent, global ones too.
        example: What an example batch says.
        ordered: Inner plates that are read in order.
        asymmetric: Inner plates whose indices are not alike, so that networks are told which is which.
        uneven: Units, by index, whose steps are not alike.
        inputs: How each input is read, and whether entries may be missing; ``None`` if the example tells.
        with_units: Globals whose location and scale under q are known.
        encoders: Users' encoders by latent.
        make_family: Makes the family of a latent.
    """

    structure: Structure
    layout: Layout
    units: tuple[Unit, ...]
    coordinates: dict[str, Coordinates]
    example: Reading
    ordered: frozenset[str]
    asymmetric: frozenset[str]
    uneven: frozenset[int]
    inputs: tuple[tuple[Scale, bool], ...] | None
    with_units: frozenset[str]
    encoders: Mapping[str, nn.Module]
    make_family: Callable[[Coordinates], Family]


@dataclass
class Row:
    """One run of the local guide: what the batch says, what was sampled, and the features computed so far.

    Attributes:
        reading: What the batch says.
        values: Latents sampled so far.
        supports: Supports of the latents.
        units: Location and scale of globals under q, as :meth:`~pyro_aevb.guides.coordinates.Coordinates.inputs` takes them.
        like: A tensor of the networks' type and device.
        features: Features by encoder.
    """

    reading: Reading
    values: Values
    supports: Mapping[str, Constraint]
    units: Mapping[str, tuple[Tensor, Tensor]]
    like: Tensor
    features: dict[int, Tensor] = field(default_factory=dict)


class LocalGuide(nn.Module):
    """The networks of all local latents.

    Args:
        blueprint: What they are built from.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        self.structure, self.layout, self.units = blueprint.structure, blueprint.layout, blueprint.units
        self.masked = frozenset(blueprint.example.masks)
        self.with_units = blueprint.with_units
        self.inputs = nn.ModuleList()
        self.encoders = nn.ModuleList()
        self.coordinates = nn.ModuleList(blueprint.coordinates.values())
        self._coordinates = {name: index for index, name in enumerate(blueprint.coordinates)}
        self._inputs: dict[Times, int] = {}
        self._encoders: dict[object, int] = {}
        self._place = {
            name: (index, step) for index, unit in enumerate(self.units) for step, name in enumerate(unit.latents)
        }
        with torch.no_grad():
            self._reads = [self._add_encoders(unit, blueprint) for unit in self.units]
        middle = [blueprint.coordinates[unit.latents[len(unit.latents) // 2]] for unit in self.units]
        self.families = nn.ModuleList(map(blueprint.make_family, middle))
        self.marks = nn.ModuleList(self._make_marks(unit, index, blueprint) for index, unit in enumerate(self.units))
        self.heads = nn.ModuleList(self._make_head(index) for index in range(len(self.units)))

    def forward(self, name: str, row: Row, offset: Tensor | None = None) -> SiteDistribution:
        """Return the distribution of a latent, of its batch shape, given what was sampled before it.

        Args:
            name: The latent.
            row: What is known so far.
            offset: Added to the parameters of its family, ``[*batch, num_outputs]``.
        """
        unit, _ = self._place[name]
        outputs = self.layout.write(self.heads[unit](self._features(name, row)), self.structure.sites[name])
        return self.families[unit](outputs if offset is None else outputs + offset, row.supports[name])

    def family(self, name: str) -> Family:
        """Return the family of a latent."""
        return cast(Family, self.families[self._place[name][0]])

    def encoder_labels(self, name: str) -> list[str]:
        """Return the names of a latent's encoders, in the order of what they read."""
        return [f"{self.encoders[index].label} {index + 1}" for index, _ in self._reads[self._place[name][0]]]

    def sources(self) -> frozenset[str]:
        """Return the observed sites and arguments that any latent reads."""
        return frozenset(name for times in self._inputs for name in times if name is not None)

    # Building

    def _add_encoders(self, unit: Unit, blueprint: Blueprint) -> list[tuple[int, Group | Series]]:
        """Make the encoders of one unit, or find those that another unit made for the same sources."""
        custom = blueprint.encoders.get(unit.latents[0])
        plates = frozenset(self.structure.sites[unit.latents[0]].plates)
        parts: list[Group | Series] = [*(unit.groups if custom is None else _for_custom(unit.groups))]
        parts += [unit.series] if unit.series is not None else []
        reads = []
        for part in parts:
            keeps = isinstance(part, Group) and bool(part.pooled & blueprint.ordered & plates)
            key: object = (part, keeps, custom)
            if isinstance(part, Group) and part.latents:
                key = (part, unit)  # sampled values are read anew for each latent
            if key not in self._encoders:
                self.encoders.append(self._make_encoder(part, blueprint, custom, plates, keeps_plate=keeps))
                self._encoders[key] = len(self.encoders) - 1
            reads.append((self._encoders[key], part))
        return reads

    def _make_encoder(
        self,
        part: Group | Series,
        blueprint: Blueprint,
        custom: nn.Module | None,
        plates: frozenset[str],
        *,
        keeps_plate: bool,
    ) -> nn.Module:
        """Make the encoder of one group or series, its inputs standardised by the example."""
        kinds = part.sites if isinstance(part, Series) else tuple((name,) for name in part.sources)
        inputs = [self._add_input(times, blueprint) for times in kinds]
        if custom is not None and inputs:
            return self._make_custom(custom, part, inputs, blueprint, plates)
        if isinstance(part, Series):
            return SeriesEncoder(inputs, part.direction)
        sampled = sum(self._slot_width((name,)) for name in part.latents)
        ordered = [frame.name for frame in self.layout.inner if frame.name in part.pooled & blueprint.ordered][-1:]
        joined = part.pooled - set(ordered) if ordered else part.pooled & blueprint.asymmetric
        flat = [frame for frame in self.layout.inner if frame.name in joined]
        pooling = Pooling(
            vector={self.layout.axis(frame.name): frame.size for frame in flat},
            items=tuple(sorted(map(self.layout.axis, part.pooled - joined))),
            order="step" if ordered and keeps_plate else "summary" if ordered else None,
        )
        return Encoder(inputs, sampled, pooling)

    def _make_custom(
        self,
        module: nn.Module,
        part: Group | Series,
        inputs: list[Input],
        blueprint: Blueprint,
        plates: frozenset[str],
    ) -> CustomEncoder:
        """Wrap a user's encoder, and call it once to learn how many features it returns."""
        names = part.sources if isinstance(part, Group) else [next(filter(None, times)) for times in part.sites]
        own = [axis for axis, frame in enumerate(self.layout.inner, start=1) if frame.name in plates]
        shapes = {name: item.given_shape for name, item in zip(names, inputs, strict=True)}
        encoder = CustomEncoder(module, shapes, own, is_series=isinstance(part, Series))
        with preserved_state([module]):
            encoder.num_features = encoder(self._observations(part, blueprint.example), self.layout.num_axes).shape[-1]
        return encoder

    def _add_input(self, times: Times, blueprint: Blueprint) -> Input:
        """Make the standardised input of one kind of observation, or find it."""
        if times not in self._inputs:
            name = next(filter(None, times))
            site = self.structure.sites.get(name)
            example = _stack(times, blueprint.example, self.layout.num_axes)
            shape = site.event_shape if site is not None else tuple(example.value.shape[self.layout.num_axes :])
            scale = read_scale(site, example)
            if blueprint.inputs is not None:
                scale, has_mask = blueprint.inputs[len(self.inputs)]
                if has_mask and example.mask is None:
                    example = example._replace(mask=torch.ones_like(example.value, dtype=torch.bool))
            self.inputs.append(Input(name, example, scale, shape))
            self._inputs[times] = len(self.inputs) - 1
        return cast(Input, self.inputs[self._inputs[times]])

    def _make_marks(self, unit: Unit, index: int, blueprint: Blueprint) -> nn.ModuleList:
        """Make what tells a head the index in plates, and the step of a series, that are not alike."""
        plates = {frame.name for frame in self.structure.sites[unit.latents[0]].frames}
        marked = [frame for frame in self.layout.inner if frame.name in plates & blueprint.asymmetric]
        marks = [Mark(frame.size, self.layout.axis(frame.name)) for frame in marked]
        if self.structure.data_plate in blueprint.asymmetric:
            marks.append(Mark(self.structure.rows, 0))
        return nn.ModuleList(marks + ([Mark(len(unit.latents), None)] if index in blueprint.uneven else []))

    def _make_head(self, index: int) -> Head:
        reads, unit = self._reads[index], self.units[index]
        width = sum(cast(Encoder, self.encoders[encoder]).num_features for encoder, _ in reads)
        width += sum(map(self._slot_width, unit.parents))
        marks = list(cast(Iterable[Mark], self.marks[index]))
        width += sum(mark.num_features for mark in marks)
        outputs = cast(Family, self.families[index]).num_outputs
        return Head(max(width, 1), outputs, is_linear=not unit.parents and not marks and len(reads) <= 1)

    def _slot_width(self, slot: Times) -> int:
        """Return the number of inputs of one slot of sampled parents."""
        name = next(filter(None, slot))
        site = self.structure.sites[name]
        instances = 1 if site.is_local else math.prod(site.batch_shape)
        inputs = self._own(name).num_inputs * (2 if name in self.with_units else 1)
        return inputs * instances + (None in slot) + (name in self.masked)

    def _own(self, name: str) -> Coordinates:
        return cast(Coordinates, self.coordinates[self._coordinates[name]])

    # Running

    def _observations(self, part: Group | Series, reading: Reading) -> list[Observation]:
        """Return the standardised inputs of a group or a series."""
        kinds = part.sites if isinstance(part, Series) else tuple((name,) for name in part.sources)
        axes = self.layout.num_axes
        return [self.inputs[self._inputs[times]](_stack(times, reading, axes)) for times in kinds]

    def _features(self, name: str, row: Row) -> Tensor:
        """Join what a latent's head reads."""
        index, step = self._place[name]
        unit = self.units[index]
        parts = []
        for encoder, part in self._reads[index]:
            features = self._encode(encoder, part, row)
            parts.append(features[..., part.positions[step], :] if isinstance(part, Series) else features)
        parts += [self._parent(slot, step, row) for slot in unit.parents]
        parts += [mark(step, self.layout.num_axes) for mark in cast(Iterable[Mark], self.marks[index])]
        if parts:
            return concatenate(parts)
        return row.like.new_ones((1,) * (self.layout.num_axes + 1))

    def _encode(self, encoder: int, part: Group | Series, row: Row) -> Tensor:
        """Return the features of one encoder; those that nothing sampled enters are computed once a run."""
        if encoder in row.features:
            return row.features[encoder]
        module, observations = self.encoders[encoder], self._observations(part, row.reading)
        if isinstance(module, SeriesEncoder):
            features = module(observations)
        elif isinstance(module, CustomEncoder):
            features = module(observations, self.layout.num_axes)
        else:
            sampled = [self._parent((name,), 0, row) for name in getattr(part, "latents", ())]
            features = module(observations, sampled, self.layout.num_axes)
        row.features[encoder] = features
        return features

    def _parent(self, slot: Times, step: int, row: Row) -> Tensor:
        """Return what a head reads of a sampled parent; zeros, told apart by a flag, at steps that lack it."""
        name = slot[step]
        if name is None:
            return row.like.new_zeros(*(1,) * self.layout.num_axes, self._slot_width(slot))
        site = self.structure.sites[name]
        members = [member for member in slot if member is not None]
        own = self._own(members[len(members) // 2])  # one head reads all steps, in the units of one
        inputs = own.inputs(row.values[name], row.supports[name], row.units.get(name))
        mask = row.reading.masks.get(name)
        if mask is not None and name not in self.masked:
            raise DataError(
                f"Latent site {name!r} is masked in this batch and was not in the batch that the guide was built on. Build it on a "
                f"batch that is masked too: guide.build(*batch).",
                site=name,
            )
        if name in self.masked:
            known = torch.ones_like(inputs[..., :1], dtype=torch.bool)
            known = known if mask is None else mask[..., None].expand(known.shape)
            inputs = torch.cat([torch.where(known, inputs, 0.0), known.to(inputs)], -1)
        parent = self.layout.read(inputs, site, 1)
        return torch.cat([parent, torch.ones_like(parent[..., :1])], -1) if None in slot else parent


def _stack(times: Times, reading: Reading, num_axes: int) -> Observation:
    """Return one observation, or those of a loop along an axis of times; a time that lacks one is missing."""
    if len(times) == 1 and times[0] is not None:
        return reading.observations[times[0]]
    found = [None if name is None else reading.observations[name] for name in times]
    like = next(item for item in found if item is not None).value
    values = [torch.zeros_like(like) if item is None else item.value for item in found]
    masks = None
    if any(item is None or item.mask is not None for item in found):
        masks = torch.stack([_mask_of(item, like) for item in found], num_axes)
    return Observation(torch.stack(values, num_axes), masks)


def _mask_of(item: Observation | None, like: Tensor) -> Tensor:
    if item is None:
        return torch.zeros_like(like, dtype=torch.bool)
    return torch.ones_like(like, dtype=torch.bool) if item.mask is None else item.mask


def _for_custom(groups: tuple[Group, ...]) -> list[Group]:
    """Give a user's encoder all observed sources at once, and leave the sampled ones that are pooled to ours."""
    sources = tuple(dict.fromkeys(name for group in groups for name in group.sources))
    whole = [Group(sources, (), frozenset())] if sources else []
    return whole + [Group((), group.latents, group.pooled) for group in groups if group.latents]
