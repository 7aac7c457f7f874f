r"""Pseudo-Gibbs with Metropolis correction, for a guide of complete rows.

Mattei & Frellsen 2018, arXiv 1802.04826, Algorithm 1.
"""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import ModelError
from pyro_aevb.imputation.missing import MissingData, PriorData, lay_out
from pyro_aevb.imputation.sampler import SINGLE, Part, Sampler, values_of
from pyro_aevb.program.batch import explained, take_rows
from pyro_aevb.program.observations import ToBatch, write_observations
from pyro_aevb.program.particles import Records, run_program
from pyro_aevb.program.rows import Rows

__all__ = ["Gibbs", "complete_at_random"]

LEAST_ACCEPTANCE = 0.01
"""A row that accepts fewer proposals has hardly moved in a chain of a hundred steps."""


def complete_at_random(
    model: PyroProgram, args: Args, kwargs: Kwargs, missing: MissingData, to_batch: ToBatch | None
) -> tuple[Args, dict[str, Any]]:
    """Complete a batch by draws from p(x), and prove on the way that observed values can be written back."""
    with PriorData(), explained("model", args, kwargs):
        records = run_program(model, missing.structure, SINGLE, args, kwargs)
    values = {name: lay_out(records[name], records[name].value, missing.structure) for name in missing.known}
    completed = missing.complete(values)
    return write_observations(model, args, kwargs, completed, structure=missing.structure, to_batch=to_batch)


class Gibbs(Sampler):
    """Metropolis-within-Gibbs, a chain a draw (arXiv 1802.04826)."""

    def __init__(self, rows: Rows, to_batch: ToBatch | None, warmup_steps: int, num_steps: int) -> None:
        super().__init__(rows)
        self.to_batch = to_batch
        self.warmup_steps = warmup_steps
        self.num_steps = num_steps

    @property
    def width(self) -> int:
        """A chain for each draw, and nothing else."""
        return 1

    @property
    def steps(self) -> int:
        """Steps of a chain."""
        return self.warmup_steps + self.num_steps

    def check(self, batch: tuple[Args, Kwargs], missing: MissingData, globals_: Values) -> None:
        """Refuse a model in which missing entries reach other distributions than by the latents.

        Its sites are weighed at the same values under two batches that differ in the missing entries alone.
        """
        other_batch = self._restart(batch, missing, globals_)
        values = values_of(self.run_guide(batch, globals_))
        one, other = (self.program.score_model(*each, SINGLE, values) for each in (batch, other_batch))
        for name, site in one.items():
            if self.structure.sites[name].kind == "imputed":
                continue
            density, other_density = (fn.log_prob(site.value) for fn in (site.fns[0], other[name].fns[0]))
            if not torch.allclose(density, other_density, rtol=1e-4, atol=1e-4, equal_nan=True):
                raise ModelError(
                    f"The distribution of site {name!r} depends on missing entries of the data themselves, so that they can't be "
                    f"drawn from the likelihood given the latents alone. Mark these entries as known, or write the model so that "
                    f"the data reach it by obs= only.",
                    site=name,
                )

    def draw(
        self, batch: tuple[Args, Kwargs], missing: MissingData, globals_: Values, num_samples: int, bar: tqdm
    ) -> Part:
        """Run a chain for each draw of each row, and keep where it ends."""
        count = len(next(iter(missing.known.values())))
        repeated = torch.arange(count).repeat(num_samples)
        missing = missing.take(repeated)
        batch = self._restart(take_rows(*batch, repeated), missing, globals_)
        guide = self.run_guide(batch, globals_)
        state, accepted = values_of(guide), torch.zeros(count)
        completed: Values = {}
        # a chain that starts far out improves again and again at first, whatever the guide
        settled = self.warmup_steps + self.num_steps // 2
        for step in range(self.steps):
            if step >= self.warmup_steps:
                state, is_accepted = self._step(batch, state, globals_)
                if step >= settled:
                    accepted += is_accepted.float().unflatten(0, (num_samples, count)).mean(0).cpu()
            elif step:
                state = values_of(self.run_guide(batch, globals_))
            batch, completed = self._renew(batch, missing, self.program.score_model(*batch, SINGLE, state))
            bar.update()
        acceptance = accepted / (self.steps - settled) if self.num_steps else torch.full((count,), torch.nan)
        samples = {name: value.unflatten(0, (num_samples, count)) for name, value in completed.items()}
        nothing = torch.full((count,), torch.nan)
        latents = self.latents(state, guide, num_samples)
        return Part(samples, latents, acceptance, nothing, acceptance < LEAST_ACCEPTANCE)

    def _step(self, batch: tuple[Args, Kwargs], state: Values, globals_: Values) -> tuple[Values, Tensor]:
        """Propose z' from q(z | x) and accept it with probability min(1, w(z') / w(z)), w = p(x, z) / q(z | x)."""
        guide = self.run_guide(batch, globals_)
        proposed = self.weigh(batch, guide)
        # weighed again at every step: x has changed since z was drawn
        current = self.weigh(batch, self.run_guide(batch, state))
        is_accepted = torch.rand_like(proposed).log() < proposed - current
        moved = {
            name: torch.where(self.per_row(site, is_accepted), site.value, state[name]) if site.is_local else site.value
            for name, site in guide.items()
        }
        return moved, is_accepted

    def _restart(self, batch: tuple[Args, Kwargs], missing: MissingData, globals_: Values) -> tuple[Args, Kwargs]:
        """Put draws from p(x) into the missing entries of a copy of the batch."""
        self.program.forget_indices()  # copies of rows are another number of rows
        with PriorData():
            prior = self.program.score_model(*batch, SINGLE, globals_)
        values = {name: lay_out(prior[name], prior[name].value, self.structure) for name in missing.known}
        completed = missing.complete(values)
        return write_observations(
            self.program.model, *batch, completed, structure=self.structure, to_batch=self.to_batch
        )

    def _renew(
        self, batch: tuple[Args, Kwargs], missing: MissingData, model: Records
    ) -> tuple[tuple[Args, Kwargs], Values]:
        """Draw the missing entries from the likelihood at the latents that the model has just run with."""
        completed = missing.complete(self.fill(model, missing.known))
        return self._write(batch, completed, model), completed

    def _write(self, batch: tuple[Args, Kwargs], completed: Values, model: Records) -> tuple[Args, Kwargs]:
        """Write completed values into the batch that the model has just run on."""
        if self.to_batch is not None:
            return write_observations(self.program.model, *batch, completed, to_batch=self.to_batch)
        for name, value in completed.items():
            # what the model observes is a view of the batch: `write_observations` has proved it at the start
            lay_out(model[name], model[name].value, self.structure).copy_(value)
        return batch
