"""How far to trust a guide, in one report: beside posterior draws, in nats of log p(x), and on data from the model itself."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_aevb._types import PyroProgram, Values
from pyro_aevb.diagnostics.calibration import Calibration, calibrate
from pyro_aevb.diagnostics.comparison import check_enough, compare_posteriors
from pyro_aevb.diagnostics.comparison_result import Comparison
from pyro_aevb.diagnostics.gap import InferenceGap, inference_gap
from pyro_aevb.errors import SettingError
from pyro_aevb.evidence.running import draw_globals
from pyro_aevb.mcmc.nuts import check_cost, nuts_posterior
from pyro_aevb.mcmc.posterior import hmc_posterior
from pyro_aevb.program.batch import as_tensors
from pyro_aevb.program.rows import Rows, inferring
from pyro_aevb.program.settings import as_values, check_count, check_covariates, check_settings

__all__ = ["TrustReport", "trust_report"]

SAMPLERS = {"hmc": hmc_posterior, "nuts": nuts_posterior}
"""Whose draws a guide can be held against."""
_OWN = ("given", "guide", "data_plate", "seed", "progress")
"""Settings of its parts that the report sets itself."""


@dataclass(frozen=True, repr=False, eq=False)
class TrustReport:
    """Three answers to one question. ``print`` it for the tables.

    Attributes:
        comparison: The guide's draws beside posterior draws of the same rows.
        gap: The ledger of what the guide's bound lacks of log p(x); ``None`` if it was left out.
        calibration: Ranks on data that the model made; ``None`` if it was left out.
        against: Whose posterior draws these are.
    """

    comparison: Comparison
    gap: InferenceGap | None
    calibration: Calibration | None
    against: str

    def __repr__(self) -> str:
        return "\n\n".join(f"{title}\n{part!r}" for title, part in self._parts().items())

    def _repr_html_(self) -> str:
        return "".join(f"<h4>{title}</h4>{part._repr_html_()}" for title, part in self._parts().items())

    def _parts(self) -> dict[str, Comparison | InferenceGap | Calibration]:
        """Return the parts that there are, by title."""
        parts = {
            f"Beside draws of {self.against}": self.comparison,
            "What the bound lacks": self.gap,
            "On data from the model": self.calibration,
        }
        return {title: part for title, part in parts.items() if part is not None}


def trust_report(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    against: str = "hmc",
    sampling: Mapping[str, Any] | None = None,
    given: Mapping[str, Tensor] | None = None,
    num_samples: int = 1000,
    ledger: bool = True,
    evidence: Mapping[str, Any] | None = None,
    num_simulations: int = 1000,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = True,
    **covariates: Any,
) -> TrustReport:
    """Compare a guide with MCMC on some rows, split its gap, and calibrate it on data from the model.

    The three look at different things. Posterior draws (:func:`~pyro_aevb.diagnostics.comparison.compare_posteriors`) show where
    the guide is wrong on these rows; the ledger (:func:`~pyro_aevb.diagnostics.gap.inference_gap`) what that costs, and whether
    another family or a better encoder would help; calibration (:func:`~pyro_aevb.diagnostics.calibration.calibrate`) whether
    its probabilities hold over all data that the model can make, which needs no chains. With globals g the first two are
    conditioned on one draw of g from q(g) each, and nothing is claimed about q(g).

    Args:
        model: The model.
        guide: The guide, trained.
        *batch: Some rows, as positional arguments of the model; tens or hundreds will do.
        against: ``"hmc"`` for :func:`~pyro_aevb.mcmc.posterior.hmc_posterior`, all rows at once; ``"nuts"`` for Pyro's own NUTS,
            row by row (:func:`~pyro_aevb.mcmc.nuts.nuts_posterior`), whose cost is told, or refused, before the other parts run.
        sampling: Settings of the sampler, such as ``{"num_samples": 500}``.
        given: Values of the globals for the comparison; by default one draw from the guide.
        num_samples: Draws of the guide for each row in the comparison.
        ledger: Whether to split the gap, which takes draws of its own for log p(x).
        evidence: Settings of :func:`~pyro_aevb.diagnostics.gap.inference_gap`, such as ``{"method": "ais"}``.
        num_simulations: Rows that the model makes for calibration; 0 leaves it out, as models whose data can't be fed back need.
        data_plate: Name of the plate whose indices are rows, or ``"auto"``.
        seed: Seed of everything; the generators are left as they were.
        progress: Whether to show progress bars.
        **covariates: The batch's keyword arguments.

    Raises:
        SettingError: If there is no such sampler, or a setting is out of range.
        DataError: If there are no rows, or data do not fit the model.
        GuideError: If the guide does not fit the model, or its density is not known.
        ModelError: If the model is not supported.

    Example:
        >>> from pyro_aevb.diagnostics.report import trust_report
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> report = trust_report(
        ...     model, guide, torch.tensor([0.0, 1.0]), sampling=dict(num_samples=100, warmup_steps=60),
        ...     ledger=False, num_simulations=200, seed=0, progress=False)
        >>> report.calibration.failures()
        ()
    """
    check_covariates(covariates, trust_report)
    check_count("num_samples", num_samples)
    if num_simulations:
        check_count("num_simulations", num_simulations)
    sampler, settings = _sampler(against, _own_settings("sampling", sampling), num_samples)
    gap_settings = _own_settings("evidence", evidence)
    batch, covariates = as_tensors(batch, covariates)
    shared: dict[str, Any] = {"data_plate": data_plate, "seed": seed, "progress": progress, **covariates}
    globals_ = as_values(given) or _draw_globals(model, guide, batch, covariates, data_plate, seed)
    if against == "nuts":
        check_cost(model, *batch, given=globals_, **settings, **shared)
    # chains come last: what the other two refuse is known before
    calibration = (
        calibrate(model, guide, *batch, num_simulations=num_simulations, **shared) if num_simulations else None
    )
    gap = inference_gap(model, guide, *batch, **gap_settings, **shared) if ledger else None
    reference = sampler(
        model, *batch, given=globals_, **settings, **({"guide": guide} if against == "hmc" else {}), **shared
    )
    return TrustReport(
        comparison=compare_posteriors(
            guide, reference, *batch, model=model, given=globals_, num_samples=num_samples, **shared
        ),
        gap=gap,
        calibration=calibration,
        against=against,
    )


def _own_settings(name: str, settings: Any) -> dict[str, Any]:
    """Return the settings of one part of the report.

    Raises:
        SettingError: If they are no mapping, or hold those of the whole report.
    """
    if not isinstance(settings, Mapping | None):
        raise SettingError(f"{name} must hold settings by name, such as {{'num_samples': 500}}; got {settings!r}.")
    found = dict(settings or {})
    if own := sorted(set(found) & set(_OWN)):
        raise SettingError(f"{name} has settings {own}, which are those of the whole report: give them beside it.")
    return found


def _sampler(name: str, settings: dict[str, Any], num_samples: int) -> tuple[Any, dict[str, Any]]:
    """Find a sampler and check what it is to be given.

    Raises:
        SettingError: If there is none of that name, it has no such setting, or draws are too few to be compared.
    """
    if not isinstance(name, str) or name not in SAMPLERS:
        raise SettingError(f"against must be one of {', '.join(map(repr, SAMPLERS))}, got {name!r}.")
    check_settings(settings, SAMPLERS[name])
    defaults = inspect.signature(SAMPLERS[name]).parameters
    chains, draws = (settings.get(count, defaults[count].default) for count in ("num_chains", "num_samples"))
    check_count("num_chains", chains)
    check_count("num_samples", draws)
    check_enough(num_samples, (chains, draws))
    return SAMPLERS[name], settings


def _draw_globals(
    model: PyroProgram,
    guide: PyroProgram,
    batch: tuple[Any, ...],
    covariates: dict[str, Any],
    data_plate: str | None,
    seed: int | None,
) -> Values:
    """Draw the model's globals once from the guide; nothing where it has none, or is one row as a whole."""
    with inferring(seed, model, guide), torch.no_grad():
        rows = Rows(model, guide, batch, covariates, data_plate)
        structure = rows.structure
        if structure.data_plate is None or not structure.has_globals:
            return {}
        return draw_globals(rows, 1)[0][0]
