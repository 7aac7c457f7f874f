"""What an estimator of log p(x) sees, rows given the globals, and what it offers to the door that calls it.

A new estimator is a frozen dataclass of its settings that derives from :class:`Estimator`, in a file of its own, and one line
in ``METHODS`` of :mod:`pyro_aevb.evidence.marginal`. Its fields are the settings that the door accepts, ``presets`` names
sets of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from pyro_aevb.errors import SettingError
from pyro_aevb.evidence.result import LogMarginal
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.program.rows import CHUNK_DRAWS

__all__ = ["Estimator", "Problem", "require_guide"]

G = TypeVar("G")
AnEstimator = TypeVar("AnEstimator", bound="Estimator")


def _stand_still(fraction: float) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Problem:
    """Rows of one chunk with the globals fixed.

    Attributes:
        density: log p(x_n, z_n | g) of the rows.
        guide: q(z_n | x_n, g) in the same coordinates; ``None`` where no guide was given.
        noise: The rows' random numbers.
        advance: Called with the fraction of the chunk's work that was done since the last call; the fractions sum to 1.
    """

    density: LogDensity
    guide: GuideDensity | None
    noise: RowNoise
    advance: Callable[[float], None] = field(default=_stand_still)

    def require_guide(self, method: str) -> GuideDensity:
        """Return the guide.

        Raises:
            SettingError: If there is none.
        """
        return require_guide(self.guide, method)


@dataclass(frozen=True)
class Estimator(ABC):
    """A way to estimate log p(x) of rows; a subclass is a frozen dataclass of its settings, checked when it is made.

    Attributes:
        method: Its name at the door.
        presets: Settings by the name of their set.

    Raises:
        SettingError: If a setting is out of range.
    """

    method: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset(cls: type[AnEstimator], name: str, **settings: Any) -> AnEstimator:
        """Make an estimator with a named set of settings; those given by name come before the set's.

        Raises:
            SettingError: If there is no such set.
        """
        return cls(**{**cls.find_preset(name), **settings})

    @classmethod
    def find_preset(cls, name: str) -> Mapping[str, Any]:
        """Return a named set of settings.

        Raises:
            SettingError: If there is no such set.
        """
        if name not in cls.presets:
            known = f"known are {', '.join(map(repr, cls.presets))}" if cls.presets else "it has none"
            raise SettingError(f"Method {cls.method!r} has no preset {name!r}; {known}.")
        return cls.presets[name]

    @property
    @abstractmethod
    def draws_per_row(self) -> int:
        """How many latents of one row are evaluated at once, which decides how many rows are."""

    def rows_at_once(self, dim: int) -> int:
        """Return how many rows of so many coordinates are in memory at once, unless the caller says."""
        return max(1, CHUNK_DRAWS // self.draws_per_row)

    @abstractmethod
    def estimate(self, problem: Problem) -> LogMarginal:
        """Estimate log p(x_n | g) of each row, in nats.

        Called without gradients, under the programs' eval mode; an estimator that needs gradients enters ``torch.enable_grad()``.
        Every random number of a row comes from ``problem.noise``, so that chunks of rows change nothing.

        Returns:
            One entry a row, in float64.

        Raises:
            SettingError: If the problem lacks what the method needs.
        """


def require_guide(guide: G | None, method: str) -> G:
    """Return the guide that a method draws from.

    Raises:
        SettingError: If there is none.
    """
    if guide is None:
        raise SettingError(
            f"Method {method!r} draws from a guide here, and guide=None was given. Give the trained guide, or use a method that "
            "does without: 'ais' from the prior, 'bridge', 'reciprocal' or 'quadrature'."
        )
    return guide
