"""What a fit needs to be continued from where it stands, and how it gets there again."""

import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_aevb.errors import AEVBWarning, FileError, warn_user
from pyro_aevb.randomness import RandomState, random_state, restore_random_state
from pyro_aevb.training.checkpoint import Checkpoints, collect, distribute
from pyro_aevb.training.data import BatchSource
from pyro_aevb.training.files import Contents
from pyro_aevb.training.place import Place

if TYPE_CHECKING:
    from pyro_aevb.training.epochs import Epochs

__all__ = ["collect_state", "load_state"]


def collect_state(epochs: "Epochs") -> Contents:
    """Return all that a fit needs to be continued from here; every process has to ask.

    Args:
        epochs: The fit, between two steps.
    """
    place, stepper, validation = epochs.place, epochs.stepper, epochs.validation
    own = {
        "source": epochs.source.state(),
        "validation": {} if validation is None else validation.state(),
        "random": random_state()._asdict(),
    }
    state = {
        "setting": _setting(epochs),
        "circumstances": _circumstances(),
        "place": asdict(place),
        "order": epochs.order if place.batches > 0 else epochs.generator.get_state(),
        "each": stepper.processes.gather([own]),
        "stepper": stepper.state(),
        "schedule": None if epochs.schedule is None else epochs.schedule.state_dict(),
        "callbacks": _callback_states(epochs.plan.callbacks),
        "buffers": _passing_buffers(epochs.module),
        "history": epochs.result.history,
        "best_epoch": epochs.result.best_epoch,
        "best": epochs.best_state,
    }
    return collect(epochs.module, state)


def load_state(epochs: "Epochs", checkpoints: Checkpoints) -> bool:
    """Bring a fit that has not begun to where the latest checkpoint was written; tell whether there is one.

    Raises:
        FileError: If the checkpoint is damaged, or one of another model.
        SettingError: If the fit is set up in another way.
    """
    found = checkpoints.read_latest()
    if found is None:
        return False
    path, contents = found
    state = distribute(epochs.module, contents, path, _setting(epochs))
    epochs.place, epochs.order = Place(**state["place"]), state["order"]
    epochs.generator.set_state(epochs.order)
    own = state["each"][epochs.stepper.processes.rank]
    epochs.source.load_state(own["source"])
    if epochs.validation is not None and own["validation"]:
        epochs.validation.load_state(own["validation"])
    epochs.stepper.load_state(state["stepper"])
    if epochs.schedule is not None:
        epochs.schedule.load_state_dict(state["schedule"])
    _load_callbacks(epochs, state["callbacks"])
    for name, buffer in _passing_buffers(epochs.module).items():
        buffer.copy_(state["buffers"][name])
    epochs.result.history, epochs.result.best_epoch = state["history"], state["best_epoch"]
    epochs.best_state = state["best"]
    _compare_circumstances(state["circumstances"])
    restore_random_state(RandomState(**own["random"]))
    return True


def _setting(epochs: "Epochs") -> dict[str, Any]:
    """Return what must be the same for a fit to be continued."""
    module = epochs.module
    return {
        "rows": epochs.source.num_rows,
        "data": _fingerprint(epochs.source),
        "batch_size": epochs.source.batch_size,
        "num_data": "growing" if module.is_growing else module.num_data,
        "objective": type(module.objective).__name__,
        "settings of the objective": getattr(module.objective, "settings", None),
        "optimizer": epochs.stepper.optimizer_name,
        "schedule": None if epochs.schedule is None else type(epochs.schedule).__name__,
        "processes": epochs.stepper.processes.count,
    }


def _fingerprint(source: BatchSource) -> str | None:
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


def _circumstances() -> dict[str, Any]:
    """Return what bits depend on beside the seed."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def _compare_circumstances(saved: dict[str, Any]) -> None:
    own = _circumstances()
    different = [f"{name} {saved[name]} then, {own[name]} now" for name in own if saved.get(name) != own[name]]
    if different:
        warn_user(
            f"The fit goes on, but not bit for bit as if it had not been stopped: {', '.join(different)}.", AEVBWarning
        )


def _callback_states(callbacks: Sequence[Any]) -> list[Any]:
    return [item.state_dict() if _has_state(item) else None for item in callbacks]


def _has_state(callback: Any) -> bool:
    return hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")


def _load_callbacks(epochs: "Epochs", states: list[Any]) -> None:
    """Give states back to callbacks that had one, in the order in which they are given."""
    keeping: list[Any] = [item for item in epochs.plan.callbacks if _has_state(item)]
    saved = [state for state in states if state is not None]
    if len(keeping) != len(saved):
        raise FileError(
            f"The checkpoint has the states of {len(saved)} callbacks, and {len(keeping)} callbacks keep one "
            f"(state_dict, load_state_dict). Give the same callbacks in the same order."
        )
    for callback, state in zip(keeping, saved, strict=True):
        callback.load_state_dict(state)


def _passing_buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a saved program leaves out (``persistent=False``)."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name not in kept}
