"""Every family of arXiv 1312.6114, section 2.4, as a posterior: law, gradients, bound and recording, against SciPy.

A family is one row of a table. Gradients are compared with finite differences of quadrature over SciPy's quantiles. Every draw has
parameters of its own, so that gradients of draws are independent and have a standard error. Statistical comparisons are within 5
standard errors: with about 150 of them, one in 10,000 seeds would fail a right program.
"""

import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats
from torch import nn
from torch.distributions import kl_divergence

import pyro_aevb as ours
from pyro_aevb import IWELBO, SGVB, stage
from pyro_aevb.errors import GuideError, SettingError, StagingWarning
from pyro_aevb.program.divergence import has_moving_support
from pyro_aevb.program.objective_module import ObjectiveModule


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


class WrappedLaw:
    """The wrapped normal from its definition, with many images."""

    def __init__(self, loc: float, scale: float) -> None:
        self.base = stats.norm(loc, scale)
        self.turns = 2 * math.pi * np.arange(-100, 101)[:, None]

    def logpdf(self, z):
        return np.log(self.base.pdf(np.atleast_1d(z) + self.turns).sum(0))

    def cdf(self, z):
        return (self.base.cdf(np.atleast_1d(z) + self.turns) - self.base.cdf(self.turns - math.pi)).sum(0)

    def ppf(self, u):
        """A quantile before wrapping, which is the same to a function of period 2 pi."""
        return self.base.ppf(u)


WEIGHTS = np.array([1.0, -0.5])


def along_weights(z):
    return z @ torch.as_tensor(WEIGHTS)


def covariance(factor):
    return np.tril(factor) @ np.tril(factor).T


def t_along_weights(df, loc, factor):
    return stats.t(df, WEIGHTS @ loc, math.sqrt(WEIGHTS @ covariance(factor) @ WEIGHTS))


def t_negative_kl(df, loc, factor):
    """E[log N(z; 0, 2^2) - log q(z)] of two dimensions, by the t's own entropy and second moments."""
    spread = np.trace(covariance(factor)) * df / (df - 2)
    log_p = -math.log(2 * math.pi * 4.0) - (loc @ loc + spread) / 8
    return log_p + stats.multivariate_t(loc, covariance(factor), df).entropy()


def negative_kl_by_torch(make, prior):
    return lambda *theta: -kl_divergence(make(*map(torch.as_tensor, theta)), prior()).item()


PRIORS: dict[str, tuple[Callable[[], Any], Any]] = {
    "real": (lambda: dist.Cauchy(0.0, 2.0), stats.cauchy(0.0, 2.0)),
    "positive": (lambda: dist.LogNormal(0.0, 1.0), stats.lognorm(1.0)),
    "unit": (lambda: dist.Beta(2.0, 2.0), stats.beta(2.0, 2.0)),
    "circle": (lambda: dist.VonMises(0.3, 1.2), stats.vonmises(1.2, loc=0.3)),
    "plane": (lambda: dist.Normal(torch.zeros(2), 2.0).to_event(1), None),
    "simplex": (lambda: dist.Dirichlet(torch.ones(3)), None),
}


@dataclass(frozen=True)
class Family:
    """One family at one point.

    Attributes:
        make: Parameters to a distribution.
        theta: The point.
        law: Parameters to SciPy's law of the projected draw.
        support: Key of the prior that bounds are taken with.
        moves: Whether the support depends on parameters.
        project: A draw to a number.
        breaks: Probabilities at which quantiles are not smooth.
        joint: Parameters to SciPy's joint law and its means and variances, for vectors.
        negative_kl: Parameters to E[log p - log q], for vectors.
    """

    make: Callable[..., Any]
    theta: tuple[Any, ...]
    law: Callable[..., Any]
    support: str = "real"
    moves: bool = False
    project: Callable[[torch.Tensor], torch.Tensor] = lambda z: z
    breaks: Callable[..., tuple[float, ...]] = lambda *_: (0.5,)
    joint: Callable[..., tuple[Any, Any, Any]] | None = None
    negative_kl: Callable[..., float] | None = field(default=None, repr=False)

    @property
    def arrays(self) -> list[np.ndarray]:
        return [np.asarray(value, dtype=float) for value in self.theta]

    def leaves(self, *shape: int) -> list[torch.Tensor]:
        """Return the point once for each index of a shape, each with a gradient of its own."""
        return [torch.as_tensor(value).expand(*shape, *value.shape).clone().requires_grad_() for value in self.arrays]

    def distribution(self) -> Any:
        return self.make(*map(torch.as_tensor, self.arrays))

    def expectation(self, f: Callable[[np.ndarray, Any], np.ndarray], *theta: Any) -> float:
        """Return E[f(z)] of the projected draw by the tanh-sinh rule over quantiles (Takahasi & Mori 1974)."""
        law = self.law(*theta)
        t = np.arange(-3.0, 3.0, 0.02)
        u = special.expit(np.pi * np.sinh(t))
        weights = 0.02 * np.pi * np.cosh(t) * u * (1 - u)
        ends = [0.0, *self.breaks(*theta), 1.0]
        parts = [(hi - lo) * weights @ f(law.ppf(lo + (hi - lo) * u), law) for lo, hi in itertools.pairwise(ends)]
        return float(sum(parts))


def mvn(loc, factor):
    return dist.MultivariateNormal(loc, scale_tril=factor.tril())


def mvt(df, loc, factor):
    return dist.MultivariateStudentT(df, loc, factor.tril())


FAMILIES = {
    # inverse distribution function
    "Exponential": Family(dist.Exponential, (1.3,), lambda r: stats.expon(scale=1 / r), "positive"),
    "Cauchy": Family(dist.Cauchy, (0.3, 0.7), stats.cauchy),
    "Logistic": Family(ours.Logistic, (0.3, 0.7), stats.logistic),
    "Rayleigh": Family(ours.Rayleigh, (0.8,), lambda s: stats.rayleigh(scale=s), "positive"),
    "Pareto": Family(dist.Pareto, (0.7, 3.0), lambda s, a: stats.pareto(a, scale=s), "positive", moves=True),
    "Weibull": Family(dist.Weibull, (0.7, 1.6), lambda s, c: stats.weibull_min(c, scale=s), "positive"),
    "Reciprocal": Family(ours.Reciprocal, (0.4, 2.5), stats.loguniform, "positive", moves=True),
    "Gompertz": Family(ours.Gompertz, (0.5, 1.2), lambda c, b: stats.gompertz(c, scale=1 / b), "positive"),
    "Gumbel": Family(dist.Gumbel, (0.3, 0.7), stats.gumbel_r),
    "Erlang": Family(lambda r: ours.Erlang(3, r), (1.7,), lambda r: stats.gamma(3, scale=1 / r), "positive"),
    # location and scale
    "Laplace": Family(dist.Laplace, (0.3, 0.7), stats.laplace),
    "Multivariate normal": Family(
        mvn,
        ([0.4, -0.2], [[0.8, 0.0], [0.5, 0.6]]),
        lambda m, L: stats.norm(WEIGHTS @ m, math.sqrt(WEIGHTS @ covariance(L) @ WEIGHTS)),
        "plane",
        project=along_weights,
        joint=lambda m, L: (stats.multivariate_normal(m, covariance(L)), m, np.diag(covariance(L))),
        negative_kl=negative_kl_by_torch(mvn, lambda: mvn(torch.zeros(2), 2 * torch.eye(2))),
    ),
    "Multivariate Student's t": Family(
        mvt,
        (5.0, [0.4, -0.2], [[0.8, 0.0], [0.5, 0.6]]),
        t_along_weights,
        "plane",
        project=along_weights,
        joint=lambda n, m, L: (
            stats.multivariate_t(m, covariance(L), float(n)),
            m,
            np.diag(covariance(L)) * n / (n - 2),
        ),
        negative_kl=t_negative_kl,
    ),
    "Student's t": Family(dist.StudentT, (5.0, 0.3, 0.7), stats.t),
    "Uniform": Family(ours.Uniform, (0.4, 1.9), lambda a, b: stats.uniform(a, b - a), "positive", moves=True),
    "Triangular": Family(
        ours.Triangular,
        (0.3, 0.8, 1.9),
        lambda a, c, b: stats.triang((c - a) / (b - a), a, b - a),
        "positive",
        moves=True,
        breaks=lambda a, c, b: ((c - a) / (b - a),),
    ),
    "Gaussian": Family(dist.Normal, (0.3, 0.7), stats.norm),
    # composition
    "Log-Normal": Family(dist.LogNormal, (0.3, 0.7), lambda m, s: stats.lognorm(s, scale=np.exp(m)), "positive"),
    "Gamma": Family(dist.Gamma, (2.3, 1.4), lambda a, b: stats.gamma(a, scale=1 / b), "positive"),
    "Dirichlet": Family(
        ours.Dirichlet,
        ([0.7, 1.4, 2.0],),
        lambda a: stats.beta(a[0] + a[2], a[1]),
        "simplex",
        project=lambda z: z[..., 0] + z[..., 2],
        joint=lambda a: (stats.dirichlet(a), stats.dirichlet(a).mean(), stats.dirichlet(a).var()),
        negative_kl=negative_kl_by_torch(dist.Dirichlet, lambda: dist.Dirichlet(torch.ones(3))),
    ),
    "Beta": Family(ours.Beta, (0.7, 1.5), stats.beta, "unit"),
    "Chi-squared": Family(dist.Chi2, (3.0,), stats.chi2, "positive"),
    "F": Family(dist.FisherSnedecor, (3.0, 7.0), stats.f, "positive"),
    # not in the paper: angles
    "Wrapped normal": Family(ours.WrappedNormal, (8.5, 0.8), WrappedLaw, "circle"),
}
EACH = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def smooth(z):
    """A bounded function, so that it has a mean under a Cauchy too; NumPy and torch."""
    module = torch if isinstance(z, torch.Tensor) else np
    return module.tanh(z - 0.4) + 1 / (1 + z * z)


def periodic(z):
    module = torch if isinstance(z, torch.Tensor) else np
    return module.cos(z - 0.4) + module.sin(2 * z) / 2


def function_for(family: Family) -> Callable[[Any], Any]:
    return periodic if family.support == "circle" else smooth


def slopes(value: Callable[..., float], arrays: list[np.ndarray], step: float = 1e-4) -> Iterator[np.ndarray]:
    """Yield central finite differences in every entry of every parameter."""
    for index, array in enumerate(arrays):
        slope = np.zeros_like(array)
        for entry in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = [item.copy() for item in arrays]
                moved[index][entry] += sign * step
                ends.append(value(*moved))
            slope[entry] = (ends[0] - ends[1]) / (2 * step)
        yield slope


def assert_mean(draws: torch.Tensor, expected: Any) -> None:
    """Compare the mean of draws, on axis 0, with a number."""
    error = draws.std(0) / len(draws) ** 0.5
    difference = (draws.mean(0) - torch.as_tensor(expected)).abs()
    assert (difference < 5 * error + 1e-7).all(), f"off by {(difference / error).tolist()} standard errors"


# The law


@EACH
def test_log_density(family: Family) -> None:
    fn = family.distribution()
    z = fn.sample((200,))
    law = family.joint(*family.arrays)[0] if family.joint else family.law(*family.arrays)
    points = z.numpy().T if family.support == "simplex" else z.numpy()
    np.testing.assert_allclose(fn.log_prob(z).numpy(), law.logpdf(points), rtol=1e-8, atol=1e-8)


@EACH
def test_draws(family: Family) -> None:
    """Kolmogorov-Smirnov at 1e-6, one draw from each of as many equal distributions."""
    fn = family.distribution()
    z = fn.expand((4, *fn.batch_shape)).sample((5000,))
    assert z.shape == (5000, 4, *fn.event_shape)
    assert fn.support.check(z).all()
    draws = family.project(z).reshape(-1).numpy()
    assert stats.kstest(draws, family.law(*family.arrays).cdf).pvalue > 1e-6


@EACH
def test_moments(family: Family) -> None:
    fn = family.distribution()
    if family.support == "circle":
        mean, variance = 8.5 - 2 * math.pi, 1 - math.exp(-0.32)
    elif family.joint:
        _, mean, variance = family.joint(*family.arrays)
    else:
        law = family.law(*family.arrays)
        mean, variance = law.mean(), law.var()
    for moment, expected in ((fn.mean, mean), (fn.variance, variance)):
        if not np.isnan(expected).any():  # a Cauchy has none
            np.testing.assert_allclose(moment.numpy(), expected, rtol=1e-8)


OWN = ["Logistic", "Rayleigh", "Reciprocal", "Gompertz", "Uniform", "Triangular"]


@pytest.mark.parametrize("family", [FAMILIES[name] for name in OWN], ids=OWN)
def test_distribution_function_and_quantiles(family: Family) -> None:
    fn, law = family.distribution(), family.law(*family.arrays)
    u = torch.tensor([1e-9, 1e-4, 0.1, 0.3, 0.5, 0.9, 0.999])
    np.testing.assert_allclose(fn.icdf(u).numpy(), law.ppf(u.numpy()), rtol=1e-9)
    np.testing.assert_allclose(fn.cdf(fn.icdf(u)).numpy(), u.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", ["Logistic", "Rayleigh", "Reciprocal", "Gompertz", "Triangular"])
def test_gradient_of_quantiles(name: str) -> None:
    """What a draw differentiates is the quantile at fixed noise: exact, without sampling error."""
    family = FAMILIES[name]
    u = np.array([0.01, 0.2, 0.4, 0.97])
    leaves = family.leaves(len(u))
    family.make(*leaves).icdf(torch.as_tensor(u)).sum().backward()
    for k in range(len(u)):
        expected = list(slopes(lambda *theta, k=k: family.law(*theta).ppf(u[k]), family.arrays, 1e-5))
        np.testing.assert_allclose([leaf.grad[k].item() for leaf in leaves], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["Reciprocal", "Triangular", "Erlang", "Uniform"])
def test_entropy(name: str) -> None:
    family = FAMILIES[name]
    np.testing.assert_allclose(family.distribution().entropy().item(), family.law(*family.arrays).entropy(), rtol=1e-8)


# The gradient


@EACH
def test_gradient_of_an_expectation(family: Family) -> None:
    f = function_for(family)
    leaves = family.leaves(40_000)
    f(family.project(family.make(*leaves).rsample())).sum().backward()
    expected = slopes(lambda *theta: family.expectation(lambda z, _: f(z), *theta), family.arrays)
    for leaf, slope in zip(leaves, expected, strict=True):
        assert_mean(leaf.grad, slope)


# As a posterior


def model_of(family: Family) -> Callable[[torch.Tensor], None]:
    prior = PRIORS[family.support][0]
    f = function_for(family)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(f(family.project(z)), 1.0), obs=x)

    return model


class Guide(nn.Module):
    """The family with parameters of its own for each row, or shared ones."""

    def __init__(self, family: Family, *rows: int) -> None:
        super().__init__()
        self.family = family
        self.theta = nn.ParameterList(family.leaves(*rows))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.family.make(*self.theta))


def exact_bound(family: Family, x: float, *theta: Any) -> float:
    f = function_for(family)

    def integrand(z, law):
        likelihood = stats.norm.logpdf(x, f(z))
        return likelihood if family.negative_kl else likelihood + PRIORS[family.support][1].logpdf(z) - law.logpdf(z)

    negative_kl = family.negative_kl(*theta) if family.negative_kl else 0.0
    return negative_kl + family.expectation(integrand, *theta)


@EACH
def test_bound_and_its_gradient(family: Family) -> None:
    rows, x = 10_000, 0.6
    model, guide, data = model_of(family), Guide(family, rows), torch.full((rows,), x)
    evaluation = SGVB(kl="sampled").evaluate(model, guide, data)
    evaluation.loss.backward()
    assert_mean(evaluation.bounds.local, exact_bound(family, x, *family.arrays))
    expected = slopes(lambda *theta: exact_bound(family, x, *theta), family.arrays)
    for leaf, slope in zip(guide.theta, expected, strict=True):
        assert_mean(-leaf.grad, slope)


@EACH
def test_which_gradients_are_allowed(family: Family) -> None:
    model, guide, x = model_of(family), Guide(family, 8), torch.linspace(-1.0, 1.0, 8)
    objectives = [SGVB(gradient="stl"), SGVB(gradient="score"), IWELBO(3, gradient="dreg")]
    assert has_moving_support(guide.family.make(*guide.theta)) == family.moves
    for objective in objectives:
        if family.moves:
            with pytest.raises(GuideError, match="support of the guide's site 'z'"):
                objective.loss(model, guide, x)
        else:
            assert math.isfinite(objective.loss(model, guide, x))


@EACH
def test_recording(family: Family) -> None:
    """The gate compares loss and gradients to 1e-10."""
    x = torch.linspace(-1.0, 1.0, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StagingWarning)
        graph = stage(SGVB(kl="sampled"), model_of(family), Guide(family, 8), x)
    assert not isinstance(graph, ObjectiveModule)
    assert graph(x) != graph(x)


@pytest.mark.parametrize("name", ["Beta", "Dirichlet"])
def test_the_own_class_is_needed_to_record(name: str) -> None:
    family = FAMILIES[name]
    theirs = Family(getattr(dist, name), family.theta, family.law, family.support, project=family.project)
    x = torch.linspace(-1.0, 1.0, 8)
    with pytest.warns(StagingWarning, match="_sample_dirichlet"):
        assert isinstance(stage(SGVB(kl="sampled"), model_of(theirs), Guide(theirs, 8), x), ObjectiveModule)


# Corners


@pytest.mark.parametrize(
    ("fn", "num_draws"),
    [
        # of torch's and Pyro's draws, about 8 and 2 among as many have no density
        pytest.param(lambda: ours.Uniform(100.0, 101.0), 2_000_000, id="Uniform"),
        pytest.param(lambda: ours.Logistic(0.0, 1.0), 30_000_000, id="Logistic"),
        pytest.param(lambda: ours.Reciprocal(100.0, 101.0), 2_000_000, id="Reciprocal"),
        pytest.param(lambda: ours.Rayleigh(0.01), 2_000_000, id="Rayleigh"),
        pytest.param(lambda: ours.Gompertz(100.0, 100.0), 2_000_000, id="Gompertz"),
        pytest.param(lambda: ours.Triangular(0.0, 0.0, 1.0), 2_000_000, id="Triangular"),
        pytest.param(lambda: ours.WrappedNormal(3.0, 1.0), 500_000, id="WrappedNormal"),
        pytest.param(lambda: ours.Beta(0.02, 0.03), 500_000, id="Beta"),
        pytest.param(lambda: ours.Dirichlet(torch.tensor([0.02, 0.03, 1.0])), 500_000, id="Dirichlet"),
    ],
)
def test_draws_have_a_density_in_single_precision(fn: Callable[[], Any], num_draws: int) -> None:
    torch.set_default_dtype(torch.float32)
    made = fn()
    z = made.sample((num_draws,))
    assert z.isfinite().all()
    assert made.log_prob(z).isfinite().all()  # which holds z against the support too


@pytest.mark.parametrize("a", [0.02, 0.3])
def test_beta_of_a_small_concentration_in_single_precision(a: float) -> None:
    """What lies below the smallest normal number, 17 % of Beta(0.02, 2), is drawn as that number; the rest keeps its law."""
    torch.set_default_dtype(torch.float32)
    z = ours.Beta(a, 2.0).sample((20_000,)).double().numpy()
    tiny, law = torch.finfo(torch.float32).tiny, stats.beta(a, 2.0)
    below, rest = law.cdf(tiny), z[z > tiny]
    assert abs((z <= tiny).mean() - below) <= 5 * math.sqrt(below / len(z))
    assert stats.kstest((law.cdf(rest) - below) / (1 - below), "uniform").pvalue > 1e-6


@pytest.mark.parametrize("scale", [0.05, 0.5, 2.0, 2.5, 2.6, 3.2, 5.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrapped_normal_at_every_scale(scale: float, dtype: torch.dtype) -> None:
    """Value and slopes, on both sides of where the series change over (2.507)."""
    z = torch.linspace(-3.1, 3.1, 25, dtype=dtype)
    loc, spread = (torch.full((25,), value, dtype=dtype, requires_grad=True) for value in (7.0, scale))
    log_prob = ours.WrappedNormal(loc, spread).log_prob(z)
    log_prob.sum().backward()
    # log-sum of images, so that far angles do not underflow
    images = z[:, None].double() - 7.0 + 2 * math.pi * torch.arange(-100, 101)
    weights = (-images.square() / (2 * scale**2)).softmax(-1)
    exact = (-images.square() / (2 * scale**2)).logsumexp(-1) - math.log(scale) - math.log(2 * math.pi) / 2
    by_loc = (weights * images).sum(-1) / scale**2
    by_scale = (weights * images.square()).sum(-1) / scale**3 - 1 / scale
    # an angle is known to the precision of pi, and the density of a narrow law falls steeply
    tolerance = 100 * torch.finfo(dtype).eps
    for got, expected in ((log_prob, exact), (loc.grad, by_loc), (spread.grad, by_scale)):
        torch.testing.assert_close(got.detach().double(), expected, rtol=tolerance / scale, atol=tolerance)


@pytest.mark.parametrize("peak", [0.0, 1.0])
def test_triangle_with_its_peak_at_an_end(peak: float) -> None:
    leaves = [torch.full((7,), value, requires_grad=True) for value in (0.0, peak, 1.0)]
    fn = ours.Triangular(*leaves, validate_args=False)
    z = torch.tensor([-0.5, 0.0, 0.2, 0.5, 0.8, 1.0, 1.5])
    law = stats.triang(peak)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(fn.log_prob(z).detach().numpy(), law.logpdf(z.numpy()), rtol=1e-12)
    np.testing.assert_allclose(fn.cdf(z).detach().numpy(), law.cdf(z.numpy()), rtol=1e-12)
    fn.rsample((1000,)).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_density_outside_the_ends() -> None:
    z = torch.tensor([0.5, 3.5])
    for fn in (ours.Reciprocal(1.0, 3.0, validate_args=False), ours.Uniform(1.0, 3.0, validate_args=False)):
        assert (fn.log_prob(z) == -math.inf).all()


def test_ends_of_rounded_draws() -> None:
    """Noise above 17 is the upper end in single precision, which rounding passes for one pair of ends in five."""
    low = torch.rand(1000, dtype=torch.float32) + 0.1
    high = low + torch.rand(1000, dtype=torch.float32) + 0.1
    for fn in (ours.Reciprocal(low, high), ours.Triangular(low, low, high), ours.Triangular(low, high, high)):
        for u in (0.0, 1.0):
            assert fn.support.check(fn.icdf(torch.tensor(u, dtype=torch.float32))).all()


def test_gompertz_mean_by_the_exponential_integral() -> None:
    eta = np.array([1e-6, 1e-2, 1.0, 50.0])
    mean = ours.Gompertz(torch.as_tensor(eta), 2.0).mean
    np.testing.assert_allclose(mean.numpy(), special.exp1(eta) * np.exp(eta) / 2, rtol=1e-8)


@pytest.mark.parametrize("name", ["Erlang", "Beta", "Dirichlet", "Uniform"])
def test_closed_form_kl_is_kept(name: str) -> None:
    family = FAMILIES[name]
    q, p = (family.make(*(torch.as_tensor(factor * a) for a in family.arrays)) for factor in (1, 2))
    if name == "Uniform":
        p = ours.Uniform(0.0, 3.0)
    z = q.sample((200_000,))
    assert_mean(q.log_prob(z) - p.log_prob(z), kl_divergence(q, p))


@EACH
def test_expanded_family_is_the_same_family(family: Family) -> None:
    fn = family.distribution()
    wide = fn.expand((3, 2))
    assert type(wide) is type(fn)
    assert (wide.batch_shape, wide.event_shape) == ((3, 2), fn.event_shape)
    assert wide.mean.shape == wide.variance.shape == (3, 2, *fn.event_shape)
    z = wide.rsample((5,))
    assert z.shape == (5, 3, 2, *fn.event_shape)
    torch.testing.assert_close(wide.log_prob(z), fn.log_prob(z))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ours.Reciprocal(2.0, 1.0), SettingError, "low < high"),
        (lambda: ours.Triangular(0.0, 2.0, 1.0), SettingError, "low <= peak <= high"),
        (lambda: ours.Triangular(1.0, 1.0, 1.0), SettingError, "low < high"),
        (lambda: ours.Erlang(0, 1.0), SettingError, "num_events"),
        (lambda: ours.Rayleigh(-1.0), ValueError, "scale"),
        (lambda: ours.Gompertz(1.0, torch.tensor([1.0, -1.0])), ValueError, "rate"),
        (lambda: ours.Rayleigh(1.0).log_prob(torch.tensor(-1.0)), ValueError, "support"),
        (lambda: ours.WrappedNormal(0.0, 1.0).log_prob(torch.tensor(4.0)), ValueError, "support"),
        (lambda: ours.Uniform(0.0, 1.0).log_prob(torch.tensor(4.0)), ValueError, "support"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_the_documented_table() -> None:
    """Every family stands in docs/families.md with its class and what the tests above hold."""
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| **")]
    table = {row[0].strip("*"): row for row in rows}
    assert set(table) == set(FAMILIES)
    for name, family in FAMILIES.items():
        fn = family.distribution()
        own = "" if type(fn).__module__.startswith("pyro_aevb") else "dist."
        assert table[name][3] == f"`{own}{type(fn).__name__}`"
        assert table[name][4].startswith("yes") == family.moves
        assert table[name][5:] == ["`reparam`" if family.moves else "all", "yes"]
