"""What a guide has read off data, and off a model's parameters, when it was built: with it, it is built again without data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pyro_aevb.guides.inputs import Scale
from pyro_aevb.program.dependencies import Dependencies

__all__ = ["Record"]


@dataclass(frozen=True)
class Record:
    """The findings of a build that another batch, or the model before its parameters are loaded, may not show.

    Attributes:
        dependencies: Who depends on whom in the model; its arguments are left out.
        argument_plates: Inner plates that the axes of an argument behind its rows belong to, by argument.
        nan_arguments: Arguments in which NaN stands for a missing entry.
        runs_model: Whether the model is run to read a batch.
        moving_supports: Latents whose support is computed from arguments.
        asymmetric: Inner plates whose indices the model does not treat alike.
        uneven: Units, by index, whose steps it does not treat alike.
        apart: Latents that share a head with no other step of their loop.
        inputs: For each input of the encoders how its values become numbers, and whether entries may be missing.
        rows: Rows that the example batch offered.
    """

    dependencies: Dependencies
    argument_plates: Mapping[str, tuple[str, ...]]
    nan_arguments: frozenset[str]
    runs_model: bool
    moving_supports: frozenset[str]
    asymmetric: frozenset[str]
    uneven: frozenset[int]
    apart: frozenset[str]
    inputs: tuple[tuple[Scale, bool], ...]
    rows: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "parents": {name: sorted(found) for name, found in self.dependencies.parents.items()},
            "ordered": sorted(self.dependencies.ordered),
            "argument_plates": {name: list(plates) for name, plates in self.argument_plates.items()},
            "nan_arguments": sorted(self.nan_arguments),
            "runs_model": self.runs_model,
            "moving_supports": sorted(self.moving_supports),
            "asymmetric": sorted(self.asymmetric),
            "uneven": sorted(self.uneven),
            "apart": sorted(self.apart),
            "inputs": [[asdict(scale), has_mask] for scale, has_mask in self.inputs],
            "rows": self.rows,
        }

    @staticmethod
    def from_json(saved: Mapping[str, Any]) -> "Record":
        """Undo :meth:`to_json`."""
        parents = {name: frozenset(found) for name, found in saved["parents"].items()}
        return Record(
            dependencies=Dependencies(parents, {}, frozenset(saved["ordered"])),
            argument_plates={name: tuple(plates) for name, plates in saved["argument_plates"].items()},
            nan_arguments=frozenset(saved["nan_arguments"]),
            runs_model=saved["runs_model"],
            moving_supports=frozenset(saved["moving_supports"]),
            asymmetric=frozenset(saved["asymmetric"]),
            uneven=frozenset(saved["uneven"]),
            apart=frozenset(saved["apart"]),
            inputs=tuple((Scale(**scale), has_mask) for scale, has_mask in saved["inputs"]),
            rows=saved["rows"],
        )
