"""log p(x) of each row: the door to every estimator."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_aevb._types import PyroProgram
from pyro_aevb.errors import SettingError
from pyro_aevb.evidence.ais import AIS
from pyro_aevb.evidence.bridge import Bridge
from pyro_aevb.evidence.importance import GuideWeights, Importance
from pyro_aevb.evidence.problem import Estimator, require_guide
from pyro_aevb.evidence.quadrature import Quadrature
from pyro_aevb.evidence.reciprocal import Reciprocal
from pyro_aevb.evidence.result import LogMarginal
from pyro_aevb.evidence.running import EstimatorRun, name_quantity
from pyro_aevb.program.batch import as_tensors
from pyro_aevb.program.compiling import Compile, check_compile
from pyro_aevb.program.processes import Processes
from pyro_aevb.program.rows import Rows, inferring
from pyro_aevb.program.settings import NOTE, check_count, check_settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["METHODS", "find_method", "log_marginal", "make_estimator"]

METHODS: dict[str, type[Estimator]] = {
    estimator.method: estimator
    for estimator in (
        Importance,
        AIS,
        Bridge,
        Reciprocal,
        Quadrature,
    )
}
"""Estimators by the name that the door knows them by; a new one is a line here."""


def log_marginal(
    model: PyroProgram,
    guide: PyroProgram | None,
    *batch: Any,
    method: str = "importance",
    preset: str | None = None,
    num_samples: int | None = None,
    num_global_samples: int = 1,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    compile: Compile = "auto",  # noqa: A002  torch's own word
    seed: int | None = None,
    fabric: "Fabric | None" = None,
    progress: bool = True,
    **settings: Any,
) -> LogMarginal:
    r"""Estimate log p(x) of each row, in nats, with a standard error.

    ==================  ===================================================================  ==========================
    method              what it does, and its settings                                       value
    ==================  ===================================================================  ==========================
    ``"importance"``    draws from the guide, or around posterior draws and from the prior   stochastic lower bound
                        (:class:`~pyro_aevb.evidence.importance.Importance`)
    ``"ais"``           anneals chains from the guide or the prior to the posterior          stochastic lower bound
                        (:class:`~pyro_aevb.evidence.ais.AIS`)
    ``"bridge"``        joins posterior draws and a Gaussian fitted to them                  estimate
                        (:class:`~pyro_aevb.evidence.bridge.Bridge`)
    ``"reciprocal"``    the paper's: a mean of q / p over posterior draws                    stochastic upper bound, if
                        (:class:`~pyro_aevb.evidence.reciprocal.Reciprocal`)                 no mode is missed
    ``"quadrature"``    integrates over a grid of at most three latents                      estimate, exact to
                        (:class:`~pyro_aevb.evidence.quadrature.Quadrature`)                 ``change``
    ==================  ===================================================================  ==========================

    The value of ``"importance"`` and ``"ais"`` is low by about half the squared standard error.

    With globals g a row's value is :math:`\log \frac1S \sum_s p(x_n | g_s), g_s \sim q(g)`: the log predictive density under
    q(g), not evidence. All rows share these S draws; with S = 1 the standard error is that of :math:`\log p(x_n | g_1)` and
    says nothing about g. ``joint`` of the result is the log evidence of all rows given, another quantity:
    :math:`\log \frac1S \sum_s w_g[s] \prod_n p(x_n | g_s)`. With ``data_plate=None`` the whole model is one row, and the
    value is the joint log evidence.

    No gradient. Cost: S times the estimator's own. Modules run in eval mode.

    Args:
        model: The model.
        guide: The guide, trained; ``None`` for methods that do without one.
        *batch: Rows to weigh, as positional arguments of the model; numpy arrays are accepted.
        method: Name of the estimator.
        preset: Name of a set of the estimator's settings; settings given by name come before it.
        num_samples: Draws per row (and per global draw): K of ``"importance"``, by default 5,000; for methods with posterior
            draws those of a row over all chains.
        num_global_samples: S, draws of the globals.
        chunk_size: Rows weighed at once; by default so many that some 50,000 draws are in memory. A model that draws its own
            rows runs as many as it draws, the last chunk padded.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None``.
        compile: Whether densities that chains run on are recorded and compiled, as of :class:`~pyro_aevb.LogDensity`.
        seed: Seed of the draws; the generators are left as they were. With a seed a row's value depends on neither ``chunk_size``
            nor, without a guide, on the rows after it, up to rounding; so it is where the prior draws by transforming as many
            random numbers for every row (not by rejection, as Gamma does). A guide draws for all rows at once: one row more or
            less changes its draws. ``"importance"`` from the guide draws anew for each chunk.
        fabric: A ``lightning_fabric.Fabric`` whose processes divide the chunks among them. Each is given all rows and gets the
            whole result: that of one process under that seed, to rounding.
        progress: Whether to show a progress bar.
        **settings: Settings of the estimator, and the batch's keyword arguments: tensors and arrays go to the model.

    Returns:
        One entry a row: value, standard error, bounds, diagnostics and status. Unreliable rows are told in one warning.

    Raises:
        SettingError: If the method, preset or a setting is unknown or out of range, or the method needs a guide.
        DataError: If there are no rows, or NaN reaches a density.
        GuideError: If the guide does not fit the model, or the rows' draws can't be told apart.
        ModelError: If the model is not supported, or a scale would enter the weights.

    Example:
        >>> from pyro_aevb import log_marginal
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.8))
        >>> result = log_marginal(model, guide, torch.tensor([0.0, 1.0]), seed=0, progress=False)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor([0.0, 1.0])).double()
        >>> bool(((result.value - exact).abs() < 4 * result.standard_error).all())
        True
    """
    covariates: dict[str, Any] = {
        name: item for name, item in settings.items() if isinstance(item, (Tensor, np.ndarray))
    }
    own = {name: item for name, item in settings.items() if name not in covariates}
    estimator = make_estimator(method, preset, num_samples, own)
    check_count("num_global_samples", num_global_samples)
    check_count("chunk_size", chunk_size, is_optional=True)
    check_compile(compile)
    batch, covariates = as_tensors(batch, covariates)
    processes = Processes(fabric)
    progress = progress and processes.is_first
    with inferring(processes.agree_on_seed(seed), *((model,) if guide is None else (model, guide))):
        if isinstance(estimator, Importance) and estimator.proposal == "guide":
            rows = Rows(model, require_guide(guide, method), batch, covariates, data_plate, processes).checked()
            weights = GuideWeights(rows, num_global_samples, estimator.num_samples)
            label = name_quantity(rows.structure, num_global_samples)
            result = weights.run(label, chunk_size, progress=progress)
        else:
            run = EstimatorRun(model, guide, (batch, covariates), data_plate, num_global_samples, compile=compile)
            result = run.estimate(estimator, chunk_size, progress=progress, processes=processes)
    if processes.is_first:
        result.warn_if_unreliable()
    return result


def find_method(method: str) -> type[Estimator]:
    """Return the estimator of a name.

    Raises:
        SettingError: If there is none.
    """
    if method not in METHODS:
        raise SettingError(f"Unknown method {method!r}; known are {', '.join(map(repr, METHODS))}.")
    return METHODS[method]


def make_estimator(method: str, preset: str | None, num_samples: int | None, settings: Mapping[str, Any]) -> Estimator:
    """Make the estimator that a method's name, a preset and settings ask for.

    Args:
        method: Its name.
        preset: Name of a set of its settings, or ``None``.
        num_samples: K of importance sampling; posterior draws of a row, over all chains, for methods that use them.
        settings: Its settings by name; they come before the preset's.

    Raises:
        SettingError: If there is no such method, preset or setting, or a setting is out of range.
    """
    kind = find_method(method)
    check_settings(settings, log_marginal, NOTE, also=(setting.name for setting in fields(kind)))
    preset_settings = {} if preset is None else kind.find_preset(preset)
    chosen = {**preset_settings, **settings}
    if num_samples is not None:
        chosen |= _draws(kind, num_samples, chosen)
    return kind(**chosen)


def _draws(kind: type[Estimator], num_samples: int, settings: Mapping[str, Any]) -> dict[str, int]:
    """Say what a number of samples means for a method."""
    check_count("num_samples", num_samples)
    defaults = {setting.name: setting.default for setting in fields(kind)}
    if "num_samples" in defaults:
        return {"num_samples": num_samples}
    if "num_draws" not in defaults:
        counts = ", ".join(name for name in defaults if name.startswith("num_"))
        raise SettingError(
            f"Method {kind.method!r} has no num_samples, got {num_samples}: its counts are {counts or 'its own'}."
        )
    num_chains = settings.get("num_chains", defaults["num_chains"])
    check_count("num_chains", num_chains)
    if num_samples % num_chains:
        raise SettingError(
            f"num_samples are the posterior draws of a row over all chains: expected a multiple of num_chains = {num_chains}, "
            f"got {num_samples}. Give num_draws, those of one chain, instead."
        )
    return {"num_draws": num_samples // num_chains}
