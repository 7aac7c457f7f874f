"""Class 3: nested plates, groups as rows with many observations each."""

import pyro
import pyro.distributions as dist
import torch
from model_classes.base import Batch, ModelClass, Moments, draw, standard_normal
from model_classes.oracles import gaussian, quadrature
from pyro import poutine
from torch import Tensor

INNER = 7


def groups(x: Tensor) -> None:
    """Location and log scale of each group; the groups' plate lies left of the inner one."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", standard_normal(2))
        with pyro.plate("inner", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(z[..., 0], (z[..., 1] / 2).exp()), obs=x)


def groups_right(x: Tensor) -> None:
    """The same, the groups' plate right of the inner one: x is transposed inside."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", standard_normal(2))
        with pyro.plate("inner", x.shape[1], dim=-2):
            pyro.sample("x", dist.Normal(z[..., 0], (z[..., 1] / 2).exp()), obs=x.t())


def groups_named(x: Tensor) -> None:
    """The same with plates of other names and no dimensions given."""
    with pyro.plate("schools", len(x), dim=-2):
        z = pyro.sample("z", standard_normal(2))
        with pyro.plate("pupils", x.shape[1]):
            pyro.sample("x", dist.Normal(z[..., 0], (z[..., 1] / 2).exp()), obs=x)


def ragged_groups(x: Tensor, present: Tensor) -> None:
    """Groups of several sizes, padded; a mask says which entries are there."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", standard_normal(2))
        with pyro.plate("inner", x.shape[1], dim=-1), poutine.mask(mask=present):
            pyro.sample("x", dist.Normal(z[..., 0], (z[..., 1] / 2).exp()), obs=x)


def nested_latents(x: Tensor) -> None:
    """A latent of each group and one of each member, two observations of a member; linear and normal."""
    with pyro.plate("data", len(x), dim=-2):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(theta, 0.7))
            pyro.sample("x", dist.Normal(torch.stack([z, 0.5 * z], -1), 0.6).to_event(1), obs=x)


def nested_counts(x: Tensor) -> None:
    """A latent of each group and one of each member, a count of each member; the groups' plate on the right."""
    with pyro.plate("data", len(x), dim=-1):
        theta = pyro.sample("theta", dist.Normal(0.5, 0.8))
        with pyro.plate("inner", x.shape[1], dim=-2):
            z = pyro.sample("z", dist.Normal(theta, 0.5))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x.t())


def nested_counts_posterior(model, args, kwargs):
    """Integrate each member's latent given the group's, then the group's, by the trapezoid rule."""
    x = args[0].double()[:, :, None, None]  # groups, members, nodes of theta, nodes of z
    theta = torch.linspace(-5, 6, 161).double()[:, None]
    z = torch.linspace(-7, 7, 241).double()
    member = dist.Normal(theta, 0.5).log_prob(z) + dist.Poisson(z.exp()).log_prob(x)
    evidence = member.logsumexp(-1)
    group = (dist.Normal(0.5, 0.8).log_prob(theta[:, 0]) + evidence.sum(1)).softmax(-1)
    inner = member.softmax(-1)
    first, second = ((group[:, None] * (inner * z**k).sum(-1)).sum(-1) for k in (1, 2))
    mean = group @ theta[:, 0]
    return {
        "theta": Moments(mean, (group @ theta[:, 0] ** 2 - mean**2).sqrt()),
        "z": Moments(first.t(), (second - first**2).sqrt().t()),
    }


def crossed(x: Tensor) -> None:
    """A row of data is a table with an effect of each line and of each column; linear and normal."""
    with pyro.plate("data", len(x), dim=-3):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        lines, columns = pyro.plate("lines", x.shape[1], dim=-2), pyro.plate("columns", x.shape[2], dim=-1)
        with lines:
            line = pyro.sample("line", dist.Normal(level, 0.8))
        with columns:
            column = pyro.sample("column", dist.Normal(0.0, 0.6))
        with lines, columns:
            pyro.sample("x", dist.Normal(line + column, 0.7), obs=x)


def _of(model, *event: int, transposed: bool = False):
    def data(rows: int) -> Batch:
        x = draw(model, torch.zeros(rows, *event))["x"]
        return (x.t().contiguous() if transposed else x,), {}

    return data


def ragged_data(rows: int) -> Batch:
    """Give the groups 0 to all members in turn."""
    present = torch.arange(INNER) < (3 * torch.arange(rows) % (INNER + 1))[:, None]
    x = draw(ragged_groups, torch.zeros(rows, INNER), torch.ones_like(present))["x"]
    return (x * present, present), {}


def _named_quadrature(model, args, kwargs):
    return quadrature(model, args, kwargs, data_plate="schools")


NESTED = [
    ModelClass("groups", 3, groups, _of(groups, INNER), quadrature),
    ModelClass("groups_right", 3, groups_right, _of(groups_right, INNER, transposed=True), quadrature),
    ModelClass("groups_named", 3, groups_named, _of(groups_named, INNER), _named_quadrature, data_plate="schools"),
    ModelClass("ragged_groups", 3, ragged_groups, ragged_data, quadrature, num_test_rows=8),
    ModelClass("nested_latents", 3, nested_latents, _of(nested_latents, 5, 2), gaussian, "exact"),
    ModelClass("nested_counts", 3, nested_counts, _of(nested_counts, 5, transposed=True), nested_counts_posterior),
    ModelClass(
        "crossed", 3, crossed, _of(crossed, 3, 4), gaussian, "exact", notes="dense a posteriori across two plates"
    ),
]
