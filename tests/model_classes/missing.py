"""Class 7: partly observed data. Row 0 has nothing, row 1 everything; of the others about a third is missing."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from model_classes.base import Batch, ModelClass, draw, fixed_net, standard_normal
from model_classes.oracles import quadrature
from pyro import poutine
from torch import Tensor

FEATURES = 5
_decoder = fixed_net(2, FEATURES, phase=0.1)


def obs_mask_normal(x: Tensor, observed: Tensor) -> None:
    """Continuous features in a plate of their own, each present or not."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", standard_normal(2))
        with pyro.plate("features", FEATURES, dim=-1):
            pyro.sample("x", dist.Normal(_decoder(z).squeeze(-2), 0.6), obs=x, obs_mask=observed)


def obs_mask_counts(x: Tensor, observed: Tensor) -> None:
    """The same with counts."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", standard_normal(2))
        with pyro.plate("features", FEATURES, dim=-1):
            rate = (0.6 * _decoder(z).squeeze(-2) + 1).exp()
            pyro.sample("x", dist.Poisson(rate), obs=x, obs_mask=observed)


def obs_mask_rows(x: Tensor, y: Tensor, observed: Tensor) -> None:
    """A vector that is there as a whole or not, beside a scalar that always is."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", standard_normal(2))
        pyro.sample("x", dist.Normal(_decoder(z), 0.6).to_event(1), obs=x, obs_mask=observed)
        pyro.sample("y", dist.Normal(z.sum(-1), 0.8), obs=y)


def nan_coded(x: Tensor) -> None:
    """NaN says what is missing; the model masks it."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", standard_normal(2))
        with pyro.plate("features", FEATURES, dim=-1), poutine.mask(mask=~x.isnan()):
            pyro.sample("x", dist.Normal(_decoder(z).squeeze(-2), 0.6), obs=x.nan_to_num())


def masked_event(x: Tensor, observed: Tensor) -> None:
    """The mask lies inside the event, by ``fn.mask``."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", standard_normal(2))
        pyro.sample("x", dist.Normal(_decoder(z), 0.6).mask(observed).to_event(1), obs=x)


def mixed_table(height: Tensor, smoker: Tensor, height_known: Tensor, smoker_known: Tensor) -> None:
    """Two columns of different kinds, each with its own gaps."""
    with pyro.plate("data", len(height)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("height", dist.Normal(z, 0.7), obs=height, obs_mask=height_known)
        pyro.sample("smoker", dist.Bernoulli(logits=2 * z - 0.5), obs=smoker, obs_mask=smoker_known)


def gaps(rows: int) -> Tensor:
    observed = torch.rand(rows, FEATURES) < 0.65
    observed[0], observed[1] = False, True
    return observed


def _elementwise(model: Callable[..., None]):
    def data(rows: int) -> Batch:
        observed = gaps(rows)
        x = draw(model, torch.zeros(rows, FEATURES), torch.ones_like(observed))["x"]
        return (torch.where(observed, x, torch.zeros_like(x)), observed), {}

    return data


def nan_coded_data(rows: int) -> Batch:
    x = draw(nan_coded, torch.zeros(rows, FEATURES))["x"]
    return (torch.where(gaps(rows), x, torch.full_like(x, torch.nan)),), {}


def obs_mask_rows_data(rows: int) -> Batch:
    observed = torch.arange(rows) % 3 != 0
    values = draw(obs_mask_rows, torch.zeros(rows, FEATURES), torch.zeros(rows), observed)
    return (values["x"] * observed[:, None], values["y"], observed), {}


def mixed_table_data(rows: int) -> Batch:
    known = gaps(rows)[:, :2].unbind(-1)
    values = draw(mixed_table, torch.zeros(rows), torch.zeros(rows), *known)
    return (values["height"] * known[0], values["smoker"] * known[1], *known), {}


MISSING = [
    ModelClass("obs_mask_normal", 7, obs_mask_normal, _elementwise(obs_mask_normal), quadrature),
    ModelClass("obs_mask_counts", 7, obs_mask_counts, _elementwise(obs_mask_counts), quadrature),
    ModelClass("obs_mask_rows", 7, obs_mask_rows, obs_mask_rows_data, quadrature),
    ModelClass("nan_coded", 7, nan_coded, nan_coded_data, quadrature),
    ModelClass("masked_event", 7, masked_event, _elementwise(masked_event), quadrature),
    ModelClass("mixed_table", 7, mixed_table, mixed_table_data, quadrature),
]
