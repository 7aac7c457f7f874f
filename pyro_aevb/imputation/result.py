"""Completed data: what imputation returns."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from pyro_aevb._types import PerRow, Values
from pyro_aevb.errors import UnreliableWarning, warn_user

__all__ = ["Imputation"]


@dataclass(frozen=True, eq=False)
class Imputation:
    """Completed data: draws of the missing entries, the known ones as they came.

    Attributes:
        samples: Completed data, ``{observed site: [num_samples, rows, inner plates, *event]}``. A site with ``obs_mask`` goes by
            the name that the model gives it.
        observed: Which entries were known, ``{observed site: [rows, inner plates, *event]}``.
        latents: Latents that belong to the draws, ``{site: [num_samples, rows, ...]}``: draws from p(z | x_observed).
        filled: The data with the mean of the draws in the missing entries (for integers: the most frequent draw), in the shape
            of the argument that ``observed`` was given for, else of the only site; ``None`` if there are several.
        acceptance: Share of proposals that the second half of each row's chains accepted, ``[rows]``; NaN for method ``"mask"``.
        ess: Effective number of importance samples of each row, ``[rows]``; NaN for method ``"gibbs"``.
        is_flagged: Rows that should not be trusted: an acceptance below 1 %, or importance weights with k-hat above 0.7.
        method: ``"gibbs"`` or ``"mask"``.
    """

    samples: Values
    observed: Values
    latents: Values
    filled: Tensor | None
    acceptance: PerRow
    ess: PerRow
    is_flagged: Bool[Tensor, " rows"]
    method: str

    @property
    def mean(self) -> Values:
        """Mean of the draws, ``{site: [rows, ...]}``; known entries as they came."""
        draws = {name: _floating(value) for name, value in self.samples.items()}
        return {name: torch.where(self.observed[name], value[0], value.mean(0)) for name, value in draws.items()}

    @property
    def std(self) -> Values:
        """Standard deviation of the draws, ``{site: [rows, ...]}``; 0 where an entry is known."""
        spread = {name: _floating(value).std(0) for name, value in self.samples.items()}
        return {name: torch.where(self.observed[name], 0.0, value) for name, value in spread.items()}

    def warn_if_unreliable(self) -> None:
        """Tell in one warning which rows should not be trusted."""
        if not self.is_flagged.any():
            return
        rows = self.is_flagged.nonzero()[:, 0].tolist()
        cause, cure = "the importance weights are too uneven", "raise num_importance_samples, or train the guide longer"
        if self.method == "gibbs":
            cause = "less than 1 % of the guide's proposals were accepted, so the chains have hardly moved"
            cure = "raise num_steps, or train the guide longer, on rows like these"
        warn_user(
            f"{len(rows)} of {len(self.is_flagged)} rows are imputed unreliably (first: {rows[:5]}): {cause}. Leave them out, "
            f"{cure}; see is_flagged.",
            UnreliableWarning,
        )

    def __repr__(self) -> str:
        """Tell how many entries were filled and how well that went."""
        missing = sum(int((~known).sum()) for known in self.observed.values())
        draws = next(len(value) for value in self.samples.values())
        rate, what = (self.acceptance, "acceptance") if self.method == "gibbs" else (self.ess, "effective samples")
        return (
            f"Imputation(method={self.method!r}, {draws} draws of {missing} missing entries in {len(rate)} rows; {what} "
            f"{rate.min():.3g} to {rate.max():.3g}; {int(self.is_flagged.sum())} rows flagged)"
        )


def _floating(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())
