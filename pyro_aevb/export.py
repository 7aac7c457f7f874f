"""Posterior draws for ArviZ: its tables, plots and comparisons take them from here."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from torch import Tensor

from pyro_aevb.arviz_arrays import from_arrays
from pyro_aevb.errors import DataError
from pyro_aevb.mcmc.draws import PosteriorDraws

__all__ = ["to_arviz"]


def to_arviz(
    posterior: PosteriorDraws | Mapping[str, Tensor],
    *,
    guide: Mapping[str, Tensor] | None = None,
    log_likelihood: Mapping[str, Tensor] | None = None,
    observed_data: Mapping[str, Tensor] | None = None,
    has_rows: bool = True,
) -> Any:
    r"""Give draws to ArviZ: an ``InferenceData`` under ArviZ 0.x, a ``DataTree`` under 1.x.

    =====================  =========================================================================================
    group                  what it holds
    =====================  =========================================================================================
    ``posterior``          the draws, ``[chain, draw, row, ...]``; what ``az.summary`` and ``az.plot_forest`` read
    ``sample_stats``       ``lp``, the log joint density of each draw and row, of chains only
    ``guide``              draws of a guide as one chain, beside chains in ``posterior``
    ``log_likelihood``     what ``az.loo`` and ``az.compare`` read
    ``observed_data``      the data
    =====================  =========================================================================================

    Axes are called ``chain``, ``draw``, ``row``, then ``<site>_dim_0`` and so on. To plot both posteriors, take their groups: under
    0.x ``az.plot_forest([data.posterior, data.guide])``, or make two objects by two calls and give ``{"chains": one, "guide":
    other}``, as plots of 1.x and ``az.compare`` of both want them.

    Args:
        posterior: Draws of chains; or of a guide, ``{site: [draws, rows, ...]}`` as ``AEVB.posterior`` returns them, as one chain.
        guide: Draws of a guide for the same rows.
        log_likelihood: Log density of observations by site: ``[chains, draws, rows, ...]`` beside chains, else ``[draws, rows,
            ...]``.
        observed_data: Observations by site, ``[rows, ...]``.
        has_rows: Whether the first axis behind the draws is the rows; ``False`` where the whole model was one row.

    Returns:
        The object of the installed ArviZ, with arrays of its own on the CPU.

    Raises:
        DataError: If there are no draws, or a site of the guide has another shape than it has in the posterior.

    Example:
        >>> from pyro_aevb.export import to_arviz
        >>> data = to_arviz({"z": torch.randn(100, 3, 2)}, observed_data={"x": torch.randn(3)})
        >>> data.posterior["z"].dims
        ('chain', 'draw', 'row', 'z_dim_0')
    """
    groups = _groups(posterior, has_rows=has_rows)
    arrays_of = _arrays if isinstance(posterior, PosteriorDraws) else _one_chain
    if guide is not None:
        groups["guide"] = _one_chain(guide)
        _check_same_shapes(groups["posterior"], groups["guide"])
    if log_likelihood is not None:
        groups["log_likelihood"] = arrays_of(log_likelihood)
    dims = {
        group: {name: _axes(name, array, has_rows=has_rows) for name, array in arrays.items()}
        for group, arrays in groups.items()
    }
    if observed_data is not None:
        groups["observed_data"] = found = _arrays(observed_data)
        dims["observed_data"] = {
            name: _axes(name, array[None, None], has_rows=has_rows)[2:] for name, array in found.items()
        }
    attributes = {"inference_library": "pyro_aevb", "inference_library_version": version("pyro_aevb")}
    return from_arrays(groups, dims, attributes)


def _groups(posterior: PosteriorDraws | Mapping[str, Tensor], *, has_rows: bool) -> dict[str, dict[str, np.ndarray]]:
    """Return the posterior's arrays, and of chains the log joint density.

    Raises:
        DataError: If there are none.
    """
    if not isinstance(posterior, PosteriorDraws):
        groups = {"posterior": _one_chain(posterior)}
    else:
        lp = posterior.log_joint if has_rows else posterior.log_joint.squeeze(-1)
        groups = {"posterior": _arrays(posterior.samples), "sample_stats": _arrays({"lp": lp})}
    if not groups["posterior"]:
        raise DataError(
            "Expected draws of at least one site, got none. Draws that sample_rows returns are unconstrained: use hmc_posterior, "
            "or give {site: draws}."
        )
    return groups


def _arrays(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copy tensors to numpy."""
    return {name: value.detach().cpu().numpy().copy() for name, value in values.items()}


def _one_chain(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copy draws as one chain of them."""
    return {name: array[None] for name, array in _arrays(values).items()}


def _axes(name: str, array: np.ndarray, *, has_rows: bool) -> list[str]:
    """Name the axes of draws."""
    leading = ["chain", "draw", "row"] if has_rows else ["chain", "draw"]
    return leading + [f"{name}_dim_{place}" for place in range(array.ndim - len(leading))]


def _check_same_shapes(posterior: Mapping[str, np.ndarray], guide: Mapping[str, np.ndarray]) -> None:
    """Refuse a guide's draws of other rows or shapes."""
    for name, array in guide.items():
        if name in posterior and posterior[name].shape[2:] != array.shape[2:]:
            raise DataError(
                f"The guide's draws of site {name!r} must have shape [draws, *{list(posterior[name].shape[2:])}] as the "
                f"posterior's, got {list(array.shape[1:])}. Give draws for the same rows.",
                site=name,
            )
