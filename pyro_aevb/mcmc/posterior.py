r"""Draws from the posterior of every row by Hamiltonian Monte Carlo: all rows and chains move together, each row on its own terms.

Chains start in two ways (:mod:`pyro_aevb.mcmc.starts`), learn a step size and scales of each row in a warm-up, freeze them, and
draw. Every random number belongs to its row, so that chunks of rows change nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import PyroProgram, Values
from pyro_aevb.errors import SettingError
from pyro_aevb.mcmc.adaptation import warm_up
from pyro_aevb.mcmc.draws import PosteriorDraws, assess, concatenate
from pyro_aevb.mcmc.hmc import Advance, nothing, sample, start
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.mcmc.starts import draw_starts
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.model_rows import ModelRows
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.program.rows import CHUNK_DRAWS, inferring
from pyro_aevb.program.settings import check_count, check_covariates

__all__ = ["hmc_posterior", "sample_rows"]


def hmc_posterior(
    model: PyroProgram,
    *batch: Any,
    guide: PyroProgram | None = None,
    given: Mapping[str, Tensor] | None = None,
    num_chains: int = 16,
    num_samples: int = 200,
    warmup_steps: int = 200,
    target_accept_prob: float = 0.8,
    num_leapfrog: int = 10,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = True,
    **covariates: Any,
) -> PosteriorDraws:
    r"""Draw from p(z | x, g) of each row by Hamiltonian Monte Carlo (Neal 2011, arXiv 1206.1901).

    The draws are exact in the limit of long chains, whatever the guide: it only says where half of the chains start; the other
    half starts where annealing leads from the prior. If the halves do not come to agree, the row is flagged.

    Every row has its own step size and scales, learned in the warm-up by dual averaging and then frozen. The number of leapfrog
    steps of a transition is drawn from 1 to ``num_leapfrog``, the same for all rows. Gradients: per row and chain
    ``(warmup_steps + num_samples) * (num_leapfrog + 1) / 2`` on average, and some 160 for the starts. Modules run in eval mode,
    parameters are held fixed.

    Args:
        model: The model.
        *batch: Rows, as positional arguments of the model.
        guide: The guide, trained or not.
        given: Values of the model's globals; required where there are any, unless ``data_plate=None``.
        num_chains: Chains of each row; even.
        num_samples: Draws of each chain after the warm-up; at least 4 for diagnostics.
        warmup_steps: Transitions before that.
        target_accept_prob: Acceptance probability that step sizes are tuned to.
        num_leapfrog: Most leapfrog steps of a transition.
        chunk_size: Rows sampled at once; by default so many that some 50,000 chains are in memory. It changes no
            draw by more than rounding does.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None`` to treat the whole model as one row, globals
            among its latents.
        seed: Seed of the draws; the generators are left as they were.
        progress: Whether to show a progress bar.
        **covariates: The batch's keyword arguments.

    Returns:
        Draws on the latents' supports, ``samples[site]`` of shape ``[chains, draws, rows, ...]``, with acceptance, R-hat, ESS and
        a verdict on each row. Unreliable rows are told in one warning.

    Raises:
        SettingError: If a setting is out of range, a keyword unknown, or a value is given that is not a global's.
        ModelError: If a global is not given, a latent is discrete, or rows are not independent.
        DataError: If there are no rows, NaN reaches a density, or data lie outside the likelihood's support.
        GuideError: If the guide does not fit the model.

    Example:
        >>> from pyro_aevb.mcmc.posterior import hmc_posterior
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
        ...         pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> settings = dict(num_samples=60, warmup_steps=60, seed=0, progress=False)
        >>> draws = hmc_posterior(model, torch.tensor([3.0, 0.0, 6.0]), **settings)
        >>> draws.samples["rate"].shape
        torch.Size([16, 60, 3])
        >>> exact = torch.tensor([5.0, 2.0, 8.0]) / 2.5
        >>> bool(((draws.samples["rate"].mean((0, 1)) - exact).abs() < 0.2).all())
        True
    """
    _check_settings(num_chains, target_accept_prob)
    counts = {"num_samples": num_samples, "warmup_steps": warmup_steps, "num_leapfrog": num_leapfrog}
    for name, count in counts.items():
        check_count(name, count)
    check_count("chunk_size", chunk_size, is_optional=True)
    check_covariates(covariates, hmc_posterior)
    with inferring(seed, model, *([] if guide is None else [guide])):
        density = LogDensity(model, *batch, data_plate=data_plate, given=given, **covariates)
        _check_one_value(density)
        proposal = None if guide is None else GuideDensity(guide, density)
        key = int(torch.randint(2**31, ())) if seed is None else seed
        noise = RowNoise(key, torch.arange(density.num_rows), dtype=density.dtype, device=density.device)
        size = (density if proposal is None else proposal).chunk_rows or chunk_size or max(1, CHUNK_DRAWS // num_chains)
        parts = []
        with _Bar(density.num_rows * (warmup_steps + num_samples), progress=progress) as bar:
            for begin in range(0, density.num_rows, size):
                rows = slice(begin, min(begin + size, density.num_rows))
                part = density.rows(rows)
                draws = sample_rows(
                    part,
                    None if proposal is None else proposal.rows(rows),
                    noise.rows(rows),
                    num_chains=num_chains,
                    target_accept_prob=target_accept_prob,
                    advance=bar.part(part.num_rows * (warmup_steps + num_samples)),
                    **counts,
                )
                parts.append(replace(draws, samples=_constrain(part, draws.unconstrained)))
    result = concatenate(parts)
    if density.structure is not None and density.structure.data_plate is None:
        result = replace(result, samples={name: value.squeeze(2) for name, value in result.samples.items()})
    result.warn_if_unreliable()
    return result


def sample_rows(
    density: LogDensity,
    guide: GuideDensity | None,
    noise: RowNoise,
    *,
    num_chains: int = 16,
    num_samples: int = 200,
    warmup_steps: int = 200,
    target_accept_prob: float = 0.8,
    num_leapfrog: int = 10,
    advance: Advance = nothing,
) -> PosteriorDraws:
    """Draw as :func:`hmc_posterior` does, for rows that are in memory at once, and leave the draws unconstrained.

    Args:
        density: The rows.
        guide: Their guide.
        noise: The rows' random numbers.
        num_chains: As there.
        num_samples: As there.
        warmup_steps: As there.
        target_accept_prob: As there.
        num_leapfrog: As there.
        advance: Is told of the progress.

    Raises:
        SettingError: If ``num_chains`` is odd, or ``target_accept_prob`` not between 0 and 1.
    """
    _check_settings(num_chains, target_accept_prob)
    position, scale = draw_starts(density, guide, noise, num_chains=num_chains)
    share = warmup_steps / (warmup_steps + num_samples)
    state, step_size, scale = warm_up(
        density.log_joint,
        start(density.log_joint, position),
        noise,
        num_steps=warmup_steps,
        target_accept_prob=target_accept_prob,
        num_leapfrog=num_leapfrog,
        scale=scale,
        advance=lambda fraction: advance(share * fraction),
    )
    draws = sample(
        density.log_joint,
        state,
        noise,
        num_draws=num_samples,
        step_size=step_size,
        scale=scale,
        num_leapfrog=num_leapfrog,
        advance=lambda fraction: advance((1 - share) * fraction),
    )
    return assess(
        draws.position,
        draws.log_density,
        acceptance=draws.acceptance,
        step_size=step_size,
        num_divergent=draws.num_divergent,
    )


def _check_settings(num_chains: int, target_accept_prob: float) -> None:
    """Refuse what the halves of chains and step sizes can't be made of."""
    if not isinstance(num_chains, Integral) or num_chains < 2 or num_chains % 2:
        raise SettingError(
            f"num_chains must be an even integer of at least 2: half of the chains start in each of two ways; got {num_chains!r}."
        )
    if not 0 < target_accept_prob < 1:
        raise SettingError(f"target_accept_prob must lie between 0 and 1; got {target_accept_prob!r}.")


def _check_one_value(density: LogDensity) -> None:
    """Refuse several values of the globals."""
    leading = density.source.given.leading if isinstance(density.source, ModelRows) else ()
    if leading:
        raise SettingError(
            f"Chains are conditioned on one value of each global; the given ones have leading axes {list(leading)}. Give one draw "
            "of them after the other."
        )


def _constrain(density: LogDensity, u: Float[Tensor, "chains draws rows latent"]) -> Values:
    """Carry draws to the latents' supports, as many at once as chains were sampled at once."""
    size = max(1, CHUNK_DRAWS // (u.shape[0] * u.shape[2]))
    parts = [density.constrain(part) for part in u.split(size, dim=1)]
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


class _Bar:
    """A progress bar over rows times steps that takes fractions.

    Args:
        total: Rows times steps.
        progress: Whether to show it.
    """

    def __init__(self, total: int, *, progress: bool) -> None:
        self._bar = tqdm(total=total, disable=not progress, unit="step", unit_scale=True, dynamic_ncols=True)
        self._done = 0.0

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def part(self, steps: int) -> Advance:
        """Return what moves the bar by fractions of so many steps."""

        def advance(fraction: float) -> None:
            self._done += fraction * steps
            self._bar.update(round(self._done) - self._bar.n)

        return advance
