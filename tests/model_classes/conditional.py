"""Class 6: covariates as extra arguments, which reach the encoder and are not modelled."""

import pyro
import pyro.distributions as dist
import torch
from model_classes.base import Batch, ModelClass, draw, fixed_net
from model_classes.oracles import quadrature
from torch import Tensor

_prior_of_floats, _decoder = fixed_net(2, 2), fixed_net(2, 5, phase=0.2)
_decoder_of_both = fixed_net(5, 6, phase=0.4, scale=0.6)
_TABLE = torch.sin(torch.arange(18.0)).reshape(3, 6)
_PRIOR_TABLE = torch.tensor([[-1.0, 0.5], [0.0, 0.0], [1.5, -0.5]])
_label_decoder = fixed_net(2, 6, phase=0.6)


def float_covariate(x: Tensor, covariate: Tensor) -> None:
    """A prior that depends on a vector of floats."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(_prior_of_floats(covariate), 0.8).to_event(1))
        pyro.sample("x", dist.Normal(_decoder(z), 0.7).to_event(1), obs=x)


def label_covariate(x: Tensor, *, label: Tensor) -> None:
    """A prior and a likelihood that depend on an integer, given by keyword."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(_PRIOR_TABLE[label], 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=2 * _label_decoder(z) + _TABLE[label]).to_event(1), obs=x)


def conditional_vae(x: Tensor, y: Tensor) -> None:
    """x given y and z, z independent of y before x is seen."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        both = torch.cat([z, y.expand(*z.shape[:-1], y.shape[-1])], -1)
        pyro.sample("x", dist.Normal(_decoder_of_both(both), 0.6).to_event(1), obs=x)


def mixed_regression(x: Tensor, y: Tensor) -> None:
    """A random intercept and slope of each row over its own covariates x, ``[rows, 5]``, an inner plate over them."""
    with pyro.plate("data", len(x), dim=-2):
        intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(0.5, 0.8))
        with pyro.plate("inner", x.shape[1], dim=-1):
            pyro.sample("y", dist.StudentT(4.0, intercept + slope * x, 0.5), obs=y)


def float_covariate_data(rows: int) -> Batch:
    covariate = torch.randn(rows, 2)
    return (draw(float_covariate, torch.zeros(rows, 5), covariate)["x"], covariate), {}


def label_covariate_data(rows: int) -> Batch:
    label = torch.arange(rows) % 3
    return (draw(label_covariate, torch.zeros(rows, 6), label=label)["x"],), {"label": label}


def conditional_vae_data(rows: int) -> Batch:
    y = torch.randn(rows, 3)
    return (draw(conditional_vae, torch.zeros(rows, 6), y)["x"], y), {}


def mixed_regression_data(rows: int) -> Batch:
    x = torch.randn(rows, 5)
    return (x, draw(mixed_regression, x, torch.zeros(rows, 5))["y"]), {}


CONDITIONAL = [
    ModelClass("float_covariate", 6, float_covariate, float_covariate_data, quadrature),
    ModelClass("label_covariate", 6, label_covariate, label_covariate_data, quadrature),
    ModelClass("conditional_vae", 6, conditional_vae, conditional_vae_data, quadrature),
    ModelClass("mixed_regression", 6, mixed_regression, mixed_regression_data, quadrature),
]
