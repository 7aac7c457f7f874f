"""Data on disk: they are read where they lie, row by row, and give the numbers that they give in memory."""

import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from resident_memory import watched
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pyro_aevb import AEVB, SGVB, AutoAmortizedNormal, export_posterior, fit
from pyro_aevb.errors import DataError
from pyro_aevb.program.batch import to_tensor

ROWS, WIDTH = 500_000, 32
ALLOWED = 48e6
"""Own pages that a fit may need: the order of the rows, batches."""
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, WIDTH)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file of 64 MB, written in blocks."""
    path = tmp_path_factory.mktemp("data") / "x.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(ROWS, WIDTH))
    generator = np.random.default_rng(0)
    for start in range(0, ROWS, 100_000):
        array[start : start + 100_000] = generator.standard_normal((100_000, WIDTH), dtype=np.float32)
    array.flush()
    return path


def train(data, **settings):
    pyro.set_rng_seed(0)
    model = Model()
    vi = AEVB(model, AutoAmortizedNormal(model))
    vi.fit(data, **({"num_epochs": 1, "batch_size": 5000, "seed": 0, "progress": False, "compile": False} | settings))
    return vi


def small(path, mode="r"):
    return np.load(path, mmap_mode=mode)[:500]


def assert_same(a, b):
    for left, right in zip(a.module.parameters(), b.module.parameters(), strict=True):
        assert torch.equal(left, right)


@needs_linux
class TestMemory:
    def test_the_watch_sees_a_copy(self, path):
        with watched() as peak:
            copy = np.array(np.load(path, mmap_mode="r"))
            peak.wait()
        assert copy.nbytes > 1.2 * ALLOWED
        assert peak.growth > 1.2 * ALLOWED

    def test_a_fit_does_not_load_a_memory_map(self, path):
        train(small(path), batch_size=100)  # what is imported and made once
        with watched() as peak:
            vi = train(np.load(path, mmap_mode="r"))
        assert vi.result.num_steps == 100
        assert peak.growth < ALLOWED

    def test_nor_do_draws_of_all_rows(self, path, tmp_path):
        vi = train(small(path), batch_size=100)
        with watched() as peak:
            export_posterior(
                vi.model, vi.guide, np.load(path, mmap_mode="r"), path=tmp_path / "z.nc", num_samples=10, seed=0
            )
        assert peak.growth < ALLOWED
        assert (tmp_path / "z.nc").stat().st_size > 10 * ROWS * 2 * 4

    def test_a_tensor_of_a_file_of_safetensors_is_a_memory_map(self, path, tmp_path):
        save_file({"x": torch.from_numpy(np.array(np.load(path)))}, tmp_path / "x.safetensors")
        train(small(path), batch_size=100)
        with watched() as peak, safe_open(tmp_path / "x.safetensors", "pt") as file:
            train(file.get_tensor("x"))
        assert peak.growth < ALLOWED


class Slices(Dataset):
    """Rows of a file of safetensors, each read as a slice of it."""

    def __init__(self, path):
        self.file = safe_open(path, "pt")
        self.rows = self.file.__enter__().get_slice("x")

    def __len__(self):
        return self.rows.get_shape()[0]

    def __getitem__(self, index):
        return self.rows[index : index + 1][0]


class TestNumbers:
    @pytest.mark.parametrize("mode", ["r", "r+", "c"])
    def test_they_are_those_of_rows_in_memory(self, path, mode):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = train(small(path, mode), batch_size=100)
        assert_same(found, train(torch.from_numpy(np.array(small(path))), batch_size=100))

    def test_rows_of_a_dataset_of_slices(self, path, tmp_path):
        rows = torch.from_numpy(np.array(small(path)))
        save_file({"x": rows}, tmp_path / "x.safetensors")
        found = train(Slices(tmp_path / "x.safetensors"), batch_size=100)
        expected = train(Rows(rows), batch_size=100)
        assert_same(found, expected)

    def test_rows_of_hugging_faces_datasets(self, path):
        datasets = pytest.importorskip("datasets")
        rows = torch.from_numpy(np.array(small(path)))
        table = datasets.Dataset.from_dict({"x": rows.numpy()}).with_format("torch")
        expected = DataLoader([{"x": row} for row in rows], batch_size=100)
        assert_same(*(train(data, batch_size=None) for data in (DataLoader(table, batch_size=100), expected)))

    def test_nan_on_disk_is_found_in_its_row(self, tmp_path):
        array = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(300_000, WIDTH))
        array[250_001, 7] = np.nan
        array.flush()
        with pytest.raises(DataError, match="argument 0, row 250001"):
            train(np.load(tmp_path / "x.npy", mmap_mode="r"))


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class TestArrays:
    """What torch can't read in place is copied, and what would lose its meaning is refused."""

    @pytest.mark.parametrize(
        "view",
        [
            lambda array: array[::-1],
            lambda array: array[:, ::-2],
            lambda array: array.astype(">f4"),
            lambda array: np.asfortranarray(array),
            lambda array: array.view([("a", np.float32), ("b", np.float32)])["b"],
            lambda array: np.rec.fromarrays([array[:, 0], array[:, 1].astype(np.int8)], names="a,b")["a"],
            lambda array: np.broadcast_to(array[:1], array.shape),
        ],
    )
    def test_views(self, view):
        array = view(np.arange(24, dtype=np.float32).reshape(6, 4))
        found = to_tensor(array, "x")
        np.testing.assert_array_equal(found, array)
        assert found.dtype == torch.float32

    @pytest.mark.parametrize(
        ("array", "match"),
        [
            (np.array(["a", "b"]), "x, got an array of type <U1"),
            (np.array([object()]), "type object"),
            (np.array(["2026-11-30"], dtype="datetime64[D]"), "datetime64"),
            (np.ones(3, dtype=np.longdouble), "float128|longdouble"),
            (np.array([""]), "<U"),
            (np.ma.masked_array([1.0, 2.0], mask=[True, False]), r"masked array as x.*obs_mask"),
        ],
    )
    def test_what_is_refused(self, array, match):
        with pytest.raises(DataError, match=match):
            to_tensor(array, "x")

    def test_masked_arrays_are_refused_by_every_door(self):
        array = np.ma.masked_array(np.ones((10, WIDTH), dtype=np.float32), mask=np.eye(10, WIDTH))
        model = Model()
        with pytest.raises(DataError, match="mask"):
            fit(model, AutoAmortizedNormal(model), SGVB(), array, progress=False)
        with pytest.raises(DataError, match="mask"):
            AEVB(model).posterior(array)
