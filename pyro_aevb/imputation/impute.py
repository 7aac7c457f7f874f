r"""p(x_missing | x_observed) of each row: draws of what is missing, given what is known.

Two ways lead there. A guide that was trained on complete rows is run on completed ones again and again, in a Markov chain whose
Metropolis step makes up for the guide's errors. A model and a guide that know what is missing, by a mask, need one pass: draws
of the guide are resampled by their importance weights.
"""

from numbers import Integral
from typing import Any

from torch import Tensor

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import SettingError
from pyro_aevb.imputation.gibbs import Gibbs, complete_at_random
from pyro_aevb.imputation.missing import MissingData, public_name, read_missing
from pyro_aevb.imputation.resampling import Resampling
from pyro_aevb.imputation.result import Imputation
from pyro_aevb.imputation.sampler import Sampler
from pyro_aevb.program.observations import ToBatch, write_observations
from pyro_aevb.program.rows import Rows, inferring
from pyro_aevb.program.settings import check_count, check_covariates
from pyro_aevb.randomness import preserved_rng

__all__ = ["impute"]

METHODS = ("auto", "gibbs", "mask")


def impute(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    observed: Any = None,
    num_samples: int = 100,
    num_steps: int = 200,
    warmup_steps: int = 20,
    method: str = "auto",
    num_importance_samples: int = 1000,
    num_global_samples: int = 10,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = True,
    to_batch: ToBatch | None = None,
    **covariates: Any,
) -> Imputation:
    r"""Draw the missing entries of rows from p(x_missing | x_observed).

    Method ``"gibbs"``, for a guide of complete rows: a Markov chain on (z, x_missing) repeats

    .. math:: z' \sim q(z | x), \quad z \leftarrow z' \text{ with probability }
              \min\left(1, \frac{p(x, z')\, q(z | x)}{p(x, z)\, q(z' | x)}\right), \quad
              x_{missing} \sim p(x_{missing} | x_{observed}, z)

    where x is the row as it is completed at that step (Mattei & Frellsen 2018, arXiv 1802.04826,
    Algorithm 1). Its stationary distribution is the exact p(z, x_missing | x_observed), whatever the guide; a poor
    guide takes longer to get there. The first ``warmup_steps`` accept always (pseudo-Gibbs, Rezende et al. 2014,
    arXiv 1401.4082): they bring the chain near, and are not exact by themselves. Every draw is the last state of a chain
    of its own, so that draws are independent. Chains start at a draw of x_missing from p(x): inside the support whatever it is,
    spread out, and right at once where nothing is observed. Cost: for each draw of each row, guide and model once a warm-up
    step, then the guide twice and the model three times a step.

    Method ``"mask"``, for a model whose masks (``obs_mask=``, ``poutine.mask``) drop the missing entries and a guide that does
    without them: of K draws from q(z | x_observed, mask), ``num_samples`` are resampled with weights
    p(x_observed, z) / q(z | x_observed, mask), and x_missing is drawn given each (Mattei & Frellsen 2019, arXiv
    1812.02633). Consistent as K grows, biased of order 1 / K. Cost: model and guide K times a row, the model once more a draw.

    Globals g are draws from q(g) that are held while x_missing is drawn given them: the result is p(x_missing | x_observed)
    under q(g). No gradient. Modules run in eval mode.

    Assumed and not verified: the chains are long enough. A low acceptance says that they are not, a high one does not say that
    they are, above all for a guide that is too narrow. Raise ``num_steps`` until the result stays.

    Args:
        model: The model.
        guide: The guide, trained.
        *batch: Rows, as positional arguments of the model. Missing entries may hold anything, NaN too.
        observed: Boolean, True where an entry is known, of the shape of the argument that holds the data; or
            ``{observed site: mask}``, each of shape ``[rows, inner plates, *event]``; ``None`` for what the model masks.
        num_samples: Draws.
        num_steps: Metropolis steps of each chain; 0 for plain pseudo-Gibbs, which is as wrong as the guide.
        warmup_steps: Steps before them, which accept always.
        method: ``"gibbs"``, ``"mask"``, or ``"auto"``: ``"mask"`` if the model's own masks drop every missing entry.
        num_importance_samples: K, for method ``"mask"``.
        num_global_samples: Draws of the globals that the draws share evenly; at most ``num_samples`` count.
        chunk_size: Rows run at once; by default so many that some 50,000 draws are in memory.
        data_plate: Name of the plate whose indices are rows, or ``"auto"``.
        seed: Seed of the draws; the generators are left as they were. It reproduces draws under the same ``chunk_size`` (and
            ``num_samples``, which chooses it by default).
        progress: Whether to show a progress bar.
        to_batch: Puts values of observed sites into a batch, from ``(values, args, kwargs)`` to new ``(args, kwargs)``, where the
            model observes something computed from its arguments.
        **covariates: The batch's keyword arguments.

    Returns:
        The draws, their latents, and how far each row can be trusted; rows that can't are told in one warning.

    Raises:
        SettingError: If a setting is out of range or unknown, or nothing says what is missing.
        DataError: If a mask has another type or shape, there are no rows, or a known entry is NaN.
        ModelError: If the model is not supported, the mask splits an event of dependent entries, or missing entries are not
            independent of the rest of the data given the latents.
        GuideError: If the guide does not fit the model.

    Example:
        >>> from pyro_aevb import impute
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x.sum(-1) / 3, 3**-0.5))
        >>> x = torch.tensor([[2.0, float("nan")]])
        >>> result = impute(model, guide, x, observed=~x.isnan(), num_samples=2000, num_steps=20, seed=0, progress=False)
        >>> bool((result.filled - torch.tensor([[2.0, 1.0]])).abs().max() < 0.1)  # E[x_2 | x_1] = x_1 / 2
        True
    """
    _check_settings(num_samples, num_steps, warmup_steps, method)
    check_count("num_importance_samples", num_importance_samples)
    check_count("num_global_samples", num_global_samples)
    check_count("chunk_size", chunk_size, is_optional=True)
    check_covariates(covariates, impute)
    with inferring(seed, model, guide):
        with preserved_rng():  # a mask that is refused leaves the generators too
            missing = read_missing(model, batch, covariates, observed, data_plate)
        method = _choose(method, missing)
        args, kwargs = batch, covariates
        if method == "gibbs":
            args, kwargs = complete_at_random(model, args, kwargs, missing, to_batch)
        rows = Rows(model, guide, args, kwargs, missing.structure.data_plate)
        sampler: Sampler = (
            Gibbs(rows, to_batch, warmup_steps, num_steps)
            if method == "gibbs"
            else Resampling(rows, num_importance_samples)
        )
        part = sampler.run(missing, num_samples, num_global_samples, chunk_size, progress=progress)
        names = {name: public_name(name, missing.structure) for name in missing.known}
        result = Imputation(
            samples={names[name]: value for name, value in part.samples.items()},
            observed={names[name]: known for name, known in missing.known.items()},
            latents=part.latents,
            filled=_filled(model, batch, covariates, missing, part.samples),
            acceptance=part.acceptance,
            ess=part.ess,
            is_flagged=part.is_flagged,
            method=method,
        )
    result.warn_if_unreliable()
    return result


def _check_settings(num_samples: int, num_steps: int, warmup_steps: int, method: str) -> None:
    check_count("num_samples", num_samples)
    for name, count in (("num_steps", num_steps), ("warmup_steps", warmup_steps)):
        if not isinstance(count, Integral) or count < 0:
            raise SettingError(f"{name} must be an integer of at least 0, got {count!r}.")
    if num_steps + warmup_steps < 1:
        raise SettingError("num_steps and warmup_steps are both 0; a chain takes at least one step.")
    if method not in METHODS:
        raise SettingError(f"Unknown method {method!r}; known are {', '.join(map(repr, METHODS))}.")


def _choose(method: str, missing: MissingData) -> str:
    """Choose one pass where the model by itself does without every missing entry."""
    if method == "mask" and not missing.is_masked:
        raise SettingError(
            "Method 'mask' needs a model whose own masks drop every missing entry, and this batch lets some of them count. Say in "
            "the batch what is missing (obs_mask=, poutine.mask), or use method='gibbs'."
        )
    return ("mask" if missing.is_masked else "gibbs") if method == "auto" else method


def _filled(model: PyroProgram, args: Args, kwargs: Kwargs, missing: MissingData, samples: Values) -> Tensor | None:
    """Return the data with a summary of the draws in the missing entries."""
    summaries = {
        name: value.mean(0) if value.is_floating_point() else value.mode(0).values for name, value in samples.items()
    }
    completed = missing.complete(summaries)
    if missing.argument is None:
        return next(iter(completed.values())) if len(completed) == 1 else None
    new_args, new_kwargs = write_observations(model, args, kwargs, completed, structure=missing.structure)
    return new_args[missing.argument] if isinstance(missing.argument, int) else new_kwargs[missing.argument]
