"""Where chains start: half of them from the guide, half from where annealing leads from the prior.

A guide alone is no start: it can miss most of a row's mass, and chains that all start in one mode agree with each other. Annealing
knows nothing of the guide, and its weights say how much mass lies where it ended. They are flattened, so that a mode that one draw
found is not lost by the luck of its weight; modes that hold next to nothing are left in the warm-up (:mod:`pyro_aevb.mcmc.modes`).
Where the two halves do not come to agree, the row is flagged (:mod:`pyro_aevb.mcmc.draws`).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb.mcmc.annealing import PILOT_CHAINS, Annealed, anneal, tune
from pyro_aevb.mcmc.noise import RowNoise, Stream
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.proposal import GuideDensity

__all__ = ["count_starts", "draw_starts"]

Positions = Float[Tensor, "chains rows latent"]
Scale = Float[Tensor, "rows latent"]

_NUM_TEMPERATURES = 40
_FIRST = 1e-5
"""First inverse temperature: a likelihood far narrower than the prior is felt little by little."""
_NUM_LEAPFROG = 4
_DRAWS_PER_START = 4
_GUIDE_DRAWS = 64
_MAX_HALVINGS = 20
_FORK = 0x57A27
"""Which fork of a row's noise is for starts: chains that annealed by some numbers must not move on by them."""


def count_starts(num_chains: int) -> int:
    """Return how many latents of one row are in memory at once to find starts for so many chains."""
    return PILOT_CHAINS + max(_DRAWS_PER_START * num_chains, _GUIDE_DRAWS)


def draw_starts(
    density: LogDensity, guide: GuideDensity | None, noise: RowNoise, *, num_chains: int
) -> tuple[Positions, Scale]:
    """Draw starting points, and guess the standard deviations of each row's posterior.

    The first half of the chains starts at draws from the guide; the second half at end states of an annealing run from the prior,
    four for each chain; without a guide, the first half at those of another such run. All are resampled by weight. Costs some
    ``320 * num_chains + 1000`` gradients a row; without a guide, whose draws cost none, ``640 * num_chains + 1000``.

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
    size = _DRAWS_PER_START * half
    num_annealed = size if guide is not None else 2 * size
    from_prior = density.draw_prior(count_starts(num_chains), seed=seeds[0])
    scale = _spread(from_prior)
    ends = _anneal(density, fork, from_prior[: PILOT_CHAINS + num_annealed], scale=scale)
    groups = list(zip(ends.position.split(size), ends.log_weights.split(size), strict=True))
    if guide is not None:
        from_guide, log_q = guide.draw(max(_GUIDE_DRAWS, size), seed=seeds[1])
        groups.append((from_guide, density.log_joint(from_guide) - log_q))
        scale = _spread(from_guide)
    chosen = [_resample(*group, fork.uniform(Stream.RESAMPLING, step, 1), half) for step, group in enumerate(groups)]
    return torch.cat(chosen[::-1]), scale


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
    uniform: Float[Tensor, "1 rows"],
    count: int,
) -> Positions:
    """Choose draws of each row by their weights, systematically, so that heavy ones are never left out.

    A few draws with the luck of the weights must not stand for all, or a mode would be lost that others had found: weights are
    flattened by a power until at least a quarter of the draws counts (in terms of effective size), as they are mostly noise beyond
    that. What is far off has no weight still. A draw without a weight counts only where no draw of the row has one.
    """
    log_weights = log_weights.double().nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    log_weights = log_weights.masked_fill((log_weights == -torch.inf).all(0), 0.0)
    exponent = log_weights.new_ones(log_weights.shape[1])
    for _ in range(_MAX_HALVINGS):
        weights = (exponent * log_weights).softmax(0)
        is_narrow = weights.square().sum(0) > 4 / len(weights)
        exponent = torch.where(is_narrow, exponent / 2, exponent)
    points = (torch.arange(count, dtype=torch.float64)[:, None].to(uniform.device) + uniform.double()) / count
    bounds = weights.cumsum(0)
    index = torch.searchsorted(bounds.T.contiguous(), (points * bounds[-1]).T.contiguous()).T
    return position.take_along_dim(index[..., None], 0)


def _spread(draws: Float[Tensor, "draws rows latent"]) -> Scale:
    """Return standard deviations, 1 where they are not a positive number."""
    sd = draws.std(0)
    return sd.where(sd.isfinite() & (sd > 0), 1.0)
