"""What a fit survives, each tried for real: killed processes, full disks, damaged files, dead workers, batches of NaN, signals."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import threading
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from pyro_aevb import AEVB
from pyro_aevb.errors import AEVBWarning, DataError, FileError
from pyro_aevb.training.files import read_file
from pyro_aevb.training.interruption import Interruption

torch.manual_seed(2)
X = torch.randn(95, 3)
NUM_EPOCHS, NUM_STEPS = 4, 40

fork = multiprocessing.get_context("fork")


class Model(nn.Module):
    """A network of some size, so that writing it takes a while."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(7)
        self.decoder = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 3))
        self.ballast = nn.Parameter(torch.zeros(width, width))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            loc = self.decoder(z) + self.ballast.sum()
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def fitted(data=X, *, width=16, after_step=None, **settings):
    """Fit anew, calling a function after each of the optimizer's steps."""
    pyro.clear_param_store()
    vi = AEVB(Model(width), compile=settings.pop("compile", False))

    def optimizer(parameters):
        made = Adam(parameters, lr=0.01)
        if after_step is not None:
            made.register_step_post_hook(lambda *_: after_step())
        return made

    if not isinstance(data, DataLoader):
        settings = {"batch_size": 10} | settings
    vi.fit(data, **{"num_epochs": NUM_EPOCHS, "seed": 3, "progress": False, "optimizer": optimizer} | settings)
    return vi


def assert_same(a, b):
    left, right = a.module.state_dict(), b.module.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    assert [record["bound"] for record in a.result.history] == [record["bound"] for record in b.result.history]


@pytest.fixture(scope="module")
def undisturbed():
    return fitted()


class Slow(torch.utils.data.IterableDataset):
    """A stream that dries up for a minute after twenty rows."""

    def __iter__(self):
        yield from X[:20]
        time.sleep(60)
        yield from X[20:]


class Lasting(TensorDataset):
    """Rows that take a while."""

    def __getitem__(self, index):
        time.sleep(0.002)
        return super().__getitem__(index)


def in_child(folder, pipe, settings):
    """Fit in a process of its own that tells each step."""
    os.setpgrp()
    try:
        fitted(checkpoint=folder, resume=True, after_step=lambda: pipe.send(1), **settings)
    except SystemExit as error:
        os._exit(error.code)
    os._exit(0)


def started(folder, **settings):
    """Start a fit in a process; return it and what it tells."""
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=in_child, args=(folder, sender, settings))
    child.start()
    sender.close()
    return child, receiver


def wait_for_steps(pipe, count):
    for _ in range(count):
        pipe.recv()


def ended(child):
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def steps_of(folder):
    return [int(path.stem[5:]) for path in sorted(folder.glob("step-*.safetensors"))]


class TestKilled:
    def kill_and_continue(self, folder, after, delay, **settings):
        child, pipe = started(folder, every=3, **settings)
        wait_for_steps(pipe, after)
        time.sleep(delay)
        child.kill()
        assert ended(child) == -signal.SIGKILL
        return fitted(checkpoint=folder, every=3, resume=True, **settings)

    @pytest.mark.parametrize("after", [2, 17, 33])
    def test_continues_as_if_nothing_had_been(self, after, undisturbed, tmp_path):
        assert_same(undisturbed, self.kill_and_continue(tmp_path, after, 0.0))

    @pytest.mark.slow
    def test_twenty_times(self, undisturbed, tmp_path):
        places = random.Random(0)
        for number in range(20):
            after, delay = places.randrange(1, NUM_STEPS - 5), places.uniform(0.0, 0.004)
            assert_same(undisturbed, self.kill_and_continue(tmp_path / str(number), after, delay))

    @pytest.mark.slow
    def test_again_and_again(self, undisturbed, tmp_path):
        places = random.Random(1)
        for _ in range(12):
            child, pipe = started(tmp_path, every=2)
            wait_for_steps(pipe, places.randrange(1, 6))
            child.kill()
            ended(child)
        assert_same(undisturbed, fitted(checkpoint=tmp_path, every=2, resume=True))

    def test_while_writing(self, tmp_path):
        width = 1500  # 9 MB, and as much twice for the optimizer
        undisturbed = fitted(width=width, num_epochs=1)
        child, pipe = started(tmp_path, every=2, width=width, num_epochs=1)
        wait_for_steps(pipe, 5)
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob(".step-*")) and time.monotonic() < deadline:
            pass
        child.kill()
        ended(child)
        assert steps_of(tmp_path)
        assert_same(undisturbed, fitted(width=width, num_epochs=1, checkpoint=tmp_path, every=2, resume=True))
        (tmp_path / ".step-000000099.safetensors.1.2").write_text("half")
        fitted(width=width, num_epochs=2, checkpoint=tmp_path, every=2, resume=True)
        assert not list(tmp_path.glob(".step-*"))  # what was left over is gone


@pytest.fixture
def heard():
    """Let Ctrl-C be heard, also where the tests were started in the background by a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
class TestSignals:
    def test_sigterm_writes_a_checkpoint_and_says_so(self, undisturbed, tmp_path):
        child, pipe = started(tmp_path, every=1000)
        wait_for_steps(pipe, 7)
        os.kill(child.pid, signal.SIGTERM)
        assert ended(child) == 143
        assert len(steps_of(tmp_path)) == 1
        assert 7 <= steps_of(tmp_path)[0] < NUM_STEPS
        assert_same(undisturbed, fitted(checkpoint=tmp_path, resume=True))

    def test_a_handler_of_the_users_is_called_after_it(self, undisturbed, tmp_path):
        calls = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append((number, steps_of(tmp_path))))
        try:
            vi = fitted(checkpoint=tmp_path, after_step=after(7, lambda: signal.raise_signal(signal.SIGTERM)))
        finally:
            signal.signal(signal.SIGTERM, before)
        assert calls == [(signal.SIGTERM, [7])]
        assert vi.result.stopped_by == "sigterm"
        assert_same(undisturbed, fitted(checkpoint=tmp_path, resume=True))

    def test_ctrl_c_finishes_the_step(self, undisturbed, tmp_path):
        vi = fitted(checkpoint=tmp_path, after_step=after(7, lambda: signal.raise_signal(signal.SIGINT)))
        assert vi.result.stopped_by == "interrupt"
        assert vi.result.num_steps == 7
        assert steps_of(tmp_path) == [7]
        assert_same(undisturbed, fitted(checkpoint=tmp_path, resume=True))

    def test_a_second_ctrl_c_does_not_wait(self, tmp_path):
        def twice():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second one was not obeyed")

        vi = fitted(checkpoint=tmp_path, after_step=after(7, twice))
        assert vi.result.stopped_by == "interrupt"
        assert steps_of(tmp_path) == []

    def test_inside_an_epoch_of_a_given_loader(self, tmp_path):
        def make(**settings):
            loader = DataLoader(TensorDataset(X), 10, shuffle=True)
            return fitted(loader, checkpoint=tmp_path, **settings)

        with pytest.warns(AEVBWarning, match="begins with epoch 2 anew"):
            make(after_step=after(17, lambda: signal.raise_signal(signal.SIGINT)))
        assert steps_of(tmp_path) == [10]
        assert_same(fitted(DataLoader(TensorDataset(X), 10, shuffle=True)), make(resume=True))

    def test_while_a_stream_gives_nothing(self, tmp_path):
        child, pipe = started(tmp_path, data=Slow(), every=1, num_epochs=1)
        wait_for_steps(pipe, 2)
        time.sleep(0.3)  # it waits for the third batch
        begun = time.monotonic()
        os.kill(child.pid, signal.SIGTERM)
        assert ended(child) == 143
        assert time.monotonic() - begun < 15  # and not the minute that the row would take
        assert steps_of(tmp_path) == [1, 2]

    def test_to_workers_too(self, tmp_path):
        child, pipe = started(tmp_path, data=DataLoader(Lasting(X), 10, num_workers=1), num_epochs=9)
        wait_for_steps(pipe, 12)
        os.killpg(child.pid, signal.SIGTERM)
        assert ended(child) == 143

    def test_ignored_ones_stay_ignored(self, undisturbed, tmp_path):
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            vi = fitted(checkpoint=tmp_path, after_step=after(7, lambda: signal.raise_signal(signal.SIGTERM)))
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGTERM, before)
        assert_same(undisturbed, vi)

    def test_without_checkpoints_they_act_as_ever(self):
        seen = []
        before = signal.getsignal(signal.SIGTERM)
        fitted(num_epochs=1, after_step=lambda: seen.append(signal.getsignal(signal.SIGTERM)))
        assert set(seen) == {before}

    def test_handlers_are_put_back(self, tmp_path):
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        fitted(checkpoint=tmp_path, num_epochs=1)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

    def test_in_another_thread(self, undisturbed, tmp_path):
        found = []
        thread = threading.Thread(target=lambda: found.append(fitted(checkpoint=tmp_path)))
        thread.start()
        thread.join()
        assert_same(undisturbed, found[0])


def after(count, act):
    """Return what acts at its count-th call."""
    calls = []

    def call():
        calls.append(1)
        if len(calls) == count:
            act()

    return call


class TestFullDisk:
    def test_a_limit_on_files(self, undisturbed, tmp_path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        seen = []

        def limit():
            seen.append({name: value.clone() for name, value in models[0].items()})
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

        models = []
        pyro.clear_param_store()
        vi = AEVB(Model(), compile=False)

        def optimizer(parameters):
            made = Adam(parameters, lr=0.01)
            models.append(vi.module.state_dict())
            made.register_step_post_hook(lambda *_: act())
            return made

        act = after(6, limit)
        try:
            with pytest.raises(FileError, match=r"step-000000006.*unchanged.*still in memory.*Make room"):
                vi.fit(
                    X,
                    num_epochs=NUM_EPOCHS,
                    batch_size=10,
                    seed=3,
                    progress=False,
                    optimizer=optimizer,
                    checkpoint=tmp_path,
                    every=2,
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert steps_of(tmp_path) == [2, 4]
        for name, value in vi.module.state_dict().items():
            assert torch.equal(value, seen[0][name]), name
        vi.save(tmp_path / "elsewhere")  # as the message says
        loaded = AEVB.load(tmp_path / "elsewhere", Model())
        draws, again = (item.posterior(X[:4], num_samples=3, seed=0)["z"] for item in (vi, loaded))
        assert torch.equal(draws, again)
        assert_same(undisturbed, fitted(checkpoint=tmp_path, every=2, resume=True))

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
    def test_a_small_disk(self, tmp_path):
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path], capture_output=True)
        if made.returncode:
            pytest.skip("a small disk can't be mounted here")
        try:
            with pytest.raises(FileError, match="Make room"):
                fitted(width=64, checkpoint=tmp_path, every=1, keep=100)
            assert steps_of(tmp_path)
            for path in tmp_path.glob("step-*"):
                read_file(path)
        finally:
            subprocess.run(["umount", tmp_path], check=True)


class TestDamage:
    def test_one_flipped_byte(self, undisturbed, tmp_path):
        fitted(checkpoint=tmp_path, every=5, num_epochs=1)
        latest = max(tmp_path.glob("step-*"))
        whole = latest.read_bytes()
        latest.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
        with pytest.raises(FileError, match=r"step-000000010.*damaged.*Delete it to continue from step-000000005"):
            fitted(checkpoint=tmp_path, every=5, resume=True)
        latest.unlink()
        assert_same(undisturbed, fitted(checkpoint=tmp_path, every=5, resume=True))

    def test_the_only_one(self, tmp_path):
        fitted(checkpoint=tmp_path, num_epochs=1)
        (path,) = tmp_path.glob("step-*")
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(FileError, match="Empty the folder"):
            fitted(checkpoint=tmp_path, resume=True)


class TestPublishing:
    """What the thread that waits for the disk can't write: a folder stands where the file should be."""

    def fitted_with_a_folder_at(self, number, tmp_path):
        place = tmp_path / f"step-{number:09d}.safetensors"
        return fitted(checkpoint=tmp_path, after_step=lambda: place.mkdir(exist_ok=True))

    def test_is_told_at_the_next_checkpoint(self, tmp_path):
        with pytest.raises(FileError, match=r"Could not write .*step-000000020"):
            self.fitted_with_a_folder_at(20, tmp_path)
        assert [path.name for path in tmp_path.glob("step-*") if path.is_file()] == ["step-000000010.safetensors"]
        assert not list(tmp_path.glob(".step-*"))

    def test_is_told_at_the_end(self, tmp_path):
        with pytest.raises(FileError, match=r"Could not write .*step-000000040"):
            self.fitted_with_a_folder_at(40, tmp_path)


class DyingDataset(TensorDataset):
    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None and index == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class TestData:
    def test_a_worker_that_dies(self, tmp_path):
        loader = DataLoader(DyingDataset(X), 10, num_workers=1)
        vi = AEVB(Model(), compile=False)
        with pytest.raises(DataError, match=r"worker.*died, after step \d"):
            vi.fit(loader, num_epochs=2, seed=0, progress=False, checkpoint=tmp_path)
        assert all(torch.isfinite(value).all() for value in vi.module.state_dict().values())

    def test_a_worker_whose_death_is_noticed_twice(self):
        def raising(number, frame):
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

        before = signal.signal(signal.SIGCHLD, raising)
        try:
            with Interruption() as interruption:
                late = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGCHLD))
                late.start()
                assert not interruption.comes_soon()
                late.join()
        finally:
            signal.signal(signal.SIGCHLD, before)

    def test_nan_in_the_middle(self, tmp_path):
        class Holed(TensorDataset):
            def __getitem__(self, index):
                (row,) = super().__getitem__(index)
                return row * float("nan") if index == 42 else row

        with pytest.warns(AEVBWarning, match="4 of 40 steps were skipped"):
            whole = fitted(Holed(X))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AEVBWarning)
            fitted(Holed(X), checkpoint=tmp_path, every=1, num_epochs=2)
            again = fitted(Holed(X), checkpoint=tmp_path, every=1, resume=True)
        assert_same(whole, again)
        assert again.result.num_skipped == 4
