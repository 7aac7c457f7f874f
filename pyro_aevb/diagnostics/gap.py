r"""Where a bound is lost: log p(x) minus the guide's bound, split into approximation gap and amortization gap, row by row.

.. math:: \log p(x_n) - L_n(q) = \underbrace{\log p(x_n) - L_n(q^*_n)}_{\text{approximation}}
          + \underbrace{L_n(q^*_n) - L_n(q)}_{\text{amortization}}

with :math:`q^*_n` the best that row n's own parameters reach within the family (Cremer, Li and Duvenaud 2018, arXiv 1801.03558).
"""

import html
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from pyro_aevb._types import PerRow, PyroProgram
from pyro_aevb.diagnostics.row_bounds import Proposal, RowBounds, Search, draw_bounds, fit_normals
from pyro_aevb.errors import SettingError, UnreliableWarning, warn_user
from pyro_aevb.evidence.marginal import find_method, make_estimator
from pyro_aevb.evidence.result import LogMarginal
from pyro_aevb.evidence.running import EstimatorRun
from pyro_aevb.evidence.summary import DIRECTION, Bound
from pyro_aevb.guides.refinement import RefinableGuide
from pyro_aevb.program.batch import as_tensors
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.program.rows import inferring
from pyro_aevb.program.settings import NOTE, check_count, check_positive, check_settings
from pyro_aevb.status import Status, judge

if TYPE_CHECKING:
    import pandas

__all__ = ["InferenceGap", "inference_gap"]

_NORMALS = (
    "normals with independent unconstrained coordinates, or the guide where it is as good (written by hand, it does not tell its "
    "family)"
)

_IMPOSSIBLE = 4.0
"""Errors by which log p(x) may lie below its own lower bound before the row is called unreliable."""


@dataclass(frozen=True, repr=False, eq=False)
class InferenceGap:
    r"""The ledger of each row, in nats.

    Attributes:
        log_marginal: The estimate of log p(x), with its error and status.
        bound: The guide's bound (ELBO), the mean of many draws.
        bound_error: Its standard error.
        best_bound: The bound of the best q that was found for the row within ``family``.
        best_error: Its standard error.
        amortization_error: Standard error of ``amortization_gap``: both bounds were drawn with common noise.
        status: The verdict: that of ``log_marginal``; also ``unreliable`` where log p(x) lies more than four errors below a bound,
            or a bound is not finite.
        family: What the best q was looked for in.
        num_draws: Draws behind each bound.
    """

    log_marginal: LogMarginal
    bound: PerRow
    bound_error: PerRow
    best_bound: PerRow
    best_error: PerRow
    amortization_error: PerRow
    status: tuple[Status, ...]
    family: str
    num_draws: int

    def __len__(self) -> int:
        return len(self.status)

    @property
    def inference_gap(self) -> PerRow:
        r"""What the guide's bound lacks of log p(x), :math:`KL(q \| p(z | x))`."""
        return self.log_marginal.value - self.bound

    @property
    def inference_error(self) -> PerRow:
        """Standard error of ``inference_gap``."""
        return self._with_evidence(self.bound_error)

    @property
    def approximation_gap(self) -> PerRow:
        """What the best bound lacks of log p(x): what the family can't express, and what the search for its best left over."""
        return self.log_marginal.value - self.best_bound

    @property
    def approximation_error(self) -> PerRow:
        """Standard error of ``approximation_gap``."""
        return self._with_evidence(self.best_error)

    @property
    def amortization_gap(self) -> PerRow:
        """The best bound minus the guide's: what the encoder loses against parameters of the row's own."""
        return self.best_bound - self.bound

    @property
    def is_flagged(self) -> Bool[Tensor, " rows"]:
        """Which rows are unreliable; means leave them out."""
        flags = [status == Status.UNRELIABLE for status in self.status]
        return torch.tensor(flags, dtype=torch.bool, device=self.bound.device)

    def summary(self) -> "pandas.DataFrame":
        r"""Return the ledger over the rows that are not flagged, nats per row.

        Returns:
            A line each for log p(x), the gaps and the bounds, with ``mean``, ``standard_error`` (Monte Carlo, of the mean over
            these very rows, :math:`\sqrt{\sum_n se_n^2} / N`) and ``sd_over_rows``. NaN where every row is flagged.
        """
        import pandas  # 0.5 s, which only those who ask for a table pay

        entries = {
            self.log_marginal.label: (self.log_marginal.value, self.log_marginal.standard_error),
            "- approximation gap": (self.approximation_gap, self.approximation_error),
            "= best bound": (self.best_bound, self.best_error),
            "- amortization gap": (self.amortization_gap, self.amortization_error),
            "= bound of the guide": (self.bound, self.bound_error),
            "inference gap": (self.inference_gap, self.inference_error),
        }
        sound = ~self.is_flagged
        rows = {name: _average(value[sound], error[sound]) for name, (value, error) in entries.items()}
        return pandas.DataFrame.from_dict(rows, orient="index", columns=["mean", "standard_error", "sd_over_rows"])

    def worst_rows(self, count: int) -> tuple[int, ...]:
        """Return the rows with the largest inference gap, largest first; flagged rows are left out.

        Args:
            count: How many rows at most.
        """
        gap = self.inference_gap.masked_fill(self.is_flagged, -math.inf)
        order = gap.argsort(descending=True)[:count].tolist()
        return tuple(row for row in order if gap[row] > -math.inf)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with one line a row; what all rows share is in its ``attrs``."""
        import pandas  # 0.5 s, which only those who ask for a table pay

        columns = {
            "log_marginal": self.log_marginal.value,
            "log_marginal_error": self.log_marginal.standard_error,
            "approximation_gap": self.approximation_gap,
            "approximation_error": self.approximation_error,
            "best_bound": self.best_bound,
            "amortization_gap": self.amortization_gap,
            "amortization_error": self.amortization_error,
            "bound": self.bound,
            "bound_error": self.bound_error,
            "inference_gap": self.inference_gap,
        }
        frame = pandas.DataFrame({name: item.cpu().numpy() for name, item in columns.items()})
        frame["status"] = [str(status) for status in self.status]
        frame.index.name = "row"
        frame.attrs = {"family": self.family, "num_draws": self.num_draws, "method": self.log_marginal.method}
        return frame

    def __repr__(self) -> str:
        ledger = self.summary().to_string(float_format=_nats, na_rep="unknown")
        worst = self._worst().to_string(float_format=_nats, na_rep="unknown")
        return "\n".join([*self._heading(), ledger, *self._notes(), "rows with the largest inference gap:", worst])

    def _repr_html_(self) -> str:
        ledger = self.summary().to_html(float_format=_nats, na_rep="unknown")
        worst = self._worst().to_html(float_format=_nats, na_rep="unknown")
        heading, notes = ("<br>".join(map(html.escape, lines)) for lines in (self._heading(), self._notes()))
        return f"<p>{heading}</p>{ledger}<p>{notes}<br>rows with the largest inference gap:</p>{worst}"

    def _worst(self) -> "pandas.DataFrame":
        """Return the table of the worst rows."""
        columns = ["log_marginal", "approximation_gap", "amortization_gap", "bound", "inference_gap", "status"]
        return self.to_pandas().loc[list(self.worst_rows(5)), columns]

    def _heading(self) -> list[str]:
        """Say what was compared."""
        evidence = self.log_marginal
        return [
            f"InferenceGap of {len(self)} rows, nats per row; {evidence.label} by {evidence.method} ({DIRECTION[evidence.bound]}), "
            f"bounds by {self.num_draws} draws",
            f"best bound within: {self.family}",
        ]

    def _notes(self) -> list[str]:
        """Count the rows left out, and say what the numbers understate."""
        num_flagged = int(self.is_flagged.sum())
        notes = [
            f"{num_flagged} of {len(self)} rows are unreliable and left out ({num_flagged / max(len(self), 1):.1%})"
        ]
        if self.log_marginal.bound is Bound.LOWER:
            notes.append(
                f"{self.log_marginal.method} lies below log p(x): the approximation gap is at least what is shown"
            )
        return notes

    def _with_evidence(self, error: PerRow) -> PerRow:
        """Add the error of log p(x), whose draws are others."""
        return (error.square() + self.log_marginal.standard_error.square()).sqrt()


def _nats(value: float) -> str:
    """Format nats for people."""
    return f"{value:.4f}"


def _average(value: Tensor, error: Tensor) -> tuple[float, float, float]:
    """Return mean, its Monte Carlo error and the standard deviation over rows."""
    if not len(value):
        return math.nan, math.nan, math.nan
    spread = value.std().item() if len(value) > 1 else math.nan
    return value.mean().item(), (error.square().mean() / len(error)).sqrt().item(), spread


def inference_gap(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    method: str = "bridge",
    num_draws: int = 5000,
    num_steps: int = 200,
    learning_rate: float = 0.1,
    num_particles: int = 16,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> InferenceGap:
    r"""Split log p(x) minus the guide's bound into approximation gap and amortization gap, for each row, in nats.

    Cremer, Li and Duvenaud (2018, arXiv 1801.03558, Eq 2 to 4). log p(x) is :func:`~pyro_aevb.evidence.marginal.log_marginal`'s.
    The best q of a row is looked for by gradient steps on all rows' own parameters at once, from where the guide put them:

    - An automatic amortized guide is refined (:meth:`~pyro_aevb.guides.refinement.RefinableGuide.refine`): offsets on the
      outputs of its networks. For factorised and for full-covariance normals these hold every member of the family; for flows
      and for latents that are conditioned on each other, the networks behind the outputs stay, and the best is the best within
      offsets.
    - A guide written by hand does not tell its family. Its rows get normals with independent unconstrained coordinates, started at
      the guide's own moments, and a row's best is that normal where fresh draws say it is better, else the guide itself. If the
      guide is such a normal, this is its family; if not, ``family`` says that it is another one.

    The bounds come from draws that had no part in the search, with common noise where the guide is refined, so that neither is
    favoured; a gap near 0 may read a little below. What the search did not find counts as approximation gap: with more steps
    it can only fall. With global latents everything is given one draw of them from q.

    No gradient. Modules run in eval mode and keep their parameters. Cost, besides log p(x): ``num_steps * num_particles``
    gradients and some ``3 * num_draws`` densities a row.

    Args:
        model: The model.
        guide: The guide, trained.
        *batch: Rows, as positional arguments of the model.
        method: Estimator of log p(x). ``"quadrature"`` is exact for up to three latents; ``"ais"`` and ``"importance"`` lie below
            log p(x), so that the approximation gap is at least what they say.
        num_draws: Draws behind each bound, at least 2.
        num_steps: Gradient steps on the rows' own parameters.
        learning_rate: Adam's at the start, in units of the networks' outputs or of the guide's standard deviations; it falls to 0.
        num_particles: Draws of each row in a step.
        chunk_size: Rows at once; by default so many that some 50,000 draws are in memory.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None``.
        seed: Seed of the draws; the generators are left as they were.
        progress: Whether to show progress bars.
        **settings: Settings of the estimator of log p(x), and the batch's keyword arguments: tensors and arrays go to the model.

    Returns:
        The ledger: printed as a table over rows, in full by ``to_pandas()``. Unreliable rows are told in one warning.

    Raises:
        SettingError: If a setting is unknown or out of range.
        DataError: If there are no rows, or NaN reaches a density.
        GuideError: If the guide does not fit the model, or has no density of a row's latents.
        ModelError: If the model is not supported.

    Example:
        >>> from pyro_aevb.testing import LinearGaussian
        >>> exact, x = LinearGaussian.fixture()
        >>> guide = exact.mean_field_guide(at_optimum=True)
        >>> settings = {"method": "quadrature", "num_steps": 20, "num_draws": 1000, "seed": 0, "progress": False}
        >>> gap = inference_gap(exact.model, guide, x, **settings)
        >>> bool(abs(gap.approximation_gap - exact.approximation_gap()) < 4 * gap.approximation_error)
        True
        >>> bool(abs(gap.amortization_gap) <= 4 * gap.amortization_error)  # nothing is better than this guide
        True
    """
    _check_search(num_draws, num_steps, learning_rate, num_particles)
    check_count("chunk_size", chunk_size, is_optional=True)
    covariates: dict[str, Any] = {
        name: item for name, item in settings.items() if isinstance(item, (Tensor, np.ndarray))
    }
    own = {name: item for name, item in settings.items() if name not in covariates}
    estimator_settings = [setting.name for setting in fields(find_method(method))]
    check_settings(own, inference_gap, NOTE, also=("preset", "num_samples", *estimator_settings))
    estimator = make_estimator(method, own.pop("preset", None), own.pop("num_samples", None), own)
    batch, covariates = as_tensors(batch, covariates)
    search = Search(num_steps, learning_rate, num_particles, chunk_size, progress)
    with inferring(seed, model, guide):
        run = EstimatorRun(model, guide, (batch, covariates), data_plate, 1)
        run.density.require_latents()
        evidence = run.estimate(estimator, chunk_size, progress=progress)
        proposal = GuideDensity(guide, run.density)
        best: Proposal
        if isinstance(guide, RefinableGuide):
            refined = guide.refine(*batch, given=run.given, **covariates, **search.settings)
            best, family = GuideDensity(refined, run.density), f"{type(guide).__name__} with offsets of each row's own"
        else:
            best, family = fit_normals(run.density, proposal, search), _NORMALS
        bounds = draw_bounds(run.density, proposal, best, num_draws, search)
    result = InferenceGap(
        log_marginal=evidence,
        **bounds._asdict(),
        status=_judge(evidence, bounds),
        family=family,
        num_draws=num_draws,
    )
    _warn(result)
    return result


def _check_search(num_draws: int, num_steps: int, learning_rate: float, num_particles: int) -> None:
    """Refuse numbers out of range."""
    check_count("num_draws", num_draws)
    check_count("num_steps", num_steps)
    check_count("num_particles", num_particles)
    if num_draws < 2:
        raise SettingError(f"num_draws must be at least 2, or a bound has no standard error; got {num_draws}.")
    check_positive("learning_rate", learning_rate)


def _judge(evidence: LogMarginal, bounds: RowBounds) -> tuple[Status, ...]:
    """Take over the verdict on log p(x), and refuse rows in which it lies below a lower bound of its own."""
    is_doubtful = torch.tensor([status == Status.WARN for status in evidence.status])
    is_refuted = torch.zeros_like(evidence.is_flagged)
    for bound, error in ((bounds.bound, bounds.bound_error), (bounds.best_bound, bounds.best_error)):
        error = (error.square() + evidence.standard_error.square()).sqrt()
        is_refuted |= ~bound.isfinite() | (evidence.value - bound < -_IMPOSSIBLE * error)
    return judge(is_doubtful.to(is_refuted.device), evidence.is_flagged | is_refuted)


def _warn(gap: InferenceGap) -> None:
    """Warn once if rows are unreliable."""
    num_flagged = int(gap.is_flagged.sum())
    if num_flagged:
        warn_user(
            f"The ledger of {num_flagged} of {len(gap)} rows is unreliable and stays out of its means: log p(x) by "
            f"{gap.log_marginal.method} can't be trusted there, or lies below a lower bound. `.status` says which; use another "
            f"method, or more of its draws.",
            UnreliableWarning,
        )
