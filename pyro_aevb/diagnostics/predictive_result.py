"""What a predictive check finds: each statistic of the data among those of replicated data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    import pandas

__all__ = ["PredictiveCheck", "StatisticCheck"]


@dataclass(frozen=True, eq=False)
class StatisticCheck:
    """One statistic of one observed site.

    Attributes:
        site: The site.
        statistic: Name of the statistic.
        observed: Its value in the data: a number, or a tensor of them.
        posterior: Its value in each data set replicated from the posterior predictive.
        prior: The same from the prior predictive.
    """

    site: str
    statistic: str
    observed: Float[Tensor, "*shape"]
    posterior: Float[Tensor, "draws *shape"]
    prior: Float[Tensor, "draws *shape"]

    @property
    def name(self) -> str:
        """The statistic of the site, such as ``mean(x)``."""
        return f"{self.statistic}({self.site})"

    @property
    def p_value(self) -> Float[Tensor, "*shape"]:
        r"""The posterior predictive p-value, :math:`P(T > T_{obs} | x) + \frac12 P(T = T_{obs} | x)`; NaN where T is."""
        return _p_value(self.posterior, self.observed)

    @property
    def prior_p_value(self) -> Float[Tensor, "*shape"]:
        """The same under the prior predictive."""
        return _p_value(self.prior, self.observed)

    @property
    def p_error(self) -> Float[Tensor, "*shape"]:
        """Monte Carlo standard error of ``p_value``, that of a share, with Agresti and Coull's two more draws; never 0."""
        draws = len(self.posterior)
        share = (self.p_value * draws + 1) / (draws + 2)
        return (share * (1 - share) / (draws + 2)).sqrt()

    @property
    def is_extreme(self) -> Tensor:
        """Whether the data lie in the outer 2.5 % at either end of the posterior predictive."""
        return (self.p_value < 0.025) | (self.p_value > 0.975)


def _p_value(draws: Tensor, observed: Tensor) -> Tensor:
    above = (draws > observed).double() + 0.5 * (draws == observed).double()
    return above.where(~(draws.isnan() | observed.isnan()), math.nan).mean(0)


@dataclass(frozen=True, repr=False, eq=False)
class PredictiveCheck:
    """Statistics of the data among those of replicated data, and some of the replicated data sets.

    ``to_arviz(draws, predictive=check)`` makes what ``arviz.plot_ppc`` takes (``arviz.plot_ppc_dist`` under ArviZ 1.x).

    Attributes:
        checks: One entry for each statistic of each observed site.
        observed_data: The data of each observed site, ``[rows, inner plates, *event]``. Missing entries are NaN.
        posterior_predictive: Replicated data, ``[1, kept draws, rows, inner plates, *event]``; NaN where the data are missing.
        prior_predictive: The same from the prior.
        num_samples: Replicated data sets behind each p-value.
    """

    checks: tuple[StatisticCheck, ...]
    observed_data: "Mapping[str, np.ndarray[Any, Any]]"
    posterior_predictive: "Mapping[str, np.ndarray[Any, Any]]"
    prior_predictive: "Mapping[str, np.ndarray[Any, Any]]"
    num_samples: int

    @property
    def p_values(self) -> dict[str, Tensor]:
        """Posterior predictive p-values by statistic, such as ``mean(x)``."""
        return {check.name: check.p_value for check in self.checks}

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with one line for each number: the data's, those of replicated data, p-values.

        Its columns: the statistic in the data; mean, 2.5 % and 97.5 % quantiles over the posterior predictive; p-value and its
        Monte Carlo error; mean over the prior predictive and p-value there.
        """
        import pandas  # 0.5 s, which only those who ask for a table pay

        return pandas.concat([_table(check) for check in self.checks])

    def __repr__(self) -> str:
        title = f"PredictiveCheck: {self.num_samples} replicated data sets"
        scalars = [check for check in self.checks if check.observed.numel() == 1]
        lines = [title]
        if scalars:
            import pandas  # 0.5 s, which only those who look at the table pay

            lines.append(pandas.concat([_table(check) for check in scalars]).to_string(float_format="{:.3g}".format))
        for check in self.checks:
            if check.observed.numel() != 1:
                share = check.is_extreme.double().mean().item()
                lines.append(f"{check.name}: {share:.1%} of {check.observed.numel()} entries in the outer 5 %")
        return "\n".join(lines)


def _table(check: StatisticCheck) -> "pandas.DataFrame":
    import pandas  # as above

    shape = check.observed.shape
    places = torch.ones(shape).nonzero().tolist()
    names = [f"{check.name}{place}" if place else check.name for place in places]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = check.posterior.quantile(ends, dim=0)
    columns = {
        "observed": check.observed,
        "posterior": check.posterior.mean(0),
        "2.5%": low,
        "97.5%": high,
        "p": check.p_value,
        "p_error": check.p_error,
        "prior": check.prior.mean(0),
        "prior_p": check.prior_p_value,
    }
    return pandas.DataFrame({name: column.reshape(-1).numpy() for name, column in columns.items()}, index=names)
