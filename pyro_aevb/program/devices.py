"""Devices that parameters may be moved to."""

from typing import Any

import torch

from pyro_aevb.errors import SettingError

__all__ = ["check_device"]


def check_device(device: Any) -> torch.device:
    """Return a device of this machine.

    Raises:
        SettingError: If it is none.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise SettingError(
            f"device must be one of this machine's, 'cpu' or 'cuda:0', got {device!r}: {reason}."
        ) from error
    return found
