"""A fit that was stopped continues bit for bit as if it had not been, whatever its data, optimizer, schedule and objective are."""

import functools
import json
import os
import signal
import threading

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
from pyro_aevb.training.checkpoint import Checkpoints
from pyro_aevb.training.files import read_file

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


class Stop(Exception):
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
                raise Stop
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
    with pytest.raises(Stop):
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
            with pytest.raises(Stop):
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
