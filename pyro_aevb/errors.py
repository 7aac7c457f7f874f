"""What can go wrong, as exceptions and warnings that carry the data behind their message.

Every message says what was expected, what came (value, shape, site) and what to do. All exceptions derive from
:class:`AEVBError`; those that replace a builtin error derive from that builtin too, so ``except ValueError`` keeps working.
"""

import sys
import warnings

__all__ = [
    "AEVBError",
    "AEVBWarning",
    "DataError",
    "FileError",
    "GuideError",
    "ModelError",
    "NonFiniteError",
    "ParameterError",
    "ParticleWarning",
    "ProcessError",
    "SettingError",
    "StagingWarning",
    "UnreliableWarning",
    "warn_user",
]


class AEVBError(Exception):
    """Base of every exception that this package raises on purpose.

    Args:
        message: What was expected, what came, what to do.
        site: Name of the sample site at fault, where there is one.
    """

    def __init__(self, message: str, *, site: str | None = None) -> None:
        super().__init__(message)
        self.site = site


class SettingError(AEVBError, ValueError):
    """An argument has a value that is not allowed."""


class ModelError(AEVBError, ValueError):
    """A model has a structure that is not supported: its plates, a discrete latent, a wrong shape."""


class GuideError(AEVBError, ValueError):
    """A guide does not fit its model: a site missing, extra, outside the support, or not reparameterized."""


class DataError(AEVBError, ValueError):
    """Data are empty, of the wrong type or shape, or hold NaN or infinity where a density reads them."""


class ParameterError(AEVBError, RuntimeError):
    """Parameters are missing, read before they exist, or appear after the optimizer was made."""


class NonFiniteError(AEVBError, ArithmeticError):
    """A density or a gradient is NaN or infinite.

    Args:
        message: What was expected, what came, what to do.
        site: Name of the first sample site with a non-finite log density, where one was found.
        num_skipped: Number of optimisation steps that were skipped before giving up.
    """

    def __init__(self, message: str, *, site: str | None = None, num_skipped: int = 0) -> None:
        super().__init__(message, site=site)
        self.num_skipped = num_skipped


class FileError(AEVBError, ValueError):
    """A saved file is damaged, of another version, or belongs to another model."""


class ProcessError(AEVBError, RuntimeError):
    """Another process of a run has ended, or does not answer in time."""


class AEVBWarning(UserWarning):
    """Base of every warning of this package."""


class ParticleWarning(AEVBWarning):
    """Particles are run one by one, because the program does not broadcast over particle axes."""


class StagingWarning(AEVBWarning):
    """A program is run eagerly, because its recorded graph would not give the same numbers."""


class UnreliableWarning(AEVBWarning):
    """A number was computed but should not be trusted; the result object says why."""


_LIBRARIES = ("pyro_aevb", "torch", "pyro", "lightning_fabric", "contextlib", "functools", "jaxtyping")


def warn_user(message: str, category: type[AEVBWarning]) -> None:
    """Warn at the line that led here from outside this package and the libraries that it runs on."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
