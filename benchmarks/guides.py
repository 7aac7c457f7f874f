r"""Automatic guides on the linear-Gaussian fixture: do they reach what their families can?

The posterior is a multivariate normal, so that the full-covariance guide and the flow can reach log p(x) itself, and the
factorised guide log p(x) less the gap :math:`\frac12 (\sum_j \log \Lambda_{jj} - \log |\Lambda|)`, the same at every row, with
the exact means and the standard deviations :math:`\Lambda_{jj}^{-1/2}` (Bishop 2006, 10.1.2;
:class:`pyro_aevb.testing.LinearGaussian`). Nothing but the model is given: ``AEVB(model)`` for the factorised one.
"""

from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from benchmarks.amortized import Timed, cosine, moments_of, timed_fit
from benchmarks.result import Result, Row
from pyro_aevb import AEVB, SGVB, AutoAmortizedFlow, AutoAmortizedMultivariateNormal
from pyro_aevb.testing import LinearGaussian

__all__ = ["run"]

NUM_TEST_ROWS = 1000
NUM_PARTICLES = 100
SEEDS = (0, 1)
GUIDES = {"Normal": None, "MultivariateNormal": AutoAmortizedMultivariateNormal, "Flow": AutoAmortizedFlow}
BARS = {"Normal": 0.02, "MultivariateNormal": 0.02, "Flow": 0.05}
MOMENTS_BAR = 0.02


class Measured(NamedTuple):
    """What one fit of one guide found.

    Attributes:
        guide: The guide.
        seed: Seed of the fit.
        timed: How long it took.
        gap: Mean of log p(x) - ELBO over the test rows, in nats, and its standard error.
        best_gap: What the family can reach.
        mean_errors: Errors of posterior means, ``[rows, latents]``.
        sd_errors: Errors of posterior standard deviations.
        noise: Standard error of such a mean by the finite number of draws.
    """

    guide: str
    seed: int
    timed: Timed
    gap: tuple[float, float]
    best_gap: float
    mean_errors: Tensor
    sd_errors: Tensor
    noise: float


def run(*, quick: bool) -> Result:
    num_rows, num_epochs, num_moment_rows, num_parts = (2000, 20, 50, 5) if quick else (20_000, 40, 100, 20)
    fixture, _ = LinearGaussian.fixture(torch.float32)
    train, _ = fixture.simulate(num_rows, seed=1, dtype=torch.float32)
    test, _ = fixture.simulate(NUM_TEST_ROWS, seed=2, dtype=torch.float32)
    measured = []
    for guide in GUIDES:
        for seed in SEEDS[:1] if quick else SEEDS:
            vi = _guided(fixture, guide)
            timed = timed_fit(
                vi,
                train,
                num_epochs=num_epochs,
                batch_size=min(500, num_rows // 10),
                learning_rate=0.01,
                schedule=cosine(num_epochs),
                seed=seed,
            )
            measured.append(_measure(fixture, vi, guide, seed, timed, test, num_moment_rows, num_parts))
    return Result(
        title="Automatic guides on the linear-Gaussian model",
        setting=f"6 pixels, 3 latents, float32, {num_rows:,} simulated rows, {num_epochs} epochs of batches of "
        f"{min(500, num_rows // 10)}, Adam 0.01 falling to 0 along a cosine, 1 thread; `AEVB(model)` (Normal), "
        f"`AEVB(model, AutoAmortized...(model), SGVB(gradient='stl'))`. Gap: mean over {NUM_TEST_ROWS:,} new rows, {NUM_PARTICLES} "
        f"draws each; moments: {num_moment_rows} of these rows, {2000 * num_parts:,} draws each, the largest error of all.",
        rows=[row for item in measured for row in _table(item)],
        notes=(
            "The gap of the factorised guide is the closed form 0.9138 at every row; the others' families hold the posterior.",
            "Standard deviations of the factorised guide are held to those of the best factorised one.",
        ),
    )


def _guided(fixture: LinearGaussian, guide: str) -> AEVB:
    kind = GUIDES[guide]
    if kind is None:
        return AEVB(fixture.model)
    return AEVB(fixture.model, kind(fixture.model), SGVB(gradient="stl"))


def _measure(
    fixture: LinearGaussian, vi: AEVB, guide: str, seed: int, timed: Timed, test: Tensor, num_rows: int, num_parts: int
) -> Measured:
    pyro.set_rng_seed(2)
    with torch.no_grad():
        bound = SGVB(NUM_PARTICLES, kl="sampled").bounds(vi.model, vi.guide, test).local
    gap = fixture.log_marginal(test) - bound
    rows = test[:num_rows]
    found = moments_of(lambda part: vi.posterior(rows, num_samples=2000, seed=part), num_parts)["z"]
    exact = fixture.posterior(rows.double())["z"]
    best = fixture.mean_field_posterior(rows.double()) if guide == "Normal" else exact
    sd = best.variance.sqrt()
    return Measured(
        guide=guide,
        seed=seed,
        timed=timed,
        gap=(float(gap.mean()), float(gap.std()) / len(gap) ** 0.5),
        best_gap=float(fixture.approximation_gap()) if guide == "Normal" else 0.0,
        mean_errors=found.mean - exact.mean,
        sd_errors=found.sd - sd,
        noise=float(sd.max()) / (2000 * num_parts) ** 0.5,
    )


def _table(measured: Measured) -> list[Row]:
    name = f"{measured.guide}, seed {measured.seed}"
    gap, error = measured.gap
    bar = BARS[measured.guide]
    mean, sd = (float(errors.abs().max()) for errors in (measured.mean_errors, measured.sd_errors))
    root_mean_square = [float(errors.square().mean().sqrt()) for errors in (measured.mean_errors, measured.sd_errors)]
    return [
        Row(
            f"{name}: log p(x) - ELBO",
            f"{gap:z.4f} nat",
            f"SE {error:.4f}",
            f"{measured.best_gap:.4f} +- {bar}",
            abs(gap - measured.best_gap) <= bar,
        ),
        Row(
            f"{name}: posterior means, largest error",
            f"{mean:.4f}",
            f"draws {measured.noise:.4f}, root mean square {root_mean_square[0]:.4f}",
            f"<= {MOMENTS_BAR}",
            mean <= MOMENTS_BAR,
        ),
        Row(
            f"{name}: posterior sds, largest error",
            f"{sd:.4f}",
            f"root mean square {root_mean_square[1]:.4f}",
            f"<= {MOMENTS_BAR}",
            sd <= MOMENTS_BAR,
        ),
        Row(f"{name}: training", str(measured.timed)),
    ]
