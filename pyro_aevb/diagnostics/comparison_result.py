r"""What a comparison of a guide with posterior draws shows: per row and site, pooled, and as a table."""

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from pyro_aevb._types import PerRow, Values
from pyro_aevb.diagnostics.metrics import Distance, Moments
from pyro_aevb.mcmc.draws import PosteriorDraws

if TYPE_CHECKING:
    import pandas

__all__ = ["Comparison", "SiteComparison", "WorstCoordinates"]

_NUMBER = "{:.3f}".format


@dataclass(frozen=True, eq=False)
class SiteComparison:
    r"""One latent site of the guide beside the reference. Shapes are ``[rows, *inner plates, *event]``, for C2ST ``[rows]``.

    A coordinate that the support holds fixed, such as the zeros of a Cholesky factor, is NaN and left out of tables.

    Attributes:
        moments: Errors of means, in posterior standard deviations, and ratios of standard deviations, with their standard errors.
        wasserstein: 1-Wasserstein distances of single coordinates, in posterior standard deviations, beside what chance makes.
        c2st: Accuracy of a classifier that is shown the whole site of a row; NaN where the chains hold too few effective draws.
        c2st_se: Standard error of the accuracy about 0.5, if guide and posterior were the same.
    """

    moments: Moments
    wasserstein: Distance
    c2st: PerRow
    c2st_se: PerRow


class WorstCoordinates(NamedTuple):
    """The worst coordinate of each row of a site, as a table's columns."""

    mean_error: Tensor
    mean_error_se: Tensor
    sd_ratio: Tensor
    sd_ratio_se: Tensor
    wasserstein: Tensor
    wasserstein_null: Tensor
    c2st: Tensor
    c2st_se: Tensor

    @classmethod
    def of(cls, site: SiteComparison) -> "WorstCoordinates":
        """Pick the mean that is furthest off, the ratio furthest from 1 on a log scale, and the largest distance."""
        error, error_se, ratio, ratio_se = (_flat(item) for item in site.moments)
        distance, null = (_flat(item) for item in site.wasserstein)
        means, ratios, distances = (_place_of_largest(item) for item in (error.abs(), ratio.log().abs(), distance))
        return cls(
            _pick(error, means),
            _pick(error_se, means),
            _pick(ratio, ratios),
            _pick(ratio_se, ratios),
            _pick(distance, distances),
            _pick(null, distances),
            site.c2st,
            site.c2st_se,
        )


def _place_of_largest(values: Float[Tensor, "rows coordinates"]) -> Int[Tensor, "rows 1"]:
    """Return the place of each row's largest value, of all but NaN."""
    return values.nan_to_num(nan=-1.0, posinf=math.inf).argmax(1, keepdim=True)


def _mean(values: Tensor) -> Tensor:
    """Return the mean of what is known."""
    return values[~values.isnan()].mean()


def _pick(values: Float[Tensor, "rows coordinates"], place: Int[Tensor, "rows 1"]) -> PerRow:
    return values.gather(1, place)[:, 0]


def _flat(values: Tensor) -> Float[Tensor, "rows coordinates"]:
    return values.reshape(len(values), -1)


@dataclass(frozen=True, repr=False, eq=False)
class Comparison:
    r"""A guide beside posterior draws of the same rows. ``print`` it for a table.

    Attributes:
        sites: What each latent site shows.
        guide_log_ratio: Mean of log q(z | x) - log p(x, z) over the guide's draws, in nats: KL(q, p) - log p(x), minus the ELBO.
        reference_log_ratio: The same over the reference draws: -KL(p, q) - log p(x).
        divergence: Their difference, in which log p(x) cancels: KL(q, p) + KL(p, q), in nats; unbiased for exact draws.
        divergence_se: Its Monte Carlo standard error.
        k_hat: Pareto k-hat of the guide's importance weights; above 0.7 they are of no use.
        reference: The reference draws.
        guide_samples: The guide's draws, ``[draws, rows, *inner plates, *event]``; no rows axis where the whole model is one row.
        guide_seconds: Time that drawing from the guide took, its training not counted.
    """

    sites: dict[str, SiteComparison]
    guide_log_ratio: PerRow
    reference_log_ratio: PerRow
    divergence: PerRow
    divergence_se: PerRow
    k_hat: PerRow
    reference: PosteriorDraws
    guide_samples: Values
    guide_seconds: float

    def __len__(self) -> int:
        return len(self.reference)

    @property
    def reference_seconds(self) -> float:
        """Time that the reference draws took."""
        return self.reference.seconds

    @property
    def num_flagged(self) -> int:
        """Rows whose reference draws are unreliable, and which pooled numbers leave out."""
        return int(self.reference.is_flagged.sum())

    def worst_rows(self, count: int = 5) -> tuple[int, ...]:
        """Return the rows on which guide and reference are furthest apart, by ``divergence``; flagged rows come last."""
        doubt = self.divergence.nan_to_num(nan=math.inf).masked_fill(self.reference.is_flagged, -math.inf)
        return tuple(doubt.argsort(descending=True, stable=True)[:count].tolist())

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with one line for each row and site: its worst coordinates, and what is known of the row."""
        import pandas  # 0.5 s, which only those who ask for a table pay

        rows = {
            "divergence": self.divergence,
            "divergence_se": self.divergence_se,
            "guide_log_ratio": self.guide_log_ratio,
            "reference_log_ratio": self.reference_log_ratio,
            "k_hat": self.k_hat,
        }
        shared = {name: value.cpu().numpy() for name, value in rows.items()}
        status = [str(status) for status in self.reference.status]
        parts = []
        for name, site in self.sites.items():
            worst = {column: value.cpu().numpy() for column, value in WorstCoordinates.of(site)._asdict().items()}
            index = pandas.MultiIndex.from_product([range(len(self)), [name]], names=["row", "site"])
            parts.append(pandas.DataFrame({**worst, **shared, "reference": status}, index=index))
        return pandas.concat(parts).sort_index(level="row", sort_remaining=False)

    def summary(self) -> "pandas.DataFrame":
        """Return a table with one line a site: means over all rows but flagged ones.

        Mean errors are root mean squares over rows and coordinates, ratios of standard deviations geometric means. Beside them
        stands what chance alone would make of them: root mean square of the standard error, mean null distance, standard error of
        the mean C2ST about 0.5. All are NaN if every row is flagged.
        """
        import pandas  # 0.5 s, which only those who ask for a table pay

        sound = ~self.reference.is_flagged
        lines = {}
        for name, site in self.sites.items():
            accuracy, accuracy_se = site.c2st[sound], site.c2st_se[sound]
            is_known = ~accuracy.isnan()
            lines[name] = {
                "mean_error": _mean(site.moments.mean_error[sound].square()).sqrt(),
                "by_chance": _mean(site.moments.mean_error_se[sound].square()).sqrt(),
                "sd_ratio": _mean(site.moments.sd_ratio[sound].log()).exp(),
                "wasserstein": _mean(site.wasserstein.value[sound]),
                "w_by_chance": _mean(site.wasserstein.null[sound]),
                "c2st": _mean(accuracy),
                "c2st_se": accuracy_se[is_known].square().mean().sqrt() / is_known.sum().sqrt(),
            }
        table = {name: {column: value.item() for column, value in line.items()} for name, line in lines.items()}
        return pandas.DataFrame.from_dict(table, orient="index")

    def __repr__(self) -> str:
        sites, worst = (table.to_string(float_format=_NUMBER, na_rep="-") for table in (self.summary(), self._worst()))
        return "\n".join([self._heading(), sites, *self._notes(), "rows furthest apart:", worst])

    def _repr_html_(self) -> str:
        sites, worst = (table.to_html(float_format=_NUMBER, na_rep="-") for table in (self.summary(), self._worst()))
        notes = "<br>".join(map(html.escape, [*self._notes(), "rows furthest apart:"]))
        return f"<p><b>{html.escape(self._heading())}</b></p>{sites}<p>{notes}</p>{worst}"

    def _heading(self) -> str:
        """Say how many rows count, and what both sets of draws took."""
        left_out = f", {self.num_flagged} with unreliable chains left out of means" if self.num_flagged else ""
        seconds = "unknown" if math.isnan(self.reference_seconds) else f"{self.reference_seconds:.3g} s"
        return (
            f"Comparison: {len(self)} rows{left_out}; drawing took {self.guide_seconds:.3g} s by the guide, {seconds} by "
            "the chains"
        )

    def _notes(self) -> list[str]:
        """Pool divergences and k-hat over rows with reliable chains; nothing where there is none."""
        sound = ~self.reference.is_flagged
        if not sound.any():
            return []
        divergence, k_hat = self.divergence[sound], self.k_hat[sound]
        share = (k_hat > 0.7).double().mean().item()
        return [
            f"KL(q, p) + KL(p, q): mean {divergence.mean():.4g}, median {divergence.median():.4g} nats a row; "
            f"k-hat: median {k_hat.median():.2f}, above 0.7 in {share:.0%} of rows"
        ]

    def _worst(self) -> "pandas.DataFrame":
        """Return the table of the rows furthest apart."""
        columns = ["mean_error", "sd_ratio", "wasserstein", "c2st", "divergence", "k_hat", "reference"]
        return self.to_pandas().loc[list(self.worst_rows())][columns]
