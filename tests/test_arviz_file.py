"""Draws of all rows in a file: those that `posterior` gives, in ArviZ's groups, whole or not at all, in little memory."""

import resource
from functools import partial
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from torch import nn

from pyro_aevb import export_posterior, posterior, to_arviz
from pyro_aevb.arviz_file import new_file
from pyro_aevb.errors import DataError, FileError, SettingError
from pyro_aevb.testing import LinearGaussian, NormalNormal

ROWS = torch.linspace(-2.0, 2.0, 23)


def read(path: Path) -> xarray.Dataset:
    with xarray.open_dataset(path, group="posterior") as found:
        return found.load()


class TestDraws:
    @pytest.mark.parametrize("chunk_size", [1, 7, 23, 100, None])
    def test_they_are_the_posteriors(self, tmp_path, chunk_size):
        exact, _ = NormalNormal.fixture()
        guide = partial(exact.guide, data=ROWS)
        settings = {"num_samples": 5, "seed": 3, "chunk_size": chunk_size}
        expected = posterior(exact.model, guide, ROWS, **settings)
        path = export_posterior(exact.model, guide, ROWS, path=tmp_path / "draws.nc", **settings)
        found = read(path)
        assert found["z"].dims == ("chain", "draw", "row")
        np.testing.assert_array_equal(found["z"][0], expected["z"])
        np.testing.assert_array_equal(found["g"][0], expected["g"])  # one draw of the globals for all chunks
        assert found["z"].dtype == np.float32

    def test_groups_are_those_of_to_arviz(self, tmp_path):
        exact, _ = LinearGaussian.fixture()
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        path = export_posterior(
            exact.model, exact.guide, x, path=tmp_path / "draws.nc", num_samples=4, seed=0, chunk_size=5
        )
        expected = to_arviz(posterior(exact.model, exact.guide, x, num_samples=4, seed=0, chunk_size=5))
        found = az.from_netcdf(path)
        xarray.testing.assert_identical(found.posterior.load(), expected.posterior)
        assert found.posterior["z"].dims == ("chain", "draw", "row", "z_dim_0")
        assert set(az.summary(found, kind="stats").index) == set(az.summary(expected, kind="stats").index)

    def test_a_model_that_is_one_row(self, tmp_path):
        exact, x = NormalNormal.fixture()
        path = export_posterior(
            exact.model, exact.guide, x, path=tmp_path / "a.nc", num_samples=6, seed=0, data_plate=None
        )
        expected = posterior(exact.model, exact.guide, x, num_samples=6, seed=0, data_plate=None)
        np.testing.assert_array_equal(read(path)["z"][0], expected["z"])
        assert read(path)["z"].dims == ("chain", "draw", "z_dim_0")

    def test_a_model_that_draws_its_own_rows(self, tmp_path):
        def model(x):
            with pyro.plate("data", len(x), subsample_size=4) as index:
                z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        class Guide(nn.Module):
            def forward(self, x):
                with pyro.plate("data", len(x), subsample_size=4) as index:
                    pyro.sample("z", dist.Normal(x[index] / 2, 1e-6))

        path = export_posterior(model, Guide(), ROWS, path=tmp_path / "a.nc", num_samples=2, seed=0)
        np.testing.assert_allclose(read(path)["z"][0, 0], ROWS / 2, atol=1e-4)

    def test_rows_of_a_memory_map(self, tmp_path):
        exact, _ = NormalNormal.fixture()
        array = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=(23,))
        array[:] = ROWS.numpy()
        guide = partial(exact.guide, data=ROWS)
        settings = {"num_samples": 5, "seed": 3}
        path = export_posterior(
            exact.model,
            guide,
            np.memmap(tmp_path / "x", dtype=np.float32, mode="r"),
            path=tmp_path / "a.nc",
            **settings,
        )
        np.testing.assert_array_equal(read(path)["z"][0], posterior(exact.model, guide, ROWS, **settings)["z"])

    def test_blocks_hold_whole_slices(self, tmp_path):
        draws = np.arange(2.0 * 3 * 10).reshape(1, 2, 30)
        with new_file(tmp_path / "a.nc", {}) as file:
            for start in range(0, 30, 10):
                file.write(
                    "posterior",
                    "z",
                    draws[:, :, start : start + 10],
                    ("chain", "draw", "row"),
                    ("row", slice(start, start + 10), 30),
                )
        found = read(tmp_path / "a.nc")["z"]
        np.testing.assert_array_equal(found, draws)
        assert found.encoding["chunksizes"] == (1, 2, 10)


class TestWholeOrNotAtAll:
    def export(self, path, x=ROWS, num_samples=4, **settings):
        exact, _ = NormalNormal.fixture()
        return export_posterior(
            exact.model, partial(exact.guide, data=ROWS), x, path=path, num_samples=num_samples, **settings
        )

    @pytest.mark.parametrize(("limit", "num_samples"), [(100_000, 20_000), (1000, 4)])  # in the middle; on closing
    def test_a_full_disk_leaves_the_old_file(self, tmp_path, limit, num_samples):
        path = self.export(tmp_path / "draws.nc")
        old = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(FileError, match=r"draws\.nc.*unchanged"):
                self.export(path, num_samples=num_samples)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == old
        assert [entry.name for entry in tmp_path.iterdir()] == ["draws.nc"]

    def test_nothing_more_is_drawn_for_a_full_disk(self, tmp_path):
        calls = []

        def guide(x):
            calls.append(len(x))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.7))

        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            with pytest.raises(FileError):
                export_posterior(
                    model, guide, torch.zeros(1000), path=tmp_path / "a.nc", num_samples=20_000, chunk_size=10
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(calls) < 30  # of 100 chunks, and some to read the programs

    def test_a_fault_on_the_way_leaves_nothing(self, tmp_path):
        class FaultError(Exception):
            pass

        calls = []

        def guide(x):
            calls.append(len(x))
            if len(calls) > 12:
                raise FaultError
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.7))

        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

        with pytest.raises(FaultError):
            export_posterior(model, guide, ROWS, path=tmp_path / "a.nc", num_samples=2, chunk_size=1)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(FileError, match="folder"):
            self.export(tmp_path / "folder" / "draws.nc")

    def test_data_that_are_refused_leave_the_old_file(self, tmp_path):
        path = self.export(tmp_path / "draws.nc")
        old = path.read_bytes()
        with pytest.raises(DataError, match="row 22"):
            self.export(path, torch.cat([ROWS[:-1], torch.tensor([float("nan")])]))
        assert path.read_bytes() == old

    def test_a_site_whose_name_separates_groups(self, tmp_path):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("a/z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("a/z", dist.Normal(x / 2, 0.7))

        with pytest.raises(SettingError, match=r"\['a/z'\].*slash"):
            export_posterior(model, guide, ROWS, path=tmp_path / "a.nc")

    @pytest.mark.parametrize("settings", [{"num_samples": 0}, {"chunk_size": 0}, {"num_sample": 3}])
    def test_settings(self, tmp_path, settings):
        with pytest.raises(SettingError, match=next(iter(settings))):
            self.export(tmp_path / "a.nc", **({"num_samples": 4} | settings))
