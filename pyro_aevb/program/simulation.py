"""Draws from the model itself: latents and observations of a batch, with globals given or drawn too."""

from collections.abc import Mapping

from pyro import poutine
from torch import Tensor

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.program.model_rows import given_globals
from pyro_aevb.program.particles import ParticleAxes, as_draws, run_program
from pyro_aevb.program.structure import Structure

__all__ = ["simulate_rows"]


def simulate_rows(
    model: PyroProgram, structure: Structure, args: Args, kwargs: Kwargs, *, given: Mapping[str, Tensor] | None = None
) -> Values:
    """Draw a model's latent and observed sites from the generators as they are.

    Args:
        model: The model.
        structure: Its structure.
        args: A batch whose shapes and covariates are used and whose observations are ignored, as positional arguments.
        kwargs: The same, as keyword arguments.
        given: Values of the model's globals; without them they are drawn too, once for all rows.

    Returns:
        ``{site: [rows, inner plates, *event]}``; globals have no rows.

    Raises:
        ModelError: If some but not all globals are given.
        SettingError: If a value is given that is not the model's.
    """
    values = given_globals(structure, dict(given)).values if given else {}
    # as Pyro has them in a run without particles
    values = {name: value.reshape(value.shape[value.dim() - structure.ranks[name] :]) for name, value in values.items()}
    records = run_program(poutine.uncondition(model), structure, ParticleAxes(), args, kwargs, values=values)
    chosen = [site for name, site in records.items() if structure.sites[name].kind in ("latent", "observed")]
    return {site.name: as_draws(site, structure)[0] for site in chosen}
