"""A fit that was stopped continues bit for bit as if it had not been, whatever its data, optimizer, schedule and objective are."""

import copy
import functools
import json
import os
import stat
import warnings
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
from pyro_aevb.errors import AEVBWarning, FileError, NonFiniteError, SettingError
from pyro_aevb.training.files import read_file
from pyro_aevb.training.packing import pack, unpack
from pyro_aevb.training.saving import load_tensors

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
    other = {"seed": 5} if any(folder.glob("step-*")) else {}  # the checkpoint's generators go on
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

    @pytest.mark.slow
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


class Filters(nn.Module):
    """A convolution whose weight lies in memory channels last, and a transposed parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Conv2d(2, 3, 3, padding=1).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(3, 2).t())

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            images = z[:, :, None, None].expand(len(x), 2, 3, 3).contiguous(memory_format=torch.channels_last)
            loc = self.net(images).mean((-1, -2)) + z @ self.turned
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class Counting(nn.Module):
    """A model that writes into a buffer which is not saved with it, and whose rows depend on it."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(3), persistent=False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(self.loc + z + self.mean, 1.0).to_event(1), obs=x)


class Remembering:
    """A callback with a state: an average of the bound, which goes into the record."""

    def __init__(self):
        self.average = 0.0

    def __call__(self, event):
        self.average = 0.5 * self.average + 0.5 * event.record["bound"]
        event.record["average"] = self.average

    def state_dict(self):
        return {"average": self.average}

    def load_state_dict(self, state):
        self.average = state["average"]


class Endless(torch.utils.data.IterableDataset):
    """Rows of an epoch that knows where it stands."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        for row in X.roll(self.place, 0):
            self.place += 1
            yield row

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Turning(TensorDataset):
    """Rows that are NaN once the first batch was looked at."""

    count = 0

    def __getitem__(self, index):
        self.count += 1
        (row,) = super().__getitem__(index)
        return row if self.count <= 40 else row * float("nan")


class TestWhatElseAStepDependsOn:
    def two_and_two(self, folder, make):
        """Compare four epochs with twice two."""
        whole = make({"num_epochs": 4})
        make({"num_epochs": 2, "checkpoint": folder})
        assert_same(whole, make({"num_epochs": 4, "checkpoint": folder, "resume": True}))

    def test_layouts_in_memory_under_the_default_optimizer(self, tmp_path):
        self.two_and_two(tmp_path, lambda settings: fitted(model=Filters(), learning_rate=0.02, **settings))

    def test_buffers_that_are_not_saved(self, tmp_path):
        self.two_and_two(tmp_path, lambda settings: fitted(model=Counting(), **settings))

    def test_callbacks_with_a_state(self, tmp_path):
        self.two_and_two(tmp_path, lambda settings: fitted(callbacks=[Remembering()], **settings))

    def test_a_validation_loader_with_a_generator(self, tmp_path):
        def make(settings):
            generator = torch.Generator().manual_seed(4)
            held_out = DataLoader(TensorDataset(X[:20]), 5, shuffle=True, generator=generator)
            return fitted(validation=held_out, **settings)

        self.two_and_two(tmp_path, make)

    def test_a_growing_number_of_rows(self, tmp_path):
        def make(settings):
            pyro.clear_param_store()
            vi = AEVB(Plain(), num_data="growing", compile=False)
            vi.fit(Endless(), batch_size=10, seed=3, progress=False, **settings)
            return vi

        self.two_and_two(tmp_path, make)
        assert read_file(max(tmp_path.glob("step-*"))).header["num_data"] == 4 * len(X)

    def test_batches_skipped_in_a_row(self, tmp_path):
        def make(**settings):
            vi = AEVB(Plain(), compile=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AEVBWarning)
                vi.fit(Turning(X), batch_size=40, num_epochs=9, progress=False, max_skipped=3, **settings)

        with pytest.raises(NonFiniteError, match="4 steps in a row"):
            make(checkpoint=tmp_path, every=1)
        with pytest.raises(NonFiniteError, match="4 steps in a row"):
            make(checkpoint=tmp_path, every=1, resume=True)
        assert steps(tmp_path)[-1] == 3  # and not begun to count anew

    def test_the_decision_to_compile(self, tmp_path):
        first = fitted(model=Plain(), compile="auto", checkpoint=tmp_path, num_epochs=1)
        again = fitted(
            model=Plain(), compile="auto", checkpoint=tmp_path, resume=True, num_epochs=9_000, callbacks=[stop]
        )
        assert again.result.execution == first.result.execution == "eager: 5 steps ahead do not repay compiling"

    @pytest.mark.slow
    def test_a_compiled_fit_that_continues_with_a_short_batch(self, tmp_path):
        def make(**settings):
            return fitted(model=Plain(), optimizer=adam, compile=True, **settings)

        whole = make()
        with pytest.raises(StoppedError):
            make(checkpoint=tmp_path, every=4, callbacks=[fail])
        assert steps(tmp_path) == [4]
        again = make(checkpoint=tmp_path, every=4, resume=True)
        assert_same(whole, again)
        assert again.result.execution == whole.result.execution

    def test_another_number_of_threads_is_told(self, tmp_path):
        fitted(checkpoint=tmp_path, num_epochs=1)
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        try:
            with pytest.warns(AEVBWarning, match=rf"not bit for bit.*threads {before} then, {before + 1} now"):
                fitted(checkpoint=tmp_path, num_epochs=2, resume=True)
        finally:
            torch.set_num_threads(before)


def stop(event):
    return True


def fail(event):
    raise StoppedError


def steps(folder):
    return [int(path.stem[5:]) for path in sorted(folder.glob("step-*.safetensors"))]


class TestFolder:
    def test_an_empty_one_begins_anew(self, tmp_path):
        folder = tmp_path / "not" / "there"
        assert_same(fitted(optimizer=adam), fitted(optimizer=adam, checkpoint=folder, resume=True))
        assert [path.name for path in sorted(folder.glob("*.safetensors"))] == [
            f"step-{n:09d}.safetensors" for n in (10, 15, 20)
        ]

    def test_the_last_few_stay(self, tmp_path):
        fitted(checkpoint=tmp_path, every=4, keep=2)
        assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == [
            f"step-{n:09d}.safetensors" for n in (16, 20)
        ]

    def test_a_finished_fit_comes_back(self, tmp_path):
        settings = {"validation": X[:9], "patience": 1, "num_epochs": 30, "optimizer": fast}
        first = fitted(checkpoint=tmp_path, **settings)
        assert first.result.stopped_by == "patience"
        assert_same(first, fitted(checkpoint=tmp_path, resume=True, **settings))

    def test_what_a_callback_ended_goes_on(self, tmp_path):
        ended = fitted(optimizer=adam, checkpoint=tmp_path, callbacks=[stop])
        assert ended.result.stopped_by == "callback"
        assert len(ended.result.history) == 1
        assert_same(fitted(optimizer=adam), fitted(optimizer=adam, checkpoint=tmp_path, resume=True))

    def test_patience_is_that_of_now(self, tmp_path):
        settings = {"validation": X[:9], "num_epochs": 30, "optimizer": fast}
        first = fitted(checkpoint=tmp_path, patience=1, **settings)
        again = fitted(checkpoint=tmp_path, patience=5, resume=True, **settings)
        assert len(again.result.history) > len(first.result.history)
        assert_same(fitted(patience=5, **settings), again)

    def test_fewer_epochs_than_are_done(self, tmp_path):
        fitted(checkpoint=tmp_path)
        with pytest.raises(SettingError, match=r"4 epochs behind it, more than num_epochs=2"):
            fitted(checkpoint=tmp_path, num_epochs=2, resume=True)

    def test_two_fits_at_once(self, tmp_path):
        def meddle(event):
            with torch.random.fork_rng(), pytest.raises(FileError, match="Another fit that is running"):
                fitted(checkpoint=tmp_path, resume=True)

        assert_same(fitted(), fitted(checkpoint=tmp_path, callbacks=[meddle]))

    def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_before_the_fit_goes_on(self, tmp_path, monkeypatch):
        calls, fsync, replace = [], os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.fstat(file).st_mode), fsync(file)))
        monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
        AEVB(Plain()).save(tmp_path / "vi")
        file, rename, folder = calls
        assert (stat.S_ISREG(file), rename, stat.S_ISDIR(folder)) == (True, "rename", True)

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

    def test_other_rows_of_the_same_shape(self, folder):
        self.refuse(SettingError, r"data='float32 \[47, 3\], checksum", folder, -X)

    def test_another_objective(self, folder):
        self.refuse(SettingError, r"objective='SGVB' \(now 'IWELBO'\)", folder, objective=IWELBO(3))
        self.refuse(SettingError, r"settings of the objective", folder, objective=SGVB(2))

    def test_another_type_of_numbers(self, folder):
        program = fitted(model=Plain()).module.program
        before = copy.deepcopy(program.state_dict())
        with pytest.raises(FileError, match="shape or type"):
            load_tensors(program, {name: item.double() for name, item in before.items()}, "file")
        assert all(torch.equal(item, before[name]) for name, item in program.state_dict().items())

    def test_frozen_parameters(self, folder):
        model = Plain()
        model.decoder.bias.requires_grad_(False)
        self.refuse(SettingError, r"other parameters.*requires_grad_", folder, model=model)

    def test_states_of_callbacks(self, folder):
        self.refuse(FileError, r"0 callbacks, and 1 callbacks keep one", folder, callbacks=[Remembering()])

    def test_what_can_not_be_read_is_not_called_damaged(self, folder):
        (path,) = folder.glob("step-*")
        path.unlink()
        path.mkdir()
        with pytest.raises(FileError) as caught:
            fitted(model=Plain(), checkpoint=folder, resume=True)
        assert "Delete" not in str(caught.value)
        assert "Empty" not in str(caught.value)

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

    def test_names_that_come_to_the_same(self):
        values = {"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}, 1: torch.ones(1), "1": torch.zeros(1)}
        tensors = {}
        found = unpack(json.loads(json.dumps(pack(values, tensors, "x"))), tensors)
        assert found["a.b"].sum() == 2
        assert found["a"]["b"].sum() == 0
        assert (found[1].sum(), found["1"].sum()) == (1, 0)

    @pytest.mark.parametrize(
        "value", [np.complex128(1j), np.array(["a"]), np.array([object()]), np.arange(3, dtype=">i4")]
    )
    def test_arrays_that_torch_does_not_know(self, value):
        with pytest.raises(FileError, match="without pickle"):
            pack(value, {}, "state")

    def test_an_array_without_axes(self):
        tensors = {}
        found = unpack(pack(np.array(0.5), tensors, "x"), tensors)
        assert found.shape == ()
        assert found == 0.5

    def test_what_needs_pickle(self):
        with pytest.raises(FileError, match=r"'state\.a' is of type object.*without pickle"):
            pack({"a": object()}, {}, "state")
