r"""Does the model make data like those that were seen? Replicated data sets beside the observed one, by statistics.

Posterior predictive checks (Gelman, Meng & Stern 1996, Statistica Sinica 6) draw a data set from
:math:`p(x^{rep} | x) = \int p(x^{rep} | z) q(z | x) dz` again and again; prior predictive checks (Box 1980) draw it from p(x).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import PyroProgram, Values
from pyro_aevb.diagnostics.predictive_result import PredictiveCheck, StatisticCheck
from pyro_aevb.diagnostics.summary_statistics import Statistic, default_statistics
from pyro_aevb.errors import ModelError, SettingError
from pyro_aevb.program.batch import as_tensors
from pyro_aevb.program.particles import ParticleAxes, Records, SiteRecord, as_draws
from pyro_aevb.program.rows import CHUNK_DRAWS, Rows, inferring
from pyro_aevb.program.settings import check_count, check_covariates
from pyro_aevb.program.structure import Structure

__all__ = ["predictive_check"]

StatisticsBySite = dict[str, dict[str, Statistic]]


def predictive_check(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    statistics: Mapping[str, Any] | None = None,
    num_samples: int = 500,
    num_kept: int = 100,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = True,
    **covariates: Any,
) -> PredictiveCheck:
    r"""Compare statistics of the data with those of replicated data, from the posterior and from the prior predictive.

    A replicated data set has the rows, covariates and missing entries of the given one. From the posterior predictive its
    globals and latents are drawn from the guide, :math:`z_n \sim q(z | x_n)`, so that each row is replicated given itself; from the
    prior predictive they are drawn from the model. Where the observations of a row are computed from one another's data (as in
    an autoregression written on x), replicates are given those.

    The p-value of a statistic T is :math:`P(T(x^{rep}) > T(x) | x) + \frac12 P(T(x^{rep}) = T(x) | x)`, the half for ties so that
    statistics of counts that are fitted well lie at 1/2 as others do. It is no frequentist p-value: since the data were used to
    find z, it keeps to the middle, and a value near 0 or 1 says more than one near 1/2 (Meng 1994). Estimated without bias
    from independent data sets, up to the guide's own error. No gradient. Cost: model and guide ``num_samples`` times a row and
    the model as often again. Modules run in eval mode.

    Args:
        model: The model.
        guide: The guide, trained.
        *batch: Rows, as positional arguments of the model.
        statistics: ``{name: function}`` for every observed site, or ``{site: {name: function}}``. A function takes the site's data
            ``[rows, inner plates, *event]`` in floating point, missing entries NaN, and returns a number or a tensor of any shape:
            a number for each row, say. By default such as suit the site
            (:func:`~pyro_aevb.diagnostics.summary_statistics.default_statistics`).
        num_samples: Replicated data sets.
        num_kept: How many of them are kept in the result.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None`` to treat the whole model as one row.
        seed: Seed of the draws; the generators are left as they were.
        progress: Whether to show a progress bar.
        **covariates: The batch's keyword arguments.

    Returns:
        P-values with their errors, and replicated data in the shape that ArviZ takes.

    Raises:
        SettingError: If a setting is out of range or unknown, a statistic fails, or changes its shape between data sets.
        DataError: If there are no rows, or NaN reaches a density.
        ModelError: If the model is not supported or observes nothing.
        GuideError: If the guide does not fit the model.

    Example:
        >>> from pyro_aevb.diagnostics.predictive import predictive_check
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = 2**0.5 * dist.StudentT(2.0).sample((500,))  # heavier tails than the model's
        >>> check = predictive_check(model, guide, x, num_samples=200, seed=0, progress=False)
        >>> bool(check.p_values["sd(x)"] < 0.01)
        True
        >>> check.posterior_predictive["x"].shape
        (1, 100, 500)
    """
    check_count("num_samples", num_samples)
    check_count("num_kept", num_kept)
    check_covariates(covariates, predictive_check)
    batch, covariates = as_tensors(batch, covariates)
    with inferring(seed, model, guide):
        replication = _Replication(Rows(model, guide, batch, covariates, data_plate))
        data = replication.observe()
        chosen = _choose_statistics(statistics, data, replication)
        observed = {name: _apply(chosen[name], value[None], name) for name, value in data.items()}
        found: dict[bool, dict[str, dict[str, Tensor]]] = {}
        kept: dict[bool, Values] = {}
        with tqdm(total=2 * num_samples, disable=not progress, unit="data set", dynamic_ncols=True) as bar:
            for is_posterior in (True, False):
                blocks = replication.replicate(num_samples, is_posterior=is_posterior)
                found[is_posterior], kept[is_posterior] = _summarise(blocks, chosen, num_kept, bar)
    checks = tuple(
        StatisticCheck(
            site, name, value[0], _same(found[True], site, name, value), _same(found[False], site, name, value)
        )
        for site, values in observed.items()
        for name, value in values.items()
    )
    arrays = {
        is_posterior: {name: value[None].numpy() for name, value in part.items()} for is_posterior, part in kept.items()
    }
    return PredictiveCheck(
        checks=checks,
        observed_data={name: value.cpu().numpy() for name, value in data.items()},
        posterior_predictive=arrays[True],
        prior_predictive=arrays[False],
        num_samples=num_samples,
    )


def _choose_statistics(given: Mapping[str, Any] | None, data: Values, replication: "_Replication") -> StatisticsBySite:
    """Return the statistics of each site, with an error for what is no function and no site."""
    if given is None:
        return {name: default_statistics(replication.sites[name], value) for name, value in data.items()}
    if not isinstance(given, Mapping):
        raise SettingError(
            f"statistics must be {{name: function}} or {{site: {{name: function}}}}, got {type(given).__name__}. Write "
            "{'mean': lambda x: x.mean()}."
        )
    if not given:
        raise SettingError("statistics is empty; give {name: function}, or leave it out for a default.")
    by_site = given if all(isinstance(item, Mapping) for item in given.values()) else dict.fromkeys(data, given)
    unknown = [name for name in by_site if name not in data]
    if unknown:
        raise SettingError(f"statistics names the sites {unknown}; the model observes {list(data)}. Name these.")
    for site, functions in by_site.items():
        for name, function in functions.items():
            if not callable(function):
                raise SettingError(
                    f"statistics must hold functions of an observed site's data, got {type(function).__name__} for {name!r}. Write "
                    f"{{'mean': lambda x: x.mean()}}, or {{{site!r}: {{...}}}} for one site alone."
                )
    return {name: dict(by_site.get(name, {})) for name in data}


def _apply(statistics: Mapping[str, Statistic], data: Tensor, site: str) -> dict[str, Tensor]:
    """Return each statistic of each data set, ``[draws, *shape]``."""
    values = {}
    for name, function in statistics.items():
        try:
            parts = [torch.as_tensor(function(item)).double().cpu() for item in data]
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise SettingError(
                f"The statistic {name!r} failed on data of site {site!r} of shape {list(data.shape[1:])}: {error}. It takes the "
                f"site's data and returns a number or a tensor of numbers.",
                site=site,
            ) from error
        if len({part.shape for part in parts}) > 1:
            raise SettingError(_changes(name, site, [list(part.shape) for part in parts]), site=site)
        values[name] = torch.stack(parts)
    return values


def _changes(name: str, site: str, shapes: list[list[int]]) -> str:
    first = next(shape for shape in shapes if shape != shapes[0])
    return (
        f"The statistic {name!r} of site {site!r} has shape {shapes[0]} in one data set and {first} in another. Let it return one "
        f"shape whatever the data."
    )


def _same(found: dict[str, dict[str, Tensor]], site: str, name: str, observed: Tensor) -> Tensor:
    """Return a statistic of replicated data, after a look at its shape."""
    value = found[site][name]
    if value.shape[1:] != observed.shape[1:]:
        raise SettingError(_changes(name, site, [list(observed.shape[1:]), list(value.shape[1:])]), site=site)
    return value


def _summarise(
    blocks: Iterator[Values], chosen: StatisticsBySite, num_kept: int, bar: "tqdm[Any]"
) -> tuple[dict[str, dict[str, Tensor]], Values]:
    """Return every statistic over all blocks of data sets, and the first of these."""
    values: dict[str, list[dict[str, Tensor]]] = {}
    kept: dict[str, list[Tensor]] = {}
    num_done = 0
    for block in blocks:
        for site, data in block.items():
            values.setdefault(site, []).append(_apply(chosen[site], data, site))
            kept.setdefault(site, []).append(data[: max(0, num_kept - num_done)].cpu())
        size = len(next(iter(block.values())))
        num_done += size
        bar.update(size)
    joined = {
        site: {name: torch.cat([part[name] for part in parts]) for name in chosen[site]}
        for site, parts in values.items()
    }
    return joined, {site: torch.cat(parts) for site, parts in kept.items()}


class _Replication:
    """Data sets like the given one.

    Args:
        rows: The rows, read.

    Attributes:
        sites: Observed sites by the name that the model gives them.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.structure = rows.structure
        self.sites = {_public_name(site.name, self.structure): site for site in self.structure.select("observed")}
        if not self.sites:
            raise ModelError(
                "The model observes nothing, so there are no data to compare with. Observe some with obs=."
            )
        self._known: Values = {}

    def observe(self) -> Values:
        """Return the data of each site, ``[rows, inner plates, *event]``, with NaN where they are missing."""
        data: dict[str, list[Tensor]] = {name: [] for name in self.sites}
        known: dict[str, list[Tensor]] = {name: [] for name in self.sites}
        for args, kwargs, count in self.rows.chunks(None, 1, progress=False):
            self.rows.program.forget_indices()  # another chunk has other rows
            records = self.rows.program.score_model(args, kwargs, ParticleAxes(), {})
            for name, site in self.sites.items():
                record = records[site.name]
                shape = torch.broadcast_shapes(record.value.shape, record.fns[0].shape())
                mask = torch.as_tensor(record.mask, device=record.value.device)
                data[name].append(self._lay_out(replace(record, value=record.value.expand(shape)), count))
                known[name].append(self._lay_out(replace(record, value=mask.expand(shape)), count))
        self._known = {name: self._join(name, parts)[0] for name, parts in known.items()}
        return {name: self._hide(name, self._join(name, parts)[0]) for name, parts in data.items()}

    def replicate(self, num_samples: int, *, is_posterior: bool) -> Iterator[Values]:
        """Yield blocks of data sets, ``[draws, rows, inner plates, *event]``, given latents of the guide or of the prior."""
        size = max(1, min(num_samples, CHUNK_DRAWS // (self.rows.count or 1)))
        for start in range(0, num_samples, size):
            yield self._block(min(size, num_samples - start), is_posterior=is_posterior)

    def _block(self, size: int, *, is_posterior: bool) -> Values:
        """Draw whole data sets, chunk by chunk; the first chunk's globals are those of all."""
        program, axes = self.rows.program, self.rows.program.axes(size, 1)
        parts: dict[str, list[Tensor]] = {name: [] for name in self.sites}
        shared: Values = {}
        for args, kwargs, count in self.rows.chunks(None, size, progress=False):
            program.forget_indices()
            given = shared
            if is_posterior:
                drawn = program.sample_guide(args, kwargs, axes, values=shared)
                given = {name: site.value for name, site in drawn.items()}
                shared = {name: site.value for name, site in drawn.items() if not site.is_local}
            records = program.simulate_model(args, kwargs, axes, given)
            if not is_posterior:
                shared = self._globals(records)
            for name, site in self.sites.items():
                parts[name].append(self._lay_out(records[site.name], count))
        return {name: self._hide(name, self._join(name, part)) for name, part in parts.items()}

    def _globals(self, records: Records) -> Values:
        return {site.name: records[site.name].value for site in self.structure.select("latent", is_local=False)}

    def _lay_out(self, record: SiteRecord, count: int) -> Tensor:
        """Return a site's value as ``[draws, rows, inner plates, *event]``, the first rows of a chunk alone."""
        value = as_draws(record, self.structure)
        return value[:, :count] if self._has_rows(record.name) else value

    def _join(self, name: str, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, 1) if self._has_rows(self.sites[name].name) else parts[0]

    def _has_rows(self, name: str) -> bool:
        return self.structure.data_plate is not None and self.structure.sites[name].is_local

    def _hide(self, name: str, value: Tensor) -> Tensor:
        """Put NaN where the data are missing; what is no floating number becomes one."""
        value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
        known = self._known[name]
        return value if known.all() else value.where(known, torch.nan)


def _public_name(name: str, structure: Structure) -> str:
    """Return the name that the model gives a site, without what Pyro adds for ``obs_mask``."""
    base = name.removesuffix("_observed")
    return base if f"{base}_unobserved" in structure.sites else name
