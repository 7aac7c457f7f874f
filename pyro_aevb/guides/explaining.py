"""A guide in words and as a graph: what each latent is given by, and which network reads it."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from pyro_aevb.errors import SettingError
from pyro_aevb.guides.building import Built, Networks
from pyro_aevb.guides.global_latents import GlobalGuide
from pyro_aevb.guides.plan import Group, Series, Unit
from pyro_aevb.program.divergence import elementwise
from pyro_aevb.program.structure import Site

__all__ = ["Explanation", "Line", "explain", "graph_text", "write_graph"]

_READS = {"backward": "read backward", "forward": "read forward", "both": "read both ways"}
_NONE = "-"


@dataclass(frozen=True)
class Line:
    """How one latent, or the steps of a series together, is guided.

    Attributes:
        latent: Its name, with the inner plates that it lies in.
        support: Its support and the shape of an event.
        family: Its family in the guide.
        parents: Sampled latents that it is given.
        observations: Observed sites and arguments that it is given, and how plates are read that it does not lie in.
        encoder: The networks that read these, in this order; equal numbers are one network. A global's parameters are free.
    """

    latent: str
    support: str
    family: str
    parents: str
    observations: str
    encoder: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """A guide as a table; it prints as plain text.

    Attributes:
        header: The guide, its rows, and how it reads a batch.
        lines: One for each latent, those of a series together.
    """

    header: str
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        """Return the table."""
        cells = [tuple(field.name for field in fields(Line)), *(astuple(line) for line in self.lines)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rows = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        rows.insert(1, "-+-".join("-" * width for width in widths))
        return "\n".join([self.header, *(row.rstrip() for row in rows)])

    __repr__ = __str__


def explain(name: str, built: Built, networks: Networks) -> Explanation:
    """Explain a guide that is built.

    Args:
        name: The guide's class.
        built: What was read from the model.
        networks: The guide's parameters.

    Returns:
        A line for each latent, globals first.
    """
    structure = built.structure
    plate = "no data plate, the whole model is one row"
    if structure.data_plate is not None:
        plate = f"data plate {structure.data_plate!r}, {structure.rows} rows when it was built"
    reads = "a run of the model reads each batch" if built.probe.runs_model else "batches are read from their tensors"
    count = sum(parameter.numel() for parameter in networks.parameters())
    lines = [line for part in networks.of_globals for line in _of_globals(cast(GlobalGuide, part))]
    lines += [_of_unit(unit, built, networks) for unit in built.units]
    return Explanation(f"{name}: {plate}; {reads}; {count:,} parameters", tuple(lines))


def _of_globals(part: GlobalGuide) -> Iterator[Line]:
    for site in part.sites:
        yield Line(_place(site, None), _support(site), part.label(site.name), _NONE, _NONE, "free")


def _of_unit(unit: Unit, built: Built, networks: Networks) -> Line:
    first = unit.latents[0]
    site = built.structure.sites[first]
    place = _place(site, built.structure.data_plate).replace(first, _range(unit.latents), 1)
    pooled = [f"{name}{_pooled(group, built)}" for group in unit.groups for name in group.latents]
    parents = [_slot(slot, unit) for slot in unit.parents] + pooled
    observed = [text for part in (*unit.groups, unit.series) if part is not None for text in _observed(part, built)]
    family = networks.of_locals.family(first)
    return Line(
        place,
        "circle" if family.coordinates.kind == "circle" else _support(site),
        family.label,
        ", ".join(parents) or _NONE,
        ", ".join([*observed, *_marks(unit, built)]) or _NONE,
        " + ".join(networks.of_locals.encoder_labels(first)) or _NONE,
    )


def _place(site: Site, data_plate: str | None) -> str:
    inner = [frame.name for frame in site.frames if frame.dim is not None and frame.name != data_plate]
    return f"{site.name} in {', '.join(inner)}" if inner else site.name


def _support(site: Site) -> str:
    """Write a support as mathematics does where it is an interval, and the shape of an event."""
    support = elementwise(site.support)
    ends = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    if ends == [None, None]:
        text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(support).__name__.strip("_")).lower()
    else:
        text = f"({_end(ends[0], '-inf')}, {_end(ends[1], 'inf')})"
    return f"{text} {list(site.event_shape)}" if site.event_shape else text


def _end(end: Any, missing: str) -> str:
    if end is None:
        return missing
    if isinstance(end, Tensor) and end.unique().numel() > 1:
        return "varies"
    return f"{float(end.reshape(-1)[0] if isinstance(end, Tensor) else end):g}"


def _range(names: Sequence[str | None]) -> str:
    present = [name for name in names if name is not None]
    return present[0] if len(set(present)) == 1 else f"{present[0]} ... {present[-1]}"


def _slot(slot: Sequence[str | None], unit: Unit) -> str:
    """Write a parent: for the steps of a series, how many steps away it lies."""
    pairs = [(name, own) for name, own in zip(slot, unit.latents, strict=True) if name is not None]
    if len({name for name, _ in pairs}) == 1 and len(unit.latents) > 1:
        return pairs[0][0]
    lag = _number(pairs[0][0]) - _number(pairs[0][1]) if len(unit.latents) > 1 else 0
    where = f" ({abs(lag)} step{'s' * (abs(lag) > 1)} {'before' if lag < 0 else 'after'})" if lag else ""
    return _range(slot) + where


def _number(name: str) -> int:
    """Return the last number in a name."""
    return int(re.findall(r"\d+", name)[-1])


def _observed(part: Group | Series, built: Built) -> list[str]:
    if isinstance(part, Series):
        return [f"{_written(_range(times))} {_READS[part.direction]}" for times in part.sites]
    return [f"{_written(name)}{_pooled(part, built)}" for name in part.sources]


def _pooled(group: Group, built: Built) -> str:
    """Say how the plates of a group's sources are read that the latent does not lie in."""
    ways = {"in order along": built.dependencies.ordered, "as a vector along": built.asymmetric}
    found: dict[str, list[str]] = {}
    for plate in sorted(group.pooled):
        way = next((way for way, plates in ways.items() if plate in plates), "pooled over")
        found.setdefault(way, []).append(plate)
    return "".join(f" {way} {' and '.join(plates)}" for way, plates in found.items())


def _marks(unit: Unit, built: Built) -> list[str]:
    """Name what tells a head the index or step that it is at."""
    plates = built.structure.sites[unit.latents[0]].plates
    steps = ["the step"] if built.units.index(unit) in built.uneven else []
    return [f"the index in {plate}" for plate in plates if plate in built.asymmetric] + steps


def _written(name: str) -> str:
    return f"argument {name[1:]}" if name.startswith("@") else name


# The graph


def graph_text(built: Built) -> str:
    """Return a guide's graph in the language of Graphviz.

    Latents are white, observed sites grey, arguments boxes, plates clusters. An edge leads from what a latent is given to the
    latent; it is dashed, with the plates as its label, where instances of these are read together.
    """
    structure = built.structure
    latents = [site.name for site in structure.select("latent")]
    places = {name: structure.sites[name].plates for name in latents}
    rows = () if structure.data_plate is None else (structure.data_plate,)
    for name in built.sources:
        own = built.probe.argument_plates.get(name, ())
        places[name] = structure.sites[name].plates if name in structure.sites else rows + own
    lines = ["digraph {", *_clusters(places, (), set(latents))]
    for name, sources in built.wiring.items():
        for source in sources:
            label = f" [style=dashed label={_quoted(', '.join(sorted(source.pooled)))}]" if source.pooled else ""
            lines.append(f"  {_quoted(source.name)} -> {_quoted(name)}{label};")
    return "\n".join([*lines, "}"])


def _clusters(places: dict[str, tuple[str, ...]], path: tuple[str, ...], latents: set[str]) -> Iterator[str]:
    """Yield the nodes at one place among the plates, then the plates inside it."""
    indent = "  " * (len(path) + 1)
    for name, plates in places.items():
        if plates == path:
            shape = "box" if name.startswith("@") else "ellipse"
            colour = "white" if name in latents else "grey85"
            label = _quoted(name.removeprefix("@"))
            yield f"{indent}{_quoted(name)} [label={label} shape={shape} style=filled fillcolor={colour}];"
    inside = (
        plates[len(path)] for plates in places.values() if len(plates) > len(path) and plates[: len(path)] == path
    )
    for plate in dict.fromkeys(inside):
        yield f"{indent}subgraph {_quoted('cluster_' + '/'.join([*path, plate]))} {{"
        yield f"{indent}  label={_quoted(plate)} labeljust=r labelloc=b;"
        yield from _clusters(places, (*path, plate), latents)
        yield f"{indent}}}"


def _quoted(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def write_graph(text: str, path: str | Path) -> None:
    """Write a graph as text (.dot, .gv), or as a picture of any kind that Graphviz draws.

    Raises:
        SettingError: If the kind is unknown, or Graphviz is not installed.
    """
    target = Path(path)
    kind = target.suffix.lstrip(".")
    if kind in ("dot", "gv"):
        target.write_text(text, encoding="utf-8")
        return
    program = shutil.which("dot")
    if program is None or not kind:
        raise SettingError(
            f"A graph is written as text to a file ending in .dot or .gv; pictures (.svg, .pdf, .png) need the program dot of "
            f"Graphviz, which is {'not installed' if program is None else 'here'}. Got {str(target)!r}."
        )
    drawn = subprocess.run([program, f"-T{kind}", "-o", str(target)], input=text, text=True, capture_output=True)
    if drawn.returncode:
        raise SettingError(f"Graphviz could not draw {str(target)!r}: {drawn.stderr.strip()}.")
