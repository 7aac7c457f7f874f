"""Which latents share networks, and what each network reads: the wiring turned into a plan.

A latent is a unit of its own, but for the steps of a series (sites ``z_1``, ``z_2``, ... of a loop): if each step needs the same
things, shifted in time, one recurrent encoder reads the observations in order and one head serves all steps.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pyro_aevb.guides.wiring import Source
from pyro_aevb.program.structure import Structure

__all__ = ["Direction", "Group", "Series", "Unit", "numbered_sites", "plan_units"]

Direction = Literal["backward", "forward", "both"]

_FEWEST_STEPS = 3


@dataclass(frozen=True)
class Group:
    """Sources that one encoder reads together.

    Attributes:
        sources: Observed sites and arguments.
        latents: Sampled latents, which are read along only where plates are pooled.
        pooled: Plates that they are pooled over; empty for those of a latent's own instance.
    """

    sources: tuple[str, ...]
    latents: tuple[str, ...]
    pooled: frozenset[str]


@dataclass(frozen=True)
class Series:
    """Observations of a loop, read in order.

    Attributes:
        sites: For each kind of observation its site at each time, ``None`` at times that lack it.
        positions: The time of each step of the unit, as an index into these.
        direction: Whether a step needs what comes after it, before it, or both.
    """

    sites: tuple[tuple[str | None, ...], ...]
    positions: tuple[int, ...]
    direction: Direction


@dataclass(frozen=True)
class Unit:
    """Latents that share a head.

    Attributes:
        latents: The latents, in order of their steps.
        groups: What is read of the whole row, the same at each step.
        series: What is read in order; ``None`` for a latent by itself.
        parents: Sampled latents that a head is given: for each slot the site at each step, ``None`` at steps that lack it.
    """

    latents: tuple[str, ...]
    groups: tuple[Group, ...]
    series: Series | None
    parents: tuple[tuple[str | None, ...], ...]


Wiring = Mapping[str, tuple[Source, ...]]


def plan_units(structure: Structure, wiring: Wiring, apart: frozenset[str] = frozenset()) -> tuple[Unit, ...]:
    """Plan the networks of local latents, in the order of the wiring.

    Args:
        structure: The model's structure.
        wiring: What each local latent reads.
        apart: Latents that share a head with no other, whatever their names.
    """
    latents = frozenset(site.name for site in structure.select("latent"))
    families = numbered_sites(structure)
    units: dict[str, Unit] = {}
    for name in wiring:
        if name in units:
            continue
        family = families.get(_split(name)[0], {})
        members = {step: site for step, site in family.items() if site in wiring.keys() - apart}
        unit = (
            _SeriesPlan(members, families, wiring, latents).unit()
            if len(members) >= _FEWEST_STEPS and name not in apart
            else None
        )
        if unit is None:
            groups, parents = _groups(wiring[name], latents)
            unit = Unit((name,), groups, None, tuple((parent,) for parent in parents))
        units |= dict.fromkeys(unit.latents, unit)
    return tuple(dict.fromkeys(units.values()))


def _groups(sources: Iterable[Source], latents: frozenset[str]) -> tuple[tuple[Group, ...], list[str]]:
    """Sort sources by the plates that they are pooled over; sampled ones of the own instance go to the head."""
    observed: dict[frozenset[str], list[str]] = defaultdict(list)
    sampled: dict[frozenset[str], list[str]] = defaultdict(list)
    for source in sources:
        (sampled if source.name in latents else observed)[source.pooled].append(source.name)
    parents = sampled.pop(frozenset(), [])
    keys = sorted({*observed, *sampled}, key=sorted)
    return tuple(Group(tuple(observed[key]), tuple(sampled[key]), key) for key in keys), parents


def _split(name: str) -> tuple[str, int | None]:
    """Split a site's name at its last number: ``z_12`` into ``z_{}`` and 12."""
    found = re.fullmatch(r"(.*?)(\d+)(\D*)", name)
    return (f"{found[1]}{{}}{found[3]}", int(found[2])) if found else (name, None)


def numbered_sites(structure: Structure) -> dict[str, dict[int, str]]:
    """Collect sites that differ in a number of their names alone."""
    families: dict[str, dict[int, str]] = defaultdict(dict)
    kinds: dict[str, set[object]] = defaultdict(set)
    for site in structure.sites.values():
        key, step = _split(site.name)
        if step is not None:
            families[key][step] = site.name
            frames = tuple(frame for frame in site.frames if frame.dim is not None)
            kinds[key].add((site.kind, site.is_local, str(site.support), site.event_shape, frames))
    return {key: members for key, members in families.items() if len(kinds[key]) == 1}


class _SeriesPlan:
    """The steps of a loop as one unit, if they need the same things shifted in time."""

    def __init__(
        self,
        members: dict[int, str],
        families: dict[str, dict[int, str]],
        wiring: Wiring,
        latents: frozenset[str],
    ) -> None:
        self.members = dict(sorted(members.items()))
        self.families = families
        self.wiring = wiring
        self.latents = latents

    def unit(self) -> Unit | None:
        """Return the unit, or ``None`` where steps differ in what they need."""
        rests = [self._rest(name) for name in self.members.values()]
        if any(set(rest) != set(rests[0]) for rest in rests):
            return None
        lags, reach = self._shifts()
        if not all(self._is_shared(key, lag) for key, lag in lags):
            return None
        groups, parents = _groups(rests[0], self.latents)
        slots = [tuple(self.families[key].get(step + lag) for step in self.members) for key, lag in sorted(lags)]
        slots += [(parent,) * len(self.members) for parent in parents]
        return Unit(tuple(self.members.values()), groups, self._series(reach), tuple(slots))

    def _is_shifted(self, source: Source) -> bool:
        """Tell whether a source is a step of a loop."""
        key, step = _split(source.name)
        return step is not None and not source.pooled and key in self.families

    def _rest(self, name: str) -> list[Source]:
        return [source for source in self.wiring[name] if not self._is_shifted(source)]

    def _shifts(self) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
        """Return the shifts of latents and of observations that any step needs."""
        lags: set[tuple[str, int]] = set()
        reach: set[tuple[str, int]] = set()
        for step, name in self.members.items():
            for source in self.wiring[name]:
                key, other = _split(source.name)
                if other is not None and self._is_shifted(source):
                    (lags if source.name in self.latents else reach).add((key, other - step))
        return lags, reach

    def _is_shared(self, key: str, lag: int) -> bool:
        """Tell whether every step whose shifted latent exists needs it."""
        pairs = ((self.members[step], self.families[key].get(step + lag)) for step in self.members)
        return all(other is None or Source(other, frozenset()) in self.wiring[name] for name, other in pairs)

    def _series(self, reach: set[tuple[str, int]]) -> Series | None:
        if not reach:
            return None
        keys = sorted({key for key, _ in reach})
        times = sorted({*self.members, *(step for key in keys for step in self.families[key])})
        sites = tuple(tuple(self.families[key].get(time) for time in times) for key in keys)
        has_later, has_earlier = any(lag > 0 for _, lag in reach), any(lag < 0 for _, lag in reach)
        direction: Direction = "both" if has_later and has_earlier else "forward" if has_earlier else "backward"
        return Series(sites, tuple(times.index(step) for step in self.members), direction)
