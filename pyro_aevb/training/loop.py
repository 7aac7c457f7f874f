"""Fit model and guide to data: Algorithm 1 of arXiv 1312.6114 on Lightning Fabric's devices."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from pyro_aevb._types import PyroProgram
from pyro_aevb.errors import AEVBWarning, SettingError, warn_user
from pyro_aevb.program.compiling import Compile, check_compile
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.settings import check_count, check_settings
from pyro_aevb.randomness import seeded
from pyro_aevb.training.data import BatchSource, as_source
from pyro_aevb.training.preparation import prepare
from pyro_aevb.training.staged import Staging
from pyro_aevb.training.stepper import OptimizerMaker, Stepper, default_optimizer

if TYPE_CHECKING:
    import pandas as pd
    from lightning_fabric import Fabric

__all__ = ["EpochEnd", "FitResult", "fit", "fit_module"]

ScheduleMaker = Callable[[Optimizer], LRScheduler]


@dataclass
class FitResult:
    """What happened during a fit.

    Attributes:
        history: One dict per epoch: ``epoch``, ``bound`` and ``validation_bound`` (nats per row), ``learning_rate``,
            ``num_skipped``, ``seconds``.
        num_steps: Optimisation steps taken.
        num_skipped: Steps skipped because loss or gradient was not finite.
        stopped_by: ``"epochs"``, ``"patience"``, ``"callback"`` or ``"interrupt"``.
        best_epoch: Epoch of the best validation bound, whose state was restored if ``patience`` was given.
        seconds_per_step: Mean wall-clock time of a step, validation left out.
        execution: How steps ran, eagerly or compiled, and why.
        seconds_to_compile: Time that recording and compiling took, in no other of these numbers.
        module: Model, guide and objective with their parameters.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    num_steps: int = 0
    num_skipped: int = 0
    stopped_by: str = "epochs"
    best_epoch: int | None = None
    seconds_per_step: float = float("nan")
    execution: str = ""
    seconds_to_compile: float = 0.0
    module: ObjectiveModule | None = None

    def to_pandas(self) -> "pd.DataFrame":
        """Return the history as a data frame, one row per epoch."""
        import pandas as pd

        return pd.DataFrame(self.history)

    def __repr__(self) -> str:
        """Tell in one line how the fit went."""
        if not self.history:
            return f"FitResult(no epoch finished, stopped_by={self.stopped_by!r})"
        last = self.history[-1]
        bounds = ", ".join(f"{name} {last[name]:.2f}" for name in ("bound", "validation_bound") if name in last)
        skipped = f", {self.num_skipped} skipped" if self.num_skipped else ""
        return (
            f"FitResult({bounds} nats per row after {len(self.history)} epochs, {self.num_steps} steps{skipped}, "
            f"{1e3 * self.seconds_per_step:.2f} ms a step, {self.execution.split(':')[0] or 'eager'}, stopped by {self.stopped_by})"
        )


@dataclass(frozen=True)
class EpochEnd:
    """What a callback gets after each epoch; returning ``True`` from it ends the fit.

    Attributes:
        epoch: Epochs done.
        record: The epoch's entry in the history, to which a callback may add.
        module: Model, guide and objective.
    """

    epoch: int
    record: dict[str, float]
    module: ObjectiveModule


def fit(
    model: PyroProgram,
    guide: PyroProgram,
    objective: ELBO,
    data: Any,
    *,
    num_data: int | None = None,
    data_plate: str | None = "auto",
    **settings: Any,
) -> FitResult:
    """Fit model and guide to data, for users who do without :class:`~pyro_aevb.AEVB`.

    Args:
        model: The model.
        guide: The guide; Pyro's AutoGuides are guides too.
        objective: :class:`~pyro_aevb.SGVB`, :class:`~pyro_aevb.IWELBO`, :class:`~pyro_aevb.WakeSleep`,
            :class:`~pyro_aevb.ReweightedWakeSleep`, or a loss of Pyro's that has ``differentiable_loss``.
        data: A tensor, a tuple, list or mapping of tensors (or numpy arrays) with rows on axis 0, a Dataset or a DataLoader.
        num_data: Rows of the whole data set; by default those of ``data``.
        data_plate: Name of the plate whose indices are rows, ``"auto"`` or ``None`` (no rows: every step gets all data).
        **settings: The settings of :func:`fit_module`.

    Returns:
        The history. Parameters are trained in place, in modules; values of ``pyro.param`` are written to the global param
        store, where a name that something else holds is left alone.

    Raises:
        SettingError: If a setting is out of range or the objective has no ``differentiable_loss``.
        DataError: If the data are empty or hold NaN or infinity where a density reads them.
        ModelError: If the model is not supported.
        GuideError: If the guide does not fit the model.
        NonFiniteError: If the loss stays NaN or infinite.

    Example:
        >>> from pyro_aevb import SGVB, fit
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(a + b * x, 0.7))
        >>> x = 3.0 + 2**0.5 * torch.randn(1000)
        >>> result = fit(model, guide, SGVB(), x, num_epochs=30, learning_rate=0.03, seed=0, progress=False)
        >>> bool((pyro.param("loc") - x.mean()).abs() < 0.1)
        True
    """
    check_settings(settings, fit_module)
    plate = getattr(objective, "data_plate", "auto") if data_plate == "auto" else data_plate
    module = ObjectiveModule(model, guide, objective, num_data=num_data, data_plate=plate)
    return fit_module(module, data, **settings)


def fit_module(
    module: ObjectiveModule,
    data: Any,
    *,
    num_epochs: int = 10,
    batch_size: int | None = None,
    optimizer: OptimizerMaker | None = None,
    learning_rate: float | None = None,
    schedule: ScheduleMaker | None = None,
    clip_norm: float | None = None,
    validation: Any = None,
    patience: int | None = None,
    seed: int | None = None,
    fabric: "Fabric | None" = None,
    compile: Compile = "auto",  # noqa: A002  torch's own word
    max_skipped: int = 10,
    callbacks: Sequence[Callable[[EpochEnd], bool | None]] = (),
    progress: bool = True,
) -> FitResult:
    """Fit a module of model, guide and objective to data.

    Args:
        module: Model, guide and objective.
        data: As in :func:`fit`.
        num_epochs: Passes over the data.
        batch_size: Rows in a batch, at most 100 by default.
        optimizer: A callable of the parameters that returns a torch optimizer; by default fused Adam.
        learning_rate: Of the default optimizer, 1e-3 by default.
        schedule: A callable of the optimizer that returns a learning-rate scheduler, stepped after each epoch;
            ``ReduceLROnPlateau`` gets minus the (validation) bound.
        clip_norm: Largest norm of the gradient over all parameters.
        validation: Held-out data in any form; their bound per row is taken after each epoch, under fixed noise, in eval mode,
            without the globals' part.
        patience: Epochs without a better validation bound after which the fit stops; the best state is restored then.
        seed: Seed of everything random in the fit; the generators are left as they were. One seed gives the same parameters bit
            for bit on one machine with one number of threads.
        fabric: A ``lightning_fabric.Fabric`` for devices and processes; by default the device of the parameters.
        compile: Whether to record and compile the training step for batches of the first one's shapes: ``True``, ``False``, or
            ``"auto"`` where the steps ahead repay it. With torch's Adam on one process that is loss, gradient and update in one
            graph, else loss and gradient. The numbers are those of eager steps under one seed, to rounding; where they are not,
            or a C++ compiler is missing, steps run eagerly after a warning. ``execution`` of the result says what was chosen.
        max_skipped: Steps in a row that may be skipped because loss or gradient is not finite.
        callbacks: Called after each epoch with :class:`EpochEnd`; returning ``True`` ends the fit. One that has a method
            ``finish`` gets the result once the fit is over, at the parameters that it leaves behind.
        progress: Whether to show a progress bar.

    Returns:
        The history. Ctrl-C ends the fit with the last state and is told in ``stopped_by``.

    Raises:
        SettingError: If a setting is out of range.
        NonFiniteError: If too many steps in a row were skipped; parameters are those of the last good step.
    """
    _check_objective(module.objective)
    check_count("num_epochs", num_epochs)
    _check_numbers(optimizer, learning_rate, clip_norm, patience, validation, max_skipped)
    check_compile(compile)
    source = as_source(data, batch_size)
    with seeded(seed):
        source = prepare(module, source, batch_size)
        make = optimizer or default_optimizer(learning_rate or 1e-3)
        steps = source.num_batches()
        staging = Staging(compile=compile, num_steps=None if steps is None else steps * num_epochs)
        stepper = Stepper(module, make, clip_norm=clip_norm, fabric=fabric, max_skipped=max_skipped, staging=staging)
        loop = _Loop(module, stepper, source, _held_out(module, validation))
        loop.schedule = schedule(stepper.optimizer) if schedule else None
        return loop.run(num_epochs, patience, callbacks, progress=progress)


def _check_objective(objective: ELBO) -> None:
    if not isinstance(objective, ELBO) or not hasattr(objective, "differentiable_loss"):
        raise SettingError(
            f"The objective {type(objective).__name__} has no differentiable_loss. Use SGVB, IWELBO, WakeSleep or "
            f"ReweightedWakeSleep of this package (IWELBO is the per-row bound that RenyiELBO means to be), or a loss of Pyro's "
            f"such as Trace_ELBO."
        )


def _check_numbers(
    optimizer: OptimizerMaker | None,
    learning_rate: float | None,
    clip_norm: float | None,
    patience: int | None,
    validation: Any,
    max_skipped: int,
) -> None:
    if optimizer is not None and learning_rate is not None:
        raise SettingError(
            "learning_rate belongs to the default optimizer; give it to your own with functools.partial."
        )
    for name, number in (("learning_rate", learning_rate), ("clip_norm", clip_norm)):
        if number is not None and not number > 0:
            raise SettingError(f"{name} must be positive, got {number}.")
    if max_skipped < 0:
        raise SettingError(f"max_skipped must be at least 0, got {max_skipped}.")
    if patience is not None and (patience < 1 or validation is None):
        raise SettingError(f"patience needs validation data and must be at least 1, got {patience}.")


def _held_out(module: ObjectiveModule, validation: Any) -> BatchSource | None:
    """Return validation data in batches; all at once for a model without rows."""
    if validation is None:
        return None
    source = as_source(validation)
    has_rows = module.structure is None or module.structure.data_plate is not None
    return source if has_rows else as_source(validation, source.num_rows)


_CHECK_EVERY = 10_000
"""Steps after which a compiled step is compared with an eager one again, where no callback may have changed anything."""


class _Loop:
    """Epochs over a source."""

    def __init__(
        self, module: ObjectiveModule, stepper: Stepper, source: BatchSource, validation: BatchSource | None
    ) -> None:
        self.module = module
        self.stepper = stepper
        self.source = source
        self.validation = validation
        self.schedule: LRScheduler | None = None
        self.result = FitResult(module=module)
        self._keeps_best = False
        self._best_bound = float("-inf")
        self._best_state: dict[str, Tensor] | None = None
        self._seconds = 0.0

    def run(
        self,
        num_epochs: int,
        patience: int | None,
        callbacks: Sequence[Callable[[EpochEnd], bool | None]],
        *,
        progress: bool,
    ) -> FitResult:
        """Train until the epochs are done, patience is spent, a callback says so, or Ctrl-C."""
        steps = self.source.num_batches()
        total = None if steps is None else steps * num_epochs
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        modes = [(module, module.training) for module in self.module.modules()]
        self._keeps_best = patience is not None
        self.stepper.check_every = _CHECK_EVERY
        try:
            with tqdm(total=total, disable=not progress, unit="step", dynamic_ncols=True) as bar:
                self.stepper.staging.announce = bar.set_postfix_str
                for epoch in range(1, num_epochs + 1):
                    record = self._run_epoch(epoch, generator, bar)
                    event = EpochEnd(epoch, record, self.module)
                    if callbacks:
                        self.stepper.expect_change()
                    if sum(callback(event) is True for callback in callbacks):
                        self.result.stopped_by = "callback"
                        break
                    if patience is not None and epoch - (self.result.best_epoch or epoch) >= patience:
                        self.result.stopped_by = "patience"
                        break
                self._restore_best()
        except KeyboardInterrupt:
            self.result.stopped_by = "interrupt"
        finally:
            self._finish(modes)
        for callback in callbacks:
            finish = getattr(callback, "finish", None)
            if finish is not None:
                finish(self.result)
        return self.result

    def _run_epoch(self, epoch: int, generator: torch.Generator, bar: "tqdm[Any]") -> dict[str, float]:
        """Train for one epoch and record it."""
        self.module.train()
        start, skipped = time.perf_counter(), self.stepper.num_skipped
        staging_before = self.stepper.staging.seconds
        total, rows = 0.0, 0
        with pyro.validation_enabled(False):
            for batch in self.source.batches(generator):
                bound = self.stepper.step(batch)
                if bound == bound:
                    total, rows = total + bound * batch.rows, rows + batch.rows
                bar.update()
                if bar.n % 10 == 0:
                    bar.set_postfix_str(f"epoch {epoch}, bound {bound:.2f} nats a row", refresh=False)
        seconds = time.perf_counter() - start - (self.stepper.staging.seconds - staging_before)
        self._seconds += seconds
        record = {"epoch": float(epoch), "bound": total / rows if rows else float("nan")}
        if self.validation is not None:
            record["validation_bound"] = self._validate(epoch)
        record["learning_rate"] = float(self.stepper.optimizer.param_groups[0]["lr"])
        record |= {"num_skipped": float(self.stepper.num_skipped - skipped), "seconds": seconds}
        self.result.history.append(record)
        self._step_schedule(record)
        bar.set_postfix_str(
            ", ".join(f"{name} {record[name]:.2f}" for name in ("epoch", "bound", "validation_bound") if name in record)
        )
        return record

    def _validate(self, epoch: int) -> float:
        """Return the bound per row of held-out data under fixed noise, and keep the best state."""
        total, rows = 0.0, 0
        self.module.eval()
        with torch.no_grad(), seeded(0), pyro.validation_enabled(False):
            for batch in self.validation.batches() if self.validation else ():
                args, kwargs = self.stepper.fabric.to_device(batch)
                bound = self.module.held_out_bound(*args, **kwargs)
                total, rows = total + float(bound) * batch.rows, rows + batch.rows
        value = total / rows
        if self.result.best_epoch is None or value > self._best_bound:
            self._best_bound = value if value == value else float("-inf")
            self.result.best_epoch = epoch
            if self._keeps_best:
                self._best_state = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        return value

    def _restore_best(self) -> None:
        if self._best_state is not None:
            self.module.load_state_dict(self._best_state)

    def _step_schedule(self, record: dict[str, float]) -> None:
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(-record.get("validation_bound", record["bound"]))
        elif self.schedule is not None:
            self.schedule.step()

    def _finish(self, modes: list[tuple[nn.Module, bool]]) -> None:
        """Restore the modes, count the steps, and publish ``pyro.param`` values."""
        for module, mode in modes:
            module.training = mode
        self.result.num_steps = self.stepper.num_steps
        self.result.num_skipped = self.stepper.num_skipped
        self.result.execution = self.stepper.execution
        self.result.seconds_to_compile = self.stepper.staging.seconds
        self.stepper.finish()
        self.result.seconds_per_step = self._seconds / max(1, self.stepper.num_steps + self.stepper.num_skipped)
        self.module.program.write_param_store()
        if self.result.num_skipped:
            warn_user(
                f"{self.result.num_skipped} of {self.stepper.num_steps + self.stepper.num_skipped} steps were skipped because the "
                f"loss or its gradient was not finite.",
                AEVBWarning,
            )
