"""Which entries of a batch are missing, site by site, whatever they hold."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.distributions import Independent
from torch.utils._pytree import tree_map_only

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import DataError, ModelError, SettingError
from pyro_aevb.program.batch import explained
from pyro_aevb.program.particles import ParticleAxes, Records, SiteRecord, as_draws, run_program
from pyro_aevb.program.structure import Structure, read_structure

__all__ = ["MissingData", "PriorData", "lay_out", "public_name", "read_missing", "unobserved"]


class PriorData(Messenger):
    """Let observed sites show draws from their distribution in place of the data, and still count as observed."""

    def _pyro_sample(self, message: Message) -> None:
        fn: Any = message["fn"]
        is_computed = (message["infer"] or {}).get("_deterministic", False)
        if message["is_observed"] and not is_computed and type(fn).__name__ not in ("_Subsample", "Unit"):
            message["value"] = fn.sample()


def _run_on_prior_data(model: PyroProgram, *args: Any, **kwargs: Any) -> Any:
    with PriorData():
        return model(*args, **kwargs)


@dataclass(frozen=True)
class MissingData:
    """What is known of a batch. Entries are laid out as ``[rows, inner plates, *event]``.

    Attributes:
        structure: The model's structure.
        known: Which entries are known, by observed site.
        given: The sites' entries as they came; a missing one may hold anything.
        is_masked: Whether the model's own masks drop every missing entry.
        argument: Position or name of the argument that the mask was given for, where it was given for one.
    """

    structure: Structure
    known: Values
    given: Values
    is_masked: bool
    argument: int | str | None

    def complete(self, values: Values) -> Values:
        """Put values into the missing entries; leading axes of the values are kept."""
        return {
            name: torch.where(known, self.given[name], values[name].to(self.given[name].dtype))
            for name, known in self.known.items()
        }

    def take(self, rows: slice | Tensor) -> "MissingData":
        """Take some rows, or repeat them."""
        known, given = ({name: item[rows] for name, item in part.items()} for part in (self.known, self.given))
        return replace(self, known=known, given=given)


def lay_out(site: SiteRecord, value: Tensor, structure: Structure) -> Tensor:
    """Lay a value of a site out as ``[rows, inner plates, *event]``, after a run without particles.

    The result shares memory with the value: it moves axes and drops those of size 1.
    """
    return as_draws(replace(site, value=value), structure)[0]


def unobserved(name: str, structure: Structure) -> str | None:
    """Return the site that Pyro draws the missing entries of an ``obs_mask`` site from; ``None`` without ``obs_mask``."""
    partner = name.removesuffix("_observed") + "_unobserved"
    return partner if partner in structure.sites and name.endswith("_observed") else None


def public_name(name: str, structure: Structure) -> str:
    """Return the name that the model gives a site, without what Pyro adds for ``obs_mask``."""
    return name.removesuffix("_observed") if unobserved(name, structure) else name


def read_missing(model: PyroProgram, args: Args, kwargs: Kwargs, observed: Any, data_plate: str | None) -> MissingData:
    """Read which entries of a batch are missing.

    Args:
        model: The model. Its densities never see the batch's observed values here, so that missing ones may be NaN.
        args: The batch, as positional arguments.
        kwargs: The batch, as keyword arguments.
        observed: A mask of the shape of an argument whose entries (views of them) are observed, or of the model's only
            observed site; masks by site; ``None`` for what the model's own masks drop.
        data_plate: As in :func:`~pyro_aevb.program.structure.read_structure`.

    Raises:
        DataError: If a mask has another type or shape.
        SettingError: If a mask is for no observed site, or nothing says what is missing.
        ModelError: If the model has no rows or draws them by itself, or a mask splits an event whose entries depend on
            each other.
    """
    # contiguous copies: a mask of an argument is read through the strides of the view that the model observes
    args, kwargs = tree_map_only(Tensor, lambda item: item.detach().clone().contiguous(), (tuple(args), dict(kwargs)))
    # a partial, in which the networks that the model reaches are found
    structure = read_structure(functools.partial(_run_on_prior_data, model), args, kwargs, data_plate=data_plate)
    _check_rows(structure)
    with explained("model", args, kwargs):
        records = run_program(model, structure, ParticleAxes(), args, kwargs)
    sites = {site.name: records[site.name] for site in structure.select("observed", is_local=True)}
    given = {name: lay_out(site, site.value, structure) for name, site in sites.items()}
    for name, site in sites.items():
        _check_shape(name, given[name], site, structure)
    counted = {name: _counted(site, structure) for name, site in sites.items()}
    known, argument = _known(observed, sites, given, counted, structure, (*enumerate(args), *kwargs.items()))
    for name, mask in known.items():
        _check_events(name, mask, sites[name])
    is_masked = not any(bool((~mask & counted[name]).any()) for name, mask in known.items())
    return MissingData(structure, known, {name: given[name] for name in known}, is_masked, argument)


def _check_rows(structure: Structure) -> None:
    if structure.data_plate is None:
        raise ModelError(
            "Missing entries are drawn row by row, and data_plate=None has no rows. Name the plate of the rows."
        )
    if structure.draws_own_rows:
        raise ModelError(
            f"The model draws {structure.rows} of its {structure.full_size} rows by itself, so that chains can't be run side by "
            f"side. Size the plate by the batch: pyro.plate({structure.data_plate!r}, len(x))."
        )


def _check_shape(name: str, given: Tensor, site: SiteRecord, structure: Structure) -> None:
    expected = lay_out(site, given.new_zeros(site.fns[0].shape()), structure).shape
    if given.shape != expected:
        raise ModelError(
            f"Site {name!r} observes a value of shape {list(given.shape)} and has entries of shape {list(expected)}: some value "
            f"is observed several times. Observe one value an entry.",
            site=name,
        )


def _counted(site: SiteRecord, structure: Structure) -> Tensor:
    """Return which entries the site's density counts."""
    mask = torch.as_tensor(site.mask, device=site.value.device)
    return lay_out(site, mask.expand(torch.broadcast_shapes(mask.shape, site.value.shape)), structure)


def _known(
    observed: Any,
    sites: Records,
    given: Values,
    counted: Values,
    structure: Structure,
    arguments: tuple[tuple[int | str, Any], ...],
) -> tuple[Values, int | str | None]:
    """Return the mask of each site, and the argument that they were given for."""
    if observed is None:
        known = {name: mask for name, mask in counted.items() if not mask.all() or unobserved(name, structure)}
        if not known:
            raise SettingError(
                "Nothing says what is missing: the model masks no observed entry. Give observed=, True where an entry is known."
            )
        return known, None
    if isinstance(observed, Mapping):
        names = {public_name(name, structure): name for name in sites}
        unknown = [name for name in observed if name not in names]
        if unknown or not observed:
            raise SettingError(
                f"observed= names the sites {list(observed)}; the model observes {list(names)} in each row. Give a mask for "
                f"each of them that has missing entries."
            )
        masks = {names[name]: _as_mask(mask) for name, mask in observed.items()}
    else:
        mask = _as_mask(observed)
        for key, item in arguments:
            views = {name: site for name, site in sites.items() if _is_view(site.value, item)}
            if views and item.shape == mask.shape:
                return _through_views(mask.to(item.device).contiguous(), views, structure, key), key
        if len(sites) != 1:
            raise DataError(_no_such_shape(mask, given))
        masks = dict.fromkeys(sites, mask)
    for name, mask in masks.items():
        if mask.shape != given[name].shape:
            raise DataError(_no_such_shape(mask, {name: given[name]}))
    return {name: mask.to(given[name].device) for name, mask in masks.items()}, None


def _as_mask(mask: Any) -> Tensor:
    """Accept boolean arrays."""
    try:
        tensor = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"observed= must be a boolean tensor, or {{site: tensor}}; got {mask!r}.") from error
    if tensor.dtype != torch.bool:
        raise DataError(
            f"observed= must be boolean, True where an entry is known; got {str(tensor.dtype).removeprefix('torch.')}. Write "
            f"mask.bool(), or mask > 0."
        )
    return tensor


def _no_such_shape(mask: Tensor, given: Values) -> str:
    shapes = ", ".join(f"{name!r} {list(item.shape)}" for name, item in given.items())
    return (
        f"observed= has shape {list(mask.shape)}; expected that of the argument whose entries the model observes, or of an "
        f"observed site: {shapes}. Models of several sites take observed={{site: mask}}."
    )


def _is_view(value: Any, argument: Any) -> bool:
    """Tell whether an observed value shows entries of an argument."""
    if not (isinstance(value, Tensor) and isinstance(argument, Tensor) and value.numel()):
        return False
    return value.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()


def _through_views(mask: Tensor, views: Records, structure: Structure, key: int | str) -> Values:
    """Read an argument's mask as the sites see the argument."""
    seen = torch.zeros_like(mask)
    known = {}
    for name, site in views.items():
        layout = (site.value.shape, site.value.stride(), site.value.storage_offset())
        torch.as_strided(seen, *layout).fill_(True)
        known[name] = lay_out(site, torch.as_strided(mask, *layout), structure)
    if not (mask | seen).all():
        raise DataError(
            f"observed= marks {int((~mask & ~seen).sum())} entries of argument {key!r} as missing that no site of the model "
            f"observes, so that nothing says how they are distributed. Mark them as known, or model them."
        )
    return known


def _check_events(name: str, known: Tensor, site: SiteRecord) -> None:
    """Refuse a mask that splits an event whose entries depend on each other given the latents."""
    base: Any = site.fns[0]
    while isinstance(base, (Independent, ExpandedDistribution, MaskedDistribution)):
        base = base.base_dist
    if not base.event_dim:
        return
    entries = known.flatten(-base.event_dim)
    is_split = entries.any(-1) & ~entries.all(-1)
    if is_split.any():
        raise ModelError(
            f"Entries of an event of site {name!r} ({type(base).__name__}, event shape {list(base.event_shape)}) depend on each "
            f"other given the latents, and the mask splits {int(is_split.sum())} of its events. Mark an event as known or "
            f"missing as a whole, or use a likelihood of independent entries, such as Normal(...).to_event(1).",
            site=name,
        )
