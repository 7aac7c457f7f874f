"""Draws and summaries of rows: posterior, posterior predictive, reconstruction, embedding and simulation.

All of them run in eval mode without gradients, in chunks of rows, and return ``{site: tensor}``: Monte Carlo axis first, then
rows, then inner plates (outer first, axes of size 1 dropped), then the event. Global sites have no rows axis.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import Args, Kwargs, PyroProgram, SiteDistribution, Values
from pyro_aevb.errors import DataError, SettingError
from pyro_aevb.program.batch import batch_rows, take_rows
from pyro_aevb.program.importance import ImportanceProgram
from pyro_aevb.program.parameters import evaluating
from pyro_aevb.program.particles import ParticleAxes, SiteRecord, as_draws, run_program
from pyro_aevb.program.structure import Structure, read_structure
from pyro_aevb.randomness import seeded

__all__ = ["embed", "posterior", "predict", "reconstruct", "simulate"]

CHUNK_DRAWS = 50_000
"""Draws of a row's sites that are in memory at once by default."""


def posterior(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = False,
    **covariates: Any,
) -> Values:
    """Draw the latents of rows, seen in training or not, from the guide.

    Args:
        model: The model.
        guide: The guide, trained.
        *batch: Rows, as positional arguments of the model.
        num_samples: Draws.
        chunk_size: Rows run at once; by default so many that some 50,000 draws are in memory.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None``.
        seed: Seed of the draws; the generators are left as they were.
        progress: Whether to show a progress bar.
        **covariates: The batch's keyword arguments.

    Returns:
        ``{site: [num_samples, rows, ...]}``, globals ``[num_samples, ...]``. Draws of one index belong together: locals are drawn
        given the globals of that index.

    Raises:
        SettingError: If ``num_samples`` is below 1.
        DataError: If there are no rows.
    """
    draw = _Draws(model, guide, batch, covariates, data_plate, num_samples)
    with _quietly(seed, model, guide):
        return draw.run(draw.latents, chunk_size, progress=progress)


def predict(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    num_samples: int = 100,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = False,
    **covariates: Any,
) -> Values:
    """Draw new observations of rows from the posterior predictive: x' ~ p(x | z), z ~ q(z | x).

    Arguments are those of :func:`posterior`.

    Returns:
        ``{observed site: [num_samples, rows, ...]}``.
    """
    draw = _Draws(model, guide, batch, covariates, data_plate, num_samples)
    with _quietly(seed, model, guide):
        return draw.run(draw.observations, chunk_size, progress=progress)


def embed(
    model: PyroProgram, guide: PyroProgram, *batch: Any, data_plate: str | None = "auto", **covariates: Any
) -> Values:
    """Return the median of each latent in the guide, each site given the medians of those before it.

    Families without a closed-form quantile get the median of 101 draws under a fixed seed.

    Returns:
        ``{site: [rows, ...]}``, globals ``[...]``.
    """
    draw = _Draws(model, guide, batch, covariates, data_plate, 1)
    with _quietly(0, model, guide):
        return _without_draws(draw.run(draw.medians, None, progress=False))


def reconstruct(
    model: PyroProgram, guide: PyroProgram, *batch: Any, data_plate: str | None = "auto", **covariates: Any
) -> Values:
    """Return the mean of the likelihood at the embedding, E[x | z = median of q(z | x)].

    Returns:
        ``{observed site: [rows, ...]}``; a draw under a fixed seed for families without a mean.
    """
    draw = _Draws(model, guide, batch, covariates, data_plate, 1)
    with _quietly(0, model, guide):
        return _without_draws(draw.run(draw.means, None, progress=False))


def simulate(
    model: PyroProgram,
    *template: Any,
    num_rows: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    **covariates: Any,
) -> Values:
    """Draw latents and observations from the model itself.

    Args:
        model: The model.
        *template: A batch whose shapes and covariates are used and whose observations are ignored.
        num_rows: Rows to draw; the template's rows are recycled. By default as many as the template has.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None``.
        seed: Seed of the draws; the generators are left as they were.
        **covariates: The template's keyword arguments.

    Returns:
        ``{site: [rows, ...]}`` for latent and observed sites, globals ``[...]`` (one draw of them for all rows).
    """
    rows = batch_rows(template, covariates)
    if num_rows is not None and rows:
        template, covariates = take_rows(template, covariates, torch.arange(num_rows) % rows)
    with _quietly(seed, model):
        structure = read_structure(model, template, covariates, data_plate=data_plate)
        run = poutine.uncondition(model)
        records = run_program(run, structure, ParticleAxes(), template, covariates)
    kinds = ("latent", "observed")
    chosen = [site for name, site in records.items() if structure.sites[name].kind in kinds]
    return _without_draws({site.name: as_draws(site, structure) for site in chosen})


@contextmanager
def _quietly(seed: int | None, *programs: PyroProgram) -> Iterator[None]:
    """Run programs in eval mode under a seed, without gradients and checks that training did."""
    with seeded(seed), torch.no_grad(), evaluating(*programs), pyro.validation_enabled(False):
        yield


def _without_draws(draws: Values) -> Values:
    return {name: value[0] for name, value in draws.items()}


class _Draws:
    """Runs of model and guide over the chunks of a batch."""

    def __init__(
        self,
        model: PyroProgram,
        guide: PyroProgram,
        args: Args,
        kwargs: Kwargs,
        data_plate: str | None,
        num_samples: int,
    ) -> None:
        if num_samples < 1:
            raise SettingError(f"num_samples must be at least 1, got {num_samples}.")
        self.rows = batch_rows(args, kwargs)
        if self.rows == 0:
            raise DataError("The batch has no rows.")
        self.args, self.kwargs = args, kwargs
        self.num_samples = num_samples
        first = take_rows(args, kwargs, slice(0, 2)) if data_plate is not None else (args, kwargs)
        with evaluating(model, guide):
            self.program = ImportanceProgram(model, guide, *first, data_plate=data_plate)
        self.globals: Values = {}

    @property
    def structure(self) -> Structure:
        """The model's structure."""
        return self.program.structure

    def run(
        self, read: Callable[[Args, Kwargs, ParticleAxes], list[SiteRecord]], chunk_size: int | None, *, progress: bool
    ) -> Values:
        """Run every chunk and join local sites along the rows."""
        axes = self.program.axes(self.num_samples, 1)
        if self.structure.data_plate is None or self.rows is None:
            return self._layout(read(self.args, self.kwargs, axes))
        chunk_size = chunk_size or max(1, CHUNK_DRAWS // self.num_samples)
        parts: list[Values] = []
        with tqdm(total=self.rows, disable=not progress, unit="row", dynamic_ncols=True) as bar:
            for start in range(0, self.rows, chunk_size):
                chunk = take_rows(self.args, self.kwargs, slice(start, start + chunk_size))
                parts.append(self._layout(read(*chunk, axes)))
                bar.update(min(chunk_size, self.rows - start))
        return {name: self._join(name, [part[name] for part in parts]) for name in parts[0]}

    def _join(self, name: str, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, 1) if self.structure.sites[name].is_local else parts[0]

    def _layout(self, records: list[SiteRecord]) -> Values:
        return {site.name: as_draws(site, self.structure) for site in records}

    def _sample(self, args: Args, kwargs: Kwargs, axes: ParticleAxes) -> dict[str, SiteRecord]:
        """Draw from the guide; every chunk of rows keeps the globals of the first."""
        records = self.program.sample_guide(args, kwargs, axes, values=self.globals)
        self.globals = self.globals or {name: site.value for name, site in records.items() if not site.is_local}
        return records

    def latents(self, args: Args, kwargs: Kwargs, axes: ParticleAxes) -> list[SiteRecord]:
        """Return draws of the model's latents."""
        records = self._sample(args, kwargs, axes)
        return [site for name, site in records.items() if name in self.program.names]

    def observations(self, args: Args, kwargs: Kwargs, axes: ParticleAxes) -> list[SiteRecord]:
        """Return draws of the model's observed sites given draws of its latents."""
        values = {name: site.value for name, site in self._sample(args, kwargs, axes).items()}
        return self._observed(self.program.simulate_model(args, kwargs, axes, values))

    def medians(self, args: Args, kwargs: Kwargs, axes: ParticleAxes) -> list[SiteRecord]:
        """Return the guide's medians."""
        with _Medians():
            return self.latents(args, kwargs, axes)

    def means(self, args: Args, kwargs: Kwargs, axes: ParticleAxes) -> list[SiteRecord]:
        """Return the likelihood's means at the guide's medians."""
        with _Medians():
            values = {name: site.value for name, site in self._sample(args, kwargs, axes).items()}
        with _Means({site.name for site in self.structure.select("observed")}):
            return self._observed(self.program.simulate_model(args, kwargs, axes, values))

    def _observed(self, records: dict[str, SiteRecord]) -> list[SiteRecord]:
        return [records[site.name] for site in self.structure.select("observed")]


class _Medians(Messenger):
    """Set sampled sites to the median of their distribution."""

    def _pyro_sample(self, message: Message) -> None:
        if not message["is_observed"] and message["value"] is None and type(message["fn"]).__name__ != "_Subsample":
            fn: SiteDistribution = message["fn"]
            message["value"] = _median(fn)
            message["done"] = True


def _median(fn: SiteDistribution) -> Tensor:
    try:
        value = fn.icdf(torch.tensor(0.5))
        if value.shape == fn.batch_shape + fn.event_shape:
            return value
    except NotImplementedError:
        pass
    if hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        return _median(fn.base_dist).expand(fn.batch_shape + fn.event_shape)
    return fn.sample((101,)).median(0).values


class _Means(Messenger):
    """Set sampled sites of given names to the mean of their distribution."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, message: Message) -> None:
        if message["name"] not in self.names:
            return
        try:
            fn: SiteDistribution = message["fn"]
            mean = fn.mean
        except NotImplementedError:
            return
        message["value"], message["done"] = mean, True
