"""A trained program on disk: tensors in safetensors, everything else as JSON in the same file's header, no pickle."""

import json
import os
from pathlib import Path
from typing import Any

import pyro
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_aevb.errors import AEVBError, FileError
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.training.data import Batch

__all__ = ["describe", "read_header", "restore", "save"]

FORMAT = 1
"""Version of the file's layout."""
_KEY = "pyro_aevb"


def save(module: ObjectiveModule, path: str | Path, settings: dict[str, Any], batch: list[list[Any]] | None) -> None:
    """Write a program atomically: to a temporary file beside the target, flushed to disk, then renamed.

    Args:
        module: Model, guide and objective.
        path: Target; a file that is there is replaced only once the new one is whole.
        settings: What is needed to rebuild the wrapper, as JSON values.
        batch: Shapes and types of a batch, from :func:`describe`, so that loading can read the model's structure without data.

    Raises:
        FileError: If the file can't be written; an old file is left as it was.
    """
    program = module.program
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in program.state_dict().items()}
    header = settings | {
        "format": FORMAT,
        "fingerprint": module.structure.fingerprint if module.structure else None,
        "batch": batch,
        "pyro_params": sorted(program.unconstrained_params()),
        "num_data": module.num_data,
    }
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise FileError(f"Could not write {target}: {error}. A file that was there is unchanged.") from error


def describe(batch: Batch) -> list[list[Any]]:
    """Return name (``None`` by position), type and shape of every tensor of a batch, as JSON values."""
    named = [*((None, item) for item in batch.args), *batch.kwargs.items()]
    return [
        [name, str(item.dtype).removeprefix("torch."), list(item.shape)]
        for name, item in named
        if isinstance(item, Tensor)
    ]


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the JSON part of a saved file.

    Raises:
        FileError: If the file is missing, damaged, of another kind or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        header = json.loads(metadata[_KEY])
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} is missing or damaged: {error}.") from error
    except (KeyError, ValueError) as error:
        raise FileError(f"{path} was not written by AEVB.save: its header has no readable {_KEY!r} entry.") from error
    if header.get("format") != FORMAT:
        raise FileError(
            f"{path} has format {header.get('format')!r}, this version reads {FORMAT}. Save it anew with a matching one."
        )
    return header


def restore(module: ObjectiveModule, path: str | Path, header: dict[str, Any]) -> None:
    """Load a saved program's tensors into a module, and check that it is the same model.

    Raises:
        FileError: If parameters or structure are those of another model; the module may then be partly built, not loaded.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} is missing or damaged: {error}.") from error
    program = module.program
    program.restore_params(
        {name: tensors[program.key(name)] for name in header["pyro_params"] if program.key(name) in tensors}
    )
    module.num_data = header["num_data"]
    if header["batch"] is not None:
        _build_on_constants(module, header, path)
    own = program.state_dict()
    wrong = [name for name in own.keys() | tensors.keys() if not _same_shape(own.get(name), tensors.get(name))]
    if wrong:
        raise FileError(
            f"{path} belongs to another model or guide: {len(wrong)} parameters are missing, extra or of another shape, first "
            f"{sorted(wrong)[:3]}. Load it with the model and guide that it was saved with."
        )
    program.load_state_dict(tensors)


def _same_shape(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape


def _build_on_constants(module: ObjectiveModule, header: dict[str, Any], path: str | Path) -> None:
    """Read the structure on a batch of the saved shapes and hold it against the saved one.

    The batch is one half everywhere, inside the support of nearly every likelihood (0 in whole numbers, ``True`` in masks).
    """
    items = [(name, torch.full(shape, 0.5).to(getattr(torch, dtype))) for name, dtype, shape in header["batch"]]
    args = tuple(item for name, item in items if name is None)
    try:
        with pyro.validation_enabled(False):
            module.build(*args, **{name: item for name, item in items if name is not None})
    except AEVBError as error:
        raise FileError(f"{path} belongs to another model: this one does not run on its batches. {error}") from error
    found = json.loads(json.dumps(module.structure.fingerprint)) if module.structure else None
    if found == header["fingerprint"]:
        return
    saved, own = (part["sites"] if part else {} for part in (header["fingerprint"], found))
    different = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    raise FileError(
        f"{path} belongs to another model: sites {different or 'and plates'} differ. Load it with the model that it was saved with."
    )
