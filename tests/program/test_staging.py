"""A recorded program gives the numbers and gradients of an eager one, or is not used, with the reason."""

import functools
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from staged_programs import (
    CASES,
    LESS_NOISE,
    NOISE_AGAIN,
    OBJECTIVES,
    PROGRAMS,
    Autoencoder,
    Convolutional,
    batch,
    methods,
)
from torch import nn

from pyro_aevb import IWELBO, SGVB
from pyro_aevb.errors import StagingWarning
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.staging import record, stage


def run(module, x, parameters, *, seed=5):
    pyro.set_rng_seed(seed)
    loss = module(x)
    return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)


def assert_same(eager, recorded):
    tolerance = 1e-5 if eager[0].dtype == torch.float32 else 1e-10
    assert torch.isfinite(eager[0])
    for a, b in zip((eager[0], *eager[1]), (recorded[0], *recorded[1]), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(a.abs().max()))


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_loss_and_gradients_are_those_of_an_eager_run(name, objective):
    model, guide = PROGRAMS[name]()
    x = batch(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = ObjectiveModule(model, guide, OBJECTIVES[objective]()).build(x)
        graph = record(module, x)
    assert graph is not module
    parameters = list(module.parameters())
    other = torch.randn_like(x)
    for inputs in (x, other):
        assert_same(run(module, inputs, parameters), run(graph, inputs, parameters))
    assert {id(p) for p in graph.parameters()} <= {id(p) for p in parameters}
    assert graph(x).item() != graph(x).item()  # fresh noise at each call


@pytest.mark.parametrize("objective", ["A", "stl", "dreg"])
def test_float64_agrees_to_ten_digits(objective):
    torch.set_default_dtype(torch.float64)
    model, guide = methods(Autoencoder())
    x = torch.randn(6, 4)
    graph = stage(OBJECTIVES[objective](), model, guide, x)
    module = ObjectiveModule(model, guide, OBJECTIVES[objective]()).build(x)
    parameters = list(module.parameters())
    assert parameters[0].dtype == torch.float64
    assert_same(run(module, x, parameters), run(graph, x, parameters))


@pytest.mark.parametrize("case", sorted(NOISE_AGAIN | LESS_NOISE), ids=", ".join)
def test_noise_that_is_needed_twice_is_not_recorded(case):
    model, guide = PROGRAMS[case[0]]()
    reason = "the recorded loss is" if case in NOISE_AGAIN else "more or fewer random numbers"
    with pytest.warns(StagingWarning, match=reason):
        module = stage(OBJECTIVES[case[1]](), model, guide, batch(case[0]))
    assert isinstance(module, ObjectiveModule)


def test_pyros_own_loss_runs_eagerly_with_its_cause():
    with pytest.warns(StagingWarning, match=r"can't be recorded \(\w+: .*data-dependent"):
        module = stage(Trace_ELBO(), *PROGRAMS["nn.Module"](), torch.randn(6, 4))
    assert torch.isfinite(module(torch.randn(6, 4)))


def test_the_scale_reaches_the_graph():
    model, guide = PROGRAMS["nn.Module"]()
    x = torch.randn(6, 4)
    small, large = (stage(SGVB(), model, guide, x, num_data=n) for n in (6, 600))
    pyro.set_rng_seed(1)
    one = small(x).item()
    pyro.set_rng_seed(1)
    assert large(x).item() == pytest.approx(100 * one, rel=1e-5)


def test_a_schedule_of_the_kl_weight_reaches_the_graph():
    model, guide = PROGRAMS["nn.Module"]()
    x = torch.randn(6, 4)
    objective = SGVB(kl_weight=lambda step: min(1.0, step / 10))
    module = ObjectiveModule(model, guide, objective).build(x)
    graph = record(module, x)
    assert graph is not module
    losses = []
    for step in (0, 5, 10):
        objective.set_step(step)
        assert_same(run(module, x, list(module.parameters())), run(graph, x, list(module.parameters())))
        losses.append(run(graph, x, list(module.parameters()))[0].item())
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    assert losses[2] > losses[0] + 0.1


def test_training_the_graph_trains_the_module_and_its_running_statistics():
    module = Convolutional()
    x = torch.randn(6, 1, 4, 4)
    graph = stage(SGVB(), module.model, module.guide, x)
    assert not isinstance(graph, ObjectiveModule)
    norm = module.encoder[1]
    assert int(norm.num_batches_tracked) == 0
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for step in (1, 2):
        expected = nn.BatchNorm2d(2)
        expected.load_state_dict(norm.state_dict())
        expected(module.encoder[0](x))
        optimizer.zero_grad()
        graph(x).backward()
        optimizer.step()
        assert int(norm.num_batches_tracked) == step
        torch.testing.assert_close(norm.running_mean, expected.running_mean)
    trainable = zip(module.parameters(), before, strict=True)
    assert sum(torch.equal(a, b) for a, b in trainable) <= 1  # a bias before BatchNorm has no gradient


def test_dropout_draws_fresh_masks():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100))

        def forward(self, x):
            return nn.functional.dropout(self.weight * x, 0.5).sum()

    module = Drops()
    graph = record(module, torch.ones(()))
    assert graph is not module
    assert len({graph(torch.ones(())).item() for _ in range(5)}) > 1


# The gate


class Loss(nn.Module):
    """A module with one parameter whose loss is written in ``call``."""

    def __init__(self, call):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("count", torch.zeros(()))
        self.call = call

    def forward(self, x):
        return self.call(self, x)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return -7.0 * gradient


def custom_backward(self, x):
    return (Reversed.apply(self.a) * x).sum()


def tensor_hook(self, x):
    y = self.a * x
    y.register_hook(lambda gradient: 5 * gradient)
    return y.sum()


class Counter:
    value = 0


def changing_number(self, x):
    Counter.value += 1
    return Counter.value * (self.a * x).sum()


def numpy_noise(self, x):
    return np.random.rand() * (self.a * x).sum()


def python_noise(self, x):
    return random.random() * (self.a * x).sum()


def rebinds_buffer(self, x):
    self.count = self.count + 1
    return (self.a * x).sum()


def counts_runs(self, x):
    self.num_runs = getattr(self, "num_runs", 0) + 1
    return (2.0 if self.num_runs > 1000 else 1.0) * (self.a * x).sum()


def branch(self, x):
    return (self.a * x).sum() if x.sum() > 0 else (self.a * x).square().sum()


CAUGHT = {
    "custom backward": (custom_backward, "gradient of parameter 'a' is not the eager one"),
    "tensor hook": (tensor_hook, "gradient of parameter 'a' is not the eager one"),
    "a number that changes": (changing_number, "the recorded loss is"),
    "noise of numpy": (numpy_noise, "the recorded loss is"),
    "noise of Python": (python_noise, "the recorded loss is"),
    "a buffer that is replaced": (rebinds_buffer, r"replaces the buffers \['count'\]"),
    "a number that matters later": (counts_runs, r"changes the attributes \['num_runs'\]"),
    "a branch on data": (branch, r"can't be recorded \(\w+: .*data-dependent"),
}


@pytest.mark.parametrize(("call", "message"), CAUGHT.values(), ids=CAUGHT.keys())
def test_what_a_recording_gets_wrong_runs_eagerly_with_its_cause(call, message):
    module, x = Loss(call), torch.tensor([1.0, 2.0])
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with pytest.warns(StagingWarning, match=message) as caught:
        assert record(module, x) is module
    assert len([item for item in caught if item.category is StagingWarning]) == 1
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert float(module.count) == 0.0
    loss = module(x)
    loss.backward()
    assert module.a.grad is not None


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_modules_are_called_at_each_run(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

        def forward(self, x):
            return self.layers(x).sum()

    module, x, calls = Net(), torch.ones(3, 2), []
    getattr(module.layers[1], f"register_{kind}_hook")(lambda *_: calls.append(1))
    with pytest.warns(StagingWarning, match=r"modules of types \['Linear'\] have hooks"):
        run = record(module, x)
    calls.clear()
    for _ in range(3):
        run(x).backward()
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_hooks_by_which_torch_computes_a_weight_are_recorded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.utils.weight_norm(nn.Linear(2, 1))

        def forward(self, x):
            return self.layer(x).square().sum()

    module, x = Net(), torch.randn(3, 2)
    graph = record(module, x)
    assert graph is not module
    parameters = list(module.parameters())
    assert_same(run(module, x, parameters), run(graph, x, parameters))


def test_the_eager_gradient_is_what_the_user_wrote():
    x = torch.tensor([1.0, 2.0])
    for call, factor in ((custom_backward, -7.0), (tensor_hook, 5.0)):
        module = Loss(call)
        with pytest.warns(StagingWarning):
            record(module, x)(x).backward()
        assert float(module.a.grad) == pytest.approx(factor * 3.0)


@functools.cache
def cached_network():
    return nn.Linear(1, 4)


def test_a_network_that_is_not_found_is_not_recorded():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(cached_network()(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(1)), 1.0).to_event(1))

    with pytest.warns(StagingWarning, match=r"shapes .*\[4, 1\].*pyro.module"):
        module = stage(SGVB(), model, guide, torch.randn(6, 4))
    assert isinstance(module, ObjectiveModule)

    def registered(x):
        pyro.module("net", cached_network())
        model(x)

    with pytest.warns(StagingWarning):
        stage(SGVB(), registered, guide, torch.randn(6, 4))(torch.randn(6, 4)).backward()
    assert cached_network().weight.grad is not None


def boolean_index(self, x):
    return (self.a * x[x > 0]).sum()


def tensor_as_number(self, x):
    return self.a * x.sum().item()


def stops_gradients(self, x):
    with torch.no_grad():
        weight = (self.a * x).softmax(0)
    return (weight * self.a.detach() * self.a * x).sum()


def writes_into_its_batch(self, x):
    return (self.a * x.mul_(2.0)).sum()


def test_a_program_that_writes_into_its_batch_gets_it_as_it_is():
    module, x = Loss(writes_into_its_batch), torch.tensor([1.0, -3.0])
    graph = record(module, x)
    assert graph is not module
    assert x.tolist() == [1.0, -3.0]
    for run_ in (module, graph):
        assert_same(run(run_, x.clone(), [module.a]), (torch.tensor(-8.0), (torch.tensor(-4.0),)))
    columns = torch.arange(12.0).reshape(3, 4)[:, ::2]
    record(Loss(writes_into_its_batch), columns)
    assert columns.tolist() == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]


@pytest.mark.parametrize("call", [boolean_index, tensor_as_number, stops_gradients])
def test_what_a_recording_gets_right_is_recorded(call):
    module = Loss(call)
    graph = record(module, torch.tensor([1.0, -2.0]))
    assert graph is not module
    for x in (torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])):
        assert_same(run(module, x, [module.a]), run(graph, x, [module.a]))


def test_recording_restores_generators_buffers_and_store():
    module = Convolutional()
    x = torch.randn(6, 1, 4, 4)
    pyro.param("mine", torch.ones(()))
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), [b.clone() for b in module.buffers()]
    graph = stage(IWELBO(3, gradient="dreg"), module.model, module.guide, x)
    assert not isinstance(graph, ObjectiveModule)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), before[2], strict=True))
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert module.training


def test_frozen_parameters_stay_frozen_in_the_graph():
    module = Autoencoder()
    module.decoder.requires_grad_(False)
    x = torch.randn(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StagingWarning)
        graph = stage(SGVB(), module.model, module.guide, x)
    graph(x).backward()
    assert all(p.grad is None for p in module.decoder.parameters())
    assert all(p.grad is not None for p in module.encoder.parameters())


def test_a_program_without_parameters_is_recorded_too():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    graph = stage(SGVB(kl="sampled"), model, guide, torch.zeros(3))
    assert not isinstance(graph, ObjectiveModule)
    expected = -dist.Normal(0.0, 2.0**0.5).log_prob(torch.zeros(3)).sum()
    torch.testing.assert_close(graph(torch.zeros(3)), expected)
