"""Objectives at work: under Pyro's SVI, as a module in a plain torch loop, with programs of every kind."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.elbo import ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_aevb.objectives.base import Objective
from pyro_aevb.objectives.importance_weighted import IWELBO
from pyro_aevb.objectives.sgvb import SGVB
from pyro_aevb.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep
from pyro_aevb.program.parameters import find_modules

OBJECTIVES: list[Callable[[], Objective]] = [
    lambda: SGVB(2),
    lambda: SGVB(2, kl="sampled"),
    lambda: SGVB(gradient="stl"),
    lambda: SGVB(20, gradient="score"),
    lambda: IWELBO(5),
    lambda: IWELBO(5, 2, gradient="dreg"),
    WakeSleep,
    lambda: ReweightedWakeSleep(5),
]
X = torch.tensor([0.5, -1.0, 2.0, 0.3, 1.7])


def param_model(x: Tensor) -> None:
    """x ~ N(b, 2) after integrating z out: the best b is the mean of x."""
    bias = pyro.param("bias", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + bias, 1.0), obs=x)


def param_guide(x: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    shift = pyro.param("shift", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x + shift, scale))


class TorchPair(nn.Module):
    """The same as an nn.Module."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(0.0))
        self.head = nn.Parameter(torch.tensor([0.0, 0.0, -0.7]))

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + self.bias, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.head[0] * x + self.head[1], self.head[2].exp()))


class PyroModel(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + self.bias, 1.0), obs=x)


class PyroGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.tensor([0.0, 0.0]))
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.head[0] * x + self.head[1], self.scale))


def torch_pair() -> tuple[Callable[..., None], Callable[..., None]]:
    pair = TorchPair()
    return pair.model, pair.guide


KINDS = {
    "pyro.param": lambda: (param_model, param_guide),
    "nn.Module": torch_pair,
    "PyroModule": lambda: (PyroModel(), PyroGuide()),
}
STEPS = 60


def check_trained(model: Callable[..., None], guide: Callable[..., None]) -> None:
    """The marginal is x ~ N(b, 2), and its posterior lies in the guide's family: b ends at the mean of x."""
    exact = torch.distributions.Normal(X.mean(), 2**0.5).log_prob(X).sum()
    bound = IWELBO(100, 20).bounds(model, guide, X).total
    assert abs(bound - exact) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_every_kind_train_under_svi(kind: str) -> None:
    model, guide = KINDS[kind]()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), SGVB(gradient="stl"))
    losses = [svi.step(X) for _ in range(STEPS)]
    assert all(isinstance(loss, float) for loss in (*losses, svi.evaluate_loss(X)))
    check_trained(model, guide)


@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_every_kind_train_as_a_module(kind: str) -> None:
    """Parameters belong to the module; the global param store stays as it was."""
    pyro.param("slope", torch.tensor(7.0))  # another program's
    model, guide = KINDS[kind]()
    loss = IWELBO(5, gradient="dreg")(model, guide).build(X)
    assert sum(parameter.numel() for parameter in loss.parameters()) == 4
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(X).backward()
        optimizer.step()
    assert list(pyro.get_param_store()) == ["slope"]
    assert pyro.param("slope").item() == 7.0
    with loss.running():
        check_trained(model, guide)


def all_parameters(model: Callable[..., None], guide: Callable[..., None]) -> Tensor:
    """Return every unconstrained number of a pair that has run, copied."""
    held = [parameter for module in find_modules(model, guide) for parameter in module.parameters()]
    held = held or list(pyro.get_param_store()._params.values())
    return torch.cat([parameter.detach().flatten().clone() for parameter in held])


@pytest.mark.parametrize("make", OBJECTIVES, ids=lambda make: repr(make()))
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_under_svi_is_the_modules_gradient(kind: str, make: Callable[[], Objective]) -> None:
    """Gradient descent at rate 1 moves each of the four parameters by the gradient that the module gives."""
    objective = make()
    model, guide = KINDS[kind]()
    module = objective(model, guide).build(X)
    module(X)  # reads the programs, so that both runs below draw the same noise
    torch.manual_seed(1)
    module(X).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    assert gradients.numel() == 4
    assert gradients.abs().min() > 0
    module.zero_grad()

    pyro.clear_param_store()
    model(X)
    guide(X)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1.0}), objective)
    before = all_parameters(model, guide)
    torch.manual_seed(1)
    svi.step(X)
    steps = before - all_parameters(model, guide)
    torch.testing.assert_close(steps.sort().values, gradients.sort().values, atol=1e-4, rtol=1e-4)


def test_an_objective_is_pyros_elbo() -> None:
    assert all(isinstance(make(), ELBO) for make in OBJECTIVES)


@pytest.mark.parametrize("make", OBJECTIVES, ids=lambda make: repr(make()))
def test_the_three_losses_are_one(make: Callable[[], Objective]) -> None:
    pair = TorchPair()
    objective = make()
    objective.read(pair.model, pair.guide, X)
    gradients = []
    values = []
    for run in ("differentiable_loss", "loss_and_grads", "module", "loss"):
        pair.zero_grad()
        torch.manual_seed(0)
        if run == "module":
            value = objective(pair.model, pair.guide).build(X)(X)
        else:
            value = getattr(objective, run)(pair.model, pair.guide, X)
        if isinstance(value, Tensor):
            value.backward()
            value = value.item()
        values.append(value)
        if run != "loss":
            gradients.append(torch.cat([pair.bias.grad[None], pair.head.grad]))
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_bounds_have_no_gradient_and_add_none() -> None:
    pair = TorchPair()
    bounds = SGVB(2).bounds(pair.model, pair.guide, X)
    assert not bounds.local.requires_grad
    assert pair.bias.grad is None


def test_a_batch_of_other_length_is_no_new_model() -> None:
    pair, objective = TorchPair(), SGVB()
    program = objective.read(pair.model, pair.guide, X)
    assert objective.bounds(pair.model, pair.guide, X[:2]).local.shape == (2,)
    assert objective.read(pair.model, pair.guide, X[:2]) is program


def test_keyword_arguments_reach_both_programs() -> None:
    def model(x: Tensor, *, noise: float = 1.0) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def guide(x: Tensor, *, noise: float = 1.0) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / (1 + noise**2), noise / (1 + noise**2) ** 0.5))

    local = IWELBO(3).bounds(model, guide, x=X, noise=0.5).local
    torch.testing.assert_close(local, torch.distributions.Normal(0.0, 1.25**0.5).log_prob(X))
