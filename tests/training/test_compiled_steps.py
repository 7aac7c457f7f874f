"""Compiled steps leave the parameters, buffers and state that eager steps leave, or are not used, with the reason."""

import copy
import functools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pyro
import pytest
import torch
from staged_programs import CASES, OBJECTIVES, PROGRAMS, Autoencoder, batch, methods
from torch import nn

from pyro_aevb import AEVB, SGVB, fit
from pyro_aevb.errors import ModelError, NonFiniteError, StagingWarning
from pyro_aevb.program import compiling
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.staging import record
from pyro_aevb.program.unchanged import Unchanged
from pyro_aevb.training import whole_step
from pyro_aevb.training.data import Batch
from pyro_aevb.training.staged import StagedLoss, Staging
from pyro_aevb.training.stepper import Stepper
from pyro_aevb.training.whole_step import WholeStep

COMPILED = [("pyro.param, global", "A"), ("nn.Module", "B")]
"""What `make test` compiles to machine code; `make test-slow` all."""


@pytest.fixture
def traced_only(monkeypatch):
    """Run the graph of a whole step as it was traced, without compiling it."""
    monkeypatch.setattr(whole_step, "compile_graph", lambda graph, *tensors: torch.no_grad()(graph))


def adam(parameters, **settings):
    """An Adam whose eps does not make steps of rounding errors, where a gradient is 0 (a bias before BatchNorm)."""
    return torch.optim.Adam(parameters, **{"lr": 0.01, "eps": 1e-2, "foreach": False, **settings})


def steppers(name, objective, *, make=adam, **settings):
    """Return an eager and a compiled stepper of two copies of one program, and their modules."""
    found = []
    for is_compiled in (False, True):
        torch.manual_seed(7)
        model, guide = PROGRAMS[name]() if isinstance(name, str) else name()
        module = ObjectiveModule(model, guide, objective(), num_data=60).build(batch(name))
        found += [Stepper(module.train(), make, staging=Staging(compile=is_compiled), **settings), module]
    eager, eager_module, compiled, module = found
    module.load_state_dict(eager_module.state_dict())
    return eager, compiled, eager_module, module


def assert_same_steps(eager, compiled, batches):
    """Take the same steps under one seed, and compare bounds, parameters, buffers and the optimizers' states."""
    bounds = []
    for stepper in (eager, compiled):
        pyro.set_rng_seed(0)
        with pyro.validation_enabled(False):
            bounds.append([stepper.step(Batch((rows,), {})) for rows in batches])
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-5 if batches[0].dtype == torch.float32 else 1e-10, nan_ok=True)
    eager.finish()
    compiled.finish()
    assert compiled.staging.decision.startswith("compiled")
    tolerance = 2e-4 if batches[0].dtype == torch.float32 else 1e-9
    ours, theirs = compiled.module.state_dict(), eager.module.state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)
    mine, other = (stepper.optimizer.state_dict()["state"] for stepper in (compiled, eager))
    assert mine.keys() == other.keys()
    for key, state in other.items():
        for name, value in state.items():
            torch.testing.assert_close(mine[key][name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(("name", "objective"), CASES)
def test_steps_are_those_of_torch(name, objective):
    torch.set_default_dtype(torch.float64)
    eager, compiled, *_ = steppers(name, OBJECTIVES[objective])
    assert_same_steps(eager, compiled, [batch(name) for _ in range(3)])


@pytest.mark.parametrize(("name", "objective"), COMPILED, ids=[", ".join(case) for case in COMPILED])
def test_machine_code_takes_these_steps(name, objective):
    eager, compiled, *_ = steppers(name, OBJECTIVES[objective])
    assert_same_steps(eager, compiled, [batch(name) for _ in range(3)])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "objective"), CASES)
def test_machine_code_takes_all_steps(name, objective):
    torch.set_default_dtype(torch.float64)
    eager, compiled, *_ = steppers(name, OBJECTIVES[objective])
    assert_same_steps(eager, compiled, [batch(name) for _ in range(3)])


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (functools.partial(adam, weight_decay=0.1), {}),
        (functools.partial(adam, betas=(0.5, 0.9), eps=1e-3), {}),
        (adam, {"clip_norm": 0.1}),
        (functools.partial(adam, fused=True, foreach=None), {}),
    ],
    ids=["weight decay", "betas", "clipped", "fused"],
)
def test_settings_of_adam_are_followed(make, settings):
    torch.set_default_dtype(torch.float64)
    eager, compiled, *_ = steppers("nn.Module", OBJECTIVES["B"], make=make, **settings)
    assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(4)])


@pytest.mark.usefixtures("traced_only")
def test_batches_of_other_shapes_run_in_parts_between_whole_steps():
    torch.set_default_dtype(torch.float64)
    eager, compiled, *_ = steppers("nn.Module", OBJECTIVES["B"])
    assert_same_steps(eager, compiled, [torch.randn(rows, 4) for rows in (6, 6, 2, 6, 3, 3, 6)])


@pytest.mark.usefixtures("traced_only")
def test_a_learning_rate_that_changes_is_followed():
    torch.set_default_dtype(torch.float64)
    eager, compiled, *_ = steppers("nn.Module", OBJECTIVES["B"])
    for rate in (0.1, 0.001):
        for stepper in (eager, compiled):
            stepper.optimizer.param_groups[0]["lr"] = rate
        assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(2)])


@pytest.mark.usefixtures("traced_only")
def test_a_kl_weight_that_changes_is_followed():
    torch.set_default_dtype(torch.float64)
    eager, compiled, *_ = steppers("nn.Module", lambda: SGVB(kl_weight=lambda step: step / 4))
    assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(4)])


@pytest.mark.usefixtures("traced_only")
def test_frozen_parameters_stay_and_are_read_anew():
    torch.set_default_dtype(torch.float64)

    def frozen():
        module = Autoencoder()
        module.decoder[0].requires_grad_(False)
        return methods(module)

    eager, compiled, *modules = steppers(frozen, OBJECTIVES["B"])
    assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(2)])
    for module in modules:
        frozen_weight = next(p for p in module.parameters() if not p.requires_grad)
        with torch.no_grad():
            frozen_weight.add_(0.5)
    assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(2)])


@pytest.mark.usefixtures("traced_only")
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    _, compiled, _, module = steppers("convolution and BatchNorm", OBJECTIVES["B"])
    good = batch("convolution and BatchNorm")
    compiled.step(Batch((good,), {}))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in compiled.optimizer.state.values()]
    bound = compiled.step(Batch((good * torch.inf,), {}))
    assert bound != bound
    assert (compiled.num_steps, compiled.num_skipped) == (1, 1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, compiled.optimizer.state.values(), strict=True))
    compiled.finish()
    assert {float(state["step"]) for state in compiled.optimizer.state.values()} == {1.0}
    for _ in range(9):
        compiled.step(Batch((good * torch.inf,), {}))
    with pytest.raises(NonFiniteError, match=r"'x'|'z'"):
        compiled.step(Batch((good * torch.inf,), {}))


def test_another_optimizer_gets_a_compiled_loss(monkeypatch):
    # torch's own way of running a recorded graph without machine code
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda graph, **_: torch_compile(graph, backend="aot_eager"))
    make = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    eager, compiled, *_ = steppers("nn.Module", OBJECTIVES["B"], make=make)
    assert_same_steps(eager, compiled, [torch.randn(6, 4), torch.randn(6, 4), torch.randn(2, 4)])
    assert compiled.staging.decision.startswith("compiled: loss and gradient,")


class Branching(Autoencoder):
    def guide(self, x):
        super().guide(x if x.sum() > 0 else -x)


def test_a_program_that_cannot_be_recorded_runs_eagerly_with_one_warning():
    program = Branching()
    with pytest.warns(StagingWarning, match=r"data-dependent.*line \d+, in guide") as caught:
        result = fit(program.model, program.guide, SGVB(), torch.randn(60, 4), batch_size=20, num_epochs=2,
                     compile=True, progress=False)  # fmt: skip
    assert len([item for item in caught if item.category is StagingWarning]) == 1
    assert result.execution.startswith("eager")
    assert result.num_steps == 6


def test_a_missing_compiler_is_named_and_steps_run_eagerly(tmp_path):
    # in a process of its own: Inductor remembers for good that there is none
    script = """
import warnings, torch
from pyro_aevb import SGVB, fit
from staged_programs import Autoencoder
program = Autoencoder()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = fit(program.model, program.guide, SGVB(), torch.randn(60, 4), num_epochs=1, compile=True, progress=False)
print(result.num_steps, result.execution, *[item.message for item in caught], sep="|")
"""
    settings = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    tests = Path(__file__).resolve().parent.parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    job = subprocess.run([sys.executable, "-c", script], env=os.environ | settings | {"PYTHONPATH": paths}, check=True,
                         capture_output=True, text=True)  # fmt: skip
    assert job.stdout.startswith("1|eager: ")
    assert re.search(r"\|Steps run eagerly: .*[Cc]ompiler", job.stdout)


def test_a_number_read_off_the_data_is_not_baked_in():
    class Scaled(Autoencoder):
        def guide(self, x):
            super().guide(x * x.sum().item())

    program = Scaled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(program.model, program.guide, SGVB(), torch.randn(60, 4), num_epochs=1, compile=True,
                     progress=False)  # fmt: skip
    assert result.execution.startswith("eager")
    assert [item for item in caught if item.category is StagingWarning]


@pytest.mark.usefixtures("traced_only")
def test_wrong_machine_code_is_not_used(monkeypatch):
    def wrong(graph, *tensors):
        def run(*inputs):
            found = graph(*inputs)
            inputs[len(list(module.parameters())) + 1].mul_(1.001)
            return found

        return torch.no_grad()(run)

    monkeypatch.setattr(whole_step, "compile_graph", wrong)
    module = ObjectiveModule(*PROGRAMS["nn.Module"](), SGVB()).build(batch("nn.Module"))
    loss = StagedLoss(module)
    graph = record(loss, batch("nn.Module"))
    step = WholeStep(graph, adam(module.parameters()), (batch("nn.Module"),), {})
    assert "gradient of parameter" in step.difference


class TestFit:
    x = torch.randn(70, 4)

    @pytest.mark.usefixtures("traced_only")
    @pytest.mark.parametrize("data", [x, (x,), {"x": x}], ids=["tensor", "tuple", "mapping"])
    def test_parameters_are_those_of_an_eager_fit(self, data):
        found = []
        for is_compiled in (False, True):
            torch.manual_seed(0)
            program = Autoencoder()
            result = AEVB(program.model, program.guide, compile=is_compiled).fit(
                data, num_epochs=3, batch_size=20, validation=data, seed=3, progress=False
            )
            found.append((result, program.state_dict()))
        (eager, expected), (compiled, state) = found
        assert eager.execution == "eager: compile=False"
        assert compiled.execution.startswith("compiled: loss, gradient and Adam in one graph of")
        assert "compiled" in repr(compiled)
        assert compiled.num_steps == eager.num_steps == 12
        for one, other in zip(compiled.history, eager.history, strict=True):
            assert one["bound"] == pytest.approx(other["bound"], rel=1e-5)
            assert one["validation_bound"] == pytest.approx(other["validation_bound"], rel=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)

    @pytest.mark.usefixtures("traced_only")
    def test_a_schedule_and_single_steps(self):
        states = []
        for is_compiled in (False, True):
            torch.manual_seed(0)
            program = Autoencoder()
            vi = AEVB(program.model, program.guide, compile=is_compiled)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # torch's, about a schedule before the first step
                vi.fit(self.x, num_epochs=2, batch_size=35, seed=3, progress=False, learning_rate=0.1,
                       schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1))  # fmt: skip
            for seed in range(3):
                vi.partial_fit(self.x[:10], seed=seed)
            states.append(program.state_dict())
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)

    def test_auto_counts_steps_and_operations(self):
        program = Autoencoder()
        result = fit(program.model, program.guide, SGVB(), self.x, num_epochs=1, progress=False)
        assert result.execution == "eager: 1 steps ahead do not repay compiling"
        staging = Staging(compile="auto", num_steps=None)
        assert "unknown" in staging.decision
        assert Staging(compile="auto", num_steps=10**6).is_pending

    def test_auto_compiles_where_it_repays(self, monkeypatch):
        monkeypatch.setattr(whole_step, "compile_graph", lambda graph, *tensors: torch.no_grad()(graph))
        module = ObjectiveModule(*PROGRAMS["nn.Module"](), SGVB()).build(self.x)
        few, many = (Stepper(module, adam, staging=Staging(compile="auto", num_steps=n)) for n in (2000, 10**6))
        few.step(Batch((self.x,), {}))
        many.step(Batch((self.x,), {}))
        assert few.staging.decision.startswith("eager: 2,000 steps ahead do not repay compiling")
        assert many.staging.decision.startswith("compiled")

    def test_what_repays_grows_with_steps_and_falls_with_operations(self):
        assert not compiling.repays(200, 1000)
        assert compiling.repays(200, 100_000)
        assert compiling.repays(20_000, 10**6)
        first = [next(n for n in range(0, 10**6, 50) if compiling.repays(size, n)) for size in (100, 1000)]
        assert first[0] > compiling.FEWEST_STEPS
        assert first == sorted(first) or first == sorted(first, reverse=True)

    def test_what_is_going_on_is_announced(self):
        told = []
        module = ObjectiveModule(*PROGRAMS["nn.Module"](), SGVB()).build(self.x)
        stepper = Stepper(module, adam, staging=Staging(compile="auto", num_steps=2500, announce=told.append))
        stepper.step(Batch((self.x,), {}))
        assert told == ["recording"]


def train(is_compiled, change, *, make=None, epochs=3, **settings):
    """Fit with a callback that changes something after the first epoch; return result and program."""
    torch.manual_seed(0)
    program = Scaled()

    def after(event):
        if event.epoch == 1:
            change(program, event)

    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    vi = AEVB(program.model, program.guide, compile=is_compiled)
    result = vi.fit(
        x, num_epochs=epochs, batch_size=10, seed=2, callbacks=[after], optimizer=make, progress=False, **settings
    )
    return result, program


class Scaled(Autoencoder):
    """A program with a Python number, a buffer and a Linear layer that a callback changes."""

    def __init__(self):
        super().__init__()
        self.factor = 1.0
        self.register_buffer("shift", torch.zeros(()))

    def guide(self, x):
        super().guide(self.factor * x + self.shift)


def set_number(program, event):
    program.factor = 2.0


def replace_buffer(program, event):
    program.shift = torch.tensor(1.0)


def write_buffer(program, event):
    program.shift.fill_(1.0)


def replace_layer(program, event):
    program.encoder[0] = nn.Linear(4, 4)
    nn.init.constant_(program.encoder[0].weight, 0.1)
    nn.init.zeros_(program.encoder[0].bias)


def freeze(program, event):
    program.decoder.requires_grad_(False)


def clear(parameter):
    parameter.grad.zero_()


def hook(program, event):
    program.decoder[0].weight.register_post_accumulate_grad_hook(clear)


def hook_module(program, event):
    program.decoder[0].register_forward_hook(double)


def double(module, inputs, output):
    return 2 * output


CHANGES = {
    "a Python number": (set_number, True),
    "a replaced buffer": (replace_buffer, False),
    "a buffer written into": (write_buffer, False),
    "a replaced layer": (replace_layer, False),
    "frozen parameters": (freeze, False),
    "a hook on a gradient": (hook, False),
    "a hook of a module": (hook_module, False),
}


@pytest.mark.usefixtures("traced_only")
class TestChanges:
    """What a user's code changes while a graph is in use reaches the next step."""

    @pytest.mark.parametrize(("change", "warns"), CHANGES.values(), ids=CHANGES.keys())
    def test_a_callback_s_change_is_followed(self, change, warns):
        torch.set_default_dtype(torch.float64)
        eager, expected = train(False, change)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StagingWarning)
            compiled, program = train(True, change)
        assert bool([item for item in caught if item.category is StagingWarning]) == warns
        for one, other in zip(compiled.history, eager.history, strict=True):
            assert one["bound"] == pytest.approx(other["bound"], rel=1e-9)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(program.state_dict()[name], value, rtol=1e-8, atol=1e-8)
        whole = 12 if change is write_buffer else 4
        assert (f", {whole} of 12 steps" in compiled.execution) or warns

    def test_a_change_that_breaks_the_program_is_explained(self):
        def break_it(program, event):
            program.factor = torch.ones(7)

        for is_compiled in (False, True):
            with pytest.raises(ModelError, match=r"program failed on a batch of \(0: float32 \[10, 4\]\)"):
                train(is_compiled, break_it)

    def test_hooks_of_the_optimizer_are_called(self):
        calls = []

        def make(parameters):
            optimizer = adam(parameters)
            optimizer.register_step_post_hook(lambda *_: calls.append(1))
            return optimizer

        monkey = pytest.MonkeyPatch()
        with monkey.context() as patch:
            torch_compile = torch.compile
            patch.setattr(torch, "compile", lambda graph, **_: torch_compile(graph, backend="aot_eager"))
            result, _ = train(True, lambda *_: None, make=make)
        assert len(calls) == 12
        assert result.execution.startswith("compiled: loss and gradient,")

    def test_a_state_loaded_into_the_optimizer_counts(self):
        torch.set_default_dtype(torch.float64)
        eager, compiled, *_ = steppers("nn.Module", OBJECTIVES["B"])
        batches = [torch.randn(6, 4) for _ in range(3)]
        assert_same_steps(eager, compiled, batches)
        for stepper in (eager, compiled):
            state = stepper.optimizer.state_dict()
            state["param_groups"][0]["lr"] = 1e-4
            stepper.optimizer.optimizer.load_state_dict(state)
        assert_same_steps(eager, compiled, batches)

    def test_modes_and_numbers_of_rows_between_single_steps(self):
        torch.set_default_dtype(torch.float64)
        eager, compiled, *modules = steppers("convolution and BatchNorm", OBJECTIVES["B"])
        batches = [batch("convolution and BatchNorm") for _ in range(2)]
        assert_same_steps(eager, compiled, batches)
        for module in modules:
            module.eval()
        assert_same_steps(eager, compiled, batches)
        for module in modules:
            module.train()
            module.num_data = 600
        assert_same_steps(eager, compiled, batches)
        assert compiled.execution.endswith("4 of 6 steps")  # all but those in the other mode

    def test_conversions_of_precision_stay_eager(self):
        from lightning_fabric import Fabric

        program = Autoencoder()
        result = fit(program.model, program.guide, SGVB(), torch.randn(20, 4), num_epochs=1, compile=True, progress=False,
                     fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"))  # fmt: skip
        assert result.execution == "eager: Fabric converts to precision 'bf16-mixed' step by step"


TEMPERATURE = torch.tensor(1.0, dtype=torch.float64)


class Tempered(Autoencoder):
    """A program that reads a global tensor, and one that is a plain attribute."""

    def __init__(self):
        super().__init__()
        self.__dict__["shift"] = torch.zeros(4)

    def guide(self, x):
        super().guide(TEMPERATURE * x + self.shift)


@pytest.fixture
def constants_are_copied(monkeypatch):
    """Run the graph as it was traced, with copies of all that is no input, which a compiler writes into the code."""
    monkeypatch.setattr(whole_step, "compile_graph", lambda graph, *tensors: torch.no_grad()(copy.deepcopy(graph)))


@pytest.mark.usefixtures("constants_are_copied")
class TestTensorsFromOutside:
    """Tensors that are no parameters or buffers are read anew at each step."""

    def test_writing_into_them_is_followed(self):
        torch.set_default_dtype(torch.float64)
        eager, compiled, *_ = steppers(lambda: methods(Tempered()), OBJECTIVES["B"])
        batches = [torch.randn(6, 4) for _ in range(2)]
        assert_same_steps(eager, compiled, batches)
        TEMPERATURE.fill_(2.0)
        for stepper in (eager, compiled):
            stepper.module.model.__self__.shift.add_(1.0)
        assert_same_steps(eager, compiled, batches)
        assert compiled.execution.endswith(", 4 of 4 steps")

    def test_a_step_does_not_write_into_them(self):
        _, compiled, _, module = steppers(lambda: methods(Tempered()), OBJECTIVES["B"])
        shift = module.model.__self__.shift
        versions = shift._version, TEMPERATURE._version
        for _ in range(3):
            compiled.step(Batch((torch.randn(6, 4),), {}))
        assert (shift._version, TEMPERATURE._version) == versions


def some(parameters):
    return adam(list(parameters)[:2])


class TestOptimizer:
    """A whole step is the optimizer's own, or is not taken."""

    @pytest.fixture(autouse=True)
    def nothing_is_compiled(self, monkeypatch, traced_only):
        monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
        torch.set_default_dtype(torch.float64)

    def test_of_some_parameters_under_a_largest_norm(self):
        eager, compiled, *_ = steppers("nn.Module", OBJECTIVES["B"], make=some, clip_norm=0.5)
        assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(3)])
        assert compiled.staging.decision.startswith("compiled: loss and gradient,")

    def test_that_loses_a_parameter_later(self):
        eager, compiled, *_ = steppers("nn.Module", OBJECTIVES["B"])
        assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(3)])
        for stepper in (eager, compiled):
            plain = stepper.optimizer.optimizer
            del plain.state[plain.param_groups[0]["params"].pop()]
        assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(3)])
        assert compiled.execution.endswith(", 3 of 6 steps")

    @pytest.mark.parametrize("setting", ["maximize", "amsgrad"])
    def test_whose_rule_changes(self, setting):
        eager, compiled, *_ = steppers("nn.Module", OBJECTIVES["B"])
        assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(3)])
        for stepper in (eager, compiled):
            stepper.optimizer.param_groups[0][setting] = True
            if setting == "amsgrad":
                for parameter, state in stepper.optimizer.state.items():
                    state["max_exp_avg_sq"] = torch.zeros_like(parameter)
        assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(3)])
        assert compiled.execution.endswith(", 3 of 6 steps")

    def test_of_parameters_that_were_frozen_for_a_while(self):
        eager, compiled, *modules = steppers("nn.Module", OBJECTIVES["B"], make=functools.partial(adam, eps=1e-8))
        batches = [torch.randn(6, 4) for _ in range(2)]
        for is_trained in (True, False, True):
            for module in modules:
                module.model.__self__.decoder.requires_grad_(is_trained)
            assert_same_steps(eager, compiled, batches)
        assert {float(state["step"]) for state in compiled.optimizer.state.values()} == {4.0, 6.0}

    def test_whose_state_a_callback_reads_and_resets(self):
        def make(parameters):
            made.append(adam(parameters))
            return made[-1]

        def restart(program, event):
            steps.append({float(state["step"]) for state in made[-1].state.values()})
            for state in made[-1].state.values():
                for value in state.values():
                    value.zero_()

        made, steps = [], []
        _, expected = train(False, restart, make=make)
        _, program = train(True, restart, make=make)
        assert steps == [{4.0}, {4.0}]
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(program.state_dict()[name], value, rtol=1e-8, atol=1e-8)

    def test_of_complex_parameters(self):
        class Complex(Autoencoder):
            def __init__(self):
                super().__init__()
                self.factor = nn.Parameter(torch.randn(4, dtype=torch.complex128))

            def guide(self, x):
                super().guide((self.factor * x).real + (self.factor * x).imag)

        eager, compiled, *_ = steppers(lambda: methods(Complex()), OBJECTIVES["B"])
        assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(3)])

    def test_of_parameters_of_several_types(self):
        class Mixed(Autoencoder):
            def __init__(self):
                super().__init__()
                self.shift = nn.Parameter(torch.zeros(4, dtype=torch.float32))

            def guide(self, x):
                super().guide(x + self.shift.double())

        eager, compiled, *_ = steppers(lambda: methods(Mixed()), OBJECTIVES["B"])
        assert next(iter(compiled.module.parameters())).dtype == torch.float32
        for stepper in (eager, compiled):
            stepper.optimizer.param_groups[0]["lr"] = 1 / 3
        for stepper in (eager, compiled):
            with pyro.validation_enabled(False):
                pyro.set_rng_seed(0)
                stepper.step(Batch((torch.ones(6, 4),), {}))
        one, other = (stepper.module.model.__self__.encoder[0].weight for stepper in (eager, compiled))
        torch.testing.assert_close(other, one, rtol=1e-13, atol=1e-13)

    def test_buffers_with_gaps_between_their_entries(self):
        class Sliced(Autoencoder):
            def __init__(self):
                super().__init__()
                self.register_buffer("slice", torch.arange(8.0)[::2], persistent=False)
                self.register_buffer("repeated", torch.ones(1).expand(4), persistent=False)

            def guide(self, x):
                super().guide(x * self.slice + self.repeated)

        eager, compiled, *_ = steppers(lambda: methods(Sliced()), OBJECTIVES["B"])
        assert_same_steps(eager, compiled, [torch.randn(6, 4) for _ in range(3)])
        assert compiled.staging.decision.startswith("compiled: loss and gradient,")


def test_parameters_converted_in_place_are_noticed():
    module = ObjectiveModule(*methods(Autoencoder()), SGVB()).build(torch.randn(6, 4))
    weight = module.model.__self__.encoder[0].weight
    unchanged, before = Unchanged([module]), weight.data
    for other, holds in (
        (before.clone(), True),
        (before.double(), False),
        (before[:, :2].clone(), False),
        (before, True),
    ):
        weight.data = other
        assert unchanged.holds == holds


@pytest.mark.slow
def test_rows_with_gaps_between_them():
    eager, compiled, *_ = steppers("nn.Module", OBJECTIVES["B"])
    assert_same_steps(eager, compiled, [torch.randn(6, 8)[:, :4] for _ in range(3)])
    assert compiled.execution.endswith(", 3 of 3 steps")


def test_warnings_that_are_errors_stop_no_compilation():
    program = Autoencoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(
            program.model, program.guide, SGVB(), torch.randn(20, 4), num_epochs=1, compile=True, progress=False
        )
    assert result.execution.startswith("compiled")
