r"""2,000 groups of eight observations, unknown mean and spread between groups: amortized posteriors against quadrature.

:math:`\mu \sim N(0, 2^2)`, :math:`\log\tau \sim N(-.5, .5^2)`, :math:`\theta_g \sim N(\mu, \tau^2)`,
:math:`x_{gi} \sim N(\theta_g, 1)` (:class:`pyro_aevb.testing.HierarchicalNormal`, whose posterior is a one-dimensional integral).
Globals get full variational Bayes, each group's theta is amortized by a set encoder. Nothing but the model is given.
"""

from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from benchmarks.amortized import Moments, Timed, cosine, moments_of, timed_fit
from benchmarks.result import Result, Row
from pyro_aevb import AEVB, SGVB
from pyro_aevb.testing import HierarchicalNormal

__all__ = ["run"]

SEEDS = (0, 1)
NUM_DRAWS = 400
LEVELS = (0.5, 0.95)
BARS = (0.05, 0.15)
MOST_SECONDS = 60.0


class Measured(NamedTuple):
    """What one fit found.

    Attributes:
        seed: Seed of the fit.
        timed: How long it took.
        gap: log p(x) - ELBO of all groups together, in nats, and its standard error.
        mean_errors: Errors of the groups' posterior means, in posterior standard deviations, ``[groups]``.
        sd_errors: Errors of their standard deviations, in the same unit.
        of_globals: The globals' errors of mean and standard deviation, in the same unit.
    """

    seed: int
    timed: Timed
    gap: tuple[float, float]
    mean_errors: Tensor
    sd_errors: Tensor
    of_globals: dict[str, tuple[float, float]]


def run(*, quick: bool) -> Result:
    num_groups, num_epochs, num_parts = (200, 100, 5) if quick else (2000, 200, 10)
    fixture = HierarchicalNormal()
    x, _ = fixture.simulate(num_groups, seed=1, dtype=torch.float32)
    measured = []
    for seed in SEEDS[:1] if quick else SEEDS:
        vi = AEVB(fixture.model, objective=SGVB(gradient="stl"))
        timed = timed_fit(
            vi,
            x,
            num_epochs=num_epochs,
            batch_size=num_groups // 5,
            learning_rate=0.01,
            schedule=cosine(num_epochs),
            clip_norm=1.0,
            seed=seed,
        )
        measured.append(_measure(fixture, vi, x, seed, timed, num_parts))
    return Result(
        title=f"{num_groups:,} groups of eight observations, globals mu and tau, against quadrature",
        setting=f"`AEVB(model, objective=SGVB(gradient='stl'))`, float32, {num_epochs} epochs of batches of {num_groups // 5}, "
        f"Adam 0.01 falling to 0 along a cosine, gradients clipped to norm 1, 1 thread. Moments of every group from "
        f"{NUM_DRAWS * num_parts:,} draws of all latents together, in units of the exact posterior standard deviation.",
        rows=[row for item in measured for row in _table(item)],
        notes=(
            "Draws alone put the median of the error of a mean at "
            f"{0.67 / (NUM_DRAWS * num_parts) ** 0.5:.3f} and its 95 % at {1.96 / (NUM_DRAWS * num_parts) ** 0.5:.3f}.",
            "The joint gap is that of all groups and globals together; q(mu, tau) is factorised.",
        ),
    )


def _measure(fixture: HierarchicalNormal, vi: AEVB, x: Tensor, seed: int, timed: Timed, num_parts: int) -> Measured:
    found = moments_of(lambda part: _flat(vi.posterior(x, num_samples=NUM_DRAWS, seed=part)), num_parts)
    exact = {
        name: Moments(q.mean.flatten(), q.variance.sqrt().flatten())
        for name, q in fixture.posterior(x.double()).items()
    }
    errors = {
        name: ((found[name].mean - own.mean) / own.sd, found[name].sd / own.sd - 1) for name, own in exact.items()
    }
    pyro.set_rng_seed(2)
    with torch.no_grad():
        bounds = SGVB(kl="sampled").bounds
        parts = [bounds(vi.model, vi.guide, x) for _ in range(50)]
    elbo = torch.stack([part.global_.sum() + part.scale * part.local.sum() for part in parts])
    return Measured(
        seed=seed,
        timed=timed,
        gap=(float(fixture.log_marginal(x.double()) - elbo.mean()), float(elbo.std()) / len(elbo) ** 0.5),
        mean_errors=errors["theta"][0].abs(),
        sd_errors=errors["theta"][1].abs(),
        of_globals={name: (float(errors[name][0]), float(errors[name][1])) for name in ("mu", "tau")},
    )


def _flat(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.reshape(len(values), -1) for name, values in draws.items()}


def _table(measured: Measured) -> list[Row]:
    name = f"seed {measured.seed}"
    rows = []
    for quantity, errors in (("means", measured.mean_errors), ("sds", measured.sd_errors)):
        for level, bar in zip(LEVELS, BARS, strict=True):
            found = float(errors.quantile(level))
            what = "median" if level == 0.5 else f"{level:.0%} quantile"
            rows.append(
                Row(
                    f"{name}: groups' posterior {quantity}, {what} of errors",
                    f"{found:.4f} sd",
                    "",
                    f"<= {bar}",
                    found <= bar,
                )
            )
    for site, (mean, sd) in measured.of_globals.items():
        rows.append(Row(f"{name}: {site}", f"mean {mean:+.3f} sd", f"sd {sd:+.1%}"))
    gap, error = measured.gap
    rows.append(Row(f"{name}: log p(x) - ELBO, all groups together", f"{gap:.2f} nats", f"SE {error:.2f}"))
    seconds = measured.timed.seconds
    return [*rows, Row(f"{name}: training", str(measured.timed), "", "< 60 s", seconds < MOST_SECONDS)]
