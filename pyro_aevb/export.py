"""Posterior draws for ArviZ: its tables, plots and comparisons take them from here, or from a file."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_aevb._types import PyroProgram
from pyro_aevb.arviz_arrays import from_arrays
from pyro_aevb.arviz_file import ArraysFile, new_file
from pyro_aevb.diagnostics.predictive_result import PredictiveCheck
from pyro_aevb.errors import DataError, SettingError
from pyro_aevb.mcmc.draws import PosteriorDraws
from pyro_aevb.program.batch import as_tensors
from pyro_aevb.program.particles import as_draws
from pyro_aevb.program.rows import Rows, inferring
from pyro_aevb.program.settings import check_count, check_covariates

__all__ = ["export_posterior", "to_arviz"]

Arrays: TypeAlias = dict[str, np.ndarray]
BySite: TypeAlias = Mapping[str, Tensor | np.ndarray]


def to_arviz(
    posterior: PosteriorDraws | BySite,
    *,
    guide: BySite | None = None,
    log_likelihood: BySite | None = None,
    observed_data: BySite | None = None,
    predictive: PredictiveCheck | None = None,
    has_rows: bool = True,
) -> Any:
    r"""Give draws to ArviZ: an ``InferenceData`` under ArviZ 0.x, a ``DataTree`` under 1.x.

    ========================  ======================================================================================
    group                     what it holds
    ========================  ======================================================================================
    ``posterior``             the draws, ``[chain, draw, row, ...]``; ``az.summary``, ``plot_forest``, ``plot_pair``
    ``sample_stats``          ``lp``, the log joint density of each draw and row, of chains only
    ``guide``                 draws of a guide as one chain, beside chains in ``posterior``
    ``log_likelihood``        what ``az.loo`` and ``az.compare`` read
    ``observed_data``         the data
    ``posterior_predictive``  replicated data; ``az.plot_ppc`` of 0.x, ``az.plot_ppc_dist`` of 1.x
    ``prior_predictive``      the same from the prior
    ========================  ======================================================================================

    Axes are called ``chain``, ``draw``, ``row``, then ``<site>_dim_0`` and so on. To plot both posteriors, take their groups: under
    0.x ``az.plot_forest([data.posterior, data.guide])``, or make two objects by two calls and give ``{"chains": one, "guide":
    other}``, as plots of 1.x and ``az.compare`` of both want them.

    Leave-one-out takes one density for each observation, not their sum. Where rows have latents of their own that is
    ``LogDensity(model, x, given=...).log_likelihood(u)`` at draws u of the rows, and what ``az.loo`` estimates is log p(x_n | g) of
    each row: the harmonic mean of its likelihood, which is of use only where Pareto k-hat is low, as it seldom is. Where the model
    is one row, and the data depend on its latents alone, these are the globals of the same model with rows:
    ``LogDensity(model, x, given=draws)``, as below. Draws of a guide are weighed as if they were posterior draws.

    Args:
        posterior: Draws of chains; or of a guide, ``{site: [draws, rows, ...]}`` as ``AEVB.posterior`` returns them, as one chain.
        guide: Draws of a guide for the same rows and sites.
        log_likelihood: Log density of observations by site: ``[chains, draws, rows, ...]`` beside chains, else ``[draws, rows,
            ...]``.
        observed_data: Observations by site, ``[rows, ...]``.
        predictive: Replicated data beside the observed ones, in place of ``observed_data``.
        has_rows: Whether the first axis behind the draws is the rows; ``False`` where the whole model was one row.

    Returns:
        The object of the installed ArviZ, with arrays of its own on the CPU.

    Raises:
        DataError: If there are no draws, they are no tensors by site, or shapes do not agree: of draws, of rows, or of a guide's
            sites with the posterior's.

    Example:
        >>> from pyro_aevb import LogDensity, to_arviz
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> x = torch.tensor([-1.0, 0.5, 1.0])
        >>> draws = {"loc": dist.Normal(0.125, 0.5).sample((100,))}  # of the exact posterior
        >>> each = LogDensity(model, x, given=draws).log_likelihood(torch.zeros(100, 3, 0))
        >>> data = to_arviz(draws, log_likelihood={"x": each}, observed_data={"x": x}, has_rows=False)
        >>> data.posterior["loc"].dims, data.log_likelihood["x"].shape
        (('chain', 'draw'), (1, 100, 3))
    """
    if isinstance(posterior, PosteriorDraws):
        lp = posterior.log_joint if has_rows else posterior.log_joint.squeeze(-1)
        groups = {"posterior": _arrays("posterior", posterior.samples), "sample_stats": _arrays("lp", {"lp": lp})}
    else:
        groups = {"posterior": _one_chain("posterior", posterior)}
    if not groups["posterior"]:
        raise DataError(
            "Expected draws of at least one site, got none. Draws that sample_rows returns are unconstrained: use hmc_posterior, "
            "or give {site: draws}."
        )
    if guide is not None:
        groups["guide"] = _one_chain("guide", guide)
        _check_same_sites(groups["posterior"], groups["guide"])
    if log_likelihood is not None:
        arrays_of = _arrays if isinstance(posterior, PosteriorDraws) else _one_chain
        groups["log_likelihood"] = arrays_of("log_likelihood", log_likelihood)
    if observed_data is not None:
        groups["observed_data"] = _arrays("observed_data", observed_data)
    for group, arrays in groups.items():
        _check_axes(group, arrays, groups["posterior"], has_rows=has_rows)
    if predictive is not None:
        groups |= _predicted(predictive)
    num_rows = next(iter(groups["posterior"].values())).shape[2] if has_rows else None
    dims = {
        group: {name: _axes(group, name, array, num_rows) for name, array in arrays.items()}
        for group, arrays in groups.items()
    }
    return from_arrays(groups, dims, _attributes())


def export_posterior(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    path: str | Path,
    num_samples: int = 100,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = False,
    **covariates: Any,
) -> Path:
    """Draw the latents of all rows from the guide and write them to a netCDF file, chunk by chunk.

    Memory holds the draws of one chunk, and rows may come from a memory map, so that neither data nor draws need to fit. The file
    has the group ``posterior`` of one chain, as :func:`to_arviz` makes it of ``posterior(...)``; ``arviz.from_netcdf(path)`` reads
    it, under ArviZ 0.x and 1.x, and ``xarray.open_dataset(path, group="posterior")`` without loading it. It is there once it is
    whole.

    Args:
        model: The model.
        guide: The guide, trained.
        *batch: Rows, tensors or numpy arrays (``numpy.memmap``), as positional arguments of the model.
        path: The file; one that is there is replaced at the end.
        num_samples: Draws of each row.
        chunk_size: Rows run at once; by default so many that some 50,000 draws are in memory.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None``.
        seed: Seed of the draws; the generators are left as they were. Draws are those of :func:`~pyro_aevb.posterior` with
            that ``num_samples`` and ``chunk_size``.
        progress: Whether to show a progress bar.
        **covariates: The batch's keyword arguments.

    Returns:
        The path.

    Raises:
        SettingError: If a setting is out of range or unknown, or a site's name holds a slash, which separates groups there.
        DataError: If there are no rows, NaN reaches a density, or data lie outside the support of their likelihood.
        ModelError: If the model is not supported or fails on the batch.
        GuideError: If the guide does not fit the model.
        FileError: If the file can't be written; one that was there is as it was.

    Example:
        >>> import tempfile, xarray
        >>> from pyro_aevb import export_posterior
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_posterior(model, guide, torch.zeros(1000), path=f"{folder}/draws.nc", num_samples=5, chunk_size=300)
        ...     xarray.open_dataset(path, group="posterior")["z"].shape
        (1, 5, 1000)
    """
    check_count("num_samples", num_samples)
    check_count("chunk_size", chunk_size, is_optional=True)
    check_covariates(covariates, export_posterior)
    if not isinstance(path, str | Path) or not Path(path).name:
        raise SettingError(f"path must name a file, got {path!r}.")
    batch, covariates = as_tensors(batch, covariates)
    with inferring(seed, model, guide):
        rows = Rows(model, guide, batch, covariates, data_plate).checked()
        names = rows.program.names
        if separated := sorted(name for name in names if "/" in name):
            raise SettingError(
                f"Sites {separated} have a slash in their names, which separates groups in a file: rename them."
            )
        axes = replace(rows.program.axes(num_samples, 1), is_weighed=False)
        done = 0
        with new_file(path, _attributes()) as file:
            for args, kwargs, count in rows.chunks(chunk_size, num_samples, progress=progress):
                records = rows.sample_guide(args, kwargs, axes)
                draws = {name: as_draws(site, rows.structure) for name, site in records.items() if name in names}
                _write_draws(file, rows, draws, slice(done, done + count))
                done += count
    return Path(path)


def _write_draws(file: ArraysFile, rows: Rows, draws: BySite, part: slice) -> None:
    """Write one chunk's draws; those of globals, which are the same in every chunk, with the first."""
    for name, array in _one_chain("posterior", draws).items():
        if rows.count is not None and rows.structure.sites[name].is_local:
            array = array[:, :, : part.stop - part.start]  # without the rows that pad a chunk
            file.write(
                "posterior", name, array, _axes("posterior", name, array, array.shape[2]), ("row", part, rows.count)
            )
        elif part.start == 0:
            file.write("posterior", name, array, _axes("posterior", name, array, None))


def _attributes() -> dict[str, str]:
    return {"inference_library": "pyro_aevb", "inference_library_version": version("pyro_aevb")}


def _arrays(group: str, values: Any) -> Arrays:
    """Copy tensors to numpy.

    Raises:
        DataError: If they are no tensors by site.
    """
    if not isinstance(values, Mapping):
        raise DataError(
            f"{group} must be {{site: tensor}}, got {type(values).__name__}. Draws of chains go first, to_arviz(chains, "
            "guide={site: draws}); of a comparison these are its .reference and .guide_samples."
        )
    for name, value in values.items():
        if not isinstance(value, Tensor | np.ndarray):
            raise DataError(
                f"{group} must hold a tensor for site {name!r}, got {type(value).__name__}.", site=str(name)
            )
    tensors = {name: torch.as_tensor(value).detach().cpu() for name, value in values.items()}
    # numpy knows no bfloat16
    return {
        name: np.array((value.float() if value.dtype == torch.bfloat16 else value).numpy(), copy=True)
        for name, value in tensors.items()
    }


def _one_chain(group: str, values: Any) -> Arrays:
    """Copy draws as one chain of them."""
    return {name: array[None] for name, array in _arrays(group, values).items()}


def _predicted(predictive: PredictiveCheck) -> dict[str, Arrays]:
    """Return the groups of replicated data.

    Raises:
        DataError: If it is no result of ``predictive_check``.
    """
    if not isinstance(predictive, PredictiveCheck):
        raise DataError(f"predictive must be what predictive_check returns, got {type(predictive).__name__}.")
    names = ("observed_data", "posterior_predictive", "prior_predictive")
    return {name: dict(getattr(predictive, name)) for name in names}


def _axes(group: str, name: str, array: np.ndarray, num_rows: int | None) -> list[str]:
    """Name the axes of an array; replicated data have no rows where the model observes them outside its data plate."""
    leading = [] if group == "observed_data" else ["chain", "draw"]
    if num_rows is not None and array.shape[len(leading) : len(leading) + 1] == (num_rows,):
        leading = [*leading, "row"]
    return leading + [f"{name}_dim_{place}" for place in range(array.ndim - len(leading))]


def _check_same_sites(posterior: Arrays, guide: Arrays) -> None:
    """Refuse a guide's draws of other sites, rows or shapes.

    Raises:
        DataError: Naming the site.
    """
    if unknown := sorted(guide.keys() - posterior.keys()):
        raise DataError(
            f"The guide's draws are of sites {unknown}, of which the posterior, {sorted(posterior)}, has none."
        )
    for name, array in guide.items():
        if posterior[name].shape[2:] != array.shape[2:]:
            raise DataError(
                f"The guide's draws of site {name!r} must have shape [draws, *{list(posterior[name].shape[2:])}] as the "
                f"posterior's, got {list(array.shape[1:])}. Give draws for the same rows.",
                site=name,
            )


def _check_axes(group: str, arrays: Arrays, posterior: Arrays, *, has_rows: bool) -> None:
    """Refuse arrays that lack axes, or have other draws than their group, or other rows than the posterior.

    Raises:
        DataError: Naming group, site and shape.
    """
    if not arrays:
        return
    axes = ("chain", "draw", "row") if has_rows else ("chain", "draw")
    sizes = dict(zip(axes, (*next(iter(posterior.values())).shape, None, None), strict=False))
    if group == "guide":
        sizes |= dict(zip(("chain", "draw"), (*next(iter(arrays.values())).shape, None), strict=False))
    leading = {axis: sizes[axis] for axis in axes[2 if group == "observed_data" else 0 :]}
    for name, array in arrays.items():
        if array.shape[: len(leading)] != tuple(leading.values()):
            raise DataError(
                f"Site {name!r} of {group} must begin with the axes {leading} as the rest does, got the shape {list(array.shape)}. "
                "Give draws and rows that belong together; has_rows=False where the whole model is one row.",
                site=str(name),
            )
