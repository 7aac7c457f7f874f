r"""Posterior collapse: latents that the model has learnt to do without.

A unit whose posterior is the same for every row carries nothing: the guide gives it the prior, and the decoder ignores it
(Bowman et al. 2016, arXiv 1511.06349). Three numbers show it, per unit or for all together:

- active units (Burda et al. 2015, arXiv 1509.00519, section 5.2): :math:`\mathrm{Var}_x\, E_q[u|x] > 0.01`;
- what each unit adds to the mean KL term of the bound, :math:`\frac1N \sum_n KL(q(z|x_n) \| p(z))`;
- the index-code mutual information (Hoffman & Johnson 2016, "ELBO surgery"), that KL term less
  :math:`KL(\frac1N \sum_n q(z|x_n) \| p(z))`.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyro_aevb._types import Args, Kwargs, PyroProgram
from pyro_aevb.diagnostics.collapse_result import CollapseReport
from pyro_aevb.diagnostics.latent_units import SiteUnits, split_kl, to_units
from pyro_aevb.diagnostics.mutual_information import RowDraws, information_terms, local_latents
from pyro_aevb.errors import DataError, GuideError, ModelError, SettingError
from pyro_aevb.program.agreement import is_delta
from pyro_aevb.program.batch import as_tensors, batch_rows, take_rows
from pyro_aevb.program.direct import directly
from pyro_aevb.program.rows import Rows, inferring
from pyro_aevb.program.settings import check_count, check_covariates
from pyro_aevb.randomness import check_seed
from pyro_aevb.training.data import as_batch
from pyro_aevb.training.loop import EpochEnd, FitResult

__all__ = ["CollapseMonitor", "CollapseReport", "collapse_report"]

SEED = 150900519
"""Seed of a monitor's draws: none that data are likely to be made under, since noise equal to the data's is no noise."""


def collapse_report(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    num_samples: int = 50,
    max_rows: int = 1000,
    threshold: float = 0.01,
    data_plate: str | None = "auto",
    seed: int | None = None,
    **covariates: Any,
) -> CollapseReport:
    r"""Measure which latents of rows the guide uses.

    Estimators, for the rows given: variance of E_q[u|x] by the covariance over rows between the means of two halves of the
    draws, unbiased; a closed form of the KL where it is valid (as ``SGVB(kl="auto")`` takes it), else log q - log p at the draws,
    unbiased; mutual information from one draw a row, as

    .. math:: I(n; z) = \frac1N \sum_n E_{q(z|x_n)} \left[ \log q(z|x_n) - \log \frac1N \sum_m q(z|x_m) \right],

    which equals mean KL(q(z|x) || p(z)) less KL(q(z) || p(z)) (Hoffman & Johnson 2016), unbiased for these N rows and at most
    log N; for the population of rows it is biased low. Latents outside the data plate are averaged over and not reported. No
    gradient. Cost: ``num_samples`` runs of model and guide a row, and the guide's density :math:`N^2` times. Eval mode.

    Args:
        model: The model.
        guide: The guide.
        *batch: Rows, seen in training or not, as positional arguments of the model.
        num_samples: Draws of each row, at least 2.
        max_rows: N, rows that are used at most, evenly spaced.
        threshold: Variance of the posterior mean over rows above which a unit is active.
        data_plate: Name of the plate whose indices are rows, or ``"auto"``.
        seed: Seed of the draws; the generators are left as they were.
        **covariates: The batch's keyword arguments.

    Returns:
        The report.

    Raises:
        SettingError: If a setting is out of range or a keyword unknown.
        DataError: If there are fewer than two rows, or NaN reaches a density.
        ModelError: If the model is not supported or has no latents of rows.
        GuideError: If the guide does not fit the model, or has points or auxiliary sites inside the data plate.

    Example:
        >>> from pyro_aevb.diagnostics.collapse import collapse_report
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)  # z[1] is of no use
        >>> def guide(x):
        ...     loc = torch.stack([x / 2, torch.zeros(len(x))], -1)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(loc, torch.tensor([0.5**0.5, 1.0])).to_event(1))
        >>> report = collapse_report(model, guide, 2**0.5 * torch.randn(300), seed=0)
        >>> report.dead_units
        ('z[1]',)
    """
    _check_settings(num_samples, max_rows, threshold)
    check_covariates(covariates, collapse_report)
    args, kwargs = _thin(*as_tensors(batch, covariates), max_rows)
    with inferring(seed, model, guide):
        rows = Rows(model, directly(guide), args, kwargs, data_plate)
        _check_rows(rows)
        return _Measurement(rows, num_samples).run(threshold)


def _check_settings(num_samples: int, max_rows: int, threshold: float) -> None:
    for name, count in (("num_samples", num_samples), ("max_rows", max_rows)):
        check_count(name, count)
        if count < 2:
            raise SettingError(f"{name} must be at least 2, got {count}: a variance needs two.")
    if not isinstance(threshold, int | float) or not threshold >= 0:
        raise SettingError(f"threshold must be at least 0, got {threshold!r}.")


def _thin(args: Args, kwargs: Kwargs, max_rows: int) -> tuple[Args, Kwargs]:
    """Take evenly spaced rows where there are too many: data sets are often sorted."""
    count = batch_rows(args, kwargs) or 0
    if count <= max_rows:
        return args, kwargs
    return take_rows(args, kwargs, torch.arange(max_rows) * count // max_rows)


def _check_two(count: int | None) -> None:
    if (count or 0) < 2:
        raise DataError(f"A variance over rows needs at least two of them, got {count or 0}. Give more rows.")


def _check_rows(rows: Rows) -> None:
    if rows.count is None:
        raise SettingError("Whether latents tell rows apart can't be asked with data_plate=None, which has no rows.")
    _check_two(rows.count)
    if not local_latents(rows):
        raise ModelError("The model has no latents inside the data plate, so there is nothing that could collapse.")
    for name, site in rows.program.guide_sites.items():
        if site.is_local and (site.is_auxiliary or is_delta(site)):
            what = (
                "draws the auxiliary site {!r} inside the data plate"
                if site.is_auxiliary
                else "has a point (Delta) at {!r}"
            )
            raise GuideError(
                f"The guide {what.format(name)}, so that its latents have no densities to compare. Use a guide that samples each "
                f"latent of a row from a distribution of its own.",
                site=name,
            )


class _Measurement:
    """Sums over the chunks of rows."""

    def __init__(self, rows: Rows, num_samples: int) -> None:
        self.rows = rows
        self.num_samples = num_samples
        self.units = {site.name: SiteUnits(site, rows.structure) for site in local_latents(rows)}
        self.halves: dict[str, list[Tensor]] = {name: [] for name in self.units}
        self.unit_kl: dict[str, list[Tensor]] = {name: [] for name in self.units}
        self.site_kl: dict[str, list[Tensor]] = {name: [] for name in self.units}

    def run(self, threshold: float) -> CollapseReport:
        """Run every chunk and join what they gave."""
        draws, program = RowDraws(self.rows), self.rows.program
        axes = program.axes(self.num_samples, 1)
        closed = _closed_sites(self.rows)
        for args, kwargs, count in self.rows.chunks(None, self.num_samples, progress=False):
            guide = self.rows.sample_guide(args, kwargs, axes)
            model = program.score_model(args, kwargs, axes, {name: site.value for name, site in guide.items()})
            draws.add(guide, count)
            for term in program.terms(model, guide, axes, closed).latents:
                if term.name in self.units:
                    self.site_kl[term.name].append(-term.negative_kl[:, 0, :count].double().mean(0))
            for name, units in self.units.items():
                self._add(name, to_units(model[name], guide[name], units)[:, :count])
                kl = split_kl(model[name], guide[name], units, is_closed=name in closed)
                if kl is not None:
                    self.unit_kl[name].append(kl[:, :count].double().mean(0))
        return self._report(information_terms(self.rows, draws), threshold)

    def _add(self, name: str, draws: Float[Tensor, "draws rows units"]) -> None:
        """Keep the means of two halves of the draws."""
        half = self.num_samples // 2
        self.halves[name].append(torch.stack([draws[:half].double().mean(0), draws[half:].double().mean(0)]))

    def _report(self, information: Float[Tensor, " rows"], threshold: float) -> CollapseReport:
        site_kl = {name: torch.cat(parts).cpu() for name, parts in self.site_kl.items()}
        total: Tensor = sum(site_kl.values(), torch.zeros((), dtype=torch.float64))
        return CollapseReport(
            units=tuple(name for units in self.units.values() for name in units.names),
            variance=torch.cat([_variance(torch.cat(parts, 1)) for parts in self.halves.values()]).cpu(),
            kl=torch.cat([self._unit_kl(name) for name in self.units]).cpu(),
            site_kl={name: kl.mean().item() for name, kl in site_kl.items()},
            kl_error=_error(total),
            mutual_information=information.mean().item(),
            mutual_information_error=_error(information),
            num_rows=len(information),
            threshold=threshold,
        )

    def _unit_kl(self, name: str) -> Float[Tensor, " units"]:
        parts = self.unit_kl[name]
        unknown = torch.full((len(self.units[name].names),), math.nan, dtype=torch.float64)
        return torch.cat(parts).mean(0) if parts else unknown


def _variance(halves: Float[Tensor, "2 rows units"]) -> Float[Tensor, " units"]:
    """Return the covariance over rows of two independent estimates, unbiased for the variance of what they estimate."""
    first, second = halves - halves.mean(1, keepdim=True)
    return (first * second).sum(0) / (halves.shape[1] - 1)


def _error(values: Float[Tensor, " rows"]) -> float:
    return (values.std() / math.sqrt(len(values))).item()


def _closed_sites(rows: Rows) -> frozenset[str]:
    """Name the sites whose closed-form KL, given a draw of the others, is unbiased: their prior reads nothing drawn from them."""
    program = rows.program
    args, kwargs = take_rows(
        rows.args, rows.kwargs, slice(0, rows.structure.rows)
    )  # as many as the program was read on
    parents = program.parents(args, kwargs)
    order = list(program.guide_sites)
    return frozenset(
        name
        for name in program.closed_form_sites(args, kwargs)
        if not parents.get(name, frozenset()) & set(order[order.index(name) :])
    )


class CollapseMonitor:
    """A callback of ``fit`` that watches which latents are used: ``fit(..., callbacks=[CollapseMonitor(x_new)])``.

    Every so many epochs it adds to the history, in nats per row: ``active_units``, ``kl``, ``mutual_information``, and
    ``kl_<unit>`` and ``kl_<site>``, what each unit and site adds to ``kl``. After the fit it measures once more, at the parameters
    that the fit leaves behind, and warns once if units are dead. It changes no parameter, buffer or generator.

    Args:
        data: Rows to watch, in any form that ``fit`` takes but datasets and loaders: held out, or of the training data.
        every: Epochs from one measurement to the next.
        num_samples: As in :func:`collapse_report`.
        max_rows: As in :func:`collapse_report`.
        threshold: As in :func:`collapse_report`.
        seed: Seed of the draws: the same noise at every epoch.

    Attributes:
        reports: Reports by epoch.
        report: The report after the fit; before its end the latest one, ``None`` if there is none.

    Raises:
        SettingError: If a setting is out of range.
        DataError: If the data are of another type, or fewer than two rows.

    Example:
        >>> from pyro_aevb import AutoAmortizedNormal, SGVB, fit
        >>> from pyro_aevb.diagnostics.collapse import CollapseMonitor
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> x = torch.randn(200)
        >>> monitor = CollapseMonitor(x, every=2)
        >>> result = fit(model, AutoAmortizedNormal(model), SGVB(), x, num_epochs=4, callbacks=[monitor], progress=False)
        >>> tuple(record.get("active_units") for record in result.history)
        (None, 1.0, None, 1.0)
        >>> monitor.report.num_rows
        200
    """

    def __init__(
        self,
        data: Any,
        *,
        every: int = 1,
        num_samples: int = 50,
        max_rows: int = 1000,
        threshold: float = 0.01,
        seed: int = SEED,
    ) -> None:
        check_count("every", every)
        _check_settings(num_samples, max_rows, threshold)
        check_seed(seed)
        batch = as_batch(data)
        _check_two(batch.rows)
        self.args, self.kwargs = _thin(batch.args, batch.kwargs, max_rows)
        self.every = every
        self.settings: dict[str, Any] = {
            "num_samples": num_samples,
            "max_rows": max_rows,
            "threshold": threshold,
            "seed": seed,
        }
        self.reports: dict[int, CollapseReport] = {}
        self.report: CollapseReport | None = None

    def __call__(self, event: EpochEnd) -> None:
        """Measure after an epoch, if it is one of those, and add to the history."""
        if event.epoch % self.every == 0:
            self.reports[event.epoch] = self.report = self._measure(event.module)
            event.record.update(self.report.to_record())

    def finish(self, result: FitResult) -> None:
        """Measure after the fit, and warn of dead units."""
        if result.module is not None and result.history:
            self.report = self._measure(result.module)
            self.report.warn_if_dead()

    def _measure(self, module: Any) -> CollapseReport:
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        args, kwargs = tree_map_only(Tensor, lambda item: item.to(device), (self.args, dict(self.kwargs)))
        plate = module.structure.data_plate if module.structure else module.data_plate
        with module.program.running():
            return collapse_report(module.model, module.guide, *args, data_plate=plate, **self.settings, **kwargs)
