r"""What an estimator of log p(x) returns: never a bare number, but a direction, an error and a verdict for each row.

:class:`LogMarginal` is the one result type of all estimators. :func:`~pyro_aevb.evidence.averages.from_log_weights` fills it
from importance weights, :func:`concatenate` joins chunks of rows. What only some estimators know about a row (acceptance,
R-hat) has the default ``None``: joining, tables and checks pick it up where it is filled.
"""

import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_aevb._types import PerRow
from pyro_aevb.errors import DataError, SettingError, UnreliableWarning, warn_user
from pyro_aevb.evidence.summary import DIRECTION, Bound, JointEvidence, Summary, number, quantile
from pyro_aevb.status import Status

if TYPE_CHECKING:
    import pandas

__all__ = ["Bound", "LogMarginal", "Status", "concatenate"]


_LEVELS = tuple(Status)
_ADVICE = {
    "importance": "More samples help little where k-hat > 0.7: use a better guide or another method.",
    "ais": "Use more temperatures, or more leapfrog steps; where two starts disagree, believe neither.",
    "bridge": "Where chains disagree, run them longer or from other starts, or check with method='ais'.",
    "reciprocal": "A mode that no chain visited lowers this upper bound unseen: check with method='bridge' or 'ais'.",
    "quadrature": "The grid did not settle there: allow more points, or use method='bridge' or 'ais'.",
}
"""What to do about unreliable rows, by method."""
_UNITS = {"ais": "chains", "bridge": "posterior draws", "reciprocal": "posterior draws", "quadrature": "nodes at most"}
"""What ``num_samples`` counts, by method."""
_EXPECTED_REFUTED = 0.05
"""Share of audited rows that may differ before the others are doubted too; by chance about one in a hundred does."""


@dataclass(frozen=True, repr=False, eq=False)
class LogMarginal:
    r"""An estimate of the log marginal likelihood of each row, in nats, with what is known about its error.

    Attributes:
        value: The estimate.
        standard_error: Monte Carlo standard error of ``value``; NaN where it would mislead.
        lower: A stochastic lower bound: :math:`E[\text{lower}] \le` truth, and for unbiased mean weights it lies b nats
            above the truth with a probability of at most :math:`e^{-b}` (Markov's inequality). One draw of it may exceed
            the truth: it is no confidence limit, and ``standard_error`` comes on top. That of ``"ais"`` is a second bound in rows
            where a check contradicts the value: chosen after a test, it lies b nats above the truth with a probability of at most
            :math:`2 e^{-b}`, and its expectation may lie above it. NaN if the method has none.
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
        acceptance: Mean acceptance probability of the row's chains; ``None`` for methods without chains, like all below.
        r_hat: Nested R-hat of the row's chains, the worst over its coordinates.
        num_divergent: Transitions of the row that diverged.
        change: How far the last refinement of a grid moved the row's value.
        audit: 1 where a run of the row from another start contradicts the value, 0 where it does not, their share with several
            draws of the globals; NaN in rows that were run once.
        degrees_of_freedom: Of the Student-t that a row's error over its standard error follows; ``None`` for a normal.
        joint: With globals the joint evidence of all rows, another quantity than ``value``.

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
    acceptance: PerRow | None = None
    r_hat: PerRow | None = None
    num_divergent: PerRow | None = None
    change: PerRow | None = None
    audit: PerRow | None = None
    degrees_of_freedom: int | None = None
    joint: JointEvidence | None = None

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

    def rows(self, index: slice | Sequence[int] | Tensor) -> "LogMarginal":
        """Return the result of some rows, in the order asked for; the joint evidence of all rows is left out.

        Args:
            index: A slice, places of rows, or a boolean for each row, such as ``~result.is_flagged``.

        Raises:
            DataError: If a place is out of range, or booleans are not one a row.

        Example:
            >>> from pyro_aevb.evidence.averages import from_log_weights
            >>> result = from_log_weights(torch.zeros(1, 200, 5))
            >>> len(result.rows([0, 3])), len(result.rows(slice(1, None))), len(result.rows(~result.is_flagged))
            (2, 4, 5)
        """
        places = _find_places(index, len(self))
        entries: dict[str, Any] = {name: _take(entry, places) for name, entry in self._per_row().items()}
        return replace(self, **entries, joint=None)

    def interval(self, level: float = 0.95) -> tuple[PerRow, PerRow]:
        r"""Return the ends of the interval that covers each row's truth with a probability of about ``level``.

        :math:`\text{value} \pm q \, \text{standard error}` with the normal quantile q, or Student's t where
        ``degrees_of_freedom`` are few. It allows for Monte Carlo error alone, and is NaN where there is no standard error.

        Args:
            level: The probability, between 0 and 1.

        Raises:
            SettingError: If the level is not between 0 and 1.

        Example:
            >>> from pyro_aevb.evidence.averages import from_log_weights
            >>> low, high = from_log_weights(torch.randn(1, 1000, 3, generator=torch.manual_seed(0))).interval(0.9)
            >>> bool((low < high).all())
            True
        """
        width = quantile(level, self.degrees_of_freedom) * self.standard_error
        return self.value - width, self.value + width

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
            worst=self.worst_rows(math.ceil(0.05 * len(self))),
            joint=self.joint,
        )

    def worst_rows(self, count: int) -> tuple[int, ...]:
        """Return the rows that can be trusted least, worst first: by status, then standard error, a void one first, then k-hat.

        Args:
            count: How many rows at most.
        """
        level = [_LEVELS.index(status) for status in self.status]
        error = self.standard_error.nan_to_num(nan=math.inf, posinf=math.inf).tolist()
        k_hat = self.k_hat.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).tolist()
        doubt = list(zip(level, error, k_hat, strict=True))
        return tuple(sorted(range(len(self)), key=doubt.__getitem__, reverse=True)[:count])

    def warn_if_unreliable(self) -> None:
        """Warn once, with the counts, if any row is unreliable, and once if the audit doubts rows that it left out.

        Warns:
            UnreliableWarning: If at least one row has status ``unreliable``; if more than one and more than a twentieth of the
                rows that were run from two starts differ.
        """
        count = Counter(self.status)
        if count[Status.UNRELIABLE]:
            warn_user(
                f"{self.label} by {self.method}: {count[Status.UNRELIABLE]} of {len(self)} rows are unreliable and "
                f"{count[Status.WARN]} more doubtful; `.status` says which. {_ADVICE.get(self.method, '')}".rstrip(),
                UnreliableWarning,
            )
        if self.audit is not None:
            _warn_of_audit(self.audit[~self.audit.isnan()])

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with one line a row; what all rows share is in its ``attrs``."""
        import pandas  # 0.5 s, which only those who ask for a table pay

        columns = self._per_row()
        # the status of a row tells its audit, and nine rows of ten have none
        shown = {name: entry for name, entry in columns.items() if isinstance(entry, Tensor) and name != "audit"}
        tensors = {name: entry.cpu().numpy() for name, entry in shown.items()}
        frame = pandas.DataFrame({**tensors, "status": [str(status) for status in self.status]})
        frame.index.name = "row"
        frame.attrs = {name: str(entry) for name, entry in vars(self).items() if name not in columns}
        return frame

    def __repr__(self) -> str:
        if len(self) == 0:
            return self._title()
        summary = self.summary()
        table = self._worst_rows(summary).to_string(float_format=number, na_rep="-")
        return f"{self._title()}\n{summary}\nleast trustworthy rows:\n{table}"

    def _repr_html_(self) -> str:
        if len(self) == 0:
            return f"<p>{html.escape(self._title())}</p>"
        summary = self.summary()
        table = self._worst_rows(summary).to_html(float_format=number, na_rep="-")
        lines = "<br>".join(html.escape(line) for line in str(summary).splitlines())
        return f"<p><b>{html.escape(self._title())}</b><br>{lines}<br>least trustworthy rows:</p>{table}"

    def _worst_rows(self, summary: Summary) -> "pandas.DataFrame":
        """Return the table of the least trustworthy rows, without the columns that hold nothing for any row."""
        return self.to_pandas().dropna(axis="columns", how="all").loc[list(summary.worst[:5])]

    def _title(self) -> str:
        """Name the quantity, the method and the direction of the bound."""
        num_samples = f"{self.num_samples} {_UNITS.get(self.method, 'samples')}"
        if self.num_global_samples > 1:
            num_samples += f" for each of {self.num_global_samples} draws of the globals"
        return (
            f"LogMarginal: {self.label} of {len(self)} rows by {self.method}, {num_samples}; "
            f"{DIRECTION[self.bound]}, nats"
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


def concatenate(results: Sequence[LogMarginal]) -> LogMarginal:
    """Join results of consecutive chunks of rows into one.

    An entry that only some of them know is NaN in the rows of the others. The joint evidence of all rows does not follow from
    the chunks' own and is left out.

    Args:
        results: Results of one method with the same settings.

    Raises:
        SettingError: If there are none, or they differ in what all rows share (method, numbers of samples, label).

    Example:
        >>> from pyro_aevb.evidence.averages import from_log_weights
        >>> chunks = [from_log_weights(torch.zeros(1, 200, rows)) for rows in (3, 2)]
        >>> len(concatenate(chunks))
        5
    """
    if not results:
        raise SettingError("Expected at least one result to concatenate, got none.")
    joined: dict[str, Any] = {}
    for name, first in vars(results[0]).items():
        entries = [getattr(result, name) for result in results]
        if name == "joint":
            continue
        if name == "status":
            joined[name] = sum(entries, ())
        elif any(isinstance(entry, Tensor) for entry in entries):
            pairs = zip(results, entries, strict=True)
            joined[name] = torch.cat([torch.full_like(r.value, math.nan) if e is None else e for r, e in pairs])
        elif any(entry != first for entry in entries):
            raise SettingError(f"Expected results of one method and setting, got {name} = {entries}.")
        else:
            joined[name] = first
    return LogMarginal(**joined)


def _warn_of_audit(audit: Float[Tensor, " audited"]) -> None:
    """Warn if so many audited rows differ that those which were not audited are as doubtful. One row alone may by chance."""
    differing = audit.sum().item()
    if differing > max(1, _EXPECTED_REFUTED * len(audit)):
        warn_user(
            f"ais from the guide and from the prior differ by more than their errors in {round(differing)} of the {len(audit)} "
            f"rows that were run from both: the guide misses part of the posterior, or temperatures are too few. The rows that "
            f"were not audited are as doubtful. Use start='prior' and more temperatures.",
            UnreliableWarning,
        )


def _find_places(index: slice | Sequence[int] | Tensor, num_rows: int) -> list[int]:
    """Turn an index of rows to their places.

    Raises:
        DataError: If it does not fit the rows.
    """
    if isinstance(index, slice):
        return list(range(num_rows))[index]
    given = torch.as_tensor(index, device="cpu")
    if given.dtype == torch.bool and given.shape == (num_rows,):
        return given.nonzero()[:, 0].tolist()
    if given.numel() == 0 and given.dim() == 1 and given.dtype != torch.bool:
        return []
    is_integer = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if not is_integer or given.dim() != 1 or bool(((given < -num_rows) | (given >= num_rows)).any()):
        raise DataError(
            f"Expected a slice, places from 0 to {num_rows - 1} in one axis or {num_rows} booleans, got {index!r}. A single row "
            "is rows([place])."
        )
    return (given % num_rows).tolist()


def _take(entry: PerRow | tuple[Status, ...], places: list[int]) -> Float[Tensor, " part"] | tuple[Status, ...]:
    """Take places of a field that holds one entry a row."""
    if isinstance(entry, Tensor):
        return entry[torch.tensor(places, dtype=torch.long, device=entry.device)]
    return tuple(entry[place] for place in places)
