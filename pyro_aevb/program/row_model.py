"""A model, read once, run on unconstrained coordinates of any batch of rows."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.program.agreement import check_separable
from pyro_aevb.program.compiled_rows import CompiledRows
from pyro_aevb.program.compiling import Compile
from pyro_aevb.program.coordinates import Layout, rows_first
from pyro_aevb.program.fixed_rank import Ranks, module_ranks
from pyro_aevb.program.parameters import detaching, evaluating, preserved_param_store, preserved_state
from pyro_aevb.program.particles import ParticleAxes, Records, can_vectorize, first_difference, run_program
from pyro_aevb.program.placing import Placing, Reading, Unmasked
from pyro_aevb.program.reach import find_modules, modules_below
from pyro_aevb.program.structure import read_structure

__all__ = ["Placed", "RowModel", "evaluating_only", "waves"]

T = TypeVar("T")


class Placed(NamedTuple):
    """What a run tells about rows at one u, or at drawn values.

    Attributes:
        u: ``[S, K, rows, D]``.
        values: Local latents, ``[S, K, rows, *inner plates, *event]``.
        jacobians: log|dz/du| by site, ``[S, K, rows]``; sites whose map is the identity lack one.
        log_probs: Log densities by local site, ``[S, K, rows]``: of latents without, of observed sites with their masks.
    """

    u: Tensor
    values: Values
    jacobians: Values
    log_probs: Values


@contextmanager
def evaluating_only(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Run programs as functions of u: eval mode, frozen parameters, no validation, and the param store left alone."""
    with ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(preserved_param_store())
        if any(module.training for module in modules_below(modules)):
            stack.enter_context(evaluating(*modules))
        if torch.is_grad_enabled():
            stack.enter_context(detaching(modules))
        yield


class RowModel:
    """A model and how its rows run.

    Args:
        model: The model.
        args: A batch of a few rows to read it on, as positional arguments.
        kwargs: The same, as keyword arguments.
        data_plate: As in :func:`~pyro_aevb.program.structure.read_structure`.
        compile: Whether evaluations with gradients are compiled.

    Attributes:
        evaluate: From u ``[S, K, rows, D]`` and rows to log prior and log likelihood ``[S, K, rows]``.
        structure: The model's structure.
        layout: The order of a row's coordinates.
        modules: Modules that the model reaches.
        batch: The batch that it was read on.
        dtype: Floating type of the local latents.
        device: Where they live.

    Raises:
        ModelError: If the model is not supported, or no latent belongs to rows.
    """

    def __init__(
        self,
        model: PyroProgram,
        args: Args,
        kwargs: Kwargs,
        data_plate: str | None,
        *,
        compile: Compile = False,  # noqa: A002  torch's own word
    ) -> None:
        self.model = model
        self.batch = (args, kwargs)
        self.modules = find_modules(model)
        self.structure = read_structure(model, args, kwargs, data_plate=data_plate)
        self.layout = Layout(self.structure)
        with preserved_state(self.modules), torch.no_grad():
            records = run_program(model, self.structure, ParticleAxes(), args, kwargs)
        check_separable("a row's log density", records, {})
        local = [site.log_prob for site in records.values() if site.is_local]
        values = [records[name].value for name in self.layout.slots] or local
        self.dtype = functools.reduce(torch.promote_types, (value.dtype for value in values))
        self.device = values[0].device
        self._dropped = [site.name for site in self.structure.select("imputed")]
        self._ranks: Ranks | None = None
        self._is_vectorized: dict[tuple[bool, bool], bool] = {}
        self.evaluate = CompiledRows(self._weigh, self.modules, compile)

    def _weigh(self, u: Tensor, args: Args, kwargs: Kwargs, given: Values) -> tuple[Tensor, Tensor]:
        return self.sums(self.place(u, args, kwargs, given))

    def sums(self, placed: Placed) -> tuple[Tensor, Tensor]:
        """Sum log prior, with the Jacobian, and log likelihood over sites."""
        latents = [density for name, density in placed.log_probs.items() if name in self.layout.slots]
        others = [density for name, density in placed.log_probs.items() if name not in self.layout.slots]
        zero = placed.u.new_zeros(placed.u.shape[:3])
        return sum([*latents, *placed.jacobians.values()], zero), sum(others, zero)

    def place(self, u: Tensor, args: Args, kwargs: Kwargs, given: Values) -> Placed:
        """Run the model at u.

        Args:
            u: ``[S, K, rows, D]``.
            args: The rows, as positional arguments.
            kwargs: The rows, as keyword arguments.
            given: Values of globals in plates, ``[S, 1, *plates, *event]``.
        """

        def once(parts: Values, axes: ParticleAxes) -> Placed:
            placing = Placing(self.layout, parts[""])
            globals_ = {name: parts[name] for name in given}
            records = self.run((placing,), args, kwargs, globals_, axes)
            return self._placed(records, parts[""], placing.log_jacobians)

        return self._each(once, {"": u, **given}, self.axes(u.shape[0], u.shape[1]))

    def read(self, values: Values, args: Args, kwargs: Kwargs, given: Values) -> Placed:
        """Run the model at values of its local latents, in plates, and read their u off."""

        def once(parts: Values, axes: ParticleAxes) -> Placed:
            reading = Reading(self.layout)
            records = self.run((reading,), args, kwargs, parts, axes)
            return self._placed(records, self._joined(reading, records), reading.log_jacobians)

        first = next(iter(values.values()))
        return self._each(once, values | given, self.axes(first.shape[0], first.shape[1]))

    def draw(self, num_draws: int, args: Args, kwargs: Kwargs, given: Values, num_globals: int) -> Placed:
        """Draw local latents from the prior, ``num_draws`` for each value of the globals."""

        def once(parts: Values, axes: ParticleAxes) -> Placed:
            reading = Reading(self.layout)
            globals_ = {name: parts[name] for name in given}
            records = self.run((reading,), args, kwargs, globals_, axes)
            return self._placed(records, self._joined(reading, records), reading.log_jacobians)

        template = torch.empty(num_globals, num_draws)
        return self._each(once, {"": template, **given}, self.axes(num_globals, num_draws))

    def run(
        self,
        handlers: tuple[AbstractContextManager[Any], ...],
        args: Args,
        kwargs: Kwargs,
        values: Values,
        axes: ParticleAxes,
    ) -> Records:
        """Run the model once with values in plates, latents unmasked."""
        with ExitStack() as stack:
            stack.enter_context(evaluating_only(self.modules))
            for handler in handlers:
                stack.enter_context(handler)
            stack.enter_context(Unmasked(self.layout.slots, self._dropped, self.device))
            own = {name: self._as_run(value, name, axes) for name, value in values.items()}
            return run_program(self.model, self.structure, axes, args, kwargs, values=own, ranks=self._ranks)

    def _as_run(self, value: Tensor, name: str, axes: ParticleAxes) -> Tensor:
        """Give a value in plates the rank that it has in the run."""
        return value.reshape(value.shape[value.dim() - self.structure.ranks[name] :]) if axes.is_single else value

    def _joined(self, reading: Reading, records: Records) -> Tensor:
        """Return the coordinates that were read, with the axes [S, K] where the run had none."""
        slots, nesting = self.layout.slots, self.structure.max_plate_nesting
        ranks = {name: 2 + nesting + len(slots[name].event) for name in slots}
        parts = {
            name: part.reshape((1,) * (ranks[name] - part.dim()) + part.shape) for name, part in reading.parts.items()
        }
        return self.layout.join(parts, next(site.log_prob for site in records.values() if site.is_local))

    def _placed(self, records: Records, u: Tensor, jacobians: Values) -> Placed:
        structure, sites = self.structure, self.structure.sites
        return Placed(
            u,
            {
                name: rows_first(records[name].value, sites[name], structure, len(sites[name].event_shape))
                for name in self.layout.slots
            },
            {name: records[name].reduce([jacobian]) for name, jacobian in jacobians.items()},
            {name: site.log_prob for name, site in records.items() if site.is_local},
        )

    def _each(self, once: Callable[[Values, ParticleAxes], T], parts: Values, axes: ParticleAxes) -> T:
        """Run under particle plates, or, where the model does not broadcast, particle by particle."""
        if axes.is_single or axes.is_vectorized:
            return once(parts, axes)
        runs = [
            [once(_particle(parts, s, k), ParticleAxes()) for k in range(axes.num_importance_samples)]
            for s in range(axes.num_particles)
        ]
        lines = [tree_map(lambda *items: torch.cat(items, 1), *line) for line in runs]
        return tree_map(lambda *items: torch.cat(items, 0), *lines)

    def axes(self, num_particles: int, num_importance_samples: int) -> ParticleAxes:
        """Choose how to run particles, by trying once on the batch that the model was read on."""
        key = (num_particles > 1, num_importance_samples > 1)
        if any(key) and key not in self._is_vectorized:
            self._is_vectorized[key] = self._try_vectorizing(key)
        return ParticleAxes(num_particles, num_importance_samples, self._is_vectorized.get(key, True))

    def _try_vectorizing(self, key: tuple[bool, bool]) -> bool:
        """Compare a run under particle plates with runs without, particle by particle."""
        args, kwargs = self.batch
        # a size that differs from the rows', or indexing by rows would pass for indexing by particles
        size = 3 if self.structure.rows == 2 else 2
        shape = (size if key[0] else 1, size if key[1] else 1)
        with preserved_state(self.modules), torch.no_grad():
            self._ranks = module_ranks(self.modules, lambda: poutine.trace(self.model).get_trace(*args, **kwargs))
            given = self.draw_globals(shape[0])
            u = waves(*shape, self.structure.rows, self.layout.dim).to(self.device, self.dtype)
            self._is_vectorized[key] = False
            looped = self.place(u, args, kwargs, given)
            self._is_vectorized[key] = True
            return can_vectorize(
                lambda: first_difference(self.place(u, args, kwargs, given).log_probs, looped.log_probs)
            )

    def draw_globals(self, count: int) -> Values:
        """Draw the model's globals from their prior, in plates, on the batch that the model was read on."""
        structure = self.structure
        runs = [run_program(self.model, structure, ParticleAxes(), *self.batch) for _ in range(count)]
        values: Values = {}
        for site in structure.select("latent", is_local=False):
            rank = 2 + structure.max_plate_nesting + len(site.event_shape)
            drawn = [records[site.name].value for records in runs]
            values[site.name] = torch.cat([item.reshape((1,) * (rank - item.dim()) + item.shape) for item in drawn])
        return values


def _particle(parts: Values, s: int, k: int) -> Values:
    """Take one particle out of tensors ``[S, K or 1, ...]``."""
    return {
        name: part[s : s + 1, k : k + 1] if part.shape[1] > 1 else part[s : s + 1, :1] for name, part in parts.items()
    }


def waves(*shape: int) -> Tensor:
    """Return numbers between -0.7 and 0.7 that differ, to try a model at, without drawing any."""
    return 0.7 * torch.arange(1.0, 1.0 + math.prod(shape)).sin().reshape(shape)
