"""Where plates and particles lie: tensors as networks read them, and back to the shapes that Pyro expects.

Networks act on the last axis and see every tensor in one *canonical* layout::

    [*lead, rows, inner plate 1, ..., inner plate m, *event]

``lead`` are the particle axes of values that were sampled (none for observations), the inner plates are all vectorized plates
that local sites lie in besides the data plate, and a plate that a site does not lie in has size 1.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from pyro_aevb.program.structure import PlateFrame, Site, Structure

__all__ = ["Layout", "read_layout"]


@dataclass(frozen=True)
class Layout:
    """Positions of a model's plates.

    Attributes:
        nesting: Number of dimensions that plates use.
        data_dim: Dimension of the data plate, negative; ``None`` when the whole model is one row.
        inner: The vectorized plates of local sites besides the data plate, leftmost dimension first.
    """

    nesting: int
    data_dim: int | None
    inner: tuple[PlateFrame, ...]

    def axis(self, plate: str) -> int:
        """Return the canonical axis of an inner plate, counted from the rows' axis."""
        return 1 + [frame.name for frame in self.inner].index(plate)

    @property
    def num_axes(self) -> int:
        """Number of canonical axes between particles and event: rows and inner plates."""
        return 1 + len(self.inner)

    def read(self, value: Tensor, site: Site, event_dim: int) -> Tensor:
        """Bring a site's value, or a mask of its batch shape, into canonical layout.

        A global site has no rows: all its plates are part of its event, ``[*lead, 1, ..., 1, features]``.
        """
        batch_dim = value.dim() - event_dim
        value = value.reshape((1,) * (self.nesting - batch_dim) + value.shape)
        lead = value.dim() - event_dim - self.nesting
        if not site.is_local:
            return value.reshape(*value.shape[:lead], *(1,) * self.num_axes, -1)
        dims = self._dims(site)
        used = [lead + self.nesting + dim for dim in dims if dim is not None]
        rest = [axis for axis in range(lead, lead + self.nesting) if axis not in used]
        value = value.permute(*range(lead), *used, *rest, *range(lead + self.nesting, value.dim()))
        sizes = iter(value.shape[lead : lead + len(used)])
        axes = [1 if dim is None else next(sizes) for dim in dims]
        return value.reshape(*value.shape[:lead], *axes, *value.shape[lead + self.nesting :])

    def write(self, tensor: Tensor, site: Site) -> Tensor:
        """Bring ``[*lead, rows, inner plates, features]`` to ``[*lead, *batch, features]`` of a local site.

        Without particles the batch shape is the one that Pyro gives the site, with them as many dimensions as plates use.
        """
        lead = tensor.dim() - 1 - self.num_axes
        dims = self._dims(site)
        used = [(dim, axis) for axis, dim in enumerate(dims) if dim is not None]
        rank = self.nesting if lead else max((-dim for dim, _ in used), default=0)
        order = [lead + axis for _, axis in sorted(used)]
        rest = [lead + axis for axis, dim in enumerate(dims) if dim is None]
        moved = tensor.permute(*range(lead), *rest, *order, tensor.dim() - 1)
        sizes = {dim: tensor.shape[lead + axis] for dim, axis in used}
        batch = [sizes.get(dim, 1) for dim in range(-rank, 0)]
        return moved.reshape(*tensor.shape[:lead], *batch, tensor.shape[-1])

    def rows(self, tensor: Tensor, plates: tuple[str, ...]) -> Tensor:
        """Bring an argument ``[rows, sizes of the named plates, *rest]`` into canonical layout, the rest flattened."""
        sizes = dict(zip(plates, tensor.shape[1:], strict=False))
        axes = [sizes.get(frame.name, 1) for frame in self.inner]
        return tensor.reshape(len(tensor), *axes, math.prod(tensor.shape[1 + len(plates) :]))

    def _dims(self, site: Site) -> list[int | None]:
        """Return the plate dimension behind each canonical axis, ``None`` where the site does not vary."""
        own = {frame.name: frame.dim for frame in site.frames}
        return [self.data_dim, *(own.get(frame.name) for frame in self.inner)]


def read_layout(structure: Structure) -> Layout:
    """Read the positions of the plates of a model's local sites."""
    frames = {
        frame.name: frame
        for site in structure.sites.values()
        if site.is_local
        for frame in site.frames
        if frame.dim is not None and frame.name != structure.data_plate
    }
    inner = tuple(sorted(frames.values(), key=lambda frame: frame.dim or 0))
    return Layout(structure.max_plate_nesting, structure.data_dim, inner)
