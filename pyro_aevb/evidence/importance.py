"""log p(x) of each row by importance sampling from the guide."""

from typing import Any

from pyro_aevb._types import Args, Kwargs, PyroProgram
from pyro_aevb.errors import SettingError
from pyro_aevb.evidence.averages import from_log_weights
from pyro_aevb.evidence.result import LogMarginal, concatenate
from pyro_aevb.program.agreement import check_separable
from pyro_aevb.program.rows import Rows, inferring
from pyro_aevb.program.settings import check_count, check_covariates

__all__ = ["log_marginal"]

METHODS = ("importance",)


def log_marginal(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    method: str = "importance",
    num_samples: int = 5000,
    num_global_samples: int = 1,
    chunk_size: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = True,
    **covariates: Any,
) -> LogMarginal:
    r"""Estimate log p(x) of each row, in nats, with a standard error.

    Method ``"importance"``: with K draws from the guide,

    .. math:: \widehat{\log p}(x_n) = \log \frac1K \sum_k \frac{p(x_n, z_k)}{q(z_k | x_n)}, \quad z_k \sim q(z | x_n)

    (Burda et al. 2015, arXiv 1509.00519, Eq 8; Rezende et al. 2014, arXiv 1401.4082, App. E). The average of weights is unbiased
    for p(x), so its logarithm is a stochastic lower bound on log p(x). With globals g it is
    :math:`\log \frac1S \sum_s p(x_n | g_s), g_s \sim q(g)`: the log predictive density under q(g), not evidence. All rows share
    these S draws; with S = 1 the standard error is that of :math:`\log p(x_n | g_1)` and says nothing about g. With
    ``data_plate=None`` the whole model is one row, and the result is the joint log evidence.

    No gradient. Cost: S * K evaluations of model and guide per row. Modules run in eval mode.

    Args:
        model: The model.
        guide: The guide, trained.
        *batch: Rows to weigh, as positional arguments of the model.
        method: ``"importance"``.
        num_samples: K, draws per row (and per global draw).
        num_global_samples: S, draws of the globals.
        chunk_size: Rows weighed at once; by default so many that some 50,000 draws are in memory. A model that draws its own
            rows runs as many as it draws, the last chunk padded.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None``.
        seed: Seed of the draws; the generators are left as they were. A seed reproduces a result under the same
            ``chunk_size`` (and ``num_samples``, which chooses it by default); under another one the draws differ.
        progress: Whether to show a progress bar.
        **covariates: The batch's keyword arguments.

    Returns:
        One entry a row: value, standard error, ESS, Pareto k-hat and status. Rows with k-hat above 0.7 have no standard error
        and are told in one warning.

    Raises:
        SettingError: If the method is unknown, a number of samples below 1 or a keyword unknown.
        DataError: If there are no rows, or NaN reaches a density.
        GuideError: If the rows' draws can't be told apart.
        ModelError: If a scale would enter the weights.

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
    if method not in METHODS:
        raise SettingError(f"Unknown method {method!r}; known are {', '.join(map(repr, METHODS))}.")
    check_count("num_samples", num_samples)
    check_count("num_global_samples", num_global_samples)
    check_count("chunk_size", chunk_size, is_optional=True)
    check_covariates(covariates, log_marginal)
    with inferring(seed, model, guide):
        rows = Rows(model, guide, batch, covariates, data_plate)
        result = _Importance(rows, num_global_samples, num_samples).run(chunk_size, progress=progress)
    result.warn_if_unreliable()
    return result


class _Importance:
    """Importance weights of all rows, chunk by chunk."""

    def __init__(self, rows: Rows, num_particles: int, num_samples: int) -> None:
        self.rows = rows
        structure = rows.structure
        has_globals = structure.has_globals and structure.data_plate is not None
        # without globals another particle is another importance sample
        self.num_particles, self.num_samples = (
            (num_particles, num_samples) if has_globals else (1, num_particles * num_samples)
        )
        self.label = "log p(x)" if structure.data_plate is not None else "joint log evidence"
        if has_globals:
            self.label = "log predictive under " + ("q(globals)" if num_particles > 1 else "one draw from q(globals)")

    def run(self, chunk_size: int | None, *, progress: bool) -> LogMarginal:
        """Weigh every chunk and join the results."""
        draws = self.num_particles * self.num_samples
        return concatenate([self._weigh(*chunk) for chunk in self.rows.chunks(chunk_size, draws, progress=progress)])

    def _weigh(self, args: Args, kwargs: Kwargs, count: int) -> LogMarginal:
        program = self.rows.program
        axes = program.axes(self.num_particles, self.num_samples)
        guide = self.rows.sample_guide(args, kwargs, axes)
        model = program.score_model(args, kwargs, axes, {name: site.value for name, site in guide.items()})
        check_separable("evidence", model | guide, program.guide_sites)
        weights = program.terms(model, guide, axes).log_weights()
        return from_log_weights(weights.local[..., :count], label=self.label)
