r"""Posterior draws of many rows at once, with a verdict on each row.

:func:`assess` judges chains of which the first half and the second half started from different places. In
:func:`~pyro_aevb.mcmc.posterior.hmc_posterior` these are two kinds of start, but for chains that left a mode without mass in the
warm-up (:mod:`pyro_aevb.mcmc.modes`): they went on from where any other chain was. Without a guide they are two runs of one kind,
which disagree where a mode is met by chance, and agree on a mode that neither knows. A row is ``unreliable`` if

- nested R-hat > 1.01, that is, the two halves of the chains tell different stories, as they do if one kind of start misses a mode
  that holds mass;
- split R-hat > 1.1: its chains are still on their way, or in places of their own;
- its acceptance lies outside [0.4, 0.98]: its chains hardly move, or feel no density at all;
- R-hat, ESS or acceptance are not known, since its chains hold NaN or do not move;

it is ``warn`` if split R-hat > 1.05, if ESS < 400, or if any transition diverged. R-hat and ESS are the worst over the row's
coordinates and its log joint density. The limit of 1.01 is for nested R-hat alone: halves of chains of N draws with autocorrelation
time tau have a split R-hat near 1 + tau / N however well they mix, and many chains are short (Margossian et al. 2024,
arXiv 2110.13017, section 3). Chance alone puts nested R-hat of well mixed chains above it in some rows: at 16 chains of 200 draws
in 1 % of rows of three coordinates, in 3 % of rows of ten and in 7 % of rows of thirty, since the worst counts; the fewer draws,
the more rows.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pyro_aevb._types import PerRow, Values
from pyro_aevb.errors import SettingError, UnreliableWarning, warn_user
from pyro_aevb.mcmc.convergence import diagnose, mean_ess, split_r_hat
from pyro_aevb.status import Status, judge

if TYPE_CHECKING:
    import pandas

__all__ = ["PosteriorDraws", "assess", "concatenate"]


@dataclass(frozen=True, repr=False, eq=False)
class PosteriorDraws:
    r"""Draws from the posterior of each row, and how far to trust them.

    Attributes:
        unconstrained: Draws in unconstrained space, all sites of a row side by side.
        log_joint: log p(x, z) of each draw in unconstrained space, in nats, with the Jacobian of the map to the supports.
        acceptance: Mean acceptance probability after warm-up.
        step_size: Frozen step size, in units of the frozen scales.
        num_divergent: Transitions after warm-up whose energy error exceeded 1000 nats or was not a number.
        r_hat: Rank-normalised split R-hat, the worst over coordinates and log joint.
        nested_r_hat: The same between the two halves of the chains.
        ess: Rank-normalised effective number of draws over all chains, the least over coordinates and log joint.
        status: The verdict on each row; :mod:`pyro_aevb.mcmc.draws` tells the rules.
        samples: Draws of each latent site on its support, ``[chains, draws, rows, *inner plates, *event]``; without the rows axis
            where the whole model is one row.
        seconds: Wall-clock time that drawing took; NaN where it was not taken.
        num_leapfrog: Most leapfrog steps of a transition after warm-up, given or learned; ``None`` where it is not one number.
    """

    unconstrained: Float[Tensor, "chains draws rows latent"]
    log_joint: Float[Tensor, "chains draws rows"]
    acceptance: PerRow
    step_size: PerRow
    num_divergent: Int[Tensor, " rows"]
    r_hat: PerRow
    nested_r_hat: PerRow
    ess: PerRow
    status: tuple[Status, ...]
    samples: Values = field(default_factory=dict)
    seconds: float = math.nan
    num_leapfrog: int | None = None

    def __len__(self) -> int:
        return len(self.status)

    @property
    def num_chains(self) -> int:
        """Number of chains of each row."""
        return self.unconstrained.shape[0]

    @property
    def num_samples(self) -> int:
        """Number of draws of each chain."""
        return self.unconstrained.shape[1]

    @property
    def is_flagged(self) -> Bool[Tensor, " rows"]:
        """Which rows have status ``unreliable``; pooled statistics should leave them out and say so."""
        flags = [status is Status.UNRELIABLE for status in self.status]
        return torch.tensor(flags, dtype=torch.bool, device=self.unconstrained.device)

    def summary(self) -> "pandas.DataFrame":
        """Return a table with one line for each number that has a posterior.

        Its columns: mean, standard deviation, Monte Carlo standard error of the mean, 5 % and 95 % quantiles, ESS for the mean
        and split R-hat, over all chains. Lines are named like ``z[3, 0]``: the row, then inner plates and event.
        """
        import pandas  # 0.5 s, which only those who ask for a table pay

        parts = [_summarise(name, values) for name, values in self.samples.items()]
        return pandas.concat([pandas.DataFrame(columns, index=names) for names, columns in parts])

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with one line a row: what is known about its chains."""
        import pandas  # 0.5 s, which only those who ask for a table pay

        names = ("acceptance", "step_size", "num_divergent", "r_hat", "nested_r_hat", "ess")
        columns: dict[str, Any] = {name: getattr(self, name).cpu().numpy() for name in names}
        frame = pandas.DataFrame({**columns, "status": [str(status) for status in self.status]})
        frame.index.name = "row"
        return frame

    def warn_if_unreliable(self) -> None:
        """Warn once, with the counts, if any row is unreliable.

        Warns:
            UnreliableWarning: If at least one row has status ``unreliable``.
        """
        count = Counter(self.status)
        if count[Status.UNRELIABLE]:
            warn_user(
                f"Posterior draws: {count[Status.UNRELIABLE]} of {len(self)} rows are unreliable and {count[Status.WARN]} more "
                "doubtful; `.status`, `.nested_r_hat` and `.acceptance` say which and why. Where R-hat is high, take more "
                "warm-up steps or draws; where the starts disagree still, the posterior has modes that chains do not connect.",
                UnreliableWarning,
            )

    def __repr__(self) -> str:
        count = Counter(self.status)
        verdicts = ", ".join(f"{count[status]} {status}" for status in Status)
        title = (
            f"PosteriorDraws: {len(self)} rows, {self.num_chains} chains of {self.num_samples} draws; rows {verdicts}"
        )
        table = self.to_pandas().loc[list(self._worst(5))].to_string(float_format="{:.4g}".format, na_rep="-")
        return f"{title}\nleast trustworthy rows:\n{table}" if len(self) else title

    def _worst(self, count: int) -> tuple[int, ...]:
        """Return the rows that can be trusted least: by status, then by the effective number of draws."""
        levels = tuple(Status)
        doubt = [
            (-levels.index(status), ess)
            for status, ess in zip(self.status, self.ess.nan_to_num(nan=0.0).tolist(), strict=True)
        ]
        return tuple(sorted(range(len(self)), key=doubt.__getitem__)[:count])


def assess(
    unconstrained: Float[Tensor, "chains draws rows latent"],
    log_joint: Float[Tensor, "chains draws rows"],
    *,
    acceptance: PerRow,
    step_size: PerRow,
    num_divergent: Int[Tensor, " rows"],
) -> PosteriorDraws:
    """Judge chains whose first half started elsewhere than their second half.

    Args:
        unconstrained: Draws after warm-up; the number of chains is even.
        log_joint: Log joint density of each.
        acceptance: Mean acceptance probability of each row.
        step_size: Step size of each row.
        num_divergent: Number of divergent transitions of each row.

    Returns:
        The draws with a verdict, without ``samples``.
    """
    quantities = torch.cat((unconstrained, log_joint[..., None].to(unconstrained)), -1)
    # what is infinite or NaN in one coordinate is no draw at all, and must not pass by its rank
    is_finite = quantities.isfinite().all((0, 1))
    quantities = quantities.where(is_finite, torch.nan)
    found = diagnose(quantities, num_superchains=2)
    r_hat, nested = found.r_hat.amax(-1), found.nested_r_hat.amax(-1)
    ess = found.ess.amin(-1).where(~r_hat.isnan(), torch.nan)
    is_doubtful = (r_hat > 1.05) | (ess < 400) | (num_divergent > 0)
    is_moving = (acceptance >= 0.4) & (acceptance <= 0.98)
    is_unreliable = ~(nested <= 1.01) | ~(r_hat <= 1.1) | ~is_moving
    return PosteriorDraws(
        unconstrained=unconstrained,
        log_joint=log_joint,
        acceptance=acceptance,
        step_size=step_size,
        num_divergent=num_divergent,
        r_hat=r_hat,
        nested_r_hat=nested,
        ess=ess,
        status=judge(is_doubtful, is_unreliable),
    )


def concatenate(parts: Sequence[PosteriorDraws]) -> PosteriorDraws:
    """Join draws of consecutive chunks of rows into one.

    Args:
        parts: Draws with the same numbers of chains, draws and coordinates, and of the same sites.

    Raises:
        SettingError: If there are none, or they differ in these.
    """
    shapes = {(part.num_chains, part.num_samples, part.unconstrained.shape[-1], *part.samples) for part in parts}
    if len(shapes) != 1:
        raise SettingError(
            f"Expected draws of equal numbers of chains, draws, coordinates and sites, got {sorted(shapes)}."
        )
    joined: dict[str, Any] = {}
    for entry in fields(PosteriorDraws):
        values = [getattr(part, entry.name) for part in parts]
        if entry.name == "status":
            joined[entry.name] = sum(values, ())
        elif entry.name == "num_leapfrog":
            joined[entry.name] = values[0] if len({*values}) == 1 else None
        elif entry.name == "seconds":
            joined[entry.name] = sum(values)
        elif entry.name == "samples":
            joined[entry.name] = {name: torch.cat([value[name] for value in values], 2) for name in values[0]}
        else:
            joined[entry.name] = torch.cat(values, 2 if entry.name in {"unconstrained", "log_joint"} else 0)
    return PosteriorDraws(**joined)


def _summarise(name: str, values: Float[Tensor, "chains draws *shape"]) -> tuple[list[str], dict[str, Any]]:
    """Return names and columns of the numbers of one site."""
    shape = values.shape[2:]
    flat = values.detach().double().reshape(*values.shape[:2], -1)
    pooled = flat.flatten(0, 1)
    ordered, last = pooled.sort(0).values, len(pooled) - 1
    ess, sd = mean_ess(flat), pooled.std(0)
    columns = {
        "mean": pooled.mean(0),
        "sd": sd,
        "mcse": sd / ess.sqrt(),
        "5%": ordered[round(0.05 * last)],
        "95%": ordered[round(0.95 * last)],
        "ess": ess,
        "r_hat": split_r_hat(flat),
    }
    places = torch.ones(shape).nonzero().tolist()
    names = [f"{name}{place}" if place else name for place in places]
    return names, {column: entries.cpu().numpy() for column, entries in columns.items()}
