r"""Importance resampling, for a model and a guide that know what is missing.

Mattei & Frellsen 2019, arXiv 1812.02633.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import Args, Kwargs, Values
from pyro_aevb.evidence.averages import from_log_weights
from pyro_aevb.imputation.missing import MissingData
from pyro_aevb.imputation.sampler import SINGLE, Part, Sampler
from pyro_aevb.program.batch import take_rows
from pyro_aevb.program.particles import SiteRecord
from pyro_aevb.program.rows import Rows

__all__ = ["Resampling"]


class Resampling(Sampler):
    """One pass for programs that know what is missing: importance resampling (arXiv 1812.02633)."""

    def __init__(self, rows: Rows, num_importance_samples: int) -> None:
        super().__init__(rows)
        self.num_importance_samples = num_importance_samples

    @property
    def width(self) -> int:
        """Importance samples."""
        return self.num_importance_samples

    @property
    def steps(self) -> int:
        """One pass."""
        return 1

    def check(self, batch: tuple[Args, Kwargs], missing: MissingData, globals_: Values) -> None:
        """Allow everything: the model's own masks keep missing entries out of its densities."""

    def draw(
        self, batch: tuple[Args, Kwargs], missing: MissingData, globals_: Values, num_samples: int, bar: tqdm
    ) -> Part:
        """Resample draws of the guide, and draw the missing entries given each."""
        rows = torch.arange(len(next(iter(missing.known.values()))))
        many = take_rows(*batch, rows.repeat(self.num_importance_samples))
        guide = self.run_guide(many, globals_)
        log_weights = self.weigh(many, guide).unflatten(0, (-1, len(rows)))
        # a row whose weights are all zero is flagged below; any of its draws will do
        shares = log_weights.double().softmax(0).nan_to_num(1.0)
        chosen = torch.multinomial(shares.T, num_samples, replacement=True).T
        chosen = (chosen * len(rows) + rows.to(chosen)).flatten()
        values = {name: self._choose(site, chosen) for name, site in guide.items()}
        self.program.forget_indices()  # copies of rows are another number of rows
        few, repeated = take_rows(*batch, rows.repeat(num_samples)), missing.take(rows.repeat(num_samples))
        completed = repeated.complete(self.fill(self.program.score_model(*few, SINGLE, values), missing.known))
        samples = {name: value.unflatten(0, (num_samples, len(rows))) for name, value in completed.items()}
        bar.update()
        verdict = from_log_weights(log_weights[None])
        nothing = torch.full((len(rows),), torch.nan)
        return Part(
            samples, self.latents(values, guide, num_samples), nothing, verdict.ess.cpu(), verdict.is_flagged.cpu()
        )

    def _choose(self, site: SiteRecord, chosen: Tensor) -> Tensor:
        """Take the chosen draws out of a local site's value."""
        if not site.is_local:
            return site.value
        return site.value.index_select((self.structure.data_dim or -1) - site.fns[0].event_dim, chosen)
