r"""A guide beside posterior draws that can be trusted: where it is wrong, by how much, and what that costs in nats.

The posterior's own draws come from :func:`~pyro_aevb.mcmc.nuts.nuts_posterior` or
:func:`~pyro_aevb.mcmc.posterior.hmc_posterior`; the guide is asked for as many as it takes. Rows whose chains are flagged are
compared too, but left out of pooled numbers: there the standard itself is in doubt.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro.infer.autoguide import AutoGuide, AutoMessenger
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import PyroProgram, Values
from pyro_aevb.diagnostics.comparison_result import Comparison, SiteComparison
from pyro_aevb.diagnostics.metrics import MIN_DRAWS, classify, compare_moments, wasserstein
from pyro_aevb.errors import DataError, SettingError
from pyro_aevb.evidence.pareto import pareto_k_hat
from pyro_aevb.mcmc.convergence import mean_ess
from pyro_aevb.mcmc.draws import PosteriorDraws
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.proposal import GuideDensity
from pyro_aevb.program.rows import CHUNK_DRAWS, inferring
from pyro_aevb.program.settings import check_count, check_covariates

__all__ = ["check_enough", "compare_posteriors"]


def compare_posteriors(
    guide: PyroProgram,
    reference: PosteriorDraws,
    *batch: Any,
    model: PyroProgram | None = None,
    given: Mapping[str, Tensor] | None = None,
    num_samples: int = 1000,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = True,
    **covariates: Any,
) -> Comparison:
    r"""Compare q(z | x) of a guide with posterior draws of the same rows, site by site and row by row.

    Means and standard deviations, Wasserstein distances and classifiers (:mod:`pyro_aevb.diagnostics.metrics`) compare draws with
    draws. Densities say what the error costs: with :math:`r(z) = \log q(z | x) - \log p(x, z)`,

    .. math:: E_q[r] = KL(q, p) - \log p(x), \quad E_p[r] = -KL(p, q) - \log p(x),

    the difference of the two is the symmetric divergence, whatever log p(x) is. A guide that misses a mode has a small KL(q, p),
    and a large KL(p, q) if the chains found it.

    Costs one run of guide and model for each draw of either set, and five fits of small trees for each row and site. No gradient.

    Args:
        guide: The guide, trained.
        reference: Draws of ``nuts_posterior`` or ``hmc_posterior`` for the same rows, model and globals.
        *batch: The rows, as positional arguments of the model.
        model: The model; may be left out for guides that know theirs (ours and Pyro's automatic ones).
        given: Values of the model's globals, those that the chains were given.
        num_samples: Draws of the guide for each row, at least 100.
        data_plate: As it was for the chains.
        seed: Seed of the guide's draws; the generators are left as they were.
        progress: Whether to show a progress bar.
        **covariates: The batch's keyword arguments.

    Raises:
        SettingError: If there is no model, a setting is out of range, the reference are no ``PosteriorDraws``, or either set has
            fewer than 100 draws a row.
        DataError: If the reference draws are of other rows, sites or shapes, or their log joint density is not that of these rows.
        GuideError: If the guide does not fit the model, or its density is not known at given latents.
        ModelError: If a global is not given, or the model is not supported.

    Example:
        >>> from pyro_aevb import hmc_posterior
        >>> from pyro_aevb.diagnostics.comparison import compare_posteriors
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the posterior, but half a standard deviation off
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2 + 0.5**1.5, 0.5**0.5))
        >>> x = torch.tensor([0.0, 1.0])
        >>> chains = hmc_posterior(model, x, num_samples=100, warmup_steps=60, seed=0, progress=False)
        >>> found = compare_posteriors(guide, chains, x, model=model, seed=0, progress=False)
        >>> bool((found.sites["z"].moments.mean_error - 0.5).abs().max() < 0.2)
        True
        >>> bool((found.divergence - 0.5**2).abs().max() < 5 * found.divergence_se.max())
        True
    """
    check_count("num_samples", num_samples)
    check_covariates(covariates, compare_posteriors)
    _check_draws(reference, num_samples)
    model = _model_of(guide) if model is None else model
    with inferring(seed, model, guide):
        density = LogDensity(model, *batch, data_plate=data_plate, given=given, **covariates)
        samples = _check_reference(reference, density)
        key = int(torch.randint(2**31, ())) if seed is None else seed
        weights = _weigh(GuideDensity(guide, density), density, reference, num_samples, key)
        own = density.constrain(weights.u)
        sites = _compare_sites(own, samples, key, progress=progress)
    in_q, in_p = weights.guide_ratio, weights.reference_ratio
    variance = in_q.var(0) / num_samples + in_p.flatten(0, 1).var(0) / mean_ess(in_p)
    is_joint = density.structure is not None and density.structure.data_plate is None
    return Comparison(
        sites=sites,
        guide_log_ratio=in_q.mean(0),
        reference_log_ratio=in_p.mean((0, 1)),
        divergence=in_q.mean(0) - in_p.mean((0, 1)),
        divergence_se=variance.sqrt(),
        k_hat=pareto_k_hat(-in_q),
        reference=reference,
        guide_samples={name: value.squeeze(1) if is_joint else value for name, value in own.items()},
        guide_seconds=weights.seconds,
    )


class _Weights(NamedTuple):
    """Draws of the guide, and log q - log p of both sets of draws."""

    u: Float[Tensor, "draws rows latent"]
    guide_ratio: Float[Tensor, "draws rows"]
    reference_ratio: Float[Tensor, "chains steps rows"]
    seconds: float


def _weigh(
    proposal: GuideDensity, density: LogDensity, reference: PosteriorDraws, num_samples: int, key: int
) -> _Weights:
    """Draw from the guide and weigh both sets of draws, as many rows at once as fit."""
    most = max(num_samples, reference.num_chains * reference.num_samples)
    size = proposal.chunk_rows or max(1, CHUNK_DRAWS // most)
    u, in_q, log_q, log_p = [], [], [], []
    seconds = 0.0
    for begin in range(0, density.num_rows, size):
        rows = slice(begin, min(begin + size, density.num_rows))
        part, own = density.rows(rows), proposal.rows(rows)
        start = time.perf_counter()
        drawn, its_log_q = own.draw(num_samples, seed=key)
        seconds += time.perf_counter() - start
        u.append(drawn)
        in_q.append(its_log_q.double() - part.log_joint(drawn).double())
        pair = own.path(reference.unconstrained[:, :, rows].to(drawn))
        log_q.append(pair[0].double())
        log_p.append(pair[1].double())
    found = torch.cat(log_p, -1)
    _check_same_data(found, reference)
    return _Weights(torch.cat(u, 1), torch.cat(in_q, 1), torch.cat(log_q, -1) - found, seconds)


def _compare_sites(own: Values, samples: Values, key: int, *, progress: bool) -> dict[str, SiteComparison]:
    """Compare each site, and let classifiers tell the two sets of its draws apart, row by row."""
    found = {}
    total = sum(value.shape[1] for value in own.values())
    with tqdm(total=total, disable=not progress, unit="row", desc="comparing", dynamic_ncols=True) as bar:
        for name, draws in own.items():
            chains = samples[name]
            accuracies = []
            for row in range(draws.shape[1]):
                pair = draws[:, row].flatten(1) if draws.dim() > 2 else draws[:, row, None]
                accuracies.append(classify(pair, chains[:, :, row].reshape(*chains.shape[:2], -1), (key + row) % 2**32))
                bar.update()
            numbers = torch.tensor(accuracies, dtype=torch.float64, device=draws.device)
            found[name] = SiteComparison(
                compare_moments(draws, chains), wasserstein(draws, chains), numbers[:, 0], numbers[:, 1]
            )
    return found


def _model_of(guide: PyroProgram) -> PyroProgram:
    """Return the model of an automatic guide.

    Raises:
        SettingError: If the guide does not know its model.
    """
    if isinstance(guide, AutoGuide | AutoMessenger):
        return guide.model
    raise SettingError(
        "The guide does not say what its model is, whose density weighs the draws. Give the model that the chains sampled: "
        "compare_posteriors(guide, reference, *batch, model=model)."
    )


def _check_draws(reference: PosteriorDraws, num_samples: int) -> None:
    """Refuse what are no draws, and too few of them."""
    if not isinstance(reference, PosteriorDraws):
        raise SettingError(
            f"reference must be draws as nuts_posterior or hmc_posterior return them, got {type(reference).__name__}. Call "
            "compare_posteriors(guide, reference, *batch, model=model)."
        )
    check_enough(num_samples, (reference.num_chains, reference.num_samples))


def check_enough(num_samples: int, chains: tuple[int, int]) -> None:
    """Refuse to compare with too few draws.

    Args:
        num_samples: Draws of the guide for each row.
        chains: How many chains the reference has, and how many draws each.

    Raises:
        SettingError: Saying how many there are.
    """
    counts = {
        "the guide": (num_samples, f"num_samples={num_samples}"),
        "the reference": (chains[0] * chains[1], f"{chains[0]} chains of {chains[1]}"),
    }
    for who, (count, how) in counts.items():
        if count < MIN_DRAWS:
            raise SettingError(
                f"A comparison needs at least {MIN_DRAWS} draws a row: classifiers and Pareto k-hat tell nothing of fewer. "
                f"Got {count} of {who} ({how}). Draw more."
            )


def _check_reference(reference: PosteriorDraws, density: LogDensity) -> Values:
    """Return reference draws of each site with a rows axis, checked to be of the batch's rows, sites and shapes.

    Raises:
        DataError: If they are not.
    """
    if len(reference) != density.num_rows:
        raise DataError(
            f"The reference draws must be of the batch's rows: expected {density.num_rows} rows, got {len(reference)}. Compare "
            "with the batch that the chains were given."
        )
    shape = (1, density.num_rows, density.dim)
    expected = {name: tuple(value.shape[1:]) for name, value in density.constrain(_zeros(density, shape)).items()}
    if reference.samples.keys() != expected.keys():
        lacking, extra = sorted(expected.keys() - reference.samples), sorted(reference.samples.keys() - expected.keys())
        raise DataError(
            f"The reference draws must be of the model's latents {sorted(expected)}; got {sorted(reference.samples)}: missing "
            f"{lacking}, unknown {extra}. Draw from this model, with the same globals given."
        )
    is_joint = density.structure is not None and density.structure.data_plate is None
    found = {name: value.unsqueeze(2) if is_joint else value for name, value in reference.samples.items()}
    for name, value in found.items():
        if tuple(value.shape[2:]) != expected[name]:
            raise DataError(
                f"The reference draws of site {name!r} must have shape [chains, draws, *{list(expected[name])}], got "
                f"{list(value.shape)}. Draw from this model for these rows, under the same data_plate.",
                site=name,
            )
    return found


def _zeros(density: LogDensity, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=density.dtype, device=density.device)


def _check_same_data(log_joint: Float[Tensor, "chains steps rows"], reference: PosteriorDraws) -> None:
    """Refuse reference draws whose log joint density is another: they are of other data, globals or parameters.

    Raises:
        DataError: Naming the rows.
    """
    theirs = reference.log_joint.to(log_joint)
    apart = (log_joint - theirs).abs() / theirs.abs().clamp(min=1.0)
    is_other = (apart.masked_fill(~theirs.isfinite(), 0.0) > 1e-3).any(0).any(0)
    if is_other.any():
        rows = is_other.nonzero()[:, 0].tolist()
        gap = (log_joint - theirs).abs()[..., rows].max().item()
        raise DataError(
            f"The reference draws must be of these data: in {len(rows)} of {len(is_other)} rows ({rows[:10]}) the log joint "
            f"density of the draws is another than the one they came with, by up to {gap:.3g} nats. Give the rows in the same "
            "order, the same globals, and the model with the parameters that the chains were run with."
        )
