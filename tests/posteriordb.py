"""Posteriors of posteriordb (stan-dev, BSD-3-Clause): joint models of ten thousand reference draws, two of known evidence."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_aevb.testing import EightSchools


@dataclass(frozen=True)
class Regression:
    """A model of the whole data set, to be run with ``data_plate=None``.

    Attributes:
        model: The model; latents ``alpha`` (of the autoregression), ``beta`` and ``sigma``.
        batch: Its arguments, in float64.
        log_evidence: log p(y) in nats: normal given sigma, by quadrature over sigma.
        mean: Mean of the reference draws by site.
        sd: Their standard deviation.
        num_draws: Their number; they are thinned until they are next to independent.
    """

    model: Callable[..., None]
    batch: tuple[Tensor, ...]
    log_evidence: float
    mean: dict[str, Tensor]
    sd: dict[str, Tensor]
    num_draws: int


def linear(x: Tensor, y: Tensor) -> None:
    """Run the Bayesian linear regression sblrc-blr."""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(10.0)))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), sigma), obs=y)


def autoregression(past: Tensor, y: Tensor) -> None:
    """Run the autoregression arK-arK on the values before each observation, the latest first."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_zeros(()), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(past.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(alpha + (past * beta).sum(-1), sigma), obs=y)


def sblrc() -> Regression:
    """Return the linear regression, or skip the test where its data are not at hand."""
    data, reference = _read("sblrc-blr")
    x, y = torch.tensor(data["X"]).double(), torch.tensor(data["y"]).double()
    return _regression(linear, (x, y), -194.9675886, reference)


def ark() -> Regression:
    """Return the autoregression, or skip the test where its data are not at hand."""
    data, reference = _read("arK-arK")
    y, lags = torch.tensor(data["y"]).double(), data["K"]
    past = torch.stack([y[lags - k : len(y) - k] for k in range(1, lags + 1)], -1)
    return _regression(autoregression, (past, y[lags:]), 58.5875939, reference)


@dataclass(frozen=True)
class Posterior:
    """Any model of the collection, to be run with ``data_plate=None``, and what its reference draws are of.

    Attributes:
        model: The model.
        batch: Its arguments, in float64.
        derive: From draws of the model's latents, ``[chains, draws, ...]``, to the quantities of the reference.
        mean: Mean of the reference draws by quantity.
        sd: Their standard deviation.
    """

    model: Callable[..., None]
    batch: tuple[Tensor, ...]
    derive: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    mean: dict[str, float]
    sd: dict[str, float]


def kidscore(iq: Tensor, score: Tensor) -> None:
    """Run the regression kidiq-kidscore_momiq on centred predictors.

    Its coefficients have a flat prior; a normal one of scale 1,000 moves means by 2e-4 of their standard deviations. The line's
    height at the mean predictor has the flat prior that the intercept has, and is next to independent of the slope.
    """
    height = pyro.sample("height", dist.Normal(score.new_zeros(()), 1000.0))
    slope = pyro.sample("slope", dist.Normal(score.new_zeros(()), 1000.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(score.new_tensor(2.5)))
    with pyro.plate("children", len(score)):
        pyro.sample("score", dist.Normal(height + slope * (iq - iq.mean()), sigma), obs=score)


def find_posterior(name: str) -> Posterior:
    """Return a posterior by its name in the collection, or skip the test where its data are not at hand."""
    data, reference = _read(name)
    mean, sd = ({line: entry[key] for line, entry in reference.items()} for key in ("mean", "sd"))
    if name == "kidiq-kidscore_momiq":
        iq, score = torch.tensor(data["mom_iq"]).double(), torch.tensor(data["kid_score"]).double()
        return Posterior(
            kidscore,
            (iq, score),
            lambda draws: {
                "beta[1]": draws["height"] - draws["slope"] * iq.mean(),
                "beta[2]": draws["slope"],
                "sigma": draws["sigma"],
            },
            mean,
            sd,
        )
    if name == "eight_schools-eight_schools_noncentered":
        schools = EightSchools(tuple(map(float, data["sigma"])))

        def derive(draws: dict[str, Tensor]) -> dict[str, Tensor]:
            theta = draws["mu"][..., None] + draws["tau"][..., None] * draws["theta_trans"]
            effects = {f"theta[{place + 1}]": theta[..., place] for place in range(theta.shape[-1])}
            return {"mu": draws["mu"], "tau": draws["tau"], **effects}

        return Posterior(schools.model, (torch.tensor(data["y"]).double(),), derive, mean, sd)
    regression = {"sblrc-blr": sblrc, "arK-arK": ark}[name]()

    def read(draws: dict[str, Tensor]) -> dict[str, Tensor]:
        beta = {f"beta[{place + 1}]": draws["beta"][..., place] for place in range(draws["beta"].shape[-1])}
        return {site: value for site, value in draws.items() if site != "beta"} | beta

    return Posterior(regression.model, regression.batch, read, mean, sd)


def _read(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    file = Path(os.environ.get("PYRO_AEVB_DATA", "")) / "posteriordb" / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"{file.name} is not on this machine; PYRO_AEVB_DATA names its directory")
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["data"], content["reference"]


def _regression(
    model: Callable[..., None], batch: tuple[Tensor, ...], log_evidence: float, reference: dict[str, Any]
) -> Regression:
    sites = [name for name in ("alpha", "sigma") if name in reference]
    lines = {name: [name] for name in sites} | {"beta": sorted(name for name in reference if name.startswith("beta"))}

    def column(key: str) -> dict[str, Tensor]:
        found = {site: torch.tensor([reference[name][key] for name in names]) for site, names in lines.items()}
        return {site: value if site == "beta" else value[0] for site, value in found.items()}

    return Regression(model, batch, log_evidence, column("mean"), column("sd"), reference["sigma"]["num_draws"])
