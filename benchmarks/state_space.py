r"""A linear-Gaussian state-space model of 50 steps: the recurrent guide against the Kalman filter and smoother.

:math:`z_1 \sim N(0, 1)`, :math:`z_t \sim N(.9 z_{t-1}, .25)`, :math:`x_t \sim N(z_t, .09)` (the second arguments are variances;
:class:`pyro_aevb.testing.LinearGaussianStateSpace`), written as a loop over 50 sites. One recurrent network reads the observations
backward and one head serves all steps. Nothing but the model is given. Smoothed means are held to those of Rauch, Tung and
Striebel (1965), the bound to log p(x) of the Kalman filter.
"""

from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from benchmarks.amortized import Timed, cosine, moments_of, timed_fit
from benchmarks.result import Result, Row
from pyro_aevb import AEVB, SGVB
from pyro_aevb.testing import LinearGaussianStateSpace

__all__ = ["run"]

SEEDS = (0, 1)
BATCH_SIZE = 64
NUM_DRAWS = 500
NUM_SMOOTHED = 200
GAP_BAR = 0.25
MEAN_BAR = 0.05


class Measured(NamedTuple):
    """What one fit found.

    Attributes:
        seed: Seed of the fit.
        timed: How long it took.
        gap: Mean over series of log p(x) - ELBO, in nats, and its standard error.
        largest_gap: The largest of a series.
        mean_error: Root mean square, over some series and all steps, of errors of smoothed means, in posterior standard
            deviations.
        noise: What the finite number of draws alone would make of it.
        sd_error: The same of standard deviations.
    """

    seed: int
    timed: Timed
    gap: tuple[float, float]
    largest_gap: float
    mean_error: float
    noise: float
    sd_error: float


def run(*, quick: bool) -> Result:
    num_series, num_steps, num_epochs, num_parts = (500, 8, 40, 2) if quick else (2000, 50, 39, 8)
    fixture = LinearGaussianStateSpace(num_steps=num_steps)
    x, _ = fixture.simulate(num_series, seed=1, dtype=torch.float32)
    measured = []
    for seed in SEEDS[:1] if quick else SEEDS:
        vi = AEVB(fixture.model, objective=SGVB(gradient="stl"))
        timed = timed_fit(
            vi,
            x,
            num_epochs=num_epochs,
            batch_size=BATCH_SIZE,
            learning_rate=0.01,
            schedule=cosine(num_epochs),
            clip_norm=10.0,
            seed=seed,
        )
        measured.append(_measure(fixture, vi, x, seed, timed, num_parts))
    return Result(
        title=f"Linear-Gaussian state-space model, {num_steps} steps, {num_series:,} series, against Kalman and RTS",
        setting=f"`AEVB(model, objective=SGVB(gradient='stl'))`, float32, {num_epochs} epochs of batches of {BATCH_SIZE}, Adam "
        f"0.01 falling to 0 along a cosine, gradients clipped to norm 10, eager, 1 thread. Smoothed moments of "
        f"{NUM_SMOOTHED} series from {NUM_DRAWS * num_parts:,} draws of each, in units of the exact posterior standard deviation; "
        f"bounds of all from 20 draws of each.",
        rows=[row for item in measured for row in _table(item)],
        notes=(
            "Steps run eagerly, so that there is no time of compilation; building the guide is part of the training time.",
        ),
    )


def _measure(
    fixture: LinearGaussianStateSpace, vi: AEVB, x: Tensor, seed: int, timed: Timed, num_parts: int
) -> Measured:
    pyro.set_rng_seed(2)
    with torch.no_grad():
        bounds = SGVB(kl="sampled").bounds
        draws = torch.stack([bounds(vi.model, vi.guide, x).local for _ in range(20)])
    gaps = fixture.log_marginal(x) - draws.mean(0)
    some = x[:NUM_SMOOTHED]
    found = moments_of(lambda part: vi.posterior(some, num_samples=NUM_DRAWS, seed=part), num_parts)
    exact = fixture.posterior(some.double())
    mean_errors = torch.stack([(found[name].mean - q.mean) / q.stddev for name, q in exact.items()])
    sd_errors = torch.stack([found[name].sd / q.stddev - 1 for name, q in exact.items()])
    return Measured(
        seed=seed,
        timed=timed,
        gap=(float(gaps.mean()), float(draws.mean(1).std()) / len(draws) ** 0.5),
        largest_gap=float(gaps.max()),
        mean_error=float(mean_errors.square().mean().sqrt()),
        noise=(NUM_DRAWS * num_parts) ** -0.5,
        sd_error=float(sd_errors.square().mean().sqrt()),
    )


def _table(measured: Measured) -> list[Row]:
    name = f"seed {measured.seed}"
    gap, error = measured.gap
    return [
        Row(
            f"{name}: log p(x) - ELBO, mean over series",
            f"{gap:z.4f} nat",
            f"SE {error:.4f}",
            f"<= {GAP_BAR}",
            gap <= GAP_BAR,
        ),
        Row(
            f"{name}: smoothed means, root mean square error",
            f"{measured.mean_error:.4f} sd",
            f"draws alone {measured.noise:.4f}",
            f"<= {MEAN_BAR}",
            measured.mean_error <= MEAN_BAR,
        ),
        Row(
            f"{name}: smoothed sds, root mean square error",
            f"{measured.sd_error:.2%}",
            f"draws alone {measured.noise / 2**0.5:.2%}",
        ),
        Row(f"{name}: training", str(measured.timed)),
    ]
