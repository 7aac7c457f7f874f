"""What is refused among the settings of a fit, before anything runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_aevb.errors import SettingError
from pyro_aevb.program.settings import check_count, check_positive

__all__ = ["check_checkpoint", "check_makers", "check_numbers", "check_objective", "check_together", "make_schedule"]


def check_objective(objective: ELBO) -> None:
    """Refuse an objective that is no loss to differentiate."""
    if not isinstance(objective, ELBO) or not hasattr(objective, "differentiable_loss"):
        raise SettingError(
            f"The objective {type(objective).__name__} has no differentiable_loss. Use SGVB, IWELBO, WakeSleep or "
            f"ReweightedWakeSleep of this package (IWELBO is the per-row bound that RenyiELBO means to be), or a loss of Pyro's "
            f"such as Trace_ELBO."
        )


def check_numbers(learning_rate: Any, clip_norm: Any, patience: Any, max_skipped: Any) -> None:
    """Refuse numbers that are none, or out of range."""
    for name, number in (("learning_rate", learning_rate), ("clip_norm", clip_norm)):
        if number is not None and not (name == "clip_norm" and number == math.inf):
            check_positive(name, number)
    check_count("patience", patience, is_optional=True)
    if isinstance(max_skipped, bool) or not isinstance(max_skipped, int) or max_skipped < 0:
        raise SettingError(f"max_skipped must be an integer of at least 0, got {max_skipped!r}.")


def check_makers(optimizer: Any, schedule: Any, callbacks: Any) -> None:
    """Refuse an optimizer or a schedule where a callable that makes one is needed, and callbacks that can't be called."""
    if isinstance(optimizer, (Optimizer, PyroOptim)) or not (optimizer is None or callable(optimizer)):
        raise SettingError(
            f"optimizer must be a callable that takes parameters and returns a torch optimizer, for the fit makes the parameters: "
            f"lambda parameters: torch.optim.Adam(parameters, lr=1e-3); got {_name(optimizer)}."
        )
    if isinstance(schedule, LRScheduler) or not (schedule is None or callable(schedule)):
        raise SettingError(
            f"schedule must be a callable that takes the optimizer and returns a scheduler of torch's: "
            f"lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10). Got {_name(schedule)}."
        )
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise SettingError(
            f"callbacks must be a list of functions, which get the end of each epoch; got {_name(callbacks)}."
        )


def make_schedule(schedule: Any, optimizer: Optimizer) -> LRScheduler | None:
    """Return the schedule that a maker makes."""
    made = None if schedule is None else schedule(optimizer)
    if made is not None and not isinstance(made, LRScheduler):
        raise SettingError(f"schedule must return a scheduler of torch's, got {_name(made)}.")
    return made


def check_together(optimizer: Any, learning_rate: Any, patience: Any = None, validation: Any = None) -> None:
    """Refuse settings that exclude or need each other."""
    if optimizer is not None and learning_rate is not None:
        raise SettingError(
            "learning_rate belongs to the default optimizer; give it to your own with functools.partial."
        )
    if patience is not None and validation is None:
        raise SettingError(f"patience needs validation data: give validation=, got {patience} without it.")


def check_checkpoint(checkpoint: str | Path | None, every: int | None, keep: int, *, resume: bool) -> None:
    """Refuse settings of checkpoints without a folder, and counts that are none."""
    if checkpoint is None and (every is not None or resume):
        raise SettingError("every and resume need a folder for checkpoints: checkpoint='...'.")
    check_count("every", every, is_optional=True)
    check_count("keep", keep)


def _name(item: Any) -> str:
    """Write what came: numbers and names as they are, objects by their type."""
    return (
        repr(item) if isinstance(item, (str, int, float, list, tuple)) else f"an object of type {type(item).__name__}"
    )
