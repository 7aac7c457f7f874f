"""What a model must keep for its rows to have densities of their own, and what its data must."""

from collections.abc import Collection

import pyro
import torch
from torch import Tensor

from pyro_aevb._types import Args, Kwargs, Values
from pyro_aevb.errors import AEVBError, ModelError, SettingError
from pyro_aevb.program.batch import batch_rows, explained, take_rows
from pyro_aevb.program.particles import ParticleAxes
from pyro_aevb.program.placing import Placing
from pyro_aevb.program.row_model import Placed, RowModel, waves
from pyro_aevb.program.structure import Structure
from pyro_aevb.program.supports import Inside

__all__ = ["check_globals", "check_independent_rows", "check_observed"]


def check_globals(structure: Structure, given: Collection[str]) -> None:
    """Hold the globals that are given against those that the model has.

    Raises:
        ModelError: If one is missing.
        SettingError: If one is not the model's.
    """
    names = [site.name for site in structure.select("latent", is_local=False)]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise SettingError(f"given= has {unknown}, which are not globals of the model; its globals are {names}.")
    missing = [name for name in names if name not in given]
    if missing:
        raise ModelError(
            f"Latents {missing} lie outside the data plate {structure.data_plate!r} and tie the rows together. Give their values, "
            f"given={{{missing[0]!r}: ...}}, or treat the whole model as one row with data_plate=None.",
            site=missing[0],
        )


def check_independent_rows(model: RowModel, args: Args, kwargs: Kwargs, given: Values, *, takes_any: bool) -> None:
    """Run a few rows, with the latents of one of them moved, twice, and with fewer others, and compare each site.

    Args:
        model: The model.
        args: The rows, as positional arguments.
        kwargs: The rows, as keyword arguments.
        given: Values of globals in plates.
        takes_any: Whether the model takes any number of rows.

    Raises:
        ModelError: Naming the site whose density of a row depends on other rows, or on chance.
    """
    given = {name: value[:1] for name, value in given.items()}
    count = _count_rows(model, args, kwargs)
    u = waves(1, 2, count, model.layout.dim).to(model.device, model.dtype)
    with explained("model", args, kwargs):
        base = model.place(u, args, kwargs, given)
    every = torch.arange(count)
    if site := _first_moved(base, model.place(u, args, kwargs, given), every):
        raise ModelError(
            f"Site {site!r} has another log density in a second run with the same latents: the model draws something by itself (a "
            f"plate that subsamples data that the model holds, noise outside sample statements). Make it an argument or a latent.",
            site=site,
        )
    for row in {0, count - 1}:
        moved = u.clone()
        moved[:, :, row] += 0.5
        if site := _first_moved(base, model.place(moved, args, kwargs, given), every[every != row]):
            raise ModelError(
                f"Rows are not independent: the log density of site {site!r} in other rows changes with the latents of row {row}. "
                f"Compute each row's sites from its own latents and from globals, or treat the whole model as one row with "
                f"data_plate=None.",
                site=site,
            )
    if takes_any and count > 1:
        _check_batch(model, args, kwargs, given, base)


def _count_rows(model: RowModel, args: Args, kwargs: Kwargs) -> int:
    """Return how many rows a run on a batch has."""
    return 1 if model.structure.data_plate is None else batch_rows(args, kwargs) or model.structure.rows


def _check_batch(model: RowModel, args: Args, kwargs: Kwargs, given: Values, base: Placed) -> None:
    """Run half of the rows without the others."""
    count = base.u.shape[2]
    half = torch.arange((count + 1) // 2)
    part = take_rows(args, kwargs, slice(0, len(half)))
    with explained("model", *part):
        alone = model.place(base.u[:, :, : len(half)], *part, given)
    if site := _first_moved(base, alone, half):
        raise ModelError(
            f"Site {site!r} has other log densities for the first {len(half)} rows alone than in a batch of {count}: they are "
            f"computed from the batch (x.mean(0)), so that chunks of rows would change the numbers. Compute such numbers once from "
            f"all data and bind them with functools.partial.",
            site=site,
        )


def _first_moved(a: Placed, b: Placed, rows: Tensor) -> str | None:
    """Return the first site whose densities of some rows differ by more than rounding."""
    for name, density in a.log_probs.items():
        tolerance = 1e-4 if density.dtype == torch.float32 else 1e-8
        before, after = (item.index_select(2, rows.to(item.device)) for item in (density, b.log_probs[name]))
        if not torch.allclose(before, after, rtol=tolerance, atol=tolerance, equal_nan=True):
            return name
    return None


def check_observed(model: RowModel, args: Args, kwargs: Kwargs, given: Values, *, first_row: int = 0) -> None:
    """Refuse data outside the support of their likelihood, where the likelihood checks its values.

    Args:
        model: The model.
        args: Rows, as positional arguments.
        kwargs: Rows, as keyword arguments.
        given: Values of globals in plates.
        first_row: What the first of these rows is called in a message.

    Raises:
        DataError: Naming the site and the first such rows.
    """
    given = {name: value[:1] for name, value in given.items()}
    count = _count_rows(model, args, kwargs)
    u = waves(1, 1, count, model.layout.dim).to(model.device, model.dtype)
    inside = Inside(model.structure.data_dim, first_row)
    try:
        with torch.enable_grad():
            placing = Placing(model.layout, u.requires_grad_())
            model.run((inside, placing, pyro.validation_enabled(True)), args, kwargs, given, ParticleAxes())
    except AEVBError:
        raise
    except ValueError:
        pass  # the checks that are on refuse such data too, and parameters outside their range at this u, no fault of the data
    if inside.error is not None:
        raise inside.error
