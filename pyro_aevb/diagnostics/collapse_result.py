"""What is known of collapse: a report with a line for each unit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

from pyro_aevb.errors import AEVBWarning, warn_user

if TYPE_CHECKING:
    import pandas

__all__ = ["CollapseReport"]


@dataclass(frozen=True, repr=False, eq=False)
class CollapseReport:
    r"""Which latents of rows are used, and how much they tell. Everything is in nats.

    Attributes:
        units: Names of the units, such as ``z[3]``: coordinates in unconstrained space of the latents inside the data plate.
        variance: :math:`\mathrm{Var}_x\, E_q[u|x]` of each unit over the rows, unbiased; chance may put that of a dead one
            slightly below 0.
        kl: What each unit adds to the KL term of a row, averaged over rows; NaN for units of a site that does not factorise
            (full covariance, flows, simplices), where only the site's sum is known.
        site_kl: The KL term of each site, averaged over rows; their sum is the bound's.
        kl_error: Standard error of the sum as an average over all possible rows.
        mutual_information: I(n; z) between a row's index and its latents, at most the logarithm of ``num_rows``. As an estimate
            for all possible rows it is biased low, since the rows' own average stands for the aggregate posterior. NaN where a
            latent has a scale of its own (``poutine.scale``).
        mutual_information_error: Its Monte Carlo standard error.
        num_rows: Number of rows.
        threshold: Variance above which a unit is active.
    """

    units: tuple[str, ...]
    variance: Float[Tensor, " units"]
    kl: Float[Tensor, " units"]
    site_kl: Mapping[str, float]
    kl_error: float
    mutual_information: float
    mutual_information_error: float
    num_rows: int
    threshold: float

    @property
    def is_active(self) -> Bool[Tensor, " units"]:
        """Which units are active."""
        return self.variance > self.threshold

    @property
    def num_active(self) -> int:
        """Number of active units."""
        return int(self.is_active.sum())

    @property
    def dead_units(self) -> tuple[str, ...]:
        """Names of the units that are not active."""
        return tuple(name for name, active in zip(self.units, self.is_active.tolist(), strict=True) if not active)

    @property
    def total_kl(self) -> float:
        """The KL term of a row, averaged over rows: what the bound takes from the log likelihood."""
        return sum(self.site_kl.values())

    @property
    def marginal_kl(self) -> float:
        """KL(q(z) || p(z)) of the aggregate posterior, where all rows have one prior; biased high."""
        return self.total_kl - self.mutual_information

    def to_record(self) -> dict[str, float]:
        """Return the columns of a history."""
        kls = {f"kl_{name}": kl for name, kl in zip(self.units, self.kl.tolist(), strict=True) if not math.isnan(kl)}
        known = {f"kl_{name}": kl for name, kl in self.site_kl.items()}
        totals = {"active_units": float(self.num_active), "kl": self.total_kl}
        return totals | {"mutual_information": self.mutual_information} | known | kls

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with one line a unit, the largest variance first."""
        import pandas  # 0.5 s, which only those who ask for a table pay

        columns = {"variance": self.variance.numpy(), "is_active": self.is_active.numpy(), "kl": self.kl.numpy()}
        frame = pandas.DataFrame(columns, index=pandas.Index(self.units, name="unit"))
        return frame.sort_values("variance", ascending=False, kind="stable")

    def warn_if_dead(self) -> None:
        """Warn once, with their names, if any unit is dead.

        Warns:
            AEVBWarning: If a unit is not active.
        """
        dead = self.dead_units
        if dead:
            names = ", ".join(dead[:10]) + (", ..." if len(dead) > 10 else "")
            warn_user(
                f"{len(dead)} of {len(self.units)} latent units are dead: {names}. Over {self.num_rows} rows their posterior mean "
                f"has a variance of at most {self.threshold:g}, so that they tell nothing of a row. If the model should use them, "
                f"raise SGVB's kl_weight from 0 to 1 over training, or set free_bits; else do with fewer latents.",
                AEVBWarning,
            )

    def __repr__(self) -> str:
        title = (
            f"CollapseReport: {self.num_active} of {len(self.units)} units active on {self.num_rows} rows; KL "
            f"{self.total_kl:.3g} ± {self.kl_error:.2g}, mutual information {self.mutual_information:.3g} ± "
            f"{self.mutual_information_error:.2g} of at most {math.log(self.num_rows):.3g} nats a row"
        )
        frame = self.to_pandas()
        table = frame.head(30).to_string(float_format="{:.3g}".format, na_rep="-")
        rest = f"\n... and {len(frame) - 30} more units" if len(frame) > 30 else ""
        return f"{title}\n{table}{rest}"
