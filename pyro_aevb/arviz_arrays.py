"""Arrays of draws as an object of ArviZ, whichever version is there. Knows nothing of this package, nor of torch.

ArviZ 0.x holds groups in an ``InferenceData``, ArviZ 1.x in a ``DataTree``. Both hold xarray's data sets, which are made here, so
that names of dimensions are the same in both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["from_arrays"]


def from_arrays(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    dims: Mapping[str, Mapping[str, Sequence[str]]],
    attributes: Mapping[str, Any],
) -> Any:
    """Make an ``InferenceData`` or a ``DataTree`` of arrays.

    Args:
        groups: Arrays by group and variable.
        dims: Names of all axes of each, by group and variable.
        attributes: Attributes of every group, such as the library's name.

    Returns:
        An object of the installed ArviZ; every axis has the coordinates 0, 1, 2 and so on.

    Raises:
        ValueError: If an array has not as many axes as it has names.
    """
    import arviz  # 3 s, which only those who export pay
    import xarray

    datasets: dict[str, Any] = {}
    for group, arrays in groups.items():
        variables = {name: (tuple(dims[group][name]), np.asarray(array)) for name, array in arrays.items()}
        sizes = {axis: size for axes, array in variables.values() for axis, size in zip(axes, array.shape, strict=True)}
        coordinates = {axis: np.arange(size) for axis, size in sizes.items()}
        datasets[group] = xarray.Dataset(variables, coords=coordinates, attrs=dict(attributes))
    if int(arviz.__version__.split(".")[0]) == 0:
        return arviz.InferenceData(**datasets)
    return xarray.DataTree.from_dict(datasets)
