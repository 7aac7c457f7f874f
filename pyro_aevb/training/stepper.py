"""One optimisation step at a time: in one graph or in parts, and what happens when loss or gradient is not finite."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pyro_aevb.errors import NonFiniteError, ParameterError, SettingError
from pyro_aevb.program.batch import explained
from pyro_aevb.program.importance import find_non_finite
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.processes import Processes
from pyro_aevb.program.supports import BatchSupports
from pyro_aevb.training.data import Batch
from pyro_aevb.training.sharding import ShardedBatch
from pyro_aevb.training.staged import StagedLoss, Staging
from pyro_aevb.training.whole_step import WholeStep

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["OptimizerMaker", "Stepper", "default_optimizer", "load_optimizer"]

OptimizerMaker = Callable[[Iterable[nn.Parameter]], Optimizer]


class Stepper:
    """One optimisation step at a time, with the optimizer's state between them.

    Args:
        module: Model, guide and objective, built.
        optimizer: A callable of the parameters that returns an optimizer.
        clip_norm: Largest norm of the gradient over all parameters.
        fabric: Devices and processes; by default the device of the parameters.
        max_skipped: Steps in a row that may be skipped because loss or gradient is not finite.
        staging: What is recorded and compiled at the first step; by default nothing.

    Attributes:
        check_every: Steps after which a recorded run is compared with an eager one again.
        processes: The processes that step together: parameters are the same in all of them after each step.
        checks_supports: Whether each batch is held against the supports of its likelihoods; not needed where all rows were.
        wants_stop: Tells whether this process wants to stop.
        must_stop: Whether any process wanted to at the last step: the same in all of them.

    Raises:
        ParameterError: If there is nothing to train.
    """

    def __init__(
        self,
        module: ObjectiveModule,
        optimizer: OptimizerMaker,
        *,
        clip_norm: float | None = None,
        fabric: "Fabric | None" = None,
        max_skipped: int = 10,
        staging: Staging | None = None,
    ) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ParameterError(
                "Model and guide have no parameters to train. Register networks with pyro.module, make them attributes of the "
                "model's or the guide's nn.Module, or use pyro.param."
            )
        self.module = module
        self.buffers = list(module.buffers())
        self.fabric = fabric or _default_fabric(self.parameters[0].device)
        self.processes = Processes(self.fabric)
        self.checks_supports = True
        self._supports = None if module.structure is None else BatchSupports(module.model, module.structure)
        self.wants_stop: Callable[[], bool] = lambda: False
        self.must_stop = False
        self.optimizer: Optimizer
        self.loss = StagedLoss(module)
        plain = optimizer(self.parameters)
        with self.processes.watching():
            self.wrapped, self.optimizer = self.fabric.setup(self.loss, plain)
        self.check_every = 100
        self.clip_norm = clip_norm
        self.max_skipped = max_skipped
        self.num_steps = 0
        self.num_skipped = 0
        self._skipped_in_a_row = 0
        self.staging = staging or Staging(compile=False)
        precision = self.fabric._precision.precision
        if self.staging.is_pending and precision != "32-true":
            self.staging.decision = f"eager: Fabric converts to precision {precision!r} step by step"
        self._plain = plain if self.fabric.world_size == 1 else None
        self._whole: WholeStep | None = None
        self._num_whole = 0
        self._num_unchecked = 0
        self._places = _places(self.parameters)

    def step(self, batch: Batch) -> float:
        """Take one step and return the bound in nats per row; NaN if the step was skipped.

        Of a batch that processes share, each gives its own part, and the bound is that of the whole batch.

        Raises:
            DataError: If data lie outside the support of their likelihood; parameters are those of the last step.
            NonFiniteError: If too many steps in a row were skipped; parameters are those of the last good step.
        """
        objective = self.module.objective
        if hasattr(objective, "set_step"):
            objective.set_step(self.num_steps)
        if not isinstance(batch, ShardedBatch):
            return self._step(batch)
        with self.module.sharing(batch.shard):
            return self._step(batch)

    def _step(self, batch: Batch) -> float:
        """Stage and check where it is time to, take a step, and count it."""
        batch = self._on_device(batch)
        if self.checks_supports and self._supports is not None:
            with self.module.running():
                self._supports.check(*batch)
        if self.staging.waits_for(batch):
            self._whole = self.staging.stage(self.loss, self._plain, batch, self.clip_norm)
            # a learning-rate schedule looks for this, and warns that it came before the first step
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        elif self.staging.is_outlived(self.loss, batch):
            self.finish()
            self._whole = self.staging.renew(self.loss, self._plain, batch, self.clip_norm, self._whole)
        self._num_unchecked += 1
        if self._num_unchecked > self.check_every:
            self._check(batch)
        bound = self._whole_step(batch) if self._whole is not None else self._parted_step(batch)
        if self.processes.count == 1:
            self.must_stop = self.wants_stop()
        if bound is None:
            self._skip(batch)
            return float("nan")
        self.num_steps += 1
        self._skipped_in_a_row = 0
        return bound

    def expect_change(self) -> None:
        """Get ready for code of the user: it may read the optimizer, and change what the recorded run has to be compared in."""
        self.finish()
        self._num_unchecked = self.check_every

    def _check(self, batch: Batch) -> None:
        """Compare on a batch that the recorded run takes; any other waits."""
        whole, loss = self._whole, self.loss
        if not (loss.holds and (loss.takes(*batch) if whole is None else whole.takes(*batch))):
            return
        self._num_unchecked = 0
        with explained("program", batch.args, batch.kwargs):
            is_stale = self.staging.is_stale(loss, batch)
        if is_stale:
            self.finish()
            self._whole = None

    def _whole_step(self, batch: Batch) -> float | None:
        """Take a step in one graph, or in parts where that is not what it was recorded for; ``None`` if it was skipped."""
        whole: Any = self._whole
        if not (self.loss.holds and whole.takes(*batch)):
            whole.leave()
            return self._parted_step(batch)
        self._num_whole += 1
        return whole(*batch)

    def _parted_step(self, batch: Batch) -> float | None:
        """Take loss, gradient and the optimizer's step one after the other; return the bound, ``None`` if it was skipped."""
        buffers = [buffer.clone() for buffer in self.buffers]
        with explained("program", batch.args, batch.kwargs), self.processes.watching():
            loss, bound = self.wrapped(*batch.args, **batch.kwargs)
        self.optimizer.zero_grad()
        self._drop_other_gradients()
        is_finite, bound, have_moved = self._agree(loss, bound, buffers)
        if is_finite:
            with self.processes.watching():
                self.fabric.backward(loss)
            self._check_reduced()
            is_finite = self._clip()
        if not is_finite:
            with torch.no_grad():
                for buffer, saved in zip(self.buffers, buffers, strict=True):
                    buffer.copy_(saved)  # a NaN would stay in BatchNorm's running statistics for good
            return None
        self._follow_parameters()
        self.optimizer.step()
        if have_moved:
            self.processes.follow_first(self.buffers)
        return float(bound)

    def _follow_parameters(self) -> None:
        """Give the optimizer's state the type and device of parameters that were converted or moved since the last step."""
        if (places := _places(self.parameters)) != self._places:
            self._places, optimizer = places, _plain(self.optimizer)
            optimizer.load_state_dict(optimizer.state_dict())  # converts what it loads

    def _drop_other_gradients(self) -> None:
        """Drop gradients of parameters that are not the optimizer's, which would add up from step to step."""
        own = {id(item) for group in self.optimizer.param_groups for item in group["params"]}
        for parameter in self.parameters:
            if id(parameter) not in own:
                parameter.grad = None

    def _agree(self, loss: Tensor, bound: Tensor, buffers: list[Tensor]) -> tuple[bool, Tensor | float, bool]:
        """Tell whether all processes' losses are finite, their mean bound, and whether any's buffers moved.

        Also ask whether any wants to stop.
        """
        is_finite, count = bool(torch.isfinite(loss)), self.processes.count
        if count == 1:
            return is_finite, bound, False
        have_moved = not all(torch.equal(now, before) for now, before in zip(self.buffers, buffers, strict=True))
        num_bad, total, num_stopping, num_moved = self.processes.total(
            not is_finite, float(bound), self.wants_stop(), have_moved
        )
        self.must_stop = num_stopping > 0
        return num_bad == 0, total / count, num_moved > 0

    def _check_reduced(self) -> None:
        """Refuse parameters without a gradient, whose processes wait for each other in vain or go apart."""
        reducer = getattr(self.wrapped, "_forward_module", None)
        if getattr(reducer, "find_unused_parameters", True) or all(item.grad is not None for item in self.parameters):
            return
        names = [name for name, item in self.module.named_parameters() if item.requires_grad and item.grad is None]
        raise SettingError(
            f"Parameters {names[:5]} have no gradient, and processes wait for those of all parameters. Remove or freeze them "
            f"(requires_grad_(False)), or use Fabric(strategy='ddp_find_unused_parameters_true')."
        )

    @property
    def execution(self) -> str:
        """How steps ran, and why."""
        counts = f", {self._num_whole:,} of {self.num_steps + self.num_skipped:,} steps" if self._num_whole else ""
        return self.staging.decision + counts

    @property
    def optimizer_name(self) -> str:
        """The optimizer's class."""
        return type(_plain(self.optimizer)).__name__

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on beside parameters and buffers."""
        self.finish()
        return {
            "optimizer": _plain(self.optimizer).state_dict(),
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "num_whole": self._num_whole,
            "decision": self.staging.decision,
            "recorded_on": self.staging.recorded_on,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state, before the first step; what was decided about compiling then holds now."""
        load_optimizer(_plain(self.optimizer), state["optimizer"])
        self.num_steps, self.num_skipped = state["num_steps"], state["num_skipped"]
        self._skipped_in_a_row, self._num_whole = state["skipped_in_a_row"], state["num_whole"]
        self.staging.decide_again(state["decision"], state["recorded_on"])

    def finish(self) -> None:
        """Leave the optimizer as if it had taken every step itself."""
        if self._whole is not None:
            self._whole.leave()

    def _on_device(self, batch: Batch) -> Batch:
        """Move a batch, unless it is where the parameters are (Fabric looks through every collection for it)."""
        device = self.parameters[0].device
        tensors = [item for item in (*batch.args, *batch.kwargs.values()) if isinstance(item, Tensor)]
        return batch if all(item.device == device for item in tensors) else self.fabric.to_device(batch)

    def _clip(self) -> bool:
        """Clip the gradient and tell whether it is finite."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        return bool(torch.isfinite(norm))

    def _skip(self, batch: Batch) -> None:
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row <= self.max_skipped:
            return
        found = _non_finite_site(self.module, self.fabric.to_device(batch))
        site = found.site if found else None
        what = (
            str(found)
            if found
            else "Every density is finite, so it is the gradient that is not: look for sqrt or log of 0."
        )
        if not found and self.processes.count > 1:
            what = "Every density of this process's rows is finite: see the other processes' errors, or the gradient is not."
        raise NonFiniteError(
            f"{self._skipped_in_a_row} steps in a row had a loss or gradient that is NaN or infinite. {what} The parameters are "
            f"those of the last good step.",
            site=site,
            num_skipped=self.num_skipped,
        )


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer's state, with the strides of its parameters: fused Adam goes through the memory of both side by side.

    Raises:
        SettingError: If it is that of other parameters.
    """
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise SettingError(
            f"The saved state of the optimizer is that of other parameters: {error}. Freeze (requires_grad_) and group the "
            f"same ones as then."
        ) from error
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_like = isinstance(value, Tensor) and value.shape == parameter.shape
            if is_like and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _places(parameters: list[nn.Parameter]) -> list[tuple[torch.dtype, torch.device]]:
    return [(parameter.dtype, parameter.device) for parameter in parameters]


def _plain(optimizer: Any) -> Optimizer:
    """Return the optimizer that Fabric wraps."""
    return getattr(optimizer, "optimizer", optimizer)


def _default_fabric(device: torch.device) -> "Fabric":
    """Return a Fabric of one process on the device where the parameters are."""
    from lightning_fabric import Fabric

    devices: Any = 1 if device.index is None else [device.index]
    return Fabric(accelerator=device.type, devices=devices)


def default_optimizer(learning_rate: float) -> OptimizerMaker:
    """Return a maker of fused Adam (Kingma & Ba 2014, arXiv 1412.6980)."""
    return lambda parameters: Adam(parameters, lr=learning_rate, fused=True)


def _non_finite_site(module: ObjectiveModule, batch: Batch) -> NonFiniteError | None:
    """Name the first site of a batch whose log density is not finite, where there is one."""
    if module.structure is None:
        return None
    with module.running(), pyro.validation_enabled(False):
        return find_non_finite(module.model, module.guide, module.structure, *batch)
