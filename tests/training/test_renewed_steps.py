"""Steps of a long series of ``partial_fit`` are recorded anew where model and guide have changed for good."""

import warnings

import pytest
import torch
from staged_programs import Autoencoder
from torch import nn

from pyro_aevb import AEVB
from pyro_aevb.errors import StagingWarning
from pyro_aevb.training import staged, whole_step

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def program_with_statistics():
    """Return a program with BatchNorm; a bias before it would make Adam's steps ones of rounding errors."""
    return Autoencoder(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh())


@pytest.fixture
def traced_only(monkeypatch):
    """Run the graph of a whole step as it was traced, without compiling it."""
    monkeypatch.setattr(whole_step, "compile_graph", lambda graph, *tensors: torch.no_grad()(graph))


def evaluate(program):
    program.eval()


def convert(program):
    program.double()


def replace_a_part(program):
    program.encoder[2] = nn.Sigmoid()


def replace_a_buffer(program):
    program.encoder[1].running_mean = torch.ones(4)


def freeze(program):
    program.decoder.requires_grad_(False)


def replace_a_layer(program):
    program.encoder[3] = nn.Linear(4, 4)
    nn.init.constant_(program.encoder[3].weight, 0.1)
    nn.init.zeros_(program.encoder[3].bias)


def hook(program):
    program.encoder[3].register_forward_hook(lambda module, inputs, output: 2 * output)


def unhook(program):
    program.encoder[3]._forward_hooks.clear()


LASTING = [evaluate, convert, replace_a_part, replace_a_buffer]
IN_PARTS = [freeze, replace_a_layer]
"""After these no step is whole: the optimizer has parameters that get no gradient, or lacks some."""


def series(changes, *, is_compiled):
    """Take steps on noise of a seed each, before each of which something may change; return bounds, program and door."""
    torch.manual_seed(7)
    program = program_with_statistics()
    vi = AEVB(program.model, program.guide, compile=is_compiled)
    bounds = []
    for number, change in enumerate(changes):
        if change is not None:
            change(program)
        x = X.to(next(program.parameters()).dtype)
        bounds.append(vi.partial_fit(x, seed=number))
    return bounds, program, vi


def assert_same(changes):
    """Compare eager and compiled steps, and return how the latter ran."""
    expected, eager, _ = series(changes, is_compiled=False)
    found, compiled, vi = series(changes, is_compiled=True)
    assert found == pytest.approx(expected, rel=1e-4)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    return vi._stepper.execution


@pytest.mark.usefixtures("traced_only")
class TestWhatLasts:
    @pytest.mark.parametrize("change", LASTING)
    def test_is_recorded(self, change):
        """Three whole steps, twenty in parts, and ten whole ones."""
        execution = assert_same([None] * 3 + [change] + [None] * 29)
        assert execution.endswith("13 of 33 steps")

    def test_is_recorded_on_a_batch_of_the_shape_that_was(self):
        *_, vi = series([None] * 3 + [evaluate] + [None] * 19, is_compiled=True)
        for number in range(3):
            vi.partial_fit(X[:2], seed=number)
        vi.partial_fit(X, seed=0)
        assert vi._stepper.execution.endswith("4 of 27 steps")

    @pytest.mark.slow
    @pytest.mark.parametrize("change", IN_PARTS)
    def test_is_compiled_without_the_optimizer_s_step(self, change):
        execution = assert_same([None] * 3 + [change] + [None] * 24)
        assert execution.startswith("compiled: loss and gradient, ")

    def test_is_told_where_it_can_not_be_recorded(self):
        """The earlier recording is kept, and used when all is as it was."""
        with pytest.warns(StagingWarning, match="hooks") as told:
            execution = assert_same([None] * 3 + [hook] + [None] * 40 + [unhook, None])
        assert len([item for item in told if item.category is StagingWarning]) == 1
        assert execution.startswith("compiled: loss, gradient and Adam")
        assert execution.endswith("5 of 46 steps")


@pytest.mark.usefixtures("traced_only")
class TestWhatDoesNotLast:
    def test_leaves_the_recording_as_it_is(self):
        """Two steps in another mode now and then."""
        changes = [None, None, *([nn.Module.eval, None, nn.Module.train, None] * 6)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StagingWarning)
            execution = assert_same(changes)
        assert execution.endswith("14 of 26 steps")
        assert not [item for item in caught if item.category is StagingWarning]

    def test_is_recorded_no_more_after_one_warning(self, monkeypatch):
        recorded = []
        record = staged.record
        monkeypatch.setattr(staged, "record", lambda *args, **named: recorded.append(1) or record(*args, **named))

        def change(program):
            program.encoder[1].running_mean = torch.zeros(4)

        with pytest.warns(StagingWarning, match="changed 11 times") as told:
            execution = assert_same([None] * 2 + [change] * 60)
        assert len([item for item in told if item.category is StagingWarning]) == 1
        assert execution.endswith("2 of 62 steps")
        assert len(recorded) == 1
