"""What a fit, by a bound or by Monte Carlo EM, tells: while it runs, to callbacks, and at its end."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.parameters import Program

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EMEpochEnd", "EMResult", "EpochEnd", "FitResult"]


@dataclass
class _Told:
    """What every fit tells of its epochs."""

    history: list[dict[str, float]] = field(default_factory=list)

    def to_pandas(self) -> "pd.DataFrame":
        """Return the history as a data frame, one row per epoch."""
        import pandas as pd

        return pd.DataFrame(self.history)


@dataclass
class FitResult(_Told):
    """What happened during a fit.

    Attributes:
        history: One dict per epoch: ``epoch``, ``bound`` and ``validation_bound`` (nats per row), ``learning_rate``,
            ``num_skipped``, ``seconds``.
        num_steps: Optimisation steps taken.
        num_skipped: Steps skipped because loss or gradient was not finite.
        stopped_by: ``"epochs"``, ``"patience"``, ``"callback"``, ``"stream"`` (an iterator gave no more), ``"interrupt"`` or
            ``"sigterm"``.
        best_epoch: Epoch of the best validation bound, whose state was restored if ``patience`` was given.
        seconds_per_step: Mean wall-clock time of a step, validation left out.
        execution: How steps ran, eagerly or compiled, and why.
        seconds_to_compile: Time that recording and compiling took, in no other of these numbers.
        module: Model, guide and objective with their parameters.
    """

    num_steps: int = 0
    num_skipped: int = 0
    stopped_by: str = "epochs"
    best_epoch: int | None = None
    seconds_per_step: float = float("nan")
    execution: str = ""
    seconds_to_compile: float = 0.0
    module: ObjectiveModule | None = None

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


@dataclass
class EMResult(_Told):
    """What happened during Monte Carlo EM.

    Attributes:
        history: One dict per epoch: ``epoch``, ``log_joint`` (log p(x, z) at the chains' latents, nats per row: neither a bound on
            log p(x) nor an estimate of it, and not to be compared with one), ``acceptance``, ``step_size``, ``seconds``.
        num_steps: Batches taken.
        num_updates: Updates of the parameters.
        stopped_by: ``"epochs"``, ``"callback"``, ``"interrupt"`` or ``"sigterm"``.
        seconds_per_step: Mean wall-clock time of a batch.
        chains: Where each row's chain is, on unconstrained space: approximate draws from its posterior.
        program: The model's parameters.
    """

    num_steps: int = 0
    num_updates: int = 0
    stopped_by: str = "epochs"
    seconds_per_step: float = float("nan")
    chains: Float[Tensor, "rows latent"] | None = None
    program: Program | None = None

    def __repr__(self) -> str:
        """Tell in one line how it went."""
        if not self.history:
            return f"EMResult(no epoch finished, stopped_by={self.stopped_by!r})"
        last = self.history[-1]
        return (
            f"EMResult(log joint {last['log_joint']:.2f} nats per row (no bound), acceptance {last['acceptance']:.2f} after "
            f"{len(self.history)} epochs, {self.num_steps} steps, {self.num_updates} updates, "
            f"{1e3 * self.seconds_per_step:.2f} ms a step, stopped by {self.stopped_by})"
        )


@dataclass(frozen=True)
class EMEpochEnd:
    """What a callback of Monte Carlo EM gets after each epoch; returning ``True`` from it ends the fit.

    Attributes:
        epoch: Epochs done.
        record: The epoch's entry in the history, to which a callback may add.
        program: The model's parameters.
    """

    epoch: int
    record: dict[str, float]
    program: Program
