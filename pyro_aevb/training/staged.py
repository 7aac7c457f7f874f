"""What of a training step is recorded and compiled, and the decision whether to."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pyro_aevb.errors import StagingWarning, warn_user
from pyro_aevb.program.compiling import (
    FEWEST_STEPS,
    Compile,
    count_operations,
    estimated_seconds,
    repays,
    signature,
)
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.staging import compare, first_line, record
from pyro_aevb.program.unchanged import Unchanged
from pyro_aevb.training.batches import Batch, describe
from pyro_aevb.training.whole_step import WholeStep, can_be_whole

__all__ = ["StagedLoss", "Staging"]

_STEPS_TO_LAST = 20
"""Steps that a changed state of modules has to last before it is recorded."""

_MOST_CHANGES = 10
"""Changed states of modules after which no other is recorded: the next one will not last either."""


class StagedLoss(nn.Module):
    """Loss and bound per row of a batch: by the module, or by what was compiled of it for a batch of that shape.

    Args:
        module: Model, guide and objective.

    Attributes:
        compiled: The compiled run, if there is one.
        signature: What its batches look like.
    """

    def __init__(self, module: ObjectiveModule) -> None:
        super().__init__()
        self.module = module
        self.compiled: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.signature: tuple[Any, ...] = ()
        self._taken_for_granted: tuple[Unchanged, Any] | None = None

    def take_for_granted(self) -> None:
        """Keep what a graph that was just recorded takes for granted."""
        self._taken_for_granted = Unchanged([self.module]), self.module.scaling

    @property
    def holds(self) -> bool:
        """Whether modules and number of rows are still those that a graph was recorded with."""
        if self._taken_for_granted is None:
            return False
        unchanged, scaling = self._taken_for_granted
        return scaling == self.module.scaling and unchanged.holds

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether a batch has the shapes that the compiled run is for."""
        return self.signature == (tuple(kwargs), signature([*args, *kwargs.values()]))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the loss over the data set and the bound in nats per row."""
        if self.compiled is not None and self.takes(args, kwargs) and self.holds:
            return self.compiled(*args, **kwargs)
        return self.module.loss_and_bound(*args, **kwargs)


class Staging:
    """The decision whether steps are compiled, taken at the first of them, and what it led to.

    Args:
        compile: Whether to; ``"auto"`` where it repays over the steps ahead.
        num_steps: Steps ahead; ``None`` where nobody knows.
        renews: Whether to record anew where modules have changed for good; a fit that may be continued does not.
        announce: Is told what is going on while it compiles.

    Attributes:
        decision: What was decided, and why.
        seconds: Time that recording and compiling took.
        recorded_on: What the batch that was recorded looked like.
    """

    def __init__(
        self,
        *,
        compile: Compile,  # noqa: A002  torch's own word
        num_steps: int | None = None,
        renews: bool = False,
        announce: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.compile, self.num_steps, self.announce = compile, num_steps, announce
        self.seconds = 0.0
        self.recorded_on: list[Any] | None = None
        self._graph: Any = None
        self._renews, self._num_changes, self._num_lasted = renews, 0, 0
        self._changed: Unchanged | None = None
        self.decision = "eager: compile=False" if compile is False else ""
        if compile == "auto" and (num_steps is None or num_steps < FEWEST_STEPS):
            ahead = "an unknown number of" if num_steps is None else f"{num_steps:,}"
            self.decision = f"eager: {ahead} steps ahead do not repay compiling"

    @property
    def is_pending(self) -> bool:
        """Whether the decision waits for a batch."""
        return not self.decision

    def decide_again(self, decision: str, recorded_on: list[Any] | None) -> None:
        """Decide as an earlier fit did, which is continued: what is compiled rounds in other places than what is not.

        Args:
            decision: What was decided.
            recorded_on: What the batch looked like that steps were recorded on; the first like it is waited for.
        """
        if decision.startswith("eager"):
            self.decision = decision
        elif decision:
            self.compile, self.decision, self.recorded_on = True, "", recorded_on

    def waits_for(self, batch: Batch) -> bool:
        """Tell whether the decision waits for this batch: the first one, or the first like that of an earlier fit."""
        return self.is_pending and self.recorded_on in (None, describe(batch))

    def stage(
        self, loss: StagedLoss, optimizer: Optimizer | None, batch: Batch, clip_norm: float | None
    ) -> WholeStep | None:
        """Record and compile for a batch, where that is decided.

        Args:
            loss: What is recorded; a compiled loss is put into it.
            optimizer: An optimizer that only this process steps, in full precision, else ``None``.
            batch: The batch.
            clip_norm: Largest norm of the gradient.

        Returns:
            A whole step as one graph, if the optimizer is one that such a step knows.
        """
        start, self.recorded_on = time.perf_counter(), describe(batch)
        try:
            return self._stage(loss, optimizer, batch, clip_norm)
        except KeyboardInterrupt:
            self.decision = "eager: interrupted while compiling"
            raise
        finally:
            self.seconds = time.perf_counter() - start

    def is_outlived(self, loss: StagedLoss, batch: Batch) -> bool:
        """Tell whether the modules' state is another than the recorded one, and has lasted; ask once a step.

        States that do not last are no reason to record, and after many of them a warning says that none will be.
        """
        if not self._renews or self._graph is None:
            return False
        if loss.holds:
            self._changed = None
            return False
        if self._changed is None or not self._changed.holds:
            self._changed, self._num_lasted = Unchanged([loss.module]), 0
            self._num_changes += 1
        if self._num_changes > _MOST_CHANGES:
            self._renews = False
            reason = f"model and guide have changed {self._num_changes} times since they were recorded, and are not recorded again"
            warn_user(f"Steps run eagerly: {reason}. The numbers are the same, steps are slower.", StagingWarning)
            return False
        self._num_lasted += 1
        return self._num_lasted > _STEPS_TO_LAST and _shapes(describe(batch)) == _shapes(self.recorded_on)

    def renew(
        self,
        loss: StagedLoss,
        optimizer: Optimizer | None,
        batch: Batch,
        clip_norm: float | None,
        whole: WholeStep | None,
    ) -> WholeStep | None:
        """Record and compile the modules as they are now; where that fails keep what there is, for when they are as they were.

        Args:
            loss: As in :meth:`stage`.
            optimizer: As in :meth:`stage`.
            batch: As in :meth:`stage`.
            clip_norm: As in :meth:`stage`.
            whole: The whole step until now.

        Returns:
            The whole step from now on, if there is one.
        """
        kept = self._graph, self.decision, self.recorded_on
        held = loss.compiled, loss.signature, loss._taken_for_granted
        self._changed, loss.compiled = None, None
        is_compiled = False
        try:
            found = self.stage(loss, optimizer, batch, clip_norm)
            is_compiled = self.decision.startswith("compiled")
        finally:
            if not is_compiled:
                self._renews = False
                self._graph, self.decision, self.recorded_on = kept
                loss.compiled, loss.signature, loss._taken_for_granted = held
        return found if is_compiled else whole

    def is_stale(self, loss: StagedLoss, batch: Batch) -> bool:
        """Compare the recorded run with an eager one again, and give up on any difference: Python numbers may have changed."""
        if self._graph is None:
            return False
        difference = compare(StagedLoss(loss.module), self._graph, *batch)
        if difference:
            self._graph = loss.compiled = None
            self._give_up(f"something changed since the program was recorded, now {difference}")
        return bool(difference)

    def _stage(
        self, loss: StagedLoss, optimizer: Optimizer | None, batch: Batch, clip_norm: float | None
    ) -> WholeStep | None:
        """Record, decide, compile."""
        self.announce("recording")
        graph: Any = record(loss, *batch.args, **batch.kwargs)
        if graph is loss:
            self.decision = "eager: the program can't be recorded (a warning said why)"
            return None
        operations = count_operations(graph)
        if self.compile == "auto" and not repays(operations, self.num_steps or 0):
            self.decision = f"eager: {self.num_steps:,} steps ahead do not repay compiling {operations} operations"
            return None
        self.announce(f"compiling {operations} operations, about {estimated_seconds(operations):.0f} s")
        try:
            return self._compile(loss, graph, optimizer, batch, clip_norm)
        except Exception as error:  # whatever Inductor or a C++ compiler that is not there raise
            self._give_up(first_line(error))
            return None

    def _compile(
        self, loss: StagedLoss, graph: Any, optimizer: Optimizer | None, batch: Batch, clip_norm: float | None
    ) -> WholeStep | None:
        if isinstance(optimizer, Adam) and can_be_whole(graph, optimizer):
            whole = WholeStep(graph, optimizer, *batch, clip_norm=clip_norm)
            if whole.difference:
                self._give_up(whole.difference)
                return None
            self.decision = f"compiled: loss, gradient and Adam in one graph of {whole.num_operations} operations"
            self._graph = graph
            loss.take_for_granted()
            return whole
        compiled: Any = torch.compile(graph, options={"fallback_random": True}, fullgraph=True)
        if difference := compare(loss, compiled, *batch):
            self._give_up(difference)
            return None
        self._graph = graph
        loss.take_for_granted()
        loss.compiled = compiled
        loss.signature = (tuple(batch.kwargs), signature([*batch.args, *batch.kwargs.values()]))
        self.decision = f"compiled: loss and gradient, a graph of {count_operations(graph)} operations"
        return None

    def _give_up(self, reason: str) -> None:
        """Run eagerly, and say why."""
        self.decision = f"eager: {reason}"
        warn_user(f"Steps run eagerly: {reason}. The numbers are the same, steps are slower.", StagingWarning)


def _shapes(description: list[Any] | None) -> list[Any]:
    """Return the shapes of a batch's tensors, by name; types change with the modules' own."""
    return [(name, shape) for name, _, shape in description or []]
