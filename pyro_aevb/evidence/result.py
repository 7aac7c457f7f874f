r"""What an estimator of log p(x) returns: never a bare number, but a direction, an error and a verdict for each row.

:class:`LogMarginal` is the one result type of all estimators. :func:`from_log_weights` fills it from importance weights,
:func:`concatenate` joins chunks of rows. An estimator with more to say about a row (acceptance, R-hat) adds a field of type
:data:`PerRow` with the default ``None``: joining, tables and checks pick it up by its value.
"""

import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pyro_aevb._types import LocalWeights, PerRow
from pyro_aevb.errors import DataError, SettingError, UnreliableWarning, warn_user
from pyro_aevb.evidence.pareto import pareto_k_hat
from pyro_aevb.status import Status

if TYPE_CHECKING:
    import pandas

__all__ = ["Bound", "LogMarginal", "Status", "Summary", "concatenate", "from_log_weights"]


class Bound(StrEnum):
    r"""On which side of the truth a value lies in expectation: below, above, or neither is known."""

    LOWER = "lower"
    UPPER = "upper"
    ESTIMATE = "estimate"


_DIRECTION = {Bound.LOWER: "stochastic lower bound", Bound.UPPER: "stochastic upper bound", Bound.ESTIMATE: "estimate"}
_LEVELS = tuple(Status)


@dataclass(frozen=True)
class Summary:
    r"""A :class:`LogMarginal` over all its rows, in nats per row. The two errors answer different questions.

    Attributes:
        num_rows: Number of rows N.
        mean: Mean value over all rows, flagged ones too.
        monte_carlo_se: Error of the mean from the finite number of samples, for these very rows:
            :math:`\sqrt{\sum_n se_n^2} / N`, since rows have independent noise. Where all rows share draws of the globals,
            the upper bound :math:`\sum_n se_n / N`. NaN if any row's standard error is void.
        data_se: Error of the mean as an estimate for new rows of the same population, sd of the values over
            :math:`\sqrt N`; it does not shrink with more samples.
        num_void: Rows without a standard error.
        num_warned: Rows with status ``warn``.
        num_flagged: Rows with status ``unreliable``.
        unflagged_mean: Mean value over the other rows. A selection of easier rows: never report it alone.
        unflagged_monte_carlo_se: Its Monte Carlo error.
        worst: The 5 % of rows that can be trusted least (at least one), worst first: by status, then standard error,
            then k-hat.
    """

    num_rows: int
    mean: float
    monte_carlo_se: float
    data_se: float
    num_void: int
    num_warned: int
    num_flagged: int
    unflagged_mean: float
    unflagged_monte_carlo_se: float
    worst: tuple[int, ...]

    @property
    def fraction_flagged(self) -> float:
        """Share of rows with status ``unreliable``."""
        return self.num_flagged / self.num_rows

    @property
    def fraction_warned(self) -> float:
        """Share of rows with status ``warn``."""
        return self.num_warned / self.num_rows

    def __str__(self) -> str:
        num_ok = self.num_rows - self.num_warned - self.num_flagged
        lines = [
            f"mean {self.mean:.4f}, Monte Carlo SE {_number(self.monte_carlo_se)}, data SE {_number(self.data_se)}",
            f"rows {num_ok} ok, {self.num_warned} warn, {self.num_flagged} unreliable ({self.fraction_flagged:.1%})",
        ]
        if 0 < self.num_flagged < self.num_rows:
            error = _number(self.unflagged_monte_carlo_se)
            lines.append(f"without the unreliable rows: mean {self.unflagged_mean:.4f}, Monte Carlo SE {error}")
        return "\n".join(lines)


@dataclass(frozen=True, repr=False, eq=False)
class LogMarginal:
    r"""An estimate of the log marginal likelihood of each row, in nats, with what is known about its error.

    Attributes:
        value: The estimate.
        standard_error: Monte Carlo standard error of ``value``; NaN where it would mislead.
        lower: A stochastic lower bound: :math:`E[\text{lower}] \le` truth, and for unbiased mean weights it lies b nats
            above the truth with a probability of at most :math:`e^{-b}` (Markov's inequality). One draw of it may exceed
            the truth: it is no confidence limit, and ``standard_error`` comes on top. NaN if the method has none.
        upper: A stochastic upper bound, :math:`E[\text{upper}] \ge` truth; NaN if the method has none.
        k_hat: Pareto k-hat of the row's importance weights (:func:`~pyro_aevb.evidence.pareto.pareto_k_hat`).
        ess: Effective number of samples, :math:`(\sum w)^2 / \sum w^2` for importance weights.
        status: The verdict on each row.
        method: The estimator.
        num_samples: Samples per row (and per draw of the globals, where there are any).
        bound: Which side of the truth ``value`` lies on in expectation.
        upper_kind: What makes ``upper`` an upper bound; ``"none"`` if there is none.
        label: The quantity that is estimated; with global latents it is not the evidence.
        num_global_samples: Draws of the globals that all rows share. Above 1 the errors of rows are correlated.

    Raises:
        DataError: If the entries of the rows differ in length.
    """

    value: PerRow
    standard_error: PerRow
    lower: PerRow
    upper: PerRow
    k_hat: PerRow
    ess: PerRow
    status: tuple[Status, ...]
    method: str
    num_samples: int
    bound: Bound
    upper_kind: str = "none"
    label: str = "log p(x)"
    num_global_samples: int = 1

    def __post_init__(self) -> None:
        lengths = {name: len(entry) for name, entry in self._per_row().items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"Expected one entry a row in every field, got lengths {lengths}.")

    def __len__(self) -> int:
        return len(self.status)

    @property
    def is_flagged(self) -> Bool[Tensor, " rows"]:
        """Which rows have status ``unreliable``; pooled statistics should leave them out and say so."""
        return self._is_status(Status.UNRELIABLE)

    def summary(self) -> Summary:
        """Average over rows, with the Monte Carlo error and the error from the finite data set apart.

        Raises:
            DataError: If there are no rows.
        """
        if len(self) == 0:
            raise DataError("Expected at least one row to summarise, got none.")
        is_flagged = self.is_flagged
        return Summary(
            num_rows=len(self),
            mean=self.value.mean().item(),
            monte_carlo_se=self._mean_se(self.standard_error),
            data_se=self.value.std().item() / math.sqrt(len(self)) if len(self) > 1 else math.nan,
            num_void=int(self.standard_error.isnan().sum()),
            num_warned=int(self._is_status(Status.WARN).sum()),
            num_flagged=int(is_flagged.sum()),
            unflagged_mean=self.value[~is_flagged].mean().item(),
            unflagged_monte_carlo_se=self._mean_se(self.standard_error[~is_flagged]),
            worst=self._worst(math.ceil(0.05 * len(self))),
        )

    def warn_if_unreliable(self) -> None:
        """Warn once, with the counts, if any row is unreliable.

        Warns:
            UnreliableWarning: If at least one row has status ``unreliable``.
        """
        count = Counter(self.status)
        if count[Status.UNRELIABLE]:
            warn_user(
                f"{self.label} by {self.method}: {count[Status.UNRELIABLE]} of {len(self)} rows are unreliable and "
                f"{count[Status.WARN]} more doubtful; `.status` and `.k_hat` say which. More samples help little where "
                "k-hat > 0.7: use a better guide or another method.",
                UnreliableWarning,
            )

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with one line a row; what all rows share is in its ``attrs``."""
        import pandas  # 0.5 s, which only those who ask for a table pay

        columns = self._per_row()
        tensors = {name: entry.cpu().numpy() for name, entry in columns.items() if isinstance(entry, Tensor)}
        frame = pandas.DataFrame({**tensors, "status": [str(status) for status in self.status]})
        frame.index.name = "row"
        frame.attrs = {name: str(entry) for name, entry in vars(self).items() if name not in columns}
        return frame

    def __repr__(self) -> str:
        if len(self) == 0:
            return self._title()
        summary = self.summary()
        table = self.to_pandas().loc[list(summary.worst[:5])].to_string(float_format=_number, na_rep="-")
        return f"{self._title()}\n{summary}\nleast trustworthy rows:\n{table}"

    def _repr_html_(self) -> str:
        if len(self) == 0:
            return f"<p>{html.escape(self._title())}</p>"
        summary = self.summary()
        table = self.to_pandas().loc[list(summary.worst[:5])].to_html(float_format=_number, na_rep="-")
        lines = "<br>".join(html.escape(line) for line in str(summary).splitlines())
        return f"<p><b>{html.escape(self._title())}</b><br>{lines}<br>least trustworthy rows:</p>{table}"

    def _title(self) -> str:
        """Name the quantity, the method and the direction of the bound."""
        num_samples = f"{self.num_samples} samples"
        if self.num_global_samples > 1:
            num_samples += f" for each of {self.num_global_samples} draws of the globals"
        return (
            f"LogMarginal: {self.label} of {len(self)} rows by {self.method}, {num_samples}; "
            f"{_DIRECTION[self.bound]}, nats"
        )

    def _per_row(self) -> dict[str, Any]:
        """Return the fields that hold one entry a row and are filled."""
        entries = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: entry for name, entry in entries.items() if isinstance(entry, Tensor) or name == "status"}

    def _is_status(self, status: Status) -> Bool[Tensor, " rows"]:
        """Compare each row's status."""
        return torch.tensor([entry == status for entry in self.status], dtype=torch.bool, device=self.value.device)

    def _mean_se(self, standard_error: PerRow) -> float:
        """Return the standard error of a mean over rows; an upper bound where rows share the globals' noise."""
        if self.num_global_samples > 1:
            return standard_error.mean().item()
        return (standard_error.square().mean() / len(standard_error)).sqrt().item()

    def _worst(self, count: int) -> tuple[int, ...]:
        """Return the rows that can be trusted least; a standard error that is void counts as infinite."""
        level = [_LEVELS.index(status) for status in self.status]
        error = self.standard_error.nan_to_num(nan=math.inf, posinf=math.inf).tolist()
        k_hat = self.k_hat.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).tolist()
        doubt = list(zip(level, error, k_hat, strict=True))
        return tuple(sorted(range(len(self)), key=doubt.__getitem__, reverse=True)[:count])


def from_log_weights(log_weights: LocalWeights, *, label: str = "log p(x)", method: str = "importance") -> LogMarginal:
    r"""Estimate each row's log marginal likelihood from its importance weights.

    .. math:: \widehat{\log p}(x_n) = \log \tfrac1S \sum_s \tfrac1K \sum_k w[s, k, n]

    (Burda et al. 2015, arXiv 1509.00519, Eq 8), accumulated in float64. The mean weight is unbiased for p(x), so its log is
    a stochastic **lower** bound: :math:`E[\widehat{\log p}] \le \log p(x)`, low by about half the squared standard error.

    The standard error is the delta method's: for S = 1 the relative one of a mean of K weights,
    :math:`\sqrt{1/ESS - 1/K}`; for S > 1 particles, in each of which the K weights share a draw of the globals, that of a
    mean of S particle means, :math:`\sqrt{\mathrm{Var}_s(\bar w_s) / S} / \bar w` (with few particles use Student-t
    quantiles of S - 1 degrees of freedom). It is void (NaN) where k-hat > 0.7, where all weights are zero, and where one
    weight is all there is. k-hat and ESS are those of all S K weights; a handful of particles cannot show that the
    weights of the globals themselves have a heavy tail.

    Costs no density evaluation. No gradient.

    Args:
        log_weights: log w[s, k, n] in nats, with pointwise densities and never a closed-form KL. Minus infinity is zero.
        label: Name of the quantity, such as ``"log predictive under q(globals)"``.
        method: Name of the estimator.

    Returns:
        One entry a row, in float64: ``lower`` equals ``value``, ``upper`` is NaN. A row whose weights are all zero has the
        value minus infinity and is unreliable; one whose weights are all equal has standard error 0.

    Raises:
        DataError: If there are no weights.
        NonFiniteError: If a log weight is NaN or plus infinity.

    Example:
        >>> result = from_log_weights(torch.full((1, 200, 2), -3.0))  # an exact guide: constant weights
        >>> result.value.tolist(), result.standard_error.tolist(), [str(status) for status in result.status]
        ([-3.0, -3.0], [0.0, 0.0], ['ok', 'ok'])
    """
    num_particles, num_samples, _ = log_weights.shape
    log_weights = log_weights.detach()
    k_hat = pareto_k_hat(log_weights.flatten(0, 1))
    log_max = log_weights.amax((0, 1)).double()
    log_max = log_max.where(log_max.isfinite(), 0.0)
    weights = (log_weights.double() - log_max).exp()
    value = log_max + weights.mean((0, 1)).log()
    standard_error = _relative_error(weights).where(~(k_hat > 0.7), math.nan)
    return LogMarginal(
        value=value,
        standard_error=standard_error,
        lower=value,
        upper=torch.full_like(value, math.nan),
        k_hat=k_hat,
        ess=(weights.sum((0, 1)).square() / weights.square().sum((0, 1))).nan_to_num(nan=0.0),
        status=tuple(_LEVELS[level] for level in _severity(k_hat, standard_error).tolist()),
        method=method,
        num_samples=num_samples,
        bound=Bound.LOWER,
        label=label,
        num_global_samples=num_particles,
    )


def concatenate(results: Sequence[LogMarginal]) -> LogMarginal:
    """Join results of consecutive chunks of rows into one.

    Args:
        results: Results of one method with the same settings.

    Raises:
        SettingError: If there are none, or they differ in what all rows share (method, numbers of samples, label).

    Example:
        >>> chunks = [from_log_weights(torch.zeros(1, 200, rows)) for rows in (3, 2)]
        >>> len(concatenate(chunks))
        5
    """
    if not results:
        raise SettingError("Expected at least one result to concatenate, got none.")
    joined: dict[str, Any] = {}
    for name, first in vars(results[0]).items():
        entries = [getattr(result, name) for result in results]
        if name == "status":
            joined[name] = sum(entries, ())
        elif isinstance(first, Tensor):
            joined[name] = torch.cat(entries)
        elif any(entry != first for entry in entries):
            raise SettingError(f"Expected results of one method and setting, got {name} = {entries}.")
        else:
            joined[name] = first
    return LogMarginal(**joined)


def _relative_error(weights: Float[Tensor, "particles importance_samples rows"]) -> PerRow:
    """Return the relative standard error of each row's mean weight, NaN where it cannot be known."""
    num_particles, num_samples, _ = weights.shape
    # With one particle this is sqrt(1/ESS - 1/K) without the cancellation. Particles are few: unbiased variance.
    units, correction = (weights.mean(1), 1) if num_particles > 1 else (weights[0], 0)
    if num_particles == num_samples == 1:
        return torch.full_like(units[0], math.nan)
    return (units.var(0, correction=correction) / len(units)).sqrt() / units.mean(0)


def _severity(k_hat: PerRow, standard_error: PerRow) -> Int[Tensor, " rows"]:
    """Return each row's index in ``Status``; the rules are told there. NaN k-hats raise no alarm, void errors do."""
    is_doubtful = (k_hat > 0.5) | (standard_error > 0.25)
    is_unreliable = (k_hat > 0.7) | (standard_error > 0.5) | standard_error.isnan()
    return is_doubtful.long().where(~is_unreliable, 2)


def _number(value: float) -> str:
    """Format a number for people; a standard error that is not known says so."""
    return "unknown" if math.isnan(value) else f"{value:.6g}"
