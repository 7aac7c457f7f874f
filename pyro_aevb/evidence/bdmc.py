"""Rigorous bounds on both sides of log p(x), for data that the model itself made: bidirectional Monte Carlo."""

import html
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import PerRow, PyroProgram
from pyro_aevb.evidence.ais import AIS, ROUNDING, average_weights
from pyro_aevb.evidence.problem import Problem
from pyro_aevb.evidence.result import Status
from pyro_aevb.evidence.rules import rate
from pyro_aevb.evidence.summary import number
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.program.batch import as_tensors
from pyro_aevb.program.compiling import Compile, check_compile
from pyro_aevb.program.observations import ToBatch
from pyro_aevb.program.rows import CHUNK_DRAWS, inferring
from pyro_aevb.program.settings import check_count, check_covariates
from pyro_aevb.program.simulated import Simulator
from pyro_aevb.program.structure import Structure

if TYPE_CHECKING:
    import pandas

__all__ = ["BDMCResult", "BDMCSummary", "bdmc"]

_DOWN_FORK = 3
_BAR = "{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


@dataclass(frozen=True)
class BDMCSummary:
    r"""Means of both bounds over the simulated rows, in nats.

    Attributes:
        num_simulations: Number of simulated rows N.
        lower: Mean lower bound.
        lower_standard_error: Its Monte Carlo error for these rows, :math:`\sqrt{\sum_n se_n^2} / N`.
        upper: Mean upper bound.
        upper_standard_error: Its Monte Carlo error for these rows, sd of the gap over rows / sqrt(N). It holds the error of the
            lower bound and what rows differ in too, and so is rather too large (by a quarter on three normal latents); the rows'
            own errors would be too small. NaN for a single row.
        gap: ``upper - lower``: on average over data from the model, annealing errs by no more on either side.
        gap_standard_error: Error of the gap as an estimate for all data from the model, sd over rows / sqrt(N).
        num_flagged: Rows with status ``unreliable``.
    """

    num_simulations: int
    lower: float
    lower_standard_error: float
    upper: float
    upper_standard_error: float
    gap: float
    gap_standard_error: float
    num_flagged: int

    def __str__(self) -> str:
        return (
            f"mean lower bound {self.lower:.4f}, Monte Carlo SE {number(self.lower_standard_error)}\n"
            f"mean upper bound {self.upper:.4f}, Monte Carlo SE {number(self.upper_standard_error)}\n"
            f"gap {self.gap:.4f}, SE {number(self.gap_standard_error)}; "
            f"{self.num_flagged} of {self.num_simulations} rows are unreliable"
        )


@dataclass(frozen=True, repr=False, eq=False)
class BDMCResult:
    r"""Bounds on both sides of log p(x) of rows that were simulated from the model, in nats.

    They hold for such rows alone, where an exact posterior draw is known: real data have none. What carries over is the size of
    ``gap`` as a measure of how well annealing with these settings works on the model.

    Attributes:
        lower: Stochastic lower bound by annealing up: :math:`E[\text{lower}] \le \log p(x)`.
        upper: Stochastic upper bound by annealing down: :math:`E[\text{upper}] \ge \log p(x)`.
        lower_standard_error: By the delta method.
        upper_standard_error: By the delta method, which is too small where few chains have skewed weights, and those down are
            more skewed than those up: on three normal latents with 16 chains, bounds vary 1.6 times as much where the gap is
            0.6 nats, 1.2 times where it is 0.13, and 1.1 times where it is 0.05.
        acceptance: Mean acceptance probability up.
        reverse_acceptance: Mean acceptance probability down.
        status: ``unreliable`` where the bounds contradict each other by more than three of each one's standard errors, where a
            standard error is above 0.5 nats or void, or an acceptance outside [0.4, 0.98].
        label: The quantity that is bounded.
        start: Where annealing starts, ``"guide"`` or ``"prior"``.
        num_chains: Chains of a row, in each direction.
        num_temperatures: Temperatures.
    """

    lower: PerRow
    upper: PerRow
    lower_standard_error: PerRow
    upper_standard_error: PerRow
    acceptance: PerRow
    reverse_acceptance: PerRow
    status: tuple[Status, ...]
    label: str
    start: str
    num_chains: int
    num_temperatures: int

    def __len__(self) -> int:
        return len(self.status)

    @property
    def gap(self) -> PerRow:
        """Upper minus lower bound; by the noise of both it can be negative in a row."""
        return self.upper - self.lower

    def summary(self) -> BDMCSummary:
        """Average over rows."""
        count = len(self)
        spread = self.gap.std().item() / math.sqrt(count) if count > 1 else math.nan
        return BDMCSummary(
            num_simulations=count,
            lower=self.lower.mean().item(),
            lower_standard_error=self.lower_standard_error.square().sum().sqrt().item() / count,
            upper=self.upper.mean().item(),
            upper_standard_error=spread,
            gap=self.gap.mean().item(),
            gap_standard_error=spread,
            num_flagged=sum(status is Status.UNRELIABLE for status in self.status),
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with one line a simulated row; what all rows share is in its ``attrs``."""
        import pandas  # 0.5 s, which only those who ask for a table pay

        entries = {name: entry.cpu().numpy() for name, entry in vars(self).items() if isinstance(entry, Tensor)}
        columns = {**entries, "gap": self.gap.cpu().numpy(), "status": [str(status) for status in self.status]}
        frame = pandas.DataFrame(columns)
        frame.index.name = "simulation"
        frame.attrs = {name: getattr(self, name) for name in ("label", "start", "num_chains", "num_temperatures")}
        return frame

    def __repr__(self) -> str:
        return f"{self._title()}\n{self.summary()}"

    def _repr_html_(self) -> str:
        lines = "<br>".join(html.escape(line) for line in str(self.summary()).splitlines())
        return f"<p><b>{html.escape(self._title())}</b><br>{lines}</p>"

    def _title(self) -> str:
        return (
            f"BDMC: bounds on {self.label} of {len(self)} rows simulated from the model (for such rows only), annealing from the "
            f"{self.start}, {self.num_chains} chains, {self.num_temperatures} temperatures; nats"
        )


def bdmc(
    model: PyroProgram,
    guide: PyroProgram | None,
    *batch: Any,
    num_simulations: int = 100,
    num_chains: int = 16,
    num_temperatures: int = 300,
    num_leapfrog: int = 5,
    target_accept_prob: float = 0.65,
    start: str | None = None,
    given: Mapping[str, Tensor] | None = None,
    to_batch: ToBatch | None = None,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    compile: Compile = "auto",  # noqa: A002  torch's own word
    seed: int | None = None,
    progress: bool = True,
    **covariates: Any,
) -> BDMCResult:
    r"""Bound log p(x) from both sides on data simulated from the model, by bidirectional Monte Carlo.

    Rows (x, z) are drawn from the model. Annealing up from the guide or the prior gives a stochastic lower bound on log p(x);
    annealing down from z, an exact draw from p(z | x), along the same steps gives weights of mean 1 / p(x) and so a stochastic
    upper bound (Grosse, Ghahramani and Adams 2015, arXiv 1511.02543; Wu et al. 2017, arXiv 1611.04273). The truth lies between
    their expectations, so the gap tells how far :class:`~pyro_aevb.evidence.ais.AIS` with these settings can be off on this
    model.

    With globals g the rows are simulated given one draw of g from q(g), or given the values in ``given``, and the bounds are on
    :math:`\log p(x | g)`: nothing is claimed about q(g). With ``data_plate=None`` the whole model is one row, and each
    simulation is a data set.

    No gradient. Costs twice what annealing costs, and the pilot.

    Args:
        model: The model.
        guide: The guide, trained; ``None`` for a model without globals, or whose globals are given.
        *batch: A template: its covariates are used, its observations ignored, its rows recycled.
        num_simulations: Rows to simulate.
        num_chains: As in :class:`~pyro_aevb.evidence.ais.AIS`, like the three below.
        num_temperatures: Temperatures.
        num_leapfrog: Leapfrog steps of a transition.
        target_accept_prob: Acceptance that the pilot aims at.
        start: ``"guide"``, ``"prior"``, or ``None``: the guide where there is one.
        given: Values of the globals by site.
        to_batch: Puts simulated values into a batch, for observations that are no views of an argument.
        chunk_size: Rows annealed at once; by default so many that some 50,000 draws are in memory.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None``.
        compile: Whether densities are recorded and compiled, as of :class:`~pyro_aevb.LogDensity`.
        seed: Seed of all draws; the generators are left as they were.
        progress: Whether to show a progress bar.
        **covariates: The template's keyword arguments.

    Returns:
        One entry a simulated row.

    Raises:
        SettingError: If a setting is out of range or unknown, or there are no rows to recycle.
        ModelError: If the model is not supported or draws its own rows, a global is neither given nor drawn by a guide, or an
            observation can't be written back.
        GuideError: If the guide does not fit the model.

    Example:
        >>> from pyro_aevb.evidence.bdmc import bdmc
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> result = bdmc(model, None, torch.zeros(1), num_simulations=20, num_temperatures=20, seed=0, progress=False)
        >>> abs(result.summary().gap) < 0.2
        True
    """
    check_count("num_simulations", num_simulations)
    check_count("chunk_size", chunk_size, is_optional=True)
    check_covariates(covariates, bdmc)
    check_compile(compile)
    batch, covariates = as_tensors(batch, covariates)
    annealing = AIS(
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        num_leapfrog=num_leapfrog,
        target_accept_prob=target_accept_prob,
        start=start or ("prior" if guide is None else "guide"),
    )
    with inferring(seed, model, *([] if guide is None else [guide])):
        key = int(torch.randint(2**62, ()))  # before anything else draws, so that it hangs on the seed alone
        simulator = Simulator(model, guide, (batch, covariates), data_plate=data_plate, given=given, to_batch=to_batch)
        chunks = _Chunks(num_simulations, chunk_size or max(1, CHUNK_DRAWS // num_chains), key, compile)
        with tqdm(total=1.0, disable=not progress, dynamic_ncols=True, bar_format=_BAR) as bar:
            problems = chunks.problems(simulator, lambda fraction: bar.update(min(fraction, 1 - bar.n)))
            parts = [_bound(annealing, *problem) for problem in problems]
    return _join(parts, annealing, _label(simulator.structure))


def _label(structure: Structure) -> str:
    """Name the quantity that is bounded."""
    if structure.data_plate is None:
        return "joint log evidence"
    return "log p(x | globals)" if structure.has_globals else "log p(x)"


class _Chunks(NamedTuple):
    """How simulated rows are dealt out: in all, at once, by which noise, and whether their densities are compiled."""

    num_simulations: int
    size: int
    key: int
    compile: Compile

    def problems(
        self, simulator: Simulator, advance: Callable[[float], None]
    ) -> Iterator[tuple[Problem, Float[Tensor, "rows latent"]]]:
        """Yield problems of some rows each, with the unconstrained latents that the rows were made from."""
        done = 0
        for made in simulator.draw(self.num_simulations, compile=self.compile):
            density, latents = made.density, made.latents
            index = torch.arange(done, done + density.num_rows)
            # starts are drawn by a row's place in its own data set, which for a model that is one row is the same in all
            noise = RowNoise(self.key, index, dtype=density.dtype, device=density.device).fork(done)
            for start in range(0, density.num_rows, self.size):
                rows = slice(start, min(start + self.size, density.num_rows))
                share = len(latents[rows]) / self.num_simulations
                problem = Problem(
                    density=density.rows(rows),
                    guide=None if made.guide is None else made.guide.rows(rows),
                    noise=noise.rows(rows),
                    advance=partial(_scaled, advance, share),
                )
                yield problem, latents[rows]
            done += density.num_rows


def _scaled(advance: Callable[[float], None], share: float, fraction: float) -> None:
    """Tell of a fraction of a share."""
    advance(share * fraction)


class _Bounds(NamedTuple):
    """Both bounds on some rows, with their errors and acceptances."""

    lower: PerRow
    upper: PerRow
    lower_standard_error: PerRow
    upper_standard_error: PerRow
    acceptance: PerRow
    reverse_acceptance: PerRow


def _bound(annealing: AIS, problem: Problem, latents: Float[Tensor, "rows latent"]) -> _Bounds:
    """Run up from the start and down from exact posterior draws, along the same steps."""
    advance = partial(_scaled, problem.advance, 0.5)
    ladder, up = annealing.climb(problem, str(annealing.start), advance=advance)
    down = annealing.descend(ladder, latents, problem.noise.fork(_DOWN_FORK), advance)
    lower, lower_error, _ = average_weights(up.log_weights)
    inverse, upper_error, _ = average_weights(down.log_weights)
    return _Bounds(lower, -inverse, lower_error, upper_error, up.acceptance.double(), down.acceptance.double())


def _join(parts: list[_Bounds], annealing: AIS, label: str) -> BDMCResult:
    """Join chunks of rows and judge each row."""
    rows = _Bounds(*(torch.cat(entries) for entries in zip(*parts, strict=True)))
    target = annealing.target_accept_prob
    is_worse_up = (rows.acceptance - target).abs() > (rows.reverse_acceptance - target).abs()
    errors = rows.lower_standard_error + rows.upper_standard_error
    crossing = rows.lower - rows.upper > 3 * errors + ROUNDING
    status = rate(
        torch.maximum(rows.lower_standard_error, rows.upper_standard_error),
        acceptance=rows.acceptance.where(is_worse_up, rows.reverse_acceptance),
        is_refuted=crossing,
    )
    return BDMCResult(
        **rows._asdict(),
        status=status,
        label=label,
        start=str(annealing.start),
        num_chains=annealing.num_chains,
        num_temperatures=annealing.num_temperatures,
    )
