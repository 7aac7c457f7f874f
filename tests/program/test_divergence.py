"""Closed-form KL against Monte Carlo, and which supports move with what is trained."""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from torch import Tensor
from torch.distributions import constraints

from pyro_aevb.program.divergence import closed_form_kl, has_known_support, has_moving_support


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def mvn(loc: float, scale: float) -> Any:
    factor = torch.tensor([[scale, 0.0], [0.4, 0.8]])
    return dist.MultivariateNormal(torch.tensor([loc, -0.3]), scale_tril=factor)


def logistic(loc: float, scale: float) -> Any:
    return dist.TransformedDistribution(dist.Normal(torch.tensor(loc), scale), [transforms.SigmoidTransform()])


def simplex(loc: float) -> Any:
    base = dist.Normal(torch.tensor([loc, -0.2]), torch.tensor([0.7, 1.1])).to_event(1)
    return dist.TransformedDistribution(base, [transforms.StickBreakingTransform()])


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "normal": (lambda: dist.Normal(0.5, 0.7), lambda: dist.Normal(-0.2, 1.3)),
    "normal batch": (lambda: dist.Normal(torch.tensor([0.5, -1.0]), 0.7), lambda: dist.Normal(0.0, 1.0)),
    "independent": (
        lambda: dist.Normal(torch.tensor([[0.5, -1.0, 2.0]]), 0.7).to_event(1),
        lambda: dist.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).to_event(1),
    ),
    "twice independent": (
        lambda: dist.Gamma(torch.full((2, 3), 2.0), 1.5).to_event(2),
        lambda: dist.Gamma(torch.full((2, 3), 3.0), 1.0).to_event(2),
    ),
    "multivariate normal": (lambda: mvn(0.5, 0.7), lambda: mvn(-0.5, 1.2)),
    "log-normal": (lambda: dist.LogNormal(0.5, 0.7), lambda: dist.LogNormal(1.0, 1.0)),
    "log-normal vector": (
        lambda: dist.LogNormal(torch.tensor([0.5, 0.1]), 0.7).to_event(1),
        lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
    ),
    "transformed": (lambda: logistic(0.5, 0.7), lambda: logistic(0.0, 1.5)),
    "transformed to a simplex": (lambda: simplex(0.5), lambda: simplex(-0.3)),
    "gamma": (lambda: dist.Gamma(2.0, 1.5), lambda: dist.Gamma(3.0, 0.7)),
    "beta": (lambda: dist.Beta(2.0, 3.0), lambda: dist.Beta(1.5, 1.2)),
    "dirichlet": (
        lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
        lambda: dist.Dirichlet(torch.tensor([2.0, 2.0, 2.0])),
    ),
    "gumbel": (lambda: dist.Gumbel(0.5, 0.7), lambda: dist.Gumbel(0.0, 1.0)),
    "beta in uniform": (lambda: dist.Beta(2.0, 3.0), lambda: dist.Uniform(0.0, 1.0)),
    "masked": (
        lambda: dist.Normal(torch.tensor([0.5, -1.0]), 0.7).mask(torch.tensor([True, False])),
        lambda: dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False])),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_closed_form_is_the_mean_of_log_q_minus_log_p(name: str) -> None:
    q, p = (make() for make in PAIRS[name])
    kl = closed_form_kl(q, p)
    assert kl is not None
    if name == "masked":  # the caller applies the mask
        q, p = q.base_dist, p.base_dist
    draws = q.sample((100_000,))
    differences = q.log_prob(draws) - p.log_prob(draws)
    error = differences.std(0) / len(draws) ** 0.5
    assert kl.shape == torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    assert ((kl - differences.mean(0)).abs() < 5 * error + 1e-9).all()


def test_kl_of_appendix_b() -> None:
    """Kingma & Welling, arXiv 1312.6114, Appendix B: -1/2 sum (1 + log s^2 - mu^2 - s^2)."""
    mu, s = torch.tensor([0.5, -1.0]), torch.tensor([0.7, 1.2])
    kl = closed_form_kl(dist.Normal(mu, s).to_event(1), dist.Normal(torch.zeros(2), 1.0).to_event(1))
    assert kl is not None
    assert kl.item() == pytest.approx(0.7643534, abs=1e-6)
    assert kl.item() == pytest.approx(-0.5 * float((1 + 2 * s.log() - mu**2 - s**2).sum()), rel=1e-12)


WITHOUT_CLOSED_FORM: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "point": (lambda: dist.Delta(torch.tensor(0.5)), lambda: dist.Normal(0.0, 1.0)),
    "point with a density": (
        lambda: dist.Delta(torch.tensor(0.5), log_density=torch.tensor(-1.0)),
        lambda: dist.LogNormal(0.0, 1.0),
    ),
    "vector of points": (
        lambda: dist.Delta(torch.zeros(2)).to_event(1),
        lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
    ),
    "masked point": (
        lambda: dist.Delta(torch.zeros(2)).mask(torch.tensor([True, False])),
        lambda: dist.Normal(torch.zeros(2), 1.0),
    ),
    "to a point": (lambda: dist.Normal(0.0, 1.0), lambda: dist.Delta(torch.tensor(0.5))),
    "other transforms": (lambda: logistic(0.0, 1.0), lambda: dist.LogNormal(0.0, 1.0)),
    "transform with other parameters": (
        lambda: dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transforms.AffineTransform(1.0, 2.0)]),
        lambda: dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transforms.AffineTransform(0.0, 2.0)]),
    ),
    "no formula": (lambda: dist.Gamma(2.0, 1.0), lambda: dist.LogNormal(0.0, 1.0)),
    "other event shape": (lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda: dist.Normal(0.0, 1.0)),
    "folded at 0, which is no bijection": (
        lambda: dist.FoldedDistribution(dist.Normal(1.0, 1.0)),
        lambda: dist.FoldedDistribution(dist.Normal(-1.0, 1.0)),
    ),
    "a mask inside the event": (
        lambda: dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False])).to_event(1),
        lambda: dist.Normal(torch.ones(2), 1.0).mask(torch.tensor([True, False])).to_event(1),
    ),
}


@pytest.mark.parametrize("name", WITHOUT_CLOSED_FORM)
def test_no_closed_form_is_none_and_not_another_number(name: str) -> None:
    q, p = (make() for make in WITHOUT_CLOSED_FORM[name])
    assert closed_form_kl(q, p) is None


def trained(value: float = 1.0) -> Tensor:
    return torch.tensor(value, requires_grad=True)


MOVING: dict[str, Callable[[], Any]] = {
    "uniform": lambda: dist.Uniform(trained(-1.0), 1.0),
    "uniform vector": lambda: dist.Uniform(torch.zeros(2), trained().expand(2)).to_event(1),
    "masked uniform": lambda: dist.Uniform(torch.zeros(2), trained()).mask(torch.tensor([True, False])),
    "pareto": lambda: dist.Pareto(trained(), 2.0),
    "transformed uniform": lambda: dist.TransformedDistribution(
        dist.Uniform(0.0, trained()), [transforms.AffineTransform(1.0, 2.0)]
    ),
    "uniform moved": lambda: dist.TransformedDistribution(
        dist.Uniform(torch.tensor(0.0), 1.0), [transforms.AffineTransform(trained(), 2.0)]
    ),
    "exponential moved": lambda: dist.TransformedDistribution(
        dist.Normal(torch.tensor(0.0), trained()),
        [transforms.ExpTransform(), transforms.AffineTransform(trained(), 1.0)],
    ),
    "stretched beta": lambda: dist.AffineBeta(2.0, 2.0, trained(0.0), trained()),
    "composed": lambda: dist.TransformedDistribution(
        dist.Uniform(torch.tensor(0.0), 1.0),
        [
            transforms.ComposeTransform(
                [transforms.AffineTransform(0.0, 2.0), transforms.AffineTransform(0.0, trained())]
            )
        ],
    ),
}
RESTING: dict[str, Callable[[], Any]] = {
    "normal": lambda: dist.Normal(trained(), trained()),
    "gamma": lambda: dist.Gamma(trained(), trained()),
    "fixed uniform": lambda: dist.Uniform(torch.tensor(0.0), torch.tensor(1.0)),
    "log-normal": lambda: dist.LogNormal(trained(), trained()),
    "weibull": lambda: dist.Weibull(trained(), trained()),
    "gumbel": lambda: dist.Gumbel(trained(), trained()),
    "fixed pareto": lambda: dist.Pareto(torch.tensor(1.0), trained()),
    "simplex": lambda: dist.Dirichlet(trained().expand(3)),
    "flow": lambda: dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [transforms.Planar(2)]),
    "affine": lambda: dist.TransformedDistribution(
        dist.Normal(trained(), 1.0), [transforms.AffineTransform(trained(), trained()), transforms.ExpTransform()]
    ),
    "fixed shift after exponential": lambda: dist.TransformedDistribution(
        dist.Normal(trained(), 1.0), [transforms.ExpTransform(), transforms.AffineTransform(1.0, 2.0)]
    ),
}


@pytest.mark.parametrize("name", MOVING)
def test_support_moves_with_what_is_trained(name: str) -> None:
    assert has_moving_support(MOVING[name]())


@pytest.mark.parametrize("name", RESTING)
def test_support_rests_whatever_is_trained(name: str) -> None:
    assert not has_moving_support(RESTING[name]())


def test_a_transform_that_knows_its_inverse_is_read_once() -> None:
    for value, moves in ((trained(), True), (torch.tensor(1.0), False)):
        affine = transforms.AffineTransform(0.0, value)
        inverse = affine.inv
        for transform in (affine, inverse):
            q = dist.TransformedDistribution(dist.Uniform(torch.tensor(0.0), 1.0), [transform])
            q.log_prob(q.sample())
            assert has_moving_support(q) == moves


def test_the_score_has_mean_zero_just_where_the_support_rests() -> None:
    """Why it matters: E_q[d log q / d parameter] over 1e6 draws of Uniform(0, b) is -1/b, of the others 0."""
    for make, moves in ((lambda b: dist.Uniform(0.0, b), True), (lambda b: dist.Weibull(b, 1.5), False)):
        b = trained(2.0)
        q = make(b)
        draws = q.sample((100_000,))
        score = torch.autograd.grad(q.log_prob(draws).mean(), b)[0]
        assert score.item() == pytest.approx(-0.5 if moves else 0.0, abs=5 / math.sqrt(100_000))


def test_what_torch_says_of_a_transformed_support_may_be_too_much() -> None:
    stretched = dist.TransformedDistribution(
        dist.Normal(torch.tensor(0.0), 1.0), [transforms.SigmoidTransform(), transforms.AffineTransform(0.0, 2.0)]
    )
    assert stretched.support is constraints.real
    assert not has_known_support(stretched)
    assert has_known_support(dist.LogNormal(0.0, 1.0))
    assert has_known_support(logistic(0.0, 1.0))
    assert has_known_support(dist.Normal(torch.zeros(2), 1.0).to_event(1))
