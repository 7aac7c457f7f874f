"""A model, its guide and a batch become terms: the one place where log p and log q of a site meet."""

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace

import torch
from pyro import poutine
from torch import Tensor

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import GuideError, NonFiniteError
from pyro_aevb.program.agreement import check_guide, check_masks
from pyro_aevb.program.dependencies import prior_parents
from pyro_aevb.program.divergence import closed_form_kl
from pyro_aevb.program.fixed_rank import Ranks, module_ranks
from pyro_aevb.program.parameters import detaching, preserved_buffers, preserved_state
from pyro_aevb.program.particles import (
    ParticleAxes,
    Records,
    SiteRecord,
    can_vectorize,
    first_difference,
    run_program,
)
from pyro_aevb.program.reach import find_modules
from pyro_aevb.program.sites import SharedIndices, SpentNoise
from pyro_aevb.program.structure import Structure, read_structure
from pyro_aevb.randomness import RandomState, random_state, replayed_rng
from pyro_aevb.weights import LatentTerm, ObservedTerm, Terms

__all__ = ["ImportanceProgram", "find_non_finite"]


class ImportanceProgram:
    """A model and its guide, read once, that turn batches into :class:`~pyro_aevb.weights.Terms`.

    Args:
        model: The model.
        guide: The guide: same arguments, one site for each latent of the model.
        args: A batch to read the structure from, as positional arguments.
        kwargs: A batch to read the structure from, as keyword arguments.
        data_plate: As in :func:`~pyro_aevb.program.structure.read_structure`.
        structure: The model's structure, if it was read before.

    Attributes:
        structure: The model's structure.
        guide_sites: The guide's sites of one run without particles, for questions about its distributions.

    Raises:
        ModelError: If the model is not supported.
        GuideError: If a site is missing from the guide, extra in it, or lies outside the model's support.
    """

    def __init__(
        self,
        model: PyroProgram,
        guide: PyroProgram,
        args: Args,
        kwargs: Kwargs,
        *,
        data_plate: str | None = "auto",
        structure: Structure | None = None,
    ) -> None:
        self.model = model
        self.guide = guide
        self.modules = find_modules(model, guide)
        self.structure = structure or read_structure(model, args, kwargs, guide=guide, data_plate=data_plate)
        with preserved_state(self.modules):
            self.guide_sites = self._of_guide(run_program(guide, self.structure, ParticleAxes(), args, kwargs))
        check_guide(self.structure, self.guide_sites)
        self._batch = (args, kwargs)
        self._ranks: Ranks | None = None
        self._is_vectorized: dict[tuple[bool, bool], bool] = {}
        self._indices = SharedIndices()
        self._noise: RandomState | None = None
        self._guide_modules = find_modules(guide)

    @property
    def names(self) -> frozenset[str]:
        """Names of the model's latents that the guide samples."""
        return frozenset(name for name in self.guide_sites if name in self.structure.sites)

    def axes(self, num_particles: int, num_importance_samples: int) -> ParticleAxes:
        """Choose how to run particles, by trying once on the batch that the structure was read from."""
        single = ParticleAxes(num_particles, num_importance_samples)
        if single.is_single:
            return single
        key = (num_particles > 1, num_importance_samples > 1)
        if key not in self._is_vectorized:
            self._is_vectorized[key] = self._try_vectorizing(key)
        return replace(single, is_vectorized=self._is_vectorized[key])

    def sample_guide(
        self, args: Args, kwargs: Kwargs, axes: ParticleAxes, *, values: Values | None = None, keeps_noise: bool = False
    ) -> Records:
        """Draw from the guide; sites named in ``values`` keep their value, and plates then the rows that they drew before.

        Args:
            args: The batch, as positional arguments.
            kwargs: The batch, as keyword arguments.
            axes: The axes of the draw.
            values: Values of sites that are not to be drawn.
            keeps_noise: Whether :meth:`rescore_guide` will weigh this draw again and needs its noise.
        """
        if not values:
            self.forget_indices()
        if keeps_noise:
            self._noise = random_state()
        return self._of_guide(self._run(self.guide, args, kwargs, axes, values or {}))

    def forget_indices(self) -> None:
        """Let subsampling plates draw their rows anew."""
        self._indices = SharedIndices()

    def rescore_guide(
        self, args: Args, kwargs: Kwargs, axes: ParticleAxes, values: Values, *, is_detached: bool = True
    ) -> Records:
        """Weigh values that :meth:`sample_guide` has just drawn once more, with the values live.

        The guide sees the same rows and the same noise again (dropout), and its buffers stay as they are.

        Args:
            args: The batch, as positional arguments.
            kwargs: The batch, as keyword arguments.
            axes: The axes of the draw.
            values: The draw.
            is_detached: Whether to detach the guide's parameters.

        A draw that was not kept with its noise is weighed under fresh noise.
        """
        detached = detaching(self._guide_modules) if is_detached else nullcontext()
        noise = replayed_rng(self._noise) if self._noise is not None else nullcontext()
        with preserved_buffers(self.modules), noise, SpentNoise(), detached:
            return self._of_guide(self._run(self.guide, args, kwargs, axes, values))

    def _of_guide(self, records: Records) -> Records:
        """Leave out the observed sites that a guide shows when it runs the model by itself, as Pyro's messenger guides do."""
        return {name: site for name, site in records.items() if not (site.is_observed and name in self.structure.sites)}

    def score_model(self, args: Args, kwargs: Kwargs, axes: ParticleAxes, values: Values) -> Records:
        """Weigh given values under the model, on the rows that the guide saw."""
        return self._run(self.model, args, kwargs, axes, values)

    def simulate_model(self, args: Args, kwargs: Kwargs, axes: ParticleAxes, values: Values) -> Records:
        """Draw the model's observed sites given values of its latents."""
        return self._run(poutine.uncondition(self.model), args, kwargs, axes, values)

    def _run(self, program: PyroProgram, args: Args, kwargs: Kwargs, axes: ParticleAxes, values: Values) -> Records:
        with self._indices:
            return run_program(program, self.structure, axes, args, kwargs, values=values, ranks=self._ranks)

    def terms(self, model: Records, guide: Records, axes: ParticleAxes, kl_sites: Collection[str] = ()) -> Terms:
        """Join the records of model and guide, site by site.

        Args:
            model: Records of the model.
            guide: Records of the guide under the same values.
            axes: The axes that both ran under.
            kl_sites: Latents whose closed-form KL is wanted.

        Raises:
            GuideError: If model and guide give a latent different masks or scales, or the guide lacks a latent.
        """
        for name, site in model.items():
            if not site.is_observed and name not in guide and self._is_latent(name):
                raise GuideError(
                    f"The model sampled site {name!r}, which the guide does not: the model's sites differ from run to run. Give "
                    f"every batch one structure, and switch parts off with poutine.mask.",
                    site=name,
                )
        latents = [
            _latent_term(site, guide[name], wants_kl=name in kl_sites)
            for name, site in model.items()
            if not site.is_observed and name in guide
        ]
        latents += [_auxiliary_term(site) for name, site in guide.items() if name not in model]
        observed = [
            ObservedTerm(site.name, site.is_local, site.log_prob) for site in model.values() if site.is_observed
        ]
        like = next((site.log_prob for site in (*model.values(), *guide.values())), torch.zeros(()))
        rows = next((site.log_prob.shape[-1] for site in (*model.values(), *guide.values()) if site.is_local), 0)
        return Terms(
            latents=tuple(latents),
            observed=tuple(observed),
            scale=_data_scale(model, guide),
            shape=(axes.num_particles, axes.num_importance_samples, rows),
            like=like,
        )

    def _is_latent(self, name: str) -> bool:
        """Tell whether an unobserved site of the model is a latent, rather than the unobserved half of an ``obs_mask`` site."""
        site = self.structure.sites.get(name)
        return site is None or site.kind == "latent"

    def draw_terms(self, args: Args, kwargs: Kwargs, num_particles: int = 1, num_importance_samples: int = 1) -> Terms:
        """Draw from the guide and weigh the draws under both programs."""
        axes = self.axes(num_particles, num_importance_samples)
        guide = self.sample_guide(args, kwargs, axes)
        model = self.score_model(args, kwargs, axes, {name: site.value for name, site in guide.items()})
        return self.terms(model, guide, axes)

    def parents(self, args: Args, kwargs: Kwargs) -> dict[str, frozenset[str]]:
        """Say which latents each site's distribution depends on in the model."""
        values = {name: site.value for name, site in self.guide_sites.items() if name in self.structure.sites}
        return prior_parents(self.model, values, args, kwargs)

    def closed_form_sites(self, args: Args, kwargs: Kwargs) -> frozenset[str]:
        """Name the latents whose KL(q || p) has a closed form."""
        values = {name: site.value for name, site in self.guide_sites.items()}
        with preserved_state(self.modules), torch.no_grad():
            model = run_program(self.model, self.structure, ParticleAxes(), args, kwargs, values=values)
        pairs = {name: (self.guide_sites[name].fns[0], model[name].fns[0]) for name in self.names}
        return frozenset(name for name, (q, p) in pairs.items() if closed_form_kl(q, p) is not None)

    def _try_vectorizing(self, key: tuple[bool, bool]) -> bool:
        """Compare a run under particle plates with runs without, particle by particle."""
        args, kwargs = self._batch
        # sizes that differ from the rows', or indexing by rows would pass for indexing by particles
        size = 3 if self.structure.rows == 2 else 2
        axes = ParticleAxes(size if key[0] else 1, size if key[1] else 1)
        loop = replace(axes, is_vectorized=False)

        def compare() -> str | None:
            guide = self.sample_guide(args, kwargs, axes)
            values = {name: site.value for name, site in guide.items()}
            model = self.score_model(args, kwargs, axes, values)
            site = _first_difference(guide, self.sample_guide(args, kwargs, loop, values=values))
            given = {name: site for name, site in model.items() if site.is_observed or name in values}
            return site or _first_difference(given, self.score_model(args, kwargs, loop, values))

        with preserved_state(self.modules), torch.no_grad():
            self._ranks = module_ranks(self.modules, lambda: self._run_both(args, kwargs))
            return can_vectorize(compare)

    def _run_both(self, args: Args, kwargs: Kwargs) -> None:
        trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        poutine.replay(self.model, trace=trace)(*args, **kwargs)


def _first_difference(vectorized: Records, looped: Records) -> str | None:
    densities = [{name: site.log_prob for name, site in records.items()} for records in (vectorized, looped)]
    return first_difference(*densities)


def _latent_term(p: SiteRecord, q: SiteRecord, *, wants_kl: bool) -> LatentTerm:
    check_masks(p, q)
    return LatentTerm(
        name=p.name,
        is_local=p.is_local,
        value=q.value,
        log_p=p.log_prob,
        log_q=q.log_prob,
        kl=_kl(p, q) if wants_kl else None,
        p=p.fns,
        q=q.fns,
    )


def _kl(p: SiteRecord, q: SiteRecord) -> Tensor | None:
    """Sum a site's closed-form KL to rows, with the site's masks and scale."""
    parts = []
    for fn_p, fn_q in zip(p.fns, q.fns, strict=True):
        kl = closed_form_kl(fn_q, fn_p)
        if kl is None:
            return None
        own_mask = getattr(fn_p, "_mask", None)
        parts.append(kl if own_mask is None else torch.where(torch.as_tensor(own_mask), kl, 0.0))
    return p.reduce(parts)


def _auxiliary_term(q: SiteRecord) -> LatentTerm:
    zero = torch.zeros_like(q.log_prob)
    return LatentTerm(q.name, q.is_local, q.value, log_p=zero, log_q=q.log_prob, kl=None, p=(), q=q.fns)


def _data_scale(model: Records, guide: Records) -> Tensor | float:
    """Return the data plate's own scale; a recording's as precise as the densities that it multiplies."""
    local = [site for site in (*model.values(), *guide.values()) if site.data_scale is not None]
    scale = local[0].data_scale if local else None
    if isinstance(scale, Tensor):
        # torch.promote_types would be recorded as an operation
        return scale.to(max((site.log_prob.dtype for site in local), key=lambda dtype: torch.finfo(dtype).bits))
    return 1.0 if scale is None else scale


def find_non_finite(
    model: PyroProgram, guide: PyroProgram | None, structure: Structure, args: Args, kwargs: Kwargs
) -> NonFiniteError | None:
    """Run once and name the first site, guide before model, whose log density is NaN or infinite, where there is one.

    Without a guide latents are drawn from the prior.
    """
    with preserved_state(find_modules(model, guide), evaluate=False), torch.no_grad(), SharedIndices():
        guide_sites = {} if guide is None else run_program(guide, structure, ParticleAxes(), args, kwargs)
        values = {name: site.value for name, site in guide_sites.items()}
        model_sites = run_program(model, structure, ParticleAxes(), args, kwargs, values=values)
    for program, records in (("guide", guide_sites), ("model", model_sites)):
        for name, site in records.items():
            bad = ~torch.isfinite(site.log_prob)
            if bad.any():
                return NonFiniteError(
                    f"The {program}'s log density at site {name!r} is NaN or infinite in {int(bad.sum())} of {bad.numel()} rows. "
                    f"Look at the data and the parameters that reach this site.",
                    site=name,
                )
    return None
