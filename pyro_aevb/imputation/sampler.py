"""Draws of missing entries, whatever the method: rows repeated side by side, chunk by chunk, globals held."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import Args, Kwargs, Values
from pyro_aevb.errors import NonFiniteError
from pyro_aevb.imputation.missing import MissingData, lay_out, unobserved
from pyro_aevb.program.agreement import check_separable
from pyro_aevb.program.batch import explained
from pyro_aevb.program.importance import find_non_finite
from pyro_aevb.program.particles import ParticleAxes, Records, SiteRecord
from pyro_aevb.program.rows import CHUNK_DRAWS, Rows

__all__ = ["SINGLE", "Part", "Sampler", "values_of"]

SINGLE = ParticleAxes()
"""Chains and importance samples are repeated rows, so that programs run in Pyro's own shapes and any network will do."""


@dataclass(frozen=True)
class Part:
    """What runs give for some rows and some of the draws.

    Attributes:
        samples: Completed data, ``{observed site: [num_samples, rows, ...]}``.
        latents: Latents, ``{site: [num_samples, rows, ...]}``, globals ``[num_samples, ...]``.
        acceptance: Share of accepted proposals, ``[rows]``.
        ess: Effective number of importance samples, ``[rows]``.
        is_flagged: Rows that should not be trusted, ``[rows]``.
    """

    samples: Values
    latents: Values
    acceptance: Tensor
    ess: Tensor
    is_flagged: Tensor


class Sampler(ABC):
    """Draws of missing entries, for chunks of rows and for each draw of the globals."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.program = rows.program
        self.structure = rows.structure

    @property
    @abstractmethod
    def width(self) -> int:
        """Copies of a row that run side by side for the sake of one draw of the globals, apart from those that are kept."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Ticks of the progress bar in one run."""

    @abstractmethod
    def check(self, batch: tuple[Args, Kwargs], missing: MissingData, globals_: Values) -> None:
        """Refuse a chunk of rows that the method would be wrong for."""

    @abstractmethod
    def draw(
        self, batch: tuple[Args, Kwargs], missing: MissingData, globals_: Values, num_samples: int, bar: tqdm
    ) -> Part:
        """Draw the missing entries of a chunk of rows, given globals."""

    def run(
        self, missing: MissingData, num_samples: int, num_globals: int, chunk_size: int | None, *, progress: bool
    ) -> Part:
        """Draw for every chunk of rows, and in it for every draw of the globals."""
        copies = max(self.width, num_samples)
        size = chunk_size or max(1, CHUNK_DRAWS // copies)
        if self.structure.full_size > self.structure.rows:
            size = max(1, min(size, self.structure.full_size // copies))
        chunks = list(self.rows.chunks(size, copies, progress=False))
        groups = self._groups(chunks[0][:2], num_samples, num_globals)
        parts, start = [], 0
        with tqdm(total=len(chunks) * len(groups) * self.steps, disable=not progress, unit="step") as bar:
            for args, kwargs, count in chunks:
                part = missing.take(slice(start, start + count))
                with explained("program", args, kwargs):
                    self.check((args, kwargs), part, groups[0][0])
                    parts.append(_join_draws([self.draw((args, kwargs), part, *group, bar) for group in groups]))
                start += count
        return self._join_rows(parts)

    def _join_rows(self, parts: list[Part]) -> Part:
        def join(values: list[Values]) -> Values:
            return {
                name: torch.cat([part[name] for part in values], 1) if self.structure.sites[name].is_local else value
                for name, value in values[0].items()
            }

        return Part(
            samples=join([part.samples for part in parts]),
            latents=join([part.latents for part in parts]),
            acceptance=torch.cat([part.acceptance for part in parts]),
            ess=torch.cat([part.ess for part in parts]),
            is_flagged=torch.cat([part.is_flagged for part in parts]),
        )

    def _groups(self, batch: tuple[Args, Kwargs], num_samples: int, num_globals: int) -> list[tuple[Values, int]]:
        """Draw the globals, and say how many draws of the missing entries go with each draw of them."""
        groups: list[tuple[Values, int]] = []
        while num_samples:
            records = self.run_guide(batch, {})
            globals_ = {name: site.value for name, site in records.items() if not site.is_local}
            count = -(-num_samples // (num_globals - len(groups))) if globals_ else num_samples
            groups.append((globals_, count))
            num_samples -= count
        return groups

    def run_guide(self, batch: tuple[Args, Kwargs], values: Values) -> Records:
        """Draw from the guide what is not given; plates that subsample choose their rows anew."""
        self.program.forget_indices()
        return self.program.sample_guide(*batch, SINGLE, values=values)

    def weigh(self, batch: tuple[Args, Kwargs], guide: Records) -> Tensor:
        """Return log p(x, z) - log q(z | x) of each row."""
        model = self.program.score_model(*batch, SINGLE, values_of(guide))
        check_separable("imputation", model | guide, self.program.guide_sites)
        log_weights = self.program.terms(model, guide, SINGLE).log_weights().local[0, 0]
        if log_weights.isnan().any():
            found = find_non_finite(self.program.model, self.program.guide, self.structure, *batch)
            raise found or NonFiniteError("A log density is NaN at a completed row.")
        return log_weights

    def fill(self, model: Records, names: Values) -> Values:
        """Draw every entry of the observed sites given the latents; entries that the model drops are latents of their own."""
        values = {}
        for name in names:
            partner = unobserved(name, self.structure)
            is_latent = partner is not None and self.structure.sites[partner].kind == "latent"
            site = model[partner] if partner is not None and is_latent else model[name]
            value = site.value if is_latent else site.fns[0].sample()
            values[name] = lay_out(site, value, self.structure)
        return values

    def latents(self, values: Values, guide: Records, num_samples: int) -> Values:
        """Lay latents of repeated rows out as draws."""
        draws = {}
        for name in sorted(self.program.names, key=list(self.structure.sites).index):
            laid = lay_out(guide[name], values[name], self.structure)
            draws[name] = (
                laid.unflatten(0, (num_samples, -1)) if guide[name].is_local else laid.expand(num_samples, *laid.shape)
            )
        return draws

    def per_row(self, site: SiteRecord, rows: Tensor) -> Tensor:
        """Give an entry a row the axes of a local site's value."""
        return rows.reshape(-1, *(1,) * (-1 - (self.structure.data_dim or -1) + site.fns[0].event_dim))


def values_of(records: Records) -> Values:
    """Return the values of sites by name."""
    return {name: site.value for name, site in records.items()}


def _join_draws(parts: list[Part]) -> Part:
    """Join runs of the same rows; a row is as good as its worst run."""
    return Part(
        samples={name: torch.cat([part.samples[name] for part in parts]) for name in parts[0].samples},
        latents={name: torch.cat([part.latents[name] for part in parts]) for name in parts[0].latents},
        acceptance=torch.stack([part.acceptance for part in parts]).mean(0),
        ess=torch.stack([part.ess for part in parts]).sum(0),
        is_flagged=torch.stack([part.is_flagged for part in parts]).any(0),
    )
