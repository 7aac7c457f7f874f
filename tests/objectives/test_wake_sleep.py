"""Wake-sleep and its reweighted form: both gradients against closed forms, weights of each row's own, what they refuse."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import Normal, constraints

from pyro_aevb.errors import GuideError, ModelError, SettingError
from pyro_aevb.guides.normal import AutoAmortizedNormal
from pyro_aevb.objectives.base import Objective
from pyro_aevb.objectives.importance_weighted import IWELBO
from pyro_aevb.objectives.sgvb import SGVB
from pyro_aevb.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.testing import LinearGaussian
from pyro_aevb.training.loop import fit

BLOCKS = 25
"""Independent gradients behind a mean. Student's t with 24 degrees of freedom exceeds 5 with probability 4e-5, so that a test
of 50 parameters fails by chance with probability 2e-3."""
NUM_DATA = 600


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def gradients(objective: Objective, program: nn.Module, x: Tensor, **settings: int) -> dict[str, Tensor]:
    """Draw gradients of the loss under seeds 0, 1, ...; by parameter ``[BLOCKS, *shape]``."""
    draws = []
    module = ObjectiveModule(program.model, program.guide, objective, **settings).build(x)
    for seed in range(BLOCKS):
        torch.manual_seed(seed)
        program.zero_grad()
        module(x).backward()
        draws.append({name: parameter.grad.clone() for name, parameter in program.named_parameters()})
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def check(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert found.keys() == exact.keys()
    for name, draws in found.items():
        errors = (draws.mean(0) - exact[name]).abs() / (draws.std(0) / BLOCKS**0.5 + 1e-9)
        assert errors.max() < 5, (name, errors.max().item())


# Wake-sleep


class FactorAnalysis(nn.Module):
    """The linear-Gaussian fixture with trainable loadings and bias, and a factorised guide away from every optimum."""

    def __init__(self) -> None:
        super().__init__()
        fixture, _ = LinearGaussian.fixture()
        self.variance = fixture.noise_variance
        self.W, self.b = nn.Parameter(fixture.weight.clone()), nn.Parameter(fixture.bias.clone())
        i, j = torch.arange(3.0), torch.arange(6.0)
        self.A, self.c = nn.Parameter(0.2 * torch.sin(2 * i[:, None] - j)), nn.Parameter(0.3 * torch.cos(i))
        self.log_s = nn.Parameter(-0.3 - 0.2 * i)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.W.T + self.b, self.variance.sqrt()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.A.T + self.c, self.log_s.exp()).to_event(1))


@torch.no_grad()
def wake_and_sleep_gradients(program: FactorAnalysis, x: Tensor, num_data: int) -> dict[str, Tensor]:
    """Expectations of the derivatives of -scale * sum log p(x, z) over q, and of -sum log q(z' | x') over p, by hand."""
    W, b, A, c = program.W, program.b, program.A, program.c
    variance, s2 = program.variance, (2 * program.log_s).exp()
    # wake: z ~ N(m, S)
    m = x @ A.T + c
    second = m.T @ m + len(x) * s2.diag()
    centred = x - b
    scale = num_data / len(x)
    # sleep: cov(x') = C, r = z' - A x' - c has mean -(A b + c)
    C = W @ W.T + variance.diag()
    mean = -(A @ b + c)
    r_x = W.T - A @ C + mean[:, None] * b
    r_r = torch.eye(3) - A @ W - W.T @ A.T + A @ C @ A.T + mean[:, None] * mean
    return {
        "W": -scale * (centred.T @ m - W @ second) / variance[:, None],
        "b": -scale * (centred - m @ W.T).sum(0) / variance,
        "A": -len(x) * r_x / s2[:, None],
        "c": -len(x) * mean / s2,
        "log_s": -len(x) * (r_r.diagonal() / s2 - 1),
    }


def test_both_gradients_are_the_closed_forms() -> None:
    """The wake phase is scaled to the data set, the sleep phase to nothing: its rows are as many as the batch's."""
    program = FactorAnalysis()
    x = LinearGaussian.fixture()[0].simulate(4, seed=1)[0].repeat(100, 1) + 0.3
    check(gradients(WakeSleep(), program, x, num_data=NUM_DATA), wake_and_sleep_gradients(program, x, NUM_DATA))


def test_the_bound_is_the_elbo_and_the_loss_is_none() -> None:
    program = FactorAnalysis()
    x = LinearGaussian.fixture()[0].simulate(20, seed=1)[0].repeat(500, 1)
    ours = WakeSleep().evaluate(program.model, program.guide, x)
    elbo = SGVB(kl="sampled").bounds(program.model, program.guide, x)
    error = ((ours.bounds.local.var() + elbo.local.var()) / len(x)).sqrt()
    assert abs(ours.bounds.local.mean() - elbo.local.mean()) < 5 * error
    assert (ours.loss + ours.bounds.total).abs() > 1000


def test_training_finds_the_posterior_that_the_guide_can_hold() -> None:
    """At the truth q(z | x) of a dream is p(z | x): with independent loadings the factorised guide holds it."""
    i = torch.arange(4.0)
    truth = LinearGaussian(torch.stack([i.cos(), i.sin()], 1), torch.zeros(4), torch.full((4,), 0.5))
    W = torch.linalg.qr(truth.weight).Q * 1.5
    truth = LinearGaussian(W, torch.zeros(4), torch.full((4,), 0.5))
    x, _ = truth.simulate(500, seed=1)
    guide = truth.mean_field_guide()
    result = fit(
        truth.model, guide, WakeSleep(), x, num_epochs=60, batch_size=500, learning_rate=0.05, seed=0, progress=False
    )
    exact = truth.log_marginal(x).mean().item()
    assert exact - 0.1 < result.history[-1]["bound"] < exact + 0.1
    assert result.history[0]["bound"] < exact - 0.5


def test_dreams_are_seen_through_the_batch() -> None:
    """A guide that reads a covariate beside x gets the given covariate with the dreamt x."""
    seen: list[tuple[Tensor, Tensor]] = []

    def model(x: Tensor, t: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 100 * t, 1.0), obs=x)

    def guide(x: Tensor, t: Tensor) -> None:
        seen.append((x, t))
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shift, 1.0))

    t = torch.arange(5.0)
    WakeSleep().loss(model, guide, torch.zeros(5), t=t)
    x, dreamt_t = seen[-1]
    assert torch.equal(dreamt_t, t)
    assert (x - 100 * t).abs().max() < 10
    assert (x - 100 * t).abs().min() > 0


def test_computed_observations_need_to_batch() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x / 255)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x / 255, 0.7))

    x = 255 * torch.randn(100)
    with pytest.raises(ModelError, match="to_batch"):
        WakeSleep().loss(model, guide, x)
    pyro.clear_param_store()
    objective = WakeSleep(to_batch=lambda values, args, kwargs: ((255 * values["x"],), kwargs))
    result = fit(model, guide, objective, x, num_epochs=100, learning_rate=0.03, seed=0, progress=False)
    assert abs(result.module.program.pyro_params()["slope"].item() - 0.5) < 0.15


def test_bounds_need_no_dream() -> None:
    """Observations that are no views of an argument can't be dreamt without to_batch, and have an ELBO all the same."""
    inputs: list[Tensor] = []

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x / 10)

    def guide(x: Tensor) -> None:
        inputs.append(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 20, 0.5**0.5))  # exact at loc = 0: every draw's bound is log p(x)

    x = torch.tensor([0.0, -7.0, 30.0])
    bounds = WakeSleep().bounds(model, guide, x)
    torch.testing.assert_close(bounds.local, Normal(0.0, 2.0**0.5).log_prob(x / 10), rtol=1e-12, atol=0.0)
    assert all(torch.equal(given, x) for given in inputs)
    for train in (WakeSleep().loss, WakeSleep().loss_and_grads, WakeSleep()(model, guide)):
        batch = (x,) if isinstance(train, nn.Module) else (model, guide, x)
        with pytest.raises(ModelError, match="to_batch"):
            train(*batch)
    with pytest.raises(ModelError, match="to_batch"):
        fit(model, guide, WakeSleep(), x, num_epochs=1, progress=False)


class Walking(nn.Module):
    """z ~ N(theta, 1), x ~ N(z, 1), with the posterior as guide."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.0))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((self.theta.detach() + x) / 2, 0.5**0.5))


def test_patience_goes_by_the_elbo_of_other_rows() -> None:
    """The model walks from 0 towards 5 and passes the held-out rows at 2, with the exact posterior as its guide on the way."""
    model, thetas = Walking(), []
    held_out = torch.full((3,), 2.0)
    result = fit(
        model.model,
        model.guide,
        WakeSleep(),
        torch.full((200,), 5.0),
        num_epochs=200,
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        validation=held_out,
        patience=3,
        callbacks=[lambda event: thetas.append(model.theta.item())],
        seed=0,
        progress=False,
    )
    found = torch.tensor([record["validation_bound"] for record in result.history])
    torch.testing.assert_close(found, Normal(torch.tensor(thetas), 2.0**0.5).log_prob(torch.tensor(2.0)))
    assert result.stopped_by == "patience"
    assert result.best_epoch == 1 + int((torch.tensor(thetas) - 2).abs().argmin())
    assert 3 < len(thetas) == result.best_epoch + 3
    assert model.theta.item() == thetas[result.best_epoch - 1]


# Reweighted wake-sleep


class Scalar(nn.Module):
    """z ~ N(b, t), x ~ N(z, 1), q(z | x) = N(a x + c, s)."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in {"b": 0.4, "log_t": 0.2, "a": 0.3, "c": 0.1, "log_s": -0.2}.items():
            setattr(self, name, nn.Parameter(torch.tensor(value)))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.b, self.log_t.exp()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.a * x + self.c, self.log_s.exp()))


@torch.no_grad()
def reweighted_gradients(program: Scalar, x: Tensor, num_data: int) -> dict[str, Tensor]:
    """Integrate the self-normalized derivatives of K = 2 draws by Gauss-Hermite quadrature, derivatives by hand."""
    nodes, weights = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    t, s = program.log_t.exp(), program.log_s.exp()
    mean = (program.a * x + program.c)[:, None]
    z = mean + s * nodes
    log_w = Normal(program.b, t).log_prob(z) + Normal(z, 1.0).log_prob(x[:, None]) - Normal(mean, s).log_prob(z)
    share = torch.sigmoid(log_w[:, :, None] - log_w[:, None, :])  # the first of two draws' normalized weight
    derivatives = {
        "b": (z - program.b) / t**2,
        "log_t": ((z - program.b) / t) ** 2 - 1,
        "a": (z - mean) / s**2 * x[:, None],
        "c": (z - mean) / s**2,
        "log_s": ((z - mean) / s) ** 2 - 1,
    }
    scale = num_data / len(x)
    return {
        # by symmetry both draws add the same
        name: -scale * 2 * torch.einsum("nij,ni,i,j->", share, part, weights, weights)
        for name, part in derivatives.items()
    }


def test_reweighted_gradients_are_the_integrals() -> None:
    program = Scalar()
    x = torch.tensor([0.5, -2.0, 3.0]).repeat(100)
    check(gradients(ReweightedWakeSleep(2), program, x, num_data=NUM_DATA), reweighted_gradients(program, x, NUM_DATA))


def test_the_models_gradient_is_that_of_the_importance_weighted_bound() -> None:
    """Draw by draw, since both weigh the same draws; the guide's is not."""
    program, x, found = Scalar(), torch.tensor([0.5, -2.0, 3.0]), []
    for objective in (ReweightedWakeSleep(5), IWELBO(5)):
        torch.manual_seed(0)
        loss = objective.differentiable_loss(program.model, program.guide, x)  # reads the programs
        torch.manual_seed(0)
        loss = objective.differentiable_loss(program.model, program.guide, x)
        found.append(torch.stack([loss, *torch.autograd.grad(loss, [program.b, program.log_t, program.c])]).detach())
    ours, theirs = found
    torch.testing.assert_close(ours[:3], theirs[:3], rtol=1e-12, atol=0.0)
    assert abs(ours[3] - theirs[3]) > 0.01


def trap(x: Tensor) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * 0.5, 0.9))

    return model, guide


def test_weights_are_of_each_rows_own() -> None:
    """K = 50, 100 rows: the sum over rows of E[log mean_k w], where weights of the whole batch lose a nat."""
    torch.manual_seed(0)
    x = torch.randn(100, dtype=torch.float32).double()
    model, guide = trap(x)
    objective, repeats = ReweightedWakeSleep(50), 100
    totals = torch.stack([objective.bounds(model, guide, x).total for _ in range(repeats)])
    error = totals.std() / repeats**0.5
    assert error < 0.1

    generator = np.random.default_rng(1)
    z = 0.5 * x.numpy() + 0.9 * generator.standard_normal((400, 50, 100))
    log_w = -0.5 * z**2 - 0.5 * (x.numpy() - z) ** 2 - np.log(2 * np.pi)
    log_w += 0.5 * ((z - 0.5 * x.numpy()) / 0.9) ** 2 + 0.5 * np.log(2 * np.pi) + np.log(0.9)
    per_row = np.log(np.exp(log_w).mean(1)).sum(1)
    both = (error**2 + per_row.var() / 400) ** 0.5
    assert abs(totals.mean().item() - per_row.mean()) < 4 * both
    joint = log_w.sum(2)
    of_batch = np.log(np.exp(joint - joint.max(1, keepdims=True)).mean(1)) + joint.max(1)
    assert per_row.mean() - of_batch.mean() > 0.6

    pyros = pyro.infer.ReweightedWakeSleep(num_particles=50, max_plate_nesting=1)
    losses = torch.stack([pyros.loss(model, guide, x)[0] for _ in range(400)])
    both = (losses.var().item() / 400 + of_batch.var() / 400) ** 0.5
    assert abs(losses.mean().item() + of_batch.mean()) < 4 * both < 0.5
    assert losses.mean() + totals.mean() > 0.7  # a loss of 154.0, where 152.9 is right


def counts_model(x: Tensor) -> None:
    """Given x a rate is Gamma(2 + x, 2.5), and x is negative binomial."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)


@pytest.mark.parametrize(
    ("make", "num_epochs", "is_weighted"),
    [
        pytest.param(WakeSleep, 300, False, marks=pytest.mark.slow, id="wake-sleep"),
        pytest.param(partial(ReweightedWakeSleep, 10), 120, True, id="reweighted"),
    ],
)
def test_automatic_guides_end_at_the_moments_of_the_posterior(
    make: Callable[[], Objective], num_epochs: int, is_weighted: bool
) -> None:
    """Both descend KL(p || q), whose best log-normal has the mean and variance of log rate, digamma and trigamma of 2 + x."""
    torch.manual_seed(3)
    x = torch.distributions.NegativeBinomial(2.0, probs=torch.tensor(0.4)).sample((300,))
    guide = AutoAmortizedNormal(counts_model)
    settings = {"num_epochs": num_epochs, "batch_size": 300, "learning_rate": 0.02, "seed": 0, "progress": False}
    result = fit(counts_model, guide, make(), x, **settings)
    log_p = torch.distributions.NegativeBinomial(2.0, probs=torch.tensor(0.4)).log_prob(x)
    shape, rate = 2 + x, torch.tensor(2.5)
    mean, variance = torch.digamma(shape) - rate.log(), torch.polygamma(1, shape)
    log_q = -0.5 * (1 + (2 * torch.pi * variance).log()) - mean
    posterior = shape * rate.log() - torch.lgamma(shape) + (shape - 1) * mean - rate * (mean + variance / 2).exp()
    elbo = (log_p - (log_q - posterior)).mean()
    with torch.no_grad():
        found = SGVB(100, kl="sampled").bounds(counts_model, guide, x).local.mean()
    assert elbo < log_p.mean() - 0.03
    assert abs(found - elbo) < 0.03
    # with 10 draws the importance-weighted bound is nearly tight; that of one draw a row is noisy
    last = torch.tensor([record["bound"] for record in result.history[-10:]]).mean()
    assert abs(last - (log_p.mean() if is_weighted else elbo)) < 0.03


# Refusals


def test_globals_are_refused() -> None:
    def model(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    for objective in (WakeSleep(), ReweightedWakeSleep(5)):
        with pytest.raises(ModelError, match=r"global latents \['g'\]"):
            objective.loss(model, guide, torch.zeros(3))


def test_points_and_trained_supports_are_refused() -> None:
    model, _ = trap(torch.zeros(3))

    def point(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(pyro.param("p", torch.tensor(0.0)).expand(len(x))))

    def bounded(x: Tensor) -> None:
        high = pyro.param("high", torch.tensor(3.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(-high, high))

    for objective in (WakeSleep(), ReweightedWakeSleep(5)):
        with pytest.raises(GuideError, match="a point"):
            objective.loss(model, point, torch.zeros(3))
        with pytest.raises(GuideError, match="depends on its parameters"):
            objective.loss(model, bounded, torch.zeros(3))
        with pytest.raises(GuideError, match="auxiliary"):
            objective.loss(model, AutoNormal(model), torch.zeros(3))


def test_a_model_that_draws_its_own_rows_can_not_dream() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("z", dist.Normal(x[index], 1.0))

    with pytest.raises(ModelError, match="draws rows of plate 'data' by itself"):
        WakeSleep().loss(model, guide, torch.zeros(6))
    assert ReweightedWakeSleep(3).bounds(model, guide, torch.zeros(6)).local.shape == (2,)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_importance_samples_are_refused(count: int) -> None:
    with pytest.raises(SettingError, match="at least"):
        ReweightedWakeSleep(count)


def test_where_a_dream_goes_is_found_out_for_each_layout_of_a_batch():
    """One objective serves batches of other lengths, strides and constants, whose views differ."""

    def model(x, column):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1e-4), obs=x[:, column])

    seen = []

    def guide(x, column):
        seen.append(x.clone())
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x[:, column], 1.0))

    objective = WakeSleep()
    batches = [(torch.zeros(5, 3), 0), (torch.zeros(5, 3), 2), (torch.zeros(4, 3), 2), (torch.zeros(3, 4).T, 1)]
    for x, column in [*batches, *batches]:
        objective.differentiable_loss(model, guide, x, column)
        dream = seen[-1]
        assert dream.shape == x.shape
        assert [bool(dream[:, other].any()) for other in range(x.shape[1])] == [
            other == column for other in range(x.shape[1])
        ]
        assert not x.any()


def test_where_a_dream_goes_depends_on_which_arguments_are_one_and_on_types():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y.float() if y.dtype == torch.uint8 else y)

    seen = []

    def guide(x, y):
        seen.append((x.clone(), y.clone()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))

    objective = WakeSleep()
    x, y = torch.full((4,), 100.0), torch.full((4,), 200.0)
    for _ in range(2):
        objective.differentiable_loss(model, guide, x, x)
        assert torch.equal(*seen[-1])
        assert (seen[-1][0] < 50).all()
        objective.differentiable_loss(model, guide, x, y)
        assert torch.equal(seen[-1][0], x)
        assert (seen[-1][1] < 50).all()
    with pytest.raises(ModelError, match="not a view"):
        objective.differentiable_loss(model, guide, x, torch.zeros(4, dtype=torch.uint8))
