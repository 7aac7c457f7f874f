"""Class 8: a continuous latent that is observed for some rows, with other sites downstream of it."""

import pyro
import pyro.distributions as dist
import torch
from model_classes.base import Batch, ModelClass, draw, fixed_net
from model_classes.oracles import quadrature
from torch import Tensor

_decoder, _chain = fixed_net(2, 5, phase=0.8), fixed_net(1, 4, phase=0.9)


def label_and_style(x: Tensor, y: Tensor, labelled: Tensor) -> None:
    """y -> x <- z: label and style, dependent where the label is missing."""
    with pyro.plate("data", len(x)):
        label = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y, obs_mask=labelled)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = _decoder(torch.stack(torch.broadcast_tensors(label, z), -1))
        pyro.sample("x", dist.Normal(loc, 0.7).to_event(1), obs=x)


def dose_and_effect(x: Tensor, y: Tensor, labelled: Tensor) -> None:
    """y -> z -> x, with a positive y."""
    with pyro.plate("data", len(x)):
        dose = pyro.sample("y", dist.LogNormal(0.0, 0.6), obs=y, obs_mask=labelled)
        z = pyro.sample("z", dist.Normal(dose - 1, 0.5))
        pyro.sample("x", dist.Normal(_chain(z[..., None]), 0.7).to_event(1), obs=x)


def _of(model, width: int):
    def data(rows: int) -> Batch:
        labelled = torch.arange(rows) % 3 == 1
        values = draw(model, torch.zeros(rows, width), torch.ones(rows), labelled)
        y = torch.where(labelled, values["y"], torch.ones(rows))  # a filler within every support
        return (values["x"], y, labelled), {}

    return data


def _unlabelled(x: Tensor, y: Tensor, labelled: Tensor) -> Tensor:
    return ~labelled


_compared = {"y_unobserved": _unlabelled}

SEMI_SUPERVISED = [
    ModelClass("label_and_style", 8, label_and_style, _of(label_and_style, 5), quadrature, compared=_compared),
    ModelClass("dose_and_effect", 8, dose_and_effect, _of(dose_and_effect, 4), quadrature, compared=_compared),
]
