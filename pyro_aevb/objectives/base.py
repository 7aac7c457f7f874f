"""What every objective is: a reduction of log-weights with an estimator of its gradient, and a ``pyro.infer.ELBO``."""

import copy
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_aevb._types import Args, Kwargs, PyroProgram
from pyro_aevb.errors import SettingError
from pyro_aevb.program.agreement import check_gradient, check_points
from pyro_aevb.program.importance import ImportanceProgram
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.parameters import preserved_state
from pyro_aevb.program.particles import ParticleAxes
from pyro_aevb.program.settings import check_count
from pyro_aevb.weights import Bounds

__all__ = ["Evaluation", "Objective", "check_choice", "check_estimator", "with_value"]


class Evaluation(NamedTuple):
    """Loss and bounds from one draw.

    Attributes:
        loss: What training minimizes, scalar, nats over the whole data set; its gradient is the estimator's.
        bounds: The bound per row and outside the rows, nats, unscaled, detached.
    """

    loss: Tensor
    bounds: Bounds


def with_value(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return a scalar with the value of one tensor and the gradient of another."""
    return value.detach() + surrogate - surrogate.detach()


class Objective(ELBO):
    r"""A lower bound on the log evidence, with an estimator of its gradient.

    Subclasses turn :class:`~pyro_aevb.weights.Terms` into a bound and a loss. The loss is

        loss = -(global + scale * sum over rows of local)

    in nats, a sum over the whole data set, as everywhere in Pyro. An objective works under ``pyro.infer.SVI``, as a module
    ``objective(model, guide)`` whose call is the loss, and under :func:`pyro_aevb.fit`. It carries no state of a model: one
    objective serves several models in turn.

    Args:
        num_particles: S, draws averaged outside the logarithm.
        data_plate: Name of the plate whose indices are rows; ``"auto"`` for the plate called "data", else the only outermost
            plate of the batch's rows; ``None`` to treat the whole model as one row.

    Raises:
        SettingError: If a number of samples is below 1.
    """

    def __init__(self, num_particles: int = 1, *, data_plate: str | None = "auto") -> None:
        check_count("num_particles", num_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.data_plate = data_plate
        self.state: nn.Module = nn.Module()
        self._prepared: tuple[Any, ImportanceProgram] | None = None

    def bounds(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> Bounds:
        """Estimate the bound per row, without gradients.

        Returns:
            Bounds with ``local`` of shape ``[rows]`` and scalar ``global_``, nats, unscaled. Unbiased for the objective's bound;
            a stochastic lower bound on log p(x). Cost: S * K evaluations of model and guide per row.
        """
        with torch.no_grad():
            return self._bounds(self.read(model, guide, *args, **kwargs), args, kwargs)

    def evaluate(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> Evaluation:
        """Estimate loss and bounds from one draw."""
        return self._evaluate(self.read(model, guide, *args, **kwargs), args, kwargs)

    def read(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> ImportanceProgram:
        """Read model and guide on a batch, once for each pair, and check that this objective can be used with them."""
        key = (model, guide, len(args), tuple(sorted(kwargs)), self.data_plate)
        if self._prepared is None or self._prepared[0] != key:
            # with gradients also where only a bound is asked for: what is trained is read off them
            with torch.enable_grad():
                program = ImportanceProgram(model, guide, args, kwargs, data_plate=self.data_plate)
                self._prepare(program, args, kwargs)
            self._prepared = (key, program)
        return self._prepared[1]

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Constructor arguments as JSON values; a schedule is left out."""

    @abstractmethod
    def _prepare(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> None:
        """Check and plan once for a pair of model and guide."""

    @abstractmethod
    def _evaluate(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> Evaluation:
        """Draw once and return loss and bounds."""

    def _bounds(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> Bounds:
        """Draw once and return the bounds; what only a loss needs may be left out."""
        return self._evaluate(program, args, kwargs).bounds

    def with_data_plate(self, data_plate: str | None) -> "Objective":
        """Return this objective for another data plate.

        Raises:
            SettingError: If it was made for yet another one.
        """
        if data_plate in ("auto", self.data_plate):
            return self
        if self.data_plate != "auto":
            raise SettingError(
                f"The objective has data_plate={self.data_plate!r}, the wrapper {data_plate!r}. Give it once."
            )
        changed = copy.copy(self)
        changed.data_plate, changed._prepared = data_plate, None
        return changed

    def __repr__(self) -> str:
        """Return the constructor's call."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    def set_step(self, step: int) -> None:
        """Tell the objective the number of optimisation steps done, for schedules; :func:`pyro_aevb.fit` does."""

    def loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number, without gradients."""
        with torch.no_grad():
            return self.evaluate(model, guide, *args, **kwargs).loss.item()

    def differentiable_loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss as a scalar tensor whose gradient is the estimator's."""
        return self.evaluate(model, guide, *args, **kwargs).loss

    def loss_and_grads(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Add the estimator's gradient to every parameter's ``grad`` and return the loss as a number."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def __call__(self, model: PyroProgram, guide: PyroProgram) -> ObjectiveModule:  # type: ignore[override]
        """Return model, guide and objective as one module whose call is the loss."""
        return ObjectiveModule(model, guide, self, data_plate=self.data_plate)

    def _get_trace(self, model: PyroProgram, guide: PyroProgram, args: Args, kwargs: Kwargs) -> tuple[Trace, Trace]:
        """Return traces of one run as Pyro's ELBO asks for them."""
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)


def check_estimator(gradient: str, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> None:
    """Refuse a guide that an estimator of the gradient is wrong for."""
    check_gradient(gradient, program.guide_sites)
    if gradient == "reparam":
        return
    values = {name: site.value.detach() for name, site in program.guide_sites.items()}
    with preserved_state(program.modules):
        fixed = program.sample_guide(args, kwargs, ParticleAxes(), values=values)
    check_points(gradient, fixed)


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a name that is not among the known ones, and list these."""
    if value not in known:
        raise SettingError(f"Unknown {name} {value!r}; known are {', '.join(map(repr, known))}.")
