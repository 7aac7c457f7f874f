"""Every estimator of a gradient has the expectation that quadrature gives, for all parameters; some lose their variance."""

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms
from torch import Tensor, nn

from pyro_aevb.objectives.base import Objective
from pyro_aevb.objectives.importance_weighted import IWELBO
from pyro_aevb.objectives.sgvb import SGVB
from pyro_aevb.testing import LinearGaussian

NUM_DATA = 10
BLOCKS = 25
"""Independent gradients behind a mean. Student's t with 24 degrees of freedom exceeds 5 with probability 4e-5, so that a test
of up to 25 parameters fails by chance with probability below 1e-3."""


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


class GlobalAndLocal(nn.Module):
    """g ~ N(m, s), z_n ~ N(g, tau), x_n ~ N(z_n, sigma), with a guide that conditions z on g; all trainable."""

    def __init__(self) -> None:
        super().__init__()
        start = {
            "m": 0.1,
            "s": 0.2,
            "tau": -0.3,
            "sigma": -0.2,
            "a": 0.3,
            "sa": -0.5,
            "l0": 0.2,
            "l1": 0.3,
            "l2": 0.3,
            "sz": -0.6,
        }
        for name, value in start.items():
            setattr(self, name, nn.Parameter(torch.tensor(value)))

    def model(self, x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(self.m, self.s.exp()))
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(g, self.tau.exp()))
            pyro.sample("x", dist.Normal(z, self.sigma.exp()), obs=x)

    def guide(self, x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(self.a, self.sa.exp()))
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(self.l0 + self.l1 * g + self.l2 * x, self.sz.exp()))

    def exact_bound(self, x: Tensor, importance_samples: int, nodes: int = 24) -> Tensor:
        """Integrate the bound over the noise of g and of each importance sample by Gauss-Hermite quadrature."""
        points, weights = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(nodes))
        weights = weights / weights.sum()
        g = (self.a + self.sa.exp() * points)[:, None, None]
        z = self.l0 + self.l1 * g + self.l2 * x[:, None] + self.sz.exp() * points  # [g, row, z]
        log_w = dist.Normal(g, self.tau.exp()).log_prob(z) + dist.Normal(z, self.sigma.exp()).log_prob(x[:, None])
        log_w = log_w - dist.Normal(self.l0 + self.l1 * g + self.l2 * x[:, None], self.sz.exp()).log_prob(z)
        if importance_samples == 1:
            rows = log_w @ weights
        else:
            pairs = torch.logaddexp(log_w[..., :, None], log_w[..., None, :]) - math.log(2)
            rows = torch.einsum("grij,i,j->gr", pairs, weights, weights)
        g = g[:, 0, 0]
        log_w_g = dist.Normal(self.m, self.s.exp()).log_prob(g) - dist.Normal(self.a, self.sa.exp()).log_prob(g)
        return weights @ (log_w_g + NUM_DATA / len(x) * rows.sum(-1))


def gradient(loss: Tensor, program: nn.Module) -> Tensor:
    grads = torch.autograd.grad(loss, list(program.parameters()), allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(program.parameters(), grads, strict=True)]
    )


def draw_gradients(objective: Objective, program: nn.Module, x: Tensor, count: int) -> Tensor:
    """Return gradients of the loss from independent draws, ``[count, parameters]``; common seeds pair two estimators."""
    draws = []
    for seed in range(count):
        torch.manual_seed(seed)
        draws.append(gradient(objective.differentiable_loss(program.model, program.guide, x), program))
    return torch.stack(draws)


def standard_errors(draws: Tensor, exact: Tensor) -> Tensor:
    """Return how many standard errors the mean of draws lies off."""
    return (draws.mean(0) - exact).abs() / (draws.std(0) / len(draws) ** 0.5 + 1e-9)


X = torch.tensor([1.3, -0.4], dtype=torch.float64)

ELBO_GRADIENTS = [
    SGVB(1000, kl="sampled"),
    SGVB(1000),
    SGVB(1000, gradient="stl"),
    SGVB(1000, gradient="score"),
    IWELBO(1, 1000),
    IWELBO(1, 1000, gradient="dreg"),
]


@pytest.mark.parametrize("objective", ELBO_GRADIENTS, ids=repr)
def test_every_elbo_gradient_has_the_exact_expectation(objective: Objective) -> None:
    program = GlobalAndLocal()
    exact = gradient(-program.exact_bound(X, 1), program)
    errors = standard_errors(draw_gradients(objective, program, X, BLOCKS), exact)
    assert errors.max() < 5


@pytest.mark.parametrize("name", ["reparam", "dreg"])
def test_importance_weighted_gradient_has_the_exact_expectation(name: str) -> None:
    program = GlobalAndLocal()
    exact = gradient(-program.exact_bound(X, 2), program)
    errors = standard_errors(draw_gradients(IWELBO(2, 2000, gradient=name), program, X, BLOCKS), exact)
    assert errors.max() < 5


@pytest.mark.parametrize(("fixed_globals", "is_right"), [(True, True), (False, False)])
def test_doubly_reparameterized_gradient_needs_globals_fixed_inside_log_q(fixed_globals: bool, is_right: bool) -> None:
    """The number of draws above is enough to see g left live inside log q(z | x, g)."""
    program = GlobalAndLocal()
    exact = gradient(-program.exact_bound(X, 2), program)
    draws = []
    for seed in range(BLOCKS):
        torch.manual_seed(seed)
        g = program.a + program.sa.exp() * torch.randn(2000, 1, 1)
        z = program.l0 + program.l1 * g + program.l2 * X + program.sz.exp() * torch.randn(2000, 2, 2)
        inner = g.detach() if fixed_globals else g
        fixed = {name: value.detach() for name, value in program.named_parameters()}

        def log_w(z: Tensor, q: dict[str, Tensor], inner: Tensor = inner, g: Tensor = g) -> Tensor:
            log_q = dist.Normal(q["l0"] + q["l1"] * inner + q["l2"] * X, q["sz"].exp()).log_prob(z)
            log_x = dist.Normal(z, program.sigma.exp()).log_prob(X)
            return dist.Normal(g, program.tau.exp()).log_prob(z) + log_x - log_q

        normalized = torch.softmax(log_w(z, fixed).detach(), 1)
        slowed = z.detach() + normalized * (z - z.detach())
        local = NUM_DATA / len(X) * (normalized * log_w(slowed, fixed)).sum((1, 2))
        log_g = dist.Normal(program.m, program.s.exp()).log_prob(g) - dist.Normal(program.a, program.sa.exp()).log_prob(
            g
        )
        draws.append(gradient(-(local + log_g[:, 0, 0]).mean(), program))
    assert (standard_errors(torch.stack(draws), exact).max() < 5) == is_right


class Linear(nn.Module):
    """Factor analysis with trainable W, b and noise, and a trainable mean-field encoder."""

    def __init__(self) -> None:
        super().__init__()
        i, j = torch.arange(1.0, 5.0), torch.arange(1.0, 3.0)
        self.w = nn.Parameter(torch.sin(i[:, None] + 2 * j))
        self.b = nn.Parameter(torch.cos(i))
        self.noise = nn.Parameter(torch.tensor(-0.5))
        self.enc = nn.Parameter(0.2 * torch.cos(i[None] * j[:, None]))
        self.c = nn.Parameter(torch.tensor([0.1, -0.2]))
        self.sd = nn.Parameter(torch.tensor([-0.7, -0.4]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w.T + self.b, self.noise.exp()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.enc.T + self.c, self.sd.exp()).to_event(1))

    def exact_bound(self, x: Tensor) -> Tensor:
        """E_q log N(x; Wz + b, v I) - KL, in closed form."""
        mean, variance, noise = x @ self.enc.T + self.c, (2 * self.sd).exp(), (2 * self.noise).exp()
        squares = ((x - mean @ self.w.T - self.b) ** 2).sum(-1) + (self.w**2 @ variance).sum()
        fit = -squares / noise / 2 - x.shape[1] / 2 * (2 * math.pi * noise).log()
        kl = (mean**2 + variance - 1 - variance.log()).sum(-1) / 2
        return (fit - kl).sum()


@pytest.mark.parametrize("objective", ELBO_GRADIENTS, ids=repr)
def test_every_gradient_of_a_linear_gaussian_model_is_the_closed_form(objective: Objective) -> None:
    program, x = Linear(), torch.tensor([[0.5, -1.0, 0.25, 1.5], [-0.75, 0.1, 0.4, -0.3]])
    exact = gradient(-program.exact_bound(x), program)
    errors = standard_errors(draw_gradients(objective, program, x, BLOCKS), exact)
    assert errors.max() < 5


class Chain(nn.Module):
    """Two latents in a chain, one of them in an inner plate, under two globals; the guide runs along the chain."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.top = nn.Parameter(torch.tensor([0.2, -0.3, 0.1, -0.5]))
        self.bottom = nn.Parameter(torch.tensor([0.5, 0.4, -0.7]))
        self.prior = nn.Parameter(torch.tensor([0.1, -0.2, 0.3]))

    def model(self, x: Tensor) -> None:
        tau = pyro.sample("tau", dist.LogNormal(self.prior[0], 0.5))
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(self.prior[1], tau))
            with pyro.plate("inner", 3, dim=-1):
                v = pyro.sample("v", dist.Gamma(2.0, (self.prior[2] + 0.1 * z).exp()))
                pyro.sample("x", dist.Normal(z + v, 0.7), obs=x)

    def guide(self, x: Tensor) -> None:
        tau = pyro.sample("tau", dist.LogNormal(self.top[0], self.top[1].exp()))
        features = self.net(x)
        with pyro.plate("data", len(x), dim=-2):
            loc = features[..., :1] + self.top[2] * tau
            z = pyro.sample("z", dist.Normal(loc, (features[..., 1:] + self.top[3]).exp()))
            with pyro.plate("inner", 3, dim=-1):
                pyro.sample("v", dist.Gamma((self.bottom[0] + 0.3 * z.tanh()).exp() + 1, self.bottom[1].exp() * tau))


@pytest.mark.parametrize(
    ("objective", "reference"),
    [
        (SGVB(100, gradient="stl"), SGVB(100, kl="sampled")),
        (IWELBO(5, 40, gradient="dreg"), IWELBO(5, 40)),
        (SGVB(1000, gradient="score"), SGVB(100, kl="sampled")),
    ],
    ids=repr,
)
def test_gradients_agree_with_several_latents_inner_plates_and_globals(
    objective: Objective, reference: Objective
) -> None:
    program, x = Chain(), torch.tensor([[0.5, 1.0, 2.0], [1.5, 0.3, -0.2]])
    differences = draw_gradients(objective, program, x, BLOCKS) - draw_gradients(reference, program, x, BLOCKS)
    assert standard_errors(differences, torch.zeros(())).max() < 5


def test_dreg_of_one_importance_sample_is_stl_where_there_are_no_globals() -> None:
    program, x = Linear(), torch.tensor([[0.5, -1.0, 0.25, 1.5]])
    dreg = draw_gradients(IWELBO(1, gradient="dreg"), program, x, 3)
    torch.testing.assert_close(dreg, draw_gradients(SGVB(gradient="stl"), program, x, 3))


class Autoregressive(nn.Module):
    """z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1) with p(z1 | x) p(z2 | z1, x) as a trainable guide."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.tensor([1 / 3, (2 / 3) ** 0.5, 0.5, 0.5, 0.5**0.5]))
        self.p = nn.Parameter(torch.tensor([0.0, 1.0, 1.0]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(self.p[0], 1.0))
            z2 = pyro.sample("z2", dist.Normal(self.p[1] * z1, 1.0))
            pyro.sample("x", dist.Normal(z2, self.p[2]), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(self.q[0] * x, self.q[1]))
            pyro.sample("z2", dist.Normal(self.q[2] * z1 + self.q[3] * x, self.q[4]))


class Unbroadcast(Autoregressive):
    """The same, in a program that indexes its rows from the left and so has to run once per particle."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(self.p[0], 1.0))
            z2 = pyro.sample("z2", dist.Normal(self.p[1] * z1[torch.arange(len(x))], 1.0))
            pyro.sample("x", dist.Normal(z2, self.p[2]), obs=x)


class FullCovariance(nn.Module):
    """The exact posterior of a linear-Gaussian model as a trainable guide."""

    def __init__(self) -> None:
        super().__init__()
        self.exact, x = LinearGaussian.fixture()
        posterior = self.exact.posterior(x)["z"]
        self.q = nn.Parameter(torch.cat([posterior.mean, posterior.scale_tril[0]]))
        self.p = nn.Parameter(self.exact.bias.clone())
        self.x = x

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.exact.weight.T + self.p, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(self.q[0], scale_tril=self.q[1:].tril()))


class ExactGlobal(nn.Module):
    """g ~ N(0, 1), z_n ~ N(g, 1), x_n ~ N(z_n, 1) with the exact posterior as a trainable guide of three rows."""

    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        precision = 1 + 3 / 2
        start = [float(self.x.sum()) / 2 / precision, precision**-0.5, 0.5, 0.5, 0.5**0.5]
        self.q = nn.Parameter(torch.tensor(start))
        self.p = nn.Parameter(torch.tensor([0.0, 1.0]))

    def model(self, x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(self.p[0], 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, self.p[1]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(self.q[0], self.q[1]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.q[2] * g + self.q[3] * x, self.q[4]))


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (Autoregressive, torch.tensor([1.3, -0.2], dtype=torch.float64)),
        (Unbroadcast, torch.tensor([1.3, -0.2, 0.4, 1.0], dtype=torch.float64)),
        (FullCovariance, LinearGaussian.fixture()[1]),
        (ExactGlobal, ExactGlobal.x),
    ],
)
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.filterwarnings("ignore::pyro_aevb.errors.ParticleWarning")
def test_stl_gradient_of_the_guide_vanishes_at_the_exact_posterior(
    make: Callable[[], nn.Module], x: Tensor, particles: int
) -> None:
    program = make()
    size = program.q.numel()
    stl = draw_gradients(SGVB(particles, gradient="stl"), program, x, 10)
    assert stl[:, :size].abs().max() < 1e-12
    assert stl[:, size:].std(0).min() > 1e-2  # the model's gradient is not 0 for a draw
    total = draw_gradients(SGVB(particles, kl="sampled"), program, x, 10)
    assert total[:, :size].std(0).max() > 1e-2
    torch.testing.assert_close(stl[:, size:], total[:, size:])


@pytest.mark.parametrize("make", [Autoregressive, Unbroadcast])
@pytest.mark.filterwarnings("ignore::pyro_aevb.errors.ParticleWarning")
def test_dreg_gradient_of_the_local_guide_vanishes_at_the_exact_posterior(make: Callable[[], nn.Module]) -> None:
    program, x = make(), torch.tensor([1.3, -0.2, 0.4, 1.0])
    dreg = draw_gradients(IWELBO(3, 2, gradient="dreg"), program, x, 5)
    assert dreg[:, :5].abs().max() < 1e-12
    assert dreg[:, 5:].std(0).min() > 1e-2


def test_signal_to_noise_ratio_falls_with_importance_samples_but_not_under_dreg() -> None:
    """Rainforth et al. 2018 (arXiv 1802.04537) and Tucker et al. 2018, Figure 2."""
    program, x = Linear(), torch.tensor([[0.5, -1.0, 0.25, 1.5]])
    start = program.w.numel() + program.b.numel() + 1

    def ratio(num_importance_samples: int, name: str) -> float:
        draws = draw_gradients(IWELBO(num_importance_samples, gradient=name), program, x, 40)[:, start:]
        return float((draws.mean(0).abs() / draws.std(0)).mean())

    assert ratio(100, "dreg") > 5 * ratio(100, "reparam")
    assert ratio(100, "reparam") < ratio(2, "reparam") / 2


def test_score_gradient_has_more_variance() -> None:
    program, x = Linear(), torch.tensor([[0.5, -1.0, 0.25, 1.5]])
    guide = slice(program.w.numel() + program.b.numel() + 1, None)
    score = draw_gradients(SGVB(gradient="score"), program, x, 60)[:, guide].var(0)
    assert (score > 3 * draw_gradients(SGVB(kl="sampled"), program, x, 60)[:, guide].var(0)).all()


def test_score_of_a_row_is_multiplied_by_its_own_cost_alone() -> None:
    loc = torch.zeros(3, requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    gradients = []
    for other in (0.0, 50.0):
        torch.manual_seed(0)
        loss = SGVB(4, gradient="score").differentiable_loss(model, guide, torch.tensor([1.0, other, 0.5]))
        gradients.append(torch.autograd.grad(loss, loc)[0])
    torch.testing.assert_close(gradients[0][[0, 2]], gradients[1][[0, 2]])
    assert abs(gradients[0][1] - gradients[1][1]) > 1


class Noisy(nn.Module):
    """An encoder with dropout before and after a sample site, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))
        self.second = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b[..., None], 1.0).expand([*b.shape, 4]).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        head = self.first(x)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(head[..., 0], head[..., 1].exp()))
            head = self.second(a[..., None])
            pyro.sample("b", dist.Normal(head[..., 0], head[..., 1].exp()))


@pytest.mark.parametrize(
    ("objective", "reference"),
    [
        (SGVB(gradient="stl"), SGVB(kl="sampled")),
        (IWELBO(3, gradient="dreg"), IWELBO(3)),
        (SGVB(gradient="score"), SGVB(kl="sampled")),
    ],
    ids=repr,
)
def test_a_second_run_of_the_guide_sees_the_noise_of_the_first(objective: Objective, reference: Objective) -> None:
    """Dropout masks are part of q: log q of another mask has another value, and batch norm counts a step once."""
    program, x = Noisy(), torch.tensor([[0.5, -1.0, 0.25, 1.5], [-0.75, 0.1, 0.4, -0.3], [1.0, 0.0, -1.0, 2.0]])
    losses, steps = [], []
    for each in (objective, reference):
        each.read(program.model, program.guide, x)
        torch.manual_seed(1)
        before = int(program.first[1].num_batches_tracked)
        losses.append(each.differentiable_loss(program.model, program.guide, x).detach())
        steps.append(int(program.first[1].num_batches_tracked) - before)
    torch.testing.assert_close(losses[0], losses[1])
    assert steps[0] == steps[1]


class Flow(nn.Module):
    """A spline flow as guide: its parameters are read when a draw is weighed, not when it is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.spline = transforms.spline(2, count_bins=4, bound=4.0)
        self.loc = nn.Parameter(torch.tensor([0.3, -0.2]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        base = dist.Normal(self.loc, 1.0).to_event(1).expand([len(x)])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [self.spline]))


FLOW_X = torch.tensor([[0.3, 1.0], [-0.5, 0.2]], dtype=torch.float64)


def test_dreg_gradient_of_a_flow_has_the_expectation_of_the_total_derivative() -> None:
    program = Flow()
    dreg, total = (
        draw_gradients(IWELBO(5, 100, gradient=name), program, FLOW_X, BLOCKS) for name in ("dreg", "reparam")
    )
    assert standard_errors(dreg - total, torch.zeros(())).max() < 5


def test_stl_gradient_of_a_flow_drops_the_score() -> None:
    """The total derivative less the path derivative is minus the score of q, taken here by hand."""
    program = Flow()
    stl, total = (
        draw_gradients(objective, program, FLOW_X, 3) for objective in (SGVB(gradient="stl"), SGVB(kl="sampled"))
    )
    scores = []
    for seed in range(3):
        torch.manual_seed(seed)
        nodes = poutine.trace(program.guide).get_trace(FLOW_X).nodes
        value = nodes["z"]["value"].detach().clone()
        scores.append(gradient(nodes["z"]["fn"].log_prob(value).sum(), program))
    torch.testing.assert_close(total - stl, torch.stack(scores), atol=1e-6, rtol=1e-6)
