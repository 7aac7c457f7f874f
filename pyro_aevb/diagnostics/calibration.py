"""Is q(z | x) the posterior, on average over data from the model? Simulation-based calibration without refits."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from pyro.infer.autoguide import AutoCallable, AutoGuideList
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import PyroProgram, Values
from pyro_aevb.diagnostics.ranks import RankTest, rank_among
from pyro_aevb.diagnostics.tarp import TarpCoverage, scaled_distances
from pyro_aevb.errors import GuideError, NonFiniteError, SettingError
from pyro_aevb.guides.refinement import RefinableGuide
from pyro_aevb.program.batch import as_tensors
from pyro_aevb.program.blocks import BLOCK_DRAWS
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.model_rows import ModelRows
from pyro_aevb.program.observations import ToBatch
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.program.rows import inferring
from pyro_aevb.program.settings import check_count, check_covariates, check_share
from pyro_aevb.program.simulated import SimulatedRows, Simulator

if TYPE_CHECKING:
    import pandas

__all__ = ["TEST_QUANTITIES", "Calibration", "calibrate"]

TEST_QUANTITIES = ("log p(x,z)", "log q(z|x)", "|z|")
"""What is ranked besides each latent coordinate."""
_DISTANCE = "TARP distance"
_SCALE_DRAWS = 1000
"""Prior draws that the units of distances are read from."""
_SHOWN = 12
"""Coordinates that are printed, the worst ones."""


@dataclass(frozen=True, repr=False, eq=False)
class Calibration:
    r"""Ranks of true latents among a guide's draws, over data simulated from the model, and what they say of the guide.

    Attributes:
        quantities: Names: each latent coordinate on its support (``z[2]``, inner plates first), then ``log p(x,z)``,
            ``log q(z|x)`` and ``|z|``, the Euclidean norm of all coordinates; densities in nats, on the supports.
        ranks: Rank of the truth among the draws, from 0 to ``num_draws``, ties broken at random.
        num_draws: Draws of each simulation.
        tarp: Joint coverage of all latents.
        given: Values of the globals that the rows were simulated under, and the guide was tested at.
    """

    quantities: tuple[str, ...]
    ranks: Int[Tensor, "simulations quantities"]
    num_draws: int
    tarp: TarpCoverage
    given: Values = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ranks)

    @cached_property
    def test(self) -> RankTest:
        """The test behind every p-value, with the bands that belong to it."""
        return self.tarp.test

    @property
    def coordinates(self) -> tuple[str, ...]:
        """The quantities that are latent coordinates."""
        return self.quantities[: -len(TEST_QUANTITIES)]

    @cached_property
    def p_values(self) -> dict[str, float]:
        """Probability that uniform ranks stray at least as far, by quantity (:class:`~pyro_aevb.diagnostics.ranks.RankTest`)."""
        columns = zip(self.quantities, self.ranks.unbind(1), strict=True)
        return {name: self.test.p_value(ranks) for name, ranks in columns}

    def failures(self, level: float = 0.05) -> tuple[str, ...]:
        """Return quantities that an exact guide would show with a probability of at most ``level`` all together (Bonferroni).

        Args:
            level: The probability, shared among the quantities.

        Raises:
            SettingError: If it is not between 0 and 1.
        """
        check_share("level", level)
        return tuple(name for name, p in self.p_values.items() if p < level / len(self.quantities))

    def summary(self) -> "pandas.DataFrame":
        """Return a table with one line a quantity.

        Its columns: ``p``; ``mean``, the mean rank on a scale from 0 to 1, where 0.5 is right; ``spread``, the variance of ranks
        in units of a uniform variable's, where 1 is right; ``finding``, what a quantity that fails says of the guide, in words.
        """
        import pandas  # 0.5 s, which only those who ask for a table pay

        scaled = (self.ranks.double() + 0.5) / (self.num_draws + 1)
        columns = {
            "p": list(self.p_values.values()),
            "mean": scaled.mean(0).tolist(),
            "spread": (12 * scaled.var(0, correction=0)).tolist(),
        }
        frame = pandas.DataFrame(columns, index=pandas.Index(self.quantities, name="quantity"))
        failed = set(self.failures())
        frame["finding"] = [
            _finding(name, line["mean"], line["spread"], len(self)) if name in failed else ""
            for name, line in frame.iterrows()
        ]
        return frame

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the ranks, one line a simulation."""
        import pandas  # 0.5 s, which only those who ask for a table pay

        frame = pandas.DataFrame(self.ranks.cpu().numpy(), columns=list(self.quantities))
        frame["TARP"] = self.tarp.ranks.cpu().numpy()
        frame.index.name = "simulation"
        frame.attrs = {"num_draws": self.num_draws}
        return frame

    def __repr__(self) -> str:
        table = self._worst().to_string(float_format="{:.3g}".format)
        return "\n".join([self._title(), table, *self._notes()])

    def _repr_html_(self) -> str:
        notes = "<br>".join(html.escape(note) for note in self._notes())
        table = self._worst().to_html(float_format="{:.3g}".format)
        return f"<p><b>{html.escape(self._title())}</b></p>{table}<p>{notes}</p>"

    def _title(self) -> str:
        return (
            f"Calibration over {len(self)} simulations, {self.num_draws} draws each; p-values of the {self.test.name}"
        )

    def _worst(self) -> "pandas.DataFrame":
        """Return the table of the test quantities and of the coordinates with the least p-values."""
        frame = self.summary()
        worst = frame.loc[list(self.coordinates)].nsmallest(_SHOWN, "p").index
        return frame.loc[[name for name in self.quantities if name in worst or name in TEST_QUANTITIES]]

    def _notes(self) -> list[str]:
        """Say what the table says, what it leaves out and what it does not claim."""
        failed = self.failures()
        verdict = f"{len(failed)} of {len(self.quantities)} quantities fail at 0.05 shared among them"
        before = "..., " if len(failed) > _SHOWN else ""
        notes = [verdict + (f": {before}{', '.join(failed[-_SHOWN:])}" if failed else "; failing to fail is no proof")]
        if len(self.coordinates) > _SHOWN:
            notes.append(f"shown are the {_SHOWN} least of {len(self.coordinates)} coordinates")
        notes.append(repr(self.tarp))
        if self.given:
            notes.append(f"at one value of the globals {', '.join(self.given)}: nothing is claimed about their guide")
        return notes


def calibrate(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    num_simulations: int = 1000,
    num_draws: int = 200,
    given: Mapping[str, Tensor] | None = None,
    to_batch: ToBatch | None = None,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = True,
    **covariates: Any,
) -> Calibration:
    r"""Test a guide on data from the model: where do the true latents rank among its draws?

    Rows (z*, x) are drawn from the model, L draws of each row from q(z | x), and the rank of f(z*, x) among the :math:`f(z_l, x)`
    is uniform for every f if q is the posterior (Talts et al. 2018, arXiv 1804.06788). The functions are the latent coordinates,
    and log p(x, z), log q(z | x) and \|z\|: ranks of coordinates alone are uniform for a guide that returns the prior, and
    log p(x, z) finds it out (Modrak et al. 2023, arXiv 2211.02383, section 3). An amortized guide needs no refits, so that
    thousands of simulations cost one pass of the encoder. The same draws give joint coverage
    (:class:`~pyro_aevb.diagnostics.tarp.TarpCoverage`).

    What is tested is the guide on average over data that look like the model's: it can be right there and wrong on real data
    that do not. With globals g the rows are simulated given one draw of g from q(g), or the values in ``given``, and
    q(z | x, g) is tested at that g: nothing is claimed about q(g). With ``data_plate=None`` the whole model is one row and each
    simulation a data set; the programs are read anew for each, some tenths of a second.

    What the model masks of a latent is held at a constant, and its own rank is drawn at random.

    No gradient. Costs 2 (L + 1) runs of guide and 3 (L + 1) of the model a row, run together.

    Args:
        model: The model.
        guide: The guide, trained; it samples each latent itself.
        *batch: A template: its covariates are used, its observations ignored, its rows recycled.
        num_simulations: Rows to simulate.
        num_draws: Draws L of the guide for each; at 100 and more the ranks are fine enough.
        given: Values of the globals by site.
        to_batch: Puts simulated values into a batch, for observations that are no views of an argument.
        chunk_size: Rows run at once; by default so many that some 16,000 draws are in memory. It changes no rank but by rounding.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None``.
        seed: Seed of all draws; the generators are left as they were.
        progress: Whether to show a progress bar.
        **covariates: The template's keyword arguments.

    Returns:
        Ranks with a p-value for each quantity, and joint coverage.

    Raises:
        SettingError: If a setting is out of range or unknown, or there are no rows to recycle.
        ModelError: If the model is not supported or draws its own rows, or an observation can't be written back.
        GuideError: If the guide does not fit the model, does not read the data or was refined on rows, draws auxiliary sites or
            is a point.
        NonFiniteError: If a quantity is NaN.

    Example:
        >>> from pyro_aevb.diagnostics.calibration import calibrate
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x, scale):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, scale))
        >>> from functools import partial
        >>> settings = dict(num_simulations=500, num_draws=100, seed=0, progress=False)
        >>> calibrate(model, partial(guide, scale=0.5**0.5), torch.zeros(1), **settings).failures()
        ()
        >>> calibrate(model, partial(guide, scale=0.4), torch.zeros(1), **settings).failures()
        ('z', 'log p(x,z)', 'log q(z|x)', '|z|')
    """
    for name, count in {"num_simulations": num_simulations, "num_draws": num_draws}.items():
        check_count(name, count)
    check_count("chunk_size", chunk_size, is_optional=True)
    check_covariates(covariates, calibrate)
    _check_reads_data(guide)
    batch, covariates = as_tensors(batch, covariates)
    with inferring(seed, model, guide):
        key = int(torch.randint(2**62, ()))  # before anything else draws, so that it hangs on the seed alone
        simulator = Simulator(model, guide, (batch, covariates), data_plate=data_plate, given=given, to_batch=to_batch)
        ranking = _Ranking(num_draws, chunk_size, key)
        with tqdm(total=num_simulations, disable=not progress, unit="simulation", dynamic_ncols=True) as bar:
            parts = [ranking.rank(rows, bar) for rows in simulator.draw(num_simulations)]
    ranks = torch.cat(parts).cpu()
    return Calibration(
        quantities=ranking.names,
        ranks=ranks[:, :-1],
        num_draws=num_draws,
        tarp=TarpCoverage(ranks[:, -1], num_draws),
        given=simulator.given,
    )


def _check_reads_data(guide: PyroProgram) -> None:
    """Refuse Pyro's automatic guides, whose q is that of the data that they were fitted to, whatever data they are given.

    Refined guides of ours are refused too: what they gained belongs to the rows that they were refined on.

    Raises:
        GuideError: Naming the class.
    """
    if isinstance(guide, RefinableGuide) and guide.is_refined:
        raise GuideError(
            f"A guide is asked for the posterior of data that the model makes, and this {type(guide).__name__} was refined: it "
            "holds numbers of its own rows, and what they gained reaches no others. Give the guide that it was made from, or "
            "leave calibration out of a report with num_simulations=0."
        )
    is_of_pyro = type(guide).__module__.startswith("pyro.infer.autoguide.")
    if is_of_pyro and not isinstance(guide, AutoCallable | AutoGuideList):
        raise GuideError(
            f"A guide is asked for the posterior of data that the model makes, and {type(guide).__name__} holds numbers of its "
            "own data's rows instead of reading the data. Use a guide that reads them, as AutoAmortizedNormal does, or leave "
            "calibration out of a report with num_simulations=0."
        )


class _Ranking:
    """Ranks of simulated rows' latents among draws of the guide.

    Args:
        num_draws: Draws of a row.
        chunk_size: Rows run at once, or ``None``.
        key: Seed of the draws.

    Attributes:
        names: The quantities, once rows were ranked.
    """

    def __init__(self, num_draws: int, chunk_size: int | None, key: int) -> None:
        self.num_draws = num_draws
        self.names: tuple[str, ...] = ()
        self._size = chunk_size or max(1, BLOCK_DRAWS // num_draws)
        self._key, self._done = key, 0
        self._scale: Tensor | None = None

    def rank(self, simulated: SimulatedRows, bar: tqdm) -> Int[Tensor, "rows quantities"]:
        """Rank all quantities of some rows, and the distances of TARP behind them."""
        density, guide = simulated.density, simulated.guide
        if guide is None:
            raise SettingError(
                "calibrate tests the draws of a guide, and guide=None was given. Give the trained guide."
            )
        self.names = (*_coordinate_names(density), *TEST_QUANTITIES)
        count = density.num_rows
        references, scale = self._references(density)
        noise = torch.rand(count, len(self.names) + 1, device=density.device)
        size = guide.chunk_rows or self._size
        parts = []
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            draws, _ = guide.rows(rows).draw(self.num_draws, seed=self._key + self._done)
            u = torch.cat((simulated.latents[rows][None].to(draws), draws))
            # a guide may do as it likes where the model masks a latent: a constant there leaves the rank to chance
            u = u.where(simulated.is_counted[rows], 0.0)
            distances = scaled_distances(u, references[rows], scale)
            values = torch.cat((_quantities(density.rows(rows), guide.rows(rows), u), distances[..., None]), -1)
            self._check(values)
            parts.append(rank_among(values[0], values[1:], noise[rows]))
            bar.update(u.shape[1])
        self._done += count
        return torch.cat(parts)

    def _references(self, density: LogDensity) -> tuple[Float[Tensor, "rows latent"], Float[Tensor, " latent"]]:
        """Draw a point for each row from the prior, and choose the units of distances."""
        draws = density.draw_prior(math.ceil(_SCALE_DRAWS / density.num_rows))
        if self._scale is None:
            spread = draws.flatten(0, 1).std(0)
            self._scale = spread.where(spread.isfinite() & (spread > 0), 1.0)
        return draws[0], self._scale

    def _check(self, values: Float[Tensor, "draws rows quantities"]) -> None:
        """Refuse NaN, which has no rank."""
        is_bad = values.isnan().any(0)
        if is_bad.any():
            place = int(is_bad.any(0).nonzero()[0])
            raise NonFiniteError(
                f"{[*self.names, _DISTANCE][place]} is NaN in draws of {int(is_bad[:, place].sum())} of {len(is_bad)} simulated "
                f"rows, so that it has no rank. Look at the guide's parameters for such data; draws at the very edge of a support "
                f"are avoided by float64."
            )


def _coordinate_names(density: LogDensity) -> list[str]:
    """Name every number of a row's latents: the site, then inner plates and event."""
    names = []
    for name, slot in _rows(density).model.layout.slots.items():
        shape = (*(size for size in slot.inner if size > 1), *slot.site.event_shape)
        names += [f"{name}{place}" if place else name for place in torch.ones(shape).nonzero().tolist()]
    return names


def _quantities(
    density: LogDensity, guide: GuideDensity, u: Float[Tensor, "draws rows latent"]
) -> Float[Tensor, "draws rows quantities"]:
    """Return coordinates and test quantities of truth and draws, all by the same steps: rounding must not tell them apart."""
    log_q, log_joint = guide.path(u)
    placed = _rows(density).place(u)
    log_jacobian = sum(placed.jacobians.values(), torch.zeros_like(placed.u[..., 0])).reshape(log_q.shape)
    z = torch.cat([value.reshape(*log_q.shape, -1).double() for value in placed.values.values()], -1)
    densities = [(log.double() - log_jacobian)[..., None] for log in (log_joint, log_q)]
    return torch.cat((z, *densities, torch.linalg.vector_norm(z, dim=-1, keepdim=True)), -1)


def _rows(density: LogDensity) -> ModelRows:
    """Return the rows of the model behind a density."""
    if not isinstance(density.source, ModelRows):
        raise SettingError("Expected the density of a Pyro model; this one is of plain functions.")
    return density.source


def _finding(name: str, mean: float, spread: float, num_simulations: int) -> str:
    """Say in words what ranks that fail say of the guide."""
    if name == "|z|":
        return "differs"
    if name == "log p(x,z)":
        return "draws too probable" if mean < 0.5 else "draws too improbable"
    if name == "log q(z|x)":
        return "guide too narrow or off" if mean < 0.5 else "guide too wide"
    shift = (mean - 0.5) * math.sqrt(12 * num_simulations)
    # 12 (u - 1/2)^2 of uniform u has variance 4/5
    widening = (spread - 1) * math.sqrt(num_simulations / 0.8)
    if abs(shift) > abs(widening):
        return "guide too low" if shift > 0 else "guide too high"
    return "guide too narrow" if widening > 0 else "guide too wide"
