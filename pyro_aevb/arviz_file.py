"""Arrays of draws written piece by piece to a netCDF file of ArviZ's groups. Knows nothing of programs, nor of torch.

A group of ArviZ, 0.x and 1.x alike, is a group of a netCDF-4 file, which is an HDF5 file. ArviZ and xarray write whole groups;
here a variable is written slice by slice along one axis, so that memory holds a slice.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pyro_aevb.errors import FileError

__all__ = ["ArraysFile", "new_file"]

_BLOCK_BYTES = 1 << 22
"""Size of the blocks that a variable is stored in, each written and read as a whole: 4 MB."""


class ArraysFile:
    """A file that is being written.

    Args:
        file: An open ``h5netcdf.File``.
        attributes: Attributes of every group.
        check: Raises what went wrong on the disk.
    """

    def __init__(self, file: Any, attributes: Mapping[str, Any], check: Callable[[], None]) -> None:
        self._file = file
        self._attributes = dict(attributes)
        self._check = check

    def write(
        self, group: str, name: str, array: np.ndarray, axes: Sequence[str], place: tuple[str, slice, int] | None = None
    ) -> None:
        """Write a variable, or a slice of one.

        Args:
            group: Its group, made at first use.
            name: Its name.
            array: Its numbers.
            axes: Names of all axes; each gets the coordinates 0, 1, 2 and so on.
            place: The axis along which the array is a slice of the variable, the slice, and the variable's length along it.

        Raises:
            ValueError: If a group's axis has another length already.
            OSError: If the disk is full, or fails.
        """
        axis, part, length = place or ("", slice(None), 0)
        shape = [length if own == axis else size for own, size in zip(axes, array.shape, strict=True)]
        if group not in self._file.groups:
            self._file.create_group(group).attrs.update(self._attributes)
        home = self._file.groups[group]
        if name not in home.variables:
            for own, size in zip(axes, shape, strict=True):
                _make_axis(home, own, size)
            home.create_variable(name, tuple(axes), array.dtype, chunks=_blocks(array, axes.index(axis) if axis else 0))
        index = tuple(part if own == axis else slice(None) for own in axes)
        home.variables[name][index] = array
        self._check()


def _make_axis(home: Any, axis: str, size: int) -> None:
    """Make an axis with its coordinates, where a group does not have it."""
    if axis not in home.dimensions:
        home.dimensions[axis] = size
        home.create_variable(axis, (axis,), np.dtype(np.int64))[:] = np.arange(size)
    if home.dimensions[axis].size != size:
        raise ValueError(f"axis {axis} has {home.dimensions[axis].size} coordinates, got {size}")


def _blocks(array: np.ndarray, axis: int) -> tuple[int, ...] | None:
    """Return the shape of the blocks for slices along an axis; ``None`` for a single number."""
    if not array.size:
        return None
    bytes_each = array.nbytes // array.shape[axis] if array.ndim else 0
    if not bytes_each:
        return None
    rows = min(array.shape[axis], max(1, _BLOCK_BYTES // bytes_each))
    return tuple(rows if place == axis else size for place, size in enumerate(array.shape))


class _Disk:
    """A file whose failing writes are kept, to be raised between HDF5's calls: HDF5 itself goes down with them on closing.

    Args:
        path: The file, made anew.

    Attributes:
        error: The first failure; nothing is written after it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self.seek, self.tell = self._file.seek, self._file.tell
        self.read, self.readinto = self._file.read, self._file.readinto
        self.flush, self.close = self._file.flush, self._file.close
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, unless that failed before."""
        rest = memoryview(data).cast("B")
        length = len(rest)
        try:
            while self.error is None and rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
        return length

    def truncate(self, size: int) -> int:
        """Give the file a size, unless something failed before."""
        try:
            if self.error is None:
                self._file.truncate(size)
        except OSError as error:
            self.error = error
        return size

    def sync(self) -> None:
        """Bring the file to the disk."""
        os.fsync(self._file.fileno())

    def check(self) -> None:
        """Raise what failed."""
        if self.error is not None:
            raise self.error


@contextmanager
def new_file(path: str | Path, attributes: Mapping[str, Any]) -> Iterator[ArraysFile]:
    """Write a file that is there only once it is whole: a temporary one beside it, flushed to disk, then renamed.

    Args:
        path: The file; one that is there is replaced at the end.
        attributes: Attributes of every group, such as the library's name.

    Yields:
        The file to write to.

    Raises:
        FileError: If it can't be written; a file that was there is as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with _opened(temporary) as (disk, file):
            yield ArraysFile(file, attributes, disk.check)
            file.close()
            disk.check()
            disk.sync()
        temporary.replace(target)
    except OSError as error:
        raise FileError(f"Could not write {target}: {error}. A file that was there is unchanged.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[_Disk, Any]]:
    """Open a file of HDF5 on the disk, and close it whatever happens."""
    import h5netcdf  # ArviZ 0.x brings it

    disk = _Disk(path)
    file = h5netcdf.File(disk, "w")
    try:
        yield disk, file
    finally:
        file.close()
        disk.close()
