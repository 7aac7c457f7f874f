r"""Draws from the posterior of every row by Hamiltonian Monte Carlo: all rows and chains move together, each row on its own terms.

Chains start in two ways (:mod:`pyro_aevb.mcmc.starts`), leave modes without mass (:mod:`pyro_aevb.mcmc.modes`) and learn a step
size and scales of each row in a warm-up, freeze them, and draw. Every random number belongs to its row, and what is learned for all
rows is learned from all chunks, so that chunks of rows change nothing.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import PyroProgram, Values
from pyro_aevb.errors import SettingError
from pyro_aevb.mcmc.adaptation import WarmUp, warm_up
from pyro_aevb.mcmc.draws import PosteriorDraws, assess, concatenate
from pyro_aevb.mcmc.hmc import Advance, nothing, sample, start
from pyro_aevb.mcmc.length import choose_num_leapfrog, measure_lengths
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.mcmc.starts import count_starts, draw_starts
from pyro_aevb.program.compiling import Compile
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.model_rows import ModelRows
from pyro_aevb.program.processes import Processes
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.program.rows import CHUNK_DRAWS, inferring
from pyro_aevb.program.settings import check_count, check_covariates, check_share

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["hmc_posterior", "sample_rows"]

Trajectory: TypeAlias = str
"""``"jittered"`` or ``"chees"``."""

_TRAJECTORIES = ("jittered", "chees")
_LONGEST = 10
"""How many times as long a learned trajectory may be as those of the warm-up."""


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
    trajectory: Trajectory = "jittered",
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    compile: Compile = "auto",  # noqa: A002  torch's own word
    seed: int | None = None,
    fabric: "Fabric | None" = None,
    progress: bool = True,
    **covariates: Any,
) -> PosteriorDraws:
    r"""Draw from p(z | x, g) of each row by Hamiltonian Monte Carlo (Neal 2011, arXiv 1206.1901).

    The draws are exact in the limit of long chains, whatever the guide: it only says where half of the chains start; the other
    half starts where annealing leads from the prior. Chains in modes that hold next to no mass leave them in the warm-up; if the
    halves do not come to agree then, the row is flagged. How many chains are in each of several modes that hold mass and that no
    chain connects says where they started, not how much mass that is.

    Every row has its own step size and scales, learned in the warm-up by dual averaging and then frozen. The number of leapfrog
    steps of a transition is drawn from 1 to ``num_leapfrog``, the same for all rows. Gradients: per row and chain
    ``(warmup_steps + num_samples) * (num_leapfrog + 1) / 2`` on average, and for the starts some 400 with a guide and 700 without.
    Modules run in eval mode, parameters are held fixed.

    With ``trajectory="chees"`` the most leapfrog steps of a draw are learned after the warm-up, one number for all rows, from 1 to
    ``10 * num_leapfrog`` (Hoffman, Radul and Sountsov 2021; :mod:`pyro_aevb.mcmc.length`), at ``40 * num_leapfrog`` gradients of
    each chain. That pays where a posterior is far longer in one direction than in another. By that number, the draws of a row
    depend on the other rows of the batch.

    Args:
        model: The model.
        *batch: Rows, as positional arguments of the model; numpy arrays are accepted.
        guide: The guide, trained or not.
        given: Values of the model's globals; required where there are any, unless ``data_plate=None``.
        num_chains: Chains of each row; even.
        num_samples: Draws of each chain after the warm-up; at least 4 for diagnostics.
        warmup_steps: Transitions before that.
        target_accept_prob: Acceptance probability that step sizes are tuned to.
        num_leapfrog: Most leapfrog steps of a transition; with ``trajectory="chees"`` of those of the warm-up.
        trajectory: ``"jittered"``, or ``"chees"`` to learn the most leapfrog steps of the draws.
        chunk_size: Rows sampled at once; by default so many that some 50,000 latents are in memory. It changes no
            draw by more than rounding does. A model that draws its own rows runs as many as it draws, whatever this says.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None`` to treat the whole model as one row, globals
            among its latents.
        compile: Whether densities are recorded and compiled, as of :class:`~pyro_aevb.LogDensity`.
        seed: Seed of the draws; the generators are left as they were.
        fabric: A ``lightning_fabric.Fabric`` whose processes divide the rows among them. Each is given all rows and gets all
            draws: those of one process under that seed, to rounding.
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
        >>> from pyro_aevb import hmc_posterior
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
        ...         pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> settings = dict(num_samples=60, warmup_steps=40, num_leapfrog=3, seed=0, progress=False)
        >>> draws = hmc_posterior(model, torch.tensor([3.0, 0.0, 6.0]), **settings)
        >>> draws.samples["rate"].shape
        torch.Size([16, 60, 3])
        >>> exact = torch.tensor([5.0, 2.0, 8.0]) / 2.5
        >>> bool(((draws.samples["rate"].mean((0, 1)) - exact).abs() < 0.2).all())
        True
    """
    began = time.perf_counter()
    settings = _Settings(
        num_chains, num_samples, warmup_steps, target_accept_prob, num_leapfrog=num_leapfrog, trajectory=trajectory
    )
    check_count("chunk_size", chunk_size, is_optional=True)
    check_covariates(covariates, hmc_posterior)
    processes = Processes(fabric)
    seed = processes.agree_on_seed(seed)
    with inferring(seed, model, *([] if guide is None else [guide])):
        density = LogDensity(model, *batch, data_plate=data_plate, given=given, compile=compile, **covariates)
        density.require_latents()
        _check_one_value(density)
        proposal = None if guide is None else GuideDensity(guide, density)
        key = int(torch.randint(2**31, ())) if seed is None else seed
        noise = RowNoise(key, torch.arange(density.num_rows), dtype=density.dtype, device=density.device)
        fixed = (density if proposal is None else proposal).chunk_rows
        most = min(CHUNK_DRAWS // count_starts(num_chains), -(-density.num_rows // processes.count))
        size = fixed or chunk_size or max(1, most)
        places = [slice(begin, min(begin + size, density.num_rows)) for begin in range(0, density.num_rows, size)]
        parts = _sample_chunks(density, proposal, noise, processes.own(places), settings, processes, progress=progress)
    result = replace(concatenate(parts), seconds=time.perf_counter() - began)
    if density.structure is not None and density.structure.data_plate is None:
        result = replace(result, samples={name: value.squeeze(2) for name, value in result.samples.items()})
    if processes.is_first:
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
    trajectory: Trajectory = "jittered",
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
        trajectory: As there; learned from these rows.
        advance: Is told of the progress.

    Raises:
        SettingError: If a setting is out of range.
    """
    settings = _Settings(
        num_chains, num_samples, warmup_steps, target_accept_prob, num_leapfrog=num_leapfrog, trajectory=trajectory
    )
    return next(_sample([_Chunk(density, guide, noise, advance)], settings))


@dataclass(frozen=True)
class _Settings:
    """Settings of chains, checked; their meaning is told by :func:`hmc_posterior`."""

    num_chains: int
    num_samples: int
    warmup_steps: int
    target_accept_prob: float
    _: KW_ONLY
    num_leapfrog: int
    trajectory: Trajectory

    def __post_init__(self) -> None:
        if not isinstance(self.num_chains, Integral) or self.num_chains < 2 or self.num_chains % 2:
            raise SettingError(
                "num_chains must be an even integer of at least 2: half of the chains start in each of two ways; got "
                f"{self.num_chains!r}."
            )
        check_share("target_accept_prob", self.target_accept_prob)
        for name in ("num_samples", "warmup_steps", "num_leapfrog"):
            check_count(name, getattr(self, name))
        if self.trajectory not in _TRAJECTORIES:
            raise SettingError(f"trajectory must be one of {', '.join(_TRAJECTORIES)}; got {self.trajectory!r}.")


class _Chunk(NamedTuple):
    """Rows that are in memory at once: their densities, their random numbers, and who is told of their progress."""

    density: LogDensity
    guide: GuideDensity | None
    noise: RowNoise
    advance: Advance


def _sample_chunks(
    density: LogDensity,
    guide: GuideDensity | None,
    noise: RowNoise,
    places: Sequence[slice],
    settings: _Settings,
    processes: Processes,
    *,
    progress: bool,
) -> list[PosteriorDraws]:
    """Draw this process's chunks of rows, and return those of all."""
    num_steps = settings.warmup_steps + settings.num_samples
    indices = [torch.arange(density.num_rows)[place] for place in places]
    with _Bar(sum(map(len, indices)) * num_steps, progress=progress and processes.is_first) as bar:
        chunks = []
        for place, rows in zip(places, indices, strict=True):
            guided = None if guide is None else guide.rows(place)
            chunks.append(_Chunk(density.rows(place), guided, noise.rows(place), bar.part(len(rows) * num_steps)))
        pairs = zip(chunks, _sample(chunks, settings, processes), strict=True)
        own = [replace(draws, samples=_constrain(chunk.density, draws.unconstrained)) for chunk, draws in pairs]
    return processes.gather(own)


def _sample(
    chunks: Sequence[_Chunk], settings: _Settings, processes: Processes | None = None
) -> Iterator[PosteriorDraws]:
    """Warm up all chunks, so that what is learned for all rows is learned from all, then draw from one after the other."""
    warm = [_warm_up(chunk, settings) for chunk in chunks]
    num_leapfrog = settings.num_leapfrog
    if settings.trajectory == "chees":
        criteria = [_measure(chunk, one, settings) for chunk, one in zip(chunks, warm, strict=True)]
        criteria = criteria if processes is None else processes.gather(criteria)
        num_leapfrog = choose_num_leapfrog(torch.cat(criteria, 1))
    for chunk, one in zip(chunks, warm, strict=True):
        yield _draw(chunk, one, settings, num_leapfrog)


def _warm_up(chunk: _Chunk, settings: _Settings) -> WarmUp:
    """Find starts, and warm up from there."""
    target = chunk.density.log_joint
    position, scale = draw_starts(chunk.density, chunk.guide, chunk.noise, num_chains=settings.num_chains)
    share = settings.warmup_steps / (settings.warmup_steps + settings.num_samples)
    return warm_up(
        target,
        start(target, position),
        chunk.noise,
        num_steps=settings.warmup_steps,
        target_accept_prob=settings.target_accept_prob,
        num_leapfrog=settings.num_leapfrog,
        scale=scale,
        advance=lambda fraction: chunk.advance(share * fraction),
    )


def _measure(chunk: _Chunk, warm: WarmUp, settings: _Settings) -> Float[Tensor, "lengths rows"]:
    """Return ChEES's criterion of each length and row."""
    return measure_lengths(
        chunk.density.log_joint,
        warm.state,
        chunk.noise,
        step_size=warm.step_size,
        scale=warm.scale,
        max_num_leapfrog=_LONGEST * settings.num_leapfrog,
    )


def _draw(chunk: _Chunk, warm: WarmUp, settings: _Settings, num_leapfrog: int) -> PosteriorDraws:
    """Draw by what the warm-up froze, and judge the draws."""
    share = settings.num_samples / (settings.warmup_steps + settings.num_samples)
    draws = sample(
        chunk.density.log_joint,
        warm.state,
        chunk.noise,
        num_draws=settings.num_samples,
        step_size=warm.step_size,
        scale=warm.scale,
        num_leapfrog=num_leapfrog,
        advance=lambda fraction: chunk.advance(share * fraction),
    )
    judged = assess(
        draws.position,
        draws.log_density,
        acceptance=draws.acceptance,
        step_size=warm.step_size,
        num_divergent=draws.num_divergent,
    )
    return replace(judged, num_leapfrog=num_leapfrog)


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
