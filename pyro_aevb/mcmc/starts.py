"""Where chains start: half of them from the guide, half from where annealing leads from the prior.

A guide alone is no start: it can miss most of a row's mass, and chains that all start in one mode agree with each other. Annealing
knows nothing of the guide, and its weights say how much mass lies where it ended. Where the two halves do not come to agree, the
row is flagged (:mod:`pyro_aevb.mcmc.draws`).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb.mcmc.annealing import PILOT_CHAINS, Annealed, anneal, tune
from pyro_aevb.mcmc.noise import RowNoise, Stream
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.proposal import GuideDensity

__all__ = ["draw_starts"]

Positions = Float[Tensor, "chains rows latent"]
Scale = Float[Tensor, "rows latent"]

_NUM_TEMPERATURES = 40
_FIRST = 1e-8
_NUM_LEAPFROG = 4
_FORK = 0x57A27
"""Which fork of a row's noise is for starts: chains that annealed by some numbers must not move on by them."""
_NUM_DRAWS = 64


def draw_starts(
    density: LogDensity, guide: GuideDensity | None, noise: RowNoise, *, num_chains: int
) -> tuple[Positions, Scale]:
    """Draw starting points, and guess the standard deviations of each row's posterior.

    The first half of the chains starts at draws from the guide, without one from the prior; the second half at end states of an
    annealing run from the prior, resampled by their weights. Costs some ``160 * (num_chains + 3)`` gradients a row.

    Args:
        density: The rows.
        guide: Their guide.
        noise: The rows' random numbers; forks of it are used.
        num_chains: Chains of a row; even.

    Raises:
        SettingError: If the density can't be drawn from its prior.
    """
    half, fork = num_chains // 2, noise.fork(_FORK)
    # torch's seeds of the prior and of the guide must differ, else both would draw by the same numbers
    seeds = [(fork.seed + place) % 2**31 for place in range(2)]
    num_annealed = num_chains if guide is not None else 2 * num_chains
    from_prior = density.draw_prior(max(_NUM_DRAWS, num_annealed + PILOT_CHAINS), seed=seeds[0])
    scale = _spread(from_prior)
    ends = _anneal(density, fork, from_prior[: num_annealed + PILOT_CHAINS], scale=scale)
    groups = [(ends.position[:num_chains], ends.log_weights[:num_chains])]
    if guide is None:
        groups.append((ends.position[num_chains:], ends.log_weights[num_chains:]))
    else:
        from_guide, log_q = guide.draw(_NUM_DRAWS, seed=seeds[1])
        groups.append((from_guide, density.log_joint(from_guide) - log_q))
        scale = _spread(from_guide)
    second, first = (
        _resample(*group, fork.uniform(Stream.RESAMPLING, step, half)) for step, group in enumerate(groups)
    )
    return torch.cat((first, second)), scale


def _anneal(density: LogDensity, noise: RowNoise, position: Positions, *, scale: Scale) -> Annealed:
    """Anneal all but the first chains, which tune the steps, from the prior to the posterior."""

    def path(u: Tensor) -> tuple[Tensor, Tensor]:
        value = density(u)
        return value.log_prior, value.log_joint

    schedule = torch.cat((torch.zeros(1), torch.logspace(math.log10(_FIRST), 0, _NUM_TEMPERATURES))).double()
    pilot, start = position[:PILOT_CHAINS], position[PILOT_CHAINS:]
    steps = tune(path, pilot, schedule, noise, scale=scale, num_leapfrog=_NUM_LEAPFROG)
    return anneal(path, start, schedule, noise, step_size=steps, scale=scale, num_leapfrog=_NUM_LEAPFROG)


def _resample(
    position: Float[Tensor, "draws rows latent"],
    log_weights: Float[Tensor, "draws rows"],
    uniform: Float[Tensor, "chains rows"],
) -> Positions:
    """Choose draws of each row by their weights; a draw without a weight counts only where no draw of the row has one."""
    log_weights = log_weights.double().nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    log_weights = log_weights.masked_fill((log_weights == -torch.inf).all(0), 0.0)
    bounds = log_weights.softmax(0).cumsum(0).T.contiguous()
    points = uniform.T.double() * bounds[:, -1:]
    index = torch.searchsorted(bounds, points.contiguous()).T
    return position.take_along_dim(index[..., None], 0)


def _spread(draws: Float[Tensor, "draws rows latent"]) -> Scale:
    """Return standard deviations, 1 where they are not a positive number."""
    sd = draws.std(0)
    return sd.where(sd.isfinite() & (sd > 0), 1.0)
