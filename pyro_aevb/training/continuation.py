"""What a fit needs to be continued from where it stands, and how it gets there again."""

import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_aevb.errors import AEVBWarning, FileError, warn_user
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.randomness import RandomState, random_state, restore_random_state
from pyro_aevb.training.checkpoint import Checkpoints, collect, distribute
from pyro_aevb.training.data import BatchSource
from pyro_aevb.training.files import Contents
from pyro_aevb.training.place import Place
from pyro_aevb.training.result import FitResult
from pyro_aevb.training.stepper import Stepper

__all__ = [
    "Standing",
    "callback_states",
    "circumstances",
    "collect_state",
    "compare_circumstances",
    "fingerprint",
    "load_callbacks",
    "load_state",
    "passing_buffers",
]


@runtime_checkable
class Standing(Protocol):
    """A fit between two steps.

    Attributes:
        module: Model, guide and objective.
        stepper: Takes the steps.
        source: Rows to train on.
        validation: Held-out rows.
        schedule: Of the learning rate.
        callbacks: Called after each epoch.
        result: What has happened.
        place: Where the fit stands.
        generator: Draws the order of each epoch.
        order: Its state at the beginning of the present one.
        best_state: Parameters of the best validation bound.
    """

    module: ObjectiveModule
    stepper: Stepper
    source: BatchSource
    validation: BatchSource | None
    schedule: LRScheduler | None
    callbacks: Sequence[Any]
    result: FitResult
    place: Place
    generator: torch.Generator
    order: Tensor
    best_state: dict[str, Tensor] | None


def collect_state(fit: Standing) -> Contents:
    """Return all that a fit needs to be continued from here; every process has to ask.

    Args:
        fit: The fit.
    """
    place, stepper, validation = fit.place, fit.stepper, fit.validation
    own = {
        "source": fit.source.state(),
        "validation": {} if validation is None else validation.state(),
        "random": random_state()._asdict(),
    }
    state = {
        "setting": _setting(fit),
        "circumstances": circumstances(),
        "place": asdict(place),
        "order": fit.order if place.batches > 0 else fit.generator.get_state(),
        "each": stepper.processes.gather([own]),
        "stepper": stepper.state(),
        "schedule": None if fit.schedule is None else fit.schedule.state_dict(),
        "callbacks": callback_states(fit.callbacks),
        "buffers": passing_buffers(fit.module),
        "history": fit.result.history,
        "best_epoch": fit.result.best_epoch,
        "best": fit.best_state,
    }
    return collect(fit.module, state)


def load_state(fit: Standing, checkpoints: Checkpoints) -> bool:
    """Bring a fit that has not begun to where the latest checkpoint was written; tell whether there is one.

    Raises:
        FileError: If the checkpoint is damaged, or one of another model.
        SettingError: If the fit is set up in another way.
    """
    found = checkpoints.read_latest()
    if found is None:
        return False
    path, contents = found
    state = distribute(fit.module, contents, path, _setting(fit))
    fit.place, fit.order = Place(**state["place"]), state["order"]
    fit.generator.set_state(fit.order)
    own = state["each"][fit.stepper.processes.rank]
    fit.source.load_state(own["source"])
    if fit.validation is not None and own["validation"]:
        fit.validation.load_state(own["validation"])
    fit.stepper.load_state(state["stepper"])
    if fit.schedule is not None:
        fit.schedule.load_state_dict(state["schedule"])
    load_callbacks(fit.callbacks, state["callbacks"])
    for name, buffer in passing_buffers(fit.module).items():
        buffer.copy_(state["buffers"][name])
    fit.result.history, fit.result.best_epoch = state["history"], state["best_epoch"]
    fit.best_state = state["best"]
    compare_circumstances(state["circumstances"])
    restore_random_state(RandomState(**own["random"]))
    return True


def _setting(fit: Standing) -> dict[str, Any]:
    """Return what must be the same for a fit to be continued."""
    module = fit.module
    return {
        "rows": fit.source.num_rows,
        "data": fingerprint(fit.source),
        "batch_size": fit.source.batch_size,
        "num_data": "growing" if module.is_growing else module.num_data,
        "objective": type(module.objective).__name__,
        "settings of the objective": getattr(module.objective, "settings", None),
        "optimizer": fit.stepper.optimizer_name,
        "schedule": None if fit.schedule is None else type(fit.schedule).__name__,
        "processes": fit.stepper.processes.count,
    }


def fingerprint(source: BatchSource) -> str | None:
    """Return types, shapes and a checksum of the first and the last row of data in memory."""
    whole = source.whole()
    if whole is None:
        return None
    value, kinds = 0, []
    for item in (*whole.args, *whole.kwargs.values()):
        if isinstance(item, Tensor):
            for row in (item[:1], item[-1:]):
                data: Any = row.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                value = zlib.crc32(data, value)
            kinds.append(f"{str(item.dtype).removeprefix('torch.')} {list(item.shape)}")
    return f"{', '.join(kinds)}, checksum of the first and the last row {value:08x}"


def circumstances() -> dict[str, Any]:
    """Return what bits depend on beside the seed."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def compare_circumstances(saved: dict[str, Any]) -> None:
    """Warn where bits may come out otherwise than in the circumstances that were saved."""
    own = circumstances()
    different = [f"{name} {saved[name]} then, {own[name]} now" for name in own if saved.get(name) != own[name]]
    if different:
        warn_user(
            f"The fit goes on, but not bit for bit as if it had not been stopped: {', '.join(different)}.", AEVBWarning
        )


def callback_states(callbacks: Sequence[Any]) -> list[Any]:
    """Return the states of callbacks that keep one, ``None`` for others."""
    return [item.state_dict() if _has_state(item) else None for item in callbacks]


def _has_state(callback: Any) -> bool:
    return hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")


def load_callbacks(callbacks: Sequence[Any], states: list[Any]) -> None:
    """Give states back to callbacks that had one, in the order in which they are given.

    Raises:
        FileError: If other callbacks keep one now.
    """
    keeping: list[Any] = [item for item in callbacks if _has_state(item)]
    saved = [state for state in states if state is not None]
    if len(keeping) != len(saved):
        raise FileError(
            f"The checkpoint has the states of {len(saved)} callbacks, and {len(keeping)} callbacks keep one "
            f"(state_dict, load_state_dict). Give the same callbacks in the same order."
        )
    for callback, state in zip(keeping, saved, strict=True):
        callback.load_state_dict(state)


def passing_buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a saved program leaves out (``persistent=False``)."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name not in kept}
