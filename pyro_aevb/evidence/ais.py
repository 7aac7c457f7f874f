"""log p(x) of each row by annealed importance sampling."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from typing_extensions import override

from pyro_aevb._types import PerRow
from pyro_aevb.errors import SettingError
from pyro_aevb.evidence.mixture import few_rows, weigh_with_prior
from pyro_aevb.evidence.problem import Estimator, Problem
from pyro_aevb.evidence.result import Bound, LogMarginal
from pyro_aevb.evidence.rules import degrees_of_freedom, rate
from pyro_aevb.evidence.summary import quantile
from pyro_aevb.mcmc.annealing import PILOT_CHAINS, Annealed, Path, anneal, sigmoid_schedule, tune
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.program.settings import check_count

__all__ = ["AIS", "ROUNDING", "Ladder", "average_weights"]

_DRAWS_FOR_SCALE = 64
_PRIOR_FORK, _AUDIT_FORK, _CHECK_FORK = 1, 2, 3
_GUIDE_DRAWS, _PRIOR_DRAWS = 500, 2000
"""Draws of a row for its check: the guide's tell of what it knows, the prior's of what it misses."""
_SHARE_OF_CHECK = 0.1  # of the time, for the progress bar
ROUNDING = 1e-3
"""Nats by which two values may differ without a reason: constant weights have no standard error, but rounding."""
_THREE_SIGMA = math.erf(3 / math.sqrt(2))


class Ladder(NamedTuple):
    """A path between two densities with everything that a run along it needs; the same steps serve up and down.

    Attributes:
        path: Log densities of both ends.
        start: Exact draws from the start, one a chain.
        schedule: Inverse temperatures.
        step_size: Step of each row at each temperature between the ends.
        scale: Units of the steps.
    """

    path: Path
    start: Float[Tensor, "chains rows latent"]
    schedule: Float[Tensor, " temperatures"]
    step_size: Float[Tensor, "transitions rows"]
    scale: Float[Tensor, "rows latent"]


@dataclass(frozen=True, kw_only=True)
class AIS(Estimator):
    r"""Annealed importance sampling along a path of bridging densities, by Hamiltonian transitions.

    .. math:: \log f_\beta(z) = (1 - \beta) \log f_0(z) + \beta \log p(x, z), \quad
              \widehat{\log p}(x) = \log \frac1C \sum_c w_c

    with :math:`f_0 = q(z | x)` or the prior (Neal 2001; Wu et al. 2017, arXiv 1611.04273), weights as in
    :mod:`pyro_aevb.mcmc.annealing`. A pilot run tunes a step size for each row and temperature; the weighted run takes them as
    they are. The mean weight is then unbiased for p(x), and the value a stochastic lower bound, however few the temperatures.

    From the guide a tenth of the temperatures does, where the guide is good; a mode that it does not know stays unfound. Every row
    is therefore checked by importance sampling from a mixture of the guide and the prior
    (:func:`~pyro_aevb.evidence.mixture.weigh_with_prior`, 500 and 2,000 draws), and some are run from the prior too (``audit``). A
    row is unreliable where the check lies more than three standard errors above the value, or the run from the prior that far to
    either side, or where no chain has a weight; where more than one and more than a twentieth of such runs differ, a warning
    doubts the other rows. What the prior's draws do not meet, a narrow mode among many latents or one of little more mass than
    that of the others, the check does not find.

    ``lower`` is the value; where the check refutes it, ``lower`` is the check's, which is a stochastic lower bound too. Chosen
    after such a test, its expectation may lie above the truth; it is b nats above it with a probability of at most
    :math:`2 e^{-b}`.

    Costs ``C T L`` gradients of log p(x, z) and log f_0 a row, an eighth more for the pilot (of 16 chains and 300 temperatures),
    the audited share of that, and 5,500 densities for the check. No gradient.

    Args:
        num_chains: C. Below 64 intervals need Student-t quantiles, which ``LogMarginal.interval`` uses.
        num_temperatures: T; 1 is importance sampling from the start.
        num_leapfrog: L, leapfrog steps of a transition.
        target_accept_prob: Acceptance that the pilot aims at.
        start: ``"guide"``, ``"prior"``, or ``None``: the guide where there is one.
        audit: Share of rows that are run from the prior too, where the start is the guide. 0 leaves out the check of every row
            as well, such as for a prior that can't be drawn from.

    Raises:
        SettingError: If a setting is out of range.
    """

    method: ClassVar[str] = "ais"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {"num_temperatures": 100},
        "default": {},
        "wu2017": {"num_temperatures": 10_000, "num_leapfrog": 10, "start": "prior"},
    }

    num_chains: int = 16
    num_temperatures: int = 300
    num_leapfrog: int = 5
    target_accept_prob: float = 0.65
    start: str | None = None
    audit: float = 0.1

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_temperatures", "num_leapfrog"):
            check_count(name, getattr(self, name))
        if not 0 < self.target_accept_prob < 1:
            raise SettingError(f"target_accept_prob must lie between 0 and 1, got {self.target_accept_prob!r}.")
        if self.start not in (None, "guide", "prior"):
            raise SettingError(f"start must be 'guide', 'prior' or None, got {self.start!r}.")
        if not 0 <= self.audit <= 1:
            raise SettingError(f"audit must be a share of rows from 0 to 1, got {self.audit!r}.")

    @property
    @override
    def draws_per_row(self) -> int:
        return self.num_chains

    @override
    def estimate(self, problem: Problem) -> LogMarginal:
        start = self.start or ("prior" if problem.guide is None else "guide")
        if start == "prior" or not self.audit:
            return self._result(self.climb(problem, start, advance=problem.advance)[1])
        audited = _audited(problem.noise, self.audit)
        twice = (1 - _SHARE_OF_CHECK) * len(audited) / (problem.density.num_rows + len(audited))
        once = 1 - _SHARE_OF_CHECK - twice
        _, run = self.climb(problem, start, advance=lambda fraction: problem.advance(once * fraction))
        result = self._result(run)
        check = _check(problem)
        problem.advance(_SHARE_OF_CHECK)
        is_missed = _exceeds(check.value - result.value, result.standard_error, check.standard_error, self.num_chains)
        is_refuted, audit = is_missed, torch.full_like(result.value, math.nan)
        if len(audited):
            differs = self._differs(result.rows(audited), self._run_again(problem, audited, twice))
            audit = audit.index_put((audited,), differs.to(audit))
            is_refuted = is_missed | (audit > 0)
        return replace(
            result,
            lower=torch.where(is_missed, check.value, result.value),
            audit=audit,
            status=rate(result.standard_error, acceptance=result.acceptance, is_refuted=is_refuted),
        )

    def _differs(self, result: LogMarginal, other: LogMarginal) -> Bool[Tensor, " rows"]:
        """Say which rows differ from a run of theirs from another start."""
        difference = (result.value - other.value).abs()
        return _exceeds(difference, result.standard_error, other.standard_error, self.num_chains)

    def _run_again(self, problem: Problem, audited: Tensor, share: float) -> LogMarginal:
        """Run some rows from the prior."""
        rows = replace(
            problem,
            density=problem.density.rows(audited),
            guide=None,
            noise=problem.noise.rows(audited).fork(_AUDIT_FORK),
        )
        return self._result(self.climb(rows, "prior", advance=lambda fraction: problem.advance(share * fraction))[1])

    def climb(self, problem: Problem, start: str, *, advance: Callable[[float], None]) -> tuple[Ladder, Annealed]:
        """Tune a ladder from the guide or the prior to log p(x, z), and run up.

        Args:
            problem: The rows.
            start: ``"guide"`` or ``"prior"``.
            advance: Is told of the progress.
        """
        path, draws = _start(problem, start, _DRAWS_FOR_SCALE + self.num_chains)
        # What shapes the transitions must not know the chains that they move.
        pilot, position = draws[:_DRAWS_FOR_SCALE], draws[_DRAWS_FOR_SCALE:]
        schedule, scale = sigmoid_schedule(self.num_temperatures), _spread(pilot)
        share = self.num_chains / (self.num_chains + PILOT_CHAINS / 2)
        step_size = tune(
            path,
            pilot[:PILOT_CHAINS],
            schedule,
            problem.noise,
            scale=scale,
            num_leapfrog=self.num_leapfrog,
            target_accept_prob=self.target_accept_prob,
            advance=lambda fraction: advance((1 - share) * fraction),
        )
        ladder = Ladder(path, position, schedule, step_size, scale)
        return ladder, self._run(ladder, problem.noise, lambda fraction: advance(share * fraction))

    def descend(
        self, ladder: Ladder, position: Float[Tensor, "rows latent"], noise: RowNoise, advance: Callable[[float], None]
    ) -> Annealed:
        """Run all chains down a ladder from one exact posterior draw of each row; the mean weight estimates 1 / p(x).

        Args:
            ladder: What :meth:`climb` tuned.
            position: The draws.
            noise: Other numbers than the way up had.
            advance: Is told of the progress.
        """
        down = Ladder(
            ladder.path,
            position.expand(self.num_chains, *position.shape),
            ladder.schedule.flip(0),
            ladder.step_size.flip(0),
            ladder.scale,
        )
        return self._run(down, noise, advance)

    def _run(self, ladder: Ladder, noise: RowNoise, advance: Callable[[float], None]) -> Annealed:
        return anneal(
            ladder.path,
            ladder.start,
            ladder.schedule,
            noise,
            step_size=ladder.step_size,
            scale=ladder.scale,
            num_leapfrog=self.num_leapfrog,
            advance=advance,
        )

    def _result(self, run: Annealed) -> LogMarginal:
        """Average the chains' weights."""
        value, standard_error, ess = average_weights(run.log_weights)
        acceptance = run.acceptance.double()
        return LogMarginal(
            value=value,
            standard_error=standard_error,
            lower=value,
            upper=torch.full_like(value, math.nan),
            k_hat=torch.full_like(value, math.nan),
            ess=ess,
            status=rate(standard_error, acceptance=acceptance),
            method=self.method,
            num_samples=self.num_chains,
            bound=Bound.LOWER,
            acceptance=acceptance,
            degrees_of_freedom=degrees_of_freedom(self.num_chains),
        )


def average_weights(log_weights: Float64[Tensor, "chains rows"]) -> tuple[PerRow, PerRow, PerRow]:
    r"""Average the weights of few independent chains.

    Returns:
        log mean weight in nats, its standard error by the delta method :math:`\mathrm{sd}(w) / (\sqrt C \bar w)`, and the effective
        number of chains. The error is NaN where all weights are zero, or one is all there is.

    Example:
        >>> value, error, ess = average_weights(torch.tensor([[0.0], [0.0], [-torch.inf], [-torch.inf]]).double())
        >>> round(value.exp().item(), 6), round(error.item(), 6), ess.item()
        (0.5, 0.57735, 2.0)
    """
    log_max = log_weights.amax(0)
    log_max = log_max.where(log_max.isfinite(), 0.0)
    weights = (log_weights - log_max).exp()
    mean = weights.mean(0)
    spread = weights.std(0) if len(weights) > 1 else torch.full_like(mean, math.nan)
    ess = (weights.sum(0).square() / weights.square().sum(0)).nan_to_num(nan=0.0)
    return log_max + mean.log(), spread / math.sqrt(len(weights)) / mean, ess


def _start(problem: Problem, start: str, num_draws: int) -> tuple[Path, Float[Tensor, "draws rows latent"]]:
    """Return the path from a start to log p(x, z), and draws from the start."""
    density = problem.density
    # torch's seeds take 31 bits everywhere; the two starts must not share their draws
    seed = problem.noise.fork(_PRIOR_FORK).seed % 2**31
    if start == "guide":
        guide = problem.require_guide("ais from the guide")
        return guide.path, guide.draw(num_draws, seed=problem.noise.seed % 2**31)[0]

    def path(u: Tensor) -> tuple[Tensor, Tensor]:
        value = density(u)
        return value.log_prior, value.log_joint

    return path, density.draw_prior(num_draws, seed=seed)


def _spread(draws: Float[Tensor, "draws rows latent"]) -> Float[Tensor, "rows latent"]:
    """Return the standard deviation that a normal of the draws' quartiles has: tails do not matter. 1 where it is 0."""
    low, high = draws.quantile(draws.new_tensor([0.25, 0.75]), dim=0)
    spread = (high - low) / 1.349
    return torch.where(spread.isfinite() & (spread > 0), spread, 1.0)


def _audited(noise: RowNoise, share: float) -> Tensor:
    """Choose places of the rows that are run twice: evenly by their index in the whole batch, the first always among them."""
    index = noise.indices.double()
    return (((index + 1) * share).ceil() > (index * share).ceil()).nonzero()[:, 0]


class _Check(NamedTuple):
    """What importance sampling from the guide and the prior says of each row."""

    value: PerRow
    standard_error: PerRow


def _check(problem: Problem) -> _Check:
    """Weigh draws of the guide and of the prior under their mixture, some rows at a time."""
    noise = problem.noise.fork(_CHECK_FORK)
    # torch's seeds of the guide and of the prior must differ, else both would draw by the same numbers
    seed = (noise.seed + 1) % 2**31
    parts = []
    for _, part in few_rows(replace(problem, noise=noise), _GUIDE_DRAWS + _PRIOR_DRAWS):
        guide = part.require_guide("ais from the guide")
        u = guide.draw(_GUIDE_DRAWS, seed=seed)[0]
        weights = weigh_with_prior(part, u, guide.log_density, num_prior=_PRIOR_DRAWS)
        parts.append(average_weights(weights.log_weights)[:2])
    return _Check(*(torch.cat(entries) for entries in zip(*parts, strict=True)))


def _exceeds(difference: PerRow, first: PerRow, second: PerRow, num_chains: int) -> Bool[Tensor, " rows"]:
    """Say where two values differ by more than three standard errors, or one alone has no weight at all.

    Weights that are all zero have no standard error, but what finds density contradicts them. A difference without an error
    for another reason (a single chain) says nothing.
    """
    error = (first.square() + second.square()).sqrt()
    width = quantile(_THREE_SIGMA, degrees_of_freedom(num_chains)) * error + ROUNDING
    return (difference > width) | (difference == math.inf)
