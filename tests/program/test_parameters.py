"""Where a program's parameters live: one module holds them all, Pyro's store stays empty, gradients are unchanged."""

import copy
import functools
import types
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_aevb import SGVB
from pyro_aevb.errors import AEVBWarning, ParameterError
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.parameters import (
    Program,
    detaching,
    evaluating,
    preserved_buffers,
    preserved_state,
)
from pyro_aevb.program.reach import find_modules

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)


def model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], rate[..., None]).expand([*z.shape, 3]).to_event(1), obs=x)


class Constrained(PyroModule):
    """A guide of each kind of parameter: nn.Parameter, constrained, in an inner nn.Module, frozen."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.1))
        self.scale = PyroParam(torch.tensor(0.5), constraints.positive)
        self.encoder = nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.tensor(0.3), requires_grad=False)

    def forward(self, x):
        mean = pyro.sample("mean", dist.Normal(self.loc, self.scale))
        pyro.sample("rate", dist.LogNormal(self.frozen, self.scale))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x)[..., 0] + mean, self.scale))


def with_params(x):
    loc = pyro.param("loc", torch.tensor(0.1))
    scale = pyro.param("scale", lambda: torch.tensor(0.5), constraint=constraints.positive)
    dotted = pyro.param("net.weight%1", torch.full((3,), 0.2))
    mean = pyro.sample("mean", dist.Normal(loc, scale))
    pyro.sample("rate", dist.LogNormal(loc, scale))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ dotted + mean, scale))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x):
        mean = pyro.sample("mean", dist.Normal(self.net.bias[0], 1.0))
        pyro.sample("rate", dist.LogNormal(self.net.bias[1], 1.0))
        with pyro.plate("data", len(x)):
            loc, scale = self.net(x).unbind(-1)
            pyro.sample("z", dist.Normal(loc + mean, nn.functional.softplus(scale)))


def auto_list():
    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=["mean", "rate"])))
    guide.append(AutoNormal(poutine.block(model, expose=["z"])))
    return guide


def messenger():
    """A guide that runs the model by itself, so that observed sites show in it."""
    return AutoNormalMessenger(poutine.condition(model, data={"rate": torch.tensor(1.0)}))


GUIDES = {
    "constrained PyroModule": Constrained,
    "function with pyro.param": lambda: with_params,
    "nn.Module": Plain,
    "AutoNormal": lambda: AutoNormal(model),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(model),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(model),
    "AutoLowRankMultivariateNormal": lambda: AutoLowRankMultivariateNormal(model, rank=2),
    "AutoDelta": lambda: AutoDelta(model),
    "AutoGuideList": auto_list,
    "AutoNormalMessenger": messenger,
}
every_guide = pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES.keys())


def parameters_of(guide):
    """Every unconstrained parameter that Pyro keeps, in the module or in its store."""
    held = guide.parameters() if isinstance(guide, nn.Module) else pyro.get_param_store()._params.values()
    return list(held)


def built(guide, program=model, objective=None):
    return ObjectiveModule(program, guide, objective or Trace_ELBO()).build(X)


@every_guide
def test_loss_and_gradients_are_those_of_pyro_to_the_bit(make):
    pyro.set_rng_seed(0)
    guide = make()
    guide(X)
    parameters = parameters_of(guide)
    pyro.set_rng_seed(1)
    expected = Trace_ELBO().differentiable_loss(model, guide, X)
    gradients = torch.autograd.grad(expected, [p for p in parameters if p is not getattr(guide, "frozen", None)])
    values = [parameter.detach().clone() for parameter in parameters]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    module = built(make())
    assert all(torch.equal(a, b) for a, b in zip(values, module.parameters(), strict=True))
    pyro.set_rng_seed(1)
    loss = module(X)
    loss.backward()
    assert torch.equal(loss, expected)
    own = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(gradients, own, strict=True))
    assert not pyro.get_param_store().keys()


@every_guide
def test_building_makes_every_parameter_and_leaves_store_and_noise(make):
    guide = make()
    state = torch.get_rng_state()
    module = built(guide)
    assert torch.equal(torch.get_rng_state(), state)
    names = {name for name, _ in module.named_parameters()}
    assert names
    before = {id(parameter) for parameter in module.parameters()}
    for _ in range(3):
        module(X).backward()
    assert {id(parameter) for parameter in module.parameters()} == before
    assert {name for name, _ in module.named_parameters()} == names
    assert all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())
    assert not pyro.get_param_store().keys()


@every_guide
@pytest.mark.parametrize("gradient", ["reparam", "stl"])
def test_parameters_outlive_training_steps_and_move(make, gradient):
    guide = make()
    program = poutine.condition(model, data={"rate": torch.tensor(1.0)}) if make is messenger else model
    module = built(guide, program, objective=SGVB(gradient=gradient, kl="sampled"))
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.01)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.zero_grad()
            module(X).backward()
            optimizer.step()
    after = dict(module.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name, parameter in after.items() if parameter.requires_grad}


def test_the_users_own_module_holds_the_trained_values():
    guide = Constrained()
    module = built(guide)
    torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    assert {id(p) for p in guide.parameters()} == {id(p) for p in module.parameters()}


def test_frozen_parameters_stay_frozen():
    guide = Constrained()
    module = built(guide)
    module(X).backward()
    assert not guide.frozen.requires_grad
    assert guide.frozen.grad is None


# Networks that a function reaches

decoder = nn.Linear(1, 3)


class Holder:
    def __init__(self):
        self.nets = {"decoder": [nn.Linear(1, 3)]}

    def __call__(self, x):
        return _decoded(x, self.nets["decoder"][0])


def _decoded(x, net):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)


def by_global(x):
    pyro.module("decoder", decoder)
    _decoded(x, decoder)


def by_call_of_another_function(x):
    by_global(x)


namespace = types.ModuleType("namespace")
namespace.net = nn.Linear(1, 3)


def by_attribute_of_a_python_module(x):
    _decoded(x, namespace.net)


class UsesGlobal(nn.Module):
    def forward(self, x):
        _decoded(x, decoder)


class KeepsList(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = [nn.Linear(1, 3)]

    def forward(self, x):
        _decoded(x, self.nets[0])


def by_closure():
    net = nn.Linear(1, 3)
    return lambda x: _decoded(x, net)


def by_default():
    def program(x, net=nn.Linear(1, 3)):  # noqa: B008
        _decoded(x, net)

    return program


REACHES = {
    "global": lambda: by_global,
    "another function": lambda: by_call_of_another_function,
    "closure": by_closure,
    "default argument": by_default,
    "partial": lambda: functools.partial(_decoded, net=nn.Linear(1, 3)),
    "container in an object": Holder,
    "method": lambda: Holder().__call__,
    "python module": lambda: by_attribute_of_a_python_module,
    "global in a module's forward": UsesGlobal,
    "list in a module": KeepsList,
    "scaled": lambda: poutine.scale(by_closure(), scale=2.0),
    "masked by a decorator": lambda: poutine.mask(mask=torch.tensor(True))(by_closure()),
}


@pytest.mark.parametrize("make", REACHES.values(), ids=REACHES.keys())
def test_networks_are_found(make):
    def guide(x):
        loc = pyro.param("loc", torch.zeros(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    module = built(guide, make())
    shapes = sorted(tuple(parameter.shape) for parameter in module.parameters())
    assert shapes == [(1,), (3,), (3, 1)]
    module(X).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_network_that_only_pyro_module_knows_is_trained():
    hidden = {}

    def fetch():
        return hidden.setdefault("net", nn.Linear(1, 3))

    def program(x):
        _decoded(x, pyro.module("net", fetch()))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    module = built(guide, program)
    assert {id(p) for p in module.parameters()} == {id(p) for p in hidden["net"].parameters()}


def test_tied_parameters_are_one():
    shared = nn.Linear(3, 3)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = shared
            self.second = shared
            self.weight = shared.weight

        def forward(self, x):
            pyro.sample("mean", dist.Normal(self.weight.sum(), 1.0))
            pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.second(self.first(x)).sum(-1), 1.0))

    guide = Tied()
    module = built(guide, objective=SGVB(gradient="stl"))
    assert len(list(module.parameters())) == 2
    module(X).backward()
    assert isinstance(guide.first.weight, nn.Parameter)
    assert guide.first.weight is guide.weight
    assert guide.weight.grad is not None
    assert find_modules(guide, shared) == [guide]


# Before the first step


def test_parameters_before_building_are_refused_only_where_some_may_be_missing():
    for guide in (with_params, AutoNormal(model)):
        module = ObjectiveModule(model, guide, SGVB())
        with pytest.raises(ParameterError, match=r"build\(\*batch\)"):
            list(module.parameters())
        with pytest.raises(ParameterError, match="build"):
            module.state_dict()
        module.build(X)
        assert module.state_dict().keys() >= {name for name, _ in module.named_parameters()}

    def plain(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    module = ObjectiveModule(nn.Module.__call__.__get__(UsesGlobal()), Plain(), SGVB())
    assert len(list(module.parameters())) == 4
    assert module.state_dict()


class MakesParam(nn.Module):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(1)), 1.0).to_event(1))


def test_a_module_that_uses_pyro_param_may_lack_parameters_too():
    module = ObjectiveModule(KeepsList(), MakesParam(), SGVB())
    with pytest.raises(ParameterError):
        list(module.parameters())
    assert len(list(module.build(X).parameters())) == 3


def test_an_automatic_guide_loads_what_another_one_saved():
    first, second = built(AutoNormal(model)), ObjectiveModule(model, AutoNormal(model), SGVB())
    for parameter in first.parameters():
        parameter.data.uniform_()
    second.build(X)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_parameter_that_appears_after_building_is_an_error():
    def guide(x):
        loc = pyro.param("late", torch.zeros(1)) if len(x) == 2 else torch.zeros(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    module = built(guide, by_closure())
    with pytest.raises(ParameterError, match=r"'late' appeared after"):
        module(X[:2])


# The global store


def trained(guide_name, value):
    def guide(x):
        scale = pyro.param("scale", torch.tensor(value), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), scale).to_event(1))

    guide.__name__ = guide_name
    return built(guide, by_closure()).program


def test_two_programs_of_equal_names_never_collide():
    first, second = trained("a", 2.0), trained("b", 3.0)
    assert float(first.pyro_params()["scale"]) == pytest.approx(2.0)
    assert float(second.pyro_params()["scale"]) == pytest.approx(3.0)
    assert not pyro.get_param_store().keys()


def test_values_are_written_back_under_the_users_names_and_rewritten():
    program = trained("a", 2.0)
    program.write_param_store()
    assert float(pyro.param("scale")) == pytest.approx(2.0)
    program.parameters_by_name["scale"].data.fill_(0.0)
    assert float(pyro.param("scale")) == pytest.approx(2.0)  # a copy
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program.write_param_store()
    assert float(pyro.param("scale")) == pytest.approx(1.0)
    assert pyro.get_param_store()._constraints["scale"] is constraints.positive


def test_a_name_of_something_else_is_kept_with_a_warning():
    pyro.param("scale", torch.tensor(7.0))
    program = trained("a", 2.0)
    with pytest.warns(AEVBWarning, match=r"\['scale'\]"):
        program.write_param_store()
    assert float(pyro.param("scale")) == 7.0
    pyro.clear_param_store()
    program.write_param_store()
    other = trained("b", 3.0)
    with pytest.warns(AEVBWarning, match="scale"):
        other.write_param_store()
    assert float(pyro.param("scale")) == pytest.approx(2.0)


def test_a_filled_store_is_not_used_and_not_changed():
    pyro.param("loc", torch.tensor(9.0))
    module = built(with_params)
    assert float(module.program.pyro_params()["loc"]) == pytest.approx(0.1)
    module(X)
    assert list(pyro.get_param_store().keys()) == ["loc"]
    assert float(pyro.param("loc")) == 9.0


def test_an_error_inside_leaves_the_store_too():
    program = Program(model, with_params)
    pyro.param("mine", torch.zeros(()))

    def fail():
        with program.running():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(pyro.get_param_store().keys()) == ["mine"]


# Pyro's module_local_params


@pytest.mark.parametrize("make", [Constrained, Plain, lambda: AutoNormal(model)])
def test_module_local_params_give_the_same(make):
    pyro.set_rng_seed(0)
    reference = built(make())
    pyro.set_rng_seed(2)
    expected = reference(X)
    expected.backward()
    with pyro.settings.context(module_local_params=True):
        pyro.set_rng_seed(0)
        module = built(make())
        module.load_state_dict(reference.state_dict())
        pyro.set_rng_seed(2)
        loss = module(X)
        loss.backward()
    assert torch.equal(loss, expected)
    for a, b in zip(reference.parameters(), module.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


def test_switching_to_module_local_params_too_late_is_explained():
    guide = Constrained()
    with (
        pyro.settings.context(module_local_params=True),
        pytest.raises(ParameterError, match=r"module_local_params.*before"),
    ):
        built(guide)


def test_pyro_param_in_functions_works_with_module_local_params():
    with pyro.settings.context(module_local_params=True):
        module = built(with_params)
        module(X).backward()
    assert len(list(module.parameters())) == 3


# Automatic guides and copies


def test_an_automatic_guide_keeps_its_model():
    guide = AutoNormal(model)
    before = guide.model
    module = built(guide)
    module(X)
    module.state_dict()
    assert guide.model is before


# Detached parameters


def detached_parameters(program):
    """A program that runs with its parameters detached."""

    def run(*args):
        with detaching(find_modules(program)):
            return program(*args)

    return run


@every_guide
@pytest.mark.parametrize("inside", [False, True], ids=["ambient store", "inside running()"])
def test_detached_parameters_get_no_gradient_and_ancestors_stay_live(make, inside):
    guide = make()
    module = built(guide)
    ancestor = torch.tensor(0.5, requires_grad=True)
    given = {"mean": ancestor}

    def density():
        if make is GUIDES["AutoDelta"]:
            return poutine.trace(detached_parameters(guide)).get_trace(X).nodes["mean"]["value"].sum()
        trace = poutine.trace(poutine.condition(detached_parameters(guide), given)).get_trace(X)
        trace.compute_log_prob()
        return trace.log_prob_sum() + sum(
            node["value"].sum() for node in trace.nodes.values() if node["type"] == "sample" and node["value"].dim()
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if inside:
            with module.program.running():
                total = density()
        else:
            total = density()
    if total.requires_grad:
        total.backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    if make in (Constrained, Plain, GUIDES["function with pyro.param"]):
        assert ancestor.grad is not None
    with module.program.running():
        after = poutine.trace(guide).get_trace(X)
    values = [node["value"] for node in after.nodes.values() if node["type"] == "sample"]
    assert any(value.requires_grad for value in values)
    assert all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())


def test_detaching_keeps_pyro_modules_param_statements_quiet():
    net = nn.Linear(3, 1)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detached_parameters(guide)(X)
    assert net.weight.requires_grad


def test_recurrent_networks_survive_detaching():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(1, 2, batch_first=True)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.gru(x[..., None])[0][:, -1, :1], 1.0).to_event(1))

    guide = Recurrent()
    values = torch.zeros(4, 1)
    live = poutine.trace(poutine.condition(guide, {"z": values})).get_trace(X)
    fixed = poutine.trace(poutine.condition(detached_parameters(guide), {"z": values})).get_trace(X)
    again = poutine.trace(poutine.condition(guide, {"z": values})).get_trace(X)
    assert torch.equal(live.log_prob_sum(), fixed.log_prob_sum())
    assert not fixed.nodes["z"]["fn"].base_dist.loc.requires_grad
    again.log_prob_sum().backward()
    assert all(parameter.grad is not None for parameter in guide.parameters())


def test_parameters_come_back_after_an_error():
    class Fails(Plain):
        def forward(self, x):
            super().forward(x)
            raise ZeroDivisionError

    guide = Fails()
    with pytest.raises(ZeroDivisionError):
        detached_parameters(guide)(X)
    assert all(parameter.requires_grad for parameter in guide.parameters())


# Buffers and modes


class Rebinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return x


def test_buffers_come_back_whether_written_into_or_replaced():
    norm, rebinds = nn.BatchNorm1d(3), Rebinds()
    buffer, mean = rebinds.count, norm.running_mean
    state = torch.get_rng_state()
    with preserved_buffers([norm, rebinds]):
        norm(torch.randn(4, 3))
        rebinds(X)
    assert rebinds.count is buffer
    assert norm.running_mean is mean
    assert torch.equal(mean, torch.zeros(3))
    assert float(buffer) == 0.0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_backward_pass_is_possible_after_buffers_were_preserved():
    norm = nn.BatchNorm1d(3)
    first = norm(X.clone().requires_grad_())
    with preserved_buffers([norm]), torch.no_grad():
        norm(X)
    first.square().sum().backward()
    assert norm.weight.grad is not None


def test_modes_come_back_one_by_one():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    net[1].eval()
    with evaluating(net):
        assert not net[0].training
    assert [module.training for module in net.modules()] == [True, True, False]
    with preserved_state([net]):
        assert not net.training
    assert [module.training for module in net.modules()] == [True, True, False]


def test_a_lazy_module_is_made_by_building():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())

        def forward(self, x):
            pyro.sample("mean", dist.Normal(0.0, 1.0))
            pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                loc, scale = self.net(x).unbind(-1)
                pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)))

    module = built(Lazy())
    assert {tuple(parameter.shape) for parameter in module.parameters()} == {(2, 3), (2,)}
    module(X).backward()


def test_a_copy_of_a_program_keeps_its_own_values():
    program = trained("a", 2.0)
    other = copy.deepcopy(program.parameters_by_name)
    other["scale"].data.fill_(0.0)
    assert float(program.pyro_params()["scale"]) == pytest.approx(2.0)
