"""Loggers of Fabric get the history and the bounds of steps."""

import csv
import struct

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger

from pyro_aevb import AEVB
from pyro_aevb.errors import AEVBWarning, SettingError
from pyro_aevb.testing import LinearGaussian

torch.manual_seed(0)
X = torch.randn(400, 6)


def fitted(**settings):
    return AEVB(LinearGaussian.fixture(torch.float32)[0].model).fit(
        X, num_epochs=2, batch_size=3, seed=0, progress=False, **settings
    )


def read_csv(folder):
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def read_events(path):
    """Return the scalars of an event file: records of length, checksum, message, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


class TestCSV:
    def test_history_and_steps(self, tmp_path):
        result = fitted(checkpoint=tmp_path, logger="csv")
        rows = read_csv(tmp_path / "csv")
        bounds = [float(row["bound"]) for row in rows if row["bound"]]
        assert bounds == pytest.approx([record["bound"] for record in result.history])
        assert [int(row["step"]) for row in rows if row["step_bound"]] == [100, 200]
        assert [int(row["step"]) for row in rows if row["bound"]] == [134, 268]

    def test_a_logger_of_ones_own(self, tmp_path):
        fitted(logger=[CSVLogger(tmp_path, name="mine")])
        assert read_csv(tmp_path / "mine")

    def test_those_of_fabric(self, tmp_path):
        fabric = Fabric(accelerator="cpu", devices=1, loggers=CSVLogger(tmp_path, name="fabric"))
        fitted(fabric=fabric)
        assert read_csv(tmp_path / "fabric")

    def test_below_logs(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fitted(logger="csv")
        assert read_csv(tmp_path / "logs" / "csv")


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    result = fitted(checkpoint=tmp_path, logger="tensorboard")
    (path,) = (tmp_path / "tensorboard").rglob("events*")
    events = read_events(path)
    bounds = [value for _, tag, value in events if tag == "bound"]
    assert bounds == pytest.approx([record["bound"] for record in result.history], rel=1e-6)
    assert [step for step, tag, _ in events if tag == "step_bound"] == [100, 200]


@pytest.mark.parametrize("logger", ["paper", 3, ["csv", "paper"]])
def test_what_is_no_logger(logger):
    with pytest.raises(SettingError, match=r"csv.*tensorboard.*got"):
        fitted(logger=logger)


class Full(CSVLogger):
    """A logger whose disk is full at its end, and that notes how it was told to end."""

    status = None

    def finalize(self, status):
        self.status = status
        raise OSError("No space left on device")


def test_a_logger_that_can_not_write_does_not_cost_the_fit(tmp_path):
    logger = Full(tmp_path)
    with pytest.warns(AEVBWarning, match="A logger could not write: No space left"):
        result = fitted(logger=logger)
    assert len(result.history) == 2
    assert logger.status == "success"


class Filling(CSVLogger):
    """A logger whose disk is full from its second record on."""

    num_records = 0

    def log_metrics(self, metrics, step=None):
        self.num_records += 1
        if self.num_records > 1:
            raise OSError("No space left on device")


def test_nor_does_one_that_can_not_write_in_the_middle(tmp_path):
    logger = Filling(tmp_path)
    with pytest.warns(AEVBWarning) as told:
        result = fitted(logger=[logger, "csv"], checkpoint=tmp_path)
    assert [str(item.message) for item in told] == [
        "A logger could not write: No space left on device. The history is in the result."
    ]
    assert len(result.history) == 2
    assert logger.num_records == 2, "it was asked again"
    (other,) = (tmp_path / "csv").rglob("metrics.csv")
    assert "200" in other.read_text(encoding="utf-8")


def test_a_logger_is_told_of_a_failure(tmp_path):
    def fail(event):
        raise RuntimeError("own")

    logger = Full(tmp_path)
    with pytest.warns(AEVBWarning, match="could not write"), pytest.raises(RuntimeError, match="own"):
        fitted(logger=logger, callbacks=[fail])
    assert logger.status == "failed"
