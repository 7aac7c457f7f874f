"""One optimisation step: loss, gradient, clipping, and what happens when they are not finite."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pyro_aevb.errors import NonFiniteError, ParameterError
from pyro_aevb.program.batch import explained
from pyro_aevb.program.importance import find_non_finite
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.training.data import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["OptimizerMaker", "Stepper", "default_optimizer"]

OptimizerMaker = Callable[[Iterable[nn.Parameter]], Optimizer]


class Stepper:
    """One optimisation step at a time, with the optimizer's state between them.

    Args:
        module: Model, guide and objective, built.
        optimizer: A callable of the parameters that returns an optimizer.
        clip_norm: Largest norm of the gradient over all parameters.
        fabric: Devices and processes; by default the device of the parameters.
        max_skipped: Steps in a row that may be skipped because loss or gradient is not finite.

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
        self.optimizer: Optimizer
        self.wrapped, self.optimizer = self.fabric.setup(_LossAndBound(module), optimizer(self.parameters))
        self.clip_norm = clip_norm
        self.max_skipped = max_skipped
        self.num_steps = 0
        self.num_skipped = 0
        self._skipped_in_a_row = 0

    def step(self, batch: Batch) -> float:
        """Take one step and return the bound in nats per row; NaN if the step was skipped.

        Raises:
            NonFiniteError: If too many steps in a row were skipped; parameters are those of the last good step.
        """
        objective = self.module.objective
        if hasattr(objective, "set_step"):
            objective.set_step(self.num_steps)
        buffers = [buffer.clone() for buffer in self.buffers]
        with explained("program", batch.args, batch.kwargs):
            loss, bound = self.wrapped(self._on_device(batch))
        self.optimizer.zero_grad()
        is_finite = bool(torch.isfinite(loss))
        if is_finite:
            self.fabric.backward(loss)
            is_finite = self._clip()
        if not is_finite:
            with torch.no_grad():
                for buffer, saved in zip(self.buffers, buffers, strict=True):
                    buffer.copy_(saved)  # a NaN would stay in BatchNorm's running statistics for good
            self._skip(batch)
            return float("nan")
        self.optimizer.step()
        self.num_steps += 1
        self._skipped_in_a_row = 0
        return float(bound)

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
        raise NonFiniteError(
            f"{self._skipped_in_a_row} steps in a row had a loss or gradient that is NaN or infinite. {what} The parameters are "
            f"those of the last good step.",
            site=site,
            num_skipped=self.num_skipped,
        )


def _default_fabric(device: torch.device) -> "Fabric":
    """Return a Fabric of one process on the device where the parameters are."""
    from lightning_fabric import Fabric

    devices: Any = 1 if device.index is None else [device.index]
    return Fabric(accelerator=device.type, devices=devices)


class _LossAndBound(nn.Module):
    """The module that Fabric wraps: its call returns the loss and the bound per row."""

    def __init__(self, module: ObjectiveModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the data set and the bound in nats per row."""
        return self.module.loss_and_bound(*batch.args, **batch.kwargs)


def default_optimizer(learning_rate: float) -> OptimizerMaker:
    """Return a maker of fused Adam (Kingma & Ba 2014, arXiv 1412.6980)."""
    return lambda parameters: Adam(parameters, lr=learning_rate, fused=True)


def _non_finite_site(module: ObjectiveModule, batch: Batch) -> NonFiniteError | None:
    """Name the first site of a batch whose log density is not finite, where there is one."""
    if module.structure is None:
        return None
    with module.running(), pyro.validation_enabled(False):
        return find_non_finite(module.model, module.guide, module.structure, *batch)
