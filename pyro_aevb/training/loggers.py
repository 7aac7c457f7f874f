"""Fabric's loggers, by their names."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_aevb.errors import SettingError

if TYPE_CHECKING:
    from lightning_fabric.loggers.logger import Logger

__all__ = ["LoggerSetting", "find_loggers"]

LoggerSetting = Any
"""``"csv"``, ``"tensorboard"``, a Fabric logger, a sequence of them, or ``None``."""


def find_loggers(setting: LoggerSetting, folder: str | Path) -> "list[Logger]":
    """Return Fabric's loggers for a setting.

    Args:
        setting: Names or loggers.
        folder: Where those that are named write, each into a folder of its name and a new version for each fit.

    Raises:
        SettingError: If a logger is unknown, or the package that it needs is not installed.
    """
    if setting is None:
        return []
    items = setting if isinstance(setting, Sequence) and not isinstance(setting, str) else [setting]
    return [_find(item, folder) for item in items]


def _find(item: Any, folder: str | Path) -> "Logger":
    from lightning_fabric.loggers.csv_logs import CSVLogger
    from lightning_fabric.loggers.logger import Logger
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    if isinstance(item, Logger):
        return item
    kinds: dict[str, Any] = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
    if not isinstance(item, str) or item not in kinds:
        raise SettingError(f'logger must be "csv", "tensorboard", or a logger of Lightning Fabric; got {item!r}.')
    try:
        return kinds[item](root_dir=folder, name=item)
    except ModuleNotFoundError as error:
        raise SettingError(
            f"logger={item!r} needs a package that is not installed: pip install 'pyro_aevb[tensorboard]'."
        ) from error
