r"""Semi-amortized inference: gradient steps on each row's own variational parameters, from where the encoder put them.

A row's own parameters are additive offsets :math:`\delta_n` on the outputs of the networks that give its latents their
distributions, :math:`q(z_n; f(x_n) + \delta_n)`, zero at the start (Kim et al. 2018, arXiv 1802.02550, on offsets instead of
whole parameters).
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import Args, Kwargs, LocalWeights, PerRow, PyroProgram, Values
from pyro_aevb.errors import DataError, GuideError, ModelError, SettingError
from pyro_aevb.guides.building import Built
from pyro_aevb.guides.row_keys import row_keys
from pyro_aevb.program.batch import batch_rows
from pyro_aevb.program.model_rows import Given, given_globals
from pyro_aevb.program.particles import ParticleAxes
from pyro_aevb.program.rows import CHUNK_DRAWS, Rows, inferring
from pyro_aevb.program.settings import check_count, check_covariates
from pyro_aevb.program.structure import Structure
from pyro_aevb.randomness import random_state, replayed_rng

__all__ = ["RefinableGuide"]

_Guide = TypeVar("_Guide", bound="RefinableGuide")

RowOffsets: TypeAlias = Callable[[Args, Kwargs, Tensor | None], Values]
"""From a batch, and the rows of it that a subsampling plate holds, to offsets ``{latent: [*batch, outputs]}``."""

NUM_JUDGING_DRAWS = 1000
"""Fresh draws of each row by which its offsets are kept or dropped. A move that gains G nats changes a draw's bound by some
sqrt(2 G) nats, so that gains above 8 / 1000 nats are seen in half of the rows or more."""

SURE = 2.0
"""Standard errors above 0 from which a gain counts: a row without any passes in 2.3 % of cases."""


@dataclass(frozen=True)
class _Steps:
    """Settings of :meth:`~pyro_aevb.guides.base.AmortizedGuide.refine`, where they are described."""

    num_steps: int
    learning_rate: float
    num_particles: int
    chunk_size: int | None
    progress: bool
    given: Values


@dataclass
class _LiveOffsets:
    """Offsets of the rows that are being refined, whatever batch is asked for; none before.

    Attributes:
        values: By latent, ``[*batch, outputs]``.
    """

    values: Values = field(default_factory=dict)

    def __call__(self, args: Args, kwargs: Kwargs, index: Tensor | None) -> Values:
        """Return them."""
        return self.values


class _Refinement:
    """Offsets of refined rows, looked up by what a row holds.

    Args:
        model: The model, whose signature names the arguments.
        structure: Its structure.
        keys: What tells the refined rows from others; of equal rows the first counts.
        offsets: By latent, rows first.
        improvement: Nats that the bound of each row gained.
    """

    def __init__(
        self, model: PyroProgram, structure: Structure, keys: list[bytes], offsets: Values, improvement: PerRow
    ) -> None:
        self._model, self._structure = model, structure
        self._places = {key: place for place, key in reversed(list(enumerate(keys)))}
        self.improvement = improvement[[self._places[key] for key in keys]]
        self._offsets = {name: torch.cat([item, torch.zeros_like(item[:1])]) for name, item in offsets.items()}

    def __call__(self, args: Args, kwargs: Kwargs, index: Tensor | None) -> Values:
        """Return the offsets of a batch, 0 in rows that were not refined."""
        keys = row_keys(self._model, self._structure, args, kwargs)
        if index is not None and len(index) != len(keys):
            keys = [keys[row] for row in index.tolist()]
        places = [self._places.get(key, -1) for key in keys]  # -1 is the row of zeros behind the others
        if max(places, default=-1) < 0:
            return {}
        return {name: _rows_back(item[places], self._structure) for name, item in self._offsets.items()}


def _rows_first(offset: Tensor, structure: Structure) -> Tensor:
    """Bring ``[*batch, outputs]`` to ``[rows, ..., outputs]``."""
    return offset[None] if structure.data_dim is None else offset.movedim(structure.data_dim - 1, 0)


def _rows_back(offset: Tensor, structure: Structure) -> Tensor:
    """Bring ``[rows, ..., outputs]`` to ``[*batch, outputs]``."""
    return offset[0] if structure.data_dim is None else offset.movedim(0, structure.data_dim - 1)


def _check_own(built: Built) -> None:
    """Refuse models in which rows have no bound, or no variational parameters, of their own."""
    structure, refined = built.structure, set(built.order)
    if structure.data_plate in built.probe.drawn and built.rows is None:
        raise DataError(
            f"The data plate {structure.data_plate!r} draws rows of data that the model holds itself, and refined rows are told "
            f"apart by what tensor arguments hold along axis 0. Give the data as arguments."
        )
    if not refined:
        raise ModelError(
            f"No latent lies inside the data plate {structure.data_plate!r}, so rows have nothing to refine."
        )
    for name, site in structure.sites.items():
        inner = [frame for frame in site.frames if frame.name != structure.data_plate]
        drawn = [frame.name for frame in inner if frame.size != frame.full_size or frame.name in built.probe.drawn]
        if name in refined and drawn:
            raise ModelError(
                f"Latent {name!r} lies in plate {drawn[0]!r}, which holds other indices at each run, so that its entries have no "
                f"parameters of their own to refine. Let the data plate alone subsample.",
                site=name,
            )
        parents = built.dependencies.parents.get(name, frozenset())
        if not site.is_local and parents & refined:
            raise ModelError(
                f"Site {name!r} lies outside the data plate but depends on latents inside it, {sorted(parents & refined)}, so that "
                f"rows have no bound of their own to refine. Use data_plate=None.",
                site=name,
            )


class _Refiner:
    """Refines one chunk of rows after the other."""

    def __init__(self, guide: "RefinableGuide", rows: Rows, live: _LiveOffsets, steps: _Steps) -> None:
        self.rows, self.live, self.steps = rows, live, steps
        self.program, self.structure = rows.program, rows.structure
        self.widths = {name: guide.networks.of_locals.family(name).num_outputs for name in guide.built.order}
        self.like: Tensor = guide.networks.like
        total = (rows.count or rows.structure.rows) * steps.num_steps
        self.bar = tqdm(total=total, disable=not steps.progress, unit="row step", dynamic_ncols=True)

    def run(self) -> tuple[Values, PerRow]:
        """Return offsets, rows first, and improvements of all rows."""
        parts = []
        with self.bar:
            for args, kwargs, count in self.rows.chunks(
                self.steps.chunk_size, self.steps.num_particles, progress=False
            ):
                offsets, improvement = self._refine(args, kwargs, count)
                parts.append(({name: item[:count] for name, item in offsets.items()}, improvement[:count]))
        joined = {name: torch.cat([offsets[name] for offsets, _ in parts]) for name in self.widths}
        return joined, torch.cat([improvement for _, improvement in parts])

    def _refine(self, args: Args, kwargs: Kwargs, count: int) -> tuple[Values, PerRow]:
        """Refine one chunk: climb, then keep the rows that gained."""
        start = self._zeros(args, kwargs)
        end = self._climb(args, kwargs, start, count)
        improvement = self._judge(args, kwargs, start, end)
        kept = {}
        for name, item in end.items():
            offset = _rows_first(item, self.structure)
            kept[name] = torch.where((improvement > 0).reshape(-1, *(1,) * (offset.dim() - 1)), offset, 0.0)
        return kept, improvement

    def _zeros(self, args: Args, kwargs: Kwargs) -> Values:
        """Return zeros for every latent, of the batch shape that its site has in this chunk."""
        self.live.values = {}
        sites = self.program.sample_guide(args, kwargs, ParticleAxes())
        return {
            name: self.like.new_zeros((*sites[name].fns[0].batch_shape, width)) for name, width in self.widths.items()
        }

    def _climb(self, args: Args, kwargs: Kwargs, start: Values, count: int) -> Values:
        """Take the gradient steps; the learning rate falls to 0 in a line, which averages the noise of the last ones."""
        axes = self.program.axes(self.steps.num_particles, 1)
        offsets = {name: item.clone().requires_grad_() for name, item in start.items()}
        # short memory: the gradients of the first steps would hold back some hundred with Adam's own 1,000 steps
        optimizer = torch.optim.Adam(offsets.values(), lr=self.steps.learning_rate, betas=(0.8, 0.9))
        for step in range(self.steps.num_steps):
            optimizer.param_groups[0]["lr"] = self.steps.learning_rate * (1 - step / self.steps.num_steps)
            with torch.enable_grad():
                loss = -self._bounds(args, kwargs, axes, offsets).mean((0, 1)).sum()
            # not backward(), which would leave gradients in the parameters of model and guide
            gradients = torch.autograd.grad(loss, list(offsets.values()))
            for leaf, gradient in zip(offsets.values(), gradients, strict=True):
                leaf.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # a density that overflows says nothing
            optimizer.step()
            self.bar.update(count)
        return {name: item.detach() for name, item in offsets.items()}

    def _bounds(self, args: Args, kwargs: Kwargs, axes: ParticleAxes, offsets: Values) -> LocalWeights:
        """Draw each row's bound, ``[particles, 1, rows]``; where gradients are wanted, log q is taken at offsets detached.

        That leaves out the score of q, of expectation 0 (Roeder et al. 2017, arXiv 1703.09194): the noise of the gradient vanishes
        where q is the posterior, and few particles are enough.
        """
        self.live.values = offsets
        self.program.forget_indices()
        guide = self.program.sample_guide(args, kwargs, axes, values=self._globals(axes), keeps_noise=True)
        values = {name: site.value for name, site in guide.items()}
        model = self.program.score_model(args, kwargs, axes, values)
        if torch.is_grad_enabled():
            self.live.values = {name: item.detach() for name, item in offsets.items()}
            guide = self.program.rescore_guide(args, kwargs, axes, values, is_detached=False)
        return self.program.terms(model, guide, axes).log_weights().local

    def _globals(self, axes: ParticleAxes) -> Values:
        """Return the values of globals that are given, the same in each particle."""
        ranks, given = self.structure.ranks, self.steps.given.items()
        if axes.is_single:
            return {name: value.reshape(value.shape[value.dim() - ranks[name] :]) for name, value in given}
        return {name: value.expand(axes.num_particles, *value.shape[1:]) for name, value in given}

    def _judge(self, args: Args, kwargs: Kwargs, start: Values, end: Values) -> PerRow:
        """Return by how much fresh bounds under common noise are higher at the end, 0 where they are not for sure."""
        at_once = 4 * self.steps.num_particles  # no graph is kept, so that more draws fit than in a gradient step
        if self.steps.chunk_size is None:
            at_once = max(at_once, min(NUM_JUDGING_DRAWS, CHUNK_DRAWS // (batch_rows(args, kwargs) or 1)))
        axes, parts = self.program.axes(at_once, 1), []
        for _ in range(-(-NUM_JUDGING_DRAWS // at_once)):
            noise = random_state()
            with replayed_rng(noise):
                before = self._bounds(args, kwargs, axes, start)
            parts.append((self._bounds(args, kwargs, axes, end) - before)[:, 0].double())
        difference = torch.cat(parts)
        mean, error = difference.mean(0), difference.std(0) / len(difference) ** 0.5
        return torch.where(mean.isfinite() & (mean > SURE * error), mean, 0.0)


class RefinableGuide(AutoGuide):
    """Base of guides that can be refined: their latents' parameters are outputs of networks plus offsets.

    Attributes:
        networks: The guide's networks.
    """

    networks: Any
    _row_offsets: RowOffsets | None = None

    @property
    def built(self) -> Built:
        """What was read from the model."""
        raise NotImplementedError

    def build(self, *args: Any, **kwargs: Any) -> "RefinableGuide":
        """Read the model on a batch and make every parameter."""
        raise NotImplementedError

    def refine(
        self: _Guide,
        *batch: Any,
        num_steps: int = 100,
        learning_rate: float = 0.05,
        num_particles: int = 8,
        chunk_size: int | None = None,
        given: Mapping[str, Tensor] | None = None,
        seed: int | None = None,
        progress: bool = False,
        **covariates: Any,
    ) -> _Guide:
        r"""Refine the variational parameters of rows by gradient steps from where the encoder put them (semi-amortized).

        .. math:: \delta_n = \arg\max_\delta E_{q(z; f(x_n) + \delta)} [\log p(x_n, z) - \log q(z; f(x_n) + \delta)]

        Kim et al. (2018, arXiv 1802.02550), with offsets on the outputs of the networks in place of whole parameters: rows have
        optima of their own, reached by Adam over all rows at once. What is optimized is the SGVB bound with ``gradient="stl"``.
        Offsets are kept in rows whose bound, from 1,000 fresh draws under common noise, is higher by more than two standard
        errors; the others, and those whose bound is not finite, keep the encoder's output. A row that gained nothing is so
        kept in at most 2.3 % of cases.

        Globals are sampled from q at every step, unless they are given, and are not refined. Parameters of model and guide stay as
        they are, and modules run in eval mode. Refining a refined guide starts from the encoder again.

        Args:
            *batch: Rows, as positional arguments of the model.
            num_steps: Gradient steps.
            learning_rate: Adam's learning rate at the start, in units of the networks' outputs (the prior's, for normals); it falls
                to 0 in a line.
            num_particles: Draws of each row in a step.
            chunk_size: Rows refined at once; by default so many that some 50,000 draws are in memory.
            given: One value of each global, at which rows are refined.
            seed: Seed of the draws; the generators are left as they were.
            progress: Whether to show a progress bar.
            **covariates: The batch's keyword arguments.

        Returns:
            A guide that shares the networks of this one. It knows the refined rows by what their tensor arguments hold, in any
            batch and order; other rows get the encoder's output. :attr:`improvement` tells what each row gained.

        Raises:
            SettingError: If a number is out of range, a keyword unknown, or what is given is not one value of each global.
            DataError: If there are no rows, NaN reaches a density, or the arguments do not tell rows apart.
            ModelError: If no latent lies inside the data plate, or rows have no bound of their own.

        Example:
            >>> from pyro_aevb import AutoAmortizedNormal
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> x = torch.tensor([0.0, 1.0, 4.0])
            >>> refined = AutoAmortizedNormal(model).refine(x, num_steps=200, seed=0)
            >>> bool((refined.median(x)["z"] - x / 2).abs().max() < 0.05)  # the exact posterior's is x / 2
            True
            >>> bool((refined.improvement > 0).all())
            True
        """
        check_count("num_steps", num_steps)
        check_count("num_particles", num_particles)
        check_count("chunk_size", chunk_size, is_optional=True)
        check_covariates(covariates, RefinableGuide.refine)
        is_number = isinstance(learning_rate, int | float) and not isinstance(learning_rate, bool)
        if not is_number or not 0 < learning_rate < math.inf:
            raise SettingError(f"learning_rate must be a positive number, got {learning_rate!r}.")
        self.build(*batch, **covariates)
        structure = self.built.structure
        _check_own(self.built)
        keys = row_keys(self.model, structure, batch, covariates)
        live = _LiveOffsets()
        working = self._with_offsets(live)
        at = given_globals(structure, dict(given)) if given else Given(torch.Size(), {})
        if at.leading:
            raise SettingError(
                f"Rows are refined at one value of each global; the given ones have leading axes {list(at.leading)}. Refine at one "
                f"draw of them after the other."
            )
        steps = _Steps(num_steps, learning_rate, num_particles, chunk_size, progress, at.values)
        with inferring(seed, self.model, working):
            rows = Rows(self.model, working, batch, covariates, structure.data_plate)
            offsets, improvement = _Refiner(self, rows, live, steps).run()
        return self._with_offsets(_Refinement(self.model, structure, keys, offsets, improvement))

    def _with_offsets(self: _Guide, offsets: RowOffsets) -> _Guide:
        """Return a guide that shares everything with this one but the offsets."""
        other = copy.copy(self)
        other._row_offsets = offsets
        return other

    @property
    def is_refined(self) -> bool:
        """Whether rows that it was refined on have variational parameters of their own."""
        return isinstance(self._row_offsets, _Refinement)

    @property
    def improvement(self) -> PerRow:
        """Nats that each row's bound gained when the guide was refined, in the batch's order; 0 where the row stayed as it was.

        Estimated by the draws that chose the rows, so that gains near the noise read a little high.

        Raises:
            GuideError: If the guide is not a refined one.
        """
        if not isinstance(self._row_offsets, _Refinement):
            raise GuideError("The guide is not refined: improvement belongs to the guide that refine(*batch) returns.")
        return self._row_offsets.improvement

    def offsets(self, args: Args, kwargs: Kwargs, index: Tensor | None = None) -> Values:
        """Return what is added to the parameters of latents' families: rows' own variational parameters, none unless refined.

        Args:
            args: The batch, as positional arguments of the model.
            kwargs: The batch, as keyword arguments of the model.
            index: The rows of the batch that a subsampling data plate holds.

        Returns:
            ``{latent: [*batch, outputs]}``.
        """
        if self._row_offsets is None:
            return {}
        like: Any = self._modules["networks"]  # read as an attribute, it would be a second pyro.module statement
        return {name: item.to(like.like) for name, item in self._row_offsets(args, kwargs, index).items()}
