"""Objectives that a saved file can name, and that are made again from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_aevb.errors import FileError, SettingError
from pyro_aevb.objectives.base import Objective
from pyro_aevb.objectives.importance_weighted import IWELBO
from pyro_aevb.objectives.sgvb import SGVB
from pyro_aevb.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep

__all__ = ["OBJECTIVES", "rebuild_objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    kind.__name__: kind for kind in (SGVB, IWELBO, WakeSleep, ReweightedWakeSleep)
}
"""By name."""


def rebuild_objective(name: str, settings: Mapping[str, Any], path: str | Path) -> Objective:
    """Make an objective of the name and the settings that a file holds.

    Args:
        name: Its class.
        settings: Its arguments.
        path: The file, for messages.

    Raises:
        FileError: If there is none of that name, or it takes no such settings.
    """
    if name not in OBJECTIVES:
        raise FileError(f"{path} was saved with the objective {name}, which is not known here: give objective=.")
    try:
        return OBJECTIVES[name](**settings)
    except (TypeError, SettingError) as error:
        raise FileError(f"{path} has settings that {name} does not take: {error}. Give objective=.") from error
