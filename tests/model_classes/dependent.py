"""Class 2: several latents per row with dependence between them, and latents of every support."""

import pyro
import pyro.distributions as dist
import torch
from model_classes.base import Batch, ModelClass, Moments, draw, fixed_net, standard_normal
from model_classes.oracles import quadrature
from pyro.distributions.transforms import OrderedTransform
from scipy import special
from torch import Tensor

_first, _second = fixed_net(1, 2), fixed_net(2, 4, phase=0.3)


def chain(x: Tensor) -> None:
    """z1 -> z2 -> x."""
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(_first(z1[..., None]), 0.6).to_event(1))
        pyro.sample("x", dist.Normal(_second(z2), 0.7).to_event(1), obs=x)


def collider(x: Tensor) -> None:
    """a -> x <- b: independent before x is seen, dependent after."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.5, 0.8))
        loc = torch.stack([a + b, a + 0.5 * b.tanh()], -1)
        pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def fork(x: Tensor, y: Tensor) -> None:
    """x <- a -> b -> y, and c -> y alone: three scalars, two observed sites."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.StudentT(5.0, a, 0.6), obs=x)
        b = pyro.sample("b", dist.Normal(a.sin(), 0.7))
        c = pyro.sample("c", dist.Normal(0.0, 0.5))
        pyro.sample("y", dist.Normal(torch.stack([b, b + c], -1), 0.4).to_event(1), obs=y)


def positive(x: Tensor) -> None:
    """A gamma mean and a log-normal standard deviation."""
    with pyro.plate("data", len(x)):
        loc = pyro.sample("loc", dist.Gamma(3.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        pyro.sample("x", dist.Normal(loc[..., None].expand(*loc.shape, 6), scale[..., None]).to_event(1), obs=x)


def unit_interval(x: Tensor, y: Tensor) -> None:
    """A beta share of a gamma rate: only their product is seen in x, the share itself in y."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(6.0, 0.5))
        share = pyro.sample("share", dist.Beta(2.0, 3.0))
        pyro.sample("x", dist.Poisson(rate * share), obs=x)
        pyro.sample("y", dist.Binomial(8, share), obs=y)


def simplex(x: Tensor) -> None:
    """Dirichlet weights of counts."""
    with pyro.plate("data", len(x)):
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0, 1.5])))
        pyro.sample("x", dist.Multinomial(20, weights), obs=x)


def simplex_posterior(model, args, kwargs):
    """Add the counts to the prior's concentration (Gelman et al., Bayesian Data Analysis, 3.4)."""
    (x,) = args
    fn = dist.Dirichlet(torch.tensor([2.0, 3.0, 1.5]).double() + x.double())
    return {"weights": Moments(fn.mean, fn.stddev)}


def ordered(x: Tensor) -> None:
    """Three cut points in increasing order, each seen twice with noise."""
    with pyro.plate("data", len(x)):
        prior = dist.TransformedDistribution(standard_normal(3), OrderedTransform())
        cuts = pyro.sample("cuts", prior)
        pyro.sample("x", dist.Normal(torch.cat([cuts, cuts], -1), 0.8).to_event(1), obs=x)


def correlation(x: Tensor) -> None:
    """The Cholesky factor of a correlation matrix behind ten vectors a row."""
    with pyro.plate("data", len(x)):
        factor = pyro.sample("factor", dist.LKJCholesky(3, torch.tensor(2.0)))
        vectors = dist.MultivariateNormal(torch.zeros(3).to(factor), scale_tril=factor[..., None, :, :])
        pyro.sample("x", vectors.expand((*factor.shape[:-2], 10)).to_event(1), obs=x)


RADIUS, NOISE, CONCENTRATION = 1.0, 0.6, 0.5


def circular(x: Tensor) -> None:
    """An angle, seen as a noisy point on the circle."""
    with pyro.plate("data", len(x)):
        angle = pyro.sample("angle", dist.VonMises(torch.tensor(0.5), torch.tensor(CONCENTRATION)))
        pyro.sample("x", dist.Normal(RADIUS * on_circle(angle), NOISE).to_event(1), obs=x)


def on_circle(angle: Tensor) -> Tensor:
    """Return cosine and sine, which an angle's full turns leave alone."""
    return torch.stack([angle.cos(), angle.sin()], -1)


def circular_posterior(model, args, kwargs):
    r"""Add natural parameters: the posterior is von Mises with vector :math:`\kappa e^{i\mu} + x r / \sigma^2`.

    Its moments are :math:`E e^{i k a} = e^{i k \mu} I_k(\kappa) / I_0(\kappa)` (Mardia and Jupp 2000, 3.5).
    """
    (x,) = args
    prior = CONCENTRATION * on_circle(torch.tensor(0.5, dtype=torch.float64))
    vector = prior + x.double() * RADIUS / NOISE**2
    kappa, mean = vector.norm(dim=-1), torch.atan2(vector[:, 1], vector[:, 0])
    first, second = (torch.as_tensor(special.ive(k, kappa.numpy()) / special.ive(0, kappa.numpy())) for k in (1, 2))
    cosine_of_double = second * (2 * mean).cos()
    square = torch.stack([1 + cosine_of_double, 1 - cosine_of_double], -1) / 2
    moment = first[:, None] * on_circle(mean)
    return {"angle": Moments(moment, (square - moment**2).sqrt())}


def _one(model, *event: int):
    def data(rows: int) -> Batch:
        return (draw(model, torch.zeros(rows, *event))["x"],), {}

    return data


def _two(model, x_event: tuple[int, ...], y_event: tuple[int, ...]):
    def data(rows: int) -> Batch:
        values = draw(model, torch.zeros(rows, *x_event), torch.zeros(rows, *y_event))
        return (values["x"], values["y"]), {}

    return data


DEPENDENT = [
    ModelClass("chain", 2, chain, _one(chain, 4), quadrature, max_mean_error=0.3),
    ModelClass("collider", 2, collider, _one(collider, 2), quadrature, notes="dependent a posteriori: q needs an edge"),
    ModelClass("fork", 2, fork, _two(fork, (), (2,)), quadrature),
    ModelClass("positive", 2, positive, _one(positive, 6), quadrature),
    ModelClass("unit_interval", 2, unit_interval, _two(unit_interval, (), ()), quadrature),
    ModelClass("simplex", 2, simplex, _one(simplex, 3), simplex_posterior, "exact"),
    ModelClass("ordered", 2, ordered, _one(ordered, 6), quadrature),
    ModelClass(
        "correlation",
        2,
        correlation,
        _one(correlation, 10, 3),
        quadrature,
        num_test_rows=4,
        max_mean_error=0.35,
        notes="An encoder has to learn products of its inputs here; a flow's means are as far off (.26) as a normal's (.30).",
    ),
    ModelClass(
        "circular",
        2,
        circular,
        _one(circular, 2),
        circular_posterior,
        "exact",
        features={"angle": on_circle},
        notes="torch gives a von Mises the support of all reals, over which its density is periodic and integrates to infinity: "
        "a bound is meaningful only for a q on one turn.",
    ),
]
