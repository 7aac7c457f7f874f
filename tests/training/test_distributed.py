"""Two processes, real ones: their gradient is that of the joined batch, they stay equal, and none waits for a dead one."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_program as program
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_aevb.program.processes import Processes, fork_seed
from pyro_aevb.program.scaling import DataPlateScale, Shard
from pyro_aevb.training.data import as_source
from pyro_aevb.training.sharding import share

SCRIPT = Path(program.__file__)
EXAMPLE = str(SCRIPT.parents[1] / "examples" / "distributed.py")
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SECONDS_TO_END = 60
"""Within which a process must have ended once another has; it takes about a second."""


def run_both(what, folder):
    """Run the script by two processes, and return what each of them found."""
    done = subprocess.run(
        [sys.executable, SCRIPT, what, folder], env=os.environ | ALONE, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_both("checks", tmp_path_factory.mktemp("checks"))


class TestGradient:
    @pytest.mark.parametrize("count", program.ROWS, ids=lambda count: f"{count} rows")
    @pytest.mark.parametrize("name", program.LAWS)
    def test_is_that_of_the_joined_batch(self, found, name, count):
        self.compare(found, (name, count), program.law_module(name), count)

    def test_is_that_of_the_joined_batch_where_nobody_knows_the_number_of_rows(self, found):
        module = program.law_module("no globals", num_data=None)
        self.compare(found, ("unknown number", 5), module, 5)

    @staticmethod
    def compare(found, key, module, count):
        loss, bound = module.loss_and_bound(*program.law_rows(count))
        loss.backward()
        for own in found:
            told, gradients = own["laws"][key]
            assert told == pytest.approx(bound.item(), rel=1e-12)
            for name, parameter in module.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12)
        for name, gradient in found[0]["laws"][key][1].items():
            assert torch.equal(gradient, found[1]["laws"][key][1][name])


class TestScale:
    @pytest.mark.parametrize("is_sized", [False, True])
    @pytest.mark.parametrize("rows", [1, 3, 5])
    def test_is_num_data_times_processes_over_the_rows_of_the_batch(self, is_sized, rows):
        assert self.site(is_sized, rows, Shard(rows, 8, 4))["scale"] == pytest.approx(program.NUM_DATA * 4 / 8)

    def test_is_the_number_of_processes_where_nobody_knows_the_number_of_rows(self):
        assert self.site(False, 3, Shard(3, 8, 4), num_data=None)["scale"] == pytest.approx(4)

    def test_is_the_same_for_a_row_that_stands_in_and_is_masked(self):
        site = self.site(False, 1, Shard(0, 8, 4))
        assert site["scale"] == pytest.approx(program.NUM_DATA * 4 / 8)
        assert not site["mask"].any()

    def test_of_globals_is_one(self):
        assert self.site(False, 3, Shard(3, 8, 4), name="g")["scale"] == 1.0

    @staticmethod
    def site(is_sized, rows, shard, num_data=program.NUM_DATA, name="x"):
        model = program.Hierarchy(has_globals=True, is_sized=is_sized).model
        with DataPlateScale("data", num_data, shard):
            return poutine.trace(model).get_trace(*program.law_rows(rows)).nodes[name]


class TestBatches:
    def test_are_those_of_one_process_with_more_rows_in_a_batch(self, found):
        source = as_source(torch.arange(23.0), 8)
        whole = [batch.args[0].tolist() for batch in source.batches(torch.Generator().manual_seed(5))]
        for kind in ("tensor", "dataset"):
            told = [own["batches"][kind]["batches"] for own in found]
            assert [first[0] + second[0] for first, second in zip(*told, strict=True)] == whole
            assert [[rows for _, rows, _ in own] for own in told] == [[4, 4, 4], [4, 4, 3]]
            assert [[rows for *_, rows in own] for own in told] == [[8, 8, 7]] * 2
            assert [own["batches"][kind]["num_batches"] for own in found] == [3, 3]

    def test_can_be_entered_in_the_middle(self, found):
        for own in found:
            assert own["batches"]["skipping"]["batches"] == own["batches"]["tensor"]["batches"][1:]

    def test_keep_the_order_where_one_holds_all_rows(self, found):
        assert [own["batches"]["one batch"]["batches"] for own in found] == [
            [([0.0, 1.0, 2.0], 3, 5)],
            [([3.0, 4.0], 2, 5)],
        ]

    @pytest.mark.parametrize("order", ["loader", "sampler"])
    def test_of_a_loader_hold_every_row_once_in_another_order_each_epoch(self, found, order):
        orders = []
        for epoch in range(2):
            told = [own["batches"][order][epoch] for own in found]
            rows = [row for own in told for batch in own for row in batch[0]]
            assert sorted(rows) == list(range(23))
            assert [[rows for *_, rows in own] for own in told] == [[8, 8, 7]] * 2
            orders.append(rows)
        assert orders[0] != orders[1]
        assert [own["batches"]["loader's rows"] for own in found] == [23, 23]

    def test_of_streams_last_as_long_as_any(self, found):
        first, second = (own["batches"]["stream"]["batches"] for own in found)
        assert [batch[1:] for batch in first] == [(2, 4), (0, 2), (0, 2), (0, 1)]
        assert [batch[1:] for batch in second] == [(2, 4), (2, 2), (2, 2), (1, 1)]
        assert [row for rows, *_ in second for row in rows] == list(range(100, 107))

    def test_of_one_process_are_left_alone(self):
        source = as_source(torch.arange(5.0), 2)
        assert share(source, Processes(None)) is source


class TestFit:
    def test_bounds_are_those_of_all_rows(self, found):
        normal = dist.Normal(0.5, 1.0)
        for own in found:
            record = own["bounds"]["history"]
            assert record["bound"] == pytest.approx(normal.log_prob(program.TRAINED).mean().item(), rel=1e-5)
            assert record["validation_bound"] == pytest.approx(
                normal.log_prob(program.HELD_OUT).mean().item(), rel=1e-5
            )
            assert own["bounds"]["num_steps"] == 3

    def test_a_step_descends_the_gradient_of_the_whole_data_set(self, found):
        step = 1e-3 * (program.TRAINED - 0.5).sum().item()
        for own in found:
            assert own["bounds"]["theta"] == pytest.approx(0.5 + step, rel=1e-5)

    def test_a_loss_of_one_process_that_is_not_finite_is_skipped_by_all(self, found):
        for own in found:
            assert (own["skipping"]["num_steps"], own["skipping"]["num_skipped"]) == (6, 3)
            assert math.isfinite(own["skipping"]["theta"])
            assert own["skipping"]["error"][0] == "NonFiniteError"
        assert found[0]["skipping"]["theta"] == found[1]["skipping"]["theta"] != 0.5
        assert "site 'x'" in found[1]["skipping"]["error"][1]
        assert "other processes' errors" in found[0]["skipping"]["error"][1]

    @pytest.mark.parametrize("name", ["seed", "no seed"])
    def test_parameters_are_equal_in_all_processes_and_noise_is_each_ones_own(self, found, name):
        first, second = (own["fits"][name] for own in found)
        for key, value in first["parameters"].items():
            assert torch.equal(value, second["parameters"][key]), key
        assert first["bounds"] == second["bounds"]
        assert not set(first["drawn"]) & set(second["drawn"])

    def test_running_statistics_are_those_of_the_first_ones_rows_in_all(self, found):
        first, second = (own["buffers"] for own in found)
        rows = first["own rows"]  # all rows are one batch, which keeps their order
        torch.testing.assert_close(first["mean"], 0.1 * rows.mean()[None])
        torch.testing.assert_close(first["variance"], 0.9 + 0.1 * rows.var()[None])
        for name in ("mean", "variance", "draws"):
            assert torch.equal(first[name], second[name]), name

    def test_one_seed_gives_one_result(self, found):
        for own in found:
            assert own["fits"]["seed"]["bounds"] == own["fits"]["again"]["bounds"] != own["fits"]["no seed"]["bounds"]
            for key, value in own["fits"]["seed"]["parameters"].items():
                assert torch.equal(value, own["fits"]["again"]["parameters"][key]), key

    @pytest.mark.parametrize("data", ["tensor", "loader", "sampler"])
    def test_a_continued_one_ends_as_an_undisturbed_one(self, found, data):
        for own in found:
            undisturbed, continued = own["resuming"][data]["undisturbed"], own["resuming"][data]["continued"]
            assert continued["bounds"] == undisturbed["bounds"]
            for key, value in undisturbed["parameters"].items():
                assert torch.equal(value, continued["parameters"][key]), key

    def test_a_callback_of_one_process_ends_the_fit_of_all(self, found):
        assert [own["fits"]["stopped"] for own in found] == [("callback", 2)] * 2

    @pytest.mark.parametrize(
        ("what", "kind", "advice"),
        [
            ("batches of one's own", "SettingError", "Give the Dataset itself with batch_size="),
            ("batches of torch's", "SettingError", "Give the Dataset itself with batch_size="),
            ("rows drawn again", "SettingError", "every row once"),
            ("a guide of rows", "GuideError", "in one process"),
            ("an idle parameter", "SettingError", "ddp_find_unused_parameters_true"),
        ],
    )
    def test_refuses(self, found, what, kind, advice):
        for own in found:
            assert own["refusals"][what][0] == kind
            assert advice in own["refusals"][what][1]


class TestInference:
    @pytest.mark.parametrize(
        "door", ["posterior", "posterior of one chunk", "predict", "embed", "reconstruct", "importance", "quadrature"]
    )
    def test_is_that_of_one_process(self, found, door):
        compare_with_one(found, "inference", door)

    def test_without_a_seed_all_have_the_same_draws(self, found):
        first, second = (own["inference"]["no seed"] for own in found)
        assert {name: value.shape for name, value in first.items()} == {"g": (40,), "z": (40, 31)}
        assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_one_process_may_have_the_strategy_of_many():
    """As a script has that is told the number of its processes, or finds one GPU; a group of one is started by itself."""
    code = """
import torch
from lightning_fabric import Fabric
from distributed_program import Latent, latent_rows
from pyro_aevb import AEVB
bounds = []
for fabric in (Fabric(accelerator="cpu", devices=1, strategy="ddp"), None):
    vi = AEVB(Latent().model)
    vi.fit(latent_rows(45), num_epochs=2, batch_size=10, seed=0, fabric=fabric, progress=False, compile=False)
    bounds.append([record["bound"] for record in vi.result.history])
    bounds.append(vi.posterior(latent_rows(3), num_samples=2, seed=0, fabric=fabric)["z"].tolist())
assert bounds[:2] == bounds[2:], bounds
torch.distributed.destroy_process_group()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | ALONE | {"PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def compare_with_one(found, check, door):
    together, alone = found[0][check][door]
    assert together
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(value, found[1][check][door][0][name], rtol=0.0, atol=0.0, equal_nan=True)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return run_both("slow", tmp_path_factory.mktemp("slow"))


@pytest.mark.slow
class TestSlow:
    def test_compiled_steps_give_the_numbers_of_eager_ones(self, slow):
        for own in slow:
            compiled, eager = own["compiled"][True], own["compiled"][False]
            assert compiled["execution"].startswith("compiled: loss and gradient")
            for name, value in compiled["parameters"].items():
                torch.testing.assert_close(value, eager["parameters"][name], rtol=1e-3, atol=1e-4)
                assert torch.equal(value, slow[1]["compiled"][True]["parameters"][name])

    @pytest.mark.parametrize("door", ["ais", "hmc", "hmc, learned length"])
    def test_chains_are_those_of_one_process(self, slow, door):
        compare_with_one(slow, "chains", door)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("fabric", "run", "--accelerator=cpu", "--devices=2", "--strategy=ddp", EXAMPLE),
        ("torchrun", "--nproc_per_node=2", EXAMPLE, "--accelerator=cpu"),
        ("python", EXAMPLE, "--accelerator=cpu", "--devices=2"),
        ("python", EXAMPLE, "--accelerator=cpu"),
    ],
    ids=["fabric run", "torchrun", "by itself", "one process"],
)
def test_the_example_runs(launcher):
    command = [Path(sys.executable).parent / launcher[0], *launcher[1:], "--groups=1000", "--epochs=60"]
    done = subprocess.run(command, env=os.environ | ALONE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    count = 2 if any("2" in flag for flag in launcher[1:] if flag is not EXAMPLE) else 1
    assert done.stdout.count(f"{count} processes: FitResult") == 1
    mu, tau = (float(re.search(rf"^{name}: (\S+)", done.stdout, re.MULTILINE)[1]) for name in ("mu", "tau"))
    # 1,000 groups of spread 2 tell their mean to 0.07 and their spread to 0.05, the guide within as much again
    assert abs(mu - 1.0) < 0.4
    assert abs(tau - 2.0) < 0.4


@pytest.mark.slow
class TestDeath:
    @pytest.fixture
    def training(self, tmp_path):
        """Start two processes that train without end, each by itself, as a cluster does; end them afterwards."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []

        def start(**settings):
            for rank in range(2):
                own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
                command = [sys.executable, SCRIPT, "endless", tmp_path]
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                environment = os.environ | ALONE | own | settings
                started.append(subprocess.Popen(command, env=environment, **quiet))
            wait_for(lambda: all((tmp_path / f"epoch{rank}").exists() for rank in range(2)), 300)
            return started

        yield start
        for process in started:
            process.kill()
            process.wait()

    def test_the_others_end_with_an_error_soon_after_a_kill(self, training, tmp_path):
        processes = training()
        processes[1].kill()
        assert processes[0].wait(SECONDS_TO_END) == 1
        message = (tmp_path / "error0").read_text()
        assert message.startswith("ProcessError: Process 0 of 2 waited for another that has ended")

    def test_the_first_may_be_the_one_that_dies(self, training, tmp_path):
        processes = training()
        processes[0].kill()
        assert processes[1].wait(SECONDS_TO_END) == 1
        assert (tmp_path / "error1").read_text().startswith("ProcessError: Process 1 of 2 waited")

    def test_one_that_answers_no_more_is_waited_for_until_the_timeout(self, training, tmp_path):
        processes = training(TIMEOUT="5")
        processes[1].send_signal(signal.SIGSTOP)
        assert processes[0].wait(SECONDS_TO_END) == 1
        assert "did not answer within the process group's timeout" in (tmp_path / "error0").read_text()


def wait_for(condition, seconds):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "the processes did not start to train"
        time.sleep(0.1)


def test_seeds_of_parts_lie_apart_and_are_torchs():
    seeds = {fork_seed(seed, number) for seed in (0, 1, 2**62) for number in range(1000)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)
