r"""Draws from the posterior by Pyro's own NUTS: the independent standard, slow and trusted.

Where :func:`~pyro_aevb.mcmc.posterior.hmc_posterior` moves all rows on a density of this package, here Pyro runs the user's model
on one row after the other with its own potential, Jacobians, sampler and adaptation. Only the verdict is shared.
"""

import inspect
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import DataError, ModelError, SettingError
from pyro_aevb.mcmc.draws import PosteriorDraws, assess, concatenate
from pyro_aevb.program.coordinates import rows_first, site_kind, turn_of
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.model_rows import ModelRows
from pyro_aevb.program.placing import Unmasked
from pyro_aevb.program.row_model import evaluating_only
from pyro_aevb.program.rows import inferring
from pyro_aevb.program.settings import check_count, check_covariates, check_share
from pyro_aevb.status import Status, judge

__all__ = ["check_cost", "nuts_posterior"]

_PILOT_SECONDS = 2.0
_PILOT_TRANSITIONS = 40


def nuts_posterior(
    model: PyroProgram,
    *batch: Any,
    given: Mapping[str, Tensor] | None = None,
    num_chains: int = 4,
    num_samples: int = 500,
    warmup_steps: int = 500,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    max_rows: int = 100,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = True,
    **covariates: Any,
) -> PosteriorDraws:
    r"""Draw from p(z | x, g) of each row by Pyro's No-U-Turn Sampler (Hoffman and Gelman 2014, arXiv 1111.4246).

    The draws are exact in the limit of long chains. Rows and chains run one after the other in this process, each under a seed of
    its own, so that a row's draws do not depend on its neighbours. The cost is told beforehand: a pilot of at most two seconds on
    the first row is timed, and more rows than ``max_rows`` are refused with the hours that they would take.

    All chains start alike, uniformly in (-2, 2) of unconstrained space as Pyro starts them. Nested R-hat, which elsewhere compares
    two kinds of start, only compares the first half of the chains with the second here. It says nothing that split R-hat does not,
    exceeds 1.01 by chance where draws are few, and does not flag a row. A row is ``unreliable`` if split R-hat > 1.1, if its
    acceptance lies outside [0.4, 0.995], or if either is not known; it is ``warn`` if split R-hat > 1.05, if ESS < 400, or if any
    transition diverged. A mode that no chain found leaves no trace in any of these.

    The density is Pyro's own, with two differences: the scale of the data plate is taken out, since a row's posterior has none, and
    masked latents keep their prior. Modules run in eval mode, parameters are held fixed.

    Args:
        model: The model.
        *batch: Rows, as positional arguments of the model.
        given: Values of the model's globals; required where there are any, unless ``data_plate=None``.
        num_chains: Chains of each row; even.
        num_samples: Draws of each chain after the warm-up; at least 4 for diagnostics.
        warmup_steps: Transitions before that.
        target_accept_prob: Acceptance probability that step sizes are tuned to.
        max_tree_depth: A transition takes at most two to this power leapfrog steps.
        max_rows: Most rows to run without being asked again.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None`` to treat the whole model as one row, globals
            among its latents.
        seed: Seed of the draws; the generators are left as they were.
        progress: Whether to show a progress bar, with the estimated time.
        **covariates: The batch's keyword arguments.

    Returns:
        Draws on the latents' supports, ``samples[site]`` of shape ``[chains, draws, rows, ...]``, with acceptance, R-hat, ESS and
        a verdict on each row. ``step_size`` is the mean over chains. Unreliable rows are told in one warning.

    Raises:
        SettingError: If a setting is out of range, a keyword unknown, a value is given that is not a global's, or there are more
            rows than ``max_rows``.
        ModelError: If a global is not given, a latent is discrete, rows are not independent, or the model runs with a fixed number
            of rows and so not with one.
        DataError: If there are no rows, NaN reaches a density, data lie outside the likelihood's support, or no start has a finite
            density.

    Example:
        >>> from pyro_aevb.mcmc.nuts import nuts_posterior
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
        ...         pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> settings = dict(num_samples=200, warmup_steps=100, seed=0, progress=False)
        >>> draws = nuts_posterior(model, torch.tensor([3.0]), **settings)
        >>> draws.samples["rate"].shape, bool((draws.samples["rate"].mean() - 2.0).abs() < 0.3)
        (torch.Size([4, 200, 1]), True)
    """
    settings = _Settings(num_chains, num_samples, warmup_steps, target_accept_prob, max_tree_depth)
    check_count("max_rows", max_rows)
    check_covariates(covariates, nuts_posterior)
    with inferring(seed, model):
        density = LogDensity(model, *batch, data_plate=data_plate, given=given, **covariates)
        rows, key, estimate = _plan(density, settings, max_rows, seed)
        total = rows.density.num_rows * settings.transitions
        with tqdm(total=total, disable=not progress, unit="step", unit_scale=True, dynamic_ncols=True) as bar:
            bar.set_description(_cost(estimate))
            parts = [_draw_row(rows, row, settings, key, bar.update) for row in range(rows.density.num_rows)]
    result = concatenate(parts)
    if rows.structure.data_plate is None:
        result = replace(result, samples={name: value.squeeze(2) for name, value in result.samples.items()})
    result.warn_if_unreliable()
    return result


def check_cost(model: PyroProgram, *batch: Any, **settings: Any) -> float:
    """Refuse the rows that :func:`nuts_posterior` would refuse, and tell what the others would cost, before anything slower runs.

    Costs its pilot, of at most two seconds.

    Args:
        model: The model.
        *batch: Rows, as positional arguments of the model.
        **settings: Of :func:`nuts_posterior`, ``progress`` for telling the cost, and the batch's keyword arguments.

    Returns:
        The seconds that all its rows and chains are estimated to take.

    Raises:
        SettingError: As there, for more rows than ``max_rows`` too.
        ModelError: As there.
        DataError: As there, but for starts of rows behind the first.

    Example:
        >>> from pyro_aevb.mcmc.nuts import check_cost
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
        ...         pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> check_cost(model, torch.ones(3), progress=False) > 0
        True
    """
    call = inspect.signature(nuts_posterior).bind(model, *batch, **settings)
    call.apply_defaults()
    chosen = call.arguments
    own = _Settings(**{setting.name: chosen[setting.name] for setting in fields(_Settings)})
    check_count("max_rows", chosen["max_rows"])
    check_covariates(chosen["covariates"], nuts_posterior)
    with inferring(chosen["seed"], model):
        density = LogDensity(
            model, *batch, data_plate=chosen["data_plate"], given=chosen["given"], **chosen["covariates"]
        )
        _, _, estimate = _plan(density, own, chosen["max_rows"], chosen["seed"])
    if chosen["progress"]:
        tqdm.write(_cost(estimate), file=sys.stderr)
    return estimate


@dataclass(frozen=True)
class _Settings:
    """Settings of the chains of a row."""

    num_chains: int
    num_samples: int
    warmup_steps: int
    target_accept_prob: float
    max_tree_depth: int

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_samples", "warmup_steps", "max_tree_depth"):
            check_count(name, getattr(self, name))
        if self.num_chains % 2:
            raise SettingError(
                f"num_chains must be even, since halves of the chains are compared; got {self.num_chains}."
            )
        check_share("target_accept_prob", self.target_accept_prob)

    @property
    def transitions(self) -> int:
        """Number of transitions of a row."""
        return self.num_chains * (self.num_samples + self.warmup_steps)

    def kernel(self, program: PyroProgram) -> NUTS:
        """Make a kernel, which serves one chain."""
        return NUTS(program, target_accept_prob=self.target_accept_prob, max_tree_depth=self.max_tree_depth)


class _Rows:
    """A model's rows as Pyro programs, one a row, whose latents are the row's.

    Args:
        density: The rows.

    Raises:
        ModelError: If the model does not run with one row.
        SettingError: If several values of the globals are given.
    """

    def __init__(self, density: LogDensity) -> None:
        source = density.source
        if not isinstance(source, ModelRows):
            raise SettingError("Pyro's NUTS needs a Pyro model; this density is one of plain functions.")
        density.require_latents()
        self.density, self.source, self.structure = density, source, source.structure
        if source.given.leading:
            raise SettingError(
                f"Chains are conditioned on one value of each global; the given ones have leading axes "
                f"{list(source.given.leading)}. Give one draw of them after the other."
            )
        if self.structure.data_plate is not None and source.chunk_rows not in (None, 1):
            raise ModelError(
                f"The model runs with {source.chunk_rows} rows at once, and NUTS needs it to run with one. Size the plate "
                f"{self.structure.data_plate!r} by the data, or use hmc_posterior."
            )

    def program(self, row: int) -> tuple[PyroProgram, Args, Kwargs]:
        """Return the program of one row, and the arguments to run it with."""
        args, kwargs = self.source.data_of(torch.tensor([row]))
        model, structure = self.source.model, self.structure
        values = {
            name: value.reshape(value.shape[value.dim() - structure.ranks[name] :])
            for name, value in self.source.given.values.items()
        }
        dropped = [site.name for site in structure.select("imputed")]
        conditioned = poutine.condition(model.model, data=values)

        def run(*args: Any, **kwargs: Any) -> None:
            with Unmasked(model.layout.slots, dropped, model.device):
                conditioned(*args, **kwargs)

        hidden = poutine.block(run, hide=[*dropped, *values])
        trace = poutine.trace(hidden).get_trace(*args, **kwargs)
        scale = next(trace.nodes[name]["scale"] for name in model.layout.slots)
        return poutine.scale(hidden, scale=1 / scale) if scale != 1 else hidden, args, kwargs

    def read(self, row: int, values: Values) -> tuple[Values, Float[Tensor, "draws latent"], Float[Tensor, " draws"]]:
        """Return a row's draws rows first, unconstrained, and their log joint densities."""
        placed = {}
        for name, slot in self.source.model.layout.slots.items():
            value, event = values[name], len(slot.site.event_shape)
            lacking = self.structure.max_plate_nesting + event + 1 - value.dim()
            in_plates = value.reshape(len(value), 1, *(1,) * lacking, *value.shape[1:])
            rows = rows_first(in_plates, slot.site, self.structure, event)[:, 0]
            rows = turn_of(rows) if site_kind(slot.site) == "circle" else rows
            inner = (size for size in slot.inner if size > 1)
            placed[name] = rows.reshape(len(value), 1, *inner, *slot.site.event_shape)
        density = self.density.rows(slice(row, row + 1))
        u = density.unconstrain(placed)
        return placed, u[:, 0], density.log_joint(u)[:, 0]


def _plan(density: LogDensity, settings: _Settings, max_rows: int, seed: int | None) -> tuple[_Rows, int, float]:
    """Return rows, the seed of their chains and the seconds that they are estimated to take; refuse too many."""
    rows = _Rows(density)
    key = int(torch.randint(2**31, ())) if seed is None else seed
    estimate = _estimate_seconds(rows, settings, key)
    _check_rows(density.num_rows, max_rows, estimate, settings)
    return rows, key, estimate


class _Watch:
    """What a chain tells of itself as it moves: step size, acceptance, divergences.

    Args:
        tell: Called after each transition.
    """

    def __init__(self, tell: Callable[[], object]) -> None:
        self.tell = tell
        self.step_size = self.acceptance = math.nan
        self.num_divergent = 0

    def __call__(self, kernel: NUTS, params: object, stage: str, step: int) -> None:
        """Look at the kernel, which forgets at the end of the chain."""
        self.tell()
        if stage.startswith("Sample"):
            self.step_size = float(kernel.step_size)
            self.acceptance = float(kernel.logging()["acc. prob"])
            self.num_divergent = len(kernel.diagnostics()["divergences"])


class _TimeIsUpError(Exception):
    """The pilot has run long enough."""


def _run_chain(rows: _Rows, row: int, settings: _Settings, key: int, watch: _Watch) -> Values:
    """Run one chain of a row and return its draws as Pyro does."""
    program, args, kwargs = rows.program(row)
    sampler = MCMC(
        settings.kernel(program),
        num_samples=settings.num_samples,
        warmup_steps=settings.warmup_steps,
        disable_progbar=True,
        hook_fn=watch,
    )
    pyro.set_rng_seed(key)
    try:
        with evaluating_only(rows.source.model.modules), torch.enable_grad():
            sampler.run(*args, **kwargs)
    except ValueError as error:
        if "valid initial" not in str(error):
            raise
        raise DataError(
            f"Pyro's NUTS found no start of finite density for row {row} in 100 tries between -2 and 2 in unconstrained space. "
            "Check the row's data, or use hmc_posterior, whose chains start from the prior."
        ) from error
    return {name: value.detach() for name, value in sampler.get_samples().items()}


def _draw_row(rows: _Rows, row: int, settings: _Settings, key: int, advance: Callable[[], object]) -> PosteriorDraws:
    """Run the chains of one row and judge them."""
    begin = time.perf_counter()
    watches = [_Watch(advance) for _ in range(settings.num_chains)]
    chains = [
        rows.read(row, _run_chain(rows, row, settings, _chain_seed(key, row, chain), watch))
        for chain, watch in enumerate(watches)
    ]
    u = torch.stack([chain[1] for chain in chains])[:, :, None]

    def mean(numbers: list[float]) -> Float[Tensor, " rows"]:
        return u.new_tensor([sum(numbers) / len(numbers)])

    draws = assess(
        u,
        torch.stack([chain[2] for chain in chains])[..., None],
        acceptance=mean([watch.acceptance for watch in watches]),
        step_size=mean([watch.step_size for watch in watches]),
        num_divergent=torch.tensor([sum(watch.num_divergent for watch in watches)], device=u.device),
    )
    samples = {name: torch.stack([chain[0][name] for chain in chains]) for name in chains[0][0]}
    return replace(draws, samples=samples, status=_judge(draws), seconds=time.perf_counter() - begin)


def _judge(draws: PosteriorDraws) -> tuple[Status, ...]:
    """Judge chains that all started alike."""
    is_doubtful = (draws.r_hat > 1.05) | (draws.ess < 400) | (draws.num_divergent > 0)
    is_moving = (draws.acceptance >= 0.4) & (draws.acceptance <= 0.995)
    return judge(is_doubtful, ~(draws.r_hat <= 1.1) | ~is_moving)


def _chain_seed(key: int, row: int, chain: int) -> int:
    """Return a seed for one chain of one row."""
    return int(np.random.SeedSequence([abs(key), row, chain]).generate_state(1)[0])


def _estimate_seconds(rows: _Rows, settings: _Settings, key: int) -> float:
    """Time a few transitions of the first row, the second half of a short chain, and reckon what all of them take."""
    begin = time.perf_counter()
    times: list[float] = []

    def tell() -> None:
        times.append(time.perf_counter())
        if times[-1] - begin > _PILOT_SECONDS:
            raise _TimeIsUpError

    half = _PILOT_TRANSITIONS // 2
    pilot = replace(settings, num_samples=half, warmup_steps=min(half, settings.warmup_steps))
    with suppress(_TimeIsUpError):
        _run_chain(rows, 0, pilot, _chain_seed(key, 0, settings.num_chains), _Watch(tell))
    middle = len(times) // 2
    since = times[middle - 1] if middle else begin
    return (times[-1] - since) / (len(times) - middle) * settings.transitions * rows.density.num_rows


def _check_rows(num_rows: int, max_rows: int, estimate: float, settings: _Settings) -> None:
    """Refuse to run for days without being asked."""
    if num_rows > max_rows:
        raise SettingError(
            f"NUTS runs rows one by one, and is not started on more than max_rows = {max_rows} of them unasked; got {num_rows:,} "
            f"rows, whose {settings.num_chains} chains of {settings.num_samples + settings.warmup_steps} transitions would take "
            f"about {_hours(estimate)} hours. Take fewer rows, or say max_rows={num_rows}; hmc_posterior moves all rows at once."
        )


def _cost(seconds: float) -> str:
    """Say how long that is."""
    if seconds < 100:
        return f"NUTS, about {seconds:.0f} s"
    return f"NUTS, about {seconds / 60:.0f} min" if seconds < 6000 else f"NUTS, about {_hours(seconds)} h"


def _hours(seconds: float) -> str:
    """Return hours to two digits, from 10 hours up in whole ones."""
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
