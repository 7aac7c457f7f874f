"""Monte Carlo EM that is stopped goes on bit for bit, and refuses what is not its own."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import SGD, Adam

from pyro_aevb import AEVB, SGVB, AutoAmortizedNormal
from pyro_aevb.errors import FileError, SettingError
from pyro_aevb.testing import LinearGaussian
from pyro_aevb.training.em import MonteCarloEM
from pyro_aevb.training.result import EMEpochEnd, EMResult


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


class Noisy(nn.Module):
    """A decoder with dropout, BatchNorm and a pyro.param: what a step depends on beside parameters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(2, 6)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.normal_(0.0, 0.5, generator=generator)
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.register_buffer("num_updates", torch.tensor(0.0), persistent=False)

    def forward(self, x: Tensor) -> None:
        pyro.module("noisy", self)
        if self.training:
            self.num_updates.add_(1)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            h = self.layer(z)
            h = self.dropout(self.norm(h.reshape(-1, 6)).reshape(h.shape))
            pyro.sample("x", dist.Normal(h, scale).to_event(1), obs=x)


class Stop:
    """End the fit after so many epochs, by a callback's answer or a signal; count epochs, also over a pause."""

    def __init__(self, epoch: int = -1, number: int | None = None) -> None:
        self.epoch, self.number, self.count = epoch, number, 0

    def __call__(self, event: EMEpochEnd) -> bool:
        assert event.record is not None
        self.count += 1
        if event.epoch == self.epoch and self.number is not None:
            signal.raise_signal(self.number)
        return event.epoch == self.epoch and self.number is None

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def rows() -> Tensor:
    return LinearGaussian.fixture()[0].simulate(50, seed=1)[0]


def fit(model: Noisy, num_epochs: int = 5, **settings: Any) -> EMResult:
    settings = {"batch_size": 20, "optimizer": partial(Adam, lr=0.02), "seed": 3, "progress": False, **settings}
    return MonteCarloEM(model, num_leapfrog=3).fit(rows(), num_epochs=num_epochs, **settings)


def told(result: EMResult) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in result.history]


def state_of(model: Noisy) -> dict[str, Tensor]:
    scale = pyro.param("scale").detach().clone()
    return {
        **{name: value.clone() for name, value in model.state_dict().items()},
        "scale": scale,
        "num_updates": model.num_updates.clone(),
    }


def assert_same(result: EMResult, model: Noisy, whole: EMResult, expected: dict[str, Tensor]) -> None:
    assert told(result) == told(whole)
    assert torch.equal(result.chains, whole.chains)
    assert (result.num_steps, result.num_updates) == (whole.num_steps, whole.num_updates)
    found = state_of(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def whole() -> tuple[EMResult, dict[str, Tensor]]:
    """A fit that nobody stopped."""
    model = Noisy()
    result = fit(model)
    expected = state_of(model)
    pyro.clear_param_store()
    return result, expected


@pytest.mark.parametrize("every", [None, 2], ids=lambda every: f"every {every}")
def test_a_fit_that_a_callback_ended_goes_on_bit_for_bit(
    whole: tuple[EMResult, dict[str, Tensor]], tmp_path: Path, every: int | None
) -> None:
    first, stop = fit(Noisy(), checkpoint=tmp_path, every=every, callbacks=[Stop(2)]), Stop()
    assert first.stopped_by == "callback"
    assert len(first.history) == 2
    pyro.clear_param_store()
    torch.manual_seed(99)  # what is drawn elsewhere in between changes nothing
    model = Noisy()
    result = fit(model, checkpoint=tmp_path, every=every, resume=True, callbacks=[stop], seed=1)
    assert result.stopped_by == "epochs"
    assert stop.count == 5
    assert_same(result, model, *whole)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 5), (signal.SIGTERM, 6)])
def test_a_signal_waits_for_the_step_and_a_checkpoint_in_the_middle_of_an_epoch(
    whole: tuple[EMResult, dict[str, Tensor]], tmp_path: Path, number: int, step: int
) -> None:
    def make(parameters: Any) -> Adam:
        optimizer, updates = Adam(parameters, lr=0.02), []

        def signal_in_a_step(*_: object) -> None:
            updates.append(None)
            if len(updates) == 5 * step - 2:
                signal.raise_signal(number)

        optimizer.register_step_post_hook(signal_in_a_step)
        return optimizer

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        if number == signal.SIGTERM:
            with pytest.raises(SystemExit, match="143"):
                fit(Noisy(), checkpoint=tmp_path, every=100, optimizer=make)
        else:
            result = fit(Noisy(), checkpoint=tmp_path, every=100, optimizer=make)
            assert (result.stopped_by, result.num_steps) == ("interrupt", step)
    finally:
        signal.signal(signal.SIGINT, before)
    pyro.clear_param_store()
    model = Noisy()
    assert_same(fit(model, checkpoint=tmp_path, resume=True), model, *whole)


def test_a_signal_between_two_epochs(whole: tuple[EMResult, dict[str, Tensor]], tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        result = fit(Noisy(), checkpoint=tmp_path, every=100, callbacks=[Stop(2, signal.SIGINT)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.stopped_by, result.num_steps) == ("interrupt", 6)
    pyro.clear_param_store()
    model = Noisy()
    assert_same(fit(model, checkpoint=tmp_path, resume=True, callbacks=[Stop()]), model, *whole)


def test_a_killed_fit_goes_on_from_the_last_file(whole: tuple[EMResult, dict[str, Tensor]], tmp_path: Path) -> None:
    """Files of later steps gone, as after a kill, an older one leads to the same end."""
    fit(Noisy(), num_epochs=3, checkpoint=tmp_path, every=1, keep=9)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert len(names) == 9
    for name in names[4:]:
        (tmp_path / name).unlink()
    pyro.clear_param_store()
    model = Noisy()
    assert_same(fit(model, checkpoint=tmp_path, every=1, resume=True), model, *whole)


def test_an_empty_folder_begins_anew_and_a_full_one_is_not_overwritten(tmp_path: Path) -> None:
    fit(Noisy(), num_epochs=1, checkpoint=tmp_path, resume=True)
    with pytest.raises(FileError, match="holds checkpoints"):
        fit(Noisy(), num_epochs=1, checkpoint=tmp_path)
    assert fit(Noisy(), num_epochs=1, checkpoint=tmp_path, resume=True).num_steps == 3  # nothing left to do


def test_another_setting_is_refused(tmp_path: Path) -> None:
    fit(Noisy(), num_epochs=2, checkpoint=tmp_path)
    for settings, what in (
        ({"batch_size": 10}, "batch_size=20"),
        ({"optimizer": partial(SGD, lr=0.1)}, "optimizer='Adam'"),
        ({"num_epochs": 1}, "num_epochs=1"),
    ):
        with pytest.raises(SettingError, match=what):
            fit(Noisy(), checkpoint=tmp_path, resume=True, **settings)
    with pytest.raises(SettingError, match="num_leapfrog=3"):
        MonteCarloEM(Noisy(), num_leapfrog=4).fit(
            rows(), batch_size=20, optimizer=Adam, checkpoint=tmp_path, resume=True, progress=False
        )
    with pytest.raises(FileError, match="1 callbacks"):
        fit(Noisy(), checkpoint=tmp_path, resume=True, callbacks=[Stop()])
    with pytest.raises(SettingError, match="folder for checkpoints"):
        fit(Noisy(), every=3)


def test_another_model_and_another_kind_of_fit_are_refused(tmp_path: Path) -> None:
    fit(Noisy(), num_epochs=1, checkpoint=tmp_path / "em")

    def other(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("other", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] + torch.zeros(6), 1.0).to_event(1), obs=x)

    settings: dict[str, Any] = {"checkpoint": tmp_path / "em", "resume": True, "batch_size": 20, "progress": False}
    with pytest.raises(FileError, match=r"sites \['other', 'z'\] differ"):
        MonteCarloEM(other, num_leapfrog=3).fit(rows(), optimizer=Adam, **settings)
    pyro.clear_param_store()
    model = Noisy()
    vi = AEVB(model, AutoAmortizedNormal(model), SGVB())
    with pytest.raises(FileError, match=r"no checkpoint of AEVB\.fit"):
        vi.fit(rows(), **settings)
    with pytest.raises(FileError, match=r"MonteCarloEM\.fit continues"):
        AEVB.load(next((tmp_path / "em").glob("*.safetensors")), model)
    vi.fit(rows(), num_epochs=1, checkpoint=tmp_path / "aevb", progress=False)
    pyro.clear_param_store()
    with pytest.raises(FileError, match="no fit by Monte Carlo EM"):
        fit(Noisy(), checkpoint=tmp_path / "aevb", resume=True)


def test_a_checkpoint_holds_one_chain_a_row(tmp_path: Path) -> None:
    result = fit(Noisy(), num_epochs=1, checkpoint=tmp_path)
    with safe_open(next(tmp_path.glob("*.safetensors")), framework="pt") as file:
        names = [name for name in file.keys() if file.get_tensor(name).shape == (1, 50, 2)]  # noqa: SIM118
        assert len(names) == 1
        assert torch.equal(file.get_tensor(names[0])[0], result.chains)
