"""Epochs over a source: steps, validation, what ends them, and where they stand, from which they can be continued."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from pyro_aevb.errors import AEVBWarning, DataError, SettingError, warn_user
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.randomness import seeded
from pyro_aevb.training.checkpoint import Checkpoints
from pyro_aevb.training.continuation import collect_state, load_state
from pyro_aevb.training.data import Batch, BatchSource
from pyro_aevb.training.interruption import Interrupted, Interruption
from pyro_aevb.training.place import Place
from pyro_aevb.training.result import EpochEnd, FitResult
from pyro_aevb.training.stepper import Stepper
from pyro_aevb.training.workers import worker_death

if TYPE_CHECKING:
    from lightning_fabric.loggers.logger import Logger

__all__ = ["CHECK_EVERY", "Epochs", "Plan"]

CHECK_EVERY = 10_000
"""Steps after which a compiled step is compared with an eager one again, where no callback may have changed anything."""
_LOG_EVERY = 100
"""Batches from one logged bound to the next."""


class Plan(NamedTuple):
    """How long to train, and who is told.

    Attributes:
        num_epochs: Passes over the data.
        patience: Epochs without a better validation bound after which to stop.
        callbacks: Called after each epoch.
        progress: Whether to show a progress bar.
        every: Batches from one checkpoint to the next; ``None`` for one an epoch.
        loggers: Fabric's loggers.
    """

    num_epochs: int
    patience: int | None
    callbacks: Sequence[Callable[[EpochEnd], bool | None]]
    progress: bool
    every: int | None
    loggers: "list[Logger]"


class Epochs:
    """Epochs over a source.

    Args:
        module: Model, guide and objective.
        stepper: Takes the steps.
        source: Rows to train on.
        plan: How long to train, and who is told.
        validation: Held-out rows.
        checkpoints: Where to write, and what to continue.
    """

    def __init__(
        self,
        module: ObjectiveModule,
        stepper: Stepper,
        source: BatchSource,
        plan: Plan,
        validation: BatchSource | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.module, self.stepper, self.source, self.plan = module, stepper, source, plan
        self.validation, self.checkpoints = validation, checkpoints
        self.callbacks = plan.callbacks
        self.schedule: LRScheduler | None = None
        self.result = FitResult(module=module)
        self.place = Place()
        self.best_state: dict[str, Tensor] | None = None
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        self.order = self.generator.get_state()
        self._num_saved = -1
        self._counted: float | None = None
        self._is_waiting = False
        self._interruption = Interruption()

    def run(self) -> FitResult:
        """Train until the epochs are done, patience is spent, a callback says so, or a signal comes."""
        modes = [(module, module.training) for module in self.module.modules()]
        self.stepper.check_every = CHECK_EVERY
        self.stepper.wants_stop = lambda: self._interruption.signal is not None
        is_over = False
        try:
            with self._noting_signals(), self._locked(), self._bar() as bar:
                self.stepper.staging.announce = bar.set_postfix_str
                self._continue()
                bar.update(self._num_batches)
                self._run(bar)
                self._save()
                if not self.stepper.must_stop:
                    self._restore_best()
                is_over = True
        except KeyboardInterrupt:
            self.result.stopped_by = "interrupt"
        finally:
            for module, mode in modes:
                module.training = mode
            self._finish(is_over=is_over)
        for callback in self.callbacks:
            finish = getattr(callback, "finish", None)
            if finish is not None:
                finish(self.result)
        self._interruption.obey()
        return self.result

    def _locked(self) -> Any:
        """Keep the folder of checkpoints for this fit alone; one process of several holds it."""
        is_ours = self.checkpoints is not None and self.stepper.processes.is_first
        return self.checkpoints.locked() if self.checkpoints is not None and is_ours else nullcontext()

    def _continue(self) -> None:
        """Go to where the latest checkpoint was written, if there is one."""
        if self.checkpoints is None or not load_state(self, self.checkpoints):
            return
        self._num_saved = self._num_batches
        if self.place.epochs > self.plan.num_epochs:
            raise SettingError(
                f"The checkpoint has {self.place.epochs} epochs behind it, more than num_epochs={self.plan.num_epochs}, which "
                f"counts from the beginning. Give at least as many."
            )
        if self._is_out_of_patience:
            self.result.stopped_by = "patience"

    @property
    def _is_out_of_patience(self) -> bool:
        since = self.place.epochs - (self.result.best_epoch or self.place.epochs)
        return self.plan.patience is not None and since >= self.plan.patience

    def _noting_signals(self) -> Any:
        """Let signals wait for the end of a step, where there is anything to be done about them."""
        return nullcontext() if self.checkpoints is None else self._interruption

    def _bar(self) -> "tqdm[Any]":
        steps = self.source.num_batches()
        total = None if steps is None else steps * self.plan.num_epochs
        is_shown = self.plan.progress and self.stepper.processes.is_first
        return tqdm(total=total, disable=not is_shown, unit="step", dynamic_ncols=True)

    @property
    def _num_batches(self) -> int:
        return self.stepper.num_steps + self.stepper.num_skipped

    def _run(self, bar: "tqdm[Any]") -> None:
        """Run epoch after epoch."""
        while self.place.epochs < self.plan.num_epochs and self.result.stopped_by == "epochs":
            if self.place.batches == 0:
                self.order = self.generator.get_state()
            self._train(bar)
            if self.stepper.must_stop:
                self._interruption.signal = self._interruption.signal or SIGTERM  # another process was asked
                self.result.stopped_by = "sigterm" if self._interruption.signal == SIGTERM else "interrupt"
                return
            self._end_epoch(bar)
            if self.plan.every is None or not self._can_enter_anywhere:
                self._save()

    def _train(self, bar: "tqdm[Any]") -> None:
        """Take the steps of an epoch, or those that are left of it."""
        self.module.train()
        place = self.place
        pending = self.source.batches(self.generator, skip=place.batches if self.source.can_skip else 0)
        with pyro.validation_enabled(False), self._timed(), self._ending_with_workers():
            while (batch := self._next(pending)) is not None:
                bound = self.stepper.step(batch)
                place.batches += 1
                if bound == bound:
                    place.total, place.rows = place.total + bound * batch.rows, place.rows + batch.rows
                else:
                    place.skipped += 1
                self._tell(bar, bound)
                if self.stepper.must_stop:
                    return
                if self.plan.every is not None and self._num_batches % self.plan.every == 0 and self._can_enter:
                    self._save()

    def _next(self, pending: Iterator[Batch]) -> Batch | None:
        """Return the next batch, ``None`` after the last; a signal does not wait for one that is long in coming."""
        self._is_waiting = True
        try:
            # several processes stop together, after a step
            with self._interruption.waiting() if self.stepper.processes.count == 1 else nullcontext():
                batch = next(pending, None)
        except Interrupted:
            self.stepper.must_stop = True
            return None
        self._is_waiting = False
        return batch

    @contextmanager
    def _ending_with_workers(self) -> Iterator[None]:
        """Say that a worker died, which torch raises in the middle of whatever runs; or end as a signal to both asks."""
        try:
            yield
        except Exception as error:
            reason = worker_death(error)
            if reason is None:
                raise
            if self._interruption.comes_soon():
                self.stepper.must_stop = True
                if not self._is_waiting:  # in the middle of a step, which no checkpoint may hold half of
                    self._num_saved = self._num_batches
                return
            raise DataError(
                f"A worker of the DataLoader died, after step {self._num_batches}: {reason} See what the dataset does in a worker "
                f"(memory, open files), or try num_workers=0."
            ) from error

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time of steps, without that of compiling."""
        self._counted = time.perf_counter() - self.stepper.staging.seconds
        yield
        self._count_time()
        self._counted = None

    def _count_time(self) -> None:
        """Count the time since it was last counted, inside a block of steps."""
        if self._counted is not None:
            now = time.perf_counter() - self.stepper.staging.seconds
            self.place.seconds += now - self._counted
            self.place.all_seconds += now - self._counted
            self._counted = now

    def _tell(self, bar: "tqdm[Any]", bound: float) -> None:
        bar.update()
        if bar.n % 10 == 0:
            bar.set_postfix_str(f"epoch {self.place.epochs + 1}, bound {bound:.2f} nats a row", refresh=False)
        if self.plan.loggers and self._num_batches % _LOG_EVERY == 0:
            self._log({"step_bound": bound})

    def _log(self, numbers: dict[str, float]) -> None:
        for logger in tuple(self.plan.loggers):
            with self._writing(logger):
                logger.log_metrics(numbers, step=self._num_batches)

    @contextmanager
    def _writing(self, logger: Any) -> Iterator[None]:
        """Go on without a logger that can't write, after one warning."""
        try:
            yield
        except OSError as error:
            self.plan.loggers.remove(logger)
            warn_user(f"A logger could not write: {error}. The history is in the result.", AEVBWarning)

    def _end_epoch(self, bar: "tqdm[Any]") -> None:
        """Validate, record, step the schedule, call back, and see whether that was the last epoch."""
        place, result = self.place, self.result
        place.epochs += 1
        record = {"epoch": float(place.epochs), "bound": place.total / place.rows if place.rows else float("nan")}
        if self.validation is not None:
            record["validation_bound"] = self._validate()
        record["learning_rate"] = float(self.stepper.optimizer.param_groups[0]["lr"])
        record |= {"num_skipped": float(place.skipped), "seconds": place.seconds}
        result.history.append(record)
        self._step_schedule(record)
        place.begin_epoch()
        self._num_saved = -1  # a checkpoint from before this epoch's end is another
        bar.set_postfix_str(
            ", ".join(f"{name} {record[name]:.2f}" for name in ("epoch", "bound", "validation_bound") if name in record)
        )
        event = EpochEnd(place.epochs, record, self.module)
        if self.callbacks:
            self.stepper.expect_change()
        wants_end = sum(callback(event) is True for callback in self.callbacks) > 0
        if self.stepper.processes.any(is_true=wants_end):
            result.stopped_by = "callback"
        elif self._is_out_of_patience:
            result.stopped_by = "patience"
        elif self.source.is_spent:
            result.stopped_by = "stream"
        self._log(record)
        if self.checkpoints is not None and result.best_epoch == place.epochs:
            contents = collect_state(self)
            if self.stepper.processes.is_first:
                self.checkpoints.write_best(contents)

    def _validate(self) -> float:
        """Return the bound per row of held-out data under fixed noise, and keep the best state."""
        total, rows, processes = 0.0, 0, self.stepper.processes
        self.module.eval()
        with torch.no_grad(), seeded(0), pyro.validation_enabled(False):
            for number, batch in enumerate(self.validation.batches() if self.validation else ()):
                if number % processes.count != processes.rank:
                    continue
                args, kwargs = self.stepper.fabric.to_device(batch)
                bound = self.module.held_out_bound(*args, **kwargs)
                total, rows = total + float(bound) * batch.rows, rows + batch.rows
        total, rows = processes.total(total, rows)
        value = total / rows
        if self.result.best_epoch is None or value > self.place.best_bound:
            self.place.best_bound = value if value == value else float("-inf")
            self.result.best_epoch = self.place.epochs
            if self.plan.patience is not None:
                self.best_state = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        return value

    def _restore_best(self) -> None:
        if self.best_state is not None:
            self.module.load_state_dict(self.best_state)

    def _step_schedule(self, record: dict[str, float]) -> None:
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(-record.get("validation_bound", record["bound"]))
        elif self.schedule is not None:
            self.schedule.step()

    @property
    def _can_enter_anywhere(self) -> bool:
        """Whether any place in an epoch can be found again: where the order is drawn here; a stream goes on with what it gives."""
        return self.source.can_skip or self.source.num_rows is None

    @property
    def _can_enter(self) -> bool:
        """Whether the present place can be found again."""
        return self._can_enter_anywhere or self.place.batches == 0

    def _save(self) -> None:
        """Write a checkpoint, unless this place has one or can't be found again."""
        if self.checkpoints is None or self._num_saved == self._num_batches:
            return
        if not self._can_enter:
            warn_user(
                f"No checkpoint is written inside an epoch of a given DataLoader: continuing begins with epoch "
                f"{self.place.epochs + 1} anew. Give the Dataset itself with batch_size= to stop anywhere.",
                AEVBWarning,
            )
            return
        self._count_time()
        contents = collect_state(self)
        if self.stepper.processes.is_first:
            self.checkpoints.write(self._num_batches, contents)
        self._num_saved = self._num_batches

    def _finish(self, *, is_over: bool) -> None:
        """Count the steps, publish ``pyro.param`` values, and close the loggers."""
        stepper, result = self.stepper, self.result
        result.num_steps, result.num_skipped = stepper.num_steps, stepper.num_skipped
        result.execution, result.seconds_to_compile = stepper.execution, stepper.staging.seconds
        stepper.finish()
        result.seconds_per_step = self.place.all_seconds / max(1, self._num_batches)
        self.module.program.write_param_store()
        for logger in tuple(self.plan.loggers):
            with self._writing(logger):
                logger.finalize("success" if is_over else "failed")
        if result.num_skipped:
            warn_user(
                f"{result.num_skipped} of {self._num_batches} steps were skipped because the loss or its gradient was not finite.",
                AEVBWarning,
            )
