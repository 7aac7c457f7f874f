"""Compiled densities are the eager ones, of whatever rows, coordinates and parameters; or they stay eager, with the reason."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from model_classes.registry import REGISTRY
from torch import nn
from torch.distributions import constraints

from pyro_aevb import AEVB, AutoAmortizedNormal, LogDensity, bdmc, hmc_posterior, log_marginal
from pyro_aevb.errors import ParticleWarning, StagingWarning, UnreliableWarning
from pyro_aevb.program import compiled_rows
from pyro_aevb.program.compiled_rows import CompiledRows, Rows
from pyro_aevb.program.proposal import GuideDensity


@pytest.fixture
def traced_only(monkeypatch):
    """Run graphs as they were traced, without compiling them."""
    monkeypatch.setattr(compiled_rows, "compile_graph", lambda graph, *tensors: torch.no_grad()(graph))


def values_and_gradients(density, u):
    live = u.clone().requires_grad_()
    found = density(live)
    gradients = [torch.autograd.grad(part, live, torch.ones_like(part), retain_graph=True, allow_unused=True)[0]
                 for part in (found.log_prior, found.log_likelihood, found.log_joint)]  # fmt: skip
    return [*found, *(torch.zeros_like(u) if gradient is None else gradient for gradient in gradients)]


def graphs(density):
    return [graph for graph in density.source.model.evaluate._graphs.values() if graph.run is not None]


def assert_same(compiled, eager, u, *, rtol=1e-9):
    for one, other in zip(values_and_gradients(compiled, u), values_and_gradients(eager, u), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=rtol, atol=rtol)
    assert graphs(compiled)


def in_double(batch):
    def convert(item):
        return item.double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item

    args, kwargs = batch
    return tuple(map(convert, args)), {name: convert(item) for name, item in kwargs.items()}


NOT_RECORDED = {"learned_offset"}
"""Models with a ``pyro.param`` that no wrapper holds."""


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("entry", REGISTRY.values(), ids=REGISTRY.keys())
def test_densities_of_every_class_of_models(entry):
    args, kwargs = in_double(entry.test_batch())
    plate = None if entry.joint and entry.name != "learned_offset" else entry.data_plate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParticleWarning)
        eager, compiled = (LogDensity(entry.model, *args, data_plate=plate, compile=flag, **kwargs)
                           for flag in (False, True))  # fmt: skip
        u = torch.randn(2, 3, eager.num_rows, eager.dim, dtype=torch.float64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StagingWarning)
            values_and_gradients(compiled, u)
    reasons = [str(item.message) for item in caught if item.category is StagingWarning]
    assert bool(reasons) == (entry.name in NOT_RECORDED), reasons
    if not reasons:
        assert_same(compiled, eager, torch.randn_like(u))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 4))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)


@pytest.mark.usefixtures("traced_only", "double")
class TestReadAnew:
    def test_other_rows_of_that_shape_run_in_one_graph(self):
        model, x = Decoder(), (torch.rand(10, 4) > 0.5).double()
        eager, compiled = LogDensity(model, x), LogDensity(model, x, compile=True)
        for rows in (slice(0, 5), slice(5, 10), torch.tensor([9, 1, 1, 0, 4])):
            assert_same(compiled.rows(rows), eager.rows(rows), torch.randn(3, 5, 2))
        assert len(graphs(compiled)) == 1
        assert_same(compiled.rows(slice(0, 2)), eager.rows(slice(0, 2)), torch.randn(3, 2, 2))
        assert len(graphs(compiled)) == 2

    def test_parameters_and_statistics_that_change(self):
        model, x = Decoder(), (torch.rand(5, 4) > 0.5).double()
        eager, compiled = LogDensity(model, x), LogDensity(model, x, compile=True)
        u = torch.randn(3, 5, 2)
        assert_same(compiled, eager, u)
        before = compiled.log_joint(u.requires_grad_())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
            model.net[2].running_mean.add_(1.0)
        assert_same(compiled, eager, u.detach())
        assert not torch.allclose(compiled.log_joint(u), before)
        assert len(graphs(compiled)) == 1
        model.net[3] = nn.Linear(5, 4)
        assert_same(compiled, eager, u.detach())

    def test_tensors_from_outside_that_are_written_into(self, monkeypatch):
        # a compiler writes what is no input into its code
        monkeypatch.setattr(
            compiled_rows, "compile_graph", lambda graph, *tensors: torch.no_grad()(copy.deepcopy(graph))
        )
        factor = torch.ones(4)

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z[..., None] * factor, 1.0).to_event(1), obs=x)

        x, u = torch.randn(5, 4), torch.randn(3, 5, 1)
        eager, compiled = LogDensity(model, x), LogDensity(model, x, compile=True)
        assert_same(compiled, eager, u)
        factor.mul_(2.0)
        assert_same(compiled, eager, u)
        assert len(graphs(compiled)) == 1

    def test_arguments_that_are_no_tensors(self):
        def model(x, power, y=None):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z**power, 1.0), obs=x)

        x, u = torch.randn(4), torch.randn(3, 4, 1)
        eager = [LogDensity(model, x, power) for power in (1, 3)]
        run = LogDensity(model, x, 1, compile=True).source.model.evaluate
        for density, power in zip(eager, (1, 3), strict=True):
            found = run(u[None].requires_grad_(), Rows((x, power), {"y": None}, {}))
            for one, other in zip(found, density(u), strict=True):
                torch.testing.assert_close(one[0], other)
        assert len([graph for graph in run._graphs.values() if graph.run is not None]) == 2

    def test_globals_with_leading_axes(self):
        def model(x):
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.LogNormal(mu, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        x = torch.randn(4)
        given = [{"mu": torch.randn(3)} for _ in range(2)]
        eager, compiled = (LogDensity(model, x, given=given[0], compile=flag) for flag in (False, True))
        for values in given:
            assert_same(compiled.given(values), eager.given(values), torch.randn(3, 2, 4, 1))
        assert len(graphs(compiled)) == 1

    def test_parameters_that_a_wrapper_holds(self):
        def model(x):
            scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, scale), obs=x)

        x = torch.randn(4)
        vi = AEVB(model, compile=False)
        vi.fit(x, num_epochs=1, progress=False)
        with vi._running(vi._rows((x,), {})):
            eager, compiled = LogDensity(model, x), LogDensity(model, x, compile=True)
            assert_same(compiled, eager, torch.randn(3, 4, 1))
            with torch.no_grad():
                for parameter in vi.module.program.parameters_by_name.values():
                    parameter.add_(0.5)
            assert_same(compiled, eager, torch.randn(3, 4, 1))


@pytest.mark.usefixtures("traced_only", "double")
def test_a_guide_and_its_model_are_one_graph():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal((x + 1).log() / 2, 0.5))

    x = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 0.0])
    eager, compiled = (GuideDensity(guide, LogDensity(model, x, compile=flag)) for flag in (False, True))
    for rows in (slice(0, 3), slice(3, 6)):
        u = torch.randn(5, 3, 1, requires_grad=True)
        for one, other in zip(compiled.rows(rows).path(u), eager.rows(rows).path(u), strict=True):
            torch.testing.assert_close(one, other)
            gradients = [
                torch.autograd.grad(part, u, torch.ones_like(part), retain_graph=True)[0] for part in (one, other)
            ]
            torch.testing.assert_close(*gradients)
    assert len([graph for graph in compiled._evaluate._graphs.values() if graph.run is not None]) == 1


def test_machine_code_in_float32():
    model, x = Decoder(), (torch.rand(7, 4) > 0.5).float()
    assert_same(LogDensity(model, x, compile=True), LogDensity(model, x), torch.randn(3, 7, 2), rtol=1e-5)


def normal(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class TestStaysEager:
    def test_without_a_gradient_or_unasked(self):
        compiled, asked = LogDensity(normal, torch.randn(3)), LogDensity(normal, torch.randn(3), compile=True)
        compiled.log_joint(torch.randn(3, 1, requires_grad=True))
        asked.log_joint(torch.randn(3, 1))
        with torch.no_grad():
            asked.log_joint(torch.randn(3, 1, requires_grad=True))
        assert not graphs(compiled)
        assert not graphs(asked)

    def test_branches_on_data_are_named_once(self):
        def branching(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z if z.max() < 1e9 else -z, 1.0), obs=x)

        density = LogDensity(branching, torch.randn(3), compile=True)
        with pytest.warns(StagingWarning, match=r"data-dependent.*line \d+, in branching"):
            density.log_joint(torch.randn(3, 1, requires_grad=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            density.log_joint(torch.randn(3, 1, requires_grad=True))

    def test_parameters_of_the_global_store_are_named(self):
        def stored(x):
            scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, scale))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        density = LogDensity(stored, torch.randn(3), compile=True)
        with pytest.warns(StagingWarning, match=r"\['scale'\] live in the global param store"):
            density.log_joint(torch.randn(3, 1, requires_grad=True))

    def test_wrong_machine_code_is_not_used(self, monkeypatch):
        def wrong(graph, *tensors):
            return lambda *inputs: tuple(1.001 * item for item in torch.no_grad()(graph)(*inputs))

        monkeypatch.setattr(compiled_rows, "compile_graph", wrong)
        density, eager = LogDensity(normal, torch.randn(3), compile=True), LogDensity(normal, torch.zeros(3))
        with pytest.warns(StagingWarning, match="a compiled density is not the eager one"):
            density.log_joint(torch.randn(3, 1, requires_grad=True))
        assert not graphs(density)
        assert eager.dim == density.dim


def test_auto_waits_until_it_repays(monkeypatch):
    built = []
    monkeypatch.setattr(compiled_rows._Graph, "build", lambda self, *args: built.append(self.num_evaluations))
    monkeypatch.setattr(compiled_rows, "repays", lambda operations, evaluations: evaluations > 5)
    run = CompiledRows(lambda u, *rows: (u.sum(-1),), [], "auto")
    for shape in [(1, 2, 3, 1)] * 5 + [(1, 2, 4, 1)] * 5 + [(1, 2, 3, 1)]:
        run(torch.zeros(shape, requires_grad=True), Rows((), {}, {}))
    assert built == [6]


@pytest.mark.usefixtures("traced_only", "double")
class TestDoors:
    x = torch.randn(5, dtype=torch.float64)

    @pytest.fixture(autouse=True)
    def built(self, monkeypatch):
        """Graphs must be built where compilation is asked for."""
        runs = []
        build = compiled_rows._Graph.build
        monkeypatch.setattr(
            compiled_rows._Graph, "build", lambda graph, *args: (build(graph, *args), runs.append(graph.run))
        )
        yield
        assert runs
        assert None not in runs

    def test_posterior_draws_are_the_same(self):
        settings = {"num_samples": 10, "warmup_steps": 20, "num_chains": 4, "seed": 0, "progress": False}
        guide = AutoAmortizedNormal(normal)
        guide.build(self.x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableWarning)
            warnings.simplefilter("error", StagingWarning)
            eager, compiled = (hmc_posterior(normal, self.x, guide=guide, compile=flag, **settings)
                               for flag in (False, True))  # fmt: skip
        torch.testing.assert_close(compiled.samples["z"], eager.samples["z"], rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("method", ["ais", "bridge"])
    @pytest.mark.parametrize("start", ["guide", pytest.param("prior", marks=pytest.mark.slow)])
    def test_log_marginals_are_the_same(self, method, start):
        few = {"num_temperatures": 10, "start": start} if method == "ais" else {"warmup_steps": 20, "num_draws": 20}
        guide = AutoAmortizedNormal(normal)
        guide.build(self.x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableWarning)
            warnings.simplefilter("error", StagingWarning)
            eager, compiled = (
                log_marginal(normal, guide, self.x, method=method, seed=0, progress=False, compile=flag, **few)
                for flag in (False, True)
            )
        torch.testing.assert_close(compiled.value, eager.value, rtol=1e-7, atol=1e-7)

    def test_bounds_are_the_same(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableWarning)
            warnings.simplefilter("error", StagingWarning)
            eager, compiled = (
                bdmc(normal, None, self.x, num_simulations=4, num_temperatures=10, seed=0, progress=False, compile=flag)
                for flag in (False, True)
            )
        torch.testing.assert_close(compiled.upper, eager.upper, rtol=1e-7, atol=1e-7)
