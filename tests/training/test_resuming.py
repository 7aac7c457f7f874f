"""A fit that was stopped continues bit for bit as if it had not been, whatever its data, optimizer, schedule and objective are."""

import functools
import json
from collections import Counter

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from pyro_aevb import AEVB, IWELBO, SGVB, WakeSleep
from pyro_aevb.errors import FileError, SettingError
from pyro_aevb.training.files import read_file
from pyro_aevb.training.packing import pack, unpack

torch.manual_seed(1)
X = torch.randn(47, 3)


class Model(nn.Module):
    """A network with dropout, batch statistics, a ``pyro.param`` and a global latent."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + shift, scale).to_event(1), obs=x)


class StoppedError(Exception):
    """What stops a fit in the middle, as a crash would."""


class Flaky:
    """An optimizer's maker whose optimizer fails at one of its steps, once."""

    def __init__(self, make, at):
        self.make, self.at, self.count = make, at, 0

    def __call__(self, parameters):
        optimizer = self.make(parameters)
        step = optimizer.step

        def counted(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                raise StoppedError
            return step(*args, **kwargs)

        optimizer.step = counted
        return optimizer


def adam(parameters):
    return Adam(parameters, lr=0.01)


def momentum(parameters):
    return SGD(parameters, lr=1e-4, momentum=0.9)


def adagrad(parameters):
    return Adagrad(parameters, lr=0.02)


def fitted(data=X, *, objective=None, model=None, **settings):
    """Fit anew; return the wrapper."""
    pyro.clear_param_store()
    vi = AEVB(model or Model(), objective=objective, compile=False)
    settings = {"num_epochs": 4, "seed": 3, "progress": False} | settings
    if not isinstance(data, DataLoader):
        settings = {"batch_size": 10} | settings
    vi.fit(data, **settings)
    return vi


def assert_same(a, b):
    """Compare parameters, buffers, histories but for times, and what was counted."""
    left, right = a.module.state_dict(), b.module.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    assert untimed(a) == untimed(b)
    for name in ("num_steps", "num_skipped", "best_epoch", "stopped_by"):
        assert getattr(a.result, name) == getattr(b.result, name)


def untimed(vi):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in vi.result.history]


def continued(folder, at, settings=dict, *, data=lambda: X, make=adam, every=3):
    """Stop a fit in the middle of a step, as a crash would, and continue it from its folder with everything made anew."""
    with pytest.raises(StoppedError):
        fitted(data(), optimizer=Flaky(make, at), checkpoint=folder, every=every, **settings())
    torch.manual_seed(999)  # nothing of the present generators may matter
    np.random.seed(999)
    other = {"seed": 5} if any(folder.iterdir()) else {}  # the checkpoint's generators go on
    return fitted(data(), optimizer=make, checkpoint=folder, every=every, resume=True, **settings() | other)


def laws(name):
    """Return settings, made anew at each call."""
    return {
        "plain": dict,
        "held out": lambda: {"validation": X[:9]},
        "patience": lambda: {"validation": X[:9], "patience": 1, "num_epochs": 9},
        "importance weighted": lambda: {"objective": IWELBO(3)},
        "analytic, free bits": lambda: {"objective": SGVB(free_bits=0.1)},
        "warmed up": lambda: {"objective": SGVB(kl_weight=lambda step: min(1.0, step / 10))},
        "clipped": lambda: {"clip_norm": 1.0},
        "steps of the rate": lambda: {"schedule": lambda o: StepLR(o, 1, 0.5)},
        "milestones": lambda: {"schedule": lambda o: MultiStepLR(o, [1, 3], 0.5)},
        "plateau": lambda: {"schedule": lambda o: ReduceLROnPlateau(o, patience=0), "validation": X[:9]},
        "one cycle": lambda: {"schedule": lambda o: OneCycleLR(o, 0.1, total_steps=6)},
        "rate by function": lambda: {"schedule": lambda o: LambdaLR(o, lambda epoch: 0.9**epoch)},
        "two schedules": lambda: {
            "schedule": lambda o: SequentialLR(o, [StepLR(o, 1, 0.5), StepLR(o, 2, 0.9)], milestones=[2])
        },
    }[name]


NAMES = ["plain", "held out", "patience", "importance weighted", "analytic, free bits", "warmed up", "clipped"]
NAMES += ["steps of the rate", "milestones", "plateau", "one cycle", "rate by function", "two schedules"]


class TestBitForBit:
    @pytest.mark.parametrize("name", NAMES)
    def test_settings(self, name, tmp_path):
        settings = laws(name)
        undisturbed = fitted(optimizer=adam, **settings())
        assert_same(undisturbed, continued(tmp_path, 14, settings))

    @pytest.mark.parametrize("at", [1, 4, 5, 6, 10, 11, 20])
    def test_places(self, at, tmp_path):
        assert_same(fitted(optimizer=adam), continued(tmp_path, at))

    @pytest.mark.parametrize("make", [momentum, adagrad, functools.partial(Adam, lr=0.01, amsgrad=True, fused=True)])
    def test_optimizers(self, make, tmp_path):
        assert_same(fitted(optimizer=make), continued(tmp_path, 13, make=make))

    @pytest.mark.parametrize("every", [None, 1, 4, 100])
    def test_distances_of_checkpoints(self, every, tmp_path):
        assert_same(fitted(optimizer=adam), continued(tmp_path, 13, every=every))

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(lambda: X.numpy(), id="numpy"),
            pytest.param(lambda: {"x": X}, id="mapping"),
            pytest.param(lambda: TensorDataset(X), id="dataset"),
            pytest.param(lambda: Augmented(), id="dataset that draws"),
            pytest.param(lambda: DataLoader(TensorDataset(X), 10, shuffle=True), id="given loader"),
            pytest.param(
                lambda: DataLoader(TensorDataset(X), 10, shuffle=True, generator=torch.Generator().manual_seed(4)),
                id="given loader with a generator",
            ),
        ],
    )
    def test_data(self, data, tmp_path):
        assert_same(fitted(data(), optimizer=adam), continued(tmp_path, 13, data=data))

    def test_wake_sleep(self, tmp_path):
        def settings():
            return {"objective": WakeSleep(), "model": Plain()}

        assert_same(fitted(optimizer=adam, **settings()), continued(tmp_path, 13, settings))

    def test_several_times(self, tmp_path):
        for at in (3, 5, 2, 4):
            with pytest.raises(StoppedError):
                fitted(optimizer=Flaky(adam, at), checkpoint=tmp_path, every=1, resume=True)
        assert_same(fitted(optimizer=adam), fitted(optimizer=adam, checkpoint=tmp_path, every=1, resume=True))

    def test_compiled(self, tmp_path):
        def settings():
            return {"compile": True, "model": Plain()}

        undisturbed = fitted(optimizer=adam, **settings())
        assert undisturbed.result.execution.startswith("compiled")
        # stopped at a short last batch, which alone calls the optimizer's own step
        assert_same(undisturbed, continued(tmp_path, 3, settings))


class Plain(nn.Module):
    """A linear decoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.decoder = nn.Linear(2, 3)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


class Augmented(torch.utils.data.Dataset):
    """Rows with noise from torch's own generator and from numpy's."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index] + 0.1 * torch.randn(3) + np.random.normal()


class TestFolder:
    def test_an_empty_one_begins_anew(self, tmp_path):
        folder = tmp_path / "not" / "there"
        assert_same(fitted(optimizer=adam), fitted(optimizer=adam, checkpoint=folder, resume=True))
        assert [path.name for path in sorted(folder.iterdir())] == [f"step-{n:09d}.safetensors" for n in (10, 15, 20)]

    def test_the_last_few_stay(self, tmp_path):
        fitted(checkpoint=tmp_path, every=4, keep=2)
        assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{n:09d}.safetensors" for n in (16, 20)]

    def test_a_finished_fit_comes_back(self, tmp_path):
        settings = {"validation": X[:9], "patience": 1, "num_epochs": 30, "optimizer": fast}
        first = fitted(checkpoint=tmp_path, **settings)
        assert first.result.stopped_by == "patience"
        assert_same(first, fitted(checkpoint=tmp_path, resume=True, **settings))

    def test_more_epochs(self, tmp_path):
        fitted(optimizer=adam, checkpoint=tmp_path, num_epochs=2)
        assert_same(fitted(optimizer=adam), fitted(optimizer=adam, checkpoint=tmp_path, resume=True))

    def test_what_callbacks_record_comes_back(self, tmp_path):
        def callback(event):
            event.record["twice"] = 2.0 * event.epoch

        fitted(checkpoint=tmp_path, num_epochs=2, callbacks=[callback])
        again = fitted(checkpoint=tmp_path, resume=True, callbacks=[callback])
        assert [record["twice"] for record in again.result.history] == [2.0, 4.0, 6.0, 8.0]

    def test_checkpoints_are_programs_too(self, tmp_path):
        vi = fitted(checkpoint=tmp_path, validation=X[:9])
        loaded = AEVB.load(max(tmp_path.glob("step-*")), Model())
        expected, found = (item.posterior(X[:3], num_samples=4, seed=0) for item in (vi, loaded))
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        best = AEVB.load(tmp_path / "best.safetensors", Model())
        assert read_file(tmp_path / "best.safetensors").tensors.keys()
        assert best.module.structure is not None

    def test_the_best_is_that_of_its_epoch(self, tmp_path):
        settings = {"validation": X[:9], "patience": 1, "num_epochs": 30, "optimizer": fast}
        vi = fitted(checkpoint=tmp_path, **settings)
        assert vi.result.best_epoch < len(vi.result.history)
        best = AEVB.load(tmp_path / "best.safetensors", Model())
        for name, value in vi.module.program.state_dict().items():
            assert torch.equal(value, best.module.program.state_dict()[name]), name

    def test_no_pickle(self, tmp_path):
        fitted(checkpoint=tmp_path)
        data = max(tmp_path.glob("step-*")).read_bytes()
        assert b"\x80\x02" not in data[:8]
        assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # a plain safetensors header


def fast(parameters):
    return Adam(parameters, lr=0.3)


class Wider(Plain):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3, bias=False)


class OtherSite(Plain):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(y), 1.0).to_event(1), obs=x)


class TestRefusals:
    @pytest.fixture
    def folder(self, tmp_path):
        fitted(model=Plain(), optimizer=adam, checkpoint=tmp_path, num_epochs=1)
        return tmp_path

    def refuse(self, error, match, folder, data=X, **settings):
        settings = {"model": Plain(), "optimizer": adam, "resume": True} | settings
        with pytest.raises(error, match=match):
            fitted(data, checkpoint=folder, **settings)

    def test_another_batch_size(self, folder):
        self.refuse(SettingError, r"batch_size=10 \(now 20\)", folder, batch_size=20)

    def test_other_data(self, folder):
        self.refuse(SettingError, r"rows=47 \(now 30\)", folder, X[:30])

    def test_another_optimizer(self, folder):
        self.refuse(SettingError, r"optimizer='Adam' \(now 'SGD'\)", folder, optimizer=momentum)

    def test_a_schedule_more(self, folder):
        self.refuse(SettingError, r"schedule=None \(now 'StepLR'\)", folder, schedule=lambda o: StepLR(o, 1))

    def test_another_model(self, folder):
        self.refuse(FileError, r"sites .*'y'", folder, model=OtherSite())
        self.refuse(FileError, r"decoder\.bias", folder, model=Wider())

    def test_a_folder_that_holds_another_fit(self, folder):
        self.refuse(FileError, r"holds checkpoints.*resume=True", folder, resume=False)

    def test_a_saved_program(self, folder):
        vi = fitted(model=Plain())
        vi.save(folder / "step-000000099.safetensors")
        self.refuse(FileError, r"not a fit.*AEVB\.load", folder)

    def test_no_folder(self):
        for settings in ({"resume": True}, {"every": 3}):
            with pytest.raises(SettingError, match="checkpoint="):
                fitted(**settings)

    @pytest.mark.parametrize(("name", "value"), [("every", 0), ("every", -3), ("keep", 0)])
    def test_numbers(self, name, value, tmp_path):
        with pytest.raises(SettingError, match=name):
            fitted(checkpoint=tmp_path, **{name: value})

    def test_a_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "a").write_text("here")
        with pytest.raises(FileError, match="Could not make the folder"):
            fitted(checkpoint=tmp_path / "a")


class TestPacking:
    def test_round_trip(self):
        values = {
            "numbers": [1, -0.1, float("inf"), 1e-320, True, None, np.float64(0.1)],
            3: (torch.arange(3), np.arange(4, dtype=np.uint32)),
            "counter": Counter({2: 3}),
            "text": "ä",
        }
        tensors = {}
        found = unpack(json.loads(json.dumps(pack(values, tensors, "x"))), tensors)
        assert found["numbers"] == values["numbers"]
        assert found["text"] == "ä"
        assert isinstance(found["counter"], Counter)
        assert found["counter"] == values["counter"]
        assert isinstance(found[3], tuple)
        assert torch.equal(found[3][0], values[3][0])
        assert found[3][1].dtype == np.uint32

    def test_what_needs_pickle(self):
        with pytest.raises(FileError, match=r"'state\.a' is of type object.*without pickle"):
            pack({"a": object()}, {}, "state")
