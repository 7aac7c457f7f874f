"""An estimator over all rows: chunk by chunk, under one draw of the globals after another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import ModelError
from pyro_aevb.evidence.averages import average_over_globals, joint_evidence
from pyro_aevb.evidence.problem import Estimator, Problem
from pyro_aevb.evidence.result import Bound, LogMarginal, concatenate
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.program.compiling import Compile
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.particles import as_draws
from pyro_aevb.program.processes import Processes
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.program.rows import Rows
from pyro_aevb.program.structure import Structure, read_structure
from pyro_aevb.randomness import preserved_rng

__all__ = ["EstimatorRun", "draw_globals", "name_quantity"]


class EstimatorRun:
    """A model's rows under draws of its globals, ready for an estimator. Made and run inside ``program.rows.inferring``.

    Args:
        model: The model.
        guide: The guide, which draws the globals; ``None`` for a model without any.
        batch: All rows, as positional and keyword arguments.
        data_plate: As in :func:`~pyro_aevb.program.structure.read_structure`.
        num_global_samples: S, draws of the globals; of no account in a model without them.
        compile: Whether densities are compiled, as of :class:`~pyro_aevb.LogDensity`.

    Attributes:
        density: The rows under the first draw of the globals.
        given: That draw by site; nothing without globals.

    Raises:
        ModelError: If the model is not supported.
        GuideError: If the guide does not fit the model.
        DataError: If there are no rows, NaN reaches a density, or data lie outside the likelihood's support.
    """

    def __init__(
        self,
        model: PyroProgram,
        guide: PyroProgram | None,
        batch: tuple[Args, Kwargs],
        data_plate: str | None,
        num_global_samples: int,
        *,
        compile: Compile = False,  # noqa: A002  torch's own word
    ) -> None:
        args, kwargs = batch
        given: list[Values] = [{}]
        self.log_global = torch.zeros(1)
        rows = None if guide is None else Rows(model, guide, args, kwargs, data_plate)
        if rows is not None and rows.structure.has_globals and rows.structure.data_plate is not None:
            given, self.log_global = draw_globals(rows, num_global_samples)
        try:
            self.density = LogDensity(model, *args, data_plate=data_plate, given=given[0], compile=compile, **kwargs)
        except ModelError:
            if guide is None:
                _check_no_globals(read_structure(model, args, kwargs, data_plate=data_plate))
            raise
        proposal = None if guide is None else GuideDensity(guide, self.density)
        self.given = given[0]
        self.has_globals = bool(self.given)
        self._conditioned: list[tuple[LogDensity, GuideDensity | None]] = [
            (self.density.given(values), proposal and proposal.given(values)) if values else (self.density, proposal)
            for values in given
        ]
        with preserved_rng():  # a mistake that an estimator finds leaves the generators as they were
            key = _draw_key()
        indices = torch.arange(self.density.num_rows)
        self._noise = RowNoise(key, indices, dtype=self.density.dtype, device=self.density.device)

    def estimate(
        self,
        estimator: Estimator,
        chunk_size: int | None,
        *,
        progress: bool,
        processes: Processes | None = None,
    ) -> LogMarginal:
        """Run an estimator on every chunk under every draw of the globals and join what it returns, in all processes."""
        processes = processes or Processes(None)
        num_rows, fixed = self.density.num_rows, self.density.chunk_rows
        # a row's numbers are its own, so that chunks may be as small as leaves none without work
        most = min(estimator.rows_at_once(self.density.dim), -(-num_rows // processes.count))
        chunks = processes.own(list(_chunks(num_rows, fixed or chunk_size or most, is_padded=fixed is not None)))
        results: list[list[LogMarginal]] = []
        with _row_bar(sum(count for _, count in chunks), progress=progress) as advance:
            for rows, count in chunks:
                advance_part = _scaled(advance, count / len(self._conditioned))
                problems = (self._problem(number, rows, advance_part) for number in range(len(self._conditioned)))
                results.append([estimator.estimate(problem).rows(slice(count)) for problem in problems])
        _draw_key()  # the next run draws by another
        gathered = processes.gather(results)
        return self._join([concatenate(given) for given in zip(*gathered, strict=True)])

    def _problem(self, number: int, rows: Tensor, advance: Callable[[float], None]) -> Problem:
        """Return some rows under one draw of the globals."""
        density, guide = self._conditioned[number]
        noise = self._noise.rows(rows)
        return Problem(
            density=density.rows(rows),
            guide=guide and guide.rows(rows),
            noise=noise.fork(number) if self.has_globals else noise,
            advance=advance,
        )

    def _join(self, results: list[LogMarginal]) -> LogMarginal:
        """Average over the globals, row by row and, with globals, for all rows together."""
        result = average_over_globals(results)
        result = replace(result, label=name_quantity(self.density.structure, len(results)))
        if not self.has_globals:
            return result
        values = torch.stack([given.value for given in results])
        is_unbiased = results[0].bound is Bound.LOWER
        joint = joint_evidence(self.log_global, values, result.standard_error, is_unbiased=is_unbiased)
        return replace(result, joint=joint)


def _check_no_globals(structure: Structure) -> None:
    """Say what to do about globals that no guide draws.

    Raises:
        ModelError: Naming them.
    """
    names = [site.name for site in structure.select("latent", is_local=False)]
    if names:
        raise ModelError(
            f"Latents {names} lie outside the data plate {structure.data_plate!r}, and guide=None draws none. Give a guide, "
            f"fix them by pyro.condition(model, data={{{names[0]!r}: ...}}), or take the whole model as one row, data_plate=None.",
            site=names[0],
        )


def draw_globals(rows: Rows, num_draws: int) -> tuple[list[Values], Float[Tensor, " particles"]]:
    """Draw a model's globals from its guide, given as many of the rows as are run at once.

    Returns:
        Each draw's values by site, and log w_g of the draws in nats.
    """
    program, structure = rows.program, rows.structure
    args, kwargs, _ = next(iter(rows.chunks(None, num_draws, progress=False)))
    axes = program.axes(num_draws, 1)
    guide = program.sample_guide(args, kwargs, axes)
    model = program.score_model(args, kwargs, axes, {name: site.value for name, site in guide.items()})
    draws = {site.name: as_draws(guide[site.name], structure) for site in structure.select("latent", is_local=False)}
    values = [{name: draw[number] for name, draw in draws.items()} for number in range(num_draws)]
    return values, program.terms(model, guide, axes).log_weights().global_


def name_quantity(structure: Structure | None, num_global_samples: int) -> str:
    """Say what a row's number is: with globals it is not the evidence."""
    if structure is not None and structure.data_plate is None:
        return "joint log evidence"
    if structure is not None and structure.has_globals:
        return "log predictive under " + ("q(globals)" if num_global_samples > 1 else "one draw from q(globals)")
    return "log p(x)"


def _draw_key() -> int:
    """Draw the key of all rows' random numbers."""
    return int(torch.randint(2**62, ()))


def _chunks(num_rows: int, size: int, *, is_padded: bool) -> Iterator[tuple[Tensor, int]]:
    """Yield places of rows and how many of them count; a padded chunk repeats its last row up to the size."""
    for start in range(0, num_rows, size):
        count = min(size, num_rows - start)
        rows = torch.arange(start, start + (size if is_padded else count))
        yield rows.clamp(max=start + count - 1), count


def _scaled(advance: Callable[[float], None], share: float) -> Callable[[float], None]:
    """Turn fractions of a part into units of the whole."""
    return lambda fraction: advance(share * fraction)


@contextmanager
def _row_bar(num_rows: int, *, progress: bool) -> Iterator[Callable[[float], None]]:
    """Show a bar in units of rows that moves by fractions of one."""
    layout = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} rows [{elapsed}<{remaining}]"
    with tqdm(total=num_rows, disable=not progress, dynamic_ncols=True, bar_format=layout) as bar:
        yield lambda fraction: bar.update(min(fraction, num_rows - bar.n))
