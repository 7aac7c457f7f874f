"""Draws of an estimator's gradient: their mean, their variance, what one costs, and whose parameters they belong to."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pyro_aevb._types import Args, Kwargs
from pyro_aevb.errors import NonFiniteError, ParameterError
from pyro_aevb.objectives.base import Objective
from pyro_aevb.objectives.sgvb import SGVB, KLPlan
from pyro_aevb.program.importance import ImportanceProgram, find_non_finite
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.parameters import Program
from pyro_aevb.program.particles import ParticleAxes, Records

__all__ = ["GradientMoments", "GradientSource"]


@dataclass(frozen=True)
class GradientMoments:
    """Moments of independent gradients of the loss, per parameter, in float64.

    Attributes:
        mean: Their mean.
        variance: Their variance.
        count: How many there are.
        seconds: Median time of one.
    """

    mean: Float[Tensor, " parameters"]
    variance: Float[Tensor, " parameters"]
    count: int
    seconds: float

    @property
    def squared_error(self) -> Float[Tensor, " parameters"]:
        """Squared standard error of the mean."""
        return self.variance / self.count


class GradientSource:
    """A model, its guide and a batch, from which objectives draw gradients with respect to one set of parameters.

    Values of ``pyro.param`` statements are those of the global param store, where it holds them. Made inside
    ``program.rows.inferring``.

    Args:
        module: Model and guide, with any objective; built here.
        args: The batch, as positional arguments.
        kwargs: The batch, as keyword arguments.

    Raises:
        ParameterError: If no parameter is trained.
        ModelError: If the model is not supported.
        GuideError: If the guide does not fit the model.
    """

    def __init__(self, module: ObjectiveModule, args: Args, kwargs: Kwargs) -> None:
        self.module, self.args, self.kwargs = module.build(*args, **kwargs), args, kwargs
        _take_stored(module.program)
        self.parameters = {
            name: parameter for name, parameter in module.program.named_parameters() if parameter.requires_grad
        }
        if not self.parameters:
            raise ParameterError(
                "Neither model nor guide has a parameter that requires a gradient. Give a guide with parameters, or make them "
                "nn.Parameter or pyro.param."
            )
        users = self._find_users()
        self.parameters = {name: item for name, item in self.parameters.items() if users.get(name)}
        self._users = users

    def groups(self, *, by_module: bool) -> dict[str, Int[Tensor, " parameters"]]:
        """Return the places of each group's parameters in a gradient: by program, and by module on request.

        Args:
            by_module: Whether to add a group for each module that holds parameters.
        """
        groups: dict[str, list[Tensor]] = {}
        start = 0
        for name, parameter in self.parameters.items():
            places = torch.arange(start, start + parameter.numel())
            start += parameter.numel()
            groups.setdefault(self._users[name], []).append(places)
            if by_module:
                groups.setdefault(f"{self._users[name]}: {_owner(name)}", []).append(places)
        return {name: torch.cat(groups[name]) for name in sorted(groups)}

    def prepare(self, objective: Objective) -> None:
        """Draw one gradient, so that an objective which does not apply says so.

        Raises:
            SettingError: If it can't be used with this pair.
            GuideError: If it is wrong for this guide.
            ModelError: If it is wrong for this model.
        """
        self._draw(objective)

    def explain(self, objective: SGVB) -> KLPlan:
        """Say for each latent site whether an objective takes the closed-form KL."""
        with torch.enable_grad(), self.module.running():
            return objective.explain(self.module.model, self.module.guide, *self.args, **self.kwargs)

    def draw(self, objective: Objective, count: int, advance: Callable[[], None]) -> GradientMoments:
        """Draw independent gradients of the loss and keep their moments.

        Args:
            objective: The estimator.
            count: How many, at least 2.
            advance: Called after each.

        Raises:
            NonFiniteError: If one is NaN or infinite.
        """
        mean, squares, seconds = torch.zeros(()), torch.zeros(()), []
        for number in range(1, count + 1):
            start = time.perf_counter()
            gradient = self._draw(objective)
            seconds.append(time.perf_counter() - start)
            self._check(gradient, objective)
            step = gradient.double() - mean  # Welford's recurrence: no difference of large sums
            mean = mean + step / number
            squares = squares + step * (gradient.double() - mean)
            advance()
        return GradientMoments(mean, squares / (count - 1), count, sorted(seconds)[count // 2])

    def _draw(self, objective: Objective) -> Tensor:
        """Return one gradient of the loss, flat."""
        parameters = list(self.parameters.values())
        with torch.enable_grad(), self.module.running():
            loss = objective.differentiable_loss(self.module.model, self.module.guide, *self.args, **self.kwargs)
            return _flat(loss, parameters)

    def _check(self, gradient: Tensor, objective: Objective) -> None:
        """Refuse NaN and infinity, and name the site."""
        if gradient.isfinite().all():
            return
        structure: Any = self.module.structure
        with self.module.running():
            found = find_non_finite(self.module.model, self.module.guide, structure, self.args, dict(self.kwargs))
        site = found.site if found else None
        raise NonFiniteError(
            f"A gradient of {objective!r} is NaN or infinite"
            + (f"; the log density at site {site!r} is not finite." if site else ".")
            + " Look at the data and the parameters that reach it.",
            site=site,
        )

    def _find_users(self) -> dict[str, str]:
        """Say of each parameter whether log q, log p given z, both or neither depend on it."""
        module, axes = self.module, ParticleAxes()
        with torch.enable_grad(), module.running():
            program = ImportanceProgram(
                module.model, module.guide, self.args, self.kwargs, data_plate=module.data_plate
            )
            guide = program.sample_guide(self.args, self.kwargs, axes)
            values = {name: site.value.detach() for name, site in guide.items()}
            model = program.score_model(self.args, self.kwargs, axes, values)
            in_guide, in_model = (self._reached(records) for records in (guide, model))
        users = {}
        for name in self.parameters:
            users[name] = " and ".join(
                side for side, names in (("guide", in_guide), ("model", in_model)) if name in names
            )
        return users

    def _reached(self, records: Records) -> set[str]:
        """Name the parameters on which a program's densities or draws depend."""
        tensors = [item.sum() for site in records.values() for item in (site.log_prob, site.value)]
        total = sum((item for item in tensors if item.requires_grad), torch.zeros(()))
        if not total.requires_grad:
            return set()
        found = torch.autograd.grad(total, list(self.parameters.values()), allow_unused=True)
        return {name for name, gradient in zip(self.parameters, found, strict=True) if gradient is not None}


def _flat(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Differentiate a loss; a parameter that it does not depend on has gradient 0."""
    if not loss.requires_grad:
        return torch.cat([torch.zeros_like(item).flatten() for item in parameters])
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().flatten() for p, g in pairs])


def _owner(name: str) -> str:
    """Return the module that holds a parameter, by its name within model or guide."""
    parts = name.split(".")
    if parts[0] == "parameters_by_name":
        return "pyro.param"
    return ".".join(parts[2:-1]) or "itself"  # "reached", its number, the path, the parameter


def _take_stored(program: Program) -> None:
    """Let ``pyro.param`` statements have the values that training left in the global param store."""
    store = pyro.get_param_store()
    own = dict(program.named_parameters())
    with torch.no_grad():
        for name in program.pyro_params():
            if name in store:
                stored: Any = store[name]
                own[Program.key(name)].copy_(stored.unconstrained())
