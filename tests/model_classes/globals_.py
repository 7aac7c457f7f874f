"""Class 4: globals and locals, globals alone, parameters. The reference is of the whole training batch."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from model_classes.base import Batch, ModelClass, Moments, draw
from model_classes.oracles import draw_chains, nuts, quadrature, summarize
from pyro import poutine
from torch import Tensor

from pyro_aevb.testing import HierarchicalNormal, NormalNormal

WEIGHTS, NOISE = (1.0, -0.5), 0.6


def of_exact_model(model: Any):
    """Return the oracle that asks an exact model."""

    def solve(program, args, kwargs):
        posterior = model.posterior(args[0].double())
        return {name: Moments(fn.mean, fn.variance.sqrt()) for name, fn in posterior.items()}

    return solve


def of_all_rows(model, args, kwargs):
    return quadrature(model, args, kwargs, data_plate=None)


def regression(x: Tensor, y: Tensor) -> None:
    """Coefficients and noise of a linear regression: globals alone, x a covariate."""
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * slopes[..., None, :]).sum(-1), noise[..., None]), obs=y)


def regression_data(rows: int) -> Batch:
    x = torch.randn(rows, 2)
    return (x, draw(regression, x, torch.zeros(rows))["y"]), {}


def decoder_weights(x: Tensor) -> None:
    """Loadings (positive, so that they have one sign) and offsets of a factor model, in a plate of features."""
    with pyro.plate("features", x.shape[1]):
        loading = pyro.sample("loading", dist.LogNormal(0.0, 0.5))
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z[..., None] * loading[..., None, :] + offset[..., None, :]
        pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def decoder_weights_posterior(model, args, kwargs):
    """Draw the weights by NUTS with z integrated out, then average the exact moments of z given each draw."""

    def marginal(x: Tensor) -> None:
        with pyro.plate("features", x.shape[1]):
            loading = pyro.sample("loading", dist.LogNormal(0.0, 0.5))
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        covariance = loading[:, None] * loading + 0.25 * torch.eye(len(loading))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(offset, covariance), obs=x)

    chains = draw_chains(marginal, args, kwargs)
    moments, quality = summarize(chains)
    loading, offset = chains["loading"][:, :, None], chains["offset"][:, :, None]
    variance = 1 / (1 + (loading**2).sum(-1) / 0.25)
    mean = variance * ((args[0].double() - offset) * loading).sum(-1) / 0.25
    of_mean, quality_of_mean = summarize({"z": mean})
    moments["z"] = Moments(of_mean["z"].mean, (variance.mean((0, 1)) + of_mean["z"].sd ** 2).sqrt())
    return moments, {**quality, **quality_of_mean}


def globals_ragged(x: Tensor, present: Tensor) -> None:
    """Group means about an unknown mean with an unknown spread; ragged groups by mask."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(-0.5, 0.5))
    with pyro.plate("data", len(x), dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("inner", x.shape[1], dim=-1), poutine.mask(mask=present):
            pyro.sample("x", dist.StudentT(5.0, theta, 0.8), obs=x)


def globals_ragged_data(rows: int) -> Batch:
    present = torch.arange(6) < (1 + 5 * torch.arange(rows) % 6)[:, None]
    x = draw(globals_ragged, torch.zeros(rows, 6), torch.ones_like(present))["x"]
    return (x * present, present), {}


def globals_counts(x: Tensor) -> None:
    """Log rates about an unknown mean with an unknown spread, four counts a row."""
    mu = pyro.sample("mu", dist.Normal(0.5, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(-0.7, 0.4))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Poisson(z.exp()[..., None].expand(*z.shape, 4)).to_event(1), obs=x)


def learned_offset(x: Tensor) -> None:
    """A factor model whose offset is a parameter: maximum likelihood puts it at the mean of the data."""
    offset = pyro.param("offset", torch.zeros(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z[..., None] * torch.tensor(WEIGHTS).to(z) + offset
        pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def learned_offset_posterior(model, args, kwargs):
    """Condition the factor on data about their mean, as :class:`pyro_aevb.testing.LinearGaussian` does."""
    x = args[0].double() - args[0].double().mean(0)
    weights = torch.tensor(WEIGHTS).double()
    variance = 1 / (1 + weights @ weights / NOISE**2)
    return {"z": Moments(variance * x @ weights / NOISE**2, variance.sqrt().expand(len(x)))}


def _of(model, *event: int):
    def data(rows: int) -> Batch:
        return (draw(model, torch.zeros(rows, *event))["x"],), {}

    return data


def _learned_data(rows: int) -> Batch:
    return (draw(learned_offset, torch.zeros(rows, 2))["x"] + torch.tensor([2.0, -1.0]),), {}


_normal, _hierarchical = NormalNormal(), HierarchicalNormal()

GLOBALS = [
    ModelClass(
        "globals_normal",
        4,
        _normal.model,
        _of(_normal.model),
        of_exact_model(_normal),
        "exact",
        joint=True,
        num_rows=60,
    ),
    ModelClass(
        "globals_hierarchical",
        4,
        _hierarchical.model,
        _of(_hierarchical.model, 8),
        of_exact_model(_hierarchical),
        joint=True,
        num_rows=60,
    ),
    ModelClass("globals_ragged", 4, globals_ragged, globals_ragged_data, nuts, "nuts", joint=True, num_rows=40),
    ModelClass("globals_counts", 4, globals_counts, _of(globals_counts, 4), nuts, "nuts", joint=True, num_rows=40),
    ModelClass("regression", 4, regression, regression_data, of_all_rows, joint=True, num_rows=60),
    ModelClass(
        "decoder_weights",
        4,
        decoder_weights,
        _of(decoder_weights, 3),
        decoder_weights_posterior,
        "nuts",
        joint=True,
        num_rows=40,
    ),
    ModelClass(
        "learned_offset",
        4,
        learned_offset,
        _learned_data,
        learned_offset_posterior,
        "exact",
        joint=True,
        num_rows=60,
        notes="no latent globals: the pyro.param is to be learned, and the reference holds at its optimum",
    ),
]
