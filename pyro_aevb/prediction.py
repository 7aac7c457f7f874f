"""Draws and summaries of rows: posterior, posterior predictive, reconstruction, embedding and simulation.

All of them run in eval mode without gradients, in chunks of rows, and return ``{site: tensor}``: Monte Carlo axis first, then
rows, then inner plates (outer first, axes of size 1 dropped), then the event. Global sites have no rows axis.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message

from pyro_aevb._types import Args, Kwargs, PyroProgram, SiteDistribution, Values
from pyro_aevb.errors import SettingError
from pyro_aevb.program.batch import batch_rows, take_rows
from pyro_aevb.program.particles import ParticleAxes, SiteRecord, as_draws
from pyro_aevb.program.processes import Processes
from pyro_aevb.program.quantiles import AtQuantile
from pyro_aevb.program.rows import Rows, inferring
from pyro_aevb.program.settings import check_count, check_covariates
from pyro_aevb.program.simulation import simulate_rows
from pyro_aevb.program.structure import read_structure

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["embed", "posterior", "predict", "reconstruct", "simulate"]


def posterior(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    fabric: "Fabric | None" = None,
    progress: bool = False,
    **covariates: Any,
) -> Values:
    """Draw the latents of rows, seen in training or not, from the guide.

    Args:
        model: The model.
        guide: The guide, trained.
        *batch: Rows, as positional arguments of the model.
        num_samples: Draws.
        chunk_size: Rows run at once; by default so many that some 50,000 draws are in memory. A model that draws its own
            rows runs as many as it draws, the last chunk padded.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None``.
        seed: Seed of the draws; the generators are left as they were. A seed reproduces draws under the same ``chunk_size``
            (and ``num_samples``, which chooses it by default); under another one the draws differ.
        fabric: A ``lightning_fabric.Fabric`` whose processes divide the chunks among them. Each is given all rows and gets all
            draws: those that one process would draw under that seed.
        progress: Whether to show a progress bar.
        **covariates: The batch's keyword arguments.

    Returns:
        ``{site: [num_samples, rows, ...]}``, globals ``[num_samples, ...]``. Draws of one index belong together: locals are drawn
        given the globals of that index.

    Raises:
        SettingError: If ``num_samples`` or ``chunk_size`` is below 1, or a keyword is unknown.
        DataError: If there are no rows, NaN reaches a density, or data lie outside the support of their likelihood.
        ModelError: If the model is not supported or fails on the batch.
        GuideError: If the guide does not fit the model.
    """
    check_count("num_samples", num_samples)
    check_count("chunk_size", chunk_size, is_optional=True)
    check_covariates(covariates, posterior)
    processes = Processes(fabric)
    with inferring(processes.agree_on_seed(seed), model, guide):
        draw = _Draws(Rows(model, guide, batch, covariates, data_plate, processes).checked(), num_samples)
        return draw.run(draw.latents, chunk_size, progress=progress and processes.is_first)


def predict(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    num_samples: int = 100,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    fabric: "Fabric | None" = None,
    progress: bool = False,
    **covariates: Any,
) -> Values:
    """Draw new observations of rows from the posterior predictive: x' ~ p(x | z), z ~ q(z | x).

    Arguments are those of :func:`posterior`.

    Returns:
        ``{observed site: [num_samples, rows, ...]}``.
    """
    check_count("num_samples", num_samples)
    check_count("chunk_size", chunk_size, is_optional=True)
    check_covariates(covariates, predict)
    processes = Processes(fabric)
    with inferring(processes.agree_on_seed(seed), model, guide):
        draw = _Draws(Rows(model, guide, batch, covariates, data_plate, processes).checked(), num_samples)
        return draw.run(draw.observations, chunk_size, progress=progress and processes.is_first)


def embed(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    data_plate: str | None = "auto",
    fabric: "Fabric | None" = None,
    **covariates: Any,
) -> Values:
    """Return the median of each latent in the guide, each site given the medians of those before it.

    A transformed distribution gets the image of its base's median, which is its median where the transform acts on each entry
    alone. Families without a closed form (Gamma, Beta, ...) get the median of 101 draws under a fixed seed, those on circles and
    spheres their mean direction.

    Returns:
        ``{site: [rows, ...]}``, globals ``[...]``.
    """
    check_covariates(covariates, embed)
    with inferring(0, model, guide):
        draw = _Draws(Rows(model, guide, batch, covariates, data_plate, Processes(fabric)).checked(), 1)
        return _without_draws(draw.run(draw.medians, None, progress=False))


def reconstruct(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    data_plate: str | None = "auto",
    fabric: "Fabric | None" = None,
    **covariates: Any,
) -> Values:
    """Return the mean of the likelihood at the embedding, E[x | z = median of q(z | x)].

    Rows are read by the encoder alone: holes may be filled with means that no draw could be.

    Returns:
        ``{observed site: [rows, ...]}``; a draw under a fixed seed for families without a mean.
    """
    check_covariates(covariates, reconstruct)
    with inferring(0, model, guide):
        draw = _Draws(Rows(model, guide, batch, covariates, data_plate, Processes(fabric)), 1)
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

    Raises:
        SettingError: If ``num_rows`` is below 1 or has nothing to recycle, or a keyword is unknown.
        ModelError: If the model is not supported or fails on the template.
    """
    check_count("num_rows", num_rows, is_optional=True)
    check_covariates(covariates, simulate)
    if num_rows is not None:
        rows = batch_rows(template, covariates)
        if not rows:
            raise SettingError(
                "num_rows recycles the rows of a template, and there is none; bind the number to the model."
            )
        template, covariates = take_rows(template, covariates, torch.arange(num_rows) % rows)
    with inferring(seed, model):
        structure = read_structure(model, template, covariates, data_plate=data_plate)
        return simulate_rows(model, structure, template, covariates)


def _without_draws(draws: Values) -> Values:
    return {name: value[0] for name, value in draws.items()}


class _Draws:
    """Runs of model and guide over the chunks of a batch."""

    def __init__(self, rows: Rows, num_samples: int) -> None:
        self.rows = rows
        self.program = rows.program
        self.structure = rows.structure
        self.num_samples = num_samples

    def run(
        self, read: Callable[[Args, Kwargs, ParticleAxes], list[SiteRecord]], chunk_size: int | None, *, progress: bool
    ) -> Values:
        """Run every chunk and join local sites along the rows, those of all processes."""
        axes = replace(self.program.axes(self.num_samples, 1), is_weighed=False)
        total = self.rows.num_own(chunk_size, self.num_samples)
        draws: Values = {}
        done = 0
        for args, kwargs, count in self.rows.chunks(chunk_size, self.num_samples, progress=progress):
            for site in read(args, kwargs, axes):
                part = as_draws(site, self.structure)
                if not self._has_rows(site.name):
                    draws.setdefault(site.name, part)
                    continue
                if site.name not in draws:
                    draws[site.name] = part.new_empty(len(part), total, *part.shape[2:])
                draws[site.name][:, done : done + count] = part[:, :count]
            done += count
        return self._joined(self.rows.processes.gather([draws]))

    def _joined(self, parts: list[Values]) -> Values:
        """Join the draws of processes, of which those without a chunk have none; globals are the same in all."""
        if len(parts) == 1:
            return parts[0]
        parts = [part for part in parts if part]
        joined = {name: [part[name] for part in parts] for name in parts[0]}
        return {name: torch.cat(every, 1) if self._has_rows(name) else every[0] for name, every in joined.items()}

    def _has_rows(self, name: str) -> bool:
        return self.structure.data_plate is not None and self.structure.sites[name].is_local

    def latents(self, args: Args, kwargs: Kwargs, axes: ParticleAxes) -> list[SiteRecord]:
        """Return draws of the model's latents."""
        records = self.rows.sample_guide(args, kwargs, axes)
        return [site for name, site in records.items() if name in self.program.names]

    def observations(self, args: Args, kwargs: Kwargs, axes: ParticleAxes) -> list[SiteRecord]:
        """Return draws of the model's observed sites given draws of its latents."""
        values = {name: site.value for name, site in self.rows.sample_guide(args, kwargs, axes).items()}
        return self._observed(self.program.simulate_model(args, kwargs, axes, values))

    def medians(self, args: Args, kwargs: Kwargs, axes: ParticleAxes) -> list[SiteRecord]:
        """Return the guide's medians."""
        with AtQuantile():
            return self.latents(args, kwargs, axes)

    def means(self, args: Args, kwargs: Kwargs, axes: ParticleAxes) -> list[SiteRecord]:
        """Return the likelihood's means at the guide's medians."""
        with AtQuantile():
            values = {name: site.value for name, site in self.rows.sample_guide(args, kwargs, axes).items()}
        with _Means({site.name for site in self.structure.select("observed")}):
            return self._observed(self.program.simulate_model(args, kwargs, axes, values))

    def _observed(self, records: dict[str, SiteRecord]) -> list[SiteRecord]:
        return [records[site.name] for site in self.structure.select("observed")]


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
        if not mean.isnan().any():  # torch's way to say that a family, such as Categorical, has none
            message["value"], message["done"] = mean, True
