"""log p(x) of each row by importance sampling."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from pyro_aevb._types import Args, Kwargs
from pyro_aevb.errors import SettingError
from pyro_aevb.evidence.averages import from_log_weights, joint_evidence
from pyro_aevb.evidence.chains import propose
from pyro_aevb.evidence.gaussian import RowGaussian, fit_gaussian
from pyro_aevb.evidence.mixture import few_rows, weigh_with_prior
from pyro_aevb.evidence.problem import Estimator, Problem
from pyro_aevb.evidence.result import LogMarginal, concatenate
from pyro_aevb.evidence.rules import rate
from pyro_aevb.mcmc.posterior import sample_rows
from pyro_aevb.program.agreement import check_separable
from pyro_aevb.program.rows import Rows
from pyro_aevb.program.settings import check_count
from pyro_aevb.weights import log_mean_exp

__all__ = ["GuideWeights", "Importance"]

_BLOCK = 50
"""With a fitted proposal so many draws of a row count for how many rows are run at once: they run their chains together."""
_PARTS = 5
"""One part in five of the draws with a fitted proposal is the prior's."""
_WIDER = 2.0
"""Standard deviations of the wider Gaussian over those of the fitted one."""
_FORK = 0xF17
"""Which fork of a row's noise is for a fitted proposal: other numbers than those of the chains and their starts."""


@dataclass(frozen=True, kw_only=True)
class Importance(Estimator):
    r"""Importance sampling with K draws of a proposal q.

    .. math:: \widehat{\log p}(x_n) = \log \frac1K \sum_k \frac{p(x_n, z_k)}{q(z_k | x_n)}, \quad z_k \sim q(z | x_n)

    (Burda et al. 2015, arXiv 1509.00519, Eq 8; Rezende et al. 2014, arXiv 1401.4082, App. E). The mean weight is unbiased for
    p(x), so its logarithm is a stochastic lower bound on log p(x). Costs K evaluations of model and proposal a row, and the
    chains' gradients where the proposal is fitted. No gradient of the result.

    Args:
        num_samples: K, draws a row.
        proposal: ``"guide"``, or ``"fitted"``: a Gaussian in unconstrained coordinates, fitted to posterior draws by
            Hamiltonian Monte Carlo, with two fifths of the draws, the same at twice its width with two fifths, and the prior with
            one fifth; all are weighed under the mixture (:func:`~pyro_aevb.evidence.mixture.weigh_with_prior`). A Gaussian alone
            has lighter tails than many posteriors, so that k-hat doubts it even where the value is right. The fit is as good
            as the chains: of a mode that none visited only the prior's draws know.

    Raises:
        SettingError: If ``num_samples`` is no integer of at least 1 (5 for a fitted proposal), or the proposal is unknown.
    """

    method: ClassVar[str] = "importance"

    num_samples: int = 5000
    proposal: str = "guide"

    def __post_init__(self) -> None:
        check_count("num_samples", self.num_samples)
        if self.proposal not in ("guide", "fitted"):
            raise SettingError(f"proposal must be 'guide' or 'fitted', got {self.proposal!r}.")
        if self.proposal == "fitted" and self.num_samples < _PARTS:
            raise SettingError(
                f"proposal='fitted' draws from a mixture and needs num_samples of at least {_PARTS}, got {self.num_samples}."
            )

    @property
    @override
    def draws_per_row(self) -> int:
        return self.num_samples if self.proposal == "guide" else min(self.num_samples, _BLOCK)

    @override
    def estimate(self, problem: Problem) -> LogMarginal:
        """Weigh draws of the guide, or of what posterior draws say. The door weighs the guide's without coordinates."""
        if self.proposal == "guide":
            u, log_q = problem.require_guide(self.method).draw(self.num_samples, seed=problem.noise.seed % 2**31)
            return from_log_weights((problem.density.log_joint(u).double() - log_q)[None])
        return self._weigh_fitted(problem)

    def _weigh_fitted(self, problem: Problem) -> LogMarginal:
        """Draw from the posterior, fit a Gaussian, and weigh draws from around it and from the prior."""
        draws = sample_rows(problem.density, problem.guide, problem.noise, advance=problem.advance)
        num_prior = self.num_samples // _PARTS
        log_weights = []
        for rows, part in few_rows(replace(problem, noise=problem.noise.fork(_FORK)), self.num_samples):
            q = fit_gaussian(draws.unconstrained[:, :, rows].flatten(0, 1))
            u, log_density = _propose_around(part, q, self.num_samples - num_prior)
            log_weights.append(weigh_with_prior(part, u, log_density, num_prior=num_prior).log_weights)
        result = from_log_weights(torch.cat(log_weights, 1)[None])
        status = rate(result.standard_error, k_hat=result.k_hat, r_hat=draws.nested_r_hat)
        return replace(result, r_hat=draws.nested_r_hat, num_divergent=draws.num_divergent.double(), status=status)


def _propose_around(
    problem: Problem, q: RowGaussian, num_draws: int
) -> tuple[Float[Tensor, "draws rows latent"], Callable[[Tensor], Tensor]]:
    """Draw one half from a Gaussian and the other from a wider one, whose tails are heavier than most posteriors'.

    Returns:
        The draws, and the log density of their mixture.
    """
    wide = RowGaussian(q.mean, _WIDER * q.scale, q.factor)
    num_wide = num_draws // 2
    share = num_wide / num_draws

    def log_density(u: Tensor) -> Tensor:
        u = u.double()
        return torch.logaddexp(q.log_density(u) + math.log1p(-share), wide.log_density(u) + math.log(share))

    u = [propose(problem, q, num_draws - num_wide, step=0), propose(problem, wide, num_wide, step=1)]
    return torch.cat(u), log_density


class GuideWeights:
    """Weights of a guide's own draws, chunk by chunk: model and guide run on sites, and need no coordinates.

    Args:
        rows: The rows, with model and guide.
        num_particles: Draws of the globals.
        num_samples: Draws of the rows' latents given each.
    """

    def __init__(self, rows: Rows, num_particles: int, num_samples: int) -> None:
        self.rows = rows
        structure = rows.structure
        self.has_globals = structure.has_globals and structure.data_plate is not None
        # without globals another particle is another importance sample
        self.num_particles, self.num_samples = (
            (num_particles, num_samples) if self.has_globals else (1, num_particles * num_samples)
        )

    def run(self, label: str, chunk_size: int | None, *, progress: bool) -> LogMarginal:
        """Weigh every chunk, join the results and, with globals, weigh all rows together."""
        draws = self.num_particles * self.num_samples
        chunks = self.rows.chunks(chunk_size, draws, progress=progress)
        own = [self._weigh(*chunk, label) for chunk in chunks]
        parts = [part for part in self.rows.processes.gather(own) if part is not None]
        result = concatenate([part.result for part in parts])
        if not self.has_globals:
            return result
        values = torch.cat([part.values for part in parts], 1)
        # every chunk keeps the globals that the guide drew with the first one
        joint = joint_evidence(parts[0].log_global, values, result.standard_error, is_unbiased=True)
        return replace(result, joint=joint)

    def _weigh(self, args: Args, kwargs: Kwargs, count: int, label: str) -> "_Weighed | None":
        """Weigh one chunk; one of which no row counts is run for its globals alone."""
        program = self.rows.program
        axes = program.axes(self.num_particles, self.num_samples)
        guide = self.rows.sample_guide(args, kwargs, axes)
        if count == 0:
            return None
        model = program.score_model(args, kwargs, axes, {name: site.value for name, site in guide.items()})
        check_separable("evidence", model | guide, program.guide_sites)
        weights = program.terms(model, guide, axes).log_weights()
        local = weights.local[..., :count]
        return _Weighed(from_log_weights(local, label=label), weights.global_, log_mean_exp(local.double(), 1))


@dataclass(frozen=True)
class _Weighed:
    """What one chunk gave.

    Attributes:
        result: The rows' results.
        log_global: log w_g of the draws of the globals.
        values: log p(x | g) of each draw and row.
    """

    result: LogMarginal
    log_global: Tensor
    values: Tensor
