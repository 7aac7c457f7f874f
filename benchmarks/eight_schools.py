r"""Eight schools (Rubin 1981): a joint model without rows, by automatic guides, against quadrature and a long reference.

Non-centred, :math:`\mu \sim N(0, 5^2)`, :math:`\tau \sim \mathrm{HalfCauchy}(5)`, :math:`\theta_j = \mu + \tau \tilde\theta_j`
(:class:`pyro_aevb.testing.EightSchools`). All schools together are one row: ``data_plate=None``. The known standard errors of the
schools differ, so that the guide has to tell one school from another by itself. The quadrature is held to 10,000 reference draws
of posteriordb (Magnusson et al., stan-dev/posteriordb) where their file is found.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from benchmarks.amortized import Moments, Timed, cosine, moments_of, timed_fit
from benchmarks.result import Result, Row
from pyro_aevb import AEVB, SGVB, AutoAmortizedFlow, AutoAmortizedNormal
from pyro_aevb.testing import EightSchools

__all__ = ["run"]

SEEDS = (0, 1)
GUIDES = {"Normal": AutoAmortizedNormal, "Flow": AutoAmortizedFlow}
NUM_DRAWS = 10_000
SITES = ("mu", "tau", "theta")
MEAN_BAR = 0.1
SD_BAR = 0.15
REFERENCE = "posteriordb/eight_schools-eight_schools_noncentered.json"


class Measured(NamedTuple):
    """What one fit of one guide found.

    Attributes:
        guide: The guide.
        seed: Seed of the fit.
        timed: How long it took.
        gap: log p(y) - ELBO, in nats, and its standard error.
        errors: By site, errors of means in posterior standard deviations, and of standard deviations relative to them.
    """

    guide: str
    seed: int
    timed: Timed
    gap: tuple[float, float]
    errors: dict[str, tuple[Tensor, Tensor]]


def run(*, quick: bool) -> Result:
    num_steps, num_particles, num_parts = (300, 16, 5) if quick else (1000, 16, 30)
    fixture, y = EightSchools.fixture(torch.float32)
    exact = {name: Moments(*own) for name, own in fixture.posterior(y.double()).items()}
    measured = []
    for guide, kind in GUIDES.items():
        for seed in SEEDS[:1] if quick else SEEDS:
            objective = SGVB(num_particles, gradient="stl")
            vi = AEVB(fixture.model, kind(fixture.model, data_plate=None), objective, data_plate=None)
            timed = timed_fit(vi, y, num_epochs=num_steps, learning_rate=0.003, schedule=cosine(num_steps), seed=seed)
            measured.append(_measure(fixture, vi, y, guide, seed, timed, exact, num_parts))
    return Result(
        title="Eight schools against quadrature",
        setting=f"`AEVB(model, AutoAmortized...(model, data_plate=None), SGVB({num_particles}, gradient='stl'), data_plate=None)`, "
        f"float32, {num_steps:,} steps, Adam 0.003 falling to 0 along a cosine, 1 thread. Moments from "
        f"{NUM_DRAWS * num_parts:,} draws, in units of the exact posterior standard deviation.",
        rows=[*(row for item in measured for row in _table(item)), *_reference_rows(exact)],
        notes=(
            "theta are the effects mu + tau * theta_trans of the eight schools; for them the largest error is given.",
            "The factorised family is normal within a site only: tau is drawn given mu, theta_trans given both.",
        ),
    )


def _measure(
    fixture: EightSchools,
    vi: AEVB,
    y: Tensor,
    guide: str,
    seed: int,
    timed: Timed,
    exact: dict[str, Moments],
    num_parts: int,
) -> Measured:
    def draw(part: int) -> dict[str, Tensor]:
        sites = vi.posterior(y, num_samples=NUM_DRAWS, seed=part)
        mu, tau = (sites[name].reshape(NUM_DRAWS, 1) for name in ("mu", "tau"))
        theta = mu + tau * sites["theta_trans"].reshape(NUM_DRAWS, -1)
        return {"mu": mu[:, 0], "tau": tau[:, 0], "theta": theta}

    found = moments_of(draw, num_parts)
    pyro.set_rng_seed(2)
    with torch.no_grad():
        bounds = SGVB(NUM_DRAWS, kl="sampled", data_plate=None).bounds
        elbo = torch.cat([bounds(vi.model, vi.guide, y).local for _ in range(10)])
    return Measured(
        guide=guide,
        seed=seed,
        timed=timed,
        gap=(float(fixture.log_marginal(y.double()) - elbo.mean()), float(elbo.std()) / len(elbo) ** 0.5),
        errors={
            name: ((found[name].mean - exact[name].mean) / exact[name].sd, found[name].sd / exact[name].sd - 1)
            for name in SITES
        },
    )


def _table(measured: Measured) -> list[Row]:
    name = f"{measured.guide}, seed {measured.seed}"
    rows = []
    for site, (means, sds) in measured.errors.items():
        mean, sd = (float(errors.flatten()[errors.abs().argmax()]) for errors in (means, sds))
        row = Row(f"{name}: {site}, error of the mean", f"{mean:+.3f} sd")
        other = Row(f"{name}: {site}, error of the sd", f"{sd:+.1%}")
        if measured.guide == "Flow":
            row = row._replace(bar=f"within {MEAN_BAR}", is_met=abs(mean) <= MEAN_BAR)
            other = other._replace(bar=f"within {SD_BAR:.0%}", is_met=abs(sd) <= SD_BAR)
        rows += [row, other]
    gap, error = measured.gap
    return [
        *rows,
        Row(f"{name}: log p(y) - ELBO", f"{gap:z.4f} nat", f"SE {error:.4f}"),
        Row(f"{name}: training", str(measured.timed)),
    ]


def _reference_rows(exact: dict[str, Moments]) -> list[Row]:
    """Hold the quadrature to posteriordb's draws, where they are found."""
    file = Path(os.environ.get("PYRO_AEVB_DATA", "")) / REFERENCE
    if not file.is_file():
        return []
    reference = json.loads(file.read_text(encoding="utf-8"))["reference"]
    names = ["mu", "tau", *(f"theta[{j}]" for j in range(1, 9))]
    mean, sd = (torch.tensor([reference[name][key] for name in names]) for key in ("mean", "sd"))
    own = Moments(*(torch.cat([exact[site][index].flatten() for site in SITES]) for index in (0, 1)))
    largest_mean, largest_sd = ((mean - own.mean) / own.sd).abs().max(), (sd / own.sd - 1).abs().max()
    return [
        Row("posteriordb's draws against the quadrature, largest difference of means", f"{largest_mean:.3f} sd"),
        Row("posteriordb's draws against the quadrature, largest difference of sds", f"{largest_sd:.1%}"),
    ]
