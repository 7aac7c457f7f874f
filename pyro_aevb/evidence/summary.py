r"""What is said of estimates in few words: the side of the truth, the joint evidence, the average over rows."""

import math
from dataclasses import dataclass
from enum import StrEnum

from scipy.special import ndtri, stdtrit

from pyro_aevb.errors import SettingError
from pyro_aevb.status import Status

__all__ = ["DIRECTION", "Bound", "JointEvidence", "Summary", "number", "quantile"]


class Bound(StrEnum):
    r"""On which side of the truth a value lies in expectation: below, above, or neither is known."""

    LOWER = "lower"
    UPPER = "upper"
    ESTIMATE = "estimate"


DIRECTION = {Bound.LOWER: "stochastic lower bound", Bound.UPPER: "stochastic upper bound", Bound.ESTIMATE: "estimate"}
"""What a bound is called in a sentence."""


@dataclass(frozen=True)
class JointEvidence:
    r"""An estimate of log p of all rows together, in nats, of a model with globals g.

    .. math:: \log \frac1S \sum_s w_g[s] \prod_n \hat p(x_n | g_s), \quad g_s \sim q(g),

    with :math:`w_g` what globals and sites outside the data plate add to the weights (:mod:`pyro_aevb.weights`). It is the
    evidence of the rows that were given and of no others, and another quantity than the sum of the rows' predictive densities.

    Attributes:
        value: The estimate.
        standard_error: Its Monte Carlo standard error; for S = 1 that of the rows given the one draw, which says nothing about
            the globals. NaN where it would mislead.
        bound: Below the truth in expectation where the rows' estimates are unbiased; else no side is known.
        ess: Effective number of draws of the globals.
        k_hat: Pareto k-hat of the S weights; NaN below 100.
        num_global_samples: S.
        status: The verdict.
        degrees_of_freedom: Of the Student-t that the standard error belongs to; ``None`` for a normal.
    """

    value: float
    standard_error: float
    bound: Bound
    ess: float
    k_hat: float
    num_global_samples: int
    status: Status
    degrees_of_freedom: int | None = None

    @property
    def label(self) -> str:
        """The quantity."""
        return "joint log evidence" + (" by one draw from q(globals)" if self.num_global_samples == 1 else "")

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the ends of the interval that covers the truth with this probability, as in :meth:`LogMarginal.interval`."""
        width = quantile(level, self.degrees_of_freedom) * self.standard_error
        return self.value - width, self.value + width

    def __str__(self) -> str:
        draws = (
            f"{self.num_global_samples} draw{'s' * (self.num_global_samples > 1)} of the globals, ESS {self.ess:.3g}"
        )
        return f"{self.label} {self.value:.4f}, SE {number(self.standard_error)} ({DIRECTION[self.bound]}, {draws}): {self.status}"


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
        joint: The joint evidence of all rows, where the model has globals.
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
    joint: JointEvidence | None = None

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
            f"mean {self.mean:.4f}, Monte Carlo SE {number(self.monte_carlo_se)}, data SE {number(self.data_se)}",
            f"rows {num_ok} ok, {self.num_warned} warn, {self.num_flagged} unreliable ({self.fraction_flagged:.1%})",
        ]
        if 0 < self.num_flagged < self.num_rows:
            error = number(self.unflagged_monte_carlo_se)
            lines.append(f"without the unreliable rows: mean {self.unflagged_mean:.4f}, Monte Carlo SE {error}")
        if self.joint is not None:
            lines.append(str(self.joint))
        return "\n".join(lines)


def quantile(level: float, degrees_of_freedom: int | None) -> float:
    """Return how many standard errors an interval reaches to either side."""
    if not 0 < level < 1:
        raise SettingError(f"level must be a probability between 0 and 1, got {level}.")
    upper = (1 + level) / 2
    return float(ndtri(upper) if degrees_of_freedom is None else stdtrit(degrees_of_freedom, upper))


def number(value: float) -> str:
    """Format a number for people; a standard error that is not known says so."""
    return "unknown" if math.isnan(value) else f"{value:.6g}"
