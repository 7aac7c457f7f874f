"""A trained program on disk, from which it is built again without data; checkpoints of a fit hold one each."""

import json
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_aevb.errors import AEVBError, FileError
from pyro_aevb.guides.base import AmortizedGuide
from pyro_aevb.guides.saving import describe_guide
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.parameters import Program
from pyro_aevb.program.structure import Structure
from pyro_aevb.training.files import Contents

__all__ = ["FIT", "describe_program", "explain_difference", "load_tensors", "restore"]

FIT = "fit/"
"""What names of tensors begin with that belong to a fit, not to the program."""


def describe_program(module: ObjectiveModule, batch: list[list[Any]] | None) -> Contents:
    """Return a program's tensors, and what is needed to rebuild it as JSON values.

    Args:
        module: Model, guide and objective.
        batch: Shapes and types of a batch, from :func:`~pyro_aevb.training.batches.describe`, so that loading can read the
            model's structure without data.
    """
    program, settings = module.program, getattr(module.objective, "settings", None)
    header = {
        "data_plate": module.data_plate,
        "guide": describe_guide(module.guide) if isinstance(module.guide, AmortizedGuide) else None,
        "objective": None if settings is None else [type(module.objective).__name__, settings],
        "fingerprint": module.structure.fingerprint if module.structure else None,
        "batch": batch,
        "pyro_params": sorted(program.unconstrained_params()),
        "num_data": module.num_data,
        "is_growing": module.is_growing,
    }
    return Contents(header, dict(program.state_dict()))


def restore(module: ObjectiveModule, contents: Contents, path: str | Path) -> None:
    """Load a saved program's tensors into a module, and check that it is the same model.

    Args:
        module: Model, guide and objective, which need not have run.
        contents: What a file held.
        path: The file, for messages.

    Raises:
        FileError: If parameters or structure are those of another model; the module may then be partly built, not loaded.
    """
    header = contents.header
    tensors = {name: tensor for name, tensor in contents.tensors.items() if not name.startswith(FIT)}
    program = module.program
    program.restore_params(
        {name: tensors[program.key(name)] for name in header["pyro_params"] if program.key(name) in tensors}
    )
    module.num_data = header["num_data"]
    if header["batch"] is not None:
        _build_on_constants(module, header, path)
    load_tensors(program, tensors, path)


def load_tensors(program: Program, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Load every tensor of a program, or none.

    Raises:
        FileError: If they are those of another program.
    """
    own = program.state_dict()
    wrong = [name for name in own.keys() | tensors.keys() if not _same_shape(own.get(name), tensors.get(name))]
    if wrong:
        raise FileError(
            f"{path} belongs to another model or guide: {len(wrong)} parameters are missing, extra or of another shape or type, "
            f"first {sorted(wrong)[:3]}. Load it with the model and guide that it was saved with."
        )
    program.load_state_dict(tensors)


def _same_shape(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype


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
    if difference := explain_difference(module.structure, header):
        raise FileError(
            f"{path} belongs to another model: {difference}. Load it with the model that it was saved with."
        )


def explain_difference(structure: Structure | None, header: dict[str, Any]) -> str:
    """Say what a model's structure differs in from a saved one; nothing where they are the same."""
    found = json.loads(json.dumps(structure.fingerprint)) if structure else None
    if found == header["fingerprint"]:
        return ""
    saved, own = (part["sites"] if part else {} for part in (header["fingerprint"], found))
    different = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    return f"sites {different or 'and plates'} differ"
