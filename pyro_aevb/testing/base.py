"""What every exact model offers."""

from abc import ABC, abstractmethod
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyro_aevb._types import Values
from pyro_aevb.errors import SettingError

__all__ = ["ExactModel", "sample_marginal"]


class ExactModel(ABC):
    """A Pyro model of rows of data with its exact posterior and evidence."""

    @classmethod
    @abstractmethod
    def fixture(cls, dtype: torch.dtype = torch.float64) -> tuple["ExactModel", Tensor]:
        """Return one instance with data whose numbers are known from elsewhere.

        Args:
            dtype: Floating type of the data.

        Returns:
            The model and ``x``, the batch that its methods take.
        """

    @abstractmethod
    def model(self, x: Float[Tensor, "rows *event"]) -> None:
        """Run the generative model with ``x`` observed, as a Pyro program for a batch of rows."""

    @abstractmethod
    def guide(self, x: Float[Tensor, "rows *event"]) -> None:
        """Sample all latents from the exact posterior, as a Pyro guide for the same batch."""

    @abstractmethod
    def log_marginal(self, x: Float[Tensor, "rows *event"]) -> Float[Tensor, "*rows"]:
        r"""Compute :math:`\log p(x)` in closed form.

        Args:
            x: The batch.

        Returns:
            Nats, one entry a row; one number for the whole batch where the model has globals, which tie its rows.
        """

    @abstractmethod
    def posterior(self, x: Float[Tensor, "rows *event"]) -> dict[str, Distribution]:
        """Return the exact posterior marginal of each latent site.

        Args:
            x: The batch.

        Returns:
            Per site a distribution of batch shape ``[rows]``, or ``[]`` for a global.
        """

    @abstractmethod
    def _template(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        """Return any valid batch of that many rows; only its shape and dtype are used."""

    def simulate(self, num_rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Values]:
        """Draw data and their latents from the model.

        Args:
            num_rows: Number of rows, at least 1.
            seed: Seed of the draw, made on the CPU; the global random state is left as it was.
            dtype: Floating type of the draws.

        Returns:
            ``x`` and the value of each latent site.

        Raises:
            SettingError: If ``num_rows`` is below 1.
        """
        if num_rows < 1:
            raise SettingError(f"num_rows must be at least 1; got {num_rows}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trace = poutine.trace(poutine.uncondition(self.model)).get_trace(self._template(num_rows, dtype))
        sites: list[Any] = [site for site in trace.nodes.values() if site["type"] == "sample"]
        observed = [site["value"] for site in sites if site["infer"].get("was_observed")]
        latents = {
            site["name"]: site["value"]
            for site in sites
            if not site["infer"].get("was_observed") and not site_is_subsample(site)
        }
        return observed[0] if len(observed) == 1 else torch.stack(observed, -1), latents


def sample_marginal(site: str, posterior: dict[str, Any], num_rows: int) -> None:
    """Run the guide of a model with one latent a row."""
    with pyro.plate("data", num_rows):
        pyro.sample(site, posterior[site])
